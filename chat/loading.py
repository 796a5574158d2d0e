"""The model that a script's command line names."""

import argparse

import torch

from model import MultiModalModel


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `load_model` reads."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint_path",
        required=True,
        help="folder that train.py wrote, a checkpoint-N in it, or a folder with other_params.bin",
    )
    group.add_argument("--decoder", help="folder or hub id of the decoder; default: the recorded one")
    group.add_argument("--encoder", help="folder or hub id of the encoder; default: the recorded one")
    group.add_argument(
        "--num_features",
        type=int,
        help="with other_params.bin: feature vectors per picture in its training (SigLIP: 728 without the first "
        "patch, the default, or 729)",
    )
    group.add_argument("--device", help="cuda, cpu, ...; default: cuda where there is one")
    dtypes = ("float32", "bfloat16", "float16")
    group.add_argument("--dtype", choices=dtypes, help="of the decoder; default: the recorded one")
    group.add_argument(
        "--quantization", choices=("none", "nf4", "int8"), help="of the decoder; default: the recorded one"
    )
    group.add_argument("--system", help="text of the system turn; default: the one of the training")


def load_model(arguments: argparse.Namespace) -> tuple[MultiModalModel, str | None]:
    """Model in eval mode on its device, and the system text that belongs to it.

    Raises:
        OSError, ValueError: an argument or a file is at fault; the message names it.
    """
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    model = MultiModalModel.from_pretrained(
        arguments.checkpoint_path,
        decoder=arguments.decoder,
        encoder=arguments.encoder,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        device=device,
        num_features=arguments.num_features,
    )
    return model, model.system if arguments.system is None else arguments.system


def check_device(name: str) -> None:
    """Raises ValueError if nothing can be written to a device and read back."""
    try:
        torch.zeros(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # which of them depends on the kind of device
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"--device {name} can't be used, take cpu, or cuda where there is a GPU: {reason}") from error
