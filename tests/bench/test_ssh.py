"""`--device ssh:`, with a real sshd on this machine's loopback and, where root may make one, another user."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mobilemm.bench import board
from mobilemm.bench.result import Settings
from mobilemm.bench.ssh import bench_over_ssh
from mobilemm.errors import MobileMMError

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
SETTINGS = Settings(prompt_tokens=8, new_tokens=2, images=1, runs=1, threads=1)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(SSHD).exists(), reason="there is no sshd: apt-get install openssh-server"),
]


@dataclass
class Server:
    """An sshd of the test's own."""

    folder: Path
    user: str
    port: int
    home: Path  # what the user may read; pytest's own folders close themselves to others
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{self.user}@127.0.0.1:{self.port}"

    def start(self, host_key: str) -> None:
        self.stop()
        config = self.folder / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder / host_key}\n"
            f"AuthorizedKeysFile {self.home / 'login.pub'}\nPidFile none\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        )
        os.makedirs("/run/sshd", exist_ok=True)
        self.process = subprocess.Popen([SSHD, "-D", "-e", "-f", config], stderr=subprocess.DEVNULL)
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        pytest.fail("sshd did not start")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def running(self) -> list[str]:
        """Command lines of what the measuring left running there."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if process.stat().st_uid == pwd.getpwnam(self.user).pw_uid and "mobilemm.bench" in line:
                    found.append(line)
        return found


@pytest.fixture(scope="module")
def user() -> Iterator[str]:
    """Another one than the test's, where that may be."""
    if os.geteuid():
        yield pwd.getpwuid(os.geteuid()).pw_name
        return
    name = f"mm{uuid.uuid4().hex[:8]}"
    # A password that nothing matches; without one, sshd calls the account locked.
    command = ["useradd", "--create-home", "--shell", "/bin/sh", "--password", "*", name]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield name
    finally:
        subprocess.run(["userdel", "--remove", "--force", name], capture_output=True)


@pytest.fixture(scope="module")
def server(user: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sshd")
    home = Path(pwd.getpwnam(user).pw_dir) if os.geteuid() == 0 else folder
    for name in ("host_key", "other_host_key", "login"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    if home != folder:
        shutil.copy(folder / "login.pub", home)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = Server(folder, user, port, home)
    made.start("host_key")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def ssh(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """How ssh is called: with the server's key, and a file of known hosts of its own."""

    def use(known: str = "known_hosts", checking: str = "accept-new", login: str = "login") -> None:
        options = {
            "UserKnownHostsFile": server.folder / known,
            "StrictHostKeyChecking": checking,
            "IdentityFile": server.folder / login,
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
        }
        flags = " ".join(f"-o {name}={value}" for name, value in options.items())
        monkeypatch.setenv("MOBILEMM_SSH", f"ssh -F /dev/null {flags}")

    use()
    return use


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("MOBILEMM_CACHE", str(folder))
        yield folder


def own_python(server: Server) -> str:
    """One that the other user may run."""
    found = shutil.which("python3.11", path="/usr/local/bin:/usr/bin:/bin")
    return found or (sys.executable if os.geteuid() else "python3")


def test_a_bundle_is_measured_there(
    server: Server, ssh: Callable[..., None], cache: Path, bundle: Path
) -> None:
    """Paths with spaces at both ends; packages, code and bundle sent once, and what changed again."""
    assert " " in bundle.name
    place = server.home / "my benchmarks"
    said: list[str] = []

    def run() -> Any:
        said.clear()
        return bench_over_ssh(bundle, SETTINGS, server.address, said.append, str(place), own_python(server))

    result = run()
    assert result.device == f"ssh:{server.address}"
    assert {"load_cold", "ttft", "pp8", "tg2", "memory"} <= {figure.name for figure in result.figures}
    assert any(line.startswith("sending packages") for line in said)
    assert any(line.startswith("sending the bundle") for line in said)
    there = place / "bundles" / bundle.name
    assert (there / "manifest.json").read_bytes() == (bundle / "manifest.json").read_bytes()
    assert there.stat().st_uid == pwd.getpwnam(server.user).pw_uid
    assert not server.running()

    (there / "tokenizer.json").write_text("{}")
    (there / "parts" / "stray.onnx").write_text("of another export")
    assert run().bundle.digest == result.bundle.digest
    sent = [line for line in said if line.startswith("sending")]
    assert len(sent) == 1
    assert "the bundle" in sent[0]
    assert "file 1 of 1" in sent[0]
    assert not (there / "parts" / "stray.onnx").exists()


def test_a_cut_connection_leaves_nothing_running(
    server: Server, ssh: Callable[..., None], cache: Path, bundle: Path
) -> None:
    long = Settings(prompt_tokens=64, new_tokens=128, runs=500, threads=1)
    errors: list[str] = []

    def measure() -> None:
        try:
            bench_over_ssh(bundle, long, server.address, folder="~/cut", python=own_python(server))
        except MobileMMError as error:
            errors.append(str(error))

    thread = threading.Thread(target=measure)
    thread.start()
    wait_until(lambda: any("bench.runner" in line for line in server.running()), 120)
    # Of this connection; the one that listens goes on.
    subprocess.run(["pkill", "-KILL", "-f", f"sshd: {server.user}"], check=True)
    thread.join(30)
    assert not thread.is_alive()
    assert "the connection was lost" in errors[0]
    wait_until(lambda: not server.running(), 10)


def test_silence_is_a_lost_connection(tmp_path: Path) -> None:
    """A network that is gone closes nothing: the board ends what it runs when it hears nothing."""
    source = Path(board.__file__).read_text().replace(f"SILENCE = {board.SILENCE}", "SILENCE = 1")
    script = tmp_path / "board.py"
    script.write_text(source + "\nmain(sys.stdin.buffer, sys.stdout.buffer)\n")
    (tmp_path / "there" / "code").mkdir(parents=True)
    (tmp_path / "there" / "code" / "sleeper.py").write_text(
        "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    requests = [
        {"do": "hello", "folder": str(tmp_path / "there"), "needs": {}},
        {"do": "run", "module": "sleeper", "path": ["code"], "request": {}},
    ]
    process.stdin.write(b"".join(json.dumps(one).encode() + b"\n" for one in requests))
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["machine"]
    child = int(json.loads(process.stdout.readline())["line"])
    assert process.wait(15) == 1
    wait_until(lambda: not Path(f"/proc/{child}").exists() or zombie(child), 5)


def zombie(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


def test_a_full_disk_is_told_and_cleaned_up(
    server: Server, ssh: Callable[..., None], cache: Path, bundle: Path
) -> None:
    disk = server.home / "small disk"
    disk.mkdir()
    options = f"size=3m,mode=777,uid={pwd.getpwnam(server.user).pw_uid}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk to fill; root may, outside of most containers")
    try:
        with pytest.raises(MobileMMError, match="No space left on device") as raised:
            bench_over_ssh(bundle, SETTINGS, server.address, folder=str(disk), python=own_python(server))
        assert "\n" not in str(raised.value)
        assert not list(disk.rglob("*.part"))
    finally:
        wait_until(lambda: not subprocess.run(["umount", disk], capture_output=True).returncode, 10)


def test_a_host_key_that_changed_is_refused(server: Server, ssh: Callable[..., None], bundle: Path) -> None:
    ssh(known="changed")
    with pytest.raises(MobileMMError, match="there is no /none/python"):  # the key is known from here on
        bench_over_ssh(bundle, SETTINGS, server.address, python="/none/python")
    server.start("other_host_key")
    try:
        with pytest.raises(MobileMMError, match=r"ssh-keygen -R '\[127\.0\.0\.1\]:\d+'") as raised:
            bench_over_ssh(bundle, SETTINGS, server.address)
        assert "\n" not in str(raised.value)
    finally:
        server.start("host_key")


def test_what_stops_a_login_is_named(server: Server, ssh: Callable[..., None], bundle: Path) -> None:
    def error(address: str = server.address, **options: Any) -> str:
        with pytest.raises(MobileMMError) as raised:
            bench_over_ssh(bundle, SETTINGS, address, **options)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "there is no python-none" in error(python="python-none")
    ssh(known="empty", checking="yes")
    assert "host key is not known here" in error()
    ssh(login="other_host_key")
    assert "login refused" in error()
    ssh()
    assert "nothing listens there" in error(address="127.0.0.1:1")
    assert "no such host" in error(address="host.invalid")
    assert "[USER@]HOST[:PORT]" in error(address="-oProxyCommand=touch")
    assert "[USER@]HOST[:PORT]" in error(address="a b")


def test_one_benchmark_at_a_time(server: Server, ssh: Callable[..., None], cache: Path, bundle: Path) -> None:
    from mobilemm.bench.ssh import Connection

    with Connection(server.address, own_python(server)) as first:
        first.ask("hello", folder="~/busy", needs={})
        with pytest.raises(MobileMMError, match="another benchmark is using"):
            bench_over_ssh(bundle, SETTINGS, server.address, folder="~/busy", python=own_python(server))


def test_an_old_python_is_named(server: Server, ssh: Callable[..., None], bundle: Path) -> None:
    """The board's part says so itself: what runs there is a Python that claims to be old."""
    script = server.home / "old python"
    script.write_text(
        f"#!/bin/sh\nexec {own_python(server)} -c 'import sys; sys.version_info = (3, 9, 2); "
        'exec(sys.argv[1])\' "$2"\n'
    )
    script.chmod(0o755)
    with pytest.raises(MobileMMError, match=r"is 3\.9; mobilemm needs 3\.11"):
        bench_over_ssh(bundle, SETTINGS, server.address, python=str(script))


def test_nothing_leaves_its_folder(tmp_path: Path) -> None:
    one = board.Board(sys.stdin.buffer, sys.stdout.buffer)
    one.folder = str(tmp_path)
    for path in ("../x", "/etc/passwd", "a/../../x", "."):
        with pytest.raises(OSError, match="leaves the folder"):
            one.inside(path)


def wait_until(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_the_signal_is_one_that_cannot_be_caught() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    board.end(child)
    assert child.wait(5) == -signal.SIGKILL
