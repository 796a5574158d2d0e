"""The drawn scenes: right answers, honest splits, equal bytes from equal seeds."""

import hashlib
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dataprocess import scenes
from dataprocess.scenes import (
    CELLS,
    CHINESE,
    DIGIT,
    HELD_OUT,
    LANGUAGES,
    SPLITS,
    Thing,
    caption,
    draw_scene,
    handwriting,
    paint,
    questions,
    split_of,
    twin,
    word,
)
from dataset.record import read_records

SCENE = (Thing(0, "red", "circle"), Thing(4, "blue", "circle"), Thing(8, "red", DIGIT, 7))


def answers(scene, language):
    return {(q.type, q.text): q.answer for q in questions(scene, random.Random(0), language)}


def test_answers_of_a_scene_are_those_a_person_would_give():
    english = answers(SCENE, "en")
    assert english["colour", "What color is northwest?"] == "red"
    assert english["colour", "What color is center?"] == "blue"
    assert english["shape", "What shape is blue?"] == "circle"
    assert english["position", "Where is blue?"] == "center"
    assert english["position", "Where is the digit?"] == "southeast"
    assert english["digit", "What digit is there?"] == "7"
    assert english["count", "How many objects?"] == "3"
    assert english["existence", "Is there a red circle?"] == "yes"
    assert caption(SCENE, "en") == "red circle northwest, blue circle center, red 7 southeast"
    assert caption(SCENE, "zh") == "红色圆形左上,蓝色圆形中间,红色7右下"
    chinese = answers(SCENE, "zh")
    assert chinese["position", "蓝色在哪里?"] == "中间"
    assert chinese["digit", "是什么数字?"] == "7"


def test_no_question_is_ambiguous():
    english = answers(SCENE, "en")
    assert ("shape", "What shape is red?") not in english  # two red objects
    assert ("position", "Where is the circle?") not in english  # two circles
    rng = random.Random(1)
    for _ in range(200):
        scene = draw_scene(rng, "train")
        for language in LANGUAGES:
            found = {}
            for question in questions(scene, rng, language):
                assert found.setdefault(question.text, question.answer) == question.answer


@pytest.mark.parametrize("language", LANGUAGES)
def test_existence_is_affirmed_as_often_as_denied(language):
    rng = random.Random(2)
    counts = Counter(
        question.answer
        for _ in range(300)
        for question in questions(draw_scene(rng, "train"), rng, language)
        if question.type == "existence"
    )
    yes, no = (CHINESE[word] if language == "zh" else word for word in ("yes", "no"))
    assert set(counts) == {yes, no} and counts[yes] == counts[no]


def test_denied_pairs_do_not_occur():
    rng = random.Random(3)
    for _ in range(300):
        scene = draw_scene(rng, "train")
        present = {f"Is there a {thing.colour} {thing.shape}?" for thing in scene}
        for question in questions(scene, rng, "en"):
            if question.type == "existence":
                assert (question.text in present) == (question.answer == "yes")


def test_a_layout_belongs_to_one_split():
    rng = random.Random(4)
    drawn = {split: {draw_scene(rng, split) for _ in range(300)} for split in SPLITS}
    for split in SPLITS:
        assert all(split_of(scene) == split for scene in drawn[split])
    for scene in drawn["train"] | drawn["validation"] | drawn["test"]:
        assert not any((thing.colour, thing.shape) in HELD_OUT for thing in scene)
    for scene in drawn["compositional"]:
        assert any((thing.colour, thing.shape) in HELD_OUT for thing in scene)


def test_held_out_pairs_are_not_named_in_training():
    rng = random.Random(8)
    names = [(word(colour, "zh") + word(shape, "zh"), f"{colour} {shape}") for colour, shape in HELD_OUT]
    for _ in range(300):
        scene = draw_scene(rng, "train")
        for language in LANGUAGES:
            text = " ".join([caption(scene, language), *(q.text for q in questions(scene, rng, language))])
            assert not any(name in text for pair in names for name in pair)


def test_every_held_out_colour_and_shape_is_seen_apart_in_training():
    rng = random.Random(5)
    things = {(thing.colour, thing.shape) for _ in range(500) for thing in draw_scene(rng, "train")}
    for colour, shape in HELD_OUT:
        assert any(thing[0] == colour for thing in things) and any(thing[1] == shape for thing in things)


def test_split_of_does_not_depend_on_the_process():
    code = "from dataprocess.scenes import *; print(split_of((Thing(0, 'red', 'circle'), Thing(8, 'red', 'digit', 7))))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == split_of((Thing(0, "red", "circle"), Thing(8, "red", DIGIT, 3)))


def test_handwriting_of_training_is_not_that_of_testing():
    for digit in range(10):
        train, test = ({piece.tobytes() for piece in handwriting(split)[digit]} for split in ("train", "test"))
        assert len(train) > 100 and len(test) > 20
        assert not train & test


def test_twins_differ_in_little_and_stay_in_training():
    rng = random.Random(6)
    for _ in range(200):
        scene = draw_scene(rng, "train")
        other = twin(scene, rng)
        assert other != scene and len(other) == len(scene) and split_of(other) == "train"
        assert len({thing.cell for thing in other}) == len(other)
        assert len(set(scene) - set(other)) <= 2


def test_pictures_show_the_objects_in_their_cells():
    picture = np.asarray(paint((Thing(4, "blue", "square"),), random.Random(7), "train")).astype(int)
    dark = (picture.max(-1) - picture.min(-1)) > 60
    rows, columns = np.nonzero(dark)
    assert 32 <= rows.min() and rows.max() < 64 and 32 <= columns.min() and columns.max() < 64
    red, _, blue = picture[dark].mean(0)
    assert blue > red + 80


def test_each_word_is_in_the_list_that_the_tokenizer_learns():
    listed = set(scenes.words())
    for english, chinese in CHINESE.items():
        assert {english, f" {english}", chinese} <= listed


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write(folder: Path, seed: int) -> Path:
    scenes.write_scenes(folder, seed, dict.fromkeys(SPLITS, 12), texts=30, copies=20, turns=3)
    return folder


def test_compositional_questions_turn_on_held_out_pairs_affirmed_as_often_as_denied():
    rng, counts = random.Random(9), Counter()
    for index in range(300):
        scene = draw_scene(rng, "compositional")
        for record in scenes.test_records(str(index), "compositional", scene, rng):
            question, answer = (turn["content"] for turn in record["messages"])
            assert record["meta"]["type"] not in ("count", "digit")
            if record["meta"]["type"] == "existence":
                counts[answer] += 1
                colour, shape = question.removesuffix("?").split()[-2:] if "there" in question else (None, None)
                assert colour is None or (colour, shape) in HELD_OUT
    assert counts["yes"] + counts["no"] == 300 and 110 < counts["yes"] < 190 and 110 < counts["是"] < 190


def test_files_are_whole_records_and_a_function_of_the_seed(tmp_path):
    first = write(tmp_path / "a", 0)
    assert digests(first) == digests(write(tmp_path / "b", 0)) != digests(write(tmp_path / "c", 1))
    for split in SPLITS:
        records = list(read_records(first / f"{split}.parquet"))
        assert {path for record in records for path in record["images"]} == {f"{split}/{i:05d}.png" for i in range(12)}
        assert all((first / "images" / path).exists() for record in records for path in record["images"])
    test = list(read_records(first / "test.parquet"))
    assert all(len(record["messages"]) == 2 for record in test)
    assert {record["meta"]["num_objects"] for record in test} == {1, 2, 3, 4}
    assert {record["meta"]["language"] for record in test} == set(LANGUAGES)
    for record in read_records(first / "copy.parquet"):
        assert record["messages"][1]["content"] == record["messages"][0]["content"] * 2
    assert all(not record["images"] for record in read_records(first / "text.parquet"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    run = subprocess.run(
        [sys.executable, "-m", "dataprocess.scenes", "--output", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 1 and "holds no drawn scenes" in run.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_drawing_needs_no_torch():
    code = "import sys, dataprocess.scenes; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_cells_are_named_in_reading_order():
    assert [CELLS[i] for i in (0, 2, 4, 6, 8)] == ["northwest", "northeast", "center", "southwest", "southeast"]
