"""Bundles of tiny models: their parts written by a target in full precision."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mobilemm.export.families import split_model
from mobilemm.export.parts import parts_of
from mobilemm.export.prompts import derive_prompt
from mobilemm.export.targets import find_target
from mobilemm.runtime.manifest import File, Manifest, ModelCard, Part, Quantization


def write_bundle(model: Any, processor: Any, folder: Path, to: str = "onnx", **options: Any) -> Path:
    """`folder` with manifest.json, parts and tokenizer; `to` names the target."""
    split = split_model(model, processor)
    folder.mkdir(parents=True)
    (folder / "parts").mkdir()
    target = find_target(to, **options)
    made, parts = parts_of(split), {}
    for name in ("vision", "decoder", "embed"):  # the embedding last, which may share the decoder's table
        module = made[name].module
        if made[name].weights:
            weights = {key: made[name].weights[key].float() for key, _ in module.named_parameters()}
            module.load_state_dict(weights, strict=False, assign=True)
        exported = target.write(made[name], module, folder / "parts")
        files = [f"parts/{file}" for file in exported.files]
        parts[name] = Part(
            file=f"parts/{exported.file}",
            files=files,
            inputs=list(exported.inputs),
            outputs=list(exported.outputs),
            quantization=Quantization(bits=32),
            bytes=sum((folder / file).stat().st_size for file in files),
            parameters=0,
            peak_memory=0,
            fingerprint="0" * 64,
            cache=exported.cache,
        )
    processor.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    text = split.text_config
    eos = model.generation_config.eos_token_id
    card = ModelCard(
        name="tiny",
        family=split.family,
        context_length=text.max_position_embeddings,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        num_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        num_image_tokens=split.num_image_tokens,
        image_token_id=split.image_token_id,
        bos_token_id=None,
        eos_token_ids=eos if isinstance(eos, list) else [eos],
        pad_token_id=0,
    )
    listed = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    manifest = Manifest(
        schema_version=1,
        created_by={"mobilemm": "test"},
        target=target.name,
        runtime=target.runtime,
        model=card,
        parts=parts,
        image=split.image,
        prompt=derive_prompt(split),
        golden=[],
        conversations=[],
        files=[
            File(
                path=path.relative_to(folder).as_posix(),
                bytes=path.stat().st_size,
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            )
            for path in listed
        ],
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    return folder
