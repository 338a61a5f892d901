"""The paper's claims, held one by one against the finished runs. make_figures.py prints the verdicts.

Every verdict has a scope (on what was the claim tested?) and an outcome (what was seen?). Only runs at the paper's
protocol, with the paper's number of trials, speak of the paper. A claim is made of statistics with margins that were
fixed before the runs. A statistic has a number for each trial, paired where two runs are compared; the 95 % interval of
a t-test decides, which must lie on one side of the margin. Identities and errata are tests: tests/test_identities.py.
"""

import copy
import itertools
import math
from dataclasses import dataclass, field

from study.finished import CONVNET, DENSENET, diverged, first_layer, joint, mean_and_error, trained, trained_in

import numpy as np

PROTOCOL, REDUCED, NO_EVIDENCE, IDENTITY = "paper's protocol", "reduced", "no evidence", "identity"
EXPLORED = "exploratory"
MET, REFUSED, OPEN = "met", "refused", "open"
WORDS = {PROTOCOL: ("reproduced", "not reproduced", "inconclusive"),
         REDUCED: ("trend seen", "trend not seen", "unclear")}
SOME_MISSING = "some of its runs are missing"
DOMINANCE = "the paper; 5 and 20 points are ours"      # whose margins `ahead` has
EARLY = 30              # epoch 3 is early in a run of more epochs
TRIALS = 3              # that decide at reduced scope; at the paper's protocol its number of trials does
TRAINED_OUT = 5         # per cent of training error, or points above `independent`: the regime of a reduced DenseNet
T_QUANTILE = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216)    # 97.5 %, df 1 to 9

# --- Statistics, and how they decide -------------------------------------------------------------


def interval(values):
    """Mean, and the ends of its 95 % interval by a t-test; infinite for a single value."""
    mean, error = mean_and_error(values)
    half = T_QUANTILE[min(len(values) - 1, len(T_QUANTILE)) - 1] * error if len(values) > 1 else math.inf
    return float(mean), float(mean - half), float(mean + half)


@dataclass
class Part:
    """What a claim is made of: a value for each trial. `tested` sets what the last line has."""
    what: str
    values: dict                                                # trial -> number, or truth
    lacking: str = field(default="", kw_only=True)              # why runs that are there may have no value
    whole_grid: bool = field(default=False, kw_only=True)       # does it need all lambdas?
    scope, reason, needed, configurations = NO_EVIDENCE, "no run", TRIALS, {}

    @property
    def n(self):
        return len(self.values)


@dataclass
class Statistic(Part):
    """A number for each trial that the claim puts above or below a margin ("at least", "at most": or at it)."""
    relation: str                   # > | < | at least | at most
    margin: float = 0
    unit: str = " points"
    enough: float = math.inf        # a mean above this meets it as well: for rows that tie in the paper
    whose: str = ""                 # whose margin it is: by default an order is the paper's, a size ours

    def __post_init__(self):
        self.values = {trial: round(value, 9) for trial, value in self.values.items()}     # counts that tie, tie
        self.mean, self.low, self.high = interval(list(self.values.values())) if self.values else [math.nan] * 3
        self.as_claimed = self.beyond(self.mean)            # (nan is not)
        self.cells = [f"{self.mean:.2f}{self.unit}" if self.n else "",
                      f"{self.low:.2f} to {self.high:.2f}" if self.n > 1 else ""]
        self.asked = (f"{self.relation} {self.margin:g} ({self.whose or ('ours' if self.margin else 'the paper')})"
                      + f", or a mean above {self.enough:g} (ours)" * (self.enough < math.inf))

    def beyond(self, number):
        return {">": number > self.margin, "<": number < self.margin,
                "at least": number >= self.margin, "at most": number <= self.margin}[self.relation]

    @property
    def outcome(self):
        if self.n < self.needed:
            return OPEN
        if (self.beyond(self.low) and self.beyond(self.high)) or self.mean > self.enough:
            return MET
        other_side = self.high < self.margin if self.relation in (">", "at least") else self.low > self.margin
        return REFUSED if other_side else OPEN


@dataclass
class InEveryTrial(Part):
    """A statement on every trial: one miss refutes it, and all hits must be more than chance."""
    chance: float                   # of a hit

    def __post_init__(self):
        self.as_claimed = self.n > 0 and all(self.values.values())
        self.cells = [f"{sum(self.values.values())} of {self.n}" if self.n else "", ""]
        self.asked = f"all, by chance {self.chance:.2f} each ({DOMINANCE})"

    @property
    def outcome(self):
        if self.n < self.needed or (self.as_claimed and self.chance ** self.n >= 0.05):
            return OPEN
        return MET if self.as_claimed else REFUSED


# --- What is read from the runs ------------------------------------------------------------------


def paired(one, other, of=lambda x, y: x - y):
    """{trial: of(x, y)} for the trials that two methods share: x - y unless said otherwise."""
    return {trial: of(one[trial], other[trial]) for trial in sorted(one.keys() & other.keys())}


BEST = {        # the lambdas among which validation error chooses one
    "the best λ": lambda lam: True, "the best λ below 1": lambda lam: lam < 1,
    "the best λ above 0": lambda lam: lam > 0, "the best λ between the extremes": lambda lam: 0 < lam < 1}


class Numbers:
    """Numbers by trial, from finished runs; diverged runs have none. A key is "CONFIGURATION METHOD"."""

    def __init__(self, runs):
        self.runs, self.experiment, self.lambdas = runs, {}, {}             # by configuration
        for experiment, block in runs.block.items():
            for name, c in block["configurations"].items():
                self.experiment[name], self.lambdas[name] = experiment, c["lambdas"]

    def result(self, key, what):
        configuration, method = key.split()
        found = self.runs.runs(self.experiment[configuration], configuration, method)
        return {record["trial"]: record["result"][what] for record, _ in found
                if not diverged(record) and what in record["result"]}

    def error(self, key):
        """{trial: test error in per cent} of a method, or at a lambda of BEST, which each trial chooses."""
        configuration, method = key.split(" ", 1)
        if method not in BEST:
            return {trial: 100 * error for trial, error in self.result(key, "test_ensemble_error").items()}
        chosen = self.best_lambda(configuration, method)
        at = {lam: self.error(f"{configuration} {joint(lam)}") for lam in set(chosen.values())}
        return {trial: at[lam][trial] for trial, lam in chosen.items()}

    def best_lambda(self, configuration, among="the best λ"):
        """{trial: the lambda of lowest validation error}, of trials that have all the lambdas of BEST[among]."""
        lambdas = [lam for lam in self.lambdas[configuration] if BEST[among](lam)]
        errors = {lam: self.result(f"{configuration} {joint(lam)}", "validation_error") for lam in lambdas}
        trials = set.intersection(*map(set, errors.values())) if errors else set()
        return {trial: min(lambdas, key=lambda lam: errors[lam][trial]) for trial in sorted(trials)}

    def minus(self, one, other, relation, margin=0, enough=math.inf, whose=""):
        """The test error of one key minus that of another, as a Statistic."""
        names = [key.replace("joint-", "λ = ").replace("1x1024H λ = 1", "1x1024H") for key in (one, other)]
        what = f"{names[0]} minus {names[1].removeprefix(one.split()[0] + ' ')}"
        return Statistic(what, paired(self.error(one), self.error(other)), relation, margin, enough=enough,
                         whose=whose, whole_grid="the best λ" in what)

    def dropped(self, configuration, lam, share):
        """{trial: test error in per cent with a share of the members dropped}"""
        found = self.runs.histories(f"robustness-{self.runs.drop}", configuration, joint(lam))
        errors = {record["trial"]: 100 * history["error"].mean(0) for record, history in found}
        return {trial: e[round(share * len(e))] for trial, e in errors.items()}

    def rise(self, configuration, lam, share=0.5):
        return paired(self.dropped(configuration, lam, share), self.dropped(configuration, lam, 0))

    def dominances(self, configuration, lam, over=0):
        """{trial: the row of `finished.dominance`} of the joint runs of over so many epochs at one lambda."""
        rows = self.runs.dominances(self.experiment[configuration], configuration, lam)
        return {row["trial"]: row for row in rows if row["epochs"] > over}

    def moved_members(self, configuration, lam):
        """{trial: share of the members whose first layer moved at least half as far from its start as the farthest}"""
        shares = {}
        for record, folder in self.runs.runs(CONVNET, configuration, joint(lam)):
            if not diverged(record) and (folder / "weights.pt").exists():
                _, moved = first_layer(folder, record)
                shares[record["trial"]] = (moved >= moved.max() / 2).double().mean().item()
        return shares


# --- The empirical claims: statistic and margin --------------------------------------------------

SINGLE, TINY = "1x1024H joint-1", "256x4H"
LOWEST = {"DN-Low": "joint-0.5", "DN-Mid": "joint-0", "DN-High": "joint-0"}         # rows of the paper's Table 2
ROWS = ("joint-0", "joint-0.5", "joint-0.9", "joint-1", "bagging", "stacking")      # all of them

DIFFERENCES = {         # claims of Numbers.minus alone, and its arguments
    "C1": [(f"{TINY} joint-0", SINGLE, ">")],
    "C3": [(f"{TINY} {method}", SINGLE, ">") for method in ("bagging", "stacking")],
    "C5": [(f"{TINY} joint-1", f"{TINY} the best λ below 1", ">")],
    "C6": [(f"{name} joint-1", f"{name} joint-0", ">") for name in LOWEST],
    "C7": [(f"{name} {row}", f"{name} {lowest}", ">", 0, 0.5)
           for name, lowest in LOWEST.items() for row in ROWS if row != lowest],
    "C21": [*((f"{name} joint-0", f"{name} the best λ above 0", ">") for name in (TINY, "64x16H")),
            *((f"{name} the best λ above 0", SINGLE, "<", 0.5) for name in (TINY, "64x16H", "16x64H"))],
    "C23": [(f"ConvNet-1.20M {end}", "ConvNet-1.20M the best λ between the extremes", ">")
            for end in ("joint-0", "joint-1")],
    "C24": [*((f"{name} {row}", f"{name} bagging", "<") for name in LOWEST for row in ROWS if row != "bagging"),
            *((f"{name} stacking", f"{name} joint-0", ">") for name in LOWEST)],
    "X1": [(f"{name} joint-1", f"{name} independent", ">", 0, math.inf, "not the paper's") for name in LOWEST]}


def c2(x):
    for method in ("bagging", "stacking", "joint-0", "joint-1"):
        single = list(x.error(SINGLE).values())
        level = np.mean(single) if single else math.nan
        one, best = ({trial: abs(error - level) for trial, error in x.error(f"{TINY} {way}").items()}
                     for way in (method, "joint-0.95"))
        yield Statistic(f"distance to 1x1024H: {TINY} {method.replace('joint-', 'λ = ')} minus λ = 0.95",
                        paired(one, best) if single else {}, ">")
    yield x.minus(f"{TINY} joint-1", SINGLE, "<", 2)


def c4(x):
    def span(name):
        return paired(x.error(f"{name} joint-0"), x.error(f"{name} joint-1"), lambda one, other: abs(one - other))

    for one, other in ((TINY, "64x16H"), ("64x16H", "16x64H")):
        yield Statistic(f"difference between λ = 0 and 1: {one} minus {other}", paired(span(one), span(other)), ">")
    yield Statistic("difference between λ = 0 and 1: 16x64H", span("16x64H"), "<", 1)


def tau(values):
    """Kendall's tau-a between the order of a list and its values; 0 if all are equal."""
    pairs = list(itertools.combinations(values, 2))
    return sum(int(np.sign(later - earlier)) for earlier, later in pairs) / len(pairs)


def c8(x):
    names = list(x.runs.published["table4"]["rows"])                # from small to large
    best = [x.best_lambda(name) for name in names]
    yield Statistic("rank correlation of capacity and best λ", {
        trial: tau([one[trial] for one in best]) for trial in set.intersection(*map(set, best))}, "<", 0, "",
        whole_grid=True)
    yield x.minus(f"{names[0]} joint-1", f"{names[0]} the best λ below 1", "<", 0.5)


def ahead(row):
    """By how many points one member dominates: above 0 if within 5 points of the ensemble and 20 ahead of others."""
    return min(min(5 - (row[f"{part}_best_member_error"] - row[f"{part}_ensemble_error"]),
                   row[f"{part}_second_best_member_error"] - row[f"{part}_best_member_error"] - 20)
               for part in ("train", "test"))


def c9(x):
    for name in ("DN-High", TINY):
        for lam in x.lambdas[name]:
            values = {trial: ahead(row) for trial, row in x.dominances(name, lam).items()}
            relation = ">" if name == "DN-High" and lam == 1 else "<"
            yield Statistic(f"{name} λ = {lam:g}: dominance of one member", values, relation, whose=DOMINANCE,
                            whole_grid=True, lacking="one member")


def c10(x):
    high = x.dominances("DN-High", 1, over=EARLY)
    members = max((record["settings"]["members"] for record in x.runs.used.values()), default=4)    # (the paper's)
    lacking = f"at most {EARLY} epochs" if members > 1 else "one member"
    yield InEveryTrial("DN-High λ = 1: the best member after epoch 3 is the best at the end, and dominates", {
        trial: row["same"] and ahead(row) > 0 for trial, row in high.items()}, 1 / members, lacking=lacking)
    high, tiny = ({trial: row["gap_at_epoch_3"] for trial, row in x.dominances(name, 1, over=EARLY).items()}
                  for name in ("DN-High", TINY))
    yield Statistic("λ = 1, gap between the two best members after epoch 3: DN-High minus 256x4H",
                    paired(high, tiny), ">", lacking=lacking)


def c11(x):
    for lam, relation, share in ((1, "at most", round(1 / 3, 9)), (0, "at least", 1)):
        yield Statistic(f"λ = {lam}: share of the members whose first layer moved",
                        x.moved_members("10xConvNet-0.29M", lam), relation, share, "", lacking="weights were not kept")


def all_members(x, name):
    yield Statistic(f"{name}, all members: λ = 0.99 minus λ = 1",
                    paired(x.dropped(name, 0.99, 0), x.dropped(name, 1, 0)), "<", 0.5)
    for lam in (0, 0.99):
        yield Statistic(f"{name} λ = {lam}: rise with half dropped", x.rise(name, lam), "<", 1)


def c12(x):
    yield from all_members(x, TINY)
    yield Statistic(f"{TINY} λ = 1: rise with half dropped", x.rise(TINY, 1), ">", 5)
    yield Statistic(f"{TINY} λ = 0.99: rise with 60 % dropped", x.rise(TINY, 0.99, 0.6), "<", 1)


def c13(x):
    def benefit(name):
        return paired(x.dropped(name, 0, 0), x.dropped(name, 0.99, 0))

    yield from all_members(x, "64x16H")
    yield Statistic("64x16H, rise with half dropped: λ = 1 minus λ = 0.99",
                    paired(x.rise("64x16H", 1), x.rise("64x16H", 0.99)), ">")
    yield Statistic("λ = 0 minus λ = 0.99, all members: 64x16H", benefit("64x16H"), ">")
    yield Statistic("λ = 0 minus λ = 0.99, all members: 64x16H minus 256x4H",
                    paired(benefit("64x16H"), benefit(TINY)), "<")


def c14(x):
    def losses(of_whom):
        return (x.result(f"64x16H joint-{lam}", f"test_{of_whom}_loss") for lam in (1, 0.9))

    yield Statistic("64x16H, mean member loss: λ = 1 over λ = 0.9", paired(
        *losses("mean_member"), lambda one, other: one / other), "at least", 2, "")
    yield Statistic("64x16H, ensemble loss: change from λ = 0.9 to 1, over that at 0.9", paired(
        *losses("ensemble"), lambda one, other: abs(one - other) / other), "<", 0.5, "")


def c22(x):
    def gain(name):
        return paired(x.error(f"{name} joint-0"), x.error(f"{name} joint-1"))

    for name, relation in ((TINY, ">"), ("ConvNet-0.07M", ">"), ("DN-High", "<")):
        yield x.minus(f"{name} joint-0", f"{name} joint-1", relation)
    yield Statistic("λ = 0 minus λ = 1: ConvNet-1.20M minus ConvNet-0.07M",
                    paired(gain("ConvNet-1.20M"), gain("ConvNet-0.07M")), "<")


FUNCTIONS = {function.__name__.upper(): function for function in (c2, c4, c8, c9, c10, c11, c12, c13, c14, c22)}
EMPIRICAL = [f"C{i}" for i in (*range(1, 15), *range(21, 25))]
EXPLORATORY = {"X1": {"where": "not in the paper", "figure": "table2",
                      "claim": "end-to-end is worse than members that train alone, at their own full rate"}}
IDENTITIES = {**dict.fromkeys(("C15", "C16", "C17", "C18", "C19"), "verified"),     # if the test of that name passes
              **dict.fromkeys(("C20", "E1", "E2", "E3"), "erratum")}
IDENTITY_TESTS = "pytest tests/test_identities.py -v"

# --- Scope and outcome ---------------------------------------------------------------------------


def scope_of(part, runs):
    """(scope, reason) of a statistic, from the runs that were asked for since runs.begin()."""
    used = list(runs.used.values())
    if not used:
        return NO_EVIDENCE, "no run"
    for record in used:
        s, paper = trained(record), runs.paper[trained_in(record["experiment"])]
        if s["data"]["source"] != "real" or s["dataset"] != paper["dataset"]:
            return NO_EVIDENCE, "stand-in data" if s["data"]["source"] == "synthetic" else "other data"
    if runs.at_chance():
        return NO_EVIDENCE, "at chance"
    if not part.n:
        if any(map(diverged, used)):
            return NO_EVIDENCE, "diverged"
        if not all(runs.asked.values()):
            return NO_EVIDENCE, SOME_MISSING
        return NO_EVIDENCE, part.lacking or ("incomplete grid of λ" if part.whole_grid else SOME_MISSING)
    exact = runs.at_protocol()
    if part.whole_grid:
        mine, theirs = ([blocks[trained_in(r["experiment"])]["configurations"][r["configuration"]]["lambdas"]
                         for r in used] for blocks in (runs.block, runs.paper))
        exact &= mine == theirs
    if exact:
        return PROTOCOL, ""
    for name in sorted({record["configuration"] for record in used if record["experiment"] == DENSENET}):
        if reason := not_trained_out(runs, name):
            return NO_EVIDENCE, reason
    return REDUCED, ""


def not_trained_out(runs, name):
    """Why a reduced study of a DenseNet does not ask the paper's question, of members over capacity; "" if it does.

    Members must fit their training data alone: at lambda 0, over the last epoch, their mean training error is below
    5 %, or at most 5 points above that of `independent` of the same trial, whose members have their full rate.
    """
    runs = copy.copy(runs)
    runs.begin()                    # a statistic is not made of what is read here
    alone, full_rate = ({record["trial"]: round(100 * float(history["train_member_error"][-1].mean()), 4)
                         for record, history in runs.histories(DENSENET, name, method)}
                        for method in ("joint-0", "independent"))
    if not alone:
        return "no run at λ = 0"
    trained_out = all(error < TRAINED_OUT or error <= full_rate.get(trial, -math.inf) + TRAINED_OUT
                      for trial, error in alone.items())
    return "" if trained_out else "members not trained out"


@dataclass
class Claim:
    """A claim of paper.yaml, or X1, and what became of it."""
    name: str
    text: dict            # claim, where, and if there is one: figure, reading
    parts: list
    scope: str
    outcome: str


def judge(runs, name):
    """One claim of paper.yaml, or X1, against the finished runs."""
    text, x = EXPLORATORY.get(name) or runs.published["claims"][name], Numbers(runs)
    if name in DIFFERENCES:
        parts = tested((x.minus(*difference) for difference in DIFFERENCES[name]), runs)
    elif name in FUNCTIONS:
        parts = tested(FUNCTIONS[name](x), runs)
    else:
        outcome = f"{IDENTITIES[name]} if test {name} passes" if name in IDENTITIES else "note"
        return Claim(name, text, [], IDENTITY, outcome)
    return Claim(name, text, parts, *((EXPLORED, "counts nowhere") if name in EXPLORATORY else verdict(parts)))


def tested(statistics, runs):
    """The statistics of a claim as a list, each with its scope, from the runs that it has asked for."""
    parts = []
    runs.begin()
    for part in statistics:
        part.scope, part.reason = scope_of(part, runs)
        part.configurations = runs.asked
        if part.scope == PROTOCOL:
            paper = (runs.paper[trained_in(r["experiment"])]["configurations"] for r in runs.used.values())
            part.needed = min(c["trials"] for configurations in paper for c in configurations.values())
        parts.append(part)
        runs.begin()
    return parts


def verdict(parts):
    """(scope, outcome) of a claim: the lowest scope of its statistics; met if all are, refused if one is."""
    scope = next(one for one in (NO_EVIDENCE, REDUCED, PROTOCOL) if one in {part.scope for part in parts})
    if scope == NO_EVIDENCE:
        return scope, f"not tested: {why_not_tested(parts)}"
    if scope == REDUCED:
        for part in parts:
            part.needed = TRIALS
    yes, no, undecided = WORDS[scope]
    short = min(parts, key=lambda part: part.n - part.needed)
    if short.n < short.needed:
        of = f" of {short.needed}" if scope == PROTOCOL else ""
        seen = "as claimed" if all(part.as_claimed for part in parts) else "not as claimed"
        return scope, f"{undecided} (n = {short.n}{of}, {seen})"
    outcomes = {part.outcome for part in parts}
    return scope, no if REFUSED in outcomes else yes if outcomes == {MET} else undecided


def why_not_tested(parts):
    """The first reason that says more than that there is no run; else how many configurations have runs."""
    for part in parts:
        if part.scope == NO_EVIDENCE and part.reason != "no run":
            return part.reason
    asked = {name for part in parts for name in part.configurations}
    with_runs = {name for part in parts for name, there in part.configurations.items() if there}
    if with_runs and with_runs < asked:
        return f"{len(with_runs)} of {len(asked)} configurations {'has' if len(with_runs) == 1 else 'have'} runs"
    return SOME_MISSING if with_runs else "no run"


# --- What is said --------------------------------------------------------------------------------


def headline(claims):
    """The counts in one sentence: only the paper's protocol speaks of the paper."""
    empirical = [claim for claim in claims if claim.name in EMPIRICAL]
    outcomes = [claim.outcome for claim in empirical if claim.scope == PROTOCOL]
    yes, no = outcomes.count("reproduced"), outcomes.count("not reproduced")
    trend = sum(claim.outcome == "trend seen" for claim in empirical)
    return (f"{len(outcomes)} of {len(empirical)} empirical claims tested at the paper's protocol: {yes} reproduced, "
            f"{no} not, {len(outcomes) - yes - no} inconclusive; of the others, {trend} with a trend at reduced size")


def print_claims(claims):
    for scope, title in ((PROTOCOL, "at the paper's protocol"), (REDUCED, "reduced runs suggest"),
                         (NO_EVIDENCE, "not tested"), (IDENTITY, f"identities and errata, by `{IDENTITY_TESTS}`"),
                         (EXPLORED, "exploratory, counts nowhere")):
        if some := [claim for claim in claims if claim.scope == scope]:
            print(f"\n{title}:")
        for claim in some:
            print(f"  {claim.name:<4} {claim.outcome.removeprefix('not tested: '):<41} {claim.text['claim']}")
            for part in claim.parts if scope == EXPLORED else []:
                print(f"         {part.what}: {' '.join(part.cells) if part.n else part.reason}")
    print(f"\n{headline(claims)}")


def rows_of(claims):
    """Rows of claims.csv: one for each statistic, and one for a claim without any."""
    for claim in claims:
        row = {"claim": claim.name, "where": claim.text["where"], "scope": claim.scope, "outcome": claim.outcome}
        for part in claim.parts:
            mean, between = part.cells
            yield row | {"statistic": part.what, "mean": mean, "interval_95": between, "n": part.n or "",
                         "claimed": part.asked, "decides": part.outcome, "statistic_scope": part.scope,
                         "reason": part.reason}
        if not claim.parts:
            yield row
