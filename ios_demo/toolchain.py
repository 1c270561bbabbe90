"""Swift for Linux out of Debian's packages, in a folder: nothing is installed, no container needed.

The compiler, Swift's package manager and the C libraries that the tests need are those of one Debian
release, fetched by this machine's own apt through a private configuration and unpacked beside each other.
They run with that folder as their root, in a mount namespace of their own: when the command ends, its mounts
are gone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SUITE = "trixie"
SWIFT = "6.0.3"
PACKAGES = (
    "swiftlang",
    # What swiftlang itself does not ask for, but its compiler does.
    *("libc6-dev", "libstdc++-14-dev", "libc-bin", "bash", "coreutils", "tzdata", "ca-certificates"),
    # What the kit links on Linux: pictures' decoders, and the header (alone) of ONNX Runtime.
    *("libpng-dev", "libturbojpeg0-dev", "libonnxruntime-dev"),
)
UNNEEDED = ("./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/share/info")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
TRIES = 3


class BuildError(Exception):
    """What failed, and what to do, in a line or a compiler's own words."""


def run(command: Sequence[str | Path], tries: int = 1) -> str:
    """A program's output. Raises BuildError with it when the program fails."""
    words = [str(word) for word in command]
    for attempt in range(1, tries + 1):
        try:
            done = subprocess.run(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError:
            raise BuildError(f"{words[0]} is not installed; ios_demo/README.md says what is needed") from None
        if done.returncode == 0:
            return done.stdout
        if attempt < tries:
            print(f"try {attempt} failed; once more in 5 seconds", file=sys.stderr)
            time.sleep(5)
    raise BuildError(f"{' '.join(words)[:300]}\n{done.stdout[-6000:]}")


def debian_mirror(lists: Path) -> str:
    """Where this machine takes Debian's packages from; `lists` is for apt's lists, if it has none yet."""
    ask = ["indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    found = run(["apt-get", *ask]).split()
    if not found:
        (lists / "partial").mkdir(parents=True)
        apart = ["apt-get", "-qq", "-o", f"Dir::State::lists={lists}", "-o", "APT::Sandbox::User=root"]
        run([*apart, "update"], tries=TRIES)
        found = run([*apart, *ask]).split()
    for line in found:
        if line.rstrip("/").endswith("/debian"):
            return line
    raise BuildError("apt knows no Debian mirror here; add one to /etc/apt/sources.list.d")


def unpack(root: Path) -> None:
    """Makes the folder, unless it is there already; whole or not at all."""
    stamp = root / ".packages"
    wanted = "\n".join([SUITE, *PACKAGES])
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    draft = root.with_name(root.name + ".part")
    for folder in (root, draft):
        shutil.rmtree(folder, ignore_errors=True)
    apt = draft / "apt"
    for name in ("state/lists/partial", "cache/archives/partial", "etc/preferences.d", "etc/apt.conf.d"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    mirror = debian_mirror(apt / "known")
    (apt / "etc" / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {SUITE} main\n")
    settings: dict[str, str | Path] = {
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc": apt / "etc",
        "Dir::Etc::sourcelist": apt / "etc" / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "1",
    }
    command = [
        "apt-get",
        "-qq",
        *(word for key, value in settings.items() for word in ("-o", f"{key}={value}")),
    ]
    print(f"fetching Swift {SWIFT} from Debian {SUITE}", flush=True)
    run([*command, "update"], tries=TRIES)
    run([*command, "--yes", "--download-only", "install", *PACKAGES], tries=TRIES)
    # /bin, /lib and the like are links into /usr in today's Debian; a package brings them, but not first.
    for name in ("bin", "sbin", "lib", "lib64"):
        (draft / "usr" / name).mkdir(parents=True)
        (draft / name).symlink_to(f"usr/{name}")
    excluded = " ".join(f"--exclude={path}" for path in UNNEEDED)
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        line = f"dpkg-deb --fsys-tarfile {shlex.quote(str(package))} | tar -x --keep-directory-symlink"
        run(["bash", "-o", "pipefail", "-c", f"{line} -C {shlex.quote(str(draft))} {excluded}"])
    shutil.rmtree(apt)
    for name in ("proc", "dev", "tmp", "root"):
        (draft / name).mkdir(exist_ok=True)
    if not (draft / "usr" / "bin" / "sh").exists():
        (draft / "usr" / "bin" / "sh").symlink_to("bash")
    draft.rename(root)
    inside(root, ["/sbin/ldconfig"])
    version = inside(root, ["swiftc", "--version"])
    if f"Swift version {SWIFT} " not in version:
        raise BuildError(f"Debian {SUITE} has another Swift than {SWIFT}:\n{version}")
    stamp.write_text(wanted)


def inside(
    root: Path,
    command: Sequence[str | Path],
    cwd: Path | None = None,
    binds: Iterable[Path] = (),
    environment: Mapping[str, str] | None = None,
    shown: bool = False,
) -> str:
    """Runs a program of that folder, which sees of this machine only `binds`, at their own paths.

    Returns what it writes; `shown` lets it write to the terminal instead. Raises BuildError when it fails.
    """
    steps = ["set -e"]
    for name in ("proc", "dev"):
        steps.append(f"mount --rbind /{name} {shlex.quote(str(root / name))}")
    for bind in dict.fromkeys(path.resolve() for path in binds):
        target = root / bind.relative_to("/")
        if bind.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        steps.append(f"mount --rbind {shlex.quote(str(bind))} {shlex.quote(str(target))}")
    variables = {
        "PATH": "/usr/libexec/swift/bin:/usr/bin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        **(environment or {}),
    }
    assignments = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
    words = " ".join(shlex.quote(str(word)) for word in command)
    inner = f"cd {shlex.quote(str(cwd.resolve()))} && exec {words}" if cwd else f"exec {words}"
    steps.append(
        f"exec chroot {shlex.quote(str(root))} /usr/bin/env -i {assignments} bash -c {shlex.quote(inner)}"
    )
    apart = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() != 0 else []), "bash", "-c"]
    if shown:
        code = subprocess.call([*apart, "\n".join(steps)], stdin=subprocess.DEVNULL)
        if code != 0:
            raise BuildError(f"{words[:300]} ended with {code}; what it says stands above")
        return ""
    return run([*apart, "\n".join(steps)])
