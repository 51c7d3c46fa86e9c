"""start(args) -> Run: devices, processes, seed, output folder, args.json, trackers, signals."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from src import checkpoint, lora, sharding
from src.pipelines import common, geometry

_PATIENCE = timedelta(hours=2)  # how long processes wait for one that renders or scores; torch's default is 10 minutes
# The same at a barrier, or for a main process that downloads and scans a data set: 12 million pictures on a network disk, at 300 a second,
# take 11 hours. On GPUs a process that hangs in training is still detected after _PATIENCE: gradients use another process group.
_PATIENCE_WITH_MAIN = timedelta(hours=12)

T = TypeVar("T")
WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # of frozen parts, by --mixed_precision


class StopSignal:
    """From `install` on, the first SIGTERM or Ctrl-C sets a flag that the loop reads; the second Ctrl-C interrupts at once.

    Before `install`, either ends the process at once: loading models and filling caches may take hours, and there is nothing to save.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Takes over both signals; does nothing outside the main thread, where Python has no signal handlers."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            current = signal.getsignal(number)
            owner = getattr(current, "__self__", None)  # the handler of an earlier run in this process that ended in an error
            self._previous[number] = owner._previous[number] if isinstance(owner, StopSignal) else current
            signal.signal(number, self._handle)

    def restore(self) -> None:
        """Restores the previous handlers of both signals."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: object) -> None:
        self.received = True
        text = f"\n{signal.Signals(number).name}: stopping after this step, with a checkpoint (Ctrl-C again: stop at once)\n"
        os.write(2, text.encode())  # print is not safe inside a handler
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def refusals() -> Iterator[None]:
    """Inside, a ValueError, an error that the user has to fix, ends the program with its message in one line."""
    try:
        yield
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


def resident_peak() -> int:
    """Peak of this process's RAM, in bytes."""
    status = Path("/proc/self/status")  # on Linux ru_maxrss starts at the parent's peak
    if found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else ""):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _numbered(device: torch.device) -> torch.device:
    """The device with its number: on one GPU accelerate's "cuda" does not equal tensors' "cuda:0", and `set_device` needs the latter."""
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


class Run:
    """One training run on this process: what every script needs besides its algorithm."""

    def __init__(self, args: argparse.Namespace, accelerator: Any):
        self.args, self.accelerator = args, accelerator
        self.output_dir: Path = args.output_dir
        self.device = _numbered(accelerator.device)
        self.weight_dtype = WEIGHT_DTYPES[args.mixed_precision]
        self.world: int = accelerator.num_processes
        self.rank: int = accelerator.process_index
        self.is_main: bool = accelerator.is_main_process
        self.signals = StopSignal()
        self._pending: tuple[Any, Tensor] | None = None
        # host-side messages go over the CPU: reading one does not wait for the GPU
        self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE_WITH_MAIN) if self.world > 1 else None

    def print(self, text: str) -> None:
        """One line from the main process, above the progress bars."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def progress(self, items: Sequence[Any], text: str) -> Iterable[Any]:
        """The items, with a bar on the main process that goes away at the end."""
        return tqdm(items, desc=text, leave=False, disable=not self.is_main, mininterval=0.5)

    def gather(self, tensor: Tensor) -> Tensor:
        """(n, ...) on every process, n the same everywhere -> (world * n, ...) in the order of the ranks."""
        assert tensor.ndim, "gather joins along the first axis: give it at least one"
        return self.accelerator.gather(tensor)

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over the processes, element by element; same shape."""
        return self.accelerator.reduce(tensor, reduction="mean") if self.world > 1 else tensor

    def broadcast(self, value: Any) -> Any:
        """The main process's value (anything that pickles) on every process."""
        if self.world == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def from_main(self, make: Callable[[], T]) -> T:
        """Calls `make` on the main process alone; returns its result (anything that pickles) on every process. The others wait.

        Raises:
            ValueError: on every process, with the same message, if `make` raises it. Any other exception there ends the others at once.
        """
        if not self.is_main:
            made, refused = self.broadcast(None)
            if refused is not None:
                raise ValueError(refused) if refused else SystemExit("error: the main process failed; its own message says why")
            return made
        made, refused = None, ""  # sent to the others if `make` neither returns nor raises ValueError
        try:
            made, refused = make(), None
        except ValueError as error:
            refused = str(error) or type(error).__name__
            raise
        finally:  # whatever happened: the others wait for this
            self.broadcast((made, refused))
        return made

    def require(self, make: Callable[[], T]) -> T:
        """As `from_main`; but a ValueError in `make`, an error that the user has to fix, ends the program with its message in one line."""
        with refusals():
            return self.from_main(make)

    def stop_requested(self, wait: bool = False) -> bool:
        """Whether any process received a stop signal; call it once per step, on every process: all get the same answer.

        With several processes the answer is that of the previous call, so that none waits for another inside a step; with `wait` it is
        this call's: for calls that are far apart.
        """
        if self.world == 1:
            return self.signals.received
        flag = torch.tensor([int(self.signals.received)])
        work = torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        pending, self._pending = self._pending, (work, flag)
        if wait:
            pending = self._pending
        if pending is None:
            return False
        pending[0].wait()
        return bool(pending[1].item())

    def turns(self, count: int) -> range:
        """This process's share of the numbers below `count`.

        Every process gets equally many, since all must take part whenever sharded weights are gathered. Some numbers are therefore `count`
        or more: compute for them, but discard the result.
        """
        return range(self.rank, -(-count // self.world) * self.world, self.world)

    @contextmanager
    def no_sync(self, model: Any, last: bool) -> Iterator[None]:
        """Around the backward pass of a micro-batch: gradients are summed over the processes only at the `last` one.

        FSDP2 sums at every one: it would keep unsummed gradients unsharded, 9 GB in fp32 for SD3.5-medium on each GPU, however many.
        """
        if last or self.world == 1 or self.accelerator.is_fsdp2:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def barrier(self) -> None:
        """Waits until every process is here, also for one that fills a cache or uploads for hours."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)
        self.accelerator.wait_for_everyone()

    def clip_gradients(self, parameters: list[torch.nn.Parameter], max_norm: float) -> Tensor:
        """Scales the gradients down to a global norm of `max_norm` (0: leaves them); returns the norm before, a scalar on the device."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if {gradient.dtype for gradient in gradients} == {torch.bfloat16}:  # clip_grad_norm_ would compute the norm to three digits
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm or float("inf"), norm)
            return norm
        return sharding.whole(self.accelerator.clip_grad_norm_(parameters, max_norm or float("inf")))  # undoes fp16's loss scale first

    def average_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Mean over the processes, in place, for weights outside the module that DistributedDataParallel wraps; once per optimizer step."""
        if self.world > 1:
            for parameter in parameters:
                parameter.grad = self.mean(parameter.grad)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Shows a PIL image in the trackers."""
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [image]}, step=step)

    def peak_memory(self) -> int:
        """Peak memory in bytes: of tensors on the GPU, or, without a GPU, of this process in RAM."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident_peak()

    def finish(self, text: str | None = None) -> None:
        """Closes the trackers, leaves the process group, gives the signals back; prints a last line."""
        if self._pending is not None:
            self._pending[0].wait()
        self.barrier()
        self.accelerator.end_training()
        self.signals.restore()
        if text:
            self.print(text)


# --------------------------------------------------------------------------- several machines


def check_shared(run: Run, folder: Path, flag: str) -> None:
    """Makes `folder`, and ends every process if one of them sees a different folder of that name, as on machines with separate disks.

    Such a run would miss cache files after hours, or resume on one machine and start afresh on the others.

    Raises:
        SystemExit: naming the flag.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if run.world == 1:
        return
    probe = folder / f".seen-by-all-{run.broadcast(secrets.token_hex(8))}"
    if run.is_main:
        probe.touch()
    run.barrier()
    deadline = time.monotonic() + 10  # a network file system may take its time to show it
    while not probe.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = int(run.gather(torch.tensor([float(probe.exists())], device=run.device)).sum().item())
    if run.is_main:
        probe.unlink()
    if seen < run.world:
        raise SystemExit(
            f"error: --{flag} {folder}: {run.world - seen} of {run.world} processes see another folder; it must lie on storage that all "
            "machines share"
        )


def check_equal_gpus(run: Run, flag: str) -> None:
    """Ends every process if their GPUs differ: the numbers that a generator draws depend on how many threads run at once.

    Raises:
        SystemExit: naming the flag.
    """
    if run.device.type != "cuda" or run.world == 1:
        return
    gpu = torch.cuda.get_device_properties(run.device)
    threads = torch.tensor([gpu.multi_processor_count * gpu.max_threads_per_multi_processor], device=run.device)
    counts = run.gather(threads).tolist()
    if len(set(counts)) > 1:
        raise SystemExit(
            f"error: {flag}: the GPUs differ ({', '.join(map(str, counts))} threads), and each would round its weights otherwise; "
            "take equal ones (CUDA_VISIBLE_DEVICES), or --weights_dtype fp32"
        )


def interface_to(address: str) -> str | None:
    """Name of the network interface that leads to `address`, or has it; None if it is unknown or the loopback."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # chooses a route, sends nothing
        except OSError:
            return None
        own = probe.getsockname()[0]
    found = (name for name, held in psutil.net_if_addrs().items() if own in {one.address for one in held})
    return None if own.startswith("127.") else next(found, None)


def _settle_gloo(environ: MutableMapping[str, str]) -> None:
    """On several machines, sets gloo's interface: the default is that of the host name, on Debian and Ubuntu the loopback."""
    several = int(environ.get("LOCAL_WORLD_SIZE", 1)) < int(environ.get("WORLD_SIZE", 1))
    if not several or "GLOO_SOCKET_IFNAME" in environ:
        return
    # On the first machine MASTER_ADDR may be the loopback: then the interface that leads to an outside address, one reserved for examples.
    if name := interface_to(environ.get("MASTER_ADDR", "")) or interface_to("192.0.2.1"):
        environ["GLOO_SOCKET_IFNAME"] = name


# --------------------------------------------------------------------------- refusals and warnings


def check_world(environ: Mapping[str, str], world: int) -> None:
    """Refuses a launcher that promised more processes than there are.

    `accelerate launch --num_processes 2` without a GPU starts one process. Its only traces: MASTER_ADDR is set, as
    for several processes, but not WORLD_SIZE, which real ones have.

    Raises:
        ValueError: names the command that works.
    """
    promised = environ.get("WORLD_SIZE")
    silent = promised is None and "MASTER_ADDR" in environ and "ACCELERATE_MIXED_PRECISION" in environ
    if (promised is None or int(promised) == world) and not silent:
        return
    asked = f"{promised} processes" if promised else "several processes (MASTER_ADDR is set)"
    raise ValueError(
        f"the launcher was asked for {asked}, but {world} runs alone; on a CPU use "
        "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`, on one process unset MASTER_ADDR and WORLD_SIZE"
    )


def unused_gpu(driver: bool, usable: bool, built_for: str | None) -> str | None:
    """Why torch does not use the GPU although an NVIDIA driver is installed, and the cure, or None; built_for: torch.version.cuda."""
    if usable or not driver:
        return None
    if built_for is None:
        return (
            f"this machine has an NVIDIA driver, but torch {torch.__version__} is a CPU build. "
            "Install a CUDA build with the command that https://pytorch.org/get-started/locally shows"
        )
    return (
        f"this machine has an NVIDIA driver, but torch (built for CUDA {built_for}) finds no GPU. "
        "Check CUDA_VISIBLE_DEVICES and that the driver supports that CUDA version (nvidia-smi prints it)"
    )


def _unused_gpu() -> str | None:
    driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
    return unused_gpu(driver, torch.accelerator.is_available(), torch.version.cuda)


def plan_without_download(args: argparse.Namespace) -> None:
    """With --dry_run a published model that is not there yet is planned from its configuration, which is written to --cache_dir."""
    for flag in ("pretrained_model_name_or_path", "reference_model"):
        path = Path(vars(args).get(flag) or "") if args.dry_run else Path()
        if path.name in geometry.FOLDERS and not path.exists() and not common.is_hub_id(str(path)):
            print(f"{path} is not there: its plan follows from the published configuration; the run needs it there")
            setattr(args, flag, str(args.cache_dir / "published" / path.name))
            geometry.write_configs(geometry.MODELS[geometry.FOLDERS[path.name]], vars(args)[flag])


def check(args: argparse.Namespace) -> None:
    """Refuse an unfit result folder or precision, and a launcher that shards weights in a program that does not.

    Raises:
        ValueError: a folder with a model that is not ours, or with a result of the other kind; fp16 without a GPU; bf16, the precision
            of real models, if there is a GPU that torch cannot use; FSDP2 or DeepSpeed.
    """
    plan_without_download(args)
    _check_output(args.output_dir, adapter=trains_adapter(args))
    _check_precision(args, torch.device("cuda" if torch.accelerator.is_available() else "cpu"))
    meant = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles") or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if args.mixed_precision == "bf16" and not meant and not args.dry_run and (trouble := _unused_gpu()):
        raise ValueError(
            f"--mixed_precision bf16: {trouble}; to train on the CPU all the same, which takes weeks with a real model, put "
            "CUDA_VISIBLE_DEVICES='' before the command"
        )
    if not vars(args).keys() & {"weights_dtype", "full_weights"}:  # those programs check it themselves
        sharding.check_whole(os.environ)


def trains_adapter(args: argparse.Namespace) -> bool:
    """Whether the run's result is a LoRA, and not a model."""
    flags = vars(args)
    return "rank" in flags and not flags.get("full_weights") and flags.get("use_lora", True)


def _check_output(folder: Path, *, adapter: bool) -> None:
    """Refuses a foreign model for a LoRA, too: the run's args.json would mark the model as ours, and a later full run could replace it."""
    if (folder / "model_index.json").is_file() and not (folder / "args.json").is_file():  # every run of ours leaves one
        raise ValueError(
            f"--output_dir {folder} holds a model that no run here wrote, and that this or a later run would replace; choose another folder"
        )
    other, kind = ("model_index.json", "whole model") if adapter else (lora.WEIGHTS_NAME, "LoRA")
    if (folder / other).is_file():
        raise ValueError(
            f"--output_dir {folder} holds the {kind} of an earlier run, which would pass for the result of this one; "
            "choose another folder, or delete it"
        )


def _check_precision(args: argparse.Namespace, device: torch.device) -> None:
    if args.mixed_precision == "fp16" and device.type == "cpu":  # accelerate would silently compute in fp32
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use --mixed_precision bf16 or no")


# --------------------------------------------------------------------------- start


def resume_args(args: argparse.Namespace) -> str | None:
    """Takes the seed of the checkpoint to be resumed if none is given; returns a line naming the flags that differ, or None."""
    folder = checkpoint.locate(args.resume_from_checkpoint, args.output_dir)
    if folder is None:
        return None
    saved = checkpoint.saved_args(folder)
    if args.seed is None:
        args.seed = saved["seed"]
    changes = checkpoint.changed_flags(saved, plain_args(args))
    if not changes:
        return None
    return f"{folder.name} was written with other flags: {', '.join(changes)} (the optimizer's own settings stay those of the checkpoint)"


def plain_args(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON values; serves as --config of another run."""
    plain = {name: value for name, value in vars(args).items() if name != "config"}
    return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}


def _write_args(args: argparse.Namespace) -> None:
    path = args.output_dir / "args.json"
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(plain_args(args), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _settle_numerics(args: argparse.Namespace) -> None:
    """Sets the process-wide switches, both ways: an earlier run of this process may have set them otherwise."""
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32 is not False  # unset: torch's own defaults, TF32 in convolutions alone
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = False
    torch.utils.deterministic.fill_uninitialized_memory = False  # saves time: nothing here reads uninitialised memory
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic


def quieten_libraries() -> None:
    """Silence diffusers' progress bars, bitsandbytes' notice about CPU kernels, and two warnings.

    One is about DistributedDataParallel's `broadcast_buffers`, whose successor accelerate cannot pass and older versions of torch lack.
    The other is about a schedule that advances although an update was skipped: that is intended.
    """
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.* is deprecated", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()


def _accelerator(args: argparse.Namespace) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

    # accelerate refuses another precision if this process had a run before; there is no public way to reset it
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    names = {"all": ["tensorboard", "wandb"], "none": None}.get(args.report_to, [args.report_to])
    _settle_gloo(os.environ)
    several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    return Accelerator(
        mixed_precision=args.mixed_precision,
        cpu=several_on_cpu,  # otherwise each of torchrun's processes would run alone
        log_with=names,
        project_config=ProjectConfiguration(project_dir=str(args.output_dir), logging_dir=str(args.output_dir / "logs")),
        # explicit, since environment variables would set both otherwise: the training loop accumulates and compiles by itself
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=_PATIENCE),
            # buffers never change: broadcasting SD3's position embeddings in every forward pass would send 0.45 GB
            # gradients are views of the communication buckets: saves a copy, 9 GB in a full fine-tuning of SD3.5-medium
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )


def _start_trackers(run: Run) -> None:
    """Continues the curves of a resumed run instead of drawing a second one over them."""
    args = run.args
    if args.report_to == "none":
        return
    logs = run.output_dir / "logs"
    folder = checkpoint.locate(args.resume_from_checkpoint, run.output_dir)
    options: dict[str, dict[str, Any]] = {"tensorboard": {}, "wandb": {}}
    if folder is not None:
        options["tensorboard"]["purge_step"] = int(folder.resolve().name.rsplit("-", 1)[1]) + 1
    if args.report_to in ("wandb", "all") and run.is_main:
        logs.mkdir(exist_ok=True)
        file = logs / "wandb_id"
        if folder is None or not file.exists():
            file.write_text(secrets.token_hex(4), encoding="utf-8")
        options["wandb"] = {"dir": str(logs), "name": run.output_dir.name, "id": file.read_text(encoding="utf-8"), "resume": "allow"}
    flags = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in plain_args(args).items()}
    run.accelerator.init_trackers(args.tracker_project_name, config=flags, init_kwargs=options)


def start(args: argparse.Namespace) -> Run:
    """Begins a run: checks the processes, fixes the seed, makes `output_dir` with args.json, opens the trackers.

    Changes `args.seed` if it is unset: to the checkpoint's when resuming, else to a number drawn here.

    Raises:
        ValueError: fp16 on a CPU; a launcher that started fewer processes than it was asked for.
        SystemExit: machines that do not share the run's folders.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the wrapper's shell starts its background job with Ctrl-C ignored
    _settle_numerics(args)
    quieten_libraries()
    accelerator = _accelerator(args)
    check_world(os.environ, accelerator.num_processes)
    _check_precision(args, accelerator.device)
    run = Run(args, accelerator)
    if trouble := _unused_gpu():
        run.print(f"warning: training runs on the CPU: {trouble}")
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", args.mixed_precision):  # the launcher's "no" may be its default
        run.print(f"warning: --mixed_precision {args.mixed_precision} counts; the launcher's {launcher} is ignored")
    for flag in ("output_dir", "cache_dir"):
        if flag in vars(args):
            check_shared(run, getattr(args, flag), flag)
    changes = resume_args(args)
    drawn = args.seed is None
    args.seed = run.broadcast(secrets.randbelow(2**31) if drawn else args.seed)
    if changes:
        run.print(changes)
    run.print(f"seed {args.seed}" + (f" (drawn; --seed {args.seed} repeats this run)" if drawn else ""))
    if run.is_main:
        _write_args(args)
    _start_trackers(run)
    run.barrier()
    return run
