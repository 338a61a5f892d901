"""The benchmarks: gpu.py, which checks a GPU if there is one and is rehearsed on the CPU; and the parts of bench.py."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import train_mlp_fmnist
from study.finished import read_csv

import bench
import gpu
import pytest
import torch


def test_it_rehearses_on_the_cpu(monkeypatch, capfd, tmp_path, one_thread):
    """Its processes are forked: each would import torch anew."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--csv", str(tmp_path / "times.csv")])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    out = capfd.readouterr().out
    assert not left.value.code and "FAILED" not in out, out
    assert "A REHEARSAL on the CPU" in out.splitlines()[0]
    assert out.count("\nok ") == 7 and "\nall checks hold\n" in out
    measured = [row["network"] for row in read_csv(tmp_path / "times.csv") if float(row["step_ms"]) > 0 and row["date"]]
    assert measured == ["DN-High", *3 * ["ConvNet-0.29M"], "256x4H"]


def test_a_check_that_does_not_hold_is_said(monkeypatch, capsys):
    def few_steps(name, device, precision, eager=True, bagging=None):
        return torch.tensor([1.0 + 0.02 * (not eager)]), 1.0            # a captured step goes 2 % too far
    monkeypatch.setattr(gpu, "few_steps", few_steps)
    with pytest.raises(SystemExit) as left:
        gpu.report(gpu.steps_agree, "cpu")
    assert left.value.code and capsys.readouterr().out.count("FAILED steps of") == 6


def test_torch_funcs_members_equal_stock_networks():
    case = bench.new_case("DN-Low", "smoke")
    members, images = case.stock(), torch.rand(3, *case.data.shape)
    torch.testing.assert_close(bench.Vmapped(members, False)(images), torch.stack([one(images) for one in members], 1))


def test_the_commands_of_bench(script, tmp_path):
    form = {"members": 2, "hidden": 3}, (1, 4, 4), 10
    one, other = (make(*form, torch.Generator().manual_seed(0)).hidden_weight.flatten()
                  for make in (train_mlp_fmnist.build, lambda *more: bench.nudged(5, *more)))
    assert (one != other).nonzero().tolist() == [[5]] and 0 < other[5] - one[5] < 1e-6
    for what, *more in (("steps", "--only", "16x64H", "DN-Low", "--seconds", "0"), ("spread", "--only", "64x16H"),
                        ("densenet",)):
        status, out, err = script(bench, what, "--preset", "smoke", "--results", tmp_path, *more)
        assert status == 0, out + err
    assert {row["way"] for row in read_csv(tmp_path / "steps.csv")} == set(bench.WAYS)
    assert [row["bit"] for row in read_csv(tmp_path / "spread.csv")] == list("01234")
    package, theirs = read_csv(tmp_path / "densenet.csv")
    assert float(package["test_ensemble_loss"]) == pytest.approx(float(theirs["test_ensemble_loss"]), rel=1e-4)


def test_the_checks_on_this_machines_gpu():
    if not shutil.which("nvidia-smi"):
        pytest.skip("no GPU")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ["GPUS_FOR_TESTS"]}
    del environment["TRITON_INTERPRET"]
    if environment["CUDA_VISIBLE_DEVICES"] == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run([sys.executable, gpu.__file__, "--device", "cuda", "--part", "checks"], capture_output=True,
                          text=True, env=environment)
    if "no usable CUDA GPU" in done.stderr:
        pytest.skip("no GPU")
    assert done.returncode == 0, done.stdout + done.stderr
