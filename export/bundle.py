"""Writes a bundle: all of it beside its place first, then under its name in one step.

A process may be killed at any moment. Under the bundle's name stands nothing, the bundle that was there
before, or the new one, each whole; what a dead process left beside it is removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from mobilemm.errors import MobileMMError, one_line
from mobilemm.export.model_card import LICENSE, model_card
from mobilemm.runtime.bundle import (
    MANIFEST,
    MANIFEST_SHA256,
    Bundle,
    file_sha256,
    manifest_digest,
    open_bundle,
    read_manifest,
    refuse_unlisted,
)
from mobilemm.runtime.manifest import PATH_PATTERN, File, Manifest


class BundleWriter:
    """Makes a bundle at `destination`; nothing is there before `finish`.

        with BundleWriter("out/demo-onnx") as writer:
            ...  # files into writer.folder
            bundle = writer.finish(manifest)

    Left without `finish`, as by an error, it removes what was written.

    Raises MobileMMError when something is at the destination: only a bundle is replaced, and only with
    `overwrite`.
    """

    def __init__(self, destination: str | Path, *, overwrite: bool = False) -> None:
        self.destination = Path(os.path.realpath(destination))
        self.overwrite = overwrite
        self._hashes: dict[tuple[str, int, int], str] = {}

    def __enter__(self) -> BundleWriter:
        recover(self.destination)
        refuse_occupied(self.destination, self.overwrite)
        self.folder, self._lock = _make_partial(self.destination)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.folder.exists():
            remove(self.folder)
        os.close(self._lock)

    def files(self) -> list[File]:
        """All files written so far, with sizes and hashes, as the manifest lists them.

        Raises MobileMMError for names that a bundle cannot have.
        """
        found = []
        for path in sorted(path for path in self.folder.rglob("*") if not path.is_dir()):
            relative = path.relative_to(self.folder).as_posix()
            if relative in (MANIFEST, MANIFEST_SHA256):
                continue
            if not re.fullmatch(PATH_PATTERN, relative) or path.is_symlink():
                raise MobileMMError(
                    f"{path}: a bundle holds plain files with names of letters, digits and . _ + - only"
                )
            status = path.stat()
            key = (relative, status.st_size, status.st_mtime_ns)
            if key not in self._hashes:
                self._hashes[key] = file_sha256(self.folder, relative)
            found.append(File(path=relative, bytes=status.st_size, sha256=self._hashes[key]))
        return found

    def finish(self, manifest: Manifest, license_text: str | None = None) -> Bundle:
        """Completes, checks and puts in place the bundle.

        README.md is written, and LICENSE when there is a text; `files` and each part's `bytes` in the
        manifest are filled in here from what lies in the folder, whatever stands there. The bundle is opened
        as a stranger's before it gets its name.

        Raises MobileMMError when it would not open, or when the disk refuses.
        """
        try:
            if license_text is not None:
                (self.folder / LICENSE).write_text(license_text, encoding="utf-8")
            (self.folder / "README.md").write_text(
                model_card(_described(manifest, self.files())), encoding="utf-8"
            )
            manifest = _described(manifest, self.files())
            data = (manifest.model_dump_json(indent=1) + "\n").encode()
            (self.folder / MANIFEST_SHA256).write_bytes(manifest_digest(data))
            (self.folder / MANIFEST).write_bytes(data)
            open_bundle(self.folder)
            put_in_place(self.folder, self.destination)
        except ValidationError as error:
            raise MobileMMError(f"{self.destination / MANIFEST}: {one_line(error)}") from error
        except OSError as error:
            raise MobileMMError(f"{self.destination}: cannot be written ({error.strerror})") from error
        return Bundle(self.destination, manifest)


def put_in_place(folder: Path, destination: Path) -> None:
    """Gives a whole folder beside `destination` that name; what is there is replaced.

    Everything is on the disk before the name is. Between the two renames of a replacement the name does not
    exist for a moment; when the process dies in it, `recover` restores what was there.
    """
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    old = None
    if destination.exists():
        with _locked(destination) as lock:
            if lock is None:
                raise MobileMMError(f"{destination}: is being replaced by another process; try again")
            old = _beside(destination, "replaced")
            os.rename(destination, old)
            try:
                os.rename(folder, destination)
            except OSError:
                os.rename(old, destination)
                raise
    else:
        os.rename(folder, destination)
    _sync(destination.parent)
    if old is not None:
        remove(old)


def recover(destination: Path) -> None:
    """Tidies up after processes that died while they wrote or replaced the bundle at `destination`."""
    for kind in ("replaced", "partial"):
        for path in _all_beside(destination, kind):
            with _locked(path) as lock:
                if lock is None or not path.exists():
                    continue
                # `remove` takes the manifest away first: what has one is whole.
                if kind == "replaced" and not destination.exists() and (path / MANIFEST).is_file():
                    os.rename(path, destination)
                else:
                    remove(path)


def refuse_occupied(destination: Path, overwrite: bool) -> None:
    """Raises MobileMMError unless the place is free, or holds a bundle and may be overwritten."""
    if not os.path.lexists(destination):
        return
    if destination.is_dir() and not any(destination.iterdir()):
        return
    try:
        refuse_unlisted(destination, read_manifest(destination))
    except MobileMMError as error:
        raise MobileMMError(
            f"{destination}: is there already and is no bundle that could be replaced; remove it or choose"
            f" another place ({one_line(error, 160)})"
        ) from None
    if not overwrite:
        raise MobileMMError(f"{destination}: is there already; choose another place, or ask for overwriting")


def remove(folder: Path) -> None:
    """Deletes a bundle's folder, its manifest first, so that half of a bundle is never taken for one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class _locked:
    """A lock on a folder that ends with the process, however it ends; None when another process has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> int | None:
        self.lock = lock_folder(self.folder)
        return self.lock

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            os.close(self.lock)


def lock_folder(folder: Path) -> int | None:
    """A descriptor that keeps `folder` locked until it is closed; None when another process has the lock."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _make_partial(destination: Path) -> tuple[Path, int]:
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        while True:
            folder = _beside(destination, "partial")
            folder.mkdir()
            lock = lock_folder(folder)
            # Another process may have taken it for a dead one's before it was locked.
            if lock is not None and folder.exists():
                return folder, lock
    except OSError as error:
        raise MobileMMError(f"{destination}: cannot be written ({error.strerror})") from error


def _beside(destination: Path, kind: str) -> Path:
    """A free name in the same folder, and so on the same file system."""
    names = (f".{destination.name}.{kind}-{os.getpid()}-{number}" for number in count())
    return next(path for name in names if not (path := destination.with_name(name)).exists())


def _all_beside(destination: Path, kind: str) -> Iterator[Path]:
    name = re.compile(rf"\.{re.escape(destination.name)}\.{kind}-\d+-\d+")
    if destination.parent.is_dir():
        yield from sorted(path for path in destination.parent.iterdir() if name.fullmatch(path.name))


def _described(manifest: Manifest, files: list[File]) -> Manifest:
    sizes = {file.path: file.bytes for file in files}
    parts = {
        name: part.model_copy(update={"bytes": max(1, sum(sizes.get(path, 0) for path in part.files))})
        for name, part in manifest.parts.items()
    }
    return manifest.model_copy(update={"files": files, "parts": parts})


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
