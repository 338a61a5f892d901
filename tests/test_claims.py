"""Verdicts from made-up run folders: true, false, lost in noise, missing, and turned round."""

import datetime
import json
import math
import re

import claims
import common
import make_figures

import numpy as np
import pytest
import torch

MLP, DENSENET, CONVNET = claims.MLP, claims.DENSENET, claims.CONVNET


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of the paper's preset in a folder of its own, without runs."""
    monkeypatch.chdir(tmp_path)
    return make_figures.Study(tmp_path / "results", "paper", "example")


def made_up(study, experiment, configuration, method, errors, validation=None, **arrays):
    """Runs of one method as the paper's preset has them, one for each of `errors` in per cent.

    An error is a number, or whatever else of the result and of history.npz is given in `arrays`,
    lists with an entry a trial.
    """
    block = study.block(experiment, study.paper)
    module = common.experiment_of(experiment)
    runs = [run for run in common.list_runs(
        "paper", module, block | {"trials": len(errors)}, {"name": experiment, "source": "real"},
        only=[configuration]) if run.method_name == method]
    assert len(runs) == len(errors)
    for i, (run, error) in enumerate(zip(runs, errors, strict=True)):
        folder = study.results / run.path
        folder.mkdir(parents=True)
        own = {key: values[i] for key, values in arrays.items()}
        result = {"epoch": 3, "diverged_at_epoch": None if math.isfinite(error) else 1,
                  "test_ensemble_error": error / 100,
                  "validation_error": (validation[i] if validation else error) / 100,
                  **{key: value for key, value in own.items() if np.ndim(value) == 0}}
        if not math.isfinite(error):
            result = {"epoch": None, "diverged_at_epoch": 1}
        history = {key: value for key, value in own.items() if np.ndim(value)}
        record = {"experiment": experiment, "preset": "paper", "configuration": configuration,
                  "method": run.method, "lambda": run.lam, "trial": run.trial,
                  "settings": json.loads(json.dumps(run.settings)), "result": result,
                  "sha256": {"history.npz": common.write(
                      folder / "history.npz", lambda file, h=history: np.savez(file, **h))},
                  "seconds": 60.0, "finished": datetime.datetime.now().isoformat(),
                  "data_from": "made up", "machine": common.machine(torch.device("cpu"))}
        (folder / "run.json").write_text(json.dumps(record | {"seal": common.seal(record)}))


def verdict(study, name):
    study.whole_run.cache_clear()
    return claims.judge(study, name).verdict


def judge_all(study):
    return [claims.judge(study, name) for name in study.published["claims"]]


def noisy(mean, trials=5, spread=0.1, seed=0):
    return list(mean + spread * np.random.default_rng(seed).standard_normal(trials))


# --- One statistic -------------------------------------------------------------------------------

@pytest.mark.parametrize("degrees, value", [(1, 12.7062), (2, 4.3027), (4, 2.7764), (29, 2.0452)])
def test_the_quantiles_are_those_of_any_table(degrees, value):
    assert claims.t_quantile(degrees) == pytest.approx(value, abs=2e-3 if degrees > 1 else 0.2)


@pytest.mark.parametrize("values, relation, margin, expected", [
    ([1.0, 1.1, 0.9], ">", 0, claims.HOLDS), ([-1.0, -1.1, -0.9], ">", 0, claims.FAILS),
    ([1.0, -1.1, 0.9], ">", 0, claims.UNDECIDED), ([1.0, 1.1], ">", 0, claims.UNDECIDED),
    ([9.0], ">", 0, claims.UNDECIDED), ([], ">", 0, claims.NOT_RUN),
    ([0.3, 0.31, 0.3], "<", 0.5, claims.HOLDS), ([0.6, 0.61, 0.6], "<", 0.5, claims.FAILS),
    ([0.0, 0.0, 0.0], "at least", 0, claims.HOLDS), ([0.0, 0.0, 0.0], ">", 0, claims.FAILS),
    ([0.0, 0.0, 0.0], "at most", 0, claims.HOLDS), ([math.nan] * 3, ">", 0, claims.FAILS)])
def test_a_statistic_is_decided_by_its_interval(values, relation, margin, expected):
    assert claims.Statistic("x", dict(enumerate(values)), relation, margin).verdict == expected


@pytest.mark.parametrize("verdicts, expected", [
    ("hhh", claims.HOLDS), ("hfn", claims.FAILS), ("hun", claims.NOT_RUN),
    ("huh", claims.UNDECIDED)])
def test_a_claim_is_true_only_if_all_of_it_is(verdicts, expected):
    values = {"h": [1, 1.1, 1.2], "f": [-1, -1.1, -1.2], "u": [1, -1, 1], "n": []}
    parts = [claims.Statistic(v, dict(enumerate(values[v])), ">") for v in verdicts]
    assert claims.combined(parts) == expected


def test_what_is_claimed_of_every_trial():
    def of(hits, chance=0.25):
        return claims.InEveryTrial("x", dict(enumerate(hits)), chance).verdict
    assert of([True] * 3) == claims.HOLDS and of([True] * 3, 0.5) == claims.UNDECIDED
    assert of([True, True, False]) == claims.FAILS
    assert of([True, True]) == claims.UNDECIDED and of([]) == claims.NOT_RUN


# --- Whole claims --------------------------------------------------------------------------------

def test_without_runs_only_what_can_be_computed_has_a_verdict(study):
    for claim in judge_all(study):
        exact = claim.name in ("C15", "C16", "C17", "C18", "C19", "C20")
        assert claim.verdict == (claims.HOLDS if exact else claims.NOT_RUN), claim.name


@pytest.mark.parametrize("single, independent, spread, trials, expected", [
    (10, 16, 0.1, 5, claims.HOLDS), (16, 10, 0.1, 5, claims.FAILS),      # relabelled, it turns
    (10, 10.1, 2, 5, claims.UNDECIDED), (10, 16, 0.1, 2, claims.UNDECIDED),
    (10, 16, 0.1, 1, claims.UNDECIDED), (10, math.nan, 0.1, 5, claims.NOT_RUN)])
def test_c1(study, single, independent, spread, trials, expected):
    made_up(study, MLP, "1x1024H", "joint-1", noisy(single, trials, spread, 1))
    made_up(study, MLP, "256x4H", "joint-0", noisy(independent, trials, spread, 2))
    assert verdict(study, "C1") == expected


def test_differences_are_paired_over_trials(study):
    """A difference of 0.5 in every trial, under trials that differ by tens of points, is seen."""
    level = [10, 30, 20, 50, 40]
    made_up(study, MLP, "1x1024H", "joint-1", level)
    made_up(study, MLP, "256x4H", "joint-0", noisy(np.array(level) + 0.5, spread=0.01))
    assert verdict(study, "C1") == claims.HOLDS


@pytest.mark.parametrize("turned", [False, True])
def test_c6_and_c7_turn_with_the_labels(study, turned):
    errors = study.published["table2"]["test_error_percent"]
    for name, printed in errors.items():
        for i, (method, error) in enumerate(printed.items()):
            if turned:
                method = {"joint-0": "joint-1", "joint-1": "joint-0"}.get(method, method)
            made_up(study, DENSENET, name, method, noisy(error, 3, 0.02, i))
    assert verdict(study, "C6") == (claims.FAILS if turned else claims.HOLDS)
    assert verdict(study, "C7") == (claims.FAILS if turned else claims.HOLDS)
    made = {name: make_figures.make(study, name, study.results.parent / "figures")
            for name in ("table1", "table4")}
    rows = [row for row in claims.printed_numbers(study, made) if row[0].startswith("Table 2")]
    assert len(rows) == 18 and sum(row[-1] == "agrees" for row in rows) == (12 if turned else 18)


def errors_over_lambda(study, experiment, configuration, errors, trials=5, spread=0.02):
    for i, (lam, error) in enumerate(errors.items()):
        made_up(study, experiment, configuration, claims.joint(lam),
                noisy(error, trials, spread, seed=i))


@pytest.mark.parametrize("at_1, expected", [(11, claims.HOLDS), (10, claims.FAILS)])
def test_c4_c5_and_c21(study, at_1, expected):
    lambdas = (0, 0.5, 0.8, 0.9, 0.95, 0.99, 1)
    made_up(study, MLP, "1x1024H", "joint-1", noisy(10.2, spread=0.02))
    for name, range_ in (("256x4H", 6), ("64x16H", 2), ("16x64H", 0.3)):
        errors = {lam: 10.3 + range_ * (0.95 - lam) for lam in lambdas if lam < 0.97}
        errors |= {0.99: 10.35, 1: at_1 if name == "256x4H" else 10.35}
        errors_over_lambda(study, MLP, name, errors)
    assert verdict(study, "C5") == expected
    assert verdict(study, "C4") == claims.HOLDS
    assert verdict(study, "C21") == claims.HOLDS


@pytest.mark.parametrize("best, expected", [
    ((1, 0.9, 0.7, 0.5, 0.3), claims.HOLDS), ((0.3, 0.5, 0.7, 0.9, 1), claims.FAILS),
    ((1, 0.9, 0.7, 0.5, 0), claims.FAILS), ((0.5,) * 5, claims.FAILS)])
def test_c8(study, best, expected):
    lambdas = study.block(CONVNET)["configurations"]["ConvNet-0.07M"]["lambdas"]
    for name, at in zip(study.published["table4"]["rows"], best, strict=True):
        errors_over_lambda(study, CONVNET, name, {lam: 50 + 10 * abs(lam - at) for lam in lambdas})
    assert verdict(study, "C8") == expected


def members(study, experiment, name, lam, dominated, early=0, trials=3):
    """Runs in which member 0 dominates at the end, and member `early` leads after epoch 3."""
    count = study.block(experiment)["configurations"][name]["members"]
    alone = np.full(count, 0.8 if dominated else 0.3)
    alone[0] = 0.2
    first = np.full(count, 0.9)
    first[early] = 0.5
    train = np.stack([first, first, first, alone])
    made_up(study, experiment, name, claims.joint(lam), [20] * trials, epoch=[4] * trials,
            train_member_error=[train] * trials, train_ensemble_error=[train[:, 0]] * trials,
            reported_test_member_error=[alone] * trials)


@pytest.mark.parametrize("at_1, below, small, expected", [
    (True, False, False, claims.HOLDS), (False, False, False, claims.FAILS),
    (True, True, False, claims.FAILS), (True, False, True, claims.FAILS)])
def test_c9(study, at_1, below, small, expected):
    for experiment, name in ((DENSENET, "DN-High"), (MLP, "256x4H")):
        for lam in study.block(experiment)["configurations"][name]["lambdas"]:
            members(study, experiment, name, lam, small if experiment == MLP else (
                at_1 if lam == 1 else below))
    assert verdict(study, "C9") == expected


@pytest.mark.parametrize("early, trials, expected", [
    (0, 3, claims.HOLDS), (1, 3, claims.FAILS), (0, 2, claims.UNDECIDED)])
def test_c10_and_the_diagnosis(study, early, trials, expected):
    for name in ("DN-Low", "DN-Mid", "DN-High"):
        members(study, DENSENET, name, 1, True, early, trials)
        made_up(study, DENSENET, name, "joint-0", [15] * trials)
    assert verdict(study, "C10") == expected
    for row in claims.diagnosis(study):
        hits = 0 if early else trials
        assert row[2:5] == ["40.0", f"{trials} of {trials}", f"{hits} of {trials}"]
        assert row[6:] == [f"{trials} of {trials}"] * 3


@pytest.mark.parametrize("rise, expected", [
    ({0: 0.1, 0.99: 0.3, 1: 20}, claims.HOLDS), ({0: 0.1, 0.99: 0.3, 1: 0.4}, claims.FAILS),
    ({0: 0.1, 0.99: 9, 1: 20}, claims.FAILS)])
def test_c12(study, rise, expected):
    for lam, points in rise.items():
        made_up(study, MLP, "256x4H", claims.joint(lam), [10] * 5)
        for folder in (study.results / f"paper/mlp_fmnist/256x4H/{claims.joint(lam)}").iterdir():
            curve = np.linspace(10, 10 + 2 * points, 256)[None] / 100
            to = study.results / str(folder.relative_to(study.results)).replace(
                "mlp_fmnist", "robustness-example")
            to.mkdir(parents=True)
            record = common.read_run(folder) | {"experiment": "robustness-example", "sha256": {
                "history.npz": common.write(to / "history.npz",
                                            lambda file, c=curve: np.savez(file, error=c))}}
            record["settings"] = {"drop": "example", "trained": record["settings"]}
            (to / "run.json").write_text(json.dumps(record | {"seal": common.seal(record)}))
    assert verdict(study, "C12") == expected


@pytest.mark.parametrize("member, ensemble, expected", [
    (3, 1.1, claims.HOLDS), (1.5, 1.1, claims.FAILS), (3, 1.8, claims.FAILS)])
def test_c14(study, member, ensemble, expected):
    for lam, factors in ((0.9, (1, 1)), (1, (member, ensemble))):
        made_up(study, MLP, "64x16H", claims.joint(lam), [11] * 3,
                test_mean_member_loss=noisy(0.5 * factors[0], 3, 0.001),
                test_ensemble_loss=noisy(0.4 * factors[1], 3, 0.001))
    assert verdict(study, "C14") == expected


@pytest.mark.parametrize("broken, fail", [
    (lambda right, z, y, lam: right(z, y, lam / 2), {"C15", "C16", "C20"}),
    (lambda right, z, y, lam: right(z, y, lam) * z.shape[1], {"C15", "C17"}),
    (lambda right, z, y, lam: right(z, y, 1 - lam), {"C15", "C16", "C17", "C20"})])
def test_a_broken_loss_is_seen_by_the_exact_claims(study, monkeypatch, broken, fail):
    right = common.joint_loss
    monkeypatch.setattr(common, "joint_loss", lambda z, y, lam: broken(right, z, y, lam))
    assert {claim.name for claim in judge_all(study) if claim.verdict == claims.FAILS} == fail


# --- What it was measured on ---------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    ({}, ""), ({"epochs": 3}, "on reduced runs"), ({"hidden": 2}, "on reduced runs"),
    ({"data": {"name": "s", "source": "synthetic"}}, "on synthetic data"),
    ({"data": {"name": "f", "source": "folder"}, "train": 500},
     "not on the paper's data, on reduced runs")])
def test_a_verdict_says_what_it_was_measured_on(study, change, words):
    made_up(study, MLP, "1x1024H", "joint-1", noisy(10))
    made_up(study, MLP, "256x4H", "joint-0", noisy(16))
    for path in study.results.rglob("run.json"):
        record = json.loads(path.read_text())
        record["settings"] |= change
        path.write_text(json.dumps(record | {"seal": common.seal(record)}))
    claim = claims.judge(study, "C1")
    assert (claim.verdict, claim.on) == (claims.HOLDS, words)


def test_the_settings_are_what_the_paper_prints(study):
    """Tables 1, 3 and 4 as the paper prints them are what the preset `paper` trains."""
    for table, experiment in (("table1", DENSENET), ("table4", CONVNET)):
        ours = study.block(experiment, study.paper)["configurations"]
        for name, printed in study.published[table]["rows"].items():
            for key in printed.keys() & ours[name].keys():
                assert ours[name][key] == printed[key], (name, key)
    assert set(study.published["claims"]) == set(claims.DECIDED_BY)


# --- The report ----------------------------------------------------------------------------------

def test_a_report_of_nothing_says_so(study):
    made = {name: make_figures.make(study, name, study.results.parent / "figures")
            for name in make_figures.FIGURES | make_figures.TABLES}
    blocks = list(claims.report(study, judge_all(study), made))
    text = "\n".join(blocks)
    assert text.count("Not drawn") == 9 and "15 were not run" in text
    page = claims.as_html(blocks, study.results.parent / "figures")
    assert page.count("<h3>") == 12 and "<img" not in page


@pytest.mark.parametrize("text, expected", [
    ("a **b** `c**d**` *e* f*g", "a <strong>b</strong> <code>c**d**</code> <em>e</em> f*g"),
    ("<script> & \\*", "&lt;script&gt; &amp; *")])
def test_inline_markdown(text, expected):
    assert claims.inline(text) == expected


def test_a_table_of_markdown_comes_back(tmp_path):
    block = claims.table(["a", "b|c"], [["1", "holds, on reduced runs"], ["x", "does not hold"]])
    page = claims.block_as_html(block, tmp_path)
    assert re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t", page) == [
        "a", "b|c", "1", "holds, on reduced runs", "x", "does not hold"]
    assert 'class="holds"' in page and 'class="fails"' in page
