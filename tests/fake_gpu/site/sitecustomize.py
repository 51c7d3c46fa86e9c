"""Read by Python at its start: replaces torch's GPU operations as soon as torch has been imported."""

import importlib.util
import os
import sys

# What only allocates, makes views or talks to the runtime works as it is; attention and convolutions of GPUs alone are switched off below.
KEPT = {"as_strided", "view", "_reshape_alias", "resize_", "unfold", "_pin_memory", "is_pinned", "record_stream", "_local_scalar_dense"}
KEPT_FAMILIES = (
    "empty", "set_", "view_as", "cudnn", "_cudnn", "miopen", "_scaled_dot_product", "_flash", "_efficient", "_fused_sdp", "_nested",
)  # fmt: skip


def install(torch) -> None:
    import fake_gpu_kernels

    torch.zeros(1).cuda()  # its library is loaded, and has registered what is to be replaced
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    names = {name.removeprefix("aten::") for name in registered if name.startswith("aten::")} | {"copy_"}
    replaced = [name for name in sorted(names) if name.partition(".")[0] not in KEPT and not name.startswith(KEPT_FAMILIES)]
    fake_gpu_kernels.install(replaced)
    torch.backends.cudnn.enabled = False
    for kernel in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
        setattr(torch.backends.cuda, f"enable_{kernel}_sdp", lambda enabled: None)

    compiled = torch.compile

    def compile(model=None, *, backend=None, mode=None, options=None, **rest):
        return compiled(model, backend=backend if callable(backend) else "eager", **rest)

    torch.compile = compile


class Finder:
    """Finds torch where it is, once, and installs after it has been imported."""

    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        run = spec.loader.exec_module

        def run_and_install(module):
            run(module)
            install(module)

        spec.loader.exec_module = run_and_install
        return spec


if os.environ.get("FAKE_GPU"):
    sys.meta_path.insert(0, Finder())
