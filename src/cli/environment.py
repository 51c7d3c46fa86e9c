"""What the machine must have: folders that can be written, packages, logins, a free port."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import netrc
import os
import socket
import sys
from pathlib import Path

GRADIO = "gradio==6.31.0"  # what --ui was tested with


def installed(package: str) -> bool:
    """Whether `import package` would find a real package, without importing it."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder ./wandb of earlier runs has a spec, but no origin


def check_writable(folder: Path, flag: str = "output_dir") -> None:
    """Refuses a folder that could not be created or written; creates nothing.

    Raises:
        ValueError: the path or a parent is a file, or the nearest existing parent is not writable.
    """
    nearest = folder.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"--{flag} {folder}: {nearest} is not a folder; choose another path")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"--{flag} {folder}: no permission to write in {nearest}; choose another folder or change its owner")


def _wandb_login() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for place in places:
        try:
            if netrc.netrc(os.path.expanduser(place)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):  # absent or unreadable: wandb cannot use it either
            continue
    return False


def check_trackers(report_to: str) -> None:
    """Refuses a tracker that is not installed, and wandb without a login.

    Raises:
        ValueError: names --report_to and the cure.
    """
    names = {"all": ("tensorboard", "wandb"), "none": ()}.get(report_to, (report_to,))
    for name in names:
        if not installed(name):
            install = f"{sys.executable} -m pip install {name}"
            raise ValueError(f"--report_to {report_to}: {name} is not installed; {install}, or --report_to none")
    mode = os.environ.get("WANDB_MODE", "online")
    if "wandb" in names and mode not in ("offline", "disabled", "dryrun") and not _wandb_login():
        login = f"{sys.executable} -m wandb login"
        raise ValueError(f"--report_to {report_to}: no wandb login on this machine; run `{login}`, or set WANDB_MODE=offline")


def check_page(host: str, port: int) -> None:
    """Refuses a page without gradio, with a gradio of another major version, or at an address that is not free.

    Raises:
        ValueError: names --ui or --ui_port and the cure.
    """
    if not installed("gradio"):
        raise ValueError(f"--ui needs gradio, which is not installed: {sys.executable} -m pip install {GRADIO}")
    version = importlib.metadata.version("gradio")
    if version.split(".")[0] != GRADIO.partition("==")[2].split(".")[0]:
        raise ValueError(f"--ui does not know gradio {version}: {sys.executable} -m pip install {GRADIO}")
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--ui_port {port}: cannot listen on {host} ({error}); try --ui_port {port % 65535 + 1}") from None


def check_environment(args: argparse.Namespace) -> None:
    """Checks the output folders, the tracker and the page, as far as the script has flags for them.

    Raises:
        ValueError: see `check_writable`, `check_trackers` and `check_page`.
    """
    has = vars(args)
    if "output_dir" in has:
        check_writable(args.output_dir)
    if "cache_dir" in has:
        check_writable(args.cache_dir, "cache_dir")
    if "report_to" in has:
        check_trackers(args.report_to)
    if has.get("ui"):
        check_page(args.ui_host, args.ui_port)
