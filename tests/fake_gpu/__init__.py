"""A simulated GPU: torch's own CUDA code over the host's memory, its operations computed by the CPU's kernels.

For machines without a GPU: the programs run as they would on one, on "cuda:0", and what a CPU forgives is an error: tensors left on the
other device, a generator of the wrong one, a device without a number, a half written for the CPU alone. Hidden waits are told by
`torch.cuda.set_sync_debug_mode`, memory by `torch.cuda.max_memory_allocated`. What it cannot tell: speed, the rounding of real kernels,
Triton (torch.compile traces, and runs the graph as it is), NCCL, and bitsandbytes, whose kernels compute nothing here.

    python -m tests.fake_gpu python train_text_to_image_lora_sd3.py ...

Needs Linux, g++ and nm; the libraries are built once, in a minute, and kept in the user's cache folder.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME, DRIVER, KERNELS = "libcudart.so", "libcuda.so.1", "fake_gpu_kernels.so"
NOT_IN_DRIVER = {"cuPointerGetAttribute", "cuGetProcAddress"}  # torch does without them, but not with ones that give nothing


def missing() -> str | None:
    """What this machine lacks to build it, or None."""
    packages = _packages()
    headers = packages / "nvidia/cu13/include/cuda_runtime_api.h"
    lacking = [name for name in ("g++", "nm") if shutil.which(name) is None]
    return lacking[0] if lacking else None if headers.is_file() else "the headers of CUDA 13, which come with torch's CUDA builds"


def environment() -> dict[str, str]:
    """Variables that give a Python process the fake GPU; builds it first."""
    folder = build()
    path = [str(HERE / "site"), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"LD_PRELOAD": str(folder / RUNTIME), "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(path), "FAKE_GPU": "1"}


def build() -> Path:
    """The folder of the three libraries for this version of torch and of the sources."""
    sources = [HERE / "runtime.cpp", HERE / "kernels.cpp", Path(__file__)]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in sources) + str(_packages()).encode() + _torch_version()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dive-into-sd3" / f"fake-gpu-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        _build(Path(scratch) / "made")
        try:
            os.rename(Path(scratch) / "made", folder)
        except OSError:  # another process was faster
            assert folder.is_dir()
    return folder


def _packages() -> Path:
    return Path(importlib.util.find_spec("torch").origin).parent.parent


def _torch_version() -> bytes:
    return (_packages() / "torch/version.py").read_bytes()


def _build(folder: Path) -> None:
    folder.mkdir()
    packages, python = _packages(), sysconfig.get_paths()["include"]
    libraries = packages / "torch/lib"
    includes = [packages / "nvidia/cu13/include", packages / "triton/backends/nvidia/include"]  # the second has CUDA's crt/
    cuda = [f"-I{path}" for path in includes]
    own = folder / "own.so"
    _compile([*cuda, HERE / "runtime.cpp"], own)
    wanted = {name for file in sorted(libraries.glob("*.so")) for name in _symbols(file, "--undefined-only") if re.match("_*cuda", name)}
    _stub(wanted - _symbols(own, "--defined-only"), folder / "rest.cpp")
    _compile([*cuda, HERE / "runtime.cpp", folder / "rest.cpp"], folder / RUNTIME)

    asked = set(_symbols(libraries / "libcaffe2_nvrtc.so", "--undefined-only"))
    asked |= {word.decode() for word in re.findall(rb"\bcu[A-Z]\w+", (libraries / "libc10_cuda.so").read_bytes())}
    _stub({name for name in asked if re.fullmatch(r"cu[A-Z]\w+", name)} - NOT_IN_DRIVER, folder / "driver.cpp")
    _compile([folder / "driver.cpp", f"-Wl,-soname,{DRIVER}"], folder / DRIVER)

    torch = [f"-I{path}" for path in (python, packages / "torch/include", packages / "torch/include/torch/csrc/api/include")]
    link = [f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-lc10_cuda", "-ltorch_python"]
    _compile(["-std=c++20", "-DTORCH_API_INCLUDE_EXTENSION_H", *torch, *cuda, HERE / "kernels.cpp", *link], folder / KERNELS)


def _compile(words: list, output: Path) -> None:
    subprocess.run(["g++", "-O1", "-w", "-shared", "-fPIC", *map(str, words), "-o", str(output)], check=True)


def _symbols(library: Path, which: str) -> set[str]:
    """Names of a library's dynamic symbols, without their versions."""
    listed = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines()}


def _stub(names: set[str], file: Path) -> None:
    """C++ of functions that do nothing and return 0, which is success."""
    file.write_text("".join(f'extern "C" __attribute__((visibility("default"))) int {name}() {{ return 0; }}\n' for name in sorted(names)))
