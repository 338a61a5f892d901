"""The benchmarks: gpu.py, which checks a GPU if there is one and is rehearsed on the CPU; and the parts of bench.py."""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import train_mlp_fmnist
from study.finished import read_csv

import bench
import gpu
import pytest
import torch


def run(environment, *arguments):
    return subprocess.run([sys.executable, gpu.__file__, *arguments], capture_output=True, text=True, env=environment)


def test_it_rehearses_on_the_cpu(tmp_path):
    done = run(os.environ, "--device", "cpu", "--csv", tmp_path / "times.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A REHEARSAL on the CPU" in done.stdout.splitlines()[0] and "FAILED" not in done.stdout
    assert done.stdout.count("\nok ") == 7 and "\nall checks hold\n" in done.stdout
    measured = [row["network"] for row in read_csv(tmp_path / "times.csv") if float(row["step_ms"]) > 0 and row["date"]]
    assert measured == ["DN-High", *3 * ["ConvNet-0.29M"], "256x4H"]


def test_a_check_that_does_not_hold_is_said(monkeypatch, capsys):
    def few_steps(name, device, precision, eager=True, bagging=None):
        return torch.tensor([1.0 + 0.02 * (not eager)]), 1.0            # a captured step goes 2 % too far
    monkeypatch.setattr(gpu, "few_steps", few_steps)
    with pytest.raises(SystemExit) as left:
        gpu.report(gpu.steps_agree, "cpu")
    assert left.value.code and capsys.readouterr().out.count("FAILED steps of") == 6


def test_one_way_that_fails_does_not_end_the_others(monkeypatch, capsys, tmp_path):
    def row_of(device, rates, name, *more):
        if name == "DN-Low":
            raise RuntimeError("no memory\nmore")
        return {"network": name, "step_ms": 1.0}, []
    monkeypatch.setattr(gpu, "row_of", row_of)
    ways = [(name, "bf16", gpu.LOOP, {}) for name in gpu.DENSENETS]
    gpu.time_ways("cpu", {}, ways, {"date": "today"}, tmp_path / "times.csv", False)
    failed, = (line for line in capsys.readouterr().out.splitlines() if "FAILED" in line)
    assert "DN-Low bf16" in failed and "RuntimeError in test_gpu.py" in failed and "no memory" in failed
    assert [row["network"] for row in read_csv(tmp_path / "times.csv")] == ["DN-High", "DN-Mid"]


def test_a_process_that_dies_or_hangs_ends_in_one_line(capsys):
    for work, argument, why in ((os._exit, 3, "exit status 3"), (time.sleep, 600, "no time left")):
        process = gpu.start(work, argument)
        assert not gpu.ended_well(process, "times", time.monotonic() + (60 if why.startswith("exit") else 0.1))
        assert capsys.readouterr().out == f"FAILED times: {why}\n"


@pytest.mark.parametrize("name", ["256x4H", "DN-Low", "ConvNet-0.29M"])
def test_every_way_of_the_benchmark_takes_steps(name):
    assert all(seconds(1) > 0 for seconds in bench.ways_of(name, "smoke").values())
    case = bench.new_case(name, "smoke")
    members, images = case.stock(), torch.rand(3, *case.data.shape)
    torch.testing.assert_close(bench.Vmapped(members, False)(images), torch.stack([one(images) for one in members], 1))


def test_the_commands_of_bench(script, tmp_path):
    form = {"members": 2, "hidden": 3}, (1, 4, 4), 10
    one, other = (make(*form, torch.Generator().manual_seed(0)).hidden_weight.flatten()
                  for make in (train_mlp_fmnist.build, lambda *more: bench.nudged(5, *more)))
    assert (one != other).nonzero().tolist() == [[5]] and 0 < other[5] - one[5] < 1e-6
    for what, more in (("steps", ["--only", "256x4H", "--seconds", "0"]), ("spread", []), ("densenet", [])):
        status, out, err = script(bench, what, "--preset", "smoke", "--results", tmp_path, *more)
        assert status == 0, out + err
    assert {row["way"] for row in read_csv(tmp_path / "steps.csv")} == set(bench.WAYS)
    assert [row["bit"] for row in read_csv(tmp_path / "spread.csv")] == list("01234")
    package, theirs = read_csv(tmp_path / "densenet.csv")
    assert float(package["test_ensemble_loss"]) == pytest.approx(float(theirs["test_ensemble_loss"]), rel=1e-4)


def test_the_checks_on_this_machines_gpu():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ["GPUS_FOR_TESTS"]}
    del environment["TRITON_INTERPRET"]
    if environment["CUDA_VISIBLE_DEVICES"] == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    done = run(environment, "--device", "cuda", "--part", "checks")
    if "no usable CUDA GPU" in done.stderr:
        pytest.skip("no GPU")
    assert done.returncode == 0, done.stdout + done.stderr
