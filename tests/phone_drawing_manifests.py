"""Manifests of bundles that draw, whole and with one fault each, and Python's verdict on them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from mobilemm.errors import MobileMMError
from mobilemm.runtime.manifest_check import parse_manifest
from tests.phone_tokenizers import save

# Where in a manifest, and what stands there instead; None: nothing at all.
Change = tuple[tuple[str | int, ...], Any]
NULL = object()
INSTEAD = "-123456789"
"""A number that is written otherwise than `json` writes any."""


def write_drawing_manifests(folder: Path) -> None:
    """By the tiny bundle's manifest, which lies in `folder` already.

    Each case has the key that Python names, or none; `refused` also where the text is no JSON.
    """
    tiny = json.loads((folder / "tiny-onnx" / "manifest.json").read_text(encoding="utf-8"))
    one, steps = drawing_manifest(tiny), stepwise_manifest(tiny)
    texts = [json.dumps(changed(one, change)) for change in faults(one)]
    texts += [json.dumps(changed(steps, change)) for change in stepwise_faults(steps)]
    scale = ("generation", "schedules", 0, 0, 1)
    raw = json.dumps(changed(steps, (scale, int(INSTEAD))))
    texts += [raw.replace(INSTEAD, number) for number in NUMBERS]
    assert INSTEAD in raw
    (folder / "drawing_manifests").mkdir()
    cases = []
    for index, text in enumerate(texts):
        file = f"drawing_manifests/{index}.json"
        (folder / file).write_text(text, encoding="utf-8")
        told = ""
        try:
            parse_manifest(text.encode(), Path("manifest.json"))
        except MobileMMError as error:
            told = str(error)
            assert "\n" not in told
        found = re.search(r"key '([^']*)'", told)
        cases.append({"file": file, "key": found[1] if found else None, "refused": bool(told)})
    assert sum(case["refused"] for case in cases) >= 95
    assert sum(not case["refused"] for case in cases) >= 10
    assert sum(case["refused"] and case["key"] is None for case in cases) == len(NO_JSON) + 1
    save(folder / "drawing_manifests.json", cases)


def changed(manifest: dict[str, Any], change: Change) -> dict[str, Any]:
    path, value = change
    content = json.loads(json.dumps(manifest))  # of what is shared, each a copy
    place: Any = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = None if value is NULL else value
    return content


def tensor(name: str, *shape: int | str) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": list(shape)}


def drawing_manifest(tiny: dict[str, Any]) -> dict[str, Any]:
    """Draws in one graph."""
    parts = {
        "output_projector": ([tensor("signal_logits", 1, 2, 16)], [tensor("condition", 1, 3, 8)]),
        "generator": (
            [tensor("condition", 1, 3, 8), tensor("noise", 1, 2, 4, 8, 8)],
            [tensor("picture", 1, 3, 16, 24)],
        ),
    }
    noise = {"rule": "philox4x32-10-box-muller", "shape": [1, 2, 4, 8, 8]}
    return with_drawing(tiny, parts, {"steps": 2, "noise": noise})


# A step that renews the noise, and the last one, which does not.
RENEWS, LAST = [999.0, 1.0, 0.5, -0.25, 0.125], [249, 1.0, 0.9, -0.4, 0.0]


def stepwise_manifest(tiny: dict[str, Any]) -> dict[str, Any]:
    """Draws step by step, in one or two steps."""
    latents = (1, 4, 8, 8)
    parts = {
        "output_projector": ([tensor("signal_logits", 1, 2, 16)], [tensor("condition", 1, 3, 8)]),
        "denoiser": (
            [
                tensor("latents", *latents),
                tensor("condition", 1, 3, 8),
                tensor("noise", *latents),
                tensor("scales", 5),
            ],
            [tensor("next_latents", *latents)],
        ),
        "image_decoder": ([tensor("latents", *latents)], [tensor("picture", 1, 3, 16, 24)]),
    }
    noise = {"rule": "philox4x32-10-box-muller", "shape": [1, 2, 4, 8, 8]}
    schedules = [[LAST], [RENEWS, LAST]]
    return with_drawing(tiny, parts, {"steps": 2, "noise": noise, "schedules": schedules})


def with_drawing(tiny: dict[str, Any], parts: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    manifest = copy.deepcopy(tiny)
    vocabulary = manifest["model"]["vocab_size"]
    for name, (inputs, outputs) in parts.items():
        manifest["parts"][name] = {**manifest["parts"]["vision"], "inputs": inputs, "outputs": outputs}
    signals = [vocabulary - 3, vocabulary - 2]
    manifest["generation"] = {"signal_token_ids": signals, "height": 16, "width": 24, **generation}
    return manifest


def faults(good: dict[str, Any]) -> list[Change]:
    """The first three are none."""
    vocabulary = good["model"]["vocab_size"]
    signals = good["generation"]["signal_token_ids"]
    projector, generator = ("parts", "output_projector"), ("parts", "generator")
    return [
        (("model", "name"), "draws"),
        (("generation",), None),
        (("parts", "upscaler"), good["parts"]["vision"]),
        (("generation",), []),
        (("generation", "signal_token_ids"), [signals[0], signals[0] + 2]),
        (("generation", "signal_token_ids"), signals[::-1]),
        (("generation", "signal_token_ids"), [vocabulary - 1, vocabulary]),
        (("generation", "signal_token_ids"), []),
        (("generation", "signal_token_ids"), [2**31]),
        (("generation", "signal_token_ids"), signals[:1]),
        (("generation", "signal_token_ids"), [*range(65)]),
        (("generation", "height"), 17),
        (("generation", "width"), 0),
        (("generation", "steps"), 2**20 + 1),
        (("generation", "steps"), 2.0),
        (("generation", "more"), 1),
        (("generation", "noise"), None),
        (("generation", "noise", "rule"), "dice"),
        (("generation", "noise", "more"), 1),
        (("generation", "noise", "shape"), []),
        (("generation", "noise", "shape"), [1, 2, 4, 8]),
        (("generation", "noise", "shape"), [1, 2, 4, 8, 0]),
        (("generation", "noise", "shape"), [1, 2, 4, 9, 8]),
        (("generation", "noise", "shape"), [1, 1, 4, 8192, 8192]),
        (("generation", "noise", "shape"), [2**20] * 8),
        (("generation", "noise", "shape"), [1] * 9),
        (projector, None),
        (generator, None),
        ((*projector, "inputs"), [tensor("logits", 1, 2, 16)]),
        ((*projector, "inputs", 0, "shape"), [1, 2, "words"]),
        ((*projector, "inputs", 0, "shape"), [1, 2, vocabulary + 1]),
        ((*projector, "inputs", 0, "shape"), [1, 3, 16]),
        ((*projector, "inputs", 0, "shape"), []),
        ((*projector, "inputs", 0, "dtype"), "int64"),
        ((*projector, "outputs"), [tensor("conditions", 1, 3, 8)]),
        ((*projector, "outputs", 0, "shape"), [1, "tokens", 8]),
        ((*projector, "outputs", 0, "shape"), [1, 4, 8]),
        ((*projector, "inputs"), [tensor("more", "words"), tensor("signal_logits", 1, 2, 16)]),
        ((*projector, "inputs"), [tensor("signal_logits", 1, 2, size) for size in ("words", 16)]),
        ((*projector, "inputs", 0, "shape"), ["batch", 2, 16]),
        ((*projector, "outputs"), [tensor("more", 1), tensor("condition", 1, 3, 8)]),
        (("parts", "denoiser"), good["parts"]["generator"]),
        (("parts", "image_decoder"), good["parts"]["generator"]),
        (("generation", "schedules"), [[LAST], [RENEWS, LAST]]),
        ((*generator, "inputs"), [tensor("condition", 1, 3, 8)]),
        ((*generator, "inputs", 0, "shape"), [1, 3, 9]),
        ((*generator, "inputs", 1, "dtype"), "uint8"),
        ((*generator, "outputs"), [tensor("image", 1, 3, 16, 24)]),
        ((*generator, "outputs", 0, "shape"), [1, 3, 24, 16]),
        ((*generator, "outputs", 0, "shape"), [1, 3, 16]),
    ]


def stepwise_faults(good: dict[str, Any]) -> list[Change]:
    """Two readable ones first."""
    generation, denoiser, decoder = ("generation",), ("parts", "denoiser"), ("parts", "image_decoder")
    schedules, shape = (*generation, "schedules"), (*generation, "noise", "shape")
    inputs = good["parts"]["denoiser"]["inputs"]
    # In float32 the one is 0, the other the least number above.
    nothing, least = [*LAST[:4], 1e-50], [*LAST[:4], 7.1e-46]
    return [
        (("model", "name"), "draws"),
        (("parts", "upscaler"), good["parts"]["vision"]),
        (schedules, None),
        (schedules, NULL),
        (schedules, "no"),
        (schedules, {}),
        (schedules, []),
        (schedules, [[]]),
        (schedules, [[LAST]]),
        (schedules, [[RENEWS, LAST]] * 2),
        (schedules, [[RENEWS] * count for count in range(1, 52)]),
        (schedules, [[RENEWS, LAST], [LAST] * 51]),
        (schedules, [[RENEWS, LAST], [RENEWS] * 5000]),
        (schedules, [[RENEWS, LAST], [LAST], []]),
        (schedules, [[RENEWS, LAST], [LAST] * 50]),
        (schedules, [LAST, RENEWS]),
        (schedules, [[RENEWS, RENEWS], [LAST]]),
        (schedules, [[RENEWS, nothing], [LAST]]),
        (schedules, [[RENEWS, least], [LAST]]),
        (schedules, [[LAST, nothing], [LAST]]),
        ((*schedules, 1, 0), RENEWS[:4]),
        ((*schedules, 1, 0), [*RENEWS, 0.0]),
        ((*schedules, 1, 0), []),
        ((*schedules, 1, 0), {}),
        ((*schedules, 1, 0), NULL),
        ((*schedules, 1, 1, 2), "0.5"),
        ((*schedules, 1, 1, 2), True),
        ((*schedules, 1, 1, 2), NULL),
        ((*schedules, 1, 1, 2), [0.5]),
        ((*generation, "schedule"), [[LAST]]),
        ((*generation, "steps"), 1),
        ((*generation, "steps"), 3),
        ((*generation, "steps"), 1000),
        ((*generation, "steps"), 0),
        (shape, [1, 1, 4, 8, 8]),
        (shape, [1, 3, 4, 8, 8]),
        (shape, [2, 2, 4, 8, 8]),
        (shape, [1, 2, 4, 64]),
        (shape, [2]),
        (shape, [1, 2, 4, 8, 9]),
        (shape, [1, 2, 4, 8192, 8192]),
        # One of two steps would fit; the other takes noise that none of the shape's numbers tells.
        (
            generation,
            {
                **good["generation"],
                "noise": {**good["generation"]["noise"], "shape": [1, 2, 4, 1024, 1024]},
                "schedules": [[RENEWS, LAST], [RENEWS] * 50],
            },
        ),
        (denoiser, None),
        (decoder, None),
        (("parts", "output_projector"), None),
        (("parts", "generator"), good["parts"]["denoiser"]),
        (("golden", 0, "part"), "denoizer"),
        *(((*denoiser, "inputs"), [*inputs[:index], *inputs[index + 1 :]]) for index in range(4)),
        ((*denoiser, "inputs"), [*inputs, tensor("timestep", 1)]),
        ((*denoiser, "inputs"), [*inputs, inputs[0]]),
        ((*denoiser, "inputs"), inputs[::-1]),
        ((*denoiser, "inputs", 0, "dtype"), "int32"),
        ((*denoiser, "inputs", 0, "dtype"), "float64"),
        ((*denoiser, "inputs", 0, "dtype"), "float16"),
        ((*denoiser, "inputs", 0, "shape"), [1, 4, 8, 9]),
        ((*denoiser, "inputs", 0, "shape"), [2, 4, 8, 8]),
        ((*denoiser, "inputs", 0, "shape"), [4, 8, 8]),
        ((*denoiser, "inputs", 1, "shape"), [1, 4, 8]),
        ((*denoiser, "inputs", 2, "shape"), [1, 2, 4, 8, 8]),
        ((*denoiser, "inputs", 3, "shape"), [4]),
        ((*denoiser, "inputs", 3, "shape"), [1, 5]),
        ((*denoiser, "inputs", 3, "dtype"), "int64"),
        ((*denoiser, "outputs", 0, "name"), "latents"),
        ((*denoiser, "outputs", 0, "shape"), [1, 4, 16, 16]),
        ((*denoiser, "outputs", 0, "dtype"), "uint8"),
        ((*denoiser, "outputs"), [tensor("more", 1), *good["parts"]["denoiser"]["outputs"]]),
        ((*decoder, "inputs", 0, "name"), "next_latents"),
        ((*decoder, "inputs", 0, "shape"), [1, 4, 8]),
        ((*decoder, "inputs", 0, "dtype"), "int8"),
        ((*decoder, "outputs", 0, "name"), "image"),
        ((*decoder, "outputs", 0, "shape"), [1, 3, 24, 16]),
        ((*decoder, "outputs", 0, "shape"), [1, 16, 24, 3]),
        ((*decoder, "outputs", 0, "dtype"), "uint8"),
    ]


NO_JSON = ("NaN", "-NaN", "nan", "Infinity", "-Infinity", "1e999", "-1e999", ".5", "1.", "0x1p3", "1e")
# As a scale; the first ones are read.
NUMBERS = (
    *("1e9", "-1000000000", "5", "-0.0", "1e-400"),
    *("1000000001", "-1.0000001e9", "1e39", "1.7976931348623157e308", "1" + "0" * 400, "1" + "0" * 5000),
    *NO_JSON,
)
