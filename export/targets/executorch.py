"""ExecuTorch: all parts as methods of one .pte, named as ExecuTorch's own multimodal runner looks for them.

Each part is lowered, and verified, by itself; `join` merges the lowered programs. Methods take one picture
and one conversation: `vision_encoder(image)`, `token_embedding(tokens)`, `text_decoder(inputs_embeds,
cache_position)`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Decoder
from mobilemm.export.parts import Embed, Part, TokenEmbedding
from mobilemm.export.quantization import (
    DRAWING_PARTS,
    FLOAT32,
    GENERATOR_PARTS,
    PARTS,
    Activations,
    PartPlan,
    QuantizationPlan,
    WeightScheme,
    refuse_coreml_only,
)
from mobilemm.export.targets import Exported
from mobilemm.export.targets.executorch_backends import check_backend, partitioners
from mobilemm.export.targets.executorch_convolutions import (
    PictureByPicture,
    is_convolutional,
    quantize_convolutions,
)
from mobilemm.export.targets.executorch_decoder import TextDecoder
from mobilemm.export.targets.executorch_lowering import (
    GROUP,
    DelegatedForms,
    express,
    lower,
    quantize_once,
)
from mobilemm.export.targets.executorch_program import (
    compile_config,
    constant_methods,
    copied,
    executable_of,
    forget_weights,
    lean_lowering,
    uncollected,
    write_program,
)
from mobilemm.export.targets.executorch_report import MethodReport, delegation
from mobilemm.export.verify import share_tensors
from mobilemm.runtime import manifest
from mobilemm.runtime.backends.executorch import ExecutorchDecoder, ExecutorchProgram, look
from mobilemm.runtime.embedding import embed_with_images
from mobilemm.runtime.executorch_check import METHODS
from mobilemm.runtime.manifest import Manifest, ModelCard, Runtime

MODEL = "model.pte"
REPORT = "delegation.json"
# The release that programs were run on.
MIN_EXECUTORCH = "1.5.1"


@dataclass(frozen=True)
class ExecutorchOptions:
    """How parts become ExecuTorch methods.

    Attributes:
        backend: what operators are handed to; "portable" hands over none.
        allow_fallback: operators that compute may stay with ExecuTorch's portable kernels, which are slow.
        convolutions: "float32", or "int8" with steps that calibration has found, of convolutional encoders
            that the plan wants in int8. EfficientNet-Lite0 loses much by it: cosine to fp32 0.96, where the
            floor is 0.98.
        etrecord: where ExecuTorch's Inspector finds what its profiles speak of; None: nowhere.
    """

    backend: str = "xnnpack"
    allow_fallback: bool = False
    convolutions: str = "float32"
    etrecord: Path | None = None

    def __post_init__(self) -> None:
        check_backend(self.backend)
        if self.convolutions not in ("int8", "float32"):
            raise MobileMMError(f"--convolutions {self.convolutions!r}: choose float32 or int8")


class ExecutorchTarget:
    """ExecuTorch for its own runtime: one `model.pte`, weights inside.

    Raises MobileMMError when the packages of the extra `executorch` are missing.
    """

    name: Literal["executorch"] = "executorch"
    default_context = 2048
    memory_factor = 5.0  # MobileVLM V2 1.7B in 4 bits peaked at 5.7 GB, mapped files included
    joins = True

    def __init__(self, options: ExecutorchOptions | None = None) -> None:
        self.options = options or ExecutorchOptions()
        if find_spec("executorch") is None:
            raise MobileMMError("--target executorch needs executorch: pip install 'mobilemm[executorch]'")
        self._context = self.default_context  # the decoder, which says it, is written first
        self._programs: dict[str, Any] = {}  # method → program of the edge dialect, lowered
        self._reports: dict[str, MethodReport] = {}
        self._witnesses: list[tuple[Part, Mapping[str, Any], NDArray[Any]]] = []

    @property
    def runtime(self) -> Runtime:
        return Runtime(name="executorch", min_version=MIN_EXECUTORCH)

    @property
    def fingerprint(self) -> str:
        versions = {name: version(name) for name in ("torch", "executorch")}
        return f"executorch {self.options} {versions}"

    def stores(self, plan: QuantizationPlan) -> QuantizationPlan:
        """In float32 what is wanted in float16; 8-bit linear layers with one scale a row.

        Where nobody asked for a block size, 4-bit groups are XNNPACK's smallest: scales above zero cost
        accuracy that these win back. SmolLM2-135M on captions, KL to fp32 a position: 0.51 in blocks of 128,
        0.29 in groups of 32.
        """
        refuse_coreml_only(plan, "executorch")
        return QuantizationPlan({name: _stored(name, plan.part(name), plan.open_blocks) for name in PARTS})

    def write(self, part: Part, module: nn.Module, folder: Path) -> Exported:
        """Args:
        module: the part's module with its weights in it: floating-point, `QuantizedLinear`,
            `QuantizedEmbedding`. Weights that XNNPACK cannot hold are changed in it to those that are
            written.
        """
        method = METHODS[part.name]
        if isinstance(module, Decoder):
            self._context = module.spec.context_length
        delegated = self.options.backend == "xnnpack"
        lowered, inputs = _method(
            part, share_tensors(express(module) if delegated else module), self._context
        )
        lowered = lower(lowered, delegated=delegated).eval()
        if part.name in DRAWING_PARTS:  # norms see how large their groups are
            with torch.no_grad():
                lowered(*part.inputs.values())
        written = None
        wanted = delegated and self.options.convolutions == "int8" and is_convolutional(lowered)
        if wanted and part.samples is not None:
            lowered = quantize_convolutions(lowered, part.samples)
            written = PictureByPicture(lowered)
        edge = self._lowered(part, lowered, inputs)
        program = edge.exported_program(method)
        self._programs[method] = program
        self._reports[method] = report = delegation(program, part.name in GENERATOR_PARTS)
        if self.options.etrecord is None:
            forget_weights(program)
        if report.unexpected and not (self.options.allow_fallback or self.options.backend == "portable"):
            raise MobileMMError(
                f"part {part.name!r}: {', '.join(report.unexpected)} would run on ExecuTorch's portable"
                " kernels, which are slow: --allow-fallback exports all the same"
            )
        path = folder / f"{part.name}.pte"
        executable = executable_of({method: copied(program)}, {})
        write_program(executable, path)
        report.planned_memory = executable.executorch_program.execution_plan[0].non_const_buffer_sizes
        notes = (f"{method}: {report}",)
        given, made = _signature(program, part, inputs)
        return Exported(path.name, (path.name,), given, made, notes=notes, module=written)

    def _lowered(
        self, part: Part, module: nn.Module, inputs: Mapping[str, tuple[Tensor, dict[int, Any]]]
    ) -> Any:
        from executorch.exir import to_edge, to_edge_transform_and_lower

        method = METHODS[part.name]
        examples = tuple(example for example, _ in inputs.values())
        shapes = tuple(dynamic or None for _, dynamic in inputs.values())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with DelegatedForms(), uncollected():
                program = torch.export.export(module, examples, dynamic_shapes=shapes)
            quantize_once(program.graph)
            chosen = partitioners(self.options.backend, decoder=part.cache is not None)
            if part.cache is not None and chosen:
                # With all operators kept that the partitioner may ask for, the program is traced once instead
                # of three times: minutes. What it does not take after all is in the report.
                kept, _ = chosen[0].ops_to_not_decompose(program)
                with uncollected():
                    edge = to_edge({method: program}, compile_config=compile_config(kept))
                with lean_lowering(keep_weights=self.options.etrecord is not None):
                    return edge.to_backend({method: chosen[0]})
            return to_edge_transform_and_lower(
                {method: program}, partitioner={method: chosen}, compile_config=compile_config()
            )

    def join(self, exported: Mapping[str, Exported], folder: Path, card: ModelCard) -> Mapping[str, Exported]:
        """One program with all methods and the constants that runners ask for.

        Raises MobileMMError when a method does not give there what it gave alone.
        """
        executable = executable_of(self._programs, constant_methods(card), self.options.etrecord)
        write_program(executable, folder / MODEL)
        for part, inputs, wanted in self._witnesses:
            found = self.run(part, replace(exported[part.name], file=MODEL), folder, inputs)
            if not np.allclose(found, wanted, rtol=0, atol=1e-4 * float(np.abs(wanted).max())):
                raise MobileMMError(
                    f"part {part.name!r} gives other numbers in {MODEL} than alone; this is a bug"
                )
        for one in exported.values():
            (folder / one.file).unlink()
        text = json.dumps({name: report.as_json() for name, report in self._reports.items()}, indent=1)
        (folder / REPORT).write_text(text + "\n", encoding="utf-8")
        self._programs, self._reports, self._witnesses = {}, {}, []
        return {name: replace(one, file=MODEL, files=(MODEL, REPORT)) for name, one in exported.items()}

    def run(self, part: Part, exported: Exported, folder: Path, inputs: Mapping[str, Any]) -> NDArray[Any]:
        """Of a decoder each position is fed by itself; the last one's logits are of one long prefill."""
        program = ExecutorchProgram(folder / exported.file)
        feeds = {name: np.asarray(value) for name, value in inputs.items()}
        if part.name == "vision":
            output = look(program, feeds["pixels"])
        elif isinstance(part.module, Decoder):
            spec = part.module.spec
            decoder = ExecutorchDecoder(program, spec.context_length, spec.mrope_section is not None)
            embeds, positions = feeds["inputs_embeds"], feeds.get("position_ids")
            steps = decoder.decode(embeds, positions, np.arange(embeds.shape[1]))
            decoder.truncate(0)
            output = np.concatenate([steps[:, :-1], decoder.decode(embeds, positions)], 1)
        elif part.name in DRAWING_PARTS:
            output = program(METHODS[part.name], *(feeds[name] for name in part.inputs))
        else:
            assert isinstance(part.module, Embed)
            output = embed_with_images(
                lambda ids: program(METHODS["embed"], ids),
                feeds["input_ids"],
                feeds["image_features"],
                part.module.image_token_id,
                part.module.table.num_embeddings,
            )
        if exported.file != MODEL:
            self._witnesses = [one for one in self._witnesses if one[0].name != part.name]
            self._witnesses.append((part, feeds, output))
        return output

    def companions(self, manifest: Manifest) -> dict[str, str]:
        return {}

    def label(self, manifest: Manifest, folder: Path) -> Manifest:
        return manifest


def _stored(part: str, plan: PartPlan, open_blocks: bool) -> PartPlan:
    if part in DRAWING_PARTS:  # XNNPACK computes with codes alone where activations are codes as well
        return PartPlan()

    def scheme(wanted: WeightScheme) -> WeightScheme:
        if wanted.bits == 6:
            raise MobileMMError(f"--target executorch: {part!r} in int6 is not possible; choose int4 or int8")
        if not wanted.quantized:
            return FLOAT32
        if part == "embed":
            return wanted
        if not wanted.symmetric:
            raise MobileMMError(
                "--target executorch: linear layers have no zero points: leave --asymmetric out"
            )
        if wanted.bits == 4 and wanted.block_size is not None and wanted.block_size % GROUP:
            raise MobileMMError(
                f"--target executorch: 4-bit weights share a scale in groups of {GROUP} and its multiples:"
                f" --block-size {GROUP}"
            )
        block = GROUP if open_blocks else wanted.block_size
        return replace(wanted, positive=True, block_size=None if wanted.bits == 8 else block)

    default = scheme(plan.default)
    exceptions = tuple((pattern, scheme(wanted)) for pattern, wanted in plan.exceptions)
    activations: Activations = "int8" if default.quantized and part != "embed" else "float32"
    if part == "decoder" and default.bits == 4:
        # Methods share no table: the head is quantized for itself, with the data and in small blocks.
        exceptions = (*exceptions, ("lm_head", replace(default, block_size=GROUP)))
    return PartPlan(default, exceptions, activations, own_head=part == "decoder")


# --- methods ------------------------------------------------------------------------------------------------


class VisionEncoder(nn.Module):
    """One picture's features as the decoder takes them: uint8 (1, 3, height, width) → (1, tokens, width)."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, image: Tensor) -> Tensor:
        return self.vision(image)[None]


def _method(
    part: Part, module: nn.Module, context: int
) -> tuple[nn.Module, dict[str, tuple[Tensor, dict[int, Any]]]]:
    """A part as the runner calls it: a module, and its inputs by name, each with its dynamic dimensions."""
    if isinstance(module, Decoder):
        spec = module.spec
        length = torch.export.Dim("length", min=1, max=context)
        inputs: dict[str, tuple[Tensor, dict[int, Any]]] = {
            "inputs_embeds": (torch.zeros(1, 5, spec.hidden_size), {1: length}),
            "cache_position": (torch.zeros(1, dtype=torch.int64), {}),
        }
        if spec.mrope_section is not None:
            inputs["position_ids"] = (torch.arange(5).expand(3, 1, 5).clone(), {2: length})
        return TextDecoder(module), inputs
    if part.name == "embed":
        length = torch.export.Dim("length", min=1, max=context)
        return TokenEmbedding(module), {"tokens": (torch.zeros(1, 5, dtype=torch.int64), {1: length})}  # type: ignore[arg-type]
    if part.name == "vision":
        return VisionEncoder(module), {"image": (part.inputs["pixels"][:1].clone(), {})}
    if part.name in DRAWING_PARTS:
        return module, {name: (example, {}) for name, example in part.inputs.items()}
    raise MobileMMError(f"part {part.name!r} is unknown to --target executorch")


def _signature(
    program: Any, part: Part, inputs: Mapping[str, tuple[Tensor, dict[int, Any]]]
) -> tuple[tuple[manifest.Tensor, ...], tuple[manifest.Tensor, ...]]:
    """Inputs and output as the manifest has them."""

    def tensor(name: str, value: Tensor, dynamic: Collection[int]) -> manifest.Tensor:
        shape = ["length" if axis in dynamic else int(size) for axis, size in enumerate(value.shape)]
        return manifest.Tensor(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)  # type: ignore[arg-type]

    (result,) = program.graph_signature.user_outputs
    value = next(node for node in program.graph.nodes if node.name == result).meta["val"]
    dynamic = [axis for axis, size in enumerate(value.shape) if not isinstance(size, int)]
    given = tuple(tensor(name, example, axes) for name, (example, axes) in inputs.items())
    return given, (tensor(part.outputs[0], value, dynamic),)
