"""A bundle's folder, opened as a stranger's: the one place where its integrity is checked.

Nothing that `open_bundle` has not looked at is ever loaded: the manifest is read with limits, each file must
be a plain file inside the folder with the size and hash that the manifest says, and parts are checked without
a runtime (`mobilemm.runtime.onnx_check`, `coreml_check`, `executorch_check`).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from mobilemm.errors import MobileMMError
from mobilemm.runtime.manifest import Manifest
from mobilemm.runtime.manifest_check import AGAIN, LARGEST_MANIFEST, parse_manifest, shown

MANIFEST = "manifest.json"
# Beside it, as of `sha256sum manifest.json`: what tells a damaged manifest from another one.
MANIFEST_SHA256 = "manifest.json.sha256"


@dataclass(frozen=True)
class Bundle:
    """A folder whose manifest and files hold together.

    Attributes:
        folder: where it lies.
        manifest: its `manifest.json`.
    """

    folder: Path
    manifest: Manifest

    def path(self, relative: str) -> Path:
        """The path of a listed file, or of a folder that holds listed files.

        Raises MobileMMError when the manifest lists no such file.
        """
        inside = f"{relative}/"
        if not any(file.path == relative or file.path.startswith(inside) for file in self.manifest.files):
            raise MobileMMError(f"{self.folder / MANIFEST}: lists no file {shown(relative)} under 'files'")
        return self.folder / relative

    def part_path(self, name: str) -> Path:
        """What a runtime opens to run this part. Raises MobileMMError when there is no such part."""
        if name not in self.manifest.parts:
            raise MobileMMError(
                f"{self.folder / MANIFEST}: there is no part {shown(name)}; the bundle has"
                f" {', '.join(sorted(self.manifest.parts))}"
            )
        return self.folder / self.manifest.parts[name].file


def open_bundle(folder: str | Path, *, verify: bool = True) -> Bundle:
    """Opens and checks a bundle; no model is loaded.

    Always checked: the manifest and what it says of itself, that the folder holds the files that it lists, in
    their sizes, and no other, and the structure of ONNX and Core ML parts. With `verify` also what
    reads every byte: the files' SHA-256 and that stored numbers are finite.

    A file that the manifest does not list is refused, because libraries that open a folder by its name would
    read it unchecked (a tokenizer's `added_tokens.json`, for one). Only hidden files at the top are ignored,
    which file managers, git and the hub's client leave behind, and which nothing reads.

    Raises MobileMMError, one line, at the first fault.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / MANIFEST
    refuse_unlisted(folder, manifest)
    for file in manifest.files:
        with open_plain(folder, file.path) as opened:
            found = os.fstat(opened.fileno()).st_size
            if found != file.bytes:
                raise MobileMMError(
                    f"{folder / file.path}: has {found:,} bytes; {path} says {file.bytes:,}; {AGAIN}"
                )
    if verify:
        for file in manifest.files:
            if file_sha256(folder, file.path) != file.sha256:
                raise MobileMMError(
                    f"{folder / file.path}: damaged or changed: its SHA-256 is not what {path} says; {AGAIN}"
                )
    if manifest.target == "onnx":
        from mobilemm.runtime.onnx_check import check_onnx_part

        for name in manifest.parts:
            check_onnx_part(folder, manifest, name, values=verify)
    elif manifest.target == "coreml":
        from mobilemm.runtime.coreml_check import check_coreml_part

        for name in manifest.parts:
            check_coreml_part(folder, manifest, name, values=verify)
    elif manifest.target == "executorch":
        from mobilemm.runtime.executorch_check import check_executorch_parts

        check_executorch_parts(folder, manifest)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The checked `manifest.json` of a folder; the files it lists are not looked at.

    Where there is a `manifest.json.sha256`, it must agree. Raises MobileMMError.
    """
    if not folder.is_dir():
        raise MobileMMError(f"{folder}: there is no such folder; give the folder of a bundle")
    if not os.path.lexists(folder / MANIFEST):
        raise MobileMMError(
            f"{folder}: is no bundle, because it has no {MANIFEST}; `mobilemm export` makes one"
        )
    with open_plain(folder, MANIFEST) as opened:
        data = opened.read(LARGEST_MANIFEST + 1)
    manifest = parse_manifest(data, folder / MANIFEST)
    if os.path.lexists(folder / MANIFEST_SHA256):
        with open_plain(folder, MANIFEST_SHA256) as opened:
            if opened.read(200) != manifest_digest(data):
                raise MobileMMError(
                    f"{folder / MANIFEST}: damaged or changed: its SHA-256 is not what {MANIFEST_SHA256}"
                    f" says; {AGAIN}"
                )
    return manifest


def manifest_digest(data: bytes) -> bytes:
    """What `manifest.json.sha256` holds for a manifest of these bytes."""
    return f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}\n".encode()


def open_plain(folder: Path, relative: str) -> BufferedReader:
    """Opens a file of a folder for reading, when it and the folders between are what they seem.

    Raises MobileMMError for links, pipes, devices and whatever else is no plain file, and when it cannot be
    read.
    """
    path = folder / relative
    try:
        for parent in reversed(Path(relative).parents[:-1]):
            if not stat.S_ISDIR(os.lstat(folder / parent).st_mode):
                raise MobileMMError(f"{folder / parent}: is a link or no folder; {AGAIN}")
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise MobileMMError(f"{path}: is a link or no plain file; {AGAIN}")
        # Whoever swaps the file between the look and the opening gains nothing: links are not followed, and
        # a pipe does not make us wait.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        opened = os.fdopen(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb")
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            opened.close()
            raise MobileMMError(f"{path}: is no plain file; {AGAIN}")
        return opened
    except FileNotFoundError:
        raise MobileMMError(f"{path}: is missing; {AGAIN}") from None
    except OSError as error:
        raise MobileMMError(f"{path}: cannot be read ({error.strerror})") from error


def file_sha256(folder: Path, relative: str) -> str:
    """The SHA-256 of a plain file in a folder, in hexadecimal. Raises MobileMMError."""
    with open_plain(folder, relative) as opened:
        try:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise MobileMMError(f"{folder / relative}: cannot be read ({error.strerror})") from error


def refuse_unlisted(folder: Path, manifest: Manifest) -> None:
    """Raises MobileMMError when something lies in the folder that its manifest does not list."""
    listed = {MANIFEST, MANIFEST_SHA256, *(file.path for file in manifest.files)}
    parents = {str(parent) for path in listed for parent in Path(path).parents}
    for relative in _entries(folder, ""):
        if relative not in listed and relative not in parents:
            raise MobileMMError(
                f"{folder / MANIFEST}: does not list {shown(relative)}, which lies in the folder; remove it"
            )


def _entries(folder: Path, inside: str) -> Iterator[str]:
    """All that lies below, links not followed, as relative paths; hidden entries at the top apart."""
    try:
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                if not inside and entry.name.startswith("."):
                    continue
                relative = f"{inside}/{entry.name}" if inside else entry.name
                yield relative
                if entry.is_dir(follow_symlinks=False):
                    yield from _entries(folder, relative)
    except OSError as error:
        raise MobileMMError(f"{folder / inside}: cannot be read ({error.strerror})") from error
