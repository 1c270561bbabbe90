"""How often the default model finds the right caption among 4, on pictures whose names it never saw.

    python scripts/score_captions.py data/pairs [--split test] [--json recipes/default/alignment.score.json]

The choice is by likelihood per token of each caption as the answer to "What is in this picture?"; the three
wrong captions are drawn from other groups of the same split. Chance is 0.25.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import mobilemm
from mobilemm.data.pairs import read_pairs
from mobilemm.errors import MobileMMError
from mobilemm.training.alignment import CaptionLoss, FeatureCache, choose_captions

QUESTION = "What is in this picture?"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path, help="folder of pairs, as scripts/fetch_pairs.py builds it")
    parser.add_argument("--model", help="a model folder; left out, the default model")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--seed", type=int, default=0, help="draws the wrong captions")
    parser.add_argument("--json", type=Path, help="write the score here")
    arguments = parser.parse_args()
    model, processor = mobilemm.load(arguments.model)
    pairs = read_pairs(arguments.pairs, arguments.split)
    cache = FeatureCache(arguments.pairs.parent / "features", model, processor)
    features = cache.get([arguments.pairs / pair.image for pair in pairs])
    accuracy = choose_captions(
        model.projector,
        CaptionLoss(model, processor),
        features,
        pairs,
        QUESTION,
        limit=len(pairs),
        seed=arguments.seed,
    )
    score = {
        "task": "right caption among 4",
        "split": arguments.split,
        "samples": len(pairs),
        "accuracy": round(accuracy, 4),
        "chance": 0.25,
        "question": QUESTION,
        "seed": arguments.seed,
        "versions": {name: version(name) for name in ("mobilemm", "torch", "transformers", "timm")},
    }
    print(json.dumps(score, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(score, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except MobileMMError as error:
        sys.exit(f"error: {error}")
