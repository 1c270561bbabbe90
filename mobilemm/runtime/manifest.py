"""The bundle's manifest, version 1: everything an app must know of a bundle, typed.

Written by `mobilemm.export`, read by `mobilemm.runtime` and, through the JSON Schema made of these classes,
by the Android and iOS demos. Plain data: no torch, no runtime.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

SCHEMA_VERSION = 1

Name = Annotated[str, Field(min_length=1, max_length=200)]
# What every phone's and computer's file system can hold, and nothing that leads out of the folder: no `..`,
# nothing hidden, no drive letters, backslashes or spaces.
_SEGMENT = r"[A-Za-z0-9_]([A-Za-z0-9._+-]*[A-Za-z0-9_+-])?"
PATH_PATTERN = rf"^{_SEGMENT}(/{_SEGMENT})*$"
RelativePath = Annotated[str, Field(min_length=1, max_length=200, pattern=PATH_PATTERN)]
Size = Annotated[int, Field(ge=1, le=2**20)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(max_length=2**16)]
Channel = Annotated[int, Field(ge=0, le=255)]


class Strict(BaseModel):
    """Unknown keys and wrong types are errors: a manifest is read from strangers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Tensor(Strict):
    """One input or output of a part. A dimension is a number, or the name of a dynamic dimension."""

    name: Name
    dtype: Literal["float32", "float16", "uint8", "int8", "int32", "int64"]
    shape: list[Annotated[int, Field(ge=0, le=2**31)] | Name]


class Quantization(Strict):
    """How a part's weights are stored. `bits` counts the main scheme's; `exceptions` maps layer to bits.

    By the method "kmeans" they are looked up in tables, and `block_size` is the most rows that share one.
    `activations` are what the part computes with: "int8" rounds them by each input's own range, "int8-static"
    by ranges that calibration has found.
    """

    bits: Literal[4, 6, 8, 16, 32]
    block_size: Annotated[int, Field(ge=1, le=2**20)] | None = None
    symmetric: bool = True
    method: Name = "none"
    activations: Literal["float32", "float16", "int8", "int8-static"] = "float32"
    exceptions: dict[str, int] = {}


class Parity(Strict):
    """The shipped part against fp32 PyTorch, as measured on the target's runtime after quantization.

    `cosine`, `snr_db` (decibels) and `max_abs_error` are over all outputs; of the decoder `top1` is the share
    of positions with the same best token, near-ties apart, and `kl` the mean KL divergence per position in
    nats.
    """

    cosine: float
    snr_db: float
    max_abs_error: float
    # The shipped part against the same quantized weights in PyTorch: what conversion alone has cost, in dB.
    conversion_db: float
    top1: float | None = None
    near_ties: float | None = None
    kl: float | None = None
    # Of a decoder: the sums behind each layer in PyTorch with the quantized weights, against fp32's, in dB.
    layers: list[float] | None = None


class Part(Strict):
    """One exported part. `file` is what a runtime opens; `files` all that it consists of."""

    file: RelativePath
    files: Annotated[list[RelativePath], Field(min_length=1)]
    inputs: Annotated[list[Tensor], Field(min_length=1)]
    outputs: Annotated[list[Tensor], Field(min_length=1)]
    quantization: Quantization
    bytes: Annotated[int, Field(ge=1, lt=2**50)]
    parameters: Annotated[int, Field(ge=0, lt=2**50)]
    peak_memory: Annotated[int, Field(ge=0, lt=2**50)]
    # Hash of all that the part was made from; a new export takes the part over when it is the same.
    fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    parity: Parity | None = None
    # Of an ONNX decoder: "shared" writes keys and values into the buffers that they are read from, which may
    # be longer than what they hold; "concatenated" gives new and longer ones at each step.
    cache: Literal["shared", "concatenated"] | None = None


class ModelCard(Strict):
    """The model's dimensions and special tokens."""

    name: Name
    family: Name
    license: Text = ""
    context_length: Size
    hidden_size: Size
    vocab_size: Size
    num_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    num_image_tokens: Annotated[int, Field(ge=0, le=2**20)]
    image_token_id: TokenId
    bos_token_id: TokenId | None
    eos_token_ids: list[TokenId]
    pad_token_id: TokenId


class Image(Strict):
    """How a picture becomes `pixels`, uint8 (1, 3, height, width). Normalization is inside the graph.

    The picture is turned upright, its transparency laid over white, converted to RGB; then, by `strategy`:
    "stretch" resizes to height × width; "pad" pads to a centred square with `pad_color` first and resizes
    then; "crop" resizes so that the shorter side is `shortest_edge` (the other:
    int(long · shortest_edge / short)) and cuts the centre out. `filter` is
    Pillow's of that name, antialiased.
    """

    height: Size
    width: Size
    strategy: Literal["stretch", "pad", "crop"]
    filter: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    pad_color: tuple[Channel, Channel, Channel] = (0, 0, 0)
    shortest_edge: Size | None = None
    # Rows and columns of the picture's tokens, where positions are counted in three dimensions (M-RoPE).
    position_grid: tuple[Size, Size] | None = None


class Turn(Strict):
    """What stands before and behind a message's content."""

    prefix: Text
    suffix: Text
    # Instead of `prefix` where the content begins with a picture; None when it is the same.
    prefix_before_image: Text | None = None
    # False where the words are left out, as in templates for captions.
    text: bool = True


class RenderedExample(Strict):
    """A conversation and what its rendering must be; `<image>` stands for a picture's placeholders."""

    messages: list[dict[str, Any]]
    rendered: Text
    input_ids: list[TokenId]


class Prompt(Strict):
    """A conversation as text, without a template language.

    `begin`, or with a system message `system`; then each turn; then `generation`, which asks for the answer.
    A user's pictures stand in front of the text, each written `image_prefix`, placeholders, `image_suffix`.
    Text between two pictures is tokenized by itself; the tokenizer's special tokens are added, if `add_bos`,
    to the first piece only. `strip` takes the white space off both ends of each message's text, or off its
    whole content, which is the text with the pictures in front of it. Without `system` there can be no system
    message. An answer ends at one of `stop`, which is not part of it.
    """

    tokenizer: RelativePath = "tokenizer.json"
    begin: Text
    system: Turn | None
    user: Turn
    assistant: Turn
    generation: Text
    # A user's turn behind an assistant's, where it is written otherwise than the first; None when it is not.
    later_user: Turn | None = None
    # A user's turn directly behind the system message, likewise.
    user_after_system: Turn | None = None
    image_prefix: Text = ""
    image_suffix: Text = ""
    strip: Literal["none", "text", "content"] = "none"
    add_bos: bool = False
    stop: list[Text] = []
    examples: list[RenderedExample] = []


class Noise(Strict):
    """What `noise` of the generator is: numbers by a rule (docs/noise.md) from a seed, in this shape."""

    rule: Literal["philox4x32-10-box-muller"]
    shape: Annotated[list[Size], Field(min_length=1, max_length=8)]


MOST_STEPS = 50
Scale = Annotated[float, Field(ge=-1e9, le=1e9)]
# Timestep; then what is multiplied: latents that enter the denoiser, latents, its prediction, fresh noise.
Row = Annotated[list[Scale], Field(min_length=5, max_length=5)]
Schedule = Annotated[list[Row], Field(min_length=1, max_length=MOST_STEPS)]


class Generation(Strict):
    """How a picture is drawn, in a bundle with the parts `output_projector` and `generator`, or step by step.

    When the model says the first signal token, all of them are fed to it, whatever it would have said next.
    Their logits, of the vocabulary's first words only (as many as `signal_logits` has), go through
    `output_projector`; `condition` and `noise` through `generator`; `picture`, float32 (1, 3, height, width)
    in [0, 1], is shown. The model goes on behind the last signal token.

    With `schedules` the parts `denoiser` and `image_decoder` are there instead of `generator`. A schedule is
    of as many steps as it has rows, and one of them has `steps`. The first noise is the first `latents`; each
    row, as `scales`, goes through `denoiser` with latents, condition and noise, and `next_latents` are the
    next step's; behind the last, or any, `image_decoder` makes `picture` of them. A row whose last number is
    not 0 takes the next noise, others take zeros: `noise.shape` is for `steps`, its second dimension 1 and
    the count of such rows, as for the rows of every other schedule.
    """

    signal_token_ids: Annotated[list[TokenId], Field(min_length=1, max_length=64)]
    height: Size
    width: Size
    steps: Size
    noise: Noise
    schedules: Annotated[list[Schedule], Field(min_length=1, max_length=MOST_STEPS)] | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Bundles without schedules stay readable for those who do not know them."""
        return {key: value for key, value in whole(self).items() if value is not None}


class Golden(Strict):
    """Vectors to check a part by on any machine: safetensors with `inputs.NAME` and `outputs.NAME` in fp32.

    The embedding's also has `row_sums` (vocabulary,): of each row of the table, looked up by its id, the sum.
    `floor_db` is the least signal-to-noise ratio of the outputs against those in the file, in decibels.
    """

    file: RelativePath
    part: Name
    floor_db: float


class GoldenConversation(Strict):
    """One whole conversation: a picture, a question, and the greedy answer that the bundle gave when made.

    `pytorch_answer` is what the checkpoint itself said in fp32; None where it was too large to be asked.
    """

    image: RelativePath | None
    prompt: Text
    input_ids: list[TokenId]
    answer_ids: list[TokenId]
    answer: Text
    pytorch_answer: Text | None = None


class File(Strict):
    """A file of the bundle."""

    path: RelativePath
    bytes: Annotated[int, Field(ge=0, lt=2**40)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Runtime(Strict):
    """What runs the bundle: its name, and the least version that does."""

    name: Name
    min_version: Name


class Manifest(Strict):
    """`manifest.json`."""

    schema_version: Literal[1]
    created_by: dict[str, str]
    target: Literal["onnx", "coreml", "executorch"]
    runtime: Runtime
    model: ModelCard
    parts: dict[Name, Part]
    image: Image | None
    prompt: Prompt
    generation: Generation | None = None
    golden: list[Golden]
    conversations: list[GoldenConversation]
    benchmarks: list[dict[str, Any]] = []
    files: Annotated[list[File], Field(min_length=1, max_length=10_000)]


def json_schema() -> str:
    """The JSON Schema of `manifest.json`, as it lies beside this file in bundle_v1.schema.json.

    After a change of these classes:
    `python -m mobilemm.runtime.manifest > mobilemm/runtime/bundle_v1.schema.json`.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
