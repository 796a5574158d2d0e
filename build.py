"""The model and the samples that a configuration describes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from config import Config, ConfigError, ModelConfig
from dataset.dataset import RecordDataset
from dataset.record import read_records
from model import MultiModalModel
from model.checkpoint import load_trained
from model.decoder import add_rows, decoder_class, decoder_config, load_decoder
from model.lora import add_lora
from model.memory import UNPADDED
from model.projector import build_projector
from model.tokenizer import load_tokenizer, rows_needed
from visual import build_encoder
from visual.media import Media
from visual.weights import check_place, is_local

MAX_LENGTH = 2048  # tokens of a sample where the configuration sets no limit


def build_model(config: ModelConfig, device: torch.device | str = "cpu") -> MultiModalModel:
    """Encoder and decoder from disk or hub, and between them projector and LoRA layers.

    These two are fresh, or those of `config.checkpoint`. What `config.tune` says is trainable.

    Args:
        device: where the decoder is loaded to; the rest follows when the Trainer places the model.

    Raises:
        ConfigError: a local folder that is not there.
        ValueError: weights that are not complete, or an encoder or LoRA setting that does not fit them.
    """
    places = {"model.decoder": config.decoder, "model.encoder.path": config.encoder.path}
    if config.checkpoint:
        places["model.checkpoint"] = os.path.abspath(config.checkpoint)  # never a hub id
    for key, path in places.items():
        try:
            check_place(path)
        except FileNotFoundError as error:
            raise ConfigError(f"{key}: {error}") from error
    encoder = build_encoder(**asdict(config.encoder))
    decoder = load_decoder(
        config.decoder,
        config.dtype,
        quantization=config.quantization,
        device=device,
        attn_implementation=config.attn_implementation,
    )
    tokenizer = load_tokenizer(config.decoder, decoder.config.model_type, config.template)
    rows = add_rows(decoder, rows_needed(tokenizer))
    model = _assemble(config, encoder, decoder, tokenizer.placeholder_id, tokenizer, rows)
    if config.checkpoint:
        load_trained(model, config.checkpoint, keep_adapter=True)
    return model


def build_empty_model(config: ModelConfig) -> MultiModalModel:
    """The model of `build_model` on the meta device, from `config.json` files alone; not quantized, no tokenizer.

    Raises:
        ConfigError: a `config.json` that isn't at hand or describes no such model, or LoRA targets that the decoder
            doesn't have.
    """
    places = {"model.decoder": config.decoder}
    if config.encoder.kind not in ("open_clip", "timm"):
        places["model.encoder.path"] = config.encoder.path
    for key, path in places.items():
        if (is_local(path) or Path(path).is_dir()) and not Path(path, "config.json").is_file():
            raise ConfigError(f"{key}: there is no {path}/config.json; the plan reads that file and nothing else of it")
    with _errors_name("model.decoder"), torch.device("meta"):
        shape = decoder_config(config.decoder)
        decoder = decoder_class(shape)._from_config(shape, dtype=getattr(torch, config.dtype))
    with _errors_name("model.encoder.path"), torch.device("meta"):
        encoder = build_encoder(**asdict(config.encoder), load_weights=False)
    with _errors_name("model"), torch.device("meta"):
        model = _assemble(config, encoder, decoder, placeholder_id=0)
    lm = model.language_model
    eager = config.attn_implementation == "eager" or config.attn_implementation is None and not lm._supports_sdpa
    lm.config._attn_implementation = "eager" if eager else UNPADDED
    return model


@contextmanager
def _errors_name(key: str) -> Iterator[None]:
    """Libraries' errors about what `key` names, as one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def _assemble(
    config: ModelConfig, encoder, decoder, placeholder_id: int, tokenizer=None, rows: int = 0
) -> MultiModalModel:
    p, lora = config.projector, config.lora
    projector = build_projector(
        p.kind,
        encoder.width,
        decoder.config.hidden_size,
        num_features=encoder.num_features,
        position_embedding=p.position_embedding,
        pixel_shuffle=p.pixel_shuffle,
        init_std=p.init_std,
    )
    if config.tune == "lora":
        decoder = add_lora(decoder, lora.r, lora.alpha, lora.dropout, lora.targets)
    media = Media(encoder, **asdict(config.media), pixel_shuffle=p.pixel_shuffle)
    model = MultiModalModel(encoder, projector, decoder, placeholder_id, tokenizer, media=media, added_rows=rows)
    model.tune(decoder=config.tune in ("decoder", "all"), encoder=config.tune == "all")
    return model


def max_length(config: Config, model: MultiModalModel) -> int:
    """Tokens that a sample may have: `data.max_length`, and no more than the decoder has position vectors.

    Raises:
        ConfigError: `data.max_length` is more than that.
    """
    positions = model.num_positions
    if config.data.max_length is None:
        return min(MAX_LENGTH, positions or MAX_LENGTH)
    if positions is not None and config.data.max_length > positions:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but the decoder has vectors for {positions} positions; "
            "lower it, or leave it out"
        )
    return config.data.max_length


def load_dataset(config: Config, files: list[str], model: MultiModalModel) -> RecordDataset:
    """Samples of all record files, one after the other, as `config.data` says.

    Raises:
        OSError, ValueError: files that are not there, hold no records, or none at all.
    """
    c = config.data
    records = read_records(files)
    if not len(records):
        raise ConfigError(f"there is no record in {', '.join(map(str, files))}")
    pooling = config.model.media.frame_pooling
    if config.model.projector.position_embedding and pooling > 1 and any(map(len, records.table["videos"].to_pylist())):
        raise ConfigError(
            f"model.projector.position_embedding has a vector for each feature of an image, of which a frame has fewer "
            f"with model.media.frame_pooling={pooling}: set the former to false or the latter to 1"
        )
    return RecordDataset(
        records,
        model.tokenizer,
        model.media,
        c.image_root,
        max_length(config, model),
        system=c.system,
        on_bad_image=c.on_bad_image,
    )
