"""The benchmarks: gpu.py, asserted on a machine with a GPU and rehearsed on the CPU; and the ways of bench.py."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import presets

import bench
import gpu
import pytest
import torch


def run(*arguments, environment=os.environ):
    return subprocess.run([sys.executable, gpu.__file__, *arguments], capture_output=True, text=True,
                          env=environment)


def test_it_rehearses_on_the_cpu(tmp_path):
    done = run("--device", "cpu", "--seconds", "1", "--csv", tmp_path / "times.csv")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "A REHEARSAL on the CPU" in lines[0] and lines[-1] == "all assertions hold"
    assert sum(line.startswith("ok ") for line in lines) == 9
    with open(tmp_path / "times.csv", newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file))
    assert row["network"] == "256x4H" and float(row["step_ms"]) > float(row["floor_ms"]) > 0 and row["date"]


def test_an_assertion_that_does_not_hold_is_said(monkeypatch, capsys):
    def steps(case, device, eager):
        return torch.tensor([1.0 if eager else 1.01]), 1.0, True        # 1 % of the way
    monkeypatch.setattr(gpu, "few_steps", steps)
    monkeypatch.setattr(gpu, "resumes", lambda device: iter([("resumed", True, "")]))
    assert not gpu.assertions(torch.device("cpu"))
    out = capsys.readouterr().out
    assert out.count("FAILED steps of") == 5 and "captured and eager apart by 1 %" in out       # in bf16 2 are allowed
    assert "ok     resumed" in out


def test_one_way_that_fails_does_not_end_the_others(monkeypatch, capsys):
    def row_of(name, *more):
        if name == "DN-Low":
            raise RuntimeError("no memory\nmore")
        return {"network": name, "precision": "fp32", "way": "as it is", "step_ms": 1.0}
    monkeypatch.setattr(gpu, "row_of", row_of)
    monkeypatch.setattr(bench, "machine_rates", lambda device: {"fp32": lambda: 1e12})
    rows = gpu.times(torch.device("cpu"), 60)
    assert "DN-Low bf16 {}: FAILED, RuntimeError: no memory\n" in capsys.readouterr().out
    assert {row["network"] for row in rows} == set(gpu.ONE_OF) - {"DN-Low"}


@pytest.mark.parametrize("name", ["256x4H", "DN-Low", "ConvNet-0.29M"])
def test_every_way_of_the_benchmark_takes_steps_and_evaluates(name):
    """At the size of `smoke`; bench.py itself compares the one network with its members."""
    experiment, _ = gpu.a_run(name, "smoke")
    block = presets.experiment_settings(presets.load_preset("smoke"), "smoke", experiment.name)
    case = bench.Case(experiment, name, block, gpu.stand_in(experiment, 2 * block["batch"], 40, torch.device("cpu")))
    precisions = ["fp32"] if experiment.name == "mlp_fmnist" else ["fp32", "bf16"]
    ways = [bench.ours(case, "fp32"), bench.textbook(case), *bench.one_network(case, precisions),
            *bench.vmapped(case, precisions)]
    assert len(ways) == 2 + 2 * len(precisions)
    for way in ways:
        way.step()
        way.step()
        way.evaluate()


def test_the_assertions_on_this_machines_gpu():
    visible = {"all": None}.get(os.environ["GPUS_FOR_TESTS"], os.environ["GPUS_FOR_TESTS"])
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    if not shutil.which("nvidia-smi") or visible == "":
        pytest.skip("no GPU")
    done = run("--device", "cuda", "--assertions", environment=environment)
    if done.returncode == 2 and "no usable CUDA GPU" in done.stderr:
        pytest.skip("torch cannot use the GPU")
    assert done.returncode == 0, done.stdout + done.stderr
