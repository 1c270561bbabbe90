"""Results on disk: what is written is valid and read back; what is not valid is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mobilemm.bench import result as contract
from mobilemm.bench.result import (
    BundleFacts,
    Condition,
    Figure,
    Limit,
    Machine,
    Result,
    Settings,
    json_schema,
    read_results,
    write_results,
)
from mobilemm.errors import MobileMMError


def some_result(**figures: list[float]) -> Result:
    """A result whose figures are rates, by name."""
    rates = figures or {"tg64": [10.0, 12.0, 11.0]}
    here = Condition(clock_mhz=[2500.0], celsius={"cpu": 51.5}, load=0.1)
    return Result(
        mobilemm="0.1.0",
        created="2026-11-01T00:00:00+00:00",
        device="host",
        runtime="onnxruntime 1.31.1",
        machine=Machine(
            system="Linux",
            processor="test",
            cores=2,
            memory=2**30,
            bandwidth=1e10,
            operations=1e11,
            before=here,
            after=here,
        ),
        bundle=BundleFacts(
            name="tiny", target="onnx", digest="0" * 64, bytes=10, parts={"decoder": 8}, bits={"decoder": 4}
        ),
        settings=Settings(),
        figures=[
            Figure(name=name, what="write", unit="tok/s", runs=runs, limit=Limit(best=100.0, by="bandwidth"))
            for name, runs in rates.items()
        ],
    )


def test_the_stored_schema_is_the_classes() -> None:
    stored = Path(contract.__file__).with_name("result_v1.schema.json").read_text(encoding="utf-8")
    assert stored == json_schema() + "\n", (
        "python -m mobilemm.bench.result > mobilemm/bench/result_v1.schema.json"
    )


def test_what_is_written_is_valid_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results = [some_result(), some_result(pp144=[400.0], tg64=[1.0])]
    write_results(results, path)
    jsonschema.validate(json.loads(path.read_text()), json.loads(json_schema()))
    assert read_results(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_median_spread_and_fraction_of_the_limit() -> None:
    rate = some_result(tg64=[40.0, 60.0, 50.0]).figure("tg64")
    assert (rate.median, rate.p10, rate.p90) == (50.0, 42.0, 58.0)
    assert rate.fraction == 0.5
    load = Figure(name="load", what="", unit="s", runs=[4.0], limit=Limit(best=1.0, by="bandwidth"))
    assert load.fraction == 0.25
    assert Figure(name="load", what="", unit="s", runs=[4.0]).fraction is None


def without_figures(content: Any) -> None:
    content[0]["figures"] = []


def with_infinity(content: Any) -> None:
    content[0]["figures"][0]["runs"] = [float("inf")]


def with_unit(content: Any) -> None:
    content[0]["figures"][0]["unit"] = "h"


def with_more(content: Any) -> None:
    content[0]["surprise"] = 1


def of_later_version(content: Any) -> None:
    content[0]["schema_version"] = 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_figures, "result 0: figures: List should have at least 1 item"),
        (with_infinity, "figures.0.runs.0"),
        (with_unit, "figures.0.unit"),
        (with_more, "surprise: Extra inputs are not permitted"),
        (of_later_version, "schema_version is 2, known here is 1"),
        (lambda content: content.clear(), "are a list"),
    ],
)
def test_wrong_files_are_one_line(tmp_path: Path, change: Any, said: str) -> None:
    content = [some_result().model_dump()]
    change(content)
    path = tmp_path / "r.json"
    path.write_text(json.dumps(content))
    with pytest.raises(MobileMMError) as raised:
        read_results(path)
    assert said in str(raised.value)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, '[{"schema_version": 1'])
def test_what_is_not_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(MobileMMError, match="is not JSON"):
        read_results(path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match="cannot be written"):
        write_results([some_result()], tmp_path / "no folder" / "r.json")
