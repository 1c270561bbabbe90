"""Shapes, layout, slices, gathering and scattering, lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.export.mil_interpreter.cases import Array, Drawn, axis_of, case, choice, drawn, normal, shape
from tests.export.mil_interpreter.programs import ct, mb


def rows(values: Any) -> Array:
    return np.array(values, np.int32)


@case("reshape")
def reshape(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (2, 3, 4))
    to = choice(rng, (6, 4), (4, -1), (-1,), (0, 0, -1), (0, -1, 2), (1, 24, 1, 1))
    wanted = x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(to)])
    return drawn(lambda x: mb.reshape(x=x, shape=rows(to)), x, wanted=wanted)


@case("reshape_like", target=ct.target.iOS16)
def reshape_like(rng: np.random.Generator, number: Any) -> Drawn:
    x, one, two = normal(rng, number, (24,)), normal(rng, number, (2, 3)), normal(rng, number, (5, 4, 1))
    return drawn(
        lambda x, one, two: mb.reshape_like(
            x=x, ref_tensors=(one, two), begins=(0, 1), ends=(0, 2), end_masks=(True, False)
        ),
        *(x, one, two),
        wanted=x.reshape(2, 3, 4),
    )


@case("transpose")
def transpose(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng, 2))
    order = rng.permutation(x.ndim)
    return drawn(lambda x: mb.transpose(x=x, perm=rows(order)), x, wanted=x.transpose(order))


@case("expand_dims")
def expand_dims(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng, 1, 3))
    axes = choice(rng, (0,), (-1,), (0, 2), (1, -1))
    axes = tuple(axis for axis in axes if axis <= x.ndim)
    return drawn(lambda x: mb.expand_dims(x=x, axes=rows(axes)), x, wanted=np.expand_dims(x, axes))


@case("squeeze")
def squeeze(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (1, 3, 1, 2))
    axes = choice(rng, (0,), (2,), (-2,), (0, 2))
    return drawn(lambda x: mb.squeeze(x=x, axes=rows(axes)), x, wanted=np.squeeze(x, axes))


@case("flatten2d")
def flatten2d(rng: np.random.Generator, number: Any) -> Drawn:
    x, axis = normal(rng, number, (2, 3, 4)), int(choice(rng, 1, 2, -1))
    return drawn(
        lambda x: mb.flatten2d(x=x, axis=axis), x, wanted=x.reshape(int(np.prod(x.shape[:axis])), -1)
    )


@case("split")
def split(rng: np.random.Generator, number: Any) -> Drawn:
    x, axis = normal(rng, number, (6, 6, 6)), int(choice(rng, 0, 1, -1))
    if rng.random() < 0.5:
        return drawn(lambda x: mb.split(x=x, num_splits=3, axis=axis), x, wanted=tuple(np.split(x, 3, axis)))
    return drawn(
        lambda x: mb.split(x=x, split_sizes=rows([1, 3, 2]), axis=axis),
        x,
        wanted=tuple(np.split(x, [1, 4], axis)),
    )


@case("concat")
def concat(rng: np.random.Generator, number: Any) -> Drawn:
    x, y = normal(rng, number, (2, 3, 4)), normal(rng, number, (2, 3, 4))
    axis, interleave = int(choice(rng, 0, 1, -1)), bool(rng.random() < 0.4)
    wanted = np.concatenate([x, y], axis)
    if interleave:
        order = [i // 2 + (i % 2) * x.shape[axis] for i in range(2 * x.shape[axis])]
        wanted = wanted.take(order, axis)
    return drawn(lambda x, y: mb.concat(values=(x, y), axis=axis, interleave=interleave), x, y, wanted=wanted)


@case("stack")
def stack(rng: np.random.Generator, number: Any) -> Drawn:
    x, y = normal(rng, number, (2, 3)), normal(rng, number, (2, 3))
    axis = int(choice(rng, 0, 1, 2, -1))
    return drawn(lambda x, y: mb.stack(values=(x, y), axis=axis), x, y, wanted=np.stack([x, y], axis))


@case("tile")
def tile(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng))
    reps = rng.integers(1, 4, x.ndim)
    return drawn(lambda x: mb.tile(x=x, reps=rows(reps)), x, wanted=np.tile(x, reps))


@case("reverse")
def reverse(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (2, 3, 4))
    axes = choice(rng, (0,), (1, 2), (-1,))
    return drawn(lambda x: mb.reverse(x=x, axes=rows(axes)), x, wanted=np.flip(x, axes))


@case("reverse_sequence")
def reverse_sequence(rng: np.random.Generator, number: Any) -> Drawn:
    x, lengths = normal(rng, number, (3, 5, 2)), rng.integers(0, 6, 3)
    wanted = x.copy()
    for row, length in enumerate(lengths):
        wanted[row, :length] = x[row, :length][::-1]
    return drawn(
        lambda x: mb.reverse_sequence(x=x, lengths=rows(lengths), seq_axis=1, batch_axis=0), x, wanted=wanted
    )


@case("pad")
def pad(rng: np.random.Generator, number: Any) -> Drawn:
    x, mode = normal(rng, number, (3, 4, 5)), choice(rng, "constant", "reflect", "replicate")
    count = int(rng.integers(1, 4)) if mode == "constant" else int(rng.integers(1, 3))
    amounts = rng.integers(0, 3, 2 * count)
    pairs = [(0, 0)] * (3 - count) + list(zip(amounts[0::2], amounts[1::2], strict=True))
    value = 1.5 if mode == "constant" else 0.0
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    more = {"constant_values": value} if mode == "constant" else {}
    wanted = np.pad(x, pairs, modes[mode], **more)  # type: ignore[call-overload]
    return drawn(
        lambda x: mb.pad(x=x, pad=rows(amounts), mode=mode, constant_val=number(value)), x, wanted=wanted
    )


@case("crop")
def crop(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (2, 3, 6, 7))
    a, b, c, d = (int(amount) for amount in rng.integers(0, 3, 4))
    return drawn(
        lambda x: mb.crop(x=x, crop_height=[a, b], crop_width=[c, d]), x, wanted=x[..., a : 6 - b, c : 7 - d]
    )


@case("shape")
def sizes(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng))
    return drawn(lambda x: mb.shape(x=x), x, wanted=np.array(x.shape))


@case("fill")
def fill(rng: np.random.Generator, number: Any) -> Drawn:
    x, to = normal(rng, number, (1,)), shape(rng)
    return drawn(
        lambda x: mb.add(x=mb.fill(shape=rows(to), value=number(2.5)), y=x), x, wanted=np.full(to, 2.5) + x
    )


@case("fill_like", target=ct.target.iOS16)
def fill_like(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, shape(rng))
    return drawn(
        lambda x: mb.fill_like(ref_tensor=x, value=number(-0.5)), x, wanted=np.full(x.shape, -0.5, number)
    )


@case("range_1d")
def range_1d(rng: np.random.Generator, number: Any) -> Drawn:
    start, step, count = int(rng.integers(-5, 5)), int(choice(rng, -2, 1, 3)), int(rng.integers(1, 6))
    end = start + step * count
    return drawn(
        lambda end: mb.range_1d(start=np.int32(start), end=mb.squeeze(x=end), step=np.int32(step)),
        rows([end]),
        wanted=np.arange(start, end, step),
    )


@case("one_hot")
def one_hot(rng: np.random.Generator, number: Any) -> Drawn:
    places, axis = rng.integers(0, 4, (2, 3)).astype(np.int32), int(choice(rng, -1, 0, 1))
    wanted = np.moveaxis(np.where(np.arange(4) == places[..., None], 2.0, 0.5), -1, axis)
    return drawn(
        lambda x: mb.one_hot(
            indices=x, one_hot_vector_size=4, axis=axis, on_value=number(2), off_value=number(0.5)
        ),
        places,
        wanted=wanted,
    )


@case("non_zero")
def non_zero(rng: np.random.Generator, number: Any) -> Drawn:
    x = (rng.random((3, 4)) < 0.5).astype(number)
    return drawn(lambda x: mb.non_zero(x=x), x, wanted=np.argwhere(x))


@case("band_part")
def band_part(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (2, 4, 5))
    lower, upper = (int(choice(rng, -1, 0, 1, 2)) for _ in range(2))
    wanted = x if lower < 0 else np.triu(x, -lower)
    wanted = wanted if upper < 0 else np.tril(wanted, upper)
    return drawn(lambda x: mb.band_part(x=x, lower=lower, upper=upper), x, wanted=wanted)


@case("pixel_shuffle", "pixel_unshuffle", "depth_to_space", "space_to_depth")
def pixels_and_channels(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x, by = normal(rng, number, (2, 8, 4, 6)), 2
    tensor = torch.from_numpy(x)
    if name == "pixel_shuffle":
        return drawn(
            lambda x: mb.pixel_shuffle(x=x, upscale_factor=by), x, wanted=F.pixel_shuffle(tensor, by)
        )
    if name == "pixel_unshuffle":
        return drawn(
            lambda x: mb.pixel_unshuffle(x=x, downscale_factor=np.uint32(by)),
            x,
            wanted=F.pixel_unshuffle(tensor, by),
        )
    # By definition, pixel by pixel: block offsets are the outer, channels the inner part of the depth.
    if name == "depth_to_space":
        wanted = np.empty((2, 2, 8, 12), number)
        for row, column, channel in np.ndindex(8, 12, 2):
            depth = ((row % by) * by + column % by) * 2 + channel
            wanted[:, channel, row, column] = x[:, depth, row // by, column // by]
        return drawn(lambda x: mb.depth_to_space(x=x, block_size=by), x, wanted=wanted)
    wanted = np.empty((2, 32, 2, 3), number)
    for row, column, channel in np.ndindex(4, 6, 8):
        wanted[:, ((row % by) * by + column % by) * 8 + channel, row // by, column // by] = x[
            :, channel, row, column
        ]
    return drawn(lambda x: mb.space_to_depth(x=x, block_size=by), x, wanted=wanted)


@case("space_to_batch", "batch_to_space")
def pixels_and_batch(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    """Pixels of one place in their block lie in one element of the batch."""
    picture = normal(rng, number, (2, 3, 4, 6))
    batch = np.concatenate([picture[:, :, row::2, column::2] for row in range(2) for column in range(2)])
    if name == "batch_to_space":
        return drawn(
            lambda x: mb.batch_to_space(x=x, block_shape=rows([2, 2]), crops=rows([[1, 0], [0, 2]])),
            batch,
            wanted=picture[:, :, 1:, :4],
        )
    inner = picture.copy()
    inner[:, :, 0] = 0
    inner[:, :, :, 4:] = 0
    batch = np.concatenate([inner[:, :, row::2, column::2] for row in range(2) for column in range(2)])
    return drawn(
        lambda x: mb.space_to_batch(x=x, block_shape=rows([2, 2]), paddings=rows([[1, 0], [0, 2]])),
        inner[:, :, 1:, :4].copy(),
        wanted=batch,
    )


@case("sliding_windows")
def sliding_windows(rng: np.random.Generator, number: Any) -> Drawn:
    x, axis = normal(rng, number, (3, 7, 8)), int(choice(rng, 1, 2, -1))
    size, stride = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    places = range(0, x.shape[axis] - size + 1, stride)
    wanted = np.stack([x.take(range(first, first + size), axis) for first in places], axis % 3)
    return drawn(lambda x: mb.sliding_windows(x=x, axis=axis, size=size, stride=stride), x, wanted=wanted)


def slices(
    rng: np.random.Generator, sizes: tuple[int, ...], squeeze: bool = True
) -> tuple[dict[str, Any], Any]:
    """Arguments of a slice, and NumPy's index."""
    begin, end, stride, open_begin, open_end, drop, index = [], [], [], [], [], [], []
    for size in sizes:
        first, last = sorted(int(place) for place in rng.choice(size + 1, 2, replace=False))
        by, dropped = int(choice(rng, 1, 1, 2, -1)), bool(squeeze and rng.random() < 0.2)
        starts, ends = (bool(rng.random() < 0.2) and not dropped for _ in range(2))
        if by < 0 and not starts and not ends:
            first, last = last - 1, first - 1
            ends = last < 0
        elif by < 0:
            by = 1
        fromend = first - size if rng.random() < 0.3 and first < size else first
        begin.append(fromend)
        end.append(last)
        stride.append(by)
        open_begin.append(starts)
        open_end.append(ends)
        drop.append(dropped)
        index.append(fromend if dropped else slice(None if starts else fromend, None if ends else last, by))
    arguments = {"begin": rows(begin), "end": rows(end), "stride": rows(stride)}
    arguments |= {"begin_mask": open_begin, "end_mask": open_end}
    return arguments | ({"squeeze_mask": drop} if squeeze else {}), tuple(index)


@case("slice_by_index")
def slice_by_index(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (4, 5, 6))
    arguments, index = slices(rng, x.shape)
    return drawn(lambda x: mb.slice_by_index(x=x, **arguments), x, wanted=x[index])


@case("slice_by_size")
def slice_by_size(rng: np.random.Generator, number: Any) -> Drawn:
    x, first = normal(rng, number, (4, 5)), int(rng.integers(0, 3))
    length = int(choice(rng, 1, 2, -1))
    wanted = x[first:, 1:3] if length == -1 else x[first : first + length, 1:3]
    return drawn(
        lambda x, begin: mb.slice_by_size(x=x, begin=begin, size=rows([length, 2])),
        *(x, rows([first, 1])),
        wanted=wanted,
    )


@case("slice_update")
def slice_update(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (4, 5, 6))
    arguments, index = slices(rng, x.shape, squeeze=False)
    update = normal(rng, number, x[index].shape)
    wanted = x.copy()
    wanted[index] = update
    return drawn(lambda x, update: mb.slice_update(x=x, update=update, **arguments), x, update, wanted=wanted)


@case("gather")
def gather(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (4, 5, 6))
    axis = axis_of(rng, 3)
    places = rng.integers(-x.shape[axis], x.shape[axis], shape(rng, 1, 2)).astype(np.int32)
    return drawn(
        lambda x, places: mb.gather(x=x, indices=places, axis=axis),
        x,
        places,
        wanted=np.take(x, places, axis),
    )


@case("gather")
def gather_in_batches(rng: np.random.Generator, number: Any) -> Drawn:
    x, places = normal(rng, number, (3, 4, 5)), rng.integers(0, 4, (3, 2)).astype(np.int32)
    if rng.random() < 0.5:
        wanted = np.stack([x[i][places[i]] for i in range(3)])
        return drawn(
            lambda x, places: mb.gather(x=x, indices=places, axis=1, batch_dims=1), x, places, wanted=wanted
        )
    wanted = np.stack([x[i][:, places[i]] for i in range(3)])
    return drawn(
        lambda x, places: mb.gather(x=x, indices=places, axis=2, batch_dims=1), x, places, wanted=wanted
    )


@case("gather_along_axis")
def gather_along_axis(rng: np.random.Generator, number: Any) -> Drawn:
    x, axis = normal(rng, number, (3, 4, 5)), axis_of(rng, 3)
    to = list(x.shape)
    to[axis] = 2
    places = rng.integers(-x.shape[axis], x.shape[axis], to).astype(np.int32)
    return drawn(
        lambda x, places: mb.gather_along_axis(x=x, indices=places, axis=axis),
        *(x, places),
        wanted=np.take_along_axis(x, places % x.shape[axis], axis),
    )


@case("gather_nd")
def gather_nd(rng: np.random.Generator, number: Any) -> Drawn:
    x = normal(rng, number, (3, 4, 5))
    if rng.random() < 0.5:
        depth = int(rng.integers(1, 4))
        places = np.stack([rng.integers(0, x.shape[i], (2, 3)) for i in range(depth)], -1).astype(np.int32)
        wanted = x[tuple(np.moveaxis(places, -1, 0))]
        return drawn(lambda x, places: mb.gather_nd(x=x, indices=places), x, places, wanted=wanted)
    places = rng.integers(0, 4, (3, 2, 1)).astype(np.int32)
    wanted = np.stack([x[i][places[i, :, 0]] for i in range(3)])
    return drawn(lambda x, places: mb.gather_nd(x=x, indices=places, batch_dims=1), x, places, wanted=wanted)


MODES = {
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: old / new,
    "max": max,
    "min": min,
    "update": lambda old, new: new,
}


@case("scatter_along_axis", tolerance=2)
def scatter_along_axis(rng: np.random.Generator, number: Any) -> Drawn:
    data, axis, mode = normal(rng, number, (3, 4, 5)), int(rng.integers(3)), choice(rng, *MODES)
    to = list(data.shape)
    to[axis] = 2
    # No place twice: which of two updates wins is not defined.
    places = np.argsort(rng.random(data.shape), axis).take([0, 1], axis).astype(np.int32)
    updates = rng.choice([-1.5, 0.75, 2], to).astype(number)
    wanted = data.astype(np.float64)
    for place in np.ndindex(*to):
        target = list(place)
        target[axis] = places[place]
        wanted[tuple(target)] = MODES[mode](wanted[tuple(target)], updates[place])
    return drawn(
        lambda data, places, updates: mb.scatter_along_axis(
            data=data, indices=places, updates=updates, axis=axis, mode=mode
        ),
        *(data, places, updates),
        wanted=wanted,
    )


@case("scatter", tolerance=2)
def scatter(rng: np.random.Generator, number: Any) -> Drawn:
    data, axis, mode = normal(rng, number, (4, 4, 4)), int(rng.integers(3)), choice(rng, *MODES)
    places = rng.permutation(4)[:2].astype(np.int32)
    updates = rng.choice([-1.5, 0.75, 2], [2 if i == axis else 4 for i in range(3)]).astype(number)
    wanted = np.moveaxis(data.astype(np.float64), axis, 0)
    for place, update in zip(places, np.moveaxis(updates, axis, 0), strict=True):
        wanted[place] = np.vectorize(MODES[mode])(wanted[place], update)
    return drawn(
        lambda data, places, updates: mb.scatter(
            data=data, indices=places, updates=updates, axis=axis, mode=mode
        ),
        *(data, places, updates),
        wanted=np.moveaxis(wanted, 0, axis),
    )


@case("scatter_nd", tolerance=2)
def scatter_nd(rng: np.random.Generator, number: Any) -> Drawn:
    data, mode = normal(rng, number, (4, 5, 3)), choice(rng, *MODES)
    flat = rng.permutation(20)[:6].reshape(2, 3)
    places = np.stack([flat // 5, flat % 5], -1).astype(np.int32)
    updates = rng.choice([-1.5, 0.75, 2], (2, 3, 3)).astype(number)
    wanted = data.astype(np.float64)
    for place in np.ndindex(2, 3):
        target = tuple(places[place])
        wanted[target] = np.vectorize(MODES[mode])(wanted[target], updates[place])
    return drawn(
        lambda data, places, updates: mb.scatter_nd(data=data, indices=places, updates=updates, mode=mode),
        *(data, places, updates),
        wanted=wanted,
    )


@case(
    "make_list", "list_write", "list_read", "list_length", "list_gather", "list_scatter", types=("float32",)
)
def lists(rng: np.random.Generator, number: Any, name: str) -> Drawn:
    x = normal(rng, number, (3, 2))

    def build(x: Any) -> Any:
        ls = mb.make_list(init_length=2, elem_shape=(2,), dtype="fp32", dynamic_length=True)
        ls = mb.list_scatter(
            ls=ls, indices=rows([0, 3]), value=mb.slice_by_size(x=x, begin=[0, 0], size=[2, 2])
        )
        ls = mb.list_write(
            ls=ls, index=1, value=mb.slice_by_index(x=x, begin=[2, 0], end=[3, 2], squeeze_mask=[True, False])
        )
        length = mb.cast(x=mb.list_length(ls=ls), dtype="fp32")
        return mb.list_gather(ls=ls, indices=rows([3, 1])), mb.list_read(ls=ls, index=0), length

    return drawn(build, x, wanted=(x[[1, 2]], x[0], np.float32(4)))
