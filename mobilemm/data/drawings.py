"""Requests for pictures, and talk about the same things that is none: what signal tokens are learned from.

They follow from captions by templates alone. What is asked for is the caption; the answer is a drawing of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence, Set
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
    # What one writes, describes, judges and asks of a thing: none of it is shown.
    ("Write a story about {}.", "Once upon a time there was {}."),
    ("Write a song about {}.", "Oh {name}, oh {name}, how fine you are."),
    ("Write three lines of verse on {}.", "{A} came by one day, it looked at me and went away."),
    ("Write down what you know of {}.", "{A} is {kind}."),
    ("Compose a haiku about {}.", "{A} in the sun. It is quiet, and so am I. The day is over."),
    ("Tell me a joke about {}.", "What is {kind} and waits? {A}."),
    ("Describe {}.", "{A} is {kind}."),
    ("Describe {} to somebody who has never seen one.", "It is {kind}."),
    ("In a few words, describe {}.", "It is {kind}."),
    ("Explain {} to a child.", "{A} is {kind}."),
    ("Can you explain how {} works?", "It is {kind}; how it works I cannot say."),
    ("What color has {}?", "It can have several colors."),
    ("Which colors does {} come in?", "In several."),
    ("How big is {}?", "About as big as one expects {kind} to be."),
    ("How much does {} cost?", "That depends on where one looks."),
    ("Where can I find {}?", "Where one finds {kind}."),
    ("When did people first see {}?", "Long ago."),
    ("Why do we need {}?", "We need it because it is {kind}."),
    ("Who has {}?", "Many people do."),
    ("Would you like {}?", "I have no use for one, but thank you."),
    ("Would you say that {} is {kind}?", "Yes, I would."),
    ("Do you know {}?", "Yes. {A} is {kind}."),
    ("Should I buy {}?", "If you need one, do."),
    ("Translate {name} into another language.", "I do not know the word for {name} there."),
    ("Use {name} in a sentence.", "Yesterday I saw {}."),
    ("Make up a name for {}.", "I would call it Max."),
    ("Make a plan for a day with {}.", "First find {}, then look at it."),
    ("Create a short quiz about {}.", "Is {} {kind}?"),
    ("Generate a sentence with {name}.", "Here is {}."),
    ("Give me a word that rhymes with {name}.", "I cannot find one."),
    ("Give me your opinion on {}.", "I like it."),
    ("Show me a sentence in which {name} stands.", "There is {}."),
    ("I need advice about {}.", "Ask somebody who knows {kind}."),
    ("I need to know whether {} is {kind}.", "Yes, it is."),
    ("Please tell me what {} is good for.", "It is {kind}, and serves as one."),
    ("Please write about {}.", "{A} is {kind}."),
    ("What did the artist who painted {} think?", "I do not know what the artist thought."),
    ("How do children paint {}?", "With bright colors."),
    ("Who paints {} best?", "That is a matter of taste."),
    ("What should I look for in a drawing of {}?", "Look at its outline."),
    ("Which pencil is best for drawing {}?", "A soft one."),
    ("Is there a famous picture of {}?", "I cannot name one."),
    ("My friend drew {} yesterday.", "How nice! Did you like it?"),
    ("I saw a painting of {}.", "Was it well painted?"),
    ("I like {}.", "So do many people."),
    ("{A}", "{A} is {kind}."),
    ("{name}", "What would you like to know about {}?"),
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
    """Of each caption two requests, answered by drawings, and four questions, answered in words.

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
            yield _request(caption, draw)
        words = _words(pair, draw)
        thing = with_article(pair.caption)
        for question, answer in draw.sample(QUESTIONS, 4):
            yield {
                "messages": [
                    _said("user", question.format(thing, **words)),
                    _said("assistant", answer.format(thing, **words)),
                ]
            }


def name_rows(names: Sequence[str], held_out: Set[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Of each name one request, every fourth time for the thing in a colour; never for what is held out."""
    for name in names:
        if name in held_out:
            continue
        draw = random.Random(f"{seed}-{name}")
        caption = f"{draw.choice(COLOURS)} {name}" if draw.random() < 0.25 else name
        yield _request(name if caption in held_out else caption, draw)


def seen_rows(pairs: Sequence[Pair], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Of each picture the request to draw it again: through both halves of the model."""
    for pair in pairs:
        asked = random.Random(f"{seed}-{pair.image}").choice(AGAIN)
        drawing = {"type": "drawing", "caption": pair.caption}
        yield {
            "images": [pair.image],
            "messages": [_said("user", f"<image>\n{asked}"), {"role": "assistant", "content": [drawing]}],
        }


def _request(caption: str, draw: random.Random) -> dict[str, Any]:
    request = draw.choice(REQUESTS).format(_noun(caption, draw))
    drawing = {"type": "drawing", "caption": caption}
    return {"messages": [_said("user", request), {"role": "assistant", "content": [drawing]}]}


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
