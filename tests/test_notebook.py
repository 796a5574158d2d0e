"""notebooks/evaluate.ipynb runs from its first cell to its last, and its figures are those of the scripts."""

import json
import math
import random
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

from dataset.record import read_records, write_records
from dataset.template import encode_record
from evaluate import evaluate
from looking import METHODS
from model import MultiModalModel
from train import train
from visual import load_image

FILE = Path(__file__).parents[1] / "notebooks" / "evaluate.ipynb"
FIGURES = """
print(json.dumps({"score": report["score"], "example": example["id"], "probability": probability,
                  "log_p": log_p.tolist(), "maps": {name: one.values.tolist() for name, one in maps.items()},
                  "compared": [run["score"]["value"] for run in comparison["runs"]]}))
"""


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebook") / "run"
    train(tiny.config(folder, "max_steps=30", "save_steps=15", "per_device_train_batch_size=4", "dropout=0"))
    return folder


@pytest.fixture(scope="module")
def executed(checkpoint, tiny) -> nbformat.NotebookNode:
    """The notebook after a run on the tiny experiment, with a last cell that prints its figures."""
    write_records(tiny.records(24), checkpoint.parent / "test.parquet")
    notebook = nbformat.read(FILE, as_version=4)
    notebook.cells.append(new_code_cell(FIGURES))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FILE.parent}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KANJIAN_RUN", str(checkpoint))
        patch.setenv("KANJIAN_DATA", str(checkpoint.parent / "test.parquet"))
        patch.setenv("KANJIAN_IMAGES", str(tiny.folder / "images"))
        patch.setenv("KANJIAN_LIMIT", "20")
        patch.setenv("KANJIAN_SHOWN", "3")
        return client.execute()


@pytest.fixture(scope="module")
def figures(executed) -> dict:
    return json.loads(output_of(executed.cells[-1], "stdout"))


def output_of(cell: nbformat.NotebookNode, name: str) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == name)


def test_is_stored_without_outputs():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


def test_every_cell_ran_and_shows_what_it_announces(executed, checkpoint):
    cells = {cell.id: cell for cell in executed.cells if cell.cell_type == "code"}
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    shown = {name: {mime for output in cell.outputs for mime in output.get("data", {})} for name, cell in cells.items()}
    assert all("image/png" in shown[name] for name in ("chart", "where", "layers", "curves"))
    page = "".join(output.data["text/html"] for output in cells["pictures"].outputs)
    assert page.count("<img") == 3 and "What colour is it?" in page
    assert all(f"{condition}: <span" in page for condition in ("real", "blind", "shuffled"))
    assert all(text in output_of(cells["accuracy"], "stdout") for text in ("real minus blind", "looking score"))
    assert "occlusion  peaks in row" in output_of(cells["where"], "stdout")
    assert "other: " + str(checkpoint / "checkpoint-15") in output_of(cells["compare"], "stdout")


def test_scores_are_those_of_evaluate(figures, checkpoint, tiny):
    everything = read_records(checkpoint.parent / "test.parquet")
    records = [everything[index] for index in sorted(random.Random(0).sample(range(24), 20))]
    found = []
    for folder in (checkpoint, checkpoint / "checkpoint-15"):
        report = evaluate(MultiModalModel.from_pretrained(folder), records, tiny.folder / "images")
        found.append(report["score"])
    assert figures["score"] == found[0] and figures["score"]["n"] == 20
    assert figures["compared"] == [score["real"]["value"] for score in found]


def test_probability_is_that_of_the_training_loss(figures, checkpoint, tiny):
    """The loss of a conversation whose last answer alone is supervised is -log p per token."""
    model = MultiModalModel.from_pretrained(checkpoint)
    record = next(r for r in tiny.records(24) if r["id"] == figures["example"])
    sample = encode_record(record, model.tokenizer, model.encoder.num_features)
    end = max(i for i, label in enumerate(sample["labels"]) if label >= 0) + 1
    start = max(i for i, label in enumerate(sample["labels"][:end]) if label < 0) + 1
    labels = torch.full((1, len(sample["labels"])), -100)
    labels[0, start:end] = torch.tensor(sample["labels"][start:end])
    pixels = model.encoder.preprocess([load_image(tiny.folder / "images" / record["images"][0])])
    real = model.encode_images(pixels)
    expected = []
    for features in (real, real * 0):
        with torch.no_grad():
            loss = model(torch.tensor([sample["input_ids"]]), features=features, labels=labels).loss
        expected.append(-loss.item() * (end - start))
    assert figures["log_p"][:2] == pytest.approx(expected, abs=1e-4)
    assert figures["probability"]["zeroed"] == pytest.approx(math.exp(expected[1]), rel=1e-3, abs=0)
    assert abs(expected[0] - expected[1]) > 1e-2
    assert figures["maps"].keys() == METHODS.keys()
    assert all(np.shape(values) == model.encoder.grid for values in figures["maps"].values())
    assert all(np.any(figures["maps"][name]) for name in ("features", "attention", "rollout"))
