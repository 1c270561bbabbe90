"""onnxruntime-genai, unmodified, as outside judge: it loads a bundle and says the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilemm.export.assemble import export_bundle
from mobilemm.export.options import ExportOptions
from mobilemm.export.quantization import make_plan
from mobilemm.export.targets import find_target
from mobilemm.export.targets.genai import genai_config
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.manifest import Tensor
from mobilemm.runtime.prompt import render
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session
from tests.cli.conftest import pristine  # noqa: F401

og = pytest.importorskip("onnxruntime_genai")
og.disable_telemetry_events()

QUESTIONS = ("What is the capital of France?", "Two  spaces,\nanother line, 日本 🙂")
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def byte_level(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:  # noqa: F811
    """A tiny model with a byte-level BPE tokenizer and the ChatML template, in float32."""
    folder = tmp_path_factory.mktemp("genai") / "bundle"
    options = ExportOptions(plan=make_plan("fp32", vision="fp32"), verify=False)
    return export_bundle(str(pristine), find_target("onnx"), folder, options).bundle


def test_the_same_text_in_float32(byte_level: Bundle) -> None:
    check(byte_level, open_session(byte_level))


def test_the_same_text_in_int4(in_int4: Any) -> None:
    """With a tokenizer of the LLaMA kind, which puts a token in front."""
    bundle = open_bundle(in_int4.folder)
    check(bundle, open_session(bundle))


def test_the_same_about_a_picture(byte_level: Bundle) -> None:
    session = open_session(byte_level)
    assert byte_level.manifest.image is not None
    picture = byte_level.folder / "golden" / "picture.png"
    session.look_at(picture)
    session.reply(QUESTIONS[0])
    content = [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]
    ids = session.tokenizer.encode([{"role": "user", "content": content}])
    inputs = og.NamedTensors()
    inputs["input_ids"] = np.array([ids], np.int32)
    inputs["pixels"] = to_pixels(picture, byte_level.manifest.image)[None]
    inputs["num_image_tokens"] = np.array([byte_level.manifest.model.num_image_tokens], np.int64)
    found = generate(og.Model(str(byte_level.folder)), len(ids), inputs)
    assert spoken(found, byte_level) == session.answer_ids != []
    inputs["pixels"] = 255 - to_pixels(picture, byte_level.manifest.image)[None]
    assert generate(og.Model(str(byte_level.folder)), len(ids), inputs) != found


def test_positions_of_three_dimensions(byte_level: Bundle) -> None:
    """Such a decoder goes by the type of which onnxruntime-genai makes them."""
    manifest = byte_level.manifest
    decoder = manifest.parts["decoder"]
    positions = Tensor(name="position_ids", dtype="int64", shape=[3, "batch", "length"])
    decoder = decoder.model_copy(update={"inputs": [*decoder.inputs, positions]})
    changed = manifest.model_copy(update={"parts": {**manifest.parts, "decoder": decoder}})
    plain, mrope = (json.loads(genai_config(one))["model"] for one in (manifest, changed))
    assert (plain["type"], mrope["type"]) == ("gemma3", "qwen2_5_vl")
    assert "position_ids" not in plain["decoder"]["inputs"]
    assert mrope["decoder"]["inputs"]["position_ids"] == "position_ids"


@pytest.mark.slow
def test_the_default_model_says_the_same(default_in_full: Path) -> None:
    bundle = open_bundle(default_in_full)
    session = open_session(bundle)
    check(bundle, session)
    assert "Paris" in session.messages[1]["content"][0]["text"]


def open_session(bundle: Bundle) -> Session:
    return Session(bundle, open_backend(bundle), Sampling(max_new_tokens=NEW_TOKENS))


def check(bundle: Bundle, session: Session) -> None:
    """The same ids of a prompt, and the same greedy answer, as ids and as text."""
    model = og.Model(str(bundle.folder))
    tokenizer = og.Tokenizer(model)
    prompt = bundle.manifest.prompt
    tokenizer.update_options(add_special_tokens="true" if prompt.add_bos else "false")
    for question in reversed(QUESTIONS):
        session.reset()
        answer = session.reply(question)
        messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        ids = tokenizer.encode(render(prompt, messages)[0]).tolist()
        assert ids == session.tokenizer.encode(messages)
        found = spoken(generate(model, len(ids), ids), bundle)
        assert found == session.answer_ids != []
        if "\N{REPLACEMENT CHARACTER}" not in answer:  # random bytes are no text
            assert tokenizer.decode(found) == answer


def generate(model: Any, length: int, prompt: Any | Sequence[int]) -> list[int]:
    """Greedy, up to NEW_TOKENS ids behind a prompt of `length` ids, given as ids or as named tensors."""
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length + NEW_TOKENS, do_sample=False)
    generator = og.Generator(model, parameters)
    if isinstance(prompt, og.NamedTensors):
        generator.set_inputs(prompt)
    else:
        generator.append_tokens(np.array(prompt, np.int32))
    ids = []
    while not generator.is_done():
        generator.generate_next_token()
        ids.append(int(generator.get_next_tokens()[0]))
    return ids


def spoken(ids: list[int], bundle: Bundle) -> list[int]:
    """Without the end token, which a `Session` does not count as said."""
    return ids[:-1] if ids and ids[-1] in bundle.manifest.model.eos_token_ids else ids
