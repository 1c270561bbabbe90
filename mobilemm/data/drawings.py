"""Requests for pictures, and talk about the same things that is none: what signal tokens are learned from.

They follow from captions by templates alone. What is asked for is the caption; the answer is a drawing of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from mobilemm.data.pairs import Pair
from mobilemm.data.things import COLOURS, KINDS, kind_of, with_article

# {} is the thing with its article. The last ones of each list are for tests: no model learns from them.
REQUESTS = (
    "Draw {}.",
    "Draw {}",
    "draw {}",
    "Please draw {}.",
    "Draw me {}.",
    "Can you draw {}?",
    "Could you draw {} for me?",
    "Paint {}.",
    "Sketch {}.",
    "Make a picture of {}.",
    "Create an image of {}.",
    "Generate a picture of {}.",
    "Show me a drawing of {}.",
    "I would like a picture of {}.",
    "I want to see a drawing of {}.",
    "A picture of {}, please.",
    "Give me an illustration of {}.",
    "Illustrate {}.",
    "Please make a drawing of {}.",
    "Produce an image showing {}.",
)
HELD_OUT_REQUESTS = (
    "Would you draw {}?",
    "Please sketch {} for me.",
    "Make me an image of {}.",
    "I need a drawing of {}.",
    "Paint me a picture of {}, please.",
)
QUESTIONS = (
    ("What is {}?", "{A} is {kind}."),
    ("Tell me about {}.", "{A} is {kind}."),
    ("What kind of thing is {}?", "It is {kind}."),
    ("Is {} {kind}?", "Yes, {the} is {kind}."),
    ("Is {} {other}?", "No, {the} is {kind}."),
    ("Where would I see {}?", "It is {kind}, so look where you would look for one."),
    ("How do I draw {}?", "Begin with its outline, then add what makes it {kind}."),
    ("Who drew {} first?", "I do not know who drew it first."),
    ("What does a picture of {} show?", "It shows {kind}."),
    ("Have you seen a drawing of {}?", "I cannot remember one."),
    ("Write a sentence about {}.", "I have never seen {} as fine as this one."),
    ("Spell the word: {name}", "{spelled}"),
    ("Say {name} twice.", "{name} {name}"),
    ("How many letters has the word {name}?", "It has {letters}."),
    # The requests' own verbs, for something else than a picture; and more that is written than shown.
    ("Make a list of words that go with {}.", "Here are some: {name}, {kind}."),
    ("Create a riddle about {}.", "It is {kind}. What is it? {A}."),
    ("Generate a title for a book about {}.", "The Secret of the {name}"),
    ("Show me how to spell {name}.", "{spelled}"),
    ("Give me three facts about {}.", "It is {kind}, it has a name, and people know it."),
    ("I would like to know more about {}.", "{A} is {kind}."),
    ("I want to see {} in real life. Where should I go?", "Go where one finds {kind}."),
    ("Please explain why people like {}.", "People like it because it is {kind}."),
    ("Can you tell me a story about {}?", "Once upon a time there was {}."),
    ("Could you compare {} with {other}?", "{A} is {kind}, not {other}."),
    ("Produce a short text on {}.", "{A} is {kind}."),
    ("Illustrate with an example what one does with {}.", "For example, one can look at {}."),
    ("What does {} look like?", "It looks like {kind}."),
    ("Why is {} called that?", "I do not know where the name comes from."),
    ("Is it hard to draw {}?", "With some practice it is not."),
    ("Do people paint {} often?", "Some of them do."),
)
HELD_OUT_QUESTIONS = (
    "Could you explain what {} is?",
    "Why would anybody own {}?",
    "What colour is {}?",
    "How is {} drawn by children?",
    "Write a poem about {}.",
    "Describe {} in one sentence.",
)
AGAIN = ("Draw this.", "Draw what you see.", "Can you draw this picture again?", "draw this as a cartoon")


def drawing_rows(pairs: Sequence[Pair], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Of each caption two requests, answered by drawings, and two questions, answered in words.

    The second request is for the same thing in another colour or beside something else, of which no picture
    need exist: what the projector learns from it is the generator's text condition.
    """
    captions = list({pair.caption: pair for pair in pairs}.values())
    for pair in captions:
        draw = random.Random(f"{seed}-{pair.caption}")
        other = f"{pair.caption} and {with_article(draw.choice(captions).caption)}"
        if len(pair.caption.split()) == 1:
            other = draw.choice([f"{draw.choice(COLOURS)} {pair.caption}", other])
        for caption in (pair.caption, other):
            request = draw.choice(REQUESTS).format(_noun(caption, draw))
            drawing = {"type": "drawing", "caption": caption}
            yield {"messages": [_said("user", request), {"role": "assistant", "content": [drawing]}]}
        words = _words(pair, draw)
        thing = with_article(pair.caption)
        for question, answer in draw.sample(QUESTIONS, 2):
            yield {
                "messages": [
                    _said("user", question.format(thing, **words)),
                    _said("assistant", answer.format(thing, **words)),
                ]
            }


def seen_rows(pairs: Sequence[Pair], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Of each picture the request to draw it again: through both halves of the model."""
    for pair in pairs:
        asked = random.Random(f"{seed}-{pair.image}").choice(AGAIN)
        drawing = {"type": "drawing", "caption": pair.caption}
        yield {
            "images": [pair.image],
            "messages": [_said("user", f"<image>\n{asked}"), {"role": "assistant", "content": [drawing]}],
        }


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _noun(caption: str, draw: random.Random) -> str:
    """As people say it: mostly with an article, sometimes without."""
    return draw.choice([with_article(caption)] * 4 + [caption, f"the {caption}"])


def _words(pair: Pair, draw: random.Random) -> dict[str, str]:
    kind = kind_of(pair) or "thing"
    other = draw.choice([other for other in dict.fromkeys(KINDS.values()) if other != kind])
    article = with_article(pair.caption)
    return {
        "name": pair.caption,
        "A": article[0].upper() + article[1:],
        "the": f"the {pair.caption}",
        "kind": with_article(kind),
        "other": with_article(other),
        "spelled": "-".join(pair.caption.replace(" ", "")),
        "letters": str(len(pair.caption.replace(" ", ""))),
    }
