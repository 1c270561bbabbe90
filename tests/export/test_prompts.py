"""Chat templates told without a template language, against the processors that they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PIL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import mobilemm
from mobilemm.data.processor import MobileMMProcessor
from mobilemm.errors import MobileMMError
from mobilemm.export.families import split_model
from mobilemm.export.prompts import derive_prompt
from mobilemm.export.split import SplitModel
from mobilemm.runtime.manifest import Image, Prompt, Turn
from mobilemm.runtime.prompt import PromptTokenizer, render, with_marks
from tests.families import conftest as tiny

SQUARE = {"height": 32, "width": 32}
RED = PIL.new("RGB", (40, 30), "red")
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]


def byte_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """All bytes and the special tokens; with `bos`, a post-processor that puts `<s>` in front."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    if bos:
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def split_of(template: str, tokenizer: Any, jinja: str | None = None) -> SplitModel:
    """As much of a model of ours as its prompt needs: 3 tokens a picture, their id outside the vocabulary."""
    if jinja is not None:
        tokenizer.chat_template = jinja
    processor = MobileMMProcessor(
        LlavaImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_pad=True
        ),
        tokenizer,
        num_image_tokens=3,
        image_token_id=32000,
        template=template,
    )
    return SplitModel(
        family="mobilemm",
        vision=nn.Identity(),
        image=Image(height=32, width=32, strategy="pad", filter="bicubic"),
        mean=(0.5,) * 3,  # type: ignore[arg-type]
        std=(0.5,) * 3,  # type: ignore[arg-type]
        num_image_tokens=3,
        image_token_id=32000,
        text_config=None,
        text_weights={},
        processor=processor,
    )


def message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {
        "role": role,
        "content": [*[{"type": "image", "image": RED}] * images, {"type": "text", "text": text}],
    }


# None of these is among the conversations of the proof.
LAST = message("user", "Wirklich?\n\n- ja\n- nein 🤔")
CONVERSATIONS = {
    "words": [message("user", "Tell me, ASSISTANT: who am I?  USER: you")],
    "four pictures": [message("user", "Which of them?", 4)],
    "a long one": [
        message("user", "a", 1),
        message("assistant", "b\nc"),
        message("user", "d", 2),
        message("assistant", "é 漢"),
        message("user", "e"),
        message("assistant", "f"),
        LAST,
    ],
    "an empty question": [message("user", "", 1)],
    "a system message": [
        message("system", "Be  brief.\n"),
        message("user", "x", 2),
        message("assistant", "y"),
        LAST,
    ],
}


def check(split: SplitModel, prompt: Prompt, names: Any = tuple(CONVERSATIONS)) -> None:
    """Our ids are the processor's."""
    tokenizer = PromptTokenizer(
        split.processor.tokenizer.backend_tokenizer, prompt, split.image_token_id, split.num_image_tokens
    )
    for name in names:
        messages = CONVERSATIONS[name]
        if name == "a system message" and prompt.system is None:
            with pytest.raises(MobileMMError, match="takes no system prompt"):
                tokenizer.encode(messages)
            continue
        wanted = split.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )["input_ids"][0]
        assert tokenizer.encode(messages) == wanted.tolist(), name
    for example in prompt.examples:
        assert with_marks(render(prompt, example.messages)) == example.rendered
        assert tokenizer.encode(example.messages) == example.input_ids
    assert len(prompt.examples) >= 3
    assert Prompt.model_validate_json(prompt.model_dump_json()) == prompt


@pytest.mark.parametrize("kind", ["bytes", "bytes with <s>", "llama"])
@pytest.mark.parametrize("template", ["v1", "plain", "chatml"])
def test_our_templates(template: str, kind: str, llama_like: Any) -> None:
    split = split_of(template, llama_like if kind == "llama" else byte_tokenizer("with" in kind))
    prompt = derive_prompt(split)
    check(split, prompt)
    assert prompt.add_bos == (kind != "bytes" and template != "chatml")
    assert prompt.stop == list(split.processor.conversation_template.stop)


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    from tests.runtime.conftest import llama_tokenizer

    made = llama_tokenizer("▁What", "▁is", "▁this", "▁USER", "▁ASSISTANT")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def test_what_v1_comes_to() -> None:
    prompt = derive_prompt(split_of("v1", byte_tokenizer(True)))
    assert prompt.user == Turn(prefix=" USER: ", suffix="")
    assert prompt.later_user == Turn(prefix="USER: ", suffix="")
    assert prompt.assistant == Turn(prefix=" ASSISTANT: ", suffix="</s>")
    assert (prompt.generation, prompt.image_suffix) == (" ASSISTANT:", "\n")
    assert prompt.begin.startswith("A chat between a curious user")


# In the shape of published ones.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}<|im_start|>system\n\nCutting Knowledge Date: December 2023\n\n"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}"
    "{% set messages = messages[1:] %}{% endif %}<|im_end|>"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n\n"
    "{{ message['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ first if loop.first else '' }}{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] }} [/INST]{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PUBLISHED = {"SmolLM2": SMOLLM2, "Llama 3": LLAMA3, "Gemma 2": GEMMA2, "Gemma 3": GEMMA3, "Mistral": MISTRAL}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_tokenizers_own_template(name: str) -> None:
    split = split_of("tokenizer", byte_tokenizer(True), PUBLISHED[name])
    prompt = derive_prompt(split)
    # Only a system message is not trimmed by Gemma 3, so its ends are not tried.
    names = [key for key in CONVERSATIONS if (name, key) != ("Gemma 3", "a system message")]
    check(split, prompt, names)
    assert prompt.strip == ("none" if name in ("SmolLM2", "Mistral") else "content")
    assert (prompt.system is None) == (name in ("Gemma 2", "Mistral"))
    assert (prompt.user_after_system is not None) == (name == "Gemma 3")


EXPORTED = {build.__name__: build for build in (tiny.smolvlm, tiny.fast_vlm, tiny.internvl, tiny.qwen2_5_vl)}


@pytest.mark.parametrize("name", EXPORTED)
def test_families(name: str, tmp_path: Path) -> None:
    EXPORTED[name](tmp_path)
    split = split_model(*mobilemm.load(tmp_path))
    prompt = derive_prompt(split)
    check(split, prompt)
    if name == "smolvlm":
        assert prompt.user.prefix == "User: "
        assert prompt.user.prefix_before_image == "User:"
    assert (
        prompt.image_prefix
        == {
            "smolvlm": "<fake_token_around_image><global-img>",
            "fast_vlm": "",
            "internvl": "<img>",
            "qwen2_5_vl": "<|vision_start|>",
        }[name]
    )


def test_a_processor_without_a_template(tmp_path: Path) -> None:
    tiny.fast_vlm(tmp_path)
    split = split_model(*mobilemm.load(tmp_path))
    split.processor.chat_template = None
    with pytest.raises(MobileMMError, match="fast_vlm: its processor has no chat template"):
        derive_prompt(split)


COUNTED = (
    "{% for message in messages %}{{ loop.index }}. {{ message['role'] }}: {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ messages | length + 1 }}. assistant: {% endif %}"
)
SHOUTED = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] | upper }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
UNQUESTIONING = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] | replace('?', '!') }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("jinja", "why"),
    [
        (COUNTED, r"knows no Jinja \(two turns: it writes '1\. user: .*3\. user: And why"),
        (SHOUTED, "'Probeanswer' is not to be found"),
        (UNQUESTIONING, r"one question: it writes 'user: What is this!"),
    ],
    ids=["counted", "shouted", "unquestioning"],
)
def test_a_template_that_does_more(jinja: str, why: str) -> None:
    with pytest.raises(MobileMMError, match=why):
        derive_prompt(split_of("tokenizer", byte_tokenizer(False), jinja))
