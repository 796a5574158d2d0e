"""What became of every row: kept, or dropped and why."""

import json
from dataclasses import dataclass, field
from pathlib import Path

EXAMPLES = 5  # faults of a kind that are reported in full


@dataclass
class Tally:
    """Counts of one source."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> number
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> first messages

    def drop(self, reason: str, message: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(message)

    def first_fault(self) -> str:
        """The most frequent fault, as the end of a sentence about the source."""
        if not self.dropped:
            return "; its file is empty"
        reason = max(self.dropped, key=self.dropped.get)
        return f". Most frequent: {reason} ({self.dropped[reason]} times), as in\n  {self.examples[reason][0]}"

    def as_dict(self) -> dict:
        dropped = {
            reason: {"count": count, "examples": self.examples[reason]}
            for reason, count in sorted(self.dropped.items())
        }
        return {"read": self.read, "kept": self.kept, "dropped": dropped}


class Drops:
    """Faulty records: each ends the run (`on_error="stop"`), or is counted and listed ("skip").

    Attributes:
        tallies: by the name of the source.
    """

    def __init__(self, path: Path, on_error: str, sources: list[str]):
        self.path, self.on_error = path, on_error
        self.tallies = {name: Tally() for name in sources}
        self._file = open(path, "w", encoding="utf-8", errors="backslashreplace") if on_error == "skip" else None

    def __enter__(self) -> "Drops":
        return self

    def __exit__(self, *_) -> None:
        if self._file:
            self._file.close()
            self.path.unlink(missing_ok=True)

    def add(self, source: str, record: str, reason: str, problem: str) -> None:
        """
        Raises:
            ValueError: with `on_error="stop"`; says what is wrong with the record and how to go on.
        """
        if self.on_error == "stop":
            raise ValueError(f"{problem}\nMend it, or leave out and list all such records with on_error=skip")
        self.tallies[source].drop(reason, problem)
        line = {"source": source, "record": record, "reason": reason, "problem": problem}
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def publish(self, path: Path) -> bool:
        """Moves the list of the dropped records to where it belongs, if there is anything in it; says whether."""
        if not any(tally.dropped for tally in self.tallies.values()):
            return False
        self._file.close()
        self.path.replace(path)
        return True


def table(tallies: dict[str, Tally]) -> str:
    """One line per source: read, kept, and a column for each reason that occurs; totals last."""
    reasons = sorted({reason for tally in tallies.values() for reason in tally.dropped})
    lines = [["source", "read", "kept", *reasons]]
    for name, tally in tallies.items():
        lines.append([name, tally.read, tally.kept, *(tally.dropped.get(reason, 0) for reason in reasons)])
    lines.append(["total", *(sum(line[column] for line in lines[1:]) for column in range(1, len(lines[0])))])
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        f"{line[0]:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
