"""The pages name what there is: files, presets, figures, commands; expected/ is what its run records give."""

import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import make_figures
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
from study import claims, command, finished, folders
from study.finished import FinishedRuns

import numpy as np
import pytest
import test_identities
import yaml

ROOT = folders.HERE
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "ARTIFACT.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
SCRIPTS = {f"{module.__name__}.py": module for module in (
    train_mlp_fmnist, train_densenet_cifar, train_convnet_cifar, robustness, make_figures)}
COMMANDS = list(dict.fromkeys(" ".join(one.split()) for one in re.findall(
    r"(?:`|^    )python (\w+\.py[^`#]*?) *(?:`|#|&&|\n\n|\n    |\n```)", "\n".join(PAGES.values()), re.M)))

# --- Names ---------------------------------------------------------------------------------------


def test_the_pages_name_only_what_there_is():
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+?)\)", text):
            assert (ROOT / name).parent.joinpath(target).exists(), (name, target)
        own = "train_mystudy.py", "train_mine.py", "train_photos.py"        # of docs/own-study.md
        for target in re.findall(r"(?:`|python |bash |pytest )([\w/]+\.(?:py|sh|md|yaml|txt|csv))\b", text):
            places = ROOT, ROOT / "study", ROOT / "benchmarks", ROOT / "expected/quick"
            assert target in own or any((place / target).exists() for place in places), (name, target)
        for target in re.findall(r"`((?:expected|benchmarks|tests|study|docs)/[\w/.-]*)`", text):
            assert (ROOT / target).exists(), (name, target)
    presets = set(yaml.safe_load((ROOT / "presets.yaml").read_text()))
    assert set(re.findall(r"bash run_all\.sh (\w+)", "\n".join(PAGES.values()))) - {"test"} <= presets
    assert set(re.findall(r"--preset (\w+)", "\n".join(PAGES.values()))) - {"PRESET"} <= presets
    assert len(COMMANDS) > 30 and {command.split()[0] for command in COMMANDS} - {"train_mystudy.py"} == set(SCRIPTS)


def test_every_figure_and_table_has_its_row():
    rows = re.findall(r"^\| ([^|]+) \| (`python [^|]+) \|", README, re.M)
    made = [name for _, commands in rows
            for name in re.search(r"make_figures\.py ([\w ]+?) --preset", commands)[1].split()]
    assert sorted(made) == sorted(make_figures.FIGURES | make_figures.TABLES)
    for name, commands in rows:
        figures = set(re.search(r"make_figures\.py ([\w ]+?) --preset", commands)[1].split())
        for script, module in SCRIPTS.items():
            wanted = script == "make_figures.py" or figures & set(getattr(module, "FIGURES", ()))
            assert (script in commands) == bool(wanted), (name, script)


def test_every_claim_is_tested():
    nothing = FinishedRuns(Path("nowhere"), "paper", "example")
    assert set(nothing.published["claims"]) == {*claims.EMPIRICAL, *claims.IDENTITIES, "E4"}
    assert {*claims.DIFFERENCES, *claims.FUNCTIONS} == {*claims.EMPIRICAL, *claims.EXPLORATORY}
    for name in claims.IDENTITIES:
        assert any(test.startswith(f"test_{name}_") for test in vars(test_identities)), name


# --- Commands, and expected/ -----------------------------------------------------------------------


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.split()[0] in SCRIPTS])
def test_commands_parse_and_plan(smoke_study, script, monkeypatch, line):
    """Training as a dry run at the size of `smoke`, figures from the smoke study; their names are checked in both."""
    name, *arguments = shlex.split(re.sub(r"--preset \w+", "--preset smoke", line))
    arguments += ["--preset", "smoke"] * ("--preset" not in arguments)
    monkeypatch.setattr(command, "seconds_of_step", lambda *arguments: 1.0)
    if name.startswith("train"):
        arguments += ["--dry-run", "--data", "synthetic"]
    elif "--compare" in arguments:
        arguments[arguments.index("--compare") + 1:] = [str(smoke_study / "figures/smoke")]
        arguments += ["--figures-dir", str(smoke_study / "figures")]
    elif name == "make_figures.py" and not set(arguments) & {*make_figures.FIGURES, *make_figures.TABLES}:
        arguments.append("table4")              # (the smoke study drew all of them)
    if name in ("robustness.py", "make_figures.py") and "--compare" not in arguments:
        arguments = [word for word in arguments if not word.startswith(("--results", "--figures-dir", "expected"))]
        arguments += ["--results", str(smoke_study / "results")] + ["--dry-run"] * (name == "robustness.py")
    status, out, err = script(SCRIPTS[name], *arguments)
    assert status == 0 and "NOT DRAWN" not in out, (out, err)


@pytest.mark.parametrize("preset", [path.parent.name for path in ROOT.glob("expected/*/claims.csv")])
def test_expected_is_what_its_run_records_give(preset):
    """Every verdict, and every number of figures and Table 2, without training and without drawing."""
    runs = FinishedRuns(ROOT / "expected" / preset / "results", preset, "example")
    judged = [claims.judge(runs, name) for name in [*runs.published["claims"], *claims.EXPLORATORY]]
    made = {"claims": list(claims.rows_of(judged)), "runs": list(runs.every_run())}
    for name in [*make_figures.FIGURES, "table2"]:
        runs.begin()
        rows = (make_figures.FIGURES | make_figures.TABLES)[name](runs)[1]
        make_figures.plt.close("all")
        rows = rows if isinstance(rows, dict) else {"": rows}
        made |= {finished.stem(name) + more: some for more, some in rows.items()}
    checked = [name for name in made if (ROOT / "expected" / preset / f"{name}.csv").exists()]
    assert {"claims", "runs", "fig6-dominance"} <= set(checked) and len(checked) >= 5
    for name in checked:
        kept = finished.read_csv(ROOT / "expected" / preset / f"{name}.csv")
        assert len(kept) == len(made[name])
        for mine, theirs in zip(made[name], kept, strict=True):
            for key in theirs.keys() - {"provenance"}:
                assert same(mine.get(key), theirs[key]), (name, key, mine, theirs)


def test_the_members_of_dn_high_are_trained_out_and_of_others_it_is_told():
    quick, night = (FinishedRuns(ROOT / f"expected/{name}/results", name, "example") for name in ("quick", "overnight"))
    assert claims.not_trained_out(quick, "DN-High") == claims.not_trained_out(night, "DN-High") == ""
    assert {claims.not_trained_out(quick, name) for name in ("DN-Low", "DN-Mid")} == {"members not trained out"}


def same(one, other):
    """Is a value that of a cell of a CSV file, as a number up to rounding?"""
    if isinstance(one, float):
        return math.isclose(one, float(other), rel_tol=1e-6, abs_tol=1e-9) or (math.isnan(one) and other == "nan")
    return other == ("" if one is None else str(finished.plain(one)))


# --- Numbers -------------------------------------------------------------------------------------


def error(preset, key):
    """The test error of CONFIGURATION METHOD in expected/, as the pages have it: "10.3 ± 0.1 % (n = 5)"."""
    name = "table2" if key.startswith("DN") else "fig2"
    (row,) = [row for row in finished.read_csv(ROOT / "expected" / preset / f"{name}.csv")
              if f"{row['configuration']} {row['method']}" == key]
    mean, spread = (float(row[column]) for column in ("test_error_percent", "standard_error"))
    return f"{mean:.1f} ± {spread:.1g} % (n = {row['n']})"


ROWS = {        # of README: the claim's cell, the statistics whose means it has
    "C1": ("by {:.2f} points", "256x4H λ = 0 minus 1x1024H"),
    "C2": ("by {:.2f} points from λ = 1 ({interval})", "distance to 1x1024H: 256x4H λ = 1 minus λ = 0.95"),
    "C3": ("by {:.2f} and {:.2f} points", "256x4H bagging minus 1x1024H", "256x4H stacking minus 1x1024H"),
    "C4": ("between λ = 0 and 1: {:.2f} points more for 256x4H than for 64x16H, {:.2f} more than for 16x64H",
           *(f"difference between λ = 0 and 1: {pair}" for pair in ("256x4H minus 64x16H", "64x16H minus 16x64H"))),
    "C5": ("by {:.2f} points from the best λ below 1", "256x4H λ = 1 minus the best λ below 1"),
    "C12": ("half dropped: {:.2f} and {:.2f} points; 60 % dropped, λ = 0.99: {:.2f} points, where our margin is 1",
            *(f"256x4H λ = {words}" for words in (
                "0.99: rise with half dropped", "1: rise with half dropped", "0.99: rise with 60 % dropped"))),
    "C14": ("{:.0f} times and by {:.2f} of itself, from λ = 0.9 to 1 (64x16H)",
            *(f"64x16H, {words}" for words in (
                "mean member loss: λ = 1 over λ = 0.9", "ensemble loss: change from λ = 0.9 to 1, over that at 0.9")))}


def sentences():
    """(page, sentence) with numbers of the records in expected/."""
    runs = len([*ROOT.glob("expected/paper/results/paper/mlp_fmnist/*/*/*/run.json")])
    yield from ((page, f"{runs} of the 120 MLP runs") for page in ("README.md", "ARTIFACT.md", "docs/summary.md"))
    alone, joint, single = (error("paper", key) for key in ("256x4H joint-0", "256x4H joint-0.95", "1x1024H joint-1"))
    yield "README.md", f"on {alone} of the test images when each learns alone, and on {joint} when they learn together"
    yield from ((page, f"errs on {single}.") for page in ("README.md", "docs/summary.md"))
    yield "docs/summary.md", f"256x4H errs on {alone} of the test images at λ = 0 and on {joint} at λ = 0.95."
    at_0, at_1 = (error("overnight", f"DN-High joint-{lam}") for lam in (0, 1))
    for page in "README.md", "ARTIFACT.md", "docs/summary.md":
        yield page, f"{at_0} when each learns alone, and on {at_1} when they learn as one"
    judged = {(row["claim"], row["statistic"]): row for row in finished.read_csv(ROOT / "expected/paper/claims.csv")}
    for claim, (text, *statistics) in ROWS.items():
        rows = [judged[claim, finished.plain(words)] for words in statistics]
        means = [float(row["mean"].split()[0]) for row in rows]
        n, outcome = min((int(row["n"]), row["outcome"]) for (name, _), row in judged.items() if name == claim)
        said, verdict = text.format(*means, interval=rows[0]["interval_95"]), f"{n}: {outcome}" if n == 5 else n
        yield from (("README.md", f"| yes | {said} | {verdict} |"), ("docs/summary.md", said))
    outcomes = list({row["claim"]: row["outcome"] for row in judged.values() if row["n"] == "5"}.values())
    counts = [outcomes.count(word) for word in ("reproduced", "inconclusive", "not reproduced")]
    yield "README.md", "Of {} claims with all five trials, {} are reproduced, {} is open, and {} fails".format(
        sum(counts), *counts)


def test_the_numbers_of_the_pages_are_those_of_the_records():
    for page, sentence in sentences():
        assert " ".join(sentence.split()) in " ".join(PAGES[page].split()), (page, sentence)


def test_the_minutes_of_readme_are_those_of_the_records():
    runs, minutes = FinishedRuns(ROOT / "expected/quick/results", "quick", "example"), {}
    for figure in ("table2", *make_figures.FIGURES):            # of Figs. 7 and 8 the drops, too
        records = [folders.read_run(runs.results / "quick" / Path(*key, f"trial{trial}"))
                   for *key, trial in runs.planned(figure)]
        minutes[figure] = f"{sum(record['seconds'] for record in records) / 60:.1f}"
    assert re.findall(r"make_figures\.py (\w+) --preset quick` \| ([\d.]+) \|", README) == [*minutes.items()]


# --- A study of one's own: docs/own-study.md -----------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with the examples of the page in their places."""
    folder = tmp_path_factory.mktemp("package")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.yaml")):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "study", folder / "study", ignore=shutil.ignore_patterns("__pycache__"))
    page = PAGES["docs/own-study.md"]
    script, loss, *datasets = re.findall(r"```python\n(.*?)```", page, re.S)
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    paper, others = (folder / "presets.yaml").read_text().split("  robustness:", 1)
    for name in ("mine", "photos"):             # of the data set's size
        others += f"\n{name}: {{mystudy: {{dataset: {name}, train: 600, validation: 200}}}}\n"
    (folder / "presets.yaml").write_text(f"{paper}{block}  robustness:{others}")
    before, after = script.split(plain := 'EXPERIMENT = plan.Experiment("mystudy", build)')
    (folder / "train_mystudy.py").write_text(before + loss + after)
    for name, text in zip(("mine", "photos"), datasets, strict=True):
        (folder / f"train_{name}.py").write_text(before + text + plain + after)
    return folder


def run(folder, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_study_of_ones_own_with_its_loss(package):
    out = run(package, "train_mystudy.py", "--preset", "quick", "--data", "synthetic", "--epochs", "2", "--trials", "1",
              "--set", "train=1000", "validation=500", "test=500")
    assert "loss: mixture_loss" in out and "4 of 4 runs to do" in out and "4xCNN stacking trial 0: test error" in out
    assert "4xCNN lambda 1 trial 0: test error" in run(package, "robustness.py", "--preset", "quick")
    folder = package / "results/quick/mystudy/4xCNN/joint-0.9/trial0"
    assert folders.load_history(folder)["validation_member_error"].shape == (2, 4)
    assert folders.read_run(folder)["settings"]["loss"].startswith("mixture_loss ")


@pytest.mark.parametrize("name", ["mine", "photos"])
def test_a_data_set_of_ones_own(package, name):
    g = np.random.default_rng(0)                # 1,200 noisy images (n, 3, 16, 16) whose brightness tells their class
    y = g.integers(3, size=1200)
    x = (g.random((1200, 3, 16, 16)) * 100 + 50 * y[:, None, None, None]).astype(np.uint8)
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
    assert f"with {name} (real" in out and float(re.search(r"test error ([\d.]+) %", out)[1]) < 20
