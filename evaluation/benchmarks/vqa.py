"""Questions with short free answers: VQAv2, GQA, TextVQA."""

import sys
from collections.abc import Iterator
from typing import Any

from dataset.json_files import JsonBuffer, json_items, json_lists
from evaluation.benchmarks.entries import Files, field, most_frequent, record, texts

VQAV2_TYPES = ("answer_type", "question_type")
BLANK = " "  # an empty answer: records have no empty texts, and every metric strips it


def vqav2(files: Files) -> Iterator[dict]:
    """`v2_OpenEnded_mscoco_val2014_questions.json` and `v2_mscoco_val2014_annotations.json` of visualqa.org.

    `{"data_subtype": "val2014", "questions": [{"image_id": 262148, "question", "question_id": 262148000}]}` and
    `{"annotations": [{"question_id", "question_type", "answer_type", "multiple_choice_answer",
    "answers": [{"answer", "answer_confidence", "answer_id"}, ... ten]}]}`. An image is
    `COCO_<data_subtype>_<image_id, twelve digits>.jpg`. Annotations of questions that are not asked are passed over.
    """
    answered = _vqav2_answers(files)
    subtype = _top_level_text(files.data, "data_subtype")
    for number, (_, entry) in enumerate(json_lists(files.data, ["questions"])):
        where = f"{files.data}, questions[{number}]"
        question_id = field(entry, "question_id", int, where)
        if question_id not in answered:
            problem = f"question_id {question_id} has no annotation in {files.annotations}"
            raise ValueError(f"{where}: {problem}; are both files of the same part of VQAv2?")
        answer, answers, answer_type, question_type = answered[question_id]
        yield record(
            files.name(question_id),
            "vqav2",
            f"COCO_{subtype}_{field(entry, 'image_id', int, where):012d}.jpg",
            field(entry, "question", str, where),
            files.suffix["en"],
            answer,
            references=list(answers),
            metric="vqa",
            answer_type=answer_type,
            question_type=question_type,
        )


def _vqav2_answers(files: Files) -> dict[int, tuple[str, tuple[str, ...], str, str]]:
    """question_id -> (most frequent answer, all answers, answer_type, question_type).

    There are millions of answers, but few different ones: `sys.intern` keeps one copy of each.
    """
    answered = {}
    for number, (_, entry) in enumerate(json_lists(files.annotations, ["annotations"])):
        where = f"{files.annotations}, annotations[{number}]"
        question_id = field(entry, "question_id", int, where)
        if question_id in answered:
            raise ValueError(f"{where}: question_id {question_id} has an annotation already; remove one of them")
        given = field(entry, "answers", list, where)
        if not given:
            raise ValueError(f"{where}: expected people's answers under 'answers', got an empty list")
        answers = tuple(sys.intern(_answer(one, f"{where}, answers[{place}]")) for place, one in enumerate(given))
        best, *types = (field(entry, key, str, where) for key in ("multiple_choice_answer", *VQAV2_TYPES))
        answered[question_id] = (sys.intern(best), answers, *map(sys.intern, types))
    return answered


def _answer(given: Any, where: str) -> str:
    """The text of one of the ten. Somebody may have typed nothing; it counts as one of the ten all the same."""
    blank = isinstance(given, dict) and given.get("answer") == ""
    return BLANK if blank else field(given, "answer", str, where)


def _top_level_text(path: Any, key: str) -> str:
    """The text under a key of the object that a JSON file holds; what stands behind it is not read."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        buffer = JsonBuffer(file, path)
        buffer.expect("{", "")
        for found in buffer.keys():
            if found == key:
                return field({key: buffer.value()}, key, str, str(path))
            if buffer.peek() == "[":
                for _ in buffer.elements():  # not of use here, and perhaps long
                    pass
            else:
                buffer.value()
    raise ValueError(f"{path}: expected a text under {key!r}, which is not among its keys")


def gqa(files: Files) -> Iterator[dict]:
    """`testdev_balanced_questions.json` of the GQA download (and the other question files, balanced or not).

    `{"201307251": {"question", "imageId": "n161313", "answer": "no", "fullAnswer", "groups": {"global", "local"},
    "types": {"structural", "semantic", "detailed"}, ...}}`. An image is `<imageId>.jpg`.
    """
    for question_id, entry in json_items(files.data):
        where = f"{files.data}, question {question_id!r:.80}"
        types = field(entry, "types", dict, where)
        groups = entry.get("groups")
        yield record(
            files.name(question_id),
            "gqa",
            f"{field(entry, 'imageId', str, where)}.jpg",
            field(entry, "question", str, where),
            files.suffix["en"],
            field(entry, "answer", str, where),
            metric="exact",
            **{key: field(types, key, str, f"{where}, types") for key in ("structural", "semantic", "detailed")},
            group=groups.get("global") if isinstance(groups, dict) else None,
        )


def textvqa(files: Files) -> Iterator[dict]:
    """`TextVQA_0.5.1_val.json` of textvqa.org.

    `{"data": [{"question_id": 34602, "question", "image_id": "003a8ae2ef43b901", "answers": [ten], "set_name": "val",
    "flickr_original_url", ...}]}`. An image is `<image_id>.jpg`; those of "val" lie in `train_images/`.
    """
    for number, (_, entry) in enumerate(json_lists(files.data, ["data"])):
        where = f"{files.data}, data[{number}]"
        answers = texts(entry, "answers", where)
        yield record(
            files.name(field(entry, "question_id", int, where)),
            "textvqa",
            f"{field(entry, 'image_id', str, where)}.jpg",
            field(entry, "question", str, where),
            files.suffix["en"],
            most_frequent(answers),
            references=[answer or BLANK for answer in answers],
            metric="vqa",
        )
