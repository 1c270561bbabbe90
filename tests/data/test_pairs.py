"""Captions, groups and splits of real titles; building and reading a few tiny pictures, without network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mobilemm.data.captions import (
    ALWAYS_TRAINED_GROUPS,
    HELD_OUT_GROUPS,
    clipart_caption,
    emoji_caption,
    group_of,
)
from mobilemm.data.pairs import LONGEST_SIDE, SPLITS, build_pairs, read_pairs, split_of
from mobilemm.errors import MobileMMError

HELD_OUT = Path(__file__).parents[1] / "assets" / "held_out"
ENGLISH = """
a and angry bear boy car cat cobra cone cream croissant crown dog flag flock golf guitar hat head horse
house ice in lemon man monkey of owl pen pin pie pumpkin red shirt shoe singing slice stack books star t
tree triangle apple watermelon with worm fire engine green mug tea farm
"""
WORDS = frozenset(ENGLISH.split())


@pytest.mark.parametrize(
    ("annotation", "group", "subgroup", "caption"),
    [
        ("cat face", "animals-nature", "animal-mammal", "cat face"),
        ("woman: curly hair", "people-body", "person", "woman with curly hair"),
        ("man: beard", "people-body", "person", "man with a beard"),
        ("person: bald", "people-body", "person", "bald person"),
        ("family: man, man, girl, boy", "people-body", "family", "family with two men, a girl and a boy"),
        ("kiss: woman, man", "people-body", "family", "a woman and a man kissing"),
        ("kiss: woman, woman", "people-body", "family", "two women kissing"),
        ("person walking: facing right", "people-body", "person-activity", "person walking facing right"),
        ("ten-thirty", "travel-places", "time", "clock showing ten-thirty"),
        ("one o’clock", "travel-places", "time", "clock showing one o'clock"),
        ("woman’s boot", "objects", "clothing", "woman's boot"),
        ("Leo", "symbols", "zodiac", "leo zodiac sign"),
        ("flag: Japan", "flags", "country-flag", "flag of japan"),
        ("flag: Türkiye", "flags", "country-flag", "flag of turkey"),
        ("keycap: 7", "symbols", "keycap", "button with the number 7"),
        ("gardener man", "extras-openmoji", "gardening", "man gardener"),
        ("trumpet", "objects", "musical-instrument", "trumpet"),
        ("light skin tone", "component", "skin-tone", None),
        ("flag: Niue", "flags", "country-flag", None),
        ("regional indicator A", "extras-unicode", "regional-indicator", None),
        ("trump", "extras-openmoji", "people", None),
        ("Firefox", "extras-openmoji", "brand", None),
    ],
)
def test_emoji_captions(annotation: str, group: str, subgroup: str, caption: str | None) -> None:
    assert emoji_caption(annotation, group, subgroup) == caption


@pytest.mark.parametrize(
    ("path", "title", "caption"),
    [
        ("animals/mammals/angry_monkey_benji_park_01", "Angry Monkey", "angry monkey"),
        ("food/breads/croissant_b_amp_w__geral_01", "Croissant (B &amp; W)", "croissant in black and white"),
        ("food/fruit/apple_with_worm_dan_gerh_01", "Apple With Worm", "apple with a worm"),
        ("animals/mammals/horse_1_konstantin_r._01", "horse#1", "horse"),
        ("animals/contour_bear", "Clipart by Nicu Buculei - contour_chipmunk", "bear"),
        ("office/pin_-_green_nicu_buculei_01", "pin - green", "green pin"),
        ("food/beverages/mug_01", "zielony kubek herbaty - green mug of tea", "green mug of tea"),
        ("music/bass_01", "guitar-head", "guitar head"),
        ("people/clothing/t-shirt_01", "t-shirt", "t-shirt"),
        ("people/a_man_singing_01", "A man singing", "man singing"),
        ("animals/birds/cigno_architetto_frances_01", "Cigno", "swan"),
        ("unsorted/fattoria", "Various Cliparts", "farm"),
        ("transportation/roadsigns/bambi", "SVG Road Signs", "deer crossing road sign"),
        ("transportation/roadsigns/kaboom", "SVG Road Signs", None),
        ("people/signore_x_01", "ralf@somewhere.de is here", None),
        ("geography/teide_clemente_01", "municipios", None),
        ("shapes/stars/star_01", "star", None),
        ("tools/thing_01", "", None),
    ],
)
def test_clipart_captions(path: str, title: str, caption: str | None) -> None:
    assert clipart_caption(path, title, [], WORDS) == caption


def test_a_folder_of_one_kind_names_what_the_title_does_not() -> None:
    path = "animals/mammals/horses/unbekannt_01"
    assert clipart_caption(path, "Mein Pferdchen", ["horse", "mammal"], WORDS) == "horse"
    assert clipart_caption(path, "Mein Pferdchen", ["clock"], WORDS) is None


@pytest.mark.parametrize(
    ("captions", "group"),
    [
        (("cat", "cat face", "weary cat", "black cat", "kitten", "sleeping cat", "cats"), "cat"),
        (("man walking", "woman with a beard", "bald person", "family with a man and a boy"), "person"),
        (("grinning face", "face with tongue", "smiley face"), "face"),
        (("clock showing ten-thirty", "alarm clock", "wall clock in black and white"), "clock"),
        (("pizza", "cheese pizza slice", "slice of pizza"), "pizza"),
        (("car", "automobile", "oncoming police car", "red car"), "car"),
        (("red square", "square with left half black", "white large square"), "square"),
        (("pilot", "woman pilot", "man pilot"), "pilot"),
        (("owl", "owl on a branch", "branch with owls"), "owl"),
        (("axe", "hatchet"), "axe"),
        (("hamburger", "chicken burger in black and white"), "hamburger"),
        (("up arrow", "left arrow sign", "arrow"), "arrow"),
        (("flag of japan", "red flag"), "flag"),
    ],
)
def test_variants_of_one_thing_are_one_group(captions: tuple[str, ...], group: str) -> None:
    assert {caption: group_of(caption) for caption in captions} == dict.fromkeys(captions, group)


@given(st.text(alphabet="abcdefghij ofwithnsg'-", min_size=1, max_size=40))
def test_every_caption_has_a_group_and_a_split(caption: str) -> None:
    assert group_of(caption)
    assert split_of(group_of(caption)) in SPLITS


def test_splits_are_stable_and_about_ninety_five_five() -> None:
    assert not HELD_OUT_GROUPS & ALWAYS_TRAINED_GROUPS
    assert {split_of(group) for group in HELD_OUT_GROUPS} == {"test"}
    assert {split_of(group) for group in ALWAYS_TRAINED_GROUPS} == {"train"}
    assert [split_of(group) for group in ("spoon", "sheep", "bus")] == ["train", "train", "train"]
    counts = {split: sum(split_of(f"thing {n}") == split for n in range(4000)) / 4000 for split in SPLITS}
    assert counts["train"] == pytest.approx(0.92, abs=0.02)
    assert counts["validation"] == pytest.approx(0.07, abs=0.02)


SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">
<circle cx="36" cy="36" r="30" fill="{}"/></svg>"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Four emoji, an icon set that draws one of them too, and four clip arts of which two are the same."""
    root = tmp_path / "packages"
    (root / "openmoji" / "data").mkdir(parents=True)
    (root / "openmoji" / "color" / "svg").mkdir(parents=True)
    rows = []
    for name, annotation, skintone in [
        ("1F989", "owl", ""),
        ("1F408", "cat", ""),
        ("1F697", "automobile", ""),
        ("1F44B-1F3FB", "waving hand: light skin tone", 1),
    ]:
        row = {"hexcode": name, "annotation": annotation, "skintone": skintone, "group": "animals-nature"}
        rows.append(row | {"subgroups": "animal-bird", "tags": "wise, night", "openmoji_tags": "forest"})
        colour = f"#{len(rows)}0{len(rows)}"
        (root / "openmoji" / "color" / "svg" / f"{name}.svg").write_text(SVG.format(colour))
    (root / "openmoji" / "data" / "openmoji.json").write_text(json.dumps(rows))

    (root / "noto").mkdir()
    body = '<circle cx="8" cy="8" r="7" fill="#a40"/>'
    (root / "noto" / "icons.json").write_text(json.dumps({"icons": {"owl": {"body": body}}, "width": 16}))

    art = root / "usr" / "share" / "openclipart"
    for name, title, size in [
        ("animals/owl_01", "Owl", (200, 100)),
        ("animals/birds/owl_02", "Owl", (200, 100)),
        ("people/a_man_singing_01", "A man singing", (40, 90)),
        ("people/blank_01", "car", None),
    ]:
        image = Image.new("RGBA", (400, 400))
        if size:
            image.paste((200, 30, 30, 255), (50, 60, 50 + size[0], 60 + size[1]))
        (art / "png" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save((art / "png" / name).with_suffix(".png"))
        (art / "svg" / name).parent.mkdir(parents=True, exist_ok=True)
        (art / "svg" / name).with_suffix(".svg").write_text(
            f"<svg><cc:Agent><dc:title>Nobody</dc:title></cc:Agent><dc:title>{title}</dc:title>"
            "<rdf:li>bird</rdf:li></svg>"
        )
    (root / "usr" / "share" / "dict").mkdir()
    (root / "usr" / "share" / "dict" / "american-english").write_text("\n".join(sorted(WORDS)))
    return root


def test_build_and_read(tmp_path: Path, packages: Path) -> None:
    folder = tmp_path / "pairs"
    counts = build_pairs(folder, ("openmoji", "noto", "openclipart"), packages)
    pairs = read_pairs(folder)
    assert sum(counts.values()) == len(pairs) == 6
    by_source = {
        source: [pair.caption for pair in pairs if pair.source == source]
        for source in ("openmoji", "noto", "openclipart")
    }
    # the skin tone, the second copy of the owl and the blank picture are left out
    assert by_source == {
        "openmoji": ["owl", "cat", "car"],
        "noto": ["owl"],
        "openclipart": ["owl", "man singing"],
    }
    owls = [pair for pair in pairs if pair.caption == "owl"]
    assert {pair.group for pair in owls} == {"owl"}
    assert {pair.split for pair in owls} == {"test"}
    assert owls[0].keywords == ("animals-nature", "animal-bird", "wise", "night", "forest")
    assert owls[2].keywords == ("animals", "birds", "bird")
    assert [pair.license for pair in owls] == ["CC BY-SA 4.0", "Apache-2.0", "public domain"]
    assert read_pairs(folder, "test") == owls
    for pair in pairs:
        with Image.open(folder / pair.image) as image:
            assert (image.mode, max(image.size), image.format) == ("RGB", LONGEST_SIDE, "PNG")
            assert image.getpixel((0, 0)) == (255, 255, 255)
    assert not list(tmp_path.glob(".pairs-*"))


def test_the_same_packages_give_the_same_bytes(tmp_path: Path, packages: Path) -> None:
    for name in ("one", "two"):
        build_pairs(tmp_path / name, ("openmoji", "openclipart"), packages)
    files = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.*"))
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    for path in files[0]:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path: Path, packages: Path) -> None:
    with pytest.raises(MobileMMError, match="npm pack openmoji"):
        build_pairs(tmp_path / "pairs", ("openmoji",), tmp_path / "nothing")
    with pytest.raises(MobileMMError, match="npm pack @iconify-json/twemoji"):
        build_pairs(tmp_path / "pairs", ("twemoji",), packages)
    with pytest.raises(MobileMMError, match="apt-get download openclipart-png"):
        build_pairs(tmp_path / "pairs", ("openclipart",), tmp_path / "nothing")
    with pytest.raises(MobileMMError, match="unknown source of pairs 'coco'"):
        build_pairs(tmp_path / "pairs", ("coco",), packages)
    assert not (tmp_path / "pairs").exists()


def test_a_failed_build_leaves_the_older_pairs(tmp_path: Path, packages: Path) -> None:
    build_pairs(tmp_path / "pairs", ("openclipart",), packages)
    before = read_pairs(tmp_path / "pairs")
    with pytest.raises(MobileMMError):
        build_pairs(tmp_path / "pairs", ("openclipart", "twemoji"), packages)
    assert read_pairs(tmp_path / "pairs") == before


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path, packages: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(MobileMMError, match="holds no pairs"):
        build_pairs(tmp_path / "thesis", ("openclipart",), packages)
    assert (tmp_path / "thesis" / "chapter1.txt").is_file()


ROW = {
    "image": "images/a/b.png",
    "caption": "owl",
    "keywords": [],
    "group": "owl",
    "source": "a",
    "license": "MIT",
    "split": "test",
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected an object"),
        (json.dumps(ROW | {"caption": ""}), "line 2: 'caption' is missing"),
        (json.dumps(ROW | {"keywords": "bird"}), "line 2: 'keywords'"),
        (json.dumps(ROW | {"split": "dev"}), "line 2: unknown split 'dev'"),
        (json.dumps(ROW | {"image": "../secret.png"}), "line 2: '../secret.png' points outside"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROW) + "\n" + row + "\n")
    with pytest.raises(MobileMMError, match=r"pairs\.jsonl, " + message):
        read_pairs(tmp_path)


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MobileMMError, match=r"pairs\.jsonl not found; build it with"):
        read_pairs(tmp_path / "pairs")
    with pytest.raises(MobileMMError, match="unknown split 'dev'"):
        read_pairs(tmp_path, "dev")


def test_the_shipped_pictures_are_held_out_and_answerable() -> None:
    questions = json.loads((HELD_OUT / "index.json").read_text())
    assert len(questions) >= 40
    captions = {question["caption"] for question in questions}
    for question in questions:
        assert split_of(group_of(question["caption"])) == "test"
        choices = question["choices"]
        assert choices[question["answer"]] == question["caption"]
        assert set(choices) <= captions
        assert len({group_of(choice) for choice in choices}) == len(choices) == 4
        path = HELD_OUT / question["image"]
        assert path.stat().st_size < 6000
        with Image.open(path) as image:
            assert max(image.size) <= 192
    assert sorted(path.name for path in HELD_OUT.glob("*.png")) == sorted(q["image"] for q in questions)
    assert "CC BY-SA 4.0" in (HELD_OUT / "LICENSE.md").read_text()
