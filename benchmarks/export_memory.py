"""What an export costs: memory, time and bytes, watched from outside while `mobilemm export` runs.

    python scripts/random_checkpoint.py /tmp/mobilevlm-1.7b
    python benchmarks/export_memory.py [--keep FOLDER] /tmp/mobilevlm-1.7b [-- --q-llm int8 …]

Every 20 ms RssAnon (memory of its own) and RssFile (files mapped, which the system may drop at any time) are
read from /proc/PID/status of the process; so Linux only. What stands behind `--` goes to the command.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02


@dataclass
class Peak:
    """The most that was seen, in bytes, and the seconds that it took. `mapped` is at the peak of the sum."""

    anonymous: int = 0
    resident: int = 0
    seconds: float = 0.0

    def see(self, anonymous: int, mapped: int) -> None:
        """Takes one sample."""
        self.anonymous = max(self.anonymous, anonymous)
        self.resident = max(self.resident, anonymous + mapped)


def watch(command: list[str]) -> tuple[Peak, dict[str, Peak], float]:
    """Runs a command; its peaks, those of each phase that it tells of on stderr, and seconds of CPU time."""
    begun = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    phase = "starting"
    phases = {phase: Peak()}
    changed = begun

    def follow() -> None:
        nonlocal phase, changed
        assert process.stderr is not None
        for line in process.stderr:
            print(f"  {time.monotonic() - begun:6.1f} s  {line.rstrip()}", file=sys.stderr, flush=True)
            now = time.monotonic()
            phases[phase].seconds += now - changed
            phase, changed = line.strip(), now
            phases.setdefault(phase, Peak())

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    whole = Peak()
    while process.poll() is None:
        sample = memory(process.pid)
        if sample is not None:
            whole.see(*sample)
            phases[phase].see(*sample)
        time.sleep(INTERVAL)
    thread.join()
    whole.seconds = time.monotonic() - begun
    phases[phase].seconds += time.monotonic() - changed
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}")
    times = os.times()
    return whole, phases, times.children_user + times.children_system


def memory(pid: int) -> tuple[int, int] | None:
    """Anonymous and mapped resident memory in bytes, None when the process is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    found = {name: 1024 * int(kb) for name, kb in re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE)}
    if "RssAnon" not in found:
        return None
    return found["RssAnon"] + found.get("RssShmem", 0), found["RssFile"]


def bits_per_weight(bundle: Path) -> float:
    """Of the language model: bits of decoder and embedding, scales included, by their parameters."""
    parts = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["parts"]
    chosen = [parts["decoder"], parts["embed"]]
    files = {file for part in chosen for file in part["files"]}  # a tied table lies in one file for both
    size = sum((bundle / file).stat().st_size for file in files)
    shared = bool(set(parts["decoder"]["files"]) & set(parts["embed"]["files"]))
    parameters = parts["decoder"]["parameters"] + (0 if shared else parts["embed"]["parameters"])
    return 8 * size / parameters


def main() -> None:
    """Reads the command line; prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--keep", type=Path, help="where the bundle goes; left out, it is not kept")
    parser.add_argument("flags", nargs="*", help="for the export, behind --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bundle = given.keep or Path(temporary) / "bundle"
        command = [sys.executable, "-m", "mobilemm", "export", given.checkpoint, "-o", str(bundle)]
        whole, phases, cpu = watch([*command, *given.flags])
        size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
        bits = bits_per_weight(bundle)
    print(f"{'phase':<24}{'s':>8}{'anonymous GB':>14}{'resident GB':>14}")
    for name, peak in phases.items():
        print(f"{name[-23:]:<24}{peak.seconds:8.1f}{peak.anonymous / 1e9:14.2f}{peak.resident / 1e9:14.2f}")
    print(f"{'all':<24}{whole.seconds:8.1f}{whole.anonymous / 1e9:14.2f}{whole.resident / 1e9:14.2f}")
    print(f"CPU {cpu:.0f} s; bundle {size:,} bytes; {bits:.2f} bits per weight of the language model")


if __name__ == "__main__":
    main()
