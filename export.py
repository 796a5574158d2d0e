"""Writes a trained model in a format that other tools read.

    python export.py --checkpoint_path outputs/run --format llava --output exported

    llava       the whole model as LlavaForConditionalGeneration of transformers, the layout of LLaVA-1.5
    qwen2       of a model with a Qwen-1, the language model alone as Qwen2ForCausalLM
    merged      a checkpoint without adapter that holds its decoder, in the format in which it was published (decoder/,
                which transformers reads unless it is a Qwen-1), and a CLIP or SigLIP encoder; encoders of open_clip
                and timm stay where they are
    checkpoint  a checkpoint as train.py writes it, from one of the first system or one whose frozen weights have moved

LoRA is merged in all but the last; a quantized decoder is loaded unquantized for that. --dtype is that of the written
weights, by default the decoder's. What was written is read again and compared with the model; nothing is left of what
can't be had in the format.
"""

import argparse
import errno
import sys
from pathlib import Path

from chat.loading import add_model_arguments, load_model
from model import MultiModalModel
from model.export import export_merged, export_qwen2, longest_text, new_folder
from model.export_llava import export_llava
from qwen import QWenConfig

WRITE_ERRORS = (errno.EACCES, errno.EFBIG, errno.ENOSPC, errno.EROFS, errno.EDQUOT)
KANJIAN_CODE = """\
from model import MultiModalModel
model = MultiModalModel.from_pretrained({path!r})"""
CODE = {
    "merged": KANJIAN_CODE,
    "checkpoint": KANJIAN_CODE,
    "qwen2": """\
from transformers import pipeline
generate = pipeline("text-generation", {path!r})""",
    "llava": """\
from transformers import pipeline
generate = pipeline("image-text-to-text", {path!r})""",
}


def export(model: MultiModalModel, folder: Path, arguments: argparse.Namespace, system: str | None) -> None:
    """Writes `model` into `folder`, as `arguments.format` says."""
    if arguments.format == "llava":
        export_llava(model, folder, system)
    elif arguments.format == "qwen2":
        export_qwen2(model, folder, system)
    else:
        model.system = system
        model.save_pretrained(folder) if arguments.format == "checkpoint" else export_merged(model, folder)


def describe(arguments: argparse.Namespace, model: MultiModalModel) -> str:
    """What was written, what differs from the checkpoint, and how to use it."""
    output = arguments.output
    files = sorted(file for file in output.rglob("*") if file.is_file())
    lines = [f"{file.stat().st_size / 2**20:10.1f} MiB  {file.relative_to(output)}" for file in files]
    config, dtype = model.language_model.config, str(model.language_model.dtype).removeprefix("torch.")
    if arguments.format == "llava" and dtype != "float32":
        lines.append(f"All weights are {dtype}; those that were float32 are rounded, the projector's among them.")
    if arguments.format in ("qwen2", "llava") and isinstance(config, QWenConfig):
        limit = f"texts of up to {longest_text(config)} tokens; Qwen-1's extrapolation beyond is left out."
        equal = "equal" if dtype == "float32" else f"agree with, but for {dtype} rounding at other places,"
        lines.append(f"Its logits {equal} the model's for {limit}")
    if arguments.format == "llava":
        lines.append("A clip is given to it as the images of its frames.")
        if model.tokenizer.begin_ids:
            lines.append("The chat template begins prompts; encode its text with add_special_tokens=False.")
    lines += [f"{output}, in Python:", "", CODE[arguments.format].format(path=str(output))]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument("--format", required=True, choices=list(CODE))
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    arguments = parser.parse_args()
    if arguments.format != "checkpoint" and arguments.quantization is None:
        arguments.quantization = "none"  # whatever is recorded
    with new_folder(arguments.output) as folder:
        model, system = load_model(arguments)
        try:
            export(model, folder, arguments, system)
        except Exception as error:
            if not any(f"(os error {number})" in str(error) for number in WRITE_ERRORS):
                raise
            # safetensors and tokenizers have classes of their own for what Python calls an OSError.
            raise OSError(f"--output {arguments.output} can't be written, is the disk full? ({error})") from error
    print(describe(arguments, model))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"export.py: {error}")
