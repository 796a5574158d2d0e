"""Evaluation of clips: each condition is what its name says."""

import json

import pytest
import torch

from build import build_model
from dataset.template import encode_prompt
from evaluation.answering import evaluate
from evaluation.order import CONDITIONS, reordered
from tests.visual.clips import write_clip


@pytest.fixture(scope="module")
def model(tiny):
    torch.manual_seed(0)
    built = build_model(tiny.config("unused", "media.frames=4", "frame_pooling=2", "projector.init_std=1").model)
    return built.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_clip(folder / f"{number}.mp4", frames=10 + 20 * number)
    return folder


def record(number: int) -> dict:
    turns = [{"role": "user", "content": "<video>\nWhat happens?"}, {"role": "assistant", "content": "red"}]
    return {
        "id": str(number), "source": "s", "images": [], "videos": [f"{number % 3}.mp4"], "audios": [],
        "messages": turns, "meta": {"type": "event"},
    }  # fmt: skip


def test_conditions_on_clips(model, folder, tmp_path):
    records = [record(number) for number in range(6)]
    report = evaluate(model, records, folder, max_new_tokens=4, output=tmp_path / "out")
    assert tuple(report["conditions"]) == CONDITIONS and "gain_over_reordered" in report["looking"]
    answers = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    prompt = encode_prompt(record(0)["messages"][:1], model.tokenizer, 4 * model.media.frame_features)
    own, others = {}, {}
    for number in range(3):
        views = model.media.load("video", folder / f"{number}.mp4")
        assert len(views.features) == 4
        own[f"{number}.mp4"] = model.encode_images(views.pixel_values, views.features).split(views.features)
    for answer in answers:
        frames = own[answer["videos"][0]]
        expected = {
            "real": torch.cat(frames),
            "blind": torch.zeros_like(torch.cat(frames)),
            "reordered": torch.cat(reordered(list(frames), f"0 {answer['id']}")),
        }
        for condition, features in expected.items():
            ids = model.generate([prompt], features=features, max_new_tokens=4, do_sample=False)
            expected_answer = model.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
            assert answer["conditions"][condition]["answer"] == expected_answer
        others[answer["videos"][0]] = answer["conditions"]["shuffled"]["answer"]
        assert answer["conditions"]["shuffled"]["videos"] != answer["videos"]
    real = {answer["videos"][0]: answer["conditions"]["real"]["answer"] for answer in answers}
    assert set(others.values()) <= set(real.values())


def test_an_order_of_frames_is_never_the_real_one():
    for seed in range(50):
        assert reordered([1, 2], str(seed)) == [2, 1]
        order = reordered(list(range(8)), str(seed))
        assert sorted(order) == list(range(8)) != order
    assert reordered([1], "x") == [1]


def test_a_clip_needs_a_second_one_to_be_shuffled(model, folder):
    with pytest.raises(ValueError, match="all records show 0.mp4; the condition 'shuffled' needs a second video"):
        evaluate(model, [record(0), {**record(0), "id": "b"}], folder, conditions=CONDITIONS)
    report = evaluate(model, [record(0)], folder, conditions=["real", "reordered"], max_new_tokens=2)
    assert report["conditions"] == ["real", "reordered"]


def test_images_have_no_order_of_frames(model, tiny):
    report = evaluate(model, tiny.records(4), tiny.folder / "images", max_new_tokens=2)
    assert report["conditions"] == list(CONDITIONS[:3])
    with pytest.raises(ValueError, match="record 'r0' shows no clip; leave the condition 'reordered' out"):
        evaluate(model, tiny.records(4), tiny.folder / "images", conditions=["reordered"])
