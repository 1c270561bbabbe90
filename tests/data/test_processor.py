"""Ids, masks and pixels against the official path: SentencePiece itself, CLIP's processor, PIL and numpy."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mobilemm.data.processor import MobileMMProcessor
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.processors import read_tokenizer
from tests.sentencepiece_model import train_sentencepiece

VOCABULARY, SLOTS = 400, 3
IMAGE_ID = VOCABULARY
SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PICTURE = Image.new("RGB", (5, 3), (10, 200, 30))


def user(text: str, images: int = 0) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": PICTURE}] * images
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


# --- pixels ----------------------------------------------------------------------------------------------


SIZES = [(640, 480), (480, 640), (336, 336), (1, 1), (500, 3), (3, 500), (37, 36), (337, 336), (1001, 667)]


def picture(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def padded_square(image: Image.Image) -> Image.Image:
    """As the official code pads: a square of CLIP's mean colour, the picture in its middle."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_official_ones_to_the_bit(folder: Path, size: tuple[int, int]) -> None:
    image = picture(size)
    ours = make(folder, size=336)(text="<image>", images=image)["pixel_values"]
    clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    theirs = clip([padded_square(image)], return_tensors="pt")["pixel_values"]
    assert ours.shape == (1, 3, 336, 336)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_near_those_of_pil_and_numpy_alone(folder: Path, size: tuple[int, int]) -> None:
    """What a phone can do without transformers."""
    image = picture(size)
    ours = make(folder, size=336)(text="<image>", images=image)["pixel_values"][0].numpy()
    resized = padded_square(image).resize((336, 336), Image.Resampling.BICUBIC)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    theirs = ((np.asarray(resized) / 255 - mean) / deviation).transpose(2, 0, 1)
    assert np.abs(ours - theirs).max() < 0.02


# --- ids -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """LLaMA's kind of tokenizer.model: BPE, byte fallback, no normalization, <unk> 0, <s> 1, </s> 2."""
    sentences = [
        SYSTEM,
        "USER: What is in this picture? ASSISTANT: A cat on the grass.",
        "USER: Which one is red? ASSISTANT: The second picture shows a red door.",
        "USER and ASSISTANT, USER: ASSISTANT: the USER the ASSISTANT",
    ] * 10
    return train_sentencepiece(sentences, VOCABULARY)


def write_tokenizer(folder: Path, model: bytes, **settings: Any) -> Path:
    """tokenizer.model and tokenizer_config.json as the official folders hold them."""
    folder.mkdir(exist_ok=True)

    def token(content: str) -> dict[str, Any]:
        return {
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }

    specials = {"bos_token": token("<s>"), "eos_token": token("</s>"), "unk_token": token("<unk>")}
    typed = {name: {"__type": "AddedToken", **value} for name, value in specials.items()}
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_bos_token": True,
                "add_eos_token": False,
                **typed,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 2048,
                "pad_token": None,
                "padding_side": "right",
                "sp_model_kwargs": {},
                "tokenizer_class": "LlamaTokenizer",
                **settings,
            }
        ),
        encoding="utf-8",
    )
    (folder / "special_tokens_map.json").write_text(
        json.dumps({**specials, "pad_token": "<unk>"}), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, sentencepiece_model: bytes) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("llama"), sentencepiece_model)


def make(folder: Path, template: str = "v1", size: int = 28) -> MobileMMProcessor:
    return MobileMMProcessor(
        LlavaImageProcessorPil(
            do_pad=True, size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        read_tokenizer(folder),
        num_image_tokens=SLOTS,
        image_token_id=IMAGE_ID,
        template=template,
    )


@pytest.fixture(scope="session")
def processor(folder: Path) -> MobileMMProcessor:
    return make(folder)


class SlowTokenizer:
    """transformers 4's slow LlamaTokenizer: a text is cut at special tokens, SentencePiece takes the pieces.

    With `legacy` each piece gets a dummy "▁" in front, without it only the beginning of the text.
    """

    def __init__(self, model: bytes, legacy: bool) -> None:
        self.legacy = legacy
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        proto.normalizer_spec.add_dummy_prefix = legacy
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def __call__(self, text: str) -> list[int]:
        if not self.legacy and text:
            text = "▁" + text
        pieces = [piece for piece in re.split("(<unk>|<s>|</s>)", text) if piece]
        if len(pieces) > 1 and pieces[0] == "▁" and pieces[1] in SPECIALS:
            pieces = pieces[1:]
        ids = [1]
        for piece in pieces:
            ids += [SPECIALS[piece]] if piece in SPECIALS else self.pieces.encode(piece)
        return ids


def official_ids(slow: SlowTokenizer, prompt: str) -> list[int]:
    """`tokenizer_image_token`: the chunks between images by themselves, <s> only in front of the first."""
    first, *rest = [slow(chunk) for chunk in prompt.split("<image>")]
    ids = list(first)
    for chunk in rest:
        ids += [IMAGE_ID] * SLOTS + chunk[1:]
    return ids


PROMPTS = [
    f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT:",
    f"{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Which one? ASSISTANT: The red.</s>",
    f"{SYSTEM} USER: <image>\n<image>\nWhich one is red? ASSISTANT:",
    "<image>a cat\n",
    "<image>",
    "<image> and <image> too",
    "",
    " Hello",
    "  two spaces  inside ",
    "no image at all</s>",
    "</s>USER: x",
    "</s> USER: x",
    "<s>again",
    "\n",
    "é漢😀\t\r\n  ",
    "12345 678",
    "a <unk> b",
]


@pytest.mark.parametrize("settings", [{}, {"legacy": True}, {"legacy": None}, {"legacy": False}], ids=str)
def test_ids_are_those_of_sentencepiece(
    tmp_path: Path, sentencepiece_model: bytes, settings: dict[str, Any]
) -> None:
    """Left out, `legacy` is true, as in the transformers that the official models were trained with."""
    processor = make(write_tokenizer(tmp_path / "llama", sentencepiece_model, **settings))
    slow = SlowTokenizer(sentencepiece_model, settings.get("legacy") is not False)
    rng = random.Random(0)
    words = ["USER: ", " ASSISTANT:", " ", "  ", "\n", "</s>", "<s>", "<unk>", "the picture", "cat", "é"]
    words += ["漢", "😀", "7", "<", "▁", "<image>"]
    prompts = PROMPTS + ["".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(300)]
    for prompt in prompts:
        if prompt.startswith("▁") or re.search("(<image>|</?s>|<unk>)▁", prompt):
            continue  # "▁" itself is a space to some and a letter to others
        images = [PICTURE] * prompt.count("<image>")
        assert processor(text=prompt, images=images)["input_ids"][0].tolist() == official_ids(slow, prompt), (
            prompt
        )


@pytest.mark.parametrize("legacy", [None, False])
def test_saved_and_read_again_the_ids_are_the_same(
    tmp_path: Path, sentencepiece_model: bytes, legacy: bool | None
) -> None:
    processor = make(write_tokenizer(tmp_path / "llama", sentencepiece_model, legacy=legacy))
    processor.save_pretrained(tmp_path / "saved")
    again = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert type(again) is MobileMMProcessor
    assert (again.num_image_tokens, again.image_token_id, again.template) == (SLOTS, IMAGE_ID, "v1")
    image = picture((9, 4))
    for prompt in PROMPTS:
        images = [image] * prompt.count("<image>")
        first, second = processor(text=prompt, images=images), again(text=prompt, images=images)
        assert first["input_ids"].tolist() == second["input_ids"].tolist(), prompt
        if images:
            assert torch.equal(first["pixel_values"], second["pixel_values"])
    assert again.tokenizer.pad_token_id == 0
    assert again.tokenizer.decode(again.tokenizer("A cat")["input_ids"], skip_special_tokens=True) == "A cat"


# --- masks -----------------------------------------------------------------------------------------------


def official_v1_labels(slow: SlowTokenizer, ids: list[int], turns: list[tuple[str, str]]) -> list[int]:
    """The official mask, turn by turn: <s> and all up to " ASSISTANT:" is hidden, the rest is learned."""
    labels = [-100]
    prefix = SYSTEM + " "
    for question, answer in turns:
        instruction = f"{prefix}USER: {question} ASSISTANT:"
        masked = len(official_ids(slow, instruction)) - 1
        whole = len(official_ids(slow, f"{instruction} {answer}</s>")) - 1
        at = len(labels)
        labels += [-100] * masked + ids[at + masked : at + whole]
        prefix = ""
    return labels


def check_v1_mask(
    processor: MobileMMProcessor, slow: SlowTokenizer, said: list[tuple[str, str, int]]
) -> None:
    """Ids and labels of a conversation of (question, answer, images in front of the question)."""
    messages = []
    official = []
    for question, answer, count in said:
        messages += [user(question, count), assistant(answer)]
        official.append(("<image>\n" * count + question, answer))
    prompt = f"{SYSTEM} " + "".join(
        f"USER: {question} ASSISTANT: {answer}</s>" for question, answer in official
    )
    ids, labels = processor.encode_for_training(messages)
    assert ids == official_ids(slow, prompt)
    assert labels == official_v1_labels(slow, ids, official)
    answers = [processor.tokenizer.decode(run) for run in runs(labels)]
    assert answers == [f"{answer}</s>" for _, answer in official]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_v1_mask(processor: MobileMMProcessor, sentencepiece_model: bytes, images: int, turns: int) -> None:
    said = [
        ("What is this?", "A cat.", images),
        ("Which one is red?", "The second.", 0),
        ("USER: x?", "ASSISTANT: é漢 7", 0),
    ]
    check_v1_mask(processor, SlowTokenizer(sentencepiece_model, legacy=True), said[:turns])


def test_v1_mask_of_200_generated_conversations(
    processor: MobileMMProcessor, sentencepiece_model: bytes
) -> None:
    slow = SlowTokenizer(sentencepiece_model, legacy=True)
    draw = random.Random(0)
    words = [
        "What",
        "is",
        "this",
        "a",
        "cat?",
        "red,",
        "USER:",
        "ASSISTANT:",
        "é漢",
        "7",
        "(x)",
        "yes.",
        "No\nline",
    ]
    for _ in range(200):
        said = [
            (
                " ".join(draw.choices(words, k=draw.randint(1, 12))),
                " ".join(draw.choices(words, k=draw.randint(1, 12))),
                draw.choice((0, 0, 1, 2)) if turn == 0 else 0,
            )
            for turn in range(draw.randint(1, 5))
        ]
        check_v1_mask(processor, slow, said)


def runs(labels: list[int]) -> list[list[int]]:
    """The unbroken stretches that are learned."""
    found: list[list[int]] = []
    for before, label in zip([-100, *labels], labels, strict=False):
        if label != -100:
            if before == -100:
                found.append([])
            found[-1].append(label)
    return found


def test_plain_mask(folder: Path, sentencepiece_model: bytes) -> None:
    slow = SlowTokenizer(sentencepiece_model, legacy=True)
    processor = make(folder, "plain")
    ids, labels = processor.encode_for_training([user("Describe it.", 1), assistant("a cat")])
    assert ids == official_ids(slow, "<image>a cat\n")
    assert labels == [-100] * (1 + SLOTS) + ids[1 + SLOTS :]


def test_chatml_mask(folder: Path) -> None:
    processor = make(folder, "chatml")
    processor.tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    processor.image_token_id = IMAGE_ID + 2  # behind the two
    ids, labels = processor.encode_for_training(
        [user("What?", 1), assistant("A cat"), user("x"), assistant("y")]
    )
    assert ids[0] == processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert [processor.tokenizer.decode(run) for run in runs(labels)] == ["A cat<|im_end|>", "y<|im_end|>"]
    assert ids.count(IMAGE_ID + 2) == SLOTS


def test_a_tokenizers_own_template(folder: Path) -> None:
    processor = make(folder, "tokenizer")
    processor.tokenizer.chat_template = (
        "{{ bos_token }}Help.{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids, labels = processor.encode_for_training(
        [user("What?", 1), assistant("A cat"), user("x"), assistant("y")]
    )
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert [processor.tokenizer.decode(run) for run in runs(labels)] == ["A cat</s>", "y</s>"]


def test_a_sample_from_which_nothing_is_learned_is_named(processor: MobileMMProcessor, folder: Path) -> None:
    with pytest.raises(MobileMMError, match=r"sample coco/7\.json:3: it has no supervised token"):
        processor.encode_for_training([user("Hello")], "coco/7.json:3")
    with pytest.raises(MobileMMError, match="no supervised token"):
        make(folder, "plain").encode_for_training([user("Hello", 1)])


@pytest.mark.parametrize("text", ["<image>", "a <image>\n<image> b", "USER: hi ASSISTANT: ho", "\ue000"])
def test_what_people_write_stays_text(
    processor: MobileMMProcessor, sentencepiece_model: bytes, text: str
) -> None:
    ids, labels = processor.encode_for_training([user(text, 1), assistant("A cat")])
    assert ids.count(IMAGE_ID) == SLOTS
    assert [processor.tokenizer.decode(run) for run in runs(labels)] == ["A cat</s>"]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    end = [*pieces.encode(f"\n{text} ASSISTANT: A cat"), 2]
    assert ids[-len(end) :] == end


def test_the_placeholder_in_a_vocabulary_is_text_when_people_write_it(
    tmp_path: Path, sentencepiece_model: bytes
) -> None:
    """llava-hf's tokenizer has a token `<image>`: written by a user, it must not ask for a picture."""
    folder = write_tokenizer(tmp_path / "llama", sentencepiece_model)
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": IMAGE_ID}), encoding="utf-8")
    processor = make(folder)
    assert processor.tokenizer("<image>")["input_ids"][-1] == IMAGE_ID
    ids, labels = processor.encode_for_training([user("What is <image>?", 1), assistant("<image>")])
    assert ids.count(IMAGE_ID) == SLOTS
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    end = [*pieces.encode("\nWhat is <image>? ASSISTANT: <image>"), 2]
    assert ids[-len(end) :] == end
    assert len(runs(labels)) == 1


# --- batches ---------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_left(processor: MobileMMProcessor) -> None:
    conversations = [[user("Hi")], [user("What is in this picture?", 2)], [user("Yes", 1)]]
    batch = processor.apply_chat_template(conversations, add_generation_prompt=True)
    alone = [processor.apply_chat_template(one, add_generation_prompt=True) for one in conversations]
    length = max(one["input_ids"].shape[1] for one in alone)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, length)
    for row, mask, one in zip(batch["input_ids"], batch["attention_mask"], alone, strict=True):
        ids = one["input_ids"][0].tolist()
        assert row.tolist() == [0] * (length - len(ids)) + ids
        assert mask.tolist() == [0] * (length - len(ids)) + [1] * len(ids)
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert "pixel_values" not in alone[0]
    right = processor.apply_chat_template(conversations, padding_side="right", add_generation_prompt=True)
    assert right["attention_mask"][:, 0].tolist() == [1, 1, 1]


def test_text_and_ids_alone(processor: MobileMMProcessor) -> None:
    conversation = [user("What?", 1)]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert text == f"{SYSTEM} USER: <image>\nWhat? ASSISTANT:"
    ids = processor.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert ids.tolist() == processor(text=text, images=PICTURE)["input_ids"].tolist()


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("no mark", [PICTURE]),
        ("<image>", None),
        ("<image><image>", [PICTURE]),
        (["<image>", "x"], [[PICTURE], [PICTURE]]),
    ],
)
def test_pictures_and_marks_must_agree(processor: MobileMMProcessor, text: Any, images: Any) -> None:
    with pytest.raises(MobileMMError, match=r"pictures given, but the text has \d <image>"):
        processor(text=text, images=images)


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        [[]],
        ["hello"],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": [{"type": "image", "image": "/no/such.png"}]}],
        [{"role": "user", "content": [{"type": "image", "image": 3}]}],
        [{"role": "robot", "content": "x"}],
    ],
    ids=str,
)
def test_wrong_conversations(processor: MobileMMProcessor, conversation: Any) -> None:
    with pytest.raises(MobileMMError):
        processor.apply_chat_template(conversation)
