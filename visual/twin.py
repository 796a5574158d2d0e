"""The model of transformers that computes what an encoder does, for exports that others read without this project."""

import re
from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.activations import ACT2FN
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from visual import VisionEncoder, build_encoder
from visual.pretrained import load_image_processor

MODELS = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}

# Relative difference of features in float32. Sums in another order make 6e-7 at ViT-L/14's size, GELU by tanh in place
# of the exact one 2e-4.
TOLERANCE = 2e-5

# A name in open_clip's VisionTransformer, or in timm's, is turned into that of transformers by all of these in turn.
OPEN_CLIP_NAMES = {
    r"^class_embedding$": "embeddings.class_embedding",
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^conv1\.": "embeddings.patch_embedding.",
    r"^ln_pre\.": "pre_layrnorm.",  # sic
    r"^ln_post\.": "post_layernorm.",
    r"^transformer\.resblocks\.": "encoder.layers.",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.attn\.in_proj_": ".self_attn.qkv.",
    r"\.attn\.out_proj\.": ".self_attn.out_proj.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
}
TIMM_NAMES = {
    r"^pos_embed$": "embeddings.position_embedding.weight",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.out_proj.",
}


def transformers_tower(encoder: VisionEncoder) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """(CLIPVisionModel or SiglipVisionModel, its image processor), both ready for `save_pretrained`.

    The model has all layers, whichever `encoder` takes its features from, the encoder's dtype, and lies on the CPU. The
    encoder's features, before any token is dropped, are its `hidden_states[-1]` (layer "last") or `hidden_states[-2]`
    (layer "penultimate"), which is where a LlavaForConditionalGeneration with that `vision_feature_layer` takes them.
    A SiglipVisionModel has no pooling head, and its configuration says that its last hidden state is normalised.

    The image processor does to an RGB image what `encoder.preprocess` does, with PIL. The one difference: of a margin
    of 3, 7, 11, ... pixels, open_clip's centre crop takes one pixel more from the left (top) than transformers' does.

    Raises:
        ValueError: transformers has no model that computes the same; the message says what stands in the way.
    """
    kind = encoder.spec["kind"]
    if kind in MODELS:
        path = encoder.spec["path"]
        # An encoder of the layer before the last does not keep the last.
        full = encoder if encoder.spec["layer"] == "last" else build_encoder(**encoder.spec | {"layer": "last"})
        model_class, config = MODELS[kind], full.backbone.config
        state = full.backbone.state_dict() | encoder.backbone.state_dict()  # which may have been trained
        processor = load_image_processor(path)
    elif kind == "open_clip":
        try:
            model_class, config, state = convert(encoder.backbone)
            processor = _image_processor(encoder.backbone.preprocess_cfg)
        except ValueError as error:
            raise ValueError(f"open_clip {encoder.spec['path']} has no twin in transformers: {error}") from error
    else:
        raise ValueError(
            f"encoder kind {kind!r} has no twin in transformers; clip and siglip have, and open_clip's CLIP and SigLIP"
        )
    dtype = next(encoder.parameters()).dtype
    state = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    # By default the last of SigLIP's `hidden_states` is that before the final norm; the encoder's is that after it.
    model.config.tie_last_hidden_states = True
    _require_equal(encoder, model)
    return model, processor


def convert(tower: nn.Module) -> tuple[type[PreTrainedModel], PreTrainedConfig, dict[str, Tensor]]:
    """(class, configuration, weights) in transformers of the backbone of an encoder of kind `open_clip`.

    Works on the meta device as well. The weights are views of the tower's.

    Raises:
        ValueError: `tower` has a part that the vision transformers of CLIP and SigLIP don't have, or lacks one.
    """
    import open_clip.transformer
    import timm.layers
    import timm.models.vision_transformer

    if type(tower) is open_clip.transformer.VisionTransformer:
        blocks = tower.transformer.resblocks
        _require_types(blocks, open_clip.transformer.ResidualAttentionBlock)
        activations = [block.mlp.gelu for block in blocks]
        model_class, config_class, image_size = CLIPVisionModel, CLIPVisionConfig, tower.image_size
        state = _rename(tower, OPEN_CLIP_NAMES, unused=("proj",))
    elif type(tower) is timm.models.vision_transformer.VisionTransformer:
        blocks = tower.blocks
        _require_types([tower.patch_embed], timm.layers.PatchEmbed)
        _require_types(blocks, timm.models.vision_transformer.Block)
        _require_types([block.attn for block in blocks], timm.layers.Attention)
        _require_types([block.mlp for block in blocks], timm.layers.Mlp)
        activations = [block.mlp.act for block in blocks]
        model_class, config_class, image_size = SiglipVisionModel, SiglipVisionConfig, tower.patch_embed.img_size
        state = _rename(tower, TIMM_NAMES, unused=("attn_pool.", "head."))
    else:
        raise ValueError(f"its image tower is a {type(tower).__name__}")
    patches = state["embeddings.patch_embedding.weight"]  # [D, 3, patch, patch]
    config = config_class(
        hidden_size=patches.shape[0],
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=len(blocks),
        num_attention_heads=_only("number of attention heads", [block.attn.num_heads for block in blocks]),
        image_size=_only("side of the image", image_size),
        patch_size=_only("side of a patch", patches.shape[2:]),
        hidden_act=_only("activation", map(_activation, activations)),
        layer_norm_eps=_only("epsilon of LayerNorm", [m.eps for m in tower.modules() if isinstance(m, nn.LayerNorm)]),
    )
    if model_class is SiglipVisionModel:
        config.vision_use_head = False
    _require_fit(model_class, config, state)
    return model_class, config, state


def _require_types(modules: Iterable[nn.Module], expected: type[nn.Module]) -> None:
    others = {type(module).__name__ for module in modules if type(module) is not expected}
    if others:
        raise ValueError(f"it has {', '.join(sorted(others))} in place of {expected.__module__}.{expected.__name__}")


def _only(what: str, values: Iterable) -> int | float | str:
    """The one value that all of `values` are."""
    values = set(values)
    if len(values) != 1:
        raise ValueError(f"it has no single {what}, but {sorted(values)}")
    return values.pop()


def _activation(module: nn.Module) -> str:
    """The name in transformers of the function that `module` computes."""
    x = torch.linspace(-4, 4, 81, device="cpu")
    for name in ("gelu", "quick_gelu", "gelu_pytorch_tanh"):
        # Exact GELU and its approximation by tanh differ by 5e-4.
        if torch.allclose(module(x), ACT2FN[name](x), atol=1e-6, rtol=0):
            return name
    raise ValueError(f"its activation {module} is none of CLIP's or SigLIP's")


def _rename(tower: nn.Module, names: dict[str, str], unused: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights by transformers' names; those that don't begin like one of `unused` and have none keep their own."""
    state = {}
    for name, tensor in tower.state_dict().items():
        if name.startswith(unused):
            continue
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        if name == "embeddings.position_embedding.weight":
            tensor = tensor.flatten(0, -2)  # timm's has a batch dimension
        if ".qkv." in name:
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace(".qkv.", f".{projection}_proj.")] = part
        else:
            state[name] = tensor
    return state


def _require_fit(model_class: type[PreTrainedModel], config: PreTrainedConfig, state: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = {(name, tuple(tensor.shape)) for name, tensor in model_class(config).state_dict().items()}
    given = {(name, tuple(tensor.shape)) for name, tensor in state.items()}
    for problem, weights in (("has", given - expected), ("lacks", expected - given)):
        if weights:
            examples = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(weights)[:3])
            raise ValueError(f"it {problem} {len(weights)} weights other than a {model_class.__name__}: {examples}")


def _image_processor(settings: dict) -> BaseImageProcessor:
    """For `preprocess_cfg` of open_clip, whose size and tower's image size are equal and square."""
    size = settings["size"] if isinstance(settings["size"], int) else _only("side of the image", settings["size"])
    bilinear = settings["interpolation"] == "bilinear"  # open_clip takes anything else for bicubic
    options = {
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
        "resample": PILImageResampling.BILINEAR if bilinear else PILImageResampling.BICUBIC,
    }
    square = {"height": size, "width": size}
    if settings["resize_mode"] == "shortest":
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square, **options)
    if settings["resize_mode"] == "squash":
        return SiglipImageProcessorPil(size=square, **options)
    raise ValueError(f"its preprocessing has resize_mode {settings['resize_mode']!r}, not shortest or squash")


def _require_equal(encoder: VisionEncoder, model: PreTrainedModel) -> None:
    """Raises ValueError where the features of one random image differ, in float32 on the CPU."""
    pixel_values = torch.randn(1, 3, *encoder.image_size, generator=torch.Generator().manual_seed(0))
    expected = _in_float32(encoder, pixel_values)
    index = -1 if encoder.spec["layer"] == "last" else -2
    features = _in_float32(model, pixel_values, output_hidden_states=True).hidden_states[index]
    features = features[:, features.shape[1] - expected.shape[1] :]  # dropped tokens are the first
    difference = ((features - expected).norm() / expected.norm()).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{encoder.spec['kind']} {encoder.spec['path']} has no twin in transformers: features of a "
            f"{type(model).__name__} with its weights differ by {difference:.1e} of their size"
        )


@torch.no_grad()
def _in_float32(module: nn.Module, *args, **kwargs):
    """What `module(*args, **kwargs)` returns with its weights as float32 on the CPU; `module` stays as it is."""
    state = {
        name: tensor.cpu().float() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in chain(module.named_parameters(), module.named_buffers())
    }
    return functional_call(module, state, args, kwargs)
