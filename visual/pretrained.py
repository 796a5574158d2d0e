"""Vision halves in the format of transformers: configuration, weights and preprocessing from a folder or a hub id."""

from functools import partial

import torch
from PIL import Image
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from visual.preprocess import Preprocess
from visual.weights import config_errors, load_strictly

# Names in the files of a dual tower that the vision half has no place for. Old files also hold `position_ids`.
TEXT_HALF = [
    r"^text_model\.",
    r"^(text|visual)_projection\.",
    r"^logit_(scale|bias)$",
    r"position_ids$",
]


def load_vision_config(path: str, kind: str) -> PreTrainedConfig:
    """The configuration of the vision half, whether `path` holds a dual tower (`kind`) or the half alone.

    Raises:
        OSError: no `config.json` there.
        ValueError: `path` holds a model of another type, or values that its type does not allow.
    """
    with config_errors(path):
        model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
        if model_type not in CONFIG_MAPPING:  # for which transformers would advise to update it
            raise ValueError(f"{path} holds a model of type {model_type!r}, expected a {kind} or a {kind}_vision_model")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type == "siglip2_vision_model":
        raise ValueError(
            f"{path} is a NaFlex checkpoint of SigLIP 2, whose number of patches varies with the image; "
            "take one with a fixed resolution, such as google/siglip2-so400m-patch14-384"
        )
    if config.model_type != f"{kind}_vision_model":
        raise ValueError(f"{path} holds a {config.model_type!r}; encoder kind {kind!r} needs a {kind}_vision_model")
    return config


def load_vision_model(
    model_class: type[PreTrainedModel], path: str, config: PreTrainedConfig, dtype: torch.dtype, load_weights: bool
) -> PreTrainedModel:
    """The vision half with its weights, or with initial ones; nothing else of the checkpoint enters memory.

    Raises:
        ValueError: a weight is missing, has another shape, or has a name that is neither of the vision half nor of
            what `model_class` is known to leave out.
    """
    if not load_weights:
        return model_class._from_config(config, dtype=dtype)
    return load_strictly(
        model_class,
        path,
        config=config,
        dtype=dtype,
        # Dual towers call the half `vision_model.`; a file of the half alone may or may not.
        key_mapping={r"^vision_model\.": ""},
    )


def load_processor(path: str) -> Preprocess:
    """The preprocessing published with the weights; raises what `load_image_processor` raises."""
    processor = load_image_processor(path)
    center_crop = bool(getattr(processor, "do_center_crop", False) and "shortest_edge" in processor.size)
    return Preprocess(partial(_process, processor), center_crop)


def load_image_processor(path: str) -> BaseImageProcessor:
    """The image processor published with the weights.

    Raises:
        FileNotFoundError: neither `preprocessor_config.json` nor `processor_config.json` beside the weights.
    """
    try:
        # The PIL backend is the arithmetic that CLIP, SigLIP and the projectors on top of them were trained with
        # (torchvision's differs by single grey levels), and the one that open_clip and timm use.
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"{path} has no usable preprocessor_config.json. Add the one published with these weights: it holds "
            f"image_processor_type, size, crop_size, image_mean, image_std and resample. ({error})"
        ) from error


def _process(processor: BaseImageProcessor, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]
