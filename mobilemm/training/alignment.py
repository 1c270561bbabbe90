"""The first stage: a projector learns to speak to a frozen language model, from pictures and their captions.

Encoder and language model stay as they are, so the encoder runs once per picture (its features are kept on
disk), and the part of the prompt before the picture runs once in all (its keys and values are kept).
L_txt-gen of the survey: cross-entropy of the caption's tokens, given picture and question.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from transformers import DynamicCache

from mobilemm.data.images import open_image
from mobilemm.data.pairs import Pair, read_pairs
from mobilemm.errors import MobileMMError
from mobilemm.models.modeling import IGNORE_INDEX, MobileMMForConditionalGeneration


class AlignmentRecipe(BaseModel):
    """What a run of this stage needs; the YAML file has the same keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Path = Field(description="folder of picture-caption pairs (scripts/fetch_pairs.py)")
    output: Path = Field(description="folder for the checkpoint, the cached features and the result")
    questions: list[str] = Field(min_length=1, description="what the user asks; drawn per sample")
    warm_start_epochs: int = Field(ge=0, default=0, description="epochs of `warm_start` before the others")
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0, default=50)
    weight_decay: float = Field(ge=0, default=0.0)
    max_grad_norm: float = Field(gt=0, default=1.0)
    save_every: int = Field(gt=0, default=50)
    seed: int = 0


def read_recipe(path: Path) -> AlignmentRecipe:
    """A recipe from YAML; MobileMMError names the file and the key that is wrong."""
    try:
        return AlignmentRecipe(**(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))
    except OSError as error:
        raise MobileMMError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, TypeError) as error:
        raise MobileMMError(f"{path}: not a YAML mapping: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise MobileMMError(f"{path}: key {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from error


class FeatureCache:
    """The frozen encoder's features of every picture, float16 on disk: (pictures, tokens, vision width)."""

    def __init__(self, folder: Path, model: MobileMMForConditionalGeneration, processor: Any) -> None:
        self.folder, self.model, self.processor = folder, model, processor

    def get(self, images: Sequence[Path], batch_size: int = 16) -> np.ndarray:
        """Features of these pictures, computed where they are not on disk yet."""
        shape = self.model.vision_encoder.shape
        tokens = shape.grid[0] * shape.grid[1]
        listing = json.dumps([str(image) for image in images] + [self.model.config.image_size])
        path = self.folder / f"features-{hashlib.sha256(listing.encode()).hexdigest()[:12]}.npy"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            writing = path.with_suffix(".part.npy")
            features = np.lib.format.open_memmap(
                writing, mode="w+", dtype=np.float16, shape=(len(images), tokens, shape.width)
            )
            for start in range(0, len(images), batch_size):
                batch = [open_image(image) for image in images[start : start + batch_size]]
                pixels = self.processor.image_processor(batch, return_tensors="pt")["pixel_values"]
                with torch.inference_mode():
                    out = self.model.vision_encoder(pixels.to(self.model.device, self.model.dtype))
                features[start : start + len(batch)] = out.half().cpu().numpy()
            features.flush()
            os.replace(writing, path)
        return np.load(path, mmap_mode="r")


class CaptionLoss:
    """Cross-entropy of answers under the frozen language model, with the prompt's beginning computed once."""

    def __init__(self, model: MobileMMForConditionalGeneration, processor: Any) -> None:
        self.model, self.processor = model, processor
        ids, _ = self._encode("?", None)
        prefix = ids[: ids.index(model.config.image_token_id)]
        self.prefix_length = len(prefix)
        self._prefix: list[tuple[Tensor, Tensor]] = []
        if prefix:
            cache = DynamicCache()
            with torch.no_grad():
                model.language_model.base_model(
                    torch.tensor([prefix], device=model.device), past_key_values=cache, use_cache=True
                )
            self._prefix = [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]

    def __call__(self, image_embeds: Tensor, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Sum over each answer's tokens of their negative log-likelihood, and their number: (batch, 2).

        `image_embeds` are (batch, num_image_tokens, text width), with or without a gradient.
        """
        model = self.model
        encoded = [self._encode(*pair) for pair in zip(questions, answers, strict=True)]
        rows = [torch.tensor(ids[self.prefix_length :]) for ids, _ in encoded]
        targets = [torch.tensor(labels[self.prefix_length :]) for _, labels in encoded]
        pad = torch.nn.utils.rnn.pad_sequence
        input_ids = pad(rows, batch_first=True).to(model.device)
        labels = pad(targets, batch_first=True, padding_value=IGNORE_INDEX).to(model.device)
        mask = pad([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)
        batch = len(rows)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._prefix):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
        hidden = model.language_model.base_model(
            inputs_embeds=model.embed(input_ids, image_features=image_embeds),
            attention_mask=torch.cat([mask.new_ones(batch, self.prefix_length), mask], 1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # Only the supervised positions go through the head, a fifth of the model.
        predicted, wanted = hidden[:, :-1], labels[:, 1:]
        supervised = wanted != IGNORE_INDEX
        logits = model.get_output_embeddings()(predicted[supervised])
        losses = torch.nn.functional.cross_entropy(logits.float(), wanted[supervised], reduction="none")
        total = torch.zeros(batch, device=losses.device).index_add(0, supervised.nonzero()[:, 0], losses)
        return torch.stack([total, supervised.sum(1).to(total)], 1)

    def _encode(self, question: str, answer: str | None) -> tuple[list[int], list[int]]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        template = self.processor.conversation_template
        return self.processor.encode(template.render(messages), template.add_special_tokens)


def align(
    recipe: AlignmentRecipe,
    model: MobileMMForConditionalGeneration,
    processor: Any,
    report: Callable[[str], None] = print,
) -> Path:
    """Trains the projector by the recipe, going on from its last checkpoint; returns `projector.safetensors`.

    The same recipe and seed give the same weights, interrupted or not, on one machine.
    """
    from safetensors.torch import save_file

    pairs = read_pairs(recipe.data, "train")
    validation = read_pairs(recipe.data, "validation")
    cache = FeatureCache(recipe.output / "features", model, processor)
    report(f"{len(pairs)} training and {len(validation)} validation pairs; encoding pictures")
    features = cache.get([recipe.data / pair.image for pair in pairs])
    held_out = cache.get([recipe.data / pair.image for pair in validation])

    model.requires_grad_(False)
    projector = model.projector.requires_grad_(True).train()
    caption_loss = CaptionLoss(model, processor)
    optimizer = torch.optim.AdamW(
        projector.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps_per_epoch = len(pairs) // recipe.batch_size
    total = steps_per_epoch * recipe.epochs
    checkpoint = recipe.output / "checkpoint.pt"
    step, history = 0, []
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        projector.load_state_dict(saved["projector"])
        optimizer.load_state_dict(saved["optimizer"])
        step, history = saved["step"], saved["history"]
        report(f"going on from step {step}")
    elif recipe.warm_start_epochs:
        named = warm_start(recipe, model, processor, features, [pair.caption for pair in pairs])
        report(f"warm start: {recipe.warm_start_epochs} epochs, loss {named:.3f}")
    started, first = time.monotonic(), step
    while step < total:
        epoch, index = divmod(step, steps_per_epoch)
        rows = _rows(recipe, len(pairs), epoch, index)
        choose = random.Random(f"{recipe.seed}-{step}")
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe.warmup_steps, total)
        embeds = projector(torch.from_numpy(features[rows]).to(model.device, model.dtype))
        losses = caption_loss(
            embeds,
            [choose.choice(recipe.questions) for _ in rows],
            [pairs[row].caption for row in rows],
        )
        loss = losses[:, 0].sum() / losses[:, 1].sum()
        if not torch.isfinite(loss):
            raise MobileMMError(
                f"the loss is {loss.item()} at step {step}; {checkpoint} is the last good state"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), recipe.max_grad_norm)
        optimizer.step()
        step += 1
        history.append(loss.item())
        if step % 10 == 0:
            rate = (time.monotonic() - started) / (step - first)
            mean = sum(history[-10:]) / 10
            left = (total - step) * rate / 60
            report(f"step {step}/{total}  loss {mean:.3f}  {rate:.2f} s/step  {left:.0f} min left")
        if step % recipe.save_every == 0 or step == total:
            state = {
                "projector": projector.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "history": history,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
        if step % (10 * recipe.save_every) == 0 or step == total:
            accuracy = choose_captions(
                projector.eval(), caption_loss, held_out, validation, recipe.questions[0]
            )
            projector.train()
            report(f"step {step}/{total}  right caption among 4, validation: {accuracy:.3f}")
    result = recipe.output / "projector.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in projector.state_dict().items()}, result)
    (recipe.output / "history.json").write_text(json.dumps(history), encoding="utf-8")
    return result


def warm_start(
    recipe: AlignmentRecipe,
    model: MobileMMForConditionalGeneration,
    processor: Any,
    features: np.ndarray,
    captions: Sequence[str],
) -> float:
    """Moves the projector's outputs near the embeddings of the captions' words, without the language model.

    A picture's mean embedding, read by the final norm and the head as if it were a hidden state, shall name
    the words of its caption; its tokens shall be as long as the words' are. Costs a thousandth of a step
    through the model. Meant for tied embeddings, where a word's embedding is what the head looks for.
    Returns the last loss.
    """
    head, words = model.get_output_embeddings(), model.get_input_embeddings().weight
    assert isinstance(words, Tensor)
    norm = model.language_model.base_model.get_submodule("norm")
    length = words.norm(dim=1).mean()
    tokens = [
        processor.tokenizer(f" {caption}", add_special_tokens=False)["input_ids"] for caption in captions
    ]
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=recipe.learning_rate)
    steps_per_epoch = len(captions) // recipe.batch_size
    loss = torch.tensor(math.nan)
    for step in range(recipe.warm_start_epochs * steps_per_epoch):
        rows = _rows(recipe, len(captions), -1 - step // steps_per_epoch, step % steps_per_epoch)
        embeds = model.projector(torch.from_numpy(features[rows]).to(model.device, model.dtype))
        scores = head(norm(embeds.mean(1))).float().log_softmax(-1)
        named = torch.stack([-scores[place, tokens[row]].mean() for place, row in enumerate(rows)]).mean()
        loss = named + (embeds.norm(dim=-1) / length).log().square().mean()
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / max(1, recipe.warmup_steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.projector.parameters(), recipe.max_grad_norm)
        optimizer.step()
    return loss.item()


def _rows(recipe: AlignmentRecipe, count: int, epoch: int, index: int) -> list[int]:
    """The pairs of one step: each epoch draws an order of its own, which only seed and epoch decide."""
    order = random.Random(f"{recipe.seed}-{epoch}").sample(range(count), count)
    return sorted(order[index * recipe.batch_size : (index + 1) * recipe.batch_size])


@torch.inference_mode()
def choose_captions(
    projector: torch.nn.Module,
    caption_loss: CaptionLoss,
    features: np.ndarray,
    pairs: Sequence[Pair],
    question: str,
    choices: int = 4,
    limit: int = 200,
    seed: int = 0,
) -> float:
    """How often the right caption is the likeliest among `choices`, per token; chance is 1 / choices.

    The wrong ones are captions of other groups of the same pairs, drawn with `seed`.
    """
    model = caption_loss.model
    draw = random.Random(seed)
    sample = draw.sample(range(len(pairs)), min(limit, len(pairs)))
    right = 0
    for row in sample:
        others = [pair.caption for pair in pairs if pair.group != pairs[row].group]
        captions = [pairs[row].caption, *draw.sample(others, choices - 1)]
        embeds = projector(torch.from_numpy(features[[row]]).to(model.device, model.dtype))
        losses = caption_loss(embeds.expand(choices, -1, -1), [question] * choices, captions)
        right += int((losses[:, 0] / losses[:, 1]).argmin()) == 0
    return right / len(sample)


def _schedule(step: int, warmup: int, total: int) -> float:
    """Linear warm-up, then a half cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
