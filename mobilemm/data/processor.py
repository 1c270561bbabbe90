"""Text and pictures → what the model takes, and the labels it learns from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoProcessor, BatchFeature, ProcessorMixin
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mobilemm.data.images import open_image
from mobilemm.data.templates import IMAGE, IMAGE_MARK, Message, Segment, Template, find_template
from mobilemm.errors import MobileMMError
from mobilemm.models import signal_tokens
from mobilemm.models.configuration import MobileMMConfig
from mobilemm.models.modeling import IGNORE_INDEX


class MobileMMProcessor(ProcessorMixin):
    """Tokenizer, image processor and conversation template of one model.

    Args:
        image_processor: transformers' own; for MobileVLM and LLaVA the one that pads to a square, resizes
            bicubically, and normalizes with CLIP's mean and deviation.
        num_image_tokens: placeholders per image.
        image_token_id: their id, possibly outside the vocabulary.
        template: name of the conversation template.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 144,
        image_token_id: int = 32000,
        template: str = "v1",
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token_id = image_token_id
        self.template = template
        self.image_token = IMAGE_MARK
        if type(image_processor).__name__ == "LlavaImageProcessor":
            # AutoProcessor's choice where torchvision is there, whose bicubic is not the official code's PIL.
            image_processor = LlavaImageProcessorPil.from_dict(image_processor.to_dict())
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def conversation_template(self) -> Template:
        """The template object that `template` names."""
        return find_template(self.template, self.tokenizer)

    @property
    def signal_text(self) -> str:
        """The signal tokens that stand for one drawing, as text; empty where the tokenizer knows none."""
        known = self.tokenizer.get_added_vocab()
        return "".join(name for name in signal_tokens.names(signal_tokens.MOST) if name in known)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Prompts with one `<image>` per picture → padded `input_ids` and `attention_mask`, `pixel_values`.

        The text between two `<image>` is tokenized by itself, as the official code does. `images` holds
        all pictures of all prompts in reading order (nested lists are flattened). Raises MobileMMError
        when their number is not that of the marks.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = [open_image(image) for image in _flatten(images)]
        marks = sum(prompt.count(IMAGE_MARK) for prompt in texts)
        if marks != len(pictures):
            raise MobileMMError(f"{len(pictures)} pictures given, but the text has {marks} {IMAGE_MARK}")
        rows = []
        for prompt in texts:
            first, *rest = prompt.split(IMAGE_MARK)
            segments = [Segment(first)]
            for piece in rest:
                segments += [IMAGE, Segment(piece)]
            rows.append(self.encode(segments, add_special_tokens)[0])
        return self._batch(rows, pictures, padding_side)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        padding_side: str = "left",
        **kwargs: Any,
    ) -> Any:
        """One conversation or a list of them, in transformers' form, through this model's template.

        A message's content is text or a list of `{"type": "text", "text": …}` and `{"type": "image",
        "image": path, bytes or PIL image}`. Returns a BatchFeature; `tokenize=False` gives the text with
        `<image>` for each picture, `return_dict=False` the ids alone.
        """
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        conversations: Any = [conversation] if single else conversation
        if not conversations or not all(conversations):
            raise MobileMMError("the conversation has no message")
        rendered = [
            self.conversation_template.render(self._signalled(messages), add_generation_prompt)
            for messages in conversations
        ]
        if not tokenize:
            texts = [
                "".join(IMAGE_MARK if piece.is_image else piece.text for piece in segments)
                for segments in rendered
            ]
            return texts[0] if single else texts
        pictures = [open_image(image) for messages in conversations for image in images_of(messages)]
        slots = sum(segment.is_image for segments in rendered for segment in segments)
        if slots != len(pictures):
            raise MobileMMError(f"{len(pictures)} pictures given, but the template has room for {slots}")
        special = self.conversation_template.add_special_tokens
        batch = self._batch(
            [self.encode(segments, special)[0] for segments in rendered], pictures, padding_side
        )
        return batch if return_dict else batch["input_ids"]

    def encode_for_training(self, messages: Sequence[Message], name: str = "") -> tuple[list[int], list[int]]:
        """A conversation's ids and labels (-100 where nothing is to be learned).

        Raises MobileMMError, with the sample's `name`, when no token would be supervised.
        """
        template = self.conversation_template
        ids, labels = self.encode(template.render(self._signalled(messages)), template.add_special_tokens)
        if all(label == IGNORE_INDEX for label in labels):
            raise MobileMMError(f"sample {name or list(messages)}: it has no supervised token")
        return ids, labels

    def _signalled(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Messages whose drawings are signal tokens. Raises MobileMMError for a model that has none."""
        if not drawings_of(messages):
            return messages
        if not self.signal_text:
            raise MobileMMError("a message holds a drawing, but this model draws nothing: it has no [IMG0]")
        text = {"type": "text", "text": self.signal_text}
        return [
            {
                **message,
                "content": [text if part.get("type") == "drawing" else part for part in message["content"]],
            }
            if isinstance(message["content"], (list, tuple))
            else message
            for message in messages
        ]

    def encode(self, segments: Iterable[Segment], add_special_tokens: bool) -> tuple[list[int], list[int]]:
        """Segments → ids and labels of equal length, image slots expanded to their placeholders.

        Text between two images is tokenized as one string; a token is supervised when it covers a
        character of a supervised segment.
        """
        ids: list[int] = []
        labels: list[int] = []
        chunks: list[list[Segment]] = [[]]
        for segment in segments:
            if segment.is_image:
                chunks.append([])
            else:
                chunks[-1].append(segment)
        for index, chunk in enumerate(chunks):
            if index:
                ids += [self.image_token_id] * self.num_image_tokens
                labels += [IGNORE_INDEX] * self.num_image_tokens
            text = "".join(segment.text for segment in chunk)
            if not text and (index or not add_special_tokens):
                continue
            chunk_ids, offsets = self._tokenize(text, add_special_tokens and index == 0)
            supervised = [False] * len(text)
            position = 0
            for segment in chunk:
                end = position + len(segment.text)
                supervised[position:end] = [segment.supervised] * len(segment.text)
                position = end
            for token, (start, end) in zip(chunk_ids, offsets, strict=True):
                ids.append(token)
                labels.append(token if any(supervised[start:end]) else IGNORE_INDEX)
        return ids, labels

    def _tokenize(self, text: str, add_special_tokens: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without images, and the characters that each of them covers."""
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
        if self.image_token_id not in encoded["input_ids"]:
            return encoded["input_ids"], encoded["offset_mapping"]
        # Somebody's words hold the placeholder itself, which llava-hf's tokenizer knows: they are text.
        backend = json.loads(self.tokenizer.backend_tokenizer.to_str())
        backend["added_tokens"] = [
            token for token in backend["added_tokens"] if token["id"] != self.image_token_id
        ]
        plain = Tokenizer.from_str(json.dumps(backend)).encode(text, add_special_tokens=add_special_tokens)
        return plain.ids, plain.offsets

    def _batch(self, rows: list[list[int]], pictures: list[Any], padding_side: str) -> BatchFeature:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        pad = self.tokenizer.pad_token_id or 0

        def padded(values: list[torch.Tensor], filler: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence(
                values, batch_first=True, padding_value=filler, padding_side=padding_side
            )

        data: dict[str, torch.Tensor] = {}
        if rows:
            data["input_ids"] = padded(tensors, pad)
            data["attention_mask"] = padded([torch.ones_like(row) for row in tensors], 0)
        if pictures:
            data["pixel_values"] = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return BatchFeature(data)


def images_of(messages: Sequence[Message]) -> list[Any]:
    """The pictures of a conversation, in the order in which templates place them."""
    images = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else []:
            if isinstance(part, Mapping) and part.get("type") == "image":
                source = part.get("image", part.get("path"))
                if source is None:
                    raise MobileMMError("a message's image part needs the key 'image': a path or a picture")
                images.append(source)
    return images


def drawings_of(messages: Sequence[Message]) -> list[str]:
    """What a conversation's drawings show: of each part {"type": "drawing", "caption": …} the caption."""
    return [
        str(part.get("caption"))
        for message in messages
        if isinstance(message, Mapping) and isinstance(message.get("content"), (list, tuple))
        for part in message["content"]
        if isinstance(part, Mapping) and part.get("type") == "drawing"
    ]


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [image for inner in images for image in _flatten(inner)]
    return [images]


AutoProcessor.register(MobileMMConfig, MobileMMProcessor, exist_ok=True)
