"""Trains the projector and the LoRA layers of a vision-language model.

    python train.py --config configs/qwen7b_siglip.yaml
    python train.py --config configs/qwen7b_siglip.yaml --train records/ --output_dir outputs/mine lora.r=64 --bf16 true
    torchrun --nproc_per_node 2 train.py --config configs/qwen7b_siglip.yaml
    python train.py --config configs/qwen7b_siglip.yaml --plan --gpu_memory 24        the memory it will need
    python train.py --help                                        every key with its default and meaning

The same command continues an interrupted run; `train.overwrite=true` starts over.
"""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import set_seed
from transformers.trainer_callback import TrainerState

from config import Config, ConfigError, ModelConfig, load_config
from dataset.collator import Collator
from dataset.dataset import RecordDataset
from dataset.record import read_records
from model import MultiModalModel
from model.checkpoint import load_trained
from model.decoder import load_decoder
from model.lora import add_lora
from model.optim import parameter_groups
from model.projector import build_projector
from model.table import module_table
from qwen import QWenTokenizer
from run_folder import RunError, resume_point
from training import VLMTrainer, training_arguments
from visual import build_encoder
from visual.weights import check_place


def main() -> None:
    try:
        if any(argument == "--plan" or argument.startswith(("--plan=", "plan=")) for argument in sys.argv[1:]):
            import plan  # it imports much, and only this needs it

            plan.main(sys.argv[1:])
        else:
            train(load_config(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"train.py: {error}")
    except RunError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(error.status)


def train(config: Config) -> VLMTrainer:
    """Trains as `config` says, from the newest checkpoint of the output folder if it holds an unfinished run.

    Leaves the trained weights, tokenizer, `config.yaml` and `trainer_state.json` (the log) in `train.output_dir`.

    Raises:
        RunError: the output folder holds a finished run or a run with another configuration.
        ConfigError: the model can't be built of what the configuration names.
    """
    args = training_arguments(config)
    with args.main_process_first(local=False):
        checkpoint = resume_point(config, main_process=args.process_index == 0)
    set_seed(config.train.seed)
    try:
        # A checkpoint of this run holds what its start has become.
        settings = replace(config.model, checkpoint=None) if checkpoint else config.model
        model = build_model(settings, args.device)
    except (OSError, ValueError) as error:  # weights that are not there, incomplete or for another model
        raise ConfigError(str(error)) from error
    model.system = config.data.system
    trainer = VLMTrainer(
        model,
        config,
        train_dataset=load_dataset(config, config.data.train, model),
        eval_dataset=load_dataset(config, config.data.validation, model) if config.data.validation else None,
        collator=Collator(model.tokenizer.pad_token_id),
        args=args,
    )
    if args.process_index == 0:
        c = config.train
        print(module_table(model, parameter_groups(model, c.lora_lr, c.projector_lr, c.weight_decay)))
        print(f"Continuing from {checkpoint}" if checkpoint else f"Starting a new run in {c.output_dir}", flush=True)
    run(trainer, checkpoint)
    if skipped := trainer.train_dataset.skipped:
        print(f"{len(skipped)} records were left out because an image could not be read: {', '.join(skipped[:10])} ...")
    return trainer


def run(trainer: VLMTrainer, checkpoint: Path | None) -> None:
    """Trains to the end and writes the result, also when only the writing was left to do."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    if state is not None and state.global_step >= state.max_steps:
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.finish()


def build_model(config: ModelConfig, device: torch.device | str = "cpu") -> MultiModalModel:
    """Frozen encoder and decoder from disk or hub, and between them projector and LoRA layers.

    These two are fresh, or those of `config.checkpoint`.

    Args:
        device: where the decoder is loaded to; the rest follows when the Trainer places the model.

    Raises:
        ConfigError: a local folder that is not there.
        ValueError: weights that are not complete, or an encoder or LoRA setting that does not fit them.
    """
    e, p, lora = config.encoder, config.projector, config.lora
    places = {"model.decoder": config.decoder, "model.encoder.path": e.path}
    if config.checkpoint:
        places["model.checkpoint"] = os.path.abspath(config.checkpoint)  # never a hub id
    for key, path in places.items():
        try:
            check_place(path)
        except FileNotFoundError as error:
            raise ConfigError(f"{key}: {error}") from error
    encoder = build_encoder(**asdict(e))
    tokenizer = QWenTokenizer.from_pretrained(config.decoder)
    decoder = load_decoder(
        config.decoder,
        config.dtype,
        quantization=config.quantization,
        device=device,
        attn_implementation=config.attn_implementation,
    )
    projector = build_projector(
        p.kind,
        encoder.width,
        decoder.config.hidden_size,
        num_features=encoder.num_features,
        position_embedding=p.position_embedding,
        init_std=p.init_std,
    )
    if lora.r > 0:
        decoder = add_lora(decoder, lora.r, lora.alpha, lora.dropout, lora.targets)
    model = MultiModalModel(encoder, projector, decoder, tokenizer.placeholder_id, tokenizer)
    if config.checkpoint:
        load_trained(model, config.checkpoint, keep_adapter=True)
    return model


def load_dataset(config: Config, files: list[str], model: MultiModalModel) -> RecordDataset:
    """Samples of all record files, one after the other, as `config.data` says."""
    c = config.data
    return RecordDataset(
        read_records(files),
        model.tokenizer,
        model.encoder.preprocess,
        model.encoder.num_features,
        c.image_root,
        c.max_length,
        system=c.system,
        on_bad_image=c.on_bad_image,
    )


if __name__ == "__main__":
    main()
