"""Projectors: numbers against torchvision's, timm's and transformers' own modules."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import LayerNormAct2d
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.ops.misc import SqueezeExcitation
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    IdeficsConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlavaConfig,
    OPTConfig,
    SmolVLMConfig,
    SmolVLMVisionConfig,
)
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from mobilemm.errors import MobileMMError
from mobilemm.models.projectors import build_projector

VISION, TEXT = 24, 32
QFORMER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "vocab_size": 50,
}
OPTIONS: list[dict[str, Any]] = [
    {"type": "linear"},
    {"type": "mlp1x_gelu"},
    {"type": "mlp2x_gelu"},
    {"type": "mlp3x_gelu"},
    {"type": "ldpnet"},
    {"type": "ldpnetv2"},
    {"type": "ldpnetv2", "num_tokens": 9},
    {"type": "pixel_shuffle"},
    {"type": "perceiver_resampler", "num_tokens": 5, "depth": 2, "num_heads": 2, "head_dim": 8},
    {"type": "qformer", "num_tokens": 3, **QFORMER},
]


def build(type_: str, grid: tuple[int, int] = (6, 6), **options: Any) -> Any:
    """A projector with weights far from their initialization."""
    torch.manual_seed(0)
    projector = build_projector({"type": type_, **options}, vision_width=VISION, text_width=TEXT, grid=grid)
    randomize(projector)
    return projector.eval()


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def features(tokens: int = 36, width: int = VISION) -> Tensor:
    return torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(1))


def copy_weights(
    source: nn.Module, target: nn.Module, names: dict[str, str], rest: tuple[str, ...] = ()
) -> None:
    """Source's weights into the target's, names rewritten; only those of `rest` may stay as they are."""
    state = {}
    for name, value in source.state_dict().items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        state[name] = value
    missing, unexpected = target.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [name for name in missing if not name.startswith(rest or ("-",))] == []


@pytest.mark.parametrize(
    ("name", "text_width", "parameters"),
    [
        ("ldpnetv2", 2048, 6_316_032),
        ("ldpnetv2", 2560, 9_205_760),
        ("ldpnet", 2048, 18_936_832),
        ("ldpnet", 2560, 28_913_920),
    ],
)
def test_sizes_are_those_of_mobilevlm(name: str, text_width: int, parameters: int) -> None:
    with torch.device("meta"):
        projector = build_projector({"type": name}, vision_width=1024, text_width=text_width, grid=(24, 24))
        tokens = projector(torch.zeros(2, 576, 1024))
    assert sum(parameter.numel() for parameter in projector.parameters()) == parameters
    assert projector.num_tokens == 144
    assert tokens.shape == (2, 144, text_width)


class ReferenceLDP(nn.Module):
    """MobileVLM's LDP as published: torchvision's inverted residuals with timm's channel LayerNorm."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.blocks = nn.Sequential(
            *(
                InvertedResidual(
                    InvertedResidualConfig(width, 3, width, width, True, "HS", stride, 1, 1),
                    partial(LayerNormAct2d, act_layer=None),
                    partial(SqueezeExcitation, scale_activation=nn.Hardsigmoid),
                )
                for stride in (1, 2)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        batch, tokens, _ = features.shape
        side = round(tokens**0.5)
        image = self.mlp(features).permute(0, 2, 1).reshape(batch, -1, side, side)
        return self.blocks(image).flatten(2).permute(0, 2, 1)


# Our names → torchvision's.
LDP_NAMES = {
    "depthwise_norm": "block.0.1",
    "depthwise": "block.0.0",
    "squeeze_excitation.squeeze": "block.1.fc1",
    "squeeze_excitation.excite": "block.1.fc2",
    "pointwise_norm": "block.2.1",
    "pointwise": "block.2.0",
}


@pytest.mark.parametrize("side", [6, 5])
@pytest.mark.parametrize("width", [32, 48, 80])  # a quarter of 48 is no multiple of 8
def test_ldp_is_torchvisions_inverted_residuals(width: int, side: int) -> None:
    torch.manual_seed(0)
    projector = build_projector({"type": "ldpnet"}, vision_width=VISION, text_width=width, grid=(side, side))
    randomize(projector)
    expected = ReferenceLDP(VISION, width)
    copy_weights(projector, expected, LDP_NAMES)
    with torch.no_grad():
        ours, theirs = projector(features(side * side)), expected(features(side * side))
    assert ours.shape == (2, 9, width)
    assert projector.num_tokens == 9
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_ldp_normalizes_each_position_alone() -> None:
    """The channel LayerNorm's statistics are a position's own, with timm's epsilon of 1e-5."""
    norm = build("ldpnet").blocks[0].depthwise_norm
    image = features(1, TEXT * 36).view(2, TEXT, 6, 6) * 1e-2
    centered = image - image.mean(1, keepdim=True)
    scaled = centered / (image.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    with torch.no_grad():
        expected = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(norm(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num_tokens", "side"), [(None, 3), (9, 3), (4, 2), (36, 6), (16, 4), (25, 5)])
def test_ldpv2_is_a_pool_and_a_convolution_added_to_its_input(num_tokens: int | None, side: int) -> None:
    projector = build("ldpnetv2", num_tokens=num_tokens)
    convolution = nn.Conv2d(TEXT, TEXT, 3, stride=1, padding=1, groups=TEXT)
    convolution.load_state_dict(projector.position.state_dict())
    with torch.no_grad():
        image = nn.functional.linear(features(), projector.mlp[0].weight, projector.mlp[0].bias)
        image = image * 0.5 * (1 + torch.erf(image / 2**0.5))  # the exact GELU
        image = nn.functional.linear(image, projector.mlp[2].weight, projector.mlp[2].bias)
        pooled = nn.AdaptiveAvgPool2d(side)(image.permute(0, 2, 1).reshape(2, TEXT, 6, 6))
        expected = (convolution(pooled) + pooled).flatten(2).permute(0, 2, 1)
        without_residual = convolution(pooled).flatten(2).permute(0, 2, 1)
        ours = projector(features())
    assert projector.num_tokens == side * side
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    # A port that forgets the residual is far off.
    assert (ours - without_residual).abs().mean() > 0.1


@pytest.mark.parametrize(("num_tokens", "plain"), [(None, True), (64, True), (144, True), (256, False)])
def test_ldpv2_token_counts_of_a_24_by_24_grid(num_tokens: int | None, plain: bool) -> None:
    """The plain pool wherever it can be, since every runtime has it; it is then the adaptive pool's equal."""
    projector = build("ldpnetv2", (24, 24), num_tokens=num_tokens)
    assert projector.num_tokens == (num_tokens or 144)
    assert isinstance(projector.pool, nn.AvgPool2d) == plain
    assert projector(features(576)).shape == (2, projector.num_tokens, TEXT)


def test_mlp2x_is_llavas_projector() -> None:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=VISION, num_attention_heads=2),
        text_config=LlamaConfig(hidden_size=TEXT, num_attention_heads=2),
    )
    projector, expected = build("mlp2x_gelu"), LlavaMultiModalProjector(config)
    copy_weights(projector, expected, {"^0": "linear_1", "^2": "linear_2"})
    with torch.no_grad():
        torch.testing.assert_close(projector(features()), expected(features()))
    assert projector.num_tokens == 36


@pytest.mark.parametrize(("name", "linears"), [("linear", 1), ("mlp1x_gelu", 1), ("mlp4x_gelu", 4)])
def test_mlps_have_gelu_between_their_layers(name: str, linears: int) -> None:
    projector = build(name)
    expected = features()
    weights = [value for key, value in projector.state_dict().items() if key.endswith("weight")]
    biases = [value for key, value in projector.state_dict().items() if key.endswith("bias")]
    assert len(weights) == linears
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        expected = nn.functional.gelu(expected) if index else expected
        expected = expected @ weight.T + bias
    with torch.no_grad():
        torch.testing.assert_close(projector(features()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_pixel_shuffle_is_smolvlms_connector(scale: int) -> None:
    config = SmolVLMConfig(
        vision_config=SmolVLMVisionConfig(hidden_size=VISION, num_attention_heads=2).to_dict(),
        text_config=LlamaConfig(hidden_size=TEXT, num_attention_heads=2).to_dict(),
        scale_factor=scale,
    )
    projector, expected = build("pixel_shuffle", scale=scale), SmolVLMConnector(config)
    copy_weights(projector, expected, {"^linear": "modality_projection.proj"})
    with torch.no_grad():
        torch.testing.assert_close(projector(features()), expected(features()))
    assert projector.num_tokens == 36 // scale**2


@pytest.mark.parametrize(("options", "tokens"), [({}, 144), ({"num_tokens": 64}, 64), ({"scale": 4}, 36)])
def test_pixel_shuffle_token_counts(options: dict[str, int], tokens: int) -> None:
    projector = build("pixel_shuffle", (24, 24), **options)
    assert projector.num_tokens == tokens
    assert projector(features(576)).shape == (2, tokens, TEXT)


def test_perceiver_is_idefics_resampler() -> None:
    depth, heads, head_dim, latents = 3, 2, 8, 5
    config = IdeficsConfig(
        vision_config={"embed_dim": VISION}, perceiver_config={"qk_layer_norms_perceiver": False}
    )
    expected = IdeficsPerceiverResampler(config, VISION, depth, heads, head_dim, latents)
    for _attention, feed_forward in expected.blocks:
        feed_forward.act = nn.GELU()  # Idefics has ReLU there, OpenFlamingo GELU
    projector = build(
        "perceiver_resampler", num_tokens=latents, depth=depth, num_heads=heads, head_dim=head_dim
    )
    linear, projector.linear = projector.linear, nn.Identity()
    copy_weights(
        projector,
        expected,
        {
            r"^norm": "layer_norm",
            r"^layers\.(\d+)\.feed_forward\.0": r"blocks.\1.1.ln",
            r"^layers\.(\d+)\.feed_forward\.1": r"blocks.\1.1.fc",
            r"^layers\.(\d+)\.feed_forward\.3": r"blocks.\1.1.c_proj",
            r"^layers\.(\d+)\.features_norm": r"blocks.\1.0.context_layer_norm",
            r"^layers\.(\d+)\.latents_norm": r"blocks.\1.0.latents_layer_norm",
            r"^layers\.(\d+)\.query": r"blocks.\1.0.q_proj",
            r"^layers\.(\d+)\.key": r"blocks.\1.0.k_proj",
            r"^layers\.(\d+)\.value": r"blocks.\1.0.v_proj",
            r"^layers\.(\d+)\.out": r"blocks.\1.0.output_proj",
        },
    )
    projector.linear = linear
    with torch.no_grad():
        torch.testing.assert_close(projector(features()), linear(expected(features())), rtol=1e-5, atol=1e-5)
    assert projector.num_tokens == latents


BLIP_VISION = {
    "hidden_size": VISION,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "image_size": 28,
    "patch_size": 14,
}
BLIP_TEXT = {
    "hidden_size": TEXT,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 20,
    "vocab_size": 60,
    "word_embed_proj_dim": TEXT,
}
QFORMER_NAMES = {r"^linear": "language_projection"}


@torch.no_grad()
def test_qformer_is_blip2s() -> None:
    """The features that BLIP-2 gives to its language model, from the same output of the vision encoder."""
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**BLIP_VISION).to_dict(),
        qformer_config=Blip2QFormerConfig(encoder_hidden_size=VISION, **QFORMER).to_dict(),
        text_config=OPTConfig(**BLIP_TEXT).to_dict(),
        num_query_tokens=3,
    )
    blip = Blip2ForConditionalGeneration(config).eval()
    projector = build("qformer", num_tokens=3, **QFORMER)
    copy_weights(projector, blip, QFORMER_NAMES, rest=("vision_model.", "language_model."))
    pixels = torch.randn(2, 3, 28, 28)
    ours = projector(blip.vision_model(pixels).last_hidden_state)
    torch.testing.assert_close(ours, blip.get_image_features(pixels, return_dict=True).pooler_output)
    assert ours.shape == (2, 3, TEXT)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_instruction_aware_qformer_is_instructblips(masked: bool) -> None:
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**BLIP_VISION).to_dict(),
        qformer_config=InstructBlipQFormerConfig(encoder_hidden_size=VISION, **QFORMER).to_dict(),
        text_config=OPTConfig(**BLIP_TEXT).to_dict(),
        num_query_tokens=3,
    )
    blip = InstructBlipForConditionalGeneration(config).eval()
    projector = build("qformer", num_tokens=3, instruction=True, **QFORMER)
    copy_weights(projector, blip, QFORMER_NAMES, rest=("vision_model.", "language_model."))
    pixels = torch.randn(2, 3, 28, 28)
    words = {"qformer_input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])}
    if masked:
        words["qformer_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    seen = blip.vision_model(pixels).last_hidden_state
    ours = projector(seen, **words)
    expected = blip.get_image_features(pixels, **words, return_dict=True).pooler_output
    torch.testing.assert_close(ours, expected)
    other = projector(seen, qformer_input_ids=torch.tensor([[9, 2, 3, 4], [5, 6, 0, 0]]))
    assert not torch.allclose(other[0], ours[0])


def test_instruction_aware_qformer_asks_for_its_words() -> None:
    projector = build("qformer", instruction=True, **QFORMER)
    with pytest.raises(MobileMMError, match="qformer_input_ids, one row per image"):
        projector(features())


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))[:24])
def test_gradients_flow_to_every_parameter(options: dict[str, Any]) -> None:
    options = dict(options)
    projector = build(options.pop("type"), **options)
    inputs = features().requires_grad_()
    tokens = projector(inputs)
    assert tokens.shape == (2, projector.num_tokens, TEXT)
    (tokens * torch.randn_like(tokens)).sum().backward()
    untouched = [
        name
        for name, parameter in projector.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # A key's bias moves all of a query's scores alike, so softmax takes its gradient away.
    assert [name for name in untouched if not name.endswith("key.bias")] == []
    assert inputs.grad is not None
    assert inputs.grad.abs().sum(-1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))[:24])
def test_images_do_not_see_each_other(options: dict[str, Any]) -> None:
    options = dict(options)
    projector = build(options.pop("type"), **options)
    with torch.no_grad():
        alone = torch.cat([projector(features()[:1]), projector(features()[1:])])
        torch.testing.assert_close(projector(features()), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("type_", "grid", "options", "message"),
    [
        ("ldpnetv2", (5, 5), {}, "grid 5×5 is odd: give num_tokens"),
        ("ldpnetv2", (6, 6), {"num_tokens": 10}, "square number, not 10"),
        ("ldpnetv2", (6, 6), {"num_tokens": 0}, "square number, not 0"),
        ("ldpnetv2", (6, 6), {"num_tokens": -4}, "square number, not -4"),
        ("ldpnetv2", (6, 6), {"num_tokens": 49}, "49 is more than the encoder's 6×6 grid"),
        ("ldpnetv2", (6, 6), {"num_tokens": "9"}, "square number, not '9'"),
        ("ldpnetv2", (6, 6), {"tokens": 9}, "'tokens'"),
        ("ldpnet", (6, 6), {"num_tokens": 9}, "'num_tokens'"),
        ("linear", (6, 6), {"depth": 2}, "'depth'"),
        ("pixel_shuffle", (6, 6), {"scale": 4}, "does not fold by 4"),
        ("pixel_shuffle", (5, 5), {}, "grid 5×5 does not fold by 2"),
        ("pixel_shuffle", (24, 24), {"num_tokens": 256}, "256 tokens"),
        ("pixel_shuffle", (24, 24), {"num_tokens": 60}, "square number, not 60"),
        ("pixel_shuffle", (6, 6), {"num_tokens": 144}, "144 tokens"),
        ("pixel_shuffle", (6, 6), {"scale": 0}, "scale must be positive"),
        ("perceiver_resampler", (6, 6), {"num_tokens": 0}, "num_tokens must be positive"),
        ("qformer", (6, 6), {"num_token": 3, **QFORMER}, "num_token"),
        ("qformer", (6, 6), {**QFORMER, "hidden_size": 15}, "15.*heads"),
    ],
)
def test_options_that_do_not_fit(
    type_: str, grid: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(MobileMMError, match=f"(?s){type_}.*{message}"):
        build(type_, grid, **options)


@pytest.mark.parametrize(
    "name",
    [
        "ldpnetv",
        "ldpnetv22",
        "my_ldpnet",
        "LDPNetV2",
        "mlp2x_gelux",
        "mlp0x_gelu",
        "mlp2x_relu",
        "mlp",
        "",
        None,
    ],
)
def test_names_match_whole_and_unknown_ones_list_the_known(name: str | None) -> None:
    with pytest.raises(MobileMMError, match="unknown projector") as caught:
        build_projector({"type": name}, vision_width=VISION, text_width=TEXT, grid=(6, 6))
    known = str(caught.value).partition("known: ")[2].split(", ")
    names = {"ldpnet", "ldpnetv2", "linear", "mlpNx_gelu", "perceiver_resampler", "pixel_shuffle", "qformer"}
    assert set(known) == names
    with pytest.raises(MobileMMError, match="unknown projector None"):
        build_projector({}, vision_width=VISION, text_width=TEXT, grid=(6, 6))


def test_a_longer_name_is_not_taken_for_its_beginning() -> None:
    first, second = build("ldpnet"), build("ldpnetv2")
    assert hasattr(first, "blocks")
    assert not hasattr(second, "blocks")
    assert isinstance(second.pool, nn.AvgPool2d)


@pytest.mark.parametrize(
    ("name", "tokens"), [("linear", 37), ("mlp2x_gelu", 37), ("perceiver_resampler", 64)]
)
def test_a_class_token_is_a_token_like_others(name: str, tokens: int) -> None:
    projector: Any = build_projector(
        {"type": name}, vision_width=VISION, text_width=TEXT, grid=(6, 6), prefix_tokens=1
    )
    assert projector.num_tokens == projector(features(37)).shape[1] == tokens


@pytest.mark.parametrize("name", ["ldpnet", "ldpnetv2", "pixel_shuffle"])
def test_a_class_token_has_no_place_in_a_grid(name: str) -> None:
    with pytest.raises(MobileMMError, match="vision_feature_select_strategy"):
        build_projector({"type": name}, vision_width=VISION, text_width=TEXT, grid=(6, 6), prefix_tokens=1)
