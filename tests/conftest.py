"""What the tests share. `bash run_all.sh test` runs them all."""

import os
import signal
import sys
from pathlib import Path

# Here and in children: bitwise promises are of the CPU, and tests at once share the cores.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(workers)))

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402


@pytest.fixture(scope="session")
def fashion_mnist():
    """Real Fashion-MNIST from disk. Where it must be there, in CI, its absence is a failure."""
    for folder in (common.DEFAULT_DATA_DIR, common.DEBIAN_FASHION_MNIST):
        if data := common.read_fashion_mnist(folder):
            return data
    message = "Fashion-MNIST is not on disk: apt-get install dataset-fashion-mnist"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture
def heed_ctrl_c():
    """Popen's preexec_fn for a child that is sent SIGINT: in the background that is ignored."""
    return lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """script(module, *arguments): runs its main in an empty folder -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        try:
            common.command_line(module.main)
            status = 0
        except SystemExit as leave:
            status = leave.code or 0
        out, err = capsys.readouterr()
        return status, out, err
    return run


@pytest.fixture
def one_thread():
    """PyTorch with one thread, or as many as the test then sets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
