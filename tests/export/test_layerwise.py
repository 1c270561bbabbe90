"""A whole decoder quantized layer by layer, from weights that lie elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mobilemm.errors import MobileMMError
from mobilemm.export.awq import smooth
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.layerwise import Stream, linears, load_parameters, quantize_decoder
from mobilemm.export.quantization import FLOAT32, PartPlan, QuantizedLinear, WeightScheme, make_plan
from mobilemm.export.quantizers import quantize


def filled(decoder: Decoder, weights) -> Decoder:
    whole = Decoder(decoder.spec)
    whole.load_state_dict(dict(weights), strict=False)
    return whole


@torch.no_grad()
def divergence(decoder: Decoder, reference: Decoder, embeddings: Tensor) -> float:
    p = reference(embeddings, EagerCache()).log_softmax(-1)
    q = decoder(embeddings, EagerCache()).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_every_layer_is_stored_as_planned(tiny) -> None:
    decoder, weights, _ = tiny
    plan = PartPlan(
        WeightScheme(4, 32, False, "hqq"),
        (("layers.0.*", WeightScheme(8, 64)), ("*.down", FLOAT32), ("lm_head", WeightScheme(16, None))),
    )
    seen: list[tuple[str, int, int]] = []
    quantize_decoder(decoder, weights, plan, progress=lambda *args: seen.append(args))
    assert seen == [("layers.0", 0, 3), ("layers.1", 1, 3), ("lm_head", 2, 3)]
    assert not any(parameter.is_meta for parameter in decoder.parameters())
    assert isinstance(decoder.layers[0].down, QuantizedLinear)
    assert isinstance(decoder.layers[1].down, nn.Linear)
    for index, layer in enumerate(decoder.layers):
        for name in ("qkv", "o", "gate", "up"):
            module = getattr(layer, name)
            assert isinstance(module, QuantizedLinear)
            expected = quantize(
                weights[f"layers.{index}.{name}.weight"], plan.scheme(f"layers.{index}.{name}")
            )
            assert torch.equal(module.packed, expected.packed)
    assert isinstance(decoder.lm_head, nn.Linear)
    assert torch.equal(decoder.norm.weight, weights["norm.weight"])


def test_a_tied_head_is_taken_as_it_is(tiny) -> None:
    decoder, weights, calibration = tiny
    head = quantize(weights["lm_head.weight"], WeightScheme(8, 32))
    plan = PartPlan(FLOAT32)
    quantize_decoder(decoder, weights, plan, head=head)
    assert isinstance(decoder.lm_head, QuantizedLinear)
    assert decoder.lm_head.packed.data_ptr() == head.packed.data_ptr()
    assert divergence(decoder, filled(decoder, weights), calibration) < 1e-3


def test_each_weight_is_asked_for_once(tiny) -> None:
    decoder, weights, calibration = tiny
    asked: list[str] = []

    class Counting(dict):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return super().__getitem__(name)

    quantize_decoder(
        decoder, Counting(weights), PartPlan(WeightScheme(4, 32, True, "gptq")), calibration=calibration
    )
    assert sorted(asked) == sorted(weights)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_looking_at_data_beats_rounding_on_other_data(tiny, method, symmetric: bool) -> None:
    decoder, weights, calibration = tiny
    reference = filled(decoder, weights)
    seen, unseen = calibration.split(len(calibration) // 2)
    found = {}
    for name in ("rtn", method):
        with torch.device("meta"):
            candidate = Decoder(decoder.spec)
        scheme = WeightScheme(4, 64, symmetric, name)
        quantize_decoder(candidate, weights, PartPlan(scheme), calibration=seen)
        found[name] = divergence(candidate, reference, unseen)
    assert 0 < found[method] < 0.9 * found["rtn"]


def test_same_input_same_bytes(tiny) -> None:
    decoder, weights, calibration = tiny
    states = []
    for _ in range(2):
        with torch.device("meta"):
            candidate = Decoder(decoder.spec)
        quantize_decoder(
            candidate, weights, PartPlan(WeightScheme(4, 64, False, "gptq")), calibration=calibration
        )
        states.append(candidate.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@torch.no_grad()
def test_later_layers_see_what_quantized_layers_make_of_the_data(tiny) -> None:
    decoder, weights, calibration = tiny
    quantize_decoder(decoder, weights, PartPlan(WeightScheme(4, 32, True, "rtn")), calibration=calibration)
    stream = Stream.start(decoder, calibration)
    stream.advance(decoder.layers[0])  # type: ignore[arg-type]
    with torch.device("meta"):
        layer = Decoder(decoder.spec).layers[1]
    load_parameters(layer, weights, "layers.1.")
    hessians = stream.hessians(layer)  # type: ignore[arg-type]
    total = stream.hidden + stream.residual
    normed = nn.functional.rms_norm(
        total, total.shape[-1:], weights["layers.1.input_norm.weight"], layer.input_norm.eps
    )
    flat = normed.flatten(0, 1)
    torch.testing.assert_close(hessians["qkv"], flat.T @ flat, rtol=1e-4, atol=1e-3)
    assert set(hessians) == {name for name, _ in linears(layer)}


@torch.no_grad()
def test_scaling_channels_changes_nothing_but_the_weights(tiny) -> None:
    decoder, weights, calibration = tiny
    whole = filled(decoder, weights)
    layer = whole.layers[0]
    stream = Stream.start(whole, calibration)
    before, residual = next(stream.run(layer))  # type: ignore[arg-type]
    old = layer.qkv.weight.clone()
    schemes = {name: WeightScheme(4, 32, True, "awq") for name, _ in linears(layer)}
    smooth(layer, stream.hessians(layer), schemes)  # type: ignore[arg-type]
    after, residual_after = next(stream.run(layer))  # type: ignore[arg-type]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(residual_after, residual, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(layer.qkv.weight, old)


def test_errors_name_the_layer(tiny) -> None:
    decoder, weights, calibration = tiny
    plan = PartPlan(WeightScheme(4, 32, True, "gptq"))
    with pytest.raises(MobileMMError, match=r"layers\.0\.qkv: the method 'gptq' needs calibration data"):
        quantize_decoder(decoder, weights, plan)
    with pytest.raises(MobileMMError, match="calibration embeddings must be"):
        quantize_decoder(decoder, weights, plan, calibration=calibration[..., :-1])
    with pytest.raises(MobileMMError, match="calibration rows of 600 tokens"):
        quantize_decoder(decoder, weights, plan, calibration=torch.zeros(1, 600, calibration.shape[2]))
    damaged = dict(weights)
    damaged["layers.1.up.weight"] = damaged["layers.1.up.weight"].clone()
    damaged["layers.1.up.weight"][2, 3] = float("nan")
    with pytest.raises(MobileMMError, match=r"layers\.1\.up"):
        quantize_decoder(decoder, damaged, plan, calibration=calibration)
    calibration = calibration.clone()
    calibration[0, 0, 0] = float("inf")
    with pytest.raises(MobileMMError, match="calibration embeddings"):
        quantize_decoder(decoder, weights, plan, calibration=calibration)


PROSE = """\
The lighthouse stood at the end of a narrow spit of rock, and for most of the year nobody came to it but
the boat that brought oil and flour. Its keeper had been a carpenter before, and the rooms were full of
shelves. On clear evenings he could count the lights of eleven ships; in fog he counted the strokes of the
bell instead. A floating point number is stored as a sign, an exponent and a fraction, so that most
decimal fractions cannot be represented exactly. Programs that compare such numbers for equality are often
wrong, and those that add many small ones to a large one lose the small ones. To make the soup, chop two
onions and three carrots, fry them in a little butter, add a litre of water, and let it simmer for half an
hour. The committee met on Tuesday and agreed, after a long discussion, that the bridge should be repaired
before winter, although nobody could say who was going to pay for it."""


@pytest.mark.slow
@torch.no_grad()
def test_the_recipe_is_closer_to_fp32_than_plain_block_32_on_the_default_model() -> None:
    # The other is what onnxruntime-genai's builder makes, of more bytes: symmetric rounding at block 32.
    from mobilemm.export.calibration import read_calibration
    from mobilemm.export.model import open_model
    from mobilemm.export.options import ExportOptions
    from mobilemm.export.quantized_parts import calibration_embeddings

    model = open_model(None, ExportOptions())
    part = model.parts["decoder"]
    spec = part.module.spec  # type: ignore[union-attr]
    calibration = calibration_embeddings(model, read_calibration())[:12]
    reference = filled(part.module, part.weights)  # type: ignore[arg-type]
    table = reference.lm_head.weight
    ids = model.split.processor.tokenizer(PROSE)["input_ids"]
    embeddings = table[torch.tensor([ids])]
    found = []
    for scheme in (make_plan("int4").part("decoder").default, WeightScheme(4, 32, True, "rtn")):
        with torch.device("meta"):
            decoder = Decoder(spec)
        plan = PartPlan(scheme, (("lm_head", FLOAT32),))
        quantize_decoder(decoder, part.weights, plan, calibration=calibration)
        found.append(divergence(decoder, reference, embeddings))
    assert 0.01 < found[0] < 0.8 * found[1]
