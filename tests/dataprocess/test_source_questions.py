"""Formats of questions, each on a small file written exactly as it is published."""

import pytest
from reading import Reader, answers, dialogue, faults


@pytest.fixture
def read(tmp_path) -> Reader:
    return Reader(tmp_path)


A_OKVQA = [
    {
        "split": "train",
        "image_id": 299207,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "ride", "bus", "taxi", "travelling", "traffic", "taxi", "cab", "cab", "his ride"],
        "difficult_direct_answer": False,
        "rationales": ["A train would not be on the street.", "He is waiting for a cab.", "He has bags."],
    }
]
REASONS = A_OKVQA[0]["rationales"]


def test_a_okvqa(read):
    records = read("a_okvqa", A_OKVQA)
    assert [record["id"] for record in records] == ["src:0.0", "src:0.1", "src:0.2"]
    assert answers(records) == [f"The answer is cab. Because {reason}" for reason in REASONS]
    assert {dialogue(r)[0][1] for r in records} == {"<image>\nWhat is the man by the bags awaiting?"}
    assert {*records[0]["images"], *records[2]["images"]} == {f"{read.images}/train2017/000000299207.jpg"}


def test_a_okvqa_options(read):
    (record,) = read("a_okvqa", A_OKVQA, choices=True, captions="one")
    question = "<image>\nWhat is the man by the bags awaiting?\nOptions: skateboarder, train, delivery, cab"
    assert dialogue(record)[0] == ("user", question) and record["id"] == "src:0"
    drawn = {answers(read("a_okvqa", A_OKVQA, captions="one", seed=seed))[0].split("Because ")[1] for seed in range(20)}
    assert drawn == set(REASONS)
    chinese = read("a_okvqa", A_OKVQA, choices=True, language="zh")[1]
    assert dialogue(chinese)[0][1].endswith("\n选项：skateboarder, train, delivery, cab")
    assert dialogue(chinese)[1][1] == f"答案是cab。因为{REASONS[1]}"
    (short,) = read("a_okvqa", A_OKVQA, captions="one", prompts=["Look. <image> {question} Why?"])
    assert dialogue(short)[0][1] == "Look. <image> What is the man by the bags awaiting? Why?"


def test_a_okvqa_images(read):
    """The folder that holds train2017, or that folder itself; older copies name the file."""
    inside = read("a_okvqa", A_OKVQA, images=f"{read.folder}/train2017")
    assert inside[0]["images"] == [f"{read.folder}/train2017/000000299207.jpg"]
    old = {**A_OKVQA[0], "image": "val2014/COCO_val2014_000000299207.jpg", "image_id": "x", "split": None}
    assert read("a_okvqa", [old])[0]["images"] == [f"{read.images}/val2014/COCO_val2014_000000299207.jpg"]
    val = {**A_OKVQA[0], "split": "val"}
    assert read("a_okvqa", [val], splits=["val"])[0]["images"] == [f"{read.images}/val2017/000000299207.jpg"]


def test_a_okvqa_without_choices_or_reasons(read):
    row = {key: A_OKVQA[0][key] for key in ("image_id", "question", "direct_answers")}
    assert answers(read("a_okvqa", [row])) == ["The answer is ride."]
    test_split = {key: A_OKVQA[0][key] for key in ("image_id", "question", "choices")}
    (fault,) = read("a_okvqa", [test_split])
    assert fault.reason == "no answer" and "neither correct_choice_idx nor direct_answers" in str(fault)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct_choice_idx": 4}, "correct_choice_idx must be one of 0 to 3, got 4"),
        ({"correct_choice_idx": -1}, "correct_choice_idx must be one of 0 to 3, got -1"),
        ({"correct_choice_idx": True}, "correct_choice_idx must be one of 0 to 3, got True"),
        ({"image_id": "hall"}, "image_id must be a number, got 'hall'"),
        ({"image_id": float("inf")}, "image_id must be a number, got inf"),
        ({"image_id": [1]}, "image_id must be a number, got [1]"),
        ({"question": 7}, "question must be text, got 7"),
        ({"choices": [1, 2, 3, 4]}, "a choice must be text, got 4"),
        ({"rationales": [None]}, "content must be valid text, got None"),
    ],
)
def test_a_okvqa_faults(read, change, message):
    (fault,) = read("a_okvqa", [{**A_OKVQA[0], **change}])
    assert fault.reason in ("malformed row", "messages")
    assert message in str(fault) and "file.json: record 'src:0'" in str(fault)


BOOK = {
    "imageURL": "http://ecx.images-amazon.com/images/I/51kJ4Ke3VzL.gif",
    "questions": ["Who wrote this book?", "What is the title of this book?", "Is this a comics book?"],
    "answers": ["Sandra Boynton", "Mom's Family Wall Calendar 2016", "No"],
    "title": "Mom's Family Wall Calendar 2016",
    "authorName": "Sandra Boynton",
    "genre": "Calendars",
    "split": 1,
}
TURNS = [
    ("user", "<image>\nWho wrote this book?"), ("assistant", "Sandra Boynton"),
    ("user", "What is the title of this book?"), ("assistant", "Mom's Family Wall Calendar 2016"),
    ("user", "Is this a comics book?"), ("assistant", "No"),
]  # fmt: skip


def test_ocr_vqa_makes_every_question_a_turn(read):
    content = {"761183272": BOOK, "1": {**BOOK, "split": 2}, "2": {**BOOK, "split": 3}}
    (record,) = read("ocr_vqa", content, "dataset.json")
    assert dialogue(record) == TURNS and record["images"] == [f"{read.images}/761183272.gif"]
    ids = [record["id"] for record in read("ocr_vqa", content, "dataset.json", splits=["val", "test"])]
    assert ids == ["src:1", "src:2"]


def test_ocr_vqa_as_a_list(read):
    row = {"filename": "761183272.jpg", "questions": BOOK["questions"], "answers": BOOK["answers"]}
    (record,) = read("ocr_vqa", [row], "dataset.json")
    assert dialogue(record) == TURNS and record["images"] == [f"{read.images}/761183272.jpg"]


def test_ocr_vqa_prompts(read):
    (record,) = read("ocr_vqa", {"7": BOOK}, prompts=["{question} In a word.\n<image>"])
    questions = [content for role, content in dialogue(record) if role == "user"]
    assert questions[0] == "Who wrote this book? In a word.\n<image>"
    assert questions[2] == "Is this a comics book? In a word."


def test_ocr_vqa_faults(read):
    content = {
        "1": {**BOOK, "answers": ["one"]},
        "2": {**BOOK, "answers": ["a", "", "c"]},
        "3": {**BOOK, "questions": [], "answers": []},
        "4": "text",
        "5": {"imageURL": "x.jpg"},
        "6": {**BOOK, "questions": ["a", 2, "c"]},
        "7": BOOK,
    }
    results = read("ocr_vqa", content)
    assert [reason for reason, _ in faults(results)] == [
        "malformed row", "empty answer", "empty answer", "malformed row", "malformed row", "empty answer",
    ]  # fmt: skip
    answered = [result for result in results if isinstance(result, dict)]
    assert [record["id"] for record in answered] == ["src:1", "src:5", "src:6"]  # 1 and 5 with what is left
    assert [len(dialogue(record)) for record in answered] == [4, 4, 6]
    assert dialogue(answered[0])[2] == ("user", BOOK["questions"][2])
    assert "3 questions and 1 answers; give each question its answer" in str(results[0])
    messages = " ".join(message for _, message in faults(results))
    assert "the key 'questions' is missing, it has 'imageURL, key'; mend the row, or set `format`" in messages
    assert "record 'src:5': question 1 and its answer must be text, got 2 and" in messages
