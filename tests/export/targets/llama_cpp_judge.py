"""llama.cpp itself, as the judge of GGUF files: its tokens, its logits, its image embeddings."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from llama_cpp import mtmd_cpp
from PIL import Image
from torch import Tensor

ASSETS = Path(__file__).parents[2] / "assets"
ENGLISH = (ASSETS / "english.txt").read_text(encoding="utf-8")
TEXTS = [
    ENGLISH[:400],
    "a  1 2   3",
    "x  12",
    "x\n\n 5\t7  ",
    " leading",
    "naïve café — 1984’s 日本",
    "don't WE'LL we'll",
    "def f(x):\n    return x  # 10,000.50\n",
]


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[llama_cpp.Llama]:
    model = llama_cpp.Llama(str(path), n_threads=1, n_threads_batch=1, verbose=False, **options)
    with closing(model):
        yield model


def llama_cpp_logits(path: Path, ids: list[int]) -> Tensor:
    """Logits of all positions, (positions, vocabulary)."""
    length = len(ids)
    sizes = {"n_ctx": length, "n_batch": length, "n_ubatch": length}
    with opened(path, **sizes, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, logits_all=True) as model:
        model.eval(ids)
        return torch.tensor(np.array(model.scores[:length]))


def llama_cpp_image_embeddings(llm: Path, mmproj: Path, picture: Image.Image, width: int) -> Tensor:
    """What llama.cpp's encoder and projector make of a picture, (image tokens, text width)."""
    mtmd_cpp.mtmd_log_set(ERRORS_ONLY, None)
    parameters = mtmd_cpp.mtmd_context_params_default()
    parameters.use_gpu, parameters.n_threads, parameters.print_timings = False, 1, False
    with opened(llm, n_ctx=256) as text_model:
        context = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), text_model.model, parameters)
        assert context, "llama.cpp does not load the mmproj"
        pixels = np.ascontiguousarray(np.asarray(picture.convert("RGB")))
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = mtmd_cpp.mtmd_bitmap_init(picture.width, picture.height, data)
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            marker = mtmd_cpp.mtmd_default_marker()
            prompt = mtmd_cpp.mtmd_input_text(marker, len(marker), True, True)
            bitmaps = (ctypes.c_void_p * 1)(bitmap)
            assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(prompt), bitmaps, 1) == 0
            found = [
                mtmd_cpp.mtmd_input_chunks_get(chunks, index)
                for index in range(mtmd_cpp.mtmd_input_chunks_size(chunks))
            ]
            image = next(
                chunk
                for chunk in found
                if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE
            )
            assert mtmd_cpp.mtmd_encode_chunk(context, image) == 0
            tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(image)
            values = np.ctypeslib.as_array(mtmd_cpp.mtmd_get_output_embd(context), (tokens, width))
            return torch.from_numpy(values.copy())
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            mtmd_cpp.mtmd_bitmap_free(bitmap)
            mtmd_cpp.mtmd_free(context)


GGML_TYPE_F32, GGML_LOG_LEVEL_ERROR = 0, 4
ERRORS_ONLY = llama_cpp.llama_log_callback(
    lambda level, text, data: print(text.decode(), end="") if level == GGML_LOG_LEVEL_ERROR else None
)
