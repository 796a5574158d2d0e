"""Formats of conversations, each on a small file written exactly as it is published."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import COCO_MINI, Reader, dialogue, faults, talk

from dataprocess.readers import read_source
from dataprocess.sources import Source
from dataset.record import write_records


@pytest.fixture
def read(tmp_path) -> Reader:
    return Reader(tmp_path)


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


def test_sharegpt_4o_as_published(read):
    """`final_data.jsonl`: one image, several, a video, or none; columns of their sizes beside them."""
    rows = [
        talk("<image>\nText?", "T", image="images/00000000.jpg", width=897, height=1152),
        talk("A. <image>\nB. <image>", "A", "And <image>?", "B", image=["a.png", "b.png", "c.png"], width_list=[1] * 3),
        talk("<video>\nDescribe.", "D", video="000001_000050/1066682446.mp4"),
        talk("<image> like <video>?", "No", image="a.png", video="v.mp4"),
        talk("Hi", "Ho"),
    ]
    records = read("sharegpt4o", "\n".join(map(json.dumps, rows)), "final_data.jsonl", images=f"{read.folder}/image")
    assert [len(record["images"]) for record in records] == [1, 3, 0, 1, 0]
    assert [len(record["videos"]) for record in records] == [0, 0, 1, 1, 0]
    assert records[0]["images"] == [f"{read.folder}/image/images/00000000.jpg"]
    assert records[2]["videos"] == [f"{read.folder}/image/000001_000050/1066682446.mp4"]
    assert dialogue(records[1])[2:] == [("user", "And <image>?"), ("assistant", "B")]


def test_chat_json_of_the_llava_pretraining(read):
    rows = [talk("Give a short summary.\n<image>", "a cat", image="GCC_train_002582585.jpg")]
    (record,) = read("zero_nlp", rows, "chat.json", images=f"{read.folder}/images_dl")
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
    results = read("llava", [
        talk("<image>", "fine", image="a.jpg"),
        talk("no placeholder", "x", image="a.jpg"),
        talk("<image>", " ", image="a.jpg"),
        {"image": "a.jpg"},
        {"image": "a.jpg", "conversations": [{"from": "robot", "value": "x"}]},
        "text",
        talk("<image>", None, image="a.jpg"),
        talk("<image>", "fine", image="a.jpg"),
    ])  # fmt: skip
    assert [r["id"] for r in results if isinstance(r, dict)] == ["src:0", "src:7"]
    reasons = [reason for reason, _ in faults(results)]
    assert reasons == [
        "placeholders", "empty answer", "malformed row", "roles", "malformed row", "messages",
    ]  # fmt: skip
    assert all(f"'src:{row}'" in message for row, (_, message) in enumerate(faults(results), start=1))


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


@pytest.mark.skipif(not COCO_MINI.exists(), reason=f"the files are not here: {COCO_MINI}")
@pytest.mark.parametrize("file", ["complex_reasoning_77k.json", "detail_23k.json"])
def test_real_files_of_llava(file):
    records = list(read_source(Source("llava", str(COCO_MINI / file), str(COCO_MINI / "train2017"), name="real")))
    published = json.loads((COCO_MINI / file).read_text())
    for record, row in zip(records, published, strict=True):
        assert [content for _, content in dialogue(record)] == [turn["value"] for turn in row["conversations"]]


@pytest.mark.skipif(not COCO_MINI.exists(), reason=f"the files are not here: {COCO_MINI}")
def test_real_messages():
    records = list(read_source(Source("messages", str(COCO_MINI / "messages.jsonl"), str(COCO_MINI), name="real")))
    published = [json.loads(line) for line in (COCO_MINI / "messages.jsonl").read_text().splitlines()]
    assert [record["messages"] for record in records] == [row["messages"] for row in published]
    assert records[0]["images"] == [str(COCO_MINI / published[0]["images"][0])]
