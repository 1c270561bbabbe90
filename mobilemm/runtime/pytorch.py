"""A conversation with a model on PyTorch, through transformers' `generate`: any model that it knows."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch

from mobilemm.data.images import open_image
from mobilemm.errors import MobileMMError
from mobilemm.runtime.conversation import Conversation, refuse_full_context
from mobilemm.runtime.drawing import Drawn, choose_seed, to_uint8
from mobilemm.runtime.noise import normal
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.streaming import TextStream


class ChatSession(Conversation):
    """One conversation. Works with mobilemm's models and with any image-text-to-text model of transformers.

    A model whose processor has no chat template (PaliGemma) answers each question by itself, about the
    pictures shown last: its prompt is an image mark for each picture, and the question.

    Args:
        model, processor: what `mobilemm.load` gives.
        sampling: how answers are drawn.
        system: a system prompt, where the model's template takes one.
        generator: folder of the generator of a model that draws; read when something is drawn.
        steps: of the generator; left out, those it was distilled for.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        sampling: Sampling | None = None,
        system: str | None = None,
        generator: Path | None = None,
        steps: int | None = None,
    ) -> None:
        self.model, self.processor = model, processor
        self.generator, self.steps = generator, steps
        self._pictures: Any = None
        super().__init__(sampling, system)

    def look_at(self, picture: Any) -> None:
        """Shows a picture (a path, encoded bytes or a PIL image); it goes with what is said next.

        Raises MobileMMError for what cannot be read.
        """
        self.pending.append(open_image(picture))

    def _answer(self, messages: list[dict[str, Any]]) -> Generator[str]:
        inputs = self._encode(messages)
        sampling = self.sampling.options()
        if context := context_length(self.model):
            length = inputs["input_ids"].shape[1]
            refuse_full_context(length, context)
            sampling["max_new_tokens"] = min(sampling["max_new_tokens"], context - length)
        signals = getattr(self.model.config, "signal_token_ids", None)
        if not signals or self.generator is None:
            return self._generate(inputs, sampling)
        return self._say_and_draw(inputs, sampling, list(signals))

    def _say_and_draw(self, inputs: Any, sampling: dict[str, Any], signals: list[int]) -> Generator[str]:
        """The answer up to the first signal token, a picture, and so on until nothing is left to be said."""
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [])
        room = sampling["max_new_tokens"]
        while room > 0:
            said: list[int] = []
            options = sampling | {"max_new_tokens": room, "eos_token_id": [*ends, signals[0]]}
            yield from self._generate(inputs, options, said)
            room -= len(said) - 1 + len(signals)
            if not said or said[-1] != signals[0]:
                return
            ids = [*inputs["input_ids"][0].tolist(), *said[:-1], *signals]
            inputs["input_ids"] = torch.tensor([ids], device=self.model.device)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            yield self._draw(inputs)

    @torch.no_grad()
    def _draw(self, inputs: Any) -> Drawn:
        """The picture that the signal tokens at the end of the prompt ask for."""
        from mobilemm.generation.generator import load_generator
        from mobilemm.generation.sampling import UnrolledGenerator

        begun = time.perf_counter()
        if self._pictures is None:
            assert self.generator is not None
            generator = load_generator(self.generator)
            self._pictures = UnrolledGenerator(generator, self.steps).to(self.model.device).eval()
        count = len(self.model.config.signal_token_ids)
        hidden = self.model(**inputs, output_hidden_states=True).hidden_states[-1][:, -count:]
        condition = self.model.output_projector(hidden).float()
        seed = choose_seed(self.sampling.seed)
        shape = (1, self._pictures.table.noises, *self._pictures.latent_shape)
        noise = torch.from_numpy(normal(seed, shape)).to(condition.device)
        picture = self._pictures(condition, noise).cpu().numpy()
        return Drawn(to_uint8(picture), seed, self.processor.signal_text, time.perf_counter() - begun)

    def _encode(self, messages: list[dict[str, Any]]) -> Any:
        from jinja2 import TemplateError

        try:
            if has_chat_template(self.processor):
                inputs = self.processor.apply_chat_template(
                    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
            else:
                inputs = self._encode_plain(messages)
        except (ValueError, TypeError, LookupError, AttributeError, TemplateError) as error:
            raise MobileMMError(f"the model's processor refuses this conversation: {error}") from error
        inputs = inputs.to(self.model.device)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        return inputs

    def _encode_plain(self, messages: list[dict[str, Any]]) -> Any:
        """The last question and the pictures shown last, for a processor without a chat template."""
        if messages[0]["role"] == "system":
            raise MobileMMError("this model has no chat template, and so takes no system prompt")
        shown = [
            [part["image"] for part in message["content"] if part["type"] == "image"] for message in messages
        ]
        pictures: list[Any] = next((images for images in reversed(shown) if images), [])
        mark = getattr(self.processor, "image_token", None) or ""
        text = f"{mark}" * len(pictures) + messages[-1]["content"][-1]["text"]
        return self.processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")

    def _generate(
        self, inputs: Any, options: dict[str, Any], said: list[int] | None = None
    ) -> Generator[str]:
        """The answer in pieces; its ids go to `said`."""
        pieces: queue.Queue[str | None] = queue.Queue()
        failure: list[BaseException] = []
        stopped = threading.Event()
        streamer = _Streamer(self.processor.tokenizer, _stop_strings(self.processor), pieces)
        streamer.ids = said if said is not None else []

        def run() -> None:
            try:
                # Sampling draws from torch's global generator; a seed must not change it for others.
                with torch.random.fork_rng(enabled=self.sampling.seed is not None):
                    if self.sampling.seed is not None:
                        torch.manual_seed(self.sampling.seed)
                    self.model.generate(
                        **inputs,
                        **options,
                        streamer=streamer,
                        stopping_criteria=[
                            lambda ids, _: _stop(stopped.is_set() or streamer.text.stopped, ids)
                        ],
                    )
            except BaseException as error:  # handed to the caller's thread below
                failure.append(error)
            finally:
                pieces.put(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            stopped.set()
            thread.join()
        if failure:
            raise failure[0]


class _Streamer:
    """Takes tokens from `generate` and puts text into a queue; `generate` calls `put` and `end`."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], pieces: queue.Queue[str | None]) -> None:
        self.text = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), stop)
        self.pieces = pieces
        self.ids: list[int] = []
        self.seen_prompt = False

    def put(self, ids: torch.Tensor) -> None:
        """One step's token; the first call brings the prompt."""
        if not self.seen_prompt:
            self.seen_prompt = True
            return
        for token in ids.flatten().tolist():
            self.ids.append(token)
            self._send(self.text.put(token))

    def end(self) -> None:
        """Sends what was held back."""
        self._send(self.text.end())

    def _send(self, piece: str) -> None:
        if piece:
            self.pieces.put(piece)


def _stop(stopped: bool, ids: torch.Tensor) -> torch.Tensor:
    return torch.full((ids.shape[0],), stopped, device=ids.device)


def _stop_strings(processor: Any) -> tuple[str, ...]:
    """What ends an answer besides the model's end tokens: only templates of ours say."""
    from mobilemm.data.processor import MobileMMProcessor

    return processor.conversation_template.stop if isinstance(processor, MobileMMProcessor) else ()


def has_chat_template(processor: Any) -> bool:
    """Whether the processor knows how a conversation is written."""
    from mobilemm.data.processor import MobileMMProcessor

    return isinstance(processor, MobileMMProcessor) or bool(getattr(processor, "chat_template", None))


def context_length(model: Any) -> int | None:
    """How many tokens the language model can attend to, None when its config does not say."""
    text = model.config.get_text_config()
    return getattr(text, "max_position_embeddings", None)


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is. Raises MobileMMError for one that is not there."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise MobileMMError(f"device {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The dtype of that name; left out, float32 on a CPU and elsewhere the checkpoint's own."""
    if name is None:
        return torch.float32 if device.type == "cpu" else None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise MobileMMError(f"unknown dtype {name!r}; known: {', '.join(known)}")
    return known[name]


def quiet() -> None:
    """Keeps libraries' progress bars and notices out of a conversation."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # read when it is imported
    warnings.filterwarnings("ignore")
