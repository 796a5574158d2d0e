"""Formats of captions, each on a small file written exactly as it is published."""

import json

import pytest
from reading import COCO_MINI, Reader, answers, dialogue, faults

from dataprocess.readers import read_source
from dataprocess.sources import Source
from dataprocess.sources.source import load_prompts

CHINESE_PROMPTS, ENGLISH_PROMPTS = (load_prompts(language)["caption"] for language in ("zh", "en"))


@pytest.fixture
def read(tmp_path) -> Reader:
    return Reader(tmp_path)


AI_CHALLENGER = [
    {"url": "http://x/1", "image_id": "8f00.jpg", "caption": ["一", "二", "三", "四", "五\n"]},
    {"url": "http://x/2", "image_id": "9a11.jpg", "caption": ["六", "七", "八", "九", "十"]},
]


def test_ai_challenger_makes_a_record_of_every_caption(read):
    records = read("ai_challenger", AI_CHALLENGER)
    assert [record["id"] for record in records] == [f"src:{row}.{k}" for row in (0, 1) for k in range(5)]
    assert answers(records) == list("一二三四五六七八九十")
    assert {record["images"][0] for record in records[:5]} == {f"{read.images}/8f00.jpg"}
    assert all(record["source"] == "src" and len(record["images"]) == 1 for record in records)


def test_ai_challenger_prompts_alternate(read):
    assert CHINESE_PROMPTS == ["这幅图像描述了什么？<image>", "<image>这幅图像中有什么？"]
    prompts = [record["messages"][0]["content"] for record in read("ai_challenger", AI_CHALLENGER)]
    first, second = CHINESE_PROMPTS
    assert prompts == [first, second, first, second, first] + [second, first, second, first, second]


def test_one_caption_per_image_is_drawn_by_seed(read):
    def chosen(seed):
        return answers(read("ai_challenger", [AI_CHALLENGER[0]] * 30, seed=seed, captions="one"))

    assert len(chosen(0)) == 30 and set(chosen(0)) == set("一二三四五")
    assert chosen(0) == chosen(0) != chosen(1)
    assert [r["id"] for r in read("ai_challenger", AI_CHALLENGER, captions="one")] == ["src:0", "src:1"]


def test_prompts_in_the_other_language_and_of_ones_own(read):
    assert {dialogue(r)[0][1] for r in read("ai_challenger", AI_CHALLENGER, language="en")} == set(ENGLISH_PROMPTS)
    prompts = ["<image>A?", "B?<image>"]
    records = read("ai_challenger", AI_CHALLENGER, prompts=prompts)
    assert [record["messages"][0]["content"] for record in records[:3]] == ["<image>A?", "B?<image>", "<image>A?"]


def test_files_of_prompts():
    """The same names in every language, each prompt with its placeholders."""
    english, chinese = load_prompts("en"), load_prompts("zh")
    assert ENGLISH_PROMPTS == ["<image>\nDescribe the image in one sentence."]
    assert english.keys() == chinese.keys()
    for phrases in (english, chinese):
        assert all(prompt.count("<image>") == 1 for name in ("caption", "description") for prompt in phrases[name])
        assert all(prompt.count("<image>") == prompt.count("{question}") == 1 for prompt in phrases["question"])
        assert phrases["options"].count("{question}") == phrases["options"].count("{options}") == 1
        assert phrases["answer"].count("{answer}") == phrases["reason"].count("{answer}") == 1
        assert phrases["reason"].count("{reason}") == 1


# As in captions_train2017.json; most of the fields are of no use.
COCO = {
    "info": {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017},
    "licenses": [{"url": "http://creativecommons.org/", "id": 1, "name": "Attribution"}],
    "images": [
        {"license": 3, "file_name": "000000391895.jpg", "height": 360, "width": 640, "id": 391895},
        {"license": 4, "file_name": "000000522418.jpg", "height": 480, "width": 640, "id": 522418},
        {"license": 4, "file_name": "000000000001.jpg", "height": 480, "width": 640, "id": 1},
    ],
    "annotations": [
        {"image_id": 522418, "id": 37, "caption": "A woman cutting a cake.\n"},
        {"image_id": 391895, "id": 38, "caption": "A man with a red helmet."},
        {"image_id": 522418, "id": 40, "caption": "A woman with a hair net."},
    ],
}


@pytest.mark.parametrize("order", [["images", "annotations"], ["annotations", "info", "images"]])
def test_coco_groups_captions_by_image(read, order):
    records = read("coco", {key: COCO[key] for key in order})
    found = [(r["id"], r["images"][0].rpartition("/")[2], r["messages"][1]["content"]) for r in records]
    assert found == [
        ("src:0", "000000391895.jpg", "A man with a red helmet."),
        ("src:1.0", "000000522418.jpg", "A woman cutting a cake."),
        ("src:1.1", "000000522418.jpg", "A woman with a hair net."),
    ]
    assert {r["messages"][0]["content"] for r in records} == set(ENGLISH_PROMPTS)


def test_a_caption_that_is_no_text_loses_nothing_but_itself(read):
    results = read("lavis", [{"image": "a.jpg", "caption": ["One.", None, "Three.", " "]}])
    assert [fault[0] for fault in faults(results)] == ["messages", "empty answer"]
    assert [dialogue(record)[1][1] for record in results if isinstance(record, dict)] == ["One.", "Three."]


def test_coco_faults(read):
    lost = {"image_id": 5, "caption": "lost"}
    twice = {"id": 391895, "file_name": "b.jpg"}
    boxes = {"image_id": 1, "id": 3, "bbox": [0, 0, 1, 1]}  # as in instances_train2017.json
    content = {
        "images": [*COCO["images"], twice, {"file_name": "c.jpg"}, "d.jpg"],
        "annotations": [*COCO["annotations"], lost, {"image_id": [1], "caption": "x"}, boxes],
    }
    results = read("coco", content)
    assert len(results) - len(faults(results)) == 3
    reasons = [reason for reason, _ in faults(results)]
    assert sorted(reasons) == ["duplicated id", *["malformed row"] * 4, "messages"]
    messages = " ".join(message for _, message in faults(results))
    for part in (
        "two of 'images' have the id 391895; remove one",
        "expected an entry of 'images' with a number under 'id', got {'file_name': 'c.jpg'}",
        "expected an entry of 'annotations' with a number under 'image_id'",
        "1 captions for image_id 5, which is not among 'images'; add it there or remove them",
        "content must be valid text, got None",
    ):
        assert part in messages


KARPATHY = {
    "images": [
        {
            "filepath": "train2014" if split == "train" else "val2014",
            "sentids": [681330],
            "filename": f"COCO_val2014_{split}.jpg",
            "imgid": 0,
            "split": split,
            "sentences": [{"tokens": [split], "raw": f"{split}.", "imgid": 0, "sentid": 681330}],
            "cocoid": 522418,
        }
        for split in ("test", "val", "restval", "train")
    ],
    "dataset": "coco",
}


def test_karpathy_reads_the_training_splits(read):
    records = read("karpathy", KARPATHY)
    assert [(record["id"], *record["images"]) for record in records] == [
        ("src:2", f"{read.images}/val2014/COCO_val2014_restval.jpg"),
        ("src:3", f"{read.images}/train2014/COCO_val2014_train.jpg"),
    ]
    (test,) = read("karpathy", KARPATHY, splits=["test"])
    assert dialogue(test) == [("user", ENGLISH_PROMPTS[0]), ("assistant", "test.")]
    (inside,) = read("karpathy", KARPATHY, splits=["train"], images=f"{read.folder}/train2014")
    assert inside["images"] == [f"{read.folder}/train2014/COCO_val2014_train.jpg"]


def test_splits_that_a_file_does_not_have(read):
    with pytest.raises(ValueError, match="file.json: no row is of split dev, but of restval, test, train, val; set `s"):
        read("karpathy", KARPATHY, splits=["dev"])


def test_karpathy_of_flickr_has_no_folders(read):
    image = {key: value for key, value in KARPATHY["images"][3].items() if key != "filepath"}
    (record,) = read("karpathy", {"images": [image], "dataset": "flickr30k"})
    assert record["images"] == [f"{read.images}/COCO_val2014_train.jpg"]


def test_lavis_takes_one_caption_or_several(read):
    rows = [
        {"image": "val2014/COCO_val2014_000000328757.jpg", "caption": "one", "image_id": "coco_328757"},
        {"image": "b.jpg", "caption": ["two", "three"], "image_id": "coco_2"},
        {"image": "c.jpg", "caption": [], "image_id": "coco_3"},
    ]
    *records, empty = read("lavis", rows)
    assert answers(records) == ["one", "two", "three"]
    assert records[0]["images"] == [f"{read.images}/val2014/COCO_val2014_000000328757.jpg"]
    assert empty.reason == "empty answer"


MINIGPT4 = {
    "annotations": [
        {"image_id": "2", "caption": "The image shows a man fishing on a lawn next to a river."},
        {"image_id": "3", "caption": "A red bus stands before a house."},
    ]
}


def test_minigpt4(read):
    first, second = read("minigpt4", MINIGPT4, "filter_cap.json", images=f"{read.folder}/cc_sbu_align")
    assert first["images"] == [f"{read.folder}/cc_sbu_align/image/2.jpg"]
    prompts = load_prompts("en")["description"]
    assert dialogue(first) == [("user", prompts[0]), ("assistant", MINIGPT4["annotations"][0]["caption"])]
    assert dialogue(second)[0] == ("user", prompts[1])
    first, _ = read("minigpt4", None, "filter_cap.json", images=f"{read.folder}/cc_sbu_align/image", language="zh")
    assert first["images"] == [f"{read.folder}/cc_sbu_align/image/2.jpg"]
    assert dialogue(first)[0][1] == load_prompts("zh")["description"][0]


IMAGE_MAP = {
    "8f00.jpg": {"image_file": "8f00.jpg", "ID": 1, "path": "/old/ali"},
    "000000000009.jpg": {"image_file": "000000000009.jpg", "ID": 2, "path": "/old/coco"},
}
CAPTIONS = {
    "1": {"q": "这幅图像描述了什么？<|extra_0|>", "a": ["甲", "乙"]},
    "2": {"q": "<|extra_0|>\nWhy?", "a": "Because."},
    "3": {"q": "<|extra_0|>", "a": "lost"},
}


def test_image_map(read):
    (read.folder / "image_map.json").write_text(json.dumps(IMAGE_MAP))
    options = {"image_map": str(read.folder / "image_map.json")}
    *records, lost = read("image_map", CAPTIONS, "captions.json", images=None, **options)
    assert [(record["images"][0], *dialogue(record)) for record in records] == [
        ("/old/ali/8f00.jpg", ("user", "这幅图像描述了什么？<image>"), ("assistant", "甲")),
        ("/old/ali/8f00.jpg", ("user", "这幅图像描述了什么？<image>"), ("assistant", "乙")),
        ("/old/coco/000000000009.jpg", ("user", "<image>\nWhy?"), ("assistant", "Because.")),
    ]
    assert lost.reason == "malformed row" and "ID 3 is not in" in str(lost)
    moved = read("image_map", CAPTIONS, "captions.json", **options)
    assert moved[2]["images"] == [f"{read.images}/000000000009.jpg"]


@pytest.mark.parametrize("folder", ["/a\0b", "/\udc80", "/\ud800"])
def test_image_map_with_folders_that_are_none(read, folder):
    (read.folder / "image_map.json").write_text(json.dumps({"a.jpg": {**IMAGE_MAP["8f00.jpg"], "path": folder}}))
    results = read("image_map", CAPTIONS, "c.json", images=None, image_map=str(read.folder / "image_map.json"))
    assert [reason for reason, _ in faults(results)] == ["path", "path", "malformed row", "malformed row"]
    assert "is no path; mend the names in the file" in str(results[0])


def test_two_images_of_one_id_in_an_image_map(read):
    images = {name: {"image_file": name, "ID": 1, "path": "/x"} for name in ("a.jpg", "b.jpg")}
    (read.folder / "image_map.json").write_text(json.dumps(images))
    with pytest.raises(ValueError, match="image_map.json: two images have the ID 1; give each one of its own"):
        read("image_map", CAPTIONS, "captions.json", image_map=str(read.folder / "image_map.json"))


def test_image_map_that_is_none(read):
    (read.folder / "image_map.json").write_text(json.dumps({"a.jpg": {"image_file": "a.jpg"}}))
    with pytest.raises(ValueError, match="image_map.json: expected 'ID' and 'path' under 'a.jpg'"):
        read("image_map", CAPTIONS, "captions.json", image_map=str(read.folder / "image_map.json"))


@pytest.mark.skipif(not COCO_MINI.exists(), reason=f"the files are not here: {COCO_MINI}")
@pytest.mark.parametrize(
    ("format", "file", "count", "first"),
    [
        ("ai_challenger", "caption_train_annotations_20170902.json", 320, "图中有11个勺子、5个刀、1个人。"),
        ("coco", "captions_train2017.json", 128, None),
    ],
)
def test_real_files(format, file, count, first):
    source = Source(format, str(COCO_MINI / file), str(COCO_MINI / "train2017"), name="real")
    records = list(read_source(source))
    assert len(records) == count and not faults(records)
    published = json.loads((COCO_MINI / file).read_text())
    if format == "coco":
        assert sorted(answers(records)) == sorted(entry["caption"].strip() for entry in published["annotations"])
    else:
        assert answers(records) == [caption.strip() for row in published for caption in row["caption"]]
        assert answers(records)[0] == first
