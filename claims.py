"""The paper's claims, held one by one against the finished runs.

    python claims.py                        # every figure and table, and figures/PRESET/claims.csv
    python claims.py --preset paper --results expected/paper/results

Trains nothing. Every verdict has a scope (on what was the claim tested?) and an outcome (what was seen?). Only runs at
the paper's protocol speak of the paper: `reproduced`, `not reproduced` or `inconclusive`. Reduced runs on the paper's
data show a trend or not; stand-in data, networks at chance and missing runs are no evidence. A claim is made of
statistics with margins that were fixed before the runs. A statistic is computed for each trial, paired where two runs
are compared, and decided by the 95 % interval of a t-test over at least three trials: the whole interval must lie on
one side of the margin.
"""

import collections
import itertools
import math
import sys
from dataclasses import dataclass

import study
import folders
import identities
import make_figures
from finished import CONVNET, DENSENET, MLP, joint, mean_and_error, trained, trained_in

import numpy as np

PROTOCOL, REDUCED, NO_EVIDENCE, IDENTITY = "paper's protocol", "reduced", "no evidence", "identity"
MET, REFUSED, OPEN = "met", "refused", "open"
WORDS = {PROTOCOL: ("reproduced", "not reproduced", "inconclusive"),
         REDUCED: ("trend seen", "trend not seen", "unclear")}
TRIALS = 3              # that decide; fewer never do
T_QUANTILE = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)    # 97.5 %, df 1 to 9

# --- Statistics, and how they decide -------------------------------------------------------------


def interval(values):
    """Mean, and the ends of its 95 % interval by a t-test; infinite for a single value."""
    mean, error = mean_and_error(values)
    half = T_QUANTILE[min(len(values) - 1, len(T_QUANTILE)) - 1] * error if len(values) > 1 else math.inf
    return float(mean), float(mean - half), float(mean + half)


class Part:
    """What a claim is made of. `scope_of` sets the scope, and the reason if there is no evidence."""
    scope, reason, n, whole_grid, lacking = NO_EVIDENCE, "no run", 0, False, "some of its runs are missing"


@dataclass
class Statistic(Part):
    """A number for each trial that the claim puts above or below a margin ("at least", "at most": or at it)."""
    what: str
    values: dict          # trial -> number
    relation: str         # > | < | at least | at most
    margin: float = 0
    unit: str = " points"
    whole_grid: bool = False    # does it choose among all lambdas?
    lacking: str = "some of its runs are missing"       # the reason if there are runs and still no number

    def __post_init__(self):
        self.values = {trial: round(value, 9) for trial, value in self.values.items()}     # counts that tie, tie

    @property
    def n(self):
        return len(self.values)

    @property
    def asked(self):
        """What is claimed, and whose the margin is: an order is the paper's, a size is ours."""
        return f"{self.relation} {self.margin:g} ({'ours' if self.margin else 'the paper'})"

    def beyond(self, number):
        return {">": number > self.margin, "<": number < self.margin,
                "at least": number >= self.margin, "at most": number <= self.margin}[self.relation]

    @property
    def outcome(self):
        if self.n < TRIALS:
            return OPEN
        _, low, high = interval(list(self.values.values()))
        if self.beyond(low) and self.beyond(high):
            return MET
        other_side = high < self.margin if self.relation in (">", "at least") else low > self.margin
        return REFUSED if other_side else OPEN

    @property
    def as_claimed(self):
        """Is the mean on the claimed side?"""
        return self.n > 0 and self.beyond(interval(list(self.values.values()))[0])

    @property
    def cells(self):
        """Mean and interval, as text."""
        if not self.n:
            return ["", ""]
        mean, low, high = interval(list(self.values.values()))
        return [f"{mean:.2f}{self.unit}", f"{low:.2f} to {high:.2f}" if self.n > 1 else ""]


@dataclass
class InEveryTrial(Part):
    """A statement on every trial: one miss refutes it, and all hits must be more than chance."""
    what: str
    hits: dict            # trial -> bool
    chance: float         # of a hit
    lacking: str = "at most 30 epochs"

    @property
    def n(self):
        return len(self.hits)

    @property
    def asked(self):
        return f"all; by chance {self.chance:.2f} each (the paper)"

    @property
    def outcome(self):
        if self.n < TRIALS or (all(self.hits.values()) and self.chance ** self.n >= 0.05):
            return OPEN
        return MET if all(self.hits.values()) else REFUSED

    @property
    def as_claimed(self):
        return self.n > 0 and all(self.hits.values())

    @property
    def cells(self):
        return [f"{sum(self.hits.values())} of {self.n}" if self.n else "", ""]


@dataclass
class LowestRow(Part):
    """A column of Table 2: its lowest mean stands in one row, and every other row is above that."""
    what: str
    errors: dict          # method -> {trial: test error in per cent}
    best: str

    def __post_init__(self):
        self.above = {method: Statistic(method, paired(there, self.errors[self.best]), ">")
                      for method, there in self.errors.items() if method != self.best}

    @property
    def n(self):
        return min((one.n for one in self.above.values()), default=0)

    asked = "the others above, by their interval or by 0.5 points of mean (ours)"

    @property
    def outcome(self):
        if self.n < TRIALS:
            return OPEN
        if any(one.outcome == REFUSED for one in self.above.values()):
            return REFUSED
        means = {method: np.mean(list(there.values())) for method, there in self.errors.items()}
        clear = all(one.outcome == MET or means[method] > means[self.best] + 0.5 for method, one in self.above.items())
        return MET if clear and self.as_claimed else OPEN

    @property
    def as_claimed(self):
        means = {method: np.mean(list(there.values())) for method, there in self.errors.items() if there}
        return self.n > 0 and all(mean > means[self.best] for method, mean in means.items() if method != self.best)

    @property
    def cells(self):
        means = {method: np.mean(list(there.values())) for method, there in self.errors.items() if there}
        return [f"lowest: {min(means, key=means.get)}" if means else "", ""]


# --- What is read from the runs ------------------------------------------------------------------


def paired(one, other, of=lambda x, y: x - y):
    """{trial: of(x, y)} for the trials that two methods share: x - y unless said otherwise."""
    return {trial: of(one[trial], other[trial]) for trial in sorted(one.keys() & other.keys())}


class Numbers:
    """Numbers by trial, from finished runs; diverged runs have none."""

    def __init__(self, runs):
        self.runs, self.published = runs, runs.published

    def result(self, experiment, configuration, method, key):
        records = [record for record, _ in self.runs.runs(experiment, configuration, method)]
        return {record["trial"]: record["result"][key] for record in records
                if record["result"]["diverged_at_epoch"] is None}

    def error(self, experiment, configuration, method):
        """{trial: test error of the ensemble in per cent}"""
        errors = self.result(experiment, configuration, method, "test_ensemble_error")
        return {trial: 100 * error for trial, error in errors.items()}

    def gap(self, experiment, one, other):
        """{trial: test error of one (configuration, method) minus that of another}"""
        return paired(self.error(experiment, *one), self.error(experiment, *other))

    def lambdas(self, experiment, configuration):
        return self.runs.block(experiment)["configurations"][configuration]["lambdas"]

    def at_best(self, experiment, configuration, among):
        """{trial: test error at the lambda of lowest validation error}, of the lambdas for which `among` is true."""
        lambdas = [lam for lam in self.lambdas(experiment, configuration) if among(lam)]
        return {trial: errors[lam] for trial, (lam, errors) in self._best(experiment, configuration, lambdas).items()}

    def best_lambda(self, experiment, configuration):
        """{trial: the lambda of lowest validation error}"""
        lambdas = self.lambdas(experiment, configuration)
        return {trial: lam for trial, (lam, _) in self._best(experiment, configuration, lambdas).items()}

    def _best(self, experiment, configuration, lambdas):
        """{trial: (best lambda on validation, {lambda: test error})}, of trials that have all the lambdas."""
        validation, test = collections.defaultdict(dict), collections.defaultdict(dict)
        for lam in lambdas:
            for target, key in ((validation, "validation_error"), (test, "test_ensemble_error")):
                for trial, value in self.result(experiment, configuration, joint(lam), key).items():
                    target[trial][lam] = 100 * value
        return {trial: (min(errors, key=errors.get), test[trial]) for trial, errors in validation.items()
                if len(errors) == len(lambdas)}

    def dropped(self, configuration, lam, share):
        """{trial: test error in per cent with a share of the members dropped}"""
        found = self.runs.runs(f"robustness-{self.runs.drop}", configuration, joint(lam))
        errors = {record["trial"]: 100 * folders.load_history(folder)["error"].mean(0) for record, folder in found}
        return {trial: e[round(share * len(e))] for trial, e in errors.items()}

    def rise(self, configuration, lam, share=0.5):
        return paired(self.dropped(configuration, lam, share), self.dropped(configuration, lam, 0))

    def dominance(self, experiment, configuration, lam):
        """{trial: `make_figures.dominance`} of the joint runs at one lambda."""
        return {record["trial"]: make_figures.dominance(record, history) for record, history in
                self.runs.histories(experiment, configuration, joint(lam))}

    def moved_members(self, configuration, lam):
        """{trial: share of the members whose first layer moved at least half as far from its start as the farthest}"""
        shares = {}
        for record, folder in self.runs.runs(CONVNET, configuration, joint(lam)):
            if record["result"]["diverged_at_epoch"] is None and (folder / "weights.pt").exists():
                _, moved = make_figures.first_layer(folder, record)
                shares[record["trial"]] = (moved >= moved.max() / 2).double().mean().item()
        return shares


# --- The empirical claims: statistic and margin --------------------------------------------------

SINGLE, TINY = ("1x1024H", "joint-1"), "256x4H"


def c1(x):
    yield Statistic("256x4H λ = 0 minus 1x1024H", x.gap(MLP, (TINY, "joint-0"), SINGLE), ">")


def c2(x):
    for method in ("bagging", "stacking", "joint-0", "joint-1"):
        single = x.error(MLP, *SINGLE).values()
        level = np.mean(list(single)) if single else math.nan
        farther = paired(x.error(MLP, TINY, method), x.error(MLP, TINY, "joint-0.95"),
                         lambda one, best, level=level: abs(one - level) - abs(best - level))
        yield Statistic(f"distance to 1x1024H: 256x4H {method.replace('joint-', 'λ = ')} minus λ = 0.95",
                        farther if single else {}, ">")
    yield Statistic("256x4H λ = 1 minus 1x1024H", x.gap(MLP, (TINY, "joint-1"), SINGLE), "<", 2)


def c3(x):
    for method in ("bagging", "stacking"):
        yield Statistic(f"256x4H {method} minus 1x1024H", x.gap(MLP, (TINY, method), SINGLE), ">")


def c4(x):
    def span(name):
        return {trial: abs(gap) for trial, gap in x.gap(MLP, (name, "joint-0"), (name, "joint-1")).items()}

    for one, other in ((TINY, "64x16H"), ("64x16H", "16x64H")):
        yield Statistic(f"difference between λ = 0 and 1: {one} minus {other}", paired(span(one), span(other)), ">")
    yield Statistic("difference between λ = 0 and 1: 16x64H", span("16x64H"), "<", 1)


def c5(x):
    yield Statistic("256x4H λ = 1 minus the best λ below 1", paired(
        x.error(MLP, TINY, "joint-1"), x.at_best(MLP, TINY, lambda lam: lam < 1)), ">", whole_grid=True)


def c6(x):
    for name in x.published["table2"]["test_error_percent"]:
        yield Statistic(f"{name} λ = 1 minus λ = 0", x.gap(DENSENET, (name, "joint-1"), (name, "joint-0")), ">")


def c7(x):
    for name, printed in x.published["table2"]["test_error_percent"].items():
        best = min(printed, key=printed.get)
        yield LowestRow(f"{name}: lowest error at {best.replace('joint-', 'λ = ')}",
                        {method: x.error(DENSENET, name, method) for method in printed}, best)


def tau(values):
    """Kendall's tau-a between the order of a list and its values; 0 if all are equal."""
    pairs = list(itertools.combinations(values, 2))
    return sum(int(np.sign(later - earlier)) for earlier, later in pairs) / len(pairs)


def c8(x):
    names = list(x.published["table4"]["rows"])                     # from small to large
    best = [x.best_lambda(CONVNET, name) for name in names]
    yield Statistic("rank correlation of capacity and best λ", {
        trial: tau([one[trial] for one in best]) for trial in set.intersection(*map(set, best))}, "<", 0, "",
        whole_grid=True)
    yield Statistic(f"{names[0]} λ = 1 minus the best λ below 1", paired(
        x.error(CONVNET, names[0], "joint-1"), x.at_best(CONVNET, names[0], lambda lam: lam < 1)), "<", 0.5,
        whole_grid=True)


def ahead(row):
    """By how many points one member dominates (a row of `make_figures.dominance`): above 0 if it does.

    Its error is within 5 points of the ensemble's and the second best member's is at least 20 points higher, in
    training and in test.
    """
    return min(min(5 - (row[f"{part}_best_member_error"] - row[f"{part}_ensemble_error"]),
                   row[f"{part}_second_best_member_error"] - row[f"{part}_best_member_error"] - 20)
               for part in ("train", "test"))


def c9(x):
    for experiment, name in ((DENSENET, "DN-High"), (MLP, TINY)):
        for lam in x.lambdas(experiment, name):
            yield Statistic(f"{name} λ = {lam:g}: dominance of one member", {
                trial: ahead(row) for trial, row in x.dominance(experiment, name, lam).items()},
                ">" if experiment == DENSENET and lam == 1 else "<", whole_grid=True)


def c10(x):
    def early(experiment, name):        # of runs long enough for epoch 3 to be early
        rows = x.dominance(experiment, name, 1)
        long = {record["trial"] for record in x.runs.used.values()
                if record["configuration"] == name and record["settings"]["epochs"] > 30}
        return {trial: row for trial, row in rows.items() if trial in long}

    members = x.runs.block(DENSENET)["configurations"]["DN-High"]["members"]
    yield InEveryTrial("DN-High λ = 1: the best member after epoch 3 is the best at the end, and dominates", {
        trial: row["same"] and ahead(row) > 0 for trial, row in early(DENSENET, "DN-High").items()}, 1 / members)
    high, tiny = ({trial: row["gap_at_epoch_3"] for trial, row in early(experiment, name).items()}
                  for experiment, name in ((DENSENET, "DN-High"), (MLP, TINY)))
    short = x.dominance(DENSENET, "DN-High", 1) and x.dominance(MLP, TINY, 1)
    yield Statistic("λ = 1, gap between the two best members after epoch 3: DN-High minus 256x4H",
                    paired(high, tiny), ">", lacking="at most 30 epochs" if short else Part.lacking)


def c11(x):
    name, lacking = "10xConvNet-0.29M", "weights were not kept"
    yield Statistic("λ = 1: share of the members whose first layer moved", x.moved_members(name, 1), "at most",
                    round(1 / 3, 9), "", lacking=lacking)
    yield Statistic("λ = 0: share of the members whose first layer moved", x.moved_members(name, 0), "at least", 1, "",
                    lacking=lacking)


def robustness_claims(x, name):
    yield Statistic(f"{name}, all members: λ = 0.99 minus λ = 1",
                    paired(x.dropped(name, 0.99, 0), x.dropped(name, 1, 0)), "<", 0.5)
    for lam in (0, 0.99):
        yield Statistic(f"{name} λ = {lam:g}: rise with half dropped", x.rise(name, lam), "<", 1)


def c12(x):
    yield from robustness_claims(x, TINY)
    yield Statistic(f"{TINY} λ = 1: rise with half dropped", x.rise(TINY, 1), ">", 5)
    yield Statistic(f"{TINY} λ = 0.99: rise with 60 % dropped", x.rise(TINY, 0.99, 0.6), "<", 1)


def c13(x):
    def benefit(name):
        return paired(x.dropped(name, 0, 0), x.dropped(name, 0.99, 0))

    yield from robustness_claims(x, "64x16H")
    yield Statistic("64x16H, rise with half dropped: λ = 1 minus λ = 0.99",
                    paired(x.rise("64x16H", 1), x.rise("64x16H", 0.99)), ">")
    yield Statistic("λ = 0 minus λ = 0.99, all members: 64x16H minus 256x4H",
                    paired(benefit("64x16H"), benefit(TINY)), "<")


def c14(x):
    def loss(key, lam):
        return x.result(MLP, "64x16H", joint(lam), f"test_{key}_loss")

    yield Statistic("64x16H, mean member loss: λ = 1 over λ = 0.9", paired(
        loss("mean_member", 1), loss("mean_member", 0.9), lambda one, other: one / other), "at least", 2, "")
    yield Statistic("64x16H, ensemble loss: change from λ = 0.9 to 1, over that at 0.9", paired(
        loss("ensemble", 1), loss("ensemble", 0.9), lambda one, other: abs(one - other) / other), "<", 0.5, "")


def c21(x):
    for name in (TINY, "64x16H"):
        yield Statistic(f"{name} λ = 0 minus the best λ above 0", paired(
            x.error(MLP, name, "joint-0"), x.at_best(MLP, name, lambda lam: lam > 0)), ">", whole_grid=True)
    for name in (TINY, "64x16H", "16x64H"):
        yield Statistic(f"{name} at its best λ above 0 minus 1x1024H", paired(
            x.at_best(MLP, name, lambda lam: lam > 0), x.error(MLP, *SINGLE)), "<", 0.5, whole_grid=True)


def c22(x):
    def gain(experiment, name):
        return x.gap(experiment, (name, "joint-0"), (name, "joint-1"))

    yield Statistic("256x4H λ = 0 minus λ = 1", gain(MLP, TINY), ">")
    yield Statistic("ConvNet-0.07M λ = 0 minus λ = 1", gain(CONVNET, "ConvNet-0.07M"), ">")
    yield Statistic("DN-High λ = 0 minus λ = 1", gain(DENSENET, "DN-High"), "<")
    yield Statistic("λ = 0 minus λ = 1: ConvNet-1.20M minus ConvNet-0.07M", paired(
        gain(CONVNET, "ConvNet-1.20M"), gain(CONVNET, "ConvNet-0.07M")), "<")


def c23(x):
    name = "ConvNet-1.20M"
    for end in (0, 1):
        yield Statistic(f"{name} λ = {end} minus the best λ between the extremes", paired(
            x.error(CONVNET, name, joint(end)), x.at_best(CONVNET, name, lambda lam: 0 < lam < 1)), ">",
            whole_grid=True)


def c24(x):
    for name, printed in x.published["table2"]["test_error_percent"].items():
        for method in printed:
            if method != "bagging":
                yield Statistic(f"{name} {method.replace('joint-', 'λ = ')} minus bagging",
                                x.gap(DENSENET, (name, method), (name, "bagging")), "<")
        yield Statistic(f"{name} stacking minus λ = 0", x.gap(DENSENET, (name, "stacking"), (name, "joint-0")), ">")


EMPIRICAL = {function.__name__.upper(): function for function in (
    c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c21, c22, c23, c24)}

# --- Scope and outcome ---------------------------------------------------------------------------


def scope_of(part, runs):
    """(scope, reason) of a statistic, from the runs that were asked for since runs.begin()."""
    if not runs.used:
        return NO_EVIDENCE, "no run"
    for record in runs.used.values():
        s, paper = trained(record), runs.block(trained_in(record["experiment"]), runs.paper)
        if s["data"]["source"] != "real" or s["dataset"] != paper["dataset"]:
            return NO_EVIDENCE, "stand-in data" if s["data"]["source"] == "synthetic" else "other data"
    if runs.at_chance():
        return NO_EVIDENCE, "at chance"
    if not part.n:
        return NO_EVIDENCE, "incomplete grid of λ" if part.whole_grid else part.lacking
    exact = runs.at_protocol()
    if part.whole_grid:
        for name, configuration in {(trained_in(r["experiment"]), r["configuration"]) for r in runs.used.values()}:
            mine, theirs = (runs.block(name, preset)["configurations"][configuration]["lambdas"]
                            for preset in (runs.preset, runs.paper))
            exact &= mine == theirs
    return (PROTOCOL if exact else REDUCED), ""


@dataclass
class Claim:
    """A claim of published.yaml, and what became of it."""
    name: str
    where: str
    claim: str
    reading: str
    parts: list
    scope: str
    outcome: str


def judge(runs, name):
    """One claim of published.yaml against the finished runs."""
    text, parts = runs.published["claims"][name], []
    if name in EMPIRICAL:
        statistics = EMPIRICAL[name](Numbers(runs))
        while True:
            runs.begin()
            if (part := next(statistics, None)) is None:
                break
            part.scope, part.reason = scope_of(part, runs)
            parts.append(part)
        scope, outcome = verdict(parts)
    elif name in identities.IDENTITIES:
        parts, scope = list(identities.IDENTITIES[name]()), IDENTITY
        true = all(part.true for part in parts)
        outcome = ("erratum" if name in identities.ERRATA else "verified") if true else "refuted"
    else:
        scope, outcome = IDENTITY, "note"
    return Claim(name, text["where"], text["claim"], text.get("reading", ""), parts, scope, outcome)


def verdict(parts):
    """(scope, outcome) of a claim: the lowest scope of its statistics; met if all are, refused if one is."""
    scope = next(one for one in (NO_EVIDENCE, REDUCED, PROTOCOL) if one in {part.scope for part in parts})
    if scope == NO_EVIDENCE:
        reasons = [part.reason for part in parts if part.scope == NO_EVIDENCE]
        some = len(parts) - reasons.count("no run")
        other = next((reason for reason in reasons if reason != "no run"), None)
        return scope, "not tested: " + (other or ("no run" if not some else
                                                  f"{some} of {len(parts)} statistics have runs"))
    (yes, no, open_), n = WORDS[scope], min(part.n for part in parts)
    if n < TRIALS:
        return scope, f"{open_} (n = {n}, {'' if all(part.as_claimed for part in parts) else 'not '}as claimed)"
    outcomes = {part.outcome for part in parts}
    return scope, no if REFUSED in outcomes else yes if outcomes == {MET} else open_


# --- What is said --------------------------------------------------------------------------------


def headline(claims):
    """The counts in one sentence: only the paper's protocol speaks of the paper."""
    empirical = [claim for claim in claims if claim.name in EMPIRICAL]
    tested = [claim.outcome for claim in empirical if claim.scope == PROTOCOL]
    yes, no = tested.count("reproduced"), tested.count("not reproduced")
    trend = sum(claim.outcome == "trend seen" for claim in empirical)
    return (f"{len(tested)} of {len(empirical)} empirical claims tested at the paper's protocol: {yes} reproduced, "
            f"{no} not, {len(tested) - yes - no} inconclusive; of the others, {trend} with a trend at reduced size")


def print_claims(claims):
    for scope, title in ((PROTOCOL, "at the paper's protocol"), (REDUCED, "reduced runs suggest"),
                         (NO_EVIDENCE, "not tested"), (IDENTITY, "identities and errata, computed")):
        if some := [claim for claim in claims if claim.scope == scope]:
            print(f"\n{title}:")
            for claim in some:
                print(f"  {claim.name:<4} {claim.outcome.removeprefix('not tested: '):<30} {claim.claim}")
    print(f"\n{headline(claims)}")


def rows_of(claims):
    """Rows of claims.csv: one for each statistic."""
    for claim in claims:
        for part in claim.parts:
            mean, between = part.cells
            yield {"claim": claim.name, "where": claim.where, "scope": claim.scope, "outcome": claim.outcome,
                   "statistic": part.what, "mean": mean, "interval_95": between, "n": part.n or "",
                   "claimed": part.asked, "decides": part.outcome, "statistic_scope": part.scope,
                   "reason": part.reason}


def draw_and_judge(args):
    """Draws every figure and table, judges every claim and writes claims.csv: (runs, folder, made, claims)."""
    runs, folder = make_figures.open_study(args)
    folders.commit()                    # before figures change the checkout, as in expected/
    made = {name: make_figures.make(runs, name, folder) for name in make_figures.FIGURES | make_figures.TABLES}
    make_figures.finish(runs, made, folder)
    claims = [judge(runs, name) for name in runs.published["claims"]]
    folders.make_writable(folder)
    make_figures.write_csv(folder / "claims.csv", list(rows_of(claims)))
    print_claims(claims)
    return runs, folder, made, claims


def main():
    _, folder, made, _ = draw_and_judge(make_figures.parser(__doc__).parse_args())
    print(f"every statistic: {folder / 'claims.csv'}")
    sys.exit(0 if all(one.state != "NOT DRAWN" for one in made.values()) else 1)


if __name__ == "__main__":
    study.command_line(main)
