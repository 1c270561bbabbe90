"""Measurements of a real bundle in a real process, against clocks and counters of the test's own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mobilemm.bench.host import bench_here, runner_lines
from mobilemm.bench.result import Result, Settings
from mobilemm.bench.runner import QUESTION, Request, Runner, photograph
from mobilemm.bench.subject import BundleSubject, decoding_of
from mobilemm.errors import MobileMMError
from mobilemm.runtime.backends.onnx import OnnxBackend
from mobilemm.runtime.bundle import open_bundle

pytestmark = pytest.mark.slow

SETTINGS = Settings(prompt_tokens=32, new_tokens=24, runs=3, threads=1)
# Rounds until two clocks agree: other processes may take the machine in the middle of one of them.
TRIES = 12


@pytest.fixture(scope="module")
def result(bundle: Path) -> Result:
    return bench_here(bundle, SETTINGS)


def test_every_phase_is_measured(result: Result, bundle: Path) -> None:
    names = {figure.name for figure in result.figures}
    assert {"load_cold", "load_warm", "image", "vision", "ttft", "pp32", "tg24", "token"} <= names
    assert {"memory", "memory_load", "memory_vision", "memory_decode", "memory_ttft"} <= names
    assert len(result.figure("tg24").runs) == SETTINGS.runs
    assert len(result.figure("token").runs) == SETTINGS.runs * SETTINGS.new_tokens
    assert result.runtime.startswith("onnxruntime ")
    assert result.bundle.bytes == sum(file.bytes for file in open_bundle(bundle).manifest.files)
    assert ("energy" in names) != ("energy" in result.absent)


def test_limits_are_what_the_manifest_and_the_machine_say(result: Result, bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    model = manifest.model
    cached = decoding_of(manifest).cache_bytes_per_token
    assert cached == 8 * 2 * model.num_key_value_heads * model.head_dim * 4
    moved = manifest.parts["decoder"].bytes + (32 + 12) * cached
    decode = result.figure("tg24")
    assert decode.limit is not None
    assert decode.limit.by == "bandwidth"
    assert decode.limit.best == pytest.approx(result.machine.bandwidth / moved)


def test_decoding_is_as_fast_as_a_loop_on_onnxruntime(bundle: Path) -> None:
    """Its own calls with a growing cache of plain arrays, in turns with the runner."""
    _agrees(bundle, loop_rate)


def test_decoding_is_as_fast_as_a_loop_on_executorch(executorch_bundle: Path) -> None:
    """Its own module, whose cache is inside, in turns with the runner."""
    _agrees(executorch_bundle, executorch_loop_rate)


def _agrees(bundle: Path, independent_rate: Callable[[Runner], float]) -> None:
    runner = Runner(Request(folder=str(bundle), settings=SETTINGS), io.StringIO())
    runner.load()
    for _ in range(TRIES):
        begin = runner.out.tell()  # type: ignore[union-attr]
        runner._decode()
        told = runner.out.getvalue()[begin:].splitlines()  # type: ignore[attr-defined]
        lines = {line["figure"]: line["runs"] for line in map(json.loads, told)}
        ours = max(lines["decode"])
        independent = max(independent_rate(runner) for _ in range(SETTINGS.runs))
        if abs(ours / independent - 1) <= 0.1:
            return
    pytest.fail(f"{ours:.1f} tok/s, by an independent loop {independent:.1f}")


def executorch_loop_rate(runner: Runner) -> float:
    """Tokens a second of a greedy loop over the program's methods."""
    import torch
    from executorch.extension.pybindings import portable_lib

    assert isinstance(runner.subject, BundleSubject)
    module = portable_lib._load_for_executorch(str(runner.subject.bundle.part_path("decoder")))

    def step(ids: list[int], position: int) -> int:
        (rows,) = module.run_method("token_embedding", (torch.tensor([ids]),))
        (logits,) = module.run_method("text_decoder", (rows, torch.tensor([position])))
        return int(logits[0, -1].argmax())

    token = step(runner._ids(SETTINGS.prompt_tokens), 0)
    begun = time.perf_counter()
    for index in range(SETTINGS.new_tokens):
        token = step([token], SETTINGS.prompt_tokens + index)
    return SETTINGS.new_tokens / (time.perf_counter() - begun)


def loop_rate(runner: Runner) -> float:
    """Tokens a second of a greedy loop that knows sessions and arrays, nothing of the decoder's class."""
    import onnxruntime

    assert isinstance(runner.subject, BundleSubject)
    backend, model = runner.subject.backend, runner.subject.manifest.model
    assert isinstance(backend, OnnxBackend)
    embed, decoder = backend.session("embed"), backend.session("decoder")
    capacity = SETTINGS.prompt_tokens + SETTINGS.new_tokens
    names = [value.name for value in decoder.get_inputs() if value.name.startswith("past_key_values.")]
    shape = (1, model.num_key_value_heads, capacity, model.head_dim)
    cache = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32)) for name in names}
    empty = np.zeros((0, model.hidden_size), np.float32)

    def step(ids: list[int], total: int) -> int:
        inputs = {"input_ids": np.array([ids], np.int64), "image_features": empty}
        (embeds,) = embed.run(["inputs_embeds"], inputs)
        binding = decoder.io_binding()
        feeds = {"inputs_embeds": embeds, "attention_mask": np.ones((1, total), np.int64)}
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        binding.bind_output("logits")
        for name in names:
            binding.bind_ortvalue_input(name, cache[name])
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), cache[name])
        decoder.run_with_iobinding(binding)
        return int(binding.get_outputs()[0].numpy()[0, -1].argmax())

    token = step(runner._ids(SETTINGS.prompt_tokens), SETTINGS.prompt_tokens)
    begun = time.perf_counter()
    for index in range(SETTINGS.new_tokens):
        token = step([token], SETTINGS.prompt_tokens + index + 1)
    return SETTINGS.new_tokens / (time.perf_counter() - begun)


def test_the_first_token_comes_when_a_stopwatch_says(result: Result, bundle: Path, tmp_path: Path) -> None:
    """Around the first character that `mobilemm run` prints of an answer about a new photo."""
    command = [sys.executable, "-m", "mobilemm", "run", bundle, "--threads", "1", "--max-new-tokens", "1"]
    talking = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    assert talking.stdin
    assert talking.stdout

    def seconds(seed: int) -> float:
        photo = tmp_path / f"{seed}.jpg"
        photo.write_bytes(photograph(seed))
        begun = time.perf_counter()
        talking.stdin.write(f"/reset\n/image {photo}\n{QUESTION}\n".encode())
        talking.stdout.read(1)
        told = time.perf_counter() - begun
        if not talking.stdout.readline().endswith(b"\n"):
            pytest.fail("it ended")
        return told

    with talking:
        seconds(0)  # loads the parts
        for turn in range(TRIES):
            shown = min(seconds(100 * turn + run + 1) for run in range(SETTINGS.runs))
            found = min((result if turn == 0 else bench_here(bundle, SETTINGS)).figure("ttft").runs)
            if abs(found / shown - 1) <= 0.1:
                break
        else:
            pytest.fail(f"{found:.4f} s, by a stopwatch {shown:.4f}")
        talking.stdin.close()


def test_memory_is_what_the_kernel_accounts_for(bundle: Path, tmp_path: Path) -> None:
    """The peak that the runner tells, and what its process is seen to hold by another one."""
    request = Request(folder=str(bundle), settings=SETTINGS).model_dump_json()
    lines = tmp_path / "lines"
    seen = 0
    with lines.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "mobilemm.bench.runner"], stdin=subprocess.PIPE, stdout=out, text=True
        )
        assert child.stdin is not None
        child.stdin.write(request)
        child.stdin.close()
        while child.poll() is None:
            pages = Path(f"/proc/{child.pid}/statm").read_text().split()
            seen = max(seen, int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else 0)
            time.sleep(0.002)
    assert child.returncode == 0
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    peak = max(line["bytes"] for line in told if "peak" in line)
    # What is looked at now and then may miss the peak; the counters of Linux lag behind by some pages.
    assert 0.9 * peak < seen < 1.02 * peak


def test_a_runner_that_fails_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mobilemm.bench.runner"]
    with pytest.raises(MobileMMError, match=r"manifest\.json") as raised:
        list(runner_lines(command, {"folder": str(tmp_path)}))
    assert "\n" not in str(raised.value)
    with pytest.raises(MobileMMError, match="ended early: gone"):
        list(runner_lines([sys.executable, "-c", "import sys; sys.exit('gone')"], {}))
