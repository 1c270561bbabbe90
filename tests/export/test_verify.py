"""Parity on numbers worked out by hand, and the floors that stop an export."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.parts import CacheShape, Part
from mobilemm.export.verify import (
    FLOORS,
    NEAR_TIE,
    check,
    cosine,
    decoder_reference,
    layer_decibels,
    measure,
    with_weights,
    worst_layers,
)
from mobilemm.runtime.manifest import Parity
from mobilemm.runtime.self_check import MAX_DB


def floats(*rows: Any) -> np.ndarray:
    return np.array(rows, np.float32)


def test_cosine_noise_and_largest_error() -> None:
    # 3·3 + 4·0 over 5 · 3; noise 16 under a signal of 25; against its own weights the noise is 0.
    parity = measure(floats(3, 0), floats(3, 4), floats(3, 0))
    assert parity.cosine == pytest.approx(9 / 15)
    assert parity.snr_db == pytest.approx(10 * math.log10(25 / 16), abs=1e-6)
    assert parity.max_abs_error == 4
    assert parity.conversion_db == MAX_DB
    assert (parity.top1, parity.near_ties, parity.kl) == (None, None, None)


def test_equal_outputs_are_perfect() -> None:
    logits = floats([[1, 2, 3], [5, 1, 0]])
    parity = measure(logits, logits, logits, logits=True)
    assert (parity.snr_db, parity.max_abs_error, parity.top1, parity.kl) == (MAX_DB, 0, 1, 0)
    assert parity.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [((1, 0), (0, 1), 0), ((1, 2), (-2, -4), -1), ((0, 0), (0, 0), 1), ((0, 0), (1, 0), 0)],
)
def test_cosine(a: tuple[int, int], b: tuple[int, int], wanted: float) -> None:
    assert cosine(floats(*a), floats(*b)) == pytest.approx(wanted)


def test_divergence_of_two_distributions() -> None:
    # fp32 says ½, ½; the shipped part ¾, ¼: KL = ½ ln(½ / ¾) + ½ ln(½ / ¼). Logits may be shifted.
    shipped = floats([[math.log(3) + 7, 7], [7, 7]])
    wanted = floats([[0, 0], [100, 100]])
    parity = measure(shipped, wanted, shipped, logits=True)
    assert parity.kl == pytest.approx((0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2, abs=1e-6)
    assert parity.near_ties == 1


@pytest.mark.parametrize(("bits", "top1", "ties"), [(32, 0.25, 0.25), (8, 0.5, 0.5), (4, 0.75, 0.75)])
def test_near_ties_are_told_from_errors(bits: int, top1: float, ties: float) -> None:
    """The shipped part always takes the second; what it should have taken leads by 0.005, 0.2, 0.5 and 4."""
    assert NEAR_TIE[32] > 0.005
    assert NEAR_TIE[8] > 0.2 > NEAR_TIE[16]
    assert NEAR_TIE[4] > 0.5 > NEAR_TIE[8]
    wanted = floats(*([lead, 0, -9] for lead in (0.005, 0.2, 0.5, 4)))
    shipped = floats(*[[0, 0.001, -9]] * 4)
    parity = measure(shipped, wanted, shipped, bits=bits, logits=True)
    assert (parity.top1, parity.near_ties) == (top1, ties)


def test_a_tie_excuses_only_the_second() -> None:
    wanted = floats([1, 0.999, 0.5])
    third = floats([0, 0, 1])
    assert measure(third, wanted, third, logits=True).top1 == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(MobileMMError, match="gives NaN or infinite values"):
        measure(floats(1, value), floats(1, 2), floats(1, 2))


def parity(**figures: float) -> Parity:
    return Parity(**{"cosine": 1, "snr_db": 90, "max_abs_error": 0, "conversion_db": 90, **figures})


@pytest.mark.parametrize(
    ("part", "bits", "figures", "pieces"),
    [
        (
            "vision",
            8,
            {"cosine": 0.97},
            ["part 'vision' (8 bits)", "cosine to fp32 0.97, at least 0.98", "Try --q-vision int8 or fp32"],
        ),
        (
            "decoder",
            4,
            {"conversion_db": 14.5},
            ["conversion error (dB) 14.5, at least 15", "--q-llm int8", "--block-size", "--q-keep"],
        ),
        ("decoder", 16, {"top1": 0.97}, ["top-1 agreement 0.97, at least 0.98"]),
        ("embed", 32, {"conversion_db": 80}, ["at least 100 is wanted", "--q-embed"]),
        ("generator", 32, {"cosine": 0.5}, ["part 'generator' (32 bits)", "Try --q-generator int8 or fp32"]),
        ("decoder", 4, {"cosine": float("nan")}, ["cosine to fp32 nan"]),
    ],
)
def test_below_its_floor_a_part_stops_the_export(
    part: str, bits: int, figures: dict[str, float], pieces: list[str]
) -> None:
    failing = parity().model_copy(update=figures)
    with pytest.raises(MobileMMError) as raised:
        check(part, bits, failing, ["layers.7 (3.1 dB)", "layers.2 (9.0 dB)"])
    message = str(raised.value)
    assert all(piece in message for piece in pieces), message
    assert "; worst: layers.7 (3.1 dB), layers.2 (9.0 dB). Try" in message
    assert "\n" not in message


def test_above_its_floor_nothing_is_said_and_no_layer_looked_at() -> None:
    def never() -> list[str]:
        raise AssertionError

    for part, floors in FLOORS.items():
        for bits, floor in floors.items():
            check(
                part,
                bits,
                parity(cosine=floor.cosine, conversion_db=floor.conversion_db, top1=floor.top1),
                never,
            )
    check("decoder", 6, parity(cosine=0.8, conversion_db=16))  # held to the floor of 4 bits


def test_several_figures_are_all_named() -> None:
    with pytest.raises(MobileMMError, match=r"conversion error \(dB\) 1.*; cosine .* 0.1.*; top-1 .* 0.2"):
        check("decoder", 8, parity(cosine=0.1, conversion_db=1, top1=0.2))


# --- the decoder, layer by layer ----------------------------------------------------------------------------


def part_of(decoder: Decoder, weights: dict[str, Tensor]) -> Part:
    return Part("decoder", decoder, {}, ("logits",), weights=weights, cache=CacheShape(2, 2, 24))


def test_the_reference_is_the_decoder_with_its_weights(
    tiny: tuple[Decoder, dict[str, Tensor], Tensor],
) -> None:
    decoder, weights, embeddings = tiny
    whole = with_weights(decoder, weights)
    cache, seen = EagerCache(), []
    found = decoder_reference(
        part_of(decoder, weights),
        {"inputs_embeds": embeddings[:1]},
        lambda name, value: seen.append((name, value.shape)),
        cache,
    )
    torch.testing.assert_close(found, whole(embeddings[:1], EagerCache()))
    assert seen == [("layers.0", (1, 48, 96)), ("layers.1", (1, 48, 96))]
    assert cache.keys[1].shape == (1, 48, 2, 24)
    # Neither the part's module nor the weights were touched.
    assert all(parameter.is_meta for parameter in decoder.parameters())


@pytest.mark.parametrize("broken", [0, 1])
def test_the_worst_layer_is_the_one_that_was_broken(
    tiny: tuple[Decoder, dict[str, Tensor], Tensor], broken: int
) -> None:
    decoder, weights, embeddings = tiny
    noisy = {name: value.clone() for name, value in weights.items()}
    noisy[f"layers.{broken}.down.weight"] += 0.1 * torch.randn_like(noisy[f"layers.{broken}.down.weight"])
    quantized = with_weights(decoder, noisy)
    sums: dict[str, Tensor] = {}
    inputs = {"inputs_embeds": embeddings[:1]}
    decoder_reference(part_of(decoder, weights), inputs, sums.__setitem__)
    with layer_decibels(quantized, sums) as decibels, torch.no_grad():
        quantized(embeddings[:1], EagerCache())
    assert not sums
    assert [decibel > 90 for decibel in decibels] == [broken == 1, False]
    found = worst_layers(decibels, count=1)
    assert len(found) == 1
    assert found[0].startswith(f"layers.{broken} (")
