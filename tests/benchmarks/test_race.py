"""The whole race by its command, over a tiny random model; its ratios by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results import behind, best_peer, fraction, ratio, table
from mobilemm.runtime.bundle import open_bundle

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 2


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("onnxruntime", "executorch", "matplotlib"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("race")
    command = [sys.executable, "-m", "benchmarks.race", "--work", str(folder), "--sizes", "tiny"]
    command += ["--rounds", str(ROUNDS), "--threads", "1", "--text", "tests/assets/english.txt"]
    done = subprocess.run([*command, "--write", str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.slow
def test_all_that_is_installed_races_and_is_in_the_page(work: Path) -> None:
    result = json.loads((work / "tiny" / "race.json").read_text())
    names = list(result["systems"])
    assert [name for name in names if result["systems"][name]["ours"]] == [
        "mobilemm ONNX int4",
        "mobilemm ExecuTorch int4",
    ]
    peers = {
        "onnxruntime_genai": ["onnxruntime-genai int4"],
        "llama_cpp": ["llama.cpp Q4_0", "llama.cpp Q8_0"],
    }
    wanted = {name for module, found in peers.items() if find_spec(module) for name in found}
    assert wanted <= set(names)
    assert sum(name.startswith("transformers ") for name in names) == 2
    for one in result["systems"].values():
        assert len(one["prefill"]) == len(one["decode"]) == ROUNDS
        assert min(*one["prefill"], *one["decode"]) > 0
        # 2,000 tokens of random weights are almost equally likely: what is wrong is further off.
        assert 0 <= one["kl"] < 0.01
    page = (work / "RESULTS.md").read_text()
    assert table(result) in page
    assert all(f"| {name} |" in page for name in names)
    assert result["processor"] in page
    assert (work / "race.svg").read_text().count(names[0]) == 1


@pytest.mark.slow
def test_bytes_of_a_token_are_those_of_the_files(work: Path) -> None:
    systems = json.loads((work / "tiny" / "race.json").read_text())["systems"]
    # 2 layers, 64 wide, 160 inside, 2,000 tokens, 4 heads of 16; behind 256 positions and half of 64.
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 160) + 2000 * 64
    numbers = 2 * 2 * 64 * 288
    onnx = open_bundle(work / "tiny" / "onnx").manifest.parts["decoder"]
    assert systems["mobilemm ONNX int4"]["bytes_per_token"] == onnx.bytes + 4 * numbers
    executorch = systems["mobilemm ExecuTorch int4"]["bytes_per_token"] - 4 * numbers
    assert linear / 2 < executorch < 2 * linear  # 4 bits, scales, and the program
    eager = next(one for name, one in systems.items() if name.startswith("transformers eager"))
    assert eager["bytes_per_token"] in (2 * (linear + numbers), 4 * (linear + numbers))


def a_result() -> dict:
    ours = {"ours": True, "prefill": [90.0, 110.0, 100.0], "decode": [8.0, 9.0, 8.5], "bytes_per_token": 1e6}
    peer = {"ours": False, "prefill": [50.0] * 3, "decode": [10.0] * 3, "bytes_per_token": 2e6}
    slow = {"ours": False, "prefill": [1.0] * 3, "decode": [99.0, 1.0, 1.0], "bytes_per_token": 2e6}
    return {
        "systems": {name: one | {"resident": 1e6} for name, one in (("a", ours), ("b", peer), ("c", slow))},
        "operations": 1e9,
        "operations_per_position": 1e6,
        "bandwidth": 2e7,
    }


def test_ratios_are_taken_in_each_round() -> None:
    result = a_result()
    assert best_peer(result, "decode") == "b"
    assert ratio(result, "a", "decode") == pytest.approx((0.85, 0.8, 0.9))
    assert ratio(result, "a", "prefill") == pytest.approx((2.0, 1.8, 2.2))
    assert fraction(result, "a", "prefill") == pytest.approx(0.1)
    assert fraction(result, "b", "decode") == pytest.approx(1.0)
    row = table(result).splitlines()[2]
    assert row == "| a | 100 | 2.00 (1.80–2.20) | 10 % | 8.5 | 0.85 (0.80–0.90) | 42 % | 1 | 1 |"


def test_where_a_peer_is_ahead_is_told() -> None:
    result = a_result()
    assert list(behind("s", result)) == ["s, a, decode: 0.85 (0.80–0.90) of b. Why is not known."]
    result["systems"]["a"]["decode"] = [8.0, 11.0, 8.5]
    (line,) = behind("s", result)
    assert "noise" in line
    result["systems"]["a"]["decode"] = list(np.array(result["systems"]["b"]["decode"]) * 2)
    assert not list(behind("s", result))
