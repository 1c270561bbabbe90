"""Vision, embedding and decoder as ONNX files on onnxruntime, against the whole model in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilemm.export.parts import parts_of
from mobilemm.export.targets.onnx import OnnxOptions, OnnxTarget, cache_names
from mobilemm.export.verify import with_weights
from tests.export.families.parity import EXPORTED, check, mrope_positions

onnxruntime = pytest.importorskip("onnxruntime")


class Bundle:
    """The three files, fed as an app feeds them."""

    def __init__(self, split: Any, folder: Path, options: OnnxOptions) -> None:
        self.split, self.parts = split, parts_of(split)
        self.sessions = {}
        for name, part in self.parts.items():
            files = OnnxTarget(options).write(part, with_weights(part.module, part.weights), folder).files
            path = folder / files[0]
            self.sessions[name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(self, name: str, inputs: dict[str, Any]) -> list[np.ndarray]:
        return self.sessions[name].run(None, inputs)

    def logits(self, ids: np.ndarray, pictures: np.ndarray, more: list[int]) -> list[np.ndarray]:
        """Of the whole prompt (1, length), and of each further token."""
        cache, width = self.parts["decoder"].cache, self.split.text_config.hidden_size
        assert cache is not None
        empty = np.zeros((1, cache.num_key_value_heads, 0, cache.head_dim), np.float32)
        past = dict.fromkeys(cache_names(cache.num_layers), empty)
        no_features = np.zeros((0, width), np.float32)
        features = self.run("vision", {"pixels": pictures})[0] if len(pictures) else no_features
        positions = mrope_positions(self.split, ids[0].tolist(), len(more))
        made, start = [], 0
        for step in (ids, *(np.array([[token]]) for token in more)):
            end = start + step.shape[1]
            embeds = self.run("embed", {"input_ids": step, "image_features": features})[0]
            inputs = {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, end), np.int64),
                "logits_positions": np.arange(step.shape[1]),
                **past,
            }
            if self.split.image.position_grid is not None:
                inputs["position_ids"] = positions[:, :, start:end]
            logits, *present = self.run("decoder", inputs)
            made.append(logits)
            past = dict(zip(past, present, strict=True))
            features, start = no_features, end
        return made


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED, indirect=True)
def test_logits_are_transformers_own(case: Any, tmp_path: Path) -> None:
    check(case, Bundle(case.split, tmp_path, OnnxOptions()))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mobilevlm_v2", "qwen2_5_vl_84"], indirect=True)
def test_logits_in_standard_operators(case: Any, tmp_path: Path) -> None:
    check(case, Bundle(case.split, tmp_path, OnnxOptions(standard_ops=True)))
