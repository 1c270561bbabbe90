"""Whether a model says its signal tokens when a drawing is asked for, and only then; and what they tell.

    python benchmarks/drawing_requests.py [MODEL] [--bundle BUNDLE …] [--pairs data/pairs] [--items 200]

Captions are of the pairs' validation and test splits, from which no output projector learned; requests and
questions in words that no model learned from. Signals: the greedy first token of the answer. Condition: the
output projector's against the generator's own text encoder's, as cosine, and as the share of captions that
are nearest, among all, to their own. Pictures: of the names of `mobilemm eval --task drawing`, all of the
same two splits, by either condition and the same noise, with each number of `--steps`; and by the sessions
of bundles of the model, where an answer in words is no picture of anything.
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
from mobilemm.evaluation.drawing import DrawingScorer, draw
from mobilemm.generation.conditions import open_condition_encoder
from mobilemm.generation.generator import load_generator, read_condition
from mobilemm.models.checkpoints.reading import generator_folder
from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import open_bundle
from mobilemm.runtime.drawing import Drawn
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session


class Requests:
    """A model that is asked for pictures."""

    def __init__(self, folder: str | None) -> None:
        self.model, self.processor = mobilemm.load(folder)
        self.signals = self.model.config.signal_token_ids

    def ask(self, words: str) -> tuple[bool, torch.Tensor]:
        """Whether the answer to these words begins with a picture, and its condition (tokens, width)."""
        asked = [{"role": "user", "content": words}]
        prompt = self.processor.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        ids = torch.cat([prompt, torch.tensor([self.signals])], 1)
        outputs = self.model(input_ids=ids, output_hidden_states=True)
        draws = int(outputs.logits[0, prompt.shape[1] - 1].argmax()) == self.signals[0]
        states = outputs.hidden_states[-1][:, -len(self.signals) :]
        return draws, self.model.output_projector(states)[0]


def pictures_of(folder: Path, questions: list[str], signals: int) -> list[torch.Tensor | None]:
    """What a bundle draws, (3, H, W) in [0, 1], behind each question; None where it answers in words."""
    bundle = open_bundle(folder)
    backend = open_backend(bundle)
    found: list[torch.Tensor | None] = []
    for seed, question in enumerate(questions):
        session = Session(bundle, backend, Sampling(max_new_tokens=signals, seed=seed))
        drawn = [piece.picture for piece in session.stream(question) if isinstance(piece, Drawn)]
        found.append(torch.from_numpy(drawn[0]).permute(2, 0, 1) / 255 if drawn else None)
    return found


@torch.no_grad()
def main() -> None:
    """Reads the command line; prints the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="left out, the default model")
    parser.add_argument("--bundle", type=Path, nargs="+", default=[], help="made of the model")
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs"))
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    folder = generator_folder(given.model)
    if folder is None:
        parser.error(f"{given.model}: this model does not draw")
    requests, chance = Requests(given.model), random.Random(0)

    splits = ("validation", "test")
    captions = sorted({pair.caption for split in splits for pair in read_pairs(given.pairs, split)})
    captions = chance.sample(captions, min(given.items, len(captions)))
    said = {True: 0, False: 0}
    conditions = []
    for caption in captions:
        for words, asks in ((HELD_OUT_REQUESTS, True), (HELD_OUT_QUESTIONS, False)):
            draws, condition = requests.ask(chance.choice(words).format(with_article(caption)))
            said[asks] += draws
            if asks:
                conditions.append(condition.flatten())
    source, _ = read_condition(folder)
    encode = open_condition_encoder(folder, source)
    found = torch.nn.functional.normalize(torch.stack(conditions), dim=-1)
    wanted = torch.nn.functional.normalize(encode(captions).flatten(1), dim=-1)
    nearest = float(((found @ wanted.T).argmax(1) == torch.arange(len(captions))).float().mean())
    asked, others = (said[asks] / len(captions) for asks in (True, False))
    print(f"{len(captions)} captions")
    print(f"signals for requests {asked:.1%}, for others {others:.1%}")
    cosine = float((found * wanted).sum(1).mean())
    print(f"condition: cosine {cosine:.3f}, nearest to its own caption {nearest:.1%}")

    generator, scorer = load_generator(folder), DrawingScorer()
    names = scorer.names
    questions = [chance.choice(HELD_OUT_REQUESTS).format(with_article(name)) for name in names]
    told = [requests.ask(question)[1] for question in questions]
    own, empty = encode(names), encode([""])
    for steps in given.steps:
        share = {}
        for which, condition in (("requests", torch.stack(told)), ("names", own)):
            pictures = draw(generator, condition, empty, steps, seed=0, first=0)
            share[which] = float(scorer.top(pictures, range(len(names))).mean())
        print(
            f"{steps} steps: {len(names)} pictures by requests {share['requests']:.1%}, by names"
            f" {share['names']:.1%}, ratio {share['requests'] / share['names']:.2f}"
        )
    for place in given.bundle:
        drawn = dict(enumerate(pictures_of(place, questions, len(requests.signals))))
        shown = {index: picture for index, picture in drawn.items() if picture is not None}
        right = scorer.top(torch.stack(list(shown.values())), list(shown)).sum() if shown else 0
        print(f"{place}: {len(shown)} of {len(names)} answered by pictures; right {right / len(names):.1%}")


if __name__ == "__main__":
    main()
