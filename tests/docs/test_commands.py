"""Every command of the README and of docs/ works as it stands there, or docs/commands.md says what it needs."""

import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config import load_config
from dataprocess import scenes
from train import train

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if not path.stem.endswith("_zh"))]
LISTED = ROOT / "docs" / "commands.md"
# A line of an indented block that begins with a program, after variables of its environment.
PROGRAMS = "accelerate bash curl echo jupyter-execute pip python sbatch ssh torchrun transformers vllm"
COMMAND = re.compile(rf" {{4,}}((?:[A-Z_]+=\S+ +)*(?:{PROGRAMS.replace(' ', '|')}) .*)")


def commands(page: Path) -> list[str]:
    """Without comments; lines that end in a backslash go on in the next one."""
    found, fenced, begun = [], False, ""
    for line in page.read_text(encoding="utf-8").splitlines():
        fenced ^= line.startswith("```")
        match = COMMAND.fullmatch(line)
        if begun:
            begun += line.strip()
        elif match and not fenced:
            begun = match[1]
        if begun.endswith("\\"):
            begun = begun[:-1]
        elif begun:
            found.append(re.sub(r"\s+# .*$", "", begun))
            begun = ""
    return found


def listed() -> dict[str, str]:
    """Command -> what it needs, from the table of docs/commands.md."""
    rows = re.findall(r"(?m)^\| `(.+?)` \| (.+?) \|$", LISTED.read_text(encoding="utf-8"))
    return {command.replace("\\|", "|"): needs for command, needs in rows}


WRITTEN = {command: page for page in PAGES if page != LISTED for command in commands(page)}
RUN = [command for command in WRITTEN if command not in listed()]  # in the order of the pages: one may need another


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory) -> Path:
    """A copy of the project in which the default run was tiny: a few scenes, random tower and decoder, two steps."""
    world = tmp_path_factory.mktemp("world")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in {path.partition("/")[0] for path in tracked} or {path.name for path in ROOT.iterdir()}:
        if name not in ("configs", "data", "outputs", ".git", ".venv"):
            (world / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", world / "configs")
    config = yaml.safe_load((ROOT / "configs/scenes.yaml").read_text())
    config["train"] |= {"max_steps": 2, "save_steps": 1, "eval_steps": 2, "logging_steps": 1, "bf16": False}
    config["train"] |= {"per_device_train_batch_size": 2}
    (world / "configs/scenes.yaml").write_text(yaml.safe_dump(config))
    scenes.write_scenes(world / "data/scenes", 0, dict.fromkeys(scenes.SPLITS, 5), texts=4, copies=4, turns=2)
    for name, made in (("decoder", "decoder"), ("tokenizer", "decoder"), ("tower", "encoder")):
        shutil.copytree(tiny.folder / made, world / "outputs/scenes" / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        train(load_config(["--config", "configs/scenes.yaml"]))
    for name in ("a", "b", "mine"):
        shutil.copytree(world / "outputs/scenes", world / "outputs" / name)
    (world / "outputs/scenes/checkpoint-1").rename(world / "outputs/scenes/checkpoint-1000")
    return world


@pytest.mark.parametrize("command", RUN)
def test_runs_as_written(command, world, monkeypatch, capsys):
    """`python` in this process, where all is imported already; `bash train.sh` is `train.py` after an installation."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        monkeypatch.setenv(name, value)
    if words[:2] == ["bash", "train.sh"]:
        words[:2] = ["python", "train.py"]
    assert words[0] == "python", f"{command}: list it in docs/commands.md with what it needs"
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "stdin", terminal := io.StringIO(""))  # a terminal in which nothing is typed
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setenv("XDG_STATE_HOME", str(world / "state"))
    module = words[1] == "-m"
    monkeypatch.setattr(sys, "argv", words[2:] if module else words[1:])
    if module:
        code = _exit_of(lambda: runpy.run_module(words[2], run_name="__main__", alter_sys=True))
    else:
        monkeypatch.syspath_prepend(world)
        code = _exit_of(lambda: runpy.run_path(words[1], run_name="__main__"))
    assert not code, f"{code}\n{capsys.readouterr()}"


CODE = [
    pytest.param(block, id=f"{page.stem} {number}")
    for page in PAGES
    if page.stem != "extend"  # whose blocks build on each other, and have a test of their own
    for number, block in enumerate(re.findall(r"(?ms)^```python\n(.*?)^```$", page.read_text(encoding="utf-8")))
    if "outputs/scenes" in block
]


@pytest.mark.parametrize("block", CODE)
def test_code_runs_as_written(block, world, monkeypatch, capsys):
    """What uses the default run; after the commands, one of which makes the export that a block reads."""
    monkeypatch.chdir(world)
    exec(compile(block, "docs", "exec"), {"__name__": "__main__"})


def _exit_of(script) -> str | int | None:
    try:
        script()
    except SystemExit as error:
        return error.code
    return None


def test_what_is_listed_is_written_somewhere():
    assert not listed().keys() - WRITTEN.keys()


TRAINED = [one for one in listed() if re.search(r"train\.(py|sh) --config configs/", one)]


@pytest.mark.parametrize("command", TRAINED)
def test_keys_of_listed_runs_exist(command, monkeypatch):
    """A training that can't be run here is at least a configuration that can be read."""
    words = shlex.split(command)
    monkeypatch.chdir(ROOT)
    plan = ("--plan", "--dry_run", "--gpu_memory")
    arguments = words[words.index("--config") :]
    load_config([word for word in arguments if word not in plan and not word.isdigit() and "," not in word])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_both_languages_show_the_same_commands(page):
    """Quoted words aside, which may be in either language."""
    chinese = page.with_name(f"{page.stem}_zh.md")
    bare = [sorted(re.sub(r'"[^"]*"', '""', command) for command in commands(one)) for one in (page, chinese)]
    assert bare[0] == bare[1]


@pytest.mark.parametrize("page", [*PAGES, *(page.with_name(f"{page.stem}_zh.md") for page in PAGES)],
                         ids=lambda page: page.name)  # fmt: skip
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8"))
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target
