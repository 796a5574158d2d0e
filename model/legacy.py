"""Adapters of the first system: `adapter_model.bin`, `adapter_config.json`, `other_params.bin`.

`adapter_model.bin` holds LoRA matrices under peft's names, `other_params.bin` the projector as an
`nn.Sequential(Linear, GELU, Linear)` (`0.weight`, `0.bias`, `2.weight`, `2.bias`). The functions here give them the
form of a checkpoint of this project (`model/checkpoint.py`). What such a folder does not say has to come from the user:
where decoder and encoder lie.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qwen import QWenTokenizer
from visual import build_encoder
from visual.weights import check_place, config_errors, read_tensors

FILES = ("adapter_config.json", "adapter_model.bin", "other_params.bin")
SYSTEM = "你是一位图像理解助手。"  # the system turn that those adapters were trained with


def is_legacy(folder: str | Path) -> bool:
    """Whether `folder` holds such an adapter; where a checkpoint was saved into it, that is what counts."""
    return (Path(folder) / "other_params.bin").is_file() and not (Path(folder) / "kanjian.json").is_file()


def legacy_spec(
    folder: str | Path,
    decoder: str | Path | None,
    encoder: str | Path | None,
    num_features: int | None = None,
    placeholder_id: int | None = None,
) -> dict:
    """What `kanjian.json` would say of such a folder (`model.checkpoint.read_spec`).

    Args:
        decoder, encoder: folders or hub ids of the frozen weights.
        num_features: feature vectors per picture in the training. The first system always left out the first token of
            the encoder: the class token of CLIP, but a patch of SigLIP (728 of 729 features). None: as it did.
        placeholder_id: for a decoder without a tokenizer.

    Raises:
        FileNotFoundError: one of the three files is missing.
        ValueError: decoder or encoder is not given, or the encoder cannot yield `num_features`.
    """
    folder = Path(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no adapter folder of the first system: it has no {name}")
    if decoder is None or encoder is None:
        raise ValueError(
            f"{folder} does not say where its frozen weights lie: pass decoder (such as Qwen/Qwen-7B-Chat) and encoder "
            "(such as google/siglip-so400m-patch14-384 or openai/clip-vit-large-patch14)"
        )
    check_place(decoder)
    projector = _read_projector(folder)
    for name in ("layers.0.weight", "layers.2.weight"):
        if name not in projector or projector[name].ndim != 2:
            raise ValueError(f"{folder / 'other_params.bin'} holds no projector: {name[7:]} [out, in] is not in it")
    tokenizer = None if placeholder_id is not None else QWenTokenizer.from_pretrained(decoder)
    encoder_spec, num_features = _encoder_spec(str(encoder), num_features)
    return {
        "placeholder_id": tokenizer.placeholder_id if tokenizer else placeholder_id,
        "system": SYSTEM,
        "encoder": encoder_spec,
        "projector": {
            "kind": "mlp",
            "in_width": projector["layers.0.weight"].shape[1],
            "out_width": projector["layers.2.weight"].shape[0],
            "num_features": num_features,
            "position_embedding": False,
            "pixel_shuffle": 1,
        },
        "decoder": {"path": str(decoder), "dtype": "auto", "quantization": "none", "rows": 0},
        "template": "chatml",
        "media": {},
        "holds": [],
        "adapter": True,
        "tokenizer": tokenizer is not None,
        "weights": {},
    }


def read_legacy(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of adapter (peft's names) and projector (names of `model.projector.Projector`).

    Raises:
        ValueError: a file is damaged or holds more than tensors.
    """
    return read_tensors(Path(folder) / "adapter_model.bin"), _read_projector(folder)


def _read_projector(folder: str | Path) -> dict[str, Tensor]:
    projector = read_tensors(Path(folder) / "other_params.bin")
    return {f"layers.{name}": weight for name, weight in projector.items()}


def _encoder_spec(path: str, num_features: int | None) -> tuple[dict, int]:
    """Arguments of `build_encoder`, and the number of features, which decides whether the first patch is dropped."""
    with config_errors(path):
        kind = str(PreTrainedConfig.get_config_dict(path)[0].get("model_type")).removesuffix("_vision_model")
    if kind not in ("clip", "siglip"):
        raise ValueError(f"{path} holds a model of type {kind!r}; the encoders of the first system are CLIP and SigLIP")
    found = {}
    for drop in (True, False) if kind == "siglip" else (False,):  # the first is the default
        with torch.device("meta"):
            encoder = build_encoder(kind, path, drop_first_patch=drop, load_weights=False)
        found[encoder.num_features] = encoder.spec
    if num_features is None:
        num_features = next(iter(found))
    if num_features not in found:
        raise ValueError(f"{path} yields {' or '.join(map(str, found))} features per picture, not {num_features}")
    return found[num_features], num_features
