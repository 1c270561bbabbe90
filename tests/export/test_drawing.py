"""A bundle that draws: the same picture as PyTorch's for the same request and seed, on every target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.export import verify
from mobilemm.export.assemble import export_bundle
from mobilemm.export.decoder import EagerCache
from mobilemm.export.drawing import OutputProjector, words_read
from mobilemm.export.model import open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.drawing import Drawn
from mobilemm.runtime.manifest_check import parse_manifest
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.self_check import self_check
from mobilemm.runtime.session import Session
from tests.export.drawing_checkpoint import OTHER, REQUEST, SIGNALS, write_drawer

STEPS = 2
SEED = Sampling(max_new_tokens=4, seed=7)


@pytest.fixture(scope="session")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawer(tmp_path_factory.mktemp("drawers") / "drawer")


@pytest.fixture(scope="session")
def bundle_of(drawer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Bundle]:
    """A bundle of a target, language model and generator in a precision; each made once."""
    made: dict[tuple[str, str], Bundle] = {}

    def bundle(target: str, precision: str) -> Bundle:
        if (target, precision) not in made:
            pytest.importorskip({"coreml": "coremltools"}.get(target, target))
            plan = make_plan("fp32", vision="fp32", generator=precision)
            folder = tmp_path_factory.mktemp("bundles") / f"{target}-{precision}"
            result = export_bundle(
                str(drawer), find_target(target), folder, ExportOptions(plan=plan, steps=STEPS)
            )
            made[target, precision] = result.bundle
        return made[target, precision]

    return bundle


def _drawn(session: Session | ChatSession, request: str = REQUEST) -> list[Drawn]:
    return [piece for piece in session.stream(request) if isinstance(piece, Drawn)]


def _psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    error = np.mean((found.astype(np.float64) - wanted.astype(np.float64)) ** 2)
    return 200.0 if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.fixture(scope="session")
def wanted(drawer: Path) -> np.ndarray:
    """What PyTorch draws, uint8 (16, 16, 3)."""
    model, processor = mobilemm.load(drawer)
    (drawn,) = _drawn(ChatSession(model, processor, SEED, generator=drawer / "generator", steps=STEPS))
    assert drawn.seed == 7
    return drawn.picture


@pytest.mark.parametrize(
    ("target", "precision", "floor"),
    [
        ("onnx", "fp32", 50),
        ("onnx", "int8", 30),
        ("executorch", "fp32", 50),
        ("coreml", "fp32", 40),
        ("coreml", "int8", 30),
    ],
)
def test_a_bundle_draws_what_pytorch_draws(
    bundle_of: Callable[[str, str], Bundle], wanted: np.ndarray, target: str, precision: str, floor: float
) -> None:
    bundle = bundle_of(target, precision)
    session = Session(bundle, open_backend(bundle), SEED)
    (drawn,) = _drawn(session)
    assert drawn.picture.shape == wanted.shape == (16, 16, 3)
    assert _psnr(drawn.picture, wanted) >= floor
    assert session.stats is not None
    assert session.stats.drawing_seconds > 0


def test_a_seed_decides_and_words_do_not_draw(bundle_of: Callable[[str, str], Bundle]) -> None:
    bundle = bundle_of("onnx", "fp32")
    backend = open_backend(bundle)
    first, again = (_drawn(Session(bundle, backend, SEED))[0].picture for _ in range(2))
    other = _drawn(Session(bundle, backend, Sampling(max_new_tokens=4, seed=8)))[0].picture
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    words = Sampling(max_new_tokens=1, seed=7)
    assert not _drawn(Session(bundle, backend, words), OTHER)


def test_a_drawing_is_remembered(bundle_of: Callable[[str, str], Bundle]) -> None:
    """The next turn reads the signal tokens as they were said, from the cache."""
    bundle = bundle_of("onnx", "fp32")
    session = Session(bundle, open_backend(bundle), SEED)
    _drawn(session)
    said = session.messages[-1]["content"][0]["text"]
    assert said.startswith("[IMG0][IMG1][IMG2]")
    session.reply("What")
    assert session.stats is not None
    fresh = Session(bundle, open_backend(bundle), SEED)
    fresh.messages = session.messages[:2]
    fresh.reply("What")
    assert fresh.messages == session.messages


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("generation", "signal_token_ids"), [5, 9, 7], "must follow each other"),
        (("generation", "noise", "shape"), [1, 1, 4, 8192, 8192], "more than"),
        (("generation", "noise", "shape"), [1, 1, 4, 9, 8], "'noise' has the shape"),
        (("generation", "noise", "rule"), "dice", "philox4x32-10-box-muller"),
        (("generation", "height"), 17, "'picture' has the shape"),
        (("parts", "generator"), None, "the part 'generator' is missing"),
    ],
)
def test_wrong_manifests_are_refused(
    bundle_of: Callable[[str, str], Bundle], path: tuple[str, ...], value: object, told: str
) -> None:
    file = bundle_of("onnx", "fp32").folder / "manifest.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
        content["golden"] = [golden for golden in content["golden"] if golden["part"] != path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(MobileMMError, match=told):
        parse_manifest(json.dumps(content).encode(), file)


def test_golden_vectors_hold_for_the_parts_that_draw(bundle_of: Callable[[str, str], Bundle]) -> None:
    bundle = bundle_of("onnx", "int8")
    assert {"output_projector", "generator"} <= {golden.part for golden in bundle.manifest.golden}
    assert all(check.passed for check in self_check(bundle, open_backend(bundle)))


def test_logits_tell_the_hidden_states(drawer: Path) -> None:
    """Through some of the head's rows, inverted, the condition is that of the states themselves."""
    model = open_model(str(drawer), ExportOptions())
    part, projector = model.parts["output_projector"].module, model.split.output_projector
    assert isinstance(part, OutputProjector)
    assert projector is not None
    head = model.parts["decoder"].weights["lm_head.weight"].float()
    part.read_through(head[: part.reader.in_features])
    ids = [5, 9, 30, *model.split.signal_token_ids]
    decoder = verify.with_weights(model.parts["decoder"].module, model.parts["decoder"].weights)
    with torch.no_grad():
        logits = decoder(model.embed(ids, []), EagerCache())[:, -SIGNALS:]
        states = verify.decoder_states(model.parts["decoder"], {"inputs_embeds": model.embed(ids, [])})
        wanted = projector(states[:, -SIGNALS:])
        found = part(logits[..., : part.reader.in_features])
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_a_head_that_tells_too_little_is_refused(tmp_path: Path) -> None:
    # Untied, the tiny model's head has rows of zeros.
    model = open_model(str(write_drawer(tmp_path / "drawer", tied=False)), ExportOptions())
    part = model.parts["output_projector"].module
    assert isinstance(part, OutputProjector)
    head = model.parts["decoder"].weights["lm_head.weight"].float()
    with pytest.raises(MobileMMError, match="do not tell the hidden state"):
        part.read_through(head[: part.reader.in_features])
    with pytest.raises(MobileMMError, match="cannot tell a hidden state of 64"):
        words_read(63, 64)
