"""LoRA adapters of the decoder, by peft."""

import copy
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel


def add_lora(
    decoder: PreTrainedModel, r: int, alpha: float, dropout: float = 0.0, targets: Sequence[str] = ()
) -> PeftModel:
    """Freezes the decoder and puts LoRA layers (`W x + alpha / r * B A x`) on the linear modules named in `targets`.

    A target is the end of a module name: `c_proj` means the attention's and the MLP's, `attn.c_proj` the former alone.
    The matrices A and B are float32 whatever dtype the decoder has.

    Raises:
        ValueError: a target that no linear module of the decoder bears, or no target at all.
    """
    targets = list(targets)
    linear = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
    if unknown or not targets:
        raise ValueError(
            f"LoRA targets {unknown or targets} match no linear module of {type(decoder).__name__}; "
            f"these are named {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
        )
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    return wrap_with_lora(decoder, config)


def wrap_with_lora(decoder: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Freezes the decoder and adds the adapter that `config` describes, float32 and trainable."""
    decoder.requires_grad_(False)
    config.inference_mode = False
    config.base_model_name_or_path = None  # peft then records where the base lies now
    return get_peft_model(decoder, config, autocast_adapter_dtype=True)


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
