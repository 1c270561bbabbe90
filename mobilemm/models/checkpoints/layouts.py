"""Other projects' checkpoint layouts: their config.json and tensor names against ours, both ways.

A layout gives a config of ours for one of theirs, names each of our tensors in its words, and writes its
config.json back. Reading, checking and writing the tensors is the same for all (`reading.py`, `writing.py`).
Sources: Meituan MobileVLM (`mobilevlm/model/`), LLaVA (`llava/model/llava_arch.py`), transformers' `llava`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.towers import Tower, find_tower
from mobilemm.models.configuration import MobileMMConfig

# model_type in an official config.json → transformers' type of the language model inside.
OFFICIAL_MODEL_TYPES = {
    "mobilevlm": "llama",
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
}
# Keys of the official projectors after `model.mm_projector.` ← ours after `projector.`
LDP_NAMES = {
    "mlp.0.": "model.mlp.1.",
    "mlp.2.": "model.mlp.3.",
    **{
        f"blocks.{ours}.{part}.": f"model.mb_block.{ours + 1}.block.{theirs}."
        for ours in (0, 1)
        for part, theirs in {
            "depthwise": "0.0",
            "depthwise_norm": "0.1",
            "squeeze_excitation.squeeze": "1.fc1",
            "squeeze_excitation.excite": "1.fc2",
            "pointwise": "2.0",
            "pointwise_norm": "2.1",
        }.items()
    },
}
LDPV2_NAMES = {"mlp.0.": "mlp.mlp.0.", "mlp.2.": "mlp.mlp.2.", "position.": "peg.peg.0."}
# Buffers that transformers used to save and now computes.
IGNORABLE = re.compile(r"(\.embeddings\.position_ids|\.rotary_emb\.inv_freq)$")


class Layout(Protocol):
    """How one project writes a checkpoint."""

    name: str

    def matches(self, foreign: dict[str, Any]) -> bool:
        """Whether this config.json is of this layout."""

    def to_config(self, foreign: dict[str, Any], folder: Path) -> tuple[MobileMMConfig, Tower]:
        """Our config for theirs, and the vision tower with its normalization."""

    def to_foreign_config(self, config: MobileMMConfig) -> dict[str, Any]:
        """Their config.json for our config; MobileMMError when the layout cannot express it."""

    def foreign_name(self, name: str, config: MobileMMConfig) -> str:
        """Their name of our tensor `name`."""

    def canonical(self, name: str) -> str:
        """The one spelling of a tensor's name in this layout, where versions differ."""


class OfficialLayout:
    """MobileVLM's and LLaVA's own: a flat LLaMA config with `mm_*` keys, a tensor `model.mm_projector.…`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def matches(self, foreign: dict[str, Any]) -> bool:
        is_mobilevlm = foreign.get("model_type") == "mobilevlm"
        return (
            foreign.get("model_type") in OFFICIAL_MODEL_TYPES
            and "text_config" not in foreign
            and is_mobilevlm == (self.name == "mobilevlm")
        )

    def to_config(self, foreign: dict[str, Any], folder: Path) -> tuple[MobileMMConfig, Tower]:
        path = folder / "config.json"
        for key in ("mm_vision_tower", "hidden_size", "vocab_size", "num_hidden_layers"):
            if foreign.get(key) is None:
                raise MobileMMError(f"{path}: key {key!r} is missing")
        tower = find_tower(str(foreign["mm_vision_tower"]), folder)
        text_class = CONFIG_MAPPING[OFFICIAL_MODEL_TYPES[foreign["model_type"]]]
        # The remaining keys are other projects' own (3B carries those of lit-gpt, which contradict these).
        known = set(text_class().to_dict()) | {"rope_theta", "rope_scaling"}
        text_keys = {key: value for key, value in foreign.items() if key in known and value is not None}
        for key in ("architectures", "model_type", "transformers_version", "_name_or_path", "dtype"):
            text_keys.pop(key, None)
        text = text_class(**text_keys)
        text.tie_word_embeddings = bool(foreign.get("tie_word_embeddings", False))
        return MobileMMConfig(
            vision_config=tower.config,
            text_config=text,
            vision_feature_layer=foreign.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy="default"
            if foreign.get("mm_vision_select_feature", "patch") == "patch"
            else "full",
            keep_unused_layers=True,
            projector={"type": foreign.get("mm_projector_type") or "linear"},
            template="v1",
            checkpoint_layout=self.name,
            checkpoint_config=foreign,
        ), tower

    def to_foreign_config(self, config: MobileMMConfig) -> dict[str, Any]:
        text = config.text_config.to_dict()
        vision = config.vision_config
        projector = dict(config.projector or {})
        kind = projector.pop("type")
        if vision.model_type != "clip_vision_model" and config.checkpoint_config is None:
            raise MobileMMError(f"the {self.name} layout holds CLIP towers, not {vision.model_type!r}")
        if projector or not (kind in ("linear", "ldpnet", "ldpnetv2") or re.fullmatch(r"mlp\d+x_gelu", kind)):
            raise MobileMMError(f"the {self.name} layout has no projector {config.projector}")
        foreign = dict(config.checkpoint_config or {})
        text_type = {value: key for key, value in reversed(OFFICIAL_MODEL_TYPES.items())}
        text_type["llama"] = "mobilevlm" if self.name == "mobilevlm" else "llava"
        if text["model_type"] not in text_type:
            raise MobileMMError(f"the {self.name} layout has no language model {text['model_type']!r}")
        written = {
            "model_type": foreign.get("model_type") or text_type[text["model_type"]],
            "architectures": foreign.get("architectures")
            or ["MobileLlamaForCausalLM" if self.name == "mobilevlm" else "LlavaLlamaForCausalLM"],
            "mm_projector_type": kind,
            "mm_vision_tower": _tower_id(vision, foreign.get("mm_vision_tower")),
            "mm_hidden_size": vision.hidden_size,
            "mm_vision_select_layer": config.vision_feature_layer,
            "mm_vision_select_feature": "patch"
            if config.vision_feature_select_strategy == "default"
            else "cls_patch",
            **{
                key: text[key]
                for key in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "hidden_act",
                    "max_position_embeddings",
                    "rms_norm_eps",
                    "bos_token_id",
                    "eos_token_id",
                    "pad_token_id",
                )
                if key in text
            },
            "tie_word_embeddings": config.text_config.tie_word_embeddings,
            "rope_theta": text.get("rope_parameters", {}).get("rope_theta", 10000.0),
        }
        if "rope_theta" not in foreign and written["rope_theta"] == 10000.0:
            del written["rope_theta"]  # the official files leave the default out
        fresh = {
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "image_aspect_ratio": "pad",
        }
        if self.name == "mobilevlm":
            fresh["vision_tower_type"] = "clip"
        return {**fresh, **foreign, **written}

    def foreign_name(self, name: str, config: MobileMMConfig) -> str:
        part, rest = name.split(".", 1)
        if part == "language_model":
            return rest
        if part == "vision_encoder":
            return "model.vision_tower.vision_tower.vision_model." + tower_name(rest, config)
        kind = (config.projector or {})["type"]
        for ours, theirs in {"ldpnet": LDP_NAMES, "ldpnetv2": LDPV2_NAMES}.get(kind, {}).items():
            if rest.startswith(ours):
                rest = theirs + rest[len(ours) :]
                break
        return f"model.mm_projector.{rest}"

    def canonical(self, name: str) -> str:
        return name


class LlavaHfLayout:
    """transformers' llava: `text_config` and `vision_config`; both the published and the v5 tensor names."""

    name = "llava-hf"

    def matches(self, foreign: dict[str, Any]) -> bool:
        return foreign.get("model_type") == "llava" and "text_config" in foreign

    def to_config(self, foreign: dict[str, Any], folder: Path) -> tuple[MobileMMConfig, Tower]:
        from transformers import LlavaConfig

        llava = LlavaConfig.from_dict(foreign)
        assert isinstance(llava.vision_config, PreTrainedConfig)
        if not isinstance(llava.vision_feature_layer, int):
            raise MobileMMError(
                f"{folder / 'config.json'}: vision_feature_layer {llava.vision_feature_layer}: several layers"
                " at once are not supported; give one"
            )
        if not llava.multimodal_projector_bias or llava.projector_hidden_act != "gelu":
            raise MobileMMError(
                f"{folder / 'config.json'}: only a projector with bias and 'gelu' is supported, not"
                f" {llava.projector_hidden_act!r} with bias {llava.multimodal_projector_bias}"
            )
        config = MobileMMConfig(
            vision_config=llava.vision_config,
            text_config=llava.text_config,
            vision_feature_layer=llava.vision_feature_layer,
            vision_feature_select_strategy=llava.vision_feature_select_strategy,
            keep_unused_layers=True,
            projector={"type": "mlp2x_gelu"},
            image_token_id=llava.image_token_index,
            template="v1",
            checkpoint_layout=self.name,
            checkpoint_config=foreign,
        )
        return config, Tower(llava.vision_config, [], [])

    def to_foreign_config(self, config: MobileMMConfig) -> dict[str, Any]:
        from transformers import LlavaConfig

        if (config.projector or {}).get("type") != "mlp2x_gelu":
            raise MobileMMError(f"the llava-hf layout has no projector {config.projector}")
        if config.checkpoint_layout == self.name and config.checkpoint_config:
            return dict(config.checkpoint_config)
        if config.image_token_id >= config.text_config.vocab_size:
            raise MobileMMError(
                f"the llava-hf layout needs image_token_id inside the vocabulary of"
                f" {config.text_config.vocab_size}, not {config.image_token_id}"
            )
        llava = LlavaConfig(  # from copies: a config takes its parts over and changes them
            vision_config=config.vision_config.to_dict(),
            text_config=config.text_config.to_dict(),
            image_token_index=config.image_token_id,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return {**llava.to_dict(), "architectures": ["LlavaForConditionalGeneration"]}

    def foreign_name(self, name: str, config: MobileMMConfig) -> str:
        part, rest = name.split(".", 1)
        if part == "language_model":
            return name
        if part == "vision_encoder":
            return "vision_tower.vision_model." + tower_name(rest, config)
        layer, rest = rest.split(".", 1)
        return f"multi_modal_projector.linear_{ {'0': 1, '2': 2}[layer] }.{rest}"

    def canonical(self, name: str) -> str:
        name = name.removeprefix("model.")
        if name.startswith("lm_head."):
            return f"language_model.{name}"
        name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
        return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


class NativeLayout:
    """Our own, as `save_pretrained` writes it."""

    name = "mobilemm"

    def matches(self, foreign: dict[str, Any]) -> bool:
        return foreign.get("model_type") == MobileMMConfig.model_type

    def to_config(self, foreign: dict[str, Any], folder: Path) -> tuple[MobileMMConfig, Tower]:
        config = MobileMMConfig.from_dict(foreign)
        return config, Tower(config.vision_config, [], [])

    def to_foreign_config(self, config: MobileMMConfig) -> dict[str, Any]:
        return config.to_dict()

    def foreign_name(self, name: str, config: MobileMMConfig) -> str:
        return name

    def canonical(self, name: str) -> str:
        return name


def tower_name(name: str, config: MobileMMConfig) -> str:
    """`model.…` and `unused.…` of our encoder as one uncut transformers model would name them."""
    if name.startswith("model."):
        return name.removeprefix("model.")
    if name.startswith("unused.norm."):
        return name.replace("unused.norm.", "post_layernorm.")
    layers, feature_layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    kept = feature_layer if feature_layer > 0 else layers + 1 + feature_layer
    _, _, index, rest = name.split(".", 3)
    return f"encoder.layers.{kept + int(index)}.{rest}"


def _tower_id(vision: Any, named: str | None) -> str:
    """What names the tower from anywhere: its folder, the id it had, or the hub id of this configuration."""
    from mobilemm.models.checkpoints.towers import KNOWN_TOWERS

    folder = Path(str(vision._name_or_path or ""))
    if named not in KNOWN_TOWERS and folder.name and folder.is_dir():
        return str(folder.resolve())
    if named:
        return named
    for name, (model_type, options) in KNOWN_TOWERS.items():
        if vision.model_type == model_type and all(
            getattr(vision, key) == value for key, value in options.items()
        ):
            return name
    return "vision_tower"


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (NativeLayout(), OfficialLayout("mobilevlm"), OfficialLayout("llava"), LlavaHfLayout())
}


def find_layout(foreign: dict[str, Any]) -> Layout | None:
    """The layout of a config.json, None when it is none that we read into our own model."""
    if not isinstance(foreign.get("model_type"), str):
        return None
    return next((layout for layout in LAYOUTS.values() if layout.matches(foreign)), None)
