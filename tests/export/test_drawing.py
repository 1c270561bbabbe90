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
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.drawing import OutputProjector, peak_signal_to_noise, words_read
from mobilemm.export.model import open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.quantized_parts import QuantizedParts
from mobilemm.export.targets import find_target
from mobilemm.generation.generator import Generator, load_generator
from mobilemm.generation.sampling import GeneratorStep, UnrolledGenerator
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.drawing import Drawn, Sketch
from mobilemm.runtime.manifest import Generation, Noise
from mobilemm.runtime.manifest_check import parse_manifest
from mobilemm.runtime.noise import RULE, normal
from mobilemm.runtime.picture_generator import StepwiseGenerator, open_generator
from mobilemm.runtime.pytorch import ChatSession
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.self_check import self_check
from mobilemm.runtime.session import Session
from tests.export.drawing_checkpoint import OTHER, REQUEST, SIGNALS, write_drawer
from tests.export.tiny_checkpoint import write_checkpoint
from tests.generation.tiny_generator import write_generator

STEPS = 2
SEED = Sampling(max_new_tokens=4, seed=7)


@pytest.fixture(scope="session")
def drawer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawer(tmp_path_factory.mktemp("drawers") / "drawer")


@pytest.fixture(scope="session")
def bundle_of(drawer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """A bundle of a target, generator in a precision, in one graph or step by step; each made once."""
    made: dict[tuple[str, str, bool], Bundle] = {}

    def bundle(target: str, precision: str, stepwise: bool = False) -> Bundle:
        key = target, precision, stepwise
        if key not in made:
            pytest.importorskip({"coreml": "coremltools"}.get(target, target))
            plan = make_plan("fp32", vision="fp32", generator=precision)
            options = ExportOptions(plan=plan, steps=STEPS, stepwise=stepwise)
            folder = tmp_path_factory.mktemp("bundles") / target
            made[key] = export_bundle(str(drawer), find_target(target), folder, options).bundle
        return made[key]

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


@pytest.mark.parametrize("stepwise", [False, True])
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
    bundle_of: Callable[..., Bundle],
    wanted: np.ndarray,
    target: str,
    precision: str,
    floor: float,
    stepwise: bool,
) -> None:
    bundle = bundle_of(target, precision, stepwise)
    assert ("generator" in bundle.manifest.parts) is not stepwise
    session = Session(bundle, open_backend(bundle), SEED)
    (drawn,) = _drawn(session)
    assert drawn.picture.shape == wanted.shape == (16, 16, 3)
    assert _psnr(drawn.picture, wanted) >= floor
    assert session.stats is not None
    assert session.stats.drawing_seconds > 0


def test_a_seed_decides_and_words_do_not_draw(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of("onnx", "fp32")
    backend = open_backend(bundle)
    first, again = (_drawn(Session(bundle, backend, SEED))[0].picture for _ in range(2))
    other = _drawn(Session(bundle, backend, Sampling(max_new_tokens=4, seed=8)))[0].picture
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    words = Sampling(max_new_tokens=1, seed=7)
    assert not _drawn(Session(bundle, backend, words), OTHER)


def test_a_drawing_is_remembered(bundle_of: Callable[..., Bundle]) -> None:
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


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_make_what_one_graph_makes(bundle_of: Callable[..., Bundle], drawer: Path, steps: int) -> None:
    """In float32, from the same noise, before pictures are rounded; and any number of steps by one bundle."""
    bundle = bundle_of("onnx", "fp32", True)
    generator = open_generator(bundle, open_backend(bundle), steps)
    assert isinstance(generator, StepwiseGenerator)
    condition = np.random.default_rng(0).normal(0, 1, (1, 3, 16)).astype(np.float32)
    *_, latents = generator.latents(condition, 7)
    found = generator.backend.run("image_decoder", {"latents": latents})["picture"]
    unrolled = UnrolledGenerator(load_generator(drawer / "generator"), steps)
    noise = normal(7, (1, unrolled.table.noises, *unrolled.latent_shape))
    with torch.no_grad():
        expected = unrolled(torch.from_numpy(condition), torch.from_numpy(noise))
    assert peak_signal_to_noise(torch.from_numpy(found), expected) >= 60
    if steps == STEPS:
        whole = bundle_of("onnx", "fp32")
        inputs = {"condition": condition, "noise": noise}
        one_graph = open_backend(whole).run("generator", inputs)["picture"]
        assert peak_signal_to_noise(torch.from_numpy(found), torch.from_numpy(one_graph)) >= 60


class _Steps:
    """A backend that has a denoiser alone, in PyTorch."""

    def __init__(self, generator: Generator) -> None:
        self.step = GeneratorStep(generator).eval()

    def run(self, part: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = self.step(*(torch.from_numpy(value) for value in inputs.values()))
        return {"next_latents": found.numpy()}


def test_each_step_that_renews_takes_the_next_noise(tmp_path: Path) -> None:
    generator = load_generator(write_generator(tmp_path / "lcm", "lcm"))
    unrolled = UnrolledGenerator(generator, 4)
    rows = unrolled.table.rows
    assert unrolled.table.noises == 4
    generation = Generation(
        signal_token_ids=[1],
        height=64,
        width=64,
        steps=4,
        noise=Noise(rule=RULE, shape=[1, 4, *unrolled.latent_shape]),
        schedules=[rows],
    )
    drawing = StepwiseGenerator(generation, 1, _Steps(generator), rows)
    condition = np.random.default_rng(0).normal(0, 1, (1, *generator.condition_shape)).astype(np.float32)
    *_, latents = drawing.latents(condition, 7)
    with torch.no_grad():
        noise = torch.from_numpy(normal(7, drawing.noise_shape))
        wanted = unrolled.latents(torch.from_numpy(condition), noise)
    torch.testing.assert_close(torch.from_numpy(latents), wanted)


def test_sketches_come_before_the_drawing(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of("onnx", "fp32", True)
    backend = open_backend(bundle)
    session = Session(bundle, backend, SEED, steps=4, sketches=True)
    pieces = [piece for piece in session.stream(REQUEST) if isinstance(piece, Drawn | Sketch)]
    *sketches, drawn = pieces
    assert [(piece.step, piece.steps) for piece in sketches] == [(1, 4), (2, 4), (3, 4)]
    assert all(piece.picture.shape == drawn.picture.shape for piece in sketches)
    (alone,) = _drawn(Session(bundle, backend, SEED, steps=4))
    assert np.array_equal(drawn.picture, alone.picture)
    assert not any(isinstance(piece, Sketch) for piece in Session(bundle, backend, SEED).stream(REQUEST))


def test_an_answer_that_ends_in_a_sketch_is_forgotten(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of("onnx", "fp32", True)
    session = Session(bundle, open_backend(bundle), SEED, sketches=True)
    stream = session.stream(REQUEST)
    assert isinstance(next(piece for piece in stream if isinstance(piece, Sketch)), Sketch)
    stream.close()
    assert session.messages == []


@pytest.mark.parametrize(
    ("stepwise", "told"), [(False, "draws in 2: export"), (True, "draws in 1, 2, 4: export")]
)
def test_steps_that_a_bundle_lacks_are_told(
    bundle_of: Callable[..., Bundle], stepwise: bool, told: str
) -> None:
    bundle = bundle_of("onnx", "fp32", stepwise)
    with pytest.raises(MobileMMError, match=f"--steps 3, but this bundle {told} it with --stepwise"):
        Session(bundle, open_backend(bundle), steps=3)


def test_only_what_draws_is_exported_step_by_step(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "plain")
    with pytest.raises(MobileMMError, match="--stepwise: this model does not draw"):
        open_model(str(model), ExportOptions(stepwise=True))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("generation", "schedules"), None, "the part 'generator' is missing"),
        (("generation", "schedules"), [[[1.0] * 5]], "one for each number of steps, 2 among them"),
        (("generation", "schedules"), [[[1.0] * 5]] * 2, "one for each number of steps"),
        (("generation", "schedules"), [[[1.0] * 4] * 2], "has 4 elements, where at least 5"),
        (("generation", "schedules"), [[[1.0] * 5] * 51], "has 51 elements, where at most 50"),
        (("generation", "schedules"), [[[1e300] + [1.0] * 4] * 2], "less than or equal to"),
        (("generation", "schedules"), [[[1.0] * 5] * 2], r"where \(1, 3, channels, height, width\)"),
        (("generation", "noise", "shape"), [1, 1, 4, 9, 8], "'latents' has the shape"),
        (("generation", "noise", "shape"), [1, 1, 4, 8192, 8192], "more than"),
        (("generation", "height"), 17, "'picture' has the shape"),
        (("parts", "image_decoder"), None, "the part 'image_decoder' is missing"),
    ],
)
def test_wrong_manifests_of_steps_are_refused(
    bundle_of: Callable[..., Bundle], path: tuple[str, ...], value: object, told: str
) -> None:
    _refused(bundle_of("onnx", "fp32", True), path, value, told)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("generation", "schedules"), [[[1.0] * 5] * 2], "the part 'denoiser' is missing"),
        (("generation", "signal_token_ids"), [5, 9, 7], "must follow each other"),
        (("generation", "noise", "shape"), [1, 1, 4, 8192, 8192], "more than"),
        (("generation", "noise", "shape"), [1, 1, 4, 9, 8], "'noise' has the shape"),
        (("generation", "noise", "rule"), "dice", "philox4x32-10-box-muller"),
        (("generation", "height"), 17, "'picture' has the shape"),
        (("parts", "generator"), None, "the part 'generator' is missing"),
    ],
)
def test_wrong_manifests_are_refused(
    bundle_of: Callable[..., Bundle], path: tuple[str, ...], value: object, told: str
) -> None:
    _refused(bundle_of("onnx", "fp32"), path, value, told)


def _refused(bundle: Bundle, path: tuple[str, ...], value: object, told: str) -> None:
    file = bundle.folder / "manifest.json"
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


@pytest.mark.parametrize("stepwise", [False, True])
def test_golden_vectors_hold_for_the_parts_that_draw(
    bundle_of: Callable[..., Bundle], stepwise: bool
) -> None:
    bundle = bundle_of("onnx", "int8", stepwise)
    drawing = {"denoiser", "image_decoder"} if stepwise else {"generator"}
    assert {"output_projector", *drawing} <= {golden.part for golden in bundle.manifest.golden}
    assert all(bundle.manifest.parts[name].quantization.bits == 8 for name in drawing)
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


def test_what_rounded_weights_add_to_the_states_is_taken_away(drawer: Path) -> None:
    """Through an int4 decoder the mean condition of requests is PyTorch's again, and each is nearer to it."""
    model = open_model(str(drawer), ExportOptions())
    options = ExportOptions(plan=make_plan(method="rtn", block_size=32, embed="int4", generator="fp32"))
    parts = QuantizedParts(model, options, [])
    decoder, _ = parts.module("decoder")
    part, _ = parts.module("output_projector")
    assert isinstance(decoder, Decoder)
    assert isinstance(part, OutputProjector)
    signals = list(model.split.signal_token_ids)
    rows = [model.tokenizer.encode([{"role": "user", "content": f"Draw {it}."}]) for it in ("a hat", "tea")]
    exact, raw, corrected = [], [], []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row + signals])
            embedded = model.embed(ids[0].tolist(), [])
            wanted = verify.decoder_states(model.parts["decoder"], {"inputs_embeds": embedded})[:, -SIGNALS:]
            logits = decoder(parts.module("embed")[0].table(ids), EagerCache())[:, -SIGNALS:]
            states = part.reader(logits[..., : part.reader.in_features])
            exact.append(wanted)
            raw.append(states)
            corrected.append(states - part.shift)
    error = [float((torch.stack(found) - torch.stack(exact)).square().mean()) for found in (raw, corrected)]
    assert error[1] < 0.8 * error[0]
    assert "behind the quantized decoder" in parts.notes["output_projector"]


def test_a_decoder_in_float32_adds_nothing_to_the_states(drawer: Path) -> None:
    model = open_model(str(drawer), ExportOptions())
    part, _ = QuantizedParts(model, ExportOptions(), []).module("output_projector")
    assert isinstance(part, OutputProjector)
    assert not part.shift.any()


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
