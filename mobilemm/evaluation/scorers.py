"""What answers questions and says how likely others' answers are: a model on PyTorch, or a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mobilemm.data.images import ImageSource

# Texts are read in windows of so many tokens, each by itself.
WINDOW = 512


class Scorer(Protocol):
    """A model or bundle, asked one question at a time."""

    def losses(self, picture: ImageSource, question: str, choices: Sequence[str]) -> list[float]:
        """Of each choice as the answer, mean negative log-likelihood a token, its end token included."""

    def answer(self, picture: ImageSource, question: str, max_new_tokens: int) -> str:
        """The greedy answer."""

    def text(self, text: str) -> tuple[float, int, int]:
        """Sum of the tokens' negative log-likelihoods, their number, and how many were the likeliest."""


class ModelScorer:
    """A model of mobilemm's own classes on PyTorch.

    Args:
        model, processor: what `mobilemm.load` gives.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval(), processor

    def losses(self, picture: ImageSource, question: str, choices: Sequence[str]) -> list[float]:
        """As the protocol says. The prompt is run once, the choices as a batch behind it."""
        features = self._features(picture)
        return self.losses_of(features, question, choices)

    def losses_of(self, image_features: Any, question: str, choices: Sequence[str]) -> list[float]:
        """`losses` for a picture by what `get_image_features` says of it: (1, image tokens, text width)."""
        import torch

        device = self.model.device
        prompt, _ = self._encode(question, None)
        rows = [self._encode(question, choice) for choice in choices]
        begin = min(next(i for i, label in enumerate(labels) if label >= 0) for _, labels in rows)
        assert all(ids[:begin] == prompt[:begin] for ids, _ in rows)
        with torch.inference_mode():
            embeds = self.model.embed(
                torch.tensor([prompt[:begin]], device=device), image_features=image_features
            )
            first = self.model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            cache = first.past_key_values
            cache.batch_repeat_interleave(len(rows))
            pad = torch.nn.utils.rnn.pad_sequence
            ids = pad([torch.tensor(row[begin:]) for row, _ in rows], batch_first=True).to(device)
            labels = pad(
                [torch.tensor(row[begin:]) for _, row in rows], batch_first=True, padding_value=-100
            ).to(device)
            # Padding stands on the right, where causal attention hides it.
            rest = self.model(
                inputs_embeds=self.model.get_input_embeddings()(ids), past_key_values=cache, use_cache=True
            ).logits
            logits = torch.cat([first.logits.expand(len(rows), -1, -1), rest[:, :-1]], 1).float()
            nll = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100)
        return (nll.sum(1) / (labels != -100).sum(1)).tolist()

    def answer(self, picture: ImageSource, question: str, max_new_tokens: int) -> str:
        """As the protocol says."""
        from mobilemm.runtime.pytorch import ChatSession
        from mobilemm.runtime.sampling import Sampling

        session = ChatSession(self.model, self.processor, Sampling(max_new_tokens=max_new_tokens))
        session.look_at(picture)
        return session.reply(question)

    def text(self, text: str) -> tuple[float, int, int]:
        """As the protocol says."""
        import torch

        ids = self.processor.tokenizer(text)["input_ids"]
        total, count, right = 0.0, 0, 0
        for start in range(0, len(ids) - 1, WINDOW):
            window = torch.tensor([ids[start : start + WINDOW + 1]], device=self.model.device)
            with torch.inference_mode():
                logits = self.model(window[:, :-1]).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += len(logits)
            right += int((logits.argmax(-1) == window[0, 1:]).sum())
        return total, count, right

    def _features(self, picture: ImageSource) -> Any:
        import torch

        inputs = self.processor(images=picture, text=self.processor.image_token).to(self.model.device)
        with torch.inference_mode():
            return self.model.get_image_features(inputs["pixel_values"])

    def _encode(self, question: str, answer: str | None) -> tuple[list[int], list[int]]:
        template = self.processor.conversation_template
        segments = template.render(_conversation(question, answer), answer is None)
        return self.processor.encode(segments, template.add_special_tokens)


class BundleScorer:
    """A bundle, through the runtime that `mobilemm run` has."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        from mobilemm.runtime.backends import open_backend
        from mobilemm.runtime.bundle import open_bundle
        from mobilemm.runtime.session import Session

        self.bundle = open_bundle(folder)
        self.backend = open_backend(self.bundle, threads)
        self.session = Session(self.bundle, self.backend)
        self.decoder = self.backend.decoder()

    def losses(self, picture: ImageSource, question: str, choices: Sequence[str]) -> list[float]:
        """As the protocol says. The prompt is run once. Raises MobileMMError when it takes no pictures."""
        from mobilemm.errors import MobileMMError
        from mobilemm.runtime.image import to_pixels

        manifest, tokenizer = self.bundle.manifest, self.session.tokenizer
        if manifest.image is None:
            raise MobileMMError(f"{self.bundle.folder}: this bundle takes no pictures")
        prompt = tokenizer.encode(_conversation(question, None))
        pixels = to_pixels(picture, manifest.image)[None]
        features = self.backend.run("vision", {"pixels": pixels})["image_features"]
        self.decoder.truncate(0)
        first = self.decoder.decode(self._embed(prompt, features))[0]
        losses = []
        for choice in choices:
            whole = tokenizer.encode(_conversation(question, choice), add_generation_prompt=False)
            assert whole[: len(prompt)] == prompt
            answer = whole[len(prompt) :]
            end = next(i for i, token in enumerate(answer) if token in manifest.model.eos_token_ids)
            answer = answer[: end + 1]
            self.decoder.truncate(len(prompt))
            embeds = self._embed(answer[:-1], features[:0])
            rest = self.decoder.decode(embeds, logits_positions=np.arange(len(answer) - 1))[0]
            losses.append(float(_negative_log_likelihood(np.concatenate([first, rest]), answer).mean()))
        return losses

    def answer(self, picture: ImageSource, question: str, max_new_tokens: int) -> str:
        """As the protocol says."""
        from mobilemm.runtime.sampling import Sampling

        self.session.reset()
        self.session.sampling = Sampling(max_new_tokens=max_new_tokens)
        self.session.look_at(picture)
        return self.session.reply(question)

    def text(self, text: str) -> tuple[float, int, int]:
        """As the protocol says."""
        ids = self.session.tokenizer.tokenizer.encode(text).ids
        window = min(WINDOW, self.bundle.manifest.model.context_length)
        none = np.zeros((0, self.bundle.manifest.model.hidden_size), np.float32)
        total, count, right = 0.0, 0, 0
        for start in range(0, len(ids) - 1, window):
            piece = ids[start : start + window + 1]
            self.decoder.truncate(0)
            embeds = self._embed(piece[:-1], none)
            logits = self.decoder.decode(embeds, logits_positions=np.arange(len(piece) - 1))[0]
            total += float(_negative_log_likelihood(logits, piece[1:]).sum())
            count += len(piece) - 1
            right += int((logits.argmax(-1) == np.array(piece[1:])).sum())
        return total, count, right

    def _embed(self, ids: Sequence[int], features: np.ndarray) -> np.ndarray:
        inputs = {"input_ids": np.array([ids], np.int64), "image_features": features}
        return self.backend.run("embed", inputs)["inputs_embeds"]


def open_scorer(model: str | None, threads: int | None = None) -> Scorer:
    """A scorer of a bundle's folder, or of a model's folder or hub id; None is the default model.

    Raises MobileMMError for a model that is not of mobilemm's own classes.
    """
    if model is not None and (Path(model) / "manifest.json").is_file():
        return BundleScorer(Path(model), threads)
    from mobilemm.data.processor import MobileMMProcessor
    from mobilemm.errors import MobileMMError
    from mobilemm.models.checkpoints.reading import load
    from mobilemm.runtime.pytorch import choose_device, choose_dtype

    device = choose_device(None)
    loaded = load(model, dtype=choose_dtype(None, device), device=device)
    if not isinstance(loaded.processor, MobileMMProcessor):
        raise MobileMMError(
            f"{model}: only bundles and models of mobilemm's own classes are scored; this one is read through"
            " transformers' class"
        )
    return ModelScorer(loaded.model, loaded.processor)


def _conversation(question: str, answer: str | None) -> list[dict[str, Any]]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _negative_log_likelihood(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids)), list(ids)]
