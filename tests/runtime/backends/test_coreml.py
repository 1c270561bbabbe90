"""Core ML bundles on the reference interpreter, against the same model on PyTorch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mobilemm.cli import app
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints import Loaded
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.backends.coreml import CoreMLBackend
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session

pytestmark = pytest.mark.skipif(
    sys.platform == "darwin", reason="Core ML itself runs there, in its own numbers"
)

TOLERANCE = 0.02  # of the largest logit: weights, activations, keys and values are float16


@pytest.fixture
def backend(coreml_bundle: Bundle) -> CoreMLBackend:
    found = open_backend(coreml_bundle, threads=1)
    assert isinstance(found, CoreMLBackend)
    return found


def embeds(length: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, 0.3, (1, length, 32)).astype(np.float32)


@torch.no_grad()
def reference(loaded: Loaded, *given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    whole = torch.from_numpy(np.concatenate(given, axis=1))
    return loaded.model.language_model(inputs_embeds=whole).logits[0].numpy()


def close(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * np.abs(wanted).max())


def test_prefill_then_decode(backend: CoreMLBackend, loaded: Loaded) -> None:
    """Longer and shorter than `prefill`, so that padding is written and overwritten."""
    pieces = [embeds(20), embeds(1, 1), embeds(1, 2), embeds(7, 3), embeds(1, 4), embeds(40, 5)]
    decoder = backend.decoder()
    wanted = reference(loaded, *pieces)
    for piece in pieces:
        logits = decoder.decode(piece)
        assert logits.shape == (1, 1, wanted.shape[1])
        close(logits[0, 0], wanted[decoder.length - 1])
    assert decoder.length == 70


def test_logits_of_chosen_positions(backend: CoreMLBackend, loaded: Loaded) -> None:
    decoder = backend.decoder()
    wanted = reference(loaded, embeds(36), embeds(9, 1))
    close(decoder.decode(embeds(36), logits_positions=np.array([3, 20, 25, -1]))[0], wanted[[3, 20, 25, 35]])
    close(decoder.decode(embeds(9, 1), logits_positions=np.array([4]))[0], wanted[[40]])
    decoder.truncate(36)
    close(decoder.decode(embeds(9, 1))[0, 0], wanted[44])


def test_the_context_can_be_filled(backend: CoreMLBackend, loaded: Loaded) -> None:
    """To the last position, where no whole `prefill` fits any more."""
    decoder = backend.decoder()
    close(decoder.decode(embeds(505))[0, 0], reference(loaded, embeds(505))[-1])
    close(decoder.decode(embeds(7, 1))[0, 0], reference(loaded, embeds(505), embeds(7, 1))[-1])
    with pytest.raises(MobileMMError, match="context of 512"):
        decoder.decode(embeds(1))
    assert decoder.length == 512


def test_pictures_and_words(backend: CoreMLBackend, loaded: Loaded) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 3, 32, 32), np.uint8)
    features = backend.run("vision", {"pixels": pixels})["image_features"]
    model = backend.bundle.manifest.model
    assert features.shape == (2 * model.num_image_tokens, 32)
    with torch.no_grad():
        wanted = loaded.model.get_image_features(torch.from_numpy(pixels) / 127.5 - 1)
    wanted = torch.cat(list(wanted)) if not isinstance(wanted, torch.Tensor) else wanted
    close(features, wanted.reshape(features.shape).float().numpy())
    ids = np.array([[5, *[model.image_token_id] * model.num_image_tokens, 7]])
    rows = backend.run("embed", {"input_ids": ids, "image_features": features})["inputs_embeds"]
    table = loaded.model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(rows[0, 1:-1], features[: model.num_image_tokens])
    np.testing.assert_allclose(rows[0, [0, -1]], table[[5, 7]], atol=2e-3)


def test_a_conversation_goes_on_over_one_cache(coreml_bundle: Bundle) -> None:
    """A second turn says the same as when the whole is read afresh."""
    red, blue = Image.new("RGB", (40, 30), (200, 30, 30)), Image.new("RGB", (30, 40), (20, 40, 220))
    first = Session(coreml_bundle, open_backend(coreml_bundle), Sampling(max_new_tokens=8))
    first.look_at(red)
    answers = [first.reply("What is this?")]
    first.look_at(blue)
    answers.append(first.reply("And this?"))
    assert first.stats is not None
    assert first.stats.cached_tokens > 0
    again = Session(coreml_bundle, open_backend(coreml_bundle), Sampling(max_new_tokens=8))
    again.look_at(red)
    assert again.reply("What is this?") == answers[0]
    again._decoder = None
    again._cached = []
    again.look_at(blue)
    assert again.reply("And this?") == answers[1]


def test_run_says_what_runs_it(coreml_bundle: Bundle) -> None:
    arguments = ["run", str(coreml_bundle.folder), "--prompt", "What is this?", "--max-new-tokens", "3"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "reference interpreter" in found.stderr


def test_reading_is_light(coreml_bundle: Bundle) -> None:
    """Neither PyTorch nor coremltools is imported to check a bundle."""
    code = (
        "import sys; from mobilemm.runtime.bundle import open_bundle; open_bundle(sys.argv[1]);"
        "print(*{'torch', 'coremltools'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(coreml_bundle.folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


@pytest.fixture
def copied(coreml_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(coreml_bundle.folder, tmp_path / "copy"))


def test_a_damaged_package_is_refused_before_it_runs(copied: Path) -> None:
    """Without hashes, as whoever makes a bundle computes them anew."""
    weights = copied / "parts" / "decoder.mlpackage" / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    data = bytearray(weights.read_bytes())
    data[64 + 16 : 64 + 24] = (2**40).to_bytes(8, "little")  # where the first weight begins
    weights.write_bytes(data)
    with pytest.raises(MobileMMError, match=r"decoder\.mlpackage: the weight at byte 64 .* ends at byte"):
        open_bundle(copied, verify=False)


def test_a_manifest_of_another_package_is_refused(copied: Path) -> None:
    manifest = copied / "manifest.json"
    text = manifest.read_text(encoding="utf-8")
    for old, new, said in (
        ('"image_features"', '"image_rows"', "is not in the"),
        ('"last_index"', '"last_row"', "is not in the"),
    ):
        assert old in text
        manifest.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(MobileMMError, match=said):
            open_bundle(copied)
