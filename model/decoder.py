"""The frozen decoder, from disk or hub, as it is or quantized."""

import logging
from pathlib import Path
from typing import Literal

import torch
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig

from qwen import MultimodalQWenLMHeadModel, QWenConfig
from visual.weights import config_errors, load_strictly

Quantization = Literal["none", "nf4", "int8"]


def load_decoder(
    path: str | Path,
    dtype: torch.dtype | str,
    *,
    quantization: Quantization = "none",
    device: torch.device | str | None = None,
    **kwargs,
) -> MultimodalQWenLMHeadModel:
    """A Qwen-1 decoder with the weights of the folder or hub id `path`, every one of them.

    Args:
        dtype: of the weights, and of the computation with quantized ones; "auto" is that of the files.
        quantization: "nf4" keeps the matrices of all layers in 4 bits (NormalFloat with double quantization,
            QLoRA, https://arxiv.org/abs/2305.14314), "int8" in 8 bits (LLM.int8(), https://arxiv.org/abs/2208.07339).
            Embeddings, norms, biases and the head stay in `dtype`.
        device: where the weights go, file by file, without a copy elsewhere; None is the CPU.
        kwargs: further arguments of transformers' `from_pretrained`, such as `attn_implementation`.

    Raises:
        OSError: nothing to load under `path`.
        ValueError: the folder holds another architecture, damaged files, or weights that are missing, unexpected or of
            another shape than the configuration says.
    """
    config = decoder_config(path)
    if quantization != "none":
        kwargs["quantization_config"] = _quantization_config(quantization)
        device = device or "cpu"  # bitsandbytes quantizes while weights are placed
    if device is not None:
        kwargs["device_map"] = {"": device}
    model = load_strictly(MultimodalQWenLMHeadModel, path, config=config, dtype=dtype, **kwargs)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = model.dtype
            # On CPUs that have it, the first forward in eval mode would repack the weights for inference alone: after
            # it, training gets wrong gradients or none.
            module.support_avx512bf16_for_cpu = False
    return model


def decoder_config(path: str | Path) -> QWenConfig:
    """The configuration of a Qwen-1 decoder in a folder or under a hub id.

    Raises:
        OSError: no `config.json` there.
        ValueError: it describes another architecture, values without a meaning in Qwen-1, or quantized weights.
    """
    with config_errors(path):
        settings, _ = QWenConfig.get_config_dict(path)
    if not settings:
        raise FileNotFoundError(
            f"{path} has no config.json, or an empty one; a decoder needs that published with its weights"
        )
    kind = settings.get("model_type")
    if kind != QWenConfig.model_type:
        raise ValueError(
            f'{path} holds a model of type {kind!r}, expected Qwen-1 ("model_type": "{QWenConfig.model_type}" in its '
            "config.json), such as Qwen/Qwen-7B-Chat"
        )
    if quantized := settings.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{path} holds weights quantized by {method!r} (quantization_config in its config.json), which are not "
            "supported: take the unquantized ones, such as Qwen/Qwen-7B-Chat; quantization=nf4 or int8 quantizes them "
            "on loading"
        )
    with config_errors(path):
        return QWenConfig.from_pretrained(path)


def quantization_of(decoder: MultimodalQWenLMHeadModel) -> Quantization:
    """What `load_decoder` was told."""
    config = getattr(decoder.config, "quantization_config", None)
    return "none" if config is None else "nf4" if config.load_in_4bit else "int8"


def _quantization_config(quantization: Quantization) -> BitsAndBytesConfig:
    if quantization == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    if quantization == "int8":
        # It says so once per layer and forward; that int8 runs in float16 inside is documented and needs no mending.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_notice)
        return BitsAndBytesConfig(load_in_8bit=True)
    raise ValueError(f"unknown quantization {quantization!r}; choose one of none, nf4, int8")


def _is_no_cast_notice(record: logging.LogRecord) -> bool:
    return "inputs will be cast" not in str(record.msg)
