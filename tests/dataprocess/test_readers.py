"""Every format on a small file written exactly as it is published."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataprocess.readers import CHINESE_PROMPTS, ENGLISH_PROMPTS, Source, read_source
from dataset.record import RecordError, write_records


@pytest.fixture
def read(tmp_path):
    """`read(format, content, file name, **options) -> records and errors`; images lie in <tmp_path>/images."""

    def run(format: str, content, name: str = "file.json", seed: int = 0, **options) -> list:
        if content is not None:
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        options = {"images": str(tmp_path / "images"), **options}
        return list(read_source(Source(format, str(tmp_path / name), name="src", **options), seed))

    run.images = str(tmp_path / "images")
    run.folder = tmp_path
    return run


def dialogue(record: dict) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in record["messages"]]


def faults(results: list) -> list[tuple[str, str]]:
    return [(error.reason, str(error)) for error in results if isinstance(error, RecordError)]


AI_CHALLENGER = [
    {"url": "http://x/1", "image_id": "8f00.jpg", "caption": ["一", "二", "三", "四", "五\n"]},
    {"url": "http://x/2", "image_id": "9a11.jpg", "caption": ["六", "七", "八", "九", "十"]},
]


def test_ai_challenger_makes_a_record_of_every_caption(read):
    records = read("ai_challenger", AI_CHALLENGER)
    assert [record["id"] for record in records] == [f"src:{row}.{k}" for row in (0, 1) for k in range(5)]
    assert [record["messages"][1]["content"] for record in records] == list("一二三四五六七八九十")
    assert {record["images"][0] for record in records[:5]} == {f"{read.images}/8f00.jpg"}
    assert all(record["source"] == "src" and len(record["images"]) == 1 for record in records)


def test_ai_challenger_prompts_alternate(read):
    assert CHINESE_PROMPTS == ["这幅图像描述了什么？<image>", "<image>这幅图像中有什么？"]
    prompts = [record["messages"][0]["content"] for record in read("ai_challenger", AI_CHALLENGER)]
    first, second = CHINESE_PROMPTS
    assert prompts == [first, second, first, second, first] + [second, first, second, first, second]


def test_one_caption_per_image_is_drawn_by_seed(read):
    def chosen(seed):
        rows = [AI_CHALLENGER[0]] * 30
        return [record["messages"][1]["content"] for record in read("ai_challenger", rows, seed=seed, captions="one")]

    assert len(chosen(0)) == 30 and set(chosen(0)) == set("一二三四五")
    assert chosen(0) == chosen(0) != chosen(1)
    assert [r["id"] for r in read("ai_challenger", AI_CHALLENGER, captions="one")] == ["src:0", "src:1"]


def test_llava_keeps_all_turns(read):
    rows = [
        {
            "id": "000000442786",
            "image": "000000442786.jpg",
            "conversations": [
                {"from": "human", "value": "What is it?\n<image>"},
                {"from": "gpt", "value": "A bus."},
                {"from": "human", "value": "Colour?"},
                {"from": "gpt", "value": "Red."},
            ],
        },
        {"id": "x", "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    ]
    bus, text = read("llava", rows)
    assert bus["id"] == "src:0" and bus["images"] == [f"{read.images}/000000442786.jpg"]
    assert dialogue(bus) == [
        ("user", "What is it?\n<image>"), ("assistant", "A bus."), ("user", "Colour?"), ("assistant", "Red."),
    ]  # fmt: skip
    assert text["images"] == [] and dialogue(text) == [("user", "2+2?"), ("assistant", "4")]


def test_llava_reads_lines_too(read):
    row = {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}
    assert len(read("llava", "\n".join([json.dumps(row)] * 3), "final_data.jsonl")) == 3


def talk(*values: str, **fields) -> dict:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "x", **fields, "conversations": turns}


def test_sharegpt_4o_as_published(read):
    """`final_data.jsonl`: one image, several, a video, or none; columns of their sizes beside them."""
    rows = [
        talk("<image>\nText?", "T", image="images/00000000.jpg", width=897, height=1152),
        talk("A. <image>\nB. <image>", "A", "And <image>?", "B", image=["a.png", "b.png", "c.png"], width_list=[1] * 3),
        talk("<video>\nDescribe.", "D", video="000001_000050/1066682446.mp4"),
        talk("<image> like <video>?", "No", image="a.png", video="v.mp4"),
        talk("Hi", "Ho"),
    ]
    records = read("llava", "\n".join(map(json.dumps, rows)), "final_data.jsonl", images=f"{read.folder}/image")
    assert [len(record["images"]) for record in records] == [1, 3, 0, 1, 0]
    assert [len(record["videos"]) for record in records] == [0, 0, 1, 1, 0]
    assert records[0]["images"] == [f"{read.folder}/image/images/00000000.jpg"]
    assert records[2]["videos"] == [f"{read.folder}/image/000001_000050/1066682446.mp4"]
    assert dialogue(records[1])[2:] == [("user", "And <image>?"), ("assistant", "B")]


def test_chat_json_of_the_llava_pretraining(read):
    rows = [talk("Give a short summary.\n<image>", "a cat", image="GCC_train_002582585.jpg")]
    (record,) = read("llava", rows, "chat.json", images=f"{read.folder}/images_dl")
    assert record["images"] == [f"{read.folder}/images_dl/GCC_train_002582585.jpg"]
    assert dialogue(record) == [("user", "Give a short summary.\n<image>"), ("assistant", "a cat")]


def test_image_placeholder_stands_for_a_video_where_there_is_no_image(read):
    film, both = read("llava", [
        talk("<image>\nWhat happens?", "It falls.", video="v.mp4"),
        talk("<image>\nWhat happens?", "It falls.", video="v.mp4", image="a.jpg"),
    ])  # fmt: skip
    assert dialogue(film)[0] == ("user", "<video>\nWhat happens?") and film["videos"] == [f"{read.images}/v.mp4"]
    assert both.reason == "placeholders" and "0 <video> in its user turns for 1 videos" in str(both)


def test_llava_placeholders_must_fit(read):
    results = read("llava", [
        talk("What is it?", "A cat.", image="a.jpg"),
        talk("<image>", "A cat.", image=["a.jpg", "b.jpg"]),
        talk("<image>", "A cat."),
    ])  # fmt: skip
    assert [reason for reason, _ in faults(results)] == ["placeholders"] * 3
    assert "'src:0': 0 <image> in its user turns for 1 images; write one" in str(results[0])


def test_llava_row_faults(read):
    def row(*values, **fields):
        speakers = ("human", "gpt")
        return {
            "image": "a.jpg",
            "conversations": [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)],
            **fields,
        }

    results = read("llava", [
        row("<image>", "fine"),
        row("no placeholder", "x"),
        row("<image>", " "),
        {"image": "a.jpg"},
        row("<image>", "x", conversations=[{"from": "robot", "value": "x"}]),
        "text",
        row("<image>", None),
        row("<image>", "fine"),
    ])  # fmt: skip
    assert [r["id"] for r in results if isinstance(r, dict)] == ["src:0", "src:7"]
    reasons = [reason for reason, _ in faults(results)]
    assert reasons == [
        "placeholders", "empty answer", "malformed row", "malformed row", "malformed row", "messages",
    ]  # fmt: skip
    assert all(f"'src:{row}'" in message for row, (_, message) in enumerate(faults(results), start=1))


def test_coco_groups_captions_by_image(read):
    content = {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 1}, {"id": 9, "file_name": "9.jpg"}, {"id": 1}],
        "annotations": [
            {"id": 1, "image_id": 9, "caption": "nine\n"},
            {"id": 2, "image_id": 7, "caption": "seven"},
            {"id": 3, "image_id": 9, "caption": "neuf"},
            {"id": 4, "image_id": 5, "caption": "lost"},
        ],
    }
    *records, lost = read("coco", content)
    found = [(r["id"], r["images"][0].rpartition("/")[2], r["messages"][1]["content"]) for r in records]
    assert found == [("src:0", "7.jpg", "seven"), ("src:1.0", "9.jpg", "nine"), ("src:1.1", "9.jpg", "neuf")]
    assert {r["messages"][0]["content"] for r in records} == set(ENGLISH_PROMPTS)
    assert lost.reason == "malformed row" and "image_id 5" in str(lost)


def test_own_prompts(read):
    prompts = ["<image>A?", "B?<image>"]
    records = read("ai_challenger", AI_CHALLENGER, prompts=prompts)
    assert [record["messages"][0]["content"] for record in records[:3]] == ["<image>A?", "B?<image>", "<image>A?"]


def test_karpathy_reads_the_training_splits(read):
    images = [
        {"filepath": "val2014", "filename": f"{split}.jpg", "split": split, "sentences": [{"raw": split, "tokens": []}]}
        for split in ("train", "restval", "val", "test")
    ]
    content = {"images": images, "dataset": "coco"}
    records = read("karpathy", content)
    assert [record["images"] for record in records] == [
        [f"{read.images}/val2014/train.jpg"], [f"{read.images}/val2014/restval.jpg"],
    ]  # fmt: skip
    (test,) = read("karpathy", content, splits=["test"])
    assert dialogue(test) == [("user", ENGLISH_PROMPTS[0]), ("assistant", "test")]


def test_lavis_takes_one_caption_or_several(read):
    rows = [
        {"image": "val2014/COCO_val2014_000000328757.jpg", "caption": "one", "image_id": "coco_328757"},
        {"image": "b.jpg", "caption": ["two", "three"], "image_id": "coco_2"},
        {"image": "c.jpg", "caption": [], "image_id": "coco_3"},
    ]
    *records, empty = read("lavis", rows)
    assert [record["messages"][1]["content"] for record in records] == ["one", "two", "three"]
    assert records[0]["images"] == [f"{read.images}/val2014/COCO_val2014_000000328757.jpg"]
    assert empty.reason == "empty answer"


MESSAGES = [
    {
        "messages": [{"role": "user", "content": "<image><image>Same?"}, {"role": "assistant", "content": "No"}],
        "images": ["a.jpg", "sub/b.jpg"],
    },
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<|extra_0|>"}]},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_messages_come_as_they_are(read, suffix):
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(MESSAGES), read.folder / "m.parquet")
        content = None
    else:
        content = MESSAGES if suffix == "json" else "\n".join(map(json.dumps, MESSAGES))
    first, second = read("messages", content, f"m.{suffix}")
    assert first["messages"] == MESSAGES[0]["messages"] and second["messages"] == MESSAGES[1]["messages"]
    assert first["images"] == [f"{read.images}/a.jpg", f"{read.images}/sub/b.jpg"] and second["images"] == []


def test_messages_read_our_own_records(read):
    record = {**MESSAGES[0], "id": "theirs", "source": "theirs", "meta": {"language": "en"}}
    write_records([record], read.folder / "r.parquet")
    (result,) = read("messages", None, "r.parquet")
    assert (result["id"], result["source"], result["meta"]) == ("src:0", "src", {"language": "en"})


def test_messages_faults(read):
    film, song = {**MESSAGES[1], "videos": ["v.mp4"]}, {**MESSAGES[1], "audios": ["a.wav"]}
    question = {"messages": MESSAGES[1]["messages"][:1]}
    tools, single = {**MESSAGES[1], "tools": "x"}, {**MESSAGES[0], "images": "a.jpg"}
    results = read("messages", [film, song, tools, single, {}, question])
    reasons = [reason for reason, _ in faults(results)]
    assert reasons == ["placeholders", "media", "fields", "placeholders", "malformed row", "no answer"]
    assert "0 <video> in its user turns for 1 videos" in str(results[0])
    assert "unknown field 'tools'" in str(results[2])


def test_messages_with_videos_and_plain_text(read):
    film = {"messages": [{"role": "user", "content": "<video>?"}, MESSAGES[0]["messages"][1]], "videos": ["f/v.mp4"]}
    text = {"messages": [{"role": "text", "content": "Once <image>"}], "images": ["a.jpg"]}
    film, text = read("messages", [film, text])
    assert film["videos"] == [f"{read.images}/f/v.mp4"] and film["images"] == []
    assert dialogue(text) == [("text", "Once <image>")] and text["images"] == [f"{read.images}/a.jpg"]


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
    assert lost.reason == "malformed row" and "ID 3" in str(lost)
    moved = read("image_map", CAPTIONS, "captions.json", **options)
    assert moved[2]["images"] == [f"{read.images}/000000000009.jpg"]


@pytest.mark.parametrize(
    ("format", "content", "message"),
    [
        ("llava", "[{]", "not valid JSON"),
        ("llava", {"a": 1}, "expected a JSON list"),
        ("coco", [], "expected a JSON object"),
        ("coco", {"images": []}, "expected a list under 'annotations'"),
        ("coco", {"images": [], "annotations": [{"caption": "x"}]}, "not a file of format coco"),
        ("karpathy", {"images": [{"filename": "x"}]}, "not a file of format karpathy"),
    ],
)
def test_a_file_of_another_format_is_an_error_that_names_it(read, format, content, message):
    with pytest.raises(ValueError, match=f"file.json: .*{message}"):
        read(format, content)


TABLE = """image,instruction,answer,text
a.jpg,What is it?,A cat.,
,,,Once upon a time.
a.jpg,What is it?,,
"""


def test_table(read):
    cat, text, fault = read("table", TABLE, "t.csv")
    assert dialogue(cat) == [("user", "<image>\nWhat is it?"), ("assistant", "A cat.")]
    assert (cat["id"], cat["source"], cat["images"]) == ("src:0", "src", [f"{read.images}/a.jpg"])
    assert dialogue(text) == [("text", "Once upon a time.")] and text["id"] == "src:1"
    assert fault.reason == "nothing to learn" and "'src:2'" in str(fault)
    rows = [{"video": ["v.mp4", "w.mp4"], "text": "left", "answer": "right"}, "text", {"picture": "a.jpg"}]
    film, *errors = read("table", rows)
    assert film["videos"] == [f"{read.images}/v.mp4", f"{read.images}/w.mp4"]
    assert [error.reason for error in errors] == ["malformed row", "fields"]


def test_table_without_a_folder(read):
    cat, text, _ = read("table", TABLE, "t.csv", images=None)
    assert cat.reason == "media" and "set `images` of the source" in str(cat)
    assert dialogue(text) == [("text", "Once upon a time.")]


def test_a_table_in_another_format_is_an_error_that_names_it(read):
    with pytest.raises(ValueError, match="file.csv, line 2: 1 cells for 2 columns"):
        read("table", "text,answer\nx\n", "file.csv")
    with pytest.raises(ValueError, match="file.txt: rows are read from"):
        read("table", "x", "file.txt")
