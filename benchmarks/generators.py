"""Pictures from our one-graph generators and from diffusers' own pipeline, over the same weights, in turns.

    python -m benchmarks.generators --work FOLDER [sd15 bk_sdm_tiny sd_turbo FOLDER …] [--steps 1 4]

sd15, bk_sdm_tiny and sd_turbo are random weights in the published shapes, whole; others are folders of
generators; left out, the default one. Ours: the graph that `mobilemm export` ships, every step and the
decoder in it, on onnxruntime, in fp32 and with weights in int8; and the same module eagerly on PyTorch. Peer:
StableDiffusionPipeline on PyTorch with the generator's kind of scheduler, told the condition, without
guidance, as distilled models run. A picture is one condition and one noise; a step is a picture's share,
the decoder with it. Each system is a process of its own, which makes one picture a round; memory is the most
that was resident while it drew, less what was before its weights. Graphs stay in the work folder and are
made once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mobilemm.bench.runner import peak, reset_peak, resident
from mobilemm.runtime.noise import normal

DEFAULT = Path(__file__).resolve().parents[1] / "mobilemm" / "models" / "default" / "generator"
SYSTEMS = ("diffusers", "mobilemm, PyTorch", "mobilemm, ONNX fp32", "mobilemm, ONNX int8")
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
# The blocks of the published denoisers' stages, their channels, and what else is their own.
SHAPES: dict[str, dict[str, Any]] = {
    "sd15": {
        "stages": (CROSS, CROSS, CROSS, PLAIN),
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "bk_sdm_tiny": {
        "stages": (CROSS, CROSS, CROSS),
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 1,
        "mid_block_type": None,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "sd_turbo": {
        "stages": (CROSS, CROSS, CROSS, PLAIN),
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
}

# Of the samplers of generators.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}

Draw = Callable[[int], Any]
_draw: Draw
"""In a system's process: a seed's picture."""


def make_generator(name: str, work: Path) -> Path:
    """Random weights of a published shape, in float32 and diffusers' layout."""
    folder = work / name
    if folder.is_dir():
        return folder
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel

    from mobilemm.generation.generator import Generator, GeneratorSettings, save_generator

    torch.manual_seed(0)
    shape = dict(SHAPES[name])
    stages = shape.pop("stages")
    unet = UNet2DConditionModel(
        sample_size=64,
        down_block_types=tuple(down for down, _ in stages),
        up_block_types=tuple(up for _, up in reversed(stages)),
        **shape,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
        scaling_factor=0.18215,
    )
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    turbo = name == "sd_turbo"
    scheduler = (
        EulerDiscreteScheduler(**betas, timestep_spacing="trailing")
        if turbo
        else PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
    )
    config = {**dict(scheduler.config), "_class_name": type(scheduler).__name__}
    settings = GeneratorSettings("euler" if turbo else "ddim", 4, 1.0, "random", 77)
    save_generator(Generator(unet, vae, config, settings), folder)
    return folder


def make_graph(generator: Path, steps: int, word: str, folder: Path) -> Path:
    """The part `generator` of a bundle for onnxruntime, alone."""
    path = folder / "generator.onnx"
    if path.is_file():
        return path
    from mobilemm.export.parts import generator_part
    from mobilemm.export.quantization import make_plan
    from mobilemm.export.quantized_parts import quantize_linears
    from mobilemm.export.targets.onnx import OnnxTarget
    from mobilemm.generation.generator import load_generator

    part = generator_part(load_generator(generator), steps)
    plan = make_plan(generator=word).part("generator")
    making = folder.with_name(f".{folder.name}.part")
    making.mkdir(parents=True, exist_ok=True)
    OnnxTarget().write(part, quantize_linears(part, plan), making)
    making.rename(folder)
    return path


def load(system: str, generator: Path, steps: int, graph: Path | None, threads: int) -> int:
    """In a process of its own: makes it able to draw. Bytes that were resident before."""
    global _draw
    before = resident() or 0
    if graph is not None:
        _draw = _onnx(graph, threads)
        return before
    import torch

    from mobilemm.generation.generator import load_generator
    from mobilemm.runtime.pytorch import quiet

    quiet()
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    before = resident() or 0
    loaded = load_generator(generator).eval()
    _draw = _pipeline(loaded, steps) if system == SYSTEMS[0] else _unrolled(loaded, steps)
    return before


def _onnx(graph: Path, threads: int) -> Draw:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    shapes = {one.name: one.shape for one in session.get_inputs()}

    def draw(seed: int) -> Any:
        return session.run(None, {name: normal(seed, shape) for name, shape in shapes.items()})

    return draw


def _unrolled(generator: Any, steps: int) -> Draw:
    import torch

    from mobilemm.generation.sampling import UnrolledGenerator

    unrolled = UnrolledGenerator(generator, steps).eval()
    condition = (1, *generator.condition_shape)
    noise = (1, unrolled.table.noises, *generator.latent_shape)

    def draw(seed: int) -> Any:
        return unrolled(torch.from_numpy(normal(seed, condition)), torch.from_numpy(normal(seed, noise)))

    return draw


def _pipeline(generator: Any, steps: int) -> Draw:
    import diffusers
    import torch

    kind = getattr(diffusers, SCHEDULERS[generator.settings.sampler])
    pipeline = diffusers.StableDiffusionPipeline(
        *(generator.autoencoder, None, None, generator.denoiser),
        *(kind.from_config(generator.scheduler_config), None, None, None, False),
    )
    pipeline.set_progress_bar_config(disable=True)
    height, width = generator.image_size

    def draw(seed: int) -> Any:
        return pipeline(
            prompt_embeds=torch.from_numpy(normal(seed, (1, *generator.condition_shape))),
            latents=torch.from_numpy(normal(seed, (1, *generator.latent_shape))),
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="np",
            height=height,
            width=width,
        )

    return draw


def turn(seed: int) -> float:
    """Seconds of a picture."""
    begun = time.perf_counter()
    _draw(seed)
    return time.perf_counter() - begun


def most(seed: int) -> int:
    """Bytes that were resident, at most, while a picture was made."""
    reset_peak()
    _draw(seed)
    return peak() or 0


def race(generator: Path, steps: int, rounds: int, threads: int, work: Path) -> None:
    """Prints a table."""
    context = get_context("spawn")
    with ExitStack() as stack:
        pools, before = {}, {}
        for system in SYSTEMS:
            word = system.removeprefix("mobilemm, ONNX ")
            graph = None
            if word != system:
                with ProcessPoolExecutor(1, context) as maker:  # whose memory goes with it
                    folder = work / f"{generator.name}-{steps}-{word}"
                    graph = maker.submit(make_graph, generator, steps, word, folder).result()
            pools[system] = stack.enter_context(ProcessPoolExecutor(1, context))
            before[system] = pools[system].submit(load, system, generator, steps, graph, threads).result()
            pools[system].submit(turn, 0).result()
        seconds: dict[str, list[float]] = {system: [] for system in SYSTEMS}
        for index in range(rounds):
            order = SYSTEMS[index % len(SYSTEMS) :] + SYSTEMS[: index % len(SYSTEMS)]
            for system in order:
                seconds[system].append(pools[system].submit(turn, index).result())
        memory = {system: pools[system].submit(most, 0).result() - before[system] for system in SYSTEMS}
    peer = np.array(seconds[SYSTEMS[0]])
    print(f"\n| {generator.name}, {steps} steps | ms a picture | ms a step | × diffusers | resident, MB |")
    print("| --- | --- | --- | --- | --- |")
    for system in SYSTEMS:
        found = np.array(seconds[system])
        ratios = peer / found
        middle = 1000 * float(np.median(found))
        print(
            f"| {system} | {middle:,.0f} | {middle / steps:,.0f} | {np.median(ratios):.2f}"
            f" ({ratios.min():.2f}–{ratios.max():.2f}) | {memory[system] / 1e6:,.0f} |",
            flush=True,
        )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("generators", nargs="*", default=[str(DEFAULT)])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    for name in given.generators:
        generator = make_generator(name, given.work) if name in SHAPES else Path(name)
        for steps in given.steps:
            race(generator, steps, given.rounds, given.threads, given.work)


if __name__ == "__main__":
    main()
