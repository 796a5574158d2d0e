"""`loss_curves.png`: what is drawn, and that it is there however a run ends."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from transformers import TrainerCallback

import train as script
from run_folder import CURVES_FILE, RunError, complete_checkpoints
from training import curves, interruption
from training.curves import draw, draw_loss, draw_parts, legend, main, points, read_history, smoothed, use_log_if_wide

HISTORY = [
    {"step": step, "loss": 5 / step, "lora_lr": 1e-4 / step, "projector_lr": 2e-4, "grad_norm": 1.0,
     "lora_grad_norm": 0.6, "projector_grad_norm": 0.8, "supervised_tokens_per_second": 100.0, "mfu": 0.4}
    for step in range(1, 41)
] + [{"step": 20, "eval_loss": 0.4}, {"step": 40, "eval_loss": float("nan")}]  # fmt: skip


class Axis:
    """Notes what is plotted."""

    def __init__(self):
        self.lines: list[tuple] = []

    def plot(self, x, y, **options):
        self.lines.append((options.get("label"), list(x), list(y)))
        return (self,)

    def get_color(self) -> str:
        return "red"


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(n, action)`: calls the action before optimizer step n + 1 of any run."""

    def arrange(step: int, action) -> None:
        class Act(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step:
                    action()

        make = script.make_trainer

        def with_action(*args, **kwargs):
            trainer = make(*args, **kwargs)
            trainer.add_callback(Act())
            return trainer

        monkeypatch.setattr(script, "make_trainer", with_action)

    return arrange


def is_picture(path: Path) -> bool:
    with Image.open(path) as picture:
        return picture.size[0] > 1000 and len(np.unique(np.asarray(picture))) > 10


def test_mean_of_a_window_is_centred_and_narrower_at_the_ends():
    values = np.arange(100.0)
    np.testing.assert_allclose(smoothed(values), values)
    spike = np.zeros(100)
    spike[50] = 11
    assert smoothed(spike)[45:56].tolist() == [1] * 11 and smoothed(spike).sum() == pytest.approx(11)
    assert smoothed(spike[48:]).tolist() != [] and smoothed(np.array([3.0])).tolist() == [3]
    assert smoothed(np.array([])).tolist() == []


def test_loss_raw_and_smoothed_and_validation():
    axis = Axis()
    draw_loss(axis, HISTORY)
    (first, steps, smooth), (raw_name, _, raw), (second, *validation) = axis.lines
    assert (first, raw_name, second) == ("training", None, "validation")
    assert steps == list(range(1, 41)) and raw == [5 / step for step in steps]
    assert smooth == smoothed(np.array(raw)).tolist()
    assert validation == [[20], [0.4]]  # what is not finite has no place
    assert points(HISTORY, "nothing")[0].size == 0


def test_rates_and_norms_of_each_part_of_each_run():
    axis = Axis()
    draw_parts(axis, {"a": HISTORY, "b": HISTORY[:3]}, "_lr")
    assert [(label, len(steps)) for label, steps, _ in axis.lines] == [
        ("a lora", 40), ("a projector", 40), ("b lora", 3), ("b projector", 3)
    ]  # fmt: skip
    axis = Axis()
    draw_parts(axis, {"": HISTORY}, "_grad_norm")
    assert [(label, values[0]) for label, _, values in axis.lines] == [("lora", 0.6), ("projector", 0.8)]
    axis = Axis()
    draw_parts(axis, {"": [{"step": 1, "grad_norm": 3.0}]}, "_grad_norm")
    assert [values for _, _, values in axis.lines] == [[3.0]]


def test_axes_are_logarithmic_only_where_it_helps():
    for values, scale in (([1, 9], "linear"), ([1, 11], "log"), ([0, 11], "linear"), ([], "linear")):
        axis = Figure().subplots()
        axis.plot(range(len(values)), values)
        use_log_if_wide(axis)
        assert axis.get_yscale() == scale


def test_pictures_of_one_run_and_of_several(tmp_path, monkeypatch, capsys):
    for name, end in (("a", 40), ("b", 10)):
        (tmp_path / name / "checkpoint-10").mkdir(parents=True)
        (tmp_path / name / "checkpoint-9").mkdir()
        for step in (9, 10):
            log = json.dumps({"log_history": HISTORY[:step]})
            (tmp_path / name / f"checkpoint-{step}" / "trainer_state.json").write_text(log)
        if end == 40:
            (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    assert len(read_history(tmp_path / "a")) == 42 and len(read_history(tmp_path / "b")) == 10
    monkeypatch.setattr(sys, "argv", ["curves", str(tmp_path / "a"), str(tmp_path / "b")])
    main()
    assert capsys.readouterr().out == f"{tmp_path}/a/{CURVES_FILE}\n" and is_picture(tmp_path / "a" / CURVES_FILE)
    draw({"": HISTORY[:1]}, tmp_path / "one.png")
    draw({"": []}, tmp_path / "empty.png")
    assert is_picture(tmp_path / "one.png") and not list(tmp_path.glob("*/.*"))


def test_a_folder_without_a_log_is_named(tmp_path):
    with pytest.raises(RunError, match=f"{tmp_path} holds no log: neither trainer_state.json nor a checkpoint"):
        read_history(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"log_')
    with pytest.raises(RunError, match="trainer_state.json is no log of a run"):
        read_history(tmp_path)


def test_a_finished_run_leaves_its_curves_and_drawing_can_not_end_it(tiny, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda histories, path: drawn.append((histories, path)))
    script.train(tiny.config(tmp_path / "a", "max_steps=2"))
    ((histories, path),) = drawn
    assert path == tmp_path / "a" / CURVES_FILE and [e["step"] for e in histories[""] if "loss" in e] == [1, 2]

    def fails(histories, path):
        raise OSError("no space left on device")

    monkeypatch.setattr(curves, "draw", fails)
    script.train(tiny.config(tmp_path / "b", "max_steps=2"))
    assert (tmp_path / "b" / "trainer_state.json").exists()
    assert "no curves were drawn: OSError('no space left on device')" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [False, True])
def test_an_error_leaves_curves_and_stays_the_error(tiny, tmp_path, monkeypatch, at_step, broken):
    def fail():
        raise FloatingPointError("the loss of step 3 is not finite")

    if broken:
        monkeypatch.setattr(curves, "draw", lambda *args: 1 / 0)
    at_step(2, fail)
    arguments = ["train.py", *tiny.arguments(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="^train.py: the loss of step 3 is not finite$"):
        script.main()
    assert broken or is_picture(tmp_path / "run" / CURVES_FILE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step(tiny, tmp_path, monkeypatch, at_step, capfd, number):
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda histories, path: drawn.append(histories))
    at_step(2, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny.arguments(tmp_path / "run", "save_steps=100")])
    with pytest.raises(SystemExit) as exit_:
        script.main()
    assert exit_.value.code == 128 + number and signal.getsignal(number) == before
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert [entry["step"] for entry in drawn[0][""]][:3] == [1, 2, 3]
    err = capfd.readouterr().err
    again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
    assert f"\nstopping after the step in hand, with a checkpoint{again}\n" in err
    assert "train.py: stopped after step 3 with a checkpoint; the same command continues" in err


def test_a_second_ctrl_c_ends_it_at_once(tiny, tmp_path, monkeypatch, at_step, capfd):
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda histories, path: drawn.append(histories))
    at_step(2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    monkeypatch.setattr(sys, "argv", ["train.py", *tiny.arguments(tmp_path / "run", "save_steps=100")])
    with pytest.raises(SystemExit) as exit_:
        script.main()
    assert exit_.value.code == 130 and not complete_checkpoints(tmp_path / "run") and not drawn
    assert "stopped at once; the same command continues from the last checkpoint" in capfd.readouterr().err


def test_processes_of_the_loader_leave_ctrl_c_to_the_run_and_obey_sigterm(tiny, tmp_path):
    """They have the handlers of the process that they are copies of."""

    class Trainer:
        stop_signal = None

        def is_world_process_zero(self) -> bool:
            return True

    trainer = Trainer()
    with interruption.stopping_on_signals(trainer):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    assert trainer.stop_signal is None


def test_a_new_run_does_not_keep_the_curves_of_the_last(tiny, tmp_path):
    script.train(tiny.config(tmp_path / "run", "max_steps=1"))
    shutil.copy(tmp_path / "run" / CURVES_FILE, tmp_path / "run" / "answers.jsonl")
    script.resume_point(tiny.config(tmp_path / "run", "max_steps=1", "overwrite=true"))
    assert not (tmp_path / "run" / CURVES_FILE).exists() and not (tmp_path / "run" / "answers.jsonl").exists()


@pytest.mark.parametrize("log", ["null", '{"log_history": null}', '{"log_history": [{"loss": 1}]}', "[]"])
def test_a_log_of_another_form_is_one_line(tmp_path, log):
    (tmp_path / "trainer_state.json").write_text(log)
    with pytest.raises(RunError, match="is no log of a run"):
        read_history(tmp_path)


def test_names_are_no_mathematics(tmp_path):
    names = [legend(Path(name)) for name in ("_a", r"b$\x$")]
    draw({name: [{"step": step, "loss": 2.0 - step} for step in (0, 1)] for name in names}, tmp_path / "curves.png")
    assert names[0] == "./_a" and (tmp_path / "curves.png").exists()
