"""Preprocessing against the bare decoding of the same images: rates, peak memory, what an interruption costs.

    python -m benchmarks.preprocess                 # about 20 minutes, 1 GB of disk; --help for sizes
    python -m benchmarks.preprocess --small         # a trial in seconds
    python -m benchmarks.preprocess --engine ray    # needs requirements-ray.txt

The images are JPEGs of COCO's size, 640x480, made from the photographs in ../shared/coco_mini (without them, from
noise) by cropping, turning and encoding them anew. Each has one record, which is the least that can be asked of it.

*Bare* is a loop over `Image.open(path)`, `load()`, one such process per worker, which does nothing else. *draft* means
`image.draft(None, (1, 1))` before `load()`: the whole file is read and its Huffman codes are decoded, which finds every
truncation, but of each 8x8 block only the mean is put together. So works `dataprocess.images.check_image`; *full* is
the loop without it. *process_image* is the whole command, from its start as a process to `report.json`: it also
reads the annotations, hashes every file, keeps the journal, divides and writes.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

PROJECT = Path(__file__).parents[1]
PHOTOGRAPHS = PROJECT.parent / "shared" / "coco_mini" / "train2017"
SIZE = (640, 480)
QUALITY = 92  # makes files of COCO's usual size, 160 KB


class Run(NamedTuple):
    seconds: float
    cpu: float  # seconds of processor time, of all processes together
    peak_main: float  # MiB, resident memory of the process that was started
    peak_all: float  # MiB, of it and its workers, memory that they share counted once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000, help="different images (default: %(default)s)")
    parser.add_argument("--files", type=int, default=50_000, help="files, of which each is one of these images")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement; medians are shown")
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000], help="for the memory")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--folder", type=Path, help="keeps the images here, for another time")
    parser.add_argument("--small", action="store_true", help="few images and records")
    args = parser.parse_args()
    if args.small:
        args.images, args.files, args.repeats, args.records = 300, 2000, 1, [1000, 10_000]
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        images = make_images((args.folder or Path(temporary)) / "images", args.images)
        size = sum(os.path.getsize(image) for image in images) / len(images)
        print(f"{args.files:,} files of {size / 1000:.0f} KB, {len(images):,} different ones\n")
        files, annotations = make_source(images, args.files, Path(temporary, "files"))
        rates(files, annotations, args)
        interruption(files, annotations, args)
        memory(images, Path(temporary), args)


def make_images(folder: Path, count: int) -> list[str]:
    """Paths of `count` JPEGs; those that are there already are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(PHOTOGRAPHS.glob("*.jpg"))
    paths = []
    for number in tqdm(range(count), "Making images", disable=None):
        paths.append(str(folder / f"{number:06d}.jpg"))
        if os.path.exists(paths[-1]):
            continue
        rng = random.Random(number)
        if sources:
            image = Image.open(sources[number % len(sources)]).convert("RGB")
            left, top = rng.randrange(image.width // 8), rng.randrange(image.height // 8)
            image = image.crop((left, top, left + image.width * 7 // 8, top + image.height * 7 // 8))
        else:
            image = Image.fromarray(np.random.default_rng(number).integers(0, 256, (60, 80, 3), dtype=np.uint8))
        image = image.resize(SIZE, Image.Resampling.BICUBIC)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image
        image.save(paths[-1], quality=QUALITY)
    return paths


def make_source(images: Sequence[str], count: int, folder: Path) -> tuple[list[str], Path]:
    """`count` files, links to the images in turn, and an annotation file with a conversation on each."""
    folder.mkdir()
    files = [str(folder / f"{number:07d}.jpg") for number in range(count)]
    annotations = folder.with_suffix(".json")
    with open(annotations, "w") as file:
        for number, path in enumerate(tqdm(files, "Linking images", disable=None)):
            os.link(images[number % len(images)], path)
            turns = [("human", "<image>\nWhat is there to see?"), ("gpt", f"{number}: " + "some words, " * 20)]
            row = {"id": str(number), "image": os.path.basename(path)}
            row["conversations"] = [{"from": speaker, "value": value} for speaker, value in turns]
            file.write(("[" if number == 0 else ",\n") + json.dumps(row))
        file.write("]")
    return files, annotations


def rates(images: list[str], annotations: Path, args: argparse.Namespace) -> None:
    rows = []
    for workers in args.workers:
        runs = {"full": [], "draft": [], "whole": []}
        for _ in range(args.repeats):  # in turn, so that other load on the machine meets all alike
            runs["full"].append(bare(images, workers, draft=False))
            runs["draft"].append(bare(images, workers, draft=True))
            with tempfile.TemporaryDirectory() as output:
                run = started(images, annotations, Path(output), workers, args.engine)
                runs["whole"].append((run.seconds, run.cpu))
        per_second = {name: len(images) / statistics.median(s for s, _ in runs[name]) for name in runs}
        cpu = {name: 1000 * statistics.median(c for _, c in runs[name]) / len(images) for name in runs}
        rows += [
            (workers, "images/s", *(f"{rate:,.0f}" for rate in per_second.values()),
             share(per_second["whole"], per_second["full"]), share(per_second["whole"], per_second["draft"])),
            (workers, "CPU, ms/image", *(f"{time:.2f}" for time in cpu.values()),
             share(cpu["full"], cpu["whole"]), share(cpu["draft"], cpu["whole"])),
        ]  # fmt: skip
    header = ("workers", "", "bare, full", "bare, draft", "process_image", "of bare, full", "of bare, draft")
    show("Rates", header, rows)


def bare(images: list[str], workers: int, draft: bool) -> tuple[float, float]:
    """Seconds in which so many processes decode all images, and of processor time. Their start is not counted."""
    context = multiprocessing.get_context("spawn")
    ready, used = context.Barrier(workers + 1), context.Queue()
    parts = [images[number::workers] for number in range(workers)]
    processes = [context.Process(target=decode, args=(part, draft, ready, used)) for part in parts]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()
    cpu = sum(used.get() for _ in processes)
    seconds = time.perf_counter() - start
    for process in processes:
        process.join()
    return seconds, cpu


def decode(paths: list[str], draft: bool, ready: threading.Barrier, used: multiprocessing.Queue) -> None:
    Image.init()
    ready.wait()
    start = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            if draft:
                image.draft(None, (1, 1))
            image.load()
    used.put(time.process_time() - start)


def command(images: list[str], annotations: Path, output: Path, workers: int, engine: str) -> list[str]:
    config = output.parent / f"{output.name}.yaml"
    source = f"{{format: llava, annotations: {annotations}, images: {os.path.dirname(images[0])}}}"
    config.write_text(f"output: {output}\nworkers: {workers}\nengine: {engine}\nsources: [{source}]\n")
    return [sys.executable, "-m", "dataprocess.process_image", "--config", str(config)]


def started(
    images: list[str],
    annotations: Path,
    output: Path,
    workers: int,
    engine: str,
    until: Callable[[], bool] | None = None,
) -> Run:
    """Runs process_image.py as a process of its own; it is killed as soon as `until` holds."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command(images, annotations, output, workers, engine), cwd=PROJECT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    peak_main = peak_all = 0.0
    cpu: dict[int, float] = {}
    while process.poll() is None:
        if until and until():
            os.killpg(process.pid, signal.SIGKILL)
        own, together = usage_of(process.pid, cpu)
        peak_main, peak_all = max(peak_main, own), max(peak_all, together)
        time.sleep(0.05 if until is None else 0.01)
    if process.wait() and until is None:
        sys.exit(f"benchmarks.preprocess: process_image.py failed: {' '.join(process.args)}")
    return Run(time.perf_counter() - start, sum(cpu.values()), peak_main, peak_all)


def usage_of(session: int, cpu: dict[int, float]) -> tuple[float, float]:
    """MiB: peak resident memory of a process, and the proportional set size of all processes of its session now.

    Seconds of processor time go to `cpu`, by process.
    """
    main, together = 0, 0
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            cpu[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            together += kib(folder / "smaps_rollup", "Pss:")
            main = kib(folder / "status", "VmHWM:") if int(folder.name) == session else main
        except (OSError, StopIteration):  # it has just ended
            continue
    return main / 1024, together / 1024


def kib(path: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))


def interruption(images: list[str], annotations: Path, args: argparse.Namespace) -> None:
    """Killed half-way (kill -9, workers included) and started again, against a run that nobody disturbs."""
    workers, rows = args.workers[-1], []
    with tempfile.TemporaryDirectory() as folder:
        whole = started(images, annotations, Path(folder, "whole"), workers, args.engine).seconds
        deadline = time.perf_counter() + whole / 2
        first = started(
            images, annotations, Path(folder, "cut"), workers, args.engine, lambda: time.perf_counter() > deadline
        ).seconds
        second = started(images, annotations, Path(folder, "cut"), workers, args.engine).seconds
        again = started(images, annotations, Path(folder, "cut"), workers, args.engine).seconds
        rows.append((workers, *(f"{s:.1f}" for s in (whole, first, second, first + second - whole, again))))
    header = ("workers", "undisturbed (s)", "killed after (s)", "the rest (s)", "lost (s)", "once more, all known (s)")
    show("An interruption", header, rows)


def memory(images: list[str], folder: Path, args: argparse.Namespace) -> None:
    """Different numbers of records, each on a file of its own."""
    workers, rows = args.workers[-1], []
    for count in args.records:
        files, annotations = make_source(images, count, folder / f"files-{count}")
        run = started(files, annotations, folder / f"output-{count}", workers, args.engine)
        size = os.path.getsize(annotations) / 1e6
        figures = (f"{count:,}", f"{size:,.0f}", f"{run.seconds:.1f}", f"{count / run.seconds:,.0f}")
        rows.append((*figures, f"{run.peak_main:.0f}", f"{run.peak_all:.0f}"))
    header = ("records and files", "annotations (MB)", "time (s)", "records/s", "peak, main (MiB)", "peak, all (MiB)")
    show(f"Memory ({workers} workers)", header, rows)


def share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str | int]]) -> None:
    """Prints a Markdown table."""
    print(f"{title}\n\n| " + " | ".join(header) + " |\n|" + "---:|" * len(header))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


if __name__ == "__main__":
    main()
