"""Questions that are answered with yes or no: POPE, MME."""

from collections.abc import Iterator
from pathlib import Path

from dataset.json_files import json_lines
from evaluation.benchmarks.entries import Files, field, record

POPE_KINDS = ("adversarial", "popular", "random")  # how the objects that are not there were drawn
IMAGES = (".jpg", ".jpeg", ".png")
# What every question of MME ends with; a suffix takes its place.
MME_ENDING = "Please answer yes or no."


def pope(files: Files) -> Iterator[dict]:
    """`coco_pope_random.json`, `coco_pope_popular.json`, `coco_pope_adversarial.json` of POPE's repository.

    JSON lines, in spite of the suffix: `{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there
    a snowboard in the image?", "label": "yes"}`.
    """
    kind = next((kind for kind in POPE_KINDS if files.data.stem.endswith(kind)), None)
    for number, entry in enumerate(json_lines(files.data), start=1):
        where = f"{files.data}, question {number}"
        yield record(
            files.name(field(entry, "question_id", int | str, where)),
            "pope",
            field(entry, "image", str, where),
            field(entry, "text", str, where),
            files.suffix["en"],
            yes_or_no(field(entry, "label", str, where), f"{where}, 'label'"),
            metric="yes_no",
            category=kind,
        )


def yes_or_no(text: str, where: str) -> str:
    """The answer in lower case. Raises ValueError, which begins with `where`, for any other."""
    answer = text.strip().lower()
    if answer not in ("yes", "no"):
        raise ValueError(f"{where}: expected yes or no, got {text!r:.80}")
    return answer


def mme(files: Files) -> Iterator[dict]:
    """The folder of the MME release: a folder for each task, an image and a text file of the same name for each pair.

    A text file has two lines `question <tab> Yes or No`. Images and texts of a task lie beside each other, or in its
    folders `images` and `questions_answers_YN`. Names of images are relative to the release's folder.
    """
    if not files.data.is_dir():
        raise ValueError(f"{files.data}: expected the folder of MME's release, which holds a folder for each task")
    tasks = sorted(path for path in files.data.iterdir() if path.is_dir() and path.name != "eval_tool")
    found = False
    for task in tasks:
        texts = task / "questions_answers_YN" if (task / "questions_answers_YN").is_dir() else task
        images = task / "images" if (task / "images").is_dir() else task
        pictures = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGES}
        for path in sorted(texts.glob("*.txt")):
            found = True
            if path.stem not in pictures:
                raise ValueError(f"{path}: expected its image {images / path.stem} ({', '.join(IMAGES)}) beside it")
            image = pictures[path.stem].relative_to(files.data).as_posix()
            for number, (question, answer) in enumerate(_mme_pair(path)):
                name = f"{task.name}/{path.stem}:{number}"
                if files.suffix["en"]:
                    question = question.removesuffix(MME_ENDING)
                yield record(
                    files.name(name), "mme", image, question, files.suffix["en"], answer,
                    metric="yes_no", category=task.name,
                )  # fmt: skip
    if not found:
        raise ValueError(f"{files.data}: expected folders of tasks with .txt files of questions, found none")


def _mme_pair(path: Path) -> list[tuple[str, str]]:
    """The two questions on an image, with their answers."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start} of the file; save it in that encoding") from None
    if len(lines) != 2:
        raise ValueError(f"{path}: expected two lines, question <tab> Yes or No, got {len(lines)}")
    pair = []
    for number, line in enumerate(lines, start=1):
        question, tab, answer = line.rpartition("\t")
        if not tab or not question.strip():
            raise ValueError(f"{path}, line {number}: expected question <tab> Yes or No, got {line!r:.80}")
        pair.append((question.strip(), yes_or_no(answer, f"{path}, line {number}")))
    return pair
