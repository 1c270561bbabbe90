"""Input projectors: visual features → embeddings of the language model, Θ_X→T in the survey's words.

A new projector is one class here and one line in `PROJECTORS`. Each takes features of shape
(images, tokens, vision_width), tokens in row-major order of the grid, and gives
(images, num_tokens, text_width). One that folds the grid keeps it as `grid`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from mobilemm.errors import MobileMMError


def build_projector(
    options: dict[str, Any],
    *,
    vision_width: int,
    text_width: int,
    grid: tuple[int, int],
    prefix_tokens: int = 0,
) -> nn.Module:
    """The projector that `options["type"]` names, with the remaining options as its keyword arguments.

    `prefix_tokens` is how many class and register tokens stand before those of the grid.

    Raises MobileMMError for an unknown name (listing the known ones), an option that is unknown or does not
    fit, or tokens before the grid where the projector folds it.
    """
    options = dict(options)
    name = options.pop("type", None)
    depth = re.fullmatch(r"mlp([1-9]\d?)x_gelu", str(name))
    projector_class = MLPProjector if depth else PROJECTORS.get(str(name))
    if projector_class is None:
        known = ", ".join(sorted([*PROJECTORS, "mlpNx_gelu"]))
        raise MobileMMError(f"unknown projector {name!r} in the config's projector type; known: {known}")
    if depth:
        options.setdefault("depth", int(depth[1]))
    try:
        projector: Any = projector_class(
            vision_width=vision_width, text_width=text_width, grid=grid, **options
        )
        if projector.num_tokens < 1:
            raise ValueError(f"num_tokens must be positive, not {projector.num_tokens}")
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise MobileMMError(f"projector {name!r} with options {options}: {error}") from error
    if prefix_tokens and hasattr(projector, "grid"):
        raise MobileMMError(
            f"projector {name!r} folds the patch grid and cannot take the {prefix_tokens} tokens before it:"
            ' set vision_feature_select_strategy to "default"'
        )
    if isinstance(projector, (LinearProjector, MLPProjector)):
        projector.num_tokens += prefix_tokens
    return projector


def _side(num_tokens: int) -> int:
    if not isinstance(num_tokens, int) or num_tokens < 1 or math.isqrt(num_tokens) ** 2 != num_tokens:
        raise ValueError(f"num_tokens must be a square number, not {num_tokens!r}")
    return math.isqrt(num_tokens)


def _to_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, height · width, channels) → (n, channels, height, width)."""
    return features.transpose(1, 2).unflatten(2, grid)


def _to_tokens(image: Tensor) -> Tensor:
    """(n, channels, height, width) → (n, height · width, channels)."""
    return image.flatten(2).transpose(1, 2)


class LinearProjector(nn.Linear):
    """One linear layer (LLaVA 1.0); as many tokens as the encoder gives."""

    num_tokens: int

    def __init__(self, vision_width: int, text_width: int, grid: tuple[int, int]) -> None:
        super().__init__(vision_width, text_width)
        self.num_tokens = grid[0] * grid[1]


class MLPProjector(nn.Sequential):
    """`depth` linear layers with GELU between them; `mlp2x_gelu` is that of LLaVA-1.5.

    Source: Liu et al. 2023, arXiv 2310.03744, section 3.3.
    """

    num_tokens: int

    def __init__(self, vision_width: int, text_width: int, grid: tuple[int, int], depth: int = 2) -> None:
        layers: list[nn.Module] = [nn.Linear(vision_width, text_width)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(text_width, text_width)]
        super().__init__(*layers)
        self.num_tokens = grid[0] * grid[1]


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of (n, channels, height, width), each position by itself."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the mean of all (ReLU inside, hard sigmoid gate).

    Inside are a quarter of the channels, to the nearest multiple of 8 as in MobileNet V3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        inside = max(8, (quarter + 4) // 8 * 8)
        inside += 8 if inside < 0.9 * quarter else 0
        self.squeeze = nn.Conv2d(channels, inside, 1)
        self.excite = nn.Conv2d(inside, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        gate = nn.functional.relu(self.squeeze(image.mean((2, 3), keepdim=True)))
        return image * nn.functional.hardsigmoid(self.excite(gate))


class DepthwiseBlock(nn.Module):
    """MobileNet V3's block without expansion: depthwise 3×3, squeeze-excitation, pointwise.

    Its output is added to its input where the stride is 1. Channel LayerNorm stands in for BatchNorm.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.depthwise_norm = ChannelLayerNorm(channels)
        self.squeeze_excitation = SqueezeExcitation(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.pointwise_norm = ChannelLayerNorm(channels)

    def forward(self, image: Tensor) -> Tensor:
        out = nn.functional.hardswish(self.depthwise_norm(self.depthwise(image)))
        out = self.pointwise_norm(self.pointwise(self.squeeze_excitation(out)))
        return image + out if self.residual else out


class LightweightDownsampleProjector(nn.Module):
    """LDP of MobileVLM: two linear layers, then two depthwise blocks, of which the second has stride 2.

    Shapes: (n, height · width, vision_width) → (n, ⌈height/2⌉ · ⌈width/2⌉, text_width); 576 → 144 at 336 px.
    Source: Chu et al. 2023, arXiv 2312.16886, section 3.4.
    """

    def __init__(self, vision_width: int, text_width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.num_tokens = math.ceil(grid[0] / 2) * math.ceil(grid[1] / 2)
        self.mlp = nn.Sequential(
            nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )
        self.blocks = nn.Sequential(DepthwiseBlock(text_width, 1), DepthwiseBlock(text_width, 2))

    def forward(self, features: Tensor) -> Tensor:
        return _to_tokens(self.blocks(_to_grid(self.mlp(features), self.grid)))


class LightweightDownsampleProjectorV2(nn.Module):
    """LDPv2 of MobileVLM V2: halves the grid of visual tokens each way (576 → 144 at 336 px).

    Two pointwise layers, an average pool, then a depthwise 3×3 convolution added to its own input,
    which gives each token its place (a positional encoding generator).

    Shapes: (n, height · width, vision_width) → (n, num_tokens, text_width). `num_tokens` is a square number
    (64, 144, 256 …); left out, a quarter of the encoder's tokens, whose grid must then be even, else
    ValueError.
    Source: Chu et al. 2024, arXiv 2402.03766, section 3.3.
    """

    def __init__(
        self, vision_width: int, text_width: int, grid: tuple[int, int], num_tokens: int | None = None
    ) -> None:
        super().__init__()
        if num_tokens is None:
            if grid[0] % 2 or grid[1] % 2:
                raise ValueError(f"the encoder's grid {grid[0]}×{grid[1]} is odd: give num_tokens")
            pooled = (grid[0] // 2, grid[1] // 2)
        else:
            pooled = (_side(num_tokens), _side(num_tokens))
        if pooled[0] > grid[0] or pooled[1] > grid[1]:
            raise ValueError(f"num_tokens {num_tokens} is more than the encoder's {grid[0]}×{grid[1]} grid")
        self.grid = grid
        self.num_tokens = pooled[0] * pooled[1]
        self.mlp = nn.Sequential(
            nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width)
        )
        # Every runtime has the plain pool; the adaptive one is for grids that do not divide.
        self.pool: nn.Module = (
            nn.AvgPool2d((grid[0] // pooled[0], grid[1] // pooled[1]))
            if grid[0] % pooled[0] == 0 and grid[1] % pooled[1] == 0
            else nn.AdaptiveAvgPool2d(pooled)
        )
        self.position = nn.Conv2d(text_width, text_width, 3, 1, 1, groups=text_width)

    def forward(self, features: Tensor) -> Tensor:
        pooled = self.pool(_to_grid(self.mlp(features), self.grid))
        return _to_tokens(self.position(pooled) + pooled)


class PixelShuffleProjector(nn.Module):
    """Folds each square of `scale` × `scale` tokens into one wide token, then one linear layer (SmolVLM).

    Shapes: (n, height · width, vision_width) → (n, height · width / scale², text_width). Give `scale` or
    `num_tokens`; a grid that `scale` does not divide is a ValueError.
    Source: Laurençon et al. 2024, arXiv 2408.12637, section 2.2.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        grid: tuple[int, int],
        scale: int | None = None,
        num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if scale is None:
            scale = 2 if num_tokens is None else max(1, grid[0] // _side(num_tokens))
        if scale < 1:
            raise ValueError(f"scale must be positive, not {scale}")
        self.num_tokens = grid[0] * grid[1] // scale**2
        if grid[0] % scale or grid[1] % scale or num_tokens not in (None, self.num_tokens):
            raise ValueError(
                f"the grid {grid[0]}×{grid[1]} does not fold by {scale} into {num_tokens} tokens"
            )
        self.grid, self.scale = grid, scale
        self.linear = nn.Linear(vision_width * scale**2, text_width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        rows, columns = self.grid[0] // self.scale, self.grid[1] // self.scale
        squares = features.reshape(-1, rows, self.scale, columns, self.scale, features.shape[-1])
        return self.linear(squares.transpose(2, 3).reshape(-1, rows * columns, self.linear.in_features))


class PerceiverLayer(nn.Module):
    """Latents attend to features and to themselves; then a feed-forward layer. Both are residual."""

    def __init__(self, width: int, num_heads: int, head_dim: int, expansion: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.features_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, num_heads * head_dim, bias=False)
        self.key = nn.Linear(width, num_heads * head_dim, bias=False)
        self.value = nn.Linear(width, num_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width * expansion, bias=False),
            nn.GELU(),
            nn.Linear(width * expansion, width, bias=False),
        )

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        normed = self.latents_norm(latents)
        context = torch.cat([self.features_norm(features), normed], 1)
        query, key, value = (
            states.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for states in (self.query(normed), self.key(context), self.value(context))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        latents = latents + self.out(attended.transpose(1, 2).flatten(2))
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """Flamingo's resampler: `num_tokens` learned latents read the features, then one linear layer.

    Shapes: (n, any, vision_width) → (n, num_tokens, text_width).
    Source: Alayrac et al. 2022, arXiv 2204.14198, section 2.1 and appendix A.1.1.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        grid: tuple[int, int],
        num_tokens: int = 64,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 64,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.latents = nn.Parameter(torch.randn(num_tokens, vision_width))
        self.layers = nn.ModuleList(
            PerceiverLayer(vision_width, num_heads, head_dim, expansion) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(vision_width)
        self.linear = nn.Linear(vision_width, text_width)

    def forward(self, features: Tensor) -> Tensor:
        latents = self.latents.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        return self.linear(self.norm(latents))


class QFormerProjector(nn.Module):
    """BLIP-2's Q-Former: learned queries through a BERT with cross-attention, then one linear layer.

    With `instruction=True` it is InstructBLIP's, whose queries also read the user's words: pass their
    `qformer_input_ids` and `qformer_attention_mask`, one row per image.

    Shapes: (n, any, vision_width) → (n, num_tokens, text_width). The remaining options are those of
    transformers' `Blip2QFormerConfig` (`hidden_size`, `num_hidden_layers`, `cross_attention_frequency` …).
    Source: Li et al. 2023, arXiv 2301.12597, section 3.1; Dai et al. 2023, arXiv 2305.06500, section 2.3.
    """

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        grid: tuple[int, int],
        num_tokens: int = 32,
        instruction: bool = False,
        **qformer_options: Any,
    ) -> None:
        from transformers import (
            Blip2QFormerConfig,
            Blip2QFormerModel,
            InstructBlipQFormerConfig,
            InstructBlipQFormerModel,
        )

        super().__init__()
        self.num_tokens, self.instruction = num_tokens, instruction
        config_class: Any = InstructBlipQFormerConfig if instruction else Blip2QFormerConfig
        model_class: Any = InstructBlipQFormerModel if instruction else Blip2QFormerModel
        known = {entry.name for entry in dataclasses.fields(config_class)}
        if unknown := sorted(set(qformer_options) - known):  # the config itself would take and ignore them
            raise TypeError(f"{config_class.__name__} has no option {', '.join(unknown)}")
        config = config_class(encoder_hidden_size=vision_width, **qformer_options)
        self.query_tokens = nn.Parameter(torch.randn(1, num_tokens, config.hidden_size) * 0.02)
        self.qformer = model_class(config)
        self.linear = nn.Linear(config.hidden_size, text_width)

    def forward(
        self,
        features: Tensor,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Tensor:
        queries = self.query_tokens.expand(features.shape[0], -1, -1)
        words: dict[str, Tensor] = {}
        if self.instruction:
            if qformer_input_ids is None:
                raise MobileMMError(
                    "an instruction-aware Q-Former needs qformer_input_ids, one row per image"
                )
            if qformer_attention_mask is None:
                qformer_attention_mask = torch.ones_like(qformer_input_ids)
            seen = qformer_attention_mask.new_ones(queries.shape[:2])
            words = {
                "input_ids": qformer_input_ids,
                "attention_mask": torch.cat([seen, qformer_attention_mask], 1),
            }
        states = self.qformer(query_embeds=queries, encoder_hidden_states=features, **words).last_hidden_state
        return self.linear(states[:, : self.num_tokens])


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": LinearProjector,
    "ldpnet": LightweightDownsampleProjector,
    "ldpnetv2": LightweightDownsampleProjectorV2,
    "pixel_shuffle": PixelShuffleProjector,
    "perceiver_resampler": PerceiverResampler,
    "qformer": QFormerProjector,
}
