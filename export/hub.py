"""Bundles to and from other places: a folder, as of a mounted drive, or a repository of the Hugging Face hub.

Both ways only files that differ are copied, an interrupted copy goes on where it stopped, every file is
hashed on arrival, and the bundle gets its name when it is whole.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

from mobilemm.errors import MobileMMError, one_line
from mobilemm.export.bundle import lock_folder, put_in_place, recover, refuse_occupied
from mobilemm.runtime.bundle import (
    MANIFEST,
    MANIFEST_SHA256,
    Bundle,
    file_sha256,
    manifest_digest,
    open_bundle,
    open_plain,
    read_manifest,
)
from mobilemm.runtime.manifest import File, Manifest
from mobilemm.runtime.manifest_check import LARGEST_MANIFEST, parse_manifest

HUB = "hub:"
REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"


def push(bundle: str | Path, destination: str, *, private: bool = False) -> str:
    """Copies a bundle to a folder, or to a hub repository written `hub:OWNER/NAME`; returns where it is now.

    A bundle that is there already is updated. The repository is made when there is none, open to all unless
    `private`; its update is one commit. Without `hub:` nothing is published, whatever the destination looks
    like.

    Raises MobileMMError when the bundle is damaged, the destination holds something else, or the hub refuses.
    """
    opened = open_bundle(bundle)
    if destination.startswith(HUB):
        return _push_to_hub(opened, _repository(destination), private)
    if re.fullmatch(REPOSITORY, destination) and not Path(destination).parent.is_dir():
        raise MobileMMError(
            f"{destination}: is it a hub repository or a folder? Write hub:{destination} to publish the"
            f" bundle, ./{destination} for a folder"
        )
    if Path(destination).exists() and os.path.samefile(bundle, destination):
        raise MobileMMError(f"{destination}: is the bundle itself; name another place")
    return str(pull(opened.folder, destination).folder)


def pull(source: str | Path, destination: str | Path) -> Bundle:
    """Fetches a bundle from a folder or a hub repository to the folder `destination`, and opens it there.

    A repository is written `hub:OWNER/NAME`, or OWNER/NAME when there is no such folder. A bundle that is at
    the destination already is updated.

    What was fetched of an interrupted pull lies beside the destination and is used again.

    Raises MobileMMError when the source is no whole bundle, cannot be reached, or the destination holds
    something that is no bundle.
    """
    destination = Path(os.path.realpath(destination))
    recover(destination)
    refuse_occupied(destination, overwrite=True)
    origin = _open_source(str(source))
    staging = destination.with_name(f".{destination.name}.pulling")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(staging)
        if lock is None:
            raise MobileMMError(f"{destination}: another process is pulling to it; wait for its end")
        try:
            _fetch_all(origin, staging, destination)
            bundle = open_bundle(staging)
            put_in_place(staging, destination)
        finally:
            os.close(lock)
    except OSError as error:
        raise MobileMMError(
            f"{destination}: cannot be written ({error.strerror or one_line(error)})"
        ) from error
    return Bundle(destination, bundle.manifest)


class Source(Protocol):
    """Where a bundle comes from."""

    manifest: Manifest
    raw_manifest: bytes

    def fetch(self, file: File, staging: Path) -> None:
        """Brings a file into the folder, going on with what is there of it. Raises MobileMMError."""


class FolderSource:
    """A bundle in a folder of this computer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        with open_plain(folder, MANIFEST) as opened:
            self.raw_manifest = opened.read(LARGEST_MANIFEST)

    def fetch(self, file: File, staging: Path) -> None:
        with open_plain(self.folder, file.path) as source, open(staging / file.path, "ab") as target:
            if os.fstat(source.fileno()).st_size != file.bytes:
                raise MobileMMError(f"{self.folder / file.path}: has not the size that {MANIFEST} says")
            source.seek(target.tell())
            shutil.copyfileobj(source, target, 2**22)


class HubSource:
    """A bundle in a repository of the hub, at the commit that was its newest when it was opened."""

    def __init__(self, repository: str) -> None:
        from huggingface_hub import HfApi

        self.repository, self.api = repository, HfApi()
        with _hub_errors(repository):
            info = self.api.model_info(repository, files_metadata=True)
        self.commit = info.sha
        self.found = {sibling.rfilename: sibling for sibling in info.siblings or []}
        size = self.found[MANIFEST].size if MANIFEST in self.found else None
        if size is None or size > LARGEST_MANIFEST:
            wrong = "there is none" if size is None else f"{size:,} bytes are too many"
            raise MobileMMError(f"{HUB}{repository}: is no bundle ({MANIFEST}: {wrong})")
        with _hub_errors(repository):
            path = self.api.hf_hub_download(repository, MANIFEST, revision=self.commit)
        self.raw_manifest = Path(path).read_bytes()
        self.manifest = parse_manifest(self.raw_manifest, Path(f"{HUB}{repository}") / MANIFEST)

    def fetch(self, file: File, staging: Path) -> None:
        found = self.found.get(file.path)
        stored = found.lfs.sha256 if found is not None and found.lfs is not None else file.sha256
        if found is None or found.size != file.bytes or stored != file.sha256:
            wrong = "missing" if found is None else "not the file that the manifest lists"
            raise MobileMMError(
                f"{HUB}{self.repository}: {file.path} is {wrong}; the bundle must be pushed again"
            )
        # The hub's client keeps what it has of a file elsewhere, and goes on with that.
        (staging / file.path).unlink(missing_ok=True)
        with _hub_errors(self.repository):
            self.api.hf_hub_download(
                self.repository, file.path, revision=self.commit, local_dir=staging, force_download=False
            )


def _open_source(source: str) -> Source:
    if not source.startswith(HUB):
        folder = Path(source).expanduser()
        if folder.exists() or not re.fullmatch(REPOSITORY, source):
            return FolderSource(folder)
    return HubSource(_repository(source))


def _repository(name: str) -> str:
    repository = name.removeprefix(HUB)
    if not re.fullmatch(REPOSITORY, repository):
        raise MobileMMError(f"{name}: is no name of a hub repository; write hub:OWNER/NAME")
    return repository


def _fetch_all(origin: Source, staging: Path, destination: Path) -> None:
    """Fills the staging folder: with what it has, what the destination has, and the rest from the source."""
    wanted = {file.path for file in origin.manifest.files}
    for path in sorted(staging.rglob("*"), reverse=True):
        relative = path.relative_to(staging).as_posix()
        if path.is_symlink() or (not path.is_dir() and relative not in wanted and relative[0] != "."):
            path.unlink()
    for file in origin.manifest.files:
        if _holds(staging, file):
            continue
        target = staging / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if _holds(destination, file):
            target.unlink(missing_ok=True)
            _link_or_copy(destination / file.path, target)
            continue
        resumed = target.exists() and 0 < target.stat().st_size < file.bytes
        if not resumed:
            target.unlink(missing_ok=True)
        origin.fetch(file, staging)
        if resumed and not _holds(staging, file):  # what was there was of another version
            target.unlink()
            origin.fetch(file, staging)
        if not _holds(staging, file):
            target.unlink()
            raise MobileMMError(f"{file.path}: did not arrive as the source's manifest says; pull again")
    (staging / MANIFEST_SHA256).write_bytes(manifest_digest(origin.raw_manifest))
    (staging / MANIFEST).write_bytes(origin.raw_manifest)
    shutil.rmtree(staging / ".cache", ignore_errors=True)  # the hub client's
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _holds(folder: Path, file: File) -> bool:
    """Whether a folder has a file with the size and hash that it should have."""
    path = folder / file.path
    try:
        return path.stat().st_size == file.bytes and file_sha256(folder, file.path) == file.sha256
    except (MobileMMError, OSError):
        return False


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # file systems without hard links, as on most drives that are carried about
        shutil.copyfile(source, target)


def _push_to_hub(bundle: Bundle, repository: str, private: bool) -> str:
    """One commit: files that differ are sent, those that are no longer the bundle's deleted."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    with _hub_errors(repository):
        url = api.create_repo(repository, private=private, exist_ok=True)
        there = {
            sibling.rfilename: sibling.lfs.sha256 if sibling.lfs is not None else None
            for sibling in api.model_info(repository, files_metadata=True).siblings or []
        }
        files = {file.path: file.sha256 for file in bundle.manifest.files}
        operations: list[Any] = [
            CommitOperationAdd(path, str(bundle.folder / path))
            for path, sha256 in files.items()
            if there.get(path) != sha256
        ]
        data = (bundle.folder / MANIFEST).read_bytes()
        operations.append(CommitOperationAdd(MANIFEST, data))
        operations.append(CommitOperationAdd(MANIFEST_SHA256, manifest_digest(data)))
        operations += [
            CommitOperationDelete(path)
            for path in there
            if path not in files and path not in (MANIFEST, MANIFEST_SHA256) and not path.startswith(".")
        ]
        api.create_commit(repository, operations, commit_message=f"Bundle {bundle.manifest.model.name[:80]}")
    return str(url)


class _hub_errors:
    """Whatever the hub's client raises (a dozen types), as one line."""

    def __init__(self, repository: str) -> None:
        self.repository = repository

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, MobileMMError):
            raise MobileMMError(
                f"{HUB}{self.repository}: the hub could not be reached or refused"
                f" ({type(error).__name__}: {one_line(error, 200)}); `hf auth login` gives access"
            ) from error
