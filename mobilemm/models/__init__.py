"""The multimodal LLM and its parts.

Importing this package makes transformers' `AutoConfig`, `AutoModel` and `AutoModelForImageTextToText` know
the model type `mobilemm`.
"""

from mobilemm.models.configuration import IMAGE_TOKEN_INDEX, MobileMMConfig
from mobilemm.models.modeling import MobileMMForConditionalGeneration

__all__ = ["IMAGE_TOKEN_INDEX", "MobileMMConfig", "MobileMMForConditionalGeneration"]
