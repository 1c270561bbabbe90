"""Names of pictures turned into captions, and captions into groups: text only, no pictures.

A caption is a short lower-case noun phrase, as a person would name the picture: `red apple`, `cat face`,
`woman with curly hair`. A group holds all captions of one kind of thing; a split never cuts through it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Set
from pathlib import PurePosixPath

from mobilemm.data.openclipart_titles import CAPTIONS, FOLDER_NOUNS, REJECTED_FOLDERS, UNINFORMATIVE_TITLES


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _renamed(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


# Things that never reach training, whatever the source: the shipped test pictures come from these groups.
HELD_OUT_GROUPS = _words(
    """
    ambulance anchor axe backpack bathtub bee broccoli broom butterfly cactus camel candle carrot castle
    crab crown doughnut drum flamingo frog giraffe grape hamburger hammer hedgehog helicopter kangaroo
    ladder lobster magnet microscope mushroom octopus owl penguin pineapple popcorn pretzel rocket sailboat
    scissors snail snowman strawberry sunflower teapot telescope tent toothbrush tractor trumpet umbrella
    violin volcano zebra
    """
)

# Families of dozens of near-twins in each source: chance must not take all people out of training.
ALWAYS_TRAINED_GROUPS = _words(
    """
    person face hand heart arrow circle square hexagon star flag clock moon sun zodiac figure worker cat dog
    horse car house tree flower ball
    """
)

_SKIPPED_EMOJI_SUBGROUPS = _words(
    """
    skin-tone hair-style regional-indicator subdivision-flag country-flag alphanum brand queer-symbols
    ui-element interaction symbols keycap
    """
)
# OpenMoji's own additions and signs that are names of persons, places of its makers' home, or abstract.
_SKIPPED_EMOJI = re.compile(
    r"^trump$|greta thunberg|schw|stuttgart|spätzle|spaetzle|kehrwoche|maultasche|hal 9000|tardis|guy fawkes"
    r"|authority|stencil|location indicator|warning strip|rounded symbol|circled|enclosing|service mark"
    r"|mark button|^mobile (info|message)$|flagged|assembly|ibeacon|^north$|^transmission$|^evacuate"
    r"|meat consumption|sea level|nuclear protection|quarantine|colossus|hanging gardens|mausoleum"
    r"|statue of zeus|temple of artemis|lighthouse of|true south|nail and gear|united federation|browncoat"
    r"|esperanto|berber|ecg|eye pain|copyright|hyphen|trade mark|registered|part alternation|curly loop"
    r"|hundred points|^zzz$|name badge|beginner|moai|kaaba|middle finger|^help others$|^drop cover hold$"
    r"|^(switch|surveillance|led|scale|scales|wire|mate|customs|baggage claim|left luggage)$"
    r"|litter in bin|^deep \w+ flag$|^(augmented|virtual) reality$"
)
# Known by sight and unlike each other at 320 px. The other 200 and more flags would teach names of countries
# by a few stripes, and be a seventh of the set.
_FLAGS = _words(
    """
    Argentina Australia Austria Belgium Brazil Canada China Colombia Cuba Denmark Egypt Finland France
    Germany Greece India Indonesia Ireland Israel Italy Jamaica Japan Mexico Nepal Netherlands Nigeria
    Norway Pakistan Poland Portugal Qatar Russia Spain Sweden Switzerland Thailand Turkey Türkiye Ukraine
    Vietnam
    """
) | {"South Africa", "South Korea", "United Kingdom", "United States", "Saudi Arabia", "England"}

_EMOJI_CAPTIONS = {
    "automobile": "car",
    "oncoming automobile": "oncoming car",
    "articulated lorry": "truck",
    "arrow turn right": "arrow turning right",
    "backhand index pointing down": "hand pointing down",
    "backhand index pointing left": "hand pointing left",
    "backhand index pointing right": "hand pointing right",
    "backhand index pointing up": "hand pointing up",
    "index pointing up": "finger pointing up",
    "index pointing at the viewer": "finger pointing at the viewer",
    "raising hands": "raised hands",
    "palms up together": "hands with palms up",
    "exhaust gases car": "car with exhaust gases",
    "exhaust gases factory": "factory with exhaust gases",
    "floating ice broken": "broken floating ice",
    "fracture leg": "broken leg",
    "half orange fruit": "half orange",
    "horse jumping hurdle": "hurdle",
    "motorbike helmet": "motorcycle helmet",
    "nuclear power plant ruin": "ruin of a nuclear power plant",
    "solar energy": "solar panel",
    "structural fire": "burning house",
    "warning fire": "fire warning sign",
    "warning tsunami": "tsunami warning sign",
    "warning volcano": "volcano warning sign",
    "wild fire": "wildfire",
    "wind energy": "wind turbine",
    "volcano ashes": "volcano with ashes",
    "wheel chair": "wheelchair",
    "on! arrow": "on arrow",
    "speaker low volume": "speaker with low volume",
    "speaker medium volume": "speaker with medium volume",
    "speaker high volume": "speaker with high volume",
    "chart increasing": "rising line chart",
    "chart decreasing": "falling line chart",
    "sunrise": "sunrise over the sea",
    "bust in silhouette": "silhouette of a person",
    "busts in silhouette": "silhouettes of two people",
    "bandage change": "changing a bandage",
    "person with crown": "person with a crown",
    "boar": "wild boar",
    "locked with pen": "padlock with pen",
    "picture": "framed picture",
    "breast-feeding": "woman breastfeeding a baby",
    "camping": "tent at a campsite",
    "collision": "explosion",
    "cooking": "egg in a frying pan",
    "dizzy": "dizzy star",
    "divide": "division sign",
    "foggy": "foggy bridge",
    "hot springs": "hot spring symbol",
    "locked": "closed padlock",
    "locked with key": "padlock with key",
    "minus": "minus sign",
    "multiply": "multiplication sign",
    "information": "information sign",
    "performing arts": "theater masks",
    "piñata": "pinata",
    "plus": "plus sign",
    "unlocked": "open padlock",
    "wedding": "wedding chapel",
    "prohibited": "prohibition sign",
    "no entry": "no entry sign",
    "warning": "warning sign",
    "construction": "construction barrier",
    "high voltage": "lightning bolt",
    "selfie": "hand taking a selfie",
    "om": "om symbol",
    "khanda": "khanda symbol",
    "oden": "oden skewer",
    "dango": "dango skewer",
    "heavy circle": "circle",
    "heavy dollar sign": "dollar sign",
    "heavy equals sign": "equals sign",
    "hourglass done": "hourglass",
    "hourglass not done": "hourglass",
    "badminton": "badminton equipment",
    "field hockey": "field hockey equipment",
    "ice hockey": "ice hockey equipment",
    "lacrosse": "lacrosse equipment",
    "ping pong": "ping pong equipment",
    "cricket": "cricket insect",
    "hole": "black hole in the ground",
    "black hole": "black hole in space",
    "lady beetle": "ladybug",
    "honeybee": "bee",
    "optical disk": "compact disc",
    "computer disk": "minidisc",
    "hollow red circle": "red circle outline",
    "oncoming fist": "fist",
    "joker": "joker playing card",
    "kiss": "couple kissing",
    "potable water": "drinking water sign",
    "non-potable water": "no drinking water sign",
    "water closet": "toilet sign",
    "restroom": "restroom sign",
    "cinema": "movie camera symbol",
    "ice": "ice cube",
    "bowling": "bowling ball and pins",
    "tennis": "tennis ball",
    "tumbler glass": "glass of whiskey",
    "sauropod": "long-necked dinosaur",
    "t-rex": "tyrannosaurus dinosaur",
}

_COLOURS = _words("red orange yellow green blue purple pink brown black white grey gray golden gold silver")
_TITLE_NOISE = _words(
    """
    icon icons clipart symbol cartoon stylized stylised simple generic basic plain svg contour silhouette
    silhouet outline illustration drawing sketch new my another yet nice little cute style image simbol
    clip-art coloured colored colour color modern generic
    """
)
_PREPOSITIONS = _words(
    """
    with without in on under behind at from for by to over near showing holding wearing facing playing
    between through against inside into during that
    """
)
_PORTIONS = _words(
    """
    slice piece glass cup bowl pot pile bottle can box bunch pair stack plate loaf mug jar bag drop bouquet
    cut set wedge sheaf carton group head pack half basket roll cluster ball flock herd bar ear
    """
)
_QUALIFIERS = _words(
    """
    symbol sign button icon logo silhouette outline suit emoji collection cob illustration half core profile
    clipart isolated slice wedge piece up down left right
    """
)
_PEOPLE = _words(
    """
    man woman person people men women boy girl child kid baby lady guy gentleman adult male female couple
    family youngster grandpa grandma mom dad father mother human
    """
)
_FACED = _words(
    """
    cat dog monkey tiger horse cow pig mouse rabbit dragon bear moon clown wind fox chick lion panda frog
    wolf hamster sun koala man woman boar unicorn
    """
)
_PARTICIPLE_LIKE_NOUNS = _words(
    """
    ring wing king string building swing painting clothing earring pudding wedding sled bed shed seed weed
    sing spring thing pudding dumpling seedling wrestling fishing bowling icing feed reed ceiling railing
    lightning crossing
    """
)
_SINGULAR = _renamed(
    """
    children:child men:man women:woman feet:foot teeth:tooth mice:mouse geese:goose knives:knife leaves:leaf
    wolves:wolf loaves:loaf dice:die wives:wife scarves:scarf shelves:shelf people:person cookies:cookie
    pies:pie ties:tie movies:movie potatoes:potato tomatoes:tomato hooves:hoof shoes:shoe axes:axe
    gloves:glove doves:dove olives:olive caves:cave waves:wave stoves:stove selfies:selfie smileys:smiley
    """
)
_PLURAL_ONLY = _words(
    """
    glasses sunglasses scissors jeans shorts news lens bus gas binoculars goggles pliers tongs chess species
    series compass cactus octopus walrus hippopotamus rhinoceros moss grass dress cross kiss mess boss glass
    circus virus campus iris canvas atlas christmas hibiscus citrus lotus asparagus tyrannosaurus bass brass
    headphones trousers pants briefs tennis
    """
)
# Two names of one thing, which must not end on two sides of a split.
_SAME_THING = _renamed(
    """
    automobile:car sportscar:car motorbike:motorcycle scooter:motorcycle plane:airplane aircraft:airplane
    jet:airplane bike:bicycle burger:hamburger cheeseburger:hamburger bunny:rabbit hare:rabbit kitten:cat
    puppy:dog honeybee:bee bumblebee:bee wasp:bee ladybird:ladybug beetle:ladybug bug:ladybug
    toadstool:mushroom champignon:mushroom sailing:sailboat yacht:sailboat ship:boat ferry:boat
    speedboat:boat telephone:phone handset:phone receiver:phone cellphone:phone tv:television hog:pig
    boar:pig piglet:pig donut:doughnut lorry:truck tramway:tram fiddle:violin cello:violin viola:violin
    rucksack:backpack tub:bathtub parasol:umbrella cornet:trumpet bugle:trumpet toad:frog
    sandglass:hourglass fries:fry cone:cream lightbulb:bulb jack-o-lantern:pumpkin lantern:lamp
    reindeer:deer doe:deer fawn:deer buck:deer penguins:penguin tux:penguin rooster:chicken hen:chicken
    chick:chicken cock:chicken smiley:face evergreen:tree conifer:tree palmtree:tree pistol:gun revolver:gun
    rifle:gun letter:envelope e-mail:envelope mail:envelope gift:present laptop:computer desktop:computer
    pc:computer monitor:screen policeman:police officer:police fireman:firefighter lady:person
    merman:mermaid merperson:mermaid firetruck:engine padlock:lock compact:disc disk:disc crawfish:lobster
    crayfish:lobster lotus:flower blossom:flower rosette:flower hibiscus:flower bouquet:flower prawn:shrimp
    dromedary:camel ufo:saucer shuttle:rocket spaceship:rocket fort:castle fortress:castle palace:castle
    chateau:castle hatchet:axe mallet:hammer mallot:hammer sledgehammer:hammer broomstick:broom
    stepladder:ladder teakettle:teapot kettle:teapot camper:tent campsite:tent tepee:tent dvd:disc cd:disc
    """
)


def emoji_caption(annotation: str, group: str, subgroup: str) -> str | None:
    """The caption of an emoji by its OpenMoji row, or None for one that shows no nameable thing.

    `woman: curly hair` → `woman with curly hair`; `ten-thirty` → `clock showing ten-thirty`.
    """
    name = annotation.strip()
    if subgroup == "country-flag" or (subgroup == "subdivision-flag" and name.startswith("flag: ")):
        country = name.removeprefix("flag: ")
        article = "the " if country.startswith(("United", "Netherlands")) else ""
        country_name = country.lower().replace("türkiye", "turkey")
        return f"flag of {article}{country_name}" if country in _FLAGS else None
    if subgroup == "keycap" and name.removeprefix("keycap: ").isdigit():
        return f"button with the number {name.removeprefix('keycap: ')}"
    name = " ".join(name.replace("’", "'").lower().split())
    if subgroup in _SKIPPED_EMOJI_SUBGROUPS or group == "component" or _SKIPPED_EMOJI.search(name):
        return None
    if subgroup == "time" and (name.endswith("o'clock") or name.endswith("-thirty")):
        return f"clock showing {name}"
    if subgroup == "zodiac":
        return f"{name} zodiac sign"
    if name in _EMOJI_CAPTIONS:
        return _EMOJI_CAPTIONS[name]
    what, _, detail = name.partition(": ")
    if not detail:
        first, _, last = what.rpartition(" ")
        # OpenMoji's own names put the kind last: `gardener man`, `champignon brown`
        moved = group.startswith("extras") and first and (last in ("man", "woman") or last in _COLOURS)
        return f"{last} {first}" if moved and "half" not in first and "diagonal" not in first else what
    if detail == "facing right":
        return f"{what} {detail}"
    if what == "family":
        return f"family with {_listed(detail.split(', '))}"
    if what in ("kiss", "couple with heart"):
        return f"{_listed(detail.split(', '))} {'kissing' if what == 'kiss' else 'with a heart'}"
    if detail == "bald":
        return f"bald {what}"
    return f"{what} with a {detail}" if detail == "beard" else f"{what} with {detail}"


def _listed(people: list[str]) -> str:
    """`[man, man, boy]` → `two men and a boy`."""
    plurals = {"man": "men", "woman": "women", "child": "children"}
    things = []
    for person in dict.fromkeys(people):
        article = "an" if person[0] in "aeiou" else "a"
        plural = plurals.get(person, f"{person}s")
        things.append(f"two {plural}" if people.count(person) > 1 else f"{article} {person}")
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


def clipart_caption(path: str, title: str, keywords: list[str], vocabulary: Set[str]) -> str | None:
    """The caption of an Open Clip Art picture, or None if nothing about it can be trusted.

    `path` is relative, without suffix (`animals/mammals/contour_fox`). The title is taken if it is plain
    English by `vocabulary` (lower-case words); the file name, if the title only names the collection it came
    with; a noun of the folder (`animals/mammals/horses` → `horse`), if neither serves.
    """
    place = PurePosixPath(path)
    icons = path.startswith("computer/") and place.parent.name != "hardware"
    if icons or path.startswith(REJECTED_FOLDERS):
        return None
    name = place.name.lower()
    in_folder = f"{place.parent.name}/{name}".lower()
    if "road signs" in title.lower():
        return CAPTIONS.get(f"roadsigns/{name}") or None
    # `owl_on_branch_ganson_01` → `owl_on_branch_ganson`
    stem = re.sub(r"[_ ]\d*[a-z]?$", "", name)
    for key in (in_folder, name, stem, _plain(title)):
        if key in CAPTIONS:
            return CAPTIONS[key] or None
    if name.startswith("aiga_"):
        words = _clean(name.removeprefix("aiga_").replace("tickey", "ticket"), vocabulary)
        return f"{words} sign" if words and not words.endswith("sign") else words
    uninformative = not title.strip() or UNINFORMATIVE_TITLES.search(title)
    caption = _clean(place.name if uninformative else title, vocabulary)
    if caption and not ("archit" in name and caption in _ITALIAN_TOO):
        return CAPTIONS.get(caption, caption) or None
    for folder in reversed(place.parent.parts):
        if folder in FOLDER_NOUNS:
            noun = FOLDER_NOUNS[folder]
            return noun if noun in keywords or folder in ("smilies", "stickmen", "homes") else None
    return None


# Words of Open Clip Art titles that the dictionary does not hold, or holds as names.
TITLE_WORDS = _words(
    """
    airbrush bible boombox camcorder cichlid clownfish corndog crawfish damselfly erlenmeyer fedora french
    gps habanero hedgeshear jukebox labrador lasagna lcd loach martini mosquito muffin padlock panda
    paperbag pepperoni pushpin rollerblading saxophone skyline smiley sombrero teddybear thumbtack tophat
    toothpaste tv usb cd vhs xylophone rubik aussie celtic christmas halloween african aztec mug chili
    handheld beagle bulldog sailboat sailboats stopwatch surfboard earth jupiter saturn venus eiffel america
    africa europe australia canada denmark finland iceland norway poland scandinavia scotland slovenia
    sweden brazil
    """
)
# English words that stand in these titles as Italian ones.
_ITALIAN_TOO = _words("mobile casa carta clips liberty sport female pera pesca torta")


def _plain(title: str) -> str:
    text = html.unescape(html.unescape(title)).lower().replace("_", " ")
    return " ".join(re.sub(r"[\d#!.?]+", " ", text).split())


def _clean(title: str, vocabulary: Set[str]) -> str | None:
    text = html.unescape(html.unescape(title)).replace("&", " and ").replace("+", " and ")
    if "@" in text or "http" in text or not text.isascii():
        return None
    monochrome = bool(re.search(r"\bb\s*(&|and|_)\s*w\b|[_ ]bw\b|\bbn\b", text, re.IGNORECASE))
    text = re.sub(r"\bb\s*(and|_)\s*w\b|[_ ]bw\b", " ", text, flags=re.IGNORECASE)
    text = re.sub(r"\([^)]*\)?", " ", text).replace("_", " ")
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text).lower()
    text = re.sub(r"#?\d+\b|(?<=[a-z])\d+\b|\b(ii|iii|iv)\b|\bv\d\S*", " ", text)
    text = re.sub(r"\b(clip art|rpg map elements?)\b", " ", text)
    text = re.sub(r"\s*,\s*(with|in)\b", r" \1", text)
    for part in re.split(r"\s+-\s*|\s*-\s+|[,:;/]|\.\s", text):
        phrase = _english(part, vocabulary)
        if phrase:
            colour = [word for word in re.findall(r"[a-z]+", text.replace(part, " ")) if word in _COLOURS]
            if colour and colour[0] not in phrase.split():
                phrase = f"{colour[0]} {phrase}"
            return f"{phrase} in black and white" if monochrome else phrase
    return None


def _english(text: str, vocabulary: Set[str]) -> str | None:
    words = [word.strip("'\".!?") for word in text.split()]
    words = [word for word in words if word and word not in _TITLE_NOISE]
    # file names join words by hyphens (`bass-guitar`); `t-shirt` and `u-turn` keep theirs
    words = [part for word in words for part in (word.split("-") if len(word.split("-")[0]) > 3 else [word])]
    while words and words[0] in ("a", "an", "the", "and", "of", "with", "in"):
        words = words[1:]
    while words and words[-1] in ("a", "an", "the", "and", "of", "with", "in", "on"):
        words = words[:-1]
    if not words or len(words) > 7 or all(word in _COLOURS or len(word) < 2 for word in words):
        return None
    for word in words:
        for piece in word.split("-"):
            if piece.removesuffix("'s") not in vocabulary or (
                len(piece) < 2 and piece not in ("a", "t", "x")
            ):
                return None
    return " ".join(words)


def group_of(caption: str) -> str:
    """The kind of thing that a caption names: its head noun, singular, synonyms merged.

    `weary cat`, `cat face` and `cat in a box` → `cat`; `slice of pizza` → `pizza`; `man walking` → `person`.
    A held-out thing anywhere in the caption wins: `owl on a branch` and `branch with owl` → `owl`.
    """
    words = [_singular(word) for word in re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", caption.lower())]
    words = [word for word in words if word not in ("a", "an", "the")]
    for word in words:
        for piece in (word, *word.split("-")):
            if _SAME_THING.get(piece, piece) in HELD_OUT_GROUPS:
                return _SAME_THING.get(piece, piece)
    end = next((at for at, word in enumerate(words) if at and word in _PREPOSITIONS), len(words))
    head = words[:end]
    while "of" in head[1:-1]:
        at = head.index("of", 1)
        head = head[at + 1 :] if head[at - 1] in _PORTIONS else head[:at]
    while len(head) > 1 and (head[-1] in _QUALIFIERS or _is_modifier(head[-1]) or _is_face(head)):
        head = head[:-1]
    noun = head[-1] if head else caption
    noun = _SAME_THING.get(noun, noun)
    if "-" in noun and noun not in _SAME_THING:
        noun = noun.rsplit("-", 1)[-1] if len(noun.rsplit("-", 1)[-1]) > 2 else noun
    return "person" if noun in _PEOPLE else noun


def _is_face(words: list[str]) -> bool:
    return words[-1] in ("face", "head", "nose", "bust") and words[-2] in _FACED | _PEOPLE


def _is_modifier(word: str) -> bool:
    participle = len(word) > 4 and word.endswith(("ing", "ed"))
    return word.isdigit() or word in _COLOURS or (participle and word not in _PARTICIPLE_LIKE_NOUNS)


def _singular(word: str) -> str:
    if word in _SINGULAR or word in _PLURAL_ONLY or len(word) < 4:
        return _SINGULAR.get(word, word)
    if word.endswith(("ss", "us", "is", "'s")):
        return word.removesuffix("'s")
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses", "oes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") else word
