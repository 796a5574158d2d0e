"""Puts a decoder and a vision encoder together as a LLaVA of transformers, with a projector that knows nothing yet.

    python -m model.assemble --decoder Qwen/Qwen2-1.5B-Instruct --encoder openai/clip-vit-large-patch14-336 \\
        --output outputs/llava --dtype bfloat16

The folder holds weights, tokenizer with the token <image>, chat template, processor and generation config, as
LlavaForConditionalGeneration and LlavaProcessor read them. All weights are read again and compared with those of the
parts. Training starts from it here too: model.decoder, model.encoder.path and model.checkpoint may name it.
"""

import argparse
import sys
from pathlib import Path

import torch

from model.decoder import add_rows, load_decoder
from model.export import new_folder
from model.export_llava import export_llava
from model.model import MultiModalModel
from model.projector import build_projector
from model.tokenizer import load_tokenizer, rows_needed
from visual import build_encoder
from visual.pretrained import kind_of
from visual.weights import check_place


def assemble(
    decoder: str | Path,
    encoder: str | Path,
    *,
    dtype: str = "float32",
    template: str | None = None,
    feature_layer: str = "penultimate",
    seed: int = 0,
) -> MultiModalModel:
    """A model of published parts and a fresh projector, two layers with PyTorch's own initial weights, as LLaVA's.

    Args:
        decoder, encoder: folders or hub ids, the encoder a CLIP or SigLIP.
        dtype: of decoder and encoder; the projector is float32.
        template: how turns are delimited, see `model.tokenizer.ChatTokenizer`.
        feature_layer: of the encoder, "last" or "penultimate".
        seed: of the projector's weights.

    Raises:
        OSError: a part is not there.
        ValueError: a part can't be used, or LLaVA can't be trained with it.
    """
    for place in (decoder, encoder):
        check_place(place)
    kind = kind_of(str(encoder))
    if kind == "siglip" and feature_layer == "last":
        raise ValueError(
            "LLaVA reads the last layer of SigLIP before the norm that belongs to it, on which no projector was "
            "trained; take --feature_layer penultimate"
        )
    tower = build_encoder(kind, str(encoder), layer=feature_layer, dtype=dtype)
    language_model = load_decoder(decoder, dtype)
    tokenizer = load_tokenizer(decoder, language_model.config.model_type, template)
    rows = add_rows(language_model, rows_needed(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = build_projector("mlp", tower.width, language_model.config.hidden_size, init_std=None)
    model = MultiModalModel(tower, projector, language_model, tokenizer.placeholder_id, tokenizer, added_rows=rows)
    return model.eval()


def describe(model: MultiModalModel, output: Path) -> str:
    """What was written, part by part."""
    parts = {
        f"encoder    {model.encoder.spec['path']}": model.encoder,
        "projector  fresh": model.projector,
        f"decoder    {model.language_model.config._name_or_path}": model.language_model,
    }
    lines = [f"{sum(p.numel() for p in part.parameters()):16,d} parameters  {name}" for name, part in parts.items()]
    lines.append(
        f"<image> is token {model.placeholder_id}; an image of {' x '.join(map(str, model.encoder.image_size))} pixels "
        f"has {model.encoder.num_features} of them; turns as in template {model.tokenizer.template!r}"
    )
    files = sorted(file for file in output.rglob("*") if file.is_file())
    lines += [f"{file.stat().st_size / 2**20:10.1f} MiB  {file.relative_to(output)}" for file in files]
    lines += [
        "Every weight was read again and is that of its part.",
        "To train it here: model.decoder, model.encoder.path and model.checkpoint="
        f"{output}, model.encoder.layer={model.encoder.spec['layer']}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="model.assemble", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--decoder", required=True, help="folder or hub id, such as Qwen/Qwen2-1.5B-Instruct")
    parser.add_argument("--encoder", required=True, help="folder or hub id of a CLIP or SigLIP")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of all weights")
    parser.add_argument("--template", help="how turns are delimited; default: as the decoder was trained")
    layers = ("last", "penultimate")
    parser.add_argument("--feature_layer", choices=layers, default="penultimate", help="of the encoder")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's initial weights")
    arguments = parser.parse_args()
    with new_folder(arguments.output) as folder:
        print(f"Reading {arguments.encoder} and {arguments.decoder}", flush=True)
        model = assemble(
            arguments.decoder,
            arguments.encoder,
            dtype=arguments.dtype,
            template=arguments.template,
            feature_layer=arguments.feature_layer,
            seed=arguments.seed,
        )
        print(f"Writing {arguments.output} and comparing what was written", flush=True)
        export_llava(model, folder)
    print(describe(model, arguments.output))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"model.assemble: {error}")
