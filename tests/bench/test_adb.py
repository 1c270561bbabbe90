"""The whole way to a phone and back, with an adb that says what adb says (`scripted_adb.py`)."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobilemm.bench import adb
from mobilemm.bench.adb import bench_adb
from mobilemm.bench.result import Settings, read_results
from mobilemm.errors import MobileMMError
from mobilemm.runtime.bundle import open_bundle
from tests.bench import scripted_adb
from tests.bench.phones import PIXEL, Phones, scripted_phones

SETTINGS = Settings(prompt_tokens=8, new_tokens=4, runs=2)
SHELL_NAME = "it-s-a--small---bundle"


@pytest.fixture
def phones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Phones]:
    with scripted_phones(tmp_path / "phones", monkeypatch) as phones:
        yield phones


def refused(folder: Path, serial: str = "", settings: Settings = SETTINGS) -> str:
    """The one line that says why not."""
    with pytest.raises(MobileMMError) as raised:
        bench_adb(folder, settings, serial)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- what goes well -----------------------------------------------------------------------------------------


def test_a_bundle_is_sent_and_measured(phones: Phones, small_bundle: Path) -> None:
    told: list[str] = []
    result = bench_adb(small_bundle, SETTINGS, "", told.append)
    assert result.device == "adb:8A1X0B7C"
    assert result.bundle.digest == hashlib.sha256((small_bundle / "manifest.json").read_bytes()).hexdigest()
    assert result.settings.model_dump() == SETTINGS.model_dump()
    assert result.figure("tg64").runs == [10.0, 12.0, 11.0]
    assert any("sending parts/decoder.onnx" in line for line in told)
    there = phones.folder / "bench" / SHELL_NAME
    assert open_bundle(there).manifest == open_bundle(small_bundle).manifest
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in there.rglob("*"))
    assert phones.left() == []


def test_the_command(phones: Phones, small_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "phone.json"
    command = [sys.executable, "-m", "mobilemm", "bench", str(small_bundle), "--json", str(out), "--device"]
    ended = subprocess.run([*command, "adb:"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "tg64" in ended.stdout
    assert [result.device for result in read_results(out)] == ["adb:8A1X0B7C"]
    phones.set(devices={})
    ended = subprocess.run([*command, "adb:8A1X0B7C"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: adb:8A1X0B7C is not connected; connected are: no phones at all\n"


def test_only_what_has_changed_is_sent(phones: Phones, small_bundle: Path, tmp_path: Path) -> None:
    files = sorted(path.relative_to(small_bundle).as_posix() for path in small_bundle.rglob("*.*"))
    bench_adb(small_bundle, SETTINGS, "8A1X0B7C")
    assert phones.pushed() == files
    bench_adb(small_bundle, SETTINGS, "8A1X0B7C")
    assert phones.pushed() == []

    # One file changes on the phone, one was never there, one and its folder ought not to be there.
    there = phones.folder / "bench" / SHELL_NAME
    (there / "tokenizer.json").write_bytes(b" " + (there / "tokenizer.json").read_bytes()[1:])
    (there / "parts" / "embed.onnx").unlink()
    (there / "it's old").mkdir()
    (there / "it's old" / 'a "file"').write_text("")
    bench_adb(small_bundle, SETTINGS, "8A1X0B7C")
    assert phones.pushed() == ["parts/embed.onnx", "tokenizer.json"]

    # The bundle changes here: its file and the manifest that lists it.
    changed = tmp_path / small_bundle.name
    shutil.copytree(small_bundle, changed)
    tokenizer, manifest = changed / "tokenizer.json", changed / "manifest.json"
    before = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    tokenizer.write_bytes(tokenizer.read_bytes().replace(b'"version"', b'"Version"', 1))
    after = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    manifest.write_text(manifest.read_text().replace(before, after))
    bench_adb(changed, SETTINGS, "8A1X0B7C")
    assert phones.pushed() == ["manifest.json", "tokenizer.json"]
    open_bundle(there)


def test_the_only_phone_that_is_ready_is_taken(
    phones: Phones, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phones.set(devices={"R58M123": "unauthorized usb:1-1 transport_id:3", "192.168.1.5:5555": PIXEL})
    assert bench_adb(small_bundle, SETTINGS, "").device == "adb:192.168.1.5:5555"
    phones.set(devices={"A": PIXEL, "B": PIXEL})
    monkeypatch.setenv("ANDROID_SERIAL", "B")
    assert bench_adb(small_bundle, SETTINGS, "").device == "adb:B"


def test_what_the_app_cannot_do_is_told(phones: Phones, small_bundle: Path) -> None:
    result = json.loads((phones.home / "result.json").read_text())
    result["absent"] = {"energy": "the battery is being charged"}
    (phones.home / "result.json").write_text(json.dumps(result))
    absent = bench_adb(small_bundle, Settings(threads=4), "").absent
    assert absent == {"energy": "the battery is being charged"}
    told = adb._result(
        adb.Phone("adb", "X"),
        open_bundle(small_bundle),
        Settings(runs=500, threads=2),
        json.dumps([{**result, "bundle": {**result["bundle"], "digest": digest(small_bundle)}}]).encode(),
    )
    assert told.absent["runs"] == "the app does not take 500, but 5"
    assert told.absent["threads"] == "the app does not take 2"


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_a_phone_may_be_away_for_a_moment(
    phones: Phones, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "LOST", 20.0)
    phones.fault("pidof", "error: device offline", times=3)
    told: list[str] = []
    bench_adb(small_bundle, SETTINGS, "", told.append)
    assert told.count("the phone does not answer") == 3


# --- what goes wrong before anything is sent ----------------------------------------------------------------


def test_no_adb(phones: Phones, small_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(phones.home / "tools"))
    assert refused(small_bundle).startswith("there is no adb on the PATH: install Android's platform-tools")


def test_a_server_that_does_not_start_or_answer(
    phones: Phones, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phones.set(server="broken")
    assert refused(small_bundle) == (
        "adb's server does not start (failed to check server version: cannot connect to daemon):"
        " `adb kill-server`, then try again"
    )
    phones.set(server="hangs")
    run = adb._run
    monkeypatch.setattr(adb, "_run", lambda command, _: run(command, 0.5))
    assert refused(small_bundle) == (
        "`adb devices -l` gave no answer within 0 s: `adb kill-server`, then try again"
    )


@pytest.mark.parametrize(
    ("devices", "serial", "said"),
    [
        ({}, "", "no phone is connected: switch on its USB debugging and plug it in, or `adb connect HOST`"),
        ({}, "X", "adb:X is not connected; connected are: no phones at all"),
        ({"A": PIXEL, "B": PIXEL}, "X", "adb:X is not connected; connected are: A, B"),
        ({"A": PIXEL, "B": PIXEL}, "", "2 phones are connected: name one of them, --device adb:A or adb:B"),
        (
            {"A": "unauthorized usb:1-1 transport_id:3"},
            "",
            "adb:A: unauthorized: unlock it and allow USB debugging for this computer",
        ),
        ({"A": "offline"}, "A", "adb:A: offline: plug it in anew, or try `adb reconnect offline`"),
        ({"A": "recovery usb:1-1"}, "", "adb:A: recovery: start Android on it"),
        ({"A": "host"}, "", "adb:A: host"),
    ],
)
def test_phones_that_cannot_be_used(
    phones: Phones, small_bundle: Path, devices: dict[str, str], serial: str, said: str
) -> None:
    phones.set(devices=devices)
    assert refused(small_bundle, serial) == said


@pytest.mark.parametrize("serial", ["082f59270073e1e3", "????????????", "(no serial number)"])
def test_no_permissions(phones: Phones, small_bundle: Path, serial: str) -> None:
    state = (
        "no permissions (user in plugdev group; are your udev rules wrong?); see"
        " [http://developer.android.com/tools/device.html] usb:1-1 transport_id:1"
    )
    phones.set(devices={serial: state})
    assert refused(small_bundle).startswith(f"adb:{serial}: no permissions: a udev rule is missing")


def test_a_phone_that_takes_its_permission_back(phones: Phones, small_bundle: Path) -> None:
    phones.fault("pm path", f"error: {scripted_adb.UNAUTHORIZED}")
    assert refused(small_bundle).startswith("adb:8A1X0B7C: unauthorized: unlock it")
    phones.fault("pm path", "error: closed")
    assert refused(small_bundle) == "adb:8A1X0B7C: closed"
    phones.fault("pm path", "error: device '8A1X0B7C' not found")
    assert refused(small_bundle) == "adb:8A1X0B7C: not found: it is no longer connected"


def test_an_app_that_is_not_there_or_another(phones: Phones, small_bundle: Path) -> None:
    phones.set(version=None)
    assert refused(small_bundle).startswith(
        "adb:8A1X0B7C: the app is not installed: adb install build/android/mobilemm-demo.apk"
    )
    phones.set(version="0.0.9")
    assert "the app is of version 0.0.9, mobilemm of 0." in refused(small_bundle)
    phones.set(booting=True)
    assert refused(small_bundle) == (
        "adb:8A1X0B7C: its apps cannot be listed: cmd: Can't find service: package"
    )
    assert phones.pushed() == []


def test_bundles_that_the_app_does_not_run(phones: Phones, small_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small_bundle, other)
    text = (other / "manifest.json").read_text()
    changed = text.replace('"target": "onnx"', '"target": "coreml"').replace(".onnx", ".mlpackage")
    (other / "manifest.json").write_text(changed)
    assert refused(other) == (
        f"{other}: the Android app runs bundles for onnx, this one is for coreml: export the model with"
        " --target onnx"
    )
    assert "is no bundle" in refused(tmp_path)
    assert not (phones.home / "calls").exists()
    (other / "manifest.json").write_text(text)
    (other / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in refused(other)
    assert phones.pushed() == []


# --- what goes wrong while it is sent -----------------------------------------------------------------------


def test_a_full_phone(phones: Phones, small_bundle: Path) -> None:
    phones.set(free=60 * 2**20)
    assert "adb:8A1X0B7C: No space left on device: " in refused(small_bundle)
    assert phones.pushed() == []
    # Or it fills up meanwhile.
    phones.set(free=50 * 10**9)
    said = "adb: error: failed to copy '{source}' to '{target}': remote No space left on device"
    phones.fault("parts/decoder.onnx", said)
    source = small_bundle / "parts" / "decoder.onnx"
    assert refused(small_bundle) == f"adb:8A1X0B7C: {source} could not be sent: No space left on device"
    assert list((phones.folder / "bench").iterdir()) == []


def test_a_push_that_is_cut(phones: Phones, small_bundle: Path) -> None:
    said = "adb: error: failed to copy '{source}' to '{target}': no response: Connection reset by peer"
    phones.fault("parts/decoder.onnx", said)
    assert "decoder.onnx could not be sent: failed to copy" in refused(small_bundle)
    there = phones.folder / "bench" / SHELL_NAME
    assert not (there / "parts" / "decoder.onnx").exists()
    sent = phones.pushed()
    bench_adb(small_bundle, SETTINGS, "")
    again = phones.pushed()
    assert "parts/decoder.onnx" in again
    assert set(sent) & set(again) == {"parts/decoder.onnx"}

    # With the cable gone, the half stays, and is known for what it is.
    (there / "parts" / "decoder.onnx").unlink()
    phones.set(
        faults=[
            {
                "match": "parts/decoder.onnx",
                "said": "adb: error: failed to get feature set: device '8A1X0B7C' not found",
                "times": 2,
            }
        ]
    )
    assert refused(small_bundle) == "adb:8A1X0B7C: not found: it is no longer connected"
    assert (there / "parts" / "decoder.onnx").exists()
    phones.pushed()
    phones.set(faults=[])
    bench_adb(small_bundle, SETTINGS, "")
    assert phones.pushed() == ["parts/decoder.onnx"]
    open_bundle(there)


def test_an_app_that_does_not_make_its_folder(
    phones: Phones, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adb, "START", 0.2)
    phones.set(app="no folder")
    assert "the app does not make its folder /sdcard/Android/data/" in refused(small_bundle)


# --- what goes wrong while it is measured -------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1])
def test_an_activity_that_does_not_start(phones: Phones, small_bundle: Path, code: int) -> None:
    phones.set(activity=False, start_code=code)
    assert refused(small_bundle) == (
        "adb:8A1X0B7C: the app's benchmark does not start: Error: Activity class"
        " {org.mobilemm.demo/org.mobilemm.demo.BenchmarkActivity} does not exist."
    )


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("fails", "adb:8A1X0B7C: parts/decoder.onnx: cannot be loaded (no memory)"),
        ("dies", "adb:8A1X0B7C: the app ended while loading; `adb logcat -d -b crash` tells why"),
        ("writes half", "adb:8A1X0B7C: the app's result is not JSON"),
        ("measures another", "adb:8A1X0B7C: the app's result is of another bundle than "),
    ],
)
def test_an_app_that_fails(phones: Phones, small_bundle: Path, does: str, said: str) -> None:
    phones.set(app=does)
    assert refused(small_bundle).startswith(said)
    assert phones.left() == []


def test_a_result_that_is_not_as_the_schema_says(phones: Phones, small_bundle: Path) -> None:
    result = json.loads((phones.home / "result.json").read_text())
    (phones.home / "result.json").write_text(json.dumps({**result, "figures": []}))
    assert refused(small_bundle).startswith("adb:8A1X0B7C: the app's result: figures: List should have")


def test_an_app_that_takes_too_long(
    phones: Phones, small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phones.set(app="hangs")
    clock = time.monotonic
    monkeypatch.setattr(adb.time, "monotonic", lambda: 2000 * clock())
    monkeypatch.setattr(adb, "START", 1e9)
    assert "no result within 14 minutes, the app is still loading" in refused(small_bundle)
    assert not phones.running()


def test_a_phone_that_goes_away(phones: Phones, small_bundle: Path) -> None:
    phones.set(app="hangs")
    phones.fault("pidof", "error: device '8A1X0B7C' not found", times=10**6)
    assert refused(small_bundle) == "adb:8A1X0B7C: not found: it is no longer connected"


def test_an_interrupt_stops_the_app(phones: Phones, small_bundle: Path) -> None:
    bench_adb(small_bundle, SETTINGS, "")
    phones.set(app="hangs")
    phones.fault("pidof", "", interrupt=True)
    # Where tests run in a shell's background, it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            bench_adb(small_bundle, SETTINGS, "")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not phones.running()
    assert phones.left() == []
