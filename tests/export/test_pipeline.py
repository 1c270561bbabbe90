"""Parts by one plan: what is refused, what is taken over, what a budget buys."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mobilemm.errors import MobileMMError
from mobilemm.export import pipeline
from mobilemm.export.model import Model, folder_digest, open_model
from mobilemm.export.options import ExportOptions
from mobilemm.export.pipeline import export_parts, fingerprints
from mobilemm.export.quantization import make_plan
from mobilemm.export.quantized_parts import calibration_embeddings
from mobilemm.export.targets import find_target
from tests.export.conftest import Exported

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PLAN = make_plan("int4", method="rtn", block_size=32)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return open_model(str(checkpoint), ExportOptions(plan=PLAN))


def test_a_checkpoint_is_taken_apart(model: Model) -> None:
    assert list(model.parts) == ["vision", "embed", "decoder"]
    assert model.license == "apache-2.0"
    assert model.license_text == "Do as you like, and be kind.\n"
    assert model.name == "tiny"
    assert model.parts["decoder"].module.spec.context_length == 512  # type: ignore[union-attr]


def test_a_longer_context_than_the_models_is_the_models(checkpoint: Path) -> None:
    parts = open_model(str(checkpoint), ExportOptions(context_length=4096)).parts
    assert parts["decoder"].module.spec.context_length == 512  # type: ignore[union-attr]


# --- fingerprints -------------------------------------------------------------------------------------------


def changed(model: Model, options: ExportOptions, other: Model | None = None, **target: object) -> set[str]:
    """The parts that would be made anew."""
    before = fingerprints(model, find_target("onnx"), ExportOptions(plan=PLAN))
    after = fingerprints(other or model, find_target("onnx", **target), options)
    return {name for name in before if before[name] != after[name]}


def test_what_a_part_is_made_from_is_in_its_fingerprint(
    model: Model, checkpoint: Path, tmp_path: Path
) -> None:
    same = ExportOptions(plan=make_plan("int4", method="rtn", block_size=32))
    everything = {"vision", "embed", "decoder"}
    assert changed(model, same) == set()
    assert changed(model, same, opset=22) == everything
    assert changed(model, same, replace(model, digest="0" * 64)) == everything
    for words, parts in (
        ({"vision": "fp32"}, {"vision"}),
        ({"embed": "int8"}, {"embed"}),
        ({"keep": ["layers.0.*=8"]}, {"decoder"}),
        ({"symmetric": False}, {"decoder", "embed"}),
        ({"method": "hqq"}, {"decoder", "embed"}),
    ):
        plan = make_plan("int4", **{"method": "rtn", "block_size": 32, **words})  # type: ignore[arg-type]
        assert changed(model, ExportOptions(plan=plan)) == parts
    shorter = open_model(str(checkpoint), ExportOptions(context_length=128))
    assert changed(model, same, shorter) == {"decoder"}
    # The name in the manifest is no part's.
    assert changed(model, replace(same, name="another"), replace(model, name="another")) == set()


def test_a_changed_weight_changes_the_checkpoints_digest(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(checkpoint, folder)
    assert folder_digest(folder) == folder_digest(checkpoint)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert folder_digest(folder) != folder_digest(checkpoint)


def test_a_finished_part_is_only_taken_when_it_is_whole(in_int4: Exported, tmp_path: Path) -> None:
    record = in_int4.result.records["embed"]
    for file in record.part.files:
        shutil.copy(in_int4.folder / file, tmp_path)
    shutil.copy(in_int4.folder / "golden" / "embed.safetensors", tmp_path)
    pipeline.keep_record(tmp_path, "embed", record)
    made_from = record.part.fingerprint
    assert pipeline._finished(tmp_path, "embed", made_from) == record
    assert pipeline._finished(tmp_path, "embed", "0" * 64) is None
    data = (tmp_path / "embed.onnx.data").read_bytes()
    text = (tmp_path / "embed.json").read_text()

    def damaged() -> bool:
        return pipeline._finished(tmp_path, "embed", made_from) is None

    assert not damaged()
    (tmp_path / "embed.onnx.data").write_bytes(data[:-1])
    assert damaged()
    (tmp_path / "embed.onnx.data").unlink()
    assert damaged()
    (tmp_path / "embed.onnx.data").write_bytes(data)
    for wrong in (text[:-1], "", "[]", "null", json.dumps({**json.loads(text), "part": {}})):
        (tmp_path / "embed.json").write_text(wrong)
        assert damaged()
    (tmp_path / "embed.json").write_text(text)
    assert not damaged()


# --- the plan -----------------------------------------------------------------------------------------------


def bits_of(path: Path) -> dict[str, int]:
    """Layer → bits, as the file's own MatMulNBits say."""
    found = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            name = node.input[1].removeprefix("module.").removesuffix(".packed")
            found[name] = next(one.i for one in node.attribute if one.name == "bits")
    return found


@pytest.mark.slow
def test_a_budget_buys_bits_and_exceptions_hold(model: Model, tmp_path: Path) -> None:
    """q-keep and q-search in one export; the file's bits are counted, not the plan's."""
    plan = make_plan("int4", method="rtn", block_size=32, keep=["layers.1.down=fp32"])
    decoder = model.parts["decoder"].module
    linears = {
        name: child.weight.shape
        for name, child in decoder.named_modules()
        if name.rsplit(".")[-1] in ("qkv", "o", "gate", "up", "down", "lm_head")
    }
    least = sum(plan.part("decoder").scheme(name).nbytes(*shape) for name, shape in linears.items())
    budget = least + 6000
    options = ExportOptions(plan=plan, budget=budget)
    records = export_parts(model, find_target("onnx"), options, tmp_path)
    bits = bits_of(tmp_path / "decoder.onnx")
    assert not any("layers.1.down" in name for name in bits)
    assert set(bits.values()) == {4, 8}
    scheme = {4: plan.part("decoder").default, 8: make_plan("int8", block_size=32).part("decoder").default}
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False).graph
    shapes = {one.name.removeprefix("module."): tuple(one.dims) for one in graph.initializer}
    spent = 0
    for name, count in bits.items():
        rows, blocks, _ = shapes[f"{name}.packed"]
        spent += scheme[count].nbytes(rows, 32 * blocks)
    spent += 4 * 64 * 128  # what is kept in float32
    assert least < spent <= budget
    exceptions = records["decoder"].part.quantization.exceptions
    assert exceptions["layers.1.down"] == 32
    assert 8 in exceptions.values()


def test_too_small_a_budget_is_refused(model: Model, tmp_path: Path) -> None:
    options = ExportOptions(plan=PLAN, budget=10_000)
    with pytest.raises(MobileMMError, match=r"--q-search 0.0: the plan takes 0.1 MB"):
        export_parts(model, find_target("onnx"), options, tmp_path)


def test_a_layer_that_is_not_there_is_refused(model: Model, tmp_path: Path) -> None:
    plan = make_plan("int4", method="rtn", keep=["layers.9.*=8"])
    with pytest.raises(MobileMMError, match=r"no layer of 'decoder' is named 'layers.9.\*'; its layers are"):
        export_parts(model, find_target("onnx"), ExportOptions(plan=plan), tmp_path)


# --- calibration --------------------------------------------------------------------------------------------


def test_calibration_of_ones_own(checkpoint: Path, tmp_path: Path) -> None:
    """Its pictures and words are what the quantizers are fed."""
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "picture.png")
    path = tmp_path / "mine.json"
    messages = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "a line"}]
    path.write_text(json.dumps([{"files": ["picture.png"], "messages": messages}]))
    options = ExportOptions(plan=PLAN, calibration=path)
    model = open_model(str(checkpoint), options)
    samples = pipeline.read_calibration(path)
    ids = model.tokenizer.encode(samples[0].messages, add_generation_prompt=False)
    assert ids.count(model.split.image_token_id) == 4
    found = calibration_embeddings(model, samples)
    assert found.shape == (1, len(ids), 64)
    table = model.parts["embed"].weights["table.weight"]
    for place, token in enumerate(ids):
        if token != model.split.image_token_id:
            assert found[0, place].equal(table[token].float())
    # Another set makes other parts.
    assert fingerprints(model, find_target("onnx"), options) != fingerprints(
        model, find_target("onnx"), ExportOptions(plan=PLAN)
    )


def test_a_calibration_set_that_cannot_be_read(model: Model, tmp_path: Path) -> None:
    options = ExportOptions(plan=PLAN, calibration=tmp_path / "none.json")
    with pytest.raises(MobileMMError, match=r"none.json: cannot be read \(No such file"):
        export_parts(model, find_target("onnx"), options, tmp_path / "work")
