"""Writes the Android core's table of letters, numbers and white space, as tokenizers class them.

    python scripts/write_character_classes.py

A phone's own tables are those of its Android version: a letter of a later Unicode would be cut otherwise
there and give other ids. The classes are asked of `tokenizers` itself, code point by code point.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, pre_tokenizers

FILE = Path(__file__).parents[1] / "android_demo/core/src/main/kotlin/org/mobilemm/CharacterClasses.kt"
CODE_POINTS = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
PIECE = 4096
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def matching(pattern: str) -> set[int]:
    """The code points that this class of a regular expression holds."""
    remove = pre_tokenizers.Split(Regex(pattern), "removed")
    found = set()
    for start in range(0, len(CODE_POINTS), PIECE):
        points = CODE_POINTS[start : start + PIECE]
        kept = {char for piece, _ in remove.pre_tokenize_str("".join(map(chr, points))) for char in piece}
        found.update(point for point in points if chr(point) not in kept)
    return found


def digits() -> set[int]:
    """Those that the pre-tokenizer `Digits` cuts off; its table is not the regular expressions'."""
    cut = pre_tokenizers.Digits(individual_digits=True)
    return {
        ord(piece)
        for start in range(0, len(CODE_POINTS), PIECE)
        for text in ["".join(f"a{chr(point)}" for point in CODE_POINTS[start : start + PIECE])]
        for piece, _ in cut.pre_tokenize_str(text)
        if len(piece) == 1
    } - {ord("a")}


def ranges(points: Iterable[int]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for point in sorted(points):
        if found and found[-1][1] == point - 1:
            found[-1] = (found[-1][0], point)
        else:
            found.append((point, point))
    return found


def base36(number: int) -> str:
    text = ""
    while True:
        number, rest = divmod(number, 36)
        text = DIGITS[rest] + text
        if not number:
            return text


def packed(points: set[int]) -> str:
    """Distance to the range before, and length, of each range, in base 36."""
    words, last = [], 0
    for first, end in ranges(points):
        words += [base36(first - last), base36(end - first)]
        last = end
    return " ".join(words)


def kotlin_string(text: str) -> str:
    lines, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) > 96:
            lines.append(line)
            line = ""
        line += word + " "
    lines.append(line.rstrip())
    return " +\n".join(f'            "{line}"' for line in lines)


def main() -> None:
    tables = {
        "LETTERS": matching(r"\p{L}"),
        "NUMBERS": matching(r"\p{N}"),
        "DIGITS": digits(),
        "SPACES": matching(r"\s"),
    }
    body = "\n\n".join(
        f"    private val {name} =\n        unpack(\n{kotlin_string(packed(points))},\n        )"
        for name, points in tables.items()
    )
    FILE.write_text(
        f"""package org.mobilemm

/**
 * Letters, numbers and white space as Hugging Face's tokenizers class them, on every Android version.
 *
 * Written by scripts/write_character_classes.py; in [DIGITS] is what the pre-tokenizer of that name cuts off.
 */
internal object CharacterClasses {{
{body}

    /** `\\p{{L}}` of a tokenizer's regular expressions. */
    fun isLetter(point: Int) = holds(LETTERS, point)

    /** `\\p{{N}}`. */
    fun isNumber(point: Int) = holds(NUMBERS, point)

    /** What the pre-tokenizer `Digits` takes for one. */
    fun isDigit(point: Int) = holds(DIGITS, point)

    /** `\\s`. */
    fun isSpace(point: Int) = holds(SPACES, point)

    /** Whether one of the ranges, first and last point of each in turn, holds the point. */
    private fun holds(
        ranges: IntArray,
        point: Int,
    ): Boolean {{
        val found = ranges.binarySearch(point)
        return found >= 0 || (-found - 1) % 2 == 1
    }}

    /** Distance to the range before, and length, of each range, in base 36. */
    private fun unpack(text: String): IntArray {{
        var last = 0
        return text.split(' ').map {{ word -> last += word.toInt(36); last }}.toIntArray()
    }}
}}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
