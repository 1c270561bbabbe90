"""ONNX: one part → one .onnx file with its weights beside it.

The graph is fused as onnxruntime runs it best: GroupQueryAttention with rotary embedding and cache inside,
SkipSimplifiedLayerNormalization, MatMulNBits, GatherBlockQuantized. With `standard_ops` it holds operators of
the ONNX standard alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import (
    Attention,
    DecoderLayer,
    Rotary,
    rotate,
    scaled_dot_product,
)
from mobilemm.export.parts import Part
from mobilemm.export.quantization import (
    DRAWING_PARTS,
    QuantizationPlan,
    QuantizedEmbedding,
    refuse_coreml_only,
)
from mobilemm.export.targets import Exported
from mobilemm.export.targets.onnx_lowering import (
    CONTRIB,
    OPS,
    OnnxOptions,
    dequantizes_blocks,
    fuse_gate_up,
    lower,
)
from mobilemm.export.targets.onnx_mobile import usability, write_ort
from mobilemm.export.verify import share_tensors
from mobilemm.runtime import manifest
from mobilemm.runtime.manifest import Manifest, ModelCard, Runtime

# The part's default where a caller does not say which positions' logits it wants: the last.
OPTIONAL_INPUTS = {"logits_positions": [-1]}
# The oldest release with every kernel that a graph here needs (8-bit GatherBlockQuantized among them).
MIN_ONNXRUNTIME = "1.23.2"


class OnnxTarget:
    """ONNX for onnxruntime: `NAME.onnx`, and its weights in `NAME.onnx.data`.

    Raises MobileMMError when the packages of the extra `onnx` are missing.
    """

    name: Literal["onnx"] = "onnx"
    default_context = 8192
    memory_factor = 2.2
    joins = False

    def __init__(self, options: OnnxOptions | None = None) -> None:
        self.options = options or OnnxOptions()
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise MobileMMError(f"--target onnx needs {', '.join(missing)}: pip install 'mobilemm[onnx]'")

    @property
    def runtime(self) -> Runtime:
        return Runtime(name="onnxruntime", min_version=MIN_ONNXRUNTIME)

    @property
    def fingerprint(self) -> str:
        versions = {name: version(name) for name in ("torch", "onnx", "onnxscript")}
        return f"onnx {self.options} {versions}"

    def write(self, part: Part, module: nn.Module, folder: Path) -> Exported:
        """Args:
        module: the part's module with its weights in it: floating-point, `QuantizedLinear`,
            `QuantizedEmbedding`. It is changed, and of no use afterwards.
        """
        import onnx_ir

        path = folder / f"{part.name}.onnx"
        model = _graph(part, module, self.options)
        data = _share_tables(part, module, model, folder)
        if data:
            onnx_ir.save(model, path)
        else:
            data = [f"{path.name}.data"]
            # Aligned to pages, so that a runtime can map tensors from the file.
            onnx_ir.save(
                model,
                path,
                external_data=data[0],
                size_threshold_bytes=1024,
                alignment=4096,
                align_threshold=4096,
            )
        del model
        inputs, outputs = signature(path)
        files = [path.name, *(name for name in data if (folder / name).exists())]
        if self.options.ort_format:
            files.append(write_ort(path).name)
        if part.cache is not None:
            cache: Literal["shared", "concatenated"] = (
                "concatenated" if self.options.standard_ops else "shared"
            )
            return Exported(path.name, tuple(files), inputs, outputs, cache)
        notes = (f"{part.name} on accelerators: {usability(path)}",) if part.name == "vision" else ()
        return Exported(path.name, tuple(files), inputs, outputs, notes=notes)

    def join(self, exported: Mapping[str, Exported], folder: Path, card: ModelCard) -> Mapping[str, Exported]:
        return exported

    def run(self, part: Part, exported: Exported, folder: Path, inputs: Mapping[str, Any]) -> NDArray[Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        file = str(folder / exported.file)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        feeds = {name: np.asarray(value) for name, value in inputs.items()}
        if part.cache is not None:
            length = feeds["inputs_embeds"].shape[1]
            feeds["attention_mask"] = np.ones((1, length), np.int64)
            feeds["logits_positions"] = np.arange(length)
            shape = (1, part.cache.num_key_value_heads, 0, part.cache.head_dim)
            kinds = {value.name: value.dtype for value in exported.inputs}
            feeds |= {name: np.zeros(shape, kinds[name]) for name in cache_names(part.cache.num_layers)}
        return session.run([part.outputs[0]], feeds)[0]

    def companions(self, manifest: Manifest) -> dict[str, str]:
        from mobilemm.export.targets.genai import genai_config

        # onnxruntime-genai knows no model that has an embedding of its own, but no eyes.
        if self.options.standard_ops or manifest.image is None:
            return {}
        return {"genai_config.json": genai_config(manifest)}

    def stores(self, plan: QuantizationPlan) -> QuantizationPlan:
        refuse_coreml_only(plan, "onnx")
        return plan

    def label(self, manifest: Manifest, folder: Path) -> Manifest:
        return manifest


def _graph(part: Part, module: nn.Module, options: OnnxOptions) -> Any:
    """The part as an onnx_ir model."""
    import onnx_ir

    if part.name in DRAWING_PARTS:
        options = replace(options, accuracy_level=1)
    if not options.standard_ops:
        for child in module.modules():
            if isinstance(child, DecoderLayer):
                fuse_gate_up(child)  # in the module itself, so that both forms are not held at once
    lowered = lower(share_tensors(module), options)
    inputs = dict(part.inputs)
    if part.cache is not None:
        inputs, lowered = _with_cache(part, lowered, options)
    opset = options.vision_opset if part.name == "vision" else options.opset
    if dequantizes_blocks(lowered):
        opset = max(opset, 21)
    outputs = list(part.outputs)
    if part.cache is not None:
        outputs += [name.replace("past_key_values", "present") for name in cache_names(part.cache.num_layers)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notices on names of axes and on its own future
        program = torch.onnx.export(
            lowered.eval(),
            tuple(inputs.values()),
            None,
            input_names=_flat_names(inputs, part),
            output_names=outputs,
            dynamic_shapes=_dynamic_shapes(part, inputs),
            opset_version=max(opset, 23) if options.standard_ops and part.cache is not None else opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    model: Any = program.model
    for value in model.graph.inputs:
        if value.name in OPTIONAL_INPUTS:
            value.const_value = onnx_ir.tensor(
                OPTIONAL_INPUTS[value.name], dtype=value.dtype, name=value.name
            )
            model.graph.register_initializer(value)
    _name_dimensions(part, model)
    model.producer_name, model.producer_version = "mobilemm", None
    model.graph.name = part.name
    for node in model.graph:
        node.metadata_props.clear()  # stack traces, with paths of the machine that exported
    return model


def _name_dimensions(part: Part, model: Any) -> None:
    """Gives dynamic dimensions the names that the part and the cache have for them."""
    import onnx_ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
        names: dict[int, str | int] = dict(part.dynamic.get(value.name, {}))
        if value.name == "attention_mask":
            names = {0: "batch", 1: "total_length"}
        elif value.name == "logits" and part.cache is not None:
            # What it gives unless asked otherwise; onnxruntime-genai only takes a last position declared so.
            names = {0: "batch", 1: 1}
        elif value.name.startswith("past_key_values."):
            names = {0: "batch", 2: "past_length"}
        elif value.name.startswith("present."):
            names = {0: "batch", 2: "total_length"}
        dims = [names.get(axis, dim) for axis, dim in enumerate(value.shape)]
        value.shape = onnx_ir.Shape(dims)


def _share_tables(part: Part, module: nn.Module, model: Any, folder: Path) -> list[str]:
    """Points a tied table's initializers at the data of the part that holds the same bytes."""
    import onnx_ir

    used: list[str] = []
    for name, (owner, twin) in part.shared.items():
        stored = folder / f"{owner}.onnx"
        if not stored.exists() or not isinstance(module.get_submodule(name), QuantizedEmbedding):
            continue  # a floating-point head lies transposed in its file
        theirs = onnx_ir.load(stored).graph.initializers
        for value in model.graph.initializers.values():
            prefix, _, field = value.name.rpartition(".")
            other = theirs.get(f"module.{twin}.{field}")
            if prefix != name or other is None or not isinstance(other.const_value, onnx_ir.ExternalTensor):
                continue
            held = other.const_value
            if held.tobytes() != value.const_value.tobytes():
                raise MobileMMError(f"part {part.name!r}: its table {name!r} is not that of {owner!r}")
            tensor = value.const_value
            value.const_value = onnx_ir.ExternalTensor(
                held.location,
                held.offset,
                held.length,
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=folder,
            )
            used.append(str(held.location))
    return sorted(set(used))


def signature(path: Path) -> tuple[tuple[manifest.Tensor, ...], tuple[manifest.Tensor, ...]]:
    """Inputs and outputs of an ONNX file."""
    import onnx

    kinds = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.UINT8: "uint8",
        onnx.TensorProto.INT8: "int8",
        onnx.TensorProto.INT32: "int32",
        onnx.TensorProto.INT64: "int64",
    }
    graph = onnx.load(path, load_external_data=False).graph

    def tensors(values: Any) -> tuple[manifest.Tensor, ...]:
        found = []
        for value in values:
            kind = value.type.tensor_type
            shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
            found.append(manifest.Tensor(name=value.name, dtype=kinds[kind.elem_type], shape=shape))  # type: ignore[arg-type]
        return tuple(found)

    return tensors(graph.input), tensors(graph.output)


def cache_names(num_layers: int) -> list[str]:
    """The cache's inputs, in order."""
    return [f"past_key_values.{i}.{kind}" for i in range(num_layers) for kind in ("key", "value")]


# --- the decoder's cache ----------------------------------------------------------------------------------


class GroupQueryCache:
    """Keys and values in buffers that past and present share; positions follow from the mask's length."""

    def __init__(self, mask: Tensor, past: Sequence[Tensor]) -> None:
        self.past, self.present = past, list(past)
        self.total_length = mask.shape[1]
        self.last = (mask.sum(1) - 1).to(torch.int32)
        self.total = torch.scalar_tensor(self.total_length, dtype=torch.int32)

    def attend(self, attention: Attention, qkv: Tensor, rotary: Rotary | None) -> Tensor:
        if attention.head_dim % 16:
            raise MobileMMError(
                f"onnxruntime's attention takes heads of 16, 32, 48 … dimensions, not {attention.head_dim}:"
                " export with --standard-ops"
            )
        batch, length, _ = qkv.shape
        key, value = self.past[2 * attention.index : 2 * attention.index + 2]
        packed: list[Tensor | None] = [qkv, None, None]
        fused_rotary = rotary is not None and not rotary.per_token
        if attention.q_norm is not None or (rotary is not None and rotary.per_token):
            q, k, v = attention.split(qkv)
            if rotary is not None and rotary.per_token:
                q, k = rotate(q, rotary.cos, rotary.sin), rotate(k, rotary.cos, rotary.sin)
            packed = [q.flatten(2), k.flatten(2), v.flatten(2)]
        tables = [rotary.cos, rotary.sin] if fused_rotary and rotary is not None else []
        scales: list[Tensor | None] = []
        attributes: dict[str, Any] = {
            "num_heads": attention.heads,
            "kv_num_heads": attention.kv_heads,
            "scale": attention.scale,
            "do_rotary": int(fused_rotary),
        }
        if attention.window is not None:
            attributes["local_window_size"] = attention.window
        if attention.softcap is not None:
            attributes["softcap"] = attention.softcap
        if attention.key_scale is not None:
            attributes |= {
                "kv_cache_bit_width": 8,
                "k_quant_type": "PER_TENSOR",
                "v_quant_type": "PER_TENSOR",
            }
            # Behind rotary tables, positions, bias and sinks.
            scales = [*[None] * (5 - len(tables)), attention.key_scale, attention.value_scale]
        shape = (batch, attention.kv_heads, self.total_length, attention.head_dim)
        output, *present = OPS.symbolic_multi_out(
            f"{CONTRIB}GroupQueryAttention",
            [*packed, key, value, self.last, self.total, *tables, *scales],
            attributes,
            dtypes=[qkv.dtype, key.dtype, value.dtype],
            shapes=[(batch, length, attention.heads * attention.head_dim), shape, shape],
            version=1,
        )
        self.present[2 * attention.index : 2 * attention.index + 2] = present
        return output


class ConcatenatedCache:
    """Keys and values concatenated in standard operators; the mask only gives the length."""

    def __init__(self, mask: Tensor, past: Sequence[Tensor]) -> None:
        self.past, self.present = past, list(past)

    def attend(self, attention: Attention, qkv: Tensor, rotary: Rotary | None) -> Tensor:
        key, value = (
            part.transpose(1, 2) for part in self.past[2 * attention.index : 2 * attention.index + 2]
        )
        q, k, v = attention.split(qkv)
        past, length = key.shape[1], q.shape[1]
        if rotary is not None:
            cos, sin = rotary.cos, rotary.sin
            if not rotary.per_token:
                positions = torch.arange(past, past + length)
                cos, sin = cos[positions][None], sin[positions][None]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = torch.cat([key, k], 1), torch.cat([value, v], 1)
        self.present[2 * attention.index : 2 * attention.index + 2] = k.transpose(1, 2), v.transpose(1, 2)
        return scaled_dot_product(attention, q, k, v, past)


class _CachedModule(nn.Module):
    """A part with a cache as one function of tensors."""

    def __init__(self, module: nn.Module, names: Sequence[str], cache: Any) -> None:
        super().__init__()
        self.module, self.names, self.cache = module, names, cache

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, arguments, strict=True))
        first, mask, past = given.pop("inputs_embeds"), given.pop("attention_mask"), given.pop("past")
        cache = self.cache(mask, past)
        output = self.module(first, cache, **given)
        return (output, *cache.present)


def _with_cache(part: Part, module: nn.Module, options: OnnxOptions) -> tuple[dict[str, Any], nn.Module]:
    assert part.cache is not None
    shape = (1, part.cache.num_key_value_heads, 4, part.cache.head_dim)
    dtype = torch.int8 if int8_cache(module) else torch.float32
    past = [torch.zeros(shape, dtype=dtype) for _ in range(2 * part.cache.num_layers)]
    first, *rest = part.inputs.items()
    mask = torch.ones(1, 4 + first[1].shape[1], dtype=torch.int64)
    inputs = dict([first, ("attention_mask", mask), *rest, ("past", past)])
    kind = ConcatenatedCache if options.standard_ops else GroupQueryCache
    return inputs, _CachedModule(module, list(inputs), kind)


def int8_cache(module: nn.Module) -> bool:
    """Whether the decoder keeps keys and values in int8."""
    return any(isinstance(child, Attention) and child.key_scale is not None for child in module.modules())


def _flat_names(inputs: dict[str, Any], part: Part) -> list[str]:
    names = [name for name in inputs if name != "past"]
    return names + (cache_names(part.cache.num_layers) if part.cache is not None else [])


def _dynamic_shapes(part: Part, inputs: dict[str, Any]) -> Any:
    dims: dict[str, Any] = {}

    def dim(name: str) -> Any:
        return dims.setdefault(name, torch.export.Dim(name))

    shapes: dict[str, Any] = {}
    for name in inputs:
        if name == "attention_mask":
            shapes[name] = {0: dim("batch"), 1: torch.export.Dim.DYNAMIC}
        elif name == "past":
            shapes[name] = [{0: dim("batch"), 2: dim("past_length")} for _ in inputs[name]]
        else:
            shapes[name] = {axis: dim(word) for axis, word in part.dynamic.get(name, {}).items()}
    if part.cache is not None:
        return (tuple(shapes.values()),)  # the arguments of `_CachedModule.forward`
    return shapes
