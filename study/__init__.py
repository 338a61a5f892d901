"""The machinery that no reader of the science has to open; here, what it runs on: packages, device, machine, commit.

Scripts import it first: it says in one line which package is missing.
"""

import contextlib
import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("USER", str(os.getuid()))     # PyTorch asks for the name of a user who may have none
os.environ.pop("MPLBACKEND", None)                  # Jupyter's is none of ours

try:
    from common import Refused

    import numpy as np
    import torch
    import torchvision
    import yaml  # noqa: F401
except (ImportError, RuntimeError, OSError) as error:       # RuntimeError: torch and torchvision of two releases
    print(f"error: the packages cannot be imported ({str(error).splitlines()[0]}): `pip install -r requirements.txt`; "
          "or `bash run_all.sh`, which makes a .venv, and then `. .venv/bin/activate`", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:                           # PyTorch takes seconds
    sys.exit(130)


def choose_device(name, jobs=None):
    """The torch device for --device. Raises Refused if torch cannot use it, or for several jobs on a GPU."""
    if jobs is not None and jobs < 1:
        raise Refused(f"--jobs {jobs}: expected at least 1")
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""         # processes that are forked must not meet a GPU
    if name == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no usable CUDA GPU; use --device cpu, or install a driver that fits "
                      f"torch {torch.__version__}")
    torch.set_num_threads(1)            # a run has one: no number depends on how many cores there are
    torch.set_flush_denormal(True)      # the momenta of dead nodes decay into slow denormal numbers
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (jobs or 1) > 1:
        raise Refused(f"--jobs {jobs}: on a GPU one run is worked on at a time; for several GPUs start this command "
                      "once for each, with CUDA_VISIBLE_DEVICES")
    return torch.device("cuda")


def cpu_field(names):
    """The first line of /proc/cpuinfo under a name, a regular expression; "" on other systems."""
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^(?:{names})\s*: (.*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def bf16_is_fast(device):
    """Does the device multiply in bf16? (It computes in it in any case, if need be slowly.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_field("flags|Features").split()))


@functools.cache        # of the code that runs, whatever is changed while it runs
def commit():
    """The git commit of the code, marked if it was changed since; or that there is none."""
    here = Path(__file__).resolve().parents[1]
    git = ["git", f"--git-dir={here}/.git", f"--work-tree={here}"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):       # git is not installed; no checkout
        return subprocess.run([*git, "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True,
                              check=True).stdout.strip()
    return "no commit: not a checkout"


def machine(device):
    """What a number depends on beside its settings, for run.json."""
    name, tf32 = cpu_field("model name") or platform.processor() or platform.machine(), False
    if device.type == "cuda":
        name, card = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        tf32 = torch.backends.cudnn.allow_tf32 and card >= (8, 0)           # fp32 convolutions, as PyTorch has them
    return {"device": name, "tf32": tf32, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "torchvision": torchvision.__version__, "numpy": np.__version__,
            "system": platform.system(), "commit": commit(),
            "deterministic": torch.are_deterministic_algorithms_enabled()}
