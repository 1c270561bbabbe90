"""Families taken apart, against their own models; and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as PIL
from torch.export import Dim
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import mobilemm
from mobilemm.errors import MobileMMError
from mobilemm.export.families import FAMILIES, split_model
from tests.families import conftest as tiny

PICTURE = PIL.radial_gradient("L").resize((60, 40)).convert("RGB")


def close(found: Any, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal up to a share of the largest value."""
    assert tuple(found.shape) == tuple(wanted.shape)
    assert float((torch.as_tensor(found) - wanted).abs().max() / wanted.abs().max()) <= tolerance


@pytest.mark.parametrize("images", [1, 3])
def test_vision_is_the_models_own(case: Any, images: int) -> None:
    pixels = case.pixels(images)
    with torch.no_grad():
        found = case.split.vision(pixels)
    close(found, case.features(pixels), 1e-5)
    assert found.shape[1] == case.split.num_image_tokens
    assert found.shape[2] == case.split.text_config.hidden_size


def test_vision_has_no_dead_parameters(case: Any) -> None:
    vision = copy.deepcopy(case.split.vision)
    for parameter in vision.parameters():
        parameter.requires_grad_()
    vision(case.pixels(2)).square().sum().backward()
    dead = [name for name, parameter in vision.named_parameters() if parameter.grad is None]
    assert dead == []


def test_torch_export_with_any_number_of_images(case: Any) -> None:
    program = torch.export.export(
        case.split.vision, (case.pixels(2),), dynamic_shapes=({0: Dim("images", min=1, max=64)},)
    )
    for images in (1, 3):
        pixels = case.pixels(images, seed=images)
        with torch.no_grad():
            close(program.module()(pixels), case.features(pixels), 1e-5)


# Opset 20 is what the ONNX target takes for vision; at 23 attention is one operator.
@pytest.mark.slow
@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize(
    "case", ["mobilevlm_v1", "smolvlm", "fast_vlm", "internvl", "qwen2_5_vl_84"], indirect=True
)
def test_onnx_export_with_any_number_of_images(case: Any, opset: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "vision.onnx"
    program = torch.onnx.export(
        case.split.vision,
        (case.pixels(2),),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: "images"},),
        input_names=["pixels"],
        verbose=False,
    )
    assert program is not None
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (1, 3):
        pixels = case.pixels(images, seed=images)
        close(session.run(None, {"pixels": pixels.numpy()})[0], case.features(pixels), 1e-4)


def test_text_weights_load_strictly(case: Any) -> None:
    split = case.split
    config = split.text_config
    if config.model_type == "qwen2_5_vl_text":  # Qwen2's layers; only positions differ
        settings = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        model: Any = Qwen2ForCausalLM(Qwen2Config(**settings))
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    result = model.load_state_dict(dict(split.text_weights), strict=False)
    assert result.unexpected_keys == []
    assert result.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    # The text alone, through the whole model and through the parts.
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        close(model.eval()(input_ids=ids).logits, case.model(input_ids=ids).logits, 1e-5)


def test_text_weights_are_the_models_own_memory(case: Any) -> None:
    theirs = {tensor.data_ptr() for tensor in case.model.state_dict().values()}
    assert all(tensor.data_ptr() in theirs for tensor in case.split.text_weights.values())


def test_tied_heads_are_left_out(tmp_path: Path) -> None:
    for tied in (True, False):
        tiny.smolvlm(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path, tie_word_embeddings=tied)
        config.text_config.tie_word_embeddings = not tied  # only the outer one counts
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        split = split_model(model, transformers.AutoProcessor.from_pretrained(tmp_path))
        assert ("lm_head.weight" in split.text_weights) is not tied
        assert split.text_config.tie_word_embeddings is tied


def test_one_picture_in_the_prompt(case: Any) -> None:
    split = case.split
    processor = split.processor
    inputs = processor(images=[PICTURE], text=[f"a{processor.image_token}b"], return_tensors="pt")
    row = inputs["input_ids"][0].tolist()
    assert row.count(split.image_token_id) == split.num_image_tokens
    start = row.index(split.image_token_id)
    end = start + split.num_image_tokens
    assert row[start:end] == [split.image_token_id] * split.num_image_tokens
    decode = processor.tokenizer.decode
    before, behind = decode(row[:start]), decode(row[end:])
    assert before.endswith("a" + split.image_prefix)
    assert behind == split.image_suffix + "b"


WRAPPINGS = {
    "smolvlm": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    "idefics3": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    "internvl": ("<img>", "</img>"),
}


def test_text_around_a_picture(case: Any) -> None:
    found = (case.split.image_prefix, case.split.image_suffix)
    assert found == WRAPPINGS.get(case.name, ("", ""))


def test_image_says_what_the_processor_does(case: Any) -> None:
    """The picture prepared by hand, as the manifest's rule has it, against the processor's pixels."""
    image, processor = case.split.image, case.split.processor
    size = (image.width, image.height)
    resample = PIL.Resampling[image.filter.upper()]
    picture = PICTURE
    if image.strategy == "pad":
        longest = max(picture.size)
        square = PIL.new("RGB", (longest, longest), image.pad_color)
        square.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
        picture = square.resize(size, resample)
    elif image.strategy == "crop":
        short = min(picture.size)
        scaled = [int(side * image.shortest_edge / short) for side in picture.size]
        picture = picture.resize(scaled, resample)
        left, top = (picture.width - image.width) // 2, (picture.height - image.height) // 2
        picture = picture.crop((left, top, left + image.width, top + image.height))
    else:
        picture = picture.resize(size, resample)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    mean, std = (torch.tensor(value)[:, None, None] for value in (case.split.mean, case.split.std))
    wanted = ((pixels / 255 - mean) / std)[None]

    made = processor(images=[PICTURE], text=[processor.image_token], return_tensors="pt")
    if "image_grid_thw" in made:
        patchify = transformers.Qwen2VLImageProcessor().patchify
        wanted = patchify(wanted, 14, 2, 2)[0][0]
        assert made["image_grid_thw"].tolist() == [[1, image.height // 14, image.width // 14]]
        assert image.position_grid == (image.height // 28, image.width // 28)
    found = made["pixel_values"].reshape(wanted.shape)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_model_and_processor_stay_as_they_were(tmp_path: Path) -> None:
    tiny.internvl(tmp_path)
    model, processor = mobilemm.load(tmp_path)
    modules, settings = str(model), processor.image_processor.to_dict()
    split_model(model, processor)
    assert str(model) == modules
    assert processor.image_processor.to_dict() == settings
    row = processor(images=[PICTURE.resize((80, 40))], text=["<IMG_CONTEXT>"])["input_ids"][0]
    assert row.count(processor.image_token_id) == 12  # two tiles and a thumbnail, 4 tokens each


@pytest.mark.parametrize(
    "name", ["paligemma", "gemma3", "lfm2_vl", "qwen2_vl", "qwen3_vl", "llava_onevision"]
)
def test_unknown_families_are_named(name: str, tmp_path: Path) -> None:
    getattr(tiny, name)(tmp_path)
    model, processor = mobilemm.load(tmp_path)
    with pytest.raises(MobileMMError) as error:
        split_model(model, processor)
    assert f"model_type {name!r}" in str(error.value)
    assert repr(model.config.vision_config.model_type) in str(error.value)
    assert all(family in str(error.value) for family in FAMILIES)


def test_sizes_that_a_family_does_not_take(tmp_path: Path) -> None:
    tiny.smolvlm(tmp_path / "smolvlm")
    with pytest.raises(MobileMMError, match=r"image size 64: this smolvlm model takes pictures of 32×32"):
        split_model(*mobilemm.load(tmp_path / "smolvlm"), image_size=64)
    tiny.qwen2_5_vl(tmp_path / "qwen")
    loaded = mobilemm.load(tmp_path / "qwen")
    with pytest.raises(MobileMMError, match=r"image size 100: .* multiples of 28, such as 112"):
        split_model(*loaded, image_size=100)
    assert split_model(*loaded).num_image_tokens == 256


def test_pieces_that_are_unknown(tmp_path: Path) -> None:
    tiny.internvl(tmp_path)
    model, processor = mobilemm.load(tmp_path)

    layers = copy.deepcopy(model.config)
    layers.vision_feature_layer = [-2, -1]
    with pytest.raises(MobileMMError, match=r"vision_feature_layer \[-2, -1\] is unknown to export"):
        split_model(_with(model, layers), processor)

    other = copy.copy(processor)
    other.image_processor = transformers.SiglipImageProcessor()
    with pytest.raises(MobileMMError, match=r"image processor SiglipImageProcessor is unknown to export"):
        split_model(model, other)

    more = copy.copy(processor)
    more.image_seq_length = 5
    with pytest.raises(MobileMMError, match=r"makes 4 tokens of a picture, the processor writes 5"):
        split_model(model, more)


def _with(model: Any, config: Any) -> Any:
    changed = copy.copy(model)
    changed.config = config
    return changed


def test_half_precision_stays_as_it_is(official_checkpoint: Any) -> None:
    model, processor = mobilemm.load(official_checkpoint("ldpnetv2", dtype=torch.float16).folder)
    split = split_model(model, processor)
    assert {weight.dtype for weight in split.text_weights.values()} == {torch.float16}
    assert {weight.dtype for weight in split.vision.parameters()} == {torch.float16}
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        found, wanted = split.vision(pixels), model.get_image_features(pixels.half())
    assert found.dtype == torch.float16
    assert torch.equal(found, wanted)


def test_bfloat16_qwen_at_its_default_size(tmp_path: Path) -> None:
    tiny.qwen2_5_vl(tmp_path)
    model, processor = mobilemm.load(tmp_path, dtype="bfloat16")
    split = split_model(model, processor)
    pixels = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    patches, *grid = transformers.Qwen2VLImageProcessor().patchify(pixels, 14, 2, 2)
    with torch.no_grad():
        found = split.vision(pixels)
        (wanted,) = model.model.get_image_features(patches[0], torch.tensor([[1, *grid]])).pooler_output
    assert found.dtype == torch.bfloat16
    close(found[0].float(), wanted.float(), 0.05)


def llava(vision: dict[str, Any], tokenizer: Any, **options: Any) -> Any:
    text = {**tiny.WIDTHS, **tiny.CONTEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    vision = {**tiny.WIDTHS, "image_size": 28, "patch_size": 14, **vision}
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, **options
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def test_llavas_with_other_towers_and_projectors() -> None:
    tokenizer = tiny.tokenizer("<image>", eos="</s>")
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_convert_rgb=True
    )
    processor = transformers.LlavaProcessor(images, tokenizer, 14, "full")
    siglip = {"model_type": "siglip_vision_model"}
    model = llava(siglip, tokenizer, vision_feature_select_strategy="full")
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        found = split_model(model, processor).vision(pixels)
        close(found, torch.stack(model.model.get_image_features(pixels).pooler_output), 1e-5)

    for options, words in (
        ({"projector_hidden_act": "relu"}, r"a projector with activation 'relu' and bias True"),
        ({"multimodal_projector_bias": False}, r"a projector with activation 'gelu' and bias False"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer \[-2, -1\]"),
        ({"vision_feature_layer": -1}, r"vision_feature_layer -1"),
    ):
        with pytest.raises(MobileMMError, match=words + " is unknown to export; known: "):
            split_model(llava(siglip, tokenizer, **options), processor)
    pixtral = llava({"model_type": "pixtral"}, tokenizer)
    with pytest.raises(
        MobileMMError, match="vision model 'pixtral' is unknown to export; known: clip_vision"
    ):
        split_model(pixtral, processor)
    images.size = {"shortest_edge": 20}
    with pytest.raises(MobileMMError, match=r"settings \(do_pad .* are unknown to export; known: plain"):
        split_model(llava(siglip, tokenizer), processor)


def test_projectors_that_read_the_users_words() -> None:
    from mobilemm.models import MobileMMConfig, MobileMMForConditionalGeneration

    sizes = {**tiny.WIDTHS, "vocab_size": 99}
    qformer = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 2}
    config = MobileMMConfig(
        vision_config={"model_type": "clip_vision_model", **tiny.WIDTHS, "image_size": 28, "patch_size": 14},
        text_config={"model_type": "llama", **sizes},
        projector={"type": "qformer", "instruction": True, "vocab_size": 99, **qformer},
    )
    with pytest.raises(MobileMMError, match="projector 'qformer' with instruction=True"):
        split_model(MobileMMForConditionalGeneration(config), None)


@pytest.mark.parametrize("size", [{"shortest_edge": 24}, {"height": 24, "width": 24}])
def test_pictures_padded_to_a_square(official_checkpoint: Any, size: dict[str, int]) -> None:
    model, processor = mobilemm.load(official_checkpoint("ldpnetv2").folder)
    processor.image_processor.size = size
    image = split_model(model, processor).image
    assert (image.strategy, image.height, image.width) == ("pad", 24, 24)
    assert image.pad_color == (122, 116, 104)  # LLaVA's: CLIP's mean, rounded down
    processor.image_processor.rescale_factor = 1.0
    with pytest.raises(MobileMMError, match="must scale pixels to 0…1"):
        split_model(model, processor)


@pytest.mark.slow
def test_the_default_model() -> None:
    model, processor = mobilemm.load()
    split = split_model(model, processor)
    assert (split.family, split.num_image_tokens, split.image.strategy) == ("mobilemm", 16, "pad")
    assert split.text_config.tie_word_embeddings
    assert "lm_head.weight" not in split.text_weights
    pixels = torch.randn(2, 3, split.image.height, split.image.width)
    with torch.no_grad():
        close(split.vision(pixels), model.get_image_features(pixels), 1e-5)
