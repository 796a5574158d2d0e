"""Trains a vision-language model: its projector, and LoRA layers or all of the decoder, as `model.tune` says.

    python train.py --config configs/qwen7b_siglip.yaml
    python train.py --config configs/qwen7b_siglip.yaml --train records/ --output_dir outputs/mine lora.r=64 --bf16 true
    torchrun --nproc_per_node 2 train.py --config configs/qwen7b_siglip.yaml
    python train.py --config configs/qwen7b_siglip.yaml --plan --gpu_memory 24        the memory it will need
    python train.py --config configs/qwen7b_siglip.yaml lora_lr=1e-5,3e-5,1e-4        a run for each value (sweep.py)
    python train.py --help                                        every key with its default and meaning

The same command continues an interrupted run; `train.overwrite=true` starts over. SIGTERM or Ctrl-C end a run after the
step in hand, with a checkpoint, and leave `loss_curves.png` as the end of a run does; a second Ctrl-C ends it at once.
"""

import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState
from transformers.utils.logging import disable_progress_bar

import sweep
from build import build_model, load_dataset, load_mixture
from config import Config, ConfigError, load_config
from dataset.collator import Collator
from dataset.feature_cache import StaleFeatures
from dataset.rows import RecordError
from dataset.sampler import ONE_BLOCK
from dataset.text_table import text_table
from model.decoder import compile_blocks
from model.optim import parameter_groups
from model.packing import enable_packing
from model.table import module_table
from run_folder import RunError, held, resume_point
from training import VLMTrainer, learning_rates, training_arguments
from training.checkpoints import unusable
from training.devices import check_shared
from training.interruption import drawing_curves, stopping_on_signals


def main() -> None:
    if not sys.stderr.isatty():
        disable_progress_bar()  # transformers', which would fill a log file with carriage returns
    try:
        if any(argument == "--plan" or argument.startswith(("--plan=", "plan=")) for argument in sys.argv[1:]):
            import plan  # it imports much, and only this needs it

            plan.main(sys.argv[1:])
        elif sweep.is_sweep(sys.argv[1:]):
            sweep.main(sys.argv[1:], [sys.executable, str(Path(__file__).resolve())])
        else:
            train(load_config(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(f"train.py: {error}")
    except RunError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(error.status)
    except (RecordError, StaleFeatures) as error:  # of a record that the run came to late
        # A loader's process puts its traceback before the message.
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
    except FloatingPointError as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print("train.py: stopped at once; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def train(config: Config) -> VLMTrainer:
    """Trains as `config` says, from the newest checkpoint of the output folder if it holds an unfinished run.

    Leaves the trained weights, tokenizer, `config.yaml` and `trainer_state.json` (the log) in `train.output_dir`.

    Raises:
        RunError: the output folder holds a finished run or a run with another configuration.
        ConfigError: the model can't be built of what the configuration names, or its data can't be learned from.
    """
    args = training_arguments(config)
    folder = Path(config.train.output_dir)
    with held(folder) if args.process_index == 0 else nullcontext():
        return _train(config, args)


def _train(config: Config, args: TrainingArguments) -> VLMTrainer:
    with args.main_process_first(local=False):
        checkpoint = resume_point(config, main_process=args.process_index == 0, processes=args.world_size)
    check_shared(config.train.output_dir, checkpoint)
    trainer = make_trainer(config, args, fresh=checkpoint is None)
    model, mixture = trainer.model, trainer.mixture
    if args.process_index == 0:
        print(module_table(model, parameter_groups(model, learning_rates(config), config.train.weight_decay)))
        if config.train.fp16 and not torch.cuda.is_available():
            print("train.fp16: float16 needs a GPU, and there is none here; this run computes in float32")
        if len(mixture or trainer.train_dataset) > ONE_BLOCK:
            print(f"{len(trainer.train_dataset):,} training records: they are encoded, and those that can't be learned "
                  "from are found, as the run comes to them; `python preview.py --config ...` checks all of them "
                  "beforehand")
        if mixture:
            rows = [(name, f"{size:,}", f"{mixture.counts[name]:,}", f"{mixture.counts[name] / size:.2f}")
                    for name, size in mixture.sizes.items()]  # fmt: skip
            print(text_table([("source", "records", "samples per epoch", "passes"), *rows], right=(1, 2, 3)))
        start = f"Starting a new run in {config.train.output_dir}"
        print(f"Continuing from {checkpoint}" if checkpoint else start, flush=True)
    with stopping_on_signals(trainer), drawing_curves(trainer):
        run(trainer, checkpoint)
    if skipped := trainer.train_dataset.skipped:
        more = ", ..." if len(skipped) > 10 else ""
        print(f"{len(skipped)} records were left out, for reasons given above: {', '.join(skipped[:10])}{more}")
    return trainer


def make_trainer(config: Config, args: TrainingArguments, fresh: bool = True, kind: type = VLMTrainer) -> VLMTrainer:
    """The training loop, a `kind`, with the model and the data that `config` describes.

    Args:
        fresh: the model starts from `model.checkpoint`, and not from a checkpoint of the run, which is loaded later.

    Raises:
        ConfigError: the model can't be built of what the configuration names, or its data can't be learned from.
    """
    set_seed(config.train.seed)
    try:
        # A checkpoint of this run holds what its start has become.
        settings = config.model if fresh else replace(config.model, checkpoint=None)
        model = build_model(settings, args.device)
        if config.train.packing:
            enable_packing(model.language_model)
        if config.train.compile:
            compile_blocks(model.language_model)
        with args.main_process_first():  # which makes the copies of large files that all of a machine then map
            files = (config.data.train, config.data.validation)
            data = [load_dataset(config, names, model) for names in files if names]
        mixture = load_mixture(config, data[0].records)
        # This encodes every record, and so finds those that can't be learned from. Of a long epoch the blocks do it.
        if len(mixture or data[0]) <= ONE_BLOCK:
            data[0].lengths.measure(mixture.samples if mixture else None)
        for dataset in data[1:]:
            dataset.lengths.measure()
    # Weights that are not there, incomplete or for another model; data that is not there or no records.
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    model.system = config.data.system
    return kind(
        model,
        config,
        train_dataset=data[0],
        eval_dataset=data[1] if config.data.validation else None,
        collator=Collator(model.tokenizer.pad_token_id, packing=config.train.packing),
        args=args,
        mixture=mixture,
    )


def run(trainer: VLMTrainer, checkpoint: Path | None) -> None:
    """Trains to the end and writes the result, also when only the writing was left to do."""
    state = None
    if checkpoint:
        with unusable(checkpoint):
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state is not None and state.global_step >= state.max_steps:
        trainer.load_checkpoint(checkpoint)
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            problem = f"stopped after step {trainer.state.global_step} with a checkpoint; the same command continues"
            raise RunError(problem, 128 + (trainer.stop_signal or signal.SIGTERM))
    trainer.finish()


if __name__ == "__main__":
    main()
