"""Arithmetic: element by element, activations, products, reductions, normalization."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.export.mil_interpreter.cases import Drawn, axis_of, case, choice, drawn, exact, normal, shape
from tests.export.mil_interpreter.programs import ct, mb

BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}
DIVISIONS = {
    "real_div": np.true_divide,
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
}
LOGIC = {"logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}
UNARY = {
    "abs": np.abs,
    "atan": np.arctan,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": np.vectorize(math.erf),
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "round": np.round,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "sign": np.sign,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sin": np.sin,
    "sinh": np.sinh,
    "softplus": lambda x: np.log1p(np.exp(x)),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}
OF_PARTS = {"acos": np.arccos, "asin": np.arcsin, "atanh": np.arctanh}  # of numbers between −1 and 1
WITH_EPSILON = {
    "inverse": lambda x, epsilon: 1 / (x + epsilon),
    "log": lambda x, epsilon: np.log(x + epsilon),
    "rsqrt": lambda x, epsilon: 1 / np.sqrt(x + epsilon),
}
WITH_ALPHA = {
    "elu": lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x)),
    "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "threshold": lambda x, alpha: np.maximum(x, alpha),
    "thresholded_relu": lambda x, alpha: np.where(x >= alpha, x, 0),
}
WITH_ALPHA_AND_BETA = {
    "clamped_relu": lambda x, a, b: np.minimum(b, np.where(x >= 0, x, a * x)),
    "clip": lambda x, a, b: np.minimum(np.maximum(x, a), b),
    "linear_activation": lambda x, a, b: a * x + b,
    "scaled_tanh": lambda x, a, b: a * np.tanh(b * x),
    "sigmoid_hard": lambda x, a, b: np.clip(a * x + b, 0, 1),
}
REDUCTIONS = {
    "reduce_l1_norm": lambda x, **to: np.abs(x).sum(**to),
    "reduce_l2_norm": lambda x, **to: np.sqrt(np.square(x).sum(**to)),
    "reduce_log_sum": lambda x, **to: np.log(x.sum(**to)),
    "reduce_log_sum_exp": lambda x, **to: np.log(np.exp(x).sum(**to)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **to: np.square(x).sum(**to),
}


def broadcast(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that fit, one of them perhaps shorter."""
    first = shape(rng)
    second = tuple(choice(rng, 1, size) for size in first)[int(rng.integers(len(first))) :]
    return (first, second) if rng.random() < 0.5 else (second, first)


@case(*BINARY)
def binary(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    first, second = broadcast(rng)
    if rng.random() < 0.3:
        x, y = (rng.integers(-3, 4, sizes).astype(np.int32) for sizes in (first, second))
    else:
        x, y = (np.round(normal(rng, number, sizes) * 4) / number(2) for sizes in (first, second))
    wanted = BINARY[name](x, y)
    return drawn(lambda x, y: getattr(mb, name)(x=x, y=y), x, y, wanted=wanted)


@case(*DIVISIONS)
def division(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    first, second = broadcast(rng)
    if rng.random() < 0.3 and name != "real_div":
        x = rng.integers(0 if name == "pow" else -9, 5, first).astype(np.int32)
        y = rng.integers(1, 4, second).astype(np.int32)
    else:
        x = (np.abs(normal(rng, number, first, 3)) + number(0.5)).astype(number)
        y = (rng.choice([-2.5, -0.75, 1.25, 3], second)).astype(number)
        x = -x if name != "pow" and rng.random() < 0.5 else x
    wanted = DIVISIONS[name](x.astype(np.float64 if x.dtype.kind == "f" else x.dtype), y)
    return drawn(lambda x, y: getattr(mb, name)(x=x, y=y), x, y, wanted=wanted)


@case("real_div", types=("float32",))
def whole_quotient(rng: np.random.Generator, number: Any) -> Drawn:
    y = rng.choice([-3, -2, 1, 5], (2, 3)).astype(np.int32)
    wanted = rng.integers(-9, 10, (2, 3)).astype(np.int32)
    return drawn(lambda x, y: mb.real_div(x=x, y=y), wanted * y, y, wanted=wanted)


@case(*LOGIC, "logical_not", types=("float32",))
def logic(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x, y = (rng.random((2, 3)) < 0.5 for _ in range(2))
    numbers = [np.where(value, 2, 0).astype(number) for value in (x, y)]
    if name == "logical_not":
        return drawn(
            lambda x: mb.cast(x=mb.logical_not(x=mb.cast(x=x, dtype="bool")), dtype="fp32"),
            numbers[0],
            wanted=np.logical_not(x),
        )
    return drawn(
        lambda x, y: mb.cast(
            x=getattr(mb, name)(x=mb.cast(x=x, dtype="bool"), y=mb.cast(x=y, dtype="bool")), dtype="fp32"
        ),
        *numbers,
        wanted=LOGIC[name](x, y),
    )


@case(*UNARY)
def unary(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x = normal(rng, number, shape(rng), 2)
    if name == "tan":
        x = np.clip(x, -1.25, 1.25)
    if name in ("round", "ceil", "floor", "sign") and rng.random() < 0.5:
        x = np.round(x * 2) / number(2)  # halves, which go to the even neighbour
    return drawn(lambda x: getattr(mb, name)(x=x), x, wanted=UNARY[name](x.astype(np.float64)))


@case(*OF_PARTS)
def unary_of_parts(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x = rng.uniform(-0.9, 0.9, shape(rng)).astype(number)
    return drawn(lambda x: getattr(mb, name)(x=x), x, wanted=OF_PARTS[name](x.astype(np.float64)))


@case("sqrt")
def square_root(rng: np.random.Generator, number: Any) -> Drawn:
    x = np.abs(normal(rng, number, shape(rng), 5))
    return drawn(lambda x: mb.sqrt(x=x), x, wanted=np.sqrt(x.astype(np.float64)))


@case(*WITH_EPSILON)
def with_epsilon(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x = (np.abs(normal(rng, number, shape(rng))) + number(0.25)).astype(number)
    epsilon = exact(rng, 0.0625, 1)
    wanted = WITH_EPSILON[name](x.astype(np.float64), epsilon)
    return drawn(lambda x: getattr(mb, name)(x=x, epsilon=number(epsilon)), x, wanted=wanted)


@case(*WITH_ALPHA)
def with_alpha(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x, alpha = normal(rng, number, shape(rng)), exact(rng, -1, 1)
    wanted = WITH_ALPHA[name](x.astype(np.float64), alpha)
    return drawn(lambda x: getattr(mb, name)(x=x, alpha=number(alpha)), x, wanted=wanted)


@case(*WITH_ALPHA_AND_BETA)
def with_alpha_and_beta(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x, alpha, beta = normal(rng, number, shape(rng)), exact(rng, -1, 0.5), exact(rng, 0.5, 2)
    wanted = WITH_ALPHA_AND_BETA[name](x.astype(np.float64), alpha, beta)
    return drawn(lambda x: getattr(mb, name)(x=x, alpha=number(alpha), beta=number(beta)), x, wanted=wanted)


@case("prelu")
def parametric_relu(rng: np.random.Generator, number: Any) -> Drawn:
    x, alpha = normal(rng, number, (2, 3, 4, 5)), normal(rng, number, (3,))
    wanted = np.where(x > 0, x, x * alpha[:, None, None].astype(np.float64))
    return drawn(lambda x: mb.prelu(x=x, alpha=alpha), x, wanted=wanted)


@case("softplus_parametric")
def parametric_softplus(rng: np.random.Generator, number: Any) -> Drawn:
    x, alpha, beta = normal(rng, number, (2, 3, 4, 5)), normal(rng, number, (3,)), normal(rng, number, (3,))
    a, b = (value[:, None, None].astype(np.float64) for value in (alpha, beta))
    wanted = a * np.log1p(np.exp(b * x))
    return drawn(lambda x: mb.softplus_parametric(x=x, alpha=alpha, beta=beta), x, wanted=wanted)


@case("gelu", types=("float32", "float16"))
def gelu(rng: np.random.Generator, number: Any) -> Drawn:
    x, mode = (
        normal(rng, number, shape(rng), 2),
        choice(rng, "EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION"),
    )
    v = x.astype(np.float64)
    wanted = {
        "EXACT": v * (1 + np.vectorize(math.erf)(v / math.sqrt(2))) / 2,
        "TANH_APPROXIMATION": v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
        "SIGMOID_APPROXIMATION": v / (1 + np.exp(-1.702 * v)),
    }[mode]
    return drawn(lambda x: mb.gelu(x=x, mode=mode), x, wanted=wanted)


@case("softmax")
def softmax(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng), 3)
    axis = axis_of(rng, x.ndim)
    powers = np.exp(x.astype(np.float64))
    return drawn(lambda x: mb.softmax(x=x, axis=axis), x, wanted=powers / powers.sum(axis, keepdims=True))


@case("select", types=("float32", "float16"))
def select(rng: np.random.Generator, number: Any) -> Drawn:
    first, second = broadcast(rng)
    a, b = normal(rng, number, first), normal(rng, number, second)
    chosen = normal(rng, number, choice(rng, first, second))
    return drawn(
        lambda chosen, a, b: mb.select(cond=mb.greater(x=chosen, y=number(0)), a=a, b=b),
        *(chosen, a, b),
        wanted=np.where(chosen > 0, a, b),
    )


@case("cast", types=("float32", "float16"))
def cast(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng), 20)
    if rng.random() < 0.5:
        kind, name = choice(rng, (np.int32, "int32"), (np.int8, "int8"), (np.int16, "int16"))
        return drawn(lambda x: mb.cast(x=mb.cast(x=x, dtype=name), dtype="int32"), x, wanted=x.astype(kind))
    kind, name = choice(rng, (np.float32, "fp32"), (np.float16, "fp16"), (np.bool_, "bool"))
    if name == "bool":
        return drawn(lambda x: mb.cast(x=mb.cast(x=x, dtype="bool"), dtype="int32"), x, wanted=x != 0)
    return drawn(lambda x: mb.cast(x=x, dtype=name), x, wanted=x.astype(kind))


@case("linear")
def linear(rng: np.random.Generator, number: Any) -> Drawn:
    wide, out = (int(size) for size in rng.integers(1, 9, 2))
    x = normal(rng, number, (*shape(rng, 0, 2), 3, wide))
    weight, bias = normal(rng, number, (out, wide)), normal(rng, number, (out,))
    wanted = x.astype(np.float64) @ weight.astype(np.float64).T
    if rng.random() < 0.5:
        return drawn(lambda x: mb.linear(x=x, weight=weight), x, wanted=wanted)
    return drawn(lambda x: mb.linear(x=x, weight=weight, bias=bias), x, wanted=wanted + bias)


@case("matmul")
def matmul(rng: np.random.Generator, number: Any) -> Drawn:
    rows, inner, columns = (int(size) for size in rng.integers(1, 6, 3))
    batch = shape(rng, 1, 2)
    turned_x, turned_y = (bool(rng.random() < 0.5) for _ in range(2))
    x = normal(rng, number, (*batch, rows, inner))
    y = normal(rng, number, (*(choice(rng, 1, size) for size in batch), inner, columns))
    wanted = x.astype(np.float64) @ y.astype(np.float64)
    x, y = (np.swapaxes(v, -1, -2).copy() if turn else v for v, turn in ((x, turned_x), (y, turned_y)))
    return drawn(
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=turned_x, transpose_y=turned_y), x, y, wanted=wanted
    )


@case("matmul", types=("float32",))
def whole_matmul(rng: np.random.Generator, number: Any) -> Drawn:
    x, y = rng.integers(-9, 9, (2, 3, 4)).astype(np.int32), rng.integers(-9, 9, (2, 4, 5)).astype(np.int32)
    return drawn(lambda x, y: mb.matmul(x=x, y=y), x, y, wanted=x @ y)


@case("einsum")
def einsum(rng: np.random.Generator, number: Any) -> Drawn:
    b, c, h, w, v = (int(size) for size in rng.integers(1, 5, 5))
    x, y = normal(rng, number, (b, c, h, w)), normal(rng, number, (b, w, h, v))
    wanted = np.einsum("bchw,bwhv->bchv", x.astype(np.float64), y.astype(np.float64))
    return drawn(lambda x, y: mb.einsum(values=(x, y), equation="bchw,bwhv->bchv"), x, y, wanted=wanted)


@case("scaled_dot_product_attention")
def attention(rng: np.random.Generator, number: Any) -> Drawn:
    batch, heads, rows, keys, width = (int(size) for size in rng.integers(1, 6, 5))
    q = normal(rng, number, (batch, heads, rows, width))
    k, v = (normal(rng, number, (batch, heads, keys, width)) for _ in range(2))
    torches = [torch.from_numpy(value.astype(np.float64)) for value in (q, k, v)]
    mask = normal(rng, number, (1, 1, rows, keys), 2)
    match choice(rng, "none", "numbers", "booleans"):
        case "none":
            wanted = F.scaled_dot_product_attention(*torches)
            build: Any = lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v)  # noqa: E731
            return drawn(build, q, k, v, wanted=wanted.numpy())
        case "numbers":
            wanted = F.scaled_dot_product_attention(*torches, torch.from_numpy(mask.astype(np.float64)))
            build = lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask)  # noqa: E731
            return drawn(build, q, k, v, wanted=wanted.numpy())
    kept = rng.random((1, 1, rows, keys)) < 0.5
    kept[..., 0] = True
    wanted = F.scaled_dot_product_attention(*torches, torch.from_numpy(kept))
    build = lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=kept)  # noqa: E731
    return drawn(build, q, k, v, wanted=wanted.numpy())


@case(*REDUCTIONS)
def reduction(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x = normal(rng, number, shape(rng))
    if name == "reduce_log_sum":
        x = np.abs(x) + number(0.5)
    count = int(rng.integers(1, x.ndim + 1))
    axes = tuple(int(axis) for axis in rng.permutation(x.ndim)[:count])
    axes = tuple(axis - x.ndim if rng.random() < 0.3 else axis for axis in axes)
    keep = bool(rng.random() < 0.5) or count == x.ndim
    wanted = REDUCTIONS[name](x.astype(np.float64), axis=axes, keepdims=keep)
    return drawn(
        lambda x: getattr(mb, name)(x=x, axes=np.array(axes, np.int32), keep_dims=keep), x, wanted=wanted
    )


@case("reduce_argmax", "reduce_argmin")
def extreme_place(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x = normal(rng, number, shape(rng, 2))
    axis, keep = axis_of(rng, x.ndim), bool(rng.random() < 0.5)
    find = np.argmax if name == "reduce_argmax" else np.argmin
    return drawn(
        lambda x: getattr(mb, name)(x=x, axis=axis, keep_dims=keep), x, wanted=find(x, axis, keepdims=keep)
    )


@case("argsort", target=ct.target.iOS16)
def argsort(rng: np.random.Generator, number: Any) -> Drawn:
    x = (
        np.round(normal(rng, number, shape(rng, 1, 3)))
        if rng.random() < 0.1
        else normal(rng, number, shape(rng))
    )
    axis, ascending = axis_of(rng, x.ndim), bool(rng.random() < 0.5)
    wanted = np.argsort(x if ascending else -x, axis, kind="stable")
    return drawn(lambda x: mb.argsort(x=x, axis=axis, ascending=ascending), x, wanted=wanted)


@case("topk")
def topk(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng, largest=8))
    axis, ascending = axis_of(rng, x.ndim), bool(rng.random() < 0.5)
    k = int(rng.integers(1, x.shape[axis] + 1))
    places = np.argsort(x if ascending else -x, axis, kind="stable").take(range(k), axis)
    return drawn(
        lambda x: mb.topk(x=x, k=k, axis=axis, ascending=ascending),
        x,
        wanted=(np.take_along_axis(x, places, axis), places),
    )


@case("cumsum")
def cumsum(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng))
    axis = int(rng.integers(x.ndim))
    exclusive, reverse = (bool(rng.random() < 0.5) for _ in range(2))
    v = np.flip(x, axis) if reverse else x
    wanted = np.cumsum(v.astype(np.float64), axis)
    wanted = wanted - v if exclusive else wanted
    wanted = np.flip(wanted, axis) if reverse else wanted
    return drawn(lambda x: mb.cumsum(x=x, axis=axis, exclusive=exclusive, reverse=reverse), x, wanted=wanted)


@case("layer_norm", tolerance=4)
def layer_norm(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, tuple(size + 2 for size in shape(rng, 2)))
    count = int(rng.integers(1, x.ndim))
    axes = sorted(int(axis) for axis in rng.permutation(x.ndim)[:count])
    sizes = tuple(x.shape[axis] for axis in axes)
    gamma, beta = normal(rng, number, sizes), normal(rng, number, sizes)
    epsilon = exact(rng, 0.0625, 1)
    v = x.astype(np.float64)
    wanted = (v - v.mean(tuple(axes), keepdims=True)) / np.sqrt(v.var(tuple(axes), keepdims=True) + epsilon)
    spread = tuple(size if axis in axes else 1 for axis, size in enumerate(x.shape))
    wanted = wanted * gamma.reshape(spread) + beta.reshape(spread)
    return drawn(
        lambda x: mb.layer_norm(x=x, axes=axes, gamma=gamma, beta=beta, epsilon=number(epsilon)),
        x,
        wanted=wanted,
    )


@case("batch_norm", "instance_norm", tolerance=4)
def channel_norm(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x = normal(rng, number, (2, 3, *(size + 2 for size in shape(rng, 1, 2))))
    gamma, beta, mean = (normal(rng, number, (3,)) for _ in range(3))
    variance = np.abs(normal(rng, number, (3,))) + number(0.5)
    epsilon = exact(rng, 0.0625, 1)
    v, spread = x.astype(np.float64), (3, *[1] * (x.ndim - 2))
    given = {"gamma": gamma, "beta": beta, "epsilon": number(epsilon)}
    over = tuple(range(2, x.ndim))
    centre, square = v.mean(over, keepdims=True), v.var(over, keepdims=True)
    if name == "batch_norm":
        given |= {"mean": mean, "variance": variance}
        centre, square = (value.astype(np.float64).reshape(spread) for value in (mean, variance))
    wanted = (v - centre) / np.sqrt(square + epsilon) * gamma.reshape(spread) + beta.reshape(spread)
    return drawn(lambda x: getattr(mb, name)(x=x, **given), x, wanted=wanted)


@case("l2_norm")
def l2_norm(rng: np.random.Generator, number: Any) -> Drawn:
    x, epsilon = normal(rng, number, shape(rng, 3, 5)), exact(rng, 0.0625, 1)
    v = x.astype(np.float64)
    wanted = v / np.sqrt(np.square(v).sum((-1, -2, -3), keepdims=True) + epsilon)
    return drawn(lambda x: mb.l2_norm(x=x, epsilon=number(epsilon)), x, wanted=wanted)


@case("local_response_norm")
def local_response_norm(rng: np.random.Generator, number: Any) -> Drawn:
    x, size = normal(rng, number, (2, 7, 3, 4)), int(choice(rng, 1, 3, 5))
    alpha, beta, k = exact(rng, 0.0625, 1), exact(rng, 0.25, 1), exact(rng, 0.5, 2)
    v = np.square(x.astype(np.float64))
    around = np.pad(v, ((0, 0), (size // 2, size // 2), (0, 0), (0, 0)))
    sums = sum(around[:, i : i + 7] for i in range(size))
    wanted = x / (k + alpha / size * sums) ** beta
    return drawn(
        lambda x: mb.local_response_norm(x=x, size=size, alpha=number(alpha), beta=number(beta), k=number(k)),
        x,
        wanted=wanted,
    )
