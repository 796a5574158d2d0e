"""The drawn clips: right answers, honest splits, and nothing but the motion that tells what happens."""

import hashlib
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

from dataprocess import moving
from dataprocess.moving import (
    CHINESE,
    DIRECTIONS,
    EVENTS,
    LANGUAGES,
    SPLITS,
    Clip,
    Figure,
    description,
    draw_clip,
    paint,
    questions,
    split_of,
    write_clip,
)
from dataprocess.scenes import HELD_OUT
from dataprocess.shapes import COLOURS, SHAPES
from dataset.record import read_records

CIRCLE, SQUARE = Figure("red", "circle", 0.8, 0.5), Figure("blue", "square", 0.1, 0.1)
CLIP = Clip("moves", CIRCLE, SQUARE, "right", "green", 0.4, 9, 4)


def answers(clip: Clip, language: str = "en") -> dict[str, str]:
    asked = [question for seed in range(20) for question in questions(clip, random.Random(seed), language)]
    return {question.text: question.answer for question in asked}


def test_answers_of_a_clip_are_those_a_person_would_give():
    assert answers(CLIP) == {
        "Which way does it move?": "right", "What happens?": "moves", "What color moves?": "red",
        "What shape moves?": "circle",
    }  # fmt: skip
    assert answers(replace(CLIP, still=None, direction="up"), "zh") == {"它往哪边移动?": "上", "发生了什么?": "移动"}
    changes = {"What happens?": "changes", "What color was it?": "red", "What color is it now?": "green"}
    assert answers(replace(CLIP, event="changes")) == changes
    for event in ("appears", "vanishes", "nothing"):
        assert answers(replace(CLIP, event=event)) == {"What happens?": event}


def test_descriptions():
    moments = [f"blue square northwest, red circle {place}" for place in ("east", "center", "center", "center")]
    assert description(replace(CLIP, direction="left"), "en") == "; ".join(moments)
    alone = replace(CLIP, still=None)
    assert description(replace(alone, event="appears"), "zh") == "没有;没有;红色圆形右边;红色圆形右边"
    assert description(replace(alone, event="vanishes"), "en") == "red circle east; red circle east; nothing; nothing"
    changed = description(replace(alone, event="changes"), "en")
    assert changed == "red circle east; red circle east; green circle east; green circle east"


def test_descriptions_tell_the_answer():
    """Every move crosses into another third, step by step, so that the order of the places tells its sense."""
    rng = random.Random(0)
    for _ in range(500):
        clip = draw_clip(rng, "train")
        if clip.event == "moves":
            ticks = [round(moment * (clip.frames - 1) / 3) for moment in range(4)]
            axis = "x" if DIRECTIONS[clip.direction][0] else "y"
            thirds = [int(3 * getattr(clip.figures(tick)[-1], axis)) for tick in ticks]
            steps = {(after - before) % 3 for before, after in zip(thirds, thirds[1:], strict=False)}
            assert steps == {0, sum(DIRECTIONS[clip.direction]) % 3}
        else:
            seen = [clip.figures(round(moment * (clip.frames - 1) / 3)) for moment in range(4)]
            assert (seen[0] == seen[-1]) == (clip.event == "nothing")


def ink(image) -> np.ndarray:
    """[96, 96] bool: where there is a shape."""
    pixels = np.asarray(image).astype(int)
    return pixels.max(-1) - pixels.min(-1) > 60


def test_frames_show_what_happens():
    alone = replace(CLIP, still=None)
    for direction, (x, y) in DIRECTIONS.items():
        frames = paint(replace(alone, direction=direction, subject=Figure("red", "circle", 0.5, 0.5)), random.Random(0))
        assert len(frames) == 9 and frames[0].size == (96, 96)
        places = [np.array(np.nonzero(ink(frame))[::-1]).mean(1) for frame in frames]
        way = (places[-1] - places[0]) / 72
        assert np.allclose(way, (0.4 * x, 0.4 * y), atol=0.04)
        assert (np.diff(places, axis=0) @ (x, y) > 0).all()
    areas = [ink(frame).sum() for frame in paint(replace(alone, event="appears"), random.Random(0))]
    assert set(areas[:4]) == {0} and min(areas[4:]) > 100
    areas = [ink(frame).sum() for frame in paint(replace(alone, event="vanishes"), random.Random(0))]
    assert min(areas[:4]) > 100 and set(areas[4:]) == {0}
    frames = [np.asarray(frame) for frame in paint(replace(alone, event="nothing"), random.Random(0))]
    assert all((frame == frames[0]).all() for frame in frames)
    frames = paint(replace(alone, event="changes"), random.Random(0))
    colours = [np.asarray(frame)[ink(frame)].mean(0).argmax() for frame in frames]
    assert colours == [0] * 4 + [1] * 5  # red, then green
    assert (ink(frames[0]) == ink(frames[-1])).mean() > 0.99


def test_figures_are_whole_in_every_frame():
    rng = random.Random(1)
    for _ in range(30):
        clip = replace(draw_clip(rng, "train"), event="moves", still=None)
        areas = [ink(frame).sum() for frame in paint(clip, random.Random(0))]
        assert len(set(areas)) == 1


# What may not tell the answer


def drawn(count: int, seed: int, event: str | None = None, split: str = "train") -> list[Clip]:
    rng, clips = random.Random(seed), []
    while len(clips) < count:
        clip = draw_clip(rng, split)
        if event in (None, clip.event):
            clips.append(clip)
    return clips


def figure_features(figure: Figure | None) -> list[float]:
    if figure is None:
        return [-1] * 4
    return [list(COLOURS).index(figure.colour), SHAPES.index(figure.shape), figure.x, figure.y]


def first_frame(clip: Clip) -> list[float]:
    """All that is to be seen in the first frame, and the length of the clip."""
    return [*figure_features(clip.figures(0)[-1]), *figure_features(clip.still), clip.frames]


def accuracy(features: list, labels: list, model=None) -> float:
    """On the second half, of a classifier trained on the first."""
    half = len(labels) // 2
    model = HistGradientBoostingClassifier(max_iter=60, random_state=0) if model is None else model
    model.fit(np.array(features[:half]), labels[:half])
    return float((model.predict(np.array(features[half:])) == np.array(labels[half:])).mean())


def at_chance(reached: float, chance: float, count: int) -> bool:
    """Within four standard deviations; `count` is that of both halves."""
    return abs(reached - chance) < 4 * (chance * (1 - chance) / (count / 2)) ** 0.5


def test_first_frame_tells_little_of_the_direction():
    clips = drawn(4000, 0, "moves")
    labels = [clip.direction for clip in clips]
    assert 0.35 < accuracy([first_frame(clip) for clip in clips], labels) < 0.5
    ends = [first_frame(clip) + figure_features(clip.figures(clip.frames - 1)[-1]) for clip in clips]
    assert accuracy(ends, labels) > 0.8  # this classifier is able to see it in first and last frame


def test_pixels_of_the_first_frame_tell_no_more():
    clips = drawn(1200, 1, "moves")
    pixels, labels = [], [clip.direction for clip in clips]
    for number, clip in enumerate(clips):
        frame = paint(replace(clip, frames=2), random.Random(number))[0]
        pixels.append(np.asarray(frame.resize((16, 16))).ravel())
    model = RandomForestClassifier(60, random_state=0)
    assert accuracy(pixels, labels, model) < 0.5


def test_frames_without_order_tell_the_axis_and_not_the_sense():
    clips = drawn(4000, 2, "moves")
    features = []
    for clip in clips:
        places = sorted((figure.x, figure.y) for tick in range(clip.frames) for figure in clip.figures(tick)[-1:])
        picked = [places[round(k * (len(places) - 1) / 7)] for k in range(8)]
        features.append([*np.ravel(picked), *figure_features(clip.still), clip.frames])
    axis = [DIRECTIONS[clip.direction][0] != 0 for clip in clips]
    sense = [sum(DIRECTIONS[clip.direction]) > 0 for clip in clips]
    assert accuracy(features, axis) > 0.98
    for of_axis in (True, False):
        chosen = [index for index, value in enumerate(axis) if value == of_axis]
        reached = accuracy([features[i] for i in chosen], [sense[i] for i in chosen])
        assert at_chance(reached, 0.5, len(chosen))


def test_first_frame_does_not_tell_which_of_two_moves():
    clips = [clip for clip in drawn(5000, 3, "moves") if clip.still]
    swap = random.Random(0)
    features, labels = [], []
    for clip in clips:
        label = swap.random() < 0.5
        pair = [clip.subject, clip.still] if label else [clip.still, clip.subject]
        features.append([value for figure in pair for value in figure_features(figure)])
        labels.append(label)
    assert at_chance(accuracy(features, labels), 0.5, len(clips))
    frames = [paint(clip, random.Random(number))[0] for number, clip in enumerate(clips[:40])]
    below = [paint(replace(clip, event="nothing"), random.Random(n))[0] for n, clip in enumerate(clips[:40])]
    assert 0 < sum(one != other for one, other in zip(frames, below, strict=True)) < 40  # where they overlap, either


def test_moments_do_not_tell_appearing_from_vanishing():
    shares = {
        event: np.mean([sum(bool(clip.figures(t)) for t in range(clip.frames)) / clip.frames for clip in clips])
        for event in ("appears", "vanishes")
        if (clips := [clip for clip in drawn(600, 4, event) if not clip.still])
    }
    assert abs(shares["appears"] - shares["vanishes"]) < 0.04
    changes = Counter((clip.subject.colour, clip.later_colour) for clip in drawn(800, 5, "changes"))
    assert all(abs(n - changes[after, before]) < 6 * n**0.5 for (before, after), n in changes.items())


def test_the_first_frame_of_a_file_knows_nothing_of_the_others(tmp_path):
    def decoded(direction: str) -> bytes:
        file = tmp_path / f"{direction}.mp4"
        clip = replace(CLIP, direction=direction, subject=Figure("red", "circle", 0.5, 0.5))
        write_clip(paint(clip, random.Random(0)), 6, file)
        with av.open(str(file)) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24").tobytes()

    assert len({decoded(direction) for direction in DIRECTIONS}) == 1


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_equally_frequent(split):
    rng, counts = random.Random(6), {"direction": Counter(), "event": Counter()}
    for _ in range(2000):
        for question in questions(draw_clip(rng, split), rng, "en"):
            if question.type in counts:
                counts[question.type][question.answer] += 1
    for kind, names in (("direction", DIRECTIONS), ("event", EVENTS)):
        expected = counts[kind].total() / len(names)
        assert set(counts[kind]) == set(names)
        assert all(abs(count - expected) < 4 * expected**0.5 for count in counts[kind].values()), counts


# Splits and files


def test_a_layout_belongs_to_one_split():
    clips = {split: drawn(400, 7, split=split) for split in SPLITS}
    layouts = {split: {clip.layout for clip in clips[split]} for split in SPLITS}
    assert not layouts["train"] & layouts["test"] and not layouts["train"] & layouts["validation"]
    assert not layouts["validation"] & layouts["test"]
    for clip in sum(clips.values(), []):
        figures = {figure for tick in range(clip.frames) for figure in clip.figures(tick)}
        assert not {(figure.colour, figure.shape) for figure in figures} & HELD_OUT
    for clip in clips["test"]:  # whatever happens, and to whichever
        other = replace(clip, subject=clip.still or clip.subject, still=clip.still and clip.subject, direction="up")
        assert clip.event == "changes" or split_of(other) == "test"
    for split in SPLITS:
        assert {bool(clip.still) for clip in clips[split]} == {True, False}


def test_each_word_is_in_the_list_that_a_tokenizer_learns():
    listed = set(moving.words())
    for english in (*DIRECTIONS, *EVENTS, *COLOURS, *SHAPES):
        assert {english, f" {english}", CHINESE[english]} <= listed
    assert all(any(text in piece for piece in listed) for text in ("What happens?", "它往哪边移动?", " nothing"))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write(folder: Path, seed: int) -> Path:
    moving.write_moving(folder, seed, dict.fromkeys(SPLITS, 12), texts=30, turns=3)
    return folder


def test_files_are_whole_records_and_a_function_of_the_seed(tmp_path):
    first = write(tmp_path / "a", 0)
    assert digests(first) == digests(write(tmp_path / "b", 0)) != digests(write(tmp_path / "c", 1))
    lengths, rates = set(), set()
    for split in SPLITS:
        records = list(read_records(first / f"{split}.parquet"))
        paths = {path for record in records for path in record["videos"]}
        assert paths == {f"{split}/{i:05d}.mp4" for i in range(12)}
        for path in paths:
            with av.open(str(first / "clips" / path)) as container:
                rates.add(container.streams.video[0].average_rate)
                lengths.add(sum(1 for _ in container.decode(video=0)))
    assert lengths <= set(range(8, 17)) and len(lengths) > 4 and len(rates) > 3
    test = list(read_records(first / "test.parquet"))
    assert all(len(record["messages"]) == 2 and set(record["meta"]) >= {"type", "language"} for record in test)
    assert {record["meta"]["language"] for record in test} == set(LANGUAGES)
    assert all(not record["videos"] for record in read_records(first / "text.parquet"))
    text = (first / "words.txt").read_text(encoding="utf-8")
    assert text.splitlines() == moving.words()


def test_clips_without_libx264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    frames = paint(CLIP, random.Random(0))
    write_clip(frames, 5, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
        decoded = [frame.to_image() for frame in container.decode(video=0)]
    assert len(decoded) == 9
    for frame, original in zip(decoded, frames, strict=True):
        assert np.abs(np.asarray(frame).astype(int) - np.asarray(original)).mean() < 3


@pytest.mark.parametrize("module", ["moving", "scenes"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, module):
    (tmp_path / "words.txt").write_text("mine")
    command = [sys.executable, "-m", f"dataprocess.{module}", "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1 and "holds no drawn" in run.stderr
    assert (tmp_path / "words.txt").read_text() == "mine"


def test_drawing_needs_no_torch():
    code = "import sys, dataprocess.moving; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
