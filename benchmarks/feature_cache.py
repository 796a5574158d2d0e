"""Where precomputed features pay: a training step with and without data.feature_cache, on a CPU.

    python -m benchmarks.feature_cache                       # all cases, after bash train.sh and benchmarks.moving
    python -m benchmarks.feature_cache --cases small_decoder --steps 5

Cases, each with its own pictures or clips, encoder and decoder:

    moving         clips of configs/moving.yaml: 8 frames of a video file, a tiny encoder
    scenes         pictures of configs/scenes.yaml: small PNG files, a tiny encoder
    small_decoder  photo-sized JPEG files, a ViT-B/16 at 224 pixels with random weights, a decoder of width 256
    large_decoder  the same pictures and encoder, a decoder of width 1024

The same model takes each batch both ways, in turn, so that other load on the machine meets both alike; the losses of
the two are compared. Break-even is the number of epochs after which the time for the cache is regained, with as many
records per picture or clip as the whole data set has.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from benchmarks.decoders import print_table
from build import autocast_dtype, build_model, load_dataset
from cache_features import amount, fill
from config import Config, load_config
from dataset.collator import Collator
from dataset.feature_cache import media_ids
from dataset.record import read_records, write_records
from model.optim import parameter_groups
from qwen import QWenConfig, QWenLMHeadModel
from qwen.tokenization_qwen import write_ranks
from training import learning_rates

CASES = ("moving", "scenes", "small_decoder", "large_decoder")
HEADER = ("case", "batch", "s/step without", "thereof data", "s/step with", "thereof data", "ratio", "cache, ms/file",
          "break-even, epochs", "cache/file", "file", "loss difference")  # fmt: skip


class Step(NamedTuple):
    """Seconds of a step, and its loss."""

    data: float
    compute: float
    loss: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=12, help="measured steps, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for tests")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            print(f"== {case}", file=sys.stderr, flush=True)
            rows.append((case, *measure(case, Path(folder), arguments.steps, arguments.small)))
    print_table(HEADER, rows)


def measure(case: str, folder: Path, steps: int, small: bool) -> tuple[str, ...]:
    """The row of a case."""
    if case in ("moving", "scenes"):
        config = load_config(["--config", f"configs/{case}.yaml", f"output_dir={folder}/run"])
    else:
        config = drawn_case(folder, width=1024 if case == "large_decoder" else 256, small=small)
    whole = read_records(config.data.train)
    share = len(media_ids(whole.table)) / len(whole)  # files per record
    size = config.train.per_device_train_batch_size
    count = size * (steps + 1)
    # From all over the data set: as few as possible of them share a file.
    some = whole.select(np.linspace(0, len(whole) - 1, count).astype(int).tolist())
    write_records(some, folder / "some.parquet")
    data = replace(config.data, train=[str(folder / "some.parquet")], validation=[])
    plain = replace(config, data=data)
    cached = replace(config, data=replace(data, feature_cache=str(folder / "features")))

    filled = fill(cached)
    building = filled.seconds / filled.encoded  # seconds per file
    torch.manual_seed(config.train.seed)
    both = train(plain, cached, steps, size)
    without, with_cache = ([step.data + step.compute for step in kind] for kind in both)
    saved = (statistics.median(without) - statistics.median(with_cache)) / size  # seconds per record and epoch
    files = [Path(config.data.image_root, medium.as_py().partition(":")[2]) for medium in media_ids(some.table)]
    per_file = sum(path.stat().st_size for path in (folder / "features").glob("part-*")) / filled.encoded
    return (
        str(size),
        *(f"{statistics.median(values):.3f}" for values in (
            without, [step.data for step in both[0]], with_cache, [step.data for step in both[1]]
        )),
        f"{statistics.median(without) / statistics.median(with_cache):.2f}",
        f"{1000 * building:.1f}",
        f"{building * share / saved:.1f}" if saved > 0 else "never",
        amount(round(per_file)),
        amount(round(statistics.mean(file.stat().st_size for file in files))),
        f"{max(abs(a.loss - b.loss) for a, b in zip(*both, strict=True)):.1e}",
    )  # fmt: skip


def train(plain: Config, cached: Config, steps: int, size: int) -> tuple[list[Step], list[Step]]:
    """Steps without and with the cache, of one model: both ways give gradients, the second ones are used."""
    model = build_model(plain.model).train()
    sets = [load_dataset(config, config.data.train, model) for config in (plain, cached)]
    optimizer = torch.optim.AdamW(parameter_groups(model, learning_rates(plain), plain.train.weight_decay), fused=True)
    collate, autocast = Collator(model.tokenizer.pad_token_id), autocast_dtype(plain)
    order = np.random.default_rng(0).permutation(len(sets[0]))
    measured: tuple[list[Step], list[Step]] = ([], [])
    for number in range(steps + 1):
        both: list[Step | None] = [None, None]
        for kind in (0, 1) if number % 2 else (1, 0):
            optimizer.zero_grad()
            begin = time.perf_counter()
            batch = collate([sets[kind][int(index)] for index in order[number * size : (number + 1) * size]])
            ready = time.perf_counter()
            torch.manual_seed(number)  # the same dropout
            with torch.autocast("cpu", getattr(torch, autocast or "float32"), enabled=autocast is not None):
                loss = model(**batch).loss
            loss.backward()
            both[kind] = Step(ready - begin, time.perf_counter() - ready, loss.item())
        begin = time.perf_counter()
        optimizer.step()
        update = time.perf_counter() - begin
        if number:  # the first one warms up
            for steps_of_kind, step in zip(measured, both, strict=True):
                steps_of_kind.append(step._replace(compute=step.compute + update))
    return measured


def drawn_case(folder: Path, width: int, small: bool) -> Config:
    """Pictures of photo size, a ViT-B/16, and a Qwen-1 decoder of some width; all weights are random."""
    torch.manual_seed(0)
    side, layers, size = (32, 2, 2) if small else (224, 12, 4 if width > 512 else 8)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2} if small else {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
    }  # fmt: skip
    vision = CLIPVisionConfig(**shape, num_hidden_layers=layers, image_size=side, patch_size=16)
    CLIPVisionModel(vision).save_pretrained(folder / "encoder")
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder / "encoder")
    (folder / "decoder").mkdir()
    write_ranks({bytes([byte]): byte for byte in range(256)}, folder / "decoder" / "qwen.tiktoken")
    decoder = QWenConfig(
        vocab_size=512, hidden_size=width, num_hidden_layers=2 if small else 12 if width > 512 else 4,
        num_attention_heads=width // 64, kv_channels=64, intermediate_size=2 * 11 * width // 4,
    )  # fmt: skip
    QWenLMHeadModel(decoder).save_pretrained(folder / "decoder")
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    records = []
    for number in range(8 if small else 160):
        coarse = Image.fromarray(random.integers(0, 256, (48, 64, 3), np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"images/{number}.jpg", quality=90)
        answer = "".join(random.choice(list("abcdefgh "), 60))
        records.append({
            "id": str(number), "source": "drawn", "images": [f"{number}.jpg"],
            "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": answer}],
        })  # fmt: skip
    write_records(records, folder / "train.parquet")
    return load_config([
        f"decoder={folder}/decoder", f"encoder.path={folder}/encoder", "lora.r=16", "lora.dropout=0",
        f"data.train={folder}/train.parquet", f"image_root={folder}/images", f"output_dir={folder}/run",
        f"per_device_train_batch_size={size}",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
