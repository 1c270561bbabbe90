"""Decoders that race: ours and others', each behind the same three calls."""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PREFILL, IMAGE, DECODE = 256, 144, 64
"""Positions of the prompt, those of them that are image embeddings, and steps behind it at most."""


class System(Protocol):
    """One system under test, loaded."""

    def prefill(self, ids: list[int], embeddings: np.ndarray) -> None:
        """The prompt, from an empty cache."""

    def step(self, token: int, embedding: np.ndarray) -> None:
        """One more token, up to its logits."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of all positions: (length, vocabulary)."""


class Bundle:
    """Ours, through the runtime that `mobilemm run` has."""

    def __init__(self, folder: Path, threads: int) -> None:
        from mobilemm.runtime.backends import open_backend
        from mobilemm.runtime.bundle import open_bundle

        self.bundle = open_bundle(folder, verify=False)
        self.backend = open_backend(self.bundle, threads)
        self.decoder = self.backend.decoder()

    def prefill(self, ids: list[int], embeddings: np.ndarray) -> None:
        self.decoder.truncate(0)
        self.decoder.decode(embeddings)

    def step(self, token: int, embedding: np.ndarray) -> None:
        self.decoder.decode(embedding)

    def logits(self, ids: list[int]) -> np.ndarray:
        empty = np.zeros((0, self.bundle.manifest.model.hidden_size), np.float32)
        inputs = {"input_ids": np.array([ids]), "image_features": empty}
        embeds = self.backend.run("embed", inputs)["inputs_embeds"]
        self.decoder.truncate(0)
        return self.decoder.decode(embeds, logits_positions=np.arange(len(ids)))[0]


class Genai:
    """onnxruntime-genai's builder and its own loop."""

    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai as og

        path = folder / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        path.write_text(json.dumps(config))
        self.og, self.folder, self.threads = og, folder, threads
        self.model = og.Model(str(folder))

    def prefill(self, ids: list[int], embeddings: np.ndarray) -> None:
        params = self.og.GeneratorParams(self.model)
        length = PREFILL + DECODE + 8
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        self.generator = self.og.Generator(self.model, params)
        self.generator.append_tokens(np.array(ids, np.int32))

    def step(self, token: int, embedding: np.ndarray) -> None:
        self.generator.append_tokens(np.array([token], np.int32))

    def logits(self, ids: list[int]) -> np.ndarray:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, self.threads
        session = onnxruntime.InferenceSession(str(self.folder / "model.onnx"), options)
        config = json.loads((self.folder / "genai_config.json").read_text())["model"]["decoder"]
        shape = (1, config["num_key_value_heads"], 0, config["head_size"])
        feeds: dict[str, Any] = {
            value.name: np.zeros(shape, np.float32)
            for value in session.get_inputs()
            if value.name.startswith("past")
        }
        feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        return session.run(["logits"], feeds)[0][0]


class LlamaCpp:
    """llama.cpp by its C interface."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.c = llama_cpp
        silence_llama_cpp()
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = 1024, 512, 512
        context.n_threads = context.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.width = llama_cpp.llama_model_n_embd(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.tokens = llama_cpp.llama_batch_init(512, 0, 1)
        self.embeddings = llama_cpp.llama_batch_init(512, self.width, 1)
        self.length = 0

    def _decode(self, batch: Any, count: int, wanted: str) -> None:
        batch.n_tokens = count
        for i in range(count):
            batch.pos[i] = self.length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = wanted == "all" or (wanted == "last" and i == count - 1)
        if self.c.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.length += count

    def _feed(self, ids: list[int], wanted: str) -> None:
        for i, token in enumerate(ids):
            self.tokens.token[i] = token
        self._decode(self.tokens, len(ids), wanted)

    def _clear(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        self.length = 0

    def prefill(self, ids: list[int], embeddings: np.ndarray) -> None:
        self._clear()
        rows = np.ascontiguousarray(embeddings[0, :IMAGE], np.float32)
        ctypes.memmove(self.embeddings.embd, rows.ctypes.data, rows.nbytes)
        self._decode(self.embeddings, IMAGE, "none")
        self._feed(ids[IMAGE:], "last")
        self.c.llama_synchronize(self.context)

    def step(self, token: int, embedding: np.ndarray) -> None:
        self._feed([token], "last")
        self.c.llama_get_logits(self.context)

    def logits(self, ids: list[int]) -> np.ndarray:
        self._clear()
        self._feed(ids, "all")
        found = self.c.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (len(ids), self.vocabulary)).copy()


def silence_llama_cpp() -> None:
    """It writes to stderr what it loads."""
    import llama_cpp

    llama_cpp.llama_log_set(_silent(llama_cpp), ctypes.c_void_p())


_CALLBACKS: list[Any] = []


def _silent(llama_cpp: Any) -> Any:
    # llama.cpp keeps the pointer, and Python must keep the function.
    _CALLBACKS.append(llama_cpp.llama_log_callback(lambda *_: None))
    return _CALLBACKS[-1]


class Transformers:
    """transformers' model as it is, with a growing cache; or under torch.compile, with a static one."""

    def __init__(self, model: Any, compiled: bool) -> None:
        import torch
        from transformers import StaticCache

        self.torch, self.model = torch, model
        self.forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
        self.cache: Any = None
        self.static = StaticCache(model.config, PREFILL + DECODE + 8) if compiled else None

    def _call(self, **inputs: Any) -> Any:
        with self.torch.inference_mode():
            return self.forward(past_key_values=self.cache, use_cache=True, **inputs).logits

    def prefill(self, ids: list[int], embeddings: np.ndarray) -> None:
        from transformers import DynamicCache

        if self.static is None:
            self.cache = DynamicCache(config=self.model.config)
        elif self.cache is None:
            self.cache = self.static
        else:
            with self.torch.inference_mode():
                self.static.reset()
        rows = self.torch.from_numpy(embeddings).to(self.model.dtype)
        self._call(inputs_embeds=rows, logits_to_keep=1)

    def step(self, token: int, embedding: np.ndarray) -> None:
        self._call(input_ids=self.torch.tensor([[token]]), logits_to_keep=1)

    def logits(self, ids: list[int]) -> np.ndarray:
        with self.torch.inference_mode():
            return self.model(input_ids=self.torch.tensor([ids])).logits[0].float().numpy()


class OptimumExecutorch:
    """optimum-executorch's program, its method `forward(input_ids, cache_position)`, on our runtime.

    It takes ids, and gives the logits of all positions that it is fed.
    """

    def __init__(self, path: Path, threads: int) -> None:
        from mobilemm.runtime.backends.executorch import ExecutorchProgram

        self.program = ExecutorchProgram(path, threads)
        self.length = 0

    def _feed(self, ids: list[int]) -> np.ndarray:
        end = self.length + len(ids)
        found = self.program("forward", np.array([ids]), np.arange(self.length, end))
        self.length = end
        return found

    def prefill(self, ids: list[int], embeddings: np.ndarray) -> None:
        self.length = 0
        self._feed(ids)

    def step(self, token: int, embedding: np.ndarray) -> None:
        self._feed([token])

    def logits(self, ids: list[int]) -> np.ndarray:
        self.length = 0
        return self._feed(ids)[0]


# --- how each is loaded, in its own process -----------------------------------------------------------------


def load_bundle(name: str, folder: Path, threads: int) -> dict[str, System]:
    """A bundle of ours."""
    return {name: Bundle(folder, threads)}


def load_genai(name: str, folder: Path, threads: int) -> dict[str, System]:
    """onnxruntime-genai's model."""
    return {name: Genai(folder, threads)}


def load_llama_cpp(name: str, path: Path, threads: int) -> dict[str, System]:
    """A GGUF file on llama.cpp."""
    return {name: LlamaCpp(path, threads)}


def load_optimum(name: str, path: Path, threads: int) -> dict[str, System]:
    """optimum-executorch's program."""
    return {name: OptimumExecutorch(path, threads)}


def load_transformers(llm: Path, threads: int) -> dict[str, System]:
    """The language model in the faster dtype of fp32 and bf16, eager and compiled over the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    ids, embeddings = prompt(model.config.vocab_size, model.config.hidden_size)
    seconds = _seconds(Transformers(model, compiled=False), ids, embeddings)
    model = model.to(torch.bfloat16)
    dtype = "bf16"
    if _seconds(Transformers(model, compiled=False), ids, embeddings) > seconds:
        model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
        dtype = "fp32"
    return {
        f"transformers eager, {dtype}": Transformers(model, compiled=False),
        f"transformers compiled, {dtype}": Transformers(model, compiled=True),
    }


def prompt(vocabulary: int, width: int) -> tuple[list[int], np.ndarray]:
    """Ids and embeddings (1, PREFILL, width), always the same."""
    generator = np.random.default_rng(0)
    ids = generator.integers(10, vocabulary - 10, PREFILL).tolist()
    return ids, generator.normal(0, 0.1, (1, PREFILL, width)).astype(np.float32)


def _seconds(system: System, ids: list[int], embeddings: np.ndarray, steps: int = 4) -> float:
    """The least time of two that a prompt and a few steps take."""
    taken = []
    for _ in range(2):
        begun = time.perf_counter()
        system.prefill(ids, embeddings)
        for _ in range(steps):
            system.step(ids[0], embeddings[:, :1])
        taken.append(time.perf_counter() - begun)
    return min(taken)
