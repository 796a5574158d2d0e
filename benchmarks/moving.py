"""Is a clip understood, or only its frames? From nothing to a model of moving shapes, and its accuracies.

    python -m benchmarks.moving                   # everything that is missing, then the table

Clips and words (`dataprocess.moving`), a tokenizer and a decoder that know these words (`pretrain`), then training as
`configs/moving.yaml` says, on the tower of the default run (`bash train.sh`). The frames of a clip in another order
(*reordered*) still tell the axis of a motion, but not its sense: of left and right, one in two is then right.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.decoders import RUN as DEFAULT_RUN
from benchmarks.decoders import SCENES, print_table, start
from config import read_config
from dataset.files import write_text
from dataset.record import read_records
from evaluation.answering import evaluate
from evaluation.order import CONDITIONS
from model import MultiModalModel

MOVING, RUN = Path("data/moving"), Path("outputs/moving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help="for train.py")
    parser.add_argument("--limit", type=int, help="only the first test questions")
    arguments = parser.parse_args()
    if not (DEFAULT_RUN / "tower").exists():
        sys.exit(f"there is no {DEFAULT_RUN}/tower; make it with `bash train.sh`")
    make(arguments.overrides)
    model = MultiModalModel.from_pretrained(
        RUN, attn_implementation=read_config(RUN / "config.yaml").model.attn_implementation
    )
    records = read_records(MOVING / "test.parquet")[: arguments.limit]
    report = evaluate(model, records, MOVING / "clips", batch_size=128, max_new_tokens=4)
    write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", RUN / "report.json")
    header = ("question", *CONDITIONS, "questions")
    rows = [(name, *figures(cell)) for name, cell in report["groups"]["type"].items()]
    rows.append(("all", *figures(report["score"])))
    print_table(header, rows)


def figures(cell: dict) -> tuple[str, ...]:
    return *(f"{100 * cell[condition]['value']:.1f} %" for condition in CONDITIONS), f"{cell['n']:,}"


def make(overrides: list[str]) -> None:
    """Runs the stages whose results are missing."""
    if not (MOVING / "words.txt").exists():
        start("-m", "dataprocess.moving", "--output", MOVING)
    if not (RUN / "tokenizer").exists():
        start("-m", "pretrain.tokenizer", f"scenes=[{SCENES},{MOVING}]", f"output={RUN / 'tokenizer'}")
    start("-m", "pretrain.decoder", f"scenes={SCENES}", f"moving={MOVING}", f"tokenizer={RUN / 'tokenizer'}",
          f"output={RUN / 'decoder'}", "steps=1000")  # fmt: skip
    if not (RUN / "trainer_state.json").exists():
        start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
              "--config", "configs/moving.yaml", *overrides)  # fmt: skip


if __name__ == "__main__":
    main()
