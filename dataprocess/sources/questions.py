"""Questions on images, with short answers."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from dataprocess.sources.source import Context, RowError, Source, as_list, exchanges, fill, text, within
from dataset.json_files import first_bracket, json_items
from dataset.rows import IMAGE_PLACEHOLDER, shown, stream_rows

IMAGE_AND_BREAK = re.compile(rf"\n?{IMAGE_PLACEHOLDER}\n?")


def a_okvqa(row: dict, context: Context) -> list[dict]:
    """`[{"image_id": 299207, "question", "choices": [4], "correct_choice_idx", "rationales": [3], "split", ...}]`

    A record per rationale: `The answer is X. Because ...`. The image is `<split>2017/%012d.jpg`, or in older copies
    `image`. Without `choices` X is the most frequent of `direct_answers`.
    """
    phrases, source = context.phrases(), context.source
    question, options = text(row["question"], "question"), as_list(row.get("choices"))
    if source.choices and options:
        question = fill(phrases["options"], question=question, options=", ".join(options))
    if isinstance(row.get("image"), str):
        image = row["image"]
    else:
        if not str(row["image_id"]).isdecimal():
            raise RowError(f"image_id must be a number, got {shown(row['image_id'])}")
        image = within(f"{row.get('split') or 'train'}2017", f"{int(row['image_id']):012d}.jpg", source)
    answer = right_answer(row, options)
    reasons = as_list(row.get("rationales"))
    # A reason that is no text stays what it is (see `exchanges`).
    answers = [
        fill(phrases["reason"], answer=answer, reason=reason.strip()) if isinstance(reason, str) else reason
        for reason in reasons
    ] or [fill(phrases["answer"], answer=answer)]
    return [
        exchanges([image], (fill(context.prompt(k), question=question), said))
        for k, said in enumerate(context.choose(answers))
    ]


def right_answer(row: dict, options: list) -> str:
    index = row.get("correct_choice_idx")
    if options and index is not None:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(options):
            raise RowError(f"correct_choice_idx must be one of 0 to {len(options) - 1}, got {shown(index)}")
        return text(options[index], "a choice").strip()
    answers = [text(answer, "a direct answer").strip() for answer in as_list(row.get("direct_answers"))]
    if not answers:
        raise RowError("neither correct_choice_idx nor direct_answers says the answer (a test split?)", "no answer")
    return Counter(answers).most_common(1)[0][0]


def ocr_vqa_rows(source: Source) -> Iterator[Any]:
    """`{<key>: row}` with the key under "key" in each row, or a list of rows."""
    if first_bracket(source.annotations) != "{":
        yield from stream_rows(source.annotations)
        return
    for key, row in json_items(source.annotations):
        yield {**row, "key": key} if isinstance(row, dict) else row


def ocr_vqa(row: dict, context: Context) -> list[dict]:
    """`{"761183272": {"imageURL", "questions": [], "answers": [], "title", "authorName", "genre", "split": 1}}`

    The image is `<key>` with the extension of imageURL, in the form of a list `filename`. One record per image, each
    question a turn: so the image's tokens, far more than those of its questions, are encoded once, and every answer
    is supervised all the same. A question without an answer is reported and left out of the others.
    """
    questions, answers = as_list(row["questions"]), as_list(row["answers"])
    if len(questions) != len(answers):
        raise RowError(f"{len(questions)} questions and {len(answers)} answers; give each question its answer")
    if not questions:
        raise RowError("there is no question; fill one in, or drop the row", "empty answer")
    if "filename" in row:
        image = row["filename"]
    else:
        image = row["key"] + (os.path.splitext(row.get("imageURL") or "")[1] or ".jpg")
    pairs, faults = [], []
    for k, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if not all(isinstance(said, str) and said.strip() for said in (question, answer)):
            problem = f"question {k} and its answer must be text, got {shown(question)} and {shown(answer)}"
            faults.append(RowError(f"{problem}; fill them in, or drop both", "empty answer"))
            continue
        prompt = IMAGE_AND_BREAK.sub("", context.prompt(k)) if pairs else context.prompt(k)
        pairs.append((fill(prompt, question=question), answer))
    return [*([exchanges([image], *pairs)] if pairs else []), *faults]
