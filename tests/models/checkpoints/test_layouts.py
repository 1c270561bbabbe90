"""Official checkpoints load whole, and compute what the official parts compute.

References are transformers' own LLaVA for the MLP projector; for MobileVLM's, transformers' CLIP and LLaMA
with a projector put together here from torchvision's and timm's blocks under the official names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image
from timm.layers import LayerNormAct2d
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.ops import SqueezeExcitation
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import mobilemm
from mobilemm.models import IMAGE_TOKEN_INDEX

IDS = [1, 30, 31, 32, IMAGE_TOKEN_INDEX, 40, 41, 42, 43]
Make = Callable[..., Any]


class LDPBlock(nn.Module):
    """V1's, by the names of its checkpoint."""

    def __init__(self, vision: int, hidden: int) -> None:
        super().__init__()
        norm = partial(LayerNormAct2d, act_layer=None)
        gate = partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid)
        self.mlp = nn.Sequential(
            nn.Identity(), nn.Linear(vision, hidden), nn.GELU(), nn.Linear(hidden, hidden)
        )
        self.mb_block = nn.Sequential(
            nn.Identity(),
            *(
                InvertedResidual(
                    InvertedResidualConfig(hidden, 3, hidden, hidden, True, "HS", stride, 1, 1), norm, gate
                )
                for stride in (1, 2)
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        x = self.mlp(x).permute(0, 2, 1).reshape(x.shape[0], -1, side, side)
        return self.mb_block(x).flatten(2).permute(0, 2, 1)


class LDPNet(nn.Module):
    def __init__(self, vision: int, hidden: int) -> None:
        super().__init__()
        self.model = LDPBlock(vision, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LDPNetV2(nn.Module):
    """V2's, by the names of its checkpoint."""

    def __init__(self, vision: int, hidden: int, side: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(vision, hidden), nn.GELU(), nn.Linear(hidden, hidden))}
        )
        self.pool = nn.AdaptiveAvgPool2d((side, side))
        self.peg = nn.ModuleDict({"peg": nn.Sequential(nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp["mlp"](x)
        side = math.isqrt(x.shape[1])
        x = self.pool(x.permute(0, 2, 1).reshape(x.shape[0], -1, side, side))
        return (self.peg["peg"](x) + x).flatten(2).permute(0, 2, 1)


def clip_features(official: Any, pixels: Tensor) -> Tensor:
    """hidden_states[-2] of the whole tower, without the class token."""
    tower = CLIPVisionModel(CLIPVisionConfig(**official.tower_config)).eval()
    tower.load_state_dict(official.tower, strict=True)
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def mobilevlm_logits(official: Any, ids: list[int], pixels: Tensor) -> Tensor:
    """The official model put together by hand, spliced by hand."""
    config = official.config
    width = config["hidden_size"]
    features = clip_features(official, pixels)
    projector: nn.Module
    if official.kind == "ldpnet":
        projector = LDPNet(features.shape[-1], width)
    else:
        projector = LDPNetV2(features.shape[-1], width, math.isqrt(features.shape[1]) // 2)
    projector.load_state_dict(official.part("model.mm_projector."), strict=True)
    visual = projector.eval()(features)
    names = LlamaConfig().to_dict()
    llama = LlamaForCausalLM(
        LlamaConfig(**{key: value for key, value in config.items() if key in names and key != "model_type"})
    ).eval()
    llama.load_state_dict(official.language_model, strict=True)
    embed = llama.get_input_embeddings()
    at = ids.index(IMAGE_TOKEN_INDEX)
    spliced = [embed(torch.tensor([ids[:at]])), visual, embed(torch.tensor([ids[at + 1 :]]))]
    return llama(inputs_embeds=torch.cat(spliced, 1)).logits


def llava_reference(official: Any) -> LlavaForConditionalGeneration:
    """transformers' own class with the same weights."""
    vocabulary = official.language_model["lm_head.weight"].shape[0]
    text = official.config.get("text_config", official.config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps")
    config = LlavaConfig(
        text_config=LlamaConfig(**{name: text[name] for name in names}, vocab_size=vocabulary),
        vision_config=CLIPVisionConfig(**official.tower_config),
        image_token_index=vocabulary - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(official.tower, strict=True)
    llama = LlamaForCausalLM(config.text_config)
    llama.load_state_dict(official.language_model, strict=True)
    model.model.language_model.load_state_dict(llama.model.state_dict(), strict=True)
    model.lm_head.load_state_dict(llama.lm_head.state_dict(), strict=True)
    prefix = "multi_modal_projector." if official.kind == "llava-hf" else "model.mm_projector."
    order = {"0": "linear_1", "2": "linear_2"}
    state = {}
    for name, tensor in official.part(prefix).items():
        layer, rest = name.split(".")
        state[f"{order.get(layer, layer)}.{rest}"] = tensor
    model.model.multi_modal_projector.load_state_dict(state, strict=True)
    return model


def llava_logits(official: Any, ids: list[int], pixels: Tensor) -> Tensor:
    model = llava_reference(official)
    at = ids.index(IMAGE_TOKEN_INDEX)
    tokens = (pixels.shape[-1] // official.tower_config["patch_size"]) ** 2
    spliced = [*ids[:at], *[model.config.image_token_index] * tokens, *ids[at + 1 :]]
    return model(input_ids=torch.tensor([spliced]), pixel_values=pixels).logits


def reference_logits(official: Any, ids: list[int], pixels: Tensor) -> Tensor:
    return (mobilevlm_logits if official.kind.startswith("ldp") else llava_logits)(official, ids, pixels)


def pixels(count: int = 1, size: int = 24) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


KINDS = ("ldpnet", "ldpnetv2", "llava", "llava-embedded", "llava-hf")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_are_those_of_an_independent_reference(official_checkpoint: Make, kind: str) -> None:
    official = official_checkpoint(kind)
    model, processor = mobilemm.load(official.folder)
    image = pixels()
    ours = model(input_ids=torch.tensor([IDS]), pixel_values=image).logits
    theirs = reference_logits(official, IDS, image)
    assert ours.shape == theirs.shape == (1, len(IDS) - 1 + model.num_image_tokens, theirs.shape[-1])
    assert theirs.std() > 0.1  # a comparison that could fail
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert processor.num_image_tokens == model.num_image_tokens == (9 if kind.startswith("ldp") else 36)


@pytest.mark.parametrize("kind", ["ldpnet", "ldpnetv2", "llava"])
@torch.no_grad()
def test_two_images_and_padded_batches(official_checkpoint: Make, kind: str) -> None:
    """Each row of a batch gives what it gives alone, and two images go where their marks are."""
    official = official_checkpoint(kind)
    model, _ = mobilemm.load(official.folder)
    images = pixels(3)
    rows = [IDS, [1, IMAGE_TOKEN_INDEX, 50, IMAGE_TOKEN_INDEX, 51]]
    ids = torch.tensor([rows[0], rows[1] + [0] * 4])
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    together = model(input_ids=ids, pixel_values=images, attention_mask=mask).logits
    tokens = model.num_image_tokens
    torch.testing.assert_close(
        together[:1, : 8 + tokens], reference_logits(official, IDS, images[:1]), atol=1e-4, rtol=0
    )
    alone = model(input_ids=torch.tensor([rows[1]]), pixel_values=images[1:]).logits
    torch.testing.assert_close(together[1:, : 3 + 2 * tokens], alone, atol=1e-4, rtol=0)
    swapped = model(input_ids=torch.tensor([rows[1]]), pixel_values=images[1:].flip(0)).logits
    assert (swapped - alone).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["ldpnetv2", "llava-hf"])
@pytest.mark.parametrize("form", ["safetensors", "sharded-safetensors", "sharded-bin", "legacy-bin"])
def test_every_file_form_gives_the_same_model(official_checkpoint: Make, kind: str, form: str) -> None:
    official = official_checkpoint(kind, form=form, dtype=torch.bfloat16)
    plain = official_checkpoint(kind, form="bin", dtype=torch.bfloat16, name="plain")
    model, _ = mobilemm.load(official.folder)
    expected = mobilemm.load(plain.folder).model.state_dict()
    found = model.state_dict()
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    widened, _ = mobilemm.load(official.folder, dtype="float32")
    assert {tensor.dtype for tensor in widened.state_dict().values()} == {torch.float32}


def test_old_buffers_are_ignored(official_checkpoint: Make) -> None:
    extra = {
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(37)[None],
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(4),
    }
    official = official_checkpoint("ldpnet", extra=extra)
    model, _ = mobilemm.load(official.folder)
    assert not any("inv_freq" in name for name in model.state_dict())


@torch.no_grad()
def test_the_3b_config_with_keys_of_lit_gpt_that_contradict(official_checkpoint: Make) -> None:
    quirks = {
        "n_head": 16,
        "n_query_groups": 16,
        "n_embd": 999,
        "n_layer": 7,
        "block_size": 4096,
        "name": "huggy_llama_3b",
        "padded_vocab_size": 12345,
        "rotary_percentage": 1.0,
    }
    official = official_checkpoint("ldpnetv2", config=quirks)
    model, _ = mobilemm.load(official.folder)
    assert model.config.text_config.num_attention_heads == official.config["num_attention_heads"]
    image = pixels()
    torch.testing.assert_close(
        model(input_ids=torch.tensor([IDS]), pixel_values=image).logits,
        mobilevlm_logits(official, IDS, image),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_near_the_reference(official_checkpoint: Make, dtype: torch.dtype) -> None:
    official = official_checkpoint("ldpnetv2", dtype=dtype)
    model, _ = mobilemm.load(official.folder)
    image = pixels()
    ours = model(input_ids=torch.tensor([IDS]), pixel_values=image).logits.float()
    theirs = mobilevlm_logits(official, IDS, image)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99


@torch.no_grad()
def test_what_transformers_writes_is_read(official_checkpoint: Make) -> None:
    """llava-hf folders that transformers 5 saved: whatever names it chooses, and its config.json."""
    official = official_checkpoint("llava-hf")
    saved = official.folder.parent / "saved"
    reference = llava_reference(official)
    reference.save_pretrained(saved)
    for file in official.folder.glob("*token*"):
        (saved / file.name).write_bytes(file.read_bytes())
    model, _ = mobilemm.load(saved)
    image = pixels()
    torch.testing.assert_close(
        model(input_ids=torch.tensor([IDS]), pixel_values=image).logits,
        llava_logits(official, IDS, image),
        atol=1e-4,
        rtol=0,
    )


@torch.no_grad()
def test_the_module_names_of_transformers_5_are_read(official_checkpoint: Make) -> None:
    """`model.vision_tower.…` without `vision_model.`, `model.language_model.…`, `lm_head.weight`."""
    official = official_checkpoint("llava-hf", form="safetensors")
    from safetensors.torch import save_file

    state = {name: tensor.clone() for name, tensor in llava_reference(official).state_dict().items()}
    assert "lm_head.weight" in state
    assert "model.vision_tower.pre_layrnorm.weight" in state
    save_file(state, official.folder / "model.safetensors")
    model, _ = mobilemm.load(official.folder)
    image = pixels()
    torch.testing.assert_close(
        model(input_ids=torch.tensor([IDS]), pixel_values=image).logits,
        llava_logits(official, IDS, image),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_pictures_are_padded_as_the_config_says(official_checkpoint: Make, aspect: str) -> None:
    """To a square of CLIP's mean colour, or not at all: to the bit what CLIP's own processor makes of it."""
    official = official_checkpoint("ldpnetv2", config={"image_aspect_ratio": aspect})
    _, processor = mobilemm.load(official.folder)
    generator = torch.Generator().manual_seed(0)
    image = Image.fromarray(
        torch.randint(0, 256, (30, 71, 3), dtype=torch.uint8, generator=generator).numpy()
    )
    square = Image.new("RGB", (71, 71), (122, 116, 104))
    square.paste(image, (0, 20))
    clip = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    expected = clip([square if aspect == "pad" else image], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=image, text="<image>")["pixel_values"], expected)


@pytest.mark.parametrize("layer", [-1, -2, -3, 2])
@torch.no_grad()
def test_the_selected_layer_and_the_class_token(official_checkpoint: Make, layer: int) -> None:
    config = {"mm_vision_select_layer": layer, "mm_vision_select_feature": "cls_patch"}
    official = official_checkpoint("llava", config=config)
    model, _ = mobilemm.load(official.folder)
    image = pixels()
    tower = CLIPVisionModel(CLIPVisionConfig(**official.tower_config)).eval()
    tower.load_state_dict(official.tower)
    expected = tower(image, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(model.vision_encoder(image), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_generation_is_greedy_over_the_reference(official_checkpoint: Make) -> None:
    official = official_checkpoint("ldpnetv2")
    model, _ = mobilemm.load(official.folder)
    image = pixels()
    output = model.generate(torch.tensor([IDS]), pixel_values=image, max_new_tokens=4, do_sample=False)
    ids = list(IDS)
    for _ in range(4):
        ids.append(int(mobilevlm_logits(official, ids, image)[0, -1].argmax()))
        if ids[-1] == 2:
            break
    assert output[0].tolist() == ids
