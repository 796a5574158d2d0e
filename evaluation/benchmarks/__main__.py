"""Writes a benchmark to a file of records.

    python -m evaluation.benchmarks pope --data coco_pope_random.json --output pope.parquet
    python -m evaluation.benchmarks mmbench --data MMBench_DEV_EN.tsv --image_root mmbench --output mmbench.parquet
"""

import argparse
import sys

from dataset.record import write_records
from evaluation.benchmarks import BENCHMARKS, read_benchmark


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation.benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="files:\n" + "\n".join(f"  {name}: {files(name)}" for name in BENCHMARKS),
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="benchmark", help=", ".join(BENCHMARKS))
    parser.add_argument("--data", required=True, help="the published file; mme: the folder")
    parser.add_argument("--annotations", help="vqav2: the file of its answers")
    parser.add_argument("--image_root", help="mmbench: folder that its images are written to")
    parser.add_argument("--suffix", help="what follows each question; for captions the whole request")
    parser.add_argument("--split", help="karpathy: train, restval, val or test (default)")
    parser.add_argument("--output", required=True, help="a .parquet file")
    arguments = vars(parser.parse_args())
    output, name = arguments.pop("output"), arguments.pop("benchmark")
    count = write_records(read_benchmark(name, **arguments), output)
    print(f"{output}: {count} records")


def files(name: str) -> str:
    return " and ".join(filter(None, (BENCHMARKS[name].data, BENCHMARKS[name].annotations)))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # files and arguments of the user: the message says what to mend
        sys.exit(f"evaluation.benchmarks: {error}")
