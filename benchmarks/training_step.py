"""A step of `mobilemm train` beside the same step of transformers' LLaVA in a plain loop.

    python -m benchmarks.training_step [--size tiny|default] [--steps 10] [--rounds 3]

One architecture and one set of random weights: CLIP, a two-layer MLP, LLaMA (`default`: SmolLM2-135M's
shape); AdamW over projector and language model, the encoder frozen, the same samples a step. Of ours the
whole command is timed, pictures read too, for so many steps and for twice as many: the difference is the
steps' time. Rounds alternate; medians and ratios are printed, also for the frozen encoder's features kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaForConditionalGeneration

import mobilemm
from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.checkpoints import save
from mobilemm.models.checkpoints.parts import make_processor
from mobilemm.training.recipe import Recipe
from mobilemm.training.stage import train
from tests.export.tiny_checkpoint import write_checkpoint

RATE = 1e-4
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "image_size": 32},
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 352},
        "heads": (4, 4, 4),
    },
    "default": {
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "image_size": 224},
        "text": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        "heads": (6, 9, 3),
    },
}


def write_models(size: str, folder: Path) -> tuple[Path, Path]:
    """The same random weights in our layout and in llava-hf's."""
    tokenizer = mobilemm.load(write_checkpoint(folder / "words")).processor.tokenizer
    shape = SIZES[size]
    vision_heads, heads, key_value_heads = shape["heads"]
    patch = 8 if size == "tiny" else 32
    torch.manual_seed(0)
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(**shape["vision"], num_attention_heads=vision_heads, patch_size=patch),
        text_config=LlamaConfig(
            **shape["text"], num_attention_heads=heads, num_key_value_heads=key_value_heads, pad_token_id=0
        ),
        projector={"type": "mlp2x_gelu"},
        image_token_id=351,
        template="v1",
    )
    model = MobileMMForConditionalGeneration(config)
    processor = make_processor(model, tokenizer, [0.5] * 3, [0.5] * 3)
    return (
        save(model, folder / "ours", processor),
        save(model, folder / "llava", layout="llava-hf"),
    )


def write_data(folder: Path, count: int = 32) -> Path:
    """Pictures with captions of one length."""
    folder.mkdir()
    for index in range(count):
        Image.new("RGB", (64, 64), (index * 7, 90, 200 - index * 5)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("this is a picture", encoding="utf-8")
    return folder


def time_ours(model: Path, data: Path, work: Path, steps: int, batch: int, keep: bool, part: str) -> float:
    """Seconds a step."""
    seconds = []
    for count in (steps, 2 * steps):
        with tempfile.TemporaryDirectory(dir=work) as output:
            parts = {"projector": RATE} | ({"language_model": RATE} if part == "both" else {})
            recipe = Recipe.model_validate(
                {
                    "model": str(model),
                    "output": output,
                    "data": [{"format": "folder", "path": data, "questions": ["What is in this picture"]}],
                    "train": parts,
                    "cache_features": keep,
                    "batch_size": batch,
                    "max_steps": count,
                    "save_every": 10_000,
                    "log_every": 10_000,
                    "show_samples": 0,
                    "report_to": [],
                }
            )
            begun = time.perf_counter()
            train(recipe, lambda line: None)
            seconds.append(time.perf_counter() - begun)
    return (seconds[1] - seconds[0]) / steps


def time_llava(folder: Path, ours: Path, data: Path, steps: int, batch: int) -> float:
    """Seconds a step of forward, backward, clipping and AdamW, its batch ready before."""
    _, processor = mobilemm.load(ours)
    pictures = [Image.open(path) for path in sorted(data.glob("*.png"))[:batch]]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture"}]},
        {"role": "assistant", "content": "this is a picture"},
    ]
    ids, labels = processor.encode_for_training(messages)
    inputs = {
        "input_ids": torch.tensor([ids] * batch),
        "attention_mask": torch.ones(batch, len(ids), dtype=torch.long),
        "labels": torch.tensor([labels] * batch),
        "pixel_values": processor.image_processor(pictures, return_tensors="pt")["pixel_values"],
    }
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    model.model.vision_tower.requires_grad_(False)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=RATE, fused=True)
    seconds = []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    return statistics.mean(seconds[1:])


def main() -> None:
    """Reads the command line; prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        ours, llava = write_models(given.size, work)
        data = write_data(work / "data")
        found: dict[str, list[float]] = {}
        for _ in range(given.rounds):
            times = {
                "mobilemm": time_ours(ours, data, work, given.steps, given.batch, False, "both"),
                "llava": time_llava(llava, ours, data, given.steps, given.batch),
                "projector alone": time_ours(ours, data, work, given.steps, given.batch, False, "one"),
                "with kept features": time_ours(ours, data, work, given.steps, given.batch, True, "one"),
            }
            for name, seconds in times.items():
                found.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    print(json.dumps({name: round(seconds, 5) for name, seconds in medians.items()}))
    print(f"mobilemm's step takes {medians['mobilemm'] / medians['llava']:.2f} of LLaVA's in a plain loop")
    print(f"kept features: {medians['projector alone'] / medians['with kept features']:.2f} times as fast")


if __name__ == "__main__":
    main()
