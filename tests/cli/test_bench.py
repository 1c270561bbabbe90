"""`mobilemm bench` and `mobilemm compare`: tables, files, and what is wrong with both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import mobilemm
from mobilemm.bench.result import json_schema
from tests.runtime.bundles import write_bundle

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def bundle(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(*mobilemm.load(pristine), tmp_path_factory.mktemp("bench") / "bundle")


@pytest.mark.slow
def test_a_table_and_a_file(run: Run, bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    flags = ["--prompt-tokens", 8, "--new-tokens", 4, "--runs", 4, "--threads", 1, "--json", path]
    ended = run("bench", bundle, *flags)
    assert ended.code == 0
    for word in ("pp8", "tg4", "ttft", "load_cold", "memory", "GB/s read", "of the limit"):
        assert word in ended.stdout
    content = json.loads(path.read_text())
    jsonschema.validate(content, json.loads(json_schema()))

    compared = run("compare", path, path)
    assert compared.code == 0
    rows = [line for line in compared.stdout.splitlines() if line.strip().startswith("tg4 ")]
    assert len(rows) == 1
    assert "1.000" in rows[0]
    assert "noise" in rows[0]


def test_wrong_places_are_one_line(run: Run, bundle: Path, tmp_path: Path) -> None:
    assert "there is no folder" in run("bench", bundle, "--json", tmp_path / "none" / "r.json").error
    assert "manifest.json" in run("bench", tmp_path).error
    (tmp_path / "r.json").write_text("[]")
    assert "are a list" in run("compare", tmp_path / "r.json", tmp_path / "r.json").error


def test_two_bundles_are_compared(run: Run, bundle: Path, tmp_path: Path) -> None:
    ended = run("compare", bundle, bundle)
    assert ended.code == 0
    assert "tell no difference" in ended.stdout
    assert "0 of" in ended.stdout
    (tmp_path / "r.json").write_text("[]")
    assert "two bundles, or two files" in run("compare", bundle, tmp_path / "r.json").error
    assert (
        "--rounds measures bundles"
        in run("compare", tmp_path / "r.json", tmp_path / "r.json", "--rounds", 2).error
    )


def test_wrong_devices_are_one_line(run: Run, bundle: Path, tmp_path: Path) -> None:
    assert "host, ssh:[USER@]HOST[:PORT] or adb:[SERIAL]" in run("bench", bundle, "--device", "phone").error
    assert "go with --device ssh" in run("bench", bundle, "--device-python", "python3").error
    assert "of this computer" in run("bench", bundle, "--device", "adb:", "--profile", tmp_path).error
    assert "there is no such folder" in run("bench", tmp_path / "none").error
