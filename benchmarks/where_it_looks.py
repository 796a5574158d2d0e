"""Do the maps of `looking` point at the object that a question asks about? A number for each kind of map.

    python -m benchmarks.where_it_looks                      # the test split of the default run, all methods
    python -m benchmarks.where_it_looks --split validation --methods occlusion --fills mean surround grey blur

Asked are all questions of the split that turn on exactly one object of the drawn scenes (colour, shape, position,
digit, and whether there is a colour and shape that there is once; no counts, no denials). Of validation pictures, whose
records are conversations, such questions are made. The model's own answer is explained, its end token included. Where
objects are is known from drawing the pictures again; that these are the pictures and questions of the data set is
checked.

    hit          the middle of the map's largest cell lies in the square that the object is painted in
    tolerant     it lies in it or within half a patch of the encoder
    chance       the share of all cells whose middle would be a hit
    any object   the hits of a map that finds some object, without reading the question
    mass         the share that cells with a hit have of all that is positive in the map

Of cells that are equally large the first counts. Intervals are 95 %, from a bootstrap over pictures
(`evaluation.statistics`): questions about one picture are not independent.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from tqdm import tqdm

from benchmarks.decoders import RUN, SCENES, print_table
from dataprocess.scenes import paint_with_boxes, start_of, test_questions, test_records
from dataset.files import write_text
from dataset.record import read_records
from dataset.template import encode_prompt
from evaluation.metrics import normalise
from evaluation.statistics import Resampled
from looking import METHODS, Map, explain
from looking.draw import save
from model import GREEDY, MultiModalModel
from visual import load_image

Square = tuple[float, float, float, float]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Asked:
    """A question about one object, and where that is in the picture, of `objects` in all."""

    record: dict
    box: Square
    objects: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, default=RUN)
    parser.add_argument("--data", type=Path, default=SCENES, help="folder that dataprocess.scenes wrote")
    parser.add_argument("--seed", type=int, default=0, help="with which it was written")
    parser.add_argument("--split", choices=("validation", "test", "compositional"), default="test")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--fills", nargs="+", default=["mean"], help="of occlusion (default: %(default)s)")
    parser.add_argument("--windows", nargs="+", default=["1"], help="of occlusion, in patches; 1+2: of both sizes")
    parser.add_argument("--strides", nargs="+", type=float, default=[1], help="of occlusion, in patches")
    parser.add_argument("--limit", type=int, help="only the first pictures")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--sheet", type=Path, help="PNG file: some questions with their maps, and the first miss")
    arguments = parser.parse_args()
    asked = questions_about_one(arguments.data, arguments.split, arguments.seed, arguments.limit)
    model = MultiModalModel.from_pretrained(arguments.checkpoint_path)
    settings = [(method, {}) for method in arguments.methods if method != "occlusion"]
    if "occlusion" in arguments.methods:
        windows = [tuple(map(float, window.split("+"))) for window in arguments.windows]
        settings = [("occlusion", {"fill": fill, "window": window, "stride": stride})
                    for fill in arguments.fills for window in windows for stride in arguments.strides
                    if min(window) >= stride] + settings  # fmt: skip
    found = measure(model, asked, arguments.data / "images", settings)
    report = {"split": arguments.split, "n": len(asked), "maps": [summary(*one) for one in found]}
    print(f"{len(asked)} questions about {len({str(one.record['images']) for one in asked})} pictures of "
          f"{arguments.split}, {100 * np.mean(found[0][1]['right']):.1f} % answered rightly")  # fmt: skip
    names = ("hit", "tolerant", "chance", "any object", "mass")
    print_table(("map", *names), [(one["name"], *(percent(one[name]) for name in names)) for one in report["maps"]])
    groups = report["maps"][0]["groups"]
    rows = [(group, str(groups[group]["n"]), *(f"{100 * one['groups'][group]['value']:.1f}" for one in report["maps"]))
            for group in groups]  # fmt: skip
    print()
    print_table(("hits", "questions", *(one["name"] for one in report["maps"])), rows)
    if arguments.output:
        write_text(json.dumps(report, indent=2) + "\n", arguments.output)
    if arguments.sheet:
        examples = examples_of(asked, found[0][1]["hit"])
        draw_sheet(model, examples, arguments.data / "images", ("occlusion", "rollout"), arguments.sheet)


def questions_about_one(data: Path, split: str, seed: int, limit: int | None) -> list[Asked]:
    """The questions of a split that ask about one object, those of the first `limit` pictures.

    Raises:
        ValueError: the data set was not drawn with this seed.
    """
    held = {record["id"]: record["messages"] for record in read_records(data / f"{split}.parquet")}
    asked = []
    for file in sorted((data / "images" / split).iterdir())[:limit]:
        rng, scene = start_of(split, int(file.stem), seed)
        picture, boxes = paint_with_boxes(scene, rng, split)
        before = rng.getstate()
        questions = test_questions(split, scene, rng)
        rng.setstate(before)
        records = list(test_records(file.stem, split, scene, rng))
        with Image.open(file) as found:
            same = picture.tobytes() == found.convert("RGB").tobytes()
        if not same or split != "validation" and any(held.get(one["id"]) != one["messages"] for one in records):
            raise ValueError(f"{file}, or its questions, are not what --seed {seed} draws; give the seed of the data")
        for record, question in zip(records, questions.values(), strict=True):
            if question.thing is not None:
                asked.append(Asked(record, boxes[scene.index(question.thing)], len(scene)))
    return asked


def measure(model: MultiModalModel, asked: list[Asked], images: Path, settings: list[tuple[str, dict]]) -> list[tuple]:
    """(method and its settings, name of a figure or grouping -> array with an entry per question) of each setting."""
    columns = [defaultdict(list) for _ in settings]
    half = model.encoder.image_size[0] / model.encoder.grid[0] / 2
    for one in tqdm(asked, desc="looking", unit="question", disable=None):
        path, picture, views, prompt, ids, said = answered(model, one, images)
        right = normalise(said) == normalise(one.record["messages"][-1]["content"])
        for (method, options), column in zip(settings, columns, strict=True):
            found = explain(model, prompt, [views], ids, method, **options)[0]
            column["right"].append(right)
            column["picture"].append(path)
            column["type"].append(one.record["meta"]["type"])
            column["objects"].append(f"{one.objects} object{'s' * (one.objects > 1)}")
            column["any object"].append(1 / one.objects)
            for name, value in pointing(found, picture.size, one.box, half).items():
                column[name].append(value)
    arrays = [{name: np.array(values) for name, values in column.items()} for column in columns]
    return list(zip(settings, arrays, strict=True))


def answered(model: MultiModalModel, one: Asked, images: Path) -> tuple:
    """(path, picture, views, prompt, ids of the greedy answer with its end, its text)."""
    path = one.record["images"][0]
    picture = load_image(images / path)
    views = model.media.load_image(picture)
    prompt = encode_prompt(one.record["messages"][:-1], model.tokenizer, [sum(views.features)], model.system)
    ids = model.generate([prompt], pixel_values=views.pixel_values, max_new_tokens=16, **GREEDY)[0].tolist()
    return path, picture, views, prompt, ids, model.tokenizer.decode(ids, skip_special_tokens=True)


def examples_of(asked: list[Asked], hits: np.ndarray) -> list[Asked]:
    """Of each type an English question about a picture of at least three objects, the first of another picture each."""
    found, shown = {}, set()
    for one in asked:
        meta, picture = one.record["meta"], one.record["images"][0]
        if meta["language"] == "en" and one.objects > 2 and meta["type"] not in found and picture not in shown:
            found[meta["type"]] = one
            shown.add(picture)
    missed = [one for one, hit in zip(asked, hits, strict=True) if not hit]
    # The first miss, in English if there is one, stands beside them.
    return [*found.values(), *sorted(missed, key=lambda one: one.record["meta"]["language"])[:1]]


def draw_sheet(
    model: MultiModalModel, examples: list[Asked], images: Path, methods: Sequence[str], file: Path
) -> None:
    """A column for each question: its picture with the object's square, and the maps."""
    figure = Figure(figsize=(2 * len(examples), 2.2 * (1 + len(methods)) + 0.3), layout="constrained")
    axes = figure.subplots(1 + len(methods), len(examples), squeeze=False)
    for column, one in zip(axes.T, examples, strict=True):
        _, picture, views, prompt, ids, said = answered(model, one, images)
        question = one.record["messages"][0]["content"].removeprefix("<image>\n")
        column[0].set_title(f"{question}\n{said}", fontsize=9)
        column[0].imshow(picture)
        left, top, right, bottom = one.box
        square = {"width": right - left, "height": bottom - top, "fill": False, "edgecolor": "black", "linestyle": ":"}
        column[0].add_patch(Rectangle((left - 0.5, top - 0.5), **square))
        for axis, method in zip(column[1:], methods, strict=True):
            axis.imshow(explain(model, prompt, [views], ids, method)[0].draw(picture))
            axis.set_title(method, fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    save(figure, file)


def pointing(found: Map, size: tuple[int, int], box: Square, half_patch: float) -> dict[str, float]:
    """How a map stands to the object in `box`, in pixels of a picture of `size`; `half_patch` in pixels of a view."""
    place = found.place(size)
    rows, columns = found.values.shape
    x = place.left + (np.arange(columns) + 0.5) * place.size[0] / columns
    y = place.top + (np.arange(rows) + 0.5) * place.size[1] / rows
    margin = half_patch * place.size[0] / found.plane.size[0]
    inside = _within(y, box[1], box[3])[:, None] & _within(x, box[0], box[2])[None, :]
    near = (_within(y, box[1] - margin, box[3] + margin)[:, None]
            & _within(x, box[0] - margin, box[2] + margin)[None, :])  # fmt: skip
    positive = found.values.clip(min=0)
    return {
        "hit": float(inside[found.peak]),
        "tolerant": float(near[found.peak]),
        "chance": float(inside.mean()),
        "mass": float(positive[inside].sum() / max(positive.sum(), 1e-12)),
    }


def _within(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return (values >= low) & (values <= high)


def summary(setting: tuple[str, dict], column: dict[str, np.ndarray]) -> dict:
    """Means with intervals of a method's figures."""
    method, options = setting
    title = method
    if options:
        window = "+".join(f"{one:g}" for one in options["window"])
        title = f"{method}, {options['fill']}, window {window}, stride {options['stride']:g}"
    pictures, names = column["picture"], ("hit", "tolerant", "mass")
    resampled = Resampled({name: column[name] for name in names}, pictures)
    figures = {name: resampled.share(name) for name in names}
    figures |= {name: {"value": float(column[name].mean())} for name in ("chance", "any object")}
    groups = {}
    for grouping in (column["type"], column["objects"], np.where(column["right"], "answered rightly", "wrongly")):
        for kind in sorted(set(grouping.tolist())):
            rows = grouping == kind
            share = Resampled({"hit": column["hit"][rows]}, pictures[rows]).share("hit")
            groups[kind] = {**share, "n": int(rows.sum())}
    return {"name": title, "method": method, "options": options, **figures, "groups": groups}


def percent(figure: dict[str, float]) -> str:
    """A share, with its interval if it has one."""
    value, *ends = (f"{100 * figure[name]:.1f}" for name in ("value", "low", "high") if name in figure)
    return f"{value} [{', '.join(ends)}]" if ends else value


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"where_it_looks: {error}")
