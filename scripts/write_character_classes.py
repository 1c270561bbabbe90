"""Writes the apps' tables of letters, numbers and white space, as tokenizers class them.

    python scripts/write_character_classes.py

A phone's own tables are those of its system's version: a letter of a later Unicode would be cut otherwise
there and give other ids. The classes are asked of `tokenizers` itself, code point by code point.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, pre_tokenizers

ROOT = Path(__file__).parents[1]
KOTLIN = ROOT / "android_demo/core/src/main/kotlin/org/mobilemm/CharacterClasses.kt"
SWIFT = ROOT / "ios_demo/MobileMMKit/Sources/MobileMMKit/CharacterClasses.swift"
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


def lines_of(text: str) -> list[str]:
    """Lines of whole words; each but the last ends with a space."""
    lines, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) > 96:
            lines.append(line)
            line = ""
        line += word + " "
    return [*lines, line.rstrip()]


def main() -> None:
    tables = {
        "LETTERS": matching(r"\p{L}"),
        "NUMBERS": matching(r"\p{N}"),
        "DIGITS": digits(),
        "SPACES": matching(r"\s"),
    }
    write_kotlin({name: lines_of(packed(points)) for name, points in tables.items()})
    write_swift({name.lower(): lines_of(packed(points)) for name, points in tables.items()})


def write_kotlin(tables: dict[str, list[str]]) -> None:
    strings = {name: " +\n".join(f'            "{line}"' for line in lines) for name, lines in tables.items()}
    body = "\n\n".join(
        f"    private val {name} =\n        unpack(\n{text},\n        )" for name, text in strings.items()
    )
    KOTLIN.write_text(
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


def write_swift(tables: dict[str, list[str]]) -> None:
    body = "\n\n".join(
        f'    private static let {name} = unpack(\n        """\n'
        + "".join(f"        {line}\\\n" for line in lines[:-1])
        + f'        {lines[-1]}\n        """)'
        for name, lines in tables.items()
    )
    SWIFT.write_text(
        f"""/// Letters, numbers and white space as Hugging Face's tokenizers class them, on every system.
///
/// Written by scripts/write_character_classes.py; in `digits` is what the pre-tokenizer of that name cuts.
enum CharacterClasses {{
{body}

    /// `\\p{{L}}` of a tokenizer's regular expressions.
    static func isLetter(_ scalar: Unicode.Scalar) -> Bool {{ holds(letters, scalar) }}

    /// `\\p{{N}}`.
    static func isNumber(_ scalar: Unicode.Scalar) -> Bool {{ holds(numbers, scalar) }}

    /// What the pre-tokenizer `Digits` takes for one.
    static func isDigit(_ scalar: Unicode.Scalar) -> Bool {{ holds(digits, scalar) }}

    /// `\\s`.
    static func isSpace(_ scalar: Unicode.Scalar) -> Bool {{ holds(spaces, scalar) }}

    /// Whether one of the ranges, first and last point of each in turn, holds the point.
    private static func holds(_ ranges: [UInt32], _ scalar: Unicode.Scalar) -> Bool {{
        var (low, high) = (0, ranges.count / 2)
        while low < high {{
            let middle = (low + high) / 2
            if ranges[2 * middle + 1] < scalar.value {{ low = middle + 1 }} else {{ high = middle }}
        }}
        return low < ranges.count / 2 && ranges[2 * low] <= scalar.value
    }}

    /// Distance to the range before, and length, of each range, in base 36.
    private static func unpack(_ text: String) -> [UInt32] {{
        var last: UInt32 = 0
        return text.split(separator: " ").map {{ word in
            last += UInt32(word, radix: 36)!
            return last
        }}
    }}
}}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
