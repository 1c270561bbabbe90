"""What the Swift package's benchmark writes is read by `mobilemm compare`; `make test-ios` leaves two."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from mobilemm.bench.result import json_schema, read_results

WRITTEN = Path(__file__).parents[2] / "build" / "ios" / "vectors"
RESULTS = ("benchmark.json", "benchmark-stepwise.json")
needs_results = pytest.mark.skipif(
    not all((WRITTEN / name).is_file() for name in RESULTS), reason="`make test-ios` has not run here"
)


@needs_results
@pytest.mark.parametrize("name", RESULTS)
def test_the_packages_results_follow_the_schema(name: str) -> None:
    jsonschema.validate(json.loads((WRITTEN / name).read_text()), json.loads(json_schema()))


@needs_results
def test_the_packages_result_is_one() -> None:
    (result,) = read_results(WRITTEN / "benchmark.json")
    assert result.runtime.startswith("onnxruntime ")
    assert result.figure("tg4").median > 0
    assert len(result.figure("token").runs) == 8
    assert result.figure("draw").median > result.figure("draw_step").median > 0
    assert result.machine.bandwidth > 1e8
    assert result.machine.operations > 1e7


@needs_results
def test_steps_that_are_calls_of_their_own_are_told_each() -> None:
    (result,) = read_results(WRITTEN / "benchmark-stepwise.json")
    assert {"denoiser", "image_decoder"} < result.bundle.parts.keys()
    assert len(result.figure("draw_step").runs) == 4 * len(result.figure("draw").runs) == 12
