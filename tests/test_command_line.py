"""Bad input gets one line that names the value, what was expected and the fix; exit status 2; nothing is written.

And what the flags of the training scripts and of robustness.py select, print and leave.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import common
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
from study import folders, plan

import pytest
import torch

MLP, DENSENET, CONVNET = TRAINING = train_mlp_fmnist, train_densenet_cifar, train_convnet_cifar
SMALL = ("--preset", "smoke", "--only", "16x64H", "--trials", 1, "--epochs", 1)


def one_line(outcome, *words):
    """The outcome of a script is exit status 2 and one line on stderr that has all the words."""
    status, _, err = outcome
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, (word, err)


def refused(outcome, *words):
    one_line(outcome, *words)
    assert list(Path().iterdir()) == [], "something was written"


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("module, arguments, words", [
    (MLP, "--preset quik", ["'quik'", "did you mean quick?"]),
    (MLP, "--lambdas 0.5 0.9999999", ["0.9999999", "[0, 1]", "six digits"]),
    (MLP, "--shard 4/4", ["'4/4'", "such as 0/4"]),
    (MLP, "--set batch=1000000", ["batch 1000000", "2500 images to train on"]),
    (MLP, "--set folds=600", ["500 images for 600 folds"]),
    (MLP, "--set momentum=0 --set nesterov=true", ["momentum above 0, or nesterov=false"]),     # both flags count
    (MLP, "--only 1x1024H --methods bagging", ["no run matches", "more than one member", "--dry-run"]),
    (MLP, "--set first=[stacking]", ["'stacking' is not a method", "and not stacking"]),
    (MLP, "--data-dir nowhere", ["nowhere", "synthetic", "--data real"]),
    (MLP, "--data real --data-dir nowhere", ["nowhere is no folder", "Fashion-MNIST", "apt-get install"]),
    (DENSENET, "--tune", ["--tune", "set validation=N"]),
    (MLP, "--tune --shard 0/2", ["--tune", "leave --shard out"]),
    (DENSENET, "--set DN-High.depth=23", ["depth 23", "6n + 4", "10, 16, 22"]),
    (CONVNET, "--set ConvNet-0.29M.strides=[1,2]", ["ConvNet-0.29M", "shorter", "an entry per layer"]),
    (CONVNET, "--set strides=[2,2,2,2,2,2,2] filters=[4,4,4,4,4,4,4]", ["Kernel size", "too small", "padding=1"]),
    (robustness, "--figure 8", ["no trained weights", "python train_mlp_fmnist.py --preset smoke --figure 8"]),
])
def test_bad_arguments(script, module, arguments, words):
    refused(script(module, "--preset", "smoke", *arguments.split()), *words)


def test_a_gpu_must_be_there_and_trains_one_run_at_a_time(script, monkeypatch):
    if not torch.cuda.is_available():
        refused(script(MLP, *SMALL, "--device", "cuda"), "--device cuda", "use --device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(script(MLP, *SMALL, "--jobs", 2), "--jobs 2", "on a GPU one run", "CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize("old, new, said", [
    ("quick: {}", "quick: {mlp_fmnist: {epoch: 3}}", "'epoch': .* did you mean epochs?"),
    ("quick: {}", "quick: {mlp_fmnist: {configurations: {256x4H: {batch: 8}}}}", "'batch'.* 256x4H|256x4H.* 'batch'"),
    ("quick: {}", "quick: {mlp_fmnist: {dataset: MNIST}}", "'MNIST': .* did you mean Fashion-MNIST?"),
    ("quick: {}", "quick: {data: real, mlp_fmnist: {}, data: auto}", "the key data stands twice .*line "),
    ("    batch: 100\n", "", "mlp_fmnist: batch is missing"), ("paper:\n", "news:\n", "presets.yaml .* no block")])
def test_bad_presets(tmp_path, old, new, said):
    paper = (folders.HERE / "presets.yaml").read_text().partition("\nshort:")[0]
    path = tmp_path / "presets.yaml"
    path.write_text(f"{paper}\nquick: {{}}\n".replace(old, new))
    with pytest.raises(common.Refused, match=rf"^[^\n]*{said}[^\n]*$"):
        plan.experiment_settings(plan.load_preset("quick", path), "quick", "mlp_fmnist")


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(script):
    assert script(MLP, *SMALL, "--lambdas", 0)[0] == 0
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    status, out, _ = script(MLP, *SMALL, "--lambdas", 0)
    assert status == 0 and "0 of 1 runs to do" in out
    status, out, _ = script(MLP, *SMALL, "--lambdas", 0, 1, "--dry-run")
    assert status == 0 and out.startswith("mlp_fmnist: 1 of 2 runs to do, about 0:00:")
    assert re.search(r"\n  1 at once on .+ \(cpu\), with synthetic stand-in \(synthetic; ", out)
    assert "    16x64H lambda 0 trial 0: finished" in out and "    16x64H lambda 1 trial 0: to do" in out
    assert "  figure 3: 1 of 2 runs to do" in out and "figure 2:" not in out       # of which nothing was selected
    for name, there, now in (("epochs", 1, 2), ("seed", 0, 5)):
        one_line(script(MLP, *SMALL, "--lambdas", 0, 0.5, f"--{name}", now),
                 f"{name} is {there} there and {now} now", "another --results")
    assert {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()} == before


def test_a_results_folder_that_cannot_be_written(script, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(script(MLP, *SMALL, "--results", tmp_path / "file" / "results"), "file", "mend this")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", ["RuntimeError('operator torchvision::nms does not exist')",
                                   "ImportError('No module named torchvision')"])
def test_packages_that_do_not_fit(tmp_path, error):
    (tmp_path / "torch.py").write_text(f"raise {error}")        # the first one that is imported
    done = subprocess.run([sys.executable, "-c", "import train_mlp_fmnist"], cwd=folders.HERE, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    one_line((done.returncode, done.stdout, done.stderr), "torchvision", "requirements.txt", "run_all.sh")


# --- What is selected ----------------------------------------------------------------------------


@pytest.mark.parametrize("module", [*TRAINING, robustness])
def test_help(script, module):
    status, out, _ = script(module, "--help")
    assert status == 0 and module.__doc__.splitlines()[0] in out and "--figure" in out


def selected(script, module, *arguments):
    """The labels of the runs of a dry run of a smoke study, one trial."""
    status, out, err = script(module, "--preset", "smoke", "--trials", 1, "--dry-run", *arguments)
    assert status == 0 and not list(Path().iterdir()), err
    return re.findall(r"^    (.+) trial 0: to do$", out, re.MULTILINE)


@pytest.mark.parametrize("module, arguments, runs", [
    (MLP, ["2"], ["1x1024H lambda 1", "256x4H lambda 0", "256x4H lambda 0.95", "256x4H lambda 1", "256x4H bagging",
                  "256x4H stacking"]),
    (MLP, ["7", "8"], [f"{name} lambda {lam}" for name in ("64x16H", "256x4H") for lam in (0, 0.99, 1)]),
    (MLP, ["figure2", "--methods", "stacking"], ["256x4H lambda 0", "256x4H stacking"]),
    (DENSENET, ["Table2", "--only", "DN-Low"], [f"DN-Low {method}" for method in (
        "lambda 0", "lambda 0.5", "lambda 0.9", "lambda 1", "independent", "bagging", "stacking")]),
    (CONVNET, ["5"], ["10xConvNet-0.29M lambda 0", "10xConvNet-0.29M lambda 1"])])
def test_a_figure_selects_the_runs_that_it_draws(script, module, arguments, runs):
    assert selected(script, module, "--figure", *arguments) == runs


def test_what_answers_the_question_is_trained_first():
    """In `short`: lambda 0 and 1 and `independent` of the smallest and the largest networks, all trials."""
    block = plan.experiment_settings(plan.load_preset("short"), "short", "densenet_cifar")
    runs = plan.list_runs("short", DENSENET.EXPERIMENT, block, None)
    assert {(run.configuration, run.method_name, run.trial) for run in runs[:18]} == {
        (name, method, trial) for name in ("DN-Low", "DN-High") for method in ("joint-0", "joint-1", "independent")
        for trial in range(3)}


def test_fetching_says_whether_the_data_is_real(script, monkeypatch):
    monkeypatch.setattr(folders, "find_data", lambda *arguments: None)
    for policy, status in (("synthetic", 0), ("auto", 3)):
        assert script(MLP, "--preset", "smoke", "--data", policy, "--fetch")[:2] == (
            status, "data: Fashion-MNIST: the synthetic stand-in\n")
    assert not list(Path().iterdir())


def test_output_that_nobody_reads_any_more(tmp_path):
    command = [sys.executable, MLP.__file__, "--preset", "smoke", "--dry-run"]
    done = subprocess.run(["bash", "-c", 'set -o pipefail; "$@" | true', "bash", *command], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr.strip()
