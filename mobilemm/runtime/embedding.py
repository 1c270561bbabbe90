"""Ids and pictures' features → embeddings, for runtimes whose embedding part takes ids alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mobilemm.runtime.backends import Array


def embed_with_images(
    lookup: Callable[[Array], Array],
    input_ids: Array,
    image_features: Array,
    image_token_id: int,
    vocab_size: int,
) -> Array:
    """Rows of the table, and pictures' features in the places of their placeholders, in reading order.

    A placeholder beyond the features is the model's own word, where its table has it.

    Args:
        lookup: int64 ids (1, length), none beyond the table → rows (1, length, width).
        input_ids: (1, length).
        image_features: (n, width), n may be 0.

    Returns: float32 (1, length, width).
    """
    is_image = input_ids == image_token_id
    known = np.where(is_image, 0, input_ids) if image_token_id >= vocab_size else input_ids
    rows = np.array(lookup(known), np.float32)
    places = np.flatnonzero(is_image)[: len(image_features)]
    rows[0, places] = image_features[: len(places)]
    return rows
