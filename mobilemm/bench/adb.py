"""A bundle measured on an Android phone by the demo app: adb brings the bundle there, and the result back.

The other half is `BenchmarkActivity` and `BenchmarkFolder` in android_demo.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mobilemm import __version__
from mobilemm.bench.limits import Rates, decode_limit, load_limit, prefill_limit
from mobilemm.bench.result import MOST_BYTES, Figure, Result, Settings, read_result
from mobilemm.bench.subject import decoding_of
from mobilemm.errors import MobileMMError, one_line
from mobilemm.runtime.bundle import MANIFEST, MANIFEST_SHA256, Bundle, file_sha256, open_bundle, read_manifest

APP = "org.mobilemm.demo"
ACTIVITY = f"{APP}/.BenchmarkActivity"
APK = "build/android/mobilemm-demo.apk (`make android` builds it)"
# What the app has a runtime for.
TARGETS = ("onnx",)

FILES = f"/sdcard/Android/data/{APP}/files"
BUNDLES = f"{FILES}/bench"
OUT = f"{FILES}/adb.json"
STATE = f"{OUT}.state"

# Bytes that are left free on the phone, and bytes a second that the slowest cable carries.
RESERVE = 64 * 2**20
SLOWEST = 1_000_000
# Seconds: between two looks at the phone, until the app must have started, until a silent phone is lost.
POLL, START, LOST = 2.0, 20.0, 30.0

# By what adb says of a phone: what its owner can do.
ADVICE = {
    "unauthorized": "unlock it and allow USB debugging for this computer",
    "authorizing": "try again in a moment",
    "offline": "plug it in anew, or try `adb reconnect offline`",
    "no permissions": "a udev rule is missing (Debian: apt-get install android-sdk-platform-tools-common)",
    "not found": "it is no longer connected",
    "recovery": "start Android on it",
    "sideload": "start Android on it",
    "bootloader": "start Android on it",
}


class Unreachable(MobileMMError):
    """adb does not reach the phone."""


def bench_adb(
    folder: Path, settings: Settings, serial: str, report: Callable[[str], None] = lambda _: None
) -> Result:
    """Measures a bundle on a phone. `serial` is as `adb devices` has it; empty, the only phone is taken.

    Files that the phone has already are not sent again. Raises MobileMMError for a bundle that is damaged or
    for another runtime, when there is no adb, phone or app, and when the app fails or does not answer.
    """
    target = read_manifest(folder).target
    if target not in TARGETS:
        raise MobileMMError(
            f"{folder}: the Android app runs bundles for {', '.join(TARGETS)}, this one is for {target}:"
            " export the model with --target onnx"
        )
    phone = connect(serial)
    report("looking at the phone")
    _check_app(phone)
    report("checking the bundle")
    bundle = open_bundle(folder)
    name = _send(phone, bundle, report)
    content = _measure(phone, name, settings, report)
    return _result(phone, bundle, settings, content)


# --- adb ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phone:
    """A phone that adb reaches. All methods raise Unreachable when it does not any more."""

    adb: str
    serial: str

    def shell(self, command: str, seconds: float = 60) -> tuple[int, str]:
        """Runs a command of the phone's shell: its exit code, and what it says."""
        done = self._run(["shell", command], seconds)
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace")

    def push(self, source: Path, target: str) -> None:
        """Sends a file. Raises MobileMMError when it is not there as a whole."""
        command = [self.adb, "-s", self.serial, "push", str(source), target]
        done = _run(command, 60 + source.stat().st_size / SLOWEST)
        if done.returncode:
            # Some versions of adb complain of this on standard output.
            said = _complaint(done.stderr + done.stdout) or f"exit code {done.returncode}"
            if any(state in said for state in ADVICE):
                raise Unreachable(_unusable(self.serial, said))
            reason = said.rpartition(": remote ")[2]
            raise MobileMMError(f"adb:{self.serial}: {source} could not be sent: {reason}")

    def read(self, path: str) -> bytes:
        """A file's bytes."""
        return self._run(["exec-out", f"cat {shlex.quote(path)}"], 60 + MOST_BYTES / SLOWEST).stdout

    def _run(self, words: list[str], seconds: float) -> subprocess.CompletedProcess[bytes]:
        done = _run([self.adb, "-s", self.serial, *words], seconds)
        complaint = _complaint(done.stderr)
        if complaint is not None:
            raise Unreachable(_unusable(self.serial, complaint))
        return done


def connect(serial: str) -> Phone:
    """The phone of that serial number; empty, the only one. Raises MobileMMError when it cannot be used."""
    adb = shutil.which("adb")
    if adb is None:
        raise MobileMMError(
            "there is no adb on the PATH: install Android's platform-tools (Debian: apt-get install adb)"
        )
    states = _devices(adb)
    serial = serial or os.environ.get("ANDROID_SERIAL", "")
    if not serial:
        ready = [name for name, state in states.items() if state.split()[0] == "device"]
        if len(ready) > 1:
            raise MobileMMError(
                f"{len(ready)} phones are connected: name one of them, --device"
                f" {' or '.join(f'adb:{name}' for name in ready)}"
            )
        if not states:
            raise MobileMMError(
                "no phone is connected: switch on its USB debugging and plug it in, or `adb connect HOST`"
            )
        serial = (ready or list(states))[0]
    if serial not in states:
        raise MobileMMError(
            f"adb:{serial} is not connected; connected are: {', '.join(states) or 'no phones at all'}"
        )
    if states[serial].split()[0] != "device":
        raise MobileMMError(_unusable(serial, states[serial]))
    return Phone(adb, serial)


def _devices(adb: str) -> dict[str, str]:
    """Serial number → state, and whatever else `adb devices -l` tells."""
    try:
        done = _run([adb, "devices", "-l"], 30)
    except Unreachable as error:
        raise MobileMMError(f"{error}: `adb kill-server`, then try again") from error
    if done.returncode:
        said = _complaint(done.stderr) or one_line(done.stderr.decode(errors="replace"))
        raise MobileMMError(f"adb's server does not start ({said}): `adb kill-server`, then try again")
    _, _, listed = done.stdout.decode(errors="replace").partition("List of devices attached")
    rows = (re.match(r"(\(no serial number\)|\S+)\s+(\S.*)", line) for line in listed.splitlines())
    return {row[1]: row[2] for row in rows if row is not None}


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        words = one_line(" ".join(command[1:]), 80)
        raise Unreachable(f"`adb {words}` gave no answer within {seconds:.0f} s") from None
    except OSError as error:
        raise MobileMMError(f"{command[0]}: cannot be run ({error.strerror})") from error


def _complaint(said: bytes) -> str | None:
    """adb's own words, apart from those of a command on the phone."""
    for line in said.decode(errors="replace").splitlines():
        if line.startswith(("error: ", "adb: ")):
            return one_line(line.removeprefix("adb: ").removeprefix("error: "))
    return None


def _unusable(serial: str, said: str) -> str:
    for state, advice in ADVICE.items():
        if state in said:
            return f"adb:{serial}: {state}: {advice}"
    return f"adb:{serial}: {said}"


# --- the app ------------------------------------------------------------------------------------------------


def _check_app(phone: Phone) -> None:
    """Raises MobileMMError when the app is not there, or not the one for this mobilemm."""
    _, said = phone.shell(f"pm path {APP}")
    if not said.startswith("package:"):
        if said.strip():
            raise MobileMMError(f"adb:{phone.serial}: its apps cannot be listed: {one_line(said)}")
        raise MobileMMError(f"adb:{phone.serial}: the app is not installed: adb install {APK}")
    _, said = phone.shell(f"dumpsys package {APP}")
    found = re.search(r"versionName=(\S+)", said)
    version = found[1] if found is not None else "unknown"
    if version.split(".")[:2] != __version__.split(".")[:2]:
        raise MobileMMError(
            f"adb:{phone.serial}: the app is of version {version}, mobilemm of {__version__}:"
            f" adb install -r {APK}"
        )


def _start(phone: Phone, *extras: str) -> None:
    """Starts the app's activity, which need not be there yet when this returns."""
    command = f"am start -n {ACTIVITY} {' '.join(shlex.quote(word) for word in extras)}"
    code, said = phone.shell(command)
    problem = re.search(r"^(Error: .*|.*Exception: .*)$", said, re.MULTILINE)
    if code or problem:
        raise MobileMMError(
            f"adb:{phone.serial}: the app's benchmark does not start:"
            f" {one_line(problem[1] if problem else said)}"
        )


# --- the bundle ---------------------------------------------------------------------------------------------


def _send(phone: Phone, bundle: Bundle, report: Callable[[str], None]) -> str:
    """Brings the bundle into the app's folder; the name that it has there."""
    name = re.sub(r"[^A-Za-z0-9._+-]", "-", bundle.folder.resolve().name)[:100].strip(".+-") or "bundle"
    place = f"{BUNDLES}/{name}"
    _make_place(phone)
    wanted = {file.path: file.sha256 for file in bundle.manifest.files}
    beside = [path for path in (MANIFEST, MANIFEST_SHA256) if (bundle.folder / path).exists()]
    wanted |= {path: file_sha256(bundle.folder, path) for path in beside}
    report("comparing with what the phone has")
    files, folders = _listing(phone, place)
    needed = {str(parent) for path in wanted for parent in PurePosixPath(path).parents}
    # Before the new ones, for which they make room.
    stale = [path for path, digest in files.items() if wanted.get(path) != digest]
    stale += [path for path in folders if path not in needed]
    if stale:
        phone.shell(f"cd {shlex.quote(place)} && rm -rf -- {' '.join(map(shlex.quote, stale))}")
    missing = [path for path in wanted if files.get(path) != wanted[path]]
    sizes = {path: (bundle.folder / path).stat().st_size for path in missing}
    _check_space(phone, sum(sizes.values()))
    phone.shell("mkdir -p " + " ".join(shlex.quote(f"{place}/{parent}") for parent in sorted(needed)))
    for index, path in enumerate(missing):
        report(f"sending {path} ({sizes[path] / 1e6:,.1f} MB, {index + 1} of {len(missing)} files)")
        try:
            phone.push(bundle.folder.resolve() / path, f"{place}/{path}")
        except BaseException as error:
            # On a full phone the other files are of no use either.
            gone = place if "No space left on device" in str(error) else f"{place}/{path}"
            with suppress(MobileMMError):
                phone.shell(f"rm -rf {shlex.quote(gone)}", 10)
            raise
    # What the shell makes belongs to the shell, and the app must read it.
    phone.shell(f"chmod -R a+rX {shlex.quote(place)}")
    return name


def _make_place(phone: Phone) -> None:
    """Lets the app make its folder: one that the shell had made would not be the app's."""
    there = f"[ -d {BUNDLES} ]"
    if phone.shell(there)[0] == 0:
        return
    _start(phone)
    begun = time.monotonic()
    while phone.shell(there)[0] != 0:
        if time.monotonic() - begun > START:
            raise MobileMMError(
                f"adb:{phone.serial}: the app does not make its folder {BUNDLES}: open it on the phone once"
            )
        time.sleep(min(POLL, 1))


def _listing(phone: Phone, place: str) -> tuple[dict[str, str], list[str]]:
    """Files below a folder of the phone with their SHA-256, and folders; nothing where it is not there."""
    _, said = phone.shell(
        f"cd {shlex.quote(place)} && find . -mindepth 1 -type d && find . -type f -exec sha256sum {{}} +", 600
    )
    files = {match[2]: match[1] for match in re.finditer(r"^([0-9a-f]{64})  \./(.+)$", said, re.MULTILINE)}
    return files, re.findall(r"^\./(.+)$", said, re.MULTILINE)


def _check_space(phone: Phone, needed: int) -> None:
    """Raises MobileMMError when so many bytes do not fit; not where the phone does not tell."""
    found = re.search(r"\s(\d+)\s+\d+%\s", phone.shell(f"df -k {BUNDLES}")[1])
    free = None if found is None else 1024 * int(found[1])
    if needed and free is not None and free < needed + RESERVE:
        raise MobileMMError(
            f"adb:{phone.serial}: No space left on device: {needed / 1e6:,.0f} MB are to be sent,"
            f" {free / 1e6:,.0f} MB are free, of which {RESERVE / 1e6:,.0f} MB stay so"
        )


# --- the measurement ----------------------------------------------------------------------------------------


def _measure(phone: Phone, name: str, settings: Settings, report: Callable[[str], None]) -> bytes:
    """What the app writes. Raises MobileMMError with the app's own words when it fails."""
    numbers = {
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "images": settings.images,
        "runs": settings.runs,
        "threads": settings.threads or 0,
    }
    extras = ["--ez", "run", "true", "--es", "bundle", name, "--es", "out", PurePosixPath(OUT).name]
    for key, number in numbers.items():
        extras += ["--ei", key, str(number)]
    tidy = f"rm -f {OUT} {STATE}"
    # In a process of its own, with nothing of an earlier run in its memory.
    phone.shell(f"am force-stop {APP}; {tidy}")
    try:
        _start(phone, *extras)
        _wait(phone, settings, report)
        content = phone.read(OUT)
        phone.shell(tidy)
        return content
    except BaseException:
        with suppress(MobileMMError):
            phone.shell(f"am force-stop {APP}; {tidy}", 10)
        raise


def _wait(phone: Phone, settings: Settings, report: Callable[[str], None]) -> None:
    """Until the result is there."""
    most = 600 + (settings.runs + 1) * (
        2 * settings.new_tokens + settings.prompt_tokens / 2 + 60 * settings.images
    )
    # In this order: what an app that has ended wrote at last is read.
    look = f"pidof {APP} >/dev/null && echo alive; cat {STATE} 2>/dev/null; [ -f {OUT} ] && echo done"
    begun = heard = time.monotonic()
    step, started = "starting", False
    while True:
        try:
            lines = phone.shell(look, 30)[1].splitlines()
            heard = time.monotonic()
        except Unreachable:
            if time.monotonic() - heard > LOST:
                raise
            report("the phone does not answer")
            time.sleep(POLL)
            continue
        if "done" in lines:
            return
        for line in lines:
            kind, _, text = line.partition(": ")
            if kind == "failed":
                raise MobileMMError(f"adb:{phone.serial}: {one_line(text)}")
            step = text if kind == "step" else step
        now = time.monotonic() - begun
        if "alive" not in lines and (started or now > START):
            raise MobileMMError(
                f"adb:{phone.serial}: the app ended while {step}; `adb logcat -d -b crash` tells why, and"
                " where it tells nothing, memory was short"
            )
        if now > most:
            raise MobileMMError(
                f"adb:{phone.serial}: no result within {most / 60:.0f} minutes, the app is still {step}:"
                " measure with fewer --runs or --new-tokens"
            )
        started = started or "alive" in lines
        report(f"{step} ({now:.0f} s)")
        time.sleep(POLL)


def _result(phone: Phone, bundle: Bundle, settings: Settings, data: bytes) -> Result:
    where = f"adb:{phone.serial}: the app's result"
    try:
        content = json.loads(data) if len(data) <= MOST_BYTES else None
    except (ValueError, RecursionError) as error:
        raise MobileMMError(f"{where} is not JSON") from error
    if not isinstance(content, list) or len(content) != 1:
        raise MobileMMError(f"{where} is not a list of one")
    result = read_result(content[0], where)
    if result.bundle.digest != file_sha256(bundle.folder, MANIFEST):
        raise MobileMMError(f"{where} is of another bundle than {bundle.folder}: adb install -r {APK}")
    absent = dict(result.absent)
    for key, asked in settings.model_dump().items():
        given = getattr(result.settings, key)
        if given != asked:
            absent[key] = f"the app does not take {asked}" + ("" if given is None else f", but {given}")
    return result.model_copy(
        update={"device": f"adb:{phone.serial}", "absent": absent, "figures": _with_limits(result, bundle)}
    )


def _with_limits(result: Result, bundle: Bundle) -> list[Figure]:
    """Figures beside what the phone's memory allows.

    What the app's compiled loops multiply a second is less than a runtime's kernels could: it limits nothing.
    """
    settings, decoding = result.settings, decoding_of(bundle.manifest)
    if not result.machine.bandwidth or not result.machine.operations:
        return result.figures
    rates = Rates(result.machine.bandwidth, result.machine.operations)
    middle = settings.prompt_tokens + settings.new_tokens / 2
    limits = {
        f"pp{settings.prompt_tokens}": prefill_limit(decoding, settings, rates),
        f"tg{settings.new_tokens}": decode_limit(decoding, middle, rates),
        "load_warm": load_limit(decoding, rates),
    }
    known = {name: limit for name, limit in limits.items() if limit.by == "bandwidth"}
    return [
        figure.model_copy(update={"limit": known.get(figure.name, figure.limit)}) for figure in result.figures
    ]
