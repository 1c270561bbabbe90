"""The ONNX backend's decoder and its cache, against the same model on PyTorch."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints import Loaded
from mobilemm.runtime.backends import onnx, open_backend
from mobilemm.runtime.backends.onnx import OnnxBackend, OnnxDecoder
from mobilemm.runtime.bundle import Bundle

TOLERANCE = 1e-4


@pytest.fixture(params=["shared", pytest.param("concatenated", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest) -> OnnxBackend:
    name = "bundle" if request.param == "shared" else "concatenated"
    return OnnxBackend(request.getfixturevalue(name), threads=1)


def embeds(length: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, 0.3, (1, length, 32)).astype(np.float32)


@torch.no_grad()
def reference(loaded: Loaded, *given: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """PyTorch's logits (length, vocabulary) for all of them in one piece."""
    whole = torch.from_numpy(np.concatenate(given, axis=1))
    return loaded.model.language_model(inputs_embeds=whole).logits[0].numpy()


def close(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE * np.abs(wanted).max())


def test_prefill_then_decode(backend: OnnxBackend, loaded: Loaded) -> None:
    pieces = [embeds(20), embeds(1, 1), embeds(1, 2), embeds(7, 3), embeds(1, 4)]
    decoder = backend.decoder()
    wanted = reference(loaded, *pieces)
    for piece in pieces:
        logits = decoder.decode(piece)
        assert logits.shape == (1, 1, len(wanted[0]))
        close(logits[0, 0], wanted[decoder.length - 1])
    assert decoder.length == 30


def test_logits_of_chosen_positions(backend: OnnxBackend, loaded: Loaded) -> None:
    decoder = backend.decoder()
    wanted = reference(loaded, embeds(12), embeds(5, 1))
    close(decoder.decode(embeds(12), logits_positions=np.arange(12))[0], wanted[:12])
    close(decoder.decode(embeds(5, 1), logits_positions=np.array([0, -1]))[0], wanted[[12, 16]])
    decoder.truncate(12)
    close(decoder.decode(embeds(5, 1))[0, 0], wanted[16])  # the last again, when nothing is said


def test_the_cache_grows(backend: OnnxBackend, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "FIRST_LENGTH", 16)
    decoder = backend.decoder()
    pieces = [embeds(10), *(embeds(1, seed) for seed in range(1, 8)), embeds(50, 9), embeds(3, 10)]
    wanted = reference(loaded, *pieces)
    capacities = []
    for piece in pieces:
        close(decoder.decode(piece)[0, 0], wanted[decoder.length - 1])
        capacities.append(decoder.capacity)
    if decoder.concatenated:
        assert decoder._values["past_key_values.0.key"].shape() == [1, 2, 70, 16]
    else:
        assert capacities == [16] * 7 + [32, 128, 128]


def test_room_comes_in_powers_of_two_up_to_the_context(bundle: Bundle) -> None:
    decoder = OnnxBackend(bundle, 1).decoder()
    assert decoder.capacity == 0
    decoder.decode(embeds(3))
    assert decoder.capacity == 512  # the model's context is less than FIRST_LENGTH
    assert [onnx._room(total, 5000) for total in (1, 1024, 1025, 4096, 4097, 5000)] == [
        *[1, 1024, 2048, 4096],
        *[5000, 5000],
    ]


def test_keys_and_values_stay_where_they_are(bundle: Bundle) -> None:
    """The graph writes into the buffers that it reads from: nothing else is allocated, nothing is copied."""
    decoder = OnnxBackend(bundle, 1).decoder()
    decoder.decode(embeds(20))
    buffers = dict(decoder._arrays)
    first = {name: buffer[:, :, :20].copy() for name, buffer in buffers.items()}
    for seed in range(3):
        decoder.decode(embeds(1, seed))
    for name, buffer in buffers.items():
        assert decoder._arrays[name] is buffer
        assert np.array_equal(buffer[:, :, :20], first[name])
        assert np.all(np.abs(buffer[:, :, :23]).sum(-1) > 0)
        assert not buffer[:, :, 23:].any()


def test_truncate(backend: OnnxBackend, loaded: Loaded) -> None:
    decoder = backend.decoder()
    decoder.decode(embeds(20))
    decoder.decode(embeds(9, 1))
    decoder.truncate(20)
    assert decoder.length == 20
    wanted = reference(loaded, embeds(20), embeds(4, 2))
    close(decoder.decode(embeds(4, 2))[0, 0], wanted[-1])
    decoder.truncate(0)
    close(decoder.decode(embeds(5, 3))[0, 0], reference(loaded, embeds(5, 3))[-1])
    for length in (-1, 6):
        with pytest.raises(ValueError, match="cannot be cut"):
            decoder.truncate(length)


def test_logits_outlive_the_next_steps(backend: OnnxBackend) -> None:
    decoder = backend.decoder()
    logits = decoder.decode(embeds(30), logits_positions=np.arange(30))
    before = logits.copy()
    for seed in range(20):
        decoder.decode(embeds(1, seed))
    assert np.array_equal(logits, before)


def test_more_than_the_context(backend: OnnxBackend, loaded: Loaded) -> None:
    decoder = backend.decoder()
    decoder.decode(embeds(510))
    with pytest.raises(MobileMMError, match="513 positions are more than this model's context of 512"):
        decoder.decode(embeds(3, 1))
    assert decoder.length == 510
    close(decoder.decode(embeds(2, 2))[0, 0], reference(loaded, embeds(510), embeds(2, 2))[-1])


def test_what_fails_leaves_the_cache_as_it_was(backend: OnnxBackend, loaded: Loaded) -> None:
    decoder = backend.decoder()
    decoder.decode(embeds(8))
    with pytest.raises(MobileMMError, match=r"decoder\.onnx: the decoder failed"):
        decoder.decode(np.zeros((1, 2, 31), np.float32))
    assert decoder.length == 8
    close(decoder.decode(embeds(2, 1))[0, 0], reference(loaded, embeds(8), embeds(2, 1))[-1])


def test_two_conversations_over_the_same_weights(backend: OnnxBackend, loaded: Loaded) -> None:
    one, two = backend.decoder(), backend.decoder()
    one.decode(embeds(8))
    two.decode(embeds(5, 1))
    close(one.decode(embeds(1, 2))[0, 0], reference(loaded, embeds(8), embeds(1, 2))[-1])
    close(two.decode(embeds(1, 3))[0, 0], reference(loaded, embeds(5, 1), embeds(1, 3))[-1])


def test_parts_without_state(bundle: Bundle, loaded: Loaded) -> None:
    backend = OnnxBackend(bundle, 1)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    features = backend.run("vision", {"pixels": pixels})["image_features"]
    with torch.no_grad():
        wanted = loaded.model.get_image_features((torch.from_numpy(pixels) / 255 - 0.5) / 0.5)
    close(features, wanted.flatten(0, 1).numpy())
    with pytest.raises(MobileMMError, match=r"vision\.onnx: part 'vision' failed"):
        backend.run("vision", {"pixels": pixels.astype(np.float32)})
    backend.release("vision")
    assert np.array_equal(backend.run("vision", {"pixels": pixels})["image_features"], features)


def test_a_part_that_is_not_there(bundle: Bundle) -> None:
    with pytest.raises(MobileMMError, match=r"no part 'generator'; the bundle has decoder, embed, vision"):
        OnnxBackend(bundle).load("generator")


def test_a_file_that_is_no_model(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "embed.onnx").write_bytes(b"no model")
    with pytest.raises(MobileMMError, match=r"embed\.onnx: cannot be loaded by onnxruntime"):
        OnnxBackend(dataclasses.replace(bundle, folder=tmp_path)).load("embed")


def test_a_graph_that_is_no_decoder(bundle: Bundle) -> None:
    session = OnnxBackend(bundle).session("embed")
    with pytest.raises(
        MobileMMError, match=r"x\.onnx: not a decoder, it lacks attention_mask, inputs_embeds"
    ):
        OnnxDecoder(session, 512, Path("x.onnx"))


def changed(bundle: Bundle, **keys: Any) -> Bundle:
    return dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update=keys))


def test_a_runtime_too_old(bundle: Bundle) -> None:
    runtime = bundle.manifest.runtime.model_copy(update={"min_version": "99.1"})
    with pytest.raises(MobileMMError, match=r"needs onnxruntime 99\.1 or newer, installed is .*pip install"):
        open_backend(changed(bundle, runtime=runtime))


def test_a_runtime_that_is_missing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MobileMMError, match=r"needs onnxruntime: pip install 'mobilemm\[onnx\]'"):
        open_backend(bundle)
