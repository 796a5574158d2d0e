"""Experiment configuration: dataclass defaults <- YAML file (and the file it extends) <- command line.

    load_config(["--config", "configs/qwen7b_siglip.yaml", "train.max_steps=100", "--lora_lr", "3e-5", "--bf16=false"])

* A YAML file may begin with `base: other.yaml` (relative to its own folder) and then states only what differs.
* On the command line `key=value`, `--key=value` and `--key value` mean the same. A key is a dotted path
  (`model.lora.r`) or any unique end of one (`lora.r`, `max_steps`).
* Unknown keys, ambiguous keys and values of a wrong type raise `ConfigError`.
"""

import dataclasses
import difflib
import inspect
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """The configuration can't be used as written; the message names the key and how to mend it."""


@dataclass
class EncoderConfig:
    kind: Literal["clip", "siglip", "vit", "open_clip", "timm"] | None = None  # null: as the config.json of path says
    path: str = MISSING  # local folder or hub name of the weights; for open_clip and timm the name of the architecture
    pretrained: str | None = None  # open_clip and timm only: weights file or tag
    layer: Literal["last", "penultimate"] = "last"  # whose hidden states become the features
    drop_class_token: bool | None = None  # null: dropped where the architecture has one
    drop_first_patch: bool = False  # only for weights that were trained so: also leaves out the top-left patch
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen encoder


@dataclass
class ProjectorConfig:
    kind: Literal["mlp", "linear"] = "mlp"  # mlp: Linear - GELU - Linear
    position_embedding: bool = False  # add a learned vector per patch before the projection
    pixel_shuffle: int = 1  # r: r x r neighbouring features become one of r * r times the width
    init_std: float = 0.01  # standard deviation of the initial weights


@dataclass
class LoraConfig:
    r: int = 128  # rank
    alpha: float = 32.0  # the update is scaled by alpha / r
    rslora: bool = False  # the update is scaled by alpha / sqrt(r) instead: the same rate suits every rank
    dora: bool = False  # LoRA turns the rows of the weights, and their lengths are learned apart (DoRA)
    dropout: float = 0.1  # on the input of the update, while training
    targets: list[str] = field(default_factory=list)  # names of decoder layers; empty: all linear ones of the blocks


@dataclass
class MediaConfig:
    max_tiles: int = 0  # high resolution: at most so many tiles of an image beside the whole; 0: the whole image alone
    frames: int = 8  # of a clip, at most; evenly over it unless fps is set
    fps: float | None = None  # frames per second of a clip
    max_seconds: float | None = None  # how much of a clip is looked at, from its start; null: all
    frame_pooling: int = 2  # k: the mean of k x k neighbouring features of a frame becomes one


@dataclass
class ModelConfig:
    decoder: str = MISSING  # local folder or hub name of a decoder with its tokenizer: Qwen-1, Llama, Qwen2, GPT-2, ...
    tune: Literal["projector", "lora", "decoder", "all"] = "lora"  # what learns beside the projector (all: encoder too)
    template: str | None = None  # how turns are delimited (dataset/template.py); null: as the decoder was trained
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    media: MediaConfig = field(default_factory=MediaConfig)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of a frozen decoder; what is trained is float32
    quantization: Literal["none", "nf4", "int8"] = "none"  # of the decoder's frozen matrices, by bitsandbytes
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] | None = None  # null: auto
    checkpoint: str | None = None  # folder with trained weights to start from; without an adapter in it, LoRA is fresh


@dataclass
class DataConfig:
    train: list[str] = MISSING  # record files or folders of them (Parquet, JSON, JSONL, CSV)
    validation: list[str] = field(default_factory=list)  # records whose loss is measured while training; may be empty
    image_root: str = "."  # folder that the paths of images and videos in the records are relative to
    weights: dict[str, float] = field(default_factory=dict)  # how often each source is drawn; empty: as the files say
    temperature: float | None = None  # T: sources are drawn in proportion to size ** (1 / T); null: to their size
    epoch: str = "total"  # an epoch is as many samples as there are, or one pass over the source of this name
    batches: Literal["mixed", "by_modality"] = "mixed"  # by_modality: with media alone, or of text alone
    max_length: int | None = None  # tokens of a sample, features included; longer ones are cut; null: 2048 at most
    system: str | None = None  # text of the system turn; null: no system turn
    on_bad_image: Literal["error", "skip"] = "error"  # an unreadable image stops the run, or its record is left out
    on_bad_record: Literal["error", "skip"] = "error"  # likewise one that is not valid or has nothing to learn
    num_workers: int = 0  # processes that load images; does not change the order of the samples
    feature_cache: str | None = None  # folder of cache_features.py: the encoder's features, made once; null: every time


@dataclass
class TrainConfig:
    output_dir: str = MISSING  # where checkpoints, the trained weights and this configuration go
    overwrite: bool = False  # delete what output_dir holds and start over instead of continuing
    seed: int = 42  # of initial weights, dropout and the order of the samples
    num_train_epochs: float = 1.0  # passes over the training records
    max_steps: int = -1  # optimizer steps; positive: overrides num_train_epochs
    per_device_train_batch_size: int = 4  # samples per process and micro-batch
    per_device_eval_batch_size: int = 8  # samples per process when validating
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    packing: bool = False  # the samples of a micro-batch follow each other in one row instead of being padded
    train_sampling_strategy: Literal["group_by_length", "random", "sequential"] = "group_by_length"  # sample order
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # 8bit: its moments in 8 bits, by bitsandbytes
    lora_lr: float = 3e-5  # peak learning rate of the LoRA weights
    projector_lr: float = 1e-4  # peak learning rate of the projector
    decoder_lr: float = 2e-5  # peak learning rate of the decoder, with model.tune=decoder or all
    encoder_lr: float = 2e-6  # peak learning rate of the encoder, with model.tune=all
    lr_scheduler_type: str = "linear"  # any schedule of transformers: linear, cosine, constant_with_warmup, ...
    warmup_steps: float = 0.0  # steps of linear warm-up; below 1: share of all steps
    weight_decay: float = 0.0  # AdamW, on matrices; biases and norms have none
    adam_beta1: float = 0.9  # AdamW, decay of the first moment
    adam_beta2: float = 0.999  # AdamW, decay of the second moment
    adam_epsilon: float = 1e-8  # AdamW, added to the root of the second moment
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0: not clipped
    bf16: bool = False  # bfloat16 autocast, on CPU and GPU
    fp16: bool = False  # float16 autocast with a scaled loss, on a GPU; without one the run is in float32
    compile: bool = False  # compile the decoder's blocks with torch.compile: a minute at the start, then faster steps
    gradient_checkpointing: bool = False  # recompute decoder activations in the backward pass: less memory, more time
    gradient_checkpointing_every: int = 1  # k: only every k-th block of the decoder is recomputed
    logging_steps: int = 10  # optimizer steps between log lines
    eval_steps: int = 500  # optimizer steps between validations
    save_steps: int = 500  # optimizer steps between checkpoints
    save_total_limit: int | None = 2  # newest checkpoints that are kept; null: all
    answers: int = 0  # validation records that the model answers at each validation, into answers.jsonl
    peak_tflops: float | None = None  # TFLOP/s of a device, of which MFU is a share; null: data sheet, or measured
    report_to: list[str] = field(default_factory=list)  # tensorboard, wandb, ...; empty: console only


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# Other names of keys, as scripts of transformers have them. One name may set several keys.
ALIASES = {
    "train_file": ("data.train",),
    "validation_file": ("data.validation",),
    "data_dir": ("data.image_root",),
    "pretrained_text_model": ("model.decoder",),
    "pretrained_vision_model": ("model.encoder.path",),
    "learning_rate": ("train.lora_lr", "train.decoder_lr"),
}

# A resumed run may differ in these: none of them touches the sequence of weights, a feature cache but for rounding.
FREE_KEYS = {
    "data.num_workers", "data.feature_cache", "train.output_dir", "train.overwrite", "train.report_to",
    "train.save_total_limit", "train.answers", "train.peak_tflops",
}  # fmt: skip

# Keys of earlier versions, and what does the same now. None of them touches the sequence of weights.
REMOVED_KEYS = {
    "train.deepspeed": "start the run with `accelerate launch --config_file configs/accelerate/zero2.yaml train.py ...`"
}

AT_LEAST_ONE = [f"train.{name}" for name in (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "gradient_checkpointing_every", "logging_steps", "eval_steps", "save_steps")]


def leaves(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> type of every value of the configuration, in the order in which they are written above."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found.update(leaves(kind, f"{prefix}{name}."))
        else:
            found[prefix + name] = kind
    return found


def load_config(argv: list[str], schema: type = Config) -> Any:
    """Configuration from command-line arguments (see the top of this file), an object of the dataclass `schema`.

    `--help` prints every key with its default and meaning and exits.

    Raises:
        ConfigError: unknown, ambiguous or missing key, wrong type, unreadable YAML file.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(schema))
        sys.exit(0)
    config_file, overrides = parse_arguments(argv, schema)
    merged = OmegaConf.structured(schema)
    for source, values in [*yaml_layers(config_file, schema), *overrides]:
        for key, value in values.items():
            merged = merge_value(merged, key, value, source, schema)
    return finish(merged, schema)


def read_config(path: str | Path) -> Config:
    """Configuration from one YAML file, without a command line (for scripts and notebooks)."""
    return load_config(["--config", str(path)])


def parse_arguments(argv: list[str], schema: type = Config) -> tuple[str | None, list[tuple[str, dict[str, Any]]]]:
    """Splits arguments into the `--config` file and `(source, {dotted path: value})` pairs, in order."""
    config_file, overrides = None, []
    for key, text in split_arguments(argv, schema):
        if key == "config":
            if config_file is not None:
                raise ConfigError("--config is given twice; let one file extend the other with a `base:` line")
            config_file = text
        else:
            paths = resolve_keys(key, schema)
            overrides.append(("command line", {path: parse_text(text, leaves(schema)[path]) for path in paths}))
    return config_file, overrides


def split_arguments(argv: list[str], schema: type = Config) -> list[tuple[str, str]]:
    """Arguments in whichever form as pairs of key (or "config") and text, both as they were typed."""
    pairs, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not equals:
            if not argument.startswith("--"):
                raise ConfigError(f"argument {argument!r} is neither key=value nor --key value")
            is_truth = key != "config" and all(leaves(schema)[path] is bool for path in resolve_keys(key, schema))
            if is_truth and (not rest or rest[0].startswith("--") or "=" in rest[0]):
                text = "true"
            elif rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            else:
                raise ConfigError(f"{argument} needs a value")
        pairs.append((key, text))
    return pairs


def resolve_keys(key: str, schema: type = Config) -> tuple[str, ...]:
    """Dotted paths that a key of the command line stands for: one, or those of an alias, whose group may be named."""
    group, dot, name = key.rpartition(".")
    paths = ALIASES.get(name, ()) if schema is Config else ()
    if paths and all(path.startswith(group + dot) for path in paths):
        return paths
    return (resolve_key(key, "command line", schema),)


def resolve_key(key: str, source: str, schema: type = Config) -> str:
    """Dotted path of the only value whose path is `key` or ends in `.key`."""
    paths = leaves(schema)
    if key in paths:
        return key
    matches = [path for path in paths if path.endswith("." + key)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"{source}: {key!r} is ambiguous: {', '.join(matches)}")
    for removed, instead in REMOVED_KEYS.items():
        if f".{removed}".endswith(f".{key}"):
            raise ConfigError(f"{source}: there is no key {removed} any more; {instead}")
    raise ConfigError(f"{source}: unknown key {key!r}{suggestion(key, paths)}")


def suggestion(key: str, paths: typing.Iterable[str]) -> str:
    """` (did you mean ...?)` with the nearest dotted path, compared by whole path and by last name; or nothing."""
    by_name = {name: path for path in paths for name in (path, path.rpartition(".")[2])}
    wanted = (key, key.rpartition(".")[2])
    nearest = [name for text in wanted for name in difflib.get_close_matches(text, by_name, n=1)]
    return f" (did you mean {by_name[nearest[0]]}?)" if nearest else ""


def parse_text(text: str, kind: Any) -> Any:
    """Command-line text as YAML, except that a value of type `str` is kept to the letter (`no` stays "no")."""
    if type(None) in typing.get_args(kind) and text in ("null", "None"):
        return None
    container = typing.get_origin(kind) in (list, dict)
    if kind is str or str in typing.get_args(kind) and not container or typing.get_origin(kind) is Literal:
        return text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"command line: can't parse {text!r} as a value: {error}") from None


def is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is list


def yaml_layers(path: str | None, schema: type = Config) -> list[tuple[str, dict[str, Any]]]:
    """`(file name, {dotted path: value})` of a YAML file and all that it extends, the most basic first."""
    layers, seen = [], []
    while path is not None:
        file = Path(path).resolve()
        if file in seen:
            raise ConfigError(f"{file}: `base:` lines form a circle: {' -> '.join(f.name for f in [*seen, file])}")
        seen.append(file)
        try:
            content = OmegaConf.to_container(OmegaConf.load(file)) or {}
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such configuration file") from None
        except (OSError, UnicodeDecodeError, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: not a YAML mapping: {error}") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected a mapping of keys to values")
        base = content.pop("base", None)
        layers.append((path, flatten(content, path, schema)))
        path = None if base is None else os.path.join(os.path.dirname(path), base)
    return layers[::-1]


def flatten(content: dict[str, Any], source: str, schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Nested YAML mapping -> {dotted path: value}; refuses what is no key of the configuration."""
    paths, flat = leaves(schema), {}
    for name, value in content.items():
        path = f"{prefix}{name}"
        if path in paths:
            flat[path] = value
        elif any(known.startswith(path + ".") for known in paths):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {path} is a group of keys, not a value; got {value!r}")
            flat.update(flatten(value, source, schema, path + "."))
        elif path in REMOVED_KEYS:
            if value is not None:  # as a saved configuration has it where it was not used
                raise ConfigError(f"{source}: there is no key {path} any more; {REMOVED_KEYS[path]}")
        else:
            raise ConfigError(f"{source}: unknown key {path!r}{suggestion(path, paths)}")
    return flat


def merge_value(config: Any, key: str, value: Any, source: str, schema: type = Config) -> Any:
    """`config` with one value replaced; a single value stands for a list of one."""
    kind = leaves(schema)[key]
    if is_list(kind) and not isinstance(value, list):
        value = [] if value is None else [value]
    try:
        updated = config.copy()
        OmegaConf.update(updated, key, value, merge=False)
        return updated
    except OmegaConfBaseException:
        raise ConfigError(f"{source}: {key} expects {type_text(kind)}, got {value!r}") from None


def type_text(kind: Any) -> str:
    """A type as a reader would say it: `int`, `true or false`, `one of clip, siglip`, `float or null`."""
    if kind is bool:
        return "true or false"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if is_list(kind):
        return f"a list of {type_text(typing.get_args(kind)[0])}"
    options = typing.get_args(kind)
    if typing.get_origin(kind) is dict:
        return f"a mapping of names to values ({type_text(options[1])}) such as {{one: 2, other: 1}}"
    if options:
        return " or ".join("null" if option is type(None) else type_text(option) for option in options)
    return kind.__name__


def finish(merged: Any, schema: type = Config) -> Any:
    """Plain `schema` object; complains about required keys without a value and about numbers out of range."""
    missing = [key for key in leaves(schema) if key in OmegaConf.missing_keys(merged)]
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}; set it in the YAML file or as {missing[0]}=...")
    config = OmegaConf.to_object(merged)
    for key in AT_LEAST_ONE if schema is Config else ():
        if OmegaConf.select(merged, key) < 1:
            raise ConfigError(f"{key} must be at least 1, got {OmegaConf.select(merged, key)}")
    if schema is Config:
        check_values(config)
    return config


def check_values(config: Config) -> None:
    """Raises ConfigError for values that exclude each other or have no meaning."""
    m, d, t = config.model, config.data, config.train
    if m.lora.r < 1:
        raise ConfigError(f"model.lora.r is a rank, at least 1, got {m.lora.r}; model.tune=projector has no adapter")
    if m.tune in ("decoder", "all"):
        frozen = {"model.dtype": m.dtype, "model.encoder.dtype": m.encoder.dtype if m.tune == "all" else "float32"}
        for key, dtype in frozen.items():
            if dtype != "float32":
                raise ConfigError(f"model.tune={m.tune} trains these weights: {key} must be float32, got {dtype}; "
                                  "train.bf16=true computes in bfloat16 nonetheless")  # fmt: skip
        if m.quantization != "none":
            raise ConfigError(f"model.tune={m.tune} trains the decoder, which can't be quantized ({m.quantization})")
    if m.lora.dora and m.tune == "lora" and m.quantization == "int8":
        raise ConfigError("model.lora.dora=true can't be put on int8 matrices: set model.quantization to nf4 or none")
    strategy = t.train_sampling_strategy
    mixes = d.weights or d.temperature is not None or d.epoch != "total" or d.batches != "mixed"
    if strategy == "sequential" and mixes:
        raise ConfigError("train.train_sampling_strategy=sequential keeps the order of the records: leave out "
                          "data.weights, data.temperature, data.epoch and data.batches")  # fmt: skip
    if strategy == "random" and d.batches != "mixed":
        raise ConfigError("data.batches=by_modality needs train.train_sampling_strategy=group_by_length")
    if m.tune == "all" and config.data.feature_cache:
        raise ConfigError("model.tune=all trains the encoder, whose features then change with every step: leave out "
                          "data.feature_cache")  # fmt: skip
    if t.gradient_checkpointing_every > 1 and not t.gradient_checkpointing:
        raise ConfigError("train.gradient_checkpointing_every needs train.gradient_checkpointing=true")
    if t.answers < 0 or t.answers and not d.validation:
        raise ConfigError(f"train.answers is a number of records of data.validation, got {t.answers}"
                          + ("" if d.validation else " and no data.validation"))  # fmt: skip
    if t.peak_tflops is not None and t.peak_tflops <= 0:
        raise ConfigError(f"train.peak_tflops is positive, or null for that of the device, got {t.peak_tflops}")
    for name in ("lora_lr", "projector_lr", "decoder_lr", "encoder_lr"):
        if not getattr(t, name) >= 0:
            raise ConfigError(f"train.{name} is a learning rate, 0 or above, got {getattr(t, name)}")
    if t.bf16 and t.fp16:
        raise ConfigError("train.bf16 and train.fp16 exclude each other")


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved configuration as YAML (temporary file, then rename)."""
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        OmegaConf.save(OmegaConf.structured(config), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def config_differences(config: Config, saved_file: str | Path) -> list[str]:
    """Lines `key: saved -> now` for every value that differs from a saved configuration, `FREE_KEYS` aside.

    A key that a saved configuration lacks, since it is younger, had the effect of its default.
    """
    schema = type(config)
    saved = read_values(saved_file, schema)
    now = flat_values(OmegaConf.structured(config), schema)
    keys = [key for key in {**saved, **now} if key not in FREE_KEYS and key not in REMOVED_KEYS]
    absent = "(absent)"
    return [f"{key}: {saved.get(key, absent)!r} -> {now.get(key, absent)!r}" for key in keys
            if saved.get(key, absent) != now.get(key, absent)]


def read_values(saved_file: str | Path, schema: type = Config) -> dict[str, Any]:
    """{dotted path: plain value} of a saved configuration; what it lacks, since it is younger, has its default."""
    try:
        saved = OmegaConf.load(saved_file)
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{saved_file}: not a YAML mapping: {error}") from None
    return {**flat_values(OmegaConf.structured(schema), schema), **flat_values(saved, schema)}


def flat_values(node: Any, schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """OmegaConf mapping -> {dotted path: plain value}; a value that is itself a mapping stays whole."""
    values = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        group = isinstance(value, dict) and path not in leaves(schema)
        flat.update(flat_values(value, schema, f"{path}.") if group else {path: value})
    return flat


def help_text(schema: type = Config) -> str:
    """Every key with its default and the comment that stands behind it in the dataclass."""
    defaults, lines = flat_values(OmegaConf.structured(schema), schema), [__doc__.strip(), ""]
    for key, comment in comments(schema).items():
        default = "(required)" if defaults[key] == MISSING else "null" if defaults[key] is None else defaults[key]
        lines.append(f"{key} = {default}\n    {comment}")
    if schema is Config:
        lines += ["", "Other names, on the command line:"]
        lines += [f"--{name}: {' and '.join(keys)}" for name, keys in ALIASES.items()]
    return "\n".join(lines)


def comments(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Dotted path -> trailing comment of its line in the source, inherited lines first."""
    found: dict[str, str] = {}
    types = typing.get_type_hints(cls)
    sources = [inspect.getsource(kind) for kind in reversed(cls.__mro__) if dataclasses.is_dataclass(kind)]
    for line in "\n".join(sources).splitlines():
        match = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
        if match and dataclasses.is_dataclass(types[match[1]]):
            found.update(comments(types[match[1]], f"{prefix}{match[1]}."))
        elif match:
            found[prefix + match[1]] = match[2] or ""
    return found
