"""configs/slurm/train.sbatch: its syntax, what it starts, and what it does when the time is over."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SCRIPT = PROJECT / "configs" / "slurm" / "train.sbatch"
STUBS = {
    # A machine's part of the job, with the environment that Slurm gives it.
    "bin/srun": 'shift; export SLURM_NODEID=1; exec "$@"',
    "bin/scancel": '[ "$*" = "--signal=TERM 70123" ] && kill -TERM "$(cat pid.txt)"',  # to the steps of the job
    "bin/scontrol": 'case "$1" in show) printf "first\\nsecond\\n" ;; *) echo "$@" >> scontrol.txt ;; esac',
    # A training that ends a while after SIGTERM, as one does that writes a checkpoint.
    ".venv/bin/python": 'trap "sleep 0.3; echo saved > saved.txt; exit 143" TERM\n'
                        'echo $$ > pid.txt; echo "$@" > started.txt\n'
                        'if [ -n "${QUICK:-}" ]; then exit "$QUICK"; fi\nwhile true; do sleep 0.05; done',
}  # fmt: skip


@pytest.fixture
def job(tmp_path):
    """Starts the script as Slurm would on the machines of a job, with stand-ins for what it calls."""
    for name, body in STUBS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "70123", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "x",
    }  # fmt: skip

    def start(*arguments: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(["bash", str(SCRIPT), *arguments], env={**environment, **variables}, cwd=tmp_path)

    return start


def test_syntax():
    for script in (SCRIPT, PROJECT / "train.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_what_is_started_on_each_machine(job, tmp_path):
    assert job("--config", "a b.yaml", QUICK="0").wait(10) == 0
    assert (tmp_path / "started.txt").read_text().strip() == (
        "-m torch.distributed.run --nnodes 2 --nproc_per_node 4 --rdzv_id 70123 --rdzv_backend c10d "
        "--rdzv_endpoint first:30123 train.py --config a b.yaml"
    )
    assert job("--config", "x.yaml", QUICK="7", ACCELERATE="fsdp2.yaml").wait(10) == 7
    assert (tmp_path / "started.txt").read_text().strip() == (
        "-m accelerate.commands.launch --config_file fsdp2.yaml --num_machines 2 --num_processes 8 --machine_rank 1 "
        "--main_process_ip first --main_process_port 30123 train.py --config x.yaml"
    )
    assert not (tmp_path / "scontrol.txt").exists()


def test_the_end_of_the_time_lets_the_run_save_and_queues_it_again(job, tmp_path):
    process = job("--config", "x.yaml")
    while not (tmp_path / "started.txt").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # until the stand-in has set its trap
    process.send_signal(signal.SIGUSR1)  # to the batch script alone, as --signal=B:USR1 does
    assert process.wait(10) == 0
    assert (tmp_path / "saved.txt").exists()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 70123\n"
