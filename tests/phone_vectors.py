"""What both apps' tests compare with, by the Python package; `make test-android`, `make test-ios` write it.

    python -m tests.phone_vectors BUNDLE FOLDER

Ids and streamed texts of generated strings by Hugging Face's tokenizers, pixels by Pillow, sampled tokens,
manifests that are read or refused, damaged bundles, and what a bundle answers about pictures.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.answers import pictures
from mobilemm.errors import MobileMMError
from mobilemm.export.bundle import BundleWriter
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.manifest import Image as ImageRule
from mobilemm.runtime.manifest import Prompt, Turn
from mobilemm.runtime.manifest_check import parse_manifest
from mobilemm.runtime.noise import normal
from mobilemm.runtime.prompt import render, with_marks
from mobilemm.runtime.sampling import Sampler, Sampling
from mobilemm.runtime.session import Session, rope_positions
from tests.ios.drawing import write_drawings
from tests.phone_drawing_manifests import write_drawing_manifests
from tests.phone_tokenizers import save, write_tokenizers
from tests.runtime.test_hostile_bundles import DAMAGES
from tests.runtime.tiny_bundle import tiny_manifest, write_parts

QUESTIONS, DAMAGED = 50, 1000


# --- pictures ---------------------------------------------------------------------------------------------


def write_images(folder: Path) -> None:
    """Raw pixels in and out: decoding is the platform's."""
    (folder / "images").mkdir()
    draw = np.random.default_rng(0)
    rules = [
        {"strategy": "pad", "filter": "bicubic", "pad_color": (127, 127, 127)},
        {"strategy": "pad", "filter": "bilinear", "pad_color": (0, 255, 3)},
        {"strategy": "stretch", "filter": "lanczos"},
        {"strategy": "stretch", "filter": "bicubic"},
        {"strategy": "stretch", "filter": "nearest"},
        {"strategy": "pad", "filter": "nearest", "pad_color": (1, 2, 3)},
        {"strategy": "crop", "filter": "bicubic", "shortest_edge": 60},
        {"strategy": "crop", "filter": "bilinear", "shortest_edge": 48},
    ]
    sizes = [(1, 1), (48, 48), (64, 48), (640, 480), (333, 217), (7, 300), (31, 64), (1280, 961)]
    cases = []
    for number, (width, height) in enumerate(sizes):
        pixels = draw.integers(0, 256, (height, width, 4), np.uint8)
        if number % 2:
            pixels[..., 3] = 255
        else:
            pixels[: height // 2, :, 3] = draw.choice([0, 255], (height // 2, width))
        (folder / "images" / f"{number}.rgba").write_bytes(pixels.tobytes())
        for index, options in enumerate(rules):
            rule = ImageRule(height=48, width=56 if index % 2 else 48, **options)
            name = f"{number}-{index}.pixels"
            (folder / "images" / name).write_bytes(to_pixels(Image.fromarray(pixels), rule).tobytes())
            cases.append(
                {"width": width, "height": height, "rgba": f"{number}.rgba", "pixels": name}
                | {"rule": rule.model_dump(mode="json")}
            )
    save(folder / "images.json", cases)
    turned = []
    picture = Image.fromarray(draw.integers(0, 256, (24, 40, 3), np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(folder / "images" / f"turned-{orientation}.jpg", exif=exif, quality=95)
        turned.append({"file": f"turned-{orientation}.jpg", "orientation": orientation})
    # Python's own decoder's pixels, upright, of the last; the others are the same picture turned.
    upright = {}
    from mobilemm.data.images import open_image

    raw = np.asarray(Image.open(folder / "images" / "turned-1.jpg").convert("RGB"))
    (folder / "images" / "turned.rgb").write_bytes(raw.tobytes())
    for case in turned:
        right = np.asarray(open_image(folder / "images" / case["file"]))
        name = f"upright-{case['orientation']}.rgb"
        (folder / "images" / name).write_bytes(right.tobytes())
        upright[str(case["orientation"])] = {"file": name, "width": right.shape[1], "height": right.shape[0]}
    save(folder / "orientations.json", {"width": 40, "height": 24, "turned": turned, "upright": upright})


# --- choices ----------------------------------------------------------------------------------------------


def write_sampling(folder: Path) -> None:
    draw = np.random.default_rng(0)
    vocabulary = 2000
    logits = draw.normal(0, 3, (8, vocabulary)).astype("<f4")
    logits[3, :50] = logits[3, 50]  # ties
    (folder / "logits.f32").write_bytes(logits.tobytes())
    settings = [
        Sampling(),
        Sampling(repetition_penalty=1.3),
        Sampling(temperature=0.7, seed=1),
        Sampling(temperature=1.0, top_k=40, seed=2),
        Sampling(temperature=1.3, top_p=0.9, seed=3),
        Sampling(temperature=0.9, min_p=0.05, seed=2**63 + 5),
        Sampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=-4),
    ]
    cases = []
    for sampling in settings:
        sampler, seen, tokens = Sampler(sampling), [5, 6, vocabulary + 1], []
        for step in range(40):
            token = sampler(logits[step % len(logits)], seen)
            seen.append(token)
            tokens.append(token)
        seed = None if sampling.seed is None else (sampling.seed + 2**63) % 2**64 - 2**63
        cases.append({**sampling.__dict__, "seed": seed, "tokens": tokens})
    save(folder / "sampling.json", {"vocabulary": vocabulary, "cases": cases})


def write_noise(folder: Path) -> None:
    """Normal numbers of some seeds, in shapes that do not end with a block."""
    cases = []
    for seed in (0, 7, 2**31 + 12345, 2**64 - 1):
        name = f"noise-{len(cases)}.f32"
        (folder / name).write_bytes(normal(seed, (3, 5, 1667)).astype("<f4").tobytes())
        # As a string: a seed may be larger than what JSON's readers hold exactly.
        cases.append({"seed": str(seed), "shape": [3, 5, 1667], "file": name})
    save(folder / "noise.json", cases)


# --- manifests and bundles --------------------------------------------------------------------------------


def write_damaged(folder: Path) -> None:
    """Bundles that Python refuses, each with one fault, and the whole one that they were made of."""
    with BundleWriter(folder / "tiny-onnx") as writer:
        write_parts(writer.folder)
        pristine = writer.finish(tiny_manifest()).folder
    total = sum(count for _, count in DAMAGES)
    cases = []
    for damage, count in DAMAGES:
        draw = random.Random(damage.__name__)
        for _ in range(max(1, round(count * DAMAGED / total))):
            name = f"{len(cases):04d}"
            target = folder / "damaged" / name / "tiny-onnx"
            shutil.copytree(pristine, target)
            told = damage(draw, target)
            cases.append({"folder": f"damaged/{name}/tiny-onnx", "damage": damage.__name__, "told": told})
    save(folder / "damaged.json", cases)


def write_json_texts(folder: Path) -> None:
    """Bytes of manifests and whether Python reads them as JSON objects that are manifests."""
    good = (folder / "tiny-onnx" / "manifest.json").read_text(encoding="utf-8")
    texts = [
        good.encode(),
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xef\xbb\xbf" + good.encode(),
        good.encode() + b" ",
        good.encode() + b"x",
        good.encode().replace(b'"tiny"', b'"\xff"', 1),
        good.replace('"tiny"', '"\\ud83d"', 1).encode(),
        good.replace('"tiny"', '"\\ud83d\\ude00"', 1).encode(),
        good.replace('"tiny"', '"a\tb"', 1).encode(),
        good.replace('"tiny"', '"' + "😀" * 200 + '"', 1).encode(),
        good.replace('"tiny"', '"' + "😀" * 201 + '"', 1).encode(),
        good.replace('"tiny"', '""', 1).encode(),
        good.replace("64", "64.0", 1).encode(),
        good.replace("64", "064", 1).encode(),
        good.replace("64", "6.4e1", 1).encode(),
        good.replace("0.99999", "NaN", 1).encode(),
        good.replace("0.99999", "1e999", 1).encode(),
        good.replace("0.99999", "1", 1).encode(),
        good.replace("0.99999", "true", 1).encode(),
        good.replace("0.99999", "-0.5E-3", 1).encode(),
        good.replace("0.99999", ".5", 1).encode(),
        good.replace('"schema_version": 1', '"schema_version": 2', 1).encode(),
        good.replace('"schema_version": 1', '"schema_version": ' + "9" * 5000, 1).encode(),
        b'{"a": ' + b"[" * 100000 + b"]" * 100000 + b"}",
        b'{"a": ' + b"[" * 60 + b"]" * 60 + b"}",
        good.encode()[:-3],
    ]
    cases = []
    (folder / "manifests").mkdir()
    for index, text in enumerate(texts):
        (folder / "manifests" / f"{index}.json").write_bytes(text)
        try:
            parse_manifest(text, Path("manifest.json"))
            read = True
        except MobileMMError:
            read = False
        cases.append({"file": f"{index}.json", "read": read})
    assert sum(case["read"] for case in cases) >= 5
    save(folder / "manifests.json", cases)


# --- prompts and conversations ----------------------------------------------------------------------------


def write_prompts(folder: Path) -> None:
    """Conversations rendered under rules of every kind."""
    cases = []
    turn = Turn(prefix="[U]", suffix="[/U]", prefix_before_image="[I]")
    for strip in ("none", "text", "content"):
        prompt = Prompt(
            begin="<begin>",
            system=Turn(prefix="[S]", suffix="[/S]"),
            user=turn,
            assistant=Turn(prefix="[A]", suffix="[/A]"),
            generation="[A]",
            later_user=Turn(prefix="[L]", suffix="[/L]"),
            user_after_system=Turn(prefix="[US]", suffix="[/US]", text=strip != "text"),
            image_prefix=" <i>",
            image_suffix="</i> \u00a0\n",
            strip=strip,
        )
        user: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "\u2003 what? \x1d\n"}]}
        seen = {
            "role": "user",
            "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": " b "}],
        }
        said = {"role": "assistant", "content": [{"type": "text", "text": " this "}]}
        system = {"role": "system", "content": [{"type": "text", "text": " be kind "}]}
        for messages in ([user], [seen], [system, user], [system, seen, said, user], [user, said, seen]):
            cases.append(
                {
                    "prompt": prompt.model_dump(mode="json"),
                    "messages": [
                        {
                            "role": message["role"],
                            "images": sum(part["type"] == "image" for part in message["content"]),
                            "text": message["content"][-1]["text"],
                        }
                        for message in messages
                    ],
                    "rendered": with_marks(render(prompt, messages)),
                }
            )
    ids = [1, 2, *[9] * 6, 3, *[9] * 6, *[9] * 6, 4]
    positions = rope_positions(ids, 9, (2, 3)).tolist()
    save(folder / "prompts.json", {"rendered": cases, "rope": {"ids": ids, "positions": positions}})


def write_answers(bundle: Path, folder: Path) -> None:
    """Greedy and seeded answers of the bundle, one of them over several turns."""
    (folder / "pictures").mkdir()
    opened = open_bundle(bundle)
    backend = open_backend(opened, 1)
    questions = [
        "What is in this picture?",
        "Describe the picture in one sentence.",
        "Which colours do you see?",
    ]
    cases = []
    for index, (name, picture) in enumerate(pictures(QUESTIONS).items()):
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        file = folder / "pictures" / f"{index}.png"
        image.save(file)
        session = Session(opened, backend, Sampling(max_new_tokens=24))
        session.look_at(file)
        question = questions[index % len(questions)]
        text = session.reply(question)
        cases.append(
            {"name": name, "image": file.name, "question": question, "ids": session.answer_ids, "text": text}
        )
    turns: list[dict[str, Any]] = []
    for sampling in (Sampling(20), Sampling(20, temperature=0.8, top_p=0.95, seed=7)):
        session = Session(opened, backend, sampling, system="You are a helpful painter. 😀")
        said = []
        for images, text in (
            ([0], "What is this?"),
            ([], "Why? Ünsinn…"),
            ([1, 2], "Compare these."),
            ([], "日本語?"),
        ):
            for image in images:
                session.look_at(folder / "pictures" / f"{image}.png")
            answer = session.reply(text)
            stats = session.stats
            assert stats is not None
            said.append(
                {
                    "images": [f"{image}.png" for image in images],
                    "text": text,
                    "ids": session.answer_ids,
                    "answer": answer,
                    "prompt_tokens": stats.prompt_tokens,
                    "cached_tokens": stats.cached_tokens,
                }
            )
        turns.append(
            {"system": session.system, "temperature": sampling.temperature, "top_p": sampling.top_p}
            | {"seed": sampling.seed, "turns": said}
        )
    save(folder / "answers.json", {"pictures": cases, "conversations": turns})


def write_default_drawings(bundle: Path, folder: Path) -> None:
    """What the bundle draws, where it is one that draws."""
    if open_bundle(bundle).manifest.generation is not None:
        (folder / "drawings").mkdir()
        write_drawings(bundle, folder / "drawings", "Draw a red apple.", 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    write_tokenizers(arguments.bundle, arguments.folder)
    write_images(arguments.folder)
    write_sampling(arguments.folder)
    write_noise(arguments.folder)
    write_prompts(arguments.folder)
    write_damaged(arguments.folder)
    write_json_texts(arguments.folder)
    write_drawing_manifests(arguments.folder)
    write_answers(arguments.bundle, arguments.folder)
    write_default_drawings(arguments.bundle, arguments.folder)
    print(f"vectors: {sum(1 for _ in arguments.folder.rglob('*'))} files in {arguments.folder}")


if __name__ == "__main__":
    main()
