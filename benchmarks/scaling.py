"""How a training step grows: its time with the number of tokens, its memory with the vocabulary.

    python -m benchmarks.scaling                     # adds to benchmarks/results.md
    python -m benchmarks.scaling --parts time --dtype bfloat16
    python -m benchmarks.scaling --small --output /tmp/results.md

Time: steps (forward, backward, AdamW) of `MultiModalModel` on one row of T tokens, a share of them supervised; medians
of `--repeats` rounds over all cases. Three numbers are fitted to it by least squares of the relative residuals,

    seconds = start + context * (tokens without label) + supervised * (tokens with one)

and R^2, the share of the variance of the logarithm of the time that they explain, and the residuals are told. A second
fit has a fourth number, for T^2: within one row attention is quadratic, which shows at the longest.

Memory: the largest number of bytes in tensors during two steps, beyond the weights, for vocabularies from 1,024 to
262,144; half of the tokens are supervised. Beside it that of transformers' LLaVA with peft (`benchmarks.train_step`),
which makes logits for all tokens. Each case has a process of its own.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import train_step
from benchmarks.measure import RESULTS, add_shapes, append_results, markdown_table, now, report, run_worker
from benchmarks.qwen7b import PeakMemory

LOADERS = {"kanjian": train_step.load_kanjian, "llava": train_step.load_llava}
SMALL = {
    "hidden": 64, "layers": 2, "vocabulary": 1000, "image_tokens": 16, "encoder_width": 32, "encoder_layers": 2,
    "rank": 4, "vocabularies": [64, 1024, 16384], "lengths": [64, 128, 256], "tokens": 64, "repeats": 1,
}  # fmt: skip
TERMS = ("start", "context", "supervised", "tokens^2")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny shapes, for tests")
    parser.add_argument("--parts", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    add_shapes(parser)
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[1024, 16384, 65536, 151936, 262144])
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096], help="T")
    parser.add_argument("--shares", nargs="+", type=float, default=[1 / 16, 1 / 4, 1 / 2], help="supervised, of T")
    parser.add_argument("--tokens", type=int, default=2048, help="T where memory is measured")
    parser.add_argument("--image-tokens", type=int, default=64, help="a square number")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="file that the result is added to")
    parser.add_argument("--worker", choices=["time", *LOADERS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    if "--small" in (sys.argv if argv is None else argv):
        parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


class Steps:
    """Training steps of a system on rows of any length."""

    def __init__(self, args: argparse.Namespace, system: str):
        self.args, self.dtype = args, getattr(torch, args.dtype)
        self.model: nn.Module = LOADERS[system](args.folder, self.dtype).to(args.device)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.clone()  # weights that are mapped from a file would not be seen
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def weights(self) -> int:
        """Bytes."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def __call__(self, tokens: int, supervised: int) -> float:
        """Seconds of a step on one row of so many tokens."""
        batch = self._batch(tokens, supervised)
        start = now()
        train_step.train_step(self.model, self.optimizer, batch, self.dtype)
        return now() - start

    def _batch(self, tokens: int, supervised: int) -> dict[str, Tensor | int]:
        prompt = tokens - self.args.image_tokens - supervised
        shape = {**vars(self.args), "batch": 1, "prompt_tokens": prompt, "answer_tokens": supervised}
        batch = train_step.batch_of_step(argparse.Namespace(**shape), 0)
        return {key: value.to(self.args.device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def cases(args: argparse.Namespace) -> list[tuple[int, int]]:
    """(tokens, supervised ones)."""
    return [(length, max(int(length * share), 1)) for length in args.lengths for share in args.shares]


def measure_time(args: argparse.Namespace) -> dict:
    steps = Steps(args, "kanjian")
    rounds = [[steps(*case) for case in cases(args)] for _ in range(1 + args.repeats)][1:]
    return {"seconds": [statistics.median(column) for column in zip(*rounds, strict=True)]}


def measure_memory(args: argparse.Namespace) -> dict:
    with PeakMemory(args.device) as memory:
        steps = Steps(args, args.worker)
        memory.start()
        for _ in range(2):  # the second one has the optimizer's state from its start
            steps(args.tokens, args.tokens // 2)
        peak = memory.stop()
    return {"beyond": peak - steps.weights()}


# Time


def fit(args: argparse.Namespace, seconds: list[float], terms: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Coefficients of the first so many `TERMS`, the seconds that they foresee, and R^2."""
    found = np.array(seconds)
    columns = np.array([(1, length - labels, labels, length**2) for length, labels in cases(args)], float)[:, :terms]
    coefficients = np.linalg.lstsq(columns / found[:, None], np.ones(len(found)), rcond=None)[0]
    foreseen = columns @ coefficients
    logs = np.log(found)
    error = np.log(np.maximum(foreseen, 1e-9)) - logs
    return coefficients, foreseen, 1 - (error**2).sum() / ((logs - logs.mean()) ** 2).sum()


def time_text(args: argparse.Namespace, seconds: list[float]) -> str:
    linear, foreseen, r2 = fit(args, seconds, 3)
    quadratic, closer, r2_quadratic = fit(args, seconds, 4)
    rows = [
        (f"{length:,}", f"{labels:,}", f"{second:.3f}", f"{one:.3f}", f"{100 * (one / second - 1):+.1f} %",
         f"{100 * (two / second - 1):+.1f} %")
        for (length, labels), second, one, two in zip(cases(args), seconds, foreseen, closer, strict=True)
    ]  # fmt: skip
    header = ("tokens", "supervised", "step (s)", "linear (s)", "residual", "residual with T^2")
    longest = max(args.lengths)
    share = quadratic[3] * longest**2 / closer[-1]
    return "\n\n".join([
        markdown_table(header, rows),
        f"Linear: {1000 * linear[0]:.1f} ms + {1000 * linear[1]:.3f} ms per context token + {1000 * linear[2]:.3f} ms "
        f"per supervised token, R^2 {r2:.4f}. With T^2: {1000 * quadratic[0]:.1f} + {1000 * quadratic[1]:.3f} + "
        f"{1000 * quadratic[2]:.3f} ms, R^2 {r2_quadratic:.4f}, and {100 * share:.0f} % of the step of {longest:,} "
        "tokens.",
    ])  # fmt: skip


# Memory


def memory_text(vocabularies: list[int], beyond: dict[str, list[int]]) -> str:
    ours, theirs = (np.array(beyond[system]) / 2**20 for system in LOADERS)
    rows = [
        (f"{vocabulary:,}", f"{one:.0f}", f"{two:.0f}", f"{two / one:.1f}")
        for vocabulary, one, two in zip(vocabularies, ours, theirs, strict=True)
    ]
    header = ("vocabulary", "Kanjian, beyond weights (MiB)", "LLaVA + peft, beyond weights (MiB)", "ratio")
    return markdown_table(header, rows)


# All of it


def main(argv: list[str]) -> int:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    if args.worker:
        print(json.dumps(measure_time(args) if args.worker == "time" else measure_memory(args)))
        return 0

    def run(worker: str, vocabulary: int, folder: str) -> dict:
        options = [*argv, "--vocabulary", str(vocabulary), "--folder", folder, "--worker", worker]
        found = run_worker("benchmarks.scaling", *options)
        print(json.dumps({"worker": worker, "vocabulary": vocabulary, **found}), flush=True)
        return found

    parts = [f"Hidden {args.hidden}, {args.layers} layers, {args.image_tokens} image tokens, {args.dtype}."]
    if "time" in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            train_step.write_weights(args, Path(folder))
            seconds = run("time", args.vocabulary, folder)["seconds"]
        parts += [f"Time, vocabulary {args.vocabulary:,}:", time_text(args, seconds)]
    if "memory" in args.parts:
        beyond: dict[str, list[int]] = {system: [] for system in LOADERS}
        for vocabulary in args.vocabularies:
            with tempfile.TemporaryDirectory() as folder:
                train_step.write_weights(argparse.Namespace(**{**vars(args), "vocabulary": vocabulary}), Path(folder))
                for system in LOADERS:
                    beyond[system].append(run(system, vocabulary, folder)["beyond"])
        parts += [f"Memory, {args.tokens:,} tokens, half of them supervised:", memory_text(args.vocabularies, beyond)]
    text = report("Scaling of a training step", "benchmarks.scaling", argv, args.device, *parts)
    print(f"\n{text}")
    append_results(text, args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
