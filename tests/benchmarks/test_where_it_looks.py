"""Where objects of the drawn scenes are, and when a map points at one."""

import dataclasses

import numpy as np
import pytest

from benchmarks.where_it_looks import pointing, questions_about_one, summary
from dataprocess import scenes as drawn  # not its functions by name: some begin with test_
from dataprocess.scenes import paint_with_boxes, start_of
from dataset.record import write_records
from looking.geometry import Box


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Eight pictures of the test split, drawn with seed 3, and their records."""
    folder, records = tmp_path_factory.mktemp("scenes"), []
    (folder / "images" / "test").mkdir(parents=True)
    for index in range(8):
        rng, scene = start_of("test", index, 3)
        paint_with_boxes(scene, rng, "test")[0].save(folder / "images" / "test" / f"{index:05d}.png")
        records += drawn.test_records(f"{index:05d}", "test", scene, rng)
    write_records(records, folder / "test.parquet")
    return folder


def test_boxes_are_where_objects_are_painted():
    """Outside of all boxes there is but the background, and in each of them something else."""
    for index in range(12):
        rng, scene = start_of("test", index, 0)
        image, boxes = paint_with_boxes(scene, rng, "test")
        pixels, background = np.asarray(image).astype(int), np.ones((96, 96), dtype=bool)
        for thing, (left, top, right, bottom) in zip(scene, boxes, strict=True):
            assert left // 32 == (right - 1) // 32 == thing.cell % 3
            assert top // 32 == (bottom - 1) // 32 == thing.cell // 3
            background[top:bottom, left:right] = False
            assert np.ptp(pixels[top:bottom, left:right], axis=(0, 1)).max() > 50
        assert np.ptp(pixels[background], axis=0).max() == 0


def test_questions_about_one_object(scenes):
    asked = questions_about_one(scenes, "test", 3, None)
    kinds = {one.record["meta"]["type"] for one in asked}
    assert kinds == {"colour", "shape", "position", "digit", "existence"}
    for one in asked:
        kind, answer = one.record["meta"]["type"], one.record["messages"][-1]["content"]
        assert kind != "existence" or answer in ("yes", "是")
        rng, scene = start_of("test", int(one.record["id"][5:10]), 3)
        _, boxes = paint_with_boxes(scene, rng, "test")
        question = drawn.test_questions("test", scene, rng)[one.record["meta"]["language"], kind]
        thing = scene[boxes.index(one.box)]
        assert question.thing == thing and one.objects == len(scene)
        said = {"color": thing.colour, "shape": thing.shape}
        for name, value in said.items():
            if f"What {name} is" in question.text:
                assert answer == value
        if kind == "existence" and one.record["meta"]["language"] == "en":
            assert question.text == f"Is there a {thing.colour} {thing.shape}?"
            assert sum((other.colour, other.shape) == (thing.colour, thing.shape) for other in scene) == 1
    assert {one.record["id"][:10] for one in questions_about_one(scenes, "test", 3, 2)} == {"test/00000", "test/00001"}


def test_another_seed_is_noticed(scenes):
    with pytest.raises(ValueError, match=r"00000\.png, or its questions, are not what --seed 0 draws"):
        questions_about_one(scenes, "test", 0, None)


@dataclasses.dataclass
class _Map:
    """What `pointing` reads of a map over the whole of a picture of 96 x 96 pixels, a view of 48 x 48."""

    values: np.ndarray

    @property
    def peak(self):
        return tuple(int(i) for i in np.unravel_index(self.values.argmax(), self.values.shape))

    @property
    def plane(self):
        return dataclasses.make_dataclass("Plane", ["size"])((48, 48))

    def place(self, size):
        return Box(0, 0, *size)


@pytest.mark.parametrize(
    ("peak", "hit", "tolerant"), [((0, 1), 1, 1), ((0, 2), 0, 0), ((2, 1), 0, 0), ((1, 1), 0, 0)]
)
def test_hits_of_a_map_of_three_by_three(peak, hit, tolerant):
    values = np.full((3, 3), -1.0)
    values[peak] = 3.0
    values[0, 1] = max(values[0, 1], 1.0)
    found = pointing(_Map(values), (96, 96), (34, 4, 60, 30), half_patch=8)
    assert (found["hit"], found["tolerant"]) == (hit, tolerant)
    assert found["chance"] == pytest.approx(1 / 9) and found["mass"] == (1.0 if hit else 0.25)


def test_half_a_patch_is_tolerated():
    """Of six cells a side, each 16 pixels wide: the object is at 40 to 60, and half a patch are 16 pixels."""
    for column, hit, tolerant in ((0, 0, 0), (1, 0, 1), (2, 1, 1), (3, 1, 1), (4, 0, 1), (5, 0, 0)):
        values = np.zeros((6, 6))
        values[2, column] = 1.0
        found = pointing(_Map(values), (96, 96), (40, 40, 60, 60), half_patch=8)
        assert (found["hit"], found["tolerant"]) == (hit, tolerant), column
        assert found["chance"] == pytest.approx(4 / 36)


def test_intervals_are_over_pictures():
    """Ten questions about each picture are as good as one."""
    hits, pictures = np.repeat([0.0, 1.0, 1.0, 1.0], 10), np.repeat(np.arange(4), 10)
    column = {name: hits for name in ("hit", "tolerant", "chance", "any object", "mass")}
    column |= {"right": hits > 0, "type": np.full(40, "a"), "objects": np.full(40, "1 object")}
    clustered, single = (
        summary(("rollout", {}), {**column, "picture": own})["hit"] for own in (pictures, np.arange(40))
    )
    assert clustered["value"] == single["value"] == 0.75
    assert clustered["high"] - clustered["low"] > 2 * (single["high"] - single["low"])


def test_summary_groups_by_type_objects_and_correctness():
    column = {
        "hit": np.array([1.0, 0.0, 1.0, 1.0]), "type": np.array(["a", "a", "b", "b"]),
        "objects": np.array(["1 object", "2 objects"] * 2), "right": np.array([True, True, True, False]),
        "picture": np.array(["p", "q", "r", "s"]),
    }  # fmt: skip
    column |= {name: column["hit"] for name in ("tolerant", "chance", "any object", "mass")}
    found = summary(("occlusion", {"fill": "mean", "window": (0.5, 1.0), "stride": 0.5}), column)
    assert found["name"] == "occlusion, mean, window 0.5+1, stride 0.5" and found["hit"]["value"] == 0.75
    groups = {name: (own["value"], own["n"]) for name, own in found["groups"].items()}
    assert groups == {
        "a": (0.5, 2), "b": (1.0, 2), "1 object": (1.0, 2), "2 objects": (0.5, 2),
        "answered rightly": (pytest.approx(2 / 3), 3), "wrongly": (1.0, 1),
    }  # fmt: skip
