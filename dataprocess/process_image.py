"""Published downloads -> checked records on disk.

    python -m dataprocess.process_image --config dataprocess/config.yaml
    python -m dataprocess.process_image --config dataprocess/config.yaml seed=1 sources.0.images=/data/coco
    python -m dataprocess.process_image --config dataprocess/config.yaml on_error=skip --preview 12
    python -m dataprocess.process_image --config dataprocess/config.yaml --engine ray
    python dataprocess/process_image.py --config dataprocess/config.yaml       the same as the first

`dataprocess/config.py` explains the keys. It writes `train.parquet`,
`validation.parquet` and, last of all, `report.json`. The same files and the same seed give the same bytes. What was
interrupted goes on with the same command: `.work/` in the output folder knows the images and videos that were checked.
"""

import os
import sys

# Started as a file it would look for packages in its own folder; started again as a module it finds those beside it.
if __name__ == "__main__" and not __package__:
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    os.execv(sys.executable, [sys.executable, "-m", "dataprocess.process_image", *sys.argv[1:]])

import argparse
import sqlite3
from pathlib import Path

from dataprocess.config import ConfigError, load_config
from dataprocess.engines import WorkerDied
from dataprocess.pipeline import process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="dataprocess/config.yaml", help="YAML file (default: %(default)s)")
    parser.add_argument("--engine", choices=("local", "ray"), help="who does the work; the same as engine=...")
    parser.add_argument("--preview", type=int, metavar="N", help="make a page that shows about N records")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace values of the file")
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides + ([f"engine={arguments.engine}"] if arguments.engine else [])
    if arguments.preview is not None and arguments.preview < 1:
        parser.error(f"argument --preview: expected at least 1, got {arguments.preview}")
    try:
        config = load_config(arguments.config, overrides)
        report = process(config)
        if arguments.preview:
            from preview import write_page  # it shows tokens, and loads what makes them

            folder = Path(config.output)
            root, model, seed = report["image_root"], config.model, config.seed
            page = write_page(folder / "train.parquet", root, folder / "preview.html", arguments.preview, model, seed)
            print(f"{page}: open it in a browser")
    except sqlite3.DatabaseError as error:
        if "disk is full" not in str(error):
            file = Path(config.output, ".work", "journal.sqlite")
            sys.exit(f"process_image.py: {file} is damaged ({error}); delete it, and all media are checked anew")
        sys.exit(f"process_image.py: {config.output}: {error}; make room, the same command then goes on from here")
    except (ConfigError, OSError, ValueError, WorkerDied) as error:
        full = "errno 28" in str(error).lower()  # so in errors of Arrow, too
        hint = f"\nMake room for {config.output}; the same command then goes on from here" if full else ""
        sys.exit(f"process_image.py: {error}{hint}")
    except KeyboardInterrupt:
        sys.exit("process_image.py: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
