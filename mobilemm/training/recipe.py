"""Training recipes: typed, read from YAML, checked before anything is loaded. Every error names its key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mobilemm.errors import MobileMMError
from mobilemm.training.generator.recipe import GENERATOR_RECIPES, GeneratorRecipe


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PartTraining(_Section):
    """How one part of the model is trained; a number alone in the recipe is its learning rate."""

    learning_rate: float = Field(ge=0, default=0.0, description="0 leaves the part frozen")
    method: Literal["full", "layer_norm", "lora", "dora"] = Field(
        default="full",
        description="all its parameters, those of its norms, or low-rank updates beside its linear layers",
    )
    from_layer: int = Field(ge=0, default=0, description="layers before this one stay frozen, embeddings too")
    rank: int = Field(gt=0, default=16, description="of lora and dora")
    alpha: float = Field(gt=0, default=32.0, description="of lora and dora: updates count alpha / rank times")
    dropout: float = Field(ge=0, lt=1, default=0.0, description="of lora and dora")

    @property
    def is_adapter(self) -> bool:
        return self.method in ("lora", "dora")


def _part(value: Any) -> Any:
    is_rate = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {"learning_rate": value} if is_rate else value


Part = Annotated[PartTraining, BeforeValidator(_part)]


class Parts(_Section):
    """What is trained; a part that is left out stays frozen."""

    vision_encoder: Part = PartTraining()
    projector: Part = PartTraining()
    language_model: Part = PartTraining()
    signal_tokens: Part = PartTraining()
    output_projector: Part = PartTraining()

    @model_validator(mode="after")
    def _something_learns(self) -> Parts:
        if not any(part.learning_rate for _, part in self):
            raise ValueError("every part has the learning rate 0: nothing would be trained")
        for name in ("vision_encoder", "projector", "signal_tokens", "output_projector"):
            if getattr(self, name).is_adapter:
                raise ValueError(f"{name}: low-rank updates are made to the language model alone")
        for name in ("projector", "signal_tokens", "output_projector"):
            if getattr(self, name).from_layer:
                raise ValueError(f"{name}: it has no layers to start from")
        return self


class Source(_Section):
    """A set of samples and how often it is drawn from."""

    format: Literal["llava", "messages", "hf", "preferences", "folder", "pairs"] = Field(
        description="LLaVA's JSON; a JSON list or lines of `messages` and `images`; a datasets folder or"
        " Parquet file of such columns; `messages` with `rejected`, a worse last answer; pictures with"
        " captions beside them; what scripts/fetch_pairs.py makes"
    )
    path: Path
    images: Path | None = Field(default=None, description="folder of the image paths; else the file's")
    weight: float = Field(
        gt=0, default=1.0, description="how often an epoch goes through it; 0.5: half of it"
    )
    split: Literal["train", "validation", "test"] = Field(default="train", description="of pairs")
    questions: list[str] = Field(
        default=["Describe this picture."], min_length=1, description="of captions: one is drawn each time"
    )


class Preferences(_Section):
    """Preference tuning instead of the likelihood of the answers."""

    loss: Literal["dpo", "ipo"] = "dpo"
    beta: float = Field(gt=0, default=0.1, description="how far the model may leave what it was")
    sft_weight: float = Field(ge=0, default=0.0, description="of the chosen answer's likelihood beside it")


class Drawing(_Section):
    """Learning to draw: when to say the signal tokens, and what their states say to the generator.

    The loss is L_txt-gen (the answers' likelihood, signal tokens among them) and the squared distance of the
    output projector's condition from that of the generator's text encoder, L_mse.
    """

    generator: Path = Field(description="folder of the generator, whose text condition is aimed at")
    anew: bool = Field(default=False, description="forget how the model draws, and begin as one that has not")
    signal_tokens: int = Field(gt=0, le=64, default=4, description="of a model that has none yet")
    new_projector: bool = Field(
        default=False,
        description="start from an output projector initialized anew; with cache_states an `mlp` sets what it"
        " measures its input by",
    )
    projector: dict[str, Any] = Field(
        default={"type": "transformer"}, description="of a new output projector; its type and options"
    )
    condition_weight: float = Field(ge=0, default=1.0, description="of L_mse beside the likelihood")
    cache_states: bool = Field(
        default=False,
        description="run the language model once a sample: for an output projector that learns L_mse by"
        " itself, or for signal tokens that learn by themselves when to be said (sources of a weight below"
        " 1 give the same rows in each epoch)",
    )
    quantized_share: float = Field(
        ge=0,
        le=1,
        default=0.0,
        description="with cache_states, of the rows that an output projector learns from: read behind the"
        " language model as `mobilemm export` quantizes it, the mean error taken away as there",
    )


class Recipe(_Section):
    """One stage of training. The YAML file has the same keys."""

    output: Path = Field(description="folder of checkpoints, logs and the result")
    data: list[Source] = Field(min_length=1)
    train: Parts
    preferences: Preferences | None = Field(default=None, description="what is learned from pairs of answers")
    drawing: Drawing | None = Field(
        default=None, description="what is learned from answers that are drawings"
    )
    model: str | None = Field(default=None, description="folder or hub id; left out, the default model")
    new_projector: bool = Field(default=False, description="start from a projector initialized anew")
    template: str | None = Field(default=None, description="conversation template instead of the model's")
    cache_features: bool = Field(
        default=False, description="keep the frozen encoder's features on disk: it runs once a picture"
    )
    max_length: int = Field(gt=8, default=2048, description="tokens of a sample, a picture's included")
    epochs: float = Field(gt=0, default=1.0)
    max_steps: int | None = Field(gt=0, default=None, description="instead of epochs")
    batch_size: int = Field(gt=0, default=8, description="samples a process and pass")
    accumulation: int = Field(gt=0, default=1, description="passes a step")
    group_by_length: bool = Field(default=True, description="samples of like length share a batch")
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: int = Field(ge=0, default=0)
    weight_decay: float = Field(ge=0, default=0.0)
    max_grad_norm: float = Field(gt=0, default=1.0)
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the arithmetic; weights that learn are kept in float32"
    )
    activation_checkpointing: bool = Field(default=False, description="less memory for a third more time")
    compile: bool = False
    save_every: int = Field(gt=0, default=100, description="steps between checkpoints")
    keep_checkpoints: int = Field(gt=0, default=2)
    log_every: int = Field(gt=0, default=10)
    show_samples: int = Field(ge=0, default=4, description="samples answered and kept with each checkpoint")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]
    workers: int = Field(ge=0, default=0, description="processes that read pictures")
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.cache_features and self.train.vision_encoder.learning_rate:
            raise ValueError("cache_features: features can be kept only when train.vision_encoder is 0")
        if self.drawing is not None and self.preferences is not None:
            raise ValueError("drawing: preferences are learned by themselves")
        learning = {name for name, part in self.train if part.learning_rate}
        alone = ({"output_projector"}, {"signal_tokens"})
        if self.drawing is not None and self.drawing.cache_states and learning not in alone:
            raise ValueError(
                "drawing.cache_states: states can be kept only when train.output_projector alone learns, or"
                " train.signal_tokens alone"
            )
        if (
            self.drawing is not None
            and self.drawing.quantized_share
            and not (self.drawing.cache_states and learning == {"output_projector"})
        ):
            raise ValueError(
                "drawing.quantized_share: goes with drawing.cache_states, and train.output_projector alone"
            )
        for name in ("signal_tokens", "output_projector"):
            if getattr(self.train, name).learning_rate and self.drawing is None:
                raise ValueError(f"train.{name}: it learns with the key 'drawing' alone")
        for number, source in enumerate(self.data):
            if (source.format == "preferences") != (self.preferences is not None):
                raise ValueError(
                    f"data.{number}.format: preferences, and no other, are learned with the key 'preferences'"
                )
        return self


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe | GeneratorRecipe:
    """A recipe from YAML, a generator's if it has the key `stage`.

    `overrides` are `key=value` (`train.projector=1e-4`, `data.0.weight=2`).

    Raises MobileMMError naming the file and the key that is missing, unknown or wrong.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise MobileMMError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise MobileMMError(f"{path}: not YAML: {error}") from error
    if not isinstance(values, dict):
        raise MobileMMError(f"{path}: a YAML mapping of keys is expected")
    for override in overrides:
        _override(values, override)
    try:
        if "stage" in values:
            generator_recipe: GeneratorRecipe = GENERATOR_RECIPES.validate_python(values)
            return generator_recipe
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        # A number in place of a section is told by the section's own key.
        places = first["loc"][1:] if "stage" in values else first["loc"]
        key = ".".join(str(place) for place in places) or ("stage" if "stage" in values else "recipe")
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise MobileMMError(f"{path}: key {key!r}: {reason}") from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: `1e-3` is one, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one `key=value` in nested mappings and lists."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise MobileMMError(f"{override!r}: give overrides as key=value, e.g. train.projector=1e-4")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise MobileMMError(f"{override!r}: the value is not YAML") from error
    *outer, last = key.split(".")
    place: Any = values
    for name in outer:
        place = _step(place, name, key) if isinstance(place, list) else place.setdefault(name, {})
        if not isinstance(place, (dict, list)):
            raise MobileMMError(f"override {key!r}: {name!r} is no section with keys of its own")
    if isinstance(place, list):
        _step(place, last, key)
        place[int(last)] = value
    else:
        place[last] = value


def _step(values: list[Any], name: str, key: str) -> Any:
    if not name.isdigit() or int(name) >= len(values):
        raise MobileMMError(f"override {key!r}: {name!r} is no place in a list of {len(values)}")
    return values[int(name)]
