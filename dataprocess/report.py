"""What became of every row: kept, or dropped and why."""

from dataclasses import dataclass, field

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

    def as_dict(self) -> dict:
        dropped = {
            reason: {"count": count, "examples": self.examples[reason]}
            for reason, count in sorted(self.dropped.items())
        }
        return {"read": self.read, "kept": self.kept, "dropped": dropped}


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
