"""A tiny random model in a folder, and the `mobilemm` command run in this process."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

from mobilemm.cli import main
from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration
from mobilemm.models.checkpoints.parts import make_processor


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<pad>", "<|im_start|>", "<|im_end|>", *alphabet]
    bpe = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = MobileMMConfig(
        vision_config=CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **sizes,
            num_attention_heads=2,
            vocab_size=len(pieces),
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.3,
        ),
        template="chatml",
    )
    model = MobileMMForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("cli") / "model"
    model.save_pretrained(folder, max_shard_size="30KB")
    make_processor(model, tokenizer, [0.5] * 3, [0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """The model's folder, free to be damaged; its weights lie in several shards."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    Image.radial_gradient("L").resize((60, 40)).save(path)
    return path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """What follows `error: `, after a check that it is all that was said."""
        assert self.code == 2
        assert self.stdout == ""
        assert self.stderr.startswith("error: ")
        assert self.stderr.count("\n") == 1
        return self.stderr.removeprefix("error: ").rstrip("\n")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`run("chat", folder, stdin=…)`: the command as a shell would run it, through `main`."""

    def command(*arguments: object, stdin: str = "") -> Ended:
        monkeypatch.setattr(sys, "argv", ["mobilemm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "200")
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return Ended(code, out, err)

    return command
