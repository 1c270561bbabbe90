"""Learning to draw on a tiny model: what moves, what stays, and when signals come."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.export.quantization import make_plan
from mobilemm.generation import conditions
from mobilemm.generation.generator import load_generator
from mobilemm.training.drawing import asking_loss, condition_distance
from mobilemm.training.recipe import Recipe
from mobilemm.training.stage import check, train
from tests.export.drawing_checkpoint import OTHER, SIGNALS, write_drawer
from tests.generation.tiny_generator import write_generator

CAPTIONS = ("red", "green", "blue", "black")
DRAWING = {"signal_tokens": 2, "projector": {"type": "mlp", "hidden": 32}, "condition_weight": 10}


def _encoder(folder: Path, name: str) -> conditions.ConditionEncoder:
    """A condition for each of the captions, as far apart as can be."""
    table = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(3)))[0]
    return lambda texts: torch.stack([table[CAPTIONS.index(text)].view(3, 16) for text in texts])


@pytest.fixture
def recipe(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Recipe]:
    monkeypatch.setattr("mobilemm.training.drawing.open_condition_encoder", _encoder)
    rows = []
    for caption in CAPTIONS:
        drawing = {"type": "drawing", "caption": caption}
        for request in ("and", "yes and"):
            rows.append([f"{request} {caption}", [drawing]])
        rows.append([f"is it {caption}", f"yes it is {caption}"])
        rows.append([f"what is {caption}", f"it is {caption}"])
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps(
            [
                {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
                for a, b in rows
            ]
        )
    )

    def make(**values: Any) -> Recipe:
        generator = tmp_path / "generator"
        if not generator.exists():
            write_generator(generator)
        return make_recipe(
            **{
                "data": [{"format": "messages", "path": path}],
                "train": {"signal_tokens": 3e-2, "output_projector": 1e-2},
                "drawing": DRAWING | {"generator": generator},
                "batch_size": 16,
            }
            | values
        )

    return make


def test_signals_come_when_asked_for_and_say_what(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    # A random language model hardly tells requests from questions: it learns as well.
    parts = {"signal_tokens": 1e-2, "output_projector": 1e-2, "language_model": 3e-3}
    folder = train(recipe(max_steps=200, save_every=200, train=parts), lambda line: None)
    model, processor = mobilemm.load(folder)
    first = model.config.signal_token_ids[0]
    wanted = _encoder(folder, "")(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        for question, draws in ((f"and {caption}", True), (f"what is {caption}", False)):
            asked = [{"role": "user", "content": question}]
            inputs = processor.apply_chat_template(asked, add_generation_prompt=True)
            assert (int(model(**inputs).logits[0, -1].argmax()) == first) == draws
            if draws:
                drawn = [*asked, {"role": "assistant", "content": [{"type": "drawing", "caption": ""}]}]
                ids = torch.tensor([processor.encode_for_training(drawn)[0]])
                hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
                condition = model.output_projector(model.signal_states(ids, hidden))
                distances = (condition - wanted).square().sum((1, 2))
                assert int(distances.argmin()) == row
    loss = json.loads((tmp_path / "run" / "result.json").read_text())["loss"]
    assert loss[-1][1] < loss[0][1] / 4


def test_what_is_frozen_stays_to_the_bit(
    recipe: Callable[..., Recipe], model_folder: Path, tmp_path: Path
) -> None:
    first = train(recipe(max_steps=2), lambda line: None)
    plain, drawing = load_file(model_folder / "model.safetensors"), load_file(first / "model.safetensors")
    assert all(torch.equal(tensor, drawing[name]) for name, tensor in plain.items())
    added = {name.split(".")[0] for name in drawing.keys() - plain.keys()}
    assert added == {"signal_tokens", "output_projector"}
    assert load_generator(first / "generator").image_size == (16, 16)
    again = recipe(model=str(first), output=tmp_path / "again", train={"signal_tokens": 1e-2}, max_steps=2)
    before = load_file(first / "model.safetensors")
    after = load_file(train(again, lambda line: None) / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("signal_tokens.") for name in moved)


def test_drawing_is_learned_anew_with_other_tokens(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = train(recipe(max_steps=2), lambda line: None)
    drawing = DRAWING | {"generator": tmp_path / "generator", "anew": True, "signal_tokens": 3}
    again = recipe(model=str(first), output=tmp_path / "again", drawing=drawing, max_steps=2)
    before, after = mobilemm.load(first), mobilemm.load(train(again, lambda line: None))
    ids = after.model.config.signal_token_ids
    assert ids[:2] == before.model.config.signal_token_ids
    assert len(ids) == 3
    assert after.model.signal_tokens.rows.shape[0] == 3
    assert after.model.config.image_token_id not in ids
    assert after.processor.tokenizer.convert_tokens_to_ids(["[IMG0]", "[IMG1]", "[IMG2]"]) == ids


def test_when_to_draw_is_learned_from_kept_states(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """By exactly the loss that the whole model has there, and with the first signal token's row alone."""
    first = train(recipe(max_steps=2), lambda line: None)
    told: list[str] = []
    again = recipe(
        model=str(first),
        output=tmp_path / "again",
        train={"signal_tokens": 3e-2},
        drawing=DRAWING | {"generator": tmp_path / "generator", "cache_states": True},
        max_steps=40,
    )
    second = train(again, told.append)
    assert sum("states: 0 of 16 rows" in line for line in told) == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert [name.split(".")[0] for name in moved] == ["signal_tokens"] * len(moved)
    assert moved
    for name in moved:
        assert torch.equal(before[name][1:], after[name][1:])
    losses, kept = [], []
    for folder in (first, second):
        model, processor = mobilemm.load(folder)
        signal = model.config.signal_token_ids[0]
        likelihood, asking = [], []
        for caption in CAPTIONS:
            for question, answer in ((f"and {caption}", None), (f"what is {caption}", "it is " + caption)):
                content: Any = answer or [{"type": "drawing", "caption": caption}]
                messages = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": content},
                ]
                ids, labels = (torch.tensor(one) for one in processor.encode_for_training(messages))
                places = (labels[1:] != -100).nonzero()[:, 0]
                places = places[:1] if answer is None else places
                logits = model(input_ids=ids[None]).logits[0, places].detach().double()
                likelihood.append(-logits.log_softmax(-1).gather(1, ids[places + 1][:, None])[:, 0])
                others = logits.index_fill(1, torch.tensor(signal), -torch.inf).logsumexp(-1)
                asks = (ids[places + 1] == signal).float()
                asking.append(torch.full_like(others, float(asking_loss(logits[:, signal], others, asks))))
        losses.append(float(torch.cat(likelihood).mean()))
        kept.append(float(torch.cat(asking).mean()))
    assert kept[0] - kept[1] == pytest.approx(losses[0] - losses[1], rel=1e-6)
    assert kept[1] < kept[0] / 2


def test_a_new_projector_keeps_the_signal_tokens(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """And measures what it reads by the states that it learns from."""
    first = train(recipe(max_steps=2), lambda line: None)
    values = {
        "model": str(first),
        "output": tmp_path / "again",
        "train": {"output_projector": 1e-2},
        "drawing": {
            "generator": tmp_path / "generator",
            "cache_states": True,
            "new_projector": True,
            "projector": {"type": "mlp", "hidden": 24},
        },
    }
    second = train(recipe(**values, max_steps=2), lambda line: None)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    same = [name for name in before if not name.startswith("output_projector.")]
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert after["output_projector.layers.0.weight"].shape[0] == 24
    model, processor = mobilemm.load(second)
    assert model.config.output_projector["hidden"] == 24
    found = []
    for request in [f"{word} {caption}" for word in ("and", "yes and") for caption in CAPTIONS]:
        drawing = {"type": "drawing", "caption": "drawn"}
        said = [{"role": "user", "content": request}, {"role": "assistant", "content": [drawing]}]
        ids = torch.tensor([processor.encode_for_training(said)[0]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1].detach()
        found.append(model.signal_states(ids, hidden))
    states = torch.cat(found)
    torch.testing.assert_close(model.output_projector.mean, states.mean(0), rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(model.output_projector.scale, 1 / states.std(0), rtol=0.02, atol=0)


def test_a_projector_learns_from_kept_states(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    first = train(recipe(max_steps=2), lambda line: None)
    told: list[str] = []
    values = {
        "model": str(first),
        "output": tmp_path / "again",
        "train": {"output_projector": 1e-2},
        "drawing": DRAWING | {"generator": tmp_path / "generator", "cache_states": True},
    }
    second = train(recipe(**values, max_steps=40), told.append)
    assert sum("states: 0 of 8 rows" in line for line in told) == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"output_projector"}
    wanted = _encoder(second, "")(CAPTIONS)
    distances = []
    for folder in (first, second):
        model, processor = mobilemm.load(folder)
        found = []
        for caption in CAPTIONS:
            drawing = {"type": "drawing", "caption": caption}
            said = [
                {"role": "user", "content": f"and {caption}"},
                {"role": "assistant", "content": [drawing]},
            ]
            ids = torch.tensor([processor.encode_for_training(said)[0]])
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
            found.append(model.output_projector(model.signal_states(ids, hidden)).detach())
        distances.append(float(condition_distance(torch.cat(found), wanted)))
    assert distances[1] < distances[0] / 2
    with pytest.raises(ValueError, match=r"drawing\.cache_states"):
        recipe(**values | {"train": {"output_projector": 1e-2, "signal_tokens": 1e-2}})


def test_some_rows_are_read_behind_quantized_weights(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other states than the exact ones, with the same mean; in float32 weights they would be those."""
    from mobilemm.training import quantized_states

    drawer = write_drawer(tmp_path / "drawer")
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(words)},
                {"role": "assistant", "content": [drawn]},
            ]
        }
        for words in itertools.permutations(OTHER.split(), 3)
        for drawn in [{"type": "drawing", "caption": CAPTIONS[len(words[0]) % 4]}]
    ]
    (tmp_path / "requests.json").write_text(json.dumps(rows))
    seen: dict[str, Any] = {}
    real = quantized_states.with_quantized_states

    def look(kept: Any, *others: Any) -> Any:
        seen["exact"], seen["mixed"] = kept, real(kept, *others)
        return seen["mixed"]

    monkeypatch.setattr(quantized_states, "with_quantized_states", look)
    told: list[str] = []
    drawing = {"generator": drawer / "generator", "cache_states": True, "quantized_share": 0.5}
    values = {
        "model": str(drawer),
        "data": [{"format": "messages", "path": tmp_path / "requests.json"}],
        "train": {"output_projector": 1e-2},
        "drawing": drawing,
        "max_steps": 2,
    }
    train(recipe(**values, output=tmp_path / "coarse"), told.append)
    assert sum("quantized language model's states: 0 of 12 rows" in line for line in told) == 1
    moved = {
        name: kept["signal_states"] - seen["exact"][name]["signal_states"]
        for name, kept in seen["mixed"].items()
        if not torch.equal(kept["signal_states"], seen["exact"][name]["signal_states"])
    }
    assert len(seen["mixed"]) == 24
    assert len(moved) == 12
    torch.testing.assert_close(
        torch.cat([*moved.values()]).mean(0), torch.zeros(SIGNALS, 64), atol=1e-3, rtol=0
    )
    assert max(float(difference.abs().max()) for difference in moved.values()) > 0.05

    monkeypatch.setattr(quantized_states, "make_plan", lambda: make_plan("fp32", vision="fp32"))
    train(recipe(**values, output=tmp_path / "fine"), told.append)
    for name, kept in seen["exact"].items():
        difference = (seen["mixed"][name]["signal_states"] - kept["signal_states"]).abs().max()
        assert float(difference) < 0.01

    with pytest.raises(ValueError, match=r"drawing\.quantized_share"):
        recipe(**values | {"drawing": drawing | {"cache_states": False}})


def test_the_distance_is_the_papers() -> None:
    torch.manual_seed(0)
    found, wanted = torch.randn(5, 3, 16), torch.randn(5, 3, 16)
    by_hand = sum(float(((found[n, t] - wanted[n, t]) ** 2).sum()) for n in range(5) for t in range(3)) / (
        5 * 3
    )
    assert float(condition_distance(found, wanted)) == pytest.approx(by_hand, rel=1e-5)


def test_check_shows_signals_as_learned(recipe: Callable[..., Recipe]) -> None:
    forecast = check(recipe(), lambda line: None)
    assert {part.name for part in forecast.parts if part.trained} == {"signal_tokens", "output_projector"}


def test_another_generators_shape_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = train(recipe(max_steps=2), lambda line: None)
    write_generator(tmp_path / "other", tokens=5)
    other = recipe(model=str(folder), drawing=DRAWING | {"generator": tmp_path / "other"})
    with pytest.raises(MobileMMError, match="5 × 16; the model's output projector gives 3 × 16"):
        train(other, lambda line: None)


def test_keys_that_need_each_other(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match=r"train\.signal_tokens: it learns with the key 'drawing'"):
        make_recipe(train={"signal_tokens": 1e-3})
