"""LoRA folders of the official code: low-rank updates over a base checkpoint, and the projector beside."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.weights import CheckpointWeights, TensorInfo, read_json

UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "megatron_config",
    "trainable_token_indices",
    "target_parameters",
)
# Initializations that take from the base weights what they put into A and B.
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def adapter_base(folder: Path) -> str:
    """The base model that an adapter names: a hub id, or a folder, absolute or beside the adapter."""
    name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise MobileMMError(
            f"{folder / 'adapter_config.json'}: key 'base_model_name_or_path' is missing; give the base model"
        )
    beside = folder / name
    return str(beside) if beside.is_dir() else name


class AdapterWeights:
    """A base checkpoint's tensors with an adapter's updates merged in, W + (α / r) · B A, one at a time.

    With DoRA each row of the sum has the length that the adapter gives it. `non_lora_trainables.bin` replaces
    whole tensors (the projector).
    Names are given back as the base model spells them; `canonical` is the layout's, for adapters that were
    trained under another spelling.
    Source: Hu et al. 2021, arXiv 2106.09685; Liu et al. 2024, arXiv 2402.09353, equation 5.
    Names as peft and the official code write them.
    """

    def __init__(
        self, folder: Path, base: CheckpointWeights, canonical: Callable[[str], str] = lambda name: name
    ) -> None:
        self.folder, self.base = folder, base
        self.settings = read_json(folder / "adapter_config.json")
        kind = self.settings.get("peft_type")
        unsupported = [key for key in UNSUPPORTED if self.settings.get(key)]
        initialization = self.settings.get("init_lora_weights")
        if str(initialization).startswith(CHANGED_BASE):
            unsupported.append(f"init_lora_weights {initialization!r}")
        if kind != "LORA" or unsupported:
            raise MobileMMError(
                f"{folder / 'adapter_config.json'}: plain LoRA is read, not {kind}"
                f" {' '.join(unsupported)}; merge it with peft first".replace("  ", " ")
            )
        self._check_settings()
        spellings = {canonical(name): name for name in base}

        def in_base(name: str) -> str:
            return name if name in base else spellings.get(canonical(name), name)

        self.adapter = CheckpointWeights(folder)
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            if (folder / name).is_file():
                self.adapter.read(folder / name)
                break
        else:
            raise MobileMMError(f"{folder}: adapter_model.safetensors or adapter_model.bin is missing")
        self.updates: dict[str, dict[str, str]] = {}
        self.magnitudes: dict[str, str] = {}
        self.replaced: dict[str, str] = {}
        for name in self.adapter:
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight", name)
            if found:
                self.updates.setdefault(in_base(f"{found[1]}.weight"), {})[found[2]] = name
            elif magnitude := re.fullmatch(
                r"base_model\.model\.(.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", name
            ):
                self.magnitudes[in_base(f"{magnitude[1]}.weight")] = name
            elif name.startswith("base_model.model.") and not re.search(
                r"\.(modules_to_save|lora_\w+)\b", name
            ):
                plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
                self.replaced[in_base(plain)] = name
            else:
                raise MobileMMError(f"{self.adapter.infos[name].file}: tensor {name!r} is not understood")
        self.extra = CheckpointWeights(folder)
        if (folder / "non_lora_trainables.bin").is_file():
            self.extra.read(folder / "non_lora_trainables.bin")
        # The official code's names, or those of a model whose own do not start with "model."
        self.extras = {
            next(
                (place for place in map(in_base, _spellings(name)) if place in base),
                in_base(_spellings(name)[0]),
            ): name
            for name in self.extra
        }
        self.infos: dict[str, TensorInfo] = dict(base.infos)
        self.infos |= {name: self.adapter.infos[source] for name, source in self.replaced.items()}
        self.infos |= {name: self.extra.infos[source] for name, source in self.extras.items()}
        for name in self.magnitudes.keys() - self.updates.keys():
            raise MobileMMError(f"{self.adapter.infos[self.magnitudes[name]].file}: {name!r} has no update")
        for name, pair in self.updates.items():
            self._check(name, pair)

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __getitem__(self, name: str) -> Tensor:
        if name in self.extras:
            return self.extra[self.extras[name]]
        weight = self.adapter[self.replaced[name]] if name in self.replaced else self.base[name]
        if name not in self.updates:
            return weight
        down = self.adapter[self.updates[name]["A"]].float()
        up = self.adapter[self.updates[name]["B"]].float()
        update = up @ down * self._scale(name, down.shape[0])
        if self.settings.get("fan_in_fan_out"):
            update = update.T
        merged = weight.float() + update
        if name in self.magnitudes:
            merged *= (self.adapter[self.magnitudes[name]].float() / merged.norm(dim=1))[:, None]
        return merged.to(weight.dtype)

    def _check(self, name: str, pair: dict[str, str]) -> None:
        file = self.adapter.infos[next(iter(pair.values()))].file
        if name not in self.base and name not in self.replaced:
            raise MobileMMError(
                f"{file}: it updates {name!r}, which the base model {self.base.folder} has not"
            )
        if set(pair) != {"A", "B"}:
            raise MobileMMError(f"{file}: of {name!r} only lora_{next(iter(pair))} is there")
        down, up = self.adapter.infos[pair["A"]].shape, self.adapter.infos[pair["B"]].shape
        expected = self.infos[name].shape
        if self.settings.get("fan_in_fan_out"):
            expected = expected[::-1]
        if len(down) != 2 or len(up) != 2 or not down[0] == up[1] > 0 or (up[0], down[1]) != expected:
            raise MobileMMError(
                f"{file}: lora_A {down} and lora_B {up} do not make up {name!r} of shape {expected}"
            )
        if bool(self.settings.get("use_dora")) != (name in self.magnitudes):
            raise MobileMMError(
                f"{file}: adapter_config.json's 'use_dora' and the tensors of {name!r} differ"
            )
        if name in self.magnitudes and self.adapter.infos[self.magnitudes[name]].shape != (expected[0],):
            raise MobileMMError(f"{file}: the magnitudes of {name!r} are not {expected[0]}, one a row")

    def _check_settings(self) -> None:
        path = self.folder / "adapter_config.json"
        patterns = self.settings.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise MobileMMError(f"{path}: key 'alpha_pattern' must be a table of names and numbers")
        for key, value in {"lora_alpha": self.settings.get("lora_alpha", 1), **patterns}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise MobileMMError(f"{path}: {key!r} must be a number, not {value!r}")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise MobileMMError(f"{path}: key 'alpha_pattern' has {pattern!r}: {error}") from error

    def _scale(self, name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        alpha = _by_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha", 8))
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _spellings(name: str) -> list[str]:
    """`base_model.model.model.mm_projector.…` → `model.mm_projector.…`, as the official merge script does;
    and without all of peft's prefix."""
    stripped = name.removeprefix("base_model.")
    official = stripped.removeprefix("model.") if stripped.startswith("model.model.") else stripped
    return [official, name.removeprefix("base_model.model.")]
