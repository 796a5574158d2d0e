"""The command runs at small size, says so, and keeps what does not fit as a row."""

import json
import math

import pytest
import torch

from benchmarks import qwen7b as benchmark


def test_small_run_writes_its_results(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(benchmark.PROJECT)
    output = tmp_path / "results.md"
    combinations = ["--quantizations", "nf4", "--batches", "1", "--steps", "1", "--new-tokens", "5"]
    benchmark.main(["--small", *combinations, "--output", str(output)])

    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    load, plain, checkpointed, generation = (line for line in lines if line["worker"] != "write")
    assert plain["losses"] == pytest.approx(checkpointed["losses"], abs=1e-3)
    assert plain["losses"][0] == pytest.approx(math.log(benchmark.SMALL_QWEN["vocab_size"]), rel=0.05)
    assert len(plain["losses"]) == benchmark.WARMUP + 1
    assert checkpointed["peak"] < plain["peak"] and generation["peak"] < plain["peak"]
    assert load["footprint"] < load["checkpoint"] and generation["new_tokens"] == 5

    text = output.read_text()
    assert text.startswith("# CPU trial at small size: no GPU figure has been measured\n")
    training = [line.split(" | ") for line in text.splitlines() if line.startswith("| nf4 | 1 | o")]
    assert [row[2] for row in training] == ["off", "on"]
    assert all(abs(float(row[5].removesuffix(" %"))) < 15 for row in training)  # the plan's error
    assert not list(tmp_path.glob("*.unfinished")) and not list(tmp_path.glob(".*.tmp"))


def test_plan_of_the_published_shapes(tmp_path, monkeypatch):
    """On a GPU nothing is small: 7,721,324,544 parameters, and a plan for them from configurations alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = benchmark.arguments(["--folder", str(tmp_path), "--batches", "1"])
    assert (args.device, args.small, args.image_tokens, args.length) == ("cuda", False, 729, 1024)
    monkeypatch.undo()
    folder = benchmark.weights_folder(args)
    benchmark.decoder_config(args).save_pretrained(folder / "decoder")
    benchmark.encoder_config(args).save_pretrained(folder / "encoder")
    monkeypatch.setattr(benchmark, "circumstances", lambda device: "one GPU")
    text = benchmark.heading([], args)
    assert text.startswith("# Qwen-7B with SigLIP so400m on one GPU\n")
    assert "decoder 7,721,324,544 parameters, " in text


def test_out_of_memory_is_a_result_and_other_errors_are_not():
    def fails(error):
        def worker(args):
            raise error

        return worker

    args = benchmark.arguments(["--small"])
    errors = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]
    for error in errors:
        assert benchmark.outcome(fails(error), args) == {"out_of_memory": True}
    with pytest.raises(RuntimeError, match="shapes"):
        benchmark.outcome(fails(RuntimeError("shapes differ")), args)
    combination = {"quantizations": "none", "batches": 4, "checkpointing": "off", "out_of_memory": True}
    row = benchmark.training_table(args, [{**combination, "plan": 2**20}]).splitlines()[-1]
    assert row == "| bf16 | 4 | off | out of memory | 1.0 |  |  |  |  |"
    assert benchmark.generation_table(args, [combination]).endswith("| bf16 | 4 | out of memory |  |  |")
    assert benchmark.loading_table(args, [combination]).endswith("| bf16 | out of memory |  |  |  |  |  |")


@pytest.mark.parametrize(
    "option", [["--length", "96"], ["--supervised", "0"], ["--batches", "1", "-2"], ["--output", "/no/such/x.md"]]
)
def test_bad_arguments_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        benchmark.arguments(["--small", *option])
    assert "--" + option[0].lstrip("-") in capsys.readouterr().err.splitlines()[-1]
