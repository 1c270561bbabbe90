"""LoRA folders as peft and the official scripts write them: merged as peft merges them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints import save
from mobilemm.models.checkpoints.inspection import inspect_model
from mobilemm.models.checkpoints.lora import AdapterWeights
from mobilemm.models.checkpoints.weights import open_weights

Make = Callable[..., Any]
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def language_model(official: Any) -> LlamaForCausalLM:
    names = LlamaConfig().to_dict()
    config = {key: value for key, value in official.config.items() if key in names and key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(official.language_model)
    return model


def write_adapter(
    official: Any,
    *,
    form: str = "safetensors",
    base: str | None = "absolute",
    with_config: bool = True,
    name: str = "adapter",
    **options: Any,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter folder over `official` that peft wrote, and peft's own merge of the language model."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR} | options
    torch.manual_seed(0)
    tuned = get_peft_model(language_model(official), LoraConfig(task_type="CAUSAL_LM", **options))
    for key, parameter in tuned.named_parameters():
        if "lora_" in key or "modules_to_save" in key or (key.endswith(".bias") and parameter.requires_grad):
            torch.nn.init.normal_(parameter, std=0.2)
    folder = official.folder.parent / name
    tuned.peft_config["default"].base_model_name_or_path = {
        "absolute": str(official.folder),
        "relative": f"../{official.folder.name}",
    }.get(str(base), base)
    tuned.save_pretrained(folder, safe_serialization=form == "safetensors")
    if form == "bin" and (folder / "adapter_model.safetensors").is_file():  # peft writes no .bin any more
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    if with_config:
        config = official.config | {"mm_vision_tower": str(official.tower_folder)}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    merged = {key: value.clone() for key, value in tuned.merge_and_unload().state_dict().items()}
    return folder, merged


def write_projector(folder: Path, official: Any) -> dict[str, torch.Tensor]:
    """non_lora_trainables.bin with another projector, named as the official training names it."""
    projector = {
        f"model.mm_projector.{key}": torch.randn_like(value)
        for key, value in official.part("model.mm_projector.").items()
    }
    torch.save(
        {f"base_model.model.{key}": value for key, value in projector.items()},
        folder / "non_lora_trainables.bin",
    )
    return projector


def assert_merged(model: Any, merged: dict[str, torch.Tensor], official: Any) -> None:
    found = model.language_model.state_dict()
    assert sorted(found) == sorted(merged)
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)
    changed = [name for name in merged if not torch.equal(merged[name], official.language_model[name])]
    assert changed  # a merge that did something


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}},
    "alpha pattern": {"alpha_pattern": {"q_proj": 32, r"layers\.0\.mlp\.\w+": 2, "up_proj|down_proj": 5}},
    "both, rslora": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
    "fractional alpha": {"lora_alpha": 1, "r": 3},
    "one module": {"target_modules": ["q_proj"]},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_merged_as_peft_merges(official_checkpoint: Make, options: dict[str, Any]) -> None:
    official = official_checkpoint("ldpnetv2")
    folder, merged = write_adapter(official, **options)
    model, _ = mobilemm.load(folder)
    assert_merged(model, merged, official)


@pytest.mark.parametrize("kind", ["ldpnet", "ldpnetv2", "llava"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@torch.no_grad()
def test_a_folder_of_the_official_training(official_checkpoint: Make, kind: str, form: str) -> None:
    """Adapter and non_lora_trainables.bin; saved again, it is a whole official checkpoint."""
    official = official_checkpoint(kind)
    folder, merged = write_adapter(official, form=form)
    projector = write_projector(folder, official)
    model, processor = mobilemm.load(folder)
    assert_merged(model, merged, official)
    written = load_file(save(model, folder.parent / "written", processor) / "model.safetensors")
    for name, tensor in projector.items():
        assert torch.equal(written[name], tensor), name
    assert sorted(written) == sorted(official.tensors)


def test_the_base_of_llava_lora_is_a_plain_language_model(official_checkpoint: Make) -> None:
    """`llava-v1.5-7b-lora` names vicuna: the projector is in the adapter's folder alone."""
    official = official_checkpoint("llava")
    folder, merged = write_adapter(official)
    projector = write_projector(folder, official)
    torch.save(official.language_model, official.folder / "pytorch_model.bin")
    model, _ = mobilemm.load(folder)
    assert_merged(model, merged, official)
    assert torch.equal(model.projector[0].weight, projector["model.mm_projector.0.weight"])
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(MobileMMError, match=r"4 tensors \('model\.mm_projector.*missing"):
        mobilemm.load(folder)


def test_the_types_of_base_projector_and_tower_may_differ(official_checkpoint: Make) -> None:
    """Half-precision base, full-precision projector and tower: one type comes out, and runs."""
    official = official_checkpoint("llava", dtype=torch.bfloat16)
    save_file(
        {f"vision_model.{name}": tensor.float() for name, tensor in official.tower.items()},
        official.tower_folder / "model.safetensors",
    )
    folder, _ = write_adapter(official)
    torch.save(
        {
            f"base_model.model.{name}": tensor.float()
            for name, tensor in official.tensors.items()
            if "mm_projector" in name
        },
        folder / "non_lora_trainables.bin",
    )
    model, _ = mobilemm.load(folder)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    model(input_ids=torch.tensor([[1, -200, 5]]), pixel_values=torch.randn(1, 3, 24, 24))


def test_where_the_base_may_be(
    official_checkpoint: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    official = official_checkpoint("ldpnetv2")
    merged = {}
    for name, base, with_config in (
        ("a", "absolute", True),
        ("b", "relative", True),
        ("c", "relative", False),
        ("d", "nobody/nothing", True),
    ):
        folder, merged = write_adapter(official, base=base, with_config=with_config, name=name)
        monkeypatch.chdir(tmp_path)
        if name == "d":
            with pytest.raises(MobileMMError, match="nobody/nothing: neither a folder here nor"):
                mobilemm.load(folder)
            model, _ = mobilemm.load(folder, base=official.folder)
        else:
            model, _ = mobilemm.load(folder)
        assert_merged(model, merged, official)


def test_an_adapter_over_our_own_layout(official_checkpoint: Make) -> None:
    """peft over the whole model, as our own training does: projector and language model at once."""
    official = official_checkpoint("ldpnetv2")
    model, processor = mobilemm.load(official.folder)
    native = save(model, official.folder.parent / "native", processor, layout="mobilemm")
    base = mobilemm.load(native).model
    torch.manual_seed(0)
    targets = r"language_model.*\.(q_proj|v_proj)|projector\.mlp\.0"
    tuned = get_peft_model(base, LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = official.folder.parent / "adapter"
    tuned.peft_config["default"].base_model_name_or_path = str(native)
    tuned.save_pretrained(folder)
    merged = tuned.merge_and_unload().state_dict()
    again, _ = mobilemm.load(folder)
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


def test_an_adapter_trained_under_other_spellings(official_checkpoint: Make) -> None:
    """transformers 5 names llava-hf's modules unlike the published files."""
    official = official_checkpoint("llava-hf", form="safetensors")
    folder = official.folder.parent / "adapter"
    folder.mkdir()
    up, down = torch.randn(32, 2), torch.randn(2, 32)
    name = "model.language_model.layers.0.self_attn.q_proj"
    save_file(
        {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": str(official.folder)}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model, _ = mobilemm.load(folder)
    expected = official.language_model["model.layers.0.self_attn.q_proj.weight"] + 2 * up @ down
    found = model.language_model.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert "LoRA of 1 tensors" in " ".join(inspect_model(folder).notes)


def test_a_half_precision_merge_rounds_once(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2", dtype=torch.bfloat16)
    folder, _ = write_adapter(official)
    weights = AdapterWeights(folder, open_weights(official.folder))
    name = "model.layers.0.mlp.up_proj.weight"
    adapter = load_file(folder / "adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    down, up = adapter[f"{module}.lora_A.weight"], adapter[f"{module}.lora_B.weight"]
    exact = official.tensors[name].double() + 2 * up.double() @ down.double()
    assert weights[name].dtype == torch.bfloat16
    torch.testing.assert_close(weights[name].double(), exact, rtol=2**-8, atol=1e-3)


@pytest.fixture
def adapter(official_checkpoint: Make) -> Path:
    """A plain adapter folder to damage."""
    return write_adapter(official_checkpoint("ldpnetv2"), target_modules=["q_proj"])[0]


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(MobileMMError) as error:
        mobilemm.load(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    value = json.loads(path.read_text(encoding="utf-8")) | settings
    path.write_text(json.dumps(value), encoding="utf-8")


def test_dora_without_its_magnitudes(adapter: Path) -> None:
    change(adapter, use_dora=True)
    assert "adapter_config.json's 'use_dora' and the tensors of" in refusal(adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"peft_type": ["LORA"]},
        {"lora_bias": True},
        {"init_lora_weights": "pissa_niter_16"},
        {"layer_replication": [[0, 1]]},
        {"lora_alpha": "8"},
        {"lora_alpha": None},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": {"q_(proj": 3}},
    ],
    ids=str,
)
def test_settings_that_are_not_understood(adapter: Path, settings: dict[str, Any]) -> None:
    change(adapter, **settings)
    assert "adapter_config.json" in refusal(adapter)


@pytest.mark.parametrize("name", [None, "", 3, ["x"], "no/such/folder/at/all", "../gone"])
def test_a_base_that_is_not_there(adapter: Path, name: Any) -> None:
    change(adapter, base_model_name_or_path=name)
    refusal(adapter)


def test_a_base_that_is_no_multimodal_model(adapter: Path) -> None:
    config = adapter.parent / "checkpoint" / "config.json"
    config.write_text('{"model_type": "llama"}', encoding="utf-8")
    (adapter / "config.json").unlink()
    assert "adapters are read over MobileVLM, LLaVA and mobilemm models" in refusal(adapter)


def test_missing_adapter_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors or adapter_model.bin is missing" in refusal(adapter)


def test_tensors_that_do_not_fit_are_named(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    target = "model.layers.0.self_attn.q_proj.weight"

    def with_changes(changes: dict[str, Any]) -> str:
        state = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        save_file(state, file)
        text = refusal(adapter)
        assert str(file) in text
        return text

    text = with_changes({f"{module}.lora_B.weight": torch.ones(16, 4)})
    assert re.search(rf"\(4, 32\).*\(16, 4\).*{re.escape(repr(target))}.*\(32, 32\)", text)
    with_changes({f"{module}.lora_A.weight": torch.ones(3, 32)})
    with_changes({f"{module}.lora_A.weight": torch.ones(4)})
    assert "only lora_A" in with_changes({f"{module}.lora_B.weight": None})
    assert "'model.layers.9.x.weight'" in with_changes(
        {
            "base_model.model.model.layers.9.x.lora_A.weight": torch.ones(4, 32),
            "base_model.model.model.layers.9.x.lora_B.weight": torch.ones(32, 4),
        }
    )
    assert "'use_dora'" in with_changes({f"{module}.lora_magnitude_vector": torch.ones(32)})
    other = module.replace("q_proj", "x_proj")
    assert "x_proj" in with_changes({f"{other}.lora_magnitude_vector": torch.ones(32)})
    assert "'something.else'" in with_changes({"something.else": torch.ones(1)})


def test_a_rank_of_zero(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    shapes = {"lora_A": (0, 32), "lora_B": (32, 0)}
    tensors = {name: torch.ones(shapes[name.split(".")[-2]]) for name in load_file(file)}
    save_file(tensors, file)
    assert str(file) in refusal(adapter)


def test_damaged_files(adapter: Path) -> None:
    """Cut or flipped anywhere: a model, or a MobileMMError."""
    rng = random.Random(3)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        path = adapter / name
        whole = path.read_bytes()
        for _ in range(15):
            data = bytearray(whole)
            at = rng.randrange(min(len(data), 1500))
            if rng.random() < 0.2:
                data = data[:at]
            else:
                data[at] = rng.choice((data[at] ^ 1 << rng.randrange(8), ord(rng.choice('{}[]",:0-9e'))))
            path.write_bytes(data)
            with suppress(MobileMMError):
                mobilemm.load(adapter)
        path.write_bytes(whole)
    mobilemm.load(adapter)
