import json

import pytest

from dataprocess.config import ConfigError, load_config


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a YAML file; the folder it lies in, the working directory, has some annotation files and images/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name in ("a.json", "b.json", "c.json", "map.json"):
        (tmp_path / name).write_text(json.dumps([]))

    def run(text: str) -> str:
        (tmp_path / "c.yaml").write_text(text)
        return "c.yaml"

    return run


SOURCES = """
sources:
  - {format: llava, annotations: a.json, images: images}
  - {format: coco, annotations: b.json, images: images, name: mine, captions: one}
"""


def test_sources_and_defaults(write):
    config = load_config(write(SOURCES))
    assert [(s.name, s.format, s.captions) for s in config.sources] == [("a", "llava", "all"), ("mine", "coco", "one")]
    assert (config.output, config.image_root, config.seed) == ("data/records", None, 0)


@pytest.mark.parametrize("format", ["table", "messages", "alpaca", "baize", "dolly"])
def test_formats_that_need_no_images(write, format):
    config = load_config(write(f"sources: [{{format: {format}, annotations: a.json}}]"))
    assert config.sources[0].images is None


def test_all_keys(write):
    text = """
output: out
workers: 3
on_error: skip
engine: ray
shard_mb: 500
model: a.json
sources:
  - {format: a_okvqa, annotations: a.json, images: images, samples: 7, weight: 0.5, language: zh, splits: [train, val],
     choices: true, captions: one, prompts: ["{question} <image>"]}
  - {format: dolly, annotations: b.json, weight: 2}
"""
    config = load_config(write(text))
    assert (config.workers, config.on_error, config.engine, config.shard_mb) == (3, "skip", "ray", 500)
    source = config.sources[0]
    assert (source.samples, source.weight, source.language, source.splits) == (7, 0.5, "zh", ["train", "val"])
    assert (source.choices, source.captions, source.prompts) == (True, "one", ["{question} <image>"])
    defaults = load_config(write(SOURCES))
    assert (defaults.workers, defaults.on_error, defaults.engine, defaults.shard_mb) == (None, "stop", "local", None)


def test_overrides(write):
    config = load_config(
        write(SOURCES), ["seed=7", "validation=0.5", "sources.1.captions=all", "image_root=null", "output=x=y"]
    )
    assert (config.seed, config.validation, config.image_root, config.output) == (7, 0.5, None, "x=y")
    assert config.sources[1].captions == "all" and config.sources[1].name == "mine"


OLD = """
ali_image_path: images
ali_image_path_label_file: a.json
coco_image_path: images
coco_image_path_label_file1: b.json
coco_image_path_label_file2: c.json
output_image_map: map.json
output_captions: captions.json
"""


def test_old_keys_are_sources(write):
    config = load_config(write(OLD))
    assert [(s.format, s.annotations, s.images) for s in config.sources] == [
        ("ai_challenger", "a.json", "images"), ("llava", "b.json", "images"), ("llava", "c.json", "images"),
    ]  # fmt: skip


def test_old_keys_beside_new_ones(write):
    text = SOURCES + "coco_image_path: images\ncoco_image_path_label_file2: c.json\nali_image_path_label_file: ''\n"
    assert [source.name for source in load_config(write(text)).sources] == ["a", "mine", "c"]


def test_old_outputs_are_a_source_where_there_is_no_other(write):
    config = load_config(write("output_image_map: map.json\noutput_captions: a.json\n"))
    assert [(s.format, s.annotations, s.image_map) for s in config.sources] == [("image_map", "a.json", "map.json")]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (SOURCES, ["wokers=2"], "unknown key 'wokers' .did you mean 'workers'"),
        (SOURCES + "ali_image_pth: x\n", [], "did you mean 'ali_image_path'"),
        (SOURCES, ["sources.0.image=images"], r"sources.0 \(llava\) has an unknown key 'image' .did you mean 'images'"),
        (SOURCES, ["sources.0.captions=one"], r"sources.0 \(llava\) has an unknown key 'captions'"),
        (SOURCES, ["sources.0.format=lava"], "unknown format 'lava' .did you mean 'llava'"),
        (SOURCES, ["sources.0.format=null"], "unknown format None; known are"),
        (SOURCES, ["sources.0.images=null"], r"sources.0 \(llava\): images is missing"),
        (SOURCES, ["sources.0.format=table", "sources.0.annotations=null"], r"\(table\): annotations is missing"),
        (SOURCES, ["sources.0.images=nowhere"], "sources.0: images: there is no folder nowhere"),
        (SOURCES, ["sources.1.annotations=no.json"], "sources.1: annotations: there is no file no.json"),
        (SOURCES, ["sources.1.captions=some"], "captions must be all or one, got 'some'"),
        (SOURCES, ["sources.1.prompts=[hello]"], "each prompt holds <image> once, got 'hello'"),
        (SOURCES, ["sources.1.name=a"], "two sources are called 'a'"),
        (SOURCES, ["seed=many"], "seed: .*many"),
        (SOURCES, ["validation=1"], "validation: expected a share"),
        (SOURCES, ["workers=0"], "workers: expected at least 1"),
        (SOURCES, ["shard_mb=0"], "shard_mb: expected at least 1, or null, got 0"),
        (SOURCES, ["on_error=ignore"], "on_error: expected stop or skip, got 'ignore'"),
        (SOURCES, ["engine=spark"], "engine: expected local or ray, got 'spark'"),
        (SOURCES, ["model=absent.yaml"], "model: there is no file absent.yaml"),
        (SOURCES, ["output=''"], "output: expected a folder"),
        (SOURCES, ["output=${nowhere}"], "nowhere"),
        (SOURCES, ["sources.0.samples=0"], "sources.0: samples: expected at least 1, or null for all rows, got 0"),
        (SOURCES, ["sources.0.samples=few"], "sources.0: samples: .*few"),
        (SOURCES, ["sources.0.weight=0"], "sources.0: weight: expected a number above 0, or null, got 0.0"),
        (SOURCES, ["sources.0.weight=.inf"], "sources.0: weight: expected a number above 0, or null, got inf"),
        (SOURCES, ["sources.0.weight=1"], "weight: some sources have one and some have none; give one to every"),
        (SOURCES, ["sources.1.language=de"], "sources.1: language: expected en or zh, got 'de'"),
        (SOURCES, ["sources.0.language=zh"], r"sources.0 \(llava\) has an unknown key 'language'"),
        (SOURCES, ["sources.1.splits=[train]"], r"sources.1 \(coco\) has an unknown key 'splits'"),
        (SOURCES, ["sources.0.choices=true"], r"sources.0 \(llava\) has an unknown key 'choices'"),
        (SOURCES, ["sources.0.annotations=[a.json]"], "sources.0: annotations: "),
        (SOURCES, ["sources.0.format=[llava]"], r"unknown format \['llava'\]"),
        (SOURCES, ["sources.0.format=alpaca"], r"sources.0 \(alpaca\) has an unknown key 'images'"),
        (SOURCES, ["sources.0.format=ocr_vqa", "sources.0.prompts=[<image>]"], "each prompt holds {question} once"),
        (SOURCES, ["sources.1.format=image_map", "sources.1.name=m"], r"\(image_map\): image_map is missing"),
        (SOURCES, ["--seed"], "'--seed': expected key=value"),
        ("seed: 1", [], "list at least one source"),
        ("sources: {format: llava}", [], "sources: expected a list"),
        ("- 1", [], "expected a mapping"),
        ("a: [", [], "c.yaml: not YAML"),
        ("ali_image_path_label_file: a.json", [], "ali_image_path_label_file needs ali_image_path"),
        ("coco_image_path: images", [], "coco_image_path needs coco_image_path_label_file1 or"),
        ("output_captions: a.json", [], "one of them is missing"),
    ],
)
def test_mistakes_are_named(write, text, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text), overrides)


def test_missing_file():
    with pytest.raises(ConfigError, match="absent.yaml: no such"):
        load_config("absent.yaml")
