"""What an APK needs of Android, and whether it is there: looked up, not run.

Sources: the ELF specification (dynamic symbols), JNI's specification ("Resolving native method names"), and
the zip format's local headers.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from class_files import ClassFile, Member, read_class, read_jar

PREFIX = "android/"
LOAD = 1
DYNAMIC_SYMBOLS = 11
# The methods that every class and interface has.
OBJECT = {"getClass", "hashCode", "equals", "clone", "toString", "notify", "notifyAll", "wait", "finalize"}


class AndroidClasses:
    """The framework's own classes of one Android version."""

    def __init__(self, jar: Path) -> None:
        self.archive = zipfile.ZipFile(jar)
        self.names = set(self.archive.namelist())
        self._read: dict[str, ClassFile | None] = {}

    def find(self, name: str) -> ClassFile | None:
        if name not in self._read:
            entry = f"{name}.class"
            self._read[name] = read_class(self.archive.read(entry)) if entry in self.names else None
        return self._read[name]

    def has(self, owner: str, member: Member) -> bool:
        """Whether a class has a member, itself or from what it inherits."""
        found = self.find(owner)
        if found is None:
            # Java's own classes are not in this jar. What Object has is known; others are believed.
            return member[0] in OBJECT if owner == "java/lang/Object" else owner.startswith("java/")
        return member in found.members or any(self.has(parent, member) for parent in found.parents)

    def check(self, jars: Sequence[Path]) -> tuple[int, list[tuple[str, Member, set[str]]]]:
        """How many of these jars' references to android.* there are, and those that lead nowhere.

        A jar's own subclasses are followed up to the framework's class.
        """
        ours = {one.name: one for jar in jars for one in read_jar(jar)}
        asked: dict[tuple[str, Member], set[str]] = {}
        for one in ours.values():
            for owner, members in one.references.items():
                for member in members or {("", "")}:
                    for base in _bases(ours, owner, member):
                        asked.setdefault((base, member), set()).add(one.name)
        missing = [
            (owner, member, users)
            for (owner, member), users in sorted(asked.items())
            if (self.find(owner) is None) or (member != ("", "") and not self.has(owner, member))
        ]
        return len(asked), missing


def _bases(ours: dict[str, ClassFile], owner: str, member: Member) -> Iterator[str]:
    """The framework's classes in which a reference is to be looked for."""
    if owner.startswith(PREFIX):
        yield owner
    elif owner in ours and member[0] not in ("", "<init>") and member not in ours[owner].members:
        parents = ours[owner].parents
        # An interface beside a superclass may have it: only a lone line of parents says where it must be.
        if len(parents) == 1:
            yield from _bases(ours, parents[0], member)


def libraries(apk: Path, abi: str) -> dict[str, set[str]]:
    """The symbols that each library of an ABI exports."""
    with zipfile.ZipFile(apk) as archive:
        names = [name for name in archive.namelist() if name.startswith(f"lib/{abi}/")]
        return {name: exported(archive.read(name)) for name in names}


def exported(data: bytes) -> set[str]:
    """The dynamic symbols that a 64-bit little-endian ELF file defines."""
    sections, size, count = (
        struct.unpack_from("<Q", data, 40)[0],
        *struct.unpack_from("<HH", data, 58),
    )
    found = set()
    for index in range(count):
        at = sections + index * size
        kind, start, length, link = (
            struct.unpack_from("<I", data, at + 4)[0],
            *struct.unpack_from("<QQ", data, at + 24),
            struct.unpack_from("<I", data, at + 40)[0],
        )
        if kind != DYNAMIC_SYMBOLS:
            continue
        strings = struct.unpack_from("<Q", data, sections + link * size + 24)[0]
        for symbol in range(start, start + length, 24):
            name, _, _, section = struct.unpack_from("<IBBH", data, symbol)
            if section:
                end = data.index(b"\0", strings + name)
                found.add(data[strings + name : end].decode())
    return found


def is_exported(native: tuple[str, str], found: dict[str, set[str]]) -> bool:
    """Whether a native method (class, name) has its function in one of the libraries."""
    escaped = ["_".join(_escaped(word) for word in part.split("/")) for part in native]
    symbol = f"Java_{escaped[0]}_{escaped[1]}"
    return any(
        symbol in names or any(name.startswith(f"{symbol}__") for name in names) for names in found.values()
    )


def _escaped(word: str) -> str:
    return "".join(
        char if char.isascii() and char.isalnum() else "_1" if char == "_" else f"_0{ord(char):04x}"
        for char in word
    )


def alignments(apk: Path) -> Iterable[tuple[str, int, int]]:
    """Each library's place in the APK and the least alignment of its loaded segments."""
    with zipfile.ZipFile(apk) as archive, apk.open("rb") as file:
        for entry in archive.infolist():
            if not entry.filename.endswith(".so"):
                continue
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            offset = entry.header_offset + 30 + name + extra
            data = archive.read(entry)
            headers, size, count = (
                struct.unpack_from("<Q", data, 32)[0],
                *struct.unpack_from("<HH", data, 54),
            )
            segments = [headers + index * size for index in range(count)]
            loads = [at for at in segments if struct.unpack_from("<I", data, at)[0] == LOAD]
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            yield entry.filename, offset, min(struct.unpack_from("<Q", data, at + 48)[0] for at in loads)
