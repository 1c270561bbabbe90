"""The README.md that travels in a bundle: what it is, its parts, how they were checked, how to run it."""

from __future__ import annotations

import json
import re

from mobilemm.runtime.manifest import Manifest, Part

RUN = {
    "onnx": "mobilemm run FOLDER --image picture.jpg --prompt 'What is this?'",
    "coreml": "mobilemm verify FOLDER",
    "executorch": "mobilemm verify FOLDER",
}

LICENSE = "LICENSE"
OTHER = "other"
"""A model hub's word for a licence that it has no identifier of."""


def model_card(manifest: Manifest) -> str:
    """Markdown with the front matter that model hubs read; every figure is the manifest's."""
    model, image = manifest.model, manifest.image
    name = _plain(model.name)
    total = sum(file.bytes for file in manifest.files)
    pictures = (
        f"Pictures are {image.width} × {image.height} px and take {model.num_image_tokens} tokens each."
        if image is not None
        else "It takes no pictures."
    )
    lines = [
        "---",
        f"license: {_license(model.license)}",
        "library_name: mobilemm",
        f"pipeline_tag: {'image-text-to-text' if image is not None else 'text-generation'}",
        "---",
        "",
        f"# {name} for {manifest.target}",
        "",
        f"A {_plain(model.family)} model, {model.num_layers} layers of width {model.hidden_size},"
        f" {model.context_length:,} tokens of context, as a mobilemm bundle (format version"
        f" {manifest.schema_version}): {total / 1e6:,.1f} MB in {len(manifest.parts)} parts.",
        pictures,
        "",
        "| part | bits | MB | parameters | parity with fp32 PyTorch |",
        "|---|---|---|---|---|",
    ]
    for part_name, part in manifest.parts.items():
        lines.append(
            f"| {_plain(part_name)} | {_bits(part)} | {part.bytes / 1e6:,.1f} | {part.parameters:,} |"
            f" {_parity(part)} |"
        )
    lines += [
        "",
        "## Run it",
        "",
        f"Needs {_plain(manifest.runtime.name)} {_plain(manifest.runtime.min_version)} or later.",
        "",
        "```",
        f"pip install 'mobilemm[{manifest.target}]'",
        RUN[manifest.target],
        "```",
        "",
        "`manifest.json` says everything that an app must know: the parts' inputs and outputs, how a picture"
        " becomes pixels, how a conversation is written, and the size and SHA-256 of every file.",
    ]
    if manifest.golden:
        lines += ["", "`golden/` holds inputs and expected outputs, by which an app checks itself."]
    license = model.license.strip() or "Not stated."
    if license == OTHER and any(file.path == LICENSE for file in manifest.files):
        license = f"See the file `{LICENSE}`."
    lines += ["", "## Licence", "", license, ""]
    return "\n".join(lines)


def _bits(part: Part) -> str:
    stored = part.quantization
    block = f", block {stored.block_size}" if stored.block_size else ""
    exceptions = sorted(set(stored.exceptions.values()) - {stored.bits})
    others = f", some {'/'.join(map(str, exceptions))}" if exceptions else ""
    return f"{stored.bits}{block}{others}"


def _parity(part: Part) -> str:
    if part.parity is None:
        return "not measured"
    figures = [f"{part.parity.snr_db:.1f} dB", f"cosine {part.parity.cosine:.5f}"]
    if part.parity.top1 is not None:
        figures.append(f"top-1 {part.parity.top1:.1%}")
    if part.parity.kl is not None:
        figures.append(f"KL {part.parity.kl:.4f}")
    return ", ".join(figures)


def _license(text: str) -> str:
    """A licence's identifier, or "other" for what the hub does not take for one."""
    found = text.strip().lower()
    return json.dumps(found) if re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,40}", found) else OTHER


def _plain(text: str) -> str:
    """A name as Markdown text: on one line, and without what would make a link, a table or HTML of it."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))
