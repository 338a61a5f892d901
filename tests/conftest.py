"""What the tests share. `bash run_all.sh test` runs them all."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

# Here and in children: bitwise promises are of the CPU, and tests at once share the cores. test_gpu.py sees the GPUs.
os.environ.setdefault("GPUS_FOR_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TRITON_INTERPRET"] = "1"          # Triton's kernels run on a CPU, too
os.environ.pop("PYTHONUNBUFFERED", None)      # output waits in a buffer, as it does for users
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(workers)))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from study import command, folders

import numpy as np
import pytest
import torch

torch.set_num_threads(1)        # as a run has on a CPU


@pytest.fixture(scope="session")
def smoke_study(tmp_path_factory):
    """The folder of a smoke study by run_all.sh, called from there: results, figures, output.txt. To be read only.

    It is trained once, by the first of pytest's processes that asks for it.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "my study"
    folder.mkdir(exist_ok=True)
    with open(shared / "smoke.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "output.txt").exists():
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            done = subprocess.run(
                ["bash", folders.HERE / "run_all.sh", "smoke", "--results", "results", "--figures-dir", "figures"],
                cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path})
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "output.txt").write_text(done.stdout)
    return folder


def outcomes(results):
    """What every run in a folder left, but for its times: {path: (settings, result, arrays and weights as bytes)}."""
    left = {}
    for folder in folders.run_folders(results, "**"):
        record, arrays = folders.read_whole_run(folder), folders.load_history(folder)
        if (folder / "weights.pt").exists():
            arrays |= folders.load_weights(folder)
        content = {key: np.asarray(value).tobytes() for key, value in arrays.items()}
        left[folder.relative_to(results)] = record["settings"], record["result"], content
    return left


@pytest.fixture
def heed_ctrl_c():
    """Popen's preexec_fn for a child that is sent SIGINT or SIGHUP, which the background and nohup ignore."""
    return lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)]


@pytest.fixture
def one_thread():
    """PyTorch has one thread before a test, whatever it sets, and after it; and may choose its algorithms."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path, one_thread):
    """script(module, *arguments): runs its main in an empty folder -> (status, stdout, stderr).

    A study trains in this process, one run after the other, unless --jobs says otherwise.
    """
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            command.command_line(module.main)
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        out, err = capsys.readouterr()
        return status, out, err
    return run
