"""Qwen-1 for current transformers: configuration, modelling, tokenizer, and the patched forward."""

from .configuration_qwen import QWenConfig
from .injection import inject, multimodal
from .modeling_qwen import QWenLMHeadModel, QWenModel
from .multimodal_qwen import MultimodalQWenLMHeadModel, MultimodalQWenModel
from .tokenization_qwen import QWenTokenizer

__all__ = [
    "MultimodalQWenLMHeadModel",
    "MultimodalQWenModel",
    "QWenConfig",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenTokenizer",
    "inject",
    "multimodal",
]
