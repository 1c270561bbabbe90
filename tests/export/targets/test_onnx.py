"""Decoders as ONNX files on onnxruntime, against transformers' own causal language models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.layerwise import quantize_decoder
from mobilemm.export.parts import Part, parts_of
from mobilemm.export.quantization import PartPlan, QuantizedEmbedding, QuantizedLinear, WeightScheme
from mobilemm.export.quantizers import quantize
from mobilemm.export.split import SplitModel
from mobilemm.export.targets import Exported
from mobilemm.export.targets.onnx import OnnxOptions, OnnxTarget
from mobilemm.export.verify import cosine, share_tensors, with_weights
from mobilemm.runtime.backends.onnx import OnnxDecoder
from mobilemm.runtime.manifest import Image
from mobilemm.runtime.self_check import snr_db
from tests.export.language_models import (
    LANGUAGE_MODELS,
    config_of,
    prompt_and_logits,
    random_language_model,
)

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

CONTEXT = 64
STANDARD = {"", "ai.onnx"}


class Patches(nn.Module):
    """An encoder that is one convolution: (images, 3, 32, 32) → (images, 4, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 16, 16)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.patches(pixels).flatten(2).mT


def split_of(model: Any) -> SplitModel:
    torch.manual_seed(0)
    return SplitModel(
        family="test",
        vision=Patches(),
        image=Image(height=32, width=32, strategy="stretch", filter="bicubic"),
        mean=(0.5, 0.4, 0.3),
        std=(0.5, 0.6, 0.7),
        num_image_tokens=4,
        image_token_id=97,
        text_config=model.config,
        text_weights=model.state_dict(),
        processor=None,
    )


def session_of(path: Path) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def decoder_of(folder: Path, concatenated: bool = False) -> OnnxDecoder:
    """As a session runs it: with one buffer for past and present, or with a cache that is concatenated."""
    path = folder / "decoder.onnx"
    return OnnxDecoder(session_of(path), CONTEXT, path, concatenated)


def run_in_steps(decoder: OnnxDecoder, embeds: np.ndarray) -> np.ndarray:
    """Logits of all positions: 30 at once, then one by one."""
    steps = [decoder.decode(embeds[:, :30], logits_positions=np.arange(30))]
    steps += [decoder.decode(embeds[:, index : index + 1]) for index in range(30, embeds.shape[1])]
    return np.concatenate(steps, 1)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def export(
    name: str, folder: Path, options: OnnxOptions | None = None, **changes: Any
) -> tuple[Part, Any, Exported]:
    model = random_language_model(config_of(name, **changes))
    part = parts_of(split_of(model), CONTEXT)["decoder"]
    exported = OnnxTarget(options).write(part, with_weights(part.module, part.weights), folder)
    return part, model, exported


FAST = ("qwen3", "gemma2")


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LANGUAGE_MODELS],
)
def test_logits_are_transformers_own(name: str, tmp_path: Path) -> None:
    _, model, exported = export(name, tmp_path)
    assert exported.cache == "shared"
    _, embeds, wanted = prompt_and_logits(model)
    found = run_in_steps(decoder_of(tmp_path), embeds.detach().numpy())
    assert np.abs(found - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    "name",
    ["mistral_window", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "qwen3"))],
)
def test_standard_operators_give_the_same(name: str, tmp_path: Path) -> None:
    _, model, exported = export(name, tmp_path, OnnxOptions(standard_ops=True))
    assert exported.cache == "concatenated"
    graph = onnx.load(tmp_path / "decoder.onnx", load_external_data=False)
    assert {node.domain for node in graph.graph.node} <= STANDARD
    assert {opset.domain for opset in graph.opset_import} <= STANDARD
    # SimplifiedLayerNormalization is onnxruntime's own, though in the standard's domain.
    for operator in operators(tmp_path / "decoder.onnx"):
        assert onnx.defs.has(operator), operator
    _, embeds, wanted = prompt_and_logits(model)
    found = run_in_steps(decoder_of(tmp_path, concatenated=True), embeds.detach().numpy())
    assert np.abs(found - wanted.numpy()).max() <= 1e-4 * wanted.abs().max()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Part, Any, Exported, Path]:
    """A decoder of two layers, with .ort beside it."""
    folder = tmp_path_factory.mktemp("llama")
    options = OnnxOptions(ort_format=True)
    return *export("llama", folder, options, num_hidden_layers=2), folder


def test_the_graph_is_fused(llama: tuple[Part, Any, Exported, Path]) -> None:
    counts = operators(llama[3] / "decoder.onnx")
    fused = {
        "GroupQueryAttention": 2,
        "SkipSimplifiedLayerNormalization": 4,
        "SimplifiedLayerNormalization": 1,  # the first has nothing to add
        "MatMul": 2 * 5 + 1,  # qkv, o, gate, up, down; the head
    }
    assert {name: counts[name] for name in fused} == fused
    # Besides: gate's activation, gate times up, the choice of positions, and the mask's few numbers.
    rest = counts - Counter(fused)
    assert rest["Mul"] <= 4
    assert rest["Sigmoid"] + rest["Swish"] + rest["QuickGelu"] == 2
    assert not {"RotaryEmbedding", "Softmax", "Concat", "Pow", "Transpose"} & set(rest)
    assert rest.total() <= 14


def test_inputs_and_outputs_have_the_contracts_names(llama: tuple[Part, Any, Exported, Path]) -> None:
    _, _, exported, folder = llama
    assert {one.name: (one.dtype, one.shape) for one in exported.inputs} == {
        "inputs_embeds": ("float32", ["batch", "length", 64]),
        "attention_mask": ("int64", ["batch", "total_length"]),
        "logits_positions": ("int64", ["positions"]),
        **{
            f"past_key_values.{layer}.{kind}": ("float32", ["batch", 2, "past_length", 16])
            for layer in range(2)
            for kind in ("key", "value")
        },
    }
    assert {one.name: (one.dtype, one.shape) for one in exported.outputs} == {
        "logits": ("float32", ["batch", 1, 97]),
        **{
            f"present.{layer}.{kind}": ("float32", ["batch", 2, "total_length", 16])
            for layer in range(2)
            for kind in ("key", "value")
        },
    }
    session = session_of(folder / "decoder.onnx")
    assert [one.name for one in session.get_overridable_initializers()] == ["logits_positions"]


def test_without_positions_the_last_ones_logits_come(llama: tuple[Part, Any, Exported, Path]) -> None:
    part, model, _, folder = llama
    _, embeds, wanted = prompt_and_logits(model)
    assert part.cache is not None
    feeds = {
        "inputs_embeds": embeds.detach().numpy(),
        "attention_mask": np.ones((1, 40), np.int64),
        **{
            f"past_key_values.{layer}.{kind}": np.zeros((1, 2, 0, 16), np.float32)
            for layer in range(2)
            for kind in ("key", "value")
        },
    }
    (logits,) = session_of(folder / "decoder.onnx").run(["logits"], feeds)
    np.testing.assert_allclose(logits, wanted[:, -1:].numpy(), rtol=0, atol=1e-4)


def test_the_ort_format_gives_the_same(llama: tuple[Part, Any, Exported, Path]) -> None:
    _, model, exported, folder = llama
    assert exported.files == ("decoder.onnx", "decoder.onnx.data", "decoder.ort")
    _, embeds, _ = prompt_and_logits(model)
    path = folder / "decoder.ort"
    found = run_in_steps(OnnxDecoder(session_of(path), CONTEXT, path), embeds.detach().numpy())
    wanted = run_in_steps(decoder_of(folder), embeds.detach().numpy())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_nothing_of_this_machine_is_in_the_files(llama: tuple[Part, Any, Exported, Path]) -> None:
    part, _, exported, folder = llama
    names = re.compile(
        rb"\.py\b|site-packages|Traceback|stack_trace|forward\(|"
        + re.escape(str(Path.home()).encode())
        + b"/"
    )
    for file in exported.files:
        data = (folder / file).read_bytes()
        assert not names.search(data), file
        for place in (Path.cwd(), folder, Path(torch.__file__).parent):
            assert str(place).encode() not in data
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False)
    assert graph.producer_name == "mobilemm"
    assert not graph.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)
    assert graph.graph.name == part.name


# --- quantized ----------------------------------------------------------------------------------------------


def quantized(part: Part, scheme: WeightScheme) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(part.module.spec)  # type: ignore[arg-type]
    quantize_decoder(decoder, part.weights, PartPlan(scheme))
    return decoder.eval()


@pytest.mark.parametrize(
    ("scheme", "level", "least_db"),
    [
        (WeightScheme(4, 32), 1, 60.0),
        pytest.param(WeightScheme(4, 32, symmetric=False), 1, 60.0, marks=pytest.mark.slow),
        pytest.param(WeightScheme(8, 32), 1, 60.0, marks=pytest.mark.slow),
        (WeightScheme(8, 32), 4, 25.0),
        pytest.param(WeightScheme(4, 32), 4, 25.0, marks=pytest.mark.slow),
        # 64 columns are half a block: the rest is padding.
        pytest.param(WeightScheme(4, 128), 1, 60.0, marks=pytest.mark.slow),
    ],
    ids=lambda value: f"{value.bits}bits{value.block_size}" if isinstance(value, WeightScheme) else None,
)
def test_a_quantized_decoder_computes_with_its_stored_weights(
    scheme: WeightScheme, level: int, least_db: float, tmp_path: Path
) -> None:
    """Against the same codes dequantized in PyTorch; at level 4 activations are rounded to int8 as well."""
    model = random_language_model(config_of("llama_biases_tied", tie_word_embeddings=False))
    _, embeds, exact = prompt_and_logits(model)
    part = parts_of(split_of(model), CONTEXT)["decoder"]
    decoder = quantized(part, scheme)
    with torch.no_grad():
        wanted = decoder(embeds, EagerCache()).numpy()
    OnnxTarget(OnnxOptions(accuracy_level=level)).write(part, decoder, tmp_path)
    found = run_in_steps(decoder_of(tmp_path), embeds.detach().numpy())
    # What is compared is the quantized model, and no other.
    assert snr_db(found, exact.numpy()) < 40
    assert cosine(found, wanted) > (0.999 if level == 4 else 0.99999)
    assert snr_db(found, wanted) >= least_db
    assert operators(tmp_path / "decoder.onnx")["MatMulNBits"] >= 3 * 4 + 1


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)], ids=lambda bits: f"{bits}bits")
def test_a_tied_table_is_stored_once(bits: Any, tmp_path: Path) -> None:
    model = random_language_model(config_of("llama", tie_word_embeddings=True, vocab_size=1024))
    parts = parts_of(split_of(model), CONTEXT)
    scheme = WeightScheme(bits, 32)
    table = quantize(model.get_input_embeddings().weight.detach(), scheme)
    with torch.device("meta"):
        decoder = Decoder(parts["decoder"].module.spec)  # type: ignore[arg-type]
    quantize_decoder(decoder, parts["decoder"].weights, PartPlan(scheme), head=table)
    embed = share_tensors(parts["embed"].module)
    embed.table = QuantizedEmbedding(table)
    target = OnnxTarget()
    target.write(parts["decoder"], decoder, tmp_path)
    before = sum(path.stat().st_size for path in tmp_path.iterdir())
    exported = target.write(parts["embed"], embed.eval(), tmp_path)
    added = sum(path.stat().st_size for path in tmp_path.iterdir()) - before
    assert exported.files == ("embed.onnx", "decoder.onnx.data")
    assert not (tmp_path / "embed.onnx.data").exists()
    assert added == (tmp_path / "embed.onnx").stat().st_size < 0.2 * table.nbytes
    ids = np.array([[0, 1023, 5, 97, 5]])
    features = np.arange(64, dtype=np.float32)[None]
    (found,) = session_of(tmp_path / "embed.onnx").run(None, {"input_ids": ids, "image_features": features})
    wanted = table.dequantize()[torch.tensor(ids[0])].numpy()
    wanted[3] = features[0]
    np.testing.assert_allclose(found[0], wanted, rtol=1e-6, atol=0)
    # Another table would point at numbers that are not its own.
    embed.table = QuantizedEmbedding(replace(table, packed=table.packed ^ 1))
    with pytest.raises(MobileMMError, match="part 'embed': its table 'table' is not that of 'decoder'"):
        target.write(parts["embed"], embed, tmp_path)


def test_six_bits_are_refused(tmp_path: Path) -> None:
    model = random_language_model(config_of("llama", num_hidden_layers=1))
    part = parts_of(split_of(model), CONTEXT)["decoder"]
    with pytest.raises(MobileMMError, match="4 or 8 bits, not 6"):
        OnnxTarget().write(part, quantized(part, WeightScheme(6, 32)), tmp_path)


# --- the other parts ----------------------------------------------------------------------------------------


def test_vision_takes_bytes_and_normalizes_them(tmp_path: Path) -> None:
    split = split_of(random_language_model(config_of("llama", num_hidden_layers=1)))
    part = parts_of(split, CONTEXT)["vision"]
    exported = OnnxTarget().write(part, with_weights(part.module, part.weights), tmp_path)
    assert [(one.name, one.dtype, one.shape) for one in exported.inputs] == [
        ("pixels", "uint8", ["images", 3, 32, 32])
    ]
    assert [(one.name, one.shape) for one in exported.outputs] == [("image_features", ["image_tokens", 64])]
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(three).view(1, 3, 1, 1) for three in (split.mean, split.std))
    with torch.no_grad():
        wanted = split.vision((pixels / 255 - mean) / std).flatten(0, 1)
    (found,) = session_of(tmp_path / "vision.onnx").run(None, {"pixels": pixels.numpy()})
    assert found.shape == (12, 64)
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def embed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., np.ndarray], Tensor]:
    """Gemma 3's, which scales: the file's function, and the table."""
    model = random_language_model(config_of("gemma3_text"))
    part = parts_of(split_of(model), CONTEXT)["embed"]
    folder = tmp_path_factory.mktemp("embed")
    OnnxTarget().write(part, with_weights(part.module, part.weights), folder)
    session = session_of(folder / "embed.onnx")

    def run(ids: list[list[int]], features: np.ndarray) -> np.ndarray:
        return session.run(None, {"input_ids": np.array(ids), "image_features": features})[0]

    return run, model.get_input_embeddings().weight.detach()


def test_embeddings_without_a_picture(embed: tuple[Callable[..., np.ndarray], Tensor]) -> None:
    run, table = embed
    found = run([[3, 0, 96], [1, 1, 2]], np.zeros((0, 64), np.float32))
    wanted = table[torch.tensor([[3, 0, 96], [1, 1, 2]])] * 8
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)


def test_features_stand_in_their_places_in_reading_order(
    embed: tuple[Callable[..., np.ndarray], Tensor],
) -> None:
    run, table = embed
    features = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    ids = [[97, 97, 4, 97], [6, 97, 97, 5]]
    found = run(ids, features)
    wanted = (table[torch.tensor(ids) % 97] * 8).numpy()
    wanted[0, [0, 1, 3]], wanted[1, [1, 2]] = features[:3], features[3:]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(("bits", "block"), [(8, None), (8, 64), (4, 32)])
@pytest.mark.parametrize("standard_ops", [False, True])
def test_quantized_encoders_load_with_and_without_contrib_operators(
    bits: Any, block: int | None, standard_ops: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    linear = QuantizedLinear(quantize(torch.randn(24, 128), WeightScheme(bits, block), "linear"))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, pixels: Tensor) -> Tensor:
            return self.linear(pixels)

    encoder = Encoder()
    part = Part("vision", encoder, {"pixels": torch.randn(3, 128)}, ("image_features",))
    target = OnnxTarget(OnnxOptions(standard_ops=standard_ops, accuracy_level=1))
    exported = target.write(part, encoder, tmp_path)
    found = target.run(part, exported, tmp_path, {"pixels": part.inputs["pixels"].numpy()})
    wanted = part.inputs["pixels"] @ linear.quantized.dequantize().T
    # onnxruntime rounds the activations as well, also where it fuses standard operators.
    assert snr_db(found, wanted.numpy()) > 35
