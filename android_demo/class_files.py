"""Java class files: what they define, and what of others they name.

Source: The Java Virtual Machine Specification, chapter 4.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONSTANT_SIZES = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4, 15: 3, 16: 2, 17: 4, 18: 4}
UTF8, CLASS, FIELD, METHOD, INTERFACE_METHOD, NAME_AND_TYPE = 1, 7, 9, 10, 11, 12
NATIVE = 0x0100

Member = tuple[str, str]


@dataclass(frozen=True)
class ClassFile:
    """Names have slashes, as in the file. A member is its name and its descriptor.

    Attributes:
        parents: the superclass and the interfaces.
        members: fields and methods that it defines; `natives` those of them that are native.
        references: class → members that are named, () where the class alone is.
    """

    name: str
    parents: tuple[str, ...]
    members: frozenset[Member]
    natives: frozenset[Member]
    references: dict[str, set[Member]]


def read_class(data: bytes) -> ClassFile:
    """Raises ValueError for what is no class file."""
    if data[:4] != b"\xca\xfe\xba\xbe":
        raise ValueError("no class file")
    (count,) = struct.unpack_from(">H", data, 8)
    pool: list[tuple[int, bytes]] = [(0, b"")] * count
    at, index = 10, 1
    while index < count:
        tag = data[at]
        size = 2 + struct.unpack_from(">H", data, at + 1)[0] if tag == UTF8 else CONSTANT_SIZES[tag]
        pool[index] = (tag, data[at + 1 : at + 1 + size])
        at += 1 + size
        index += 2 if tag in (5, 6) else 1

    def text(place: int) -> str:
        return pool[place][1][2:].decode("utf-8", "replace")

    def two(place: int) -> tuple[int, int]:
        first, second = struct.unpack(">HH", pool[place][1])
        return first, second

    def class_name(place: int) -> str:
        return text(struct.unpack(">H", pool[place][1])[0])

    references: dict[str, set[Member]] = {}
    for place, (tag, _) in enumerate(pool):
        if tag == CLASS:
            name = class_name(place)
            if not name.startswith("["):
                references.setdefault(name, set())
        elif tag in (FIELD, METHOD, INTERFACE_METHOD):
            owner, member = two(place)
            name, kind = two(member)
            if not class_name(owner).startswith("["):
                references.setdefault(class_name(owner), set()).add((text(name), text(kind)))
    this, parent, interfaces = struct.unpack_from(">HHH", data, at + 2)
    at += 8
    parents = [class_name(parent)] if parent else []
    parents += [class_name(struct.unpack_from(">H", data, at + 2 * one)[0]) for one in range(interfaces)]
    at += 2 * interfaces
    members, natives = set(), set()
    for _ in range(2):  # fields, then methods
        (number,) = struct.unpack_from(">H", data, at)
        at += 2
        for _ in range(number):
            flags, name, kind, attributes = struct.unpack_from(">HHHH", data, at)
            at += 8
            members.add((text(name), text(kind)))
            if flags & NATIVE:
                natives.add((text(name), text(kind)))
            for _ in range(attributes):
                at += 6 + struct.unpack_from(">I", data, at + 2)[0]
    return ClassFile(class_name(this), tuple(parents), frozenset(members), frozenset(natives), references)


def read_jar(path: Path, prefix: str = "") -> Iterator[ClassFile]:
    """The classes of a jar whose names begin with `prefix`."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".class") and name.startswith(prefix) and not name.startswith("META-INF/"):
                yield read_class(archive.read(name))
