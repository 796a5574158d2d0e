"""A trained model in formats that other tools read: its decoder, LoRA merged, as Qwen-1 or as Qwen2.

Below `seq_length` Qwen-1 is transformers' Qwen2 with `c_attn` split into q, k and v, `w2` as gate and `w1` as up
projection. Beyond, Qwen-1 extrapolates as Qwen2 does not, so `seq_length` is the longest text of an exported Qwen2.
"""

import copy
import json
import re
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model.decoder import quantization_of
from model.model import MultiModalModel
from qwen import MultimodalQWenLMHeadModel, QWenConfig, QWenLMHeadModel, QWenTokenizer
from qwen.tokenization_qwen import RANKS_FILE, TURN_END, write_ranks
from visual.twin import transformers_tower

SHARD = "5GB"
MAX_NEW_TOKENS = 512  # as inference.py; transformers' own default ends an answer after 20
IMAGE_TOKEN = "<image>"
LINEAR_NAMES = {  # linear modules of a Qwen-1 layer that stand for one of Qwen2
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}
LAYER_NAMES = {"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", **LINEAR_NAMES}
TOP_NAMES = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}

# ChatML as dataset.template writes it, behind a line that sets `default_system` and `image`.
CHAT_TEMPLATE = """\
{%- if default_system and (not messages or messages[0].role != 'system') -%}
    {{- '<|im_start|>system\\n' ~ default_system ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages if message.role != 'system' or message.content -%}
    {%- if message.role not in ('system', 'user', 'assistant') -%}
        {{- raise_exception("role must be 'system', 'user' or 'assistant', got '" ~ message.role ~ "'") -}}
    {%- endif -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'text' -%}
                {{- part.text -}}
            {%- elif part.type == 'image' and image and message.role == 'user' -%}
                {{- image -}}
            {%- else -%}
                {{- raise_exception("a " ~ message.role ~ " turn can't hold a part of type '" ~ part.type ~ "'") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def export_merged(model: MultiModalModel, folder: Path) -> None:
    """Writes a checkpoint without adapter: decoder in Qwen-1's published format and, of CLIP and SigLIP, the encoder.

    Both lie in the checkpoint's folder, so it can be moved alone. `model` is merged and names these weights afterwards.

    Raises:
        ValueError: the decoder is quantized.
        FileNotFoundError: the encoder has no preprocessing settings.
    """
    decoder = merged_decoder(model)
    if model.encoder.spec["kind"] in ("clip", "siglip"):
        tower, image_processor = transformers_tower(model.encoder)
        tower.save_pretrained(folder / "encoder")
        image_processor.save_pretrained(folder / "encoder")
        model.encoder.spec["path"] = str(folder / "encoder")
    _save_qwen1(decoder, model.tokenizer, folder / "decoder")
    decoder.config._name_or_path = str(folder / "decoder")
    model.save_pretrained(folder)


def merged_decoder(model: MultiModalModel) -> MultimodalQWenLMHeadModel:
    """The decoder after `model.merge()`; raises ValueError if it is quantized."""
    decoder = model.merge().language_model
    if (quantization := quantization_of(decoder)) != "none":
        raise ValueError(f'{quantization} weights are not exported; load the model with quantization="none"')
    return decoder


def _save_qwen1(decoder: MultimodalQWenLMHeadModel, tokenizer: QWenTokenizer | None, folder: Path) -> None:
    """A decoder as the published checkpoints have it: plain class, shards, ranks file."""
    config = copy.deepcopy(decoder.config)
    config.placeholder_id = None
    with torch.device("meta"):
        plain = QWenLMHeadModel(config)
    plain.load_state_dict(decoder.state_dict(), assign=True)
    plain.generation_config = decoder.generation_config
    plain.save_pretrained(folder, max_shard_size=SHARD)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        write_ranks(_ranks(tokenizer), folder / RANKS_FILE)


def _ranks(tokenizer: QWenTokenizer) -> dict[bytes, int]:
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    return {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}


def export_qwen2(model: MultiModalModel, folder: Path, system: str | None = None) -> None:
    """Writes the language model alone as `Qwen2ForCausalLM`, with tokenizer, chat template and generation config.

    `model` is merged afterwards.

    Args:
        system: text of the system turn of a conversation that brings none.

    Raises:
        ValueError: Qwen2 can't compute what the decoder does, or its tokenizer can't encode as the model's, or there is
            none; nothing is written.
    """
    config = qwen2_config(model.language_model.config, model.language_model.dtype)
    tokenizer = exported_tokenizer(model, chat_template(system))
    _check_merges(tokenizer)
    save_weights(qwen2_state(merged_decoder(model).state_dict()), folder)
    config.save_pretrained(folder)
    save_text_files(tokenizer, model, folder)


def qwen2_config(config: QWenConfig, dtype: torch.dtype) -> Qwen2Config:
    """Configuration of the Qwen2 that computes what a Qwen-1 decoder does.

    Raises:
        ValueError: there is none; lists every reason.
    """
    reasons = []
    if not config.no_bias:
        reasons.append("no_bias=False, but Qwen2 has no bias in the output projection and the MLP")
    if not config.scale_attn_weights:
        reasons.append("scale_attn_weights=False, but Qwen2 always scales")
    if config.emb_dropout_prob:
        reasons.append(f"emb_dropout_prob={config.emb_dropout_prob}, but Qwen2 has no dropout on embeddings; "
                       "set it to 0 in the decoder's config.json if training is over")  # fmt: skip
    if reasons:
        raise ValueError("the decoder can't be exported as Qwen2: " + "; ".join(reasons))
    hidden, heads = config.hidden_size, config.num_attention_heads
    qwen2 = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=hidden,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=config.intermediate_size // 2,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_emb_base)},
        max_position_embeddings=config.seq_length,
        attention_dropout=config.attn_dropout_prob,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=dtype,
        architectures=["Qwen2ForCausalLM"],
        # Written only where needed: some servers know heads of width hidden / heads alone.
        **({} if heads * config.kv_channels == hidden else {"head_dim": config.kv_channels}),
    )
    qwen2.rope_theta = qwen2.rope_parameters["rope_theta"]  # where transformers 4 reads it
    return qwen2


def qwen2_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Qwen-1 decoder under the names of `Qwen2ForCausalLM`; q, k and v are copies."""
    result = {}
    for name, weight in state.items():
        module, _, kind = name.rpartition(".")
        if module in TOP_NAMES:
            result[f"{TOP_NAMES[module]}.{kind}"] = weight
            continue
        index, part = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", module).groups()
        if part == "attn.c_attn":
            for third, split in zip("qkv", weight.chunk(3), strict=True):
                result[f"model.layers.{index}.self_attn.{third}_proj.{kind}"] = split.clone()
        else:
            result[f"model.layers.{index}.{LAYER_NAMES[part]}.{kind}"] = weight
    return result


def chat_template(system: str | None, image: str | None = None) -> str:
    """Jinja chat template; `image` is what a part of type "image" becomes, None where a turn can't hold one."""
    return f"{{%- set default_system = {system!r} -%}}{{%- set image = {image!r} -%}}\n{CHAT_TEMPLATE}"


def exported_tokenizer(model: MultiModalModel, template: str, with_image: bool = False) -> PreTrainedTokenizerFast:
    """The model's tokenizer as a class of transformers.

    Args:
        with_image: the placeholder is renamed to `<image>`, which so has an id without a new embedding.

    Raises:
        ValueError: the model has no tokenizer, or the placeholder is none of its special tokens.
    """
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer, which this format needs")
    backend = json.loads(model.tokenizer.backend_tokenizer.to_str())
    if with_image:
        tokens = {token["id"]: token for token in backend["added_tokens"]}
        if model.placeholder_id not in tokens:
            raise ValueError(f"placeholder_id {model.placeholder_id} is no special token of the checkpoint's tokenizer")
        tokens[model.placeholder_id]["content"] = IMAGE_TOKEN
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token=TURN_END,
        pad_token=model.tokenizer.pad_token,
        chat_template=template,
        model_max_length=model.language_model.config.seq_length,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids by default
    )


def _check_merges(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ValueError if Qwen2Tokenizer, as which transformers reads a Qwen2's tokenizer, would encode otherwise.

    It joins pairs until none is left, where Qwen-1 takes a word that is a token at once. These agree if pairs lead to
    every token, which they do in the published vocabulary.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["ignore_merges"] = False
    merging = Tokenizer.from_str(json.dumps(backend))
    vocabulary = merging.get_vocab(with_added_tokens=False)
    unreachable = [token for token in vocabulary if len(merging.model.tokenize(token)) > 1]
    if unreachable:
        raise ValueError(
            f"{len(unreachable)} tokens of the checkpoint's tokenizer, such as {unreachable[0]!r}, are not made by "
            "merging pairs of tokens, and so never by the tokenizer of a Qwen2"
        )


def save_text_files(tokenizer: PreTrainedTokenizerFast, model: MultiModalModel, folder: Path) -> None:
    """Tokenizer, chat template and generation config."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 4 knows no other name of this class
    write_json(settings, file)
    stop = {"eos_token_id": model.tokenizer.stop_ids, "pad_token_id": model.tokenizer.pad_token_id}
    GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW_TOKENS, **stop).save_pretrained(folder)


def save_weights(state: dict[str, Tensor], folder: Path) -> None:
    """Writes `model.safetensors`, or shards and their index, into a folder that is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = [name for name in state if name.endswith("lm_head.weight")]  # left out where it is the embedding itself
    save_torch_state_dict(state, folder, max_shard_size=SHARD, shared_tensors_to_discard=tied)


def write_json(values: dict, file: Path) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
