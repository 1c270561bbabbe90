"""An adb whose phone is a folder: the command lines, outputs and exit codes of adb 1.0.41.

What a test wants of it stands in `script.json` of the folder $SCRIPTED_ADB; every call is a line of `calls`
there. Commands of the phone's shell are run by this computer's sh, in the folder `phone` and with the phone's
own tools (`am`, `pm`, …) as this file has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path(os.environ.get("SCRIPTED_ADB", "."))
PHONE = HOME / "phone"
APP = "org.mobilemm.demo"
FILES = PHONE / "sdcard" / "Android" / "data" / APP / "files"
TOOLS = ("am", "pm", "pidof", "dumpsys", "df")

UNAUTHORIZED = (
    "device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set\n"
    "Try 'adb kill-server' if that seems wrong.\nOtherwise check for a confirmation dialog on your device."
)
NO_SERVER = (
    "* daemon not running; starting now at tcp:5037\nADB server didn't ACK\n"
    "Full server startup log: /tmp/adb.1000.log\nServer had pid: 4711\n* failed to start daemon\n"
    "adb: failed to check server version: cannot connect to daemon"
)


def script() -> dict[str, Any]:
    return json.loads((HOME / "script.json").read_text())


def fail(said: str, code: int = 1, out: Any = sys.stderr) -> None:
    print(said, file=out)
    sys.exit(code)


# --- adb ----------------------------------------------------------------------------------------------------


def adb(words: list[str]) -> None:
    with (HOME / "calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    wanted = script()
    if words[0] == "devices":
        if wanted["server"] == "broken":
            fail(NO_SERVER)
        if wanted["server"] == "hangs":
            time.sleep(60)
        print("* daemon not running; starting now at tcp:5037", file=sys.stderr)
        print("* daemon started successfully", file=sys.stderr)
        print("List of devices attached")
        for serial, state in wanted["devices"].items():
            print(f"{serial:<22} {state}")
        print()
        return
    serial = None
    if words[0] == "-s":
        serial, words = words[1], words[2:]
    devices = wanted["devices"]
    if serial is None and len(devices) != 1:
        unreachable(words, "more than one device/emulator" if devices else "no devices/emulators found")
    state = next(iter(devices.values())) if serial is None else devices.get(serial)
    if state is None:
        unreachable(words, f"device '{serial}' not found")
    elif not state.startswith("device"):
        unreachable(words, UNAUTHORIZED if state.startswith("unauthorized") else "device offline")
    fault(words, wanted)
    if words[0] == "shell":
        sys.exit(shell(" ".join(words[1:])).returncode)
    elif words[0] == "exec-out":
        shell(" ".join(words[1:]))  # its exit code does not come through
    elif words[0] == "push":
        push(Path(words[1]), words[2])
    else:
        fail(f"adb: unknown command {words[0]}")


def unreachable(words: list[str], said: str) -> None:
    if words[0] == "push":
        fail(f"adb: error: failed to get feature set: {said}", out=sys.stdout)
    if words[0] == "logcat":
        print("- waiting for device -", file=sys.stderr)
        time.sleep(600)
    fail(f"error: {said}", 255 if words[0] == "exec-out" else 1)


def fault(words: list[str], wanted: dict[str, Any]) -> None:
    """The first fault of the script whose `match` is in the command: it happens `times`, then no more."""
    command = " ".join(words)
    for one in wanted["faults"]:
        if one["match"] in command and one["times"] > 0:
            one["times"] -= 1
            (HOME / "script.json").write_text(json.dumps(wanted))
            if words[0] == "push":
                half(Path(words[1]), words[2])
                fail(one["said"].format(source=words[1], target=words[2]), out=sys.stdout)
            if "interrupt" in one:
                os.kill(os.getppid(), signal.SIGINT)
                time.sleep(60)
            fail(one["said"], one.get("code", 1))


def shell(command: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PATH": f"{HOME / 'tools'}{os.pathsep}{os.environ['PATH']}"}
    there = command.replace("/sdcard/", f"{PHONE}/sdcard/")
    return subprocess.run(["sh", "-c", there], env=environment, stdin=subprocess.DEVNULL)


def push(source: Path, target: str) -> None:
    if not source.is_file():
        fail(f"adb: error: cannot stat '{source}': No such file or directory", out=sys.stdout)
    place = Path(f"{PHONE}{target}")
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)
    print(f"{source}: 1 file pushed. 25.3 MB/s ({source.stat().st_size} bytes in 0.010s)")


def half(source: Path, target: str) -> None:
    content = source.read_bytes()
    Path(f"{PHONE}{target}").write_bytes(content[: len(content) // 2])


# --- the phone's tools --------------------------------------------------------------------------------------


def am(words: list[str]) -> None:
    if words[0] == "force-stop":
        if running():
            os.kill(int((HOME / "pid").read_text()), signal.SIGKILL)
        (HOME / "pid").unlink(missing_ok=True)
        return
    assert words[:2] == ["start", "-n"]
    component, extras = words[2], words[3:]
    wanted = script()
    print(f"Starting: Intent {{ cmp={component}{' (has extras)' if extras else ''} }}")
    if not wanted["activity"]:
        package, _, name = component.partition("/")
        fail(
            f"Error type 3\nError: Activity class {{{package}/{package}{name}}} does not exist.",
            wanted["start_code"],
        )
    if wanted["app"] == "no folder":
        return
    (FILES / "bench").mkdir(parents=True, exist_ok=True)
    if running():
        print(
            "Warning: Activity not started, intent has been delivered to currently running top-most instance."
        )
        return
    command = [sys.executable, __file__, "app"]
    if wanted["benchmark"] and extras:
        # What the JVM's side takes: no switches of the screen's.
        command, extras = wanted["benchmark"], extras[3:]
    with (HOME / "app.log").open("a") as log:
        process = subprocess.Popen(
            [*command, str(FILES), *extras],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (HOME / "pid").write_text(str(process.pid))


def pm(words: list[str]) -> None:
    wanted = script()
    if wanted["booting"]:
        fail("cmd: Can't find service: package", 20)
    if words != ["path", APP] or wanted["version"] is None:
        sys.exit(1)
    print(f"package:/data/app/~~Rk3rzZvWqPqBtGqXQ0F0zA==/{APP}-4oYt5p1cK0mWzqJv1vB2Hw==/base.apk")


def dumpsys(words: list[str]) -> None:
    print(
        f"Packages:\n  Package [{words[1]}] (2f0c1b3):\n    userId=10234\n"
        "    versionCode=1 minSdk=26 targetSdk=35\n"
        f"    versionName={script()['version']}\n    splits=[base]"
    )


def df(words: list[str]) -> None:
    free = script()["free"]
    print("Filesystem     1K-blocks     Used Available Use% Mounted on")
    print(f"/dev/fuse      113159680 {113159680 - free // 1024:>8} {free // 1024:>9}  19% /storage/emulated")


def pidof(words: list[str]) -> None:
    if not running():
        sys.exit(1)
    print((HOME / "pid").read_text())


def running() -> bool:
    """A process that has ended may not have been waited for yet."""
    if not (HOME / "pid").exists():
        return False
    told = subprocess.run(
        ["ps", "-o", "stat=", "-p", (HOME / "pid").read_text()], capture_output=True, text=True
    )
    return told.stdout.strip() not in ("", "Z", "Z+", "Zs", "ZNs", "ZN")


def app(words: list[str]) -> None:
    """The app, as the script wants it; without extras it only stands there."""
    does, files = script()["app"], Path(words[0])
    extras = {words[at + 1]: words[at + 2] for at in range(1, len(words), 3)}
    if not extras:
        time.sleep(60)
    out = files / extras["out"]
    state = files / f"{out.name}.state"
    state.write_text("step: loading\n")
    if does == "dies":
        return
    if does == "hangs":
        time.sleep(60)
    if does == "fails":
        state.write_text("failed: parts/decoder.onnx: cannot be loaded (no memory)\n")
        time.sleep(60)
    result = json.loads((HOME / "result.json").read_text())
    manifest = files / "bench" / extras["bundle"] / "manifest.json"
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    result["bundle"]["digest"] = "0" * 64 if does == "measures another" else digest
    result["settings"] = {
        name: int(extras[name]) for name in ("prompt_tokens", "new_tokens", "images", "runs")
    }
    result["settings"]["threads"] = int(extras["threads"]) or None
    text = json.dumps([result])
    if does == "writes half":
        text = text[: len(text) // 2]
    draft = files / f".{out.name}.part"
    draft.write_text(text)
    draft.rename(out)
    state.unlink()
    time.sleep(60)


if __name__ == "__main__":
    if sys.argv[1] in (*TOOLS, "app"):
        globals()[sys.argv[1]](sys.argv[2:])
    else:
        adb(sys.argv[1:])
