"""Runs written packages on the reference interpreter: what is verified is the file that ships."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilemm.export import mil_interpreter
from mobilemm.export.parts import Part

Array = NDArray[Any]


def run_part(part: Part, package: Path, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
    """The first output of a package for a part's inputs; of a decoder the logits of all positions."""
    model = mil_interpreter.load(package)
    if part.cache is not None:
        return _decoder_logits(model, inputs)
    if part.name == "embed":
        return _spliced(part, model, inputs)
    if not part.dynamic:
        return model(inputs)[part.outputs[0]].astype(np.float32)
    first = next(iter(inputs.values()))
    rows = [
        model({name: value[index : index + 1] for name, value in inputs.items()})[part.outputs[0]]
        for index in range(len(first))
    ]
    return np.concatenate(rows).astype(np.float32)


def _spliced(part: Part, model: mil_interpreter.Model, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
    from mobilemm.runtime.embedding import embed_with_images

    def lookup(ids: Array) -> Array:
        return model({"input_ids": ids.astype(np.int32)})["inputs_embeds"].astype(np.float32)

    module: Any = part.module
    return embed_with_images(
        lookup,
        inputs["input_ids"],
        inputs["image_features"],
        module.image_token_id,
        module.table.num_embeddings,
    )


def _decoder_logits(model: mil_interpreter.Model, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
    """All functions, each on what the others have written.

    `decode` gives all positions of the first chunk. Then `prefill` takes that chunk on an empty state, and
    decoding goes on behind it. Of each later chunk `prefill` gives the last position's logits once more, over
    the keys and values that decoding wrote. Where there are several of them, the shorter give those of the
    positions before, and the longest writes the chunk anew behind them.
    """
    embeds = inputs["inputs_embeds"].astype(np.float16)
    rope = inputs.get("position_ids")
    count = embeds.shape[1]
    widths = prefill_lengths(model)
    (longest, width), *shorter = widths.items()
    logits: list[Array] = []

    def call(function: str, start: int, stop: int, length: int, state: mil_interpreter.State) -> Array:
        # What fills the chunk is the last row again: it must not change anything.
        rows = np.minimum(np.arange(start, start + length), stop - 1)
        given = {
            "inputs_embeds": embeds[:, rows],
            "position_ids": np.arange(start, start + length, dtype=np.int32)[None],
        }
        if rope is not None:
            given["rope_position_ids"] = rope[..., rows].astype(np.int32)
        if function in widths:
            given["last_index"] = np.array([stop - start - 1], np.int32)
        return model(given, function=function, state=state)["logits"].astype(np.float32)

    state = model.make_state()
    for start in range(0, count, width):
        stop = min(start + width, count)
        logits += [call("decode", index, index + 1, 1, state) for index in range(start, stop)]
        if start == 0:
            state = model.make_state()  # one at a time: of a large model it takes a gigabyte
        if start + width > buffer_length(model):
            continue
        logits[-1] = call(longest, start, stop, width, state)
        for back, (function, length) in enumerate(shorter, 1):
            end = stop - back
            begin = max(start, end - length)
            if end > begin:
                logits[end - 1] = call(function, begin, end, length, state)
        if shorter:
            call(longest, start, stop, width, state)
    return np.concatenate(logits, 1)


def prefill_lengths(model: mil_interpreter.Model) -> dict[str, int]:
    """Positions of a decoder's functions that take many, the most first."""
    found = {}
    for name in model.functions:
        length = next(value.shape[1] for value in model.inputs(name) if value.name == "inputs_embeds")
        assert isinstance(length, int)
        if name != "decode":
            found[name] = length
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def buffer_length(model: mil_interpreter.Model) -> int:
    """Positions that the states of a decoder hold."""
    length = next(state.shape[2] for state in model.states("decode") if state.name == "k_cache")
    assert isinstance(length, int)
    return length
