"""Phones of a test's own, behind an adb of its own on the PATH."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mobilemm.bench import adb
from tests.bench import scripted_adb
from tests.bench.test_result import some_result

PIXEL = "device usb:1-2 product:shiba model:Pixel_8 device:shiba transport_id:1"


class Phones:
    """What adb and the phones behind it are to do; `folder` is the app's on the phone."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = home / "phone" / "sdcard" / "Android" / "data" / adb.APP / "files"
        self.script: dict[str, Any] = {
            "server": "runs",
            "devices": {"8A1X0B7C": PIXEL},
            "version": "0.1.0",
            "booting": False,
            "free": 50 * 10**9,
            "activity": True,
            "start_code": 0,
            "app": "measures",
            "benchmark": None,
            "faults": [],
        }

    def set(self, **changes: Any) -> None:
        self.script |= changes
        (self.home / "script.json").write_text(json.dumps(self.script))

    def fault(self, match: str, said: str, times: int = 1, **more: Any) -> None:
        self.set(faults=[{"match": match, "said": said, "times": times, **more}])

    def pushed(self) -> list[str]:
        """Files that were sent, below the bundle."""
        calls = [json.loads(line) for line in (self.home / "calls").read_text().splitlines()]
        (self.home / "calls").unlink()
        return sorted(call[-1].split("/bench/")[1].partition("/")[2] for call in calls if "push" in call)

    def left(self) -> list[str]:
        """All that is in the app's folder, apart from bundles."""
        return [path.name for path in self.folder.iterdir() if path.name != "bench"]

    def running(self) -> bool:
        """Whether the app is."""
        scripted_adb.HOME = self.home
        return scripted_adb.running()


@contextmanager
def scripted_phones(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phones]:
    """One phone that has the app, and all that it needs below `home`."""
    for folder in ("bin", "tools", "phone/sdcard/Android/data"):
        (home / folder).mkdir(parents=True)
    for place, name, words in [("bin", "adb", ""), *(("tools", name, name) for name in scripted_adb.TOOLS)]:
        command = shlex.join([sys.executable, scripted_adb.__file__])
        (home / place / name).write_text(f'#!/bin/sh\nexec {command} {words} "$@"\n')
        (home / place / name).chmod(0o755)
    (home / "result.json").write_text(some_result().model_dump_json())
    monkeypatch.setenv("SCRIPTED_ADB", str(home))
    monkeypatch.setenv("PATH", f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    for name, seconds in (("POLL", 0.02), ("START", 2.0), ("LOST", 0.5)):
        monkeypatch.setattr(adb, name, seconds)
    phones = Phones(home)
    phones.set()
    try:
        yield phones
    finally:
        scripted_adb.HOME = home
        scripted_adb.am(["force-stop"])
