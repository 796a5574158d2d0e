"""A function applied to many items: the results come in the order of the items, whoever computes them and when.

The functions of the pipeline are pure and their items and results can be pickled, so it does not matter where they run:
here, in the processes of `local_engine`, or on the machines of `dataprocess.ray_engine`.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any

AHEAD = 4  # items per worker that are under way at the same time

Apply = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


class WorkerDied(RuntimeError):
    """A process ended in the middle of its work."""


def open_engine(name: str, workers: int | None) -> AbstractContextManager[Apply]:
    """`with open_engine("local", None) as apply: for result in apply(function, items): ...`

    Args:
        name: "local" or "ray".
        workers: processes; None: as many as this process may use cores, or all that a Ray cluster has.

    Raises:
        ValueError: "ray" where Ray is not installed; says how to mend that.
    """
    if name == "ray":
        from dataprocess.ray_engine import ray_engine

        return ray_engine(workers)
    return local_engine(workers or len(os.sched_getaffinity(0)))


@contextmanager
def local_engine(workers: int) -> Iterator[Apply]:
    """Processes of this machine; one worker, or a single item, is served by this very process."""
    pool = None

    def apply(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        nonlocal pool
        items = iter(items)
        first = list(islice(items, 2))
        if workers == 1 or len(first) < 2:
            yield from map(function, chain(first, items))
            return
        pool = pool or _start_pool(workers)
        under_way = deque()
        try:
            for item in chain(first, items):
                under_way.append(pool.submit(function, item))
                if len(under_way) > AHEAD * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a worker process ended in the middle of its work; was it killed for its memory? The same command goes "
                "on where it stopped, and needs less memory with a smaller number of `workers`"
            ) from error

    try:
        yield apply
    except BaseException:
        if pool is not None:
            _end_pool(pool)
        raise
    if pool is not None:
        pool.shutdown()


def _end_pool(pool: ProcessPoolExecutor) -> None:
    """Ends the workers at once, whatever they are at: after Ctrl-C nobody waits for images to be decoded in vain.

    A second Ctrl-C meanwhile would leave workers behind that this process then waits for without end.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        for worker in multiprocessing.active_children():
            worker.kill()
        pool.shutdown(cancel_futures=True)
    finally:
        if main:
            signal.signal(signal.SIGINT, before)


def _start_pool(workers: int) -> ProcessPoolExecutor:
    # Not forked from this process, whose threads (of Arrow, of tqdm) would be missing there; from a server that has
    # imported everything already, so that a further process starts in milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dataprocess.pipeline"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers wait for work on a pipe that they hold open themselves, and would outlive a parent that was killed."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
