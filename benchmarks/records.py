"""A million records: how long until the first batch, how much memory, and what a list from a JSON file costs instead.

    python -m benchmarks.records                        # --records 100000 for a trial in seconds

Writes records like those of real mixtures (captions and questions about pictures, and text alone, in three sources)
once as Parquet and once as the JSON list that training scripts commonly load into every process. Each way is measured
in a fresh process, after its libraries were imported:

* open: until the records can be indexed; "first" includes the making of the memory-mapped copy
* first batch: from there until the first batch of 32 lies ready in a shuffled, length-grouped epoch, pictures decoded
  and texts encoded by 2 workers, the sampler's first block measured (JSON: in random order, for it has no lengths)
* memory: what the process holds more than before it opened the records, after the batch and 20,000 records drawn at
  random. "own" is its own, "file" are pages of files, the mapped one above all, which all processes share and the
  system can take back; of a worker, what it doesn't share with the process that started it
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from dataset.collator import Collator
from dataset.dataset import RecordDataset
from dataset.record import Records, read_records, write_records
from dataset.sampler import GlobalBatchSampler
from dataset.text_table import text_table
from qwen.tokenization_qwen import QWenTokenizer, write_ranks
from visual import build_encoder
from visual.media import Media

PROJECT = Path(__file__).parents[1]
PICTURES = 200
WORDS = (
    "a the man woman dog cat red blue green sitting standing on in with near under table street field tree sky holding "
    "plate food people group playing ball white black large small several young old next to of and is are two three"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the records go and stay; default: a folder that is deleted")
    parser.add_argument("--ranks", type=Path, default=PROJECT.parent / "shared/tokenizer/qwen.tiktoken",
                        help="ranks file of a tokenizer; without it text is encoded as bytes")  # fmt: skip
    parser.add_argument("--measure", choices=("parquet", "json"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        prepare(folder, arguments.records, arguments.ranks)
        runs = [("Parquet, first", "parquet"), ("Parquet, again", "parquet"), ("list of a JSON file", "json")]
        rows = []
        for name, kind in runs:
            command = [sys.executable, "-m", "benchmarks.records", "--measure", kind, "--folder", str(folder)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            output = subprocess.run(command, cwd=PROJECT, env=environment, check=True, capture_output=True, text=True)
            found = json.loads(output.stdout.splitlines()[-1])
            rows.append([name, *(f"{found[key]:.2f}" for key in ("open", "batch")),
                         *(f"{found[key]:,.0f}" for key in ("own", "file", "worker"))])  # fmt: skip
    header = ["way", "open (s)", "first batch (s)", "own memory (MiB)", "file pages (MiB)", "own, per worker (MiB)"]
    print(f"{arguments.records:,} records")
    print(text_table([header, *rows], right=range(1, len(header))))


def prepare(folder: Path, count: int, ranks: Path) -> None:
    """Records in both forms, pictures of 640 x 480, an encoder and a tokenizer."""
    images = folder / "images"
    if images.exists():
        return
    images.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for number in range(PICTURES):
        small = Image.fromarray(noise.integers(0, 256, (30, 40, 3), np.uint8))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(images / f"{number:03d}.jpg", quality=90)
    config = CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                              image_size=224, patch_size=14)  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder / "encoder")
    CLIPImageProcessor().save_pretrained(folder / "encoder")
    (folder / "tokenizer").mkdir()
    if ranks.is_file():
        (folder / "tokenizer/qwen.tiktoken").symlink_to(ranks.resolve())
    else:
        write_ranks({bytes([byte]): byte for byte in range(256)}, folder / "tokenizer/qwen.tiktoken")
    write_records(random_records(count), folder / "train.parquet")
    with open(folder / "train.json", "w", encoding="utf-8") as file:
        for number, record in enumerate(random_records(count)):
            file.write(("[" if number == 0 else ",\n") + json.dumps(record))
        file.write("]")


def random_records(count: int) -> Iterator[dict]:
    """60 % captions of 8 to 16 words, 30 % short answers, 10 % texts of 60 to 140 words without a picture."""
    draw = random.Random(0)
    for number in range(count):
        source = draw.choices(("captions", "questions", "text"), (6, 3, 1))[0]
        question, least, most = {
            "captions": ("<image>\nDescribe the image in one sentence.", 8, 16),
            "questions": ("<image>\nWhat is the man doing? Answer in a few words.", 1, 4),
            "text": (f"Write about a {draw.choice(WORDS)}.", 60, 140),
        }[source]
        answer = " ".join(draw.choices(WORDS, k=draw.randint(least, most)))
        yield {
            "id": f"{source}:{number}",
            "source": source,
            "images": [] if source == "text" else [f"{number % PICTURES:03d}.jpg"],
            "videos": [],
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }


class RecordList(Records):
    """Records as a list of Python objects."""

    def __init__(self, path: Path):
        self.rows = json.loads(path.read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"audios": [], "meta": {}, **self.rows[index]}


def measure(kind: str, folder: Path) -> dict[str, float]:
    """Seconds and MiB of one way, in a process that does nothing else."""
    tokenizer = QWenTokenizer.from_pretrained(folder / "tokenizer")
    media = Media(build_encoder("clip", str(folder / "encoder")))
    _ = media.preprocess
    before = resident()
    start = time.perf_counter()
    records = read_records(folder / "train.parquet") if kind == "parquet" else RecordList(folder / "train.json")
    opened = time.perf_counter()
    dataset = RecordDataset(records, tokenizer, media, folder / "images", max_length=2048)
    strategy = "group_by_length" if kind == "parquet" else "random"
    lengths = dataset.lengths if kind == "parquet" else range(len(records))
    sampler = GlobalBatchSampler(lengths, 32, strategy=strategy)
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=Collator(tokenizer.pad_token_id), num_workers=2)
    batches = iter(loader)
    _ = next(batches)
    ready = time.perf_counter()
    for index in np.random.default_rng(0).integers(0, len(records), 20_000).tolist():
        _ = records[index]
    for _ in range(20):
        _ = next(batches)
    after = resident()
    workers = [unshared(worker.pid) for worker in batches._workers]
    return {
        "open": opened - start,
        "batch": ready - opened,
        "own": after["own"] - before["own"],
        "file": after["file"] - before["file"],
        "worker": max(workers),
    }


def resident() -> dict[str, float]:
    """MiB of this process in memory: its own, and pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    amounts = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return {"own": amounts["RssAnon"] / 1024, "file": amounts["RssFile"] / 1024}


def unshared(pid: int) -> float:
    """MiB of a process that no other has: what it has written to since it was forked."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")) / 1024


if __name__ == "__main__":
    main()
