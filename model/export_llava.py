"""The whole model as `LlavaForConditionalGeneration`, the class of transformers that vLLM and SGLang have too.

Names of weights and files are those of the published LLaVA-1.5 repositories, which older versions of these tools read
as well. All of them take features from `hidden_states`, that is before the norm that follows SigLIP's last layer. Ours
are taken after it, so there the norm becomes a layer of the tower (`append_norm`).

LLaVA has images alone, each of one view. A clip is given to it as the images of its frames, `<image>` behind `<image>`
without anything between; they have as many features as other images, also where `frame_pooling` was more than 1 in
training, which concerns clips alone.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from model.decoder import Head
from model.export import (
    IMAGE_TOKEN,
    compare,
    exported_tokenizer,
    merged_decoder,
    qwen2_config,
    qwen2_state,
    save_text_files,
    save_weights,
    write_json,
)
from model.llava import PROJECTOR_NAMES
from model.model import MultiModalModel
from model.projector import Projector
from qwen import QWenConfig
from visual.twin import transformers_tower
from visual.weights import load_strictly

NORM_SCALE = 2.0**24  # a power of two: scaling by it rounds nothing
# In files -> in the class of transformers. The first was the decoder's class with head when the layout was published,
# and stands for that without head whatever the decoder calls it.
FILE_NAMES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def export_llava(model: MultiModalModel, folder: Path, system: str | None = None) -> None:
    """Writes weights in the decoder's dtype, configuration, tokenizer, chat template, processor and generation config.

    `model` is merged afterwards. What was written is read again and compared with the model, weight by weight.

    Args:
        folder: where to; on an error it may hold some of the files (`model.export.new_folder`).
        system: text of the system turn of a conversation that brings none.

    Raises:
        ValueError: LLaVA can't compute what the model does, there is no tokenizer, or its chat template can't make the
            prompts of the training, and nothing is written; or what was written reads as something else.
        FileNotFoundError: the encoder has no preprocessing settings.
    """
    _check_media(model)
    projector = _projector_state(model.projector)
    dtype = model.language_model.dtype
    text_config = _text_config(model.language_model, dtype)
    tokenizer = exported_tokenizer(model, system, f"{IMAGE_TOKEN}\n")
    tower, image_processor = transformers_tower(model.encoder)
    tower.config.tie_last_hidden_states = False  # true is a way to normalise them that only transformers 5 knows
    tower.config.name_or_path = ""
    if isinstance(tower, SiglipVisionModel) and model.encoder.spec["layer"] == "last":
        if dtype == torch.float16:
            raise ValueError("float16 overflows in a SigLIP tower whose last norm is a layer; export as bfloat16")
        append_norm(tower)
        projector["linear_1.weight"] /= NORM_SCALE
    state = _decoder_state(merged_decoder(model), tied=text_config.tie_word_embeddings)
    state |= {f"vision_tower.vision_model.{name}": weight for name, weight in tower.state_dict().items()}
    state |= {f"multi_modal_projector.{name}": weight for name, weight in projector.items()}
    state = {name: weight.to(dtype) for name, weight in state.items()}
    save_weights(state, folder)

    features = feature_settings(model, tower)
    tower.config.dtype = dtype
    LlavaConfig(
        vision_config=tower.config,
        text_config=text_config,
        image_token_index=model.placeholder_id,
        image_seq_length=model.encoder.num_features,
        projector_hidden_act="gelu",
        vision_feature_layer=-1 if model.encoder.spec["layer"] == "last" else -2,
        vision_feature_select_strategy=features["vision_feature_select_strategy"],
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=dtype,
        architectures=["LlavaForConditionalGeneration"],
    ).save_pretrained(folder)
    save_text_files(tokenizer, model, folder)
    image_processor.save_pretrained(folder)
    write_json({"processor_class": "LlavaProcessor", **features}, folder / "processor_config.json")
    _check_written(folder, state, type(text_config))


def _check_media(model: MultiModalModel) -> None:
    """Raises ValueError where an image has other views or features than LLaVA gives it."""
    if (r := model.projector.spec["pixel_shuffle"]) > 1:
        raise ValueError(f"LLaVA has no pixel shuffle, this model's projector joins {r} x {r} features")
    if tiles := model.media.spec["max_tiles"]:
        raise ValueError(
            f"LLaVA sees an image as one view, this model as up to {tiles} tiles beside it (model.media.max_tiles)"
        )


def _text_config(decoder: PreTrainedModel, dtype: torch.dtype) -> PreTrainedConfig:
    """Configuration of the decoder within LLaVA.

    Raises:
        ValueError: LLaVA's head, a matrix, is not all that the decoder has behind its last layer.
    """
    if isinstance(decoder.config, QWenConfig):
        return qwen2_config(decoder.config, dtype)
    kind, head = decoder.config.model_type, decoder.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    if getattr(head, "bias", None) is not None and head.bias.any():
        raise ValueError(f"LLaVA's head has no bias, that of this {kind} has")
    if (scale := Head(decoder).scale) != 1:
        raise ValueError(f"LLaVA does not scale logits, this {kind} does, by {scale:g}")
    if cap := getattr(decoder.config, "final_logit_softcapping", None):
        raise ValueError(f"LLaVA does not squash logits, this {kind} does (final_logit_softcapping {cap})")
    config = copy.deepcopy(decoder.config)
    del config.placeholder_id
    config.name_or_path = ""
    config.dtype = dtype
    config.architectures = [type(decoder).__name__]
    # LLaVA ties its head to a matrix of this name alone; others are written twice.
    words = getattr(decoder.base_model, "embed_tokens", None)
    config.tie_word_embeddings = words is not None and head.weight is words.weight
    return config


def _decoder_state(decoder: PreTrainedModel, tied: bool) -> dict[str, Tensor]:
    """Weights of a decoder by the names of LLaVA's files."""
    if isinstance(decoder.config, QWenConfig):
        state = {f"language_model.{name}": weight for name, weight in qwen2_state(decoder.state_dict()).items()}
    else:
        state = {f"language_model.model.{name}": weight for name, weight in decoder.base_model.state_dict().items()}
        state["language_model.lm_head.weight"] = decoder.get_output_embeddings().weight.detach()
        if not tied:
            state["language_model.lm_head.weight"] = state["language_model.lm_head.weight"].clone()
    return state


def _check_written(folder: Path, state: dict[str, Tensor], text_config: type[PreTrainedConfig]) -> None:
    """Raises ValueError unless a LlavaForConditionalGeneration reads `state` from the folder, every weight of it."""
    llava = load_strictly(LlavaForConditionalGeneration, folder, dtype="auto")
    if type(llava.config.text_config) is not text_config:
        raise ValueError(f"LLaVA reads a {text_config.__name__} as a {type(llava.config.text_config).__name__}")
    expected = {}
    for name, weight in state.items():
        prefix = next(prefix for prefix in FILE_NAMES if name.startswith(prefix))
        expected[FILE_NAMES[prefix] + name.removeprefix(prefix)] = weight
    compare(expected, llava.state_dict(), "a LlavaForConditionalGeneration with the weights")


def _projector_state(projector: Projector) -> dict[str, Tensor]:
    """Copies of its weights by LLaVA's names; raises ValueError if LLaVA has no such projector."""
    if (kind := projector.spec["kind"]) != "mlp":
        raise ValueError(f'LLaVA\'s projector has two layers (kind "mlp"), this model\'s is of kind {kind!r}')
    if projector.spec["position_embedding"]:
        raise ValueError(
            "LLaVA's projector has no position_embedding, this model's has; train with "
            "model.projector.position_embedding=false"
        )
    return {
        f"{theirs}.{name}": tensor.clone()
        for ours, theirs in PROJECTOR_NAMES.items()
        for name, tensor in projector.get_submodule(ours).state_dict().items()
    }


def feature_settings(model: MultiModalModel, tower: PreTrainedModel) -> dict:
    """`processor_config.json`: which of the tower's tokens are features, and so how many `<image>` a picture needs."""
    spec, siglip = model.encoder.spec, isinstance(tower, SiglipVisionModel)
    drops_first = spec["drop_first_patch"] if siglip else spec["drop_class_token"] is not False
    return {
        "image_token": IMAGE_TOKEN,
        "patch_size": tower.config.patch_size,
        "vision_feature_select_strategy": "default" if drops_first else "full",
        "num_additional_image_tokens": 0 if siglip else 1,
    }


@torch.no_grad()
def append_norm(tower: SiglipVisionModel) -> None:
    """Appends a layer that turns x into `NORM_SCALE * post_layernorm(x) + x`, of which x is lost in rounding.

    A layer adds to its input; the scale makes what was there irrelevant, and the projector's first weight is divided
    by it. The attention adds nothing. In the MLP, norm and activation give act(z) and act(-z), z the norm's output, and
    act(z) - act(-z) = z for every activation z * F(z) with F(z) + F(-z) = 1: each kind of GELU, and SiLU.

    Raises:
        ValueError: the MLP is narrower than twice the tower.
    """
    width, mlp_width = tower.config.hidden_size, tower.config.intermediate_size
    if mlp_width < 2 * width:
        raise ValueError(
            f"LLaVA reads SigLIP's features before the last norm; as a layer, the norm needs an MLP at least twice as "
            f"wide as the tower ({width}), this one's has {mlp_width}"
        )
    layer = copy.deepcopy(tower.encoder.layers[-1])
    for parameter in layer.parameters():
        parameter.zero_()
    layer.layer_norm2.load_state_dict(tower.post_layernorm.state_dict())
    identity = torch.eye(width)
    layer.mlp.fc1.weight[: 2 * width] = torch.cat([identity, -identity])
    layer.mlp.fc2.weight[:, : 2 * width] = NORM_SCALE * torch.cat([identity, -identity], dim=1)
    tower.encoder.layers.append(layer)
    tower.config.num_hidden_layers += 1
