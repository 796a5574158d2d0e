"""Runs of train.py on one process or several, without the seconds that imports take.

They are forked from a process that has imported all of it and computed nothing: after a backward pass torch allows no
fork.
"""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "tests.training.launch"])


def accelerate_environment(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/<name>.yaml` tells its processes."""
    settings = yaml.safe_load((PROJECT / "configs" / "accelerate" / f"{name}.yaml").read_text())
    environment = {key.upper(): str(value).lower() for key, value in settings.get("fsdp_config", {}).items()}
    if environment:
        environment |= {"ACCELERATE_USE_FSDP": "true"}
    if "deepspeed_config" in settings:
        zero = settings["deepspeed_config"]
        environment |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero["zero_stage"]),
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": zero["offload_optimizer_device"],
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": zero["offload_param_device"],
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(zero["zero3_init_flag"]).lower(),
            "DS_ACCELERATOR": "cpu",
        }
    return environment


def launch(
    arguments: list[str],
    processes: int = 1,
    environment: dict[str, str] | None = None,
    before: Callable[[], None] | None = None,
    timeout: float = 60,
) -> tuple[list[int], str]:
    """Runs `train.py <arguments>`; exit statuses of the processes, and what they wrote, one after the other.

    Args:
        environment: further variables.
        before: called in each process first; a function that pickle knows by name.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [Path(tempfile.gettempdir(), f"kanjian-{os.getpid()}-{port}-{rank}.log") for rank in range(processes)]
    variables = [{**(environment or {}), **_rank_variables(rank, processes, port)} for rank in range(processes)]
    children = [
        CONTEXT.Process(target=_child, args=(arguments, own, str(log), before), daemon=True)
        for own, log in zip(variables, logs, strict=True)
    ]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(timeout)
    finally:
        for child in children:
            child.kill()
            child.join()
    output = "".join(log.read_text() for log in logs)
    for log in logs:
        log.unlink()
    return [child.exitcode for child in children], output


def _rank_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    if processes == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _child(arguments: list[str], environment: dict[str, str], log: str, before: Callable[[], None] | None) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    os.chdir(PROJECT)
    sys.argv = ["train.py", *arguments]
    import train

    if before is not None:
        before()
    train.main()
