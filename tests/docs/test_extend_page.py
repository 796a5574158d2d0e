"""docs/extend.md: its files, changes, code and commands, done in the order of the page to a copy of the project."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from dataprocess import scenes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extend.md"
NOT_COPIED = shutil.ignore_patterns(".*", "outputs", "data", "docs", "tests", "notebooks", "__pycache__")
# Runs the steps in one process, which imports torch once; prints what each wrote as a JSON list.
RUNNER = """
import contextlib, io, json, runpy, shlex, sys
sys.path.insert(0, ".")
written = []
for kind, text in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if kind == "python":
            exec(compile(text, "docs/extend.md", "exec"), {"__name__": "__main__"})
        for command in text.splitlines() if kind == "sh" else ():
            python, *sys.argv = shlex.split(command)
            assert python == "python"
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                assert not end.code, (command, end.code)
    written.append(out.getvalue())
print(json.dumps(written))
"""


class Block(NamedTuple):
    kind: str
    file: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"(?ms)^```(\w+) ?(\S*)\n(.*?)^```$", page.read_text(encoding="utf-8"))
    return [Block(*block) for block in found]


def patched(source: str, diff: str) -> str:
    """`source` after a diff without line numbers, whose places are each the only ones of their kind."""
    for hunk in re.split(r"(?m)^@@\n", diff):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] != "+")
        assert source.count(before) == 1, f"{source.count(before)} times in the file: {before}"
        source = source.replace(before, "".join(line[1:] for line in lines if line[0] != "-"))
    return source


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> Path:
    """What `bash train.sh` leaves, with tiny weights and a few scenes, and the changes of the page."""
    world = tmp_path_factory.mktemp("extended") / "project"
    shutil.copytree(ROOT, world, ignore=NOT_COPIED)
    config = yaml.safe_load((world / "configs/scenes.yaml").read_text())
    config["train"] |= {"per_device_train_batch_size": 2, "bf16": False}
    (world / "configs/scenes.yaml").write_text(yaml.safe_dump(config))
    scenes.write_scenes(world / "data/scenes", 0, dict.fromkeys(scenes.SPLITS, 5), texts=4, copies=4, turns=2)
    for name, made in (("decoder", "decoder"), ("tower", "encoder")):
        shutil.copytree(tiny.folder / made, world / "outputs/scenes" / name)
    for block in blocks(PAGE):
        file = world / block.file
        if block.kind == "diff":
            file.write_text(patched(file.read_text(), block.text))
        elif block.file:
            file.write_text(block.text)
    return world


def test_the_page_works_as_it_stands(world):
    steps, expected = [], {}
    for block in blocks(PAGE):
        if block.kind == "text":
            expected[len(steps) - 1] = block.text.rstrip()
        elif not block.file:
            steps.append((block.kind, block.text))
    run = subprocess.run(
        [sys.executable, "-c", RUNNER], cwd=world, input=json.dumps(steps), capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-5000:]
    written = json.loads(run.stdout.splitlines()[-1])
    assert {number: written[number].rstrip() for number in expected} == expected and len(expected) == 3
    assert len(list((world / "outputs/try").glob("*/kanjian.json"))) == 6


def test_the_changes_keep_to_the_style(world):
    files = {block.file for block in blocks(PAGE) if block.file}
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), *files]
    run = subprocess.run(command, cwd=world, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_both_languages_show_the_same():
    assert blocks(PAGE) == blocks(PAGE.with_name("extend_zh.md"))
