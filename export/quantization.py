"""What is quantized, how far and how: one plan for all targets, and weights as they are stored.

The layout is that of onnxruntime's MatMulNBits: each row (an output channel) is cut into blocks of columns,
each block has a scale and a zero point, and `weight = (code - zero_point) * scale`. Or, of a palette, a few
rows share a table of as many weights as there are codes, and `weight = table[code]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError

Bits = Literal[4, 6, 8, 16, 32]
Method = Literal["rtn", "hqq", "gptq", "awq", "kmeans"]
Activations = Literal["float32", "float16", "int8", "int8-static"]

GENERATOR_PARTS = ("generator", "denoiser", "image_decoder")
"""What a condition is drawn by: all in one, or step by step."""

DRAWING_PARTS = ("output_projector", *GENERATOR_PARTS)
"""Parts whose weights alone are quantized: they compute in floating point."""

PARTS = ("vision", "embed", "decoder", *DRAWING_PARTS)
"""The parts of a model that a plan speaks of."""

WORDS: Mapping[str, Bits] = {"int4": 4, "int6": 6, "int8": 8, "fp16": 16, "fp32": 32}
"""The command line's words for a precision."""

PALETTES: Mapping[str, Bits] = {"pal4": 4, "pal6": 6}
"""Its words for weights that are looked up in tables, for runtimes that have them."""

W8A8 = "w8a8"
"""Its word for an encoder in int8 throughout, the steps of its activations found beforehand."""

BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class WeightScheme:
    """How one weight matrix is stored, and how it is brought there.

    Attributes:
        bits: of a code; 16 and 32 are float16 and float32, where nothing else applies.
        block_size: columns that share a scale; None is the whole row. Of a palette, the most rows that share
            a table; None is the whole matrix.
        symmetric: the zero point is 2^(bits-1) everywhere, and not stored.
        method: "rtn" (round to nearest), "hqq", "gptq" or "awq" (see `mobilemm.export.quantizers`); "kmeans"
            makes palettes.
        positive: scales of symmetric blocks are above zero, for kernels that take no others.
    """

    bits: Bits = 4
    block_size: int | None = 128
    symmetric: bool = True
    method: Method = "rtn"
    positive: bool = False

    def __post_init__(self) -> None:
        if self.bits not in get_args(Bits):
            raise MobileMMError(f"weights of {self.bits} bits are not known; choose from {_listed(WORDS)}")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise MobileMMError(
                f"a block of {self.block_size} weights is not known; choose from {_listed(BLOCK_SIZES)}"
            )
        if self.method not in get_args(Method):
            raise MobileMMError(
                f"the method {self.method!r} is not known; choose from {_listed(get_args(Method))}"
            )
        if self.palette and self.bits not in PALETTES.values():
            raise MobileMMError(f"palettes have 4 or 6 bits, not {self.bits}")

    @property
    def palette(self) -> bool:
        """Whether codes stand for weights in a table."""
        return self.method == "kmeans"

    @property
    def quantized(self) -> bool:
        """Whether there are codes at all."""
        return self.bits <= 8

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes that a matrix of this size takes."""
        if not self.quantized:
            return rows * columns * self.bits // 8
        if self.palette:
            return rows * columns * self.bits // 8 + 2 * rows // rows_of_table(self, rows) * 2**self.bits
        block = block_length(self.block_size, columns)
        blocks = math.ceil(columns / block)
        zero_points = 0 if self.symmetric else rows * math.ceil(blocks * _stored_bits(self.bits) / 8)
        return rows * blocks * (block * _stored_bits(self.bits) // 8 + 4) + zero_points


FLOAT32 = WeightScheme(bits=32, block_size=None)


@dataclass(frozen=True)
class PartPlan:
    """How one part's weights are stored.

    Attributes:
        default: the scheme of every layer that no exception names.
        exceptions: (pattern of layer names, scheme), the first that fits decides: `layers.0.*`, `*.down`.
        activations: what the part computes with; "int8" is quantized anew at each run, "int8-static" with
            steps that calibration has found, in linear layers and convolutions.
        own_head: a decoder's head is quantized by this plan also where it is the embedding's table: for
            runtimes that cannot share it.
    """

    default: WeightScheme = FLOAT32
    exceptions: tuple[tuple[str, WeightScheme], ...] = ()
    activations: Activations = "float32"
    own_head: bool = False

    def scheme(self, layer: str) -> WeightScheme:
        """The scheme of the layer of this name."""
        return next(
            (scheme for pattern, scheme in self.exceptions if fnmatchcase(layer, pattern)), self.default
        )

    def unused_patterns(self, layers: Iterable[str]) -> list[str]:
        """Patterns that fit none of these layers: most likely typing errors."""
        names = list(layers)
        return [
            pattern for pattern, _ in self.exceptions if not any(fnmatchcase(name, pattern) for name in names)
        ]


@dataclass(frozen=True)
class QuantizationPlan:
    """How each part's weights are stored. A part that is not named stays float32.

    Attributes:
        open_blocks: nobody asked for the language model's block size; a target may take one that suits it.
    """

    parts: Mapping[str, PartPlan] = field(default_factory=dict)
    open_blocks: bool = False

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.parts) - set(PARTS)):
            raise MobileMMError(f"a plan has no part {unknown[0]!r}; choose from {_listed(PARTS)}")

    def part(self, name: str) -> PartPlan:
        """The plan of one part."""
        return self.parts.get(name, PartPlan())

    def with_exceptions(self, part: str, exceptions: Sequence[tuple[str, WeightScheme]]) -> QuantizationPlan:
        """The same plan with further exceptions, which come before those it has."""
        old = self.part(part)
        return replace(
            self, parts={**self.parts, part: replace(old, exceptions=(*exceptions, *old.exceptions))}
        )


INT4_BLOCK = 128
PALETTE_ROWS = 16
DRAWING_BLOCK = 32
TABLE_BLOCK: Mapping[Bits, int] = {4: 32, 6: 128, 8: 128}


def make_plan(
    llm: str = "int4",
    *,
    embed: str | None = None,
    vision: str = "int8",
    generator: str = "int8",
    method: str | None = None,
    block_size: int | None = None,
    symmetric: bool = True,
    keep: Sequence[str] = (),
) -> QuantizationPlan:
    """A plan from the command line's words.

    `int4` alone is the recipe that ships: GPTQ at block 128, symmetric; the embedding, and with it a head
    tied to it, rounded at block 32. Encoders are int8 per row, activations quantized at each run; output
    projector and generator are int8, in blocks of 32 and convolutions per row, and compute in
    floating point. SmolLM2-135M on held-out text, mean KL to fp32 a position: 0.33; with `embed` at int8
    0.24; that of llama.cpp's Q4_0 is 0.42, of rounding at block 32 throughout 0.49.

    Args:
        llm, embed, vision, generator: "int4", "int6", "int8", "fp16" or "fp32", and "pal4" or "pal6" for
            palettes, "w8a8" for a vision encoder in int8 throughout; `embed` left out is as `llm`.
        method: "gptq", "hqq", "rtn" or "awq" of the language model; left out, GPTQ below 8 bits. Palettes
            have one of their own.
        block_size: 16 to 256, of the language model; left out, 128, and 32 for the embedding at 4 bits; 16
            rows of a palette.
        symmetric: whether the language model does without zero points.
        keep: decoder layers that are stored otherwise, "PATTERN=BITS": "layers.0.*=8", "*.down=pal6".

    Raises MobileMMError naming the flag that is wrong.
    """
    size = INT4_BLOCK if block_size is None else block_size
    if method == "kmeans":
        raise MobileMMError("--q-method kmeans: is that of palettes; ask for them by --q-llm pal4 or pal6")

    def palette(word: str, rows: int | None = None) -> WeightScheme:
        return WeightScheme(PALETTES[word], rows or PALETTE_ROWS, method="kmeans")

    def scheme(word: str, flag: str) -> WeightScheme:
        if word in PALETTES:
            return palette(word, block_size)
        bits = _bits(word, flag)
        if bits > 8:
            return WeightScheme(bits, None)
        # Eight bits lose next to nothing however they are rounded.
        chosen = "rtn" if bits == 8 and method == "gptq" else method or ("rtn" if bits == 8 else "gptq")
        return WeightScheme(bits, size, symmetric if bits < 8 else True, chosen)  # type: ignore[arg-type]

    def encoder(word: str, flag: str) -> PartPlan:
        if word in PALETTES:
            return PartPlan(palette(word))
        if word == W8A8 and flag == "--q-vision":
            return PartPlan(WeightScheme(8, None), activations="int8-static")
        bits = _bits(word, flag)
        if bits == 8:
            return PartPlan(WeightScheme(8, None), activations="int8")
        return PartPlan(WeightScheme(bits, INT4_BLOCK) if bits < 8 else WeightScheme(bits, None))

    def drawing(word: str) -> PartPlan:
        # Weights alone: what a picture is made of passes through these parts several times.
        if word in PALETTES:
            return PartPlan(palette(word))
        bits = _bits(word, "--q-generator")
        return PartPlan(WeightScheme(bits, DRAWING_BLOCK if bits <= 8 else None))

    decoder = scheme(llm, "--q-llm")
    table = decoder if embed is None else scheme(embed, "--q-embed")
    if table.quantized and not table.palette:
        # A table is looked up: there are no inputs to calibrate on. It takes smaller blocks instead.
        table_method: Method = "hqq" if method == "hqq" else "rtn"
        table = replace(table, block_size=block_size or TABLE_BLOCK[table.bits], method=table_method)
    exceptions = [_kept(text, scheme) for text in keep]
    return QuantizationPlan(
        {
            "vision": encoder(vision, "--q-vision"),
            "embed": PartPlan(table),
            "decoder": PartPlan(decoder, tuple(exceptions)),
            **dict.fromkeys(DRAWING_PARTS, drawing(generator)),
        },
        open_blocks=block_size is None,
    )


def _kept(text: str, scheme: Callable[[str, str], WeightScheme]) -> tuple[str, WeightScheme]:
    pattern, equals, word = (piece.strip() for piece in text.rpartition("="))
    if not equals or not pattern or not word:
        raise MobileMMError(f"--q-keep {text!r}: must be PATTERN=BITS, such as 'layers.0.*=8'")
    return pattern, scheme(word, f"--q-keep {text!r}")


def _bits(word: str, flag: str) -> Bits:
    if word in WORDS:
        return WORDS[word]
    by_number = {str(bits): bits for bits in WORDS.values()}
    if flag.startswith("--q-keep") and word in by_number:
        return by_number[word]
    raise MobileMMError(f"{flag}: {word!r} is no precision; choose from {_listed([*WORDS, *PALETTES])}")


def refuse_coreml_only(plan: QuantizationPlan, target: str) -> None:
    """Raises MobileMMError when a plan has what this target's runtime does not know: palettes, w8a8."""
    for name, part in plan.parts.items():
        if part.activations == "int8-static":
            raise MobileMMError(
                f"--target {target}: {name!r} in w8a8 is not possible, it is for --target coreml; choose int8"
            )
        for scheme in (part.default, *(scheme for _, scheme in part.exceptions)):
            if scheme.palette:
                raise MobileMMError(
                    f"--target {target}: {name!r} in pal{scheme.bits} is not possible, palettes are for"
                    f" --target coreml alone; choose int4 or int8"
                )


# --- weights as they are stored --------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (rows, columns) in codes. Columns are padded with zero points to whole blocks.

    Attributes:
        packed: uint8 (rows, blocks, bytes of a block); 4 bit: two codes a byte, the lower half first;
            6 and 8 bit: a code a byte.
        scales: float32 (rows, blocks).
        zero_points: uint8 (rows, blocks), one a byte, or None: 2^(bits-1) everywhere.
        bits: 4, 6 or 8.
        block_size: columns in a block.
        shape: (rows, columns), without padding.
        palette: float32 (tables, 2^bits), in float16's precision: row r is looked up in table
            r // (rows / tables). Then the row is one block, and scales and zero points mean nothing.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block_size: int
    shape: tuple[int, int]
    palette: Tensor | None = None

    @classmethod
    def from_palette(cls, codes: Tensor, palette: Tensor, bits: int) -> QuantizedWeight:
        """From codes, uint8 (rows, columns), and the tables, float32 (tables, 2^bits)."""
        rows, columns = codes.shape
        scales = torch.ones(rows, 1)
        padded = nn.functional.pad(codes, (0, columns % 2))[:, None]
        made = cls.from_codes(padded, scales, None, bits, padded.shape[2])
        return replace(made, shape=(rows, columns), palette=palette)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, columns: int
    ) -> QuantizedWeight:
        """From codes, uint8 (rows, blocks, block size), of which the first `columns` a row count."""
        rows, blocks, block = codes.shape
        if blocks * block != columns:  # what stands behind the last column must multiply to zero
            codes = codes.clone()
            tail = columns - (blocks - 1) * block
            codes[:, -1, tail:] = 2 ** (bits - 1) if zero_points is None else zero_points[:, -1:]
        packed = codes[..., 0::2] | (codes[..., 1::2] << 4) if _stored_bits(bits) == 4 else codes
        return cls(packed.contiguous(), scales, zero_points, bits, block, (rows, columns))

    def codes(self) -> Tensor:
        """uint8 (rows, blocks, block size)."""
        if _stored_bits(self.bits) == 8:
            return self.packed
        return torch.stack((self.packed & 15, self.packed >> 4), dim=-1).flatten(-2)

    def dequantize(self) -> Tensor:
        """float32 (rows, columns)."""
        if self.palette is not None:
            codes = self.codes()[:, 0, : self.shape[1]].unflatten(0, (len(self.palette), -1))
            pieces = zip(self.palette, codes, strict=True)
            return torch.cat([table[rows.int()] for table, rows in pieces])
        weight = self.codes().to(torch.float32)
        if self.zero_points is None:
            weight -= 2 ** (self.bits - 1)
        else:
            weight -= self.zero_points[..., None]
        weight *= self.scales[..., None]
        return weight.flatten(1)[:, : self.shape[1]]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, float32 scales, and zero points packed as the codes are; tables in float16."""
        if self.palette is not None:
            return math.ceil(self.shape[0] * self.shape[1] * self.bits / 8) + 2 * self.palette.numel()
        rows, blocks = self.scales.shape
        zero_points = (
            0 if self.zero_points is None else rows * math.ceil(blocks * _stored_bits(self.bits) / 8)
        )
        return self.packed.numel() + 4 * rows * blocks + zero_points


class QuantizedLinear(nn.Module):
    """`nn.Linear` over a quantized weight; computes in floating point. Targets put their kernel in its place.

    Shapes: (…, columns) → (…, rows).
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    palette: Tensor | None
    bias: Tensor | None
    bits: int
    block_size: int

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        _register(self, weight)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight, sharing memory with the buffers."""
        return _registered(self, (self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """The product with the dequantized weight."""
        return nn.functional.linear(x, self.quantized.dequantize().to(x.dtype), self.bias)


class QuantizedEmbedding(nn.Module):
    """`nn.Embedding` over a table quantized along the hidden dimension.

    Shapes: ids (…) → float32 (…, columns).
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    palette: Tensor | None
    bits: int
    block_size: int

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        _register(self, weight)
        self.num_embeddings, self.embedding_dim = weight.shape

    @property
    def quantized(self) -> QuantizedWeight:
        """The table, sharing memory with the buffers."""
        return _registered(self, (self.num_embeddings, self.embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of these ids."""
        rows = ids.flatten()
        zero_points = None if self.zero_points is None else self.zero_points[rows]
        palette = self.palette
        if palette is not None:
            palette = palette[rows // (self.num_embeddings // len(palette))]
        chosen = replace(
            self.quantized,
            packed=self.packed[rows],
            scales=self.scales[rows],
            zero_points=zero_points,
            palette=palette,
            shape=(len(rows), self.embedding_dim),
        )
        return chosen.dequantize().reshape(*ids.shape, self.embedding_dim)


def _register(module: QuantizedLinear | QuantizedEmbedding, weight: QuantizedWeight) -> None:
    module.register_buffer("packed", weight.packed)
    module.register_buffer("scales", weight.scales)
    module.register_buffer("zero_points", weight.zero_points)
    module.register_buffer("palette", weight.palette)
    module.bits, module.block_size = weight.bits, weight.block_size


def _registered(module: QuantizedLinear | QuantizedEmbedding, shape: tuple[int, int]) -> QuantizedWeight:
    return QuantizedWeight(
        module.packed,
        module.scales,
        module.zero_points,
        module.bits,
        module.block_size,
        shape,
        module.palette,
    )


def block_length(block_size: int | None, columns: int) -> int:
    """Columns in a block: the scheme's, or for whole rows their length, made even for packing."""
    return block_size or columns + columns % 2


def rows_of_table(scheme: WeightScheme, rows: int) -> int:
    """Rows that share a table of a palette: a divisor of all rows, not above what the scheme says."""
    most = min(scheme.block_size or rows, rows)
    return next(size for size in range(most, 0, -1) if rows % size == 0)


def _stored_bits(bits: int) -> int:
    return 4 if bits == 4 else 8


def _listed(words: Iterable[object]) -> str:
    return ", ".join(str(word) for word in words)
