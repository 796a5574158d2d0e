"""Asks a model all questions of records or of a benchmark: with the real pictures and clips, blind, with other ones.

    python evaluate.py --checkpoint_path outputs/run --data test.parquet --image_root data \\
        --output outputs/run/evaluation
    python evaluate.py --checkpoint_path outputs/run --benchmark vqav2 --data questions.json \\
        --annotations annotations.json --image_root val2014 --output outputs/run/vqav2

The last turn of each record, an assistant turn, is predicted; all turns before it are given as they are. A record says
in its `meta` by which metric its answer is scored, and what else is accepted (`evaluation.questions`); by default an
answer is right if it equals the last turn but for case, white space and full stops at the end. The conditions real,
blind, shuffled and, for clips, reordered (`evaluation.answering`) tell whether the model looks.

`--output` is a folder:

    rows.jsonl      every question with its answers under all conditions, written as they come
    settings.json   what was asked of which model; the same command continues an interrupted evaluation
    report.json     figures with 95 % intervals (`evaluation.results`), over all and by every key of the records' `meta`
    report.md       the same as tables
    report.html     the same as a page with charts and a gallery of questions, pictures and answers

Without it the table is printed and nothing is written.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from chat.loading import add_model_arguments, load_model
from dataset.record import read_records
from evaluation.answering import evaluate
from evaluation.benchmarks import BENCHMARKS, read_benchmark
from evaluation.order import CONDITIONS
from evaluation.questions import METRICS
from evaluation.results import format_report
from run_folder import RunError


def main() -> None:
    arguments = parse_arguments()
    model, system = load_model(arguments)
    report = evaluate(
        model,
        read_questions(arguments),
        arguments.image_root or ".",
        system=system,
        conditions=arguments.conditions,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens or longest_answer(arguments.benchmark),
        seed=arguments.seed,
        perplexity=arguments.perplexity,
        metrics=arguments.metrics or (),
        output=arguments.output,
        overwrite=arguments.overwrite,
        described={
            name: getattr(arguments, name)
            for name in ("checkpoint_path", "benchmark", "data", "annotations", "split", "limit", "sample")
            if getattr(arguments, name) is not None
        },
    )
    print(format_report(report))
    if arguments.output:
        print(f"\nWritten to {arguments.output}: report.html, report.md, report.json, rows.jsonl")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--data", nargs="+", required=True,
        help="records: Parquet, JSON, JSONL or CSV files, or folders of them; with --benchmark its questions",
    )  # fmt: skip
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="format of --data, if it is no record file")
    parser.add_argument("--annotations", help="answers of a benchmark that keeps them in a file of their own")
    parser.add_argument("--suffix", help="what follows a benchmark's questions; default: what LLaVA-1.5 was asked with")
    parser.add_argument("--split", help="part of a benchmark whose file has several")
    parser.add_argument("--image_root", help="folder that image paths are relative to; default: this one")
    few = parser.add_mutually_exclusive_group()
    few.add_argument("--limit", type=positive, help="only so many records, the first ones")
    few.add_argument("--sample", type=positive, help="only so many records, drawn at random as --seed says")
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, help="default: all that fit the data")
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, help="to report for all questions; default: each question's own"
    )
    parser.add_argument(
        "--perplexity", action=argparse.BooleanOptionalAction, default=True, help="that of the references, too"
    )
    parser.add_argument("--batch_size", type=positive, default=64, help="questions at a time (64)")
    parser.add_argument("--max_new_tokens", type=positive, help="longest answer (16; benchmarks of captions: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures that replace each other, and of --sample")
    parser.add_argument("--output", help="folder for rows and report")
    parser.add_argument("--overwrite", action="store_true", help="start over, whatever evaluation --output holds")
    arguments = parser.parse_args()
    for name in ("annotations", "suffix", "split"):
        if getattr(arguments, name) is not None and not arguments.benchmark:
            parser.error(f"--{name} is for a --benchmark")
    if arguments.annotations and len(arguments.data) > 1:
        parser.error("--annotations belong to a single file of --data")
    if arguments.output and Path(arguments.output).suffix == ".json":
        parser.error("--output is a folder, in which report.json is one file of several")
    return arguments


def positive(text: str) -> int:
    """A whole number from 1 on."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number and at least 1, got {text}")
    return number


def longest_answer(benchmark: str | None) -> int:
    """Tokens that an answer may have where nothing else is said."""
    return BENCHMARKS[benchmark].max_new_tokens if benchmark else 16


def read_questions(arguments: argparse.Namespace) -> Sequence[dict]:
    """The records that are evaluated, validated, or those that are drawn of them."""
    if arguments.benchmark is None:
        records = read_records(arguments.data)
    else:
        options = {name: getattr(arguments, name) for name in ("annotations", "image_root", "suffix", "split")}
        records = [record for file in arguments.data for record in read_benchmark(arguments.benchmark, file, **options)]
    if arguments.sample is None or arguments.sample >= len(records):
        return records[: arguments.limit]
    drawn = sorted(random.Random(arguments.seed).sample(range(len(records)), arguments.sample))
    return [records[index] for index in drawn]


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, RunError) as error:  # files and settings of the user: the message says what to mend
        sys.exit(f"evaluate.py: {error}")
    except KeyboardInterrupt:
        sys.exit("evaluate.py: stopped; with --output the same command goes on")
