"""transformers' Trainer for our models: a learning rate a part, whole checkpoints, a stop at a NaN."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from mobilemm.data.mixture import Mixture
from mobilemm.errors import MobileMMError, one_line
from mobilemm.models.modeling import MobileMMForConditionalGeneration
from mobilemm.training.checkpoints import WRITING, clean, last_checkpoint, put_in_place
from mobilemm.training.parts import PARTS, optimizer_groups, trained_parameters
from mobilemm.training.prefix import SharedPrefix
from mobilemm.training.recipe import Recipe

TRAINED = "trained.safetensors"


class Objective(Protocol):
    """A loss other than the likelihood of the answers."""

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """(the model as wrapped for the run, a batch) → the pass's mean loss."""

    def pop_metrics(self) -> dict[str, float]:
        """What else is to be logged, since the last call."""


class PartsTrainer(Trainer):
    """Trains what `select_trained` has chosen. Checkpoints hold these tensors alone, and the optimizer.

    A checkpoint is written beside its place and renamed; a gradient that is not finite stops the run before
    it reaches the weights. Parts that do not learn stay in evaluation mode, and so does the encoder even when
    it learns: its batch statistics are those of its own training, not of a few pictures here.
    """

    def __init__(
        self,
        model: MobileMMForConditionalGeneration,
        recipe: Recipe,
        args: TrainingArguments,
        train_dataset: Mixture,
        data_collator: Any,
        objective: Objective | None = None,
        prefix: SharedPrefix | None = None,
        **options: Any,
    ) -> None:
        self.recipe = recipe
        self.run_folder = Path(recipe.output)
        self.objective: Objective | None = objective
        self.prefix = prefix
        self.tokens_seen = 0
        learning = {name.split(".")[0] for name in trained_parameters(model)}
        self._still = [
            part
            for name in PARTS
            if (name not in learning or name == "vision_encoder")
            and (part := getattr(model, name)) is not None
        ]
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=data_collator, **options
        )
        self.remove_callback(PrinterCallback)
        if objective is not None:
            self.loss_is_scaled_for_ga = False  # a mean over the pass: the passes of a step are averaged

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the parts' own learning rates."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = optimizer_groups(trained, self.recipe.train, self.recipe.weight_decay)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective's, or cross-entropy over the supervised tokens of a whole step."""
        for part in self._still:
            part.eval()
        self.tokens_seen += int(inputs["attention_mask"].sum()) * self.args.world_size
        if self.prefix is not None:
            inputs = self.prefix.take_off(inputs)
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return self.objective(model, inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer does, with what the objective has to say."""
        if self.objective is not None and "loss" in logs:
            logs |= self.objective.pop_metrics()
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        # float16 finds its loss scale by gradients that overflow now and then.
        if not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)).all():
            last = last_checkpoint(self.run_folder)
            good = f"{last} is the last good state" if last else "there is no checkpoint yet"
            raise MobileMMError(
                f"the gradient is {float(norm)} at step {self.state.global_step + 1}: the weights were left"
                f" alone, and {good}; try a smaller learning rate, or look at the data of this step"
            )
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.run_folder / WRITING)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            clean(self.run_folder)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                put_in_place(self.run_folder, name, self.recipe.keep_checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self.run_folder / WRITING, ignore_errors=True)
            last = last_checkpoint(self.run_folder)
            raise MobileMMError(
                f"{self.run_folder / name}: could not be written ({one_line(error)}); is the disk full?"
                + (f" {last} is whole, and the same command goes on from there" if last else "")
            ) from error
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        if not self.args.should_save:
            return
        os.makedirs(output_dir, exist_ok=True)
        model: Any = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]  # there is one
        trained = trained_parameters(model)
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in trained.items()},
            Path(output_dir) / TRAINED,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        whole: Any = self.model
        trained = trained_parameters(whole)
        path = Path(resume_from_checkpoint) / TRAINED
        saved = load_file(path)
        if set(saved) != set(trained):
            name = sorted(set(saved) ^ set(trained))[0]
            raise MobileMMError(f"{path}: it was written by another recipe ({name!r} learned in one alone)")
        with torch.no_grad():
            for name, tensor in saved.items():
                trained[name].copy_(tensor)


def training_arguments(recipe: Recipe, steps: int) -> TrainingArguments:
    """transformers' arguments for a recipe whose whole run is one pass over its plan."""
    return TrainingArguments(
        output_dir=str(recipe.output),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        max_steps=steps,
        # The plan has the order, so that resuming needs to know the step alone.
        train_sampling_strategy="sequential",
        learning_rate=max(getattr(recipe.train, part).learning_rate for part in PARTS),
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bfloat16",
        fp16=recipe.precision == "float16",
        activation_checkpointing=recipe.activation_checkpointing,
        torch_compile=recipe.compile,
        save_strategy="steps",
        save_steps=min(recipe.save_every, steps),
        logging_steps=recipe.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=[name for name in recipe.report_to if name != "tensorboard"],
        dataloader_num_workers=recipe.workers,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        # Without this, processes without GPUs would each train alone.
        use_cpu=int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available(),
        seed=recipe.seed,
    )
