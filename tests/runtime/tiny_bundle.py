"""A bundle of a few kilobytes that really runs: three small ONNX parts, one with external int4 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image as PillowImage
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from mobilemm.runtime import manifest as m
from mobilemm.runtime.bundle import MANIFEST_SHA256, manifest_digest

HIDDEN, VOCAB, HEADS, HEAD_DIM, LAYERS, BLOCK, IMAGE_TOKEN = 32, 40, 2, 8, 2, 16, 39
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def write_parts(folder: Path) -> None:
    """Everything that the tiny bundle's manifest lists, but the manifest."""
    rng = np.random.default_rng(0)
    (folder / "parts").mkdir(parents=True)
    (folder / "golden").mkdir()
    _save(_vision(rng), folder / "parts" / "vision.onnx")
    _save(_embed(rng), folder / "parts" / "embed.onnx")
    _save(_decoder(rng), folder / "parts" / "decoder.onnx", external=True)
    pieces = {
        "<pad>": 0,
        "<eos>": 1,
        **{letter: 2 + i for i, letter in enumerate("abcdefghijklmnopqrstuvw ")},
    }
    Tokenizer(models.BPE(pieces, [])).save(str(folder / "tokenizer.json"))
    PillowImage.linear_gradient("L").resize((4, 4)).convert("RGB").save(folder / "golden" / "image.png")
    save_file(
        {
            "inputs.pixels": np.zeros((1, 3, 4, 4), np.uint8),
            "outputs.image_features": np.zeros((4, HIDDEN), np.float32),
        },
        folder / "golden" / "vision.safetensors",
    )


def tiny_manifest() -> m.Manifest:
    """The tiny bundle's manifest; `files` and the parts' `bytes` are the writer's to fill in."""
    floats = m.Quantization(bits=32)
    cache = ["batch", HEADS, "past", HEAD_DIM]
    past = [f"past_key_values.{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    return m.Manifest(
        schema_version=1,
        created_by={"mobilemm": "0.1.0"},
        target="onnx",
        runtime=m.Runtime(name="onnxruntime", min_version="1.24.0"),
        model=m.ModelCard(
            name="tiny",
            family="mobilemm",
            license="apache-2.0",
            context_length=64,
            hidden_size=HIDDEN,
            vocab_size=VOCAB,
            num_layers=LAYERS,
            num_attention_heads=2 * HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_DIM,
            num_image_tokens=4,
            image_token_id=IMAGE_TOKEN,
            bos_token_id=None,
            eos_token_ids=[1],
            pad_token_id=0,
        ),
        parts={
            "vision": _part(
                "vision",
                [m.Tensor(name="pixels", dtype="uint8", shape=["images", 3, 4, 4])],
                [m.Tensor(name="image_features", dtype="float32", shape=["tokens", HIDDEN])],
                floats,
                m.Parity(cosine=0.99999, snr_db=61.5, max_abs_error=0.001, conversion_db=80.25),
            ),
            "embed": _part(
                "embed",
                [
                    m.Tensor(name="input_ids", dtype="int64", shape=["batch", "sequence"]),
                    m.Tensor(name="image_features", dtype="float32", shape=["tokens", HIDDEN]),
                ],
                [m.Tensor(name="inputs_embeds", dtype="float32", shape=["batch", "sequence", HIDDEN])],
                floats,
            ),
            "decoder": _part(
                "decoder",
                [
                    m.Tensor(name="inputs_embeds", dtype="float32", shape=["batch", "sequence", HIDDEN]),
                    m.Tensor(name="attention_mask", dtype="int64", shape=["batch", "total"]),
                    m.Tensor(name="logits_positions", dtype="int64", shape=["n"]),
                    *(m.Tensor(name=name, dtype="float32", shape=cache) for name in past),
                ],
                [
                    m.Tensor(name="logits", dtype="float32", shape=["batch", "n", VOCAB]),
                    *(
                        m.Tensor(
                            name=name.replace("past_key_values", "present"),
                            dtype="float32",
                            shape=["batch", HEADS, "total", HEAD_DIM],
                        )
                        for name in past
                    ),
                ],
                m.Quantization(bits=4, block_size=BLOCK, method="rtn", exceptions={"kv": 32}),
                m.Parity(
                    cosine=0.999,
                    snr_db=30.25,
                    max_abs_error=0.1,
                    conversion_db=60.5,
                    top1=0.98,
                    near_ties=0.01,
                    kl=0.002,
                ),
            ),
        },
        image=m.Image(height=4, width=4, strategy="pad", filter="bicubic", pad_color=(127, 127, 127)),
        prompt=m.Prompt(
            begin="",
            system=None,
            user=m.Turn(prefix="a", suffix="b"),
            assistant=m.Turn(prefix="c", suffix="d"),
            generation="c",
            stop=["d"],
            examples=[
                m.RenderedExample(messages=[{"content": "e"}], rendered="aebc", input_ids=[2, 6, 3, 4]),
            ],
        ),
        golden=[m.Golden(file="golden/vision.safetensors", part="vision", floor_db=40.5)],
        conversations=[
            m.GoldenConversation(
                image="golden/image.png",
                prompt="e",
                input_ids=[IMAGE_TOKEN] * 4 + [2, 6, 3, 4],
                answer_ids=[5, 1],
                answer="d",
            )
        ],
        files=[m.File(path="tokenizer.json", bytes=0, sha256="0" * 64)],
    )


def rehash(folder: Path) -> None:
    """What whoever changes a bundle on purpose does as well: sizes and hashes made to fit."""
    import hashlib

    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    sizes = {}
    for file in manifest["files"]:
        data = (folder / file["path"]).read_bytes()
        sizes[file["path"]] = file["bytes"] = len(data)
        file["sha256"] = hashlib.sha256(data).hexdigest()
    for part in manifest["parts"].values():
        part["bytes"] = sum(sizes[file] for file in part["files"])
    write_manifest(folder, json.dumps(manifest).encode())


def write_manifest(folder: Path, data: bytes) -> None:
    """A manifest of these bytes, with the hash that fits."""
    (folder / "manifest.json").write_bytes(data)
    (folder / MANIFEST_SHA256).write_bytes(manifest_digest(data))


def _part(
    name: str,
    inputs: list[m.Tensor],
    outputs: list[m.Tensor],
    quantization: m.Quantization,
    parity: m.Parity | None = None,
) -> m.Part:
    file = f"parts/{name}.onnx"
    return m.Part(
        file=file,
        files=[file, f"{file}.data"] if name == "decoder" else [file],
        inputs=inputs,
        outputs=outputs,
        quantization=quantization,
        bytes=1,
        parameters=1000,
        peak_memory=10_000,
        fingerprint="0" * 64,
        parity=parity,
        cache="concatenated" if name == "decoder" else None,
    )


def _save(model: Any, path: Path, external: bool = False) -> None:
    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=128)
    else:
        onnx.save(model, path)


def _model(graph: Any) -> Any:
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10)


def _vision(rng: np.random.Generator) -> Any:
    """(images, 3, 4, 4) → 4 tokens an image, each 12 pixels times a matrix; the scale of pixels in fp16."""
    weights = {
        "rows": np.array([-1, 12], np.int64),
        "scale": np.array([1 / 255], np.float16),
        "weight": rng.normal(size=(12, HIDDEN)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["half"], "cast", to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["half", "scale"], ["scaled"], "normalize"),
        helper.make_node("Cast", ["scaled"], ["float"], "cast_back", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "rows"], ["patches"], "patches"),
        helper.make_node("MatMul", ["patches", "weight"], ["image_features"], "project"),
    ]
    return _model(
        helper.make_graph(
            nodes,
            "vision",
            [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["images", 3, 4, 4])],
            [helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["tokens", HIDDEN])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )
    )


def _embed(rng: np.random.Generator) -> Any:
    """Rows of a table, a list of floats, those of the image's placeholder replaced by its features."""
    table = rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    placeholder = numpy_helper.from_array(np.array(IMAGE_TOKEN))
    embeds = helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", HIDDEN])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], "gather"),
        helper.make_node("Constant", [], ["placeholder"], "placeholder", value=placeholder),
        helper.make_node("Equal", ["input_ids", "placeholder"], ["seen"], "seen"),
        helper.make_node("NonZero", ["seen"], ["where"], "where"),
        helper.make_node("Transpose", ["where"], ["places"], "places", perm=[1, 0]),
        helper.make_node("ScatterND", ["rows", "places", "image_features"], ["inputs_embeds"], "scatter"),
    ]
    return _model(
        helper.make_graph(
            nodes,
            "embed",
            [
                helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
                helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["tokens", HIDDEN]),
            ],
            [embeds],
            [helper.make_tensor("table", TensorProto.FLOAT, table.shape, table.reshape(-1).tolist())],
        )
    )


def _decoder(rng: np.random.Generator) -> Any:
    """Keys and values appended, logits of the wanted positions with int4 weights; attends to nothing."""
    blocks = HIDDEN // BLOCK
    weights = {
        "heads": np.array([0, 0, HEADS, HEAD_DIM], np.int64),
        "logits_positions": np.array([-1], np.int64),
        "lm_head": rng.integers(0, 256, (VOCAB, blocks, BLOCK // 2), dtype=np.uint8),
        "lm_head_scales": rng.uniform(0.01, 0.1, (VOCAB, blocks)).astype(np.float32),
        "lm_head_zeros": np.full((VOCAB, 1), 0x88, np.uint8),
        "kv": rng.normal(size=(HIDDEN, HEADS * HEAD_DIM)).astype(np.float32),
        "mask": np.array([0, -np.inf], np.float32),
    }
    cache = ["batch", HEADS, "past", HEAD_DIM]
    nodes = [
        helper.make_node("MatMul", ["inputs_embeds", "kv"], ["flat"], "kv"),
        helper.make_node("Reshape", ["flat", "heads"], ["split"], "split"),
        helper.make_node("Transpose", ["split"], ["new"], "turn", perm=[0, 2, 1, 3]),
        helper.make_node("Gather", ["inputs_embeds", "logits_positions"], ["last"], "last", axis=1),
        helper.make_node("ReduceMax", ["mask"], ["zero"], "zero", keepdims=0),
        helper.make_node("Add", ["last", "zero"], ["x"], "add"),
        helper.make_node(
            "MatMulNBits",
            ["x", "lm_head", "lm_head_scales", "lm_head_zeros"],
            ["logits"],
            "lm_head",
            domain="com.microsoft",
            K=HIDDEN,
            N=VOCAB,
            bits=4,
            block_size=BLOCK,
        ),
    ]
    inputs = [
        helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", HIDDEN]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("logits_positions", TensorProto.INT64, ["n"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "n", VOCAB])]
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            nodes.append(helper.make_node("Concat", [past, "new"], [present], present, axis=2))
            inputs.append(helper.make_tensor_value_info(past, TensorProto.FLOAT, cache))
            outputs.append(
                helper.make_tensor_value_info(present, TensorProto.FLOAT, ["batch", HEADS, "all", HEAD_DIM])
            )
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return _model(helper.make_graph(nodes, "decoder", inputs, outputs, stored))
