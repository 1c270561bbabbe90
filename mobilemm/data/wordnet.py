"""Names of things one can draw, from WordNet: far more than there are pictures of.

An output projector learns from names alone (NExT-GPT, arXiv 2309.05519, section 4.2), and the more of them,
the better it does with those that it has not read.
"""

from __future__ import annotations

from pathlib import Path

from mobilemm.errors import MobileMMError

# WordNet's lexicographer files whose nouns have a look, see lexnames(5WN).
FILES = {
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "13": "food",
    "17": "object",
    "18": "person",
    "19": "phenomenon",
    "20": "plant",
    "25": "shape",
}
MOST_WORDS = 3


def read_names(path: Path) -> list[str]:
    """The nouns of WordNet's `data.noun` (format: wndb(5WN)) in lower case, sorted, each once.

    Those with capitals, as proper and Latin names have, with digits, and of more than three words are left
    out. Raises MobileMMError for another file, or none.
    """
    names: set[str] = set()
    try:
        with path.open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("  "):  # the licence
                    continue
                _, file, _, count, *words = line.split(" ")
                end = 2 * int(count, 16)
                if file in FILES:
                    names.update(words[:end:2])
    except OSError as error:
        raise MobileMMError(
            f"{path}: WordNet's nouns cannot be read ({error.strerror}); scripts/fetch_pairs.py fetches them"
        ) from error
    except ValueError as error:
        raise MobileMMError(f"{path}: not WordNet's data.noun ({error})") from error
    plain = (name.replace("_", " ") for name in names if name.islower() and name[0].isalpha())
    return sorted(
        name for name in plain if len(name.split()) <= MOST_WORDS and not any(map(str.isdigit, name))
    )
