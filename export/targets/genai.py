"""`genai_config.json`, by which onnxruntime-genai runs an ONNX bundle as it stands."""

from __future__ import annotations

import json
from typing import Any

from mobilemm.runtime.manifest import Manifest

# onnxruntime-genai knows no model of ours. This type of its own runs the same three parts: vision, embedding
# that splices features in, and a decoder that takes embeddings.
MODEL_TYPE = "gemma3"


def genai_config(manifest: Manifest) -> str:
    """The file's content. What it cannot say, preparing pictures and the prompt, stays with the app.

    Source: onnxruntime-genai 0.18, src/config.h.
    """
    model = manifest.model
    parts = manifest.parts
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
            "type": MODEL_TYPE,
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
        "search": {"max_length": model.context_length, "past_present_share_buffer": True, "do_sample": False},
    }
    return json.dumps(config, indent=2) + "\n"
