"""Verdicts from made-up runs: true, false, tied, noisy, at chance, on a stand-in, reduced, missing. And the report."""

import copy
import dataclasses
import functools
import json
import math
import random
import re
import tempfile
import types
from pathlib import Path

import study
import claims
import common
import finished
import folders
import identities
import make_figures
import presets
import report
from claims import EMPIRICAL, MET, NO_EVIDENCE, OPEN, PROTOCOL, REDUCED, REFUSED
from finished import CONVNET, DENSENET, MLP, FinishedRuns, trained_in

import numpy as np
import pytest
import torch
from torch.nn import functional as F

# --- Made-up studies -----------------------------------------------------------------------------

NOTHING = FinishedRuns(folders.HERE / "nowhere", "paper", "example")
PUBLISHED = NOTHING.published
TABLE_2, CONVNETS = PUBLISHED["table2"]["test_error_percent"], list(PUBLISHED["table4"]["rows"])
CIFAR = types.SimpleNamespace(shape=(3, 32, 32), classes=100, device=torch.device("cpu"))
STAND_IN = {"data": {"name": "stand-in", "source": "synthetic"}}
USUAL = {"validation": None, "best": 3, "behind": 0, "parts": ("train", "test"), "early": 0, "gap": 1, "rise": 0.2,
         "moved": 10, "member_loss": 0.5, "loss": 0.5}      # of a run, beside its error; made_up has what each is


def of_convnets(best):
    """The errors of the five ConvNets: 10 points for each unit of lambda from the best."""
    return {f"{name} joint-{lam / 10:g}": 50 + abs(lam - 10 * at)
            for name, at in zip(CONVNETS, best, strict=True) for lam in range(11)}


def truth(changes=()):
    """{"configuration method": what comes out} as the paper has it, but for changes. A list has an entry a trial."""
    own = {"1x1024H joint-1": 10.2, "256x4H bagging": 15.8, "256x4H stacking": 14.6, "10xConvNet-0.29M joint-0": 50,
           "10xConvNet-0.29M joint-1": 50} | of_convnets((1, 0.9, 0.7, 0.5, 0.3))
    for name, errors in {"256x4H": (16.3, 13, 11.5, 10.8, 10.3, 10.4, 10.9), "64x16H": (
            13, 12, 11.2, 10.9, 10.5, 10.4, 10.6), "16x64H": (11, 10.9, 10.8, 10.7, 10.6, 10.5, 10.6)}.items():
        own |= {f"{name} joint-{lam:g}": e for lam, e in zip((0, 0.5, 0.8, 0.9, 0.95, 0.99, 1), errors, strict=True)}
    own |= {f"{name} {method}": error for name, column in TABLE_2.items() for method, error in column.items()}
    own = {key: USUAL | {"error": error} for key, error in own.items()}
    for key, change in [
            ("256x4H joint-1", {"rise": 20}), ("64x16H joint-1", {"rise": 5, "member_loss": 1.5, "loss": 0.55}),
            ("DN-High joint-1", {"gap": 10, "behind": 40}), ("10xConvNet-0.29M joint-1", {"moved": 2}),
            *dict(changes).items()]:
        own[key] |= change if isinstance(change, dict) else {"error": change}
    return own


@functools.cache
def planned(experiment):
    """{"configuration method": run of trial 0} of the block `paper`, on the real data."""
    block = presets.experiment_settings(presets.load_preset("paper"), "paper", experiment) | {"trials": 1}
    about = common.DATASETS[block["dataset"]].description
    return {f"{run.configuration} {run.method_name}": run for run in study.list_runs(
        "paper", study.experiment_of(experiment), block, about)}


def made_up(runs, kind, truth, trials=(0, 1, 2), change=()):
    """Writes the runs of one (experiment, configuration, method), with changes of their settings."""
    experiment, key = kind[0], " ".join(kind[1:])
    for trial in trials:
        it = types.SimpleNamespace(**{name: value[trial] if isinstance(value, list) else value
                                      for name, value in truth[key].items()})
        if not isinstance(truth[key]["error"], list):
            it.error += random.Random(f"{key} {trial}").gauss(0, 0.005)
        run = dataclasses.replace(planned(trained_in(experiment))[key], experiment=experiment, trial=trial)
        settings, folder, files, arrays = run.settings | dict(change), runs.results / run.path, {}, {}
        result = {"epoch": 4, "diverged_at_epoch": None, "test_ensemble_error": it.error / 100,
                  "validation_error": (it.validation or it.error) / 100,
                  "test_mean_member_loss": it.member_loss, "test_ensemble_loss": it.loss}
        folder.mkdir(parents=True)
        members = settings["members"]
        if math.isnan(it.error):
            result = {"epoch": None, "diverged_at_epoch": 1}
        elif experiment != trained_in(experiment):      # the error rises in a straight line, by `rise` to half of it
            arrays["error"] = (it.error + 2 * it.rise * np.arange(members)[None] / members) / 100
            settings, result = {"drop": "example", "repeats": 20, "seed": 0, "trained": settings}, {}
        elif key.startswith(("DN-High joint", "256x4H joint")):     # member 0 is ahead at the end
            train, test = ((it.error + it.best + it.behind * (part in it.parts) * (np.arange(members) > 0)) / 100
                           for part in ("train", "test"))
            first = 0.9 - it.gap / 100 * (np.arange(members) == it.early)
            arrays = {"train_member_error": np.stack([first, first, first, train]),
                      "train_ensemble_error": np.full(4, it.error / 100), "reported_test_member_error": test}
        elif key.startswith("10x"):
            ensemble, _ = common.new_ensemble(study.experiment_of(CONVNET).build, run, CIFAR)
            weights = {f"members.{m}.0.weight": member[0].weight.detach() * (2 if m < it.moved else 1.4)
                       for m, member in enumerate(ensemble.members)}
            files["weights.pt"] = folders.write(folder / "weights.pt", lambda file, w=weights: torch.save(w, file))
        files["history.npz"] = folders.write(folder / "history.npz", lambda file, a=arrays: np.savez(file, **a))
        record = {"experiment": experiment, "preset": "paper", "configuration": run.configuration, "lambda": run.lam,
                  "method": run.method, "trial": trial, "settings": settings, "result": result, "sha256": files,
                  "seconds": 60.0, "finished": "now", "machine": {"device": "<b>&", "commit": "<i>&"}}
        (folder / "run.json").write_text(json.dumps(record | {"seal": folders.seal(record)}))


@functools.cache
def asked(name):
    """The (experiment, configuration, method) of every run that a claim reads."""
    kinds, runs = {}, copy.copy(NOTHING)
    runs.runs = lambda *kind: kinds.setdefault(kind, [])
    claims.judge(runs, name)
    return list(kinds)


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """empty(): the study of the preset `paper` in a new folder, without runs."""
    monkeypatch.setattr(folders.os, "fsync", lambda file: None)

    def make():
        runs = copy.copy(NOTHING)       # which has read the presets
        runs.results, runs.whole_run = Path(tempfile.mkdtemp("<u>&", dir=tmp_path)), functools.cache(folders.whole_run)
        return runs
    return make


@pytest.fixture
def judged(empty):
    """judged(claim, changes, trials, changed settings, a configuration if only that): the Claim of a made-up study."""
    def judge(name, changes=(), trials=3, own=(), only=""):
        runs = empty()
        for kind in asked(name):
            if only in kind[1]:
                made_up(runs, kind, truth(changes), range(trials), own(kind) if callable(own) else own)
        return claims.judge(runs, name)
    return judge


def seen(claim):
    return claim.scope, claim.outcome


# --- One statistic -------------------------------------------------------------------------------


@pytest.mark.parametrize("relation, outcomes", [(">", "MROOO"), ("<", "RMOOO"), ("at least", "MROMO"), (
    "at most", "RMOMO")])
@pytest.mark.parametrize("margin", [0, 0.5])
def test_the_interval_decides_a_statistic(relation, outcomes, margin):
    above, below, around, tie = ([margin + x for x in by] for by in ([3, 4, 5], [-3, -4, -5], [1, -2, 1], [0] * 3))
    cases = above, below, around, tie, [math.nan] * 3, [], [9], [9, 9], [-9, -9]        # fewer than three never decide
    found = [claims.Statistic("x", dict(enumerate(values)), relation, margin).outcome for values in cases]
    assert found == [{"M": MET, "R": REFUSED, "O": OPEN}[one] for one in outcomes + "OOOO"]


def test_the_interval_is_students():
    for df, quantile in enumerate(claims.T_QUANTILE, 1):        # 47.5 % lie between 0 and the quantile
        x = np.linspace(0, quantile, 200_001)
        density = (1 + x * x / df) ** (-(df + 1) / 2) * math.gamma((df + 1) / 2) / (
            math.sqrt(df * math.pi) * math.gamma(df / 2))
        assert np.trapezoid(density, x) == pytest.approx(0.475, abs=1e-6), df
    assert claims.interval([1, 2, 3, 4]) == pytest.approx((2.5, 0.4459, 4.5541), abs=1e-3)
    assert claims.interval([7]) == (7, -math.inf, math.inf)


def test_chance_is_that_of_the_classes():
    for classes, share in (({"classes": 10}, 0.63 / 0.9), ({"classes": None}, 0.63 / 0.99), ({}, 0.63 / 0.99)):
        record = {"result": {"test_ensemble_error": 0.63}, "settings": {"dataset": "CIFAR-100", **classes}}
        assert finished.error_share(record, None) == pytest.approx(share)


def test_a_statement_on_every_trial():
    def outcome(hits, chance=0.25):
        return claims.InEveryTrial("x", dict(enumerate(hits)), chance).outcome
    assert outcome([True] * 3) == MET and outcome([True] * 3, 0.5) == OPEN and outcome([True] * 5, 0.5) == MET
    assert outcome([True, True, False]) == outcome([True, False, True], 0.5) == REFUSED
    assert {outcome(hits) for hits in ([], [False], [True] * 2, [False] * 2)} == {OPEN}


# --- Whole claims: what keeps each true, makes it false, leaves it open ---------------------------

TIE, WIDE = [10] * 3, [2, 14, 40]
I, J, E, TEN = "256x4H joint-0", "256x4H joint-0.99", "256x4H joint-1", "10xConvNet-0.29M joint"    # noqa: E741
CASES = {       # claim: (still true, false, tied, noisy), each by changes of what the paper has
    "C1": ([], [{I: 9}, {I: 10.2, "1x1024H joint-1": 16.3}], {I: TIE, "1x1024H joint-1": TIE}, {I: WIDE}),
    "C2": ([{"256x4H bagging": 4}], [{E: 13}, *({"256x4H joint-0.95": 9, f"256x4H {way}": 10.2} for way in (
        "bagging", "stacking", "joint-0", "joint-1"))], {"1x1024H joint-1": TIE, "256x4H joint-0.95": [9.5] * 3,
                                                         "256x4H bagging": [10.5] * 3}, {"256x4H bagging": WIDE}),
    "C3": ([], [{"256x4H bagging": 9}, {"256x4H stacking": 9}], {"256x4H stacking": TIE, "1x1024H joint-1": TIE},
           {"256x4H stacking": WIDE}),
    "C4": ([{"16x64H joint-0": 10.2}], [{I: 12}, {"64x16H joint-0": 10.7}, {
        "64x16H joint-0": 14, "16x64H joint-0": 12.6}], {
        "64x16H joint-0": [11] * 3, "64x16H joint-1": [10.5] * 3, "16x64H joint-0": [10.5] * 3, "16x64H joint-1": TIE},
        {I: WIDE}),
    "C5": ([{"256x4H joint-0.9": 9, "256x4H joint-0.95": {"validation": 1}}], [
        {E: 10.1}, {I: {"validation": 1}}, {E: 10.3, "256x4H joint-0.95": 10.9}],
        {E: TIE, I: {"error": TIE, "validation": 1}}, {E: WIDE}),
    "C6": ([], [{f"{name} joint-1": column["joint-0"], f"{name} joint-0": column["joint-1"]}
                for name, column in TABLE_2.items()], {"DN-Low joint-0": TIE, "DN-Low joint-1": TIE},
           {"DN-Mid joint-1": WIDE}),
    "C7": ([{"DN-Mid joint-0.5": [18, 20, 25]}], [
        {"DN-Low joint-0": 22}, {"DN-Mid stacking": 18}, {"DN-High bagging": 15}],
        {"DN-Mid joint-0": TIE, "DN-Mid joint-0.5": TIE}, {"DN-Mid joint-0.5": [18.9, 20, 21.1]}),
    "C8": ([], [of_convnets((0.3, 0.5, 0.7, 0.9, 1)), {"ConvNet-0.07M joint-1": 52}], of_convnets([1] * 5),
           {"ConvNet-0.07M joint-1": [40, 50, 62]}),
    "C9": ([], [{"DN-High joint-0.5": {"behind": 40}}, {E: {"behind": 40}}, *({"DN-High joint-1": some} for some in (
        {"parts": ("train",)}, {"parts": ("test",)}, {"best": 6}))],
        {"DN-High joint-1": {"error": [20] * 3, "behind": 20}}, {"DN-High joint-1": {"behind": [0, 22, 60]}}),
    "C10": ([], [{"DN-High joint-1": {"early": [1, 0, 0]}}, {"DN-High joint-1": {"behind": 10}}, {E: {"gap": 20}}],
            {E: {"gap": 10}}, {E: {"gap": [0, 9, 30]}}),
    "C11": ([{f"{TEN}-1": {"moved": 3}}], [{f"{TEN}-1": {"moved": 6}}, {f"{TEN}-0": {"moved": 9}}],
            None, {f"{TEN}-1": {"moved": [1, 4, 7]}}),       # (met if tied: at most, at least)
    "C12": ([], [{J: 12}, {I: {"rise": 2}}, {E: {"rise": 4}}, {J: {"rise": 2}}, {J: {"rise": 0.9}},
                 {J: {"rise": 20}, E: {"rise": 0.2}}], {E: {"error": TIE, "rise": 5}}, {E: {"rise": [1, 10, 30]}}),
    "C13": ([], [{"64x16H joint-0.99": 12}, {"64x16H joint-0": 20}, {"64x16H joint-0": {"rise": 2}}, {
        "64x16H joint-0.99": {"rise": 2}}, {"64x16H joint-1": {"rise": 0.1}}], {
        f"64x16H joint-{lam}": {"error": TIE, "rise": 0.5} for lam in (0.99, 1)},
        {"64x16H joint-1": {"rise": [0, 5, 20]}}),
    "C14": ([{"64x16H joint-1": {"member_loss": 1.0}}], [{"64x16H joint-1": change} for change in (
        {"member_loss": 0.8}, {"loss": 0.8}, {"loss": 0.2})],
        {"64x16H joint-1": {"loss": 0.75}}, {"64x16H joint-1": {"member_loss": [0.5, 1.2, 3]}}),
    "C21": ([{I: {"validation": 1}}], [{I: 9}, {"64x16H joint-0": 9}, {"1x1024H joint-1": 9.5}, {
        "16x64H joint-0.5": {"error": 12, "validation": 1}}], {"64x16H joint-0": TIE, "64x16H joint-0.99": TIE},
        {I: WIDE}),
    "C22": ([], [{I: 10}, {"ConvNet-0.07M joint-0": 49}, {"DN-High joint-0": 25}, {"ConvNet-1.20M joint-0": 75}],
            {"DN-High joint-0": TIE, "DN-High joint-1": TIE}, {I: WIDE}),
    "C23": ([], [{"ConvNet-1.20M joint-0": 49}, {"ConvNet-1.20M joint-1": 49}],
            {"ConvNet-1.20M joint-0": TIE, "ConvNet-1.20M joint-0.3": TIE}, {"ConvNet-1.20M joint-0": WIDE}),
    "C24": ([], [{"DN-Low joint-1": 35}, {"DN-Mid stacking": 31}, {"DN-High stacking": 17}],
            {"DN-Mid bagging": [29] * 3, "DN-Mid joint-1": [29] * 3}, {"DN-Mid joint-1": WIDE})}


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_a_claim(judged, name):
    true, false, tied, noisy = CASES[name]
    for scope, own, (yes, no, unclear) in (
            (PROTOCOL, {}, ("reproduced", "not reproduced", "inconclusive")),
            (REDUCED, {"epochs": 100}, ("trend seen", "trend not seen", "unclear"))):
        for word, cases in ((yes, [{}, *true]), (no, false), (unclear, [*filter(None, [tied]), noisy])):
            for case in cases:
                assert seen(judged(name, case, own=own)) == (scope, word), case
        for n in (1, 2):
            assert seen(judged(name, {}, n, own)) == (scope, f"{unclear} (n = {n}, as claimed)")
            assert seen(judged(name, false[0], n, own)) == (scope, f"{unclear} (n = {n}, not as claimed)")
    key = next(iter(false[0]))
    for case, own, n, reason in (({}, STAND_IN, 3, "stand-in data"), ({}, {}, 0, "no run"), (
            {key: 98 if key.startswith(("DN", "Conv", "10x")) else 89}, {}, 3, "at chance")):
        assert seen(judged(name, case, n, own)) == (NO_EVIDENCE, f"not tested: {reason}")


def test_the_edges_of_evidence(judged):
    """Up to four fifths of the error of guessing an ensemble learns; C10 needs more than 30 epochs."""
    assert judged("C1", {I: [72] * 3}).scope == PROTOCOL and judged("C1", {I: [72.1] * 3}).scope == NO_EVIDENCE
    assert seen(judged("C10", own={"epochs": 30})) == (NO_EVIDENCE, "not tested: at most 30 epochs")
    assert seen(judged("C10", own={"epochs": 31})) == (REDUCED, "trend seen")


@pytest.mark.parametrize("name, outcome, study_of, how", [
    ("C6", "not tested: 1 of 3 statistics have runs", ({}, 3), {"only": "DN-Low"}),
    ("C10", "not tested: at most 30 epochs", ({}, 3), {"own": lambda kind: {"epochs": 30} if kind[0] == MLP else {}}),
    ("C4", "inconclusive", ({"16x64H joint-0": [10.03] * 3, "16x64H joint-1": [9.03] * 3}, 3), {}),  # counts that tie
    ("C11", "trend seen", ({f"{TEN}-1": {"moved": 1}}, 3), {"own": {"members": 4}}),
    ("C7", "inconclusive (n = 1, not as claimed)", ({"DN-Mid joint-0": TIE, "DN-Mid joint-0.5": TIE}, 1), {})])
def test_claims_md_word_for_word(judged, name, outcome, study_of, how):
    assert judged(name, *study_of, **how).outcome == outcome


def test_only_runs_as_the_paper_has_them_speak_of_the_paper(empty):
    """Of 200 random studies; in every other one, no setting is changed and no trial missing."""
    words = set()
    for seed in range(200):
        rng, runs, own, n, exact = random.Random(seed), empty(), truth(), {}, {}
        for kind in {**dict.fromkeys(asked("C1") + asked("C3") + asked("C4"))}:
            key, change, mean, spread = " ".join(kind[1:]), {}, rng.uniform(8, 20), rng.choice((0, 0.1, 5))
            n[kind], settings = 3 if seed % 2 else rng.randint(0, 4), planned(MLP)[key].settings
            if seed % 2 == 0 and rng.random() < 0.3:
                name = rng.choice(sorted(settings.keys() - {"seed"}))
                old = settings[name]
                change = STAND_IN if name == "data" else {name: 500 if old is None else old + {
                    str: "x", list: [0.5]}.get(type(old), 1)}
            own[key]["error"] = [rng.choice((mean, mean, mean, 89, math.nan)[:3 + seed % 7 // 3]) + rng.gauss(0, spread)
                                 for _ in range(4)]
            made_up(runs, kind, own, range(n[kind]), change)
            exact[kind] = not change
        for name in ("C1", "C3", "C4"):
            scope, outcome = seen(claims.judge(runs, name))
            words.add(outcome)
            assert scope != PROTOCOL or all(exact[kind] and n[kind] for kind in asked(name)), (seed, name)
            assert "reproduced" not in outcome or all(exact[kind] and n[kind] > 2 for kind in asked(name)), (seed, name)
    assert words >= {"reproduced", "not reproduced", "inconclusive", "not tested: stand-in data",
                     "not tested: at chance", "not tested: other data"}


# --- Of many claims ------------------------------------------------------------------------------


def test_a_claim_has_the_lowest_scope_and_the_headline_counts_the_highest(judged):
    claim = judged("C22", own=lambda kind: {} if kind[0] == MLP else {"epochs": 100})
    assert seen(claim) == (REDUCED, "trend seen")
    rows = [(row["scope"], row["statistic_scope"], row["decides"]) for row in claims.rows_of([claim])]
    assert rows == [(REDUCED, PROTOCOL, MET)] + 3 * [(REDUCED, REDUCED, MET)]
    missing = judged("C22", only="256x4H")
    assert missing.scope == NO_EVIDENCE and [part.scope for part in missing.parts] == [PROTOCOL] + 3 * [NO_EVIDENCE]
    some = [judged("C1"), judged("C1", {I: 9}), judged("C1", {I: WIDE}), judged("C1", trials=1), claim, missing,
            judged("C1", own=STAND_IN), claims.judge(NOTHING, "C15"), claims.judge(NOTHING, "E4")]
    assert claims.headline(some) == (
        "4 of 7 empirical claims tested at the paper's protocol: 1 reproduced, 1 not, 2 inconclusive; of the others, 1 "
        "with a trend at reduced size")


@pytest.mark.parametrize("change", [{"epochs": 3}, {"seed": 1}, STAND_IN])
def test_runs_of_other_settings_share_no_mean_and_no_figure(empty, tmp_path, change):
    runs, (one, other, *_) = empty(), asked("C1")
    made_up(runs, one, truth())
    made_up(runs, other, truth(), change=change)
    with pytest.raises(common.Refused, match=f"mixes runs with {next(iter(change))}"):
        make_figures.make(runs, "3", tmp_path / "figures")
    made_up(runs, one, truth(), trials=[3], change=change)
    with pytest.raises(common.Refused, match="mixes runs with"):
        claims.judge(runs, "C1")
    assert not (tmp_path / "figures").exists()


def members(z, y, axis=2):
    """The members' cross entropies (N, M); the softmax is over an axis of the logits (N, M, K)."""
    return -((y if y.dim() == 2 else F.one_hot(y, z.shape[2]))[:, None] * z.log_softmax(axis)).sum(2)


def ensemble(z, y):
    return members(z.mean(1, keepdim=True), y).mean()


@pytest.mark.parametrize("name", ["joint_loss", "loss_and_cross_entropies"])
@pytest.mark.parametrize("loss, wrong", [
    (lambda z, y, lam: lam * ensemble(z, y) + (1 - lam) * members(z, y).mean(), False),
    (lambda z, y, lam: lam * ensemble(z, y) + (1 - lam) * members(z, y).sum(1).mean(), True),
    (lambda z, y, lam: lam * ensemble(z, y) - (1 - lam) * members(z, y).mean(), True),
    (lambda z, y, lam: lam * ensemble(z.softmax(2).mean(1, True).log(), y) + (1 - lam) * members(z, y).mean(), True),
    (lambda z, y, lam: lam * ensemble(z, y) + (1 - lam) * members(z, y, 1).mean(), True),
    (lambda z, y, lam: lam / 2 * ensemble(z, y) + (1 - lam / 2) * members(z, y).mean(), True)],
    ids=["right", "no 1/M", "sign", "arithmetic mean", "axis", "half of lambda"])
def test_the_identities_see_a_wrong_loss(monkeypatch, name, loss, wrong):
    monkeypatch.setattr(common, name, loss if name == "joint_loss" else lambda *args: (loss(*args), None, None))
    found = {name: claims.judge(NOTHING, name).outcome for name in identities.IDENTITIES}
    assert ("refuted" in found.values()) == wrong
    assert wrong or found == {**dict.fromkeys(("C15", "C16", "C17", "C18", "C19"), "verified"),
                              **dict.fromkeys(("C20", "E1", "E2", "E3"), "erratum")}


def test_e3_is_of_the_count_of_parameters(monkeypatch):
    monkeypatch.setattr(make_figures, "parameters", lambda experiment, c: 70_000 * c["members"])
    assert claims.judge(NOTHING, "E3").outcome == "refuted"


def test_what_is_published_is_what_is_tested_and_trained():
    """Tables 1, 3 and 4 as the paper prints them are what the preset `paper` trains."""
    assert set(PUBLISHED["claims"]) == {*EMPIRICAL, *identities.IDENTITIES, "E4"} and set(CASES) == set(EMPIRICAL)
    for table, experiment in (("table1", DENSENET), ("table4", CONVNET)):
        ours = NOTHING.block(experiment, NOTHING.paper)["configurations"]
        for name, printed in PUBLISHED[table]["rows"].items():
            shared = printed.keys() & ours[name].keys()
            assert shared >= ({"filters"} if table == "table4" else {"depth", "growth", "members"})
            assert {key: ours[name][key] for key in shared} == {key: printed[key] for key in shared}


# --- The report ----------------------------------------------------------------------------------


def test_the_report(empty, monkeypatch, tmp_path):
    """One page without scripts or other files; every name in it is escaped."""
    monkeypatch.setattr(study, "bytes_saved_for_backward", lambda *_: 0)       # (slow)
    nothing, some, full = empty(), empty(), empty()
    tables = {name: make_figures.make(nothing, name, tmp_path) for name in make_figures.TABLES}
    for kind in asked("C3"):
        made_up(some, kind, truth({"256x4H bagging": [0, 1, 9], "256x4H stacking": [60, 99, 100]}))
    pages = []
    for runs in (nothing, some):
        made = {name: make_figures.make(runs, name, tmp_path) for name in make_figures.FIGURES} | tables
        pages.append("".join(report.page(runs, tmp_path, made, [claims.judge(runs, name) for name in CASES])))
        assert pages[-1].startswith("<!DOCTYPE html>") and pages[-1].endswith("</main></body></html>\n")
        assert not re.search(r"""https?:|<script|<[ui]>|<b>&|(src|href)=["'](?!data:|#)""", pages[-1])
        assert len(re.findall("<table><caption>[^<]", pages[-1])) == pages[-1].count("<table") >= 20
        assert all(' scope="' in tag for tag in re.findall(r"<th\b[^>]*>", pages[-1]))
    for text in ("0 of 18 empirical claims tested", "No end-to-end run of more than 30 epochs is there."):
        assert text in pages[0]
    assert pages[0].count("Not drawn: none of its runs is there.") == 9 and "<img" not in pages[0]
    for text in ('src="data:image/png', "&lt;b&gt;&amp;", "&lt;i&gt;&amp;", "&lt;u&gt;&amp;", "Not drawn"):
        assert text in pages[1]
    ends = [float(end) for pair in re.findall(r"\[(.*?), (.*?)\]</td>", pages[1]) for end in pair]
    assert ends and all(0 <= end <= 100 for end in ends)

    for kind in dict.fromkeys(asked("C2") + asked("C7")):
        made_up(full, kind, truth({"DN-Low joint-0": 26}))
    rows = [row[-1] for row in report.printed_numbers(full, tables)]
    assert rows == 3 * ["within 0.5 points"] + ["apart"] + 17 * ["within 0.5 points"] + 3 * ["agrees"] + [
        "differs"] + 3 * ["agrees"] + ["differs"]
    early = empty()
    for kind in dict.fromkeys([*asked("C10"), (DENSENET, "DN-High", "joint-0")]):
        made_up(early, kind, truth({"DN-High joint-1": {"early": [0, 0, 1]}}))
    assert list(report.diagnosis(early))[-1] == [
        "DN-High", "3", "10.0", "3 of 3", "2 of 3", "0.25", "3 of 3", "3 of 3", "3 of 3"]
    assert report.compared([10.0], 10.2, REDUCED, "")[-1] == "not compared: reduced"
