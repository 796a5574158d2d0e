"""Answers to a few validation records while a model learns: `answers.jsonl`, and nothing else is any different."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cache_features import fill
from config import ConfigError
from dataset.record import write_records
from evaluation.answering import evaluate
from model import GREEDY, MultiModalModel
from tests.conftest import Tiny
from tests.test_train import make_trainer, trajectory, weights
from tests.training.launch import launch
from train import train
from training.answers import Answers
from training.devices import Devices

RUN = ("max_steps=6", "eval_steps=2", "save_steps=2", "lora_lr=3e-3")


def answers_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory) -> Path:
    """A run that is asked about three records."""
    folder = tmp_path_factory.mktemp("asked") / "run"
    train(tiny.config(folder, *RUN, f"validation={tiny.folder}/validation.parquet", "answers=3"))
    return folder


def test_answers_are_written_at_each_validation_and_before_the_first_step(tiny, reference):
    lines = answers_in(reference)
    assert [line["step"] for line in lines] == [step for step in (0, 2, 4, 6) for _ in range(3)]
    assert all(line.keys() == {"step", "id", "source", "question", "reference", "answer"} for line in lines)
    assert len({line["id"] for line in lines}) == 3
    assert [line["id"] for line in lines[:3]] == [line["id"] for line in lines[9:]]
    records = {record["id"]: record for record in Tiny.records(5)}
    for line in lines:
        messages = records[line["id"]]["messages"]
        assert line["reference"] == messages[-1]["content"]
        assert line["question"] == "\n".join(message["content"] for message in messages[:-1])


def test_answers_are_those_of_the_evaluation(tiny, reference):
    last = {line["id"]: line["answer"] for line in answers_in(reference)[9:]}
    model = MultiModalModel.from_pretrained(reference)
    records = [record for record in Tiny.records(5) if record["id"] in last]
    evaluate(model, records, tiny.folder / "images", conditions=["real"], max_new_tokens=128,
             output=reference / "evaluation")  # fmt: skip
    lines = (reference / "evaluation/rows.jsonl").read_text().splitlines()
    said = {line["id"]: line["conditions"]["real"]["answer"] for line in map(json.loads, lines)}
    assert said == last and GREEDY["do_sample"] is False


def test_the_run_is_bit_for_bit_that_without_answers(tiny, reference, tmp_path):
    train(tiny.config(tmp_path / "run", *RUN, f"validation={tiny.folder}/validation.parquet"))
    assert trajectory(tmp_path / "run") == trajectory(reference)
    assert all(torch.equal(weights(tmp_path / "run")[name], tensor) for name, tensor in weights(reference).items())
    assert not (tmp_path / "run" / "answers.jsonl").exists()


def test_steps_that_are_done_again_are_not_written_twice(tiny, reference, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(reference / "checkpoint-2", folder / "checkpoint-2")
    for name in ("config.yaml", "answers.jsonl"):
        shutil.copy(reference / name, folder)
    with (folder / "answers.jsonl").open("a") as file:
        file.write('{"step": 6, "id": "r')  # killed while it wrote
    train(tiny.config(folder, *RUN, f"validation={tiny.folder}/validation.parquet", "answers=3"))
    assert answers_in(folder) == answers_in(reference)
    # What is asked may change from one part of a run to the next.
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "trainer_state.json").unlink()
    train(tiny.config(folder, *RUN, f"validation={tiny.folder}/validation.parquet", "answers=1"))
    assert [line["step"] for line in answers_in(folder)] == [0] * 3 + [2] * 3 + [4] * 3 + [6]
    (folder / "trainer_state.json").unlink()
    train(tiny.config(folder, *RUN, f"validation={tiny.folder}/validation.parquet", "answers=1", "overwrite=true"))
    assert [line["step"] for line in answers_in(folder)] == [0, 2, 4, 6]


def test_sources_take_turns_and_what_can_not_be_asked_is_left_out(tiny, tmp_path):
    records = Tiny.records(12)
    names = {3: "rare", 8: "rare", 5: "silent", 6: "broken"}
    for number, record in enumerate(records):
        record["source"] = names.get(number, "much")
    records[5]["messages"].append({"role": "user", "content": "And?"})
    records[6]["images"] = ["gone.png"]
    write_records(records, tmp_path / "validation.parquet")
    trainer = make_trainer(tiny.config(tmp_path / "run", f"validation={tmp_path}/validation.parquet", "answers=5"))
    chosen = trainer.answers.questions
    assert [q.source for q in chosen[:4]].count("rare") == 2 and len({q.question.id for q in chosen}) == 5
    assert {q.source for q in chosen} == {"rare", "much"}
    again = Answers(trainer.eval_dataset, 5, trainer.config.train.seed, tmp_path)
    other = Answers(trainer.eval_dataset, 5, 7, tmp_path)
    everything = Answers(trainer.eval_dataset, 100, 7, tmp_path)
    assert [q.index for q in again.questions] == [q.index for q in chosen] != [q.index for q in other.questions]
    assert len(everything.questions) == 10


def test_cached_features_give_the_same_answers(tiny, tmp_path):
    lines = []
    for cache in ("null", tmp_path / "cache"):
        config = tiny.config(tmp_path, f"validation={tiny.folder}/validation.parquet", "answers=4",
                             f"feature_cache={cache}")  # fmt: skip
        if lines:
            fill(config)
        trainer = make_trainer(config)
        trainer.model.train()
        lines.append(trainer.answers.ask(trainer.model, trainer.accelerator, 0))
        assert trainer.model.training and not trainer.model.encoder.training
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_two_processes_share_the_questions(tiny, tmp_path):
    settings = [f"validation={tiny.folder}/validation.parquet", "answers=3", "dropout=0", "max_steps=2",
                "logging_steps=2", "eval_steps=2"]  # fmt: skip
    train(tiny.config(tmp_path / "one", *settings, "per_device_train_batch_size=4"))
    statuses, output = launch(tiny.arguments(tmp_path / "two", *settings), processes=2)
    assert statuses == [0, 0], output
    one, two = answers_in(tmp_path / "one"), answers_in(tmp_path / "two")
    assert one[:3] == two[:3] and [line["id"] for line in one] == [line["id"] for line in two]


def test_without_validation_or_a_whole_model_it_is_refused(tiny, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="train.answers is a number of records of data.validation, got 3 and no data"):
        tiny.config(tmp_path, "answers=3")
    create = Devices.create_accelerator_and_postprocess

    def divided(trainer):
        create(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(Devices, "create_accelerator_and_postprocess", divided)
    with pytest.raises(ConfigError, match="train.answers needs the whole model in each process"):
        make_trainer(tiny.config(tmp_path, f"validation={tiny.folder}/validation.parquet", "answers=3"))
