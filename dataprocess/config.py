"""Configuration of `process_image.py`: a YAML file and `key=value` overrides -> a checked `Config`.

    output: data/records       folder for train.parquet, validation.parquet and report.json
    image_root: data           paths of images and videos are written relative to it; null: what their folders share
    validation: 0.02           share of images and videos that goes to validation.parquet with their records; 0: none
    seed: 0                    decides which those are, which rows `samples` takes and which answer `captions: one`
    workers: null              processes that decode images and videos; null: all cores; changes no result
    on_error: stop             at the first record that can't be used; skip: leave such records out, list and count them
    engine: local              or ray: the same work on a Ray cluster (requirements-ray.txt)
    shard_mb: null             about so many MB of images and videos to a tar file beside the records; null: no copies
    model: null                training configuration (configs/x.yaml) with whose tokenizer `--preview` shows the data
    sources:
      - format: llava          see `dataprocess.sources.FORMATS`
        annotations: detail_23k.json
        images: train2017      folder that the file's names of images and videos are relative to
        name: detail           first part of the ids of its records; default: stem of the annotation file
        samples: 10000         so many of its rows, drawn by seed; null: all
        weight: 0.5            its share of the samples in training, against the weights of the others; null: its size

Options of single formats:

    follow_links: true         names may be links that lead out of `images`, as in folders of linked folders
    captions: all              a record for each answer to the same question; one: a single one, drawn by seed
    prompts: ["<image>\\n..."] questions that take turns, with {question} in them where the file has the questions
    language: zh               of the prompts in dataprocess/prompts/, where the source has none of its own
    splits: [train, val]       parts of the file to read; null: those for training
    choices: true              a_okvqa: the options stand in the question
    image_map: image_map.json  image_map: its second file

Paths are relative to the working directory. Configurations that name their downloads by the keys in `OLD_KEYS` instead
of a list of sources work too.
"""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dataprocess.sources import FORMATS, Source
from dataprocess.sources.source import LANGUAGES
from dataset.rows import IMAGE_PLACEHOLDER, nearest

OLD_KEYS = (
    "ali_image_path",  # AI Challenger: folder of the images
    "ali_image_path_label_file",  # and the file of captions
    "coco_image_path",  # COCO train2017: folder of the images
    "coco_image_path_label_file1",  # and LLaVA files on it: complex reasoning,
    "coco_image_path_label_file2",  # detailed descriptions
    "output_image_map",  # image_map.json and captions.json made from these: read only if none of the above is set,
    "output_captions",  # since they hold the same records once more
)
# Keys that a source of any format may have.
COMMON_OPTIONS = ("format", "annotations", "name", "samples", "weight")


class ConfigError(ValueError):
    """The configuration can't be used as written; the message names the key and how to mend it."""


@dataclass
class Config:
    output: str = "data/records"
    image_root: str | None = None
    validation: float = 0.02
    seed: int = 0
    workers: int | None = None
    on_error: str = "stop"
    engine: str = "local"
    shard_mb: int | None = None
    model: str | None = None
    sources: list[Source] = field(default_factory=list)


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Configuration of a YAML file with `key=value` replacements such as `seed=1` or `sources.0.images=/data/coco`.

    Raises:
        ConfigError: no such file, unknown key (the nearest known one is named), wrong type, an impossible value,
            no source at all.
    """
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except Exception as error:  # the YAML library has several bases of its own for what it can't parse
        raise ConfigError(f"{path}: not YAML: {error}") from None
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"argument {override!r}: expected key=value")
        try:
            value = OmegaConf.from_dotlist([f"value={override[len(key) + 1 :]}"]).value
            OmegaConf.update(loaded, key, value, merge=False)
        except Exception as error:  # same, and whatever a path through the wrong kind of node leads to
            raise ConfigError(f"argument {override!r}: {str(error).splitlines()[0]}") from None
    try:
        values = OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        raise ConfigError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return check_config(values)


def check_config(values: dict[str, Any]) -> Config:
    """Plain values -> `Config` with complete sources. Raises `ConfigError` as `load_config` does."""
    values = dict(values)
    check_keys(values, [*Config.__dataclass_fields__, *OLD_KEYS], "the configuration")
    old = {key: values.pop(key, None) for key in OLD_KEYS}
    sources = values.pop("sources", None) or []
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise ConfigError(f"sources: expected a list of mappings, got {sources!r:.80}")
    config = typed(Config, values, "")
    check_values(config)
    for number, source in enumerate([*sources, *old_sources(old)]):
        check_source(source, f"sources.{number}")
        config.sources.append(typed(Source, source, f"sources.{number}: "))
        check_source_values(config.sources[-1], f"sources.{number}")
    if not config.sources:
        raise ConfigError("sources: nothing to read; list at least one source")
    weighted = {source.weight is not None for source in config.sources}
    if len(weighted) == 2:
        raise ConfigError("weight: some sources have one and some have none; give one to every source or to none")
    names = set()
    for source in config.sources:
        source.name = source.name or Path(source.annotations).stem
        if source.name in names:
            raise ConfigError(f"two sources are called {source.name!r}; give one of them another `name`")
        names.add(source.name)
    return config


def typed(kind: type, values: dict[str, Any], where: str) -> Any:
    """`kind(**values)` with values of its types, converted where YAML gives another (a number for a text)."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}{error.full_key}: {str(error).splitlines()[0]}") from None


def check_values(config: Config) -> None:
    """Refuses values that are of the right type and yet impossible."""
    if not 0 <= config.validation < 1:
        raise ConfigError(f"validation: expected a share of at least 0 and below 1, got {config.validation}")
    if not config.output:
        raise ConfigError("output: expected a folder, got ''")
    for key in ("workers", "shard_mb"):
        value = getattr(config, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key}: expected at least 1, or null, got {value}")
    for key, known in (("on_error", ("stop", "skip")), ("engine", ("local", "ray"))):
        if getattr(config, key) not in known:
            raise ConfigError(f"{key}: expected {' or '.join(known)}, got {getattr(config, key)!r}")
    if config.model and not os.path.isfile(config.model):
        raise ConfigError(f"model: there is no file {config.model}; name a configuration such as configs/scenes.yaml")


def check_keys(values: dict[str, Any], known: list[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has an unknown key {key!r}{nearest(key, known)}")


def check_source(values: dict[str, Any], where: str) -> None:
    """Refuses a source with a key that its format has no use for, or without one that it needs."""
    name = values.get("format")
    if not isinstance(name, str) or name not in FORMATS:
        raise ConfigError(f"{where}: unknown format {name!r}{nearest(name, FORMATS)}")
    form = FORMATS[name]
    check_keys(values, [*COMMON_OPTIONS, *form.options], f"{where} ({name})")
    for key in ("annotations", *(["images"] if form.images else []), *(["image_map"] if name == "image_map" else [])):
        if not values.get(key):
            raise ConfigError(f"{where} ({name}): {key} is missing")


def check_source_values(source: Source, where: str) -> None:
    """Refuses files that are not there, and values that are of the right type and yet impossible."""
    if source.captions not in ("all", "one"):
        raise ConfigError(f"{where}: captions must be all or one, got {source.captions!r}")
    if source.samples is not None and source.samples < 1:
        raise ConfigError(f"{where}: samples: expected at least 1, or null for all rows, got {source.samples}")
    if source.weight is not None and not 0 < source.weight < math.inf:
        raise ConfigError(f"{where}: weight: expected a number above 0, or null, got {source.weight}")
    if source.language not in (None, *LANGUAGES):
        raise ConfigError(f"{where}: language: expected {' or '.join(LANGUAGES)}, got {source.language!r}")
    asked = FORMATS[source.format].prompts == "question"
    for prompt in source.prompts or []:
        for part, count in ((IMAGE_PLACEHOLDER, 1), ("{question}", int(asked))):
            if prompt.count(part) != count:
                often = "once" if count else f"nowhere, since files of format {source.format} have no questions"
                raise ConfigError(f"{where}: each prompt holds {part} {often}, got {prompt!r}")
    for key, exists, what in (
        ("annotations", os.path.isfile, "file"),
        ("image_map", os.path.isfile, "file"),
        ("images", os.path.isdir, "folder"),
    ):
        path = getattr(source, key)
        if path and not exists(path):
            raise ConfigError(f"{where}: {key}: there is no {what} {path}")


def old_sources(old: dict[str, str | None]) -> list[dict[str, str]]:
    """Sources that the values of `OLD_KEYS` stand for. Empty values count as absent."""
    sources = []
    for format, images, *label_files in (
        ("ai_challenger", "ali_image_path", "ali_image_path_label_file"),
        ("llava", "coco_image_path", "coco_image_path_label_file1", "coco_image_path_label_file2"),
    ):
        given = [key for key in label_files if old[key]]
        if given and not old[images]:
            raise ConfigError(f"{given[0]} needs {images}, the folder of its images")
        if old[images] and not given:
            raise ConfigError(f"{images} needs {' or '.join(label_files)}, the file with the texts on its images")
        sources += [{"format": format, "annotations": old[key], "images": old[images]} for key in given]
    if sources or not (old["output_image_map"] or old["output_captions"]):
        return sources
    if not (old["output_image_map"] and old["output_captions"]):
        raise ConfigError("output_image_map and output_captions are read together; one of them is missing")
    return [{"format": "image_map", "annotations": old["output_captions"], "image_map": old["output_image_map"]}]
