"""Configuration of Qwen-1 ("Qwen-7B"), with the keys of its published `config.json`."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class QWenConfig(PreTrainedConfig):
    """Shape and behaviour of a Qwen-1 decoder. The defaults are those of Qwen-7B.

    Published keys that change what is computed:

    - `intermediate_size`: twice the number of rows of `mlp.w1` and `mlp.w2`.
    - `kv_channels`: width of one attention head.
    - `no_bias`: no bias in `w1`, `w2` and the two `c_proj`; `c_attn` has one regardless.
    - `seq_length`: the length the model was trained on; beyond it, in eval mode, the two extrapolations below act.
    - `use_dynamic_ntk`: the rotary base grows with the length of the text (see `modeling_qwen.ntk_alpha`).
    - `use_logn_attn`: the query at position p is scaled by `max(1, log(p + 1) / log(seq_length))`.

    `use_flash_attn`, `bf16`, `fp16`, `fp32`, `softmax_in_fp32` and `use_cache_kernel` are kept for round trips only:
    `attn_implementation` and `dtype` of `from_pretrained` decide, and the softmax always runs in float32.

    Keys of this project:

    - `placeholder_id`: id of the token that stands for one feature vector (`<|extra_0|>`), needed to pass `features`.
    - `ntk_alpha_mode`: which alpha a cached step uses. `"length"`: that of the text's present length, as an uncached
      forward has it, so that cached equals uncached decoding. `"frozen"`: that of the first forward into the cache, as
      the published implementation has it.

    Raises `huggingface_hub.errors.StrictDataclassError` for a value of the wrong type or without a meaning in Qwen-1.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    emb_dropout_prob: float | int = 0.0
    attn_dropout_prob: float | int = 0.0
    rotary_emb_base: float | int = 10000
    rotary_pct: float | int = 1.0
    seq_length: int = 8192
    max_position_embeddings: int = 32768
    scale_attn_weights: bool = True
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    no_bias: bool = True
    tie_word_embeddings: bool = False
    use_cache: bool = True
    use_cache_quantization: bool = False
    use_cache_kernel: bool = False
    use_flash_attn: bool | str = "auto"
    softmax_in_fp32: bool = False
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    placeholder_id: int | None = None
    ntk_alpha_mode: Literal["length", "frozen"] = "length"

    def __post_init__(self, **kwargs):
        # Published configs point at remote code, which this class replaces.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Refuses published keys whose other values no published Qwen-1 uses and this implementation does not have."""
        if self.rotary_pct != 1.0:
            raise ValueError(f"rotary_pct={self.rotary_pct}: Qwen-1 rotates the whole head, rotary_pct must be 1.0")
        if self.use_cache_quantization:
            raise ValueError(
                "use_cache_quantization=True is not supported: set it to false and pass "
                "cache_implementation='quantized' to generate() instead"
            )
        if self.intermediate_size % 2 or self.kv_channels % 2:
            raise ValueError(
                f"intermediate_size={self.intermediate_size} and kv_channels={self.kv_channels} must be even"
            )
        if self.seq_length < 2:
            raise ValueError(f"seq_length={self.seq_length} must be at least 2 (log-n divides by its logarithm)")
