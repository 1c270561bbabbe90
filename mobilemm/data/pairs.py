"""Picture–caption pairs for the first alignment of vision and language, built from packages of drawings.

A folder of pairs is `pairs.jsonl`, one row a picture, and `images/<source>/….png`: RGB on white, longest
side 320 px. `scripts/fetch_pairs.py` fetches the packages, `build_pairs` renders them, `read_pairs`
reads the rows.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mobilemm.data.captions import (
    ALWAYS_TRAINED_GROUPS,
    HELD_OUT_GROUPS,
    TITLE_WORDS,
    clipart_caption,
    emoji_caption,
    group_of,
)
from mobilemm.errors import MobileMMError

if TYPE_CHECKING:
    from PIL import Image

LONGEST_SIDE = 320
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pair:
    """One picture and its caption; `image` is relative to the folder of pairs."""

    image: str
    caption: str
    keywords: tuple[str, ...]
    group: str
    source: str
    license: str
    split: str


@dataclass(frozen=True)
class _Drawing:
    name: str
    caption: str
    keywords: tuple[str, ...]
    draw: Callable[[], Image.Image | None]


@dataclass(frozen=True)
class Source:
    """A package of drawings: whose it is, under which licence, and how a person gets it."""

    license: str
    attribution: str
    how_to_get: str
    drawings: Callable[[Path], Iterator[_Drawing]]


def build_pairs(
    folder: Path | str, sources: Sequence[str] | None = None, packages: Path | str | None = None
) -> Counter[tuple[str, str]]:
    """Render the pictures of `sources` into `folder` and write its `pairs.jsonl`; counts per (source, split).

    `packages` holds the unpacked packages (default: `<folder>-packages` beside the folder), as
    `scripts/fetch_pairs.py` leaves them. All of SOURCES, if none are named. The same packages give the same
    bytes. The folder appears when it is whole: an older one is replaced, a failure leaves it untouched.

    Raises MobileMMError for an unknown source, and for a missing package with the command that gets it.
    """
    folder = Path(folder)
    packages = Path(packages) if packages else folder.with_name(folder.name + "-packages")
    names = tuple(sources) if sources is not None else tuple(SOURCES)
    for name in names:
        if name not in SOURCES:
            raise MobileMMError(f"unknown source of pairs '{name}'; there are: {', '.join(SOURCES)}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        whole = Path(temporary) / "whole"
        counts = _write_pairs(whole, names, packages)
        if not counts:
            raise MobileMMError(f"{packages}: no usable pictures for {', '.join(names)}")
        if folder.exists():
            if not (folder / "pairs.jsonl").is_file() and any(folder.iterdir()):
                raise MobileMMError(f"{folder} is not empty and holds no pairs; name another folder")
            folder.rename(Path(temporary) / "old")
        whole.rename(folder)
    return counts


def read_pairs(folder: Path | str, split: str | None = None) -> list[Pair]:
    """The pairs of a folder in the order of its `pairs.jsonl`, of one split (train, validation, test) or all.

    Raises MobileMMError if the folder or a field is missing or wrong, naming file and line.
    """
    folder = Path(folder)
    if split is not None and split not in SPLITS:
        raise MobileMMError(f"unknown split '{split}'; there are: {', '.join(SPLITS)}")
    table = folder / "pairs.jsonl"
    if not table.is_file():
        raise MobileMMError(f"{table} not found; build it with `python scripts/fetch_pairs.py {folder}`")
    with table.open(encoding="utf-8") as rows:
        pairs = [_pair(row, f"{table}, line {line}") for line, row in enumerate(rows, 1) if row.strip()]
    return [pair for pair in pairs if split in (None, pair.split)]


def split_of(group: str) -> str:
    """The split that a whole group belongs to, about 90 % of the pairs train, 5 % validation, 5 % test.

    Named groups are test or train whatever comes (HELD_OUT_GROUPS, ALWAYS_TRAINED_GROUPS); a hash of the name
    decides for the others, so that a group keeps its split when sources are added.
    """
    if group in HELD_OUT_GROUPS:
        return "test"
    if group in ALWAYS_TRAINED_GROUPS:
        return "train"
    share = int.from_bytes(hashlib.sha256(f"mobilemm pairs {group}".encode()).digest()[:4], "big") / 2**32
    return "validation" if share < 0.07 else "test" if share < 0.08 else "train"


def _write_pairs(folder: Path, sources: Sequence[str], packages: Path) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    folder.mkdir()
    with (folder / "pairs.jsonl").open("w", encoding="utf-8", newline="\n") as rows:
        for name in sources:
            source = SOURCES[name]
            images = folder / "images" / name
            seen: set[bytes] = set()
            for drawing in source.drawings(packages):
                picture = drawing.draw()
                if picture is None or (digest := hashlib.sha256(picture.tobytes()).digest()) in seen:
                    continue
                seen.add(digest)
                path = images / f"{drawing.name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
                group = group_of(drawing.caption)
                pair = Pair(
                    image=path.relative_to(folder).as_posix(),
                    caption=drawing.caption,
                    keywords=drawing.keywords,
                    group=group,
                    source=name,
                    license=source.license,
                    split=split_of(group),
                )
                rows.write(json.dumps(asdict(pair), ensure_ascii=False) + "\n")
                counts[name, pair.split] += 1
    if counts:
        lines = [f"{name}: {SOURCES[name].attribution} ({SOURCES[name].license})" for name in sources]
        (folder / "LICENSES.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return counts


def _pair(row: str, where: str) -> Pair:
    try:
        fields = json.loads(row)
    except json.JSONDecodeError as error:
        raise MobileMMError(f"{where}: not JSON ({error.msg})") from None
    if not isinstance(fields, dict):
        raise MobileMMError(f"{where}: expected an object, found {type(fields).__name__}")
    for name in ("image", "caption", "group", "source", "license", "split"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            raise MobileMMError(f"{where}: '{name}' is missing or not a text")
    keywords = fields.get("keywords")
    if not isinstance(keywords, list) or not all(isinstance(word, str) for word in keywords):
        raise MobileMMError(f"{where}: 'keywords' is missing or not a list of texts")
    if fields["split"] not in SPLITS:
        raise MobileMMError(f"{where}: unknown split '{fields['split']}'; there are: {', '.join(SPLITS)}")
    if Path(fields["image"]).is_absolute() or ".." in Path(fields["image"]).parts:
        raise MobileMMError(f"{where}: '{fields['image']}' points outside the folder")
    return Pair(**{**{name: fields[name] for name in Pair.__dataclass_fields__}, "keywords": tuple(keywords)})


def _openmoji(packages: Path) -> Iterator[_Drawing]:
    root = packages / "openmoji"
    for name, row in _emoji_rows(packages):
        svg = root / "color" / "svg" / f"{name}.svg"
        if svg.is_file():
            yield _emoji_drawing(name, row, partial(_rendered, svg))


def _iconify(icon_set: str) -> Callable[[Path], Iterator[_Drawing]]:
    """The same emoji drawn by others: an Iconify package, whose icons carry the Unicode names as slugs."""

    def drawings(packages: Path) -> Iterator[_Drawing]:
        table = packages / icon_set / "icons.json"
        if not table.is_file():
            raise _missing(icon_set, table)
        icons = json.loads(table.read_text(encoding="utf-8"))
        for name, row in _emoji_rows(packages):
            # OpenMoji's own additions have no Unicode name; an icon of that name would be something else
            icon = None if row["group"].startswith("extras") else icons["icons"].get(_slug(row["annotation"]))
            if icon is not None:
                width = icon.get("width", icons.get("width", 16))
                height = icon.get("height", icons.get("height", 16))
                svg = (
                    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                    f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
                )
                yield _emoji_drawing(name, row, partial(_rendered, svg))

    return drawings


def _emoji_rows(packages: Path) -> Iterator[tuple[str, dict]]:
    table = packages / "openmoji" / "data" / "openmoji.json"
    if not table.is_file():
        raise _missing("openmoji", table)
    for row in json.loads(table.read_text(encoding="utf-8")):
        if not row["skintone"]:
            yield row["hexcode"], row


def _emoji_drawing(name: str, row: dict, draw: Callable[[], Image.Image | None]) -> _Drawing:
    caption = emoji_caption(row["annotation"], row["group"], row["subgroups"])
    words = [word.strip() for word in f"{row['tags']},{row['openmoji_tags']}".split(",")]
    keywords = dict.fromkeys([row["group"], row["subgroups"], *(word for word in words if word)])
    return _Drawing(name, caption or "", tuple(keywords), draw if caption else lambda: None)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"[’']", "", name.lower())).strip("-")


# One title over many files (houses, clocks, stick figures) would outweigh the rest.
_MOST_OF_ONE_CAPTION = 16


def _openclipart(packages: Path) -> Iterator[_Drawing]:
    root = packages / "usr" / "share" / "openclipart"
    words = packages / "usr" / "share" / "dict" / "american-english"
    if not (root / "png").is_dir() or not (root / "svg").is_dir():
        raise _missing("openclipart", root)
    if not words.is_file():
        raise _missing("openclipart", words)
    vocabulary = frozenset(word for word in words.read_text(encoding="utf-8").split() if word.islower())
    vocabulary |= TITLE_WORDS
    used: Counter[str] = Counter()
    known: set[str] = set()
    pictures = [
        path.relative_to(root / "png").with_suffix("").as_posix() for path in (root / "png").rglob("*.png")
    ]
    # the deepest folder first: it says most about a picture that stands in several
    for name in sorted(pictures, key=lambda name: (-name.count("/"), name)):
        title, keywords = _clipart_metadata(root / "svg" / f"{name}.svg")
        caption = clipart_caption(name, title, keywords, vocabulary)
        # one picture stands in several folders, under one file name
        file_name = name.rsplit("/", 1)[-1]
        if caption and used[caption] < _MOST_OF_ONE_CAPTION and file_name not in known:
            used[caption] += 1
            known.add(file_name)
            folders = name.split("/")[:-1]
            further = [
                word for word in keywords if re.fullmatch(r"[a-z][a-z -]+", word) and word not in _TAG_NOISE
            ]
            png = root / "png" / f"{name}.png"
            yield _Drawing(name, caption, tuple(dict.fromkeys(folders + further)), partial(_opened, png))


_TAG_NOISE = frozenset(["hash", "unsorted", "architetto francesco rollandin"])


def _clipart_metadata(svg: Path) -> tuple[str, list[str]]:
    if not svg.is_file():
        return "", []
    text = svg.read_text(encoding="utf-8", errors="replace")
    # creator and publisher carry a title of their own
    text = re.sub(r"<(?:\w+:)?Agent\b.*?</(?:\w+:)?Agent>", "", text, flags=re.DOTALL)
    title = re.search(r"<dc:title[^>]*>([^<]*)</dc:title>", text)
    keywords = [word.strip().lower() for word in re.findall(r"<rdf:li[^>]*>([^<]*)</rdf:li>", text)]
    return title[1].strip() if title else "", sorted(word for word in keywords if word)


def _rendered(svg: str | Path) -> Image.Image:
    """An SVG, by file or by its text, on white."""
    from PIL import Image

    try:
        import resvg_py
    except ImportError:
        raise MobileMMError("drawing SVG needs resvg-py: pip install resvg-py") from None
    png = resvg_py.svg_to_bytes(
        svg_string=svg.read_text(encoding="utf-8") if isinstance(svg, Path) else svg,
        background="#ffffff",
        skip_system_fonts=True,
        width=LONGEST_SIDE,
        height=LONGEST_SIDE,
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


_MOST_PIXELS = 16_000_000


def _opened(png: Path) -> Image.Image | None:
    """A PNG on white, cut to its content with a small border; None for one that shows (nearly) nothing."""
    from PIL import Image, ImageChops

    with png.open("rb") as file:
        # the size stands in the header; a few files of this package unpack to hundreds of megapixels
        width, height = struct.unpack(">16xII", file.read(24))
    if width * height > _MOST_PIXELS:
        return None
    with Image.open(png) as image:
        drawn = image.convert("RGBA")
    picture = Image.new("RGB", drawn.size, "white")
    picture.paste(drawn, mask=drawn.getchannel("A"))
    content = ImageChops.difference(picture, Image.new("RGB", picture.size, "white")).getbbox()
    if content is None:
        return None
    width, height = content[2] - content[0], content[3] - content[1]
    if min(width, height) < 24 or max(width, height) > 5 * min(width, height):
        return None
    border = max(width, height) // 20
    framed = Image.new("RGB", (width + 2 * border, height + 2 * border), "white")
    framed.paste(picture.crop(content), (border, border))
    scale = LONGEST_SIDE / max(framed.size)
    sides = [max(1, round(side * scale)) for side in framed.size]
    return framed.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)


def _missing(source: str, path: Path) -> MobileMMError:
    return MobileMMError(f"{path} not found; get it with {SOURCES[source].how_to_get}")


def _npm(package: str, folder: str) -> str:
    return f"`npm pack {package}` and unpack it as '{folder}', or run scripts/fetch_pairs.py"


SOURCES: dict[str, Source] = {
    "openmoji": Source(
        license="CC BY-SA 4.0",
        attribution="OpenMoji, the open-source emoji and icon project, openmoji.org",
        how_to_get=_npm("openmoji@17.0.0", "openmoji"),
        drawings=_openmoji,
    ),
    "openclipart": Source(
        license="public domain",
        attribution="Open Clip Art Library 0.18, openclipart.org",
        how_to_get="`apt-get download openclipart-png openclipart-svg wamerican` and `dpkg-deb -x` "
        "of the three, or run scripts/fetch_pairs.py",
        drawings=_openclipart,
    ),
}
ICON_SETS = {
    "noto": ("1.2.9", "Apache-2.0", "Noto Emoji, Google"),
    "twemoji": ("1.2.5", "CC BY 4.0", "Twemoji, Twitter and contributors"),
    "fluent-emoji": ("1.2.7", "MIT", "Fluent Emoji, Microsoft"),
    "fluent-emoji-flat": ("1.2.6", "MIT", "Fluent Emoji Flat, Microsoft"),
    "emojione": ("1.2.3", "CC BY 4.0", "EmojiOne 2, Emoji One"),
}
for _name, (_version, _license, _attribution) in ICON_SETS.items():
    SOURCES[_name] = Source(
        license=_license,
        attribution=_attribution,
        how_to_get=_npm(f"@iconify-json/{_name}@{_version}", _name),
        drawings=_iconify(_name),
    )
