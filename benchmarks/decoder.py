"""The bundle's decoder against onnxruntime-genai's builder and llama.cpp Q4_0, interleaved in one run.

    python benchmarks/decoder.py BUNDLE… --work FOLDER [--model CHECKPOINT] [--rounds 7] [--text FILE]

Peers are made from the same weights by their own tools, with their own defaults:
`onnxruntime_genai.models.builder -p int4 -e cpu`, and `llama_model_quantize` to Q4_0 from a float16 GGUF.
Needs the extra `judges`.

Prefill is 256 positions, of which 144 are image embeddings; the builder's model has no input for those and
gets 256 ids. Decode is 64 steps behind it. Each round runs every system once, in an order that turns; figures
are medians. With --text: mean KL divergence to fp32 per position, of each system as it runs, with its own
rounding of activations.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

PREFILL, IMAGE, DECODE = 256, 144, 64


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
        params.set_search_options(
            max_length=PREFILL + DECODE + 8, min_length=PREFILL + DECODE + 8, do_sample=False
        )
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
        llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p())
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

    def prefill(self, ids: list[int], embeddings: np.ndarray) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        self.length = 0
        rows = np.ascontiguousarray(embeddings[0, :IMAGE], np.float32)
        ctypes.memmove(self.embeddings.embd, rows.ctypes.data, rows.nbytes)
        self._decode(self.embeddings, IMAGE, "none")
        self._feed(ids[IMAGE:], "last")
        self.c.llama_synchronize(self.context)

    def step(self, token: int, embedding: np.ndarray) -> None:
        self._feed([token], "last")
        self.c.llama_get_logits(self.context)

    def logits(self, ids: list[int]) -> np.ndarray:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        self.length = 0
        self._feed(ids, "all")
        found = self.c.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (len(ids), self.vocabulary)).copy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="+")
    parser.add_argument(
        "--model", help="the checkpoint that they were made from; left out, the default model"
    )
    parser.add_argument("--work", type=Path, required=True, help="where the peers' files are made, and kept")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, help="for the KL divergence")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    llm = make_llm(options.model, options.work)
    genai, gguf = make_genai(llm, options.work), make_gguf(options.work)
    makers: dict[str, Callable[[], System]] = {
        **{
            f"mobilemm {folder.name}": lambda folder=folder: Bundle(folder, options.threads)
            for folder in options.bundle
        },
        "onnxruntime-genai": lambda: Genai(genai, options.threads),
        "llama.cpp Q4_0": lambda: LlamaCpp(gguf, options.threads),
    }
    systems = {name: make() for name, make in makers.items()}
    sizes = {
        **{f"mobilemm {folder.name}": decoder_bytes(folder) for folder in options.bundle},
        "onnxruntime-genai": genai_bytes(genai),
        "llama.cpp Q4_0": gguf_bytes(gguf),
    }
    results = speed(systems, llm, options.rounds)
    if options.text:
        for name, kl in divergences(systems, llm, options.text).items():
            results[name]["kl"] = kl
    bandwidth = read_bandwidth()
    for name, result in results.items():
        result["bytes_per_token"] = sizes[name]
        result["bandwidth_fraction"] = result["decode"] * sizes[name] / bandwidth
    peers = [results["onnxruntime-genai"], results["llama.cpp Q4_0"]]
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {options.threads} threads, {options.rounds} rounds")
    head = (
        f"{'':28}{'prefill':>9}{'×best':>7}{'decode':>9}{'×best':>7}{'MB/token':>10}{'of limit':>10}{'KL':>9}"
    )
    print(head)
    for name, result in results.items():
        for kind in ("prefill", "decode"):
            result[f"{kind}_ratio"] = result[kind] / max(peer[kind] for peer in peers)
        kl = f"{result['kl']:9.3f}" if "kl" in result else ""
        print(
            f"{name:28}{result['prefill']:9.1f}{result['prefill_ratio']:7.2f}{result['decode']:9.1f}"
            f"{result['decode_ratio']:7.2f}{result['bytes_per_token'] / 1e6:10.1f}"
            f"{result['bandwidth_fraction']:10.0%}{kl}"
        )
    if options.json:
        options.json.write_text(json.dumps({"bandwidth": bandwidth, "systems": results}, indent=2))


def speed(systems: dict[str, System], llm: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens a second of each system: medians over the rounds, and all of them."""
    config = json.loads((llm / "config.json").read_text())
    generator = np.random.default_rng(0)
    ids = generator.integers(10, config["vocab_size"] - 10, PREFILL).tolist()
    embeddings = generator.normal(0, 0.1, (1, PREFILL, config["hidden_size"])).astype(np.float32)
    one = np.ascontiguousarray(embeddings[:, :1])
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    names = list(systems)
    for turn in range(rounds + 1):  # the first warms up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            system = systems[name]
            start = time.perf_counter()
            system.prefill(ids, embeddings)
            middle = time.perf_counter()
            for _ in range(DECODE):
                system.step(ids[0], one)
            end = time.perf_counter()
            if turn:
                samples[name].append((PREFILL / (middle - start), DECODE / (end - middle)))
    return {
        name: {
            "prefill": float(np.median([prefill for prefill, _ in found])),
            "decode": float(np.median([decode for _, decode in found])),
            "runs": found,
        }
        for name, found in samples.items()
    }


def divergences(systems: dict[str, System], llm: Path, text: Path, length: int = 256) -> dict[str, float]:
    """Mean KL(fp32 ‖ system) per position in nats, over the text in pieces of `length` tokens."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    ids = Tokenizer.from_file(str(llm / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    pieces = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    sums = dict.fromkeys(systems, 0.0)
    for piece in pieces:
        with torch.no_grad():
            wanted = model(torch.tensor([piece])).logits[0].double().log_softmax(-1)
        for name, system in systems.items():
            found = torch.from_numpy(system.logits(piece).astype(np.float64)).log_softmax(-1)
            sums[name] += float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return {name: total / len(pieces) for name, total in sums.items()}


# --- the peers' files ---------------------------------------------------------------------------------------


def make_genai(llm: Path, work: Path) -> Path:
    """onnxruntime-genai's int4 model with the builder's defaults."""
    folder = work / "genai"
    if not (folder / "genai_config.json").exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        command += ["-i", str(llm), "-o", str(folder), "-c", str(work / "cache")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def make_llm(model: str | None, work: Path) -> Path:
    """The language model alone, in transformers' layout; and beside it `f16.gguf`, unless they are there."""
    folder = work / "llm"
    if (work / "f16.gguf").exists() or (work / "q4_0.gguf").exists():
        return folder
    import mobilemm
    from mobilemm.export.targets.gguf import export_gguf

    loaded = mobilemm.load(model)
    loaded.model.language_model.save_pretrained(folder)
    loaded.processor.tokenizer.save_pretrained(folder)
    files = export_gguf(loaded, work / "gguf", "f16", mmproj=False)
    os.replace(files.llm, work / "f16.gguf")
    return folder


def make_gguf(work: Path) -> Path:
    """llama.cpp's Q4_0 by its own quantizer, from our float16 GGUF of the same weights."""
    path = work / "q4_0.gguf"
    if path.exists():
        return path
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, 2
    llama_cpp.llama_log_set(_SILENT, ctypes.c_void_p())
    names = (str(work / "f16.gguf").encode(), str(path).encode())
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(options)):
        raise SystemExit("llama.cpp could not quantize its model")
    return path


def decoder_bytes(folder: Path) -> int:
    """Bytes that each decoded token reads: the decoder's weights."""
    from mobilemm.runtime.bundle import open_bundle

    manifest = open_bundle(folder, verify=False).manifest
    # All parts are one file there; the memory that is told is twice the part's own.
    if manifest.target == "executorch":
        return manifest.parts["decoder"].peak_memory // 2
    return sum(path.stat().st_size for path in (folder / "parts").glob("decoder.onnx.data"))


def genai_bytes(folder: Path) -> int:
    """Of the builder's model, without an embedding table of its own (one row of it is read)."""
    import onnx

    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    gathered = {node.input[0] for node in graph.node if node.op_type in ("Gather", "GatherBlockQuantized")}
    used = {name for node in graph.node if "MatMul" in node.op_type for name in node.input}
    lengths = {
        tensor.name: int(next((entry.value for entry in tensor.external_data if entry.key == "length"), 0))
        for tensor in graph.initializer
    }
    return sum(length for name, length in lengths.items() if name not in gathered or name in used)


def gguf_bytes(path: Path) -> int:
    """Of the GGUF, without an embedding table that is not the head's."""
    from gguf import GGUFReader

    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    table = tensors.pop("token_embd.weight")
    return sum(tensors.values()) + (0 if "output.weight" in tensors else table)


def read_bandwidth() -> float:
    """Bytes a second that two threads read from memory: the best of five sums over 1 GiB."""
    import torch

    values = torch.ones(2**27, dtype=torch.float64)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        best = max(best, values.numel() * 8 / (time.perf_counter() - start))
    return best


def _silent() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


try:
    _SILENT = _silent()
except ImportError:
    sys.exit("error: this benchmark needs its peers: pip install 'mobilemm[judges]'")

if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
