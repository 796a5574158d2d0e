"""Instructions in text, and tables."""

from dataprocess.sources.source import Context, RowError, exchanges, text
from dataset.table import record_of_row


def dolly(row: dict, context: Context) -> list[dict]:
    """`databricks-dolly-15k.jsonl`: `{"instruction", "context", "response", "category"}` a line"""
    return instruction(row, "instruction", "context", "response")


def alpaca(row: dict, context: Context) -> list[dict]:
    """`alpaca_gpt4_data.json`: `[{"instruction", "input", "output"}]`"""
    return instruction(row, "instruction", "input", "output")


def instruction(row: dict, words: str, below: str, answer: str) -> list[dict]:
    """One turn of the texts under these keys; what stands below the instruction may be empty or absent."""
    said = text(row[answer], answer)
    if not said.strip():
        raise RowError(f"{answer} is empty; fill it in, or drop the row", "empty answer")
    parts = (text(row[words], words), text(row.get(below) or "", below))
    return [exchanges([], ("\n".join(part for part in parts if part.strip()), said))]


def table(row: dict, context: Context) -> list[dict]:
    """`{"text", "image", "video", "instruction", "answer"}`, all optional: see `dataset.table`."""
    return [record_of_row(row, f"{context.source.name}:{context.number}")]
