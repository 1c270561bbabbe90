"""What bundles of the default model answer and know, against the checkpoint in fp32 PyTorch.

    python benchmarks/answers.py BUNDLE… [--model CHECKPOINT] [--pairs data/pairs] [--items 200]

Answers: greedy, about 100 pictures (held-out ones of the tests, docs/drawings, and drawings made here); the
share whose tokens are all those of PyTorch's `generate`. Of a bundle in fp32 it must be every one. Where an
answer first differs, it is told by how many nats PyTorch preferred its own token: little is a near-tie.

Score: the right caption among 4 by least loss per token, as the tests measure the default model: on the
held-out pictures, and with --pairs on the validation split of `scripts/fetch_pairs.py`, --items of them. The
bundle's likelihoods come out of its decoder on its own runtime.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mobilemm.evaluation.scorers import BundleScorer, ModelScorer
from mobilemm.evaluation.tasks import QUESTION, Item, held_out, read_task

ROOT = Path(__file__).resolve().parents[1]
DRAWINGS = ROOT / "docs" / "drawings"
PICTURES, NEW_TOKENS, CHOICES = 100, 24, 4

Picture = Path | Image.Image


def pictures(count: int = PICTURES) -> dict[str, Picture]:
    """By name: held-out ones and drawings first, then as many made here as are still wanted."""
    found: dict[str, Picture] = {path.stem: path for path in sorted(held_out().glob("*.png"))}
    found |= {f"drawing of a {path.stem}": path for path in sorted(DRAWINGS.glob("*.png"))}
    made = max(0, count - len(found))
    found |= {f"made {index}": shapes(index) for index in range(made)}
    return dict(list(found.items())[:count])


def shapes(seed: int) -> Image.Image:
    """A few coloured shapes on a plain background, of another size and form for each seed."""
    draw_number = random.Random(seed)
    width, height = draw_number.randint(120, 400), draw_number.randint(120, 400)
    colors = ["white", "black", "red", "green", "blue", "yellow", "orange", "purple", "brown", "gray", "pink"]
    picture = Image.new("RGB", (width, height), draw_number.choice(colors[:1] * 8 + colors[1:]))
    canvas = ImageDraw.Draw(picture)
    for _ in range(draw_number.randint(1, 4)):
        left, top = draw_number.randint(0, width // 2), draw_number.randint(0, height // 2)
        right = left + draw_number.randint(20, width // 2)
        bottom = top + draw_number.randint(20, height // 2)
        color = draw_number.choice(colors)
        match draw_number.randrange(4):
            case 0:
                canvas.ellipse((left, top, right, bottom), color, "black", 3)
            case 1:
                canvas.rectangle((left, top, right, bottom), color, "black", 3)
            case 2:
                canvas.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], color, "black")
            case _:
                canvas.line((left, top, right, bottom), color, 8)
    return picture


def validation(folder: Path, count: int, seed: int = 0) -> list[Item]:
    """Pairs of the validation split, each with captions of three other groups."""
    from mobilemm.data.pairs import read_pairs

    pairs = read_pairs(folder, "validation")
    draw = random.Random(seed)
    items = []
    for pair in draw.sample(pairs, min(count, len(pairs))):
        others = sorted({other.caption for other in pairs if other.group != pair.group} - {pair.caption})
        choices = [pair.caption, *draw.sample(others, CHOICES - 1)]
        draw.shuffle(choices)
        items.append(Item(folder / pair.image, QUESTION, tuple(choices), choices.index(pair.caption)))
    return items


class PyTorch(ModelScorer):
    """The checkpoint in fp32: transformers' `generate`."""

    def __init__(self, source: str | None = None) -> None:
        import torch

        import mobilemm

        self.torch = torch
        super().__init__(*mobilemm.load(source, dtype="float32"))

    def _inputs(self, picture: Picture) -> Any:
        content: list[dict[str, Any]] = [
            {"type": "image", "image": picture if isinstance(picture, Image.Image) else str(picture)},
            {"type": "text", "text": QUESTION},
        ]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )

    def margin(self, picture: Picture, own: list[int], other: list[int]) -> float:
        """By how many nats the own answer's token is likelier, where the two first differ."""
        end = self.model.generation_config.eos_token_id
        stop = end[0] if isinstance(end, list) else end
        pairs = enumerate(zip([*own, stop], [*other, stop], strict=False))
        place, (wanted, found) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        inputs = self._inputs(picture)
        begun = self.torch.tensor([own[:place]], dtype=self.torch.long)
        for name, filling in (("input_ids", begun), ("attention_mask", self.torch.ones_like(begun))):
            inputs[name] = self.torch.cat([inputs[name], filling], 1)
        with self.torch.inference_mode():
            logits = self.model(**inputs).logits[0, -1].float()
        return float(logits[wanted] - logits[found])

    def answer_ids(self, picture: Picture) -> list[int]:
        """Of the greedy answer, without the end token."""
        inputs = self._inputs(picture)
        with self.torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found = ids[0, inputs["input_ids"].shape[1] :].tolist()
        end = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        return found[:-1] if found and found[-1] in ends else found


class Bundle(BundleScorer):
    """A bundle through the runtime that `mobilemm run` has."""

    def answer_ids(self, picture: Picture) -> list[int]:
        """Of the greedy answer, without the end token."""
        self.answer(picture, QUESTION, NEW_TOKENS)
        return list(self.session.answer_ids)


def main() -> None:
    """Reads the command line; prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--model", help="checkpoint that they were made from; left out, the default model")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--pairs", type=Path, help="folder of scripts/fetch_pairs.py")
    parser.add_argument("--items", type=int, default=200, help="of the validation pairs")
    given = parser.parse_args()
    systems = {str(folder): Bundle(folder) for folder in given.bundles}
    pytorch = PyTorch(given.model)

    shown = pictures(given.pictures)
    wanted = {name: pytorch.answer_ids(picture) for name, picture in shown.items()}
    for label, system in systems.items():
        answers = {name: system.answer_ids(picture) for name, picture in shown.items()}
        same = sum(answers[name] == wanted[name] for name in shown)
        print(f"{label}: {same} of {len(shown)} answers have the same tokens as PyTorch's", flush=True)
        decode = system.session.tokenizer.decode
        others = [name for name in shown if answers[name] != wanted[name]]
        for name in others:
            margin = pytorch.margin(shown[name], wanted[name], answers[name])
            print(f"  {name}: {decode(answers[name])!r}, PyTorch {decode(wanted[name])!r} by {margin:.3f}")

    tasks = {"held-out": read_task("multiple-choice")}
    if given.pairs is not None:
        tasks["validation"] = validation(given.pairs, given.items)
    for task, items in tasks.items():
        reference = [_losses(pytorch, item) for item in items]
        print(f"{task}, right caption among {CHOICES}: PyTorch {_right(items, reference)}", flush=True)
        for label, system in systems.items():
            losses = [_losses(system, item) for item in items]
            furthest = np.abs(np.array(losses) - np.array(reference)).max()
            print(
                f"  {label}: {_right(items, losses)}; loss per token at most {furthest:.2g} off", flush=True
            )


def _losses(system: PyTorch | Bundle, item: Item) -> list[float]:
    assert item.picture is not None
    return system.losses(item.picture, item.question, item.choices)


def _right(items: Sequence[Item], losses: Sequence[Sequence[float]]) -> str:
    right = sum(int(np.argmin(row)) == item.answer for item, row in zip(items, losses, strict=True))
    return f"{right} of {len(items)} ({100 * right / len(items):.1f} %)"


if __name__ == "__main__":
    main()
