"""The stages that make tokenizer, tower and decoder from nothing, at a tiny size."""

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn

from config import ConfigError, load_config
from dataprocess import moving, scenes
from dataset.record import read_records
from dataset.template import encode_record
from model.contrastive import recall_at_1
from model.decoder import load_decoder
from model.tokenizer import load_tokenizer
from pretrain import decoder, loop, tokenizer, tower
from qwen import MultimodalQWenLMHeadModel, QWenTokenizer
from visual import build_encoder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    scenes.write_scenes(folder, 0, dict.fromkeys(scenes.SPLITS, 4), texts=40, copies=110, turns=2)
    return folder


@pytest.fixture(scope="module")
def tokens(drawn):
    folder = drawn.parent / "tokenizer"
    tokenizer.make_tokenizer(tokenizer.TokenizerConfig(scenes=[str(drawn)], output=str(folder)))
    return folder


def test_each_content_word_is_one_token_wherever_it_stands(tokens):
    tok = QWenTokenizer.from_pretrained(tokens)
    for english, chinese in scenes.CHINESE.items():
        for word in (english, f" {english}", chinese):
            assert len(tok.encode_plain(word)) == 1, word
    for record in [*read_records(tokens.parent / "scenes" / "text.parquet")]:
        for turn in record["messages"]:
            pieces = [tok.decode([i]) for i in tok.encode_plain(turn["content"])]
            assert "".join(pieces) == turn["content"]  # no token ends inside a character
            for chinese in scenes.CHINESE.values():
                if chinese in turn["content"] and len(chinese) > 1:
                    assert chinese in pieces or f"是什么{chinese}" in pieces


def test_other_text_survives_the_small_tokenizer(tokens):
    tok = QWenTokenizer.from_pretrained(tokens)
    for text in ("Grüße, 世界! 🎈", "def f(x):\n\treturn x", ""):
        assert tok.decode(tok.encode_plain(text)) == text


def test_muon_gets_the_matrices_of_the_layers_and_nothing_else(tokens):
    config = decoder.DecoderConfig(scenes="", tokenizer="", output="", hidden_size=16, num_layers=1, num_heads=2)
    model = decoder.build(config, QWenTokenizer.from_pretrained(tokens))
    muon, adam = loop.optimizers(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    assert matrices == {f"transformer.h.0.{part}.weight" for part in parts}
    others = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert others | matrices == set(names.values()) and not others & matrices


def test_learning_rate_warms_up_and_decays():
    config = loop.LoopConfig(steps=100, warmup_steps=10)
    factors = [loop._schedule(config)(step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and max(factors) <= 1
    assert factors[50] == pytest.approx(0.5) and factors[99] == pytest.approx(0.05)


def test_a_loss_that_is_not_finite_stops_the_loop():
    module = nn.Linear(2, 2)
    with pytest.raises(FloatingPointError, match="Tower: loss nan in step 1"):
        loop.optimise(module, lambda step: module.weight.sum() * math.nan, loop.LoopConfig(steps=2), "Tower")


def tiny_decoder(drawn, tokens, output, **changes):
    return decoder.DecoderConfig(
        scenes=str(drawn), tokenizer=str(tokens), output=str(output), steps=6, batch_size=8, copy_steps=2,
        hidden_size=32, num_layers=1, num_heads=2, bf16=False, **changes,
    )  # fmt: skip


def test_decoder_stage_leaves_a_decoder_that_the_model_loads(drawn, tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoder, "TEST_CONVERSATIONS", 20)
    config = tiny_decoder(drawn, tokens, tmp_path / "decoder")
    decoder.main(config)
    metrics = json.loads((tmp_path / "decoder" / "metrics.json").read_text())
    assert metrics["config"]["steps"] == 6 and metrics["history"][-1]["step"] == 6
    assert {"copy", "colour", "count", "en", "zh"} <= set(metrics["reached"])
    model = MultimodalQWenLMHeadModel.from_pretrained(tmp_path / "decoder")
    tok = QWenTokenizer.from_pretrained(tmp_path / "decoder")
    assert model.config.vocab_size == len(tok)
    assert "expected at least" in capsys.readouterr().out

    before = {name: value.clone() for name, value in model.state_dict().items()}
    decoder.main(config)  # done already: nothing changes
    assert "is there already" in capsys.readouterr().out
    decoder.main(replace(config, output=str(tmp_path / "again")))
    again = MultimodalQWenLMHeadModel.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(before[name], again[name]) for name in before)
    with pytest.raises(ValueError, match="made with other settings:\n  steps: 6 -> 7"):
        decoder.main(replace(config, steps=7))


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_other_decoders_come_with_a_tokenizer_of_the_same_ids(drawn, tokens, tmp_path, monkeypatch, architecture):
    monkeypatch.setattr(decoder, "TEST_CONVERSATIONS", 20)
    decoder.main(tiny_decoder(drawn, tokens, tmp_path / "decoder", architecture=architecture))
    model = load_decoder(tmp_path / "decoder", "float32")
    ours, theirs = QWenTokenizer.from_pretrained(tokens), load_tokenizer(tmp_path / "decoder", architecture)
    assert model.config.model_type == architecture and len(theirs) == len(ours) == model.config.vocab_size
    assert (theirs.template, theirs.placeholder_id) == ("chatml", ours.placeholder_id)
    assert theirs.stop_ids == [ours.im_end_id]
    for record in read_records(drawn / "text.parquet"):
        assert encode_record(record, theirs, 0) == encode_record(record, ours, 0)


def test_conversations_about_clips_take_the_place_of_those_about_scenes(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(decoder, "TEST_CONVERSATIONS", 20)
    moving.write_moving(tmp_path / "moving", 0, dict.fromkeys(moving.SPLITS, 2), texts=60, turns=2)
    folders = [str(drawn), str(tmp_path / "moving")]
    tokenizer.make_tokenizer(tokenizer.TokenizerConfig(scenes=folders, output=str(tmp_path / "tokenizer")))
    tok = QWenTokenizer.from_pretrained(tmp_path / "tokenizer")
    for word in ("left", " left", "左", "vanishes", "消失", "circle", "圆形"):
        assert len(tok.encode_plain(word)) == 1, word
    decoder.main(tiny_decoder(drawn, tmp_path / "tokenizer", tmp_path / "decoder", moving=str(tmp_path / "moving")))
    reached = json.loads((tmp_path / "decoder" / "metrics.json").read_text())["reached"]
    assert {"copy", "all"} == set(reached)


def test_decoder_measure_counts_first_tokens_of_answers(drawn, tokens):
    tok = QWenTokenizer.from_pretrained(tokens)
    model = decoder.build(tiny_decoder(drawn, tokens, ""), tok).eval()
    sample = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, -100]}
    with torch.no_grad():
        predicted = model(torch.tensor([sample["input_ids"]])).logits[0].argmax(-1).tolist()
    assert decoder.correct(model, sample) == [[predicted[1] == 7, predicted[2] == 8]]


def test_copying_is_learned(drawn, tokens):
    """Training on sequences to copy lowers their loss well below that of guessing among all tokens."""
    config = tiny_decoder(drawn, tokens, "")
    config.steps, config.warmup_steps, config.batch_size = 80, 5, 16
    tok = QWenTokenizer.from_pretrained(tokens)
    model, losses = decoder.build(config, tok), []
    records = [record for record in read_records(drawn / "copy.parquet")]
    rng = random.Random(0)

    def loss_of_step(step):
        samples = [decoder.encode_record(rng.choice(records), tok, 0) for _ in range(config.batch_size)]
        rows = [{**sample, "pixel_values": None, "view_features": []} for sample in samples]
        loss = decoder.mean_loss(model, decoder.Collator(0)(rows))
        losses.append(loss.item())
        return loss

    loop.optimise(model, loss_of_step, config, "Copy")
    assert losses[0] > 0.9 * math.log(len(tok)) and losses[-1] < 0.75 * losses[0]


def test_tower_stage_leaves_a_tower_that_the_encoder_loads(tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(tower, "TEST_SCENES", 20)
    monkeypatch.setattr(tower, "PROBE_SCENES", 200)
    config = tower.TowerConfig(
        tokenizer=str(tokens), output=str(tmp_path / "tower"), steps=4, batch_size=8, hidden_size=32, num_layers=1,
        text_hidden_size=32, bf16=False,
    )  # fmt: skip
    tower.main(config)
    metrics = json.loads((tmp_path / "tower" / "metrics.json").read_text())
    assert {"recall at 1", "colour", "shape", "digit"} == set(metrics["reached"])
    encoder = build_encoder("clip", str(tmp_path / "tower"))
    assert (encoder.num_features, encoder.width) == (9, 32)
    picture = scenes.paint(scenes.draw_scene(random.Random(0), "test"), random.Random(0), "test")
    expected = tower.processor(48)([picture], return_tensors="pt").pixel_values
    assert torch.equal(encoder.preprocess([picture]), expected)
    assert encoder.preprocess([Image.new("RGB", (96, 96), "white")]).unique().tolist() == [1.0]


def test_a_batch_for_the_tower_is_distinct_training_layouts_in_twins():
    batch = tower.twin_groups(random.Random(0), 32, 4)
    assert len(set(batch)) == 32 and all(scenes.split_of(scene) == "train" for scene in batch)
    near = sum(len(set(batch[i]) - set(batch[i + 1])) <= 2 for i in range(31))
    assert near >= 16


def test_recall_at_1():
    texts = torch.eye(3)
    assert recall_at_1(texts, texts) == 1.0
    assert recall_at_1(texts[[1, 0, 2]], texts) == pytest.approx(1 / 3)


def test_a_folder_of_something_else_is_not_overwritten(tokens, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="has no metrics.json"):
        tower.main(tower.TowerConfig(tokenizer=str(tokens), output=str(tmp_path / "out")))


def test_keys_of_a_stage_are_checked():
    with pytest.raises(ConfigError, match="did you mean steps"):
        load_config(["stepz=3"], decoder.DecoderConfig)
    with pytest.raises(ConfigError, match="no value for .*tokenizer"):
        load_config(["steps=3"], tower.TowerConfig)
    assert load_config(["--scenes", "a", "output=b"], tokenizer.TokenizerConfig).output == "b"
