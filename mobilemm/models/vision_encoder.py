"""The vision encoder: any transformers vision model or timm model, cut behind the layer that is used."""

from __future__ import annotations

import copy
import functools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig

from mobilemm.errors import MobileMMError
from mobilemm.models.configuration import MobileMMConfig

# Where transformers' vision models keep their layers, and the norms that follow the last one.
LAYER_LISTS = ("encoder.layers", "encoder.layer", "encoder.stages", "layers", "layer", "model.layer")
FINAL_NORMS = ("post_layernorm", "layernorm", "norm")


@dataclass(frozen=True)
class FeatureShape:
    """What an encoder gives for one image: `tokens` rows of `width`, the last of which are the grid's."""

    tokens: int
    width: int
    grid: tuple[int, int]
    channels_last: bool


class VisionEncoder(nn.Module):
    """Pixels → features, F_X = ME(I_X).

    Shapes: `pixel_values` (images, 3, image_size, image_size), normalized → (images, tokens, width). With the
    "default" selection the tokens are the grid's, in row-major order; with "full" the class and register
    tokens stand before them.

    Raises MobileMMError for a vision model that transformers or timm does not know, or a layer it has not.
    """

    def __init__(self, config: MobileMMConfig) -> None:
        super().__init__()
        self.config = config
        self.model, unused = _build(config)
        # What an official checkpoint carries although nothing runs it.
        self.unused = nn.ModuleDict(unused) if config.keep_unused_layers and unused else None
        self.shape = feature_shape(config)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch tokens."""
        return self.shape.grid

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens before the patch tokens: none but with the "full" selection."""
        full = self.config.vision_feature_select_strategy == "full"
        return self.shape.tokens - self.grid[0] * self.grid[1] if full else 0

    @property
    def width(self) -> int:
        """Size of one feature vector."""
        return self.shape.width

    def forward(self, pixel_values: Tensor) -> Tensor:
        features = _run(self.model, self.config, pixel_values)
        if features.ndim == 4:
            features = features.flatten(1, 2) if self.shape.channels_last else features.flatten(2).mT
        if self.config.vision_feature_select_strategy == "full":
            return features
        return features[:, self.shape.tokens - self.grid[0] * self.grid[1] :]


def feature_shape(config: MobileMMConfig) -> FeatureShape:
    """Shape of the encoder's features, found by running it on shapes alone: no weights, no arithmetic."""
    vision = config.vision_config
    assert isinstance(vision, PreTrainedConfig)
    return _probe(json.dumps(vision.to_dict(), default=str), config.image_size, config.vision_feature_layer)


@functools.lru_cache(maxsize=64)
def _probe(vision_json: str, size: int, feature_layer: int) -> FeatureShape:
    config = MobileMMConfig(
        vision_config=json.loads(vision_json),
        text_config={"model_type": "llama"},  # any: it has no part in this, and left out it makes a warning
        image_size=size,
        vision_feature_layer=feature_layer,
    )
    model: Any
    with torch.device("meta"):
        model, _ = _build(config)
    # BEiT caches an index tensor, made on the device in scope, for all models to come: it must hold numbers.
    with torch.device("cpu"), torch.no_grad():
        try:
            features = _run(model.eval(), config, torch.zeros(1, 3, size, size, device="meta"))
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise MobileMMError(
                f"vision encoder {config.vision_config.model_type!r} does not run on the pixels of a"
                f" {size}×{size} image alone: {error}"
            ) from error
    if features.ndim == 4:
        channels = (
            model.feature_info.channels()[-1]
            if hasattr(model, "feature_info") and not hasattr(model, "forward_features")
            else getattr(model, "num_features", features.shape[1])
        )
        channels_last = features.shape[1] != channels and features.shape[3] == channels
        if channels_last:
            height, columns, width = features.shape[1:]
        else:
            width, height, columns = features.shape[1:]
        return FeatureShape(height * columns, width, (height, columns), channels_last)
    _, tokens, width = features.shape
    side = _side(model, config.vision_config, tokens, size)
    if side * side > tokens:
        raise MobileMMError(
            f"vision encoder {config.vision_config.model_type!r}: {tokens} tokens do not hold the"
            f" {side}×{side} grid of a {size} px image"
        )
    return FeatureShape(tokens, width, (side, side), False)


def _side(model: nn.Module, vision: PreTrainedConfig, tokens: int, size: int) -> int:
    """Rows, and columns, of the grid that the last of an image's `tokens` tokens form."""
    if vision.model_type == "timm_wrapper":
        return math.isqrt(tokens - getattr(model, "num_prefix_tokens", 0))
    patch = getattr(vision, "patch_size", None)
    if patch is None:
        raise MobileMMError(f"vision encoder {vision.model_type!r}: its config has no patch_size")
    if isinstance(patch, (list, tuple)):
        patch = patch[0]
    stages = len(_layers(model)) if hasattr(vision, "depths") else 1
    return size // (int(patch) * 2 ** (stages - 1))


def _run(model: Any, config: MobileMMConfig, pixel_values: Tensor) -> Tensor:
    """The model's last hidden state: (n, tokens, width), or 4-D from convolutional models."""
    vision = config.vision_config
    if vision.model_type == "timm_wrapper":
        if hasattr(model, "forward_features"):
            return model.forward_features(pixel_values)
        return model(pixel_values)[-1]
    options = {}
    if vision.model_type == "vit_mae":
        # A masked autoencoder sorts its patches by this noise; a ramp leaves them where they are.
        patches = (config.image_size // vision.patch_size) ** 2
        ramp = torch.arange(patches, device=pixel_values.device, dtype=torch.float32)
        options["noise"] = ramp.expand(pixel_values.shape[0], -1)
    return model(pixel_values, **options).last_hidden_state


def _build(config: MobileMMConfig) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The encoder up to the selected layer, and apart from it the parts that lie behind."""
    vision = config.vision_config
    assert isinstance(vision, PreTrainedConfig)
    if vision.model_type == "timm_wrapper":
        return _build_timm(config), {}
    vision = copy.deepcopy(vision)
    size = config.image_size
    if hasattr(vision, "image_size"):
        vision.image_size = [size, size] if isinstance(vision.image_size, (list, tuple)) else size
    if hasattr(vision, "vision_use_head"):  # SigLIP's pooling head
        vision.vision_use_head = False
    if vision.model_type == "vit_mae":
        vision.mask_ratio = 0.0
    try:
        model = AutoModel.from_config(vision)
    except ValueError as error:
        raise MobileMMError(
            f"vision_config: transformers builds no vision model {vision.model_type!r} of it: {error}"
        ) from error
    if getattr(model, "pooler", None) is not None and any(True for _ in model.pooler.parameters()):
        model.pooler = None
    return model, _cut(model, config.vision_feature_layer)


def _layers(model: nn.Module) -> nn.ModuleList:
    for path in LAYER_LISTS:
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList):
            return layers
    raise MobileMMError(f"vision encoder {type(model).__name__}: its list of layers was not found")


def _cut(model: nn.Module, feature_layer: int) -> dict[str, nn.Module]:
    """Takes off what lies behind the selected hidden state, and returns it."""
    if feature_layer == -1:
        return {}
    layers = _layers(model)
    kept = feature_layer if feature_layer > 0 else len(layers) + 1 + feature_layer
    if not 1 <= kept <= len(layers):
        raise MobileMMError(f"vision_feature_layer {feature_layer}: the encoder has {len(layers)} layers")
    if kept == len(layers):
        return {}
    unused: dict[str, nn.Module] = {"layers": layers[kept:]}
    del layers[kept:]
    last: Any = layers[-1]
    if getattr(last, "downsample", None) is not None:  # Swin's stages end in one
        unused["downsample"] = last.downsample
        last.downsample = None
    for name in FINAL_NORMS:
        if isinstance(getattr(model, name, None), nn.LayerNorm):
            unused["norm"] = getattr(model, name)
            setattr(model, name, nn.Identity())
    return unused


def _build_timm(config: MobileMMConfig) -> nn.Module:
    import timm
    from timm.models.efficientnet import EfficientNetFeatures
    from timm.models.mobilenetv3 import MobileNetV3Features

    vision = config.vision_config
    options: dict[str, Any] = {"pretrained": False, **(getattr(vision, "model_args", None) or {})}
    if config.vision_feature_layer == -1:
        options |= {"num_classes": 0, "global_pool": ""}
    else:
        layer = config.vision_feature_layer
        options |= {"features_only": True, "out_indices": (layer - 1 if layer > 0 else layer,)}
    if vision.architecture.partition(".")[0] not in timm.list_models(include_tags=False):
        near = timm.list_models(f"*{vision.architecture.split('_')[0]}*")[:8]
        raise MobileMMError(
            f"timm {timm.__version__} has no model {vision.architecture!r}; near: {', '.join(near) or 'none'}"
        )
    try:
        try:  # models with position embeddings need to know the size, convolutional ones do not take it
            model = timm.create_model(vision.architecture, img_size=config.image_size, **options)
        except TypeError:
            model = timm.create_model(vision.architecture, **options)
    except (RuntimeError, AssertionError, IndexError, ValueError, TypeError) as error:
        raise MobileMMError(
            f"timm model {vision.architecture!r} at {config.image_size} px, layer"
            f" {config.vision_feature_layer}, arguments {getattr(vision, 'model_args', None)}: {error}"
        ) from error
    if isinstance(model, (EfficientNetFeatures, MobileNetV3Features)):
        # Alone among timm's models these keep, and run, the blocks behind the features asked for.
        del model.blocks[max(model.feature_info.get("stage")) :]
    return model
