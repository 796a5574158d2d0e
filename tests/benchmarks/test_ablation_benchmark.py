"""All rows of the ablation are the same training: equal losses where batches are equal, and a table of them."""

import json

import pytest
import torch

from benchmarks import ablation
from dataset.record import read_records

COMMAND = ["--small", "--threads", "1"]


def test_all_rows_learn_the_same(tmp_path, in_process, capsys):
    in_process(ablation)
    rows = ["peer", "naive", "supervised", "grouping", "packing", "bf16", "cached", "checkpointing"]
    output = tmp_path / "results.md"
    output.write_text("# before\n")
    assert ablation.main([*COMMAND, "--rows", *rows, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"row"')]
    found = {line["row"]: line for line in lines}
    for row in ("naive", "supervised"):
        assert found[row]["batches"] == found["peer"]["batches"]
        assert found[row]["losses"] == pytest.approx(found["peer"]["losses"], abs=1e-5)
        assert found[row]["loss"] == pytest.approx(found["peer"]["loss"], abs=1e-5)
    assert found["grouping"]["batches"] != found["peer"]["batches"]
    assert found["packing"]["positions"] < found["grouping"]["positions"]
    for row in ("packing", "bf16", "cached", "checkpointing"):
        assert found[row]["samples"] == found["peer"]["samples"] == 12
        assert found[row]["loss"] == pytest.approx(found["peer"]["loss"], abs=0.02)
    assert found["cached"]["losses"] == pytest.approx(found["bf16"]["losses"], abs=1e-3)
    assert found["peer"]["losses"][-1] < found["peer"]["losses"][0]

    text = output.read_text()
    assert text.startswith("# before\n\n# Ablation of a training step\n")
    titles = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert titles[1:] == [ablation.ROWS[row].title for row in rows]


def test_lengths_are_those_of_captions_and_long_answers(tmp_path):
    args = ablation.arguments([*COMMAND, "--folder", str(tmp_path), "--batch", "100", "--steps", "4"])
    made = ablation.write_experiment(args)
    records = read_records([tmp_path / ablation.TRAIN])
    lengths = torch.tensor([len(record["messages"][1]["content"].split()) + 1 for record in records])
    assert made["mean_answer"] == lengths.float().mean()
    short, long = lengths.sort().values.float().split(200)
    assert short.mean() == pytest.approx(ablation.SHORT, rel=0.15)
    assert long.mean() == pytest.approx(ablation.LONG, rel=0.15)


def test_other_losses_for_equal_batches_are_told():
    result = {"batches": [1, 2], "losses": [3.0, 2.0], "bf16": False}
    results = {
        "peer": dict(result), "naive": {**result, "losses": [3.0, 2.001]}, "grouping": {**result, "batches": [2]},
        "bf16": {**result, "losses": [3.1, 2.0], "bf16": True},
    }  # fmt: skip
    ablation.compare_losses(results)
    assert results["grouping"]["reference"] == "grouping"
    assert results["naive"]["difference"] == pytest.approx(1e-3)
    assert ablation.unequal(results) == [
        "**The losses of Kanjian, naive are not those of LLaVA + peft + Trainer.**",
    ]
