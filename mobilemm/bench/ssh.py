"""A bundle measured on another computer, over the system's ssh: a Raspberry Pi, a Jetson, any Linux.

One connection does it all, so that a password is asked for once. The other computer needs a Python and
nothing else: the runtime's packages are sent as wheels where they are missing, then mobilemm's own code and
the bundle, of which only what changed. What measures ends with the connection.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mobilemm
from mobilemm.bench import board
from mobilemm.bench.result import Result, Settings, read_result
from mobilemm.cache import cache_folder
from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.bundle import MANIFEST, MANIFEST_SHA256, open_bundle

FOLDER = "~/.cache/mobilemm"
LEAST_PYTHON = (3, 11)
PING_SECONDS = 5.0
CHUNK = 2**20

# What a session over a bundle imports, and what that imports.
PACKAGES = ("numpy", "pillow", "pydantic", "packaging", "tokenizers", "onnx", "onnxruntime")
THEIR_PACKAGES = (
    "annotated-types",
    "ml-dtypes",
    "protobuf",
    "pydantic-core",
    "typing-extensions",
    "typing-inspection",
)
RUNTIMES = {"onnx": "onnxruntime", "executorch": "executorch", "coreml": "coremltools"}

# What ssh says, and what is to be done about it.
TROUBLES = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": "its host key is not the one that is known here; if it was"
    " installed anew, forget the old one: ssh-keygen -R '{known}'",
    "Host key verification failed": "its host key is not known here: connect once with `{login}`"
    " and accept it",
    "Permission denied": "login refused: try `{login}`; keys are set up with ssh-copy-id",
    "Could not resolve": "there is no such host",
    "Connection refused": "nothing listens there: is sshd running, and is the port right?",
    "timed out": "no answer: is it on, and in this network?",
    "No route to host": "no way there: is it on, and in this network?",
    "not found": "there is no {python}: name a Python of {least} or newer with --device-python",
    "No such file": "there is no {python}: name a Python of {least} or newer with --device-python",
}


def bench_over_ssh(
    bundle: Path,
    settings: Settings,
    address: str,
    report: Callable[[str], None] = lambda _: None,
    folder: str = FOLDER,
    python: str = "python3",
) -> Result:
    """Measures a bundle on the computer at `address`, [USER@]HOST[:PORT].

    $MOBILEMM_SSH is the command instead of `ssh`, with options if need be.

    Args:
        folder: there, for what is sent.
        python: there; what it lacks for ONNX bundles is sent, other runtimes it must have itself.

    Raises MobileMMError, on one line, for whatever is missing on the way or goes wrong there.
    """
    opened = open_bundle(bundle)
    target = opened.manifest.target
    least = {name: version(name) for name in (*PACKAGES, RUNTIMES[target])}
    least[RUNTIMES[target]] = opened.manifest.runtime.min_version
    if target != "onnx":
        del least["onnx"], least["onnxruntime"]
    report(f"connecting to {address}")
    with Connection(address, python) as connection:
        there = connection.ask(
            "hello", folder=folder, needs={name: _major(one) for name, one in least.items()}
        )
        found = tuple(there["python"])
        if found < LEAST_PYTHON:
            raise MobileMMError(
                f"{address}: {python} is {'.'.join(map(str, found))}; mobilemm needs"
                f" {'.'.join(map(str, LEAST_PYTHON))}: name another with --device-python"
            )
        path = ["code"]
        if there["missing"]:
            if target != "onnx":
                raise MobileMMError(
                    f"{address}: {python} lacks {', '.join(there['missing'])}: pip install them there,"
                    " or name another with --device-python"
                )
            path.append(_send_packages(connection, there, report))
        code = {f"mobilemm/{name}": one for name, one in _code().items()}
        connection.send("code", code, report, "mobilemm's code")
        files = {file.path: opened.folder / file.path for file in opened.manifest.files}
        files |= {
            name: opened.folder / name
            for name in (MANIFEST, MANIFEST_SHA256)
            if (opened.folder / name).is_file()
        }
        place = f"bundles/{bundle.resolve().name}"
        connection.send(place, files, report, "the bundle")
        request = {
            "folder": f"{there['folder']}/{place}",
            "settings": settings.model_dump(),
            "device": f"ssh:{address}",
        }
        for line in connection.run("mobilemm.bench.host", path, request):
            if "report" in line:
                report(line["report"])
            elif "error" in line:
                raise MobileMMError(f"{address}: {line['error']}")
            elif "result" in line:
                return read_result(line["result"], address)
    raise MobileMMError(f"{address}: it ended without a result")


class Connection:
    """ssh, and `board` at its other end. Raises MobileMMError for whatever happens to either."""

    def __init__(self, address: str, python: str) -> None:
        match = re.fullmatch(r"((?:[^@\s]+@)?[^-:@\s][^:@\s]*)(?::(\d+))?", address)
        if match is None:
            raise MobileMMError(f"--device ssh:{address}: an address is [USER@]HOST[:PORT]")
        self.address, self.python = address, python
        host, port = match[1], match[2]
        self.login = f"ssh -p {port} {host}" if port else f"ssh {host}"
        name = host.split("@")[-1]
        self.known = f"[{name}]:{port}" if port else name  # as ~/.ssh/known_hosts has it
        command = shlex.split(os.environ.get("MOBILEMM_SSH", "ssh"))
        command += ["-T", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"]
        command += ["-o", "ConnectTimeout=20", *(["-p", port] if port else []), "--", host]
        start = (
            "import sys; i = sys.stdin.buffer; exec(i.read(int(i.readline()))); main(i, sys.stdout.buffer)"
        )
        command.append(f"{shlex.quote(python)} -c {shlex.quote(start)}")
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=-1,
            )
        except OSError as error:
            raise MobileMMError(
                f"{command[0]}: cannot be started ({error.strerror}): install OpenSSH"
            ) from error
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        self._said: deque[str] = deque(maxlen=50)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        source = Path(board.__file__).read_bytes()
        self._write(b"%d\n" % len(source) + source)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Its input closed, the board ends what it runs.
        for pipe in (self._to, self._from):
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, do: str, content: Path | None = None, **request: Any) -> dict[str, Any]:
        """One request, with a file's bytes behind it, and its answer."""
        self._write(json.dumps({"do": do, **request}).encode() + b"\n")
        if content is not None:
            with content.open("rb") as file:
                while piece := file.read(CHUNK):
                    self._write(piece)
        return self._answer()

    def send(self, into: str, files: Mapping[str, Path], report: Callable[[str], None], what: str) -> None:
        """Makes a folder there have these files and no others; those that are there already are not sent."""
        hashes = {path: _sha256(source) for path, source in files.items()}
        lacking = self.ask("lacking", into=into, files=hashes)["lacking"]
        total = sum(files[path].stat().st_size for path in lacking)
        for index, path in enumerate(lacking):
            report(f"sending {what} ({total / 1e6:.1f} MB, file {index + 1} of {len(lacking)})")
            size = files[path].stat().st_size
            self.ask("put", files[path], into=into, path=path, size=size, sha256=hashes[path])

    def run(self, module: str, path: list[str], request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Runs a module there; the JSON that it prints, line by line.

        What else it prints tells why it failed.
        """
        self._write(
            json.dumps({"do": "run", "module": module, "path": path, "request": request}).encode() + b"\n"
        )
        over = threading.Event()
        threading.Thread(target=self._ping, args=(over,), daemon=True).start()
        other = ""
        try:
            while "ended" not in (answer := self._answer()):
                if answer["line"].startswith("{"):
                    yield json.loads(answer["line"])
                elif answer["line"].strip():
                    other = answer["line"]
        finally:
            over.set()
        if answer["ended"]:
            raise MobileMMError(
                f"{self.address}: the measuring process ended early:"
                f" {one_line(other or 'exit code ' + str(answer['ended']))}"
            )

    def _ping(self, over: threading.Event) -> None:
        while not over.wait(PING_SECONDS):
            try:
                self._to.write(b'{"do": "ping"}\n')
                self._to.flush()
            except (OSError, ValueError):
                return

    def _write(self, content: bytes) -> None:
        try:
            self._to.write(content)
            self._to.flush()
        except OSError:
            self._answer()  # why, if it said so
            raise self._broken() from None

    def _answer(self) -> dict[str, Any]:
        line = self._from.readline()
        if not line.endswith(b"\n"):
            raise self._broken()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise MobileMMError(
                f"{self.address}: its shell prints {one_line(line.decode(errors='replace'), 60)!r} when it"
                " starts; without a terminal it must print nothing"
            )
        if set(answer) == {"error"}:
            raise MobileMMError(f"{self.address}: {answer['error']}")
        return answer

    def _broken(self) -> MobileMMError:
        """Why ssh is gone."""
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._listener.join(5)
        said = " ".join(self._said)
        for words, trouble in TROUBLES.items():
            if words in said:
                least = ".".join(map(str, LEAST_PYTHON))
                told = trouble.format(login=self.login, known=self.known, python=self.python, least=least)
                return MobileMMError(f"{self.address}: {told}")
        last = one_line(self._said[-1]) if self._said else f"exit code {code}"
        return MobileMMError(
            f"{self.address}: the connection was lost ({last}); what ran there ends by itself within"
            f" {board.SILENCE} seconds"
        )

    def _listen(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            if text := line.decode(errors="replace").strip():
                self._said.append(text)


def _send_packages(connection: Connection, there: dict[str, Any], report: Callable[[str], None]) -> str:
    """The packages that are missing there, as wheels for its Python; where they are unpacked."""
    report("fetching packages")
    wheels = _wheels(connection.address, tuple(there["python"]), there["machine"], tuple(there["libc"]))
    digest = hashlib.sha256("\n".join(sorted(wheel.name for wheel in wheels)).encode()).hexdigest()
    connection.send("wheels", {wheel.name: wheel for wheel in wheels}, report, "packages")
    report("unpacking packages")
    site = f"packages/{digest[:16]}"
    connection.ask("unpack", wheels=[f"wheels/{wheel.name}" for wheel in wheels], into=site)
    return site


def _wheels(address: str, python: tuple[int, int], machine: str, libc: tuple[str, str]) -> list[Path]:
    """Fetched by pip into the user's cache, in the versions that are installed here."""
    number = "".join(map(str, python))
    wanted = [f"{name}=={version(name)}" for name in (*PACKAGES, *THEIR_PACKAGES)]
    kept = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:16]
    folder = cache_folder() / "wheels" / f"{number}-{machine}-{kept}"
    if len(list(folder.glob("*.whl"))) != len(wanted):
        if libc[0] == "glibc":
            newest = int(libc[1].split(".")[1])
            platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 16, -1)]
            platforms += [f"{old}_{machine}" for old in ("manylinux2014", "linux")]
        else:
            platforms = [f"musllinux_1_{minor}_{machine}" for minor in (2, 1)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", number, "--implementation", "cp", "--abi", f"cp{number}"]
        command += ["--abi", "abi3", "--abi", "none", "--dest", str(folder)]
        command += [part for one in platforms for part in ("--platform", one)]
        ended = subprocess.run([*command, *wanted], capture_output=True, text=True)
        if ended.returncode:
            errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
            raise MobileMMError(
                f"{address}: packages for its Python {'.'.join(map(str, python))} on {machine} cannot be had"
                f" ({one_line((errors or ended.stderr.splitlines() or ['pip failed'])[-1])}): pip install"
                f" {' '.join(PACKAGES)} there"
            )
    return sorted(folder.glob("*.whl"))


def _code() -> dict[str, Path]:
    """mobilemm's own modules, without models and data."""
    root = Path(mobilemm.__file__).parent
    return {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if path.relative_to(root).parts[0] in ("__init__.py", "errors.py", "bench", "data", "runtime")
    }


def _major(text: str) -> str:
    """Of a version: what may be older is its last part."""
    return text.split(".")[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
