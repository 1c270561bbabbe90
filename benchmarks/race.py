"""Our decoders against other projects', over the same weights on the same machine, interleaved in one run.

    python -m benchmarks.race --work FOLDER [--sizes default mobilellama-1.4b] [--rounds 7] [--write]

Ours: the bundles that `mobilemm export` makes for onnx and executorch; Core ML runs on Apple's systems alone.
Peers: onnxruntime-genai's builder (int4), llama.cpp (Q4_0 and Q8_0 by its own quantizer from float16),
transformers eager and under torch.compile with a static cache, in the faster of fp32 and bf16 here; and with
--optimum PYTHON, a Python of an environment that has it, optimum-executorch's own recipe. Weights: the
default model's, and random ones of MobileLLaMA-1.4B's shape, which are rounded to nearest for ours. Whatever
is made stays in FOLDER and is made once. Needs the extra `judges`; a peer that is not installed is left out.

Prefill is 256 positions, of which 144 are image embeddings; onnxruntime-genai and optimum-executorch have no
input for those and get 256 ids. Decode is 64 steps behind it, 16 where a step takes more than 0.1 s. Each
system is in a process of its own; each round runs every one once, in an order that turns, and measures the
machine. With --text: mean KL divergence to fp32 per position, of each system as it runs, with its own
rounding of activations. --write puts the results into RESULTS.md and race.svg beside this file, or in a
folder; --rounds 0 races nothing, makes what is missing, and writes what is known.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.results import table, write_results
from benchmarks.systems import (
    DECODE,
    PREFILL,
    System,
    load_bundle,
    load_genai,
    load_llama_cpp,
    load_optimum,
    load_transformers,
    prompt,
)
from mobilemm.bench import machine

SLOW_STEP, SLOW_DECODE, WARM_UP = 0.1, 16, 4
# Thread pools spin when their work is over, none of these for longer: the next system begins behind that.
PAUSE = 0.2
# Seconds that a process has to end by itself.
GRACE = 10.0

# Of scripts/random_checkpoint.py, whose names are those of whole models; None is the default model.
SIZES = {"default": None, "mobilellama-1.4b": "1.7B", "tiny": "tiny"}
TARGETS = {"onnx": "mobilemm ONNX int4", "executorch": "mobilemm ExecuTorch int4"}
PACKAGES = (
    *("mobilemm", "onnxruntime", "executorch", "onnxruntime-genai", "llama-cpp-python"),
    *("transformers", "torch"),
)


@dataclass(frozen=True)
class Entry:
    """What a process loads; by system's name bytes of the weights, and of a number in the cache."""

    load: Callable[[], dict[str, System]]
    reads: dict[str, tuple[int, int]]
    ours: bool = False


class Loaded:
    """An entry in its process."""

    def __init__(self, entry: Entry) -> None:
        context = get_context("spawn")
        self.entry = entry
        self._connection, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, entry.load), daemon=True)
        self._process.start()
        far.close()
        self.names: list[str] = self._receive()

    def __enter__(self) -> Loaded:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._connection.send(None)
        self._process.join(GRACE)
        self._process.terminate()

    def call(self, name: str, what: str, *arguments: Any) -> Any:
        """One of the functions below in the process, on a system."""
        self._connection.send((name, what, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise SystemExit(f"error: {' and '.join(self.entry.reads)} ended early") from None


def _serve(connection: Any, load: Callable[[], dict[str, System]]) -> None:
    systems = load()
    connection.send(list(systems))
    answers = {"turn": _turn, "logits": _logits, "resident": _resident}
    while (request := connection.recv()) is not None:
        name, what, arguments = request
        connection.send(answers[what](systems[name], *arguments))


def _turn(system: System, ids: list[int], embeddings: np.ndarray, steps: int) -> tuple[float, float]:
    """Seconds of the prompt, and of one step."""
    one = np.ascontiguousarray(embeddings[:, :1])
    start = time.perf_counter()
    system.prefill(ids, embeddings)
    middle = time.perf_counter()
    for _ in range(steps):
        system.step(ids[0], one)
    return middle - start, (time.perf_counter() - middle) / steps


def _logits(system: System, ids: list[int]) -> np.ndarray:
    return system.logits(ids)


def _resident(_: System) -> int:
    """Bytes in memory, mapped files included."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def prepare(size: str, work: Path, options: argparse.Namespace) -> tuple[Path, list[Entry]]:
    """The language model alone, and all that race at a size; files that are missing are made."""
    work.mkdir(parents=True, exist_ok=True)
    model, flags = options.model, ()
    if SIZES[size] is not None:
        model, flags = str(work / "checkpoint"), ("--q-method", "rtn")
        if not Path(model).exists():
            _tell(f"{size}: writing a random checkpoint")
            peers.make_checkpoint(SIZES[size], Path(model))
    threads = options.threads
    bundles = {}
    for target, name in TARGETS.items():
        _tell(f"{size}: {name}")
        bundles[name] = peers.make_bundle(model, work / target, target, flags)
    bundles |= {f"mobilemm {folder.name}": folder for folder in options.bundle}
    entries = [
        Entry(
            partial(load_bundle, name, folder, threads),
            {name: (peers.bundle_bytes(folder), peers.bundle_cache_width(folder))},
            ours=True,
        )
        for name, folder in bundles.items()
    ]
    _tell(f"{size}: peers")
    llm = peers.make_llm(model, work)
    if find_spec("onnxruntime_genai"):
        name, folder = "onnxruntime-genai int4", peers.make_genai(llm, work)
        reads = {name: (peers.genai_bytes(folder), 4)}
        entries.append(Entry(partial(load_genai, name, folder, threads), reads))
    if find_spec("llama_cpp"):
        for kind in ("Q4_0", "Q8_0"):
            name, path = f"llama.cpp {kind}", peers.make_gguf(work, kind)
            reads = {name: (peers.gguf_bytes(path), 2)}
            entries.append(Entry(partial(load_llama_cpp, name, path, threads), reads))
    if options.optimum:
        name, path = "optimum-executorch 8da4w", peers.make_optimum(llm, work, options.optimum)
        reads = {name: (peers.optimum_bytes(path, llm), 4)}
        entries.append(Entry(partial(load_optimum, name, path, threads), reads))
    weights = Shape.read(llm).linear + Shape.read(llm).head
    reads = {
        f"transformers {mode}, {dtype}": (width * weights, width)
        for mode in ("eager", "compiled")
        for dtype, width in (("fp32", 4), ("bf16", 2))
    }
    entries.append(Entry(partial(load_transformers, llm, threads), reads))
    return llm, entries


@dataclass(frozen=True)
class Shape:
    """Parameters of a language model's linear layers without its head; of the head; numbers in the cache."""

    vocabulary: int
    width: int
    linear: int
    head: int
    attention: int
    cached: int

    @classmethod
    def read(cls, llm: Path) -> Shape:
        """From the config of a LLaMA."""
        config = json.loads((llm / "config.json").read_text())
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or width // heads
        query, key = heads * head_dim, config["num_key_value_heads"] * head_dim
        return cls(
            vocabulary=config["vocab_size"],
            width=width,
            linear=layers * (2 * width * query + 2 * width * key + 3 * width * config["intermediate_size"]),
            head=config["vocab_size"] * width,
            attention=layers * query,
            cached=2 * layers * key,
        )

    @property
    def operations(self) -> float:
        """For a position of the prompt: the head's at the last alone, attention's below the diagonal."""
        return 2 * (self.linear + self.head / PREFILL + self.attention * PREFILL)


def race(llm: Path, loaded: Sequence[Loaded], rounds: int, threads: int) -> dict[str, Any]:
    """Tokens a second of each system and round, and of each round what the machine does a second."""
    shape = Shape.read(llm)
    question = prompt(shape.vocabulary, shape.width)
    systems = {name: one for one in loaded for name in one.names}
    steps = {}
    for name, one in systems.items():
        one.call(name, "turn", *question, WARM_UP)
        _, step = one.call(name, "turn", *question, WARM_UP)
        steps[name] = SLOW_DECODE if step > SLOW_STEP else DECODE
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in systems}
    rates = []
    names = list(systems)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            time.sleep(PAUSE)
            found[name].append(systems[name].call(name, "turn", *question, steps[name]))
        rates.append((machine.read_bandwidth(threads, 2), machine.operation_rate(threads, 2)))
        _tell(f"round {turn + 1} of {rounds}")
    results = {}
    for name, one in systems.items():
        weights, cache_width = one.entry.reads[name]
        results[name] = {
            "ours": one.entry.ours,
            "prefill": [PREFILL / prefill for prefill, _ in found[name]],
            "decode": [1 / step for _, step in found[name]],
            "steps": steps[name],
            "bytes_per_token": weights + shape.cached * cache_width * (PREFILL + steps[name] / 2),
            "resident": one.call(name, "resident"),
        }
    return {
        "bandwidth": max(bandwidth for bandwidth, _ in rates),
        "operations": max(operations for _, operations in rates),
        "operations_per_position": shape.operations,
        "systems": results,
    }


def divergences(loaded: Sequence[Loaded], llm: Path, text: Path, length: int = 256) -> dict[str, float]:
    """Mean KL(fp32 ‖ system) per position in nats, over the text in pieces of `length` tokens."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    ids = Tokenizer.from_file(str(llm / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    pieces = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    sums = {name: 0.0 for one in loaded for name in one.names}
    for piece in pieces:
        with torch.no_grad():
            wanted = model(torch.tensor([piece])).logits[0].double().log_softmax(-1)
        for one in loaded:
            for name in one.names:
                logits = one.call(name, "logits", piece).astype(np.float64)
                found = torch.from_numpy(logits).log_softmax(-1)
                sums[name] += float((wanted.exp() * (wanted - found)).sum(-1).mean())
    return {name: total / len(pieces) for name, total in sums.items()}


def conditions(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and settings."""
    asked = f" --text {options.text}" if options.text else ""
    asked += " --optimum PYTHON" if options.optimum else ""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if options.optimum:
        versions["optimum-executorch"] = peers.optimum_version(options.optimum)
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": machine.processor(),
        "cores": machine.cores(),
        "memory": machine.memory(),
        "versions": versions,
        "rounds": options.rounds,
        "threads": options.threads,
        "command": f"python -m benchmarks.race --work FOLDER --sizes {size}{asked}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line; prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="where all files are made, and kept")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["default", "mobilellama-1.4b"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=machine.cores())
    parser.add_argument("--model", help="another checkpoint in place of the default model")
    parser.add_argument(
        "--bundle", type=Path, nargs="+", default=[], help="more of the size, named by folder"
    )
    parser.add_argument("--optimum", metavar="PYTHON", help="a Python that has optimum-executorch")
    parser.add_argument("--text", type=Path, help="for the KL divergence")
    parser.add_argument("--write", type=Path, nargs="?", const=Path(__file__).parent, metavar="FOLDER")
    options = parser.parse_args(arguments)
    for size in options.sizes:
        work = options.work / size
        llm, entries = prepare(size, work, options)
        if options.rounds:
            with ExitStack() as stack:
                _tell(f"{size}: loading")
                loaded = [stack.enter_context(Loaded(entry)) for entry in entries]
                found = conditions(size, options) | race(llm, loaded, options.rounds, options.threads)
                if options.text:
                    for name, kl in divergences(loaded, llm, options.text).items():
                        found["systems"][name]["kl"] = kl
            (work / "race.json").write_text(json.dumps(found, indent=1))
    # Of the other sizes, what their last race has left.
    files = {
        size: options.work / size / "race.json" for size in SIZES if size != "tiny" or size in options.sizes
    }
    results = {size: json.loads(path.read_text()) for size, path in files.items() if path.exists()}
    for size in options.sizes:
        if size in results:
            print(f"{size}\n\n{table(results[size])}\n", flush=True)
    if options.write and results:
        write_results(results, options.write)


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
