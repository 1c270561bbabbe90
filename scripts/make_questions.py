"""Questions and text rows for the default model's training, made from its pairs and calibration set.

    python scripts/make_questions.py data/pairs data/questions

WordNet's nouns are those that `scripts/fetch_pairs.py` fetched, beside the pairs. `text.jsonl` holds
questions without pictures and what SmolLM2 itself answered: it shall keep its tone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mobilemm.data.questions import write_questions
from mobilemm.errors import MobileMMError
from mobilemm.export.calibration import read_calibration


def main(pairs: Path, folder: Path) -> None:
    """Writes the rows' files; prints how many each has."""
    nouns = pairs.with_name(pairs.name + "-packages") / "wordnet" / "dict" / "data.noun"
    rows = write_questions(pairs, folder, nouns=nouns)
    text = [{"messages": sample.messages} for sample in read_calibration() if not sample.files]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text), encoding="utf-8")
    for name, count in {**rows, "text": len(text)}.items():
        print(f"{folder / name}.jsonl: {count:,} rows")


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:3] or ["data/pairs", "data/questions"]))
    except MobileMMError as error:
        sys.exit(f"error: {error}")
