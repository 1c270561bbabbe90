"""Qwen2.5-VL at one fixed resolution: what it computes from a picture's size becomes constants."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLImageProcessorPil
from transformers.image_utils import SizeDict
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from mobilemm.errors import MobileMMError
from mobilemm.export.families.pictures import expansion, tile, with_pillow
from mobilemm.export.families.text import language_model
from mobilemm.export.split import SplitModel

DEFAULT_IMAGE_SIZE = 448  # 256 tokens
IMAGE_PROCESSORS = ("Qwen2VLImageProcessor",)


class SquareImageProcessor(Qwen2VLImageProcessorPil):
    """Qwen-VL's image processor, stretching pictures to squares of `size.longest_edge` pixels in all."""

    def resize(self, image: Any, size: SizeDict, resample: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        side = math.isqrt(size.longest_edge or 0)
        square = SizeDict(height=side, width=side)
        return super(Qwen2VLImageProcessorPil, self).resize(image, square, resample)


class Attention(nn.Module):
    """Self-attention within windows: `groups` says (windows, patches each) along the sequence.

    Shapes: (images, patches, width), patches of a window side by side → the same.
    """

    def __init__(self, attention: Any, groups: list[tuple[int, int]]) -> None:
        super().__init__()
        self.qkv, self.proj = attention.qkv, attention.proj
        self.num_heads, self.scale = attention.num_heads, attention.scaling
        self.groups = groups

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(states).unflatten(-1, (3, self.num_heads, -1))
        turned = qkv[:, :, :2].float()  # queries and keys
        half = turned.shape[-1] // 2
        swapped = torch.cat([-turned[..., half:], turned[..., :half]], -1)
        turned = (turned * cos + swapped * sin).to(states.dtype)
        qkv = torch.cat([turned, qkv[:, :, 2:]], 2)
        attended, start = [], 0
        for windows, length in self.groups:
            # (images, windows, length, 3, heads, head_dim) → (3, images · windows, heads, length, head_dim)
            part = qkv[:, start : start + windows * length].unflatten(1, (windows, length))
            q, k, v = part.permute(3, 0, 1, 4, 2, 5).flatten(1, 2).unbind(0)
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            attended.append(out.transpose(1, 2).flatten(2).reshape(-1, windows * length, states.shape[-1]))
            start += windows * length
        return self.proj(torch.cat(attended, 1) if len(attended) > 1 else attended[0])


class Block(nn.Module):
    """One layer of the encoder."""

    def __init__(self, block: Any, groups: list[tuple[int, int]]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp = block.norm1, block.norm2, block.mlp
        self.attention = Attention(block.attn, groups)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        states = states + self.attention(self.norm1(states), cos, sin)
        return states + self.mlp(self.norm2(states))


class Vision(nn.Module):
    """Normalized pixels (images, 3, size, size) → (images, tokens, text width), tokens in row-major order.

    A still picture is a video of two equal frames, so the patch embedding's two frames are added up. Patches
    are put in order of their windows, windows of equal size side by side, and the tokens put back at the end.
    """

    order: Tensor
    back: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, visual: Any, image_size: int) -> None:
        super().__init__()
        config, side = visual.config, image_size // visual.patch_size
        merge, patches = config.spatial_merge_size, side * side
        grid = torch.tensor([[1, side, side]])
        window_index, bounds = get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=visual.window_size, patch_size=visual.patch_size
        )
        # In tokens of merge² patches; sorted by length, so that equal ones can be computed together.
        ends = [int(bound) // merge**2 for bound in bounds]
        windows = sorted((window_index[start:end] for start, end in pairwise(ends)), key=len)
        lengths = [len(window) * merge**2 for window in windows]
        groups = [(lengths.count(length), length) for length in sorted(set(lengths))]
        tokens = torch.cat(windows)

        places = get_vision_position_ids(grid, merge)  # (patches, 2): row and column, token by token
        places = places.unflatten(0, (-1, merge**2))[tokens].flatten(0, 1)
        self.register_buffer("order", places[:, 0] * side + places[:, 1], persistent=False)
        self.register_buffer("back", torch.argsort(tokens), persistent=False)
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), places.to(visual.rotary_pos_emb.inv_freq.device))
        self.register_buffer("cos", cos.float().cpu()[:, None, None], persistent=False)
        self.register_buffer("sin", sin.float().cpu()[:, None, None], persistent=False)

        # A sum of two half-precision numbers is none: kept in fp32.
        weight = visual.patch_embed.proj.weight.detach().float().sum(2)
        self.patch_embedding = nn.Conv2d(
            3, weight.shape[0], visual.patch_size, visual.patch_size, bias=False, device="meta"
        )
        self.patch_embedding.weight = nn.Parameter(weight, requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(block, [(1, patches)] if index in visual.fullatt_block_indexes else groups)
            for index, block in enumerate(visual.blocks)
        )
        self.merged = merge**2
        self.norm, self.mlp = visual.merger.ln_q, visual.merger.mlp

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).mT
        states = patches[:, self.order].to(self.norm.weight.dtype)
        for block in self.blocks:
            states = block(states, self.cos, self.sin)
        squares = self.norm(states).unflatten(1, (-1, self.merged)).flatten(2)
        return self.mlp(squares)[:, self.back]


def split(model: Any, processor: Any, image_size: int | None = None) -> SplitModel:
    """Of a `Qwen2_5_VLForConditionalGeneration`, pictures stretched to `image_size` (left out, 448).

    Raises MobileMMError for a size that is no multiple of a token's side, and as `split_model` does.
    """
    size = DEFAULT_IMAGE_SIZE if image_size is None else image_size
    vision = model.config.vision_config
    token_side = vision.patch_size * vision.spatial_merge_size
    if size < token_side or size % token_side:
        raise MobileMMError(
            f"image size {size}: qwen2_5_vl takes multiples of {token_side}, such as"
            f" {max(1, round(size / token_side)) * token_side}"
        )
    pixels = {"shortest_edge": size**2, "longest_edge": size**2}
    processor = with_pillow(processor, "qwen2_5_vl", IMAGE_PROCESSORS, size=pixels, do_resize=True)
    processor.image_processor = SquareImageProcessor.from_dict(processor.image_processor.to_dict())
    side = size // token_side
    image, mean, std = tile(
        processor.image_processor,
        "qwen2_5_vl",
        height=size,
        width=size,
        strategy="stretch",
        position_grid=(side, side),
    )
    prefix, num_tokens, suffix = expansion(processor, model.config.image_token_id, "qwen2_5_vl")
    config, weights = language_model(
        model,
        model.config.text_config,
        {"model.language_model.": "model.", "lm_head.": "lm_head."},
    )
    return SplitModel(
        family="qwen2_5_vl",
        vision=Vision(model.model.visual, size).eval(),
        image=image,
        mean=mean,
        std=std,
        num_image_tokens=num_tokens,
        image_token_id=model.config.image_token_id,
        text_config=config,
        text_weights=weights,
        processor=processor,
        image_prefix=prefix,
        image_suffix=suffix,
    )
