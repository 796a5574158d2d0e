"""The three systems write the same tokens, and the command says how fast."""

import json

from benchmarks import generation


def test_all_systems_write_the_same(tmp_path, in_process, capsys):
    in_process(generation, questions=[1, 1, 3, 3])
    output = tmp_path / "results.md"
    command = ["--small", "--threads", "1", "--dtypes", "float32", "--batches", "1", "3", "--output", str(output)]
    assert generation.main(command) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [(line["batch"], line["system"]) for line in lines] == [
        (batch, system) for batch in (1, 3) for system in generation.SYSTEMS
    ]
    assert all(line["equal"] == 1 and 0 < line["first"] for line in lines)
    assert len([line for line in output.read_text().splitlines() if line.startswith("| Kanjian, Qwen-1 |")]) == 2
