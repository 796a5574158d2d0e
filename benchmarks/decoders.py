"""The default run's recipe with decoders of three families: does the patch serve them alike?

    python -m benchmarks.decoders                 # everything that is missing, then the table
    python -m benchmarks.decoders --only gpt2 --text_steps 1500      its decoder reads for longer

For each family a small decoder of equal width and depth is trained on text alone (`pretrain.decoder architecture=...`),
then projector and LoRA as `configs/scenes.yaml` says, with the tower of the default run. All see the same data in the
same order. Finished parts in `outputs/decoders/` are kept. Needs `outputs/scenes/tower`, which `bash train.sh` makes.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from config import read_config
from dataset.record import read_records
from dataset.text_table import text_table
from evaluation.answering import evaluate
from model import MultiModalModel
from pretrain.decoder import ARCHITECTURES

OUTPUT = Path("outputs/decoders")
RUN, SCENES = Path("outputs/scenes"), Path("data/scenes")
NAMES = {"qwen": "Qwen-1", "qwen2": "Qwen2", "gpt2": "GPT-2"}
TYPES = ("colour", "shape", "existence", "count", "position", "digit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--text_steps", type=int, help="of pretrain.decoder; default: those of the default run")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="key=value", help="for train.py")
    parser.add_argument("--limit", type=int, help="only the first test questions")
    arguments = parser.parse_args()
    if not (RUN / "tower").exists():
        sys.exit(f"there is no {RUN}/tower; make it with `bash train.sh`")
    rows = [measure(name, arguments.text_steps, arguments.overrides, arguments.limit) for name in arguments.only]
    header = ("decoder", "parameters", *TYPES, "all", "blind", "shuffled", "unseen pairs")
    print_table(header, rows)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns, and once more in Markdown."""
    print(text_table([header, *rows], right=range(1, len(header))))
    print("\n| " + " | ".join(header) + " |\n|---" + "|---:" * (len(header) - 1) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def measure(
    architecture: str, text_steps: int | None, overrides: list[str], limit: int | None
) -> tuple[str, ...]:
    """Makes decoder and model of a family where they are missing, and its row of the table."""
    folder = OUTPUT / (architecture if text_steps is None else f"{architecture}-{text_steps}")
    decoder, run = folder / "decoder", folder / "run"
    start("-m", "pretrain.decoder", f"scenes={SCENES}", f"tokenizer={RUN / 'tokenizer'}", f"output={decoder}",
          f"architecture={architecture}", *([] if text_steps is None else [f"steps={text_steps}"]))  # fmt: skip
    if not (run / "trainer_state.json").exists():
        start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
              "--config", "configs/scenes.yaml", f"decoder={decoder}", f"output_dir={run}", *overrides)  # fmt: skip
    config = read_config(run / "config.yaml")
    model = MultiModalModel.from_pretrained(run, attn_implementation=config.model.attn_implementation)
    reports = {
        split: evaluate(
            model, read_records(SCENES / f"{split}.parquet")[:limit], SCENES / "images", batch_size=128,
            max_new_tokens=4, conditions=("real", "blind", "shuffled"),
        )
        for split in ("test", "compositional")
    }  # fmt: skip
    test = reports["test"]
    cells = [test["groups"]["type"][name]["real"] for name in TYPES]
    cells += [test["score"][condition] for condition in ("real", "blind", "shuffled")]
    shares = [cell["value"] for cell in (*cells, reports["compositional"]["score"]["real"])]
    count = sum(p.numel() for p in model.language_model.parameters()) - sum(
        p.numel() for name, p in model.decoder.named_parameters() if ".lora_" in name
    )
    return (
        NAMES[architecture] + ("" if text_steps is None else f", {text_steps:,} steps on text"),
        f"{count:,}",
        *(f"{100 * share:.1f} %" for share in shares),
    )


def start(*command: str) -> None:
    """Runs `python <command>`; ends the benchmark where it fails."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    print("==", " ".join(map(str, command)), flush=True)
    result = subprocess.run([sys.executable, *map(str, command)], env=environment)
    if result.returncode:
        sys.exit(f"benchmarks.decoders: this command failed: {' '.join(map(str, command))}")


if __name__ == "__main__":
    main()
