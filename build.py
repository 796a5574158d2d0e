"""The model and the samples that a configuration describes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from config import Config, ConfigError, ModelConfig
from dataset.dataset import RecordDataset
from dataset.feature_cache import FeatureCache, media_ids
from dataset.feature_key import feature_key
from dataset.mixture import TOTAL, Mixture, shares_of
from dataset.record import Records, read_records
from model import MultiModalModel
from model.checkpoint import ENCODER_FILE, load_trained, read_spec
from model.decoder import add_rows, decoder_class, decoder_config, load_decoder
from model.legacy import is_legacy
from model.llava import is_llava
from model.lora import add_lora
from model.memory import UNPADDED
from model.projector import build_projector
from model.tokenizer import load_tokenizer, rows_needed
from visual import VisionEncoder, build_encoder
from visual.media import Media
from visual.weights import check_place, is_local, read_tensors

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
    _check_places(config, {"model.decoder": config.decoder})
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


def build_views(config: ModelConfig) -> tuple[VisionEncoder, Media]:
    """Encoder and media as `build_model` makes them, without a decoder; raises what it raises."""
    _check_places(config, {})
    encoder = build_encoder(**asdict(config.encoder))
    load_held_encoder(config, encoder)
    return encoder, Media(encoder, **asdict(config.media), pixel_shuffle=config.projector.pixel_shuffle)


def _check_places(config: ModelConfig, places: dict[str, str]) -> None:
    """Raises ConfigError for a local folder that is not there, of these and those of encoder and checkpoint."""
    places = {**places, "model.encoder.path": config.encoder.path}
    if config.checkpoint:
        places["model.checkpoint"] = os.path.abspath(config.checkpoint)  # never a hub id
    for key, path in places.items():
        try:
            check_place(path)
        except FileNotFoundError as error:
            raise ConfigError(f"{key}: {error}") from error


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
            raise ConfigError(f"{key}: there is no {path}/config.json, which says what shape it has")
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
        decoder = add_lora(decoder, lora.r, lora.alpha, lora.dropout, lora.targets, lora.rslora, lora.dora)
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


def load_mixture(config: Config, records: Records) -> Mixture | None:
    """How often the sources of the training records are drawn; None: every record once per epoch.

    The weights are those of `config.data` or, without any there, those in the records' files, which say nothing where
    the order is sequential.

    Raises:
        ValueError: weights, temperature or epoch that don't fit the sources.
    """
    c = config.data
    names, numbers = records.sources()
    weights = c.weights
    if not weights and c.temperature is None and config.train.train_sampling_strategy != "sequential":
        weights = {name: weight for name, weight in records.weights.items() if name in names}
        if weights and (missing := [name for name in names if name not in weights]):
            raise ValueError(f"the files of data.train have weights for {', '.join(weights)}, and none for "
                             f"{', '.join(missing)}; set data.weights")  # fmt: skip
    if not weights and c.temperature is None and c.epoch == TOTAL:
        return None
    sizes = dict(zip(names, np.bincount(numbers, minlength=len(names)).tolist(), strict=True))
    return Mixture(names, numbers, shares_of(sizes, weights, c.temperature), c.epoch, config.train.seed)


def load_dataset(config: Config, files: list[str], model: MultiModalModel) -> RecordDataset:
    """Samples of all record files, one after the other, as `config.data` says.

    Raises:
        OSError, ValueError: files that are not there, hold no records, or none at all; a feature cache that is not
            there, of another encoder or other settings, or without some medium of the records.
    """
    c = config.data
    records = read_records(files)
    if not len(records):
        raise ConfigError(f"there is no record in {', '.join(map(str, files))}")
    pooling = config.model.media.frame_pooling
    if config.model.projector.position_embedding and pooling > 1 and records.media_counts("videos").any():
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
        on_bad_record=c.on_bad_record,
        feature_cache=_open_cache(config, records, model) if c.feature_cache else None,
    )


def _open_cache(config: Config, records: Records, model: MultiModalModel) -> FeatureCache:
    load_held_encoder(config.model, model.encoder)
    key = feature_key(model.encoder, model.media, autocast_dtype(config))
    cache = FeatureCache(config.data.feature_cache, key)
    cache.check(media_ids(records.table), config.data.image_root)
    return cache


def load_held_encoder(config: ModelConfig, encoder: VisionEncoder) -> None:
    """Loads the encoder that `config.checkpoint` holds, where it was trained: no other weights are used then."""
    folder = config.checkpoint
    if folder and not is_llava(folder) and not is_legacy(folder) and "encoder" in read_spec(folder)["holds"]:
        encoder.backbone.load_state_dict(read_tensors(Path(folder, ENCODER_FILE)))


def autocast_dtype(config: Config) -> str | None:
    """Name of the dtype that a run computes in where its weights are float32; None: in theirs."""
    if config.train.fp16 and torch.cuda.is_available():
        return "float16"
    return "bfloat16" if config.train.bf16 else None
