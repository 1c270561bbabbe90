"""A model's exportable parts: module, named example inputs, dynamic dimensions. Parts know no target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Decoder, DecoderWeights
from mobilemm.export.decoder_spec import DecoderSpec, decoder_spec
from mobilemm.export.drawing import OutputProjector, words_read
from mobilemm.export.split import SplitModel


@dataclass(frozen=True)
class CacheShape:
    """Keys and values that a part keeps between calls: per layer (batch, kv heads, positions, head_dim)."""

    num_layers: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Part:
    """One exportable part of a model.

    Attributes:
        name: "vision", "embed", "decoder", "output_projector" and "generator", or "denoiser" and
            "image_decoder".
        module: PyTorch, eager. Its parameters may lie on the meta device while `weights` holds them.
        inputs: example inputs by name, in the order of `module.forward`'s arguments, the cache apart.
        outputs: names of what it returns.
        dynamic: input or output name → {dimension: name of the dynamic dimension}.
        weights: parameter name → tensor in the checkpoint's own dtype, mapped from disk where it can be.
        cache: what the part keeps between calls. Its module is then called with a target's `Cache` as second
            argument.
        shared: parameter name → (part, parameter name) that holds the same table.
        samples: the first input's rows as calibration has them, for targets that measure activations.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    cache: CacheShape | None = None
    shared: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    samples: Tensor | None = None


class Vision(nn.Module):
    """Pixels as an app has them → features as the decoder takes them.

    Shapes: uint8 (images, 3, height, width) → (images · tokens, text width).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, split: SplitModel) -> None:
        super().__init__()
        assert split.vision is not None
        self.encoder = split.vision
        mean = torch.tensor(split.mean, dtype=torch.float32) * 255
        std = torch.tensor(split.std, dtype=torch.float32) * 255
        self.register_buffer("scale", (1 / std).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        normalized = pixels.to(torch.float32) * self.scale + self.shift
        return self.encoder(normalized).flatten(0, 1)


class Embed(nn.Module):
    """Ids → embeddings, with pictures' features in the places of their placeholders, in reading order.

    Shapes: `input_ids` (batch, length), `image_features` (n, width), n = number of placeholders, 0 allowed →
    (batch, length, width). The placeholder may lie outside the table.
    """

    def __init__(self, vocab_size: int, width: int, image_token_id: int, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, width)
        self.image_token_id, self.scale = image_token_id, scale
        self.outside = image_token_id >= vocab_size

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        is_image = input_ids == self.image_token_id
        embeds = self.table(input_ids.masked_fill(is_image, 0) if self.outside else input_ids)
        if self.scale != 1.0:
            embeds = embeds * self.scale
        # A row behind the last, for the ids that are text: so that no image at all needs no other graph.
        padded = torch.cat([image_features, image_features.new_zeros(1, image_features.shape[1])])
        order = is_image.flatten().to(torch.int64).cumsum(0).view_as(input_ids) - 1
        # A placeholder beyond the features is the model's own word, where its table has it.
        is_image = is_image & (order < image_features.shape[0])
        rows = torch.where(is_image, order, image_features.shape[0])
        return torch.where(is_image[..., None], padded[rows], embeds)


class TokenEmbedding(nn.Module):
    """The table of an `Embed` alone, for runtimes where pictures' rows are laid over outside of the graph.

    Shapes: ids (batch, length), none of them beyond the table → (batch, length, width). See
    `mobilemm.runtime.embedding`.
    """

    def __init__(self, embed: Embed) -> None:
        super().__init__()
        self.table, self.scale = embed.table, embed.scale

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds = self.table(input_ids)
        return embeds * self.scale if self.scale != 1.0 else embeds


def parts_of(
    split: SplitModel, context_length: int | None = None, steps: int | None = None, stepwise: bool = False
) -> dict[str, Part]:
    """The parts of a model: vision, if it has eyes, embed, decoder; what draws, if it can.

    That is a generator of so many steps, or `stepwise` what one step takes and what decodes latents.
    Raises MobileMMError for a language model with a piece that export does not know, and for `stepwise` of a
    model that does not draw.
    """
    spec = decoder_spec(split.text_config, context_length)
    table = split.text_weights.get("model.embed_tokens.weight")
    if table is None:
        raise MobileMMError(f"family {split.family!r}: tensor 'model.embed_tokens.weight' is missing")
    with torch.device("meta"):
        embed = Embed(spec.vocab_size, spec.hidden_size, split.image_token_id, spec.embedding_scale)
        decoder = Decoder(spec)
    image = split.image
    features = torch.zeros(split.num_image_tokens or 2, spec.hidden_size)
    decoder_inputs: dict[str, Tensor] = {"inputs_embeds": torch.zeros(1, 3, spec.hidden_size)}
    decoder_dynamic = {"inputs_embeds": {0: "batch", 1: "length"}, "logits": {0: "batch", 1: "positions"}}
    if spec.mrope_section is not None:
        decoder_inputs["position_ids"] = torch.arange(3).expand(3, 1, 3).clone()
        decoder_dynamic["position_ids"] = {1: "batch", 2: "length"}
    decoder_inputs["logits_positions"] = torch.tensor([0, -1])
    decoder_dynamic["logits_positions"] = {0: "positions"}
    parts = {}
    if image is not None:
        parts["vision"] = Part(
            "vision",
            Vision(split),
            {"pixels": torch.zeros(2, 3, image.height, image.width, dtype=torch.uint8)},
            ("image_features",),
            {"pixels": {0: "images"}, "image_features": {0: "image_tokens"}},
        )
    if split.generator is not None:
        parts |= _drawing_parts(split, spec, steps, stepwise)
    elif stepwise:
        raise MobileMMError("--stepwise: this model does not draw, it has no generator")
    return {
        **parts,
        "embed": Part(
            "embed",
            embed,
            {"input_ids": torch.zeros(1, 5, dtype=torch.int64), "image_features": features},
            ("inputs_embeds",),
            {
                "input_ids": {0: "batch", 1: "length"},
                "image_features": {0: "image_tokens"},
                "inputs_embeds": {0: "batch", 1: "length"},
            },
            {"table.weight": table},
            shared={"table": ("decoder", "lm_head")} if spec.tied else {},
        ),
        "decoder": Part(
            "decoder",
            decoder,
            decoder_inputs,
            ("logits",),
            decoder_dynamic,
            DecoderWeights(spec, split.text_weights),
            CacheShape(spec.num_layers, spec.num_key_value_heads, spec.head_dim),
        ),
    }


def _drawing_parts(
    split: SplitModel, spec: DecoderSpec, steps: int | None, stepwise: bool
) -> dict[str, Part]:
    """The output projector, and the generator: of so many steps (None: its own), or step by step."""
    projector: Any = split.output_projector
    words = words_read(spec.vocab_size, spec.hidden_size)
    signals = len(split.signal_token_ids)
    reads = OutputProjector(projector, signals, words, spec.hidden_size, spec.logit_softcap)
    output_projector = Part(
        "output_projector",
        reads.eval(),
        {"signal_logits": torch.zeros(1, signals, words)},
        ("condition",),
    )
    drawing = stepwise_parts(split.generator) if stepwise else [generator_part(split.generator, steps)]
    return {part.name: part for part in (output_projector, *drawing)}


def generator_part(generator: Any, steps: int | None = None) -> Part:
    """A generator of so many steps (None: those it was made for), all in one graph."""
    from mobilemm.generation.sampling import UnrolledGenerator

    unrolled = UnrolledGenerator(generator, steps)
    inputs = {
        "condition": torch.zeros(1, *generator.condition_shape),
        "noise": torch.zeros(1, unrolled.table.noises, *generator.latent_shape),
    }
    return Part("generator", unrolled.eval(), inputs, ("picture",))


def stepwise_parts(generator: Any) -> list[Part]:
    """A generator as one step, whose numbers are an input, and the decoder of latents."""
    from mobilemm.generation.sampling import GeneratorStep, LatentDecoder

    latents = torch.zeros(1, *generator.latent_shape)
    inputs = {
        "latents": latents,
        "condition": torch.zeros(1, *generator.condition_shape),
        "noise": latents.clone(),
        "scales": torch.ones(5),
    }
    return [
        Part("denoiser", GeneratorStep(generator).eval(), inputs, ("next_latents",)),
        Part("image_decoder", LatentDecoder(generator).eval(), {"latents": latents}, ("picture",)),
    ]
