"""Whether a model says its signal tokens when a drawing is asked for, and only then; and what they tell.

    python benchmarks/drawing_requests.py MODEL --generator FOLDER [--pairs data/pairs] [--items 200]

Captions are of the pairs' test split, requests and questions in words that no model learned from. Signals:
the greedy first token of the answer. Condition: the output projector's against the generator's own text
encoder's, as cosine, and as the share of captions that are nearest, among all, to their own.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch

import mobilemm
from mobilemm.data.drawings import HELD_OUT_QUESTIONS, HELD_OUT_REQUESTS
from mobilemm.data.pairs import read_pairs
from mobilemm.data.things import with_article
from mobilemm.generation.conditions import open_condition_encoder
from mobilemm.generation.generator import read_condition


@torch.no_grad()
def main() -> None:
    """Reads the command line; prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--generator", type=Path, help="left out, the model's own")
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs"))
    parser.add_argument("--items", type=int, default=200)
    given = parser.parse_args()
    generator = given.generator or given.model / "generator"
    model, processor = mobilemm.load(given.model)
    draw = random.Random(0)
    captions = sorted({pair.caption for pair in read_pairs(given.pairs, "test")})
    captions = draw.sample(captions, min(given.items, len(captions)))
    signals = model.config.signal_token_ids
    said = {True: 0, False: 0}
    conditions = []
    for caption in captions:
        for words, asks in ((HELD_OUT_REQUESTS, True), (HELD_OUT_QUESTIONS, False)):
            asked = [{"role": "user", "content": draw.choice(words).format(with_article(caption))}]
            inputs = processor.apply_chat_template(asked, add_generation_prompt=True)
            prompt = inputs["input_ids"]
            ids = torch.cat([prompt, torch.tensor([signals])], 1)
            outputs = model(input_ids=ids, output_hidden_states=True)
            said[asks] += int(outputs.logits[0, prompt.shape[1] - 1].argmax()) == signals[0]
            if asks:
                states = outputs.hidden_states[-1][:, -len(signals) :]
                conditions.append(model.output_projector(states)[0].flatten())
    found = torch.nn.functional.normalize(torch.stack(conditions), dim=-1)
    source, _ = read_condition(generator)
    wanted = open_condition_encoder(generator, source)(captions).flatten(1)
    wanted = torch.nn.functional.normalize(wanted, dim=-1)
    nearest = (found @ wanted.T).argmax(1) == torch.arange(len(captions))
    print(f"{len(captions)} captions")
    print(
        f"signals for requests {said[True] / len(captions):.1%}, for others {said[False] / len(captions):.1%}"
    )
    cosine = float((found * wanted).sum(1).mean())
    print(f"condition: cosine {cosine:.3f}, nearest to its own caption {float(nearest.float().mean()):.1%}")


if __name__ == "__main__":
    main()
