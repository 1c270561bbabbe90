"""A benchmark's result, version 1: one schema for this computer, a board and a phone.

Plain data, as the manifest: what a phone writes is read by the same classes. The JSON Schema made of them is
`result_v1.schema.json`: `python -m mobilemm.bench.result`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from mobilemm.errors import MobileMMError
from mobilemm.runtime.manifest import Name, Strict, Text

SCHEMA_VERSION = 1
MOST_BYTES = 64 * 2**20

Unit = Literal["s", "tok/s", "B", "J"]
Positive = Annotated[float, Field(ge=0)]


class Limit(Strict):
    """The best that this machine could do, in the figure's unit, and what sets it: memory or arithmetic."""

    best: Positive
    by: Literal["bandwidth", "operations"]


class Figure(Strict):
    """One thing measured. `runs` are in the order in which they were made.

    Attributes:
        name: in llama-bench's words where it has one: `pp144` reads 144 tokens, `tg128` writes 128.
        what: the same for people.
    """

    name: Name
    what: Text
    unit: Unit
    runs: Annotated[list[Positive], Field(min_length=1, max_length=100_000)]
    limit: Limit | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.runs))

    @property
    def p10(self) -> float:
        return float(np.percentile(self.runs, 10))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.runs, 90))

    @property
    def higher_is_better(self) -> bool:
        return self.unit == "tok/s"

    @property
    def fraction(self) -> float | None:
        """Of the limit: 1 is as good as this machine allows."""
        if self.limit is None or not self.limit.best or not self.median:
            return None
        return self.median / self.limit.best if self.higher_is_better else self.limit.best / self.median


class Condition(Strict):
    """The machine at one moment: clock of each core in MHz and temperatures in °C, as far as it tells."""

    clock_mhz: list[Positive] = Field(default_factory=list)
    celsius: dict[str, float] = Field(default_factory=dict)
    load: Positive | None = None


class Machine(Strict):
    """What it was measured on. `bandwidth` in B/s and `operations` in fp32 operations/s were measured too."""

    system: Text
    processor: Text
    cores: Annotated[int, Field(ge=1, le=2**16)]
    memory: Annotated[int, Field(ge=0, le=2**60)]
    bandwidth: Positive
    operations: Positive
    before: Condition
    after: Condition


class BundleFacts(Strict):
    """What was measured.

    `digest` is the manifest's SHA-256, or that of all of a checkpoint's files; `parts` maps part to bytes.
    `target` of a checkpoint is "pytorch".
    """

    name: Name
    target: Name
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0, lt=2**50)]
    parts: dict[str, Annotated[int, Field(ge=0, lt=2**50)]]
    bits: dict[str, int]


class Settings(Strict):
    """How it was measured.

    `threads` None: what the runtime takes by itself. `steps` of a drawing; None: those it was made for.
    """

    prompt_tokens: Annotated[int, Field(ge=1, le=2**20)] = 144
    new_tokens: Annotated[int, Field(ge=2, le=2**20)] = 64
    images: Annotated[int, Field(ge=0, le=64)] = 1
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    runs: Annotated[int, Field(ge=1, le=1000)] = 5
    threads: Annotated[int, Field(ge=1, le=2**16)] | None = None


class MemoryTrace(Strict):
    """Resident bytes of the measuring process over its time, and when each phase began, in seconds."""

    seconds: Annotated[list[Positive], Field(max_length=100_000)]
    bytes: Annotated[list[Annotated[int, Field(ge=0, lt=2**50)]], Field(max_length=100_000)]
    phases: dict[Name, Positive]


class Result(Strict):
    """One bundle on one machine."""

    schema_version: Literal[1] = 1
    mobilemm: Name
    created: Name
    device: Name
    runtime: Text
    machine: Machine
    bundle: BundleFacts
    settings: Settings
    figures: Annotated[list[Figure], Field(min_length=1, max_length=1000)]
    memory: MemoryTrace | None = None
    # What could not be measured here, and why: energy where no counter can be read.
    absent: dict[str, Text] = Field(default_factory=dict)

    def figure(self, name: str) -> Figure:
        """Raises KeyError when there is none of that name."""
        for figure in self.figures:
            if figure.name == name:
                return figure
        raise KeyError(name)


def write_results(results: Sequence[Result], path: Path) -> None:
    """A JSON list, whole or not at all. Raises MobileMMError when it cannot be written."""
    write_whole(
        json.dumps([result.model_dump() for result in results], indent=1, ensure_ascii=False) + "\n", path
    )


def write_whole(text: str, path: Path) -> None:
    """A text, whole or not at all. Raises MobileMMError when it cannot be written."""
    draft = path.with_name(f".{path.name}.part")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise MobileMMError(f"{path}: cannot be written ({error.strerror})") from error


def read_results(path: Path) -> list[Result]:
    """What `mobilemm bench --json` wrote, here or on a phone.

    Raises MobileMMError naming the file and the key for whatever is not as the schema says.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise MobileMMError(f"{path}: too large for a benchmark's result ({path.stat().st_size:,} bytes)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MobileMMError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise MobileMMError(f"{path}: is not JSON") from error
    if not isinstance(content, list) or not content:
        raise MobileMMError(f"{path}: a benchmark's results are a list, as `mobilemm bench --json` writes it")
    return [read_result(entry, f"{path}: result {index}") for index, entry in enumerate(content)]


def read_result(content: Any, where: str) -> Result:
    """One result. Raises MobileMMError, `where` and the key first."""
    if isinstance(content, dict) and content.get("schema_version") != SCHEMA_VERSION:
        raise MobileMMError(
            f"{where}: schema_version is {content.get('schema_version')!r}, known here is {SCHEMA_VERSION}:"
            " bench again, or update mobilemm"
        )
    try:
        return Result.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise MobileMMError(f"{where}: {key}: {first['msg']}") from error


def json_schema() -> str:
    """Of a list of results."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mobilemm benchmark results, version 1",
        "type": "array",
        "minItems": 1,
        "items": {"$ref": "#/$defs/Result"},
        "$defs": {**Result.model_json_schema().pop("$defs"), "Result": _without_defs()},
    }
    return json.dumps(schema, indent=1)


def _without_defs() -> dict[str, Any]:
    schema = Result.model_json_schema()
    schema.pop("$defs")
    return schema


if __name__ == "__main__":
    print(json_schema())
