"""Qwen-1 with the patched forward."""

from .injection import InjectsFeatures, PassesFeatures
from .modeling_qwen import QWenLMHeadModel, QWenModel


class MultimodalQWenModel(InjectsFeatures, QWenModel):
    """`QWenModel` whose forward takes `features` for the placeholders."""


class MultimodalQWenLMHeadModel(PassesFeatures, QWenLMHeadModel):
    """`QWenLMHeadModel` over `MultimodalQWenModel`; parameter names are the same."""

    decoder_class = MultimodalQWenModel
