"""Readers of published benchmark files, on small files of exactly their form, and figures that benchmarks publish."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dataset.record import read_records, write_records
from evaluation.benchmarks import BENCHMARKS, read_benchmark
from evaluation.benchmarks.__main__ import main as command
from evaluation.benchmarks.scores import circular_scores, mme_scores, published_scores, score_rows
from evaluation.questions import make_question
from evaluation.results import format_report, make_report, markdown

WORD = "Answer the question using a single word or phrase."


def dump(value, path: Path) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def prompt(record: dict) -> str:
    assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"]
    return record["messages"][0]["content"]


def answer(record: dict) -> str:
    return record["messages"][1]["content"]


# --- POPE

PHOTO = "COCO_val2014_000000310196.jpg"
POPE_LINES = [
    {"question_id": 1, "image": PHOTO, "text": "Is there a kite in the image?", "label": "yes"},
    {"question_id": 2, "image": PHOTO, "text": "Is there a car in the image?", "label": "no"},
]


def write_pope(folder: Path, lines=POPE_LINES, kind: str = "adversarial") -> Path:
    path = folder / f"coco_pope_{kind}.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pope(tmp_path):
    first, second = read_benchmark("pope", write_pope(tmp_path))
    assert first["id"] == "coco_pope_adversarial:1" and first["images"] == [PHOTO]
    assert prompt(first) == f"<image>\nIs there a kite in the image?\n{WORD}"
    assert (answer(first), answer(second)) == ("yes", "no")
    assert first["meta"] == {"metric": "yes_no", "category": "adversarial"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"label": "maybe"}, "question 2, 'label': expected yes or no, got 'maybe'"),
        ({"text": " "}, "question 2: expected a text under 'text', got ' '"),
        ({"image": None}, "question 2: expected a text under 'image', got None"),
    ],
)
def test_faulty_pope_entries_are_named(tmp_path, change, problem):
    path = write_pope(tmp_path, [POPE_LINES[0], POPE_LINES[1] | change])
    with pytest.raises(ValueError, match="coco_pope_adversarial.json") as raised:
        list(read_benchmark("pope", path))
    assert problem in str(raised.value)


def test_a_missing_key_and_a_broken_line_are_named(tmp_path):
    line = {key: value for key, value in POPE_LINES[1].items() if key != "label"}
    with pytest.raises(ValueError, match="question 2: expected a text under 'label', which is not among its keys: qu"):
        list(read_benchmark("pope", write_pope(tmp_path, [POPE_LINES[0], line])))
    path = write_pope(tmp_path)
    path.write_text(path.read_text() + '{"question_id": 3, "image"')
    with pytest.raises(ValueError, match="coco_pope_adversarial.json, line 3, column 27: not valid JSON"):
        list(read_benchmark("pope", path))


# --- VQAv2

TEN = ["net", "net", "net", "netting", "net", "net", "mesh", "net", "", "net"]


def write_vqav2(folder: Path, answers=TEN, annotated=458752000) -> tuple[Path, Path]:
    head = {"info": {"description": "This is v2.0 of the VQA dataset."}, "license": {"url": "", "name": ""}}
    part = {"task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": "val2014"}
    questions = [{"image_id": 458752, "question": "What is this in front of?", "question_id": 458752000}]
    annotation = {
        "question_type": "what is this",
        "multiple_choice_answer": "net",
        "answers": [
            {"answer": text, "answer_confidence": "maybe", "answer_id": number}
            for number, text in enumerate(answers, start=1)
        ],
        "image_id": 458752,
        "answer_type": "other",
        "question_id": annotated,
    }
    unasked = annotation | {"question_id": 1}
    return (
        dump(
            {**head, **part, "questions": questions},
            folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        ),
        dump(
            {**head, "annotations": [unasked, annotation], **part},
            folder / "v2_mscoco_val2014_annotations.json",
        ),
    )


def test_vqav2(tmp_path):
    (record,) = read_benchmark("vqav2", *write_vqav2(tmp_path))
    assert record["images"] == ["COCO_val2014_000000458752.jpg"]
    assert prompt(record) == f"<image>\nWhat is this in front of?\n{WORD}" and answer(record) == "net"
    assert record["id"] == "v2_OpenEnded_mscoco_val2014_questions:458752000"
    assert [text.strip() for text in record["meta"].pop("references")] == TEN
    assert record["meta"] == {"metric": "vqa", "answer_type": "other", "question_type": "what is this"}


def test_a_question_of_vqav2_without_annotation_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"questions\[0\]: question_id 458752000 has no annotation in .*same part"):
        list(read_benchmark("vqav2", *write_vqav2(tmp_path, annotated=7)))
    with pytest.raises(ValueError, match=r"annotations\[1\]: question_id 1 has an annotation already"):
        list(read_benchmark("vqav2", *write_vqav2(tmp_path, annotated=1)))
    with pytest.raises(ValueError, match=r"annotations\[0\], answers\[2\]: expected a text under 'answer', got 3"):
        list(read_benchmark("vqav2", *write_vqav2(tmp_path, answers=["a", "b", 3])))
    with pytest.raises(ValueError, match=r"annotations\[0\]: expected people's answers under 'answers', got an empty"):
        list(read_benchmark("vqav2", *write_vqav2(tmp_path, answers=[])))


def test_vqav2_needs_its_part_wherever_that_stands_in_the_file(tmp_path):
    questions, annotations = write_vqav2(tmp_path)
    content = json.loads(questions.read_text())
    subtype = content.pop("data_subtype")
    dump(content, questions)
    with pytest.raises(ValueError, match="questions.json: expected a text under 'data_subtype'"):
        list(read_benchmark("vqav2", questions, annotations))
    dump(content | {"data_subtype": subtype}, questions)
    assert len(list(read_benchmark("vqav2", questions, annotations))) == 1


# --- GQA, TextVQA

GQA = {
    "201307251": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": ["201307252"],
        "equivalent": ["201307251"],
        "question": "Is it overcast?",
        "imageId": "n161313",
        "isBalanced": True,
        "groups": {"global": None, "local": "13-weather_overcast"},
        "answer": "no",
        "semanticStr": "select: scene->verify weather: overcast [0]",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
        "fullAnswer": "No, it is clear.",
    }
}


def test_gqa(tmp_path):
    path = dump(GQA, tmp_path / "testdev_balanced_questions.json")
    (record,) = read_benchmark("gqa", path)
    assert record["id"] == "testdev_balanced_questions:201307251" and record["images"] == ["n161313.jpg"]
    assert prompt(record) == f"<image>\nIs it overcast?\n{WORD}" and answer(record) == "no"
    types = {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"}
    assert record["meta"] == {"metric": "exact", **types}
    dump({"7": GQA["201307251"] | {"types": "verify"}}, path)
    with pytest.raises(ValueError, match="question '7': expected an object under 'types', got 'verify'"):
        list(read_benchmark("gqa", path))


TEXTVQA = {
    "question": "what is the brand of this camera?",
    "image_id": "003a8ae2ef43b901",
    "image_classes": ["Cassette deck", "Camera"],
    "flickr_original_url": "https://farm2.staticflickr.com/1/2_o.jpg",
    "flickr_300k_url": "https://c4.staticflickr.com/1/2_o.jpg",
    "image_width": 1024,
    "image_height": 664,
    "answers": ["nous", "dakota", "clos", "dakota digital", "dakota", "dakota", "dakota digital", "dakota", "", "n"],
    "question_tokens": ["what", "is", "the", "brand"],
    "question_id": 34602,
    "set_name": "val",
}


def test_textvqa(tmp_path):
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [TEXTVQA]}
    (record,) = read_benchmark("textvqa", dump(content, tmp_path / "TextVQA_0.5.1_val.json"), suffix="Read it.")
    assert record["images"] == ["003a8ae2ef43b901.jpg"] and answer(record) == "dakota"
    assert prompt(record) == "<image>\nwhat is the brand of this camera?\nRead it."
    assert len(record["meta"]["references"]) == 10 and record["meta"]["metric"] == "vqa"


def test_the_test_part_of_textvqa_has_no_answers(tmp_path):
    row = {key: value for key, value in TEXTVQA.items() if key != "answers"}
    path = dump({"data": [row]}, tmp_path / "TextVQA_0.5.1_test.json")
    with pytest.raises(ValueError, match=r"data\[0\]: expected a list under 'answers', which is not among its keys"):
        list(read_benchmark("textvqa", path))


# --- MME

COUNT = ["Are there two dogs? Please answer yes or no.\tYes", "Are there five dogs? Please answer yes or no.\tNo"]


def write_mme(folder: Path, lines=COUNT) -> Path:
    release = folder / "MME_Benchmark_release_version"
    for images, texts in (("count", "count"), ("artwork/images", "artwork/questions_answers_YN"), ("eval_tool", None)):
        (release / images).mkdir(parents=True)
        if texts:
            (release / texts).mkdir(exist_ok=True)
            (release / images / "000000006040.jpg").touch()
            (release / texts / "000000006040.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return release


def test_mme(tmp_path):
    records = list(read_benchmark("mme", write_mme(tmp_path)))
    assert [record["images"] for record in records] == [["artwork/images/000000006040.jpg"]] * 2 + [
        ["count/000000006040.jpg"]
    ] * 2
    assert [answer(record) for record in records] == ["yes", "no"] * 2
    assert records[2]["id"] == "MME_Benchmark_release_version:count/000000006040:0"
    assert records[2]["meta"] == {"metric": "yes_no", "category": "count"}
    assert prompt(records[2]) == f"<image>\nAre there two dogs?\n{WORD}"
    own = next(read_benchmark("mme", tmp_path / "MME_Benchmark_release_version", suffix=""))
    assert prompt(own) == "<image>\nAre there two dogs? Please answer yes or no."


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (COUNT[:1], r"000000006040.txt: expected two lines, question <tab> Yes or No, got 1"),
        ([COUNT[0], "Are there five dogs? No"], r"line 2: expected question <tab> Yes or No, got 'Are there five dogs"),
        ([COUNT[0], "Are there five dogs?\tFive"], r"line 2: expected yes or no, got 'Five'"),
    ],
)
def test_faulty_pairs_of_mme_are_named(tmp_path, lines, problem):
    with pytest.raises(ValueError, match=problem):
        list(read_benchmark("mme", write_mme(tmp_path, lines)))


def test_mme_names_the_image_that_is_missing(tmp_path):
    release = write_mme(tmp_path)
    (release / "count" / "000000006040.jpg").unlink()
    with pytest.raises(ValueError, match=r"count/000000006040.txt: expected its image .*count/000000006040 \(.jpg"):
        list(read_benchmark("mme", release))
    with pytest.raises(ValueError, match="expected folders of tasks"):
        list(read_benchmark("mme", release / "eval_tool"))


# --- MMBench

COLUMNS = "index question hint A B C D answer category image source l2-category comment split".split()


def encoded(colour: str, form: str = "JPEG") -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def mmbench_row(index: int, image: str, /, **changes: str) -> dict[str, str]:
    row = dict.fromkeys(COLUMNS, "") | {
        "index": str(index), "question": "Which one is red?", "A": "the cat", "B": "the car", "C": "the kite",
        "D": "the bus", "answer": "B", "category": "attribute_recognition", "image": image, "source": "unknown",
        "l2-category": "finegrained_perception (instance-level)", "split": "dev",
    }  # fmt: skip
    return row | changes


def write_mmbench(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "MMBench_DEV_EN.tsv"
    lines = ["\t".join(COLUMNS), *("\t".join(row[name] for name in COLUMNS) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_mmbench(tmp_path):
    path = write_mmbench(
        tmp_path,
        mmbench_row(241, encoded("red"), hint='"A picture\nof ""a"" street."'),
        mmbench_row(252, encoded("blue", "PNG"), question="哪一个是红色的？", C="", D="nan", answer="A"),
        mmbench_row(1000241, "241", A="the car", B="the kite", C="the bus", D="the cat", answer="A"),
        mmbench_row(1000252, encoded("blue", "PNG")),
    )
    first, second, rotated, again = read_benchmark("mmbench", path, image_root=tmp_path / "images")
    assert prompt(first) == (
        '<image>\nA picture\nof "a" street.\nWhich one is red?\nA. the cat\nB. the car\nC. the kite\nD. the bus\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert answer(first) == "B" and first["meta"]["choices"] == ["A", "B", "C", "D"]
    assert {key: first["meta"][key] for key in ("metric", "language", "question", "category", "split")} == {
        "metric": "choice", "language": "en", "question": 241, "category": "attribute_recognition", "split": "dev",
    }  # fmt: skip
    assert first["meta"]["l2_category"].startswith("finegrained")
    assert second["meta"]["choices"] == ["A", "B"] and second["meta"]["language"] == "zh"
    assert prompt(second).endswith("A. the cat\nB. the car\n请直接回答选项字母。")
    assert rotated["images"] == first["images"] and rotated["meta"]["question"] == 241
    assert again["images"] == second["images"]
    assert make_question(first).choices == ("A", "B", "C", "D")
    files = sorted((tmp_path / "images").iterdir())
    assert len(files) == 2 and {file.suffix for file in files} == {".jpg", ".png"}
    with Image.open(tmp_path / "images" / second["images"][0]) as image:
        assert image.getpixel((0, 0)) == (0, 0, 255)


def test_images_of_mmbench_are_written_once_and_whole(tmp_path, monkeypatch):
    path = write_mmbench(tmp_path, mmbench_row(1, encoded("red")), mmbench_row(2, encoded("green")))
    (first, _) = read_benchmark("mmbench", path, image_root=tmp_path / "images")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "images").iterdir()}
    list(read_benchmark("mmbench", path, image_root=tmp_path / "images"))
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "images").iterdir()} == before

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        list(read_benchmark("mmbench", path, image_root=tmp_path / "other"))
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"answer": ""}, "row 1 (index 5): expected one of A, B, C, D under 'answer', but there is no answer"),
        ({"answer": "E"}, "row 1 (index 5): expected one of A, B, C, D under 'answer', got 'E'"),
        ({"answer": "C", "C": "", "D": ""}, "expected one of A, B under 'answer', got 'C'"),
        ({"B": ""}, "expected two options or more, A, B, ... without a gap, got ['A', 'C', 'D']"),
        ({"image": "77"}, "expected base64 of an image, or the index of an earlier row, under 'image', got '77'"),
        ({"image": base64.b64encode(b"no image" * 20).decode()}, "expected base64 of an image under 'image', got"),
        ({"index": "x"}, "row 1: expected a whole number under 'index', got 'x'"),
    ],
)
def test_faulty_rows_of_mmbench_are_named(tmp_path, changes, problem):
    path = write_mmbench(tmp_path, mmbench_row(5, encoded("red"), **changes))
    with pytest.raises(ValueError, match="MMBench_DEV_EN.tsv, row 1") as raised:
        list(read_benchmark("mmbench", path, image_root=tmp_path))
    assert problem in str(raised.value)


def test_a_row_of_mmbench_with_too_few_cells_is_named(tmp_path):
    path = write_mmbench(tmp_path)
    path.write_text(path.read_text() + "1\tWhich?\n")
    with pytest.raises(ValueError, match="line 2: 2 cells for 14 columns; a text with tabs or line breaks"):
        list(read_benchmark("mmbench", path, image_root=tmp_path))


# --- Captions

CAPTIONS = ["A dog.", "A brown dog runs. ", "Dog on grass.", "A dog outside.", "The dog is running."]


def test_official_coco_captions(tmp_path):
    annotations = [{"image_id": 42, "id": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    images = [{"license": 5, "file_name": "COCO_val2014_000000000042.jpg", "height": 478, "width": 640, "id": 42}]
    content = {"info": {}, "images": images, "licenses": [], "annotations": annotations}
    path = dump(content, tmp_path / "captions_val2014.json")
    (record,) = read_benchmark("coco_captions", path)
    assert record["images"] == ["COCO_val2014_000000000042.jpg"]
    assert prompt(record) == "<image>\nProvide a one-sentence caption for the provided image."
    references = [text.strip() for text in CAPTIONS]
    assert answer(record) == "A dog." and record["meta"]["references"] == references
    assert record["meta"]["metric"] == "caption" and record["meta"]["language"] == "en"
    dump({"images": [], "annotations": annotations}, path)
    with pytest.raises(ValueError, match="captions_val2014.json, image 0: 5 captions for image_id 42, which"):
        list(read_benchmark("coco_captions", path))


def karpathy_image(number: int, split: str) -> dict:
    sentences = [{"tokens": text.split(), "raw": text, "imgid": number, "sentid": n} for n, text in enumerate(CAPTIONS)]
    name = f"COCO_val2014_{number:012d}.jpg"
    return {
        "filepath": "val2014", "sentids": [], "filename": name, "imgid": number, "split": split,
        "sentences": sentences, "cocoid": number,
    }  # fmt: skip


def test_karpathy(tmp_path):
    images = [karpathy_image(1, "train"), karpathy_image(2, "test"), karpathy_image(3, "val")]
    path = dump({"images": images, "dataset": "coco"}, tmp_path / "dataset_coco.json")
    (record,) = read_benchmark("karpathy", path)
    assert record["images"] == ["val2014/COCO_val2014_000000000002.jpg"] and len(record["meta"]["references"]) == 5
    (record,) = read_benchmark("karpathy", path, split="val", image_root=tmp_path / "val2014", suffix="Describe it.")
    assert record["images"] == ["COCO_val2014_000000000003.jpg"] and prompt(record) == "<image>\nDescribe it."
    with pytest.raises(ValueError, match="no image has the split 'restval'"):
        list(read_benchmark("karpathy", path, split="restval"))
    with pytest.raises(ValueError, match="split must be one of train, restval, val, test, got 'dev'"):
        list(read_benchmark("karpathy", path, split="dev"))


def test_chinese_captions(tmp_path):
    captions = ["一只狗在跑。", "草地上的狗", "棕色的狗", "狗", "一只狗"]
    row = {"url": "http://x/1.jpg", "image_id": "a1.jpg", "caption": captions}
    (record,) = read_benchmark("ai_challenger", dump([row], tmp_path / "caption_validation_annotations_20170910.json"))
    assert prompt(record) == "<image>\n用一句话描述这张图片。" and record["meta"]["language"] == "zh"
    assert record["images"] == ["a1.jpg"] and len(record["meta"]["references"]) == 5


def test_real_pictures_with_real_captions(shared):
    folder = shared / "coco_mini"
    records = list(read_benchmark("coco_captions", folder / "captions_train2017.json"))
    assert len(records) > 20 and all(len(record["meta"]["references"]) > 1 for record in records)
    assert all((folder / "train2017" / record["images"][0]).is_file() for record in records)
    chinese = list(read_benchmark("ai_challenger", folder / "caption_train_annotations_20170902.json"))
    assert {record["meta"]["language"] for record in chinese} == {"zh"}


# --- All of them

def test_arguments_that_do_not_fit_are_refused_at_once(tmp_path):
    path = write_pope(tmp_path)
    with pytest.raises(ValueError, match=r"no benchmark is called 'pop' \(did you mean 'pope'\?\)"):
        read_benchmark("pop", path)
    with pytest.raises(ValueError, match="vqav2 needs a second file, annotations: v2_mscoco_val2014_annotations.json"):
        read_benchmark("vqav2", path)
    with pytest.raises(ValueError, match="pope is read from one file, leave annotations out"):
        read_benchmark("pope", path, path)
    with pytest.raises(ValueError, match="mmbench needs image_root"):
        read_benchmark("mmbench", path)
    with pytest.raises(ValueError, match="gqa has no parts in its file, leave split out: 'val'"):
        read_benchmark("gqa", path, split="val")
    with pytest.raises(FileNotFoundError, match="nothing.json: there is no such file; gqa expects testdev_balanced"):
        read_benchmark("gqa", tmp_path / "nothing.json")


def test_records_survive_a_file_and_ask_what_they_should(tmp_path):
    """What every reader yields can be written, read again, and evaluated."""
    records = [*read_benchmark("vqav2", *write_vqav2(tmp_path)), *read_benchmark("pope", write_pope(tmp_path))]
    records += read_benchmark("mmbench", write_mmbench(tmp_path, mmbench_row(5, encoded("red"))), image_root=tmp_path)
    write_records(records, tmp_path / "all.parquet")
    assert list(read_records(tmp_path / "all.parquet")) == records
    metrics = [make_question(record).metric for record in records]
    assert metrics == ["vqa", "yes_no", "yes_no", "choice"]


def test_the_command_writes_records(tmp_path, request, monkeypatch, capsys):
    output = tmp_path / "pope.parquet"
    arguments = ["pope", "--data", str(write_pope(tmp_path)), "--output", str(output), "--suffix", ""]
    monkeypatch.setattr(sys, "argv", ["evaluation.benchmarks", *arguments])
    command()
    assert capsys.readouterr().out == f"{output}: 2 records\n"
    assert prompt(read_records(output)[0]) == "<image>\nIs there a kite in the image?"
    arguments[0] = "vqav2"
    output.unlink()
    started = [sys.executable, "-m", "evaluation.benchmarks", *arguments]
    result = subprocess.run(started, cwd=request.config.rootpath, capture_output=True, text=True)
    assert result.returncode == 1 and not output.exists()
    assert result.stderr.startswith("evaluation.benchmarks: vqav2 needs a second file")
    assert result.stderr.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["evaluation.benchmarks", "--help"])
    with pytest.raises(SystemExit):
        command()
    text = capsys.readouterr().out
    assert all(f"  {name}: {benchmark.data}" in text for name, benchmark in BENCHMARKS.items())


# --- Figures that benchmarks publish

def scored(score: float, **row) -> dict:
    blind = {"answer": "", "score": 1.0}
    return {"conditions": {"real": {"answer": "", "score": score}, "blind": blind}, **row}


def test_mme_scores_by_hand():
    """count: of 2 images one pair is right and half of the other: acc 75, acc+ 50."""
    rows = [
        scored(score, images=[image], meta={"category": "count"})
        for image, score in (("a", 1.0), ("a", 1.0), ("b", 1.0), ("b", 0.0))
    ]
    scores = mme_scores(rows)
    assert scores["tasks"] == {"count": {"acc": 75.0, "acc_plus": 50.0, "score": 125.0, "images": 2}}
    assert scores["perception"] is None and scores["cognition"] is None
    assert published_scores("mme", rows)["blind"]["tasks"]["count"]["score"] == 200
    cognition = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
    every = [scored(1.0, images=["a"], meta={"category": task}) for task in cognition for _ in range(2)]
    assert mme_scores(every)["cognition"] == 800 and mme_scores(every)["perception"] is None
    with pytest.raises(ValueError, match="b: 1 questions, expected the two"):
        mme_scores(rows[:3])
    for compute in (mme_scores, circular_scores):
        with pytest.raises(ValueError, match="row 'x': it has no meta.*; take rows of evaluate.py --benchmark mm"):
            compute([scored(1.0, id="x", images=[], meta={})])


def test_published_scores_stand_in_the_report():
    """Of whole benchmarks: of a part of one the sums would be those of something else."""
    rows = [
        {**scored(score, images=["a.png"], meta={"category": "count"}), "id": str(number), "videos": [], "choices": [],
         "turns": [{"role": "user", "content": "<image>?"}], "answer": "yes", "references": ["yes"], "metric": "yes_no"}
        for number, score in enumerate((1.0, 0.0))
    ]  # fmt: skip
    report = make_report(rows, settings={"benchmark": "mme"})
    assert report["benchmark_scores"] == published_scores("mme", rows)
    lines = [line.split() for line in format_report(report).splitlines()]
    assert ["perception", "-", "-"] in lines and ["count", "(acc", "+", "acc+)", "50.0", "200.0"] in lines
    assert "| mme | real | blind |" in markdown(report, "t") and "| count (acc + acc+) | 50.0 | 200.0 |" in markdown(
        report, "t")  # fmt: skip
    for settings in ({"benchmark": "pope"}, {"benchmark": "mme", "limit": 2}, {"benchmark": "mme", "sample": 2}, {}):
        assert "benchmark_scores" not in make_report(rows, settings=settings)
    circular = {"real": {"circular": 0.5}, "blind": {"circular": None}}
    assert score_rows(circular) == {"circular accuracy": ["50.0 %", "-"]}


def test_circular_scores_by_hand():
    rows = [
        scored(score, id=f"MMBench_DEV_EN:{number}", meta={"question": question})
        for number, question, score in ((1, 1, 1.0), (1000001, 1, 0.0), (2, 2, 1.0), (1000002, 2, 1.0))
    ]
    assert circular_scores(rows) == {"accuracy": 0.75, "circular": 0.5, "rows": 4, "questions": 2}
    rows[2]["id"], rows[2]["meta"] = "MMBench_DEV_CN:1", {"question": 1}  # another file's question of the same number
    assert circular_scores(rows)["questions"] == 3


def test_other_benchmarks_publish_nothing_more():
    with pytest.raises(ValueError, match="no further figures are published for 'gqa'"):
        published_scores("gqa", [])
