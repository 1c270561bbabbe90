"""ONNX: one part → one .onnx file with its weights beside it.

The graph is fused as onnxruntime runs it best: GroupQueryAttention with rotary embedding and cache inside,
SkipSimplifiedLayerNormalization, MatMulNBits, GatherBlockQuantized. With `standard_ops` it holds operators of
the ONNX standard alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    ResidualNorm,
    RMSNorm,
    Rotary,
    rotate,
    scaled_dot_product,
)
from mobilemm.export.parts import Part
from mobilemm.export.quantization import QuantizedEmbedding, QuantizedLinear, QuantizedWeight
from mobilemm.export.targets import Exported
from mobilemm.export.targets.onnx_mobile import usability, write_ort
from mobilemm.export.verify import share_tensors
from mobilemm.runtime import manifest
from mobilemm.runtime.manifest import Manifest, Runtime

# Symbolic operators give zeros outside an export: a lowered module is only good for exporting.
OPS = torch.onnx.ops
CONTRIB = "com.microsoft::"
# The part's default where a caller does not say which positions' logits it wants: the last.
OPTIONAL_INPUTS = {"logits_positions": [-1]}
# The oldest release with every kernel that a graph here needs (8-bit GatherBlockQuantized among them).
MIN_ONNXRUNTIME = "1.23.2"


@dataclass(frozen=True)
class OnnxOptions:
    """How parts become ONNX.

    Attributes:
        opset: of the decoder and the embedding; vision keeps to 20, at which every operator of convolutional
            encoders has a kernel.
        standard_ops: no contrib operators; the cache is then concatenated, not shared.
        accuracy_level: of MatMulNBits; 4 computes with activations in int8, 1 in float32.
        ort_format: `NAME.ort` beside each file.
    """

    opset: int = 21
    vision_opset: int = 20
    standard_ops: bool = False
    accuracy_level: int = 4
    ort_format: bool = False


class OnnxTarget:
    """ONNX for onnxruntime: `NAME.onnx`, and its weights in `NAME.onnx.data`.

    Raises MobileMMError when the packages of the extra `onnx` are missing.
    """

    name: Literal["onnx"] = "onnx"

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
            return Exported(tuple(files), inputs, outputs, cache)
        notes = (f"{part.name} on accelerators: {usability(path)}",) if part.name == "vision" else ()
        return Exported(tuple(files), inputs, outputs, notes=notes)

    def run(self, part: Part, exported: Exported, folder: Path, inputs: Mapping[str, Any]) -> NDArray[Any]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        file = str(folder / exported.files[0])
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

        return {} if self.options.standard_ops else {"genai_config.json": genai_config(manifest)}


def _graph(part: Part, module: nn.Module, options: OnnxOptions) -> Any:
    """The part as an onnx_ir model."""
    import onnx_ir

    if not options.standard_ops:
        for child in module.modules():
            if isinstance(child, DecoderLayer):
                _fuse_gate_up(child)  # in the module itself, so that both forms are not held at once
    lowered = lower(share_tensors(module), options)
    inputs = dict(part.inputs)
    if part.cache is not None:
        inputs, lowered = _with_cache(part, lowered, options)
    opset = options.vision_opset if part.name == "vision" else options.opset
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


# --- lowering: generic modules → the operators that ONNX has for them ---------------------------------------


def lower(module: nn.Module, options: OnnxOptions) -> nn.Module:
    """Puts modules that emit ONNX operators in the places of quantized layers and norms."""
    for name, child in list(module.named_children()):
        replacement = _lowered(child, options)
        if replacement is not None:
            setattr(module, name, replacement)
        else:
            lower(child, options)
    return module


def _fuse_gate_up(layer: DecoderLayer) -> None:
    """One product for gate and up where both are stored alike: their rows one below the other."""
    gate, up = layer.gate, layer.up
    if not isinstance(gate, QuantizedLinear) or not isinstance(up, QuantizedLinear):
        return
    zero = (gate.zero_points, up.zero_points)
    if (gate.bits, gate.block_size) != (up.bits, up.block_size) or (zero[0] is None) != (zero[1] is None):
        return
    rows, columns = gate.out_features + up.out_features, gate.in_features
    weight = QuantizedWeight(
        torch.cat([gate.packed, up.packed]),
        torch.cat([gate.scales, up.scales]),
        None if zero[0] is None or zero[1] is None else torch.cat([zero[0], zero[1]]),
        gate.bits,
        gate.block_size,
        (rows, columns),
    )
    bias = None if gate.bias is None or up.bias is None else torch.cat([gate.bias, up.bias])
    layer.gate, layer.up = QuantizedLinear(weight, bias), None


def _lowered(module: nn.Module, options: OnnxOptions) -> nn.Module | None:
    if isinstance(module, QuantizedLinear):
        if options.standard_ops:
            return _DequantizedLinear(module)
        whole_row = module.block_size >= module.in_features and module.bits == 8
        return _DynamicInt8Linear(module) if whole_row else _MatMulNBits(module, options.accuracy_level)
    if isinstance(module, QuantizedEmbedding):
        return _DequantizedEmbedding(module) if options.standard_ops else _GatherBlockQuantized(module)
    if options.standard_ops:
        return None
    if isinstance(module, ResidualNorm):
        return _SkipSimplifiedLayerNorm(module)
    if isinstance(module, RMSNorm):
        return _SimplifiedLayerNorm(module)
    return None


class _SimplifiedLayerNorm(nn.Module):
    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return _simplified_layer_norm(x, self.weight, self.eps)


class _SkipSimplifiedLayerNorm(nn.Module):
    def __init__(self, norm: ResidualNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            return _simplified_layer_norm(x, self.weight, self.eps), x
        per_row = (*x.shape[:-1], 1)
        normed, _, _, total = OPS.symbolic_multi_out(
            f"{CONTRIB}SkipSimplifiedLayerNormalization",
            [x, residual, self.weight],
            {"epsilon": self.eps},
            dtypes=[x.dtype, torch.float32, torch.float32, x.dtype],
            shapes=[x.shape, per_row, per_row, x.shape],
            version=1,
        )
        return normed, total


def _simplified_layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # onnxruntime registers this operator of its own in the standard's domain.
    attributes: dict[str, Any] = {"epsilon": eps, "axis": -1, "stash_type": 1}
    return OPS.symbolic("SimplifiedLayerNormalization", [x, weight], attributes, dtype=x.dtype, shape=x.shape)


class _MatMulNBits(nn.Module):
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: QuantizedLinear, accuracy_level: int) -> None:
        super().__init__()
        _require_stored(linear)
        self.register_buffer("packed", linear.packed)
        self.register_buffer("scales", linear.scales)
        self.register_buffer("zero_points", _packed_zero_points(linear))
        self.register_buffer("bias", linear.bias)
        self.rows, self.columns = linear.out_features, linear.in_features
        self.attributes: dict[str, Any] = {
            "K": self.columns,
            "N": self.rows,
            "bits": linear.bits,
            "block_size": linear.block_size,
            "accuracy_level": accuracy_level,
        }

    def forward(self, x: Tensor) -> Tensor:
        inputs: list[Tensor | None] = [x, self.packed, self.scales, self.zero_points, None, self.bias]
        while inputs[-1] is None:
            inputs.pop()
        shape = (*x.shape[:-1], self.rows)
        return OPS.symbolic(
            f"{CONTRIB}MatMulNBits", inputs, self.attributes, dtype=x.dtype, shape=shape, version=1
        )


class _DynamicInt8Linear(nn.Module):
    """Weights int8 per row, activations quantized to uint8 at each run."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        codes = linear.quantized.codes()[:, 0, : linear.in_features]
        zero = 128 if linear.zero_points is None else linear.zero_points
        self.register_buffer("weight", (codes.to(torch.int16) - zero).to(torch.int8).T.contiguous())
        self.register_buffer("scales", linear.scales[:, 0].contiguous())
        self.register_buffer("bias", linear.bias)
        self.rows = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return OPS.symbolic(
            f"{CONTRIB}DynamicQuantizeMatMul",
            [x, self.weight, self.scales, None, *([] if self.bias is None else [self.bias])],
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.rows),
            version=1,
        )


class _GatherBlockQuantized(nn.Module):
    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        _require_stored(embedding)
        # The same bytes as a head's MatMulNBits, so that a tied table is stored once: rows are padded.
        self.register_buffer("packed", embedding.packed.flatten(1))
        self.register_buffer("scales", embedding.scales)
        self.register_buffer("zero_points", _packed_zero_points(embedding))
        self.width = embedding.embedding_dim
        self.padded = embedding.packed.shape[1] * embedding.block_size
        self.attributes: dict[str, Any] = {
            "bits": embedding.bits,
            "block_size": embedding.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }

    def forward(self, ids: Tensor) -> Tensor:
        zero_points = [] if self.zero_points is None else [self.zero_points]
        rows = OPS.symbolic(
            f"{CONTRIB}GatherBlockQuantized",
            [self.packed, ids, self.scales, *zero_points],
            self.attributes,
            dtype=torch.float32,
            shape=(*ids.shape, self.padded),
            version=1,
        )
        return rows[..., : self.width] if self.padded != self.width else rows


class _DequantizedLinear(nn.Module):
    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.table = _BlockDequantize(linear)
        self.register_buffer("bias", linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        product = x @ self.table().T
        return product if self.bias is None else product + self.bias


class _DequantizedEmbedding(nn.Module):
    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.table = _BlockDequantize(embedding)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.table())


class _BlockDequantize(nn.Module):
    """A quantized table by ONNX's DequantizeLinear, eight bits a code: standard at every opset from 21."""

    codes: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, module: QuantizedLinear | QuantizedEmbedding) -> None:
        super().__init__()
        weight = module.quantized
        columns = weight.shape[1]
        self.register_buffer("codes", weight.codes().flatten(1)[:, :columns].contiguous())
        self.register_buffer("scales", weight.scales)
        zero = weight.zero_points
        middle = torch.full(weight.scales.shape, 2 ** (weight.bits - 1), dtype=torch.uint8)
        self.register_buffer("zero_points", middle if zero is None else zero)
        self.shape, self.block_size = weight.shape, weight.block_size

    def forward(self) -> Tensor:
        return OPS.symbolic(
            "DequantizeLinear",
            [self.codes, self.scales, self.zero_points],
            {"axis": 1, "block_size": self.block_size},
            dtype=torch.float32,
            shape=self.shape,
        )


def _require_stored(module: QuantizedLinear | QuantizedEmbedding) -> None:
    if module.bits not in (4, 8):
        raise MobileMMError(f"ONNX stores weights in 4 or 8 bits, not {module.bits}: choose int4 or int8")


def _packed_zero_points(module: QuantizedLinear | QuantizedEmbedding) -> Tensor | None:
    """Zero points in the codes' own width: two a byte along the blocks for 4 bit."""
    zero = module.zero_points
    if zero is None or module.bits == 8:
        return zero
    if zero.shape[1] % 2:
        zero = nn.functional.pad(zero, (0, 1))
    return (zero[:, 0::2] | (zero[:, 1::2] << 4)).contiguous()
