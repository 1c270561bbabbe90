"""MIL's lists of tensors. A list is never changed, so that values stay what they were."""

from __future__ import annotations

import torch
from torch import Tensor

from mobilemm.export.mil_interpreter.ops import TensorList, op

LONGEST = 100_000

_DTYPES = {"fp16": torch.float32, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}


@op("make_list", exact=True)
def make_list(
    init_length: int = 1,
    dynamic_length: bool = True,
    elem_shape: list[int] | None = None,
    dtype: str = "fp32",
) -> TensorList:
    if not 0 <= init_length <= LONGEST:
        raise ValueError(f"a list of {init_length} tensors")
    # The same tensor each time: nothing writes into it.
    return [torch.zeros(elem_shape or [], dtype=_DTYPES[dtype])] * init_length


@op("list_length")
def list_length(ls: TensorList) -> Tensor:
    return torch.tensor(len(ls), dtype=torch.int32)


@op("list_read", view=True)
def list_read(ls: TensorList, index: int) -> Tensor:
    return ls[index]


@op("list_write", view=True)
def list_write(ls: TensorList, index: int, value: Tensor) -> TensorList:
    return list_scatter(ls, [index], value[None])


@op("list_gather", exact=True)
def list_gather(ls: TensorList, indices: list[int]) -> Tensor:
    return torch.stack([ls[index] for index in indices])


@op("list_scatter", view=True)
def list_scatter(ls: TensorList, indices: list[int], value: Tensor) -> TensorList:
    """Writes behind the end lengthen the list."""
    if len(indices) != len(value):
        raise ValueError(f"{len(value)} tensors for {len(indices)} places")
    written = list(ls)
    for index, tensor in zip(indices, value, strict=True):
        if not -len(written) <= index < LONGEST:
            raise IndexError(f"index {index} of a list of {len(written)}")
        while index >= len(written):
            written.append(torch.zeros_like(tensor))
        written[index] = tensor
    return written
