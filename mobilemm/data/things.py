"""What captions name: with its article, and of which kind it is."""

from __future__ import annotations

from mobilemm.data.pairs import Pair

COLOURS = (
    *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray"),
    *("golden", "silver"),
)
# Keyword of a picture's source, or its beginning → what kind of thing it is.
KINDS = {
    "animal-": "animal",
    "plant-": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-": "food",
    "drink": "drink",
    "transport-sign": "sign",
    "transport-": "vehicle",
    "clothing": "clothing",
    "tool": "tool",
    "musical-instrument": "musical instrument",
    "sky-weather": "weather",
    "place-building": "building",
    "sport": "sport",
    "person": "person",
    "face-": "face",
    "hand-": "hand",
    "arrow": "arrow",
    "flag": "flag",
}


def with_article(name: str) -> str:
    """`a cat`, `an owl`; plurals and what cannot be counted stay as they are."""
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us")):
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def kind_of(pair: Pair) -> str | None:
    """What kind of thing a picture shows, as far as its source's keywords tell."""
    for keyword in reversed(pair.keywords[:2]):  # the narrower one comes second
        for beginning, kind in KINDS.items():
            if keyword.startswith(beginning):
                return kind
    return None
