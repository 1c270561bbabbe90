"""Vision, embedding and decoder as ExecuTorch programs, against the whole model in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mobilemm.export import verify
from mobilemm.export.parts import parts_of
from mobilemm.export.targets.executorch import ExecutorchTarget
from mobilemm.export.verify import with_weights
from mobilemm.runtime.backends.executorch import ExecutorchDecoder, ExecutorchProgram
from mobilemm.runtime.self_check import snr_db
from tests.export.families.parity import check, mrope_positions

pytest.importorskip("executorch")

CONTEXT = 128
# LLaVA's other layouts and the second size of Qwen2.5-VL are the same modules.
EXPORTED = (
    *("mobilevlm_v1", "mobilevlm_v2", "llava_hf", "smolvlm", "idefics3", "fast_vlm", "internvl"),
    "qwen2_5_vl_84",
)


class Bundle:
    """The three programs, fed as an app feeds them. Nothing but what is expected stays outside of XNNPACK."""

    def __init__(self, split: Any, folder: Path) -> None:
        self.split, self.folder, self.target = split, folder, ExecutorchTarget()
        self.parts, self.exported = parts_of(split, CONTEXT), {}
        for name in ("decoder", "embed", "vision"):
            part = self.parts[name]
            self.exported[name] = self.target.write(part, with_weights(part.module, part.weights), folder)

    def run(self, name: str, inputs: dict[str, Any]) -> np.ndarray:
        return self.target.run(self.parts[name], self.exported[name], self.folder, inputs)

    def logits(self, ids: np.ndarray, pictures: np.ndarray, more: list[int]) -> list[np.ndarray]:
        """Of the whole prompt (1, length), and of each further token."""
        no_features = np.zeros((0, self.split.text_config.hidden_size), np.float32)
        features = self.run("vision", {"pixels": pictures}) if len(pictures) else no_features
        grid = self.split.image.position_grid
        positions = mrope_positions(self.split, ids[0].tolist(), len(more)) if grid is not None else None
        program = ExecutorchProgram(self.folder / self.exported["decoder"].file)
        decoder = ExecutorchDecoder(program, CONTEXT, grid is not None)
        made, start = [], 0
        for step in (ids, *(np.array([[token]]) for token in more)):
            end = start + step.shape[1]
            embeds = self.run("embed", {"input_ids": step, "image_features": features})
            place = None if positions is None else positions[:, :, start:end]
            made.append(decoder.decode(embeds, place, np.arange(step.shape[1])))
            if start == 0:  # all at once gives what it gives one by one
                decoder.truncate(0)
                assert np.abs(decoder.decode(embeds, place)[:, 0] - made[0][:, -1]).max() <= 1e-4
            features, start = no_features, end
        return made


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED, indirect=True)
def test_logits_are_transformers_own(case: Any, tmp_path: Path) -> None:
    bundle = Bundle(case.split, tmp_path)
    check(case, bundle)
    # So near that the floor of an export stops a GELU of the wrong kind.
    noise = torch.randint(0, 256, bundle.parts["vision"].inputs["pixels"].shape, dtype=torch.uint8)
    found = bundle.run("vision", {"pixels": noise.numpy()})
    wanted = verify.reference(bundle.parts["vision"], {"pixels": noise}).numpy()
    assert snr_db(found, wanted) > verify.FLOORS["vision"][32].conversion_db + 6
