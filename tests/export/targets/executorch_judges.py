"""ExecuTorch's own multimodal runner and its own profile, as judges of our bundles."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer

from mobilemm.runtime.backends import open_backend
from mobilemm.runtime.bundle import Bundle
from mobilemm.runtime.image import to_pixels
from mobilemm.runtime.sampling import Sampling
from mobilemm.runtime.session import Session


def runner_and_session(bundle: Bundle, count: int = 12) -> tuple[list[str], list[str]]:
    """The golden conversation's answer, token by token: of ExecuTorch's own runner, and of our session."""
    (conversation,) = bundle.manifest.conversations
    assert conversation.image is not None
    said = stock_runner_says(bundle, conversation.input_ids, bundle.path(conversation.image), count)
    session = Session(bundle, open_backend(bundle), Sampling(max_new_tokens=count))
    session.look_at(bundle.path(conversation.image))
    session.reply(conversation.prompt)
    tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer.json")))
    pieces = [tokenizer.decode([token], skip_special_tokens=False).strip() for token in session.answer_ids]
    ends = {tokenizer.id_to_token(token) for token in bundle.manifest.model.eos_token_ids}
    return [piece.strip() for piece in said if piece not in ends], pieces  # the runner says its end as well


def stock_runner_says(bundle: Bundle, ids: list[int], picture: Path, count: int) -> list[str]:
    """What ExecuTorch's runner says to these ids, a picture in the place of its placeholders, by tokens.

    MultimodalRunner, unmodified, on the same file and with the tokenizer beside it.
    """
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.runner import (
        GenerationConfig,
        MultimodalRunner,
        make_image_input,
        make_token_input,
    )

    model, image = bundle.manifest.model, bundle.manifest.image
    assert image is not None
    place = ids.index(model.image_token_id)
    pixels = torch.from_numpy(to_pixels(picture, image).copy())
    behind = ids[place + model.num_image_tokens :]
    inputs = [make_token_input(ids[:place]), make_image_input(pixels), make_token_input(behind)]
    file = bundle.part_path("decoder")
    runner = MultimodalRunner(str(file), str(bundle.path(bundle.manifest.prompt.tokenizer)))
    said: list[str] = []
    runner.generate(inputs, GenerationConfig(max_new_tokens=count, temperature=0.0, echo=False), said.append)
    return said


def delegation_is_executed(bundle: Bundle, folder: Path) -> Counter[str]:
    """Asserts that the decoder's report is what one step's profile shows; the profile's events."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401
    from executorch.devtools import Inspector
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(
        bundle.part_path("decoder"), enable_etdump=True, debug_buffer_size=2**20
    )
    hidden = bundle.manifest.model.hidden_size
    program.load_method("text_decoder").execute([torch.zeros(1, 1, hidden), torch.tensor([0])])
    program.write_etdump_result_to_file(str(folder / "etdump"), str(folder / "debug"))
    events = Counter(Inspector(etdump_path=str(folder / "etdump")).to_dataframe().event_name)
    report = json.loads((bundle.folder / "parts" / "delegation.json").read_text())["text_decoder"]
    assert events["DELEGATE_CALL"] == report["delegates"]
    calls: Counter[str] = Counter()
    for event, count in events.items():
        if event.startswith(("native_call_", "llama::")):
            calls[event.removeprefix("llama::").removeprefix("native_call_").partition(".")[0]] += count
    assert calls == {name.partition(".")[2]: one["count"] for name, one in report["portable"].items()}
    return events
