"""Verdicts from made-up runs: true, false, tied, noisy, at chance, on a stand-in, reduced, missing."""

import copy
import functools
import math
import random
import re
import types
from pathlib import Path

import common
from study import claims, folders, plan, report
from study.claims import MET, NO_EVIDENCE, OPEN, PROTOCOL, REDUCED, REFUSED
from study.finished import CONVNET, DENSENET, MLP, FinishedRuns, trained_in

import numpy as np
import pytest
import torch

NOTHING = FinishedRuns(Path("nowhere"), "paper", "example")
TABLE_2 = NOTHING.published["table2"]["test_error_percent"]
STAND_IN = {"data": {"name": "stand-in", "source": "synthetic"}}
USUAL = {"validation": None, "fit": None, "best": 3, "behind": 0, "parts": ("train", "test"), "early": 0, "gap": 1,
         "rise": 0.2, "moved": 10, "member_loss": 0.5, "loss": 0.5}     # of a run, beside its error: see made_up


def of_convnets(best):
    """The errors of the five ConvNets: 10 points for each unit of lambda from the best."""
    return {f"{name} joint-{lam / 10:g}": 50 + abs(lam - 10 * at)
            for name, at in zip(NOTHING.published["table4"]["rows"], best, strict=True) for lam in range(11)}


def truth(changes=()):
    """{"configuration method": what comes out} as the paper has it, but for changes. A list has an entry a trial."""
    own = {"1x1024H joint-1": 10.2, "256x4H bagging": 15.8, "256x4H stacking": 14.6, "10xConvNet-0.29M joint-0": 50,
           "10xConvNet-0.29M joint-1": 50} | of_convnets((1, 0.9, 0.7, 0.5, 0.3))
    for name, errors in {"256x4H": (16.3, 13, 11.5, 10.8, 10.3, 10.4, 10.9), "64x16H": (
            13, 12, 11.2, 10.9, 10.5, 10.4, 10.6), "16x64H": (11, 10.9, 10.8, 10.7, 10.6, 10.5, 10.6)}.items():
        own |= {f"{name} joint-{lam:g}": e for lam, e in zip((0, 0.5, 0.8, 0.9, 0.95, 0.99, 1), errors, strict=True)}
    own |= {f"{name} {method}": error for name, column in TABLE_2.items() for method, error in column.items()}
    own |= {f"{name} independent": 20 for name in TABLE_2}
    own = {key: USUAL | {"error": error} for key, error in own.items()}
    for key, change in [
            ("256x4H joint-1", {"rise": 20}), ("64x16H joint-1", {"rise": 5, "member_loss": 1.5, "loss": 0.55}),
            ("DN-High joint-1", {"gap": 10, "behind": 40}), ("10xConvNet-0.29M joint-1", {"moved": 2}),
            *((f"{name} joint-0", {"fit": 1}) for name in TABLE_2), *dict(changes).items()]:
        own[key] |= change if isinstance(change, dict) else {"error": change}
    return own


@functools.cache
def settings_of(experiment, configuration, method, lam):
    """The settings of a run of the block `paper`, on the real data."""
    block = NOTHING.paper[trained_in(experiment)]
    data = common.DATASETS[block["dataset"]].description
    return plan.run_settings(block, block["configurations"][configuration], method, lam) | {"data": data, "seed": 0}


class MadeUp(FinishedRuns):
    """A study of the preset `paper` whose runs lie in memory, as {folder: (run.json, history.npz)} in `there`."""

    def __init__(self, monkeypatch):
        vars(self).update(vars(NOTHING) | {"results": Path(), "there": {}})     # (NOTHING has read the presets)
        self.begin()
        self.whole_run = lambda path: self.there[path][0]
        monkeypatch.setattr(folders, "run_folders", lambda place, method: [
            path for path in self.there if path.parent == place / method])
        monkeypatch.setattr(folders, "load_history", lambda path: self.there[path][1])
        monkeypatch.setattr(claims, "first_layer", lambda path, record: (None, self.there[path][1]["moved"]))
        monkeypatch.setattr(Path, "exists", lambda path: True)          # weights.pt, for first_layer

    def made_up(self, kind, truth, trials=None, change=()):
        """Adds the runs of one (experiment, configuration, method), with changes of their settings."""
        (experiment, configuration, name), key = kind, " ".join(kind[1:])
        method, _, lam = name.partition("-")
        papers = self.paper[trained_in(experiment)]["configurations"][configuration]["trials"]
        for trial in range(papers if trials is None else trials):
            it = types.SimpleNamespace(**{name: value[trial % len(value)] if isinstance(value, list) else value
                                          for name, value in truth[key].items()})
            if not isinstance(truth[key]["error"], list):
                it.error += random.Random(f"{key} {trial}").gauss(0, 0.005)
            settings, history = settings_of(experiment, configuration, method, float(lam or 0)) | dict(change), {}
            members = settings["members"]
            result = {"epoch": 4, "diverged_at_epoch": None, "test_ensemble_error": it.error / 100,
                      "validation_error": (it.validation or it.error) / 100,
                      "test_mean_member_loss": it.member_loss, "test_ensemble_loss": it.loss}
            if math.isnan(it.error):
                result = {"epoch": None, "diverged_at_epoch": 1}
            elif experiment != trained_in(experiment):  # the error rises in a straight line, by `rise` to half of it
                history["error"] = (it.error + 2 * it.rise * np.arange(members)[None] / members) / 100
                settings, result = {"drop": "example", "repeats": 20, "seed": 0, "trained": settings}, {}
            elif key.startswith(("DN-", "256x4H joint")):       # member 0 is ahead at the end
                train, test = ((it.error + it.best + it.behind * (part in it.parts) * (np.arange(members) > 0)) / 100
                               for part in ("train", "test"))
                if it.fit is not None:
                    train = np.full(members, it.fit / 100)
                first = 0.9 - it.gap / 100 * (np.arange(members) == it.early)
                history = {"train_member_error": np.stack([train, train, first, train]),
                           "train_ensemble_error": np.full(4, it.error / 100), "reported_test_member_error": test}
            elif key.startswith("10x"):
                history["moved"] = torch.where(torch.arange(members) < it.moved, 1, 0.4)
            record = {"experiment": experiment, "configuration": configuration, "lambda": float(lam or 0),
                      "method": method, "trial": trial, "settings": settings, "result": result}
            self.there[Path("paper", *kind, f"trial{trial}")] = record, history


@functools.cache
def asked(name):
    """The (experiment, configuration, method) of every run that a claim, and the regime of its DenseNets, reads."""
    kinds, runs = {}, copy.copy(NOTHING)
    runs.runs = lambda *kind: kinds.setdefault(kind, [])
    claims.judge(runs, name)
    kinds |= {(DENSENET, configuration, "joint-0"): [] for experiment, configuration, _ in kinds
              if experiment == DENSENET}
    return list(kinds)


@pytest.fixture
def empty(monkeypatch):
    """empty(): a study without runs; of several, only the last can be read."""
    return lambda: MadeUp(monkeypatch)


@pytest.fixture
def judged(empty):
    """judged(...): the Claim of a made-up study; trials: of each run, by default the paper's; only: a configuration."""
    def judge(name, changes=(), trials=None, own=(), only="", grid=()):
        runs = empty()
        if grid:
            runs.block = copy.deepcopy(runs.block)
            runs.block[MLP]["configurations"]["256x4H"]["lambdas"] = grid
        for kind in [kind for kind in asked(name) if only in kind[1]]:
            runs.made_up(kind, truth(changes), trials, own(kind) if callable(own) else own)
        return claims.judge(runs, name)
    return judge


def seen(claim):
    return claim.scope, claim.outcome


@pytest.mark.parametrize("relation, outcomes", [
    (">", "MROOO"), ("<", "RMOOO"), ("at least", "MROMO"), ("at most", "RMOMO")])
@pytest.mark.parametrize("margin", [0, 0.5])
def test_the_interval_decides_a_statistic(relation, outcomes, margin):
    above, below, around, tie = ([margin + x for x in by] for by in ([3, 4, 5], [-3, -4, -5], [1, -2, 1], [0] * 3))
    cases = above, below, around, tie, [math.nan] * 3, [], [9], [9, 9], [-9, -9]        # fewer than three never decide
    found = [claims.Statistic("x", dict(enumerate(values)), relation, margin).outcome for values in cases]
    assert found == [{"M": MET, "R": REFUSED, "O": OPEN}[one] for one in outcomes + "OOOO"]
    assert claims.interval([1, 2, 3, 4]) == pytest.approx((2.5, 0.4459, 4.5541), abs=1e-3)      # Student's


def test_a_statement_on_every_trial():
    def outcome(hits, chance=0.25):
        return claims.InEveryTrial("x", dict(enumerate(hits)), chance).outcome
    assert outcome([True] * 3) == MET and outcome([True] * 3, 0.5) == OPEN and outcome([True] * 5, 0.5) == MET
    assert outcome([True, True, False]) == outcome([True, False, True], 0.5) == REFUSED
    assert {outcome(hits) for hits in ([], [False], [True] * 2, [False] * 2)} == {OPEN}


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
    "C13": ([], [{"64x16H joint-0.99": 12}, *({"64x16H joint-0": change} for change in (20, 10, {"rise": 2})), {
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
            {"ConvNet-1.20M joint-0": TIE, "ConvNet-1.20M joint-0.3": TIE}, {"ConvNet-1.20M joint-0": [40, 50, 70]}),
    "C24": ([], [{"DN-Low joint-1": 35}, {"DN-Mid stacking": 31}, {"DN-High stacking": 17}],
            {"DN-Mid bagging": [29] * 3, "DN-Mid joint-1": [29] * 3}, {"DN-Mid joint-1": WIDE})}


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_a_claim(judged, name):
    true, false, tied, noisy = CASES[name]
    for scope, own, trials, of, (yes, no, unclear) in (
            (PROTOCOL, {}, None, " of [35]", ("reproduced", "not reproduced", "inconclusive")),
            (REDUCED, {"epochs": 100}, 3, "", ("trend seen", "trend not seen", "unclear"))):
        for word, cases in ((yes, [{}, *true]), (no, false), (unclear, [*filter(None, [tied]), noisy])):
            for case in cases:
                assert seen(judged(name, case, trials, own)) == (scope, word), case
        for n in (1, 2):
            for case, words in (({}, "as claimed"), (false[0], "not as claimed")):
                claim = judged(name, case, n, own)
                assert claim.scope == scope and re.fullmatch(rf"{unclear} \(n = {n}{of}, {words}\)", claim.outcome)
    key = next(iter(false[0]))
    for case, own, n, reason in (({}, STAND_IN, 3, "stand-in data"), ({}, {}, 0, "no run"), (
            {key: 98 if key.startswith(("DN", "Conv", "10x")) else 89}, {}, 3, "at chance")):
        assert seen(judged(name, case, n, own)) == (NO_EVIDENCE, f"not tested: {reason}")


@pytest.mark.parametrize("name, outcome, changes, how", [
    ("C1", "inconclusive (n = 4 of 5, as claimed)", {}, {"trials": 4}),
    ("C22", "inconclusive (n = 3 of 5, as claimed)", {}, {"trials": 3}),
    ("C1", "reproduced", {I: [72] * 3}, {}),                        # four fifths of the error of guessing: it learns
    ("C1", "not tested: at chance", {I: [72.1] * 3}, {}),
    ("C1", "not tested: diverged", {I: [math.nan]}, {}),
    ("C6", "not tested: 1 of 3 configurations has runs", {}, {"only": "DN-Low"}),
    ("C10", "trend seen", {}, {"own": {"epochs": 31}}),
    ("C10", "not tested: at most 30 epochs", {}, {"own": lambda kind: {"epochs": 30} if kind[0] == MLP else {}}),
    ("C4", "inconclusive", {"16x64H joint-0": [10.03] * 3, "16x64H joint-1": [9.03] * 3}, {}),      # counts that tie
    ("C2", "reproduced", {"1x1024H joint-1": [9.2, 10.2, 10.2, 10.2, 11.2], E: 9.5}, {}),       # distance to the mean
    ("C5", "trend seen", {}, {"grid": [0, 0.5, 0.95, 1]}),          # not the paper's
    ("C7", "inconclusive (n = 1 of 3, not as claimed)", {"DN-Mid joint-0": 20.1}, {"trials": 1})])
def test_claims_md_word_for_word(judged, name, outcome, changes, how):
    assert judged(name, changes, **how).outcome == outcome


@pytest.mark.parametrize("fit, independent, reason", [
    (4.9, None, ""), (5, None, "members not trained out"), (12, 7, ""), (12.1, 7, "members not trained out"),
    ([1, 1, 6], None, "members not trained out"), (None, 1, "no run at λ = 0")])
@pytest.mark.parametrize("name, network", [
    ("C6", "DN-Low"), ("C7", "DN-Mid"), ("C24", "DN-Low"), ("C9", "DN-High"), ("C10", "DN-High"), ("C22", "DN-High")])
def test_a_reduced_densenet_counts_if_it_is_trained_out(empty, name, network, fit, independent, reason):
    """Members' training error at lambda 0: below 5 %, or at most 5 points above that of `independent`."""
    runs, kinds = empty(), [kind for kind in asked(name) if fit is not None or kind[1:] != (network, "joint-0")]
    kinds += [(DENSENET, network, "independent")] * (independent is not None)
    changes = truth({f"{network} joint-0": {"fit": fit}, f"{network} independent": {"fit": independent}})
    for kind in kinds:
        runs.made_up(kind, changes, 3, {"epochs": 100})
    scope, outcome = seen(claims.judge(runs, name))
    assert scope == (NO_EVIDENCE if reason else REDUCED)
    if fit is None and name not in ("C9", "C10"):           # a difference to lambda 0 has no value
        reason = "some of its runs are missing"
    assert outcome == (f"not tested: {reason}" if reason else "trend seen")


def test_convolutions_in_tf32_are_the_papers_fp32_and_are_named(empty):
    runs = empty()
    for kind in asked("C23"):
        runs.made_up(kind, truth())
    for record, _ in runs.there.values():
        record["machine"] = {"device": "a card", "commit": "1", "tf32": True}
    assert seen(claims.judge(runs, "C23")) == (PROTOCOL, "reproduced")
    runs.point(CONVNET, "ConvNet-1.20M", "joint-0")
    assert "fp32 · convolutions in TF32\n" in runs.provenance()


def test_only_runs_as_the_paper_has_them_speak_of_the_paper(empty):
    """Of 200 random studies; in every other one, no setting is changed and no trial missing."""
    words, changes = set(), [STAND_IN, {"epochs": 3}, {"lr": 0.5}, {"dataset": "CIFAR-10"}, {"decay": [0.5]},
                             {"train": 500}, {"batch": 50}, {"classes": 5}, {"loss": "mine"}]
    for seed in range(200):
        rng, runs, own, n = random.Random(seed), empty(), truth(), {}
        change = {} if seed % 4 else rng.choice(changes)
        for kind in dict.fromkeys(asked("C1") + asked("C3") + asked("C4")):
            mean, spread = rng.uniform(8, 20), rng.choice((0, 0.1, 5))
            n[kind] = 5 if seed % 2 else rng.randint(0, 6)
            own[" ".join(kind[1:])]["error"] = [rng.choice((mean, mean, mean, 89, math.nan)[:3 + seed % 7 // 3])
                                                + rng.gauss(0, spread) for _ in range(6)]
            runs.made_up(kind, own, n[kind], change)
        for name in ("C1", "C3", "C4"):
            scope, outcome = seen(claims.judge(runs, name))
            words.add(outcome.split(" (")[0].removeprefix("not tested: "))
            assert scope != PROTOCOL or (not change and all(n[kind] for kind in asked(name))), (seed, name)
            assert "reproduced" not in outcome or (scope == PROTOCOL and all(n[kind] >= 5 for kind in asked(name)))
    assert words >= {"reproduced", "not reproduced", "inconclusive", "stand-in data", "at chance", "other data"}


def test_a_claim_has_the_lowest_scope_and_the_headline_counts_the_highest(judged, capsys):
    claim = judged("C22", trials=3, own=lambda kind: {} if kind[0] == MLP else {"epochs": 100})
    rows = [(row["scope"], row["statistic_scope"], row["decides"]) for row in claims.rows_of([claim])]
    assert rows == [(REDUCED, PROTOCOL, MET)] + 3 * [(REDUCED, REDUCED, MET)]
    missing = judged("C22", only="256x4H")
    assert missing.scope == NO_EVIDENCE and [part.scope for part in missing.parts] == [PROTOCOL] + 3 * [NO_EVIDENCE]
    some = [judged("C1"), judged("C1", {I: 9}), judged("C1", {I: WIDE}), judged("C1", trials=1), claim, missing,
            judged("C1", own=STAND_IN), judged("X1"), *(claims.judge(NOTHING, name) for name in ("C15", "E4"))]
    assert re.findall(r"\d+ \w+", claims.headline(some)) == ["4 of", "7 empirical", "1 reproduced", "1 not",
                                                             "2 inconclusive", "1 with"]
    assert {(part.scope, part.asked) for part in some[7].parts} == {(PROTOCOL, "> 0 (not the paper's)")}
    claims.print_claims(some)
    assert re.search(r"DN-High λ = 1 minus independent: 2\.1\d points 2\.\d+ to 2\.\d+\n", capsys.readouterr().out)
    assert list(report.beside_every_verdict(some))[1].startswith("7 statistics were decided at 95 % each: about 0.3")
