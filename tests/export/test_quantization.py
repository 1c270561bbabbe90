"""Plans, packing, and the layout against onnxruntime's own kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.quantization import (
    FLOAT32,
    PartPlan,
    QuantizationPlan,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    WeightScheme,
    make_plan,
)
from mobilemm.export.quantizers import quantize


def matrix(rows: int = 24, columns: int = 576) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))


def random_codes(rows: int, columns: int, block: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(bits * block + columns)
    blocks = -(-columns // block)
    codes = torch.randint(0, 2**bits, (rows, blocks, block), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, blocks), dtype=torch.uint8, generator=generator)
    return codes, torch.rand(rows, blocks, generator=generator) - 0.5, zeros


# --- packing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("columns", [128, 576, 33, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_packed_is_what_comes_out(bits: int, block: int, columns: int, symmetric: bool) -> None:
    codes, scales, zeros = random_codes(5, columns, block, bits)
    packed = QuantizedWeight.from_codes(codes, scales, None if symmetric else zeros, bits, columns)
    blocks = -(-columns // block)
    assert packed.packed.shape == (5, blocks, block * (4 if bits == 4 else 8) // 8)
    assert packed.packed.dtype == torch.uint8
    assert torch.equal(packed.codes().flatten(1)[:, :columns], codes.flatten(1)[:, :columns])
    zero = torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    expected = (codes.double() - zero[..., None].double()) * scales[..., None].double()
    torch.testing.assert_close(
        packed.dequantize().double(), expected.flatten(1)[:, :columns], rtol=1e-6, atol=1e-7
    )
    # Behind the last column there is nothing but zeros: a kernel may multiply by it.
    padded = QuantizedWeight(packed.packed, scales, packed.zero_points, bits, block, (5, blocks * block))
    assert (padded.dequantize()[:, columns:] == 0).all()


def test_the_first_code_of_a_byte_is_its_lower_half() -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 16)
    packed = QuantizedWeight.from_codes(codes, torch.ones(1, 1), None, 4, 16)
    assert packed.packed.flatten().tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("block", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [576, 1536, 33])
def test_bytes_are_foretold(bits: Any, block: int | None, symmetric: bool, columns: int) -> None:
    scheme = WeightScheme(bits, block, symmetric)
    assert scheme.nbytes(24, columns) == quantize(matrix(24, columns), scheme).nbytes


def test_bits_a_weight_at_block_128() -> None:
    assert WeightScheme(4, 128, True).nbytes(2048, 2048) * 8 / 2048**2 == 4.25
    assert WeightScheme(4, 128, False).nbytes(2048, 2048) * 8 / 2048**2 == 4.28125
    assert WeightScheme(16, None).nbytes(3, 5) == 30


def test_the_recipe_keeps_to_4_6_bits_a_weight_of_a_llama_of_1_4b() -> None:
    plan = make_plan("int4")
    hidden, ffn, vocabulary = 2048, 5632, 32000
    decoder = {"qkv": (3 * hidden, hidden), "o": (hidden, hidden), "gate": (ffn, hidden), "up": (ffn, hidden)}
    decoder["down"] = (hidden, ffn)
    shapes = {f"layers.{index}.{name}": shape for index in range(24) for name, shape in decoder.items()}
    shapes["lm_head"] = (vocabulary, hidden)
    size = sum(plan.part("decoder").scheme(name).nbytes(*shape) for name, shape in shapes.items())
    size += plan.part("embed").scheme("table").nbytes(vocabulary, hidden)
    weights = sum(rows * columns for rows, columns in shapes.values()) + vocabulary * hidden
    assert 4.25 < size * 8 / weights <= 4.6


# --- modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_modules_compute_with_the_dequantized_weight(symmetric: bool) -> None:
    weight = quantize(matrix(40, 96), WeightScheme(4, 64, symmetric))
    x, bias = matrix(3, 96), matrix(1, 40)[0]
    linear = QuantizedLinear(weight, bias)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, weight.dequantize(), bias))
    ids = torch.tensor([[3, 39], [3, 0]])
    assert torch.equal(QuantizedEmbedding(weight)(ids), weight.dequantize()[ids])
    names = {"packed", "scales", "bias"} | (set() if symmetric else {"zero_points"})
    assert set(linear.state_dict()) == names
    assert linear.quantized.nbytes == weight.nbytes


# --- onnxruntime's kernels -------------------------------------------------------------------------------


def run_matmul_nbits(weight: QuantizedWeight, x: np.ndarray, accuracy_level: int) -> np.ndarray:
    """x times the weight's transpose in a model of one node."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    rows, columns = weight.shape
    tensors = {"packed": weight.packed.numpy(), "scales": weight.scales.numpy()}
    if weight.zero_points is not None:
        zeros = weight.zero_points.numpy()
        if weight.bits == 4:
            zeros = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
            zeros = zeros[:, 0::2] | (zeros[:, 1::2] << 4)
        tensors["zero_points"] = zeros
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=weight.bits,
        block_size=weight.block_size,
        accuracy_level=accuracy_level,
    )
    graph = onnx.helper.make_graph(
        [node],
        "one",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (len(x), rows))],
        [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("columns", [256, 576])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens", [1, 9])
def test_matmul_nbits_reads_it_as_we_do(
    bits: Any, block: int, columns: int, symmetric: bool, tokens: int
) -> None:
    weight = quantize(matrix(24, columns), WeightScheme(bits, block, symmetric))
    x = matrix(tokens, columns)
    wanted = (x.double() @ weight.dequantize().double().T).numpy()
    for level in (0, 1):
        np.testing.assert_allclose(
            run_matmul_nbits(weight, x.numpy(), level), wanted, atol=1e-4 * np.abs(wanted).max()
        )
    # Level 4 rounds the inputs of each block to 8 bits: an error of a step's 1/√12 at each of the columns.
    got = run_matmul_nbits(weight, x.numpy(), 4)
    step = x.abs().max().item() / 127
    sigma = step / 12**0.5 * weight.dequantize().square().sum(1).sqrt().max().item()
    assert np.abs(got - wanted).max() < 5 * sigma


@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits_at_level_4_takes_zero_rows_and_constants(symmetric: bool) -> None:
    values = matrix(8, 256)
    values[0] = 0
    values[1, 128:] = 0
    values[2] = 0.5
    weight = quantize(values, WeightScheme(4, 128, symmetric))
    x = matrix(2, 256)
    got = run_matmul_nbits(weight, x.numpy(), 4)
    assert (got[:, 0] == 0).all()
    np.testing.assert_allclose(got, (x @ weight.dequantize().T).numpy(), atol=0.3)


# --- plans -----------------------------------------------------------------------------------------------


def test_int4_alone_is_the_recipe_that_ships() -> None:
    plan = make_plan("int4")
    decoder = plan.part("decoder")
    assert decoder.scheme("layers.3.down") == WeightScheme(4, 128, True, "gptq")
    assert plan.part("embed").scheme("table") == WeightScheme(4, 32, True, "rtn")
    assert plan.part("vision") == PartPlan(WeightScheme(8, None), activations="int8")


def test_flags_make_the_plan() -> None:
    plan = make_plan(
        "int4",
        embed="int4",
        vision="fp16",
        method="hqq",
        block_size=64,
        symmetric=False,
        keep=["layers.0.*=8", "*.down = int6", "lm_head=fp32"],
    )
    decoder = plan.part("decoder")
    assert decoder.scheme("layers.1.qkv") == WeightScheme(4, 64, False, "hqq")
    assert decoder.scheme("layers.0.down").bits == 8
    assert decoder.scheme("layers.11.down").bits == 6
    assert decoder.scheme("lm_head") == FLOAT32
    assert plan.part("embed").scheme("table") == WeightScheme(4, 64, False, "hqq")
    assert plan.part("vision").default.bits == 16
    assert plan.part("vision").activations == "float32"


@pytest.mark.parametrize(("word", "bits"), [("int8", 8), ("int6", 6), ("fp16", 16), ("fp32", 32)])
def test_words(word: str, bits: int) -> None:
    plan = make_plan(word)
    assert plan.part("decoder").default.bits == bits
    assert plan.part("embed").default.bits == bits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"llm": "int5"}, "--q-llm: 'int5' is no precision; choose from int4, int6, int8, fp16, fp32"),
        ({"embed": "4"}, "--q-embed: '4'"),
        ({"vision": ""}, "--q-vision"),
        ({"method": "magic"}, "method 'magic' is not known; choose from rtn, hqq, gptq, awq"),
        ({"block_size": 48}, "block of 48 weights is not known; choose from 16, 32, 64"),
        ({"keep": ["layers.0.*"]}, "--q-keep 'layers.0.*': must be PATTERN=BITS"),
        ({"keep": ["=8"]}, "--q-keep '=8'"),
        ({"method": "kmeans"}, "--q-method kmeans: is that of palettes"),
        ({"keep": ["*.o=7"]}, "--q-keep '*.o=7': '7' is no precision"),
    ],
)
def test_wrong_flags_are_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(MobileMMError) as caught:
        make_plan(**flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_pattern_that_fits_decides_and_unused_ones_are_found() -> None:
    four, eight = WeightScheme(4), WeightScheme(8)
    plan = PartPlan(four, (("layers.1.*", FLOAT32), ("*.down", eight)))
    assert plan.scheme("layers.1.down") == FLOAT32
    assert plan.scheme("layers.10.down") == eight
    assert plan.scheme("layers.10.up") == four
    assert plan.unused_patterns(["layers.0.up", "layers.0.down"]) == ["layers.1.*"]
    whole = QuantizationPlan({"decoder": plan}).with_exceptions("decoder", [("*.down", four)])
    assert whole.part("decoder").scheme("layers.1.down") == four
    assert whole.part("vision").default == FLOAT32
    with pytest.raises(MobileMMError, match="no part 'ears'"):
        QuantizationPlan({"ears": plan})
