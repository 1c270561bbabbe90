"""One stage of training, from a recipe to the trained model; broken off, the same call goes on with it."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mobilemm.data.mixture import Mixture, ScannedSource, collate, encode, plan, scan
from mobilemm.data.sources import Sample, open_source
from mobilemm.data.templates import find_template
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.reading import load
from mobilemm.models.modeling import IGNORE_INDEX, MobileMMForConditionalGeneration, new_projector
from mobilemm.training.checkpoints import begin, clean, last_checkpoint
from mobilemm.training.features import FeatureCache
from mobilemm.training.parts import PartCount, half_precision, select_trained, trained_parameters
from mobilemm.training.recipe import Recipe

if TYPE_CHECKING:
    from mobilemm.training.prefix import SharedPrefix
    from mobilemm.training.trainer import Objective

# Keys that may change while a run is broken off: none of them decides what is learned.
FREE_KEYS = frozenset(
    ("output", "save_every", "keep_checkpoints", "log_every", "show_samples", "report_to", "workers")
)
PROBED = 256


@dataclass
class Stage:
    """A recipe with all that it names, ready to run."""

    recipe: Recipe
    model: MobileMMForConditionalGeneration
    processor: Any
    parts: list[PartCount]
    sources: list[ScannedSource]
    step_size: int
    objective: Objective | None = None
    features: FeatureCache | None = None


@dataclass(frozen=True)
class Forecast:
    """What `mobilemm train --check` tells: nothing of it was trained.

    `tokens` are a sample's on average, padding apart; `memory_bytes` are weights, gradients, optimizer and an
    estimate of the activations. `sample` is one as text, what is supervised between ⟦ and ⟧.
    """

    parts: list[PartCount]
    sources: list[tuple[str, int, Counter[str]]]
    steps: int
    samples_per_step: int
    tokens: float
    supervised: float
    memory_bytes: int
    sample: str


def prepare(recipe: Recipe, report: Callable[[str], None] = print) -> Stage:
    """Reads model and data and chooses what learns. Raises MobileMMError for what cannot be used."""
    # The data first: what is wrong with it should be told before a model is read.
    opened = [
        (
            open_source(source.format, source.path, source.images, source.questions, source.split),
            source.weight,
        )
        for source in recipe.data
    ]
    loaded = load(recipe.model, dtype=torch.float32)
    model, processor = loaded
    if not isinstance(model, MobileMMForConditionalGeneration):
        raise MobileMMError(
            f"{recipe.model}: a model of mobilemm's own classes is trained, not {type(model).__name__};"
            " make one of its parts with mobilemm.models.checkpoints.compose"
        )
    if recipe.template is not None:
        find_template(recipe.template, processor.tokenizer)
        processor.template = model.config.template = recipe.template
    torch.manual_seed(recipe.seed)
    if recipe.new_projector:
        model.projector = new_projector(model.config, model.vision_encoder)
    objective: Objective | None = None
    if recipe.preferences is not None:
        from mobilemm.training.preferences import PreferenceObjective

        objective = PreferenceObjective(model, recipe.preferences)
    if recipe.drawing is not None:
        from mobilemm.training.drawing import DrawingObjective, prepare_to_draw

        prepare_to_draw(model, processor, recipe.drawing)
        objective = DrawingObjective(recipe.drawing)
    parts = select_trained(model, recipe.train)
    if recipe.precision == "bfloat16":
        half_precision(model, torch.bfloat16)
    sources = [scan(source, weight, model.num_image_tokens) for source, weight in opened]
    for source in sources:
        for reason, count in source.reasons.most_common():
            report(f"{source.source.name}: {count} of {len(source.source)} rows left out: {reason}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    step_size = recipe.batch_size * recipe.accumulation * processes
    return Stage(recipe, model, processor, parts, sources, step_size, objective)


def check(recipe: Recipe, report: Callable[[str], None] = print) -> Forecast:
    """What a recipe would train, on what, in how many steps and how much memory."""
    stage = prepare(recipe, report)
    mixture = _mixture(stage)
    places = range(0, len(mixture), max(1, len(mixture) // PROBED))
    lengths, supervised = [], []
    shown = ""
    for place in places:
        try:
            encoded = encode(stage.processor, mixture.sample(place), recipe.max_length)
        except MobileMMError as error:
            report(f"left out when its turn comes: {error}")
            continue
        lengths.append(len(encoded.input_ids))
        supervised.append(sum(label != IGNORE_INDEX for label in encoded.labels))
        shown = shown or marked_text(stage.processor, encoded.input_ids, encoded.labels)
    if not lengths:
        raise MobileMMError("none of the samples looked at can be used")
    return Forecast(
        stage.parts,
        [(source.source.name, len(source.rows), source.reasons) for source in stage.sources],
        len(mixture) // stage.step_size,
        stage.step_size,
        float(np.mean(lengths)),
        float(np.mean(supervised)),
        _memory(stage, max(lengths)),
        shown,
    )


def train(recipe: Recipe, report: Callable[[str], None] = print) -> Path:
    """Runs a recipe, going on from its last checkpoint; returns the folder of the result.

    The result is a whole model (`output/model`), or with low-rank updates an adapter that holds whatever else
    learned, the projector with it (`output/adapter`). On one process of one machine the same recipe gives the
    same weights bit for bit, interrupted or not.
    """
    from mobilemm.training.progress import Keepsakes, Progress
    from mobilemm.training.results import write_result
    from mobilemm.training.trainer import PartsTrainer, training_arguments

    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    run = Path(recipe.output)
    main = int(os.environ.get("RANK", "0")) == 0
    report = report if main else lambda _: None
    stage = prepare(recipe, report)
    mixture = open_mixture(stage, report)
    steps = len(mixture) // stage.step_size
    arguments = training_arguments(recipe, steps)
    if arguments.process_index == 0:
        _begin(stage, mixture)
        clean(run)
    trained = sum(part.trained for part in stage.parts)
    report(
        f"{len(mixture):,} samples in {steps:,} steps of {stage.step_size}; {trained:,} parameters learn"
        f" of {sum(part.parameters for part in stage.parts):,}"
    )
    trainer = PartsTrainer(
        stage.model,
        recipe,
        arguments,
        mixture,
        partial(collate, pad_token_id=_padding(stage)),
        stage.objective,
        _shared_prefix(stage, mixture),
    )
    shown = _samples(mixture, recipe.show_samples)
    if "tensorboard" in recipe.report_to:
        # Given its writer, because it would take the folder from the environment of the whole process.
        trainer.add_callback(_tensorboard(run / "logs"))
    trainer.add_callback(Keepsakes(run, stage.model, stage.processor, shown))
    trainer.add_callback(Progress(report, lambda: trainer.tokens_seen))
    last = last_checkpoint(run)
    if last is not None:
        report(f"going on from {last}")
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    for reason, count in mixture.skipped.most_common():
        report(f"{count} samples left out on the way: {reason}")
    result = run
    if arguments.process_index == 0:
        result = write_result(stage.recipe, stage.model, stage.processor, trainer.state.log_history)
        report(f"done: {result}")
    return result


def open_mixture(stage: Stage, report: Callable[[str], None] = print) -> Mixture:
    """The samples of a run, with all that is computed once for them and kept in the run's folder."""
    recipe, run = stage.recipe, Path(stage.recipe.output)
    drawing = recipe.drawing
    if drawing is not None and drawing.cache_states:
        from mobilemm.training.drawing import keep_shares

        keep_shares(stage.sources, recipe.seed)
    if recipe.cache_features:
        _keep_features(stage, report)
    mixture = _mixture(stage)
    if drawing is None:
        return mixture
    from mobilemm.training.drawing import keep_conditions, keep_states, standardize

    if drawing.cache_states:
        asking = recipe.train.signal_tokens.learning_rate > 0
        states = keep_states(stage.model, mixture, _padding(stage), run, report, asking)
        if drawing.new_projector and not asking:
            standardize(stage.model, states)
        mixture = _mixture(stage)  # of the rows that are left
        if drawing.quantized_share:
            from mobilemm.training.quantized_states import with_quantized_states

            states = with_quantized_states(
                states, recipe.model, mixture, drawing.quantized_share, run, report
            )
        mixture.states = states
    mixture.conditions = keep_conditions(drawing, stage.sources, run, report)
    return mixture


def _padding(stage: Stage) -> int:
    return stage.processor.tokenizer.pad_token_id or 0


def marked_text(processor: Any, ids: list[int], labels: list[int]) -> str:
    """A sample as text: supervised stretches between ⟦ and ⟧, each picture as <image>."""
    pieces: list[str] = []
    stretch: list[int] = []
    learned = False

    def close() -> None:
        if stretch:
            text = processor.tokenizer.decode(stretch)
            pieces.append(f"⟦{text}⟧" if learned else text)
            stretch.clear()

    images = 0
    for token, label in zip(ids, labels, strict=True):
        if token == processor.image_token_id:
            close()
            if images % processor.num_image_tokens == 0:
                pieces.append("<image>")
            images += 1
            continue
        if (label != IGNORE_INDEX) != learned:
            close()
            learned = not learned
        stretch.append(token)
    close()
    return "".join(pieces)


def _mixture(stage: Stage) -> Mixture:
    recipe = stage.recipe
    order = plan(
        stage.sources, recipe.epochs, stage.step_size, recipe.seed, recipe.max_steps, recipe.group_by_length
    )
    mixture = Mixture(stage.sources, order, stage.processor, recipe.max_length, recipe.seed)
    mixture.features = stage.features
    return mixture


def _keep_features(stage: Stage, report: Callable[[str], None]) -> None:
    """The encoder's features of every picture of the data; rows whose pictures are damaged leave the plan."""
    from accelerate import PartialState

    images = [
        image
        for source in stage.sources
        for row in source.rows
        for image in source.source.sample(row, random.Random(0)).images
    ]

    def told(done: int, total: int) -> None:
        if done == total or done % 1024 == 0:
            report(f"encoding pictures: {done:,} of {total:,}")

    if images:
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        with PartialState(cpu=several and not torch.cuda.is_available()).main_process_first():
            features = FeatureCache(
                Path(stage.recipe.output) / "features", stage.model, stage.processor, images, told
            )
        if features.unreadable:
            for source in stage.sources:
                source.leave_out(features.unreadable)
            report(
                f"{len(features.unreadable)} pictures cannot be read, the first: "
                f"{next(iter(features.unreadable.values()))}"
            )
        stage.features = features


def _shared_prefix(stage: Stage, mixture: Mixture) -> SharedPrefix | None:
    """What all prompts begin with, where it can be run once and for all."""
    from mobilemm.training.prefix import SharedPrefix, common_prefix

    learns = stage.recipe.train.language_model.learning_rate > 0
    # Checkpointing runs layers a second time, and would add to the cache what is there already.
    if mixture.states:  # the language model is not run at all
        return None
    compares = stage.recipe.preferences is not None  # with a copy of the model, which has its own cache
    if learns or compares or stage.recipe.activation_checkpointing:
        return None
    ids = common_prefix(mixture, stage.processor.image_token_id)
    return SharedPrefix(stage.model.language_model, ids) if ids else None


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MobileMMError(
            "key 'report_to': tensorboard is not installed: pip install 'mobilemm[train]', or report_to=[]"
        ) from None
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(log_dir=str(folder)))


def _samples(mixture: Mixture, count: int) -> list[Sample]:
    found: list[Sample] = []
    for place in range(min(len(mixture), count)):
        found.append(mixture.sample(place * (len(mixture) // count)))
    return found


def _begin(stage: Stage, mixture: Mixture) -> None:
    settings = {
        key: value for key, value in stage.recipe.model_dump(mode="json").items() if key not in FREE_KEYS
    }
    settings["samples_per_step"] = stage.step_size
    settings["order_of_data"] = hashlib.sha256(mixture.order.tobytes()).hexdigest()[:16]
    begin(Path(stage.recipe.output), settings)


def _memory(stage: Stage, longest: int) -> int:
    """Weights, gradients and AdamW's two moments; of activations about 16 widths a token and layer."""
    weights = sum(parameter.nbytes for parameter in stage.model.parameters())
    learned = sum(parameter.nbytes for parameter in trained_parameters(stage.model).values())
    text = stage.model.config.get_text_config()
    size = 4 if stage.recipe.precision == "float32" else 2
    layers = 1 if stage.recipe.activation_checkpointing else text.num_hidden_layers
    tokens = stage.recipe.batch_size * longest
    activations = tokens * size * (layers * 16 * text.hidden_size + 3 * text.vocab_size)
    return weights + 3 * learned + activations
