"""Memory given back early, so that a large model can be exported on a small machine (on Linux)."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Linux' advice that pages are not needed soon: a file's are dropped, and read again when touched. Unlike
# MADV_DONTNEED it never loses what only memory holds.
MADV_PAGEOUT = 21


def page_out(tensor: Tensor) -> None:
    """Drops a tensor's pages from memory, if they are mapped from a file."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros that take no memory until they are written to; PyTorch's own are written when they are made."""
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    return torch.from_numpy(np.zeros(tuple(shape), kind))


def available_memory() -> int | None:
    """Bytes that programs can still have without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else 1024 * int(found)


def release() -> None:
    """Collects cycles, as exporters leave them behind, and returns freed memory to the system."""
    gc.collect()
    trim()


def trim() -> None:
    """Returns freed memory to the system."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)
