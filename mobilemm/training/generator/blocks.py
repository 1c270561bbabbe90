"""A denoiser with fewer blocks, taught by the whole one: BK-SDM's block removal and feature distillation.

The student keeps the teacher's weights where it has the block. Of each pair of stages the second residual
(and attention) layer goes; `small` has no middle, `tiny` no innermost stage either.
Source: Kim et al. 2023, "BK-SDM", arXiv 2305.15798, sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mobilemm.errors import MobileMMError
from mobilemm.generation import diffusion
from mobilemm.generation.generator import Generator
from mobilemm.training.generator.objectives import LatentBatch, Objective
from mobilemm.training.generator.recipe import BlocksRecipe


class BlocksObjective(Objective):
    """Denoising loss + ‖student − teacher‖² of the output + the same of each stage's features, averaged."""

    def __init__(self, teacher: Generator, recipe: BlocksRecipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.teacher = teacher.requires_grad_(False).eval()
        self.learner, self.pairs = drop_blocks(teacher.denoiser, recipe.drop_blocks)

    def forward(self, batch: LatentBatch) -> Tensor:
        alphas = self.teacher.alphas_cumprod
        timesteps = batch.timesteps(len(alphas))
        alpha = alphas[timesteps].to(batch.latents.dtype)
        noisy = diffusion.add_noise(batch.latents, batch.noise, alpha)
        with _features(self.teacher.denoiser, [old for _, old in self.pairs]) as wanted, torch.no_grad():
            taught = self.teacher.denoise(noisy, timesteps, batch.conditions)
        with _features(self.learner, [new for new, _ in self.pairs]) as found:
            predicted = self.learner(noisy, timesteps, batch.conditions, return_dict=False)[0]
        target = diffusion.target(self.teacher.prediction_type, batch.latents, batch.noise, alpha)
        loss = functional.mse_loss(predicted, target)
        loss = loss + self.recipe.output_weight * functional.mse_loss(predicted, taught)
        features = [functional.mse_loss(found[new], wanted[old]) for new, old in self.pairs]
        return loss + self.recipe.feature_weight * torch.stack(features).mean()


def drop_blocks(denoiser: Any, size: str) -> tuple[Any, list[tuple[str, str]]]:
    """The student, with the teacher's weights, and which of its stages stands for which of the teacher's.

    Raises MobileMMError for a denoiser that has nothing to drop.
    """
    config = dict(denoiser.config)
    layers, stages = config["layers_per_block"], len(config["block_out_channels"])
    if layers != 2:
        raise MobileMMError(f"key 'drop_blocks': layers_per_block is {layers!r}; one layer of two is dropped")
    config["layers_per_block"] = 1
    if size in ("small", "tiny"):
        config["mid_block_type"] = None
    first_up = 0
    if size == "tiny":
        if stages < 3:
            raise MobileMMError("key 'drop_blocks': tiny drops a stage of at least three")
        stages, first_up = stages - 1, 1
        for key, keep in (("block_out_channels", slice(stages)), ("down_block_types", slice(stages))):
            config[key] = tuple(config[key][keep])
        config["up_block_types"] = tuple(config["up_block_types"][first_up:])
        for key in ("attention_head_dim", "num_attention_heads", "cross_attention_dim"):
            if isinstance(config.get(key), (tuple, list)):
                config[key] = tuple(config[key][:stages])
    student = type(denoiser).from_config(config)
    old = denoiser.state_dict()
    new = {}
    for name, value in student.state_dict().items():
        source = _source(name, first_up)
        if source not in old or old[source].shape != value.shape:
            raise MobileMMError(
                f"key 'drop_blocks': the teacher has no {source} of shape {tuple(value.shape)}"
            )
        new[name] = old[source].clone()
    student.load_state_dict(new)
    downs = [(f"down_blocks.{index}", f"down_blocks.{index}") for index in range(stages)]
    ups = [(f"up_blocks.{index}", f"up_blocks.{index + first_up}") for index in range(stages)]
    middle = [("mid_block", "mid_block")] if config["mid_block_type"] is not None else []
    # The student's innermost stage halves nothing any more: its features have another size.
    return student.train(), (downs[:-1] if first_up else downs) + middle + ups


def _source(name: str, first_up: int) -> str:
    """Where the student's tensor stands in the teacher: of the way up the first and last layer are kept."""
    block, *rest = name.split(".")
    if block != "up_blocks":
        return name
    if rest[1] in ("resnets", "attentions") and rest[2] == "1":
        rest[2] = "2"
    return ".".join([block, str(int(rest[0]) + first_up), *rest[1:]])


class _features:
    """The outputs of some of a module's children while a block lasts, by their names."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self.module, self.names = module, names
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> dict[str, Tensor]:
        def keep(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                self.found[name] = output[0] if isinstance(output, tuple) else output

            return hook

        self.hooks = [
            self.module.get_submodule(name).register_forward_hook(keep(name)) for name in self.names
        ]
        return self.found

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
