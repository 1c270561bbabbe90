#!/usr/bin/env python3
"""Holds the stand-in for ExecuTorch's Android library against the library's published sources.

    python android_demo/executorch_names.py CHECKOUT...          names what they lack
    python android_demo/executorch_names.py CHECKOUT... --write  writes executorch/NAMES.md if that is nothing

Public declarations are compared word by word: modifiers, names, parameters, defaults, types, values.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
STANDIN = HERE / "executorch" / "src" / "standin" / "kotlin" / "org" / "pytorch" / "executorch"
PUBLISHED = "extension/android/executorch_android/src/main/java/org/pytorch/executorch"
NAMES = HERE / "executorch" / "NAMES.md"
# What is behind the stand-in, and not of the library.
OWN = "PythonRuntime.kt"

COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
HIDDEN = re.compile(r"\b(private|internal|protected)\b")
TYPE = r"[\w<>?]+"
DECLARATION = re.compile(
    r"(?:@JvmStatic )?(?:@JvmOverloads )?"
    r"(?:(?:open|abstract|override|external|const|enum|private|internal) )*"
    rf"(?:fun \w+\([^()]*\)(?:: {TYPE})?"
    rf"|val \w+: {TYPE}(?= (?:@DoNotStrip )?get\(\))"
    r"|const val \w+ = \d+"
    r"|class \w+)"
    r"|\b[A-Z]\w+\(\d+\)(?=[,;])"
)


def declarations(file: Path) -> list[str]:
    """The public ones of a Kotlin file, each on one line."""
    text = re.sub(r"\s+", " ", COMMENT.sub("", file.read_text(encoding="utf-8")))
    text = text.replace("( ", "(").replace(", )", ")").replace(" )", ")")
    return [one[0] for one in DECLARATION.finditer(text) if not HIDDEN.search(one[0])]


def files() -> list[Path]:
    return [file for file in sorted(STANDIN.glob("*.kt")) if file.name != OWN]


def lacking(checkout: Path) -> Iterator[str]:
    """What the stand-in declares and the library does not."""
    for file in files():
        published = checkout / PUBLISHED / file.name
        known = set(declarations(published)) if published.is_file() else set()
        for declaration in declarations(file):
            if declaration not in known:
                yield f"{file.stem}: {declaration}"


def page(versions: list[str]) -> str:
    lines = [
        "# ExecuTorch's names in the stand-in",
        "",
        "Written by `python android_demo/executorch_names.py CHECKOUT... --write` from pytorch/executorch at",
        f"{', '.join(versions)},",
        f"under `{PUBLISHED}`.",
        "All declarations below stand there word for word.",
    ]
    for file in files():
        lines += ["", f"## {file.name}", ""] + [f"- `{declaration}`" for declaration in declarations(file)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", type=Path, nargs="+", help="folders, named as their versions")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = [f"{one.name}: {line}" for one in arguments.checkouts for line in lacking(one)]
    for line in found:
        print(f"not in {line}", file=sys.stderr)
    if found:
        return 1
    if arguments.write:
        NAMES.write_text(page([one.name for one in arguments.checkouts]), encoding="utf-8")
    count = sum(len(declarations(file)) for file in files())
    print(f"{count} declarations are in {len(arguments.checkouts)} versions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
