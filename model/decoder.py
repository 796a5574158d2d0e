"""The decoder, from disk or hub, as it is or quantized: Qwen-1, or any decoder of transformers, with the patch."""

import logging
from pathlib import Path
from shutil import which
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from model.llava import MODEL_TYPE as LLAVA
from model.llava import decoder_of, decoder_reader
from model.sharded import whole
from qwen import MultimodalQWenLMHeadModel, QWenConfig, multimodal
from visual.weights import config_errors, load_strictly

Quantization = Literal["none", "nf4", "int8"]


def load_decoder(
    path: str | Path,
    dtype: torch.dtype | str,
    *,
    quantization: Quantization = "none",
    device: torch.device | str | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A decoder whose forward takes features, with the weights of the folder or hub id `path`, every one of them.

    Args:
        path: a Qwen-1, or a decoder with a language-modelling head that transformers has (Llama, Qwen2, Gemma, GPT-2,
            Mixtral, ...), alone or within a LLaVA.
        dtype: of the weights, and of the computation with quantized ones; "auto" is that of the files.
        quantization: "nf4" keeps the matrices of all layers in 4 bits (NormalFloat with double quantization,
            QLoRA, https://arxiv.org/abs/2305.14314), "int8" in 8 bits (LLM.int8(), https://arxiv.org/abs/2208.07339).
            Embeddings, norms, biases and the head stay in `dtype`.
        device: where the weights go, file by file, without a copy elsewhere; None is the CPU.
        kwargs: further arguments of transformers' `from_pretrained`, such as `attn_implementation`.

    Raises:
        OSError: nothing to load under `path`.
        ValueError: the folder holds no decoder, damaged files, or weights that are missing, unexpected or of another
            shape than the configuration says.
    """
    config = decoder_config(path)
    if quantization != "none":
        kwargs["quantization_config"] = _quantization_config(quantization)
        device = device or "cpu"  # bitsandbytes quantizes while weights are placed
    if device is not None:
        kwargs["device_map"] = {"": device}
    model_class = decoder_class(config)
    if PreTrainedConfig.get_config_dict(path)[0].get("model_type") == LLAVA:
        model_class, kwargs["key_mapping"] = decoder_reader(model_class)
    model = load_strictly(model_class, path, config=config, dtype=dtype, **kwargs)
    if "key_mapping" in kwargs:
        del model._weight_conversions  # by which save_pretrained would give the weights LLaVA's names again
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = model.dtype
            # On CPUs that have it, the first forward in eval mode would repack the weights for inference alone: after
            # it, training gets wrong gradients or none.
            module.support_avx512bf16_for_cpu = False
    _check_forward(model)
    return model


def decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class with the patched forward for a configuration of `decoder_config`."""
    if isinstance(config, QWenConfig):
        return MultimodalQWenLMHeadModel
    return multimodal(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def decoder_config(path: str | Path) -> PreTrainedConfig:
    """The configuration of a decoder in a folder or under a hub id.

    Raises:
        OSError: no `config.json` there.
        ValueError: it describes no decoder, values that its type does not allow, or quantized weights.
    """
    with config_errors(path):
        settings, _ = PreTrainedConfig.get_config_dict(path)
    if not settings:
        raise FileNotFoundError(
            f"{path} has no config.json, or an empty one; a decoder needs that published with its weights"
        )
    kind = settings.get("model_type")
    if quantized := settings.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{path} holds weights quantized by {method!r} (quantization_config in its config.json), which are not "
            "supported: take the unquantized ones; quantization=nf4 or int8 quantizes them on loading"
        )
    if kind == QWenConfig.model_type:
        with config_errors(path):
            return QWenConfig.from_pretrained(path)
    if kind == LLAVA:
        with config_errors(path):
            return decoder_of(AutoConfig.from_pretrained(path, trust_remote_code=False), path)
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{path} holds a model of type {kind!r}, expected a decoder with a language-modelling head: Qwen-1 "
            f'("model_type": "{QWenConfig.model_type}" in its config.json) or one that transformers has as '
            "...ForCausalLM, such as llama, qwen2, qwen3, mistral, mixtral, phi, gemma, gpt2"
        )
    with config_errors(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    # What fills in masked words sees those that follow.
    if config.is_encoder_decoder or hasattr(config, "vision_config") or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ValueError(f"{path} holds a model of type {kind!r}, which is no decoder of text alone")
    return config


class Head(nn.Module):
    """Hidden states `[..., H]` after the last norm -> logits `[..., V]`, as the decoder's own forward makes them.

    Cohere's are scaled by `logit_scale`, Granite's by 1 / `logits_scaling`; Gemma 2 and others squash them:
    `cap * tanh(logits / cap)` (`final_logit_softcapping`).
    """

    def __init__(self, decoder: PreTrainedModel):
        super().__init__()
        self.linear = decoder.get_output_embeddings()
        self.out_features = self.linear.out_features  # V
        self.cap = getattr(decoder.config, "final_logit_softcapping", None)
        self.scale = getattr(decoder.config, "logit_scale", None) or 1 / (
            getattr(decoder.config, "logits_scaling", None) or 1
        )

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.linear(hidden)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def compile_blocks(decoder: PreTrainedModel, backend: str = "inductor") -> None:
    """Has torch compile the decoder's blocks at their first use, one graph for all of them and for all lengths.

    Parameters keep their names.

    Raises:
        ValueError: the blocks are not told from the rest, or there is no compiler for the CPU's code.
    """
    blocks = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ValueError(f"{type(decoder).__name__} has no blocks that can be compiled; leave out train.compile")
    if decoder.device.type == "cpu" and not any(map(which, ("c++", "g++", "clang++"))):
        raise ValueError("train.compile needs a C++ compiler on a CPU (apt install g++), or leave it out")
    for block in blocks:
        block.compile(backend=backend, dynamic=True)


class _OnlyHidden(SimpleNamespace):
    """Output of a decoder without its head, in which all but the hidden states is None."""

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


@torch.no_grad()
def _check_forward(decoder: PreTrainedModel) -> None:
    """Raises ValueError if features don't get through the decoder's forward, or it makes other logits than `Head`."""
    weight = decoder.get_input_embeddings().weight
    hidden = torch.linspace(-1, 1, weight.shape[1], device=weight.device, dtype=weight.dtype)[None, None]
    handed_on = {}

    def trunk(*args, **kwargs):
        handed_on.update(kwargs)
        return _OnlyHidden(last_hidden_state=hidden)

    with patch.object(decoder.base_model, "forward", trunk):
        ids = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        try:
            logits = decoder(input_ids=ids, features=hidden[0]).logits
        except ValueError:  # it has called something else than its trunk, which found no place for the features
            logits = None
    name = f"{decoder.config._name_or_path}: a {type(decoder).__name__}"
    if handed_on.get("features") is None:
        raise ValueError(f"{name} hands no further arguments to the model behind it, so no feature can reach it")
    if not torch.allclose(Head(decoder)(hidden).float(), logits.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{name} changes logits after its head in a way that is not known here (model.decoder.Head), so the loss "
            "would be wrong"
        )


@torch.no_grad()
def add_rows(decoder: PreTrainedModel, vocabulary: int) -> int:
    """Gives the embeddings of a decoder at least `vocabulary` rows and returns how many were added.

    New rows, of the head too, are the mean of the old ones: of average likelihood, and no random number decides.
    Nothing happens where spare rows suffice.
    """
    old = decoder.get_input_embeddings().weight.shape[0]
    if vocabulary <= old:
        return 0
    decoder.resize_token_embeddings(vocabulary, pad_to_multiple_of=1, mean_resizing=False)
    for layer in {id(layer.weight): layer for layer in _vocabulary_layers(decoder).values()}.values():
        layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias[old:] = layer.bias[:old].float().mean().to(layer.bias)
    return vocabulary - old


def added_rows(decoder: PreTrainedModel, count: int) -> dict[str, Tensor]:
    """The last `count` rows of embeddings and head, `[count, H]` and `[count]` by name; one copy of shared ones."""
    rows = {}
    for name, layer in _vocabulary_layers(decoder).items():
        for kind, parameter in layer.named_parameters(recurse=False):
            rows[f"{name}.{kind}"] = whole(parameter)[-count:].clone()
    return rows


@torch.no_grad()
def set_rows(decoder: PreTrainedModel, rows: dict[str, Tensor]) -> None:
    """Writes what `added_rows` gave."""
    for name, layer in _vocabulary_layers(decoder).items():
        for kind, parameter in layer.named_parameters(recurse=False):
            values = rows[f"{name}.{kind}"]
            parameter[-len(values) :] = values.to(parameter)


def _vocabulary_layers(decoder: PreTrainedModel) -> dict[str, nn.Module]:
    """Embedding and, where it has a matrix of its own, head, without peft's wrappers."""
    layers = {"input": decoder.get_input_embeddings(), "output": decoder.get_output_embeddings()}
    layers = {name: getattr(layer, "base_layer", layer) for name, layer in layers.items()}
    if layers["output"].weight is layers["input"].weight and getattr(layers["output"], "bias", None) is None:
        del layers["output"]
    return layers


def quantization_of(decoder: PreTrainedModel) -> Quantization:
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
