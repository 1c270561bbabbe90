"""What of a method its backends take over, and what is left to ExecuTorch's own kernels."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# What may stay outside of a backend, and why.
EXPECTED: Mapping[str, str] = {
    "llama.update_cache": "ExecuTorch's own operator",
    "llama.custom_sdpa": "ExecuTorch's own operator",
    "llama.custom_quantized_sdpa": "ExecuTorch's own operator",
    **dict.fromkeys(
        (
            *("quantized_decomposed.quantize_per_tensor", "quantized_decomposed.quantize_per_token"),
            "quantized_decomposed.choose_qparams_per_token_asymmetric",
        ),
        "of queries, keys and values, for a cache in int8",
    ),
    "quantized_decomposed.embedding_4bit": "a look-up",
    "quantized_decomposed.embedding_byte": "a look-up",
    "aten.embedding": "a look-up",
    "aten.mul": "of an embedding by its scale",
    **dict.fromkeys(("aten.arange", "aten.full"), "constants"),
    "aten.mean": "of a condition's few tokens",
    **dict.fromkeys(("aten._to_copy", "dim_order_ops._to_dim_order_copy"), "pixels come as uint8"),
    **dict.fromkeys(
        (
            *(
                "aten.view_copy",
                "aten.slice_copy",
                "aten.select_copy",
                "aten.unsqueeze_copy",
                "aten.squeeze_copy",
            ),
            *(
                "aten.permute_copy",
                "aten.expand_copy",
                "aten.cat",
                "aten.clone",
                "dim_order_ops._clone_dim_order",
            ),
            *("aten.split_copy", "aten.split_with_sizes_copy", "aten.alias_copy", "aten.constant_pad_nd"),
            *("aten.index", "aten.select_scatter", "aten.slice_scatter", "aten.upsample_nearest2d"),
        ),
        "moves numbers, computes none",
    ),
}
# Of shapes and positions, checked and computed where the program runs.
BOOKKEEPING = re.compile(
    r"(aten\.(sym_\w+|_assert_\w+|_local_scalar_dense)|_operator\.|builtins\.|math\.|torch\.sym)"
)


# ExecuTorch's plain kernels, and those that it has for language models, which are fast.
OUTSIDE = ("portable", "llm kernels")


@dataclass
class Share:
    """Operators, and floating-point operations (two for a multiplication and an addition), of one backend."""

    operators: int = 0
    flops: int = 0


@dataclass
class MethodReport:
    """Where one method's operators run.

    Attributes:
        backends: name of a delegate, or of OUTSIDE, → its share. With a dynamic length, operations are those
            of the example's length.
        delegates: separate graphs that are handed over.
        fallbacks: operators outside of any backend → how often.
        unexpected: those of them that a backend should have taken.
        planned_memory: bytes of each memory: [0, activations, keys and values].
    """

    backends: dict[str, Share] = field(default_factory=dict)
    delegates: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    unexpected: tuple[str, ...] = ()
    planned_memory: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        operators = sum(share.operators for share in self.backends.values())
        flops = sum(share.flops for share in self.backends.values())
        shares = [
            f"{name} {share.operators / max(operators, 1):.0%} of operators and"
            f" {share.flops / max(flops, 1):.1%} of FLOPs"
            for name, share in self.backends.items()
        ]
        memory = sum(self.planned_memory) / 1e6
        return f"{'; '.join(shares)}; {self.delegates} delegates; {memory:,.1f} MB planned"

    def as_json(self) -> dict[str, Any]:
        """For the file beside the program."""
        return {
            "backends": {name: vars(share) for name, share in self.backends.items()},
            "delegates": self.delegates,
            "portable": {
                name: {"count": count, "why": EXPECTED.get(name, "no backend takes it")}
                for name, count in self.fallbacks.most_common()
            },
            "planned_memory": list(self.planned_memory),
        }


# Means that norms take are matrix products (`executorch_lowering`): elsewhere a mean is one that was missed.
OF_THE_GENERATOR = ("aten.mean",)


def delegation(program: Any, generator: bool = False) -> MethodReport:
    """Of a lowered program of the edge dialect; `generator`, when it is that part's."""
    report = MethodReport()
    for backend, node in _operators(program.graph_module, report):
        share = report.backends.setdefault(backend, Share())
        share.operators += 1
        share.flops += flops(node)
        if backend in OUTSIDE:
            report.fallbacks[operator_name(node)] += 1
    known = set(EXPECTED) - (set() if generator else set(OF_THE_GENERATOR))
    report.unexpected = tuple(sorted(set(report.fallbacks) - known))
    return report


def delegates(module: Any) -> Iterator[Any]:
    """The lowered modules of a program's graph."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and hasattr(lowered := getattr(module, node.target), "backend_id"):
            yield lowered


def _operators(module: Any, report: MethodReport) -> Iterator[tuple[str, Any]]:
    """Backend and node of each operator."""
    for node in module.graph.nodes:
        if node.op == "get_attr" and hasattr(lowered := getattr(module, node.target), "backend_id"):
            report.delegates += 1
            for inner in lowered.original_module.graph_module.graph.nodes:
                if inner.op == "call_function" and not _is_bookkeeping(inner):
                    yield lowered.backend_id, inner
        elif node.op == "call_function" and not _is_bookkeeping(node):
            yield OUTSIDE[operator_name(node).startswith("llama.")], node


def _is_bookkeeping(node: Any) -> bool:
    name = operator_name(node)
    return name.endswith("executorch_call_delegate") or BOOKKEEPING.match(name) is not None


def operator_name(node: Any) -> str:
    """namespace.operator, without the overload: "aten.linear"."""
    target = node.target
    if "auto_functionalized" in str(target):  # around an operator that changes its argument
        target = node.args[0]
    schema = getattr(target, "_schema", None)
    if schema is not None:
        return schema.name.replace("::", ".")
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}".removeprefix(".")


def flops(node: Any) -> int:
    """Of products of matrices and convolutions; of all else one for each number that comes out."""
    name = operator_name(node).partition(".")[2]
    value = node.meta.get("val")
    shapes = [_shape(argument) for argument in node.args]
    out = _shape(node)
    if name in ("linear", "bmm", "mm", "matmul") and out and shapes[0]:
        return 2 * math.prod(out) * shapes[0][-1]
    if name == "addmm" and out and shapes[1]:
        return 2 * math.prod(out) * shapes[1][-1]
    if name in ("convolution", "conv2d") and out and shapes[1]:
        return 2 * math.prod(out) * math.prod(shapes[1][1:])
    if name in ("custom_sdpa", "custom_quantized_sdpa") and out and shapes[1]:
        return 4 * math.prod(out) * shapes[1][1]  # as over the whole cache
    return math.prod(out) if out and value is not None else 0


def _shape(node: Any) -> list[int] | None:
    """Sizes, those that are dynamic as in the example."""
    value = getattr(node, "meta", {}).get("val")
    if value is None or not hasattr(value, "shape"):
        return None
    return [size if isinstance(size, int) else int(size.node.hint or 1) for size in value.shape]
