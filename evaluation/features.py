"""Feature vectors of the images and clips that questions show, under each condition."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from dataset.record import RecordError
from dataset.shards import open_medium
from evaluation.order import reordered
from evaluation.questions import Medium, Question
from model import MultiModalModel
from visual.media import Views

FEATURE_BYTES = 2**30  # features held at a time; more media than fit are worked off in chunks
MOST_MEDIA = 1024  # in a chunk, so that the first answers don't wait for all pictures
ENCODE_BATCH = 32  # images or clips that go through the encoder at once
LOADERS = min(8, os.cpu_count() or 1)  # threads that open pictures while the encoder works


def check_media(questions: Sequence[Question], root: str | Path) -> None:
    """Raises FileNotFoundError, which names the record, where the file of an image or a clip is missing."""
    seen = set()
    for q in questions:
        for medium in q.media:
            if medium not in seen:
                seen.add(medium)
                file = open_medium(root, medium[1])
                if isinstance(file, Path) and not file.is_file():
                    problem = f"there is no {medium[0]} {file}; check the folder of the pictures (--image_root)"
                    raise FileNotFoundError(f"record {q.id!r}: {problem}")


def media_per_chunk(model: MultiModalModel, clips: bool) -> int:
    """Media whose features `[n, H]` fit in `FEATURE_BYTES`, if all were as large as the larger kind."""
    embeddings = model.language_model.get_input_embeddings().weight
    most = max(most_features(model, kind) for kind in ("image", "video")[: 1 + clips])
    return min(max(1, FEATURE_BYTES // (most * embeddings.shape[1] * embeddings.element_size())), MOST_MEDIA)


def most_features(model: MultiModalModel, kind: str) -> int:
    """How many features an image or a clip has at most."""
    if kind == "image":
        return model.media.num_features * (1 + model.media.spec["max_tiles"])
    return model.media.frame_features * model.media.spec["frames"]


def feature_count(model: MultiModalModel, medium: Medium, root: str | Path, owner: str) -> int:
    """How many features a medium has; what can't be read raises an error that names the record `owner`."""
    try:
        return sum(model.media.features(medium[0], open_medium(root, medium[1])))
    except (OSError, ValueError) as error:
        raise _named(error, owner) from error


@torch.inference_mode()
def encode(
    model: MultiModalModel, media: list[Medium], root: str | Path, questions: Sequence[Question] = ()
) -> dict[Medium, list[Tensor]]:
    """(kind, path) -> features of each of its views, `[n, H]`, on the model's device.

    Args:
        questions: among which an error looks for the record that shows a medium.
    """
    features = {}
    parts = [media[start : start + ENCODE_BATCH] for start in range(0, len(media), ENCODE_BATCH)]
    for part, views in zip(parts, _loaded(model, parts, root, questions), strict=True):
        counts = [count for one in views for count in one.features]
        pixel_values = torch.cat([one.pixel_values for one in views])
        encoded = iter(model.encode_images(pixel_values.to(model.device), counts).split(counts))
        for medium, one in zip(part, views, strict=True):
            features[medium] = list(islice(encoded, len(one.features)))
    return features


def _loaded(
    model: MultiModalModel, parts: list[list[Medium]], root: str | Path, questions: Sequence[Question]
) -> Iterator[list[Views]]:
    """Views of each part's media; those of the next one are opened meanwhile."""

    def load(medium: Medium) -> Views:
        try:
            return model.media.load(medium[0], open_medium(root, medium[1]))
        except (OSError, ValueError) as error:
            raise _named(error, next((q.id for q in questions if medium in q.media), None)) from error

    model.media.preprocess  # noqa: B018  read once, before the threads would
    pool = ThreadPoolExecutor(LOADERS)
    try:
        waiting = [pool.submit(load, medium) for medium in parts[0]] if parts else []
        for number in range(len(parts)):
            current, following = waiting, parts[number + 1 : number + 2]
            waiting = [pool.submit(load, medium) for part in following for medium in part]
            yield [future.result() for future in current]
    finally:
        pool.shutdown(cancel_futures=True)


def _named(error: Exception, owner: str | None) -> Exception:
    """The error with the record that shows the medium in front."""
    if owner is None:
        return error
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else RecordError
    return kind(f"record {owner!r}: {error}")


def features_of(
    q: Question, condition: str, features: dict[Medium, list[Tensor]], substitute: dict[Medium, Medium], seed: int
) -> list[Tensor]:
    """Features `[n, H]` of each image and clip of a question under a condition."""
    found = []
    for medium in q.media:
        views = features[substitute[medium] if condition == "shuffled" else medium]
        if condition == "reordered" and medium[0] == "video":
            views = reordered(views, f"{seed} {q.id}")
        elif condition == "blind":
            views = [torch.zeros_like(view) for view in views]
        found.append(torch.cat(views))
    return found
