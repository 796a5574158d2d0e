"""What scenes.yaml takes from a record, and its score: the exact match of evaluate.py."""

from pathlib import Path

from PIL import Image

from evaluation.metrics import exact

IMAGES = Path("data/scenes/images")


def pictures(record: dict) -> list[Image.Image]:
    return [Image.open(IMAGES / name) for name in record["images"]]


def question(record: dict) -> str:
    """The first turn, with `<image>` where a picture stands."""
    return record["messages"][0]["content"]


def answer(record: dict) -> str:
    return record["messages"][-1]["content"]


def score(record: dict, results: list[str]) -> dict[str, float]:
    return {"accuracy": exact(results[0], [answer(record)])}
