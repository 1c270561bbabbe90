"""The shared beginning of prompts, run once, changes neither loss nor gradients."""

from __future__ import annotations

import random
from pathlib import Path

import torch

import mobilemm
from mobilemm.data.mixture import Mixture, collate, plan, scan
from mobilemm.data.sources import open_source
from mobilemm.training.prefix import SharedPrefix, common_prefix


def test_loss_and_gradients_are_those_of_the_whole_pass(model_folder: Path, conversations: Path) -> None:
    model, processor = mobilemm.load(model_folder)
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    scanned = scan(open_source("llava", conversations), 1.0, model.num_image_tokens)
    order = plan([scanned], 1, 8, seed=0)
    mixture = Mixture([scanned], order, processor, 512, seed=0)
    ids = common_prefix(mixture, processor.image_token_id)
    assert processor.tokenizer.decode(ids).split() == ["<|im_start|>"]  # "user" follows, and then they differ
    batch = collate([mixture[place] for place in random.Random(0).sample(range(32), 8)])
    found = []
    for inputs in (batch, SharedPrefix(model.language_model, ids).take_off(batch)):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss.detach(), [parameter.grad.clone() for parameter in model.projector.parameters()]))
    (whole, gradients), (short, others) = found
    torch.testing.assert_close(short, whole)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)


def test_a_row_that_begins_otherwise_goes_as_it_is(model_folder: Path) -> None:
    model, _ = mobilemm.load(model_folder)
    prefix = SharedPrefix(model.language_model, [1, 3])
    ids = torch.tensor([[1, 3, 5, 6], [1, 4, 5, 6]])
    batch = {"input_ids": ids, "labels": ids, "logits_to_keep": torch.tensor([2])}
    assert prefix.take_off(batch) is batch
    batch = {"input_ids": ids[:1], "labels": ids[:1], "logits_to_keep": torch.tensor([2])}
    shorter = prefix.take_off(batch)
    assert shorter["input_ids"].tolist() == [[5, 6]]
    assert shorter["logits_to_keep"].tolist() == [0]
    assert shorter["past_key_values"].get_seq_length() == 2
