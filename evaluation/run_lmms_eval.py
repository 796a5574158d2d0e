"""Runs tasks of lmms-eval on a checkpoint. Needs an environment of its own, see requirements-lmms-eval.txt.

    python -m evaluation.run_lmms_eval --model_args checkpoint_path=outputs/run --tasks pope,mme --batch_size 16
    accelerate launch --num_processes 8 -m evaluation.run_lmms_eval --model_args checkpoint_path=outputs/run --tasks gqa

All arguments are those of lmms-eval (`--help`); `--model` is `kanjian`. Keys of `--model_args` are the arguments of
`evaluation.lmms_eval_model.Kanjian`. Nothing of lmms-eval is edited: its registry of models gets one more.
"""

import sys
from pathlib import Path

MODEL = "kanjian"
PROJECT = Path(__file__).resolve().parents[1]


def register() -> None:
    """Adds the model to lmms-eval's registry.

    Raises:
        ValueError: lmms-eval, or something that it needs, is not installed.
    """
    # lmms-eval imports the package `evaluate`, which must not be the script of that name in this project.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != PROJECT] + [str(PROJECT)]
    try:
        from lmms_eval import models
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ValueError(f"lmms-eval can't be imported ({error}); see requirements-lmms-eval.txt") from error
    manifest = ModelManifest(model_id=MODEL, simple_class_path="evaluation.lmms_eval_model.Kanjian")
    models.MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


def main() -> None:
    register()
    from lmms_eval.__main__ import cli_evaluate

    if not any(argument.split("=")[0] == "--model" for argument in sys.argv[1:]):
        sys.argv[1:1] = ["--model", MODEL]
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"evaluation.run_lmms_eval: {error}")
