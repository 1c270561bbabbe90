"""Damage layer by layer against plain runs of the whole model, and the budget against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mobilemm.errors import MobileMMError
from mobilemm.export.decoder import Decoder, EagerCache
from mobilemm.export.quantization import FLOAT32, PartPlan, QuantizedLinear, WeightScheme
from mobilemm.export.quantizers import quantize
from mobilemm.export.sensitivity import measure_damage, spend

FOUR, EIGHT = WeightScheme(4, 32), WeightScheme(8, 32)


def kl(reference: Tensor, other: Tensor) -> float:
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@torch.no_grad()
def test_damage_is_that_of_the_whole_model_with_one_layer_quantized(tiny) -> None:
    decoder, weights, calibration = tiny
    plan = PartPlan(FOUR, (("layers.1.o", EIGHT), ("layers.0.gate", FLOAT32)))
    seen: list[str] = []
    damage = measure_damage(
        decoder, weights, plan, calibration, progress=lambda name, done, total: seen.append(name)
    )
    assert seen == ["layers.0", "layers.1", "lm_head"]
    assert len(damage) == 2 * 5 + 1 - 2
    assert "layers.1.o" not in damage
    assert "layers.0.gate" not in damage
    whole = Decoder(decoder.spec)
    whole.load_state_dict(dict(weights), strict=False)
    reference = whole(calibration, EagerCache())
    for name, found in damage.items():
        owner, _, last = name.rpartition(".")
        module = whole.get_submodule(owner)
        linear = getattr(module, last)
        setattr(module, last, QuantizedLinear(quantize(linear.weight, FOUR)))
        assert found == pytest.approx(kl(reference, whole(calibration, EagerCache())), rel=2e-3, abs=1e-7)
        setattr(module, last, linear)
    assert max(damage.values()) > 1e-5


def test_a_tied_head_is_not_measured(tiny) -> None:
    decoder, weights, calibration = tiny
    head = quantize(weights["lm_head.weight"], EIGHT)
    damage = measure_damage(decoder, weights, PartPlan(FOUR), calibration, head=head)
    assert "lm_head" not in damage
    assert len(damage) == 10


def test_methods_with_data_are_measured_as_they_will_be_used(tiny) -> None:
    decoder, weights, calibration = tiny
    rounded = measure_damage(decoder, weights, PartPlan(WeightScheme(4, 32, True, "rtn")), calibration)
    ours = measure_damage(decoder, weights, PartPlan(WeightScheme(4, 32, True, "gptq")), calibration)
    assert ours.keys() == rounded.keys()
    assert sum(ours.values()) < sum(rounded.values())


def test_the_budget_is_kept_and_well_spent() -> None:
    shapes = {
        f"layers.{i}.{n}": (64, 32 * (1 + i + 2 * j)) for i in range(3) for j, n in enumerate(("o", "up"))
    }
    damage = {name: 0.01 * (1 + index * 7 % 5) for index, name in enumerate(shapes)}
    plan = PartPlan(FOUR)

    def size(chosen: PartPlan) -> int:
        return sum(chosen.scheme(name).nbytes(*shape) for name, shape in shapes.items())

    def left(chosen: PartPlan) -> float:
        return sum(value for name, value in damage.items() if chosen.scheme(name).bits == 4)

    lowest = size(plan)
    highest = size(PartPlan(EIGHT))
    assert spend(plan, shapes, damage, lowest) == plan
    assert left(spend(plan, shapes, damage, highest)) == 0
    previous = left(plan)
    for share in (0.25, 0.5, 0.75):
        budget = int(lowest + share * (highest - lowest))
        chosen = spend(plan, shapes, damage, budget)
        assert size(chosen) <= budget
        assert left(chosen) < previous
        previous = left(chosen)
        # By size greed can fall short of the best choice by no more than the one layer that did not fit.
        best = min(
            left(candidate)
            for count in range(len(shapes) + 1)
            for names in itertools.combinations(shapes, count)
            if size(candidate := PartPlan(FOUR, tuple((name, EIGHT) for name in names))) <= budget
        )
        assert left(chosen) <= best + max(damage.values())


def test_a_budget_below_the_plan_is_refused() -> None:
    with pytest.raises(MobileMMError, match=r"--q-search 0\.0: the plan takes 1\.3 MB"):
        spend(PartPlan(FOUR), {"layers.0.o": (2048, 1000)}, {"layers.0.o": 1.0}, 1000)
