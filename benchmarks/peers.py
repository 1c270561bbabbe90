"""The files that peers race with, made of the same weights by their own tools with their own defaults.

Each is made once, and kept. The same goes for our own bundles.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.systems import silence_llama_cpp
from mobilemm.runtime.manifest import Manifest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "random_checkpoint.py"
RECIPE = (
    *("--task", "text-generation", "--recipe", "xnnpack", "--use_custom_sdpa", "--use_custom_kv_cache"),
    *("--qlinear", "8da4w", "--qembedding", "8w"),
)
"""optimum-executorch's, as its README has it."""


def make_checkpoint(size: str, folder: Path) -> None:
    """Random weights, by `scripts/random_checkpoint.py`."""
    _run([sys.executable, str(SCRIPT), str(folder), "--size", size])


def make_bundle(model: str | None, folder: Path, target: str, flags: tuple[str, ...]) -> Path:
    """Ours, by `mobilemm export`."""
    if not (folder / "manifest.json").exists():
        command = [sys.executable, "-m", "mobilemm", "export", *([model] if model else [])]
        _run([*command, "--target", target, "--output", str(folder), *flags])
    return folder


def make_llm(model: str | None, work: Path) -> Path:
    """The language model alone, in transformers' layout; and beside it `f16.gguf`."""
    folder = work / "llm"
    if (work / "f16.gguf").exists():
        return folder
    import mobilemm
    from mobilemm.export.targets.gguf import export_gguf

    loaded = mobilemm.load(model)
    loaded.model.language_model.save_pretrained(folder)
    loaded.processor.tokenizer.save_pretrained(folder)
    files = export_gguf(loaded, work / "gguf", "f16", mmproj=False)
    os.replace(files.llm, work / "f16.gguf")
    return folder


def make_genai(llm: Path, work: Path) -> Path:
    """onnxruntime-genai's int4 model with its builder's defaults."""
    folder = work / "genai"
    if not (folder / "genai_config.json").exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        _run([*command, "-i", str(llm), "-o", str(folder), "-c", str(work / "cache")])
    return folder


def make_gguf(work: Path, kind: str) -> Path:
    """Q4_0 or Q8_0 by llama.cpp's own quantizer, from our float16 GGUF of the same weights."""
    path = work / f"{kind.lower()}.gguf"
    if path.exists():
        return path
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    silence_llama_cpp()
    draft = path.with_name(f".{path.name}.part")
    names = (str(work / "f16.gguf").encode(), str(draft).encode())
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(options)):
        raise SystemExit("error: llama.cpp could not quantize its model")
    os.replace(draft, path)
    return path


def make_optimum(llm: Path, work: Path, python: str) -> Path:
    """optimum-executorch's program, by a Python that has it."""
    folder = work / "optimum"
    path = folder / "model.pte"
    if not path.exists():
        command = [python, "-m", "optimum.commands.optimum_cli", "export", "executorch", "--model", str(llm)]
        _run([*command, *RECIPE, "--output_dir", str(folder)])
    return path


def optimum_version(python: str) -> str:
    """Of optimum-executorch, where a Python has it."""
    code = "from importlib.metadata import version; print(version('optimum-executorch'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-2000:]}\nerror: {' '.join(command)} ended with {done.returncode}")


# --- bytes that a decoded token reads of the weights --------------------------------------------------------


def bundle_bytes(folder: Path) -> int:
    """Of the decoder. Where all parts are one file, by the memory that is told, twice the part's own."""
    manifest = _manifest(folder)
    part = manifest.parts["decoder"]
    return part.peak_memory // 2 if manifest.target == "executorch" else part.bytes


def bundle_cache_width(folder: Path) -> int:
    """Bytes of a number in the cache."""
    inputs = _manifest(folder).parts["decoder"].inputs
    kinds = {one.dtype for one in inputs if one.name.startswith("past_key_values.")}
    return {"int8": 1, "float16": 2}.get(next(iter(kinds), "float32"), 4)


def _manifest(folder: Path) -> Manifest:
    from mobilemm.runtime.bundle import open_bundle

    return open_bundle(folder, verify=False).manifest


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


def optimum_bytes(path: Path, llm: Path) -> int:
    """The file without the 8-bit table, of which one row is read."""
    config = json.loads((llm / "config.json").read_text())
    return path.stat().st_size - config["vocab_size"] * config["hidden_size"]
