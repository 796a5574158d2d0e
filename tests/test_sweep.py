"""sweep.py: which runs a command line asks for, and that each of them comes to its end or is told why not.

Most runs here are made by a stand-in for train.py, which takes its arguments and leaves what a run leaves.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import sweep
import train
from config import ConfigError, load_config
from run_folder import RunError
from sweep import duration, is_sweep, plan_runs, safe_name

STAND_IN = textwrap.dedent("""
    import json, signal, sys, time
    from pathlib import Path
    from config import load_config, save_config

    config = load_config(sys.argv[1:])
    rate, folder = config.train.lora_lr, Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "started.txt", "a") as file:
        file.write(folder.name + "\\n")
    save_config(config, folder / "config.yaml")
    if rate == 1.0:
        sys.exit("train.py: the loss of step 3 is not finite (nan)")
    if rate == 2.0:
        raise RuntimeError("out of memory")
    if rate == 3.0 and not (folder / "begun").exists():  # its first attempt takes until it is stopped
        def stop(number, frame):
            (folder / "begun").touch()
            sys.exit(128 + number)
        signal.signal(signal.SIGTERM, stop)
        (folder / "waits").touch()
        time.sleep(60)
    log = [{"step": step, "loss": 5 - step / 10 + rate, "samples_per_second": 10.0 + step} for step in range(1, 21)]
    log += [{"step": 10, "eval_loss": 3 * rate}, {"step": 20, "eval_loss": 4 * rate}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
""")


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    return ["decoder=d", "encoder.path=e", "data.train=[a,b]", f"output_dir={tmp_path}/out"]


@pytest.fixture
def command(tmp_path, monkeypatch, request) -> list[str]:
    """Starts the stand-in."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    return [sys.executable, str(tmp_path / "stand_in.py")]


def started(tmp_path: Path) -> list[str]:
    return (tmp_path / "out/started.txt").read_text().splitlines()


def results(tmp_path: Path) -> dict[str, dict]:
    runs = json.loads((tmp_path / "out/sweep.json").read_text())["runs"]
    return {Path(run["folder"]).name: run for run in runs}


# What is to run


def test_every_combination_is_a_run_in_a_folder_of_its_own(arguments, tmp_path):
    runs = plan_runs([*arguments, "train.learning_rate=1e-4,3e-4", "--model.lora.r", "8,16", "bf16=true"])
    names = [f"learning_rate={rate},lora.r={r}" for rate in ("1e-4", "3e-4") for r in (8, 16)]
    assert [run.name for run in runs] == names
    assert [run.folder for run in runs] == [tmp_path / "out" / name for name in names]
    assert runs[1].values == {"learning_rate": "1e-4", "lora.r": "16"}
    for run, (rate, r) in zip(runs, [(1e-4, 8), (1e-4, 16), (3e-4, 8), (3e-4, 16)], strict=True):
        config = load_config(run.arguments)
        assert (config.train.lora_lr, config.train.decoder_lr, config.model.lora.r) == (rate, rate, r)
        assert config.train.output_dir == str(run.folder) and config.train.bf16
        assert config.data.train == ["a", "b"] and config.train.projector_lr == 1e-4


@pytest.mark.parametrize("argument,values", [
    ("tune=projector,lora", ["projector", "lora"]),  # one of some words
    ("lr_scheduler_type=linear,cosine", ["linear", "cosine"]),  # any text
    ("bf16=true,false", ["true", "false"]),
    ("media.fps=null,2.5", ["null", "2.5"]),
    ("encoder.path=/models/a,/models/b", ["/models/a", "/models/b"]),
    ("lora_lr=1e-4, 3e-4", ["1e-4", "3e-4"]),
])  # fmt: skip
def test_any_key_of_one_value_can_be_varied(arguments, argument, values):
    assert is_sweep([*arguments, argument])
    assert [list(run.values.values()) for run in plan_runs([*arguments, argument])] == [[value] for value in values]


@pytest.mark.parametrize("argument", [
    "data.validation=[a,b]", "data.validation=a,b", "report_to=[tensorboard,wandb]", "weights={a: 1, b: 2}",
    "lora.targets=[w1,w2]", "data.system=Be brief, please.", "lora_lr=1e-4", "nokey=1,2", "--help",
])  # fmt: skip
def test_other_commas_mean_what_they_meant(arguments, argument):
    assert not is_sweep([*arguments, argument])


def test_folder_with_a_comma_in_its_name_is_one_value(arguments, tmp_path):
    (tmp_path / "a,b").mkdir()
    assert not is_sweep([*arguments, f"model.checkpoint={tmp_path}/a,b", f"output_dir={tmp_path}/c,d"])
    assert is_sweep([*arguments, f"model.checkpoint={tmp_path}/a,c"])


@pytest.mark.parametrize("extra,message", [
    (["lora.r=8,big"], "model.lora.r expects int, got 'big'"),
    (["lora.r=8,0"], "model.lora.r is a rank, at least 1, got 0"),
    (["tune=lora,qlora"], "model.tune expects one of projector, lora, decoder, all, got 'qlora'"),
    (["lora_lr=1e-4,,3e-4"], "lora_lr=1e-4,,3e-4 has nothing between two commas"),
    (["lora_lr=1e-4,0.0001"], "lora_lr=1e-4 and lora_lr=0.0001 are the same run"),
    (["lora_lr=1e-4,3e-4", "lora_lr=1e-3"], "lora_lr=1e-4 and lora_lr=3e-4 are the same run"),
    (["lora_lr=1e-4,3e-4", "lora.rr=3"], "unknown key 'lora.rr'"),
])  # fmt: skip
def test_mistakes_are_found_before_the_first_run(arguments, extra, message, command, tmp_path):
    with pytest.raises(ConfigError) as caught:
        sweep.sweep([*arguments, *extra], command)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_names_are_safe_and_different():
    assert safe_name("learning_rate=1e-4,lora.r=8") == "learning_rate=1e-4,lora.r=8"
    slashed, spaced, long = safe_name("decoder=/m/a"), safe_name("decoder=/m a"), safe_name("x=" + "ab" * 300)
    assert slashed.startswith("decoder=_m_a-") and len({slashed, spaced, safe_name("decoder=_m_a")}) == 3
    assert len(long.encode()) <= 200 and long != safe_name("x=" + "ab" * 301)


def test_durations():
    assert [duration(s) for s in (5, 89, 91, 3569, 12_000)] == ["5 s", "89 s", "2 min", "59 min", "3 h 20 min"]


# Running


def test_table_is_sorted_and_a_failure_does_not_end_the_sweep(arguments, command, tmp_path, capfd):
    status = sweep.sweep([*arguments, "lora_lr=0.3,1.0,2.0,0.1"], command)
    assert status == 1
    assert started(tmp_path) == ["lora_lr=0.3", "lora_lr=1.0", "lora_lr=2.0", "lora_lr=0.1"]
    out, err = capfd.readouterr()
    lines = [line.split() for line in out.splitlines()]
    table = lines[lines.index(next(line for line in lines if line[:2] == ["lora_lr", "status"])) :]
    assert [line[:2] for line in table[1:5]] == [
        ["0.1", "finished"], ["0.3", "finished"], ["1.0", "failed"], ["2.0", "failed"]
    ]  # fmt: skip
    assert "lora_lr=1.0 failed: the loss of step 3 is not finite (nan)" in out
    assert "lora_lr=2.0 failed: RuntimeError: out of memory" in out
    assert "RuntimeError: out of memory" in err  # what a run says is seen as it says it
    assert "== lora_lr=1.0: 2 of 4 (3 left, about" in out
    best = results(tmp_path)["lora_lr=0.1"]
    assert best["validation_loss"] == pytest.approx(0.4) and [step for step, _ in best["validation"]] == [10, 20]
    assert best["best_validation_loss"] == pytest.approx(0.3) and best["best_step"] == 10
    assert best["train_loss"] == pytest.approx((5 - 1.9 + 5 - 2.0) / 2 + 0.1)  # steps 19 and 20, the last tenth
    assert best["samples_per_second"] == 20.5 and 0 < best["seconds"] < 60
    assert results(tmp_path)["lora_lr=1.0"]["validation_loss"] is None
    rows = (tmp_path / "out/sweep.md").read_text().splitlines()
    assert rows[0].startswith("| lora_lr | status | validation loss |")
    assert rows[2].startswith("| 0.1 | finished | 0.4000 | 0.3000 | 10 |")
    assert (tmp_path / "out/sweep.png").stat().st_size > 5000


def test_what_is_finished_is_not_run_again(arguments, command, tmp_path, capfd):
    assert sweep.sweep([*arguments, "lora_lr=0.1,0.2"], command) == 0
    seconds = results(tmp_path)["lora_lr=0.1"]["seconds"]
    assert sweep.sweep([*arguments, "lora_lr=0.1,0.2,0.3"], command) == 0
    assert started(tmp_path) == ["lora_lr=0.1", "lora_lr=0.2", "lora_lr=0.3"]
    assert list(results(tmp_path)) == ["lora_lr=0.1", "lora_lr=0.2", "lora_lr=0.3"]
    assert results(tmp_path)["lora_lr=0.1"]["seconds"] == seconds
    assert "status" not in capfd.readouterr().out.splitlines()[-5]  # all are finished: there is nothing to say
    with pytest.raises(RunError, match="holds a run with another configuration:\n  train.max_steps: -1 -> 5"):
        sweep.sweep([*arguments, "lora_lr=0.1,0.2", "max_steps=5"], command)
    sweep.sweep([*arguments, "lora_lr=0.1,0.2", "overwrite=true"], command)
    assert started(tmp_path)[3:] == ["lora_lr=0.1", "lora_lr=0.2"]


def test_dry_run_lists_what_there_is_to_do(arguments, command, tmp_path, capsys):
    sweep.sweep([*arguments, "lora_lr=0.1,0.2"], command)
    capsys.readouterr()
    assert sweep.sweep([*arguments, "lora_lr=0.1,0.4", "--dry_run"], command) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"2 runs in {tmp_path}/out:", "  lora_lr=0.1  (finished)", "  lora_lr=0.4  (waiting)"
    ]  # fmt: skip
    assert len(started(tmp_path)) == 2


def test_ctrl_c_ends_the_sweep_after_the_run_in_hand_and_the_same_command_goes_on(
    arguments, command, tmp_path, capfd
):
    arguments = [*arguments, "lora_lr=0.1,3.0,0.2"]

    def send() -> None:
        end = time.monotonic() + 120
        while not (tmp_path / "out/lora_lr=3.0/waits").exists() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    before = signal.getsignal(signal.SIGINT)
    assert sweep.sweep(arguments, command) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == before
    assert "The sweep was stopped; the same command goes on" in capfd.readouterr().out
    assert (tmp_path / "out/lora_lr=3.0/begun").exists()  # it could do what it does on SIGTERM
    assert {name: run["status"] for name, run in results(tmp_path).items()} == {
        "lora_lr=0.1": "finished", "lora_lr=3.0": "interrupted", "lora_lr=0.2": "waiting"
    }  # fmt: skip
    assert sweep.sweep(arguments, command) == 0
    assert started(tmp_path) == ["lora_lr=0.1", "lora_lr=3.0", "lora_lr=3.0", "lora_lr=0.2"]
    assert {run["status"] for run in results(tmp_path).values()} == {"finished"}


def test_a_second_signal_ends_the_run_at_once(tmp_path, capfd):
    """A run that does not listen to SIGTERM."""
    script = tmp_path / "deaf.py"
    script.write_text(
        "import os, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: os.kill(os.getppid(), signal.SIGTERM))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)\n"
    )
    begin, before = time.monotonic(), signal.getsignal(signal.SIGTERM)
    with sweep.Runner([sys.executable, str(script)]) as runner:
        assert runner.run([]) == "ended by SIGKILL"
    assert runner.signal == signal.SIGTERM and time.monotonic() - begin < 30
    assert signal.getsignal(signal.SIGTERM) == before


def test_torchrun_around_a_sweep_is_refused(arguments, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "lora_lr=0.1,0.2"])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert "each of which needs a torchrun of its own" in str(caught.value)


def test_train_sh_leaves_sweeps_to_sweep_py(request, tmp_path):
    """Its launch lines with a python that only says what it was asked to run."""
    lines = (request.config.rootpath / "train.sh").read_text().splitlines()
    first = lines.index("if [ $# -gt 0 ]; then")
    launch = "\n".join(lines[first : lines.index("fi", first) + 1])
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[ "$2" = --is_sweep ] && exec {sys.executable} "$@"\necho "$@"\n')
    python.chmod(0o755)

    def started_by(*arguments: str, nproc: str) -> str:
        return subprocess.run(
            ["bash", "-c", launch, "train.sh", *arguments], cwd=request.config.rootpath, text=True,
            env={**os.environ, "PYTHON": str(python), "NPROC": nproc}, stdout=subprocess.PIPE, check=True,
        ).stdout  # fmt: skip

    assert started_by("lora_lr=1e-4,3e-4", nproc="2") == "sweep.py lora_lr=1e-4,3e-4\n"
    assert started_by("data.train=[a,b]", nproc="1") == "train.py data.train=[a,b]\n"
    assert started_by("data.train=[a,b]", nproc="2").endswith("--nproc_per_node 2 train.py data.train=[a,b]\n")


def test_real_runs(tiny, tmp_path, capfd):
    """One that learns and one that diverges, each in a process of its own."""
    out = tmp_path / "out"
    validation = f"data.validation={tiny.folder}/validation.parquet"
    arguments = tiny.arguments(out, "lora_lr=1e-2,1e30", validation, "max_steps=4", "eval_steps=2", "dropout=0")
    assert sweep.sweep(arguments, [sys.executable, str(tiny.project / "train.py")]) == 1
    done, failed = results(tmp_path).values()
    assert (done["status"], failed["status"]) == ("finished", "failed")
    assert "is not finite" in failed["reason"]
    log = json.loads((out / "lora_lr=1e-2/trainer_state.json").read_text())["log_history"]
    validated = [[entry["step"], entry["eval_loss"]] for entry in log if "eval_loss" in entry]
    assert done["validation"] == validated and [step for step, _ in validated] == [2, 4]
    assert done["train_loss"] == [entry["loss"] for entry in log if "loss" in entry][-1]
    assert (out / "lora_lr=1e-2/adapter_model.safetensors").exists()
    assert f"{done['validation_loss']:.4f}" in capfd.readouterr().out


def test_train_py_leaves_sweeps_to_sweep_py(arguments, monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "sweep", lambda *call: asked.append(call) or 7)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "lora_lr=0.1,0.2"])
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 7
    assert asked == [([*arguments, "lora_lr=0.1,0.2"], [sys.executable, train.__file__], 1)]
