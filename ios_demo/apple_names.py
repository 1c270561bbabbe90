#!/usr/bin/env python3
"""Looks the stand-ins' names up in published metadata of Apple's frameworks, and writes StandIns/NAMES.md.

    python ios_demo/apple_names.py            # fails when NAMES.md is not what is found
    python ios_demo/apple_names.py --write

The metadata are NativeScript's type definitions, made from Apple's Objective-C headers, out of an npm
package; they tell the first iOS version of each name. What is Swift alone (SwiftUI, Charts, App Intents,
CryptoKit, parts of Core ML) is in no such metadata, and is listed as unconfirmed.
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
        self.members: dict[str, dict[str, str]] = {}
        since, inside = "", ""
        for line in text.splitlines():
            if version := re.search(r"@since ([\d.]+)", line):
                since = version[1]
                continue
            kind = re.match(r"(?:declare )?(?:const )?(?:class|interface|enum|function|var) (\w+)", line)
            member = re.match(r"\t(?:static |readonly )*(\w+)", line)
            if kind:
                self.types.setdefault(kind[1], since)
                inside = kind[1] if line.endswith("{") else ""
                self.members.setdefault(inside, {})
            elif member and inside:
                self.members[inside].setdefault(member[1], since)
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


def stand_in_names(module: str) -> list[tuple[str, str, str]]:
    """(type or "", name, first label) of what the stand-in declares."""
    found: list[tuple[str, str, str]] = []
    for file in sorted((STAND_INS / module).glob("*.swift")):
        if file.name in OWN:
            continue
        inside = ""
        for line in file.read_text(encoding="utf-8").splitlines():
            if kind := TYPE.match(line):
                inside = kind[2]
                if kind[1] != "extension":
                    found.append(("", inside, ""))
            elif name := GLOBAL.match(line):
                inside = ""
                found.append(("", name[1], ""))
            elif line.startswith("}"):
                inside = ""
            elif inside and re.match(r" {4}\S", line) and (name := MEMBER.match(line)):
                if "private" in line or ("public" not in line and "open" not in line and not name[8]):
                    continue
                text = name[2] or name[4] or name[6] or name[9]
                found.append((inside, text, name[5] or name[7] or ""))
    return found


def report(definitions: dict[str, str]) -> str:
    confirmed, unconfirmed = [], []
    for folder in sorted(path for path in STAND_INS.iterdir() if path.is_dir()):
        known = Definitions(definitions.get(folder.name, ""))
        for of, name, label in dict.fromkeys(stand_in_names(folder.name)):
            swift = f"{of}.{name}" if of else name
            swift += f"({label}:)" if label else ""
            if of:
                match = known.member(of, name, label)
            else:
                match = (name, known.types[name]) if name in known.types else None
            if match is None:
                unconfirmed.append(f"- {folder.name}: `{swift}`")
            else:
                confirmed.append(f"| {folder.name} | `{swift}` | `{match[0]}` | {match[1]} |")
    return "\n".join(
        [
            "# Apple's names in the stand-ins",
            "",
            f"Written by `python ios_demo/apple_names.py --write` from npm's {PACKAGE}.",
            "An empty version is that of the type, or one that the metadata do not tell.",
            "",
            f"## Confirmed: {len(confirmed)}",
            "",
            "| module | in Swift | in Objective-C | first iOS |",
            "|---|---|---|---|",
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
