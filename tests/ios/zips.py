"""Zip files of a bundle, honest and hostile: what the Swift package imports, and what it must refuse.

    python -m tests.ios.zips BUNDLE FOLDER

Python's zipfile writes them; what it would not write is changed in its bytes. `zips.json` tells of each
whether it is one to import, and a word of the message otherwise.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

RANDOM = 500
CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
LONG_AGO = (1980, 1, 1, 0, 0, 0)

Files = dict[str, bytes]


def packed(files: Files, method: int = zipfile.ZIP_DEFLATED, top: str = "", zip64: bool = False) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(top + name, LONG_AGO)
            info.compress_type = method
            with archive.open(info, "w", force_zip64=zip64) as entry:
                entry.write(data)
    return target.getvalue()


class Unseekable(io.BytesIO):
    """Makes zipfile write sizes behind the data, as streams have them."""

    def tell(self) -> int:
        raise io.UnsupportedOperation("tell")


def streamed(files: Files) -> bytes:
    target = Unseekable()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name, LONG_AGO), data, zipfile.ZIP_DEFLATED)
    return target.getvalue()


def linked(files: Files, name: str, to: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for other, data in files.items():
            info = zipfile.ZipInfo(other, LONG_AGO)
            if other == name:
                info.create_system = 3
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                data = to.encode()
            archive.writestr(info, data)
    return target.getvalue()


def changed(data: bytes, name: str, where: bytes, offset: int, value: bytes) -> bytes:
    """One field of a file's header, in the directory (CENTRAL) or before its data (LOCAL)."""
    at = -1
    while (at := data.find(where, at + 1)) >= 0:
        start = at + (46 if where == CENTRAL else 30)
        if data[start : start + len(name)] == name.encode():
            return data[: at + offset] + value + data[at + offset + len(value) :]
    raise ValueError(name)


def ending(data: bytes, offset: int, value: bytes) -> bytes:
    at = data.rfind(END)
    return data[: at + offset] + value + data[at + offset + len(value) :]


def number(value: int, size: int = 4) -> bytes:
    return value.to_bytes(size, "little")


def overlapping(files: Files, name: str, other: str) -> bytes:
    """One file's bytes stand for two."""
    data = packed({**files, other: files[name]}, zipfile.ZIP_STORED)
    at = data.find(LOCAL)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        at = archive.getinfo(name).header_offset
    return changed(data, other, CENTRAL, 42, number(at))


def good(files: Files) -> dict[str, bytes]:
    bundle = packed(files)
    left_behind: Files = {"__MACOSX/._manifest.json": b"x", ".DS_Store": b"x"}
    return {
        "deflated": bundle,
        "stored": packed(files, zipfile.ZIP_STORED),
        "in_a_folder": packed(files, top="my bundle/"),
        "with_what_file_managers_leave": packed({**left_behind, **files}),
        "zip64": packed(files, zip64=True),
        "streamed": streamed(files),
        "with_a_comment": ending(bundle, 20, number(5, 2)) + b"hello",
        "with_folders": packed({"parts/": b"", **files}, zipfile.ZIP_STORED),
    }


def hostile(files: Files) -> dict[str, tuple[bytes, str]]:
    """Each with a word that the message must have."""
    bundle, stored = packed(files), packed(files, zipfile.ZIP_STORED)
    name, size = "tokenizer.json", len(files["tokenizer.json"])
    outside = ("../evil", "/tmp/evil", "parts/../../evil", "C:\\evil", "parts\\..\\evil", "parts/./evil", "é")
    zeros = bytes(64 << 20)
    bomb = packed({**files, name: zeros})
    wide = {f"parts/{index}": b"" for index in range(10_001)}
    vast = {key: files[key] for key in files if key != "manifest.json.sha256"}
    vast["manifest.json"] = vast["manifest.json"].replace(
        f'"bytes": {size},'.encode(), b'"bytes": 1000000000000,'
    )
    cases = {
        f"outside_{index}": (packed({**files, path: b"evil"}), "no plain path")
        for index, path in enumerate(outside)
    }
    return cases | {
        "outside_of_the_top": (packed({**{f"top/{key}": files[key] for key in files}, "evil": b""}), "plain"),
        "a_zero_in_a_name": (stored.replace(name.encode(), b"tokenize\0.json"), "plain path"),
        "a_name_that_is_no_utf8": (stored.replace(name.encode(), b"tokenize\xff.json"), "plain path"),
        "a_link": (linked(files, name, "/etc/passwd"), "manifest says"),
        "a_link_of_the_right_size": (linked(files, name, "/" * size), "is a link"),
        "the_same_name_twice": (packed({**files, "tokenizer.jso_": b"1"}).replace(b"jso_", b"json"), "twice"),
        "encrypted": (changed(bundle, name, CENTRAL, 8, number(1, 2)), "is encrypted"),
        "bzip2": (packed(files, zipfile.ZIP_BZIP2), "method 12"),
        "lzma": (packed(files, zipfile.ZIP_LZMA), "method 14"),
        "a_bomb": (bomb, f"has {len(zeros)} bytes"),
        "a_bomb_that_lies": (changed(bomb, name, CENTRAL, 24, number(size)), "longer than"),
        "a_manifest_without_end": (packed({**files, "manifest.json": b" " * (17 << 20)}), "too large"),
        "a_manifest_that_asks_for_all": (packed(vast), "says 1000000000000"),
        "overlapping": (overlapping(files, name, "tokenizer.copy"), "overlap"),
        "shorter_than_declared": (
            changed(packed({**files, name: files[name][:-1]}), name, CENTRAL, 24, number(size)),
            "declares",
        ),
        "stored_shorter": (changed(stored, name, CENTRAL, 20, number(size - 1)), "is damaged"),
        "another_checksum": (changed(bundle, name, CENTRAL, 16, number(1)), "checksum"),
        "other_content": (packed({**files, name: files[name][::-1]}), "SHA-256"),
        "no_deflate": (changed(stored, name, CENTRAL, 10, number(8, 2)), "is damaged"),
        "without_a_file": (packed({key: files[key] for key in files if key != name}), "lacks"),
        "with_another_file": (packed({**files, "evil": b""}), "does not list"),
        "without_a_manifest": (
            packed({key: files[key] for key in files if key != "manifest.json"}),
            "no bundle",
        ),
        "too_deep": (packed(files, top="a/b/"), "no bundle"),
        "too_many_files": (packed({**files, **wide}), "10000 files"),
        "nothing": (packed({}), "no bundle"),
        "empty": (b"", "no zip file"),
        "text": (b"hello, this is no zip file" * 10, "no zip file"),
        "cut": (bundle[: len(bundle) // 2], "no zip file"),
        "without_its_end": (bundle[:-30], "no zip file"),
        "something_behind": (bundle + b"x", "no zip file"),
        "something_before": (b"x" + bundle, "no zip file"),
        "a_directory_elsewhere": (ending(bundle, 16, number(3)), "no zip file"),
        "more_entries_than_there_are": (ending(bundle, 10, number(500, 2)), "no zip file"),
        "fewer_entries_than_there_are": (ending(bundle, 10, number(1, 2)), "no zip file"),
        "several_disks": (ending(bundle, 4, number(1, 2)), "disks"),
        "an_entry_far_away": (changed(bundle, name, CENTRAL, 42, number(0x7FFFFFFF)), "no zip file"),
        "an_entry_without_header": (changed(bundle, name, LOCAL, 0, b"PKxx"), "no zip file"),
        "an_entry_into_the_directory": (
            changed(bundle, name, CENTRAL, 20, number(0x7FFFFFFF)),
            "no zip file",
        ),
        "zip64_without_numbers": (changed(bundle, name, CENTRAL, 20, number(0xFFFFFFFF)), "no zip file"),
        "zip64_out_of_range": (huge64(files), "no zip file"),
    }


def huge64(files: Files) -> bytes:
    """The end record refers to one of zip64 whose numbers are absurd."""
    data = packed(files)
    at = data.rfind(END)
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, 2**63, 2**64 - 1)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, at, 1)
    end = data[at:]
    return data[:at] + record + locator + end[:10] + b"\xff\xff" + end[12:]


def at_random(data: bytes, draw: random.Random) -> bytes:
    """One bit, some bytes or the end: refused, or nothing that matters has changed."""

    def flip() -> bytes:
        at = draw.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]

    def overwrite() -> bytes:
        at = draw.randrange(len(data))
        some = draw.randbytes(draw.randint(1, 64))
        return (data[:at] + some + data[at + len(some) :])[: len(data)]

    def flip_in_directory() -> bytes:
        at = draw.randrange(data.find(CENTRAL), len(data))
        return data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]

    def cut() -> bytes:
        return data[: draw.randrange(len(data))]

    kinds: list[Callable[[], bytes]] = [flip, overwrite, flip_in_directory, flip_in_directory, cut]
    return draw.choice(kinds)()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    files = {
        path.relative_to(arguments.bundle).as_posix(): path.read_bytes()
        for path in sorted(arguments.bundle.rglob("*"))
        if path.is_file()
    }
    cases = []

    def write(name: str, data: bytes, imports: bool | None, word: str = "") -> None:
        (arguments.folder / f"{name}.zip").write_bytes(data)
        cases.append({"file": f"{name}.zip", "imports": imports, "word": word})

    for name, data in good(files).items():
        write(name, data, True)
    for name, (data, word) in hostile(files).items():
        write(name, data, False, word)
    draw = random.Random(0)
    whole = packed(files), packed(files, zipfile.ZIP_STORED)
    for index in range(RANDOM):
        write(f"random-{index}", at_random(whole[index % 2], draw), None)
    (arguments.folder / "zips.json").write_text(json.dumps(cases), encoding="utf-8")
    print(f"zip files: {len(cases)} in {arguments.folder}")


if __name__ == "__main__":
    main()
