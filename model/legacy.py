"""Adapters of the first system: `adapter_model.bin`, `adapter_config.json`, `other_params.bin`.

`adapter_model.bin` holds LoRA matrices under peft's names, `other_params.bin` the projector as an
`nn.Sequential(Linear, GELU, Linear)` (`0.weight`, `0.bias`, `2.weight`, `2.bias`). The functions here give them the
form of a checkpoint of this project (`model/checkpoint.py`). What such a folder does not say has to come from the user:
where decoder and encoder lie.
"""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from qwen import QWenTokenizer
from visual import build_encoder
from visual.weights import read_tensors

FILES = ("adapter_config.json", "adapter_model.bin", "other_params.bin")
SYSTEM = "你是一位图像理解助手。"  # the system turn that those adapters were trained with


def is_legacy(folder: str | Path) -> bool:
    return (Path(folder) / "other_params.bin").is_file()


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
    projector = read_legacy(folder)[1]
    for name in ("layers.0.weight", "layers.2.weight"):
        if name not in projector or projector[name].ndim != 2:
            raise ValueError(f"{folder / 'other_params.bin'} holds no projector: {name[7:]} [out, in] is not in it")
    tokenizer = None if placeholder_id is not None else QWenTokenizer.from_pretrained(decoder)
    return {
        "placeholder_id": tokenizer.placeholder_id if tokenizer else placeholder_id,
        "system": SYSTEM,
        "encoder": _encoder_spec(str(encoder), num_features),
        "projector": {
            "kind": "mlp",
            "in_width": projector["layers.0.weight"].shape[1],
            "out_width": projector["layers.2.weight"].shape[0],
        },
        "decoder": {"path": str(decoder), "dtype": "auto", "quantization": "none"},
        "adapter": True,
        "tokenizer": tokenizer is not None,
    }


def read_legacy(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of adapter (peft's names) and projector (names of `model.projector.Projector`).

    Raises:
        ValueError: a file is damaged or holds more than tensors.
    """
    adapter = read_tensors(Path(folder) / "adapter_model.bin")
    projector = read_tensors(Path(folder) / "other_params.bin")
    return adapter, {f"layers.{name}": weight for name, weight in projector.items()}


def _encoder_spec(path: str, num_features: int | None) -> dict:
    """Arguments of `build_encoder`; the number of features decides whether the first patch is dropped."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    kind = getattr(config, "vision_config", config).model_type.removesuffix("_vision_model")
    if kind not in ("clip", "siglip"):
        raise ValueError(f"{path} holds a {kind!r} encoder; the first system had CLIP and SigLIP")
    with torch.device("meta"):
        patches = build_encoder(kind, path, load_weights=False).num_features
    choices = {patches - 1: True, patches: False} if kind == "siglip" else {patches: False}  # the first is the default
    if num_features is None:
        num_features = next(iter(choices))
    if num_features not in choices:
        raise ValueError(f"{path} yields {' or '.join(map(str, choices))} features per picture, not {num_features}")
    return {"kind": kind, "path": path, "drop_first_patch": choices[num_features]}
