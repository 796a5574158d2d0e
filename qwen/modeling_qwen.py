"""Qwen-1 decoder for transformers 5, with the published parameter names.

Rotary extrapolation in a generation
------------------------------------
In eval mode a text longer than `config.seq_length` is rotated with the base `rotary_emb_base * alpha ** (d / (d - 2))`,
d the width of a head (NTK-aware scaling, Qwen Technical Report, https://arxiv.org/abs/2309.16609), where alpha
(`ntk_alpha`) depends on the length of the whole text. A text that grows across `seq_length`, `2 * seq_length`, ...
changes its alpha, and with it every hidden state of every layer.

The definition used here: **the logits of a call are those of an uncached forward on the whole text up to the end of the
call.** Alpha is a function of the present true length of each row and of nothing else. The keys and values in the cache
belong to one alpha per row; when a call brings a row to another alpha, the cache is first computed anew from the
embeddings it was filled with (`_refill`), once per doubling of the length. Cached decoding, beams, left-padded batches
and prefill in chunks equal plain forwards by construction.

What that needs travels in the cache, not in the model: one further layer behind the decoder's, whose keys are the input
embeddings `[B, 1, T, H]` and whose values are alpha and position `[B, 1, T, 2]`. All cache operations (reordering for
beams, cropping, repeating) so apply to it too, and generations share no state.

`config.ntk_alpha_mode="frozen"` keeps the alpha of the first forward into the cache for all later ones instead.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_qwen import QWenConfig
from .decoding import GrowingLayer


def ntk_alpha(lengths: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Dynamic NTK factor of texts of these lengths: `max(2 ** ceil(log2(length / seq_length) + 1) - 1, 1)`.

    `lengths` counts tokens, any shape; the result has that shape, float32.
    """
    exponent = torch.ceil(torch.log2(lengths.float() / seq_length) + 1)
    return (torch.exp2(exponent) - 1).clamp(min=1)


def logn_scale(position_ids: torch.Tensor, seq_length: int) -> torch.Tensor:
    """Log-n factor of the query at each position (0-based), `max(1, log(p + 1) / log(seq_length))`, float32."""
    return (torch.log(position_ids.float() + 1) / math.log(seq_length)).clamp(min=1)


def rotary_table(
    position_ids: torch.Tensor, head_dim: int, base: float, alpha: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for `rotate`, float32 `[B, T, 1, head_dim]`; `position_ids` `[B, T]`, `alpha` `[B, T or 1]`."""
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    if alpha is not None:
        base = (base * alpha ** (head_dim / (head_dim - 2)))[..., None]
    angles = position_ids[..., None].float() * (1.0 / base**exponents)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x` `[B, T, heads, head_dim]`, half-split form, computed in float32 and returned so."""
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def segment_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the packed sample that each token belongs to, `[B, T]`; a sample ends where positions don't go on."""
    steps = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1)
    segments = (steps != 1).cumsum(-1)
    counts = torch.zeros_like(segments).scatter_add(1, segments, torch.ones_like(segments))
    return counts.gather(1, segments)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, for `attn_implementation="eager"`; query, key, value `[B, heads, T, head_dim]`."""
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Written out: the backward pass of F.rms_norm takes a general power on CPUs, a fifth of a training step.
        states = x.float()
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps)
        return states.to(x.dtype) * self.weight


class QWenAttention(nn.Module):
    """Multi-head self-attention; `c_attn` yields [q; k; v]."""

    is_causal = True

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        width = config.num_attention_heads * self.head_dim
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cos, sin, query_scale = position_embeddings
        batch, length, _ = hidden_states.shape
        # [B, T, 3 * heads * head_dim] -> three of [B, T, heads, head_dim]
        query, key, value = self.c_attn(hidden_states).view(batch, length, 3, -1, self.head_dim).unbind(2)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if query_scale is not None:
            query = query * query_scale
        # [B, T, heads, head_dim] -> [B, heads, T, head_dim]
        query, key, value = (states.to(value.dtype).transpose(1, 2) for states in (query, key, value))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.c_proj(output.reshape(batch, length, -1)), weights


class QWenMLP(nn.Module):
    """Gated feed-forward layer; `w2` is the gate."""

    def __init__(self, config: QWenConfig):
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class QWenBlock(GradientCheckpointingLayer):
    """One decoder layer, pre-norm."""

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QWenPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialization common to the Qwen-1 models.

    There are no buffers: rotary and log-n factors are computed once per forward from positions, so that nothing besides
    the parameters has to survive a load, a cast or a move. Parameters that no checkpoint holds are initialized by
    `PreTrainedModel` itself: N(0, `initializer_range`) for matrices, zero for biases, one for norms.
    """

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _input_embed_layer = "wte"
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}


class QWenModel(QWenPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.h = nn.ModuleList([QWenBlock(config, index) for index in range(config.num_hidden_layers)])
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[B, T, H]` of `input_ids` `[B, T]` or `inputs_embeds` `[B, T, H]`.

        `attention_mask` `[B, past + T]` is 1 at tokens and 0 at padding; positions then count the tokens of each row.
        Packed samples: no mask, no cache, and `position_ids` `[B, T]` that start again at each sample.

        Raises `ValueError` if not exactly one of ids and embeddings is given, if the mask's length is not that of the
        text, or if alpha has to change over a cache that was not filled in eval mode by this model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, not both and not neither")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length = past_length + inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] != length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, expected {length} "
                f"({past_length} cached + {inputs_embeds.shape[1]} new tokens)"
            )
        if position_ids is None:
            position_ids = self._position_ids(inputs_embeds, attention_mask, past_length)

        alpha = None
        if self.config.use_dynamic_ntk and not self.training:
            alpha = self._alpha(position_ids, attention_mask, past_key_values, past_length)
        return self._decode(inputs_embeds, attention_mask, position_ids, alpha, past_key_values, **kwargs)

    @staticmethod
    def _position_ids(inputs_embeds, attention_mask, past_length) -> torch.Tensor:
        """Number of tokens before each new token, `[B, T]` (`[1, T]` where all rows agree); 0 at left padding."""
        length = inputs_embeds.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        return torch.arange(past_length, past_length + length, device=inputs_embeds.device).unsqueeze(0)

    def _alpha(self, position_ids, attention_mask, past_key_values, past_length) -> torch.Tensor | None:
        """Alpha of each row or token, `[B, T or 1]`; None stands for 1. Brings the cache to it where it differs."""
        length = past_length + position_ids.shape[1]
        if attention_mask is not None and attention_mask.ndim == 2:
            lengths = attention_mask.sum(-1, keepdim=True)
        elif attention_mask is None and past_length == 0:
            lengths = segment_lengths(position_ids)
        else:
            lengths = position_ids.amax(-1, keepdim=True) + 1
        alpha = ntk_alpha(lengths, self.config.seq_length) if length > self.config.seq_length else None
        if past_length == 0:
            return alpha

        inputs = self._cached_inputs(past_key_values, past_length)
        if inputs is None and alpha is None:
            return None
        if inputs is None:
            raise ValueError(
                f"the cache holds {past_length} tokens without their embeddings, so it can't follow the rotary base "
                f"beyond seq_length={self.config.seq_length}: fill it in eval mode, or set use_dynamic_ntk=False"
            )
        cached_alpha = inputs.values[:, 0, -1:, 0]
        if self.config.ntk_alpha_mode == "frozen":
            return cached_alpha
        alpha = torch.ones_like(cached_alpha) if alpha is None else alpha
        if (alpha != cached_alpha).any():
            self._refill(past_key_values, inputs, attention_mask, alpha)
        return alpha

    def _refill(self, past_key_values, inputs, attention_mask, alpha) -> None:
        """Computes the cache anew, for the same inputs under another alpha `[B, 1]`."""
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be [B, T] where alpha changes, got {list(attention_mask.shape)}")
        inputs_embeds, position_ids = inputs.keys[:, 0], inputs.values[:, 0, :, 1].long()
        for layer in past_key_values.layers:
            layer.reset()
        if attention_mask is not None:
            attention_mask = attention_mask[:, : inputs_embeds.shape[1]]
        self._decode(inputs_embeds, attention_mask, position_ids, alpha, past_key_values)

    @capture_outputs
    def _decode(
        self, inputs_embeds, attention_mask, position_ids, alpha, past_key_values, **kwargs
    ) -> BaseModelOutputWithPast:
        """Runs the layers on embeddings `[B, T, H]` that follow what the cache holds."""
        config = self.config
        past_length = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        # A cache of fixed size always needs its mask, which hides what is not filled yet; a growing one that is still
        # empty says nothing, and packed samples are recognised only without a cache.
        is_static = past_key_values is not None and past_key_values.get_max_length() != -1
        causal_mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values if past_length or is_static else None,
            position_ids=position_ids,
            allow_is_causal_skip=not is_static,
        )
        query_scale = None
        if config.use_logn_attn and not self.training and past_length + inputs_embeds.shape[1] > config.seq_length:
            query_scale = logn_scale(position_ids, config.seq_length)[..., None, None]
        cos, sin = rotary_table(position_ids, config.kv_channels, config.rotary_emb_base, alpha)

        hidden_states = self.drop(inputs_embeds)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                position_embeddings=(cos, sin, query_scale),
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        if past_key_values is not None and config.use_dynamic_ntk and not self.training:
            self._remember_inputs(past_key_values, past_length, inputs_embeds, position_ids, alpha)
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values)

    def _cached_inputs(self, past_key_values, past_length) -> DynamicLayer | None:
        """The cache's layer of inputs, if it has those of all cached tokens."""
        layers = past_key_values.layers[self.config.num_hidden_layers :]
        return layers[0] if layers and layers[0].get_seq_length() == past_length else None

    def _remember_inputs(self, past_key_values, past_length, inputs_embeds, position_ids, alpha) -> None:
        """Appends what `_refill` needs to the cache's layer of inputs."""
        if past_length == 0 and len(past_key_values.layers) == self.config.num_hidden_layers:
            past_key_values.layers.append(GrowingLayer())
        inputs = self._cached_inputs(past_key_values, past_length)
        if inputs is None:  # tokens went into the cache in training mode
            return
        position_ids = position_ids.float().expand(inputs_embeds.shape[:2])
        alpha = torch.ones_like(position_ids) if alpha is None else alpha.expand_as(position_ids)
        inputs.update(inputs_embeds[:, None], torch.stack((alpha, position_ids), dim=-1)[:, None])


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """The decoder with its (untied) head."""

    decoder_class = QWenModel
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = self.decoder_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits `[B, T, V]` and, with `labels` `[B, T]` (-100 where nothing is asked), the mean next-token loss.

        The shift happens inside: the logits at t are held against `labels[:, t + 1]`. With `num_items_in_batch` the
        summed loss is divided by it instead. `logits_to_keep` limits the logits to the last so many positions (0: all).
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None, **kwargs) -> torch.Tensor | None:
        """Leaves the mask `[B, T]` as it is: `QWenModel` reads the true length of each row from it."""
        return attention_mask
