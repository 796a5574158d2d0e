"""Checkpoints survive kill -9 at every moment of their writing and full disks, and fit another number of processes."""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from run_folder import Division, RunError, complete_checkpoints, held, keep_newest, resume_point
from tests.training.launch import launch
from train import train
from training import VLMTrainer
from training.writing import Writing

# With progress and configuration, what makes a checkpoint complete.
READ = ("trainer_state.json", "scheduler.pt", "kanjian.json", "optimizer.pt", "rng_state.pth")
SETTINGS = ["max_steps=6", "save_steps=2", "save_total_limit=1"]


def files(folder: Path) -> dict[str, bytes]:
    """Content of all files, random numbers aside: Python seeds its own anew in a forked process."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != "rng_state.pth"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "adapter_model.safetensors"), **load_file(folder / "projector.safetensors")}


def losses(folder: Path) -> list[tuple]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry]


def kill_at(number: int) -> None:
    """Makes the process kill itself before the file operation of this number, counted from now."""
    left = number

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        writes = event == "open" and (arguments[1] in ("w", "wb", "x") or arguments[1] is None)
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def in_child(folder: Path, action) -> int:
    """Exit status of a forked process that works in `folder`, minus a signal's number; 3 for a RunError."""
    child = os.fork()
    if child == 0:
        status = 4
        try:
            os.chdir(folder)
            action()
            status = 0
        except RunError as error:
            limit_file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            Path("error.txt").write_text(str(error))
            status = 3
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory) -> dict[str, list[Path]]:
    """Output folders of a run whose second checkpoint ("killed"), or result ("finishing"), was cut off at each moment,
    and those where the disk was full ("full"), beside the run that went through ("whole")."""
    root = tmp_path_factory.mktemp("interrupted")
    found: dict[str, list[Path]] = {"killed": [], "finishing": [], "full": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)

        def tried(kind: str, prepare, write, *arguments) -> int:
            """Exit status of writing in a copy of what there is, after `prepare`."""
            place = root / f"{kind}-{len(found[kind])}"
            shutil.copytree(root / "run", place / "run")
            found[kind].append(place)
            return in_child(place, lambda: (prepare(), write(*arguments)))

        def save(trainer, model, trial=None):
            if trainer.state.global_step == 4:
                while tried("killed", functools.partial(kill_at, len(found["killed"])), original, trainer, model):
                    pass
                for limit in (0, 1000, 3000, 8000, 16000, 30000):
                    tried("full", functools.partial(limit_file_size, limit), original, trainer, model)
            original(trainer, model, trial)
            if trainer.state.global_step == 4:
                shutil.copytree(root / "run", root / "whole")

        def finish(trainer):
            while tried("finishing", functools.partial(kill_at, len(found["finishing"])), original_finish, trainer):
                pass
            original_finish(trainer)

        original, original_finish = VLMTrainer._save_checkpoint, VLMTrainer.finish
        patch.setattr(VLMTrainer, "_save_checkpoint", save)
        patch.setattr(VLMTrainer, "finish", finish)
        train(tiny.config("run", *SETTINGS))
    return {**found, "whole": [root / "whole", root / "run"]}


def limit_file_size(limit: int) -> None:
    """Writes beyond so many bytes of a file fail, in this process, as they do where a quota is used up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_killed_while_a_checkpoint_is_written(tiny, interrupted):
    whole, _ = interrupted["whole"]
    expected = {"checkpoint-4": files(whole / "checkpoint-4")}
    newest = []
    for place in interrupted["killed"]:
        last = complete_checkpoints(place / "run")[-1]
        expected.setdefault(last.name, files(last))  # checkpoint-2, as it was before
        assert files(last) == expected[last.name], place
        newest.append(last.name)
    assert expected.keys() == {"checkpoint-2", "checkpoint-4"} and len(newest) > 20
    assert newest == sorted(newest)  # once the new one is whole it stays


def test_killed_while_a_checkpoint_is_written_continues_bit_for_bit(tiny, interrupted, monkeypatch):
    run = interrupted["whole"][1]
    places = interrupted["killed"]
    chosen = {complete_checkpoints(place / "run")[-1].name: place for place in places}  # the last moment of each
    for place in [places[0], *chosen.values()]:
        monkeypatch.chdir(place)
        train(tiny.config("run", *SETTINGS))
        assert losses(place / "run") == losses(run)
        assert all(torch.equal(weights(place / "run")[name], tensor) for name, tensor in weights(run).items())
        assert {path.name for path in (place / "run").iterdir()} == {path.name for path in run.iterdir()}


def test_killed_while_the_result_is_written(tiny, interrupted, monkeypatch):
    run = interrupted["whole"][1]
    states = interrupted["finishing"]
    assert len(states) > 8
    for place in (states[0], states[len(states) // 2], states[-2]):
        assert files(complete_checkpoints(place / "run")[-1]) == files(run / "checkpoint-6")
        monkeypatch.chdir(place)
        train(tiny.config("run", *SETTINGS))
        assert {path.name for path in (place / "run").iterdir()} == {path.name for path in run.iterdir()}
        assert all(torch.equal(weights(place / "run")[name], tensor) for name, tensor in weights(run).items())


def test_full_disk_leaves_the_last_checkpoint(interrupted):
    for place in interrupted["full"]:
        problem = (place / "error.txt").read_text()
        assert problem.startswith("checkpoint-4 can't be written: ") and "\n" not in problem
        assert "are free where run lies" in problem and "the same command then continues" in problem
        assert [path.name for path in (place / "run").glob("*checkpoint*")] == ["checkpoint-2"]
        assert files(place / "run") == files(interrupted["full"][0] / "run")


@pytest.mark.parametrize(
    "write",
    [
        lambda path, tensor: torch.save({"a": tensor}, path),
        lambda path, tensor: save_file({"a": tensor}, path),
        lambda path, tensor: path.write_bytes(bytes(10_000)),
    ],
)
@pytest.mark.parametrize("limit", [0, 2000])
def test_every_kind_of_failed_write_is_an_error_that_says_what_to_do(tmp_path, write, limit):
    def action():
        limit_file_size(limit)
        writing = Writing(tmp_path / "made", "checkpoint-4", "The others are whole.")
        (tmp_path / "made").mkdir()
        writing(write, tmp_path / "made" / "file", torch.zeros(2500), size=10_000_000)
        writing(Path.touch, tmp_path / "later")
        writing.agree()

    assert in_child(tmp_path, action) == 3
    problem = (tmp_path / "error.txt").read_text()
    assert "checkpoint-4 can't be written: " in problem and "It takes about 10.0 MB, and " in problem
    assert [path.name for path in tmp_path.iterdir()] == ["error.txt"]


def test_a_mistake_in_the_code_is_no_failed_write(tmp_path):
    with pytest.raises(KeyError):
        Writing(tmp_path / "made", "checkpoint-4", "")({}.__getitem__, "absent")


def test_full_disk_ends_the_script_with_one_line(tiny, tmp_path):
    arguments = tiny.arguments(tmp_path / "run", *SETTINGS)
    codes, output = launch(arguments, before=functools.partial(limit_file_size, 24_000))
    assert codes == [1], output
    lines = [line for line in output.splitlines() if "can't be written" in line]
    assert len(lines) == 1 and "train.py: checkpoint-2 can't be written: " in lines[0]
    assert "Traceback" not in output
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "config.yaml"]


def test_output_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"train.output_dir=.*/file/run can't be written: .*Not a directory"):
        resume_point(tiny.config(tmp_path / "file" / "run"))


def checkpoint(tiny, folder: Path, processes: int, *settings: str) -> Path:
    """A run's folder with what `resume_point` reads of a checkpoint."""
    resume_point(tiny.config(folder, *settings), processes=processes)
    made = folder / "checkpoint-2"
    made.mkdir()
    for name in READ:
        (made / name).touch()
    (made / "progress.json").write_text(json.dumps({"processes": processes}))
    shutil.copy(folder / "config.yaml", made)
    return made


def test_another_number_of_processes_needs_the_same_global_batch(tiny, tmp_path):
    settings = ("per_device_train_batch_size=2", "gradient_accumulation_steps=6")
    made = checkpoint(tiny, tmp_path / "run", 1, *settings)
    with pytest.raises(RunError, match=r"of 12 \(1 processes x 2 x 6\), now it would be 24 \(2 processes x 2 x 6\); to "
                       r"continue on 2 processes set train.per_device_train_batch_size=2 "
                       r"train.gradient_accumulation_steps=3"):
        resume_point(tiny.config(tmp_path / "run", *settings), processes=2)
    with pytest.raises(RunError, match="set train.per_device_train_batch_size=3 train.gradient_accumulation_steps=1"):
        resume_point(tiny.config(tmp_path / "run", *settings), processes=4)
    with pytest.raises(RunError, match="continue on a number of processes that divides 12: 1, 2, 3, 4, 6, 12"):
        resume_point(tiny.config(tmp_path / "run", *settings), processes=5)
    with pytest.raises(RunError, match="another configuration:\n  train.lora_lr"):
        resume_point(tiny.config(tmp_path / "run", *settings, "lora_lr=1"), processes=2)
    other = tiny.config(tmp_path / "run", settings[0], "gradient_accumulation_steps=3")
    assert resume_point(other, processes=2) == made
    # The checkpoint still tells how it was trained.
    assert resume_point(tiny.config(tmp_path / "run", *settings), processes=1) == made


def test_another_number_of_processes_that_leaves_out_other_samples_is_refused(tiny, tmp_path):
    """Of 24 samples in global batches of 10, 4 are left: enough for 2 processes of 5, too few for 5 of 1 or 2."""
    assert Division(5, 2, 1).left_out(24) == 4
    assert Division(2, 5, 1).left_out(24) == Division(1, 10, 1).left_out(24) == 0
    assert Division(2, 2, 2).left_out(29) == 1 and Division(2, 2, 2).left_out(30) == 0
    made = checkpoint(tiny, tmp_path / "run", 1, "per_device_train_batch_size=10")

    def check(processes: int, size: int) -> None:
        config = tiny.config(tmp_path / "run", f"per_device_train_batch_size={size}")
        trainer = SimpleNamespace(
            config=config, mixture=None, train_dataset=range(24), args=SimpleNamespace(world_size=processes)
        )
        VLMTrainer._check_division(trainer, made)

    check(2, 5)
    with pytest.raises(RunError, match="24 samples the last 0 were left out on 1, .* and 4 would be now; continue on"):
        check(5, 2)


def test_old_checkpoints_go_after_the_new_one_and_remains_do_not_count(tmp_path):
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in (*READ, "progress.json", "config.yaml"):
            (tmp_path / f"checkpoint-{step}" / name).touch()
    for remains in (3, 999):  # copies that were broken off
        (tmp_path / f"checkpoint-{remains}").mkdir()
    keep_newest(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 5
    keep_newest(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-10", "checkpoint-999"}
    keep_newest(tmp_path, 1)
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-10"]


def test_a_second_run_in_the_same_folder_is_refused(tiny, tmp_path):
    command = [sys.executable, "-c", "import sys, time, run_folder, pathlib\n"
               "with run_folder.held(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)",
               str(tmp_path)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tiny.project) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another run is at work in"), held(tmp_path):
            pass
        other.kill()
    with held(tmp_path):  # the lock goes with the process
        pass


@pytest.mark.parametrize("damage", ["absent", "empty", "zeros"])
@pytest.mark.parametrize("name", ["rng_state.pth", "trainer_state.json"])
def test_other_damaged_files_are_named_or_left_out(tiny, tmp_path, name, damage):
    train(tiny.config(tmp_path, "max_steps=4"))
    for file in ("trainer_state.json", "kanjian.json"):
        (tmp_path / file).unlink()
    file = tmp_path / "checkpoint-2" / name
    shutil.rmtree(tmp_path / "checkpoint-4")
    if damage == "absent":
        file.unlink()
        assert complete_checkpoints(tmp_path) == []
        return
    file.write_bytes(b"" if damage == "empty" else bytes(file.stat().st_size))
    with pytest.raises(RunError, match="checkpoint-2 can't be continued"):
        train(tiny.config(tmp_path, "max_steps=4"))


def test_workers_leave_the_group_that_signals_go_to(tiny, tmp_path):
    """As torchrun does it: every process of the group gets SIGTERM, and the checkpoint is written nonetheless."""
    command = [sys.executable, "train.py", *tiny.arguments(tmp_path, "max_steps=4000", "num_workers=1", "save_steps=2")]
    with subprocess.Popen(command, cwd=tiny.project, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        while not complete_checkpoints(tmp_path):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGTERM)
        _, problem = run.communicate(timeout=60)
    assert run.returncode == 143 and "with a checkpoint; the same command continues" in problem
