"""Settings of `transformers.Trainer` from the configuration."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import TrainingArguments

from config import Config, ConfigError


def learning_rates(config: Config) -> dict[str, float]:
    """Peak learning rate of each part that can be trained."""
    c = config.train
    return {"lora": c.lora_lr, "projector": c.projector_lr, "decoder": c.decoder_lr, "encoder": c.encoder_lr}


def training_arguments(config: Config) -> TrainingArguments:
    """Settings of the Trainer. Starts the process group under `torchrun`.

    Raises:
        ConfigError: DeepSpeed is asked for, but it or its settings are not there.
    """
    c = config.train
    if c.deepspeed and find_spec("deepspeed") is None:
        raise ConfigError("train.deepspeed needs a package: pip install -r requirements-deepspeed.txt")
    if c.deepspeed and not Path(c.deepspeed).is_file():
        raise ConfigError(f"train.deepspeed: there is no file {c.deepspeed}, such as configs/deepspeed_zero2.json")
    args = TrainingArguments(
        output_dir=c.output_dir,
        seed=c.seed,
        num_train_epochs=c.num_train_epochs,
        max_steps=c.max_steps,
        per_device_train_batch_size=c.per_device_train_batch_size,
        per_device_eval_batch_size=c.per_device_eval_batch_size,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        lr_scheduler_type=c.lr_scheduler_type,
        warmup_steps=c.warmup_steps,
        max_grad_norm=c.max_grad_norm,
        bf16=c.bf16,
        fp16=c.fp16 and torch.cuda.is_available(),
        deepspeed=c.deepspeed,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=c.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.data.validation else "no",
        eval_steps=c.eval_steps,
        save_steps=c.save_steps,
        save_total_limit=c.save_total_limit,
        report_to=c.report_to or "none",
        remove_unused_columns=False,
        dataloader_num_workers=config.data.num_workers,
        activation_checkpointing=c.gradient_checkpointing,
        ddp_find_unused_parameters=False,  # the model puts every trainable parameter into the graph of every batch
        ddp_broadcast_buffers=False,  # all processes fill theirs alike
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for torchrun; DataParallel would cut batches between images
    return args
