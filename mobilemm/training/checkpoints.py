"""A run's folder: checkpoints that are whole or not there, and what the run must find unchanged to go on."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from mobilemm.errors import MobileMMError

WRITING = ".writing"
_DELETING = ".deleting"
_RUN = "run.json"


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run; one whose writing was cut short has no such name."""
    return max(_checkpoints(run), key=_step, default=None)


def put_in_place(run: Path, name: str, keep: int) -> Path:
    """Gives a checkpoint that was written into the folder `.writing` its name, and removes the oldest ones.

    All of it is on the disk before it has the name, so that not even a power failure leaves half of one.
    """
    written = run / WRITING / name
    for path in written.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(written)
    place = run / name
    if place.exists():  # of a run that went on from an older one
        _remove(place)
    os.rename(written, place)
    (run / WRITING).rmdir()
    _sync(run)
    for old in sorted(_checkpoints(run), key=_step)[:-keep]:
        _remove(old)
    return place


def clean(run: Path) -> None:
    """Removes what a run left behind that was cut short while it wrote or deleted."""
    for path in [run / WRITING, *run.glob(f"{_DELETING}*")]:
        shutil.rmtree(path, ignore_errors=True)


def begin(run: Path, settings: dict[str, Any]) -> None:
    """Notes what this run is; when the folder already holds one, it must be the same.

    `settings` are those that decide the weights. Raises MobileMMError naming the key that differs.
    """
    path = run / _RUN
    settings = json.loads(json.dumps(settings, default=str))
    if path.is_file() and last_checkpoint(run) is not None:
        before = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted({*before, *settings}):
            if before.get(key) != settings.get(key):
                raise MobileMMError(
                    f"{run}: a run is here that began with {key!r}: {before.get(key)!r}, not"
                    f" {settings.get(key)!r}; go on with what it began with, or give another 'output'"
                )
        return
    run.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _checkpoints(run: Path) -> list[Path]:
    return [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _remove(folder: Path) -> None:
    """First the name goes, then the files: what is half deleted is no checkpoint any more."""
    gone = folder.with_name(f"{_DELETING}-{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
