"""MobileMM: vision encoder → projector → language model (→ output projector), on transformers' classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from mobilemm.errors import MobileMMError
from mobilemm.models.configuration import IMAGE_TOKEN_INDEX, MobileMMConfig
from mobilemm.models.output_projector import build_output_projector
from mobilemm.models.projectors import build_projector
from mobilemm.models.signal_tokens import new_signal_tokens
from mobilemm.models.vision_encoder import VisionEncoder

IGNORE_INDEX = -100


class MobileMMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A small multimodal LLM: looks at any number of pictures per prompt and continues the text.

    Images enter `input_ids` either as one `-200` each (the official convention; spliced inside, logits are
    over the spliced sequence) or as `num_image_tokens` placeholders `config.image_token_id` each.
    """

    config_class = MobileMMConfig
    config: MobileMMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (transformers' own name and form)

    def __init__(self, config: MobileMMConfig) -> None:
        super().__init__(config)
        self.vision_encoder = VisionEncoder(config)
        self.projector: Any = new_projector(config, self.vision_encoder)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.signal_tokens = new_signal_tokens(config)
        self.output_projector = new_output_projector(config)
        inner = getattr(self.vision_encoder.model, "_no_split_modules", None)
        self._no_split_modules = sorted(inner or [])
        self.post_init()

    @property
    def num_image_tokens(self) -> int:
        """How many positions one image takes in the language model's sequence."""
        return int(self.projector.num_tokens)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        vision_features: Tensor | None = None,
        **projector_inputs: Tensor,
    ) -> Tensor:
        """Normalized pixels (images, 3, size, size) → (images, num_image_tokens, text width).

        `vision_features` (images, tokens, vision width) stand for what the encoder makes of the pixels.
        """
        if vision_features is None:
            assert pixel_values is not None
            vision_features = self.vision_encoder(pixel_values.to(self.dtype))
        return self.projector(vision_features.to(self.dtype), **projector_inputs)

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        vision_features: Tensor | None = None,
        **projector_inputs: Tensor,
    ) -> Tensor:
        """Embeddings of (batch, length) ids, with each image's placeholders replaced by its features.

        Images are taken in reading order: row by row, left to right. Raises MobileMMError when the
        placeholders do not hold exactly the images given.
        """
        is_image = input_ids == self.config.image_token_id
        # The placeholder may lie outside the table; its row is overwritten anyway.
        inputs_embeds = self._embed_text(input_ids.masked_fill(is_image, 0))
        seen = pixel_values if vision_features is None else vision_features
        if image_features is None and seen is not None and len(seen):
            image_features = self.get_image_features(pixel_values, vision_features, **projector_inputs)
        given = 0 if image_features is None else image_features.shape[0]
        if not torch.compiler.is_compiling():
            slots = int(is_image.sum())
            if slots != given * self.num_image_tokens:
                raise MobileMMError(
                    f"the prompt has {slots} image placeholders, which is room for"
                    f" {slots / self.num_image_tokens:g} images of {self.num_image_tokens} tokens;"
                    f" {given} given"
                )
        if image_features is None:
            return inputs_embeds + self._untouched() if self.training else inputs_embeds
        return inputs_embeds.masked_scatter(is_image[..., None], image_features.to(inputs_embeds))

    def _embed_text(self, input_ids: Tensor) -> Tensor:
        if self.signal_tokens is None:
            return self.get_input_embeddings()(input_ids)
        plain = input_ids.masked_fill(self.signal_tokens.among(input_ids), 0)
        return self.signal_tokens.embed(input_ids, self.get_input_embeddings()(plain))

    def signal_states(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Last hidden states (batch, length, width) at the signal tokens → (pictures, signal tokens, width).

        Pictures are taken in reading order, row by row. Raises MobileMMError where a signal is not whole.
        """
        assert self.signal_tokens is not None
        found = self.signal_tokens.among(input_ids)
        count = self.signal_tokens.count
        ids = input_ids[found]
        wanted = torch.arange(count, device=ids.device) + self.signal_tokens.first
        if len(ids) % count or bool((ids.view(-1, count) != wanted).any()):
            raise MobileMMError(
                f"signal tokens stand in groups of {count}, in their order; not {ids.tolist()}"
            )
        return hidden[found].view(-1, count, hidden.shape[-1])

    def _untouched(self) -> Tensor | float:
        """Zero, through all that a picture passes and that learns.

        A batch of text alone then gives these parameters a gradient of zero instead of none: processes that
        share gradients wait for each of them, and an optimizer treats both kinds of batches alike.
        """
        if not torch.is_grad_enabled():
            return 0.0
        encoder = next(self.vision_encoder.parameters())
        if any(parameter.requires_grad for parameter in self.vision_encoder.parameters()):
            size = self.config.image_size
            return 0.0 * self.get_image_features(encoder.new_zeros(1, 3, size, size)).sum()
        if any(parameter.requires_grad for parameter in self.projector.parameters()):
            shape = self.vision_encoder.shape
            tokens = shape.grid[0] * shape.grid[1] + self.vision_encoder.num_prefix_tokens
            blank = encoder.new_zeros(1, tokens, shape.width)
            return 0.0 * self.get_image_features(vision_features=blank).sum()
        return 0.0

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_features: Tensor | None = None,
        vision_features: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One pass over (batch, length) ids, or over `inputs_embeds` (batch, length, text width).

        Args:
            pixel_values: all images of the batch in reading order, (images, 3, size, size), normalized;
                None or zero rows for text alone.
            image_features: instead of `pixel_values`, what `get_image_features` gave for them.
            vision_features: instead of `pixel_values`, what `vision_encoder` gave for them.
            labels: (batch, length) ids to predict, -100 where nothing is to be learned; spliced like the ids.
            logits_to_keep: how many last positions, or which ones, go through the head; with labels, tokens
                that other positions would predict do not count.

        Returns logits (batch, spliced length, vocabulary), or only those that `logits_to_keep` names.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise MobileMMError("give input_ids or inputs_embeds")
            if not torch.compiler.is_compiling() and bool((input_ids == IMAGE_TOKEN_INDEX).any()):
                input_ids, attention_mask, labels = expand_image_slots(
                    input_ids,
                    self.config.image_token_id,
                    self.num_image_tokens,
                    attention_mask=attention_mask,
                    labels=labels,
                )
                position_ids = None
            instruction = {
                "qformer_input_ids": qformer_input_ids,
                "qformer_attention_mask": qformer_attention_mask,
            }
            inputs_embeds = self.embed(
                input_ids,
                pixel_values,
                image_features,
                vision_features,
                **{name: value for name, value in instruction.items() if value is not None},
            )
        kept = logits_to_keep if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)
        shows_states = kwargs.pop("output_hidden_states", None)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            output_hidden_states=shows_states or self.signal_tokens is not None,
            **kwargs,
        )
        if self.signal_tokens is not None:
            outputs = CausalLMOutputWithPast(
                logits=self.signal_tokens.extend(outputs.logits, outputs.hidden_states[-1][:, kept]),
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states if shows_states else None,
                attentions=outputs.attentions,
            )
        if labels is not None:
            loss_options = {name: kwargs[name] for name in ("num_items_in_batch",) if name in kwargs}
            following = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
            outputs["loss"] = self.loss_function(
                logits=outputs.logits,
                labels=labels,
                shift_labels=following[:, kept].contiguous(),
                vocab_size=outputs.logits.shape[-1],
                **loss_options,
            )
        return outputs

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' `generate`; images in `input_ids` as in `forward`, prompts padded on the left.

        Returns what transformers does, each sequence beginning with `input_ids` as they were passed.
        """
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        if input_ids is None or "inputs_embeds" in kwargs:
            return super().generate(input_ids, **kwargs)  # type: ignore[misc]
        # Images are spliced in once, here: transformers would otherwise repeat `pixel_values` per beam and
        # hand ids outside the vocabulary to its logits processors.
        expanded, mask = input_ids, kwargs.pop("attention_mask", None)
        if bool((expanded == IMAGE_TOKEN_INDEX).any()):
            expanded, mask, _ = expand_image_slots(
                expanded, self.config.image_token_id, self.num_image_tokens, attention_mask=mask, side="left"
            )
        names = ("pixel_values", "image_features", "qformer_input_ids", "qformer_attention_mask")
        images = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        inputs_embeds = self.embed(expanded, **images)
        pad = self.generation_config.pad_token_id or 0
        output: Any = super().generate(  # type: ignore[misc]
            expanded.masked_fill(expanded == self.config.image_token_id, pad),
            inputs_embeds=inputs_embeds,
            attention_mask=torch.ones_like(expanded) if mask is None else mask,
            **kwargs,
        )
        sequences = output if isinstance(output, Tensor) else output.sequences
        prompts = input_ids.repeat_interleave(sequences.shape[0] // input_ids.shape[0], 0)
        sequences = torch.cat([prompts.to(sequences.device), sequences[:, expanded.shape[1] :]], 1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Any,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own; what the model has said is text, even an `image_token_id` of the vocabulary."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if inputs_embeds is not None and not is_first_iteration:
            inputs["inputs_embeds"] = self._embed_text(inputs["input_ids"])
            inputs["input_ids"] = None
        return inputs


def new_projector(config: MobileMMConfig, encoder: VisionEncoder) -> nn.Module:
    """The projector that the config names, initialized anew, between this encoder and the language model."""
    return build_projector(
        config.projector,
        vision_width=encoder.width,
        text_width=config.text_config.hidden_size,
        grid=encoder.grid,
        prefix_tokens=encoder.num_prefix_tokens,
    )


def new_output_projector(config: MobileMMConfig) -> nn.Module | None:
    """The output projector that the config names, initialized anew; None of a model that does not draw."""
    if config.output_projector is None or config.signal_token_ids is None:
        return None
    return build_output_projector(
        config.output_projector,
        text_width=config.text_config.hidden_size,
        signal_tokens=len(config.signal_token_ids),
    )


def expand_image_slots(
    input_ids: Tensor,
    image_token_id: int,
    num_image_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    side: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Replaces each `-200` by `num_image_tokens` placeholders; rows of unequal length are padded anew.

    Shapes: (batch, length) → (batch, spliced length) for ids, mask and labels. Padding goes to `side`, or
    where the mask shows it to be ("right" when it shows none); padded ids are 0, padded labels -100.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if side is None:
        side = "left" if bool((attention_mask[:, 0] == 0).any()) else "right"
    rows, label_rows = [], []
    for index, (row, keep) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
        row = row[keep]
        repeats = torch.where(row == IMAGE_TOKEN_INDEX, num_image_tokens, 1)
        rows.append(
            row.masked_fill(row == IMAGE_TOKEN_INDEX, image_token_id).repeat_interleave(
                repeats, output_size=None
            )
        )
        if labels is not None:
            row_labels = labels[index][keep].masked_fill(row == IMAGE_TOKEN_INDEX, IGNORE_INDEX)
            label_rows.append(row_labels.repeat_interleave(repeats))
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    mask = nn.utils.rnn.pad_sequence(
        [attention_mask.new_ones(len(row)) for row in rows], batch_first=True, padding_side=side
    )
    if labels is None:
        return ids, mask, None
    spliced = nn.utils.rnn.pad_sequence(
        label_rows, batch_first=True, padding_value=IGNORE_INDEX, padding_side=side
    )
    return ids, mask, spliced


AutoConfig.register(MobileMMConfig.model_type, MobileMMConfig, exist_ok=True)
AutoModel.register(MobileMMConfig, MobileMMForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(MobileMMConfig, MobileMMForConditionalGeneration, exist_ok=True)
