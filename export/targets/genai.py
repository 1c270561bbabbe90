"""`genai_config.json`, by which onnxruntime-genai runs an ONNX bundle as it stands."""

from __future__ import annotations

import json
from typing import Any

from mobilemm.runtime.manifest import Manifest

# onnxruntime-genai knows no model of ours. These types of its own run the same three parts: vision, embedding
# that splices features in, and a decoder that takes embeddings; the second counts positions in three
# dimensions.
MODEL_TYPE, MROPE_MODEL_TYPE = "gemma3", "qwen2_5_vl"


def genai_config(manifest: Manifest) -> str:
    """The file's content. What it cannot say, preparing pictures and the prompt, stays with the app.

    The decoder's logits must be declared as those of one position: onnxruntime-genai allocates them itself,
    for every position of the prompt unless the file says 1.

    Source: onnxruntime-genai 0.18, src/config.h, src/models/logits.cpp and position_inputs.cpp.
    """
    model = manifest.model
    parts = manifest.parts
    mrope = any(value.name == "position_ids" for value in parts["decoder"].inputs)
    decoder: dict[str, Any] = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": parts["decoder"].file,
        "head_size": model.head_dim,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "num_hidden_layers": model.num_layers,
        "inputs": {
            "inputs_embeds": "inputs_embeds",
            "attention_mask": "attention_mask",
            **({"position_ids": "position_ids"} if mrope else {}),
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    config = {
        "model": {
            "type": MROPE_MODEL_TYPE if mrope else MODEL_TYPE,
            "bos_token_id": model.bos_token_id if model.bos_token_id is not None else model.eos_token_ids[0],
            "eos_token_id": model.eos_token_ids,
            "pad_token_id": model.pad_token_id,
            "image_token_id": model.image_token_id,
            "vocab_size": model.vocab_size,
            "context_length": model.context_length,
            "decoder": decoder,
            "embedding": {
                "filename": parts["embed"].file,
                "inputs": {"input_ids": "input_ids", "image_features": "image_features"},
                "outputs": {"inputs_embeds": "inputs_embeds"},
            },
            "vision": {
                "filename": parts["vision"].file,
                "inputs": {"pixel_values": "pixels"},
                "outputs": {"image_features": "image_features"},
            },
        },
        "search": {
            "max_length": model.context_length,
            "past_present_share_buffer": parts["decoder"].cache == "shared",
            "do_sample": False,
        },
    }
    return json.dumps(config, indent=2) + "\n"
