"""scripts/slurm/train.sbatch on a Slurm of two stubs: what each node is told to start, and what happens when the time is up."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Runs the command once per node, at the same time, as srun does.
SRUN = """#!/usr/bin/env bash
if [ "$1" = --overlap ]; then shift; fi
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & done
wait
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'alpha\\nbeta\\n'; else echo "$@" >> outputs/requeued; fi
"""
WRAPPER = """#!/usr/bin/env bash
echo "$ACCELERATE_ARGS | $*" > outputs/node-$SLURM_NODEID
if [ -n "${STAY:-}" ]; then
  trap 'exit 0' TERM
  while true; do sleep 0.05; done
fi
exit "${STATUS:-0}"
"""


@pytest.fixture
def cluster(tmp_path):
    """start(**environment) -> a running job of two nodes with four GPUs each, in a folder with stubs of Slurm."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "outputs").mkdir()
    for name, text in {"bin/srun": SRUN, "bin/scontrol": SCONTROL, "wrapper.sh": WRAPPER}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "x", "SLURM_SUBMIT_DIR": "."}

    def start(*arguments, **environment):
        return subprocess.Popen(
            ["bash", ROOT / "scripts/slurm/train.sbatch", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **slurm, **environment, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        )  # fmt: skip

    return tmp_path / "outputs", start


def test_every_node_starts_its_part_of_one_world(cluster):
    """Two nodes of four GPUs: eight processes, met at the first node; the port comes from the job, 20000 + 40007 mod 20000 = 20007."""
    outputs, start = cluster
    assert start("wrapper.sh", "--seed", "1").wait(20) == 0
    for node in range(2):
        launch, arguments = (outputs / f"node-{node}").read_text().split(" | ")
        assert launch == (
            "--multi_gpu --num_machines 2 --num_processes 8 --mixed_precision no --dynamo_backend no "
            f"--main_process_ip alpha --main_process_port 20007 --machine_rank {node}"
        )
        assert arguments.split() == ["--seed", "1"]
    assert sorted(path.name for path in outputs.iterdir()) == ["node-0", "node-1"]  # nothing is left behind, and it is not queued again


def test_when_the_time_is_up_the_wrappers_are_told_and_the_job_queues_itself_again(cluster):
    outputs, start = cluster
    job = start("wrapper.sh", STAY="1")
    deadline = time.monotonic() + 20
    while not all((outputs / f"node-{node}").exists() for node in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)  # the wrappers set their traps
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    assert (outputs / "requeued").read_text().split() == ["requeue", "40007"]


def test_a_job_that_runs_again_goes_on_from_its_checkpoint(cluster):
    outputs, start = cluster
    assert start("wrapper.sh", SLURM_RESTART_COUNT="1", SLURM_NNODES="1").wait(20) == 0
    assert (outputs / "node-0").read_text().split(" | ")[1].split() == ["--resume_from_checkpoint", "latest"]


def test_a_job_without_a_wrapper_says_what_to_name(cluster):
    job = cluster[1]()
    assert job.wait(20) == 2
    assert "name a wrapper" in job.stderr.read()
