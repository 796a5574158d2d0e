"""A trained model in formats that other tools read: its decoder, LoRA merged, in its own format or as Qwen2.

Below `seq_length` Qwen-1 is transformers' Qwen2 with `c_attn` split into q, k and v, `w2` as gate and `w1` as up
projection. Beyond, Qwen-1 extrapolates as Qwen2 does not, so `seq_length` is the longest text of an exported Qwen2.
"""

import copy
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model.chat_template import chat_template, check_chat_template
from model.checkpoint import save_decoder
from model.decoder import load_decoder, quantization_of
from model.model import MultiModalModel
from qwen import MultimodalQWenLMHeadModel, QWenConfig, QWenLMHeadModel, QWenTokenizer
from qwen.tokenization_qwen import RANKS_FILE, TURN_END, write_ranks
from visual.twin import transformers_tower
from visual.weights import by_layer, load_strictly

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


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name at the end, or disappears after an error.

    Raises:
        ValueError: there is something at `path`, other than an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output {path} exists and is no empty folder; name a new one or empty it")
    staged = path.with_name(f".{path.name}.exporting")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        if path.exists():
            path.rmdir()
        staged.rename(path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def export_merged(model: MultiModalModel, folder: Path) -> None:
    """Writes a checkpoint without adapter: decoder in its own published format and, of CLIP and SigLIP, the encoder.

    Both lie in the checkpoint's folder, so it can be moved alone. Rows that were added to the decoder's embeddings are
    rows like others there. `model` is merged and names these weights afterwards.

    Raises:
        ValueError: the decoder is quantized, or what was written reads as something else.
        FileNotFoundError: the encoder has no preprocessing settings.
    """
    decoder = merged_decoder(model)
    if model.encoder.spec["kind"] in ("clip", "siglip"):
        tower, image_processor = transformers_tower(model.encoder)
        tower.save_pretrained(folder / "encoder")
        image_processor.save_pretrained(folder / "encoder")
        model.encoder.spec["path"] = str(folder / "encoder")
        model.holds -= {"encoder"}
        again = load_strictly(type(tower), folder / "encoder", dtype="auto")
        compare(tower.state_dict(), again.state_dict(), "the encoder")
    if isinstance(decoder, MultimodalQWenLMHeadModel):
        _save_qwen1(decoder, model.tokenizer, folder / "decoder")
    else:
        save_decoder(model, folder / "decoder")
    compare(decoder.state_dict(), load_decoder(folder / "decoder", "auto").state_dict(), "the decoder")
    decoder.config._name_or_path = str(folder / "decoder")
    model.holds -= {"decoder"}
    model.added_rows = 0
    model.requires_grad_(False)
    model.save_pretrained(folder)


def merged_decoder(model: MultiModalModel) -> PreTrainedModel:
    """The decoder after `model.merge()`; raises ValueError if it is quantized."""
    decoder = model.merge().language_model
    if (quantization := quantization_of(decoder)) != "none":
        raise ValueError(f'{quantization} weights are not exported; load the model with quantization="none"')
    return decoder


def compare(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    """Raises ValueError unless both have the same names, shapes and values; NaN equals NaN.

    Args:
        expected: may be of another dtype; it is rounded to that of `found`.
        what: the part that is compared, for the error.
    """
    problems = {"missing": expected.keys() - found.keys(), "unexpected": found.keys() - expected.keys()}
    problems["of other values"] = {
        name for name in expected.keys() & found.keys() if not _equal(expected[name], found[name])
    }
    lines = [f"{problem}: {', '.join(by_layer(names))}" for problem, names in problems.items() if names]
    if lines:
        raise ValueError(f"what was written does not read as {what} of the model; {'; '.join(lines)}")


def _equal(expected: Tensor, found: Tensor) -> bool:
    expected = expected.detach().to(found)
    if expected.shape != found.shape:
        return False
    return torch.equal(expected, found) or torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True)


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
        ValueError: the decoder is no Qwen-1, Qwen2 can't compute what it does, or its tokenizer can't encode as the
            model's, or there is none; nothing is written.
    """
    kind = model.language_model.config.model_type
    if kind != QWenConfig.model_type:
        raise ValueError(
            f"format qwen2 converts Qwen-1; this decoder is a {kind}, whose own format is read by transformers: take "
            "format merged, and the folder decoder/ of what it writes"
        )
    config = qwen2_config(model.language_model.config, model.language_model.dtype)
    tokenizer = exported_tokenizer(model, system)
    _check_merges(tokenizer)
    state = qwen2_state(merged_decoder(model).state_dict())
    save_weights(state, folder)
    config.save_pretrained(folder)
    save_text_files(tokenizer, model, folder)
    found = load_strictly(Qwen2ForCausalLM, folder, dtype="auto").state_dict()
    compare(state, found, "the decoder")


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


def exported_tokenizer(model: MultiModalModel, system: str | None, image: str | None = None) -> PreTrainedTokenizerFast:
    """The model's tokenizer as a class of transformers, with a chat template.

    Args:
        system: text of the system turn of a conversation that brings none.
        image: what a part of type "image" of a turn becomes. With it the placeholder is renamed to `<image>`, which so
            has an id without a new embedding; None where a turn can't hold one.

    Raises:
        ValueError: the model has no tokenizer, the placeholder is none of its special tokens, or the template can't
            make the prompts of the training.
    """
    ours = model.tokenizer
    if ours is None:
        raise ValueError("the checkpoint has no tokenizer, which this format needs")
    given = getattr(ours, "hf", ours)
    backend = json.loads(given.backend_tokenizer.to_str())
    if image is not None:
        tokens = {token["id"]: token for token in backend["added_tokens"]}
        if model.placeholder_id not in tokens:
            raise ValueError(f"placeholder_id {model.placeholder_id} is no special token of the checkpoint's tokenizer")
        old, tokens[model.placeholder_id]["content"] = tokens[model.placeholder_id]["content"], IMAGE_TOKEN
        words = backend["model"]["vocab"]  # which of some kinds holds special tokens as well
        if isinstance(words, dict) and old in words:
            words[IMAGE_TOKEN] = words.pop(old)
        elif isinstance(words, list) and model.placeholder_id < len(words):
            words[model.placeholder_id][0] = IMAGE_TOKEN
    begin = {"bos_token": given.bos_token} if ours.begin_ids else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token=TURN_END if given is ours else ours.eos_token,
        pad_token=given.pad_token,
        model_max_length=longest_text(model.language_model.config),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # transformers 4 adds token_type_ids by default
        **begin,
    )
    options = {"begin": begin.get("bos_token", ""), "eos": ours.eos_token or ""}
    tokenizer.chat_template = chat_template(ours.template, None, image, **options)
    check_chat_template(tokenizer, ours)
    tokenizer.chat_template = chat_template(ours.template, system, image, **options)
    return tokenizer


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that a decoder was made for."""
    return getattr(config, "seq_length", None) or getattr(config, "max_position_embeddings", None)


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
    save_torch_state_dict(dict(state), folder, max_shard_size=SHARD, shared_tensors_to_discard=tied)


def write_json(values: dict, file: Path) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
