"""What a stage trains moves, what is frozen stays to the bit; data goes through as it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.training.recipe import Recipe
from mobilemm.training.results import merge
from mobilemm.training.stage import check, train


def _silent(line: str) -> None:
    pass


def _moved(before: Path, after: dict[str, torch.Tensor]) -> set[str]:
    start = load_file(before / "model.safetensors")
    assert start.keys() == after.keys()
    return {name for name, tensor in start.items() if not torch.equal(tensor, after[name])}


LANGUAGE = "language_model.model."


@pytest.mark.parametrize(
    ("parts", "moves"),
    [
        ({"projector": 1e-2}, lambda name: name.startswith("projector.")),
        (
            {"projector": 1e-2, "language_model": 1e-2},
            lambda name: name.startswith(("projector.", "language_model.")),
        ),
        ({"vision_encoder": 1e-2}, lambda name: name.startswith("vision_encoder.model.")),
        (
            {"language_model": {"learning_rate": 1e-2, "from_layer": 1}},
            lambda name: name.startswith((f"{LANGUAGE}layers.1.", f"{LANGUAGE}norm.")),
        ),
        (
            {"language_model": {"learning_rate": 1e-2, "method": "layer_norm"}},
            lambda name: name.startswith("language_model.") and "norm" in name,
        ),
        (
            {"vision_encoder": {"learning_rate": 1e-2, "from_layer": 1}},
            lambda name: (
                "vision_encoder.model." in name and ("layers.1." in name or "post_layernorm" in name)
            ),
        ),
    ],
    ids=["projector", "projector and llm", "encoder", "last layer", "norms", "encoder's last layer"],
)
def test_what_learns_moves_and_the_rest_stays(
    make_recipe: Callable[..., Recipe],
    model_folder: Path,
    parts: dict[str, Any],
    moves: Callable[[str], bool],
) -> None:
    result = train(make_recipe(train=parts), _silent)
    after = load_file(result / "model.safetensors")
    assert _moved(model_folder, after) == {name for name in after if moves(name)}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_holds_the_projector_and_merges(
    make_recipe: Callable[..., Recipe], model_folder: Path, tmp_path: Path, method: str
) -> None:
    learning = {"learning_rate": 1e-2, "method": method, "rank": 2, "from_layer": 1}
    recipe = make_recipe(train={"projector": 1e-2, "language_model": learning}, show_samples=2)
    adapter = train(recipe, _silent)
    assert adapter.name == "adapter"
    merged = merge(adapter, tmp_path / "merged")
    moved = _moved(model_folder, load_file(merged / "model.safetensors"))
    assert {name for name in moved if name.startswith("projector.")}
    updated = {name for name in moved if not name.startswith("projector.")}
    assert updated == {
        f"{LANGUAGE}layers.1.{block}.{name}_proj.weight"
        for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in names
    }
    # The reference is peft's own reading of the folder over the same base.
    from peft import PeftModel

    model, processor = mobilemm.load(merged)
    plain, _ = mobilemm.load(model_folder)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "projector" in n}, strict=False)
    reference = PeftModel.from_pretrained(plain, str(adapter)).eval()
    ids = processor(text="what is it", padding_side="right")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_kept_features_train_as_pictures_do(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    plain = train(make_recipe(output=tmp_path / "a"), _silent)
    kept = train(make_recipe(output=tmp_path / "b", cache_features=True), _silent)
    wanted, found = load_file(plain / "model.safetensors"), load_file(kept / "model.safetensors")
    for name, tensor in wanted.items():  # features lie in float16 on disk
        torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=2e-3)


def test_pretraining_then_instructions_overfit_32_samples(
    make_recipe: Callable[..., Recipe], conversations: Path, tmp_path: Path
) -> None:
    schedule = {"batch_size": 16, "save_every": 1000, "cache_features": True}
    first = train(
        make_recipe(output=tmp_path / "pt", train={"projector": 1e-2}, max_steps=40, **schedule), _silent
    )
    second = train(
        make_recipe(
            output=tmp_path / "sft",
            model=str(first),
            train={"projector": 3e-3, "language_model": 3e-3},
            max_steps=200,
            warmup_steps=10,
            **schedule,
        ),
        _silent,
    )
    model, processor = mobilemm.load(second)
    model.eval()
    from mobilemm.data.sources import open_source

    source = open_source("llava", conversations)
    for index in range(len(source)):
        sample = source.sample(index, None)  # type: ignore[arg-type]  # nothing is drawn in this format
        for place, message in enumerate(sample.messages):
            if message["role"] != "assistant":
                continue
            inputs = processor.apply_chat_template(list(sample.messages[:place]), add_generation_prompt=True)
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert said.split() == message["content"][0]["text"].split(), sample.name


def test_check_tells_and_trains_nothing(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(train={"projector": 1e-3, "language_model": 1e-5}, max_steps=None, epochs=2)
    forecast = check(recipe, _silent)
    assert not recipe.output.exists()
    assert {part.name: part.learning_rate for part in forecast.parts} == {
        "projector": 1e-3,
        "language_model": 1e-5,
        "vision_encoder": 0,
    }
    trained = {part.name: part.trained == part.parameters for part in forecast.parts}
    assert trained == {"projector": True, "language_model": True, "vision_encoder": False}
    assert (forecast.steps, forecast.samples_per_step) == (16, 4)
    assert "⟦" in forecast.sample
    assert "user" not in "".join(part.split("⟧")[0] for part in forecast.sample.split("⟦")[1:])


def test_keepsakes_lie_beside_each_checkpoint(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(show_samples=2, log_every=1, report_to=["tensorboard"])
    train(recipe, _silent)
    for folder in (recipe.output, recipe.output / "checkpoint-2", recipe.output / "checkpoint-4"):
        assert "<polyline" in (folder / "loss.svg").read_text()
        assert (folder / "samples.md").read_text().count("- model: ") == 2
    result = json.loads((recipe.output / "result.json").read_text())
    assert [step for step, _ in result["loss"]] == [1, 2, 3, 4]
    assert result["versions"]["torch"] == torch.__version__.split("+")[0]
    assert list(recipe.output.rglob("events.out.tfevents.*"))


def test_text_alone_counts_as_much_as_without_the_zero_path(make_recipe: Callable[..., Recipe]) -> None:
    """A batch without pictures gives the projector a gradient of exactly zero, so that no process waits."""
    model, processor = mobilemm.load(make_recipe().model)
    model.train()
    ids = processor(text="what is it", padding_side="right")["input_ids"]
    loss = model(ids, labels=ids).loss
    loss.backward()
    for parameter in [*model.projector.parameters(), *model.vision_encoder.model.parameters()]:
        assert parameter.grad is None or not parameter.grad.any()
    assert all(parameter.grad is not None for parameter in model.projector.parameters())
    torch.testing.assert_close(loss, model.eval()(ids, labels=ids).loss)


def test_a_model_of_another_class_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match="there is no such folder"):
        train(make_recipe(model=str(tmp_path / "nowhere")), _silent)
