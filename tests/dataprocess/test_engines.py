import multiprocessing
import os
import time

import pytest

from dataprocess.engines import WorkerDied, local_engine


def square(number: int) -> int:
    time.sleep(0.01 * (number % 3 == 0))
    return number * number


def process_id(_) -> int:
    return os.getpid()


def refuse(number: int) -> int:
    if number == 5:
        raise ValueError(f"{number} is refused")
    return number


def die(number: int) -> int:
    if number == 5:
        os._exit(1)
    return number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items(workers):
    with local_engine(workers) as apply:
        for count in (0, 1, 2, 50):  # one engine serves several phases
            assert list(apply(square, iter(range(count)))) == [number * number for number in range(count)]


def test_who_does_the_work():
    with local_engine(1) as apply:
        assert set(apply(process_id, range(5))) == {os.getpid()}
    with local_engine(2) as apply:
        assert list(apply(process_id, [0])) == [os.getpid()]
        others = set(apply(process_id, range(50)))
    assert os.getpid() not in others and 1 <= len(others) <= 2


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for number in range(1000):
            taken.append(number)
            yield number

    with local_engine(2) as apply:
        results = apply(square, items())
        assert [next(results) for _ in range(3)] == [0, 1, 4]
        assert len(taken) < 20


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_function_raises_comes_through(workers):
    with pytest.raises(ValueError, match="5 is refused"), local_engine(workers) as apply:
        list(apply(refuse, range(100)))


def test_a_worker_that_was_killed():
    with pytest.raises(WorkerDied, match="killed for its memory.*`workers`"), local_engine(2) as apply:
        list(apply(die, range(100)))


def test_an_error_ends_workers_in_the_middle_of_their_work():
    begin = time.monotonic()
    with pytest.raises(KeyError), local_engine(2) as apply:
        for _ in apply(time.sleep, [0, *[300] * 20]):
            raise KeyError
    assert time.monotonic() - begin < 100 and not multiprocessing.active_children()
