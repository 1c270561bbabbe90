"""Checks an ExecuTorch bundle's program as a file: what the runtime would load is looked at before it does.

Whoever makes a hostile bundle computes its hashes as well. So the program's structure is read within limits
(`mobilemm.runtime.pte`), its methods must be those of the manifest's parts, over known operators and
delegates, and what it says of itself must be what the manifest says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mobilemm.errors import MobileMMError
from mobilemm.runtime.bundle import open_plain
from mobilemm.runtime.manifest import Manifest, Part, Tensor
from mobilemm.runtime.manifest_check import AGAIN, shown
from mobilemm.runtime.pte import Method, PteError, TensorType, Value, read_pte

METHODS = {
    "vision": "vision_encoder",
    "embed": "token_embedding",
    "decoder": "text_decoder",
    "output_projector": "output_projector",
    "generator": "generator",
    "denoiser": "denoiser",
    "image_decoder": "image_decoder",
}
"""Part → method, as ExecuTorch's own multimodal runner names it; it knows none that draws."""

NAMESPACES = ("aten", "llama", "quantized_decomposed", "dim_order_ops", "executorch_prim")
BACKENDS = ("XnnpackBackend", "CoreMLBackend", "VulkanBackend")


def check_executorch_parts(folder: Path, manifest: Manifest) -> None:
    """Raises MobileMMError, one line, at the first fault of the bundle's programs."""
    for relative in dict.fromkeys(part.file for part in manifest.parts.values()):
        path = folder / relative
        try:
            with open_plain(folder, relative) as file:
                methods = read_pte(file)
        except PteError as error:
            raise MobileMMError(f"{path}: {error}; {AGAIN}") from None
        for fault in _faults(methods, manifest, relative):
            raise MobileMMError(f"{path}: {fault}; {AGAIN}")


def _faults(methods: dict[str, Method], manifest: Manifest, file: str) -> Iterator[str]:
    for method in methods.values():
        for operator in method.operators:
            if operator.partition("::")[0] not in NAMESPACES:
                yield f"method {shown(method.name)} calls {shown(operator)}, which is unknown here"
        for backend in method.backends:
            if backend not in BACKENDS:
                yield f"method {shown(method.name)} needs the backend {shown(backend)}, which is unknown here"
    for name, part in manifest.parts.items():
        if part.file != file:
            continue
        wanted = METHODS.get(name, name)
        if wanted not in methods:
            yield f"the method {wanted!r} of part {shown(name)} is missing"
            return
        yield from _signature_faults(methods[wanted], part, manifest.model.context_length)
    model = manifest.model
    numbers = (
        ("get_max_seq_len", model.context_length),
        ("get_max_context_len", model.context_length),
        ("get_vocab_size", model.vocab_size),
    )
    for name, number in numbers:
        found = constants(methods, name)
        if found != (number,):
            yield f"{name} says {shown(found[0] if found else None)}, where the manifest has {number}"
    if set(constants(methods, "get_eos_ids")) != set(model.eos_token_ids):
        yield "get_eos_ids says other tokens than the manifest"


def constants(methods: dict[str, Method], name: str) -> tuple[Value, ...]:
    """What a method without instructions gives; () when there is none."""
    method = methods.get(name)
    return method.outputs if method is not None and not method.instructions else ()


def _signature_faults(method: Method, part: Part, context: int) -> Iterator[str]:
    for side, values, tensors in (
        ("inputs", method.inputs, part.inputs),
        ("outputs", method.outputs, part.outputs),
    ):
        if len(values) != len(tensors):
            yield f"method {method.name!r} has {len(values)} {side}, where the manifest has {len(tensors)}"
            return
        for value, tensor in zip(values, tensors, strict=True):
            if not _fits(value, tensor, context):
                found = f"{value.dtype} {value.shape}" if isinstance(value, TensorType) else "no tensor"
                yield (
                    f"method {method.name!r}: {tensor.name!r} is {found}, where the manifest has"
                    f" {tensor.dtype} {shown(str(tuple(tensor.shape)))}"
                )


def _fits(value: Value, tensor: Tensor, context: int) -> bool:
    """Whether it is this tensor; a dimension with a name goes up to the context."""
    if not isinstance(value, TensorType) or value.dtype != tensor.dtype:
        return False
    sizes = tuple(context if isinstance(size, str) else size for size in tensor.shape)
    return value.shape == sizes and value.dynamic == any(isinstance(size, str) for size in tensor.shape)
