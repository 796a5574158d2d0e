"""Vision halves in the format of transformers: configuration, weights and preprocessing from a folder or a hub id."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, LlavaConfig, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from visual.preprocess import Preprocess
from visual.weights import config_errors, load_strictly

# model_type in `config.json` -> kind of encoder. The types of SigLIP 2 are for the error that explains NaFlex.
KINDS = {
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "siglip2": "siglip",
    "siglip2_vision_model": "siglip",
    "vit": "vit",
}
VISION_TYPES = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "vit": "vit"}

# Names in the files of a dual tower that the vision half has no place for. Old files also hold `position_ids`.
TEXT_HALF = [
    r"^text_model\.",
    r"^(text|visual)_projection\.",
    r"^logit_(scale|bias)$",
    r"position_ids$",
]
# Names in the files of a LLaVA that its vision tower has no place for.
BESIDE_TOWER = [
    r"^language_model\.",
    r"^multi_modal_projector\.",
    r"^lm_head\.",
]


def kind_of(path: str) -> str:
    """The kind of encoder that a folder or hub id in the format of transformers holds, by its `config.json`.

    Raises:
        OSError: no `config.json` there.
        ValueError: it describes no such encoder.
    """
    try:
        with config_errors(path):
            if Path(path).is_dir() and not Path(path, "config.json").is_file():
                raise FileNotFoundError(f"{path} has no config.json")
            settings = PreTrainedConfig.get_config_dict(path)[0]
            found = settings.get("model_type")
            if found == "llava":
                found = settings.get("vision_config", {}).get("model_type", LlavaConfig().vision_config.model_type)
    except OSError as error:
        raise type(error)(
            f"{_line(error)}. A model of timm or open_clip has no config.json of transformers: name its kind"
        ) from error
    if found not in KINDS:
        raise ValueError(
            f"{path}/config.json has model_type {found!r}, which is none of {', '.join(KINDS)}, llava; if it is a "
            "model of timm or open_clip, name its kind"
        )
    return KINDS[found]


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def load_vision_config(path: str, kind: str) -> PreTrainedConfig:
    """The configuration of the vision half, whether `path` holds a dual tower (`kind`), a LLaVA, or the half alone.

    Raises:
        OSError: no `config.json` there.
        ValueError: `path` holds a model of another type, or values that its type does not allow.
    """
    wanted = VISION_TYPES[kind]
    expected = kind if kind == wanted else f"{kind} or a {wanted}"
    with config_errors(path):
        model_type = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
        if model_type not in CONFIG_MAPPING:  # for which transformers would advise to update it
            raise ValueError(f"{path} holds a model of type {model_type!r}, expected a {expected}")
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type == "siglip2_vision_model":
        raise ValueError(
            f"{path} is a NaFlex checkpoint of SigLIP 2, whose number of patches varies with the image; "
            "take one with a fixed resolution, such as google/siglip2-so400m-patch14-384"
        )
    if config.model_type != wanted:
        raise ValueError(f"{path} holds a {config.model_type!r}; encoder kind {kind!r} needs a {wanted}")
    return config


def load_vision_model(
    model_class: type[PreTrainedModel],
    path: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    load_weights: bool,
    names: Mapping[str, str] = MappingProxyType({}),
) -> PreTrainedModel:
    """The vision half with its weights, or with initial ones; nothing else of the checkpoint enters memory.

    Args:
        names: further patterns -> what they become in names of weights, one after the other.

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
        # One after the other. Dual towers call the half `vision_model.`, a file of the half alone may or may not; a
        # LLaVA has either, or neither, in its `vision_tower.`, newer ones in `model.vision_tower.`
        key_mapping={r"^model\.": "", r"^vision_tower\.": "", r"^vision_model\.": "", **names},
    )


def on_grid(patches: Tensor, config: PreTrainedConfig) -> Tensor:
    """All patches `[N, n, D]` of a vision transformer as `[N, rows, columns, D]`."""
    height, width = sides(config.image_size)
    patch_height, patch_width = sides(config.patch_size)
    return patches.unflatten(1, (height // patch_height, width // patch_width))


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size in a configuration, where one number stands for both."""
    return (size, size) if isinstance(size, int) else tuple(size)


def load_processor(path: str) -> Preprocess:
    """The preprocessing published with the weights; raises what `load_image_processor` raises."""
    processor = load_image_processor(path)
    # One that pads to a square first has no use for the middle of a strip alone.
    center_crop = bool(
        getattr(processor, "do_center_crop", False)
        and "shortest_edge" in processor.size
        and not getattr(processor, "do_pad", False)
    )
    as_it_is = {name: False for name in ("do_resize", "do_center_crop", "do_pad") if hasattr(processor, name)}
    return Preprocess(partial(_process, processor), center_crop, partial(_process, processor, **as_it_is))


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


def _process(processor: BaseImageProcessor, image: Image.Image, **options) -> torch.Tensor:
    return processor(image, return_tensors="pt", **options)["pixel_values"][0]
