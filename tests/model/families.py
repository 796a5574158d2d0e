"""Tiny decoders of every supported family, with a byte-level tokenizer, in folders as transformers writes them."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

TOKENS = 259  # three special ones and the 256 bytes
SHAPE = {
    "vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 20}  # shorter than the texts of the tests

FAMILIES = {
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen2-tied": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral": lambda: MistralConfig(**SHAPE, **WINDOW),
    "phi": lambda: PhiConfig(**{**SHAPE, "num_key_value_heads": 4}),  # its head has a bias
    "phi3": lambda: Phi3Config(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, **WINDOW, head_dim=8, final_logit_softcapping=2.0),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, **WINDOW, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8),
    "mixtral": lambda: MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def byte_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A token for each byte, `<pad>`, `<s>`, `</s>`, and what else is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: 3 + i for i, letter in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def make_decoder(family: str, folder: Path, *special: str, spare_rows: int = 0) -> Path:
    """Writes a random decoder of a family; `special` tokens come behind the bytes, then spare rows."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.vocab_size = TOKENS + len(special) + spare_rows
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():  # as large as to matter, norms and biases too
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_tokenizer(*special).save_pretrained(folder)
    return folder
