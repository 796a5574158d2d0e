"""Settings of `transformers.Trainer` from the configuration."""

import torch
from transformers import TrainingArguments

from config import Config
from training.devices import check_launch, load_models_whole, uses_deepspeed


def learning_rates(config: Config) -> dict[str, float]:
    """Peak learning rate of each part that can be trained."""
    c = config.train
    return {"lora": c.lora_lr, "projector": c.projector_lr, "decoder": c.decoder_lr, "encoder": c.encoder_lr}


def training_arguments(config: Config) -> TrainingArguments:
    """Settings of the Trainer. Starts the process group under `torchrun` and `accelerate launch`.

    Raises:
        ConfigError: the run was launched under something that can't train it (`training.devices`).
    """
    c = config.train
    check_launch(config)
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
        bf16=c.bf16 and not uses_deepspeed(),  # which would round trained weights; see training.devices
        fp16=c.fp16 and torch.cuda.is_available(),
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
        activation_checkpointing_kwargs={"every_n_layers": c.gradient_checkpointing_every},
        ddp_find_unused_parameters=False,  # the model puts every trainable parameter into the graph of every batch
        ddp_broadcast_buffers=False,  # all processes fill theirs alike
    )
    if uses_deepspeed():
        load_models_whole()
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for torchrun; DataParallel would cut batches between images
    return args
