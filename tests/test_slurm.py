"""scripts/slurm/train.sbatch on a Slurm of two stubs: what each node is told to start, and what happens when the time is up."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UP = signal.SIGUSR1  # what tells the job that its time is up
# Runs the command once per node, at the same time, as srun does; one beside another step returns when that one may be over.
SRUN = """#!/usr/bin/env bash
steps=() status=0 pause=0
if [ "$1" = --overlap ]; then shift; pause=0.3; fi
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & steps+=($!); done
for step in "${steps[@]}"; do wait "$step" || status=$?; done
sleep $pause
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'alpha\\nbeta\\n'; else echo "$@" >> outputs/requeued; fi
"""
WRAPPER = """#!/usr/bin/env bash
echo "$ACCELERATE_ARGS | $*" > outputs/node-$SLURM_NODEID
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then echo "${SRUN_CPUS_PER_TASK:-}" > outputs/cores-$SLURM_NODEID; fi
if [ -n "${STAY:-}" ]; then
  trap "$STAY" TERM
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

    def start(*arguments, start_new_session=False, **environment):
        return subprocess.Popen(
            ["bash", ROOT / "scripts/slurm/train.sbatch", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **slurm, **environment, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
            start_new_session=start_new_session,
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


def test_the_step_gets_the_jobs_cores(cluster):
    """srun takes --cpus-per-task over from SRUN_CPUS_PER_TASK alone."""
    outputs, start = cluster
    assert start("wrapper.sh", SLURM_CPUS_PER_TASK="16").wait(20) == 0
    assert (outputs / "cores-0").read_text() == "16\n"


def test_on_one_node_the_launchers_arguments_may_be_given(cluster):
    outputs, start = cluster
    given = "--config_file scripts/accelerate/fsdp2.yaml --num_processes 4"
    assert start("wrapper.sh", SLURM_NNODES="1", ACCELERATE_ARGS=given).wait(20) == 0
    assert (outputs / "node-0").read_text().split(" | ")[0] == f"{given} --machine_rank 0"


@pytest.mark.parametrize("given", [{"ACCELERATE_ARGS": "--multi_gpu"}, {"NUM_PROCESSES": "2"}])
def test_what_would_not_count_is_refused(cluster, given):
    job = cluster[1]("wrapper.sh", **given)
    assert job.wait(20) == 2 and next(iter(given)) in job.stderr.read()


def wait_for_the_wrappers(outputs):
    deadline = time.monotonic() + 20
    while not all((outputs / f"node-{node}").exists() for node in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)  # the wrappers set their traps


@pytest.mark.slow
def test_when_the_time_is_up_the_wrappers_are_told_and_the_job_queues_itself_again(cluster):
    outputs, start = cluster
    job = start("wrapper.sh", STAY="exit 0")
    wait_for_the_wrappers(outputs)
    job.send_signal(UP)
    assert job.wait(20) == 0
    assert (outputs / "requeued").read_text().split() == ["requeue", "40007"]


@pytest.mark.slow
def test_a_job_whose_time_is_up_while_caches_are_filled_queues_itself_again(cluster):
    """The trainers' own handlers are not there yet: they die of the signal, and so does the wrapper's status say, 128 + 15."""
    outputs, start = cluster
    job = start("wrapper.sh", STAY="exit 143")
    wait_for_the_wrappers(outputs)
    job.send_signal(UP)
    assert job.wait(20) == 143
    assert (outputs / "requeued").read_text().split() == ["requeue", "40007"]
    assert sorted(path.name for path in outputs.iterdir()) == ["node-0", "node-1", "requeued"]


@pytest.mark.slow
def test_one_node_whose_wrapper_is_gone_does_not_keep_the_job_from_the_queue(cluster):
    """What should end the wrappers then fails itself on that node."""
    outputs, start = cluster
    job = start("wrapper.sh", STAY="exit 0")
    wait_for_the_wrappers(outputs)
    for file in outputs.glob("slurm-pids.*/1"):
        os.kill(int(file.read_text()), signal.SIGKILL)
    job.send_signal(UP)
    assert job.wait(20) == 137
    assert (outputs / "requeued").read_text().split() == ["requeue", "40007"]


def test_a_job_that_ended_in_an_error_is_not_queued_again(cluster):
    outputs, start = cluster
    assert start("wrapper.sh", STATUS="3").wait(20) == 3
    assert not (outputs / "requeued").exists()


def test_a_job_that_was_cancelled_stays_so(cluster):
    """scancel sends TERM to every process of the job, the script of the job among them."""
    outputs, start = cluster
    job = start("wrapper.sh", STAY="exit 0", start_new_session=True)
    wait_for_the_wrappers(outputs)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(20) != 0
    assert sorted(path.name for path in outputs.iterdir()) == ["node-0", "node-1"]


def test_a_job_that_runs_again_goes_on_from_its_checkpoint(cluster):
    outputs, start = cluster
    assert start("wrapper.sh", SLURM_RESTART_COUNT="1", SLURM_NNODES="1").wait(20) == 0
    assert (outputs / "node-0").read_text().split(" | ")[1].split() == ["--resume_from_checkpoint", "latest"]


def test_the_job_asks_for_the_signal_that_it_listens_to():
    text = (ROOT / "scripts/slurm/train.sbatch").read_text()
    assert f"--signal=B:{UP.name.removeprefix('SIG')}@300" in text


def test_a_job_without_a_wrapper_says_what_to_name(cluster):
    job = cluster[1]()
    assert job.wait(20) == 2
    assert "name a wrapper" in job.stderr.read()
