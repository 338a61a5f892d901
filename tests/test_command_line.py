"""Bad input gets one line that names the value, what was expected and the fix; exit status 2; nothing is written.

And what the flags of the training scripts and of robustness.py select, print and leave.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import study
import common
import folders
import presets
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist

import numpy as np
import pytest
import torch
import yaml

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
    (MLP, "--only 256x4", ["'256x4'", "did you mean 256x4H?"]),
    (MLP, "--figure 33", ["figure or table '33'", "2, 3, 6, 7, 8, 9\n"]),
    (MLP, "--figure 2 4", ["'4'", "2, 3, 6, 7, 8, 9"]),                     # 4 is of the ConvNets
    (DENSENET, "--figure tabel2", ["'tabel2'", "did you mean table2?"]),
    (MLP, "--figure 2 --only 16x64H", ["no run matches", "figures"]),
    (MLP, "--lambdas 1.5", ["'1.5'", "[0, 1]"]),
    (MLP, "--lambdas nan", ["'nan'", "[0, 1]"]),
    (MLP, "--lambdas 0.5 0.9999999", ["'0.9999999'", "six digits"]),
    (MLP, "--epochs 0", ["'0'", "at least 1"]),
    (MLP, "--epochs 2.5", ["'2.5'", "whole number"]),
    (MLP, "--epochs 99999999", ["'99999999'", "at most 1000000"]),
    (MLP, "--trials -3", ["-3", "trials"]),
    (MLP, "--seed -1", ["-1", "seed"]),
    (MLP, "--seed 99999999999999999999", ["'99999999999999999999'", "whole number"]),
    (MLP, "--data reel", ["'reel'", "'real'", "--help"]),
    (MLP, "--device gpu", ["'gpu'", "'auto', 'cpu', 'cuda'"]),
    (MLP, "--jobs 0", ["'0'", "at least 1"]),
    (MLP, "--threads 0", ["'0'", "at least 1"]),
    (MLP, "--shard 4/4", ["'4/4'", "I/N", "0/4"]),
    (MLP, "--shard 1/2/3", ["'1/2/3'", "I/N"]),
    (MLP, "--unknown", ["--unknown", "--help"]),
    (MLP, "--set batch=1000000", ["batch 1000000", "training split", "lower batch"]),
    (MLP, "--set batch", ["--set batch", "a key and a value were expected"]),
    (MLP, "--set bacth=7", ["'bacth'", "did you mean batch?"]),
    (MLP, "--set bagging=[", ["bagging=[", "weights, resample"]),
    (MLP, "--set penalties=[1,-1]", ["penalties=[1,-1]", "a list, not empty, each entry a number above 0"]),
    (MLP, "--set folds=600", ["folds 600", "500 images", "lower folds"]),
    (MLP, "--set momentum=0 nesterov=true", ["nesterov needs momentum"]),
    (MLP, "--only 1x1024H --methods bagging", ["no run matches", "no run matches"]),
    (MLP, "--data-dir nowhere", ["nowhere", "synthetic", "--data real"]),
    (MLP, "--data real --data-dir nowhere", ["nowhere", "not a folder", "Fashion-MNIST"]),
    (DENSENET, "--tune", ["--tune", "validation is 0", "--set validation=N"]),
    (MLP, "--tune --methods bagging", ["--tune is of joint training", "add joint"]),
    (MLP, "--tune --shard 0/2", ["--tune", "leave --shard out"]),
    (DENSENET, "--set DN-High.depth=23", ["depth 23", "6n + 4", "10, 16, 22"]),
    (DENSENET, "--set members=0", ["members=0", "at least 1"]),
    (DENSENET, "--set decay=[0.5,1]", ["decay=[0.5,1]", "below 1 (the end)"]),
    (DENSENET, "--set DN-Hihg.depth=22", ["'DN-Hihg'", "did you mean DN-High?"]),
    (DENSENET, "--set DN-High.batch=9", ["batch holds for all", "leave 'DN-High.' out"]),
    (DENSENET, "--set precision=fp16", ["precision=fp16", "fp32, bf16, auto"]),
    (DENSENET, "--set augment=maybe", ["augment=maybe", "true or false"]),
    (DENSENET, "--set dataset=CIFAR", ["'CIFAR'", "CIFAR-100, CIFAR-10"]),
    (DENSENET, "--set dataset=[1]", ["dataset=[1]", "the name of a data set"]),
    (DENSENET, "--set stacking=validation", ["validation is 0", "stacking=training"]),
    (CONVNET, "--set ConvNet-0.29M.strides=[1,2]", ["strides [1, 2]", "an entry per layer"]),
    (CONVNET, "--set filters=8", ["filters=8", "is not a list"]),
    (CONVNET, "--set strides=[2,2,2,2,2,2,2] filters=[4,4,4,4,4,4,4]", ["32x32", "too small", "padding=1"]),
    (CONVNET, "--set classes=1", ["classes=1", "at least 2, or null for all"]),
    (CONVNET, "--set classes=ten", ["classes=ten", "at least 2, or null for all"]),
    (CONVNET, "--set classes=101", ["classes 101", "more than the 100 of CIFAR-100"]),
    (CONVNET, "--set classes=1e1", ["1e1", "a whole number of at least 2", "write 10"]),
    (CONVNET, "--set padding=2", ["padding=2", "0 or 1"]),
    (CONVNET, "--set lr=0.1", ["lr=0.1", "per range of lambda"]),
    (robustness, "--figure 2", ["'2'", "7, 8"]),
    (robustness, "--drop exmple", ["'exmple'", "'example'"]),
    (robustness, "--only 256x4", ["'256x4'", "did you mean 256x4H?"]),
    (robustness, "--figure 8", ["no trained weights", "python train_mlp_fmnist.py --preset smoke --figure 8"]),
])
def test_bad_arguments(script, module, arguments, words):
    refused(script(module, "--preset", "smoke", *arguments.split()), *words)


@pytest.mark.parametrize("size", ["train", "validation", "test"])
def test_more_images_than_there_are(script, monkeypatch, size):
    monkeypatch.setattr(folders, "find_data", lambda *arguments: common.synthetic(10, (1, 28, 28), 100, 40))
    sizes = "train=60", "validation=30", "test=30", "batch=20", "folds=2"
    refused(script(MLP, *SMALL, "--set", *sizes, f"{size}=90"), size, "90", "lower")
    assert script(MLP, *SMALL, "--set", *sizes, f"{size}=40", "--dry-run")[0] == 0


def test_an_empty_data_folder(script, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    refused(script(MLP, *SMALL, "--data", "real", "--data-dir", empty), str(empty), "has no files of Fashion-MNIST",
            "apt-get install")


def test_a_gpu_must_be_there_and_trains_one_run_at_a_time(script, monkeypatch):
    if not torch.cuda.is_available():
        refused(script(MLP, *SMALL, "--device", "cuda"), "--device cuda", "use --device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, *arguments in ((MLP, *SMALL), (robustness, "--preset", "smoke")):
        refused(script(module, *arguments, "--jobs", 2), "--jobs 2", "on a GPU one run", "CUDA_VISIBLE_DEVICES")


def tiny(presets):
    return presets["paper"]["mlp_fmnist"]["configurations"]["256x4H"]


@pytest.mark.parametrize("change, words", [
    (lambda p: p["quick"]["mlp_fmnist"].update(epoch=3), ["'epoch'", "did you mean epochs?"]),
    (lambda p: p["quick"].update(mlp={}), ["'mlp'", "did you mean mlp_fmnist?"]),
    (lambda p: p["paper"]["mlp_fmnist"].pop("batch"), ["batch is missing"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(lambdas=[0, 7]), ["mlp_fmnist.lambdas", "[0, 7]", "[0, 1]"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(lambdas=[]), ["lambdas", "[]", "not empty"]),
    *((lambda p, key=key: p["paper"]["mlp_fmnist"].update({key: 1}), [key, "1 is not a list"])
      for key in ("lambdas", "decay", "penalties", "tune", "once")),
    (lambda p: tiny(p).update(weights=0), ["256x4H.weights", "0 is not a list"]),
    *((lambda p, key=key, value=value: tiny(p).update({key: value}),
       [f"paper.mlp_fmnist: {key} holds for all configurations", "out of 256x4H"])
      for key, value in (("batch", 8), ("bagging", "resample"))),
    (lambda p: p["quick"]["mlp_fmnist"].update(configurations={"256x4H": {"batch": 8}}), ["quick", "batch holds"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(configurations={"256x4H": 3}), ["256x4H is 3", "a block"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(weight_decay="1e-4"), ["'1e-4' is not a number", "write 0.0001"]),
    (lambda p: p["paper"]["mlp_fmnist"].update(dataset="MNIST"), ["'MNIST'", "did you mean Fashion-MNIST?"]),
    (lambda p: p["quick"].update(data="fake"), ["'fake'", "real, auto, synthetic"]),
    (lambda p: p["quick"].update(mlp_fmnist=None), ["mlp_fmnist is None", "a block"]),
    (lambda p: p.update(quick=3), ["quick is 3", "a block"]),
    (lambda p: p.pop("paper"), ["expected a block `paper`"]),
    (lambda p: p["quick"].update(robustness={"repeats": 0}), ["repeats", "at least 1"]),
    (lambda p: tiny(p).update(lr={0.5: 1}), ["256x4H.lr", "per range of lambda"]),
    (lambda p: tiny(p).update(lr={0.9999999: 1, 1: 1}), ["256x4H.lr", "per range of lambda"]),
    (lambda p: [c.update(methods=["bagging"], members=1) for c in
                p["paper"]["mlp_fmnist"]["configurations"].values()], ["no run matches"]),
])
def test_bad_presets(script, monkeypatch, tmp_path_factory, change, words):
    there, load_preset = yaml.safe_load((folders.HERE / "presets.yaml").read_text()), presets.load_preset
    change(there)
    data = [] if "'fake'" in words else ["--data", "synthetic"]
    path = tmp_path_factory.mktemp("presets") / "presets.yaml"
    path.write_text(yaml.safe_dump(there))
    monkeypatch.setattr(presets, "load_preset", lambda name: load_preset(name, path))
    refused(script(MLP, "--preset", "quick", *data), *words)


DEEP = "[" * 20_000


@pytest.mark.parametrize("content", [b"", b"- 1", b"paper: [", b"paper: 3", b"paper: {}", b"\xff\xfe\x00",
                                     DEEP.encode(), b"paper: !!python/object/apply:os.getcwd []",
                                     b"paper: {mlp_fmnist: {epochs: 3, batch: 5, epochs: 200}}"])
def test_a_presets_file_of_another_form(tmp_path, content):
    path = tmp_path / "presets.yaml"
    path.write_bytes(content)
    with pytest.raises(common.Refused, match=r"^[^\n]*preset[^\n]*$"):
        presets.load_preset("quick", path)


@pytest.mark.parametrize("key", ["epochs", "validation", "momentum", "weight_decay", "lr", "lambdas", "penalties"])
def test_hostile_values(tmp_path, key):
    """No value is taken for a number that is none, or has no sense, in --set and in presets.yaml."""
    preset, path = presets.load_preset("smoke"), tmp_path / "presets.yaml"
    text_of_paper = (folders.HERE / "presets.yaml").read_text() + "\nhostile:\n  mlp_fmnist:\n"
    for text in ("true", "010", "1:30", ".nan", ".inf", "[.nan]", "ten", "-1", "[-1]", "9" * 40, "{a: 1}", "{1: true}",
                 "''", "null", "!!python/object/apply:os.getcwd []", DEEP):
        with pytest.raises(common.Refused, match=rf"^--set {key}=[^\n]* is not [^\n]*$"):
            presets.experiment_settings(preset, "smoke", "mlp_fmnist", [f"{key}={text}"])
        path.write_text(text_of_paper + (f"    {key}: {text}\n" if key != "lr" else
                                         f"    configurations: {{256x4H: {{lr: {text}}}}}\n"))
        with pytest.raises(common.Refused, match=r"^presets.yaml[^\n]* (is not|cannot be read)[^\n]*$"):
            presets.load_preset("hostile", path)


def test_a_key_twice_is_named(tmp_path):
    path = tmp_path / "presets.yaml"
    path.write_text("paper:\n  a: {epochs: 3, batch: 5, epochs: 200}\n")
    with pytest.raises(common.Refused, match=r"the key epochs stands twice .*line 2"):
        presets.load_preset("paper", path)


@pytest.mark.parametrize("selection", ["--only 16x64H", "--figure 3", "--methods joint"])
def test_settings_contradict_each_other_only_if_a_selected_run_has_both(script, selection):
    every = MLP, "--preset", "smoke", "--dry-run", "--set", "validation=0"
    assert script(*every, *selection.split())[0] == 0
    refused(script(*every, "--figure", "2"), "stacking", "validation is 0")


def test_a_data_set_of_one_experiment_concerns_no_other(monkeypatch, tmp_path):
    there = yaml.safe_load((folders.HERE / "presets.yaml").read_text())
    there["paper"]["mlp_fmnist"]["dataset"] = "mine"
    (tmp_path / "presets.yaml").write_text(yaml.safe_dump(there))
    preset = presets.load_preset("smoke", tmp_path / "presets.yaml")
    assert presets.experiment_settings(preset, "smoke", "convnet_cifar")["dataset"] == "CIFAR-100"


def test_a_key_that_not_every_configuration_has_is_set_where_it_is(tmp_path):
    there = yaml.safe_load((folders.HERE / "presets.yaml").read_text())
    tiny(there)["gates"] = 2
    (tmp_path / "presets.yaml").write_text(yaml.safe_dump(there))
    preset = presets.load_preset("smoke", tmp_path / "presets.yaml")
    block = presets.experiment_settings(preset, "smoke", "mlp_fmnist", ["gates=3"])
    assert {name: c.get("gates") for name, c in block["configurations"].items() if "gates" in c} == {"256x4H": 3}
    with pytest.raises(common.Refused, match=r"^--set 16x64H\.gates=3: 16x64H has no gates$"):
        presets.experiment_settings(preset, "smoke", "mlp_fmnist", ["16x64H.gates=3"])


def test_a_figure_of_ones_own_may_have_any_name():
    for name in ("Ends", "fig-a", "2"):
        assert study.figure_names([name], {name: {}}) == [name]
    assert study.figure_names(["Fig2", "FIGURE7"], {"2": {}, "7": {}}) == ["2", "7"]


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(script):
    assert script(MLP, *SMALL, "--lambdas", 0)[0] == 0
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    status, out, _ = script(MLP, *SMALL, "--lambdas", 0)
    assert status == 0 and "0 of 1 runs to do" in out
    for name, there, now in (("epochs", 1, 2), ("seed", 0, 5)):
        one_line(script(MLP, *SMALL, "--lambdas", 0, 0.5, f"--{name}", now),
                 f"{name} is {there} there and {now} now", "another --results")
    assert {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()} == before


def test_a_results_folder_that_cannot_be_written(script, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for place in (blocked, blocked / "results"):
        one_line(script(MLP, *SMALL, "--results", place), str(place), "name another folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- An installation that does not work ----------------------------------------------------------


@pytest.mark.parametrize("module, content, words", [
    (None, None, ["3.9.1", "3.11"]),
    ("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')",
     ["not of one release pair", "requirements.txt"]),
    ("yaml", "raise ImportError(\"No module named 'yaml'\")", ["'yaml'", "requirements.txt"])])
def test_python_or_packages_that_do_not_fit(tmp_path, module, content, words):
    code = "import train_mlp_fmnist"
    if module:
        (tmp_path / f"{module}.py").write_text(content)
    else:
        code = f"import sys; sys.version_info = (3, 9, 1); sys.version = '3.9.1'; {code}"
        ast.parse(Path(study.__file__).read_text(), feature_version=(3, 8))     # an old Python comes as far as that
    done = subprocess.run([sys.executable, "-c", code], cwd=folders.HERE, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    one_line((done.returncode, done.stdout, done.stderr), *words)


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


@pytest.mark.parametrize("module", TRAINING)
def test_the_figures_name_runs_of_the_paper(module):
    block = presets.experiment_settings(presets.load_preset("paper"), "paper", module.EXPERIMENT.name)
    for name, figure in module.FIGURES.items():
        for configuration, words in figure.items():
            drawn = study.drawn(figure, configuration, block["configurations"][configuration])
            assert set(words) <= {word for each in drawn for word in (each[0], study.method_name(*each))}, name


# A test that a figure draws the runs that FIGURES names, and tests of bad arguments of make_figures.py and claims.py,
# belong here.


def test_a_dry_run_prints_what_is_to_do_by_figure_and_writes_nothing(script):
    select = ("--preset", "smoke", "--only", "16x64H", "--trials", 1, "--lambdas", 0, 1)
    assert script(MLP, *select[:-1])[0] == 0
    before = sorted(Path().rglob("*"))
    status, out, _ = script(MLP, *select, "--dry-run")
    assert status == 0 and re.match(r"mlp_fmnist: 1 of 2 runs to do, about \d+ s\n  1 at once on .+ \(cpu\), with "
                                    r"synthetic stand-in \(synthetic; made from a seed\)\n", out)
    assert "    16x64H lambda 0 trial 0: finished" in out and "    16x64H lambda 1 trial 0: to do" in out
    assert re.search(r"  figure 3: 1 of 2 runs to do, about \d+ s", out)
    assert "figure 2:" not in out                       # of which nothing was selected
    assert sorted(Path().rglob("*")) == before


def test_fetching_says_whether_the_data_is_real(script, monkeypatch):
    monkeypatch.setattr(folders, "find_data", lambda *arguments: None)
    for policy, status in (("synthetic", 0), ("auto", 3)):
        assert script(MLP, "--preset", "smoke", "--data", policy, "--fetch")[:2] == (
            status, "data: Fashion-MNIST: the synthetic stand-in\n")
    assert not list(Path().iterdir())


def test_tuning_prints_rates_as_presets_take_them(script):
    status, out, _ = script(MLP, *SMALL, "--lambdas", 0, 1, "--tune")
    assert status == 0, out
    rates, tried = yaml.safe_load(out.splitlines()[-1].removeprefix("16x64H: lr: ")), {0: {}, 1: {}}
    presets.check("lr", rates, {}, "printed")
    for path in Path("results/smoke").glob("tune-lr*/**/run.json"):
        record = json.loads(path.read_text())
        tried[record["lambda"]][record["settings"]["lr"]] = record["result"]["validation_error"]
    assert set(rates) == {0, 1} and all(errors[rates[lam]] == min(errors.values()) for lam, errors in tried.items())
    assert sorted(tried[0]) == pytest.approx([16 * rate for rate in (0.002, 0.006, 0.02, 0.06)])     # times M


def test_the_diagnosis_is_told_after_epoch_3_of_end_to_end_runs(script):
    status, out, _ = script(MLP, "--preset", "smoke", "--only", "1x1024H", "16x64H", "--lambdas", 0, 1, "--trials", 1)
    told = re.findall(r"\] (.+): over epoch 3 the two best members have ([\d.]+) and ([\d.]+) % training error", out)
    (run, best, second), = told
    assert status == 0 and run == "16x64H lambda 1 trial 0"
    history = folders.load_history(Path("results/smoke/mlp_fmnist/16x64H/joint-1/trial0"))
    assert [float(best), float(second)] == pytest.approx(100 * np.sort(history["train_member_error"][2])[:2], abs=0.051)


def test_output_that_nobody_reads_any_more(tmp_path):
    plan = f"'{sys.executable}' '{MLP.__file__}' --preset smoke --dry-run"
    piped = ["bash", "-o", "pipefail", "-c", f"{plan} | true"]
    done = subprocess.run(piped, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
