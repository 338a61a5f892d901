"""The whole smoke study through run_all.sh, as a user runs it, and what it leaves behind."""

import collections
import csv
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import study as machinery
import claims
import finished
import folders
import make_figures
import presets
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
from finished import FinishedRuns, mean_and_error

import matplotlib
import numpy as np
import pytest

ROOT = folders.HERE
FIGURES, TABLES = (tuple(map(make_figures.stem, some)) for some in (make_figures.FIGURES, make_figures.TABLES))
TRAINING = {"mlp_fmnist": 2 * (1 + 3 * 7 + 2), "densenet_cifar": 2 * 3 * (4 + 3),
            "convnet_cifar": 2 * (5 * 3 + 2)}          # smoke's runs: 2 trials


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A smoke study made by run_all.sh, called from another folder, with a space in its path."""
    folder = tmp_path_factory.mktemp("smoke") / "my study"
    folder.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", ROOT / "run_all.sh", "smoke", "--results", "results", "--figures-dir", "figures"],
                          cwd=folder, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "output.txt").write_text(done.stdout)
    return folder


def records(study, experiment="mlp_fmnist"):
    for path in (study / "results" / "smoke" / experiment).rglob("run.json"):
        yield json.loads(path.read_text()), path.parent


def sealed(record):
    """A run.json as the package writes it."""
    return json.dumps(record | {"seal": folders.seal(record)})


def table(folder, figure):
    with open(folder / "figures" / "smoke" / f"{figure}.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- What a study leaves -------------------------------------------------------------------------


def test_every_promised_file_is_there(study):
    figures = study / "figures" / "smoke"
    assert sorted(p.name for p in figures.iterdir()) == sorted(
        ["report.html", "claims.csv", "runs.csv", "fig6-dominance.csv",
         *(f"{figure}.{kind}" for figure in FIGURES for kind in ("csv", "pdf", "png")),
         *(f"{table}.{kind}" for table in TABLES for kind in ("csv", "md"))])
    assert all(p.stat().st_size > (200 if p.name.startswith("table") else 500) for p in figures.iterdir())
    assert len(table(study, "runs")) == sum(TRAINING.values())
    for name, count in TRAINING.items():
        there = list(records(study, name))
        assert len(there) == count
        assert all({p.name for p in folder.iterdir()} == {"run.json", *record["sha256"]} for record, folder in there)
    assert sum(1 for _ in records(study, "robustness-example")) == 2 * 2 * 3
    assert {p.name for p in study.iterdir()} == {"results", "figures", "output.txt"}


def test_weights_are_kept_only_where_something_needs_them(study):
    """Figs 5, 7 and 8, and lambda 0 where stacking combines its members."""
    kept = {(folder.parent.parent.name, folder.parent.name) for experiment in TRAINING
            for _, folder in records(study, experiment) if (folder / "weights.pt").exists()}
    assert kept == {
        *((name, f"joint-{lam}") for name in ("64x16H", "256x4H") for lam in ("0", "0.99", "1")),
        *((name, "joint-0") for name in ("DN-Low", "DN-Mid", "DN-High")),
        *(("10xConvNet-0.29M", f"joint-{lam}") for lam in ("0", "1"))}


def test_the_output_says_what_was_chosen_planned_made_and_tested(study):
    lines = (study / "output.txt").read_text()
    assert lines.startswith("preset smoke, as asked\n") and "\r" not in lines
    assert "mlp_fmnist: 48 of 48 runs to do, about" in lines and "\n  figure 9: 14 of 14 runs to do" in lines
    assert re.search(r"\[48/48\] .*: test error", lines)
    assert lines.rstrip().splitlines()[-1].startswith("done in ")
    for figure in FIGURES:
        assert f"{figure}: complete, {study}/figures/smoke/{figure}.pdf, .png, .csv" in lines
    assert f"figures: complete: {' '.join(FIGURES + TABLES)}" in lines
    not_tested, exact = re.search(r"\nnot tested:\n(.*?)\n\nidentities and errata, computed:\n(.*?)\n\n", lines,
                                  re.S).groups()
    assert [line.split()[:3] for line in not_tested.splitlines()] == [[name, "stand-in", "data"]
                                                                      for name in claims.EMPIRICAL]
    assert [line.split()[1] for line in exact.splitlines()] == ["verified"] * 5 + ["erratum"] * 4 + ["note"]
    assert "0 of 18 empirical claims tested at the paper's protocol" in lines
    assert f"report: {study}/figures/smoke/report.html" in lines


def test_the_report_has_every_figure_and_is_one_page(study):
    page = (study / "figures/smoke/report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(FIGURES) == page.count("<img alt=")
    assert "http" not in re.sub(r"base64,[^\"]*", "", page) and "<script" not in page       # nothing is fetched
    for run in ("python train_densenet_cifar.py --preset smoke --figure table2",
                "python robustness.py --preset smoke --figure 7", "python make_figures.py 9 --preset smoke"):
        assert run in page
    assert "SYNTHETIC STAND-IN DATA" in page


def test_comparing_with_what_was_expected(study, script, tmp_path):
    flags = ("--preset", "smoke", "--figures-dir", study / "figures", "--compare")
    expected = tmp_path / "expected"
    shutil.copytree(study / "figures" / "smoke", expected)
    status, out, _ = script(make_figures, *flags, expected)
    numbers, total = re.search(r"(\d+) of (\d+) numbers are within", out).groups()
    assert status == 0 and numbers == total and int(total) > 1000 and "fig4.csv: all within" in out
    text = (expected / "fig2.csv").read_text().splitlines()
    row = text[3].split(",")
    row[4] = f"{float(row[4]) - 4}"
    (expected / "fig2.csv").write_text("\n".join([*text[:3], ",".join(row), *text[4:]]))
    status, out, _ = script(make_figures, "2", "fig3", *flags, expected)
    assert status == 1 and "fig2.csv: 1 numbers are apart\n    256x4H joint-0: test_error" in out
    assert "fig3.csv: all within" in out
    status, _, err = script(make_figures, *flags, tmp_path / "nothing")
    assert status == 2 and err.count("\n") == 1 and "is not a folder" in err
    status, _, err = script(make_figures, "--preset", "smoke", "--compare", expected)
    assert status == 2 and "does not exist: draw that figure first" in err


def test_a_run_says_all_that_decided_its_numbers(study):
    for record, folder in [run for name in TRAINING for run in records(study, name)]:
        assert record["settings"]["data"]["source"] == "synthetic" and record["machine"]["threads"] == 1
        assert record["machine"].keys() >= {"device", "torch", "python", "commit"}
        result, history = record["result"], folders.load_history(folder)
        if record["method"] == "stacking":
            continue
        epochs, members = record["settings"]["epochs"], record["settings"]["members"]
        second = "validation" if record["settings"]["validation"] else "test"
        for part in ("train", second):
            if part == "train" and record["settings"].get("bagging") == "resample":
                continue                # members with images of their own form no ensemble there
            for key in ("member_loss", "member_error"):
                assert history[f"{part}_{key}"].shape == (epochs, members)
            np.testing.assert_allclose(history[f"{part}_mean_member_loss"], history[f"{part}_member_loss"].mean(1),
                                       rtol=1e-5)
            np.testing.assert_allclose(history[f"{part}_diversity"], history[f"{part}_mean_member_loss"]
                                       - history[f"{part}_ensemble_loss"], atol=1e-5)
        assert history["reported_test_member_error"].shape == (members,)
        if second == "test":
            assert result["epoch"] == epochs
            continue
        assert result["epoch"] == 1 + history["validation_ensemble_error"].argmin()
        assert result["validation_error"] == pytest.approx(history["validation_ensemble_error"].min())


# --- Figures and tables are the run folders' numbers ---------------------------------------------


def expected(study, configuration, method, key, experiment="mlp_fmnist"):
    values = [record["result"][key] for record, folder in records(study, experiment)
              if (record["configuration"], folder.parent.name) == (configuration, method)]
    assert len(values) == 2
    return sum(values) / 2, abs(values[0] - values[1]) / 2    # standard error, ddof 1, of two


@pytest.mark.parametrize("name, experiment, rows", [
    ("fig2", "mlp_fmnist", 6), ("fig3", "mlp_fmnist", 22), ("fig4", "convnet_cifar", 15),
    ("table2", "densenet_cifar", 21)])
def test_errors_equal_the_run_folders(study, name, experiment, rows):
    found = table(study, name)
    assert len(found) == rows
    assert "SYNTHETIC STAND-IN" in found[0]["provenance"] and "reduced: " in found[0]["provenance"]
    for row in found:
        mean, error = expected(study, row["configuration"], row["method"], "test_ensemble_error", experiment)
        assert float(row["test_error_percent"]) == pytest.approx(100 * mean, abs=1e-12)
        assert float(row["standard_error"]) == pytest.approx(100 * error, abs=1e-12)
        assert row["n"] == "2" and row["diverged"] == "0"
        if "minimum" in row:
            lowest = min(float(r["test_error_percent"]) for r in found if r["configuration"] == row["configuration"])
            assert row["minimum"] == "False" or float(row["test_error_percent"]) == lowest
    if "minimum" in found[0]:
        assert {r["configuration"] for r in found if r["minimum"] == "True"} == {r["configuration"] for r in found}


def test_table_2_is_the_same_in_both_its_forms(study):
    text = (study / "figures/smoke/table2.md").read_text()
    for row in table(study, "table2"):
        mean = f"{float(row['test_error_percent']):.1f}"
        theirs = f" (paper: {row['published_percent']})" if row["published_percent"] else ""
        shown = f"**{mean}**" if row["minimum"] == "True" else mean
        assert f"{shown} ± {float(row['standard_error']):.1f}, n = 2{theirs}" in text
    published = {row["published_percent"] for row in table(study, "table2")} - {""}
    assert {"17.8", "19.9", "23.5", "29.6"} <= published and len(published) == 18
    assert text.index("SYNTHETIC") < text.index("| DN-Low")


def test_the_tables_of_architectures(study):
    first = {row["configuration"]: row for row in table(study, "table1")}
    assert first["DN-High"]["parameters"] == "3200128"
    assert first["DN-High, preset smoke"]["depth"] == "10"
    assert {row["peak_cuda_memory"] for name, row in first.items() if "preset" in name} == {"not measured on CUDA"}
    assert first["DN-Low"]["peak_cuda_memory"] == "at most 11.6 GB for a step on an NVIDIA H200"
    saved = [int(first[name]["bytes_saved_for_backward"]) for name in ("DN-High", "DN-Mid", "DN-Low")]
    assert max(saved) < 1.1 * min(saved) and min(saved) > 8e9       # "approximately" one size
    fourth = {row["configuration"]: row for row in table(study, "table4")}
    assert fourth["ConvNet-0.07M"]["parameters"] == "62820"
    assert [name for name, row in fourth.items() if row["differs"] == "True"] == ["ConvNet-0.07M", "ConvNet-1.20M"]
    assert "0.07M computes to 0.063M" in (study / "figures/smoke/table4.md").read_text()


@pytest.mark.parametrize("preset, measured", [("smoke", "DN-High, preset smoke"), ("short", "DN-High")])
def test_table_1_has_the_peak_of_a_run_on_a_gpu(study, script, preset, measured):
    """It stands in the row of the network that was run: in `short` that is the paper's own."""
    run = "densenet_cifar/DN-High/joint-1/trial0"
    shutil.copytree(study / "results/smoke" / run, Path("results", preset, run))
    path = Path("results", preset, run, "run.json")
    record = json.loads(path.read_text())
    record["preset"], record["result"]["peak_memory_bytes"] = preset, 12_340_000_000
    path.write_text(sealed(record))
    status, _, err = script(make_figures, "table1", "--preset", preset)
    assert status == 0, err
    with open(f"figures/{preset}/table1.csv") as file:
        peaks = {row["configuration"]: row["peak_cuda_memory"] for row in csv.DictReader(file)}
    assert peaks.pop(measured).startswith("12.3 GB (batch 32, ")
    assert all(peak.endswith(" GB for a step on an NVIDIA H200") != ("preset" in name) for name, peak in peaks.items())


def test_fig5_equals_the_weights(study):
    found = table(study, "fig5")
    assert len(found) == 2 * 2 * 10
    for row in found:
        folder = study / "results/smoke/convnet_cifar/10xConvNet-0.29M" / row["method"] / f"trial{row['trial']}"
        weights = folders.load_weights(folder, "cpu")
        norms = [weights[f"members.{m}.0.weight"].norm().item() for m in range(10)]
        m = int(row["member"]) - 1
        assert float(row["filter_norm"]) == pytest.approx(norms[m])
        assert float(row["distance_from_initial_filters"]) == pytest.approx(moved(folder, 100)[m], rel=1e-4)


def moved(folder, classes):
    """How far the first filters of each ConvNet lie from where a new ensemble of that many classes has them."""
    record, weights = folders.read_run(folder), folders.load_weights(folder, "cpu")
    name, trial = record["configuration"], record["trial"]
    run = machinery.Run("", "convnet_cifar", name, "joint", 0, trial, {"seed": 0}, False)
    start = train_convnet_cifar.build(record["settings"], (3, 32, 32), classes, run.generator("initialisation"))
    return [((weights[f"members.{m}.0.weight"] - member[0].weight).norm() / member[0].weight.norm()).item()
            for m, member in enumerate(start.members)]


def test_fig6_equals_the_histories(study):
    found, numbers = table(study, "fig6"), table(study, "fig6-dominance")
    assert len(numbers) == 2 * (4 + 7)
    for row in numbers:
        experiment = "densenet_cifar" if row["configuration"] == "DN-High" else "mlp_fmnist"
        folder = study / "results/smoke" / experiment / row["configuration"] / row["method"] / f"trial{row['trial']}"
        history = folders.load_history(folder)
        epoch = json.loads((folder / "run.json").read_text())["result"]["epoch"]
        test, train = history["reported_test_member_error"], history["train_member_error"]
        assert float(row["test_dominance"]) == pytest.approx(100 * (np.median(test) - test.min()))
        assert float(row["train_best_member_error"]) == pytest.approx(100 * train[epoch - 1].min())
        first, second = np.sort(train[2])[:2]
        assert float(row["gap_at_epoch_3"]) == pytest.approx(100 * (second - first), abs=1e-4)
        assert row["same"] == str(train[2].argmin() == train[epoch - 1].argmin())
        drawn = {r["who"]: float(r["error_percent"]) for r in found if r["epoch"] == "end" and r["part"] == "test"
                 and all(r[key] == row[key] for key in ("configuration", "method", "trial"))}
        assert len(drawn) == 1 + len(test)
        assert drawn["member 2"] == pytest.approx(100 * test[1])
    by_epoch = [row for row in found if row["epoch"] != "end"]
    assert {(row["configuration"], row["part"]) for row in by_epoch} == {
        ("DN-High", "train"), ("DN-High", "test"), ("256x4H", "train"), ("256x4H", "validation")}


def test_fig9_equals_the_run_folders(study):
    found = table(study, "fig9")
    assert len(found) == 2 * 7
    for row in found:
        mean, error = expected(study, "64x16H", row["method"], row["loss"])
        assert row["n"] == "2" and float(row["cross_entropy"]) == pytest.approx(mean)
        assert float(row["standard_error"]) == pytest.approx(error)


@pytest.mark.parametrize("figure, configuration, members", [("fig7", "256x4H", 256), ("fig8", "64x16H", 64)])
def test_robustness_equals_the_run_folders(study, figure, configuration, members):
    found = table(study, figure)
    assert len(found) == 3 * members
    for method in ("joint-0", "joint-0.99", "joint-1"):
        curves = [folders.load_history(folder)["error"] for _, folder in records(study, "robustness-example")
                  if (folder.parent.parent.name, folder.parent.name) == (configuration, method)]
        assert [curve.shape for curve in curves] == [(3, members)] * 2    # repeats, dropped
        mean = np.mean([curve.mean(0) for curve in curves], 0) * 100
        mine = [row for row in found if row["method"] == method]
        assert [int(row["dropped"]) for row in mine] == list(range(members))
        assert float(mine[-1]["dropped_percent"]) == 100 * (members - 1) / members
        np.testing.assert_allclose([float(row["test_error_percent"]) for row in mine], mean)
        assert mean[0] == pytest.approx(100 * expected(study, configuration, method, "test_ensemble_error")[0])


def test_one_run_alone_equals_the_same_run_in_the_study(study, script):
    for select in (("--only", "256x4H", "--lambdas", 0.95), ("--only", "64x16H", "--lambdas", 1)):
        status, out, err = script(train_mlp_fmnist, "--preset", "smoke", *select, "--trials", 2)
        assert status == 0, out + err
    alone = {path.parent.relative_to(Path.cwd()) for path in Path.cwd().rglob("run.json")}
    assert len(alone) == 4
    for folder in alone:
        one, other = (json.loads((root / folder / "run.json").read_text()) for root in (Path.cwd(), study))
        assert all(one[key] == other[key] for key in ("result", "settings", "sha256")), folder


# --- When something goes wrong -------------------------------------------------------------------


def test_a_stage_that_fails_stops_no_other_and_is_named_at_the_end(tmp_path):
    """Without data nothing can be trained; a GPU that torch cannot use is told as well."""
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho 'GPU 0: a card with an old driver'\n")
    nvidia_smi.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", ROOT / "run_all.sh", "quick", "--data", "real", "--data-dir", "nowhere", "--results", "results",
         "--figures-dir", "figures"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert "WARNING: torch cannot use this machine's GPU (GPU 0: a card" in done.stdout
    for preset in ("short", "paper"):
        stopped = subprocess.run(["bash", ROOT / "run_all.sh", preset, "--dry-run"], cwd=tmp_path, capture_output=True,
                                 text=True, env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""})
        assert stopped.returncode == 2 and re.fullmatch(
            r"error: torch cannot use this machine's GPU [^\n]* add --device cpu\n", stopped.stderr)
    assert "fig2: NOT DRAWN" in done.stdout and f"{tmp_path}/nowhere is not a folder" in done.stderr
    _, summary = done.stdout.split("NOT COMPLETE")
    for stage in ("data: CIFAR-100", "MLPs on Fashion-MNIST", "DenseNets on CIFAR-100", "ConvNets on CIFAR-100",
                  "robustness", "figures and verdicts"):
        assert f"  {stage} (exit status" in summary
    assert {p.name for p in tmp_path.iterdir()} == {"nvidia-smi", "figures"}
    drawn = {p.name.split(".")[0] for p in (tmp_path / "figures/quick").iterdir()}
    assert drawn == {"table1", "table3", "table4", "report", "claims"}      # they need no runs


def test_the_drivers_help_is_its_first_lines():
    done = subprocess.run(["bash", ROOT / "run_all.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    first, last = done.stdout.splitlines()[0], done.stdout.splitlines()[-1]
    assert first.startswith("Regenerates") and "The default preset is" in done.stdout and "SLURM array" in last
    head = (ROOT / "run_all.sh").read_text().split("#SBATCH")[0]
    assert all(line.startswith("#") for line in head.splitlines())      # sbatch reads no directive after a command


@pytest.mark.parametrize("arguments, words", [
    (["quik"], "did you mean quick?"), (["quick", "smoke"], "one preset at a time"), (["--seed"], "a value"),
    (["smoke", "--device", "gpu"], "'gpu'"), (["smoke", "--batch", "3"], "unknown option --batch")])
def test_the_driver_refuses_in_one_line(tmp_path, arguments, words):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", ROOT / "run_all.sh", *arguments], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PATH": path})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_no_half_written_file(tmp_path):
    """A limit of 100 kB a file stands in for the disk: weights of 3 MB do not fit."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = subprocess.run([sys.executable, ROOT / "train_mlp_fmnist.py", "--preset", "smoke", "--only", "256x4H",
                           "--lambdas", "0", "--trials", "1"], cwd=tmp_path, capture_output=True, text=True,
                          preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "weights.pt cannot be written: File too large" in done.stderr
    assert not list(tmp_path.rglob("*weights.pt*"))
    assert not list(tmp_path.rglob("run.json"))


# --- Figures from less than a whole study --------------------------------------------------------


def test_what_is_missing_is_named_with_the_command_that_makes_it(study, script):
    status, out, _ = script(make_figures, "3", "7", "--preset", "smoke")
    assert status == 1 and "fig3: NOT DRAWN\n  44 runs are missing:" in out
    assert out.splitlines()[-1] == "figures: NOT DRAWN: fig3 fig7"
    assert "    64x16H joint-0.8, trial 0 1\n" in out and not Path("figures").exists()
    train3, train7, drop7 = (line.split()[1:] for line in out.splitlines() if line.startswith("    python"))
    for (name, *arguments), runs in ((train3, 44), (train7, 6)):
        assert name == "train_mlp_fmnist.py"
        status, out, _ = script(train_mlp_fmnist, *arguments, "--dry-run")
        assert status == 0 and f"{runs} of {runs} runs to do" in out
    assert drop7 == ["robustness.py", "--preset", "smoke", "--figure", "7"]


@pytest.mark.parametrize("name", [*make_figures.FIGURES, "table2"])
def test_figures_draws_what_a_figure_reads(study, name):
    """FIGURES names every run that a figure asks for, and no other."""
    runs = FinishedRuns(study / "results", "smoke", "example")
    fig = (make_figures.FIGURES | make_figures.TABLES)[name](runs)
    if name in make_figures.FIGURES:
        make_figures.plt.close(fig[0])
    asked = {(record["experiment"], record["configuration"], machinery.method_name(record["method"], record["lambda"]),
              record["trial"]) for record in runs.used.values()}
    planned = {key for key in runs.planned(name)}
    if name in ("7", "8"):          # drawn from what robustness.py measured on the trained runs
        planned = {key for key in planned if key[0].startswith("robustness")}
    assert asked == planned and not runs.missing(name)


def test_a_figure_draws_what_there_is(study, script, tmp_path):
    part = Path("smoke", "mlp_fmnist", "256x4H", "joint-0", "trial0")
    shutil.copytree(study / "results" / part, tmp_path / "results" / part)
    status, out, _ = script(make_figures, "fig2", "--preset", "smoke")
    assert status == 0 and "fig2: incomplete, figures/smoke/fig2.pdf" in out
    assert "11 runs are missing" in out and "--data synthetic" in out
    rows = {row["method"]: row for row in table(tmp_path, "fig2")}
    assert rows["joint-0"]["n"] == "1" and rows["joint-0"]["standard_error"] == "nan"
    assert rows["bagging"]["n"] == "0" and rows["bagging"]["test_error_percent"] == "nan"


@pytest.mark.parametrize("without, state, panels", [(["joint-0", "joint-1"], "NOT DRAWN", 0),
                                                    (["joint-1"], "incomplete", 3)])
def test_runs_without_weights_are_missing_in_fig5(study, script, tmp_path, monkeypatch, without, state, panels):
    part, drawn = Path("results/smoke/convnet_cifar/10xConvNet-0.29M"), []
    shutil.copytree(study / part, part)
    for method in without:
        for path in (part / method).rglob("weights.pt"):
            path.unlink()
    save = make_figures.save_figure
    monkeypatch.setattr(make_figures, "save_figure", lambda fig, *rest: (drawn.extend(fig.axes), save(fig, *rest)))
    status, out, _ = script(make_figures, "5", "--preset", "smoke")
    assert status == (state == "NOT DRAWN") and f"fig5: {state}" in out and len(drawn) == panels
    assert f"{2 * len(without)} runs are missing" in out and f"10xConvNet-0.29M {without[-1]}, trial 0 1" in out


def altered_copy(study, target, change):
    """A copy of the study's 256x4H runs at lambda 0, trial 1 of them changed."""
    for trial in (0, 1):
        folder = Path("results", "smoke", "mlp_fmnist", "256x4H", "joint-0", f"trial{trial}")
        record = json.loads((study / folder / "run.json").read_text())
        if trial:
            change(record)
        shutil.copytree(study / folder, target / folder)
        (target / folder / "run.json").write_text(sealed(record))


def test_of_the_methods_in_once_only_the_first_trial_is_planned(tmp_path):
    block = presets.experiment_settings(presets.load_preset("overnight"), "overnight", "densenet_cifar")
    once = block["configurations"]["DN-Low"]["once"]
    assert once == ["joint-0.5", "joint-0.9", "bagging", "stacking"]
    runs = machinery.list_runs("overnight", train_densenet_cifar.EXPERIMENT, block, {})
    trials = collections.Counter((run.configuration, run.method_name) for run in runs)
    assert {trials["DN-Low", name] for name in ("joint-0", "joint-1")} == {3}
    assert {trials["DN-High", name] for name in once} == {1}
    assert trials["DN-Low", "bagging"] == 0 and trials["DN-High", "stacking"] == 1       # methods of one configuration
    late = [run.method_name in once for run in runs]
    assert late == sorted(late) and {run.trial for run in runs[:late.index(True)]} == {0, 1, 2}
    there = {(run.experiment, run.configuration, run.method_name, run.trial) for run in runs}
    assert set(FinishedRuns(tmp_path, "overnight", "example").planned("table2")) == there


@pytest.mark.parametrize("key", ["epochs", "momentum", "lr", "train", "classes", "seed", "hidden"])
def test_runs_of_other_settings_never_share_a_mean(study, script, tmp_path, key):
    altered_copy(study, tmp_path, lambda record: record["settings"].update({key: 99}))
    status, _, err = script(make_figures, "fig2", "--preset", "smoke")
    assert status == 2 and f"mixes runs with {key}" in err and err.count("\n") == 1
    assert not Path("figures").exists()


@pytest.mark.parametrize("there, copied_to", [
    ("joint-0/trial0", "joint-1/trial0"), ("joint-0/trial0", "joint-0/trial1"), ("joint-1/trial1", "joint-0/trial5")])
def test_a_run_in_the_folder_of_another_is_refused(study, script, tmp_path, there, copied_to):
    """By figures, by training and by robustness.py: n = 2 of one trial would have a standard error of 0."""
    shutil.copytree(study / "results", "results")
    place = Path("results/smoke/mlp_fmnist/256x4H")
    shutil.rmtree(place / copied_to, ignore_errors=True)
    shutil.copytree(place / there, place / copied_to)
    scripts = [(make_figures, "fig2"), (robustness, "--figure", "7")]
    if "trial5" not in copied_to:
        scripts.append((train_mlp_fmnist, "--figure", "2", "--data", "synthetic"))
    for module, *arguments in scripts:
        status, _, err = script(module, *arguments, "--preset", "smoke")
        assert status == 2 and f"smoke/mlp_fmnist/256x4H/{there}" in err and copied_to in err and err.count("\n") == 1


def test_a_link_that_leaves_the_results_folder_is_refused(study, script, tmp_path):
    shutil.copytree(study / "results", "elsewhere")
    shutil.copytree(study / "results", "results")
    place = Path("smoke/mlp_fmnist/256x4H/joint-0/trial1")
    shutil.rmtree("results" / place)
    ("results" / place).symlink_to(Path("elsewhere" / place).resolve())
    for module, *arguments in ((make_figures, "fig2"), (train_mlp_fmnist, "--figure", "2", "--data", "synthetic")):
        status, _, err = script(module, *arguments, "--preset", "smoke")
        assert status == 2 and err.count("\n") == 1
        assert f"results/{place}/run.json is " in err and f"elsewhere/{place}/run.json, by a link that leaves " in err
    shutil.rmtree("results/smoke")                      # nothing is trained behind one, either
    Path("empty").mkdir()
    Path("results/smoke").symlink_to(Path("empty").resolve())
    status, _, err = script(train_mlp_fmnist, "--preset", "smoke", "--only", "1x1024H", "--trials", 1)
    assert status == 2 and "by a link that leaves results" in err and not list(Path("empty").iterdir())
    Path("results").rename("own")
    Path("results").symlink_to("elsewhere")             # a link to the whole is the user's own choice
    assert script(make_figures, "fig2", "--preset", "smoke")[0] == 0


@pytest.mark.parametrize("name", ["run.json", "history.npz", "weights.pt"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file_is_refused(study, script, tmp_path, make, name):
    """A pipe would be read for ever."""
    shutil.copytree(study / "results", "results")
    path = Path("results/smoke/mlp_fmnist/256x4H/joint-0/trial1", name)
    path.unlink()
    make(path)
    for module, *arguments in ((make_figures, "fig2"), (train_mlp_fmnist, "--figure", "2", "--data", "synthetic")):
        status, _, err = script(module, *arguments, "--preset", "smoke")
        assert status == 2 and f"{path} is not a regular file: remove it" in err and err.count("\n") == 1


@pytest.mark.parametrize("figure, status", [("fig4", 2), ("fig5", 0)])
def test_a_configuration_may_have_classes_of_its_own(study, script, tmp_path, figure, status):
    """Its data are its own. In one figure, errors of other numbers of classes do not stand side by side."""
    for name, classes in (("ConvNet-0.07M", 20), ("10xConvNet-0.29M", 10)):
        done = script(train_convnet_cifar, "--preset", "smoke", "--only", "ConvNet-0.14M", name, "--trials", "1",
                      "--set", f"{name}.classes={classes}")
        assert done[0] == 0, done
        path = Path("results/smoke/convnet_cifar", name, "joint-0/trial0")
        assert folders.read_run(path)["settings"]["classes"] == classes
    weights = folders.load_weights(path, "cpu")
    assert [len(w) for name, w in weights.items() if name.endswith("bias")][-1] == 10
    assert 0 < max(moved(path, 10)) < 0.1 < 1 < min(moved(path, 100)[1:])         # 0.1: two epochs of few images
    assert make_figures.first_layer(path, folders.read_run(path))[1].tolist() == pytest.approx(moved(path, 10))
    done = script(make_figures, figure, "--preset", "smoke")
    assert done[0] == status and ("mixes runs with classes" in done[2]) == bool(status), done


def test_the_names_of_methods_are_recognised():
    for lam in (0, 1, 0.5, 0.99, 0.999999, 1e-5, 1.5e-5):
        assert re.fullmatch(folders.METHOD_NAME, folders.method_name("joint", lam)), lam
    for method in presets.METHODS[1:]:
        assert re.fullmatch(folders.METHOD_NAME, folders.method_name(method, 0))
    for name in ("joint-old", "joint-0.", "joint-1.2.3", "backup", "bagging2"):
        assert not re.fullmatch(folders.METHOD_NAME, name)


def test_folders_that_are_no_runs_are_said_and_ignored(study, script, tmp_path):
    shutil.copytree(study / "results", "results")
    place = Path("results/smoke/mlp_fmnist/256x4H")
    copies = [place / name for name in ("joint-0/trial0.bak", "joint-old/trial0", "joint-0 (copy)/trial0")]
    for copy in copies:
        shutil.copytree(place / "joint-0/trial0", copy)
    status, _, err = script(make_figures, "2", "3", "--preset", "smoke")
    assert status == 0, err
    assert sorted(err.splitlines()) == sorted(
        f"ignored: {copy}, which is not named as the folder of a run (METHOD/trialN)" for copy in copies)
    for name in ("fig2", "fig3"):
        assert [row["n"] for row in table(tmp_path, name)] == [row["n"] for row in table(study, name)]


def test_robustness_of_other_repeats_never_shares_a_mean(study, script, tmp_path):
    shutil.copytree(study / "results", "results")
    (path, *_) = Path("results").glob("smoke/robustness-example/256x4H/joint-1/trial1/run.json")
    record = json.loads(path.read_text())
    record["settings"]["repeats"] = 99
    path.write_text(sealed(record))
    status, _, err = script(make_figures, "7", "--preset", "smoke")
    assert status == 2 and "mixes runs with repeats 3 and 99" in err


def test_a_diverged_run_is_counted_and_not_averaged(study, script, tmp_path):
    altered_copy(study, tmp_path, lambda record: record.update(result={"diverged_at_epoch": 1}))
    status, _, _ = script(make_figures, "fig2", "--preset", "smoke")
    drawn = table(tmp_path, "fig2")
    rows = {row["method"]: row for row in drawn}
    assert status == 0 and (rows["joint-0"]["n"], rows["joint-0"]["diverged"]) == ("1", "1")
    assert not math.isnan(float(rows["joint-0"]["test_error_percent"]))
    assert "1 diverged, left out of the means" in drawn[0]["provenance"]


@pytest.mark.parametrize("epochs, marks", [(200, 1), (50, 0)])
def test_the_papers_numbers_are_marked_at_the_papers_protocol_only(study, tmp_path, epochs, marks):
    settings = finished.paper_settings("mlp_fmnist")["256x4H", "joint-0"] | {"epochs": epochs}
    altered_copy(study, tmp_path, lambda record: record.update(settings=settings))
    shutil.rmtree(tmp_path / "results/smoke/mlp_fmnist/256x4H/joint-0/trial0")
    for figure in (make_figures.fig2, make_figures.fig3):
        fig, rows = figure(FinishedRuns(tmp_path / "results", "smoke", "example"))
        labels = [label for label in fig.axes[0].get_legend_handles_labels()[1] if "paper" in label]
        assert len(labels) == marks
        (own,) = (row for row in rows if (row["configuration"], row["method"]) == ("256x4H", "joint-0"))
        assert own["published_percent"] == 16.3 != own["test_error_percent"]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_reads_at_the_width_of_the_papers_text(study, name, tmp_path):
    """LNCS has 12.2 cm: no text below 7 points there, and four lines at most on what it was made from."""
    runs = FinishedRuns(study / "results", "smoke", "example")
    fig, rows = make_figures.FIGURES[name.removeprefix("fig")](runs)
    make_figures.save_figure(fig, rows, runs.provenance() + "\n" + 9 * "reduced (paper: more), ", tmp_path / name)
    assert fig.get_size_inches()[0] <= 4.8
    texts = [text for text in fig.findobj(matplotlib.text.Text) if text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 7
    (foot,) = (text.get_text() for text in texts if "SYNTHETIC STAND-IN DATA" in text.get_text())
    assert foot.count("\n") <= 3 and re.search(r"\w\), … \(all in the CSV\)$", foot)
    assert all(ax.has_data() for ax in fig.axes)
    make_figures.plt.close(fig)


def test_what_is_at_chance_says_so_across_its_face(study, tmp_path):
    assert "**At the level of guessing: shows nothing.**" in (study / "figures/smoke/table2.md").read_text()
    assert "guessing" not in (study / "figures/smoke/table3.md").read_text()
    for at_chance in (True, False):
        fig, ax = make_figures.plt.subplots()
        ax.plot([1], label="a")
        make_figures.save_figure(fig, [], "", tmp_path / "figure", at_chance)
        make_figures.plt.close(fig)
        assert any("level of guessing" in text.get_text() for text in fig.texts) == at_chance


def test_figures_do_not_depend_on_the_users_matplotlib(study, tmp_path):
    """And a name with dollars is no mathematics, which would be refused here."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\naxes.facecolor: black\nfont.size: 30\n")
    for place, env in (("a", {}), ("b", {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})):
        done = subprocess.run([sys.executable, make_figures.__file__, "9", "--preset", "smoke", "--figures-dir",
                               tmp_path / place], cwd=study, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "a/smoke/fig9.png").read_bytes() == (tmp_path / "b/smoke/fig9.png").read_bytes()
    assert b"Software" not in (tmp_path / "a/smoke/fig9.png").read_bytes()
    fig, ax = make_figures.plt.subplots()
    ax.set_title(r"a $\frac$ name")
    fig.savefig(tmp_path / "dollars.png")
    make_figures.plt.close(fig)


def test_mean_and_standard_error():
    mean, error = mean_and_error([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert error == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3))
    assert math.isnan(mean_and_error([0.1])[1])


def test_a_filter_montage_has_one_scale():
    filters = np.zeros((2, 3, 3, 3, 3))
    filters[1, 2] = 0.5
    tiles = make_figures.filter_montage(filters, 0.5)
    assert make_figures.filter_montage(filters[:, :2], 0.5).shape == (9, 11, 3)     # not taller than wide
    assert tiles.shape == (9, 19, 3)                            # two columns for each member
    assert (tiles[1:4, 1:4] == 0.5).all()                       # a filter of zeros is grey
    assert (tiles[5:8, 10:13] == 1).all() and math.isclose(tiles[1:4, 10:13].mean(), 0.5)


def test_figures_of_settings_other_than_planned(script):
    """No validation split for Fig. 4, one for Fig. 6, and an ensemble of one: drawn as they are."""
    few = ("--preset", "smoke", "--trials", 1, "--epochs", 1, "--set")
    for module, *arguments in (
            (train_convnet_cifar, "--only", "ConvNet-0.07M", "--lambdas", 0, *few, "validation=0"),
            (train_densenet_cifar, "--only", "DN-High", "--lambdas", 1, *few, "validation=32", "DN-High.members=1")):
        status, _, err = script(module, *arguments)
        assert status == 0, err
    status, out, err = script(make_figures, "4", "6", "--preset", "smoke")
    assert status == 0 and "fig4: incomplete" in out and "fig6: incomplete" in out, (out, err)
    (row,) = (row for row in table(Path(), "fig4") if row["n"] == "1")
    assert row["validation_error_percent"] == "nan" and row["minimum"] == "True"
    assert {"train", "validation"} <= {row["part"] for row in table(Path(), "fig6")}


@pytest.mark.parametrize("arguments, words", [
    (["fig33"], "figure or table '33'"), (["tabel2"], "did you mean table2?"),
    (["--preset", "papr"], "did you mean paper?"), (["--drop", "al"], "'al'")])
def test_bad_arguments_of_make_figures(script, arguments, words):
    status, _, err = script(make_figures, *arguments)
    assert status == 2 and err.count("\n") == 1 and words in err, err
    assert not list(Path().iterdir())


def test_the_bytes_of_table_1_are_of_the_papers_batch():
    c = presets.experiment_settings(presets.load_preset("paper"), "paper", "densenet_cifar")
    settings = c["configurations"]["DN-High"] | {"batch": c["batch"]}
    assert machinery.bytes_saved_for_backward(train_densenet_cifar.build, settings, (3, 32, 32), 100) > 8e9


@pytest.mark.parametrize("where, said", [("checkout", None), ("inside another", "no commit: not a checkout"),
                                         ("nowhere", "no commit: not a checkout"), ("GIT_DIR", None)])
def test_the_commit_is_that_of_the_package(tmp_path, monkeypatch, where, said):
    def git(folder, *arguments):
        return subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                              check=True, capture_output=True, text=True).stdout.strip()
    package = tmp_path / "package"
    package.mkdir()
    other = {"inside another": tmp_path, "checkout": package, "GIT_DIR": package}.get(where)
    if other:
        git(other, "init", "-q")
        git(other, "commit", "-q", "--allow-empty", "-m", "one")
        said = said or git(package, "describe", "--always")
    if where == "GIT_DIR":
        monkeypatch.setenv("GIT_DIR", str(ROOT / ".git"))
    monkeypatch.setattr(folders, "HERE", package)
    assert folders.commit.__wrapped__() == said
