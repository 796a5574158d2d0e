"""Configuration of `process_image.py`: a YAML file and `key=value` overrides -> a checked `Config`.

    output: data/records       folder for train.parquet, validation.parquet and report.json
    image_root: data           paths of images and videos are written relative to it; null: what their folders share
    validation: 0.02           share of images and videos that goes to validation.parquet with their records; 0: none
    seed: 0                    decides which those are, and with `captions: one` which caption is kept
    workers: 4                 threads that decode images and videos; changes no result
    sources:
      - format: llava          see `dataprocess.readers.FORMATS`
        annotations: detail_23k.json
        images: train2017      folder that the file's names of images and videos are relative to
        name: detail           first part of the ids of its records; default: stem of the annotation file

Options of single formats: `captions` (all: a record per caption; one: one caption per image), `prompts` (questions
that take turns), `splits` (parts of the file to read), `image_map`. A `table` of texts alone needs no `images`. Paths
are relative to the working directory.

Configurations that name their downloads by the keys in `OLD_KEYS` instead of a list of sources work too.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dataprocess.readers import FORMATS, Source
from dataset.record import IMAGE_PLACEHOLDER, nearest

OLD_KEYS = (
    "ali_image_path",  # AI Challenger: folder of the images
    "ali_image_path_label_file",  # and the file of captions
    "coco_image_path",  # COCO train2017: folder of the images
    "coco_image_path_label_file1",  # and LLaVA files on it: complex reasoning,
    "coco_image_path_label_file2",  # detailed descriptions
    "output_image_map",  # image_map.json and captions.json made from these: read only if none of the above is set,
    "output_captions",  # since they hold the same records once more
)


class ConfigError(ValueError):
    """The configuration can't be used as written; the message names the key and how to mend it."""


@dataclass
class Config:
    output: str = "data/records"
    image_root: str | None = None
    validation: float = 0.02
    seed: int = 0
    workers: int = 4
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
            raise ConfigError(f"argument {override!r}: {error}") from None
    values = OmegaConf.to_container(loaded, resolve=True)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return check_config(values)


def check_config(values: dict[str, Any]) -> Config:
    """Plain values -> `Config` with complete sources. Raises `ConfigError` as `load_config` does."""
    values = dict(values)
    check_keys(values, [*Config.__dataclass_fields__, *OLD_KEYS], "the configuration")
    old = {key: values.pop(key, None) for key in OLD_KEYS}
    sources = values.get("sources") or []
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise ConfigError(f"sources: expected a list of mappings, got {sources!r:.80}")
    values["sources"] = [*sources, *old_sources(old)]
    for number, source in enumerate(values["sources"]):
        check_source(source, f"sources.{number}")
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    if not 0 <= config.validation < 1:
        raise ConfigError(f"validation: expected a share of at least 0 and below 1, got {config.validation}")
    if config.workers < 1:
        raise ConfigError(f"workers: expected at least 1, got {config.workers}")
    if not config.sources:
        raise ConfigError("sources: nothing to read; list at least one source")
    names = set()
    for source in config.sources:
        source.name = source.name or Path(source.annotations).stem
        if source.name in names:
            raise ConfigError(f"two sources are called {source.name!r}; give one of them another `name`")
        names.add(source.name)
    return config


def check_keys(values: dict[str, Any], known: list[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where} has an unknown key {key!r}{nearest(key, known)}")


def check_source(values: dict[str, Any], where: str) -> None:
    """Refuses a source whose keys or values its format has no use for."""
    if values.get("format") not in FORMATS:
        raise ConfigError(f"{where}: unknown format {values.get('format')!r}{nearest(values.get('format'), FORMATS)}")
    options = FORMATS[values["format"]].options
    check_keys(values, ["format", "annotations", "images", "name", *options], f"{where} ({values['format']})")
    second = {"image_map": ["image_map"], "table": []}.get(values["format"], ["images"])
    for key in ("annotations", *second):
        if not values.get(key):
            raise ConfigError(f"{where} ({values['format']}): {key} is missing")
    if values.get("captions", "all") not in ("all", "one"):
        raise ConfigError(f"{where}: captions must be all or one, got {values['captions']!r}")
    for prompt in values.get("prompts") or []:
        if str(prompt).count(IMAGE_PLACEHOLDER) != 1:
            raise ConfigError(f"{where}: each prompt holds {IMAGE_PLACEHOLDER} once, got {prompt!r}")
    for key, exists, what in (
        ("annotations", os.path.isfile, "file"),
        ("image_map", os.path.isfile, "file"),
        ("images", os.path.isdir, "folder"),
    ):
        if values.get(key) and not exists(values[key]):
            raise ConfigError(f"{where}: {key}: there is no {what} {values[key]}")


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
