"""scripts/launch.sh with stubs of nvidia-smi, python and accelerate: how many processes it starts, and on what."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUBS = {
    "nvidia-smi": "printf 'GPU 0: H100 (UUID: GPU-a)\\nGPU 1: H100 (UUID: GPU-b)\\n'",
    "python": "exit 0",  # the arguments are fine
    "accelerate": 'echo "$* | cpu ${ACCELERATE_USE_CPU:-no}"',
}


@pytest.mark.parametrize(
    ("visible", "asked", "expected"),
    [
        (None, None, "launch --quiet --multi_gpu --num_processes 2 | cpu no"),
        ("0,1", None, "launch --quiet --multi_gpu --num_processes 2 | cpu no"),
        ("1", None, "launch --quiet --num_processes 1 | cpu no"),
        ("GPU-b", None, "launch --quiet --num_processes 1 | cpu no"),
        ("", None, "launch --quiet --num_processes 1 | cpu no"),  # hidden, all of them: a run on the CPU
        ("-1", None, "launch --quiet --num_processes 1 | cpu no"),
        ("", "2", "launch --quiet --multi_gpu --num_processes 2 | cpu true"),
    ],
)
def test_one_process_for_each_gpu_that_may_be_seen(tmp_path, visible, asked, expected):
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    ours = ("CUDA_VISIBLE_DEVICES", "NUM_PROCESSES", "ACCELERATE_ARGS", "ACCELERATE_USE_CPU")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "VENV": str(tmp_path / "none")}
    env |= {name: value for name, value in (("CUDA_VISIBLE_DEVICES", visible), ("NUM_PROCESSES", asked)) if value is not None}
    command = ["bash", "-c", f"set -euo pipefail; source {ROOT}/scripts/launch.sh; launch train.py --seed 1"]
    started = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()
    assert started == expected.replace(" |", " --num_machines 1 --mixed_precision no --dynamo_backend no train.py --seed 1 |")


@pytest.mark.parametrize(
    ("given", "world"),
    [
        ({}, "2"),
        ({"NUM_PROCESSES": "3"}, "3"),
        ({"ACCELERATE_ARGS": "--config_file fsdp.yaml --num_processes 4"}, "4"),
        ({"ACCELERATE_ARGS": "--num_processes=4"}, "4"),
    ],
)
def test_arguments_are_checked_for_as_many_processes_as_will_run(tmp_path, given, world):
    """Some batches suit one process and not four: that is said before any is started."""
    for name, text in (STUBS | {"python": 'case "$*" in *parse_args*) echo "$WORLD_SIZE" > "$SEEN" ;; esac'}).items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    ours = ("CUDA_VISIBLE_DEVICES", "NUM_PROCESSES", "ACCELERATE_ARGS", "WORLD_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "VENV": str(tmp_path / "none"), "SEEN": str(tmp_path / "seen"), **given}
    command = ["bash", "-c", f"set -euo pipefail; source {ROOT}/scripts/launch.sh; launch train.py"]
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert (tmp_path / "seen").read_text().strip() == world


@pytest.mark.parametrize(
    ("cores", "gpus", "given", "expected"),
    [
        (1, 0, {}, "1"),
        (8, 0, {}, "2"),  # the batch is divided by it: not as many as there happen to be
        (8, 1, {}, "1"),
        (8, 0, {"NUM_PROCESSES": "1"}, "1"),
        (8, 1, {"NUM_PROCESSES": "3"}, "3"),
        (8, 0, {"ACCELERATE_ARGS": "--num_processes 4"}, "1"),  # whoever writes that divides the batch as well
    ],
)
def test_processes_of_a_tiny_recipe(tmp_path, cores, gpus, given, expected):
    stubs = {"nproc": f"echo {cores}", "nvidia-smi": STUBS["nvidia-smi"] if gpus else "exit 9"}
    for name, text in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "NUM_PROCESSES", "ACCELERATE_ARGS")}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "VENV": str(tmp_path / "none"), **given}
    command = ["bash", "-c", f"set -euo pipefail; source {ROOT}/scripts/launch.sh; tiny_processes"]
    assert subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip() == expected


@pytest.mark.parametrize("command", ["demo.sh", "scripts/train_refl_v1_5.sh"])
def test_without_an_environment_one_line_says_how_to_get_one(tmp_path, command):
    (tmp_path / "python").write_text("#!/usr/bin/env bash\nexit 1\n")  # as one that lacks torch, and as one that is not there
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": str(tmp_path / "none")}
    refused = subprocess.run(["bash", str(ROOT / command)], env=env, capture_output=True, text=True)
    assert refused.returncode == 1 and not refused.stdout
    (line,) = refused.stderr.splitlines()
    assert "no Python with PyTorch" in line and "bash scripts/quickstart.sh" in line and f"bash {ROOT / command}" in line


@pytest.mark.parametrize("found_by", ["pgrep", "/proc"])
def test_sigterm_reaches_the_trainer_also_where_there_is_no_pgrep(tmp_path, found_by):
    """The launcher ends by SIGTERM, and would leave the trainer behind; the trainer saves. Of the shell's tools only these are there."""
    if found_by == "/proc" and not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").is_file():
        pytest.skip("this kernel does not list a process's children")
    tools = ["bash", "cat", "dirname", "env", "grep", "sed", "sleep", *(["pgrep"] if found_by == "pgrep" else [])]
    for name in tools:
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here")
        (tmp_path / name).symlink_to(shutil.which(name))
    trainer = "trap 'echo saved; exit 0' TERM\necho begun\nfor _ in {1..400}; do sleep 0.05; done"
    launcher = "sleep 0.2; trainer & wait $!"  # the shell that starts it has its traps by then
    for name, text in {"trainer": trainer, "python": "exit 0", "accelerate": launcher, "nvidia-smi": "exit 9"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": str(tmp_path), "VENV": str(tmp_path / "none"), "NUM_PROCESSES": "1"}
    command = ["bash", "-c", f"set -euo pipefail; source {ROOT}/scripts/launch.sh; launch train.py"]
    shell = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert shell.stdout.readline() == "begun\n"
    shell.terminate()
    assert (shell.communicate(timeout=20)[0], shell.returncode) == ("saved\n", 0)


@pytest.mark.slow
def test_the_last_line_of_a_failed_run_is_its_own(tmp_path):
    """Not the launcher's: a user looks at the end of a long log."""
    (tmp_path / "train.py").write_text('def parse_args():\n    pass\n\nif __name__ == "__main__":\n    raise ValueError("what to do")\n')
    command = ["bash", "-c", f"set -euo pipefail; source {ROOT}/scripts/launch.sh; cd {tmp_path}; launch train.py"]
    env = {name: value for name, value in os.environ.items() if name != "ACCELERATE_ARGS"} | {"NUM_PROCESSES": "1"}
    failed = subprocess.run(command, env=env, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1] == "ValueError: what to do"
