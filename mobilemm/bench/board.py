"""What runs on a board at the other end of ssh: takes files, runs one command, and goes with the connection.

Sent as source and fed to whatever Python is there: the standard library alone, and nothing newer than Python
3.7, so that it can say that it is too old. Requests come on standard input and answers go to standard
output, one JSON object a line; a request with `size` is followed by so many bytes.

- `hello` (folder, needs) → python, machine, libc, missing, free: what is there. `needs` maps distributions to
  their least versions. From here on no other benchmark may use the folder.
- `lacking` (into, files) → lacking: the files, by SHA-256, that are not there yet; others are removed.
- `put` (into, path, size, sha256) → ok.
- `unpack` (wheels, into) → ok: packages from their archives, once.
- `run` (module, path, request) → a line for each line of its output, at last `ended` with the exit code.
- `ping`: silence for longer than SILENCE means that nobody is there any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from typing import Any, BinaryIO

SILENCE = 30
CHUNK = 1 << 20


def main(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """Serves one connection."""
    board = Board(incoming, outgoing)
    try:
        while True:
            line = incoming.readline()
            if not line:
                return
            request = json.loads(line)
            action = request.pop("do")
            if action != "ping":
                board.say(**getattr(board, action)(**request))
    except OSError as error:
        name = f" ({error.filename})" if error.filename else ""
        board.say(error=f"{error.strerror or error}{name}")


class Board:
    """One method a request; what it returns is the answer."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self.incoming, self.outgoing = incoming, outgoing
        self.folder = ""

    def say(self, **answer: Any) -> None:
        self.outgoing.write(json.dumps(answer).encode() + b"\n")
        self.outgoing.flush()

    def hello(self, folder: str, needs: dict[str, str]) -> dict[str, Any]:
        self.folder = os.path.abspath(os.path.expanduser(folder))
        os.makedirs(self.folder, exist_ok=True)
        import fcntl

        self.lock = open(os.path.join(self.folder, "lock"), "w")  # noqa: SIM115, held to the end
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return {"error": f"another benchmark is using {self.folder}"}
        return {
            "folder": self.folder,
            "python": list(sys.version_info[:2]),
            "machine": platform.machine(),
            "libc": list(platform.libc_ver()),
            "missing": [name for name, least in needs.items() if not installed(name, least)],
            "free": shutil.disk_usage(self.folder).free,
        }

    def lacking(self, into: str, files: dict[str, str]) -> dict[str, Any]:
        root = self.inside(into)
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                if os.path.relpath(path, root).replace(os.sep, "/") not in files:
                    os.unlink(path)
        return {"lacking": [path for path in files if sha256(os.path.join(root, path)) != files[path]]}

    def put(self, into: str, path: str, size: int, sha256: str) -> dict[str, Any]:
        target = self.inside(into, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        draft, whole = target + ".part", hashlib.sha256()
        try:
            with open(draft, "wb") as file:
                while size:
                    piece = self.incoming.read(min(CHUNK, size))
                    if not piece:
                        raise ConnectionError("cut off")
                    file.write(piece)
                    whole.update(piece)
                    size -= len(piece)
            if whole.hexdigest() != sha256:
                return {"error": f"{path} arrived damaged"}
            os.replace(draft, target)
        finally:
            if os.path.exists(draft):
                os.unlink(draft)
        return {"ok": True}

    def unpack(self, wheels: list[str], into: str) -> dict[str, Any]:
        root = self.inside(into)
        if not os.path.isdir(root):
            shutil.rmtree(root + ".part", ignore_errors=True)
            for wheel in wheels:
                with zipfile.ZipFile(self.inside(wheel)) as archive:
                    archive.extractall(root + ".part")
            os.rename(root + ".part", root)
            for other in os.listdir(os.path.dirname(root)):
                if other != os.path.basename(root):
                    shutil.rmtree(os.path.join(os.path.dirname(root), other), ignore_errors=True)
        return {"ok": True}

    def run(self, module: str, path: list[str], request: dict[str, Any]) -> dict[str, Any]:
        paths = [self.inside(one) for one in path]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), PYTHONUNBUFFERED="1")
        environment["PYTHONPYCACHEPREFIX"] = os.path.join(self.folder, "bytecode")
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )
        assert child.stdin
        assert child.stdout
        heard = [time.monotonic()]

        def listen() -> None:  # the only thing that comes now is a ping
            while self.incoming.readline():
                heard[0] = time.monotonic()
            heard[0] = float("-inf")

        def watch() -> None:
            while child.poll() is None:
                if time.monotonic() - heard[0] > SILENCE:
                    end(child)
                    os._exit(1)
                time.sleep(0.2)

        for task in (listen, watch):
            threading.Thread(target=task, daemon=True).start()
        try:
            with child.stdin as pipe:
                pipe.write(json.dumps(request).encode())
            for line in child.stdout:
                self.say(line=line.decode("utf-8", "replace").rstrip("\n"))
            code = child.wait()
        finally:
            end(child)
        self.say(ended=code)  # the thread that listens would steal what comes next
        self.outgoing.flush()
        os._exit(0)

    def inside(self, *parts: str) -> str:
        path = os.path.normpath(os.path.join(self.folder, *parts))
        if not path.startswith(self.folder + os.sep):
            raise OSError(f"{os.path.join(*parts)} leaves the folder")
        return path


def end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def installed(name: str, least: str) -> bool:
    from importlib import metadata

    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return numbers(found) >= numbers(least)


def numbers(version: str) -> list[int]:
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return parts


def sha256(path: str) -> str | None:
    whole = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(CHUNK), b""):
                whole.update(piece)
    except OSError:
        return None
    return whole.hexdigest()
