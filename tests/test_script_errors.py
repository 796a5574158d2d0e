"""What the scripts say of arguments and circumstances that they can do nothing with: one line, no traceback."""

import resource
import sys
from pathlib import Path

import pytest

import evaluate
import export
import inference
import train
from build import build_model

REST = {
    inference: ["--text", "?"],
    evaluate: ["--data", "nowhere.jsonl"],
    export: ["--format", "llava", "--output", "exported"],
}


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("script_errors")
    build_model(tiny.config(folder).model).save_pretrained(folder)
    return folder


def run(monkeypatch, script, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


@pytest.mark.parametrize("script", REST, ids=lambda script: script.__name__)
@pytest.mark.parametrize("device", ["cuda", "foo", "cpu:x", "meta", "xpu", "hpu"])  # each another kind of error
def test_a_device_that_is_not_there(script, device, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^--device {device} can't be used, take cpu, or cuda where .*: .+$"):
        run(monkeypatch, script, "--checkpoint_path", checkpoint, "--device", device, *REST[script])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", REST, ids=lambda script: script.__name__)
@pytest.mark.parametrize("argument", ["--decoder", "--encoder"])
@pytest.mark.parametrize("place", ["/nowhere", "/nowhere/b", "./nowhere", "~/nowhere", "a/b/nowhere"])
def test_a_folder_that_is_not_there(script, argument, place, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^there is no folder {place}$"):
        run(monkeypatch, script, "--checkpoint_path", checkpoint, argument, place, *REST[script])


def test_the_script_ends_with_one_line(tiny, checkpoint):
    result = tiny.run("inference.py", "--checkpoint_path", checkpoint, "--device", "foo", "--text", "?", check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("inference.py: --device foo can't be used")


@pytest.mark.parametrize(
    ("file", "content", "arguments", "message"),
    [
        ("none.json", None, [], "expected a .*folder"),
        ("odd.json", '[{"text": "a", "picture": "b.png"}]', [], "unknown key 'picture'"),
        ("odd.csv", "instruction;answer\na;b\n", [], "unknown key 'instruction;answer'"),
        ("odd.json", '[{"instruction": "a", "answer": 3}]', [], "answer must be text, got 3"),
        ("odd.json", '[{"image": "a.png", "instruction": "<image> or <image>", "answer": "b"}]', [], "2 <image>"),
        ("odd.json", "[]", [], "no record"),
        ("odd.json", '[{"instruction": "a", "answer": "b"}]', ["max_length=3"], "raise data.max_length"),
        ("odd.json", '[{"instruction": "a", "answer": "b"}]', ["deepspeed=none.json"], "deepspeed"),
    ],
)
def test_data_that_cant_be_learned_from(tiny, tmp_path, monkeypatch, file, content, arguments, message):
    if content is not None:
        (tmp_path / file).write_text(content)
    given = tiny.arguments(tmp_path / "run", f"data.train={tmp_path / file}", *arguments)
    monkeypatch.setattr(sys, "argv", ["train.py", *given])
    with pytest.raises(SystemExit, match=f"^train.py: .*{message}"):
        train.main()


@pytest.mark.parametrize("form", list(export.CODE))
@pytest.mark.parametrize("size", [1000, 20000])  # too small for the first file, for weights or the tokenizer
def test_a_full_disk(form, size, checkpoint, tmp_path, monkeypatch):
    """Here the limit on the size of a file, which fails the same calls."""
    message = r"(exported can't be written, is the disk full|^\[Errno 27\]).*File too large"
    arguments = ["--checkpoint_path", checkpoint, "--format", form, "--output", tmp_path / "exported"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(OSError, match=message):
            run(monkeypatch, export, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
