"""What the Android app's benchmark writes is read by `mobilemm compare`; `make test-android` leaves one."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilemm.bench.result import read_results

WRITTEN = Path(__file__).parents[2] / "build" / "android" / "vectors" / "benchmark.json"


@pytest.mark.skipif(not WRITTEN.is_file(), reason="`make test-android` has not run here")
def test_the_apps_result_is_one() -> None:
    (result,) = read_results(WRITTEN)
    assert result.runtime.startswith("onnxruntime ")
    assert result.figure("tg4").median > 0
    assert result.figure("draw").median > result.figure("draw_step").median > 0
    assert len(result.figure("token").runs) == 8
    assert result.machine.bandwidth > 1e8
