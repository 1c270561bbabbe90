"""ExecuTorch bundles' decoders against optimum-executorch's own recipe, on one runtime, in one run.

    python benchmarks/executorch_decoder.py BUNDLE… --optimum PYTHON --work FOLDER [--model CHECKPOINT]

The peer is made from the same language model by optimum-executorch itself, as its README has it: XNNPACK,
custom SDPA and custom cache, linear layers 8da4w in groups of 32, the embedding in 8 bits. Its release asks
for other packages than ours, so --optimum names the Python of an environment with it (optimum-executorch
1.1.0 with transformers 5.0.0rc1, and the executorch that runs here). Needs the extra `judges`.

Rounds, prompt and table are those of `benchmarks/decoder.py`, whose bundles of other targets may stand
beside. The peer takes ids, and gives the logits of all positions that it is fed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import numpy as np
from decoder import Bundle, System, decoder_bytes, make_llm, read_bandwidth, speed

RECIPE = (
    *("--task", "text-generation", "--recipe", "xnnpack", "--use_custom_sdpa", "--use_custom_kv_cache"),
    *("--qlinear", "8da4w", "--qembedding", "8w"),
)


class Optimum:
    """optimum-executorch's program, its method `forward(input_ids, cache_position)`, on our runtime."""

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


def main() -> None:
    """Reads the command line; prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, nargs="+")
    parser.add_argument("--optimum", required=True, help="a Python that has optimum-executorch")
    parser.add_argument("--work", type=Path, required=True, help="where the peer is made, and kept")
    parser.add_argument("--model", help="the bundles' checkpoint; left out, the default model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    llm = make_llm(options.model, options.work)
    peer = make_peer(llm, options.work, options.optimum)
    name = "optimum-executorch 8da4w"
    systems: dict[str, System] = {
        **{f"mobilemm {folder.name}": Bundle(folder, options.threads) for folder in options.bundle},
        name: Optimum(peer, options.threads),
    }
    sizes = {f"mobilemm {folder.name}": decoder_bytes(folder) for folder in options.bundle}
    sizes[name] = peer_bytes(peer, llm)
    results = speed(systems, llm, options.rounds)
    bandwidth = read_bandwidth()
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, {options.threads} threads, {options.rounds} rounds")
    print(f"{'':32}{'prefill':>9}{'×peer':>7}{'decode':>9}{'×peer':>7}{'MB/token':>10}{'of limit':>10}")
    for system, result in results.items():
        result["bytes_per_token"] = sizes[system]
        result["bandwidth_fraction"] = result["decode"] * sizes[system] / bandwidth
        for kind in ("prefill", "decode"):
            result[f"{kind}_ratio"] = result[kind] / results[name][kind]
        print(
            f"{system:32}{result['prefill']:9.1f}{result['prefill_ratio']:7.2f}{result['decode']:9.1f}"
            f"{result['decode_ratio']:7.2f}{sizes[system] / 1e6:10.1f}{result['bandwidth_fraction']:10.0%}"
        )
    if options.json:
        options.json.write_text(json.dumps({"bandwidth": bandwidth, "systems": results}, indent=2))


def make_peer(llm: Path, work: Path, python: str) -> Path:
    """optimum-executorch's program, unless it is there."""
    folder = work / "optimum"
    path = folder / "model.pte"
    if not path.exists():
        command = [python, "-m", "optimum.commands.optimum_cli", "export", "executorch", "--model", str(llm)]
        subprocess.run([*command, *RECIPE, "--output_dir", str(folder)], check=True)
    return path


def peer_bytes(path: Path, llm: Path) -> int:
    """Bytes that a decoded token reads: the file without the 8-bit table, of which one row is read."""
    config = json.loads((llm / "config.json").read_text())
    return path.stat().st_size - config["vocab_size"] * config["hidden_size"]


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
