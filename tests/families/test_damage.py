"""What is wrong with a folder of another family is told in one line; nothing inside it is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.inspection import inspect_model

GATE = "model.text_model.layers.0.mlp.gate_proj.weight"


def edit_config(change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        change(config)
        (folder / name).write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


CONFIG = [
    (
        edit_config(lambda c: c.update(model_type="nonsense")),
        "config.json: model_type 'nonsense' is not known",
    ),
    (edit_config(lambda c: c.pop("model_type")), "config.json: key 'model_type' is missing"),
    (edit_config(lambda c: c.update(model_type="llama")), "'llama' is no multimodal LLM"),
    (edit_config(lambda c: c["text_config"].update(hidden_size="a")), "'hidden_size' expected int, got str"),
    (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
    (remove("config.json"), "config.json: there is no such file"),
]
FILES = [
    (remove("model.safetensors"), "no weights here"),
    (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-1000]
        ),
        "model.safetensors: cut short or damaged",
    ),
    (edit_weights(lambda tensors: tensors.pop(GATE)), f"tensor '{GATE}' missing from the weights"),
    (
        edit_weights(lambda tensors: tensors.update({GATE: torch.zeros(3, 3)})),
        f"model.safetensors: tensor '{GATE}' has the shape (3, 3); config.json asks for (64, 32)",
    ),
    (remove("tokenizer.json", "tokenizer_config.json"), "no tokenizer here"),
    (remove("processor_config.json"), "neither preprocessor_config.json nor processor_config.json here"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "its processor cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), CONFIG + FILES)
def test_load_says_what_is_wrong(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(MobileMMError) as caught:
        mobilemm.load(folder)
    assert str(caught.value).startswith(str(folder))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("damage", "message"), CONFIG + FILES[:2])
def test_inspect_says_what_is_wrong(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(MobileMMError) as caught:
        inspect_model(folder)
    assert message in str(caught.value)


def test_sizes_that_do_not_fit_together(folder: Path) -> None:
    edit_config(lambda config: config["vision_config"].update(num_attention_heads=5))(folder)
    with pytest.raises(MobileMMError, match=r"config\.json: no model can be built from it"):
        inspect_model(folder)


@pytest.mark.parametrize("model_type", ["unheard_of", "idefics3"])
def test_code_in_a_checkpoint_is_neither_run_nor_offered(
    folder: Path, model_type: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask on the terminal whether to run it."""
    ran = folder / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: ...\nclass Processor: ...\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"open({str(ran)!r}, 'w')\ndef generate(*a, **k): ..."
    )
    auto_map = {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"}
    edit_config(lambda config: config.update(model_type=model_type, auto_map=auto_map))(folder)
    processor = {"processor_class": "Processor", "auto_map": {"AutoProcessor": "code.Processor"}}
    edit_config(lambda config: config.update(processor), "processor_config.json")(folder)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(MobileMMError, match="never run"):
        mobilemm.load(folder)
    if model_type == "unheard_of":
        with pytest.raises(MobileMMError, match="never run"):
            inspect_model(folder)
    else:
        inspect_model(folder)
    assert not ran.exists()
    assert "custom code" not in "".join(capsys.readouterr())


def test_custom_generate_is_not_run(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "custom_generate").mkdir()
    code = f"open({str(ran)!r}, 'w')\ndef generate(*args, **options): ...\n"
    (folder / "custom_generate" / "generate.py").write_text(code)
    model, processor = mobilemm.load(folder)
    inputs = processor(text="a", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    assert not ran.exists()


def test_dtype_and_device(folder: Path) -> None:
    assert mobilemm.load(folder, dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16
    assert mobilemm.load(folder).model.dtype == torch.float32
