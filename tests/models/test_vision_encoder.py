"""Vision encoders: each family's features are those of the uncut transformers or timm model."""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BeitConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    InternVLVisionConfig,
    PreTrainedConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SwinConfig,
    TimmWrapperConfig,
    ViTConfig,
    ViTMAEConfig,
)

from mobilemm.errors import MobileMMError
from mobilemm.models.configuration import MobileMMConfig
from mobilemm.models.vision_encoder import VisionEncoder, feature_shape

DEPTH, SIZE, WIDTH = 4, 32, 32
HEADS: dict[str, Any] = {"num_hidden_layers": DEPTH, "num_attention_heads": 2, "hidden_size": WIDTH}
SQUARE: dict[str, Any] = {"image_size": SIZE, "patch_size": 8}
PLAIN: dict[str, Any] = {**HEADS, **SQUARE, "intermediate_size": 48}


@dataclass(frozen=True)
class Family:
    """A transformers vision model: where its layers are, and what stands around its 4×4 patch tokens."""

    config: PreTrainedConfig
    layers: str
    norm: str | None = None
    prefix_tokens: int = 1
    never_built: tuple[str, ...] = field(default=())


FAMILIES = {
    "clip": Family(CLIPVisionConfig(**PLAIN), "encoder.layers", "post_layernorm"),
    "siglip": Family(SiglipVisionConfig(**PLAIN), "encoder.layers", "post_layernorm", 0, ("head.",)),
    "dinov2": Family(Dinov2Config(**HEADS, **SQUARE), "encoder.layer", "layernorm"),
    "dinov2_with_registers": Family(
        Dinov2WithRegistersConfig(**HEADS, **SQUARE, num_register_tokens=3), "encoder.layer", "layernorm", 4
    ),
    "dinov3_vit": Family(DINOv3ViTConfig(**PLAIN, num_register_tokens=2), "model.layer", "norm", 3),
    "vit": Family(ViTConfig(**PLAIN), "layers", "layernorm", never_built=("pooler.",)),
    "beit": Family(BeitConfig(**PLAIN, use_relative_position_bias=True), "layers", never_built=("pooler.",)),
    "beit_with_norm": Family(BeitConfig(**PLAIN, use_mean_pooling=False), "layers", "layernorm"),
    "vit_mae": Family(ViTMAEConfig(**PLAIN), "layers", "layernorm"),
    "internvl": Family(
        InternVLVisionConfig(**{**PLAIN, "image_size": [SIZE, SIZE], "patch_size": [8, 8]}), "encoder.layer"
    ),
}
SWIN = SwinConfig(
    image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 2], num_heads=[1, 2, 2], window_size=4
)


def make_config(
    vision: PreTrainedConfig | dict[str, Any], size: int = SIZE, **options: Any
) -> MobileMMConfig:
    return MobileMMConfig(
        vision_config=copy.deepcopy(vision), text_config={"model_type": "llama"}, image_size=size, **options
    )


def make_encoder(vision: PreTrainedConfig, size: int = SIZE, **options: Any) -> VisionEncoder:
    return VisionEncoder(make_config(vision, size, **options)).eval()


def timm_config(name: str, **arguments: Any) -> TimmWrapperConfig:
    return TimmWrapperConfig(architecture=name, model_args=arguments)


def randomize(model: nn.Module) -> nn.Module:
    """Weights far from their initialization, where zeros, ones and tiny scales would hide differences."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@functools.cache
def full_model(name: str) -> nn.Module:
    """transformers' own uncut model of one of `FAMILIES`."""
    config = copy.deepcopy(FAMILIES[name].config)
    if name == "vit_mae":
        config.mask_ratio = 0.0
    return randomize(AutoModel.from_config(config))


def pixels(size: int = SIZE) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def load(encoder: VisionEncoder, full: nn.Module) -> None:
    """Copies the full model's weights; those of `encoder` that it lacks raise."""
    weights = full.state_dict()
    encoder.model.load_state_dict({name: weights[name] for name in encoder.model.state_dict()})


@torch.no_grad()
def reference(name: str, layer: int) -> Tensor:
    """All tokens behind `layer`, from a hook on that layer of the full model."""
    family, full = FAMILIES[name], full_model(name)
    layers = full.get_submodule(family.layers)
    states: list[Tensor] = []
    index = layer - 1 if layer > 0 else DEPTH + layer
    hook = layers[index].register_forward_hook(
        lambda _module, _inputs, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    options = {}
    if name == "vit_mae":  # patches in a random order, which is undone below
        options["noise"] = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    outputs = full(pixels(), output_hidden_states=True, **options)
    hook.remove()
    features = states[0]
    if outputs.hidden_states is not None:
        torch.testing.assert_close(outputs.hidden_states[layer], features)
    if layer == -1:
        features = outputs.last_hidden_state
    if name == "vit_mae":
        order = outputs.ids_restore[..., None].expand(-1, -1, WIDTH)
        features = torch.cat([features[:, :1], features[:, 1:].gather(1, order)], 1)
    return features


def number_of_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("layer", [-1, -2, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_full_models_hidden_state(name: str, layer: int) -> None:
    family = FAMILIES[name]
    encoder = make_encoder(family.config, vision_feature_layer=layer)
    load(encoder, full_model(name))
    expected = reference(name, layer)
    assert encoder.grid == (4, 4)
    assert encoder.width == WIDTH
    assert encoder.shape.tokens == expected.shape[1] == 16 + family.prefix_tokens
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels()), expected[:, family.prefix_tokens :])
        encoder.config.vision_feature_select_strategy = "full"
        torch.testing.assert_close(encoder(pixels()), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_behind_the_selected_one_are_not_built(name: str) -> None:
    family, full = FAMILIES[name], full_model(name)
    encoder = make_encoder(family.config, vision_feature_layer=2)
    missing = set(full.state_dict()) - set(encoder.state_dict() | encoder.model.state_dict())
    behind = (f"{family.layers}.2.", f"{family.layers}.3.", *family.never_built)
    expected = {key for key in full.state_dict() if key.startswith((*behind, f"{family.norm}."))}
    assert missing == expected
    dropped = sum(full.state_dict()[key].numel() for key in expected)
    assert number_of_parameters(encoder) == number_of_parameters(full) - dropped


@pytest.mark.parametrize("name", FAMILIES)
def test_unused_layers_are_kept_but_never_run(name: str) -> None:
    family, full = FAMILIES[name], full_model(name)
    encoder = make_encoder(family.config, vision_feature_layer=-2, keep_unused_layers=True)
    load(encoder, full)
    heads = sum(v.numel() for k, v in full.named_parameters() if k.startswith(family.never_built))
    assert number_of_parameters(encoder) == number_of_parameters(full) - (heads if family.never_built else 0)
    assert encoder.unused is not None
    calls: list[nn.Module] = []
    for module in encoder.unused.modules():
        module.register_forward_hook(lambda module, _inputs, _output: calls.append(module))
    with torch.no_grad():
        for parameter in encoder.unused.parameters():
            parameter.fill_(torch.nan)
        features = encoder(pixels())
    torch.testing.assert_close(features, reference(name, -2)[:, family.prefix_tokens :])
    assert calls == []


def test_the_last_layer_by_its_number_is_the_encoders_output() -> None:
    encoder = make_encoder(FAMILIES["vit"].config, vision_feature_layer=DEPTH)
    load(encoder, full_model("vit"))
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels()), reference("vit", -1)[:, 1:])


def test_masked_autoencoder_keeps_the_order_and_number_of_patches() -> None:
    """Changing one patch, seen before any attention, changes that token only."""
    encoder = make_encoder(FAMILIES["vit_mae"].config, vision_feature_layer=1)
    load(encoder, full_model("vit_mae"))
    embeddings: list[Tensor] = []
    encoder.model.layers[0].register_forward_pre_hook(lambda _m, inputs: embeddings.append(inputs[0]))
    image = pixels()
    changed = image.clone()
    changed[..., 8:16, 16:24] += 1  # row 1, column 2 of the 4×4 patches
    with torch.no_grad():
        encoder(image), encoder(changed)
    differs = (embeddings[0] != embeddings[1]).any(-1)
    assert differs.nonzero()[:, 1].tolist() == [1 + 1 * 4 + 2] * 2


def test_a_build_without_weights_leaves_no_trace_in_later_models() -> None:
    """BEiT caches the index of its position bias; one on "meta" would make garbage of later features."""
    config = BeitConfig(**{**PLAIN, "image_size": 40}, use_relative_position_bias=True)
    with torch.device("meta"):  # as transformers' from_pretrained does
        VisionEncoder(make_config(config, 40, vision_feature_layer=-1))
    full = randomize(AutoModel.from_config(config))
    encoder = make_encoder(config, 40, vision_feature_layer=-1)
    load(encoder, full)
    bias = full.layers[0].relative_position_bias
    assert bias.generate_relative_position_index((5, 5)).device.type == "cpu"
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels(40)), full(pixels(40)).last_hidden_state[:, 1:])


@pytest.mark.parametrize(("layer", "stage", "side", "width"), [(-1, 3, 4, 32), (-2, 2, 8, 16), (1, 1, 16, 8)])
def test_swin_counts_stages_before_their_downsampling(layer: int, stage: int, side: int, width: int) -> None:
    full = randomize(AutoModel.from_config(copy.deepcopy(SWIN)))
    encoder = make_encoder(SWIN, 64, vision_feature_layer=layer)
    load(encoder, full)
    assert (encoder.grid, encoder.width) == ((side, side), width)
    with torch.no_grad():
        outputs = full(pixels(64), output_hidden_states=True, output_hidden_states_before_downsampling=True)
        maps = outputs.reshaped_hidden_states[stage].flatten(2).mT
        torch.testing.assert_close(encoder(pixels(64)), outputs.last_hidden_state if layer == -1 else maps)
    behind = tuple(f"encoder.layers.{index}." for index in range(stage, 3))
    ends = (f"encoder.layers.{stage - 1}.downsample.", "layernorm.") if layer != -1 else ()
    dropped = {key for key in full.state_dict() if key.startswith((*behind, *ends))}
    assert set(full.state_dict()) - set(encoder.model.state_dict()) == dropped


@pytest.mark.parametrize(("layer", "side", "width"), [(-1, 2, 32), (-2, 4, 24), (1, 16, 8)])
def test_convnext_maps_become_rows_of_tokens(layer: int, side: int, width: int) -> None:
    config = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    full = randomize(AutoModel.from_config(config))
    encoder = make_encoder(config, 64, vision_feature_layer=layer)
    load(encoder, full)
    assert (encoder.grid, encoder.width) == ((side, side), width)
    with torch.no_grad():
        outputs = full(pixels(64), output_hidden_states=True)
        expected = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
        features = encoder(pixels(64))
    assert torch.equal(features[:, 1 * side + 1], expected[:, :, 1, 1])  # row-major
    torch.testing.assert_close(features, expected.flatten(2).mT)


TIMM = {
    # name: (timm model, its arguments, image side)
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2}, 32),
    "eva02_clip": (
        "eva02_base_patch16_clip_224",
        {"patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2},
        32,
    ),
    "nfnet": ("test_nfnet", {}, 64),
    "fastvit": ("fastvit_mci0", {"embed_dims": (8, 16, 32, 64), "layers": (1, 1, 1, 1)}, 64),
    "mobilenetv4": ("mobilenetv4_conv_small_035", {}, 64),
    "efficientnet": ("test_efficientnet", {}, 64),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"window_size": 2, "embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
        64,
    ),
}
TIMM_SHAPES = {
    # (grid side, width) of layers -1, -2 and 1
    "vit": [(4, 32), (4, 32), (4, 32)],
    "eva02_clip": [(4, 32), (4, 32), (4, 32)],
    "nfnet": [(2, 192), (4, 96), (32, 64)],
    "fastvit": [(2, 128), (4, 32), (16, 8)],
    "mobilenetv4": [(2, 336), (4, 32), (32, 32)],
    "efficientnet": [(2, 256), (4, 48), (32, 16)],
    "convnext": [(2, 32), (4, 24), (16, 8)],
    "swin": [(2, 64), (4, 32), (16, 8)],
}


@functools.cache
def full_timm_model(name: str) -> nn.Module:
    """timm's own uncut model of one of `TIMM`."""
    architecture, arguments, size = TIMM[name]
    in_size = {"img_size": size} if name in ("vit", "eva02_clip", "swin") else {}
    return randomize(timm.create_model(architecture, num_classes=0, **in_size, **arguments))


def load_timm(encoder: VisionEncoder, full: nn.Module) -> int:
    """Copies weights, whose names timm flattens in cut models; returns the number of parameters left."""

    def flat(name: str) -> str:
        return re.sub(r"[._]", "", name.removeprefix("model."))

    weights = {flat(name): value for name, value in full.state_dict().items()}
    assert len(weights) == len(full.state_dict())
    encoder.model.load_state_dict({name: weights[flat(name)] for name in encoder.model.state_dict()})
    taken = {flat(name) for name, _ in encoder.model.named_parameters()}
    return sum(value.numel() for name, value in full.named_parameters() if flat(name) not in taken)


@pytest.mark.parametrize(("position", "layer"), list(enumerate([-1, -2, 1])))
@pytest.mark.parametrize("name", TIMM)
def test_timm_features_are_the_full_models(name: str, position: int, layer: int) -> None:
    architecture, arguments, size = TIMM[name]
    side, width = TIMM_SHAPES[name][position]
    full = full_timm_model(name)
    encoder = make_encoder(timm_config(architecture, **arguments), size, vision_feature_layer=layer)
    left_out = load_timm(encoder, full)
    assert (encoder.grid, encoder.width) == ((side, side), width)
    with torch.no_grad():
        features = encoder(pixels(size))
        if layer == -1:
            expected = full.forward_features(pixels(size))
            if name == "swin":  # timm's Swin puts channels last
                expected = expected.permute(0, 3, 1, 2)
            if expected.ndim == 3:
                expected = expected[:, 1:].mT.unflatten(2, (side, side))
        else:
            maps = full.forward_intermediates(pixels(size), intermediates_only=True)
            expected = maps[layer - 1 if layer > 0 else layer]
    assert torch.isfinite(features).all()
    torch.testing.assert_close(features, expected.flatten(2).mT, rtol=1e-4, atol=1e-5)
    assert number_of_parameters(encoder) == number_of_parameters(full) - left_out
    if layer != -1:
        assert left_out > 0


@pytest.mark.parametrize("name", ["mobilenetv4", "efficientnet", "nfnet", "vit", "swin"])
def test_timm_runs_nothing_behind_the_selected_layer(name: str) -> None:
    """Every parameter of the encoder gets a gradient, so none lies behind what it returns."""
    architecture, arguments, size = TIMM[name]
    encoder = make_encoder(timm_config(architecture, **arguments), size, vision_feature_layer=2)
    encoder(pixels(size)).square().sum().backward()
    assert [key for key, value in encoder.named_parameters() if value.grad is None] == []


def test_timm_full_strategy_puts_class_and_register_tokens_first() -> None:
    arguments = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    name = "vit_small_patch14_reg4_dinov2"
    full = randomize(timm.create_model(name, num_classes=0, img_size=28, **arguments))
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    encoder = make_encoder(timm_config(name, **arguments), 28, **options)
    load_timm(encoder, full)
    with torch.no_grad():
        expected = full.forward_features(pixels(28))
        assert expected.shape == (2, 1 + 4 + 2 * 2, 32)
        torch.testing.assert_close(encoder(pixels(28)), expected)
        encoder.config.vision_feature_select_strategy = "default"
        torch.testing.assert_close(encoder(pixels(28)), expected[:, 5:])


def test_timm_hybrid_grid_follows_its_tokens_not_its_patch_size() -> None:
    """Its patches are cut from a map that the stem has shrunk: one token for 32 pixels, not for 8."""
    encoder = make_encoder(timm_config("vit_tiny_r_s16_p8_224", depth=1), 64, vision_feature_layer=-1)
    assert encoder.grid == (2, 2)
    assert encoder(pixels(64)).shape == (2, 4, 192)


def test_timm_name_may_carry_its_weights_tag() -> None:
    config = timm_config("test_vit.r160_in1k")
    assert feature_shape(make_config(config, 64, vision_feature_layer=-1)).grid == (4, 4)


@pytest.mark.slow
def test_efficientnet_lite0_gives_49_tokens_of_1280_at_224_pixels() -> None:
    full = randomize(timm.create_model("tf_efficientnet_lite0", num_classes=0))
    encoder = make_encoder(timm_config("tf_efficientnet_lite0"), 224, vision_feature_layer=-1)
    load_timm(encoder, full)
    assert (encoder.grid, encoder.width) == ((7, 7), 1280)
    with torch.no_grad():
        expected = full.forward_features(pixels(224))
        torch.testing.assert_close(encoder(pixels(224)), expected.flatten(2).mT, rtol=1e-4, atol=1e-5)


def test_clip_large_336_as_in_mobilevlm() -> None:
    """577 tokens of 1024; of CLIP's 303,507,456 parameters a layer and the last norm are not built."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        encoder = VisionEncoder(make_config(vision, 336))
    assert (encoder.shape.tokens, encoder.width, encoder.grid) == (577, 1024, (24, 24))
    attention, mlp, norms = 4 * (1024 * 1024 + 1024), 2 * 1024 * 4096 + 4096 + 1024, 2 * 2 * 1024
    assert number_of_parameters(encoder) == 303_507_456 - (attention + mlp + norms) - 2 * 1024


@pytest.mark.parametrize(
    ("vision", "options", "message"),
    [
        (timm_config("resnot50"), {}, "timm .* has no model 'resnot50'"),
        (timm_config("vit_tiny_patch16_224", colour=True), {}, "colour"),
        (timm_config("test_vit"), {"vision_feature_layer": 40}, "layer 40"),
        (timm_config("test_efficientnet"), {"vision_feature_layer": 9}, "layer 9"),
        ({"model_type": "clip_visio"}, {}, "clip_visio"),
        ({"model_type": "clip_vision_model", "hidden_size": 33}, {}, "33"),
        (
            {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2},
            {},
            "'llama' does not run",
        ),
        (FAMILIES["clip"].config, {"vision_feature_layer": DEPTH + 1}, "layer 5: the encoder has 4 layers"),
        (FAMILIES["clip"].config, {"vision_feature_layer": -DEPTH - 1}, "layer -5: the encoder has 4 layers"),
        (FAMILIES["clip"].config, {"vision_feature_layer": 0}, "layer 0: the encoder has 4 layers"),
        (SWIN, {"vision_feature_layer": 4}, "layer 4: the encoder has 3 layers"),
        (Siglip2VisionConfig(**HEADS, patch_size=8), {}, "siglip2_vision_model.*pixels"),
    ],
)
def test_errors_say_what_is_wrong(vision: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MobileMMError, match=message):
        VisionEncoder(make_config(vision, **options))
