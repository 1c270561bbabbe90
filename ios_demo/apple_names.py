#!/usr/bin/env python3
"""Looks the stand-ins' names up in published metadata of Apple's frameworks, and writes StandIns/NAMES.md.

    python ios_demo/apple_names.py            # fails when NAMES.md is not what is found
    python ios_demo/apple_names.py --write

The metadata are NativeScript's type definitions, made from Apple's Objective-C headers, out of an npm
package; they tell the first iOS version of each name, types of properties, parameters and results, and
values of constants. What is Swift alone (SwiftUI, Charts, App Intents, CryptoKit, parts of Core ML) is in no
such metadata, and is listed as unconfirmed. ExecuTorch is not Apple's, and not looked up here.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
import tempfile
from pathlib import Path

from toolchain import TRIES, BuildError, run

HERE = Path(__file__).resolve().parent
STAND_INS = HERE / "MobileMMKit" / "StandIns"
FOUND = STAND_INS / "NAMES.md"
PACKAGE = "@nativescript/types-ios@9.1.2"
SHA256 = "1c917c0945f304eae6b96d41a623c4c9c875e567d1666fa5a8fd69b0d16c2672"
# Here for themselves: how the stand-in of Core ML answers.
OWN = {"Recording.swift"}
OTHERS = {"ExecuTorch"}

TYPE = re.compile(r"^(?:@\w+ )*(?:public|open) (?:final )?(class|struct|enum|protocol|extension) (\w+)")
MEMBER = re.compile(
    r"^\s*(?:@\w+ )*(?:public |open )?(?:weak )?(?:static |class )?"
    r"(?:(var|let) (\w+)|(func) (\w+)\(\s*(\w*)|(init)\??\(\s*(\w*)|(case) (\w+))"
)
GLOBAL = re.compile(r"^public (?:func|let|var|typealias) (\w+)")


def fetch(folder: Path) -> dict[str, str]:
    """Definitions by framework."""
    run(["npm", "pack", "--silent", "--pack-destination", folder, PACKAGE], tries=TRIES)
    (archive,) = folder.glob("*.tgz")
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise BuildError(f"{archive.name}: is not the package that this was written for")
    found = {}
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            if name := re.fullmatch(r".*/objc-x86_64/objc!(\w+)\.d\.ts", member.name):
                file = opened.extractfile(member)
                assert file is not None
                found[name[1]] = file.read().decode()
    return found


class Definitions:
    """Names of one framework, and the iOS version that they came with."""

    def __init__(self, text: str) -> None:
        self.types: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.members: dict[str, dict[str, str]] = {}
        self.declared: dict[tuple[str, str], str] = {}
        since, inside = "", ""
        for line in text.splitlines():
            if version := re.search(r"@since ([\d.]+)", line):
                since = version[1]
                continue
            kind = re.match(r"(?:declare )?(?:const )?(?:class|interface|enum|function|var) (\w+)", line)
            if word := re.match(r"(?:declare )?(?:const )?(class|interface|enum) (\w+)", line):
                self.kinds.setdefault(word[2], word[1])
            member = re.match(r"\t(?:static |readonly )*(\w+)", line)
            if kind:
                self.types.setdefault(kind[1], since)
                inside = kind[1] if line.endswith("{") else ""
                self.members.setdefault(inside, {})
            elif member and inside:
                self.members[inside].setdefault(member[1], since)
                self.declared.setdefault((inside, member[1]), line.strip())
            if not line.strip().startswith(("/*", "*")):
                since = ""

    def member(self, of: str, name: str, label: str) -> tuple[str, str] | None:
        """The Objective-C name and its version: Swift's name, its first label, prefixes of constants."""
        members = self.members.get(of, {})
        if name == "init":
            for found, since in members.items():
                if f"with{label}".lower() in found.lower() and label:
                    return found, since
            return None
        joined = name if label in ("", "_") else name + label[:1].upper() + label[1:]
        for wanted in (joined, f"{name}With{joined[len(name) :]}", of + name[:1].upper() + name[1:], name):
            for found, since in members.items():
                if found.lower() == wanted.lower() or (len(wanted) > 3 and found.startswith(wanted)):
                    return found, since
        return None


# Swift's kinds of types and how the metadata have them; sets of options are structs in Swift.
KINDS = {("class", "class"), ("enum", "enum"), ("struct", "enum"), ("protocol", "interface")}
# Swift's own types, over classes.
REFINED = {("struct", "class"), ("enum", "class")}
PLAIN = {
    "Int": "number",
    "NSNumber": "number",
    "Bool": "boolean",
    "String": "string",
    "URL": "NSURL",
    "Any": "any",
}


def pieces(text: str) -> list[str]:
    """What commas part, outside of all brackets."""
    found, depth = [""], 0
    for char in re.sub(r"[-=]>", "→", text):
        depth += (char in "([{<") - (char in ")]}>")
        if char == "," and depth == 0:
            found.append("")
        else:
            found[-1] += char
    return [piece.strip() for piece in found if piece.strip()]


def objective_c(swift: str) -> str:
    """A Swift type as the metadata write it, without its nullability."""
    text = swift.strip().removeprefix("any ").removesuffix("?")
    if text.startswith("[") and text.endswith("]"):
        key, _, value = text[1:-1].partition(": ")
        return (
            f"NSDictionary<{objective_c(key)},{objective_c(value)}>"
            if value
            else f"NSArray<{objective_c(key)}>"
        )
    if inner := re.fullmatch(r"Set<(.*)>", text):
        return f"NSSet<{objective_c(inner[1])}>"
    return PLAIN.get(text, text)


def swift_types(line: str) -> list[str] | None:
    """Of parameters and the result; of a constant its value; None where the line does not tell."""
    if constant := re.search(r"\bcase \w+ = (\d+)$", line):
        return [constant[1]]
    if call := re.search(r"\b(?:func \w+|init)\((.*?)\)(?: async)?(?: throws)?(?: -> (.*?))?(?: \{|$)", line):
        types = [piece.partition(": ")[2].partition(" = ")[0] for piece in pieces(call[1])]
        return [objective_c(one) for one in [*types, *([call[2]] if call[2] else [])]]
    if value := re.search(r"\b(?:var|let) \w+: (.*?)(?: = | \{|$)", line):
        return [objective_c(value[1])]
    return None


def metadata_types(line: str, is_init: bool) -> list[str] | None:
    """Likewise, of an Objective-C member; a completion handler's first value is the result."""

    def plain(text: str) -> str:
        return text.partition(" | ")[0].replace(" ", "")

    if constant := re.fullmatch(r"\w+ = (\d+),?", line):
        return [constant[1]]
    if call := re.match(r"(?:static )?\w+\((.*)\): (\w.*?);", line):
        types, result = [], plain(call[2])
        for piece in pieces(call[1]):
            name, _, text = piece.partition(": ")
            if handler := re.match(r"\(p1: (.*?)(?:, p2|\))", text):
                result = plain(handler[1])
            elif name != "error?":
                types.append(plain(text))
        return types if is_init else [*types, result]
    if value := re.match(r"(?:static )?(?:readonly )?\w+: (.*?);", line):
        return [plain(value[1])]
    return None


def agreement(of: str, name: str, swift: str, metadata: str) -> str:
    """Whether the types are the "same" or "other" ones; "" where one of the two does not tell."""
    ours, theirs = swift_types(swift), metadata_types(metadata, name == "init")
    if ours is None or theirs is None or "any" in theirs:
        return ""
    # Types inside of others have both names in Objective-C.
    same = len(ours) == len(theirs) and all(
        mine in (their, their.removeprefix(of)) for mine, their in zip(ours, theirs, strict=True)
    )
    return "same" if same else "other"


def stand_in_names(module: str) -> dict[tuple[str, str, str], str]:
    """(type or "", name, first label) of what the stand-in declares, and how."""
    found: dict[tuple[str, str, str], str] = {}
    for file in sorted((STAND_INS / module).glob("*.swift")):
        if file.name in OWN:
            continue
        inside = ""
        for line in file.read_text(encoding="utf-8").splitlines():
            if kind := TYPE.match(line):
                inside = kind[2]
                if kind[1] != "extension":
                    found.setdefault(("", inside, ""), kind[1])
            elif name := GLOBAL.match(line):
                inside = ""
                found.setdefault(("", name[1], ""), "")
            elif line.startswith("}"):
                inside = ""
            elif inside and re.match(r" {4}\S", line) and (name := MEMBER.match(line)):
                if "private" in line or ("public" not in line and "open" not in line and not name[8]):
                    continue
                text = name[2] or name[4] or name[6] or name[9]
                found.setdefault((inside, text, name[5] or name[7] or ""), line.strip())
    return found


def report(definitions: dict[str, str]) -> str:
    confirmed, unconfirmed, others, typed = [], [], [], 0
    for folder in sorted(path for path in STAND_INS.iterdir() if path.is_dir() and path.name not in OTHERS):
        known = Definitions(definitions.get(folder.name, ""))
        for (of, name, label), declared in stand_in_names(folder.name).items():
            swift = f"{of}.{name}" if of else name
            swift += f"({label}:)" if label else ""
            if of:
                match = known.member(of, name, label)
                told = agreement(of, name, declared, known.declared.get((of, match[0]), "")) if match else ""
            else:
                match = (name, known.types[name]) if name in known.types else None
                kinds = (declared, known.kinds.get(name, ""))
                told = "same" if kinds in KINDS else "" if not all(kinds) or kinds in REFINED else "other"
            if match is None:
                unconfirmed.append(f"- {folder.name}: `{swift}`")
                continue
            typed += told == "same"
            confirmed.append(f"| {folder.name} | `{swift}` | `{match[0]}` | {match[1]} | {told} |")
            if told == "other":
                others.append(f"{swift}: {declared}")
    if others:
        raise BuildError(f"of another type in Apple's metadata: {'; '.join(others)}")
    return "\n".join(
        [
            "# Apple's names in the stand-ins",
            "",
            f"Written by `python ios_demo/apple_names.py --write` from npm's {PACKAGE}.",
            "An empty version is that of the type, or one that the metadata do not tell. Types are those of",
            "properties, parameters and results, values of constants, and of a type whether it is a class,",
            "an enum or a protocol; where there is none, it is as unconfirmed as the names below.",
            "",
            f"## Confirmed: {len(confirmed)}",
            "",
            f"By type, too: {typed}.",
            "",
            "| module | in Swift | in Objective-C | first iOS | type |",
            "|---|---|---|---|---|",
            *confirmed,
            "",
            f"## Unconfirmed: {len(unconfirmed)}",
            "",
            "Swift's own, of which no metadata are published, or named otherwise in Objective-C:",
            "",
            *unconfirmed,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write what is found")
    write = parser.parse_args().write
    try:
        with tempfile.TemporaryDirectory() as folder:
            found = report(fetch(Path(folder)))
    except BuildError as error:
        sys.exit(f"error: {error}")
    if write:
        FOUND.write_text(found, encoding="utf-8")
    elif not FOUND.is_file() or FOUND.read_text(encoding="utf-8") != found:
        sys.exit(f"error: {FOUND.name} is not what is found; write it anew with --write, and look at it")
    print("; ".join(line[3:] for line in found.splitlines() if line.startswith("## ")))


if __name__ == "__main__":
    main()
