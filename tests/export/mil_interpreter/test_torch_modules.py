"""Modules of one operation, drawn at random and converted as anyone would, against PyTorch itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemm.export import mil_interpreter
from tests.export.mil_interpreter.cases import choice
from tests.export.mil_interpreter.programs import convert_module, ct

VARIANTS = 5
Drawn = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def picture(rng: np.random.Generator, channels: int = 6, rank: int = 2, low: int = 6) -> Tensor:
    return torch.from_numpy(rng.standard_normal((2, channels, *rng.integers(low, 11, rank)))).float()


def number(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def convolution(rng: np.random.Generator) -> Drawn:
    rank = int(choice(rng, 1, 2, 2, 2, 3))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    groups = int(choice(rng, 1, 1, 2, 6))
    padding = choice(rng, "same", number(rng, 0, 2))
    stride = 1 if padding == "same" else number(rng, 1, 3)
    module = kind(
        6, 12, number(rng, 1, 3), stride, padding, number(rng, 1, 2), groups, bias=bool(rng.random() < 0.5)
    )
    return module, (picture(rng, rank=rank),)


def transposed_convolution(rng: np.random.Generator) -> Drawn:
    rank = int(choice(rng, 1, 2, 2))
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d)[rank - 1]
    stride, padding = number(rng, 1, 3), number(rng, 0, 1)
    # coremltools 9.0 converts a longer output with padding only.
    longer = number(rng, 0, stride - 1) if padding else 0
    module = kind(
        *(6, 4, number(rng, 2, 4), stride, padding, longer),
        groups=int(choice(rng, 1, 2)),
    )
    return module, (picture(rng, rank=rank),)


def average_pool(rng: np.random.Generator) -> Drawn:
    rank, kernel = int(choice(rng, 1, 2, 2)), number(rng, 2, 4)
    kind = (nn.AvgPool1d, nn.AvgPool2d)[rank - 1]
    ceil = bool(rng.random() < 0.5)
    # Longer strides would, for coremltools 9.0 and not for PyTorch, give windows that hold nothing.
    stride = number(rng, 1, min(kernel, 3))
    module = kind(kernel, stride, number(rng, 0, kernel // 2), ceil, bool(rng.random() < 0.5))
    return module, (picture(rng, rank=rank),)


def greatest_pool(rng: np.random.Generator) -> Drawn:
    rank, kernel = int(choice(rng, 1, 2, 2)), number(rng, 2, 4)
    kind = (nn.MaxPool1d, nn.MaxPool2d)[rank - 1]
    stride, ceil = number(rng, 1, min(kernel, 3)), bool(rng.random() < 0.5)
    module = kind(kernel, stride, number(rng, 0, kernel // 2), ceil_mode=ceil)
    return module, (picture(rng, rank=rank),)


def resized(rng: np.random.Generator) -> Drawn:
    mode = choice(rng, "nearest", "bilinear")
    options = {} if mode == "nearest" else {"align_corners": bool(rng.random() < 0.5)}
    if rng.random() < 0.5:
        size = (number(rng, 3, 20), number(rng, 3, 20))
        return lambda x: F.interpolate(x, size=size, mode=mode, **options), (picture(rng),)
    factor = float(choice(rng, 2, 3))
    return lambda x: F.interpolate(x, scale_factor=factor, mode=mode, **options), (picture(rng),)


def sampled(rng: np.random.Generator) -> Drawn:
    x = picture(rng)
    grid = torch.from_numpy(rng.uniform(-1.3, 1.3, (2, 4, 5, 2))).float()
    mode, padding = choice(rng, "bilinear", "nearest"), choice(rng, "zeros", "border", "reflection")
    corners = bool(rng.random() < 0.5)
    return lambda x, grid: F.grid_sample(x, grid, mode, padding, corners), (x, grid)


def normalized(rng: np.random.Generator) -> Drawn:
    module = choice(
        rng, nn.GroupNorm(3, 6), nn.BatchNorm2d(6), nn.InstanceNorm2d(6, affine=True), nn.LayerNorm([6, 7, 8])
    )
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, tensor.shape)))
    return module, (torch.from_numpy(rng.standard_normal((2, 6, 7, 8))).float(),)


def padded(rng: np.random.Generator) -> Drawn:
    mode = choice(rng, "constant", "reflect", "replicate")
    amounts = [int(amount) for amount in rng.integers(0, 4, 4)]
    return lambda x: F.pad(x, amounts, mode), (picture(rng),)


def attention(rng: np.random.Generator) -> Drawn:
    module = nn.MultiheadAttention(24, int(choice(rng, 2, 4)), batch_first=True).requires_grad_(False)
    x = torch.from_numpy(rng.standard_normal((2, number(rng, 1, 6), 24))).float()
    return lambda x: module(x, x, x, need_weights=False)[0], (x,)


def feed_forward(rng: np.random.Generator) -> Drawn:
    act = choice(rng, nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.ELU(), nn.Mish(), nn.ReLU6())
    module = nn.Sequential(nn.Linear(12, 20), act, nn.Linear(20, 12), nn.Softmax(-1))
    return module, (torch.from_numpy(rng.standard_normal((2, 5, 12))).float(),)


def rearranged(rng: np.random.Generator) -> Drawn:
    functions: Sequence[Callable[[Tensor], Tensor]] = (
        lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).permute(0, 2, 1, 4, 3).flatten(2),
        lambda x: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
        lambda x: x.transpose(1, 3).reshape(2, -1, 6)[:, 1::2, -4:-1],
        lambda x: torch.stack([x.cumsum(2), x.flip(3)], 1).squeeze(0),
        lambda x: torch.cat([x.roll(2, 3), x.mean((2, 3), keepdim=True).expand_as(x)], 1),
        lambda x: x.clamp(-0.5, 0.5).masked_fill(x > 1, 9.0).tril(1),
        lambda x: x.sort(3, descending=True)[0] + x.norm(dim=1, keepdim=True),
        lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
        lambda x: x[:, [3, 1, 1]] ** 2 + x.amax(1, keepdim=True) // 0.75,
    )
    return functions[number(rng, 0, len(functions) - 1)], (picture(rng),)


class Several(nn.Module):
    """Several functions, each of inputs of its own."""

    def __init__(self, drawn: Sequence[Drawn]) -> None:
        super().__init__()
        self.functions = [function for function, _ in drawn]
        self.counts = [len(inputs) for _, inputs in drawn]
        self.modules_ = nn.ModuleList(f for f in self.functions if isinstance(f, nn.Module))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = iter(inputs)
        pairs = zip(self.functions, self.counts, strict=True)
        return tuple(function(*(next(given) for _ in range(count))) for function, count in pairs)


DRAWS = (
    *(convolution, transposed_convolution, average_pool, greatest_pool, resized, sampled),
    *(normalized, padded, attention, feed_forward, rearranged),
)


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
@pytest.mark.parametrize("form", ["fp32 iOS18", "fp16 iOS18", "fp32 iOS15", "fp32 iOS26"])
def test_module(draw: Callable[[np.random.Generator], Drawn], form: str, tmp_path: Path) -> None:
    """From one system to the next operations have other arguments, and other ones stand for a module."""
    torch.manual_seed(0)
    half, target = form.startswith("fp16"), getattr(ct.target, form[5:])
    rng = np.random.default_rng(crc32(f"{draw.__name__} {form}".encode()))
    drawn = [draw(rng) for _ in range(VARIANTS)]
    module = Several(drawn).eval()
    inputs = tuple(tensor for _, tensors in drawn for tensor in tensors)
    path = convert_module(tmp_path / "m.mlpackage", module, inputs, half=half, target=target)
    model = mil_interpreter.load(path)
    outputs = model({f"x{i}": tensor.numpy() for i, tensor in enumerate(inputs)})
    with torch.no_grad():
        wanted = module(*inputs)
    for feature, want in zip(model.outputs(), wanted, strict=True):
        found = outputs[feature.name]
        assert found.shape == want.shape
        error = np.linalg.norm(found - want.numpy()) / max(np.linalg.norm(want.numpy()), 1e-3)
        assert error < (4e-3 if half else 1e-5), feature.name
