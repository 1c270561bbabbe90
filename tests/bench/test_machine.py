"""The machine's own figures, against what the system or a made-up one tells."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mobilemm.bench import machine


def counter(root: Path, name: str, value: int, limit: int = 1_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / "energy_uj"


def test_energy_is_of_whole_packages_and_counters_wrap(tmp_path: Path) -> None:
    first, second = counter(tmp_path, "intel-rapl:0", 999_000), counter(tmp_path, "intel-rapl:1", 10)
    inside = counter(tmp_path, "intel-rapl:0:0", 5)
    meter = machine.EnergyMeter(tmp_path)
    assert meter.known
    first.write_text("499\n")  # 1,001 µJ to the limit and round, and 499 more
    second.write_text("2010\n")
    inside.write_text("900000\n")
    assert meter.joules() == pytest.approx((1_001 + 499 + 2_000) / 1e6)


def test_no_counter_is_no_energy(tmp_path: Path) -> None:
    meter = machine.EnergyMeter(tmp_path)
    assert not meter.known
    assert meter.joules() == 0


def test_this_machine() -> None:
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    assert machine.processor()
    # Between an old telephone and the largest servers.
    assert 1e8 < machine.read_bandwidth(1, rounds=1) < 1e13
    assert 1e8 < machine.operation_rate(1, rounds=1) < 1e16
    assert all(1 < clock < 10_000 for clock in machine.condition().clock_mhz)
