"""Conversations of any number of turns, with images, videos or in text alone."""

import re

from dataprocess.sources.source import Context, RowError, as_list
from dataset.json_files import parse_json
from dataset.rows import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, nearest, shown

SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
BAIZE_TURN = re.compile(r"\[\|(Human|AI)\|\]")


def llava(row: dict, context: Context) -> list[dict]:
    """`[{"id", "image": "000000442786.jpg", "conversations": [{"from": "human" or "gpt", "value"}]}]`: all turns.

    `image` may be a list; beside it or in its place there may be `video`. Rows without either are conversations in
    text. Where a row has videos alone, `<image>` in its turns stands for them, as some published files have it.
    ShareGPT-4o (`final_data.jsonl`) and zero_nlp (`chat.json`) have this layout too.
    """
    turns = [{"role": speaker(turn["from"]), "content": turn["value"]} for turn in row["conversations"]]
    images, videos = as_list(row.get("image")), as_list(row.get("video"))
    if videos and not images:
        for turn in turns:
            if turn["role"] == "user" and isinstance(turn["content"], str):
                turn["content"] = turn["content"].replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
    return [{"images": images, "videos": videos, "messages": turns}]


def speaker(name: str) -> str:
    if not isinstance(name, str) or name not in SPEAKERS:
        raise RowError(f"a turn is from {shown(name)}, an unknown role{nearest(name, SPEAKERS)}", "roles")
    return SPEAKERS[name]


def messages(row: dict, context: Context) -> list[dict]:
    """`{"messages": [{"role", "content"}], "images": [str], "videos": [str]}`: as it is.

    An `id` or `source` of its own gives way: ids tell the file and the row.
    """
    meta = row.get("meta")
    if isinstance(meta, str):  # in Parquet, records keep it as JSON
        meta = parse_json(meta or "{}", "meta")
    media = {key: as_list(row.get(key)) for key in ("images", "videos")}
    return [{**row, "messages": row["messages"], **media, "meta": meta}]


def baize(row: dict, context: Context) -> list[dict]:
    """`[{"topic", "input": "The conversation between human and AI assistant.\\n[|Human|] q\\n[|AI|] a\\n[|Human|] "}]`

    What stands before the first mark introduces the conversation and is the same in all; a question without words at
    the end, where the conversation was broken off, is left out.
    """
    _, *parts = BAIZE_TURN.split(row["input"])
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns and turns[-1] == {"role": "user", "content": ""}:
        turns.pop()
    if not turns:
        raise RowError(f"expected [|Human|] and [|AI|] before the turns of 'input', got {shown(row['input'])}")
    return [{"messages": turns}]
