"""What the tests of sources share."""

import json
from pathlib import Path

from dataprocess.readers import read_source
from dataprocess.sources import Source
from dataset.record import RecordError

SHARED = Path(__file__).resolve().parents[3] / "shared"  # beside the repository; tests that need it skip without it
COCO_MINI = SHARED / "coco_mini"


class Reader:
    """`read(format, content, file name, **options) -> records and errors`; images lie in `<folder>/images`."""

    def __init__(self, folder: Path):
        self.folder, self.images = folder, str(folder / "images")

    def __call__(self, format: str, content, name: str = "file.json", seed: int = 0, **options) -> list:
        if isinstance(content, bytes):
            (self.folder / name).write_bytes(content)
        elif content is not None:
            (self.folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        options = {"images": self.images, **options}
        return list(read_source(Source(format, str(self.folder / name), name="src", **options), seed))


def dialogue(record: dict) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in record["messages"]]


def answers(results: list[dict]) -> list[str]:
    return [record["messages"][1]["content"] for record in results]


def faults(results: list) -> list[tuple[str, str]]:
    return [(error.reason, str(error)) for error in results if isinstance(error, RecordError)]


def talk(*values: str, **fields) -> dict:
    """A row of LLaVA's: turns of human and gpt, the human's first."""
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "x", **fields, "conversations": turns}
