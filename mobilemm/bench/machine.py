"""The machine under test: what it is, how fast it moves bytes and multiplies, and in what condition it is.

Linux tells most of this in /proc and /sys; elsewhere what cannot be read is left out.
"""

from __future__ import annotations

import os
import platform
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from mobilemm.bench.result import Condition

RAPL = Path("/sys/class/powercap")
THERMAL = Path("/sys/class/thermal")
READ_BYTES = 2**29
MATRIX = 1024


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Its name, as the system has it."""
    for key in ("model name", "Model", "Hardware"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
        if found is not None:
            return found[1].strip()
    return platform.processor() or platform.machine()


def memory() -> int:
    """Bytes of main memory, 0 where it is not told."""
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def condition() -> Condition:
    """Clocks, temperatures and load at this moment."""
    clocks = [
        int(text) / 1000
        for path in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        if (text := _read(path).strip()).isdecimal()
    ]
    if not clocks:
        info = _read(Path("/proc/cpuinfo"))
        clocks = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", info, re.MULTILINE)]
    celsius = {}
    for zone in sorted(THERMAL.glob("thermal_zone*")):
        with suppress(ValueError):
            celsius[_read(zone / "type").strip() or zone.name] = int(_read(zone / "temp")) / 1000
    try:
        load: float | None = os.getloadavg()[0]
    except (OSError, AttributeError):
        load = None
    return Condition(clock_mhz=clocks, celsius=celsius, load=load)


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes a second that `threads` read from memory together, the best of some rounds."""
    values = np.ones(READ_BYTES // 8)
    pieces = np.array_split(values, threads)

    def read() -> float:
        begun = time.perf_counter()
        list(pool.map(np.sum, pieces))
        return time.perf_counter() - begun

    with ThreadPoolExecutor(threads) as pool:
        return values.nbytes / min(read() for _ in range(rounds))


def operation_rate(threads: int, rounds: int = 5) -> float:
    """Multiplications and additions a second in float32, of `threads` together, the best of some rounds.

    Kernels for smaller numbers do more: a fraction of this limit can be above 1.
    """
    generator = np.random.default_rng(0)
    matrices = [generator.random((MATRIX, MATRIX), np.float32) for _ in range(threads)]

    def multiply() -> float:
        begun = time.perf_counter()
        list(pool.map(lambda matrix: matrix @ matrix, matrices))
        return time.perf_counter() - begun

    with ThreadPoolExecutor(threads) as pool:
        return threads * 2 * MATRIX**3 / min(multiply() for _ in range(rounds))


class EnergyMeter:
    """Joules of the processor's packages by Intel's and AMD's counters (RAPL), where they can be read."""

    def __init__(self, root: Path = RAPL) -> None:
        self._counters = {
            path: int(limit)
            for path in sorted(root.glob("intel-rapl:[0-9]*/energy_uj"))
            if path.parent.name.count(":") == 1  # whole packages, not their parts again
            and _read(path).strip().isdecimal()
            and (limit := _read(path.with_name("max_energy_range_uj")).strip()).isdecimal()
        }
        self._begun = self._now()

    @property
    def known(self) -> bool:
        return bool(self._counters)

    def joules(self) -> float:
        """Since the meter was made. A counter that wrapped round once is understood."""
        now = self._now()
        return sum(
            ((now[path] - self._begun[path]) % (limit + 1)) / 1e6 for path, limit in self._counters.items()
        )

    def _now(self) -> dict[Path, int]:
        return {path: int(_read(path)) for path in self._counters}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
