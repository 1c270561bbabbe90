"""Writing a model back in the layout of the project that it came from."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import LlavaProcessor

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.layouts import LAYOUTS
from mobilemm.models.checkpoints.reading import GENERATOR
from mobilemm.models.configuration import MobileMMConfig
from mobilemm.models.modeling import MobileMMForConditionalGeneration


def save(
    model: MobileMMForConditionalGeneration,
    folder: str | Path,
    processor: Any = None,
    *,
    layout: str | None = None,
    max_shard_size: str = "5GB",
    generator: Path | None = None,
) -> Path:
    """Writes `model` into a new folder, as "mobilevlm", "llava", "llava-hf" or "mobilemm".

    Without `layout` it is the one that the model was read from. The official code and llama.cpp read what is
    written. A tower that the checkpoint only named is not written either, but for llava-hf, which holds its
    own. `generator` is a folder of what a model that draws draws with, of which a copy goes along. The
    folder appears when it is whole.

    Raises MobileMMError when the folder exists, or when the layout cannot hold this model.
    """
    target = Path(folder)
    name = layout or model.config.checkpoint_layout or "mobilemm"
    if name not in LAYOUTS:
        raise MobileMMError(f"unknown layout {name!r}; known: {', '.join(LAYOUTS)}")
    if model.config.signal_token_ids and name != "mobilemm":
        raise MobileMMError(
            f"layout {name!r} has no place for what draws in this model; write it as 'mobilemm'"
        )
    if target.exists():
        raise MobileMMError(f"{target}: it is there already; give a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if name == "mobilemm":
            model.save_pretrained(writing)
        else:
            foreign = LAYOUTS[name].to_foreign_config(model.config)
            (writing / "config.json").write_text(json.dumps(foreign, indent=2) + "\n", encoding="utf-8")
            save_torch_state_dict(
                _foreign_state(model, name), writing, max_shard_size=max_shard_size, metadata={"format": "pt"}
            )
        if processor is not None:
            _save_processor(processor, writing, name, model.config)
        if generator is not None:
            shutil.copytree(generator, writing / GENERATOR)
        writing.chmod(0o755)
        writing.rename(target)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    return target


def _foreign_state(model: MobileMMForConditionalGeneration, layout: str) -> dict[str, Any]:
    config = model.config
    tied = set(model.all_tied_weights_keys)
    with_tower = config.vision_tower_stored or layout == "llava-hf"  # which cannot name a tower elsewhere
    return {
        LAYOUTS[layout].foreign_name(name, config): tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied and (with_tower or not name.startswith("vision_encoder."))
    }


def _save_processor(processor: Any, folder: Path, layout: str, config: MobileMMConfig) -> None:
    tokenizer = processor.tokenizer
    tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    if layout == "mobilemm":
        processor.save_pretrained(folder)
    elif layout == "llava-hf":
        LlavaProcessor(
            processor.image_processor,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,  # the class token
            chat_template=processor.chat_template,
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
        ).save_pretrained(folder)
    model = Path(str(getattr(tokenizer, "vocab_file", None) or ""))
    if model.suffix != ".model" or not model.is_file():
        return
    shutil.copyfile(model, folder / "tokenizer.model")
    if layout in ("mobilevlm", "llava") and len(tokenizer) == tokenizer.vocab_size:
        # The official code and llama.cpp read LLaMA's tokenizer from its SentencePiece model alone.
        (folder / "tokenizer.json").unlink()
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": tokenizer.init_kwargs.get("legacy", True),
            "add_bos_token": True,
            "add_eos_token": False,
            **{name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "clean_up_tokenization_spaces": False,
            "model_max_length": tokenizer.model_max_length,
            "padding_side": tokenizer.padding_side,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
