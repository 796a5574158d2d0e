"""Memory does not follow the vocabulary, the fit finds what it is given, and the command writes both."""

import json

import numpy as np
import pytest

from benchmarks import scaling
from model import loss


def test_memory_is_flat_where_the_peer_grows(tmp_path, in_process, capsys, monkeypatch):
    in_process(scaling)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 2**13)
    output = tmp_path / "results.md"
    sizes = ["--vocabularies", "1024", "8192", "--tokens", "128"]
    command = ["--small", "--threads", "1", "--parts", "memory", *sizes, "--output", str(output)]
    assert scaling.main(command) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    beyond = {(line["worker"], line["vocabulary"]): line["beyond"] for line in lines}
    assert beyond["kanjian", 8192] < 1.1 * beyond["kanjian", 1024]
    assert beyond["llava", 8192] - beyond["llava", 1024] > 2 * 128 * (8192 - 1024) * 4
    assert "| 8,192 | " in output.read_text()


def test_time_is_fitted(tmp_path, in_process):
    in_process(scaling)
    output = tmp_path / "results.md"
    command = ["--small", "--threads", "1", "--parts", "time", "--lengths", "64", "96", "--output", str(output)]
    assert scaling.main(command) == 0
    text = output.read_text()
    assert len([line for line in text.splitlines() if line.startswith(("| 64 | ", "| 96 | "))]) == 6
    assert "R^2" in text


def test_the_fit_finds_the_numbers_that_made_the_times():
    args = scaling.arguments(["--small"])
    seconds = [0.1 + 0.001 * (length - labels) + 0.005 * labels for length, labels in scaling.cases(args)]
    coefficients, foreseen, r2 = scaling.fit(args, seconds, 3)
    assert coefficients == pytest.approx([0.1, 0.001, 0.005])
    assert foreseen == pytest.approx(np.array(seconds)) and r2 == pytest.approx(1)
    bent = [second + 1e-5 * length**2 for second, (length, _) in zip(seconds, scaling.cases(args), strict=True)]
    assert scaling.fit(args, bent, 3)[2] < scaling.fit(args, bent, 4)[2] == pytest.approx(1)
