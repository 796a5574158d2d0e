"""Training on several sources by weight: shares in the log, exact resume, weights in files, and errors."""

import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from build import load_mixture
from config import ConfigError, load_config
from dataset.record import read_records, write_records
from train import main, train

WEIGHTS = "weights={colours: 1, text: 2, twice: 1}"


@pytest.fixture(scope="module")
def mixed(tiny, tmp_path_factory):
    """40 records of three sources: `colours` with images, `twice` with images and two turns, `text` without."""
    path = tmp_path_factory.mktemp("mixed") / "train.parquet"
    records = tiny.records(40)
    for record in records:
        record["source"] = "text" if not record["images"] else "twice" if len(record["messages"]) > 2 else "colours"
    assert Counter(record["source"] for record in records) == {"colours": 24, "twice": 11, "text": 5}
    write_records(records, path)
    return path


@pytest.fixture
def blocks(monkeypatch):
    """An epoch has several blocks."""
    monkeypatch.setattr("dataset.sampler.ONE_BLOCK", 8)
    monkeypatch.setattr("dataset.sampler.BLOCK", 12)
    monkeypatch.setattr("train.ONE_BLOCK", 8)


def logs_of(folder) -> list[dict]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("second", "runtime", "data_wait", "mfu", "memory", "train_loss")  # the last: since the process began
    return [{key: value for key, value in entry.items() if not any(word in key for word in timed)} for entry in log]


def test_shares_are_logged_and_a_resumed_run_draws_the_same(tiny, mixed, blocks, tmp_path):
    options = (f"data.train={mixed}", "validation=null", WEIGHTS, "batches=by_modality", "max_steps=27", "save_steps=5",
               "save_total_limit=null", "logging_steps=9", "per_device_train_batch_size=2",
               "gradient_accumulation_steps=2")  # fmt: skip
    whole = tmp_path / "whole"
    train(tiny.config(whole, *options))
    shares = {key: value for key, value in logs_of(whole)[-2].items() if key.startswith("share_")}
    # 20 of the 40 samples of an epoch are of `text`, which has 5: each is seen four times
    assert shares == pytest.approx({"share_colours": 0.25, "share_twice": 0.25, "share_text": 0.5}, abs=0.05)
    for step in (5, 10, 25):  # an epoch has 10 steps
        folder = tmp_path / f"from{step}"
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copy(whole / "config.yaml", folder)
        train(tiny.config(folder, *options))
        assert logs_of(folder) == logs_of(whole)
        for name in ("projector.safetensors", "adapter_model.safetensors"):
            one, other = load_file(folder / name), load_file(whole / name)
            assert all(torch.equal(one[key], other[key]) for key in other)


def test_epochs_of_a_named_source(tiny, mixed, tmp_path, capsys):
    options = (f"data.train={mixed}", "validation=null", WEIGHTS, "data.epoch=twice", "per_device_train_batch_size=4")
    trainer = train(tiny.config(tmp_path, *options, "max_steps=-1", "num_train_epochs=1"))
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["twice", "11", "11", "1.00"] in table and ["text", "5", "22", "4.40"] in table
    assert trainer.state.global_step == 44 / 4  # 11 samples of `twice` are a quarter of them
    assert dict(zip(trainer.sources, trainer.drawn.tolist(), strict=True)) == {"colours": 11, "twice": 11, "text": 22}


def test_weights_in_the_files_hold_unless_the_configuration_has_some(tiny, mixed, tmp_path):
    records = read_records(mixed)
    write_records(records, tmp_path / "weighted.parquet", {"colours": 1, "twice": 0, "text": 1})
    weighted = read_records(tmp_path / "weighted.parquet")
    plain = tiny.config(tmp_path)
    assert load_mixture(plain, records) is None
    assert load_mixture(plain, weighted).counts == {"colours": 15, "text": 14}
    assert load_mixture(tiny.config(tmp_path, WEIGHTS), weighted).counts == {"colours": 10, "twice": 10, "text": 20}
    assert load_mixture(tiny.config(tmp_path, "train_sampling_strategy=sequential"), weighted) is None
    only = weighted.select([index for index, record in enumerate(weighted) if record["source"] == "text"])
    assert load_mixture(plain, only).counts == {"text": 5}
    write_records([{**record, "source": "more"} for record in records], tmp_path / "z.parquet")
    with pytest.raises(ValueError, match="have weights for colours, text, twice, and none for more; set data.weights"):
        load_mixture(plain, read_records(tmp_path))
    even = load_mixture(tiny.config(tmp_path, "temperature=1000"), weighted)
    assert sorted(even.counts.values()) == [13, 13, 14]


def test_a_source_that_is_left_out_may_hold_what_can_not_be_learned(tiny, mixed, tmp_path):
    records = list(read_records(mixed))
    records[0]["messages"][0]["content"] += " really" * 300  # its answer lies behind max_length
    records[0]["source"] = "long"
    write_records(records, tmp_path / "train.parquet")
    options = (f"data.train={tmp_path}/train.parquet", "validation=null", "max_steps=2", "save_steps=1")
    weights = "weights={colours: 1, twice: 1, text: 1, long: %d}"
    train(tiny.config(tmp_path / "without", *options, weights % 0))
    with pytest.raises(ConfigError, match=r"none of its first 200 tokens .* is supervised.*data.on_bad_record=skip"):
        train(tiny.config(tmp_path / "with", *options, weights % 1))
    trainer = train(tiny.config(tmp_path / "skip", *options, weights % 1, "on_bad_record=skip"))
    assert trainer.train_dataset.skipped == ["r0"]


def test_a_faulty_record_of_a_long_epoch_ends_the_run_with_its_name(tiny, mixed, tmp_path, blocks, monkeypatch, capsys):
    records = list(read_records(mixed))
    records[0]["messages"][0]["content"] += " really" * 300
    write_records(records, tmp_path / "train.parquet")
    arguments = tiny.arguments(tmp_path / "run", f"data.train={tmp_path}/train.parquet", "validation=null",
                               "max_steps=-1", "num_train_epochs=1")  # fmt: skip
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    with pytest.raises(SystemExit, match=r"^train.py: record 'r0': none of its first 200 tokens"):
        main()
    assert "40 training records: they are encoded" in capsys.readouterr().out


def test_all_records_skipped_is_an_error(tiny, mixed, tmp_path):
    options = (f"data.train={mixed}", "validation=null", "max_length=2", "on_bad_record=skip")
    with pytest.raises(ConfigError, match="no record can be used: all of them were skipped"):
        train(tiny.config(tmp_path, *options))


@pytest.mark.parametrize(
    "options, message",
    [
        (["weights={colours: 1, twice: 1}"], "data.weights: no weight for text"),
        (["weights={color: 1, twice: 1, text: 1}"], r"there is no source 'color' \(did you mean 'colours'\?\)"),
        ([WEIGHTS, "temperature=2"], "data.weights or data.temperature"),
        (["data.epoch=colour"], r"data.epoch: 'colour' is neither 'total' nor"),
    ],
)
def test_settings_that_do_not_fit_the_sources(tiny, mixed, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train(tiny.config(tmp_path / "run", f"data.train={mixed}", "validation=null", *options))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "options, message",
    [
        (["weights={colours:1}"], r"data.weights expects a mapping of names to values \(float\) such as \{one: 2"),
        (["weights=3"], "data.weights expects a mapping of names to values"),
        ([WEIGHTS, "train_sampling_strategy=sequential"], "sequential keeps the order of the records: leave out"),
        (["batches=by_modality", "train_sampling_strategy=random"], "needs train.train_sampling_strategy=group_by"),
    ],
)
def test_settings_that_are_no_settings(tiny, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(tmp_path, *options)


def test_weights_in_yaml_extend_nothing_but_replace(tmp_path):
    (tmp_path / "base.yaml").write_text("data: {weights: {a: 1, b: 2}}\n")
    (tmp_path / "mine.yaml").write_text(
        "base: base.yaml\nmodel: {decoder: d, encoder: {path: e}}\ndata: {train: [t], weights: {c: 3}}\n"
        "train: {output_dir: o}\n"
    )
    assert load_config(["--config", str(tmp_path / "mine.yaml")]).data.weights == {"c": 3.0}
