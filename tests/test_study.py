"""Which runs a study has, what they leave, and that each is the same alone, at once with others, and in a whole study.

What figures and verdicts make of them is in test_figures.py and test_verdicts.py.
"""

import collections
import csv
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import study
import common
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
from study import command, folders, plan

import pytest
import yaml
from conftest import outcomes

TRAINING = {"mlp_fmnist": 2 * (1 + 3 * 7 + 2), "densenet_cifar": 2 * 3 * (4 + 3),
            "convnet_cifar": 2 * (5 * 3 + 2)}          # smoke's runs: 2 trials


def records(results, experiment="*"):
    """(run.json, folder) of the runs of a smoke study in a folder."""
    there = folders.run_folders(results / "smoke", f"{experiment}/*/*")
    return [(folders.read_run(folder), folder) for folder in there]


def runs_of(preset, name, changes=(), **narrowed):
    """All runs of an experiment in a preset."""
    block = plan.experiment_settings(plan.load_preset(preset), preset, name, changes)
    about = common.DATASETS[block["dataset"]].description
    return plan.list_runs(preset, plan.experiment_of(name), block, about, **narrowed)


# --- What a whole study leaves -------------------------------------------------------------------


def test_a_study_leaves_every_run_with_all_that_decided_it_and_nothing_else(smoke_study):
    for name, count in TRAINING.items():
        assert len(records(smoke_study / "results", name)) == count
    assert len(records(smoke_study / "results", "robustness-example")) == 2 * 2 * 3
    for record, folder in records(smoke_study / "results"):
        assert {path.name for path in folder.iterdir()} - {"weights.pt"} == {"run.json", "history.npz"}
        settings, machine = record["settings"].get("trained", record["settings"]), record["machine"]
        assert settings["data"]["source"] == "synthetic" and record["data_from"] == "made from a seed"
        assert machine["threads"] == 1 and machine.keys() >= {"device", "torch", "python", "commit"}
    assert {path.name for path in smoke_study.iterdir()} == {"results", "figures", "output.txt"}
    with open(smoke_study / "figures/smoke/runs.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == sum(TRAINING.values())


def test_weights_are_kept_only_where_something_needs_them(smoke_study):
    """Figs 5, 7 and 8, and lambda 0 where stacking combines its members."""
    kept = {(record["configuration"], folder.parent.name) for record, folder in records(smoke_study / "results")
            if (folder / "weights.pt").exists()}
    assert kept == {
        *((name, f"joint-{lam}") for name in ("64x16H", "256x4H") for lam in ("0", "0.99", "1")),
        *((name, "joint-0") for name in ("DN-Low", "DN-Mid", "DN-High")),
        *(("10xConvNet-0.29M", f"joint-{lam}") for lam in ("0", "1"))}


def test_the_output_says_what_was_chosen_planned_and_made(smoke_study):
    lines = (smoke_study / "output.txt").read_text()
    assert lines.startswith("preset smoke (others: ") and "\r" not in lines
    assert "mlp_fmnist: 48 of 48 runs to do, about" in lines and "\n  figure 9: 14 of 14 runs to do" in lines
    assert re.search(r"\[48/48\] .*: test error [\d.]+ % \(.*about 0:00:00 left\n", lines)
    assert f"{len(records(smoke_study / 'results', 'robustness-example'))} trained runs, 0 measured before" in lines
    assert lines.rstrip().splitlines()[-1].startswith("done in ")


@pytest.mark.parametrize("module, arguments, jobs, made", [
    (train_mlp_fmnist, ["--only", "64x16H", "--lambdas", 1, "--trials", 2], 1, 2),
    (train_densenet_cifar, ["--only", "DN-High", "--methods", "bagging", "stacking", "--trials", 1, "--deterministic"],
     2, 3),
    (robustness, ["--only", "64x16H", "--trials", 1], 2, 3)])
def test_a_run_alone_or_beside_others_equals_the_same_run_in_the_study(smoke_study, script, module, arguments, jobs,
                                                                       made):
    if module is robustness:
        shutil.copytree(smoke_study / "results/smoke/mlp_fmnist/64x16H", "results/smoke/mlp_fmnist/64x16H")
    before = outcomes(Path("results"))
    status, out, err = script(module, "--preset", "smoke", *arguments, "--jobs", jobs)
    here, study = outcomes(Path("results")), outcomes(smoke_study / "results")
    assert status == 0 and len(here) == len(before) + made and f"[{made}/{made}]" in out, err
    assert jobs == 1 or module is robustness or "\n  2 at once on " in out
    for run in here:
        assert here[run] == study[run], run


def test_the_records_of_earlier_versions_are_finished_runs():
    """They have seals, check sums and folders of their machines, and no weights: nothing of them is trained again."""
    place = folders.HERE / "expected/paper/results"
    there = {folder.relative_to(place) for folder in folders.run_folders(place, "paper/mlp_fmnist/*/*")}
    finished = {run.path for run in runs_of("paper", "mlp_fmnist") if folders.run_is_finished(run, place)}
    assert len(there) >= 72 and finished == there


# --- Which runs there are ------------------------------------------------------------------------


def test_a_configuration_may_have_its_own_trials_and_epochs():
    trials = collections.Counter((run.configuration, run.method_name) for run in runs_of("overnight", "convnet_cifar"))
    assert trials["10xConvNet-0.29M", "joint-0"] == 1 and trials["ConvNet-0.29M", "joint-0"] == 3
    epochs = {run.configuration: run.settings["epochs"] for run in runs_of("quick", "densenet_cifar")}
    assert epochs == {"DN-Low": 50, "DN-Mid": 50, "DN-High": 150}


@pytest.mark.parametrize("parts", [1, 3, 50])
def test_shards_are_the_study_and_share_nothing(parts):
    runs = runs_of("paper", "mlp_fmnist")
    shards = [plan.shard(runs, part, parts) for part in range(parts)]
    assert sorted(run.path for shard in shards for run in shard) == sorted(run.path for run in runs)
    for shard in shards:
        there = {run.path for run in shard}
        assert {run.path_of_members for run in shard if run.method == "stacking"} <= there
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 6                 # five trials of stacking go with their members


def test_a_learning_rate_holds_up_to_its_lambda():
    runs = runs_of("paper", "mlp_fmnist", only=["256x4H"], lambdas=[0, 0.95, 0.97])
    assert {run.lam: run.settings["lr"] for run in runs} == {0: 5.15, 0.95: 5.15, 0.97: 1.536}
    assert folders.method_name("joint", -0.0) == "joint-0"


def test_tuning_prints_rates_as_presets_take_them(script):
    status, out, _ = script(train_mlp_fmnist, "--preset", "smoke", "--only", "16x64H", "--trials", 1, "--epochs", 1,
                            "--lambdas", 0, 1, "--tune")
    assert status == 0, out
    rates, tried = yaml.safe_load(out.splitlines()[-1].removeprefix("16x64H: lr: ")), {0: {}, 1: {}}
    plan.check("lr", rates, {}, "printed")
    for path in Path("results/smoke").glob("tune-lr*/**/run.json"):
        record = json.loads(path.read_text())
        tried[record["lambda"]][record["settings"]["lr"]] = record["result"]["validation_error"]
    assert set(rates) == {0, 1} and all(errors[rates[lam]] == min(errors.values()) for lam, errors in tried.items())
    assert sorted(tried[0]) == pytest.approx([16 * rate for rate in (0.002, 0.006, 0.02, 0.06)])     # times M
    only = ("--preset", "smoke", "--only", "16x64H", "--trials", 1, "--epochs", 1, "--lambdas", 0, "--tune")
    for folder, grid, why in ("high", "[1e9, 1e10]", "each diverged"), ("one", "[0.02]", "one was tried"):
        status, out, _ = script(train_mlp_fmnist, *only, "--results", folder, "--set", f"tune={grid}")
        assert status == 0 and f"no rate to recommend: {why}" in out and "lr: {" not in out


def test_a_configuration_may_have_classes_of_its_own(script):
    status, _, err = script(train_convnet_cifar, "--preset", "smoke", "--only", "ConvNet-0.07M", "10xConvNet-0.29M",
                            "--trials", 1, "--epochs", 1, "--lambdas", 0, "--set", "10xConvNet-0.29M.classes=10",
                            "weights=[0]")
    assert status == 0, err
    classes = {record["configuration"]: (record["settings"]["classes"], len(folders.load_weights(folder)[
        "members.0.12.bias" if "10x" in record["configuration"] else "members.0.8.bias"]))
               for record, folder in records(Path("results"))}
    assert classes == {"ConvNet-0.07M": (None, 100), "10xConvNet-0.29M": (10, 10)}


@pytest.mark.parametrize("copied_to", ["joint-1/trial0", "joint-0/trial1"])
def test_a_run_in_the_folder_of_another_is_refused(smoke_study, script, copied_to):
    """n = 2 of one trial would have a standard error of 0."""
    place, there = Path("results/smoke/mlp_fmnist/64x16H"), "joint-0/trial0"
    shutil.copytree(smoke_study / place / there, place / copied_to)
    for module, *arguments in ((robustness,), (train_mlp_fmnist, "--figure", "8", "--data", "synthetic")):
        status, _, err = script(module, *arguments, "--preset", "smoke")
        assert status == 2 and f"smoke/mlp_fmnist/64x16H/{there}" in err and copied_to in err and err.count("\n") == 1


def test_the_commit_is_that_of_the_package_and_not_of_a_repository_around_it(tmp_path, monkeypatch):
    (tmp_path / "package/study").mkdir(parents=True)
    for words in ("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "one"):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)
    for folder, found in (tmp_path, r"[0-9a-f]{7,}"), (tmp_path / "package", "no commit: not a checkout"):
        monkeypatch.setattr(study, "__file__", str(folder / "study/__init__.py"))
        assert re.fullmatch(found, study.commit.__wrapped__())


# --- How many at once, and for how long ----------------------------------------------------------


@pytest.mark.parametrize("runs, jobs, cores, gigabytes, device, at_once", [
    (5, None, 3, 1000, "cpu", 3),       # as many as there are cores
    (5, None, 3, 0.001, "cpu", 1),      # and as memory allows,
    (2, 4, 3, 0.001, "cpu", 2),         # unless --jobs says, as far as there are runs
    (5, None, 3, 1000, "cuda", 1)])
def test_runs_at_once(monkeypatch, runs, jobs, cores, gigabytes, device, at_once):
    data = SimpleNamespace(device=SimpleNamespace(type=device))
    monkeypatch.setattr(Path, "read_text", lambda path: f"MemAvailable:   {gigabytes * 1e9 / 1024:.0f} kB\n")
    assert command.runs_at_once(range(runs), lambda run: data, jobs, cores) == at_once


def test_progress_tells_the_time_left(monkeypatch, capsys):
    """Four runs of three epochs of 20 s each, taken for 10 s; a line for each run that ends, and each half minute."""
    clock = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    settings = {"epochs": 3, "validation": 1, "members": 2}
    runs = [plan.Run("p", "e", "c", "joint", 0.0, trial, settings, False) for trial in range(4)]
    progress = command.Progress({run.path: 30.0 for run in runs}, jobs=1)
    for run in runs:
        report = command.reporter(run, progress.epoch_ended)
        for epoch in (1, 2, 3):
            clock[0] += 20
            report(epoch, [({}, {"ensemble_error": 0.1})])
        progress.run_ended(run, f"{run.label}: ended")
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["[0/4] c lambda 0 trial 0: epoch 2/3, validation error 10.0 %, about 0:03:20 left",
                        "[1/4] c lambda 0 trial 0: ended, about 0:03:00 left"]
    assert said[-1] == "[4/4] c lambda 0 trial 3: ended, about 0:00:00 left" and len(said) == 8
