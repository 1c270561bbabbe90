"""Two bundles side by side: what their manifests say, and both measured in turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from mobilemm.bench.difference import changed_files, differences, in_turns
from mobilemm.bench.result import Settings
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.manifest import GoldenConversation


@pytest.fixture
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


def test_a_bundle_is_like_itself(opened: Bundle) -> None:
    assert differences(opened, opened) == []
    assert changed_files(opened, opened) == (0, len(opened.manifest.files))


def test_what_changed_is_named(opened: Bundle) -> None:
    manifest = opened.manifest
    part = manifest.parts["decoder"]
    scheme = part.quantization.model_copy(update={"bits": 4, "block_size": 32, "method": "gptq"})
    smaller = part.model_copy(update={"quantization": scheme, "bytes": part.bytes // 8})
    talk = GoldenConversation(image=None, prompt="What?", input_ids=[1], answer_ids=[2], answer="A line.")
    files = [manifest.files[0].model_copy(update={"sha256": "0" * 64}), *manifest.files[1:]]
    other = manifest.model_copy(
        update={
            "parts": {**manifest.parts, "decoder": smaller},
            "model": manifest.model.model_copy(update={"context_length": 1024}),
            "conversations": [*manifest.conversations, talk],
            "files": files,
        }
    )
    found = {
        name: (before, after) for name, before, after in differences(opened, Bundle(opened.folder, other))
    }
    assert found["decoder: weights"] == (
        f"32 bits, {part.quantization.method}",
        "4 bits in blocks of 32, gptq",
    )
    assert found["model: context length"] == (str(manifest.model.context_length), "1024")
    assert found["“What?”"] == ("–", "A line.")
    assert "decoder: size" in found
    assert "vision: size" not in found
    assert changed_files(opened, Bundle(opened.folder, other))[0] == 1


@pytest.mark.slow
def test_turns_pair_the_rounds(bundle: Path) -> None:
    said: list[str] = []
    settings = Settings(prompt_tokens=8, new_tokens=4, images=1, runs=1, threads=1)
    changes = {one.name: one for one in in_turns(bundle, bundle, settings, 2, said.append)}
    assert {"ttft", "pp8", "tg4", "load_warm"} <= changes.keys()
    assert changes["tg4"].verdict == "too few runs"
    assert [line.rsplit(" ", 1)[1] for line in said] == ["before", "after", "after", "before"]
