"""Processes of the trainers that start at once: forked from one that has imported the heavy libraries and computed nothing.

Each has memory, signals, files and an exit code of its own, as `python train_….py` has; only the ten seconds of imports are saved.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

LIBRARIES = [
    "torch._dynamo", "accelerate", "peft", "matplotlib.pyplot", "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5", "transformers.models.clip.tokenization_clip", "transformers.models.t5.tokenization_t5",
    "tensorboard.summary.writer.event_file_writer",
]  # fmt: skip


def _run(command: list[str], log: Path, env: dict[str, str], cwd: Path) -> None:
    """The whole life of a forked process: output to a file, environment, arguments, and the script as __main__."""
    multiprocessing.set_start_method(None, force=True)  # of a data loader's workers: that of a program, not of the tests
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = command
    sys.path[:0] = [str(Path(command[0]).resolve().parent), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    runpy.run_path(command[0], run_name="__main__")


class Forked:
    """What the tests use of subprocess.Popen, for `ranks` processes of one script."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str], cwd: Path, ranks: int = 1):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)  # the first call counts
        with mock.patch.dict(os.environ, env, clear=True), _quiet():  # libraries read some variables when they are imported
            multiprocessing.forkserver.ensure_running()
        log.write_text("")
        self.processes = [
            context.Process(target=_run, args=(command, log, env | _rendezvous(rank, ranks, port), cwd))
            for port in [_free_port()] for rank in range(ranks)
        ]  # fmt: skip
        for process in self.processes:
            process.start()
        atexit.register(self.kill)  # a test that failed half way would leave pytest waiting for them

    @property
    def returncode(self) -> int | None:
        """None while one of them lives; else the first that is not 0. If one fails, the others would wait for it: they are killed."""
        codes = [process.exitcode for process in self.processes]
        if any(codes) and None in codes:
            self.kill()
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 400) -> int:
        end = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.processes), timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What is started inside writes nowhere: whoever reads the tests' output through a pipe would wait for its end, too."""
    kept, nowhere = [os.dup(number) for number in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    try:
        yield
    finally:
        for number, file in zip((1, 2), kept, strict=True):
            os.dup2(file, number)
            os.close(file)
        os.close(nowhere)


def stop() -> None:
    """Ends the process that the others are forked from."""
    pid = multiprocessing.forkserver._forkserver._forkserver_pid
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _rendezvous(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells each of several processes, and accelerate to leave the GPUs alone."""
    if ranks == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
