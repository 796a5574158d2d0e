"""preview.py: the page as a browser parses it, the figures beside it, and the exit status."""

import html.parser
import json
import re
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import preview
from config import ConfigError, load_config
from dataprocess import moving
from dataset.record import write_records
from dataset.template import IGNORE_INDEX, TEMPLATES
from tests.model.families import make_decoder

SCRIPT = "<script>alert('x')</script><img src=http://evil/x.png onerror=alert(1)>"


class Page(html.parser.HTMLParser):
    """Elements of a page: tags, attributes, and for each `<article>` its tokens and its text."""

    VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.articles, self._open = [], [], [], []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in self.VOID and not (self._open and self._open[-1] == "svg" and tag in ("line", "text")):
            self._open.append(tag)
        if tag == "article":
            self.articles.append({"tokens": [], "text": "", "images": []})
        if self.articles and "title" in dict(attributes) and tag in "bi":
            self.articles[-1]["tokens"].append((int(dict(attributes)["title"]), tag == "b", dict(attributes)))
        if self.articles and tag == "img":
            self.articles[-1]["images"].append(dict(attributes))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        if self._open[-1] != tag and self._open[-1] in ("p", "li"):  # may be left open
            self._open.pop()
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        self.text += data
        if self.articles:
            self.articles[-1]["text"] += data


def turns(*contents: str, system: str | None = None) -> list[dict]:
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def records() -> list[dict]:
    """Hostile, long, faulty and foreign ones, from three sources."""
    made = [
        {"id": "two", "source": "a", "images": ["red.png", "wide.png"],
         "messages": turns("<image> left, <image> right?", "Red, then wide.")},
        {"id": "clip", "source": "a", "videos": ["clip.mp4"], "messages": turns("<video>\nWhat moves?", "It does.")},
        {"id": "text", "source": "a", "messages": turns("Hi", "Ho", "And?", "So.", system="Be brief.")},
        {"id": "中文", "source": "中文来源", "images": ["red.png"],
         "messages": turns("这幅图像描述了什么？<image>", "红色的方块，没有别的。龘")},
        {"id": "long", "source": "a", "messages": turns("Tell me", "word " * 400)},
        {"id": "longest", "source": "a", "messages": turns("Tell me", "word " * 420)},
        {"id": f"evil {SCRIPT}", "source": f"b {SCRIPT}", "meta": {SCRIPT: SCRIPT},
         "messages": turns(f"{SCRIPT} \u202e <|im_start|>", f"</div></article>{SCRIPT} <|im_end|> {{{{ 7 * 7 }}}}")},
        {"id": "gone", "source": f"b {SCRIPT}", "images": ["<gone>.png"], "messages": turns("<image>", "x")},
        {"id": "plain", "source": "a", "messages": [{"role": "text", "content": "All of this is learned."}]},
    ]  # fmt: skip
    return [{"images": [], "videos": [], "audios": [], "meta": {}, **one} for one in made]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """Records and their media."""
    folder = tmp_path_factory.mktemp("preview")
    Image.new("RGB", (20, 20), (220, 30, 30)).save(folder / "red.png")
    Image.new("RGB", (900, 300), (30, 30, 220)).save(folder / "wide.png")
    frames = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in range(0, 240, 30)]
    moving.write_clip(frames, 4, folder / "clip.mp4")
    write_records(records(), folder / "train.parquet")
    return folder


def arguments(tiny, folder: Path, output: Path, *extra: str) -> list[str]:
    data = [f"data.train={folder}/train.parquet", f"image_root={folder}", "max_tiles=4", "frames=3", "frame_pooling=1",
            "max_length=400"]  # fmt: skip
    return [*tiny.arguments(output.parent / "out", *data), "--output", str(output), *extra]


def run(monkeypatch, argv: list[str]) -> int | str | None:
    """Exit status of `python preview.py ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["preview.py", *argv])
    with pytest.raises(SystemExit) as end:
        preview.main()
    return end.value.code


@pytest.fixture(scope="module")
def shown(tiny, folder, tmp_path_factory) -> tuple[Page, dict, str]:
    """(page, figures, what the terminal shows) of all these records."""
    output = tmp_path_factory.mktemp("page") / "look.html"
    options, rest = preview.parse_options(arguments(tiny, folder, output))
    report = preview.write(preview.open_data(load_config(rest)), options.output, options.preview, seed=0)
    assert json.loads(output.with_suffix(".json").read_text(encoding="utf-8")) == report
    return Page(output), report, preview.text_of(report)


def test_the_page_stands_alone_and_runs_nothing(shown):
    page, _, terminal = shown
    assert not {"script", "iframe", "object", "embed", "form", "link", "base", "a"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "srcset", "style", "action"):
            assert tag == "img" and re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", value)
    policy = next(value for tag, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy and "script" not in policy
    assert SCRIPT in page.text and "{{ 7 * 7 }}" in page.text
    assert "\u202e" not in page.text and "\\u202e" in page.text
    assert all(letter.isprintable() or letter == "\n" for letter in terminal)


def article(page: Page, name: str) -> dict:
    (found,) = [one for one in page.articles if one["text"].strip().startswith(name)]
    return found


def test_every_source_and_the_extremes_are_there(shown):
    page, report, terminal = shown
    assert list(report["sources"]) == ["a", "中文来源", f"b {SCRIPT}"]
    assert "the longest" in article(page, "longest")["text"]
    assert "cut" in article(page, "long\n")["text"] and "supervised ones lost" in article(page, "long\n")["text"]
    assert "refused" in article(page, "gone")["text"] and "no image file" in article(page, "gone")["text"]
    assert report["refused"] == [{"id": "gone", "source": f"b {SCRIPT}", "record": 7, "reason": "missing file",
                                  "problem": report["refused"][0]["problem"]}]  # fmt: skip
    assert "'gone'" in report["refused"][0]["problem"] and "<gone>.png" in report["refused"][0]["problem"]
    assert report["total"]["cut"] == 2 and report["total"]["control_texts"] == 1
    for text in ("Training would stop: 1 record is refused", "中文来源", "packing", "max_length=400"):
        assert text in terminal and text in page.text
    assert page.tags.count("svg") == 3


def test_tokens_are_those_of_the_samples(shown, tiny, folder, tmp_path):
    page, _, _ = shown
    data = preview.open_data(load_config(preview.parse_options(arguments(tiny, folder, tmp_path / "x.html"))[1]))
    assert data.dataset.max_length == 400
    for index, record in enumerate(records()):
        if record["id"] in ("gone", "long", "longest"):
            continue
        sample = data.dataset[index]
        pairs = list(zip(sample["input_ids"], sample["labels"], strict=True))
        expected = [(id, label != IGNORE_INDEX) for id, label in pairs if id != data.dataset.tokenizer.placeholder_id]
        name = record["id"] if "evil" not in record["id"] else "evil"
        assert [token[:2] for token in article(page, name)["tokens"]] == expected
    text = article(page, "two")["text"]
    assert "image 1: <image> x 20" in text and "image 2: <image> x 16" in text
    assert "4 views (the whole and 3 tiles): 4 x 4 features" in text
    assert "900 x 300 pixels, here 320 x 107" in text
    assert [image["alt"] for image in article(page, "two")["images"]] == ["image 1", "image 2"]
    clip = article(page, "clip")
    assert "video 1: <video> x 12" in clip["text"] and len(clip["images"]) == 3
    assert "红1/3" in article(page, "中文")["text"] and "红3/3" in article(page, "中文")["text"]
    control = [attributes for _, _, attributes in article(page, "evil")["tokens"] if attributes.get("class") == "c"]
    assert len(control) == 4  # of the template, none of the text


def test_exit_status_and_decoding(tiny, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "p.html"
    assert run(monkeypatch, arguments(tiny, folder, output, "--preview", "1")) == 1
    assert "Refused (1):" in capsys.readouterr().out
    assert len(Page(output).articles) >= 3  # one of each source, and the extremes
    assert run(monkeypatch, arguments(tiny, folder, output, "on_bad_image=skip")) == 0
    assert "Left out (1):" in capsys.readouterr().out
    report = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert report["refused"] == [] and [fault["id"] for fault in report["skipped"]] == ["gone"]
    whole = (folder / "wide.png").read_bytes()
    Image.new("RGB", (9, 9)).save(tmp_path / "red.png")
    (tmp_path / "wide.png").write_bytes(whole[: len(whole) // 2])
    write_records(records()[:1], tmp_path / "train.parquet")
    assert run(monkeypatch, arguments(tiny, tmp_path, output)) == 0
    assert run(monkeypatch, arguments(tiny, tmp_path, output, "--decode")) == 1
    assert "wide.png" in capsys.readouterr().out


def test_a_sample_of_the_records(tiny, tmp_path, monkeypatch, capsys):
    output = tmp_path / "p.html"
    argv = [*tiny.arguments(tmp_path / "out"), "--output", str(output), "--records", "10"]
    assert run(monkeypatch, argv) == 0
    first = capsys.readouterr().out
    assert "10 of 24 records were measured, drawn by seed 42: figures are estimates" in first
    pages = [output.read_bytes()]
    assert run(monkeypatch, argv) == 0 and run(monkeypatch, [*argv, "train.seed=1"]) == 0
    assert run(monkeypatch, argv) == 0
    pages.append(output.read_bytes())
    assert pages[0] == pages[1]
    assert [path.name for path in tmp_path.iterdir()] in (["p.html", "p.json"], ["p.json", "p.html"])


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template(tiny, folder, tmp_path, template):
    decoder = make_decoder("llama", tmp_path / "decoder", *TEMPLATES[template].control)
    argv = arguments(tiny, folder, tmp_path / "p.html", f"model.decoder={decoder}", "lora.targets=[q_proj]",
                     "max_length=128", f"template={template}")  # fmt: skip
    options, rest = preview.parse_options(argv)
    report = preview.write(preview.open_data(load_config(rest)), options.output, 12, seed=0)
    page = Page(tmp_path / "p.html")
    tokens = article(page, "text")["tokens"]
    # Two answers and what ends each, which is supervised.
    assert sum(supervised for _, supervised, _ in tokens) == len("HoSo.") + 2
    assert len(report["sources"]) == 3 and f"template {template}" in page.text


def test_page_of_a_record_file_without_a_model(folder, tmp_path, capsys):
    written = preview.write_page(folder / "train.parquet", folder, tmp_path / "p.html", count=9, model=None, seed=0)
    assert written == tmp_path / "p.html"
    page, report = Page(written), json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert "no tokens are shown" in page.text and "model: configs/x.yaml" in page.text
    assert report["unit"] == "character" and report["padding"] is None and report["max_length"] is None
    assert report["sources"]["中文来源"]["length"]["max"] == len("这幅图像描述了什么？红色的方块，没有别的。龘")
    assert all(not one["tokens"] for one in page.articles) and len(page.articles) == 9
    assert len(article(page, "two")["images"]) == 2 and "no image file" in article(page, "gone")["text"]
    assert "characters" in capsys.readouterr().out


def test_page_of_a_record_file_with_a_model(tiny, folder, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(f"base: {tiny.folder}/tiny.yaml\ntrain: {{output_dir: {tmp_path}/out}}\n")
    preview.write_page(folder / "train.parquet", folder, tmp_path / "p.html", count=9, model=str(config), seed=0)
    report = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert report["unit"] == "token" and report["max_length"] == 200
    assert article(Page(tmp_path / "p.html"), "text")["tokens"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["model.decoder=/nowhere/qwen"], "model.decoder: there is no /nowhere/qwen/config.json"),
        (["encoder.path=/nowhere/clip"], "model.encoder.path: there is no /nowhere/clip/config.json"),
        (["data.train=/nowhere/train.parquet"], "/nowhere/train.parquet"),
        (["--preview", "0"], "--preview is a number of records, at least 1"),
        (["--records", "many"], "invalid int value"),
        (["--output", "page.txt"], "name of an HTML file"),
        (["--output", "/nowhere/page.html"], "no folder /nowhere"),
        (["max_lenght=3"], "unknown key 'max_lenght'"),
    ],
)
def test_bad_input_is_one_clear_line(tiny, folder, tmp_path, monkeypatch, extra, message):
    status = run(monkeypatch, [*arguments(tiny, folder, tmp_path / "p.html"), *extra])
    assert status.startswith("preview.py: ") and message in status and "\n" not in status
    assert not any(path.suffix in (".html", ".json") for path in tmp_path.iterdir())


def test_a_decoder_without_tokenizer(tiny, folder, tmp_path):
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder" / "config.json").write_bytes((tiny.folder / "decoder" / "config.json").read_bytes())
    argv = arguments(tiny, folder, tmp_path / "p.html", f"model.decoder={tmp_path}/decoder")
    with pytest.raises(ConfigError, match=f"model.decoder={tmp_path}/decoder: .*tokenizer.json"):
        preview.open_data(load_config(preview.parse_options(argv)[1]))


def test_media_in_shards_are_shown(tiny, folder, tmp_path):
    with tarfile.open(tmp_path / "train-00000.tar", "w") as shard:
        shard.add(folder / "wide.png", "one.png")
        shard.add(folder / "clip.mp4", "two.mp4")
    with tarfile.open(tmp_path / "train-00000.tar") as shard:
        places = [f"train-00000.tar#{member.offset_data}+{member.size}" for member in shard]
    write_records([
        {"id": "there", "source": "s", "images": places[:1], "videos": places[1:],
         "messages": turns("<image><video>", "x")},
        {"id": "gone", "source": "s", "images": ["absent.tar#512+9"], "messages": turns("<image>", "x")},
    ], tmp_path / "train.parquet")  # fmt: skip
    options, rest = preview.parse_options(arguments(tiny, tmp_path, tmp_path / "p.html"))
    report = preview.write(preview.open_data(load_config(rest)), options.output, 12, seed=0)
    assert [fault["id"] for fault in report["refused"]] == ["gone"]
    assert report["refused"][0]["reason"] == "missing file"
    assert len(article(Page(options.output), "there")["images"]) == 4


def test_endless_names_and_texts(tiny, tmp_path):
    endless = [
        {"id": "i" * 90_000, "source": "s" * 90_000, "messages": turns("q", "x")},
        {"id": "answer", "source": "t", "messages": turns("q", "word " * 50_000)},
        {"id": "media", "source": "t", "images": ["a.png"] * 90, "messages": turns("<image>" * 90, "x")},
    ]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    write_records([{"images": [], "videos": [], "audios": [], "meta": {}, **one} for one in endless],
                  tmp_path / "train.parquet")  # fmt: skip
    options, rest = preview.parse_options(arguments(tiny, tmp_path, tmp_path / "p.html", "max_tiles=0"))
    report = preview.write(preview.open_data(load_config(rest)), options.output, 12, seed=0)
    assert report["total"]["length"]["max"] > 100_000 and not report["refused"]
    assert options.output.stat().st_size < 400_000 and len(preview.text_of(report)) < 5000
    page = Page(options.output)
    assert "the first 24 of 90 images" in article(page, "media")["text"]
    assert "more than half of the supervised tokens of 1 sample" in page.text
