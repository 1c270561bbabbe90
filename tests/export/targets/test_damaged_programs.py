"""500 damaged ExecuTorch programs, and files that do not belong together: one line each, nothing loaded."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mobilemm.errors import MobileMMError
from mobilemm.runtime import pte
from mobilemm.runtime.bundle import Bundle, open_bundle
from mobilemm.runtime.pte import MOST_STEPS, PteError, read_pte
from tests.runtime.tiny_bundle import rehash

PROGRAM = "parts/model.pte"


@pytest.fixture
def folder(in_executorch: Bundle, tmp_path: Path) -> Path:
    """A copy, free to be changed."""
    return Path(shutil.copytree(in_executorch.folder, tmp_path / "bundle"))


def refused(folder: Path) -> str:
    with pytest.raises(MobileMMError) as raised:
        open_bundle(folder)
    text = str(raised.value)
    assert "\n" not in text
    assert text.startswith(str(folder))
    return text


def damaged(rng: random.Random, data: bytes, structure: int) -> bytes:
    """A bit, a number, a hole, two places exchanged, within the first `structure` bytes; or cut off."""
    changed, at = bytearray(data), rng.randrange(structure - 32)
    match rng.choice(["bit", "number", "hole", "exchange", "cut"]):
        case "bit":
            changed[at] ^= 1 << rng.randrange(8)
        case "number":
            at &= ~3
            numbers = (0, 1, 2**31 - 1, 2**32 - 1, rng.randrange(2**32), rng.randrange(structure))
            struct.pack_into("<I", changed, at, rng.choice(numbers))
        case "hole":
            changed[at : at + 16] = bytes(16)
        case "exchange":
            other = rng.randrange(structure - 32)
            changed[at : at + 16], changed[other : other + 16] = (
                changed[other : other + 16],
                changed[at : at + 16],
            )
        case "cut":
            del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def test_500_damaged_programs(in_executorch: Bundle, folder: Path) -> None:
    """By accident, where the hash shows it; on purpose, with its hash: then the structure, or it is whole."""
    rng = random.Random(0)
    data = (folder / PROGRAM).read_bytes()
    structure = struct.unpack_from("<Q", data, 16)[0]
    assert structure < len(data)
    for _ in range(100):
        (folder / PROGRAM).write_bytes(damaged(rng, data, len(data)))
        if (folder / PROGRAM).read_bytes() != data:
            assert PROGRAM in refused(folder)
    told: list[str] = []
    for _ in range(400):
        (folder / PROGRAM).write_bytes(damaged(rng, data, structure))
        rehash(folder)
        try:
            open_bundle(folder)
        except MobileMMError as error:
            told.append(str(error).removeprefix(str(folder)))
    assert all("\n" not in text and len(text) < 400 for text in told)
    assert len(told) > 200
    assert len({text[:60] for text in told}) > 20
    (folder / PROGRAM).write_bytes(data)
    rehash(folder)
    assert open_bundle(folder).manifest.parts.keys() == in_executorch.manifest.parts.keys()


@pytest.mark.parametrize(
    ("kind", "message"), [(1, "is not given what it takes"), (2, "a delegate is not given")]
)
def test_arguments_of_another_kind(folder: Path, kind: int, message: str) -> None:
    """An integer where a tensor is wanted, which the runtime would end the process for."""
    data = bytearray((folder / PROGRAM).read_bytes())
    reader = pte._Reader(bytes(data[: struct.unpack_from("<Q", data, 16)[0]]))
    program = pte._Table(reader, reader.follow(0))
    plan = next(plan for plan in program.tables(1) if plan.text(0) == "text_decoder")
    number = next(index for index, value in enumerate(plan.tables(2)) if value.number(0, "<B") == 2)
    calls = (
        one.table(1) for chain in plan.tables(5) for one in chain.tables(2) if one.number(0, "<B") == kind
    )
    call = next(call for call in calls if call is not None)
    place = call._field(1)
    assert place is not None
    struct.pack_into("<i", data, reader.vector(place, 4)[0], number)
    (folder / PROGRAM).write_bytes(data)
    rehash(folder)
    assert message in refused(folder)


def edit(folder: Path, change: Callable[[Any], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.json.sha256").unlink(missing_ok=True)


def longer_context(manifest: Any) -> None:
    manifest["model"]["context_length"] = 1024


def other_vocabulary(manifest: Any) -> None:
    manifest["model"]["vocab_size"] += 8
    manifest["parts"]["decoder"]["outputs"][0]["shape"][2] += 8


def other_end(manifest: Any) -> None:
    manifest["model"]["eos_token_ids"] = [3]


def other_picture(manifest: Any) -> None:
    manifest["image"]["height"] = manifest["image"]["width"] = 48
    manifest["parts"]["vision"]["inputs"][0]["shape"] = [1, 3, 48, 48]


def further_part(manifest: Any) -> None:
    manifest["parts"]["generator"] = manifest["parts"]["vision"]


def other_position(manifest: Any) -> None:
    manifest["parts"]["decoder"]["inputs"][1]["dtype"] = "int32"


def no_decoder(manifest: Any) -> None:
    del manifest["parts"]["decoder"]
    manifest["golden"] = [one for one in manifest["golden"] if one["part"] != "decoder"]


def next_schema(manifest: Any) -> None:
    manifest["schema_version"] = 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            longer_context,
            "method 'text_decoder': 'inputs_embeds' is float32 (1, 512, 64), where the manifest has",
        ),
        (other_vocabulary, "'logits' is float32 (1, 1, 363), where the manifest has float32 '(1, 1, 371)'"),
        (other_end, "get_eos_ids says other tokens than the manifest"),
        (other_picture, "'image' is uint8 (1, 3, 32, 32), where the manifest has uint8 '(1, 3, 48, 48)'"),
        (further_part, "the method 'generator' of part 'generator' is missing"),
        (other_position, "'cache_position' is int32, where int64 is expected"),
        (no_decoder, "the part 'decoder' is missing"),
        (next_schema, "format version 2 is newer than this mobilemm reads"),
    ],
)
def test_files_that_do_not_belong_together(folder: Path, change: Callable[[Any], None], message: str) -> None:
    edit(folder, change)
    assert message in refused(folder)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("picture", "pasture"))
    assert "damaged or changed" in refused(folder)


@pytest.mark.parametrize(
    ("name", "other", "message"),
    [
        (b"token_embedding", b"token_empedding", "the method 'token_embedding' of part 'embed' is missing"),
        (b"XnnpackBackend", b"XnnpackPacker1", "needs the backend 'XnnpackPacker1', which is unknown here"),
        (
            b"llama::custom_sdpa",
            b"shell::custom_sdpa",
            "calls 'shell::custom_sdpa.out', which is unknown here",
        ),
    ],
)
def test_other_names(folder: Path, name: bytes, other: bytes, message: str) -> None:
    data = (folder / PROGRAM).read_bytes()
    assert name in data
    (folder / PROGRAM).write_bytes(data.replace(name, other))
    rehash(folder)
    assert message in refused(folder)


def test_what_is_no_program(tmp_path: Path) -> None:
    for content in (b"", b"ET12", bytes(100), b"\x18\0\0\0ET12eh00" + bytes(100)):
        (tmp_path / "x.pte").write_bytes(content)
        with (tmp_path / "x.pte").open("rb") as file, pytest.raises(PteError):
            read_pte(file)


def test_structures_that_share_are_not_endless(tmp_path: Path) -> None:
    """Many methods with one long list of values: small in the file, without end to walk through."""
    flatbuffers = pytest.importorskip("flatbuffers")
    builder = flatbuffers.Builder(0)
    builder.StartObject(2)
    value = builder.EndObject()
    count = 20_000
    builder.StartVector(4, count, 4)
    for _ in range(count):
        builder.PrependUOffsetTRelative(value)
    values = builder.EndVector()
    name = builder.CreateString("m")
    builder.StartObject(10)
    builder.PrependUOffsetTRelativeSlot(0, name, 0)
    builder.PrependUOffsetTRelativeSlot(2, values, 0)
    plan = builder.EndObject()
    builder.StartVector(4, count, 4)
    for _ in range(count):
        builder.PrependUOffsetTRelative(plan)
    plans = builder.EndVector()
    builder.StartObject(8)
    builder.PrependUOffsetTRelativeSlot(1, plans, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"ET12")
    assert count * count > 10 * MOST_STEPS
    (tmp_path / "x.pte").write_bytes(bytes(builder.Output()))
    with (
        (tmp_path / "x.pte").open("rb") as file,
        pytest.raises(PteError, match=r"two methods|larger than any"),
    ):
        read_pte(file)
