"""LoRA adapters of the decoder, by peft."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from model.decoder import quantization_of

ROUTERS = {"gate", "router", "shared_expert_gate"}  # linear layers that choose or weigh experts


def add_lora(
    decoder: PreTrainedModel,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
) -> PeftModel:
    """Freezes the decoder and puts LoRA layers (`W x + s B A x`, s = alpha / r) on what `targets` names.

    A target is the end of a module's name: `c_proj` means the attention's and the MLP's, `attn.c_proj` the former
    alone. Experts of a mixture are parameters rather than modules, and named by theirs: `experts.down_proj`. No target
    means all linear layers of the blocks (`linear_layers`). The matrices A and B are float32 whatever dtype the decoder
    has.

    Args:
        rslora: s = alpha / sqrt(r), with which the learning rate need not change with the rank (rsLoRA,
            https://arxiv.org/abs/2312.03732).
        dora: row i of W becomes `m_i (W + s B A)_i / |(W + s B A)_i|`, where the lengths m, which begin as those of W,
            are learned too (DoRA, https://arxiv.org/abs/2402.09353).

    Raises:
        ValueError: a target that no linear layer of the decoder bears, or dropout or DoRA with targets that are
            parameters.
    """
    names = linear_names(decoder)
    stacks = [name for name, parameter in decoder.named_parameters() if parameter.ndim == 3]
    targets = list(targets) or linear_layers(decoder)
    modules = [target for target in targets if _any_ends(names, target)]
    parameters = [target for target in targets if target not in modules and _any_ends(stacks, target)]
    if unknown := [target for target in targets if target not in (*modules, *parameters)]:
        known = sorted({name.rpartition(".")[2] for name in names})
        known += sorted({".".join(name.split(".")[-2:]) for name in stacks})
        raise ValueError(
            f"LoRA targets {unknown} match no linear layer of {type(decoder).__name__}; these are named "
            f"{', '.join(known)}"
        )
    if parameters and dropout:
        raise ValueError(f"LoRA on the experts ({', '.join(parameters)}) knows no dropout; set model.lora.dropout=0")
    if parameters and dora:
        raise ValueError(f"LoRA on the experts ({', '.join(parameters)}) knows no DoRA; set model.lora.dora=false")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        use_dora=dora,
        lora_dropout=dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in decoder.modules()),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return wrap_with_lora(decoder, config)


def linear_layers(decoder: PreTrainedModel) -> list[str]:
    """Last names of all linear layers of the decoder's blocks, such as `q_proj`, without those that route to experts.

    The experts themselves, stacks of matrices in one parameter, are not among them: an adapter for each of them is
    large, and rarely meant. `add_lora` takes them by name.
    """
    blocks = [name for name in linear_names(decoder) if any(part.isdigit() for part in name.split("."))]
    return sorted({name.rpartition(".")[2] for name in blocks} - ROUTERS)


def linear_names(decoder: nn.Module) -> list[str]:
    """Full names of linear layers: `nn.Linear` and GPT-2's `Conv1D`."""
    return [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _any_ends(names: list[str], target: str) -> bool:
    return any(f".{name}".endswith(f".{target}") for name in names)


def wrap_with_lora(decoder: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Freezes the decoder and adds the adapter that `config` describes, float32 and trainable.

    Raises:
        ValueError: DoRA on an int8 decoder, whose matrices peft damages when it asks for their lengths.
    """
    if config.use_dora and quantization_of(decoder) == "int8":
        raise ValueError("DoRA can't be put on int8 matrices; take nf4 or none")
    decoder.requires_grad_(False)
    config.inference_mode = False
    config.base_model_name_or_path = None  # peft then records where the base lies now
    wrapped = get_peft_model(decoder, config, autocast_adapter_dtype=True)
    for layer in wrapped.modules():
        if not isinstance(layer, LoraLayer):
            continue
        if config.use_dora:
            _start_lengths_in_float32(layer)
        else:
            layer.register_forward_pre_hook(_leave_casts_to_autocast)
    return wrapped


@torch.no_grad()
def _start_lengths_in_float32(layer: LoraLayer) -> None:
    """Gives DoRA the lengths of the frozen rows as they are; peft rounds them to the dtype of the decoder.

    Rounded lengths would scale the rows, by up to 1 / 256 in bfloat16, before anything is learned. For the same reason
    DoRA layers keep peft's cast of their input to float32, which is the dtype that it takes lengths in.
    """
    for lengths in layer.lora_magnitude_vector.values():
        weight = dequantize_module_weight(layer.get_base_layer()).float()
        lengths.weight = nn.Parameter(torch.linalg.vector_norm(weight, dim=0 if lengths.fan_in_fan_out else 1))


def _leave_casts_to_autocast(layer: LoraLayer, inputs: tuple) -> None:
    """Under autocast the input of A would be cast to float32 and, for the product, back: two copies of `[B, T, H]`."""
    layer.cast_input_dtype_enabled = not torch.is_autocast_enabled(inputs[0].device.type)


def adapted_layers(decoder: nn.Module) -> list[str]:
    """Last names of the layers and parameters that have LoRA matrices, such as `q_proj`."""
    layers = {name: module for name, module in decoder.named_modules() if isinstance(module, LoraLayer)}
    # Wrappers of several parameters of one module lie within each other.
    names = {
        f"experts.{module.parameter_name}" if isinstance(module, ParamWrapper) else name.rpartition(".")[2]
        for name, module in layers.items()
    }
    return sorted(names)


def language_model(decoder: nn.Module) -> PreTrainedModel:
    """The decoder itself, with the LoRA layers that peft put in place but without the wrapper around it."""
    return decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder


def lora_config(decoder: PeftModel) -> LoraConfig:
    """Configuration of the decoder's one adapter.

    Raises:
        ValueError: the decoder has several adapters, or one that is not LoRA.
    """
    configs = list(decoder.peft_config.values())
    if len(configs) != 1 or not isinstance(configs[0], LoraConfig):
        raise ValueError(f"expected one LoRA adapter, the decoder has {list(decoder.peft_config.items())}")
    return configs[0]


def write_lora_config(decoder: PeftModel, folder: Path) -> None:
    """Writes `adapter_config.json` as peft does, for inference and with the targets sorted."""
    config = copy.copy(lora_config(decoder))
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
