"""Core ML: one part → one .mlpackage, an ML program for iOS 18 and macOS 15 with weights beside it.

The decoder is one package of functions that share weights, `prefill` for a fixed number of positions (several
where asked) and `decode` for one, over the states `k_cache` and `v_cache`. Everything computes in float16.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mobilemm.errors import MobileMMError, one_line
from mobilemm.export.decoder import Decoder
from mobilemm.export.memory import release
from mobilemm.export.parts import Part, TokenEmbedding
from mobilemm.export.quantization import PARTS, PartPlan, QuantizationPlan, WeightScheme
from mobilemm.export.targets import Exported
from mobilemm.export.targets.coreml_conversion import (
    STEP_PASSES,
    complete_converter,
    keeps_float32,
    unchecked_passes,
)
from mobilemm.export.targets.coreml_functions import merge
from mobilemm.export.targets.coreml_lowering import STATE_ALIGNMENT, STATES, DecoderStep, Layout, lower
from mobilemm.export.targets.coreml_package import describe, require_rotary, require_states, signature
from mobilemm.export.verify import share_tensors
from mobilemm.runtime.manifest import Manifest, ModelCard, Runtime

FLOAT16 = WeightScheme(bits=16, block_size=None)
# Deployment target → the system that is the least. States and codes in blocks came with iOS 18.
DEPLOYMENT_TARGETS = {"iOS18": "18", "iOS26": "26"}
EXTENSION = ".mlpackage"
# Each is converted by itself, and Core ML compiles each for its processors.
MOST_FUNCTIONS = 8


@dataclass(frozen=True)
class CoreMLOptions:
    """How parts become Core ML packages.

    Attributes:
        minimum_deployment_target: "iOS18" or "iOS26"; macOS, watchOS and the others of the same year.
        layout: "gpu" has linear layers over (1, length, channels) and fused attention; "ane" is written for
            the Neural Engine: convolutions over (1, channels, 1, length).
        prefill: positions of the decoder's function `prefill`; several make a function `prefill_LENGTH` of
            each, among which apps choose by what they have to say.
    """

    minimum_deployment_target: str = "iOS18"
    layout: Layout = "gpu"
    prefill: int | Sequence[int] = 64

    def __post_init__(self) -> None:
        if self.minimum_deployment_target not in DEPLOYMENT_TARGETS:
            raise MobileMMError(
                f"--minimum-deployment-target {self.minimum_deployment_target!r}: states need iOS 18; choose"
                f" from {', '.join(DEPLOYMENT_TARGETS)}"
            )
        if self.layout not in get_args(Layout):
            raise MobileMMError(f"--coreml-layout {self.layout!r}: choose from {', '.join(get_args(Layout))}")
        lengths = self.prefill_functions.values()
        for length in lengths:
            if not 2 <= length <= 2048:
                raise MobileMMError(f"--prefill-length {length}: choose 2 to 2048 positions")
        if len(lengths) > MOST_FUNCTIONS:
            raise MobileMMError(f"--prefill-length: {len(lengths)} lengths; choose {MOST_FUNCTIONS} at most")

    @property
    def prefill_functions(self) -> dict[str, int]:
        """Positions by the function's name, the fewest first."""
        if isinstance(self.prefill, int):
            return {"prefill": self.prefill}
        lengths = sorted(set(self.prefill))
        if len(lengths) == 1:
            return {"prefill": lengths[0]}
        return {f"prefill_{length}": length for length in lengths}


class CoreMLTarget:
    """Core ML for iOS and macOS: `NAME.mlpackage`.

    Raises MobileMMError when coremltools is missing.
    """

    name: Literal["coreml"] = "coreml"
    default_context: int = 2048
    memory_factor = 2.2
    joins = False

    def __init__(self, options: CoreMLOptions | None = None) -> None:
        self.options = options or CoreMLOptions()
        if find_spec("coremltools") is None:
            raise MobileMMError("--target coreml needs coremltools: pip install 'mobilemm[coreml]'")

    @property
    def runtime(self) -> Runtime:
        return Runtime(name="coreml", min_version=DEPLOYMENT_TARGETS[self.options.minimum_deployment_target])

    @property
    def fingerprint(self) -> str:
        versions = {name: version(name) for name in ("torch", "coremltools")}
        return f"coreml {self.options} {versions}"

    def write(self, part: Part, module: nn.Module, folder: Path) -> Exported:
        """Args:
        module: the part's module with its weights in it: floating-point, `QuantizedLinear`,
            `QuantizedEmbedding`, `QuantizedConv2d`.
        """
        package = folder / f"{part.name}{EXTENSION}"
        shutil.rmtree(package, ignore_errors=True)
        try:
            with _quiet(), unchecked_passes(), torch.no_grad():
                if part.cache is not None:
                    self._write_decoder(module, package)
                elif part.name == "embed":
                    self._write_embedding(module, package)
                else:
                    self._write_static(part, module, package)
        except MobileMMError:
            raise
        except Exception as error:
            raise MobileMMError(
                f"part {part.name!r}: coremltools cannot convert it ({one_line(error)})"
            ) from error
        inputs, outputs = signature(package)
        files = sorted(path for path in package.rglob("*") if path.is_file())
        names = tuple(path.relative_to(folder).as_posix() for path in files)
        return Exported(file=package.name, files=names, inputs=inputs, outputs=outputs)

    def run(self, part: Part, exported: Exported, folder: Path, inputs: Mapping[str, Any]) -> NDArray[Any]:
        from mobilemm.export.targets.coreml_execution import run_part

        return run_part(part, folder / exported.file, inputs)

    def join(self, exported: Mapping[str, Exported], folder: Path, card: ModelCard) -> Mapping[str, Exported]:
        return exported

    def stores(self, plan: QuantizationPlan) -> QuantizationPlan:
        """In float16 what is wanted in float32; activations too, if they would be quantized at each run."""
        return QuantizationPlan({name: _stored(name, plan.part(name)) for name in PARTS})

    def companions(self, manifest: Manifest) -> dict[str, str]:
        return {}

    def label(self, manifest: Manifest, folder: Path) -> Manifest:
        card, parts = manifest.model, {}
        for name, part in manifest.parts.items():
            facts = {
                "model": card.name,
                "family": card.family,
                "part": name,
                "bits": str(part.quantization.bits),
            }
            if name == "decoder":
                facts["context_length"] = str(card.context_length)
            author = f"{card.name}, exported by mobilemm"
            with _quiet():
                describe(folder / part.file, name, facts, author=author, license=card.license)
            size = sum((folder / file).stat().st_size for file in part.files)
            parts[name] = part.model_copy(update={"bytes": size})
        return manifest.model_copy(update={"parts": parts})

    def _write_decoder(self, module: nn.Module, package: Path) -> None:
        """All functions converted by themselves, then made one package."""
        assert isinstance(module, Decoder)
        spec = module.spec
        prefill = self.options.prefill_functions
        buffer = max(-(-spec.context_length // STATE_ALIGNMENT) * STATE_ALIGNMENT, *prefill.values())
        lowered = lower(share_tensors(module), self.options.layout)
        assert isinstance(lowered, Decoder)
        packages: dict[str, Path] = {}
        with tempfile.TemporaryDirectory(dir=package.parent, prefix=".coreml-") as work:
            for function, length in {**prefill, "decode": 1}.items():
                step = DecoderStep(lowered, length, buffer, self.options.layout).half().eval()
                known = {
                    "inputs_embeds": _Input((1, length, spec.hidden_size), torch.float16),
                    "position_ids": _Input((1, length), torch.int32),
                    "rope_position_ids": _Input((3, 1, length), torch.int32),
                    "last_index": _Input((1,), torch.int32),
                }
                single = Path(work) / f"{function}{EXTENSION}"
                self._convert(
                    step, {name: known[name] for name in step.input_names}, ["logits"], single, STATES
                )
                require_states(single, spec.num_layers)
                require_rotary(single, spec.rope_tables)
                packages[function] = single
                del step
                release()
            merge(packages, "decode", package)

    def write_text_step(self, step: DecoderStep, context: int, package: Path) -> None:
        """Converts a `TextStep` (see `swift_transformers`) for conversations of so many tokens.

        Raises MobileMMError as `write` does.
        """
        inputs = {
            "inputIds": _Input((1, None), torch.int32, longest=context),
            "causalMask": _Input((1, 1, 1, None), torch.float16, shortest=2, longest=context + 1, traced=8),
        }
        spec, states = step.decoder.spec, step.states
        try:
            with _quiet(), unchecked_passes(), torch.no_grad():
                self._convert(step, inputs, ["logits"], package, states)
        except Exception as error:
            raise MobileMMError(f"coremltools cannot convert the model ({one_line(error)})") from error
        require_states(package, spec.num_layers, states)
        require_rotary(package, spec.rope_tables)

    def _write_embedding(self, module: nn.Module, package: Path) -> None:
        embedding = lower(share_tensors(TokenEmbedding(module))).eval()  # type: ignore[arg-type]
        ids = _Input((1, None), torch.int32, longest=self.default_context)
        self._convert(embedding, {"input_ids": ids}, ["inputs_embeds"], package)

    def _write_static(self, part: Part, module: nn.Module, package: Path) -> None:
        """A part without state, its shapes those of its example inputs, one picture a call."""
        lowered = lower(share_tensors(module), self.options.layout).eval()
        inputs = {}
        for name, example in part.inputs.items():
            shape = (1, *example.shape[1:]) if 0 in part.dynamic.get(name, {}) else tuple(example.shape)
            inputs[name] = _Input(
                shape, torch.float32, image=example.dtype == torch.uint8, exact=len(shape) == 1
            )
        self._convert(lowered, inputs, part.outputs, package)

    def _convert(
        self,
        module: nn.Module,
        inputs: Mapping[str, _Input],
        outputs: Sequence[str],
        package: Path,
        states: Sequence[str] = (),
    ) -> None:
        import coremltools as ct

        complete_converter()
        traced = torch.jit.trace(module, tuple(each.example() for each in inputs.values()), check_trace=False)
        shapes = {name: getattr(module, name).shape for name in states}
        ct.convert(
            traced,
            convert_to="mlprogram",
            inputs=[each.coreml(name) for name, each in inputs.items()],
            outputs=[ct.TensorType(name=name, dtype=np.float16) for name in outputs],
            states=[
                ct.StateType(wrapped_type=ct.TensorType(shape=shape, dtype=np.float16), name=name)
                for name, shape in shapes.items()
            ]
            or None,
            minimum_deployment_target=getattr(ct.target, self.options.minimum_deployment_target),
            compute_precision=ct.precision.FLOAT16
            if states
            else ct.transform.FP16ComputePrecision(lambda op: not keeps_float32(op)),
            pass_pipeline=ct.PassPipeline(list(STEP_PASSES), "decoder step") if states else None,
            package_dir=str(package),
            skip_model_load=True,
        )


@dataclass(frozen=True)
class _Input:
    """What a graph is traced and converted with; a dimension of None is as long as is said.

    `exact` numbers come in float32: a timestep's last digits are angles.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    image: bool = False
    exact: bool = False
    shortest: int = 1
    longest: int = 1
    traced: int = 2

    def example(self) -> torch.Tensor:
        return torch.zeros([self.traced if size is None else size for size in self.shape], dtype=self.dtype)

    def coreml(self, name: str) -> Any:
        import coremltools as ct

        if self.image:
            # Core ML's own image input has one scale for all channels: scales stay inside the graph.
            return ct.ImageType(name=name, shape=self.shape, color_layout=ct.colorlayout.RGB)
        flexible = ct.RangeDim(self.shortest, self.longest, default=self.shortest)
        shape = [flexible if size is None else size for size in self.shape]
        kind = np.int32 if self.dtype == torch.int32 else np.float32 if self.exact else np.float16
        return ct.TensorType(name=name, shape=shape, dtype=kind)


def _stored(part: str, plan: PartPlan) -> PartPlan:
    def scheme(wanted: WeightScheme) -> WeightScheme:
        if wanted.bits == 6 and not wanted.palette:
            raise MobileMMError(
                f"--target coreml: {part!r} in int6 is not possible; choose pal6, int4 or int8"
            )
        return FLOAT16 if wanted.bits == 32 else wanted

    exceptions = tuple((pattern, scheme(wanted)) for pattern, wanted in plan.exceptions)
    static = plan.activations == "int8-static"
    return PartPlan(scheme(plan.default), exceptions, "int8-static" if static else "float16")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without coremltools' bars and notices; what goes wrong is raised."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
