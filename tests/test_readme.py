"""Every command of the README and of docs/ runs, at smoke size; every number of the README is in expected/."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import study
import claims
import finished
import folders
import make_figures
import report
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
from finished import FinishedRuns

import numpy as np
import pytest
import yaml

ROOT = folders.HERE
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "ARTIFACT.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
SCRIPTS = {f"{module.__name__}.py": module for module in (
    train_mlp_fmnist, train_densenet_cifar, train_convnet_cifar, robustness, make_figures, claims, report)}
COMMANDS = list(dict.fromkeys(re.findall(r"(?:`|^    )python (\w+\.py[^`\n#]*?) *(?:`|#|&&|$)", "\n".join(
    PAGES.values()), re.M)))
OURS = [command for command in COMMANDS if command.split()[0] in SCRIPTS]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A folder in which every command of the pages runs, one after the other, with smoke for its preset."""
    return tmp_path_factory.mktemp("commands")


def test_the_pages_are_short_and_name_only_what_there_is():
    assert README.count("\n") <= 150 and README.count("![") <= 2
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+?)\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), (name, target)
    presets = set(re.findall(r"bash run_all\.sh (\w+)", README)) - {"test"}
    assert presets == set(yaml.safe_load((ROOT / "presets.yaml").read_text()))


def test_every_figure_and_table_has_its_row():
    rows = re.findall(r"^\| ([^|]+) \| (`python [^|]+) \|", README, re.M)
    made = [name for _, commands in rows
            for name in re.search(r"make_figures\.py ([\w ]+?) --preset", commands)[1].split()]
    assert sorted(made) == sorted(make_figures.FIGURES | make_figures.TABLES)
    for name, commands in rows:
        for experiment in ("mlp_fmnist", "densenet_cifar", "convnet_cifar"):
            there = name.removeprefix("Table ") and study.experiment_of(experiment).figures
            wanted = any(figure in there for figure in made if f"make_figures.py {figure} " in commands)
            assert (f"train_{experiment}.py" in commands) == wanted, name


@pytest.mark.parametrize("command", OURS)
def test_commands_run_at_smoke_size(smoke, monkeypatch, capsys, command):
    monkeypatch.chdir(smoke)
    name, *arguments = shlex.split(re.sub(r"--preset \w+", "--preset smoke", command))
    monkeypatch.setattr(sys, "argv", [name, *arguments] + ["--preset", "smoke"] * ("--preset" not in command))
    if name in ("claims.py", "report.py") or "--compare" in arguments:
        monkeypatch.setattr(sys, "argv", [name, "--preset", "smoke", "--help"])     # (test_study.py runs these)
    if {"--shard", "--fetch"} & set(arguments) or "CIFAR-10" in command:
        sys.argv += ["--dry-run", "--data", "synthetic"]
    try:
        study.command_line(SCRIPTS[name].main)
        status = 0
    except SystemExit as leave:
        status = leave.code or 0
    out, err = capsys.readouterr()
    assert status == 0 and "NOT DRAWN" not in out, (out, err)


@pytest.mark.parametrize("preset", ["short", "paper"])
def test_the_plans_of_the_long_presets(script, fashion_mnist, preset):
    """As written in the README, up to the end of --dry-run, for the part whose plan takes seconds."""
    status, out, err = script(train_mlp_fmnist, "--preset", preset, "--dry-run")
    assert status == 0 and re.search(r"figure 3: \d+ of \d+ runs to do, about", out), err


def csv_rows(name):
    with open(ROOT / "expected" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_numbers_of_the_answer_are_those_of_expected():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", README.split("## Two commands")[0], re.M)[1:]
    errors = {(row["configuration"], row["method"]): row for row in csv_rows("paper/fig2.csv")}
    verdicts = {row["claim"]: row for row in reversed(csv_rows("paper/claims.csv"))}
    mean = {(row["claim"], row["statistic"]): float(row["mean"].split()[0]) for row in csv_rows("paper/claims.csv")
            if row["mean"].endswith("points")}
    first = {claim: points for (claim, _), points in reversed(mean.items())}
    farther = min(points for (claim, what), points in mean.items() if claim == "C2" and what.startswith("distance"))
    percent = {key: float(row["test_error_percent"]) for key, row in errors.items()}
    worse = [f"{percent['256x4H', method] - percent['1x1024H', 'joint-1']:.1f}" for method in ("bagging", "stacking")]
    said = {"C2": f"the next is {farther:.1f} points farther", "C3": f"by {' and '.join(worse)} points",
            "C12": f"{mean['C12', '256x4H λ = 0.99: rise with 60 % dropped']:.1f} and "
                   f"{mean['C12', '256x4H λ = 1: rise with half dropped']:.1f} points"}
    first["C1"] = percent["256x4H", "joint-0"] - percent["1x1024H", "joint-1"]      # (claims.csv is rounded)
    for name, rows_with_it in (("1x1024H", 1), ("256x4H", 3)):
        least = min(float(row["seconds"]) for row in csv_rows("paper/runs.csv") if f"/{name}/joint-" in row["run"])
        assert README.count(f"| {least / 60:.0f} or more a run |") == rows_with_it
    checked = 0
    for what, _, ours, outcome in rows:
        if claim := re.match(r"(C\d+):", what):
            row = verdicts[claim[1]]
            assert ours == said.get(claim[1], f"by {first[claim[1]]:.1f} points") + f" (n = {row['n']})", what
            assert outcome == row["outcome"], what
        elif "1x1024H" in what or "256x4H" in what:
            lam = re.search(r"λ = ([\d.]+)", what)
            row = errors["256x4H", f"joint-{lam[1]}"] if lam else errors["1x1024H", "joint-1"]
            assert ours == f"{float(row['test_error_percent']):.1f} % (n = {row['n']})", what
        else:
            continue
        checked += 1
    assert checked >= 9
    decided = [claim for claim, row in verdicts.items() if row["outcome"] == "reproduced"][::-1]
    assert f"{', '.join(decided[:-1])} and {decided[-1]} are reproduced" in " ".join(README.split())
    better = float(errors["256x4H", "joint-0"]["test_error_percent"]) - float(
        errors["256x4H", "joint-1"]["test_error_percent"])
    n = errors["256x4H", "joint-1"]["n"]
    assert f"λ = 1 is {better:.1f} points better than λ = 0 (n = {n})" in " ".join(README.split())
    runs = FinishedRuns(ROOT / "expected/paper/results", "paper", "example")
    count = f"{len(csv_rows('paper/runs.csv'))} of 120"
    assert f"{count} runs are finished" in README and f"Finished runs: {count} of mlp_fmnist" in (
        report.finished_runs(runs, list(runs.every_run())))
    gap, same = float(verdicts["C1"]["mean"].split()[0]), float(errors["256x4H", "joint-0.95"]["test_error_percent"])
    artifact = " ".join(PAGES["ARTIFACT.md"].split())
    assert f"independently is {gap:.1f} points worse than one large network (n = {n})" in artifact
    assert f"its error is {same:.1f} %" in artifact
    open_ = [claim for claim, row in verdicts.items() if row["outcome"] == "inconclusive"][::-1]
    assert f"C1 to C4 and C13 are reproduced; {', '.join(open_[:-1])} and {open_[-1]} are inconclusive" in artifact
    one = errors["1x1024H", "joint-1"]
    assert f"that of the one network is {float(one['test_error_percent']):.1f} % (n = {one['n']})" in artifact
    assert f"whose standard error of {float(one['standard_error']):.1f} points does not enter them" in artifact


def same(one, other):
    """Are two cells of a CSV equal, as numbers up to rounding?"""
    try:
        return float(one) == pytest.approx(float(other), rel=1e-6, abs=1e-9, nan_ok=True)
    except ValueError:
        return one == other


@pytest.mark.parametrize("preset", ["paper", "overnight", "quick"])
def test_expected_is_what_its_run_records_give(script, tmp_path, preset):
    """Every figure and every verdict, without training: only the deviations of identities are of this machine."""
    status, _, err = script(claims, "--preset", preset, "--results", ROOT / "expected" / preset / "results",
                            "--figures-dir", tmp_path)
    assert status == (preset != "quick"), err                   # 1: some figures have no runs yet
    tables = sorted({path.name for path in (ROOT / "expected" / preset).glob("*.csv")} - {"fig6.csv", "spread.csv"})
    mlps = {"fig2.csv", "fig3.csv", "fig9.csv"} if preset != "overnight" else {"table2.csv"}
    assert {"claims.csv", "fig6-dominance.csv", "runs.csv"} | mlps <= set(tables)
    for name in tables:
        with open(tmp_path / preset / name, newline="", encoding="utf-8") as file:
            drawn = list(csv.DictReader(file))
        kept = csv_rows(f"{preset}/{name}")
        assert len(drawn) == len(kept), name
        for mine, theirs in zip(drawn, kept, strict=True):
            own = {"mean"} if theirs.get("scope") == "identity" else set()
            for key in theirs.keys() - own:
                assert same(mine[key], theirs[key]), (name, key, mine, theirs)


@pytest.mark.parametrize("preset, runs", [("quick", 104), ("overnight", 2)])
def test_every_ensemble_of_expected_learns(preset, runs):
    """Nothing at chance is drawn as a result: at most 0.8 of the error of guessing."""
    places = [path.parent for path in (ROOT / "expected" / preset / "results").rglob("run.json")]
    shares = {place: finished.error_share(folders.read_run(place), place) for place in places}
    assert len(shares) >= runs and min(shares.values()) > 0 and max(shares.values()) <= finished.LEARNING


def test_the_runs_of_overnight_are_those_of_expected():
    rows = {(row["configuration"], row["method"]): row for row in csv_rows("overnight/table2.csv") if row["n"] != "0"}
    assert len(rows) == 4 and {row["n"] for row in rows.values()} == {"1"}
    for name in ("DN-High", "DN-Low"):
        zero, one = (float(rows[name, method]["test_error_percent"]) for method in ("joint-0", "joint-1"))
        assert f"{zero:.1f} % at λ = 0 and {one:.1f} % at λ = 1" in " ".join(PAGES["ARTIFACT.md"].split())


def test_the_members_of_fig_5_are_those_of_expected_quick():
    moved = {method: [float(row["distance_from_initial_filters"]) for row in csv_rows("quick/fig5.csv")
                      if row["method"] == method] for method in ("joint-0", "joint-1")}
    far = {method: sum(d >= max(ds) / 2 for d in ds) for method, ds in moved.items()}
    page = " ".join(PAGES["ARTIFACT.md"].split())
    assert f"{far['joint-1']} of 10 members reach half of the largest distance" in page
    assert f"trained independently, {far['joint-0']} of 10 reach it" in page
    assert sum(d < 0.1 for d in moved["joint-1"]) == 3 and "three have hardly moved" in page


def test_the_spread_of_one_trial_is_that_of_expected():
    errors = [float(row["test_error_percent"]) for row in csv_rows("paper/spread.csv")]
    said = f"{min(errors):.2f} to {max(errors):.2f} %, a standard deviation of {np.std(errors, ddof=1):.2f} points"
    assert len(errors) == 5 and said in report.spread() and said in " ".join(PAGES["docs/open-questions.md"].split())


def test_the_minutes_of_the_figures_are_those_of_expected_quick():
    """Minutes of one core: the sum over the runs of expected/quick that a figure draws."""
    seconds = {row["run"]: float(row["seconds"]) for row in csv_rows("quick/runs.csv")}
    runs = FinishedRuns(Path("results"), "quick", "example")
    rows = re.findall(r"^\| (Table )?(\d) \| `python train[^|]+ \| ([\d.]+) \|", README, re.M)
    assert len(rows) == 9
    for table, name, minutes in rows:
        figure = f"table{name}" if table else name
        paths = [Path("quick", *map(str, kind), f"trial{trial}").as_posix()
                 for *kind, trial in runs.planned(figure) if not kind[0].startswith("robustness")]
        assert minutes == f"{sum(seconds[path] for path in paths) / 60:.1f}", name


def test_the_costs_on_cuda_are_those_of_the_csv_files():
    page, checked = PAGES["docs/costs.md"].split("## On CUDA")[1], 0
    with open(ROOT / "benchmarks/h200.csv", newline="", encoding="utf-8") as file:
        measured = {(row["network"], row["precision"], row["way"]): row for row in csv.DictReader(file)}
    for line in re.findall(r"^\| \S+ \| (?:fp32|bf16) \|.*$", page, re.M):
        network, precision, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        row, one = measured[network, precision, "as it is"], measured.get((network, precision, "1 streams"), {})
        numbers = [row["step_ms"], row["floor_ms"], row["times_floor"], one.get("step_ms"), row["eager_ms"],
                   row["peak_GB"]]
        for cell, number in zip(cells, numbers, strict=True):
            digits = len(cell.partition(".")[2])
            assert cell == (f"{float(number):.{digits}f}" if number else ""), (network, precision, cell, number)
            checked += 1
    assert checked == 6 * 13
    with open(ROOT / "benchmarks/h200_runs.csv", newline="", encoding="utf-8") as file:
        gpu = {tuple(row["run"].split("/")[2:4]): row for row in csv.DictReader(file)}
    cpu = {tuple(row["run"].split("/")[2:4]): row for row in csv_rows("paper/runs.csv") if "trial0" in row["run"]}
    rows = re.findall(r"^\| (\S+), λ = (\S+) \| (\d+) s \| (\d+) min \| (\S+) % \| (\S+) % \|$", page, re.M)
    assert len(rows) == 4
    for configuration, lam, seconds, minutes, *errors in rows:
        one, other = (runs[configuration, f"joint-{lam}"] for runs in (gpu, cpu))
        assert (seconds, minutes) == (f"{float(one['seconds']):.0f}", f"{float(other['seconds']) / 60:.0f}")
        assert errors == [f"{100 * float(row['test_ensemble_error']):.2f}" for row in (one, other)]


def test_the_first_epoch_of_one_densenet_is_that_of_its_csv():
    with open(ROOT / "benchmarks/one_densenet.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["network"] for row in rows} == {"package", "torchvision"}
    for row in rows:
        assert (f"test loss {float(row['test_ensemble_loss']):.4f} and test error "
                f"{float(row['test_ensemble_error']):.2%} for both").replace("%", " %") in " ".join(
                    PAGES["ARTIFACT.md"].split())


# --- A study of one's own (docs/own-study.md) ----------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with the examples of docs/own-study.md in their places."""
    folder = tmp_path_factory.mktemp("package")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.yaml")):
        shutil.copy(path, folder)
    page = PAGES["docs/own-study.md"]
    script, *datasets = re.findall(r"```python\n(.*?)```", page, re.S)
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (folder / "train_mystudy.py").write_text(script)
    paper, others = (folder / "presets.yaml").read_text().split("  robustness:", 1)
    (folder / "presets.yaml").write_text(f"{paper}{block}  robustness:{others}\n")
    before, after = script.split("EXPERIMENT =")
    for name, text in zip(("mine", "photos"), datasets, strict=True):
        (folder / f"train_{name}.py").write_text(f"{before}{text}\n\nEXPERIMENT ={after}")
        with open(folder / "presets.yaml", "a") as file:                  # on the data set's size
            file.write(f"\n{name}: {{mystudy: {{dataset: {name}, train: 600, validation: 200}}}}\n")
    return folder


def run(folder, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_study_of_ones_own(package):
    out = run(package, "train_mystudy.py", "--preset", "quick", "--data", "synthetic", "--epochs", "2", "--trials", "1",
              "--set", "train=1000", "validation=500", "test=500")
    assert "4 of 4 runs to do" in out and "4xCNN stacking trial 0: test error" in out
    assert "4xCNN lambda 1 trial 0: test error" in run(package, "robustness.py", "--preset", "quick")
    history = folders.load_history(package / "results/quick/mystudy/4xCNN/joint-0.9/trial0")
    assert history["validation_member_error"].shape == (2, 4)


def made_up_images():
    """1,200 noisy images (n, 3, 16, 16) whose brightness tells their class, and their labels."""
    g = np.random.default_rng(0)
    labels = g.integers(3, size=1200)
    return (g.random((1200, 3, 16, 16)) * 100 + 50 * labels[:, None, None, None]).astype(np.uint8), labels


@pytest.mark.parametrize("name", ["mine", "photos"])
def test_a_data_set_of_ones_own(package, name):
    x, y = made_up_images()
    if name == "mine":
        (package / "mine").mkdir()
        np.savez(package / "mine" / "mine.npz", x=x[:900], y=y[:900], test_x=x[900:], test_y=y[900:])
    else:
        pil = pytest.importorskip("PIL.Image")
        for i, (image, label) in enumerate(zip(x, y, strict=True)):
            place = package / "photos" / ("train" if i < 900 else "test") / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            pil.fromarray(image.transpose(1, 2, 0)).save(place / f"{i}.png")
    out = run(package, f"train_{name}.py", "--preset", name, "--data", "real", "--data-dir", name, "--lambdas", "0.9",
              "--trials", "1")
    assert f"with {name} (real; {name})" in out and float(re.search(r"test error ([\d.]+) %", out)[1]) < 20
