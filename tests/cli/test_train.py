"""`mobilemm train` and `merge` as a person types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(4):
        Image.new("RGB", (40, 30), (index * 50, 0, 0)).save(pictures / f"{index}.png")
        (pictures / f"{index}.txt").write_text("red", encoding="utf-8")
    (pictures / "broken.png").write_bytes(b"")
    (pictures / "broken.txt").write_text("red", encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    values: dict[str, Any] = {
        "model": str(folder),
        "output": str(tmp_path / "run"),
        "data": [{"format": "folder", "path": str(pictures)}],
        "train": {"projector": 1e-3, "language_model": {"learning_rate": 1e-3, "method": "lora", "rank": 2}},
        "batch_size": 2,
        "show_samples": 1,
    }
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def test_check_then_train_then_merge(recipe: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    checked = run("train", recipe, "--check")
    assert checked.code == 0
    for shown in ("projector", "frozen", "lora", "2 of 2 samples", "⟦red<|im_end|>⟧"):
        assert shown in checked.stdout, checked.stdout
    assert "1 of 5 rows left out: a picture of 0 bytes" in checked.stderr
    assert not (tmp_path / "run").exists()
    trained = run("train", recipe, "max_steps=3", "report_to=[]")
    assert trained.code == 0
    assert "step 1/3" in trained.stderr
    assert trained.stderr.rstrip().endswith("adapter")
    merged = run("merge", tmp_path / "run" / "adapter", "-o", tmp_path / "merged")
    assert merged.code == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert run("inspect", tmp_path / "merged").code == 0


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["epochs=many"], "key 'epochs'"),
        (["model=nowhere"], "nowhere: there is no such folder"),
        (["data.0.path=gone"], "gone: there is no such folder"),
        (["train.language_model.from_layer=7"], "from_layer: 7"),
        (["template=v9"], "unknown template 'v9'"),
    ],
)
def test_what_is_wrong_is_one_line(
    recipe: Path, run: Callable[..., Any], overrides: list[str], named: str
) -> None:
    ended = run("train", recipe, *overrides)
    assert named in ended.error


def test_merge_wants_an_adapter(folder: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    ended = run("merge", folder, "-o", tmp_path / "merged")
    assert "no adapter here" in ended.error
