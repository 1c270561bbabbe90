"""The multimodal LLM and its parts."""
