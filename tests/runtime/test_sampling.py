"""Sampling, against transformers' own logits processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as reference

from mobilemm.runtime.sampling import Sampler, Sampling, SplitMix64, distribution, penalize


def logits(seed: int, size: int = 300, spread: float = 3.0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(0, spread, size).astype(np.float32)


def transformers_probabilities(scores: np.ndarray[Any, Any], seen: list[int], sampling: Sampling) -> Any:
    """What `generate` would draw from: its own list of processors, in its own order."""
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    processors = model._get_logits_processor(config, input_ids_seq_length=len(seen))
    filtered = processors(torch.tensor([seen]), torch.from_numpy(scores)[None])
    return filtered[0].double().softmax(-1).numpy()


def ours(scores: np.ndarray[Any, Any], seen: list[int], sampling: Sampling) -> Any:
    ids, probabilities = distribution(penalize(scores, seen, sampling.repetition_penalty), sampling)
    full = np.zeros(len(scores))
    full[ids] = probabilities
    return full


SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.3),
    Sampling(temperature=1.0, top_k=7),
    Sampling(temperature=1.0, top_k=1000),
    Sampling(temperature=1.0, top_p=0.6),
    Sampling(temperature=1.0, top_p=0.01),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.0, repetition_penalty=1.7),
    Sampling(temperature=1.0, repetition_penalty=0.6),
    Sampling(temperature=1.4, top_k=40, top_p=0.7, min_p=0.2, repetition_penalty=1.2),
    Sampling(temperature=0.7, top_k=5, top_p=0.95, min_p=0.02, repetition_penalty=1.1),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_drawn_from_is_what_transformers_draws_from(sampling: Sampling, seed: int) -> None:
    scores, seen = logits(seed), [3, 5, 8, 13, 5, 299]
    found, wanted = ours(scores, seen, sampling), transformers_probabilities(scores, seen, sampling)
    assert np.array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9)


def test_the_order_matters_and_is_transformers() -> None:
    """Top-p behind top-k sees only what top-k left: 0.4 / 0.7 > 0.5, so one token stays, not two."""
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    sampling = Sampling(temperature=1.0, top_k=2, top_p=0.5)
    assert ours(scores, [0], sampling).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert np.count_nonzero(ours(scores, [0], Sampling(temperature=1.0, top_p=0.5))) == 2


def test_equal_logits_at_the_border_of_top_k_all_stay() -> None:
    scores = np.array([1.0, 2.0, 2.0, 2.0, 0.0], np.float32)
    sampling = Sampling(temperature=1.0, top_k=2)
    assert np.array_equal(
        ours(scores, [0], sampling) > 0, transformers_probabilities(scores, [0], sampling) > 0
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.2, 3.0))
def test_greedy_is_the_argmax_after_the_penalty(seed: int, penalty: float) -> None:
    scores, seen = logits(seed), [1, 2, 3, 250]
    wanted = reference.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([seen]), torch.from_numpy(scores)[None].clone()
    )
    assert Sampler(Sampling(repetition_penalty=penalty))(scores, seen) == int(wanted.argmax())


def test_placeholders_outside_the_vocabulary_are_not_penalized() -> None:
    scores = logits(0)
    assert np.array_equal(penalize(scores, [3, 300, 32000], 2.0), penalize(scores, [3], 2.0))


def test_draws_follow_the_probabilities() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=7))
    counts = np.bincount([sampler(scores, []) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.012)  # 3.4 standard deviations


def test_a_seed_makes_it_repeatable() -> None:
    def drawn(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(logits(0), []) for _ in range(20)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)


def test_the_generator_is_splitmix64() -> None:
    """The first numbers of the algorithm's published C code for the seeds 0 and 1234567."""
    generator = SplitMix64(0)
    assert [generator.next() for _ in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert SplitMix64(1234567).next() == 6457827717110365317


def test_half_precision_logits_are_taken() -> None:
    assert Sampler(Sampling())(logits(0).astype(np.float16), []) == int(logits(0).argmax())
