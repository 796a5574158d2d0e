"""The engine for more than one machine: Ray Data. It is an optional requirement (requirements-ray.txt).

    python -m dataprocess.process_image --config dataprocess/config.yaml --engine ray             on this machine
    RAY_ADDRESS=auto python -m dataprocess.process_image --config ... --engine ray                on a running cluster

All machines of a cluster need the images under the same paths, with `shard_mb` the output folder too, and the packages
of requirements.txt; this project's code is sent to them. The journal and the order of the results are this process's.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dataprocess.engines import Apply, WorkerDied

AHEAD = 128  # items per core that are handed over at the same time: each hand-over costs a fraction of a second
BYTES = 1 << 28  # but not more of them than have so many bytes
RETRIES = 3  # of a task whose machine or process was lost; Ray's own default is to retry for ever
ITEMS = 8  # of a task of Ray, which costs milliseconds
PROJECT = Path(__file__).parents[1]


@contextmanager
def ray_engine(workers: int | None) -> Iterator[Apply]:
    """Workers of the cluster that RAY_ADDRESS names, or of a local one that lives as long as this block.

    Args:
        workers: cores that a local cluster has and, of any, how many are used at the same time; None: all.

    Raises:
        ValueError: Ray is not installed; says how to mend that.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        install = "python -m pip install -r requirements-ray.txt"
        raise ValueError(f"engine=ray needs Ray, which is not installed ({error}); run `{install}`") from error
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS", "local")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a local cluster reports to nobody
        if address == "local":
            settings = {"num_cpus": workers or len(os.sched_getaffinity(0)), "include_dashboard": False}
        else:
            settings = {"runtime_env": {"py_modules": [str(PROJECT / name) for name in ("dataprocess", "dataset")]}}
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **settings)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the pipeline shows its own
    context.execution_options.preserve_order = True
    cores = workers or int(ray.cluster_resources()["CPU"])

    def apply(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for part in portions(map(pickle.dumps, items), AHEAD * cores):
            rows = [{"number": number, "item": item} for number, item in enumerate(part)]
            tasks = max(len(rows) // ITEMS, min(len(rows), cores))
            data = ray.data.from_items(rows, override_num_blocks=tasks)
            strategy = ray.data.TaskPoolStrategy(size=min(cores, tasks))
            results = data.map(on_pickled, fn_args=(function,), compute=strategy, max_retries=RETRIES)
            try:
                for row in results.iter_rows():
                    result = pickle.loads(row["result"])
                    if isinstance(result, Raised):
                        raise result.error
                    yield result
            except ray.exceptions.RayError as error:
                raise WorkerDied(f"Ray: {error} The same command goes on where it stopped") from error

    try:
        yield apply
    finally:
        if ours:
            ray.shutdown()


def portions(items: Iterable[bytes], count: int) -> Iterator[list[bytes]]:
    """The items in lists of at most `count`; a list ends sooner when it has `BYTES`."""
    part, size = [], 0
    for item in items:
        part.append(item)
        size += len(item)
        if len(part) == count or size >= BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


class Raised(NamedTuple):
    """In place of a result: what the function raised, which Ray would wrap in reports of its own."""

    error: Exception


def on_pickled(row: dict, function: Callable[[Any], Any]) -> dict:
    """A row of the data set: an item and what `function` makes of it are Python objects, in bytes."""
    try:
        result = function(pickle.loads(row["item"]))
    except (OSError, ValueError) as error:
        result = Raised(error)
    return {"number": row["number"], "result": pickle.dumps(result)}
