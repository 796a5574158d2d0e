"""Folders of `LlavaForConditionalGeneration`, published or of `model.assemble`, as a place to start a training from."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from visual.weights import check_file, config_errors

if TYPE_CHECKING:
    from model.model import MultiModalModel

MODEL_TYPE = "llava"
OTHER_PARTS = [r"^(model\.)?(vision_tower|multi_modal_projector)\."]
PROJECTOR_NAMES = {"layers.0": "linear_1", "layers.2": "linear_2"}  # ours -> LLaVA's
LAYERS = {-1: "last", -2: "penultimate"}  # vision_feature_layer -> layer of an encoder


def is_llava(folder: str | Path) -> bool:
    """Whether a folder holds a LLaVA, by its `config.json`."""
    try:
        return json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["model_type"] == MODEL_TYPE
    except (OSError, ValueError, KeyError, TypeError):
        return False


def decoder_of(config: PreTrainedConfig, path: str | Path) -> PreTrainedConfig:
    """The configuration of the decoder in a LLaVA under `path`, whose weights `decoder_reader` finds there."""
    decoder = config.text_config
    decoder.tie_word_embeddings = config.tie_word_embeddings
    decoder._name_or_path = str(path)
    return decoder


def decoder_reader(decoder_class: type[PreTrainedModel]) -> tuple[type[PreTrainedModel], dict[str, str]]:
    """A class for `load_strictly` and its `key_mapping`, which read a decoder out of a LLaVA and leave the rest.

    Names are those of the published repositories (`language_model.model.`, for every kind of decoder) or of the class
    in transformers 5 (`model.language_model.`).
    """
    members = {"_keys_to_ignore_on_load_unexpected": OTHER_PARTS, "__module__": decoder_class.__module__}
    reader = type(decoder_class.__name__, (decoder_class,), members)
    trunk = f"{decoder_class.base_model_prefix}."
    return reader, {
        r"^language_model\.lm_head\.": "lm_head.",
        r"^language_model\.model\.": trunk,
        r"^model\.language_model\.": trunk,
    }


def read_projector(model: "MultiModalModel", folder: str | Path) -> dict[str, Tensor]:
    """Weights of the projector in a LLaVA folder, by the names of `model.projector`.

    Raises:
        ValueError: the folder's projector takes other features than those of the model's encoder, or has another
            activation; or a file is damaged, or there is no projector.
    """
    with config_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if problems := _feature_differences(model, config):
        raise ValueError(f"{folder}: its projector does not fit the model's encoder:\n  " + "\n  ".join(problems))
    ours = {theirs: name for name, theirs in PROJECTOR_NAMES.items()}
    state = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        check_file(file)
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                parts = name.split(".")
                if "multi_modal_projector" in parts[:2]:
                    layer = parts[-2]
                    state[f"{ours.get(layer, layer)}.{parts[-1]}"] = tensors.get_tensor(name).float()
    if not state:
        raise ValueError(f"{folder} has no multi_modal_projector in its *.safetensors; take a complete LLaVA folder")
    return state


def _feature_differences(model: "MultiModalModel", config: PreTrainedConfig) -> list[str]:
    spec, problems = model.encoder.spec, []
    layer = config.vision_feature_layer
    if layer not in LAYERS:
        problems.append(f"vision_feature_layer {layer}, this project reads -1 (last) and -2 (penultimate)")
    elif LAYERS[layer] != spec["layer"]:
        problems.append(f"vision_feature_layer {layer} is model.encoder.layer={LAYERS[layer]}, not {spec['layer']}")
    if config.vision_config.model_type == "siglip_vision_model" and layer == -1:
        problems.append(
            "it takes the last layer of SigLIP before the norm, which this project's encoder has behind it; "
            "start from the checkpoint that was exported, or from a LLaVA of vision_feature_layer -2"
        )
    if config.vision_config.model_type == "clip_vision_model":
        drops = config.vision_feature_select_strategy == "default"
        if drops != (spec["drop_class_token"] is not False):
            problems.append(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} is "
                f"model.encoder.drop_class_token={str(drops).lower()}"
            )
    if config.projector_hidden_act != "gelu":
        problems.append(f"its activation is {config.projector_hidden_act}, this project's is gelu")
    return problems
