from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from mobilemm.errors import MobileMMError
from mobilemm.export.bundle import BundleWriter
from mobilemm.runtime import manifest as contract
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.manifest import PATH_PATTERN, json_schema
from tests.runtime.tiny_bundle import IMAGE_TOKEN, tiny_manifest, write_manifest, write_parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with BundleWriter(tmp_path / "tiny-onnx") as writer:
        write_parts(writer.folder)
        return writer.finish(tiny_manifest()).folder


def test_a_whole_bundle_opens_and_runs(folder: Path) -> None:
    bundle = open_bundle(folder)
    sessions = {name: onnxruntime.InferenceSession(bundle.part_path(name)) for name in bundle.manifest.parts}
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 3, 4, 4)
    features = sessions["vision"].run(None, {"pixels": pixels})[0]
    ids = np.array([[IMAGE_TOKEN] * 4 + [2, 6]])
    embeds = sessions["embed"].run(None, {"input_ids": ids, "image_features": features})[0]
    np.testing.assert_array_equal(embeds[0, :4], features)
    past = {
        tensor.name: np.zeros((1, 2, 3, 8), np.float32)
        for tensor in bundle.manifest.parts["decoder"].inputs
        if tensor.name.startswith("past")
    }
    mask = np.ones((1, 9), np.int64)
    outputs = sessions["decoder"].run(None, {"inputs_embeds": embeds, "attention_mask": mask, **past})
    assert outputs[0].shape == (1, 1, 40)
    assert outputs[1].shape == (1, 2, 9, 8)


def test_paths_are_given_for_listed_files_and_their_folders_only(folder: Path) -> None:
    bundle = open_bundle(folder)
    assert bundle.path("tokenizer.json") == folder / "tokenizer.json"
    assert bundle.path("golden") == folder / "golden"
    for wrong in ("manifest.json", "../tiny-onnx/tokenizer.json", "/etc/passwd", "", "gold", "parts/"):
        with pytest.raises(MobileMMError, match="lists no file"):
            bundle.path(wrong)
    with pytest.raises(MobileMMError, match="no part 'generator'; the bundle has decoder, embed, vision"):
        bundle.part_path("generator")


def test_without_verification_only_what_reads_every_byte_is_left_out(folder: Path) -> None:
    data = folder / "parts" / "decoder.onnx.data"
    whole = bytearray(data.read_bytes())
    whole[100] ^= 1
    data.write_bytes(whole)
    open_bundle(folder, verify=False)
    with pytest.raises(MobileMMError, match=r"decoder\.onnx\.data: damaged or changed: its SHA-256"):
        open_bundle(folder)
    data.write_bytes(whole[:-1])
    with pytest.raises(MobileMMError, match=r"decoder\.onnx\.data: has [\d,]+ bytes; .*manifest\.json says"):
        open_bundle(folder, verify=False)


def test_hidden_files_at_the_top_are_not_the_bundles(folder: Path) -> None:
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_bytes(b"x")
    open_bundle(folder)
    (folder / "added_tokens.json").write_text("{}")
    with pytest.raises(MobileMMError, match=r"does not list 'added_tokens\.json'"):
        open_bundle(folder)


def test_a_damaged_manifest_is_told_from_another_one(folder: Path) -> None:
    """A changed letter in a text is valid in itself; only the hash beside the manifest shows it."""
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"name": "tiny"', '"name": "tinz"'))
    with pytest.raises(MobileMMError, match=r"manifest\.json: damaged or changed"):
        open_bundle(folder)
    write_manifest(folder, path.read_bytes())
    assert open_bundle(folder).manifest.model.name == "tinz"
    checked = subprocess.run(["sha256sum", "-c", "manifest.json.sha256"], cwd=folder, capture_output=True)
    assert checked.returncode == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema_version", 2, "version 2 is newer than this mobilemm reads (1); update it"),
        (
            "schema_version",
            0,
            "version 0 is older than this mobilemm reads (1); export the model again",
        ),
        (
            "model.num_layers",
            3,
            "'parts.decoder.inputs': keys and values of 2 layers, where the model has 3",
        ),
        ("model.head_dim", 16, "(any, 2, any, 16) is expected"),
        ("model.hidden_size", 64, "'image_features' has the shape \"('tokens', 32)\", where (any, 64)"),
        ("model.vocab_size", 41, "'logits' has the shape \"('batch', 'n', 40)\", where (any, any, 41)"),
        ("model.eos_token_ids", [40], "key 'model.eos_token_ids': token 40 is not in a vocabulary of 40"),
        ("model.context_length", 9, "key 'conversations.0': 10 tokens do not fit a context of 9"),
        ("model.context_length", 4, "a picture must leave room in a context of 4"),
        ("image.strategy", "crop", "key 'image.shortest_edge': must be given"),
        ("golden.0.part", "ear", "key 'golden.0.part': there is no part 'ear'"),
        ("prompt.tokenizer", "tok.json", "key 'prompt.tokenizer': 'tok.json' is not listed under 'files'"),
        ("parts.vision.bytes", 1, "key 'parts.vision.bytes': is 1, but the part's files have"),
        ("parts.embed.file", "../x", "key 'parts.embed.file': '../x' is no plain path inside the bundle"),
        ("model.name", 5, "key 'model.name': input should be a valid string, not 5"),
        ("extra", 1, "key 'extra': is not known in this format version"),
    ],
)
def test_the_line_names_the_key_and_what_is_wrong(
    folder: Path, key: str, value: object, message: str
) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    *parents, last = [int(name) if name.isdigit() else name for name in key.split(".")]
    at = manifest
    for name in parents:
        at = at[name]
    at[last] = value
    write_manifest(folder, json.dumps(manifest).encode())
    with pytest.raises(MobileMMError) as error:
        open_bundle(folder)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_a_missing_folder_and_a_folder_without_manifest_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match="there is no such folder"):
        open_bundle(tmp_path / "none")
    with pytest.raises(MobileMMError, match="is no bundle"):
        open_bundle(tmp_path)


def test_reading_is_light(folder: Path) -> None:
    """Neither PyTorch nor a runtime is imported to check a bundle."""
    code = (
        "import sys; from mobilemm.runtime.bundle import open_bundle; open_bundle(sys.argv[1]);"
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_stored_schema_is_the_classes() -> None:
    stored = Path(contract.__file__).with_name("bundle_v1.schema.json").read_text(encoding="utf-8")
    assert stored == json_schema(), (
        "python -m mobilemm.runtime.manifest > mobilemm/runtime/bundle_v1.schema.json"
    )


def test_the_schema_says_what_apps_rely_on() -> None:
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    assert schema["properties"]["schema_version"]["const"] == 1
    assert {"model", "parts", "image", "prompt", "files"} <= set(schema["required"])
    assert schema["$defs"]["File"]["properties"]["path"]["pattern"] == PATH_PATTERN


@pytest.mark.parametrize("path", ["a", "a.b", "parts/decoder.onnx.data", "A-1_x+y/b.mlpackage/Manifest.json"])
def test_plain_paths(path: str) -> None:
    assert re.fullmatch(PATH_PATTERN, path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        ".",
        "..",
        "a/..",
        "../a",
        "/a",
        "a/",
        "a//b",
        "./a",
        ".a",
        "a/.b",
        "a\\b",
        "C:a",
        "a b",
        "é",
        "a.",
        "a/b.",
        "~/a",
    ],
)
def test_paths_that_are_refused(path: str) -> None:
    assert not re.fullmatch(PATH_PATTERN, path)
