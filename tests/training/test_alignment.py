"""The likelihood of captions, by a shortcut, is that of the whole pass."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import mobilemm
from mobilemm.training.alignment import CaptionLoss


def test_caption_loss_equals_the_plain_forward_pass(model_folder: Path) -> None:
    model, processor = mobilemm.load(model_folder)
    picture = Image.new("RGB", (32, 20), (200, 10, 10))
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what it is"}],
        },
        {"role": "assistant", "content": "red"},
    ]
    ids, labels = processor.encode_for_training(messages)
    pixels = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(torch.tensor([ids]), pixel_values=pixels, labels=torch.tensor([labels])).loss
        embeds = model.get_image_features(pixels).expand(2, -1, -1)
        losses = CaptionLoss(model, processor)(embeds, ["what it is", "what"], ["red", "green blue"])
    assert losses[:, 1].tolist() == [2, 3]  # the answer's words and the end token
    torch.testing.assert_close(losses[0, 0] / losses[0, 1], expected)
