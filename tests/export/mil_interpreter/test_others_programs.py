"""Programs of others: a package that ships with its ONNX twin, and models converted as they are."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mobilemm.export import mil_interpreter
from tests.export.mil_interpreter.programs import convert_module


@pytest.mark.parametrize("precision", ["declared", "float32"])
def test_basic_pitch_as_its_onnx_twin(precision: Any) -> None:
    """Spotify's note detector, converted by them from TensorFlow; both files come in the same package."""
    found = find_spec("basic_pitch")
    if found is None or found.origin is None:
        pytest.skip("needs basic-pitch: pip install --no-deps basic-pitch")
    models = Path(found.origin).parent / "saved_models" / "icassp_2022"
    session = onnxruntime.InferenceSession(models / "nmp.onnx", providers=["CPUExecutionProvider"])
    time = np.arange(43844) / 22050
    rng = np.random.default_rng(0)
    audio = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.2 * np.sin(2 * np.pi * 660 * time * (time > 1))
    audio = (audio + 0.01 * rng.standard_normal(len(time))).astype(np.float32)[None, :, None]
    wanted = session.run(None, {session.get_inputs()[0].name: audio})
    model = mil_interpreter.load(models / "nmp.mlpackage", precision)
    outputs = model({model.inputs()[0].name: audio})
    # The twins name their outputs otherwise: Identity_2 is the ONNX model's first output.
    for name, want in zip(("Identity_2", "Identity_1", "Identity"), wanted, strict=True):
        np.testing.assert_allclose(outputs[name], want, atol=2e-5)


class First(nn.Module):
    """A model of Hugging Face as a function of tensors that gives the first of its outputs."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs, **self.options, return_dict=False)[0]


def clip() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    return First(CLIPVisionModel(config)), (torch.randn(1, 3, 56, 56),)


def siglip() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    return First(SiglipVisionModel(config)), (torch.randn(1, 3, 56, 56),)


def whisper() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=64, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128, max_source_positions=100
    )
    return First(WhisperEncoder(config)), (torch.randn(1, 80, 200),)


def mobilenet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from torchvision.models import mobilenet_v3_small

    model = mobilenet_v3_small(num_classes=20)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "running_mean")):
            tensor.copy_(torch.rand_like(tensor) + (0.5 if name.endswith("var") else -0.5))
    return model, (torch.randn(1, 3, 64, 64),)


def unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return First(model), (torch.randn(1, 4, 16, 16), torch.tensor([37.0]), torch.randn(1, 5, 32))


def autoencoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(
        encoder_block_out_channels=(16, 16),
        decoder_block_out_channels=(16, 16),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return First(model), (torch.rand(1, 3, 32, 32),)


@pytest.mark.slow
@pytest.mark.parametrize("make", [clip, siglip, whisper, mobilenet, unet, autoencoder])
def test_model_converted_as_it_is(
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], tmp_path: Path
) -> None:
    """Plain conversion settings, random weights; relative errors over all outputs."""
    torch.manual_seed(0)
    module, inputs = make()
    module.eval()
    with torch.no_grad():
        wanted = module(*inputs).numpy()
    given = {f"x{i}": tensor.numpy() for i, tensor in enumerate(inputs)}

    def error(half: bool, precision: Any) -> float:
        path = tmp_path / f"{half}.mlpackage"
        if not path.exists():
            convert_module(path, module, inputs, half=half)
        (found,) = mil_interpreter.load(path, precision)(given).values()
        assert found.shape == wanted.shape
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    assert error(False, "declared") < 1e-5
    assert error(True, "float32") < 2e-3  # weights in fp16, arithmetic in fp32
    assert error(True, "declared") < 5e-3
