"""The order of a run follows from the seed; batches are padded as they should be."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mobilemm
from mobilemm.data.mixture import Mixture, ScannedSource, collate, plan, scan
from mobilemm.data.sources import SampleSource, open_source
from mobilemm.errors import MobileMMError
from tests.export.tiny_checkpoint import write_checkpoint


def _source(count: int, weight: float = 1.0, longest: int = 100) -> ScannedSource:
    draw = random.Random(count)
    nothing = SampleSource("none", range(count), lambda *_: None)  # type: ignore[arg-type,return-value]
    lengths = [draw.randint(1, longest) for _ in range(count)]
    return ScannedSource(nothing, weight, list(range(count)), lengths)


def test_an_epoch_sees_each_row_as_often_as_its_weight_says() -> None:
    sources = [_source(40), _source(10, weight=2.0), _source(60, weight=0.5)]
    order = plan(sources, epochs=1, step_size=10, seed=3)
    assert order.shape == (90, 2)
    seen = Counter(map(tuple, order.tolist()))
    assert all(seen[0, place] == 1 for place in range(40))
    assert all(seen[1, place] == 2 for place in range(10))
    assert sorted(seen[2, place] for place in range(60)) == [0] * 30 + [1] * 30


def test_the_seed_decides_and_steps_count() -> None:
    sources = [_source(33)]
    first = plan(sources, 2, 8, seed=1)
    np.testing.assert_array_equal(first, plan(sources, 2, 8, seed=1))
    assert not np.array_equal(first, plan(sources, 2, 8, seed=2))
    assert len(first) == 8 * 8  # 66 samples in 8 whole steps
    assert len(plan(sources, 1, 8, seed=1, max_steps=20)) == 160
    assert len(plan([_source(3)], 1, 64, seed=1)) == 64  # fewer rows than a step has


def test_neighbours_in_length_share_a_step() -> None:
    source = _source(512, longest=1000)
    lengths = np.array(source.lengths)

    def spread(grouped: bool) -> float:
        order = plan([source], 1, 8, seed=0, group_by_length=grouped)[:, 1].reshape(-1, 8)
        assert sorted(order.ravel()) == list(range(512))
        return float(np.ptp(lengths[order], axis=1).mean())

    assert spread(True) < 0.1 * spread(False)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> object:
    return mobilemm.load(write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")).processor


def _rows(folder: Path, texts: list[str], pictures: bool = True) -> Path:
    rows = []
    for index, text in enumerate(texts):
        Image.new("RGB", (16, 16), (index * 9, 0, 0)).save(folder / f"{index}.png")
        turns = [("human", "<image>\nWhat is in this picture"), ("gpt", text)]
        if not pictures:
            turns[0] = ("human", "What is this")
        rows.append(
            {"conversations": [{"from": who, "value": said} for who, said in turns]}
            | ({"image": f"{index}.png"} if pictures else {})
        )
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


def _mixture(path: Path, processor: object, max_length: int = 512) -> Mixture:
    scanned = scan(open_source("llava", path), 1.0, 4)
    order = plan([scanned], 1, 1, seed=0, group_by_length=False)
    return Mixture([scanned], order, processor, max_length, seed=0)


def test_a_batch(tmp_path: Path, processor: object) -> None:
    mixture = _mixture(_rows(tmp_path, ["this", "this picture is this picture"]), processor)
    items = [mixture[0], mixture[1]]
    batch = collate(items, pad_token_id=7)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, longest)
    assert batch["pixel_values"].shape[0] == 2
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
        assert batch["input_ids"][row, :length].tolist() == item["input_ids"]
        assert set(batch["input_ids"][row, length:].tolist()) <= {7}
        assert batch["labels"][row, length:].tolist() == [-100] * (longest - length)
    supervised = {place - 1 for item in items for place, label in enumerate(item["labels"]) if label >= 0}
    assert batch["logits_to_keep"].tolist() == sorted(supervised)


def test_the_loss_is_that_of_all_logits(tmp_path: Path) -> None:
    model, processor = mobilemm.load(write_checkpoint(tmp_path / "tiny"))
    mixture = _mixture(_rows(tmp_path, ["this", "this picture is this picture"]), processor)
    batch = collate([mixture[0], mixture[1]])
    kept = model(**batch)
    assert kept.logits.shape[1] == len(batch["logits_to_keep"])
    del batch["logits_to_keep"]
    whole = model(**batch)
    expected = torch.nn.functional.cross_entropy(
        whole.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(whole.loss, expected)
    torch.testing.assert_close(kept.loss, expected)


def test_a_damaged_picture_gives_its_place_to_the_next(tmp_path: Path, processor: object) -> None:
    path = _rows(tmp_path, ["this"] * 6)
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    mixture = _mixture(path, processor)
    items = [mixture[place] for place in range(6)]
    assert all("pixel_values" in item for item in items)
    assert sum(mixture.skipped.values()) == 1
    assert "2.png" in next(iter(mixture.skipped))


def test_a_sample_that_is_too_long(tmp_path: Path, processor: object) -> None:
    path = _rows(tmp_path, ["this", "this picture " * 40])
    short, long = sorted(len(_mixture(path, processor)[place]["input_ids"]) for place in range(2))
    assert long > short + 3
    mixture = _mixture(path, processor, max_length=short + 3)
    # What fits of the answer is learned.
    assert sorted(len(mixture[place]["input_ids"]) for place in range(2)) == [short, short + 3]
    assert not mixture.skipped
    for most, reason in ((9, "cut a picture"), (short - 5, "cut the answer")):
        with pytest.raises(MobileMMError, match=f"longer than max_length, which would {reason}"):
            _mixture(path, processor, max_length=most)[0]
