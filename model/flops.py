"""Floating point operations that a training step needs, the numerator of MFU.

A product of a vector with a matrix of w numbers is w multiplications and w additions: 2 w operations. Training takes it
up to three times: forward; backward with respect to the vector, where a gradient is to reach something below; backward
with respect to the matrix, where the matrix is trained. A trained matrix so costs 6 w per token (the "6 N" of Kaplan et
al., https://arxiv.org/abs/2001.08361, and of PaLM, https://arxiv.org/abs/2204.02311, appendix B), a frozen one
4 w, one with nothing trained below 2 w. Per sample of T tokens, S of them supervised, with F feature vectors from V
views:

    decoder      T * (4 or 6) * w over all matrices of its blocks; of a mixture of experts only those that a token
                 goes through. Frozen matrices are 4 w down to the first block, since the projector, which is always
                 trained, lies below all of them. Embeddings are looked up, which is no product.
    lora         T * 6 * (r * in + r * out) for each adapted matrix. DoRA also needs the norms of W + B A, hence
                 2 r * in * out per forward pass, and with dropout W times the dropped-out input, 4 w per token.
    attention    3 * 2 * pairs * heads * (d_key + d_value) per block: scores and weighted sums, causal, so that there
                 are T (T + 1) / 2 pairs, fewer with a window. (Megatron, https://arxiv.org/abs/2104.04473, and PaLM
                 count T^2.)
    head         S * 4 * w, or 6 w where it is trained: logits are made at supervised positions only.
    projector    F * 6 * w; its first matrix 4 w, for below it lies the frozen encoder.
    encoder      V * its forward pass, as torch's FlopCounterMode counts it; with the backward pass where it is trained;
                 0 where its features come from a cache.

Not counted, as usual: norms, softmax, activations, everything else that is no product; padding, which nobody needs;
and what activation checkpointing computes again. The result is what the model needs, not what the hardware does (MFU
and not HFU in PaLM's terms).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig

from model.loss import IGNORE_INDEX
from model.model import MultiModalModel

FROZEN, TRAINED = 4, 6  # operations per token and number of a matrix
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


class TrainingFlops:
    """Counts the operations of training batches of one model; see the top of this file for what counts.

    The model is looked at once, when this is made: before anything wraps or shards it.

    Attributes:
        per_token: "decoder" and "lora": operations per token, attention aside.
        per_supervised: operations of the head per supervised token.
        per_feature: operations of the projector per feature vector.
        per_view: operations of the encoder per view.
        per_batch: operations of the adapters per micro-batch, whatever is in it.

    Raises:
        ValueError: the decoder has something whose operations are not known here.
    """

    def __init__(self, model: MultiModalModel):
        decoder = model.language_model
        self.num_features = model.media.num_features
        active = experts_per_token(decoder.config)
        self.per_token, self.per_batch = Counter(decoder=0, lora=0), 0
        for module in _modules(decoder.base_model):
            if isinstance(module, LoraLayer):
                per_token, per_batch = _adapter(module, active)
                self.per_token["lora"] += per_token
                self.per_batch += per_batch
            else:
                self.per_token["decoder"] += _own_matrices(module, active)
        head = _modules(decoder.get_output_embeddings())
        self.per_supervised = sum(_adapter(m, 1)[0] if isinstance(m, LoraLayer) else _own_matrices(m, 1) for m in head)
        self.per_feature = _projector(model)
        self.per_view = model.encoder.count_flops()
        self.attention_width = attention_width(decoder.config)  # operations of a pair's forward pass in one block / 2
        self.windows = Counter(attention_windows(decoder.config))

    def __call__(self, lengths: Sequence[int], supervised: int, features: int = 0, views: int = 0) -> dict[str, float]:
        """Operations of forward and backward pass of one micro-batch, by part.

        Args:
            lengths: tokens of each sample, feature vectors included.
            supervised: tokens that the loss counts.
            features: feature vectors out of the projector.
            views: images, tiles and frames that go through the encoder; 0 where their features come from a cache.
        """
        tokens = sum(lengths)
        pairs = sum(
            layers * sum(causal_pairs(length, window) for length in lengths) for window, layers in self.windows.items()
        )
        return {
            "decoder": self.per_token["decoder"] * tokens,
            "lora": self.per_token["lora"] * tokens + self.per_batch,
            "attention": 3 * 2 * pairs * self.attention_width,
            "head": self.per_supervised * supervised,
            "projector": self.per_feature * features,
            "encoder": self.per_view * views,
        }

    def of_batch(self, batch: Mapping[str, Tensor | list[int]]) -> float:
        """Operations of a micro-batch of `dataset.collator.Collator`."""
        views = len(batch["pixel_values"]) if "pixel_values" in batch else 0
        if "view_features" in batch:
            features = int(batch["view_features"].sum())
        else:
            features = int(batch["view_counts"].sum()) * self.num_features
        return sum(self(sample_lengths(batch), supervised_tokens(batch), features, views).values())


def sample_lengths(batch: Mapping[str, Tensor | list[int]]) -> list[int]:
    """Tokens of each sample of a batch, padded or packed; padding is none."""
    return list(batch["sample_lengths"]) if "sample_lengths" in batch else batch["attention_mask"].sum(1).tolist()


def supervised_tokens(batch: Mapping[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def causal_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key not after it, nor `window` or more before it."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return causal_pairs(window) + (length - window) * window


def attention_width(config: PreTrainedConfig) -> int:
    """heads * (width of a key + width of a value): a pair of positions costs twice as much, forward."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or getattr(config, "kv_channels", None) or config.hidden_size // heads
    rope = getattr(config, "qk_rope_head_dim", None)  # multi-head latent attention: keys have two parts
    key = config.qk_nope_head_dim + rope if rope else head
    return heads * (key + (getattr(config, "v_head_dim", None) or head))


def attention_windows(config: PreTrainedConfig) -> list[int | None]:
    """How far each block looks back, in tokens; None: to the beginning.

    Raises:
        ValueError: a block does something else than attend.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        kinds = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    windows = {
        "full_attention": None,
        "sliding_attention": window,
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    if unknown := set(kinds) - set(windows):
        raise ValueError(f"no count of operations for blocks of type {', '.join(sorted(unknown))}")
    return [windows[kind] for kind in kinds]


def experts_per_token(config: PreTrainedConfig) -> int | None:
    """Experts that a token goes through, as the decoder's configuration names them; None without any."""
    return next((getattr(config, name) for name in EXPERTS_PER_TOKEN if getattr(config, name, None)), None)


def _modules(root: nn.Module) -> Iterator[nn.Module]:
    """All modules but those within adapters; their base layers come, and experts with several adapters once."""
    pending, seen = [root], set()
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        pending += [module.base_layer] if isinstance(module, LoraLayer) else module.children()


def _own_matrices(module: nn.Module, active: int | None) -> int:
    """Operations per token of the matrices that are parameters of `module` itself."""
    if isinstance(module, nn.Embedding):
        return 0
    return sum(
        (TRAINED if parameter.requires_grad else FROZEN) * _size(module, name, parameter, active)
        for name, parameter in module.named_parameters(recurse=False)
    )


def _size(module: nn.Module, name: str, parameter: Tensor, active: int | None) -> int:
    """Numbers of a parameter by which a token is multiplied; 0 for vectors, such as biases and norms.

    Raises:
        ValueError: a stack of experts, of which nobody says how many a token goes through.
    """
    if name == "weight" and hasattr(module, "in_features"):
        return module.in_features * module.out_features  # a quantized weight has another shape
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves a process only a part, and the shape here
    if len(shape) < 2:
        return 0
    size = torch.Size(shape).numel()
    if len(shape) == 2 or isinstance(module, nn.Conv1d):
        return size
    if len(shape) == 3 and active:
        return size // shape[0] * min(active, shape[0])
    raise ValueError(f"no count of operations for {name} {list(shape)} of a {type(module).__name__}")


def _adapter(layer: LoraLayer, active: int | None) -> tuple[int, int]:
    """Operations of an adapter's matrices: per token, and per micro-batch.

    Those of experts are multiplied with each other, `r * in * out` per expert, and added to the experts' matrices: a
    token meets only these, but the backward pass needs their gradient.
    """
    per_token = per_batch = 0
    for name in layer.lora_A:
        rank, in_out = layer.r[name], layer.in_features * layer.out_features
        if isinstance(layer, ParamWrapper):
            experts = layer.num_experts
            per_batch += TRAINED * rank * in_out * experts
            per_token += (TRAINED - FROZEN) * in_out * min(active or 1, experts)
            continue
        per_token += TRAINED * rank * (layer.in_features + layer.out_features)
        if layer.use_dora.get(name):
            per_batch += 2 * rank * in_out
            if getattr(layer.lora_dropout[name], "p", 0):
                per_token += FROZEN * in_out
    return per_token, per_batch


def _projector(model: MultiModalModel) -> int:
    """Operations per feature vector."""
    sizes = [module.weight.numel() for module in model.projector.modules() if isinstance(module, nn.Linear)]
    first = TRAINED if model.encoder.trainable else FROZEN  # nothing below a frozen encoder wants a gradient
    return first * sizes[0] + TRAINED * sum(sizes[1:])
