"""How a model lies on the processes that train it: whole in each (DDP), or divided by FSDP2 or DeepSpeed's ZeRO.

Which of them it is, `accelerate launch` says through its environment (`configs/accelerate/`); plain `python` and
`torchrun` leave the model whole.

Nothing here changes what is computed. Trained weights are float32 in each of them, gradients are summed in float32, and
bfloat16 is autocast's, as on one process.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import (
    propagate_args_to_deepspeed,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from config import Config, ConfigError
from model import MultiModalModel
from run_folder import RunError


def uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def check_launch(config: Config) -> None:
    """Raises ConfigError if the launcher asks for what is not there or does not fit the configuration."""
    if uses_deepspeed() and find_spec("deepspeed") is None:
        raise ConfigError("DeepSpeed is not installed: pip install -r requirements-deepspeed.txt")
    kind = "FSDP" if uses_fsdp() else "DeepSpeed" if uses_deepspeed() else None
    if kind is None:
        return
    if uses_fsdp() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP is supported in version 2: fsdp_version: 2, as in configs/accelerate/fsdp2.yaml")
    if config.train.fp16:
        raise ConfigError(f"train.fp16 is not supported under {kind}; take train.bf16=true")
    if config.train.optimizer != "adamw":
        raise ConfigError(
            f"train.optimizer={config.train.optimizer} is not supported under {kind}, which divides the optimizer's "
            "state among the processes already; take adamw"
        )
    if config.model.quantization != "none":
        raise ConfigError(
            f"model.quantization={config.model.quantization} is not supported under {kind}, which can't divide "
            "quantized weights; start the run with torchrun, or with configs/accelerate/ddp.yaml"
        )


def check_shared(folder: str, checkpoint: Path | None) -> None:
    """Raises RunError in all processes if they don't see the same newest `checkpoint` in the output folder."""
    if not dist.is_initialized():
        return
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, checkpoint and checkpoint.name)
    if len(set(found)) > 1:
        raise RunError(
            f"train.output_dir={folder} is not the same for all processes, which find {', '.join(map(str, found))} "
            "there to continue from; put it on a file system that all machines share"
        )


def block_classes(model: MultiModalModel) -> list[str]:
    """Names of the classes of the blocks that the decoder, and an encoder that is trained, consist of.

    Raises:
        ConfigError: the decoder's architecture doesn't say (`_no_split_modules`).
    """
    present = {type(module).__name__ for module in model.modules()}
    names = set(model.language_model._no_split_modules or ()) & present
    if not names:
        raise ConfigError(
            f"{type(model.language_model).__name__} doesn't say what its blocks are, so FSDP2 can't divide it; start "
            "the run with torchrun"
        )
    if model.encoder.trainable:
        names |= set(getattr(model.encoder.backbone, "_no_split_modules", None) or ()) & present
    return sorted(names)


class Devices:
    """The part of `VLMTrainer` that lays the model on the processes; stands before `transformers.Trainer`."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        on_cpu = state.distributed_type == DistributedType.MULTI_CPU  # where accelerate looks for neither of the two
        if uses_fsdp():
            if on_cpu:
                state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
                self.is_fsdp_enabled = True
            self._set_up_fsdp(state.fsdp_plugin)
        if uses_deepspeed():
            if on_cpu:
                self.args.deepspeed_plugin.select(_from_accelerator_state=True)
                state.distributed_type, state.deepspeed_plugins = DistributedType.DEEPSPEED, self.args.deepspeed_plugin
                self.is_deepspeed_enabled = True
                propagate_args_to_deepspeed(self.accelerator, self.args)
            load_models_whole()

    def _set_up_fsdp(self, plugin: FullyShardedDataParallelPlugin) -> None:
        """FSDP2 of the decoder's blocks; what is outside of them is one unit, whole from forward to backward pass.

        To that belong embeddings and head, which the loss calls by itself, outside of the decoder's forward.

        A frozen encoder stays whole in every process: it is small beside the decoder, and its work is done outside of
        the model's forward (`training.encoding`), in those processes whose samples have images.
        """
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        plugin.transformer_cls_names_to_wrap = block_classes(self.model)
        if not self.model.encoder.trainable:
            plugin.ignored_modules = [self.model.encoder]

    def _prepare_for_training(self, max_steps: int, train_dataloader, resume_from_checkpoint: str | None):
        divided = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if divided and self.config.train.bf16:  # elsewhere accelerate does it
            autocast = torch.autocast(self.args.device.type, torch.bfloat16)
            self.model.forward = autocast(self.model.forward)
        if self.is_deepspeed_enabled and not self.model.encoder.trainable:
            put_encoder_aside(self.model, self.args.device)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled:
            keep_whole_outside_of_blocks(self.deepspeed, self.model)
            # By which generate() knows that processes have to keep step.
            set_hf_deepspeed_config(self.accelerator.state.deepspeed_plugin.hf_ds_config)
        return prepared


def put_encoder_aside(model: MultiModalModel, device: torch.device) -> None:
    """Makes a frozen encoder an attribute that is no module of the model's, so that DeepSpeed leaves it whole.

    Divided, it would have to run in all processes or none, but the samples of one may have no image.
    """
    encoder = model.encoder.to(device).eval()
    del model.encoder
    model.__dict__["encoder"] = encoder


def keep_whole_outside_of_blocks(engine, model: MultiModalModel) -> None:
    """Has ZeRO-3 divide no more than FSDP2 does: what is outside of blocks stays whole between optimizer steps.

    Putting a weight together takes all processes, but they call the head as often as their supervised tokens need, and
    the projector as often as they have images and clips.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:  # ZeRO-2, which divides no weights
        return
    blocks = set(block_classes(model))
    inside = {id(p) for module in model.modules() if type(module).__name__ in blocks for p in module.parameters()}
    kept = [p for p in model.parameters() if id(p) not in inside]
    for parameter in kept:
        if not parameter.ds_persist:
            parameter.ds_persist = True
            offload.persistent_parameters.append(parameter)
    kept[0].all_gather(kept)


class Filler(list):
    """A batch that is computed and not counted."""


def equally_many(batches: list[list[int]], most: int, sample: int) -> list[list[int]]:
    """`batches` and as many of one `sample` as make them `most`: processes that share a model have to keep step."""
    return batches + [Filler([sample])] * (most - len(batches))


def load_models_whole() -> None:
    """Keeps transformers from dividing a model under ZeRO-3 while it is loaded: it is divided once it is complete."""
    unset_hf_deepspeed_config()
