"""Bad input gets one line that names the value and the fix, exit status 2, and writes nothing."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import common
import make_figures
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist

import numpy as np
import pytest
import torch
import yaml

ROOT = Path(common.__file__).parent
SMALL = ("--preset", "smoke", "--only", "16x64H", "--trials", 1, "--epochs", 1)


def refused(outcome, *words):
    status, _, err = outcome
    assert status == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err, (word, err)
    assert list(Path().iterdir()) == [], "something was written"


@pytest.mark.parametrize("arguments, words", [
    (["--preset", "quik"], ["'quik'", "did you mean quick?"]),
    (["--only", "256x4"], ["'256x4'", "did you mean 256x4H?"]),
    (["--methods", "baging"], ["'baging'", "did you mean bagging?"]),
    (["--lambdas", "1.5"], ["'1.5'", "[0, 1]"]),
    (["--lambdas", "-0.1"], ["-0.1", "lambdas"]),
    (["--lambdas", "nan"], ["'nan'", "[0, 1]"]),
    (["--lambdas", "half"], ["'half'", "[0, 1]"]),
    (["--epochs", "0"], ["'0'", "at least 1"]),
    (["--epochs", "-3"], ["-3", "epochs"]),
    (["--epochs", "2.5"], ["'2.5'", "whole number"]),
    (["--trials", "0"], ["'0'", "at least 1"]),
    (["--seed", "-1"], ["-1", "seed"]),
    (["--data", "reel"], ["'reel'", "did you mean real?"]),
    (["--device", "gpu"], ["'gpu'", "auto, cpu, cuda"]),
    (["--set", "batch=0"], ["batch=0", "at least 1"]),
    (["--set", "batch=-5"], ["batch=-5", "at least 1"]),
    (["--set", "batch=1000000"], ["batch 1000000", "training split", "lower batch"]),
    (["--set", "batch"], ["--set batch", "at least 1"]),
    (["--set", "bacth=7"], ["'bacth'", "did you mean batch?"]),
    (["--set", "momentum=.nan"], ["momentum=.nan", "[0, 1)"]),
    (["--set", "penalties=[1, -1]"], ["penalties", "numbers above 0"]),
    (["--set", "bagging=[", "lambdas=[0, 2]"], ["bagging=[", "weights, resample"]),
    (["--set", "folds=600"], ["folds 600", "500 images"]),
    (["--only", "1x1024H", "--methods", "bagging"], ["no run is left", "1x1024H"]),
    (["--data-dir", "nowhere"], ["nowhere", "synthetic", "--data real"]),
    (["--unknown"], ["--unknown", "--help"]),
    (["--jobs", "0"], ["'0'", "at least 1"]),
    (["--shard", "4/4"], ["'4/4'", "I/N", "0/4"]),
    (["--shard", "1/2/3"], ["'1/2/3'", "I/N"]),
    (["--shard", "one"], ["'one'", "I/N"]),
    (["--data", "real", "--data-dir", "nowhere"], ["nowhere", "not a folder", "Fashion-MNIST"]),
])
def test_bad_arguments(script, arguments, words):
    preset = [] if "--preset" in arguments else ["--preset", "smoke"]
    refused(script(train_mlp_fmnist, *preset, *arguments), *words)


@pytest.mark.parametrize("module, arguments, words", [
    (train_densenet_cifar, ["DN-High.depth=23"], ["DN-High.depth=23", "6n + 4", "10, 16, 22"]),
    (train_densenet_cifar, ["depth=4"], ["depth=4", "6n + 4"]),
    (train_densenet_cifar, ["members=0"], ["members=0", "at least 1"]),
    (train_densenet_cifar, ["decay=[0.5, 1]"], ["decay=[0.5, 1]", "below 1 (the end)"]),
    (train_densenet_cifar, ["decay=[2]"], ["decay=[2]", "shares of the epochs"]),
    (train_densenet_cifar, ["DN-Hihg.depth=22"], ["'DN-Hihg'", "did you mean DN-High?"]),
    (train_densenet_cifar, ["DN-High.batch=9"], ["batch holds for all", "leave 'DN-High.' out"]),
    (train_densenet_cifar, ["precision=fp16"], ["precision=fp16", "fp32, bf16, auto"]),
    (train_densenet_cifar, ["augment=maybe"], ["augment=maybe", "true or false"]),
    (train_densenet_cifar, ["dataset=CIFAR"], ["dataset=CIFAR", "common.DATASETS"]),
    (train_densenet_cifar, ["dataset=[1]"], ["dataset=[1]", "common.DATASETS"]),
    (train_densenet_cifar, ["stacking=validation"], ["validation is 0", "stacking=training"]),
    (train_densenet_cifar, ["nesterov=true", "momentum=0"], ["nesterov needs momentum"]),
    (train_convnet_cifar, ["ConvNet-0.29M.strides=[1, 2]"], ["strides [1, 2]", "one stride"]),
    (train_convnet_cifar, ["strides=[2, 2, 2, 2, 2, 2, 2]", "filters=[4, 4, 4, 4, 4, 4, 4]"],
     ["32x32", "too small", "padding=1"]),
    (train_convnet_cifar, ["padding=2"], ["padding=2", "0 or 1"]),
    (train_convnet_cifar, ["filters=[]"], ["filters=[]", "one a layer"]),
    (train_convnet_cifar, ["lr=0.1"], ["lr=0.1", "per range of lambda"]),
])
def test_bad_settings_of_networks_with_convolutions(script, module, arguments, words):
    refused(script(module, "--preset", "smoke", "--set", *arguments), *words)


def test_tuning_needs_images_held_out(script):
    refused(script(train_densenet_cifar, "--preset", "smoke", "--tune"), "validation is 0")


@pytest.mark.parametrize("size", ["train", "validation", "test"])
def test_more_images_than_there_are(script, fashion_mnist, size):
    refused(script(train_mlp_fmnist, *SMALL, "--data", "real", "--set", f"{size}=70000"), size,
            "70000", "presets.yaml")


def test_an_empty_data_folder(script, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    refused(script(train_mlp_fmnist, *SMALL, "--data", "real", "--data-dir", empty), str(empty),
            "holds nothing of it", "apt-get install")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(script):
    refused(script(train_mlp_fmnist, *SMALL, "--device", "cuda"), "--device cuda", "--device cpu")


@pytest.mark.parametrize("module, arguments, words", [
    (make_figures, ["fig33"], ["'fig33'", "did you mean fig3?"]),
    (make_figures, ["tabel2"], ["'tabel2'", "did you mean table2?"]),
    (make_figures, ["--preset", "papr"], ["'papr'", "did you mean paper?"]),
    (make_figures, ["--drop", "al"], ["'al'", "example, set, probability"]),
    (robustness, ["--drop", "exmple"], ["'exmple'", "did you mean example?"]),
    (robustness, ["--only", "256x4"], ["'256x4'", "did you mean 256x4H?"]),
    (robustness, ["--preset", "smoke"], ["no trained weights", "python train_mlp_fmnist.py"]),
])
def test_bad_arguments_of_the_other_scripts(script, module, arguments, words):
    refused(script(module, *arguments), *words)


def tiny(presets):
    return presets["paper"]["mlp_fmnist"]["configurations"]["256x4H"]


@pytest.mark.parametrize("change, words", [
    (lambda p: p["quick"]["mlp_fmnist"].update(epoch=3), ["'epoch'", "did you mean epochs?"]),
    (lambda p: p["quick"].update(mlp={}), ["'mlp'", "did you mean mlp_fmnist?"]),
    (lambda p: p["paper"]["mlp_fmnist"].update(lerning=1), ["'lerning'"]),
    (lambda p: p["paper"]["mlp_fmnist"].pop("batch"), ["batch is missing"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(epochs="ten"), ["epochs", "'ten'", "whole number"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(epochs=True), ["epochs", "True"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(momentum=float("nan")), ["momentum", "nan"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(lambdas=[0, 7]), ["lambdas", "[0, 1]"]),
    (lambda p: p["quick"]["mlp_fmnist"].update(lambdas=[]), ["lambdas", "[]"]),
    (lambda p: p["quick"].update(data="fake"), ["'fake'", "real, auto, synthetic, folder"]),
    (lambda p: p["quick"].update(mlp_fmnist=None), ["mlp_fmnist is None", "a block"]),
    (lambda p: p.update(quick=3), ["quick is 3", "a block"]),
    (lambda p: p.pop("paper"), ["expected a block `paper`"]),
    (lambda p: p["quick"].update(robustness={"repeats": 0}), ["repeats", "at least 1"]),
    (lambda p: tiny(p).update(lr={0.5: 1}), ["256x4H.lr", "per range of lambda"]),
    (lambda p: tiny(p).update(lr=5), ["256x4H.lr", "5 is not"]),
    (lambda p: tiny(p).update(members=0), ["256x4H.members", "0 is not"]),
])
def test_bad_presets(script, monkeypatch, tmp_path_factory, change, words):
    presets = yaml.safe_load((ROOT / "presets.yaml").read_text())
    change(presets)
    path = tmp_path_factory.mktemp("presets") / "presets.yaml"
    path.write_text(yaml.safe_dump(presets))
    real = common.load_preset
    monkeypatch.setattr(common, "load_preset", lambda name: real(name, path))
    refused(script(train_mlp_fmnist, "--preset", "quick"), *words)


@pytest.mark.parametrize("text", ["paper: [", "", "- 1", "!!python/object/apply:os.getcwd []"])
def test_a_presets_file_that_is_none(tmp_path, text):
    path = tmp_path / "presets.yaml"
    path.write_text(text)
    with pytest.raises(common.Refused, match=r"presets.yaml"):
        common.load_preset("quick", path)


def test_a_configuration_without_methods_to_train(script, monkeypatch, tmp_path_factory):
    test_bad_presets(script, monkeypatch, tmp_path_factory, lambda p: [
        c.update(methods=["bagging"], members=1)
        for c in p["paper"]["mlp_fmnist"]["configurations"].values()], ["no run is left"])


def test_lambdas_that_differ_in_the_eighth_digit_are_two(script):
    assert script(train_mlp_fmnist, *SMALL, "--lambdas", 1, "0.9999999", "1e-05")[0] == 0
    assert sorted(path.parent.parent.name for path in Path().rglob("run.json")) == [
        "joint-0.00001", "joint-0.9999999", "joint-1"]
    status, out, _ = script(make_figures, "fig3", "--preset", "smoke")
    assert status == 0 and "fig3: incomplete" in out


@pytest.mark.parametrize("name", ["weights.pt", "history.npz"])
@pytest.mark.parametrize("keep", [0, 0.5, -1])
def test_a_file_that_is_not_whole(script, name, keep):
    select = ("--preset", "smoke", "--only", "64x16H", "--trials", 1)
    assert script(train_mlp_fmnist, *select, "--epochs", 1, "--lambdas", 0)[0] == 0
    if name == "history.npz":
        assert script(robustness, *select)[0] == 0
    path = next(path for path in sorted(Path().rglob(name))
                if name == "weights.pt" or "robustness-example" in path.parts)
    content = path.read_bytes()
    path.write_bytes(content[:int(keep * len(content)) if keep >= 0 else -1])
    status, _, err = script(*((robustness, *select) if name == "weights.pt" else
                              (make_figures, "fig8", "--preset", "smoke")))
    assert status == 2 and err.count("\n") == 1 and str(path) in err and "remove" in err


def test_results_from_other_settings(script):
    assert script(train_mlp_fmnist, *SMALL, "--lambdas", 0)[0] == 0
    before = sorted(Path().rglob("*"))
    for other, words in ((["--epochs", 2], ["epochs is 1 there and 2 now"]),
                         (["--seed", 5], ["seed is 0 there and 5 now"])):
        status, _, err = script(train_mlp_fmnist, *SMALL, "--lambdas", 0, 0.5, *other)
        assert status == 2 and err.count("\n") == 1 and "another --results" in err
        for word in words:
            assert word in err
    assert sorted(Path().rglob("*")) == before


def test_a_record_that_is_not_whole(script):
    assert script(train_mlp_fmnist, *SMALL, "--lambdas", 0)[0] == 0
    (path,) = Path().rglob("run.json")
    path.write_text(path.read_text()[:40])
    status, _, err = script(make_figures, "fig3", "--preset", "smoke")
    assert status == 2 and str(path) in err and f"remove {path.parent}" in err


def test_a_results_folder_that_cannot_be_written(script, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    for place in (blocked, blocked / "results"):
        status, _, err = script(train_mlp_fmnist, *SMALL, "--results", place)
        assert status == 2 and err.count("\n") == 1 and str(place) in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def in_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment)


def test_python_too_old():
    done = in_python("import sys; sys.version_info = (3, 9, 1); sys.version = '3.9.1'\n"
                     "import common")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "3.9.1" in done.stderr and "3.11" in done.stderr


def test_torch_and_torchvision_of_other_releases(tmp_path):
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')")
    done = in_python("import common", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "not of one release pair" in done.stderr and "requirements.txt" in done.stderr


def test_a_package_that_is_missing(tmp_path):
    (tmp_path / "yaml.py").write_text("raise ImportError(\"No module named 'yaml'\")")
    done = in_python("import train_mlp_fmnist", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'yaml'" in done.stderr


@pytest.mark.parametrize("module", [train_mlp_fmnist, train_densenet_cifar, train_convnet_cifar,
                                    robustness, make_figures])
def test_help(script, module):
    status, out, _ = script(module, "--help")
    assert status == 0 and module.__doc__.splitlines()[0] in out


def test_a_dry_run_says_what_is_finished_and_writes_nothing(script):
    select = ("--preset", "smoke", "--only", "16x64H", "--trials", 1, "--lambdas", 0, 1)
    assert script(train_mlp_fmnist, *select[:-1])[0] == 0
    before = sorted(Path().rglob("*"))
    status, out, _ = script(train_mlp_fmnist, *select, "--dry-run")
    assert status == 0 and "2 runs, 1 finished, 1 to do" in out
    assert "16x64H lambda 0 trial 0: finished" in out and "16x64H lambda 1 trial 0: to do" in out
    assert re.search(r"Fig\. 3: 1 of 2 runs to do, about \d+ s, \d+ MB", out)
    assert "Fig. 2:" not in out                         # of which nothing was selected
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("module", [train_mlp_fmnist, train_densenet_cifar, train_convnet_cifar])
def test_a_plan_names_for_a_figure_the_runs_that_it_draws(tmp_path, module):
    experiment = module.EXPERIMENT
    block = common.experiment_settings(common.load_preset("paper"), "paper", experiment)
    runs = common.list_runs("paper", experiment, block, {})
    for name, drawn in experiment.figures.items():
        study = make_figures.Study(tmp_path, "paper", "example")
        kind, number = name.split()
        if kind == "Table":
            make_figures.TABLES[f"table{number}"](study)
        else:
            make_figures.plt.close(make_figures.FIGURES[f"fig{number}"](study)[0])
        missing = {run for run in study.missing if run[0] == experiment.name}
        assert {(run.experiment, run.configuration, run.method_name, run.trial)
                for run in runs if drawn(run)} == missing, name


def test_a_finished_run_is_not_trained_again(script):
    assert script(train_mlp_fmnist, *SMALL, "--lambdas", 0)[0] == 0
    (path,) = Path().rglob("run.json")
    written = path.read_text()
    status, out, _ = script(train_mlp_fmnist, *SMALL, "--lambdas", 0)
    assert status == 0 and "1 finished, 0 to do" in out and path.read_text() == written


def test_tuning_prints_rates_as_presets_take_them(script):
    status, out, _ = script(train_mlp_fmnist, *SMALL, "--lambdas", 0, 1, "--tune")
    assert status == 0, out
    text = out.splitlines()[-1].removeprefix("16x64H: lr: ")
    rates = yaml.safe_load(text)
    assert set(rates) == {0, 1} and common.CONFIGURATION["lr"][0](rates)
    tried = {}
    for path in Path("results/smoke").glob("tune-lr*/**/run.json"):
        record = json.loads(path.read_text())
        tried.setdefault(record["lambda"], {})[record["settings"]["lr"]] = \
            record["result"]["validation_error"]
    assert len(tried[0]) == 4 and all(rates[x] == min(tried[x], key=tried[x].get) for x in tried)


def test_the_diagnosis_is_told_after_epoch_3_of_end_to_end_runs(script):
    select = ("--preset", "smoke", "--only", "1x1024H", "16x64H", "--lambdas", 0, 1, "--trials", 1)
    status, out, _ = script(train_mlp_fmnist, *select, "--diagnose")
    told = re.findall(
        r"(.+): over epoch 3 the two best members have ([\d.]+) and ([\d.]+) % training error, "
        r"([\d.]+) points apart \(5 tell\): (OVER CAPACITY|not over capacity)", out)
    (run, best, second, gap, verdict), = told
    assert status == 0 and run == "16x64H lambda 1 trial 0"
    history = common.load_history(Path("results/smoke/mlp_fmnist/16x64H/joint-1/trial0"))
    expected = 100 * np.sort(history["train_member_error"][2])[:2]
    assert [float(best), float(second)] == pytest.approx(expected, abs=0.051)
    assert (verdict == "OVER CAPACITY") == (float(gap) >= 5)


@pytest.mark.parametrize("errors, over", [([0.1, 0.15, 0.9], True), ([0.9, 0.149, 0.1], False)])
def test_the_diagnosis_is_the_gap_between_the_two_best(errors, over):
    run = common.Run("p", "e", "c", "joint", 1.0, 0, {}, weights=False)
    assert ("OVER CAPACITY" in common.diagnose(run, np.array(errors))) == over


# --- A fuzz: whatever is written, a valid study or one line ---------------------------------------

NONSENSE = ["[]", "{}", "-1", "0", "1.5", "1e400", ".nan", ".inf", "-.inf", "null", "true", "''",
            "text", "'12'", "[1, 2]", "[[]]", "{a: 1}", "99999999999999999999", "0x" + "f" * 9000,
            "9" * 9000, "2024-99-99", "!!python/object/apply:os.system [exit 3]", "!!binary x",
            "&a [*a]", "*nothing", "[" * 2000, "\t", "{{", "é\u0000", "!!set {a}", "? [a]"]
BOMB = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9 if i else ['x'] * 9)}]\n"
               for i in range(30))


def read_as_a_study(folder, text):
    """What a script does with presets.yaml before it trains: the runs, or Refused."""
    path = folder / "presets.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    preset = common.load_preset("smoke", path)
    for module in (train_mlp_fmnist, train_densenet_cifar, train_convnet_cifar):
        block = common.experiment_settings(preset, "smoke", module.EXPERIMENT)
        assert common.list_runs("smoke", module.EXPERIMENT, block, {})


def test_a_fuzz_of_presets(tmp_path):
    """The values of presets.yaml, one at a time, replaced by nonsense, removed or doubled."""
    lines = (ROOT / "presets.yaml").read_text().split("\n")
    at = [i for i, line in enumerate(lines) if re.match(r" +[\w.]+: \S", line)]
    draw, refused = random.Random(0), 0
    for i in [*at, *(i for i in at if " data: " in lines[i])]:
        key, value = re.match(r"( +[\w.]+: )(.*)", lines[i]).groups()
        inner = re.sub(r"(\w+: )[^,}\[]+", rf"\g<1>{draw.choice(NONSENSE[:18])}", value, count=1)
        line = draw.choice([key + draw.choice(NONSENSE), key + inner, "", key + "*b29",
                            f"{lines[i]}\n{lines[i]}", f" {lines[i]}"])
        head = [BOMB] if "*b29" in line else []
        try:
            read_as_a_study(tmp_path, "\n".join([*head, *lines[:i], line, *lines[i + 1:]]))
        except common.Refused as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, line
    assert refused > len(at) / 3


@pytest.mark.parametrize("key", ["data", "mlp_fmnist", "robustness"])
def test_a_bomb_in_presets(tmp_path, key):
    """Nine references to nine references to ...: written out, it would fill any memory."""
    with pytest.raises(common.Refused, match=r"^[^\n]{10,1000}$"):
        read_as_a_study(tmp_path, f"{BOMB}paper: &p {{{key}: *b29}}\nsmoke: {{}}")


@pytest.mark.parametrize("text", ["", "- a", "paper: 3", "paper: &p {mlp_fmnist: *p}\nsmoke: *p",
                                  "\ud800", "smoke: {}", "[" * 100_000, *NONSENSE])
def test_presets_of_another_form(tmp_path, text):
    with pytest.raises(common.Refused, match=r"^[^\n]{10,1000}$"):
        read_as_a_study(tmp_path, text)


FLAGS = ("--preset", "--only", "--lambdas", "--trials", "--data-dir", "--device", "--seed",
         "--methods", "--epochs", "--data", "--set", "--jobs", "--shard", "--results")


@pytest.mark.parametrize("flag", FLAGS)
def test_a_fuzz_of_the_command_line(script, flag):
    """Nonsense after a flag is refused in a line, and nothing is written; no value is refused too.
    """
    words = [w for w in NONSENSE if "\0" not in w] if flag != "--results" else ["/dev/null/x"]
    if flag == "--data-dir":
        words = [w for w in words if w != "''"]
    for word in ["", *words]:
        arguments = ["--preset", "smoke", "--dry-run" if flag != "--results" else "--eager"]
        arguments += [flag] if word == "" else [flag, word]
        if word in ("0", "1.5", "1e400") and flag in ("--seed", "--lambdas", "--data-dir"):
            continue                                        # (some are sensible there)
        status, _, err = script(train_mlp_fmnist, *arguments)
        assert status == 2 and err.startswith("error: "), (arguments, err)
        assert err.count("\n") == 1 and len(err) < 20_000, arguments
    assert not list(Path().iterdir())


@pytest.mark.parametrize("key", [*common.SETTINGS, *common.CONFIGURATION, "hidden", "256x4H.lr"])
def test_a_fuzz_of_set(key):
    preset = common.load_preset("smoke")
    for word in NONSENSE:
        try:
            common.experiment_settings(preset, "smoke", train_mlp_fmnist.EXPERIMENT,
                                       [f"{key}={word}"])
        except common.Refused as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
