"""Pictures' rows laid over on the host, as `Embed` does it in a graph."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mobilemm.export.parts import Embed, TokenEmbedding
from mobilemm.runtime.embedding import embed_with_images


@pytest.mark.parametrize("image_token_id", [7, 40])
@pytest.mark.parametrize("rows", [0, 2, 3, 5])
def test_rows_on_the_host_are_those_of_the_graph(image_token_id: int, rows: int) -> None:
    torch.manual_seed(rows)
    embed = Embed(20, 6, image_token_id, scale=1.5)
    ids = torch.tensor([[3, image_token_id, image_token_id, 5, image_token_id, 19]])
    features = torch.randn(rows, 6)
    asked: list[int] = []

    def lookup(known: np.ndarray) -> np.ndarray:
        asked.extend(known.ravel().tolist())
        with torch.no_grad():
            return TokenEmbedding(embed)(torch.from_numpy(known)).numpy()

    found = embed_with_images(lookup, ids.numpy(), features.numpy(), image_token_id, 20)
    with torch.no_grad():
        wanted = embed(ids, features).numpy()
    np.testing.assert_array_equal(found, wanted)
    assert max(asked) < 20
