"""What several benchmarks share: peak memory, time, worker processes, tables, and the file of results."""

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from dataset.files import write_text

RESULTS = Path(__file__).with_name("results.md")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # of /proc/cpuinfo: products of bfloat16 in hardware


def now() -> float:
    """Seconds, once the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets VmHWM to the present size
    else:
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> float:
    """MiB since `reset_peak`: resident memory of the process on a CPU, allocated tensors on a GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def resident_memory() -> float:
    """MiB of this process now."""
    return _status("VmRSS")


def _status(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) / 2**10


# Worker processes: `python -m <module> ... --worker <name>` prints lines of JSON.


def run_worker(module: str, *arguments: str) -> dict:
    """Runs a worker to its end; returns the last line it printed.

    Raises:
        RuntimeError: it failed; the message has what it wrote.
    """
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with status {result.returncode}\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


class Conversation:
    """A worker that answers each line on its standard input with a line of JSON."""

    def __init__(self, module: str, *arguments: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            command = " ".join(map(str, self.process.args))
            raise RuntimeError(f"a worker ended with status {self.process.wait()}: {command}")
        return json.loads(line)

    def ask(self, question) -> dict:
        self.process.stdin.write(f"{question}\n")
        return self.answer()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# Arguments


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Sizes of the decoder and the encoder that systems are compared with."""
    for name, size in (("hidden", 512), ("layers", 8), ("vocabulary", 151936), ("encoder-width", 256),
                       ("encoder-layers", 4)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=size)


# Text


def machine(device: str) -> str:
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", "--id=0"]
        name, memory, driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split(",")
        return f"{name.strip()}, {memory.strip()}, driver {driver.strip()}"
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = set(re.search(r"flags\s*:\s*(.+)|$", text).group(0).split())
    extensions = " and ".join(name for name in BF16_FLAGS if name in flags) or "no bfloat16 products"
    return f"{model[1] if model else 'CPU'} ({extensions}), {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


def circumstances(device: str) -> str:
    """Date, machine and versions, one line."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{datetime.date.today()}, {machine(device)}, {versions}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """All columns but the first are flushed right."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def report(title: str, module: str, argv: Sequence[str], device: str, *parts: str) -> str:
    """What a run found, as it stands in the file of results."""
    command = shlex.join(["python", "-m", module, *argv])
    return "\n\n".join([f"# {title}", f"    {command}", circumstances(device), *parts]) + "\n"


def append_results(text: str, path: Path = RESULTS) -> None:
    """Adds what a run found to the end of a file, which is whole at any moment."""
    before = path.read_text() + "\n" if path.exists() else ""
    write_text(before + text, path)
