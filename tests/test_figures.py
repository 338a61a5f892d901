"""Figures and tables of the smoke study equal its run folders; what is missing, mixed, diverged or apart is said."""

import json
import re
import shutil
from pathlib import Path

import common
import make_figures
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
from study import finished, folders, plan
from study.finished import FinishedRuns

import numpy as np
import pytest


def table(folder, name):
    return finished.read_csv(folder / "figures/smoke" / f"{name}.csv")


def runs_of(study, row, experiment="mlp_fmnist"):
    """(run.json, folder) of the runs of a row's configuration and method, by trial."""
    place = study / "results/smoke" / experiment / row["configuration"] / row["method"]
    return [(folders.read_run(folder), folder) for folder in sorted(place.glob("trial*"))]


def is_mean(row, column, values):
    """Are a mean and its standard error (ddof 1) those of two trials?"""
    one, other = values
    return [float(row[column]), float(row["standard_error"])] == pytest.approx(
        [(one + other) / 2, abs(one - other) / 2], abs=1e-9)


@pytest.mark.parametrize("name, experiment, rows, column", [
    ("fig2", "mlp_fmnist", 6, "test_error_percent"), ("fig3", "mlp_fmnist", 22, "test_error_percent"),
    ("fig4", "convnet_cifar", 15, "test_error_percent"), ("table2", "densenet_cifar", 21, "test_error_percent"),
    ("fig9", "mlp_fmnist", 14, "cross_entropy")])
def test_means_equal_the_run_folders(smoke_study, name, experiment, rows, column):
    found, columns = table(smoke_study, name), {}
    provenance = found[0]["provenance"]
    assert len(found) == rows and re.search("SYNTHETIC STAND-IN DATA.*other than the paper's: .*epochs", provenance)
    for row in found:
        key, scale = (row["loss"], 1) if name == "fig9" else ("test_ensemble_error", 100)
        values = [scale * record["result"][key] for record, _ in runs_of(smoke_study, row, experiment)]
        assert is_mean(row, column, values) and (row["n"], row["diverged"]) == ("2", "0")
        columns.setdefault(row["configuration"], []).append((float(row[column]), row.get("minimum")))
    if "minimum" in found[0]:
        assert all((min(column)[0], "True") in column for column in columns.values())


@pytest.mark.parametrize("name, members", [("fig7", 256), ("fig8", 64)])
def test_robustness_equals_the_run_folders(smoke_study, name, members):
    rows = table(smoke_study, name)
    assert len(rows) == 3 * members
    for row in rows[::7]:
        dropped = int(row["dropped"])
        errors = [100 * folders.load_history(folder)["error"][:, dropped].mean()
                  for _, folder in runs_of(smoke_study, row, "robustness-example")]
        assert is_mean(row, "test_error_percent", errors)
        assert float(row["dropped_percent"]) == 100 * dropped / members


def test_fig5_equals_the_weights(smoke_study):
    rows = table(smoke_study, "fig5")
    assert len(rows) == 2 * 2 * 10
    for row in rows[::3]:               # of all runs; each builds the initial network
        record, folder = runs_of(smoke_study, row, "convnet_cifar")[int(row["trial"])]
        run = plan.Run("", "convnet_cifar", row["configuration"], "joint", 0, int(row["trial"]), {"seed": 0}, False)
        start = train_convnet_cifar.build(record["settings"], (3, 32, 32), 100, run.generator("initialisation"))
        before, now = (weights[f"members.{int(row['member']) - 1}.0.weight"]
                       for weights in (start.state_dict(), folders.load_weights(folder)))
        assert float(row["filter_norm"]) == pytest.approx(now.norm().item())
        moved = ((now - before).norm() / before.norm()).item()
        assert float(row["distance_from_initial_filters"]) == pytest.approx(moved, rel=1e-4)


def test_fig6_equals_the_histories(smoke_study):
    rows, numbers = table(smoke_study, "fig6"), table(smoke_study, "fig6-dominance")
    assert len(numbers) == 2 * (4 + 7) and "same" not in numbers[0]         # of few epochs none is early
    for row in numbers:
        experiment = "densenet_cifar" if row["configuration"] == "DN-High" else "mlp_fmnist"
        record, folder = runs_of(smoke_study, row, experiment)[int(row["trial"])]
        history = folders.load_history(folder)
        train = history["train_member_error"][record["result"]["epoch"] - 1]
        test = history["reported_test_member_error"]
        assert float(row["train_second_best_member_error"]) == pytest.approx(100 * np.sort(train)[1])
        assert float(row["test_dominance"]) == pytest.approx(100 * (np.median(test) - test.min()))
        end = {"epoch": "end", "part": "test"} | {key: row[key] for key in ("configuration", "method", "trial")}
        drawn = {one["who"]: float(one["error_percent"]) for one in rows if end.items() <= one.items()}
        if len(test) <= 20:
            assert len(drawn) == 1 + len(test) and drawn["member 2"] == pytest.approx(100 * test[1])
        else:
            assert len(drawn) == 1 + 4 and drawn["25 % of the members"] == pytest.approx(100 * np.quantile(test, 0.25))
    assert {(row["configuration"], row["part"]) for row in rows if row["epoch"] != "end"} == {
        ("DN-High", "train"), ("DN-High", "test"), ("256x4H", "train"), ("256x4H", "validation")}


def test_the_tables(smoke_study):
    text = (smoke_study / "figures/smoke/table2.md").read_text()
    assert text.index("**At the level of guessing: shows nothing.**") < text.index("SYNTHETIC") < text.index("| DN-Low")
    for row in table(smoke_study, "table2"):
        theirs = f" (paper: {row['published_percent']})" if row["published_percent"] else ""
        mean = f"{float(row['test_error_percent']):.1f}"
        shown = f"**{mean}**" if row["minimum"] == "True" else mean
        assert f"{shown} ± {float(row['standard_error']):.1f}, n = 2{theirs}" in text
    first = {row["configuration"]: row for row in table(smoke_study, "table1")}
    assert (first["DN-High"]["parameters"], first["DN-High"]["depth"]) == ("3200128", "100")
    assert first["DN-Low"]["peak_cuda_memory"] == "at most 11.6 GB for a step on an NVIDIA H200"
    assert [row["differs"] for row in table(smoke_study, "table4")] == ["True", "False", "False", "False", "True"]


@pytest.mark.parametrize("name", [*make_figures.FIGURES, "table2"])
def test_figures_draws_what_a_figure_reads(smoke_study, name):
    """FIGURES names every run that a figure asks for, and no other."""
    runs = FinishedRuns(smoke_study / "results", "smoke", "example")
    (make_figures.FIGURES | make_figures.TABLES)[name](runs)
    make_figures.plt.close("all")
    asked = {(record["experiment"], record["configuration"], folders.method_name(record["method"], record["lambda"]),
              record["trial"]) for record in runs.used.values()}
    assert asked == {key for key in runs.planned(name) if name not in "78" or key[0] == "robustness-example"}
    assert not runs.missing(name)


def test_the_report_is_one_page_with_every_figure(smoke_study):
    text = (smoke_study / "figures/smoke/report.html").read_text()
    assert text.count('<img alt="Fig. ') == text.count('src="data:image/png;base64,') == len(make_figures.FIGURES)
    assert not re.search("<script|<link|https?:", text) and text.count("<details>") == 18 + 1           # with X1
    for tag in ("table", "tr", "td", "th", "ul", "li", "details", "pre", "p", "body"):
        assert len(re.findall(f"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    for words in ("0 of 18 empirical claims tested", "48 of 48 of mlp_fmnist", "0 statistics were decided at 95 % each",
                  "python train_densenet_cifar.py --preset smoke --figure table2", "verified if test C15 passes",
                  "python robustness.py --preset smoke --figure 7", "not compared: stand-in data"):
        assert words in text, words


def test_comparing_numbers_and_verdicts(smoke_study, script):
    flags = ("--preset", "smoke", "--figures-dir", smoke_study / "figures", "--compare")
    shutil.copytree(smoke_study / "figures/smoke", "expected")
    status, out, _ = script(make_figures, *flags, "expected")
    near, total = re.search(r"(\d+) of (\d+) numbers and verdicts are within", out).groups()
    assert status == 0 and near == total and int(total) > 1000
    rows, text = finished.read_csv(Path("expected/fig2.csv")), Path("expected/claims.csv").read_text()
    rows[2]["test_error_percent"] = float(rows[2]["test_error_percent"]) - 4
    finished.write_csv(Path("expected/fig2.csv"), rows)
    Path("expected/claims.csv").write_text(text.replace("not tested: stand-in data", "reproduced", 1))
    status, out, _ = script(make_figures, *flags, "expected")
    assert status == 1 and out.count("\n") == 3 and "fig2.csv: 256x4H joint-0: test_error_percent" in out
    assert "claims.csv: C1: outcome not tested: stand-in data, expected reproduced" in out
    Path("empty").mkdir()
    Path("empty/fig2.csv").write_text("configuration,method,n,provenance\n")
    for folder in "nothing", "empty":
        status, _, err = script(make_figures, *flags, folder)
        assert status == 2 and err.count("\n") == 1 and "no numbers of these figures: try expected/quick" in err
    status, _, err = script(make_figures, "3", "--preset", "smoke", "--compare", "expected")
    assert status == 2 and err.count("\n") == 1 and "fig3.csv does not exist: draw it first" in err


def test_what_is_missing_is_named_with_the_command_that_makes_it(script):
    status, out, _ = script(make_figures, "3", "7", "--preset", "smoke")
    assert status == 1 and "fig3: NOT DRAWN\n  44 runs are missing:" in out
    assert "    mlp_fmnist 64x16H joint-0.8, trial 0 1\n" in out
    train3, train7, drop7 = (line.split()[1:] for line in out.splitlines() if line.startswith("    python"))
    for (name, *arguments), runs in ((train3, 44), (train7, 6)):
        status, out, _ = script(train_mlp_fmnist, *arguments, "--dry-run")
        assert name == "train_mlp_fmnist.py" and status == 0 and f"{runs} of {runs} runs to do" in out
    assert drop7 == ["robustness.py", "--preset", "smoke", "--figure", "7"]


def altered(study, change, part="mlp_fmnist/256x4H/joint-0"):
    """Copies runs of the study into results, trial 1 of them changed."""
    shutil.copytree(study / "results/smoke" / part, Path("results/smoke", part))
    path = Path("results/smoke", part, "trial1/run.json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("part, key, figure, words", [
    *(("mlp_fmnist/256x4H/joint-0", key, "fig2", key) for key in ("epochs", "lr", "seed", "loss")),
    ("robustness-example/256x4H/joint-1", "repeats", "7", "repeats of robustness.py 3 and 99")])
def test_runs_of_other_settings_never_share_a_figure(smoke_study, script, part, key, figure, words):
    altered(smoke_study, lambda record: record["settings"].update({key: 99}), part)
    status, _, err = script(make_figures, figure, "--preset", "smoke")
    assert status == 2 and f"mixes runs with {words}" in err and err.count("\n") == 1


def test_a_diverged_run_is_counted_and_not_averaged(smoke_study, script, tmp_path):
    altered(smoke_study, lambda record: record.update(result={"diverged_at_epoch": 1}))
    status, out, _ = script(make_figures, "fig2", "--preset", "smoke")
    first, _, row, *_ = table(tmp_path, "fig2")
    assert status == 0 and "fig2: incomplete" in out and "10 runs are missing" in out and "--data synthetic" in out
    assert [row[key] for key in ("n", "diverged", "standard_error")] == ["1", "1", "nan"] != row["test_error_percent"]
    assert "1 diverged; left out of the means" in first["provenance"]


def test_numpy_reads_every_csv_file(smoke_study):
    for path in (smoke_study / "figures/smoke").glob("*.csv"):
        read = np.genfromtxt(path, names=True, delimiter=",", dtype=None, encoding="utf-8")
        assert read.size == len(finished.read_csv(path)), path
        assert "commit" not in read.dtype.names or read["commit"].dtype.kind == "U"         # 5e12345 is no number


def test_a_damaged_run_is_missing_in_its_figures_and_in_no_other(smoke_study, script, tmp_path):
    altered(smoke_study, lambda record: None)
    Path("results/smoke/mlp_fmnist/256x4H/joint-0/trial1/history.npz").write_bytes(b"damaged")
    status, out, _ = script(make_figures, "2", "table4", "--preset", "smoke")
    assert status == 0 and out.count("left out: ") == 1 and "fig2: incomplete" in out and "table4: complete" in out
    assert "256x4H joint-0, trial 1\n" in out and table(tmp_path, "fig2")[2]["n"] == "1"


@pytest.mark.parametrize("lambdas, result, why", [([0.5], {"test_ensemble_error": 0.5}, "the preset has no run of it"),
                                                  ([0], {"diverged_at_epoch": 1}, "all its runs diverged")])
def test_a_figure_without_a_point_is_not_drawn(smoke_study, script, monkeypatch, lambdas, result, why):
    part = Path("results/smoke/mlp_fmnist/256x4H/joint-0")
    shutil.copytree(smoke_study / part, part)
    for path in part.glob("*/run.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"result": result}))
    preset = plan.load_preset("smoke")
    preset["mlp_fmnist"]["lambdas"] = lambdas
    monkeypatch.setattr(plan, "load_preset", lambda name: preset)
    status, out, _ = script(make_figures, "7", "--preset", "smoke")
    assert status == 1 and f"fig7: NOT DRAWN, {why}" in out, out


def test_the_values_of_lambdas_near_each_other_do_not_overlap():
    _, ax = make_figures.plt.subplots()
    make_figures.lambda_axis(ax, [0, 0.5, 0.89, 0.9, 0.91, 1])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.5", "", "", "0.91", "1"]
    make_figures.plt.close("all")


@pytest.mark.parametrize("epochs, marks", [(200, 1), (50, 0)])
def test_the_papers_numbers_are_marked_at_the_papers_protocol_only(smoke_study, script, epochs, marks):
    block = FinishedRuns(Path(), "paper", "example").paper["mlp_fmnist"]
    settings = plan.run_settings(block, block["configurations"]["256x4H"], "joint", 0) | {
        "data": common.DATASETS["Fashion-MNIST"].description, "seed": 3, "epochs": epochs}
    altered(smoke_study, lambda record: record.update(settings=settings))
    shutil.rmtree("results/smoke/mlp_fmnist/256x4H/joint-0/trial0")
    for figure in (make_figures.fig2, make_figures.fig3):
        fig, rows = figure(FinishedRuns(Path("results"), "smoke", "example"))
        assert len([label for label in fig.axes[0].get_legend_handles_labels()[1] if "paper" in label]) == marks
        assert [row["published_percent"] for row in rows if row["n"]] == [16.3]
    make_figures.plt.close("all")


def test_fig5_names_runs_without_weights(smoke_study, script):
    part = Path("results/smoke/convnet_cifar/10xConvNet-0.29M")
    shutil.copytree(smoke_study / part, part)
    for path in part.glob("joint-1/*/weights.pt"):
        path.unlink()
    status, out, _ = script(make_figures, "5", "--preset", "smoke")
    assert status == 0 and "fig5: incomplete" in out and "10xConvNet-0.29M joint-1, trial 0 1" in out


def test_figures_and_verdicts_of_settings_other_than_planned(script, monkeypatch, tmp_path):
    """No validation split for Fig. 4, one for Fig. 6, and an ensemble of one."""
    few = ("--preset", "smoke", "--trials", 1, "--epochs", 1, "--set")
    script(train_convnet_cifar, "--only", "ConvNet-0.07M", "--lambdas", 0, *few, "validation=0")
    script(train_densenet_cifar, "--only", "DN-High", "--lambdas", 1, *few, "validation=32", "DN-High.members=1")
    status, out, err = script(make_figures, "--preset", "smoke")
    assert status == 1 and "fig4: incomplete" in out and "fig6: incomplete" in out and "report: " in out, (out, err)
    assert {"train", "validation"} <= {row["part"] for row in table(tmp_path, "fig6")}
    assert not table(tmp_path, "fig6-dominance")


def test_what_is_at_chance_says_so_across_its_face(tmp_path):
    for at_chance in (True, False):
        fig, ax = make_figures.plt.subplots()
        ax.plot([1], label="a $\\frac$ name")           # no mathematics
        make_figures.save_figure(fig, "", tmp_path / "figure", at_chance)
        assert any("level of guessing" in text.get_text() for text in fig.texts) == at_chance
    make_figures.plt.close("all")


def test_chance_is_of_the_classes_that_are_left():
    for classes, share in (({"classes": 10}, 0.63 / 0.9), ({"classes": None}, 0.63 / 0.99), ({}, 0.63 / 0.99)):
        record = {"result": {"test_ensemble_error": 0.63}, "settings": {"dataset": "CIFAR-100", **classes}}
        assert finished.error_share(record, None) == pytest.approx(share)
