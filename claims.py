"""Does the paper hold? Its claims, held one by one against the runs at hand, and a report.

    python claims.py                         # figures/PRESET/report.html, and report.md

Draws every figure and table as make_figures.py does, and trains nothing.

A claim is made of a few statistics, each with a margin, all fixed beforehand. A statistic is
computed for every trial, paired where two are compared (trials share their split, and within a
configuration their initial weights), and decided by the 95 % interval of a t-test over at least
three trials: it holds, or it does not, if the interval lies on one side of the margin; else it is
undecided. What is claimed of every trial (C10) falls with one miss, and holds if so many hits are
unlikely by chance. Fewer trials than three never decide. A claim does not hold if one of its
statistics does not; it holds if all do. What was measured on stand-in data or on reduced runs says
so.
"""

import base64
import collections
import datetime
import functools
import html
import itertools
import math
import re
import sys
from dataclasses import dataclass

import common
import make_figures

import numpy as np
import torch
from torch.nn import functional as F

HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "undecided", "not run"
TRIALS = 3      # that decide; fewer never do

# --- How a statistic decides -------------------------------------------------------------


@functools.cache
def t_quantile(degrees):
    """The 97.5 % quantile of Student's t, by integration of its density."""
    x = np.linspace(0, 50, 500_001)
    scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    density = math.exp(scale) / math.sqrt(degrees * math.pi) * (1 + x * x / degrees) ** (
        -(degrees + 1) / 2)
    area = np.cumsum((density[1:] + density[:-1]) / 2 * (x[1] - x[0]))
    return float(x[1 + area.searchsorted(0.475)])


def interval(values):
    """Mean, and the ends of its 95 % interval by a t-test; they are infinite for a single value."""
    mean, error = make_figures.mean_and_error(values)
    half = t_quantile(len(values) - 1) * error if len(values) > 1 else math.inf
    return float(mean), float(mean - half), float(mean + half)


@dataclass
class Statistic:
    """A number of every trial, which is to lie above or below a margin (or "at least", "at most").
    """
    what: str
    values: dict          # trial -> number
    relation: str         # > | < | at least | at most
    margin: float = 0
    unit: str = " points"

    def beyond(self, number):
        return {">": number > self.margin, "<": number < self.margin,
                "at least": number >= self.margin, "at most": number <= self.margin}[self.relation]

    @property
    def verdict(self):
        if not self.values:
            return NOT_RUN
        if len(self.values) < TRIALS:
            return UNDECIDED
        _, *ends = interval(list(self.values.values()))
        return {2: HOLDS, 1: UNDECIDED, 0: FAILS}[sum(map(self.beyond, ends))]

    @property
    def cells(self):
        """What, the mean, its interval, n, what is claimed, and the verdict, as text."""
        asked, n, verdict = f"{self.relation} {self.margin:g}", len(self.values), self.verdict
        if not n:
            return [self.what, "", "", "0", asked, verdict]
        mean, low, high = interval(list(self.values.values()))
        if n < TRIALS:
            verdict += ", seen as claimed" if self.beyond(mean) else ", seen otherwise"
        return [self.what, f"{mean:.2f}{self.unit}", f"{low:.2f} to {high:.2f}" if n > 1 else "",
                str(n), asked, verdict]


@dataclass
class InEveryTrial:
    """What is claimed of every trial: one miss refutes it, and hits must be more than chance."""
    what: str
    hits: dict            # trial -> bool
    chance: float         # of a hit

    @property
    def verdict(self):
        if not self.hits:
            return NOT_RUN
        if len(self.hits) < TRIALS:
            return UNDECIDED
        if not all(self.hits.values()):
            return FAILS
        return HOLDS if self.chance ** len(self.hits) < 0.05 else UNDECIDED

    @property
    def cells(self):
        return [self.what, of(self.hits.values()), "", str(len(self.hits)),
                f"all; by chance {self.chance:.2f} each", self.verdict]


@dataclass
class Exact:
    """What can be computed: a deviation, and the most that rounding leaves."""
    what: str
    deviation: float
    most: float

    @property
    def verdict(self):
        return HOLDS if self.deviation <= self.most else FAILS      # (nan does not hold)

    @property
    def cells(self):
        return [self.what, f"{self.deviation:.1e}", "", "", f"at most {self.most:g}",
                self.verdict]


def combined(parts):
    """The verdict of a claim on its statistics: false if one is, and true only if all are."""
    verdicts = {part.verdict for part in parts}
    return next(v for v in (FAILS, NOT_RUN, UNDECIDED, HOLDS) if v in verdicts)


def both(one, other, of=lambda x, y: x - y):
    """{trial: of(x, y)} of the trials that two methods share: x - y unless said otherwise."""
    return {trial: of(one[trial], other[trial]) for trial in one.keys() & other.keys()}


# --- What is read from the runs ----------------------------------------------------------------

MLP, DENSENET, CONVNET = "mlp_fmnist", "densenet_cifar", "convnet_cifar"


class Runs:
    """Numbers by trial, from the runs of a `make_figures.Study`; diverged runs have none."""

    def __init__(self, study):
        self.study = study

    def result(self, experiment, configuration, method, key):
        return {record["trial"]: record["result"][key] for record, _ in self.study.runs(
            experiment, configuration, method) if record["result"]["diverged_at_epoch"] is None}

    def error(self, experiment, configuration, method):
        """{trial: test error of the ensemble in per cent}"""
        errors = self.result(experiment, configuration, method, "test_ensemble_error")
        return {trial: 100 * error for trial, error in errors.items()}

    def over_lambdas(self, experiment, configuration, error="test_ensemble_error"):
        """{trial: {lambda: error in per cent}}, of the trials that have every planned lambda."""
        planned = self.study.block(experiment)["configurations"][configuration]["lambdas"]
        found = collections.defaultdict(dict)
        for lam in planned:
            for trial, value in self.result(experiment, configuration, joint(lam), error).items():
                found[trial][lam] = 100 * value
        return {trial: errors for trial, errors in found.items() if len(errors) == len(planned)}

    def best_lambda(self, experiment, configuration):
        """{trial: the lambda of the lowest validation error}"""
        validation = self.over_lambdas(experiment, configuration, "validation_error")
        return {trial: min(errors, key=errors.get) for trial, errors in validation.items()}

    def at_best(self, experiment, configuration):
        """{trial: test error at the lambda of the lowest validation error}"""
        errors = self.over_lambdas(experiment, configuration)
        return both(self.best_lambda(experiment, configuration), errors, lambda lam, e: e[lam])

    def dropped(self, configuration, method):
        """{trial: (test error with all members, with half of them)} in per cent."""
        found = self.study.runs(f"robustness-{self.study.drop}", configuration, method)
        errors = {record["trial"]: 100 * common.load_history(folder)["error"].mean(0)
                  for record, folder in found}
        return {trial: (e[0], e[len(e) // 2]) for trial, e in errors.items()}

    def dominance(self, experiment, configuration, lam):
        """{trial: `make_figures.dominance`} of the joint runs at one lambda."""
        return {record["trial"]: make_figures.dominance(record, history) for record, history in
                self.study.histories(experiment, configuration, joint(lam))}

    def strong_members(self, configuration, lam):
        """{trial: (members with a first-layer norm of at least half the largest, members)}"""
        counts = {}
        for record, folder in self.study.runs(CONVNET, configuration, joint(lam)):
            if record["result"]["diverged_at_epoch"] is None:
                norms = make_figures.first_layer(folder, record).flatten(1).norm(dim=1)
                counts[record["trial"]] = (int((norms >= norms.max() / 2).sum()), len(norms))
        return counts


def joint(lam):
    return f"joint-{common.lambda_name(lam)}"


# --- The claims, and the statistic and margin that decide each ----------------------------------

def less(runs, experiment, one, other, relation=">", margin=0):
    """The statistic: test error of one (configuration, method) less that of another."""
    def name(configuration, method):
        alone = (configuration, method) == SINGLE
        return configuration if alone else f"{configuration} {method.replace('joint-', 'λ = ')}"
    return Statistic(f"{name(*one)} less {name(*other)}",
                     both(*(runs.error(experiment, *which) for which in (one, other))), relation,
                     margin)


SINGLE, TINY = ("1x1024H", "joint-1"), "256x4H"


def c1(runs):
    yield less(runs, MLP, (TINY, "joint-0"), SINGLE)


def c2(runs):
    for method in ("bagging", "stacking", "joint-0", "joint-1"):
        yield less(runs, MLP, (TINY, method), (TINY, "joint-0.95"))
    yield less(runs, MLP, (TINY, "joint-1"), SINGLE, "<", 2)


def c3(runs):
    for method in ("bagging", "stacking"):
        yield less(runs, MLP, (TINY, method), SINGLE)


def c4(runs):
    ranges = {name: {trial: max(e.values()) - min(e.values())
                     for trial, e in runs.over_lambdas(MLP, name).items()}
              for name in (TINY, "64x16H", "16x64H")}
    for one, other in ((TINY, "64x16H"), ("64x16H", "16x64H")):
        yield Statistic(f"range over λ of {one} less that of {other}",
                        both(ranges[one], ranges[other]), ">")
    yield Statistic("range over λ of 16x64H", ranges["16x64H"], "<", 1)


def c5(runs):
    yield Statistic("best λ of 256x4H", runs.best_lambda(MLP, TINY), "<", 1, "")
    yield Statistic("256x4H λ = 1 less the best λ", both(runs.error(MLP, TINY, "joint-1"),
                                                         runs.at_best(MLP, TINY)), ">")


def c6(runs):
    for name in runs.study.published["table2"]["test_error_percent"]:
        yield less(runs, DENSENET, (name, "joint-1"), (name, "joint-0"))


def c7(runs):
    for name, printed in runs.study.published["table2"]["test_error_percent"].items():
        best = min(printed, key=printed.get)
        for other in printed:
            if other != best:
                yield less(runs, DENSENET, (name, other), (name, best))


def c8(runs):
    names = list(runs.study.published["table4"]["rows"])            # from small to large
    best = {name: runs.best_lambda(CONVNET, name) for name in names}
    for small, large in itertools.pairwise(names):
        yield Statistic(f"best λ of {small} less that of {large}", both(best[small], best[large]),
                        "at least", 0, "")
    yield Statistic(f"best λ of {names[0]} less that of {names[-1]}",
                    both(best[names[0]], best[names[-1]]), ">", 0, "")
    yield Statistic(f"best λ of {names[-1]}", best[names[-1]], ">", 0, "")
    yield Statistic(f"best λ of {names[-1]}", best[names[-1]], "<", 1, "")


def ahead(row):
    """By how many points one member dominates (`make_figures.dominance`): above 0 if it does.

    Its error is within 5 points of the ensemble's, and the second best member's at least 20 points
    worse, in training and in test.
    """
    return min(min(5 - (row[f"{part}_best_member_error"] - row[f"{part}_ensemble_error"]),
                   row[f"{part}_second_best_member_error"] - row[f"{part}_best_member_error"] - 20)
               for part in ("train", "test"))


def c9(runs):
    for experiment, name in ((DENSENET, "DN-High"), (MLP, TINY)):
        for lam in runs.study.block(experiment)["configurations"][name]["lambdas"]:
            claimed = experiment == DENSENET and lam == 1
            yield Statistic(f"{name} λ = {common.lambda_name(lam)}: one member ahead by more than "
                            "dominance asks", {trial: ahead(row) for trial, row in runs.dominance(
                                experiment, name, lam).items()}, ">" if claimed else "<")


def c10(runs):
    for name, block in runs.study.block(DENSENET)["configurations"].items():
        yield InEveryTrial(f"{name}: the best member after epoch 3 is the best at the end", {
            trial: row["same"] for trial, row in runs.dominance(DENSENET, name, 1).items()
            if "same" in row}, 1 / block["members"])


def c11(runs):
    name = "10xConvNet-0.29M"
    weak = {trial: n - strong for trial, (strong, n) in runs.strong_members(name, 0).items()}
    yield Statistic("λ = 0: members with weak filters", weak, "at most", 0, "")
    strong = {trial: strong - n / 3 for trial, (strong, n) in runs.strong_members(name, 1).items()}
    yield Statistic("λ = 1: members with strong filters, less M/3", strong, "at most", 0, "")


def c12(runs):
    curves = {lam: runs.dropped(TINY, joint(lam)) for lam in (0, 0.99, 1)}
    whole = {lam: {trial: e[0] for trial, e in found.items()} for lam, found in curves.items()}
    yield Statistic("256x4H, all members: λ = 0.99 less λ = 1", both(whole[0.99], whole[1]), "<",
                    0.5)
    for lam, relation, margin in ((0.99, "<", 1), (0, "<", 1), (1, ">", 5)):
        yield Statistic(f"256x4H λ = {lam}: half dropped less all members",
                        {trial: half - every for trial, (every, half) in curves[lam].items()},
                        relation, margin)


def c13(runs):
    curves = {(name, lam): runs.dropped(name, joint(lam))
              for name in (TINY, "64x16H") for lam in (0, 0.99, 1)}
    half, whole = ({key: {trial: e[i] for trial, e in found.items()}
                    for key, found in curves.items()} for i in (1, 0))
    for lam in (0, 1):
        yield Statistic(f"64x16H, half dropped: λ = {lam} less λ = 0.99",
                        both(half["64x16H", lam], half["64x16H", 0.99]), ">")
    benefit = {name: both(whole[name, 0], whole[name, 0.99]) for name in (TINY, "64x16H")}
    yield Statistic("λ = 0 less λ = 0.99, all members: 64x16H less 256x4H",
                    both(benefit["64x16H"], benefit[TINY]), "<")


def c14(runs):
    loss = {(key, lam): runs.result(MLP, "64x16H", joint(lam), f"test_{key}_loss")
            for key in ("mean_member", "ensemble") for lam in (0.9, 1)}
    yield Statistic("64x16H, mean member loss: λ = 1 over λ = 0.9", both(
        loss["mean_member", 1], loss["mean_member", 0.9], lambda x, y: x / y), "at least", 2, "")
    yield Statistic("64x16H, ensemble loss: change from λ = 0.9 to 1, over that at 0.9", both(
        loss["ensemble", 1], loss["ensemble", 0.9], lambda x, y: abs(x - y) / y), "<", 0.5, "")


def c21(runs):
    single = runs.error(MLP, *SINGLE)
    for name in (TINY, "64x16H", "16x64H"):
        yield Statistic(f"{name} at its best λ less 1x1024H", both(runs.at_best(MLP, name), single),
                        "<", 0.5)


# --- The claims that can be computed -------------------------------------------------------------

def example():
    """Member logits (N, M, K) in double precision, and targets (N,)."""
    g = torch.Generator().manual_seed(1)
    return (3 * torch.randn(7, 5, 4, generator=g, dtype=torch.double),
            torch.randint(4, (7,), generator=g))


def divergence(log_p, log_q):
    """D(p || q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def gradient(loss, at):
    """The gradient of a function of one tensor."""
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def farthest(one, other):
    return (one - other).abs().max().item()


def c15(_=None):
    z, y = example()
    log_q, log_q_bar = z.log_softmax(-1), z.mean(1, keepdim=True).log_softmax(-1)
    members = F.nll_loss(log_q.flatten(0, 1), y.repeat_interleave(z.shape[1]))      # p is one-hot
    for lam in (0, 0.3, 0.95, 1):
        eq5 = members - lam * divergence(log_q_bar, log_q).mean()
        yield Exact(f"λ = {lam}: Eq. 4 less Eq. 5",
                    abs((common.joint_loss(z, y, lam) - eq5).item()), 1e-12)


def eigenvalues(lam):
    """Those of the Hessian of Eq. 4 where four scalar (Bernoulli) outputs all predict y, ascending,
    and the largest entry of the gradient there: it is a stationary point."""
    y = 0.3
    eta = torch.logit(torch.tensor(y, dtype=torch.double)).repeat(4)
    targets = torch.tensor([[1 - y, y]], dtype=torch.double)

    def loss(eta):
        return common.joint_loss(torch.stack([torch.zeros_like(eta), eta], -1)[None], targets, lam)
    hessian = torch.autograd.functional.hessian(loss, eta)
    return torch.linalg.eigvalsh(hessian), gradient(loss, eta).abs().max().item()


def c16(_=None):
    for lam in (0.1, 0.5, 0.9, 0.99):
        values, slope = eigenvalues(lam)
        yield Exact(f"λ = {lam}: condition number times (1 - λ), less 1",
                    abs((values[-1] / values[0]).item() * (1 - lam) - 1) + slope, 1e-9)


def c17(_=None):
    z, y = example()
    members = range(z.shape[1])
    independent = gradient(lambda z: sum(F.cross_entropy(z[:, m], y) for m in members), z)
    for name, loss in (
            ("LL (Eq. 18)", lambda z: torch.stack([F.cross_entropy(z[:, m], y)
                                                   for m in members]).mean()),
            ("SM (Eq. 22)", lambda z: F.nll_loss(z.log_softmax(-1).mean(1), y)),
            ("Eq. 4 at λ = 0", lambda z: common.joint_loss(z, y, 0))):
        yield Exact(f"gradient of {name} less the independent one over M",
                    farthest(gradient(loss, z), independent / len(members)), 1e-14)


def c18(_=None):
    z, _ = example()
    central, log_q = z.mean(1), z.log_softmax(-1)

    def spread(z):                                                                  # Eq. 1
        return divergence(z.log_softmax(-1)[:, None], log_q).mean(1).sum()
    yield Exact("gradient of the mean divergence at the mean logits",
                gradient(spread, central).abs().max().item(), 1e-13)
    g = torch.Generator().manual_seed(3)
    for size in (1e-3, 0.1, 3):
        step = size * torch.randn(central.shape, generator=g, dtype=torch.double)
        yield Exact(f"divergence there less that after a step of {size:g} aside",
                    (spread(central) - spread(central + step)).item(), 0)


def c19(_=None):
    g = torch.Generator().manual_seed(2)
    f, y = (torch.randn(7, n, generator=g, dtype=torch.double) for n in (5, 1))
    for lam in (0, 0.3, 1):
        def eq4(f, lam=lam):                    # for Gaussians D(p || q) is half the squared error
            return (lam * (f.mean(1, keepdim=True) - y).square() / 2
                    + (1 - lam) * (f - y).square().mean(1, keepdim=True) / 2).sum()

        def ncl(f, lam=lam):        # Liu and Yao: each member's own loss, the ensemble held fixed
            apart = f - f.mean(1, keepdim=True).detach()
            others = (apart.sum(1, keepdim=True) - apart).detach()
            return ((f - y).square() / 2 + lam * apart * others).sum()
        yield Exact(f"λ = {lam}: gradient of M times Eq. 4, less that of their loss",
                    farthest(gradient(eq4, f) * f.shape[1], gradient(ncl, f)), 1e-13)


def c20(_=None):
    for lam in (1.01, 1.5, 3):
        values, slope = eigenvalues(lam)
        yield Exact(f"λ = {lam}: the smallest eigenvalue at a stationary point",
                    values[0].item() + slope, 0)
        yield Exact(f"λ = {lam}: the largest, with the sign changed", -values[-1].item() + slope, 0)


DECIDED_BY = {f"C{i}": function for i, function in enumerate(
    (c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15, c16, c17, c18, c19, c20,
     c21), 1)}


@dataclass
class Claim:
    """A claim of published.yaml, and what became of it."""
    name: str
    where: str
    claim: str
    parts: list
    verdict: str
    on: str               # what it was measured on, if that is not what the paper has


def judge(study, name):
    """One claim of published.yaml against the runs of a study."""
    study.begin()
    parts = list(DECIDED_BY[name](Runs(study)))
    verdict, printed = combined(parts), study.published["claims"][name]
    return Claim(name, printed["where"], printed["claim"], parts, verdict,
                 "" if verdict == NOT_RUN else measured_on(study))


def measured_on(study):
    """In words, how the runs in use differ from the paper's: in their data and in their size."""
    true_of = collections.Counter()
    for record in study.used.values():
        block = study.block(make_figures.trained_in(record["experiment"]), study.paper)
        theirs = block | block["configurations"].get(record["configuration"], {}) | {
            "repeats": study.paper["robustness"]["repeats"]}
        mine = record["settings"] | make_figures.trained(record)
        source, keys = mine["data"]["source"], mine.keys() & theirs.keys()
        true_of["on synthetic data"] += source == "synthetic"
        true_of["not on the paper's data"] += (source == "folder"
                                               or mine["dataset"] != theirs["dataset"])
        true_of["on reduced runs"] += any(mine[key] != theirs[key] for key in keys - {
            "lr", "precision", "bagging", "stacking", "dataset"})
    return ", ".join(words for words, count in true_of.items() if count)


# --- The numbers that the paper prints -----------------------------------------------------------

def titled(name):
    """fig2 -> Figure 2, table1 -> Table 1"""
    return f"{'Table' if name in make_figures.TABLES else 'Figure'} {name[-1]}"


def printed_numbers(study, made):
    """Rows [what, paper, here, difference, verdict] of every number that the paper prints."""
    runs, published = Runs(study), study.published
    study.begin()
    for experiment, figure in ((MLP, "fig2"), (DENSENET, "table2")):
        for configuration, methods in published[figure]["test_error_percent"].items():
            for method, theirs in methods.items():
                values = list(runs.error(experiment, configuration, method).values())
                what = (f"{titled(figure)}: {configuration} "
                        f"{method.replace('joint-', 'λ = ')}, test error (%)")
                yield [what, str(theirs), *compared(values, theirs, study)]
    for table in ("table1", "table4"):
        counts = {row["configuration"]: row["parameters"] for row in made[table].table.rows}
        for name, row in published[table]["rows"].items():
            theirs = row["parameters"]
            digits = len(theirs.rstrip("M").split(".")[1])
            yield [f"{titled(table)}: {name}, parameters", theirs, f"{counts[name]:,}", "",
                   "agrees" if f"{counts[name] / 1e6:.{digits}f}M" == theirs else "differs"]


def compared(values, theirs, study):
    """[here, difference, verdict] of a number over trials beside the one that is printed."""
    if not values:
        return ["not run", "", NOT_RUN]
    mean, low, high = interval(values)
    here = f"{mean:.1f}" + (f" [{low:.1f}, {high:.1f}]" if len(values) > 1 else "")
    if not study.real():
        return [f"{here}, n = {len(values)}", "", "not comparable: other data"]
    agrees = low - 0.05 <= theirs <= high + 0.05                    # it is printed to 0.1
    verdict = UNDECIDED if len(values) < TRIALS else "agrees" if agrees else "differs"
    return [f"{here}, n = {len(values)}", f"{mean - theirs:+.1f}", verdict]


# --- The diagnosis -----------------------------------------------------------------------

def diagnosis(study):
    """Rows of what the members' training errors after epoch 3 say of end-to-end training."""
    study.begin()
    runs = Runs(study)
    for experiment in (MLP, DENSENET, CONVNET):
        for name, block in study.block(experiment)["configurations"].items():
            if block["members"] == 1:
                continue
            found = {trial: row for trial, row in runs.dominance(experiment, name, 1).items()
                     if "same" in row}
            worse = both(runs.error(experiment, name, "joint-1"),
                         runs.error(experiment, name, "joint-0"), lambda x, y: x > y)
            flagged = {trial: row["gap_at_epoch_3"] >= common.DIAGNOSIS[1]
                       for trial, row in found.items()}
            right = [flagged[trial] == worse[trial] for trial in flagged.keys() & worse.keys()]
            if found:
                gap = np.mean([row["gap_at_epoch_3"] for row in found.values()])
                yield [name, str(len(found)), f"{gap:.1f}",
                       of(flagged.values()), of(row["same"] for row in found.values()),
                       f"{1 / block['members']:.2f}",
                       of(ahead(row) > 0 for row in found.values()), of(worse.values()), of(right)]


def of(values):
    """Truths counted: "2 of 3"."""
    values = list(values)
    return f"{sum(values)} of {len(values)}" if values else ""


# --- The report --------------------------------------------------------------------------

def table(columns, rows):
    """A Markdown table; a cell cannot hold a bar, a paragraph or nothing."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |"
                     for line in lines)


def report(study, claims, made):
    """The report as Markdown. `made` has a make_figures.Made for every figure and table."""
    now, here = datetime.datetime.now().astimezone(), common.machine(torch.device("cpu"))
    counts = collections.Counter(claim.verdict for claim in claims)
    yield f"# Does it hold? The reproduction's report, preset {study.name}"
    yield ("*To Ensemble or Not Ensemble: When does End-To-End Training Fail?* (Webb et al., "
           f"ECML-PKDD 2020), {now:%Y-%m-%d %H:%M}, from {study.results / study.name}. Of "
           f"{len(claims)} claims, {counts_in_words(counts)}.")
    yield "## Verdicts"
    yield table(["claim", "in the paper", "verdict"], [
        [f"**{c.name}** {c.claim}", c.where, f"{c.verdict}{', ' * bool(c.on)}{c.on}"]
        for c in claims])
    yield "## The evidence"
    yield __doc__.split("\n\n")[-1].replace("\n", " ").strip()
    yield table(["claim", "statistic", "mean", "95 % interval", "n", "claimed", "verdict"], [
        [f"**{c.name}**", *part.cells] for c in claims for part in c.parts])
    yield "Errors in per cent, differences in points; n counts trials."
    yield "## The numbers that the paper prints"
    yield table(["what", "paper", "here", "difference", "verdict"],
                list(printed_numbers(study, made)))
    yield ("A number agrees if it lies in the 95 % interval of ours (n of at least 3); a count, if "
           "ours rounds to it. A claim may hold where its numbers differ.")
    yield "## Figures and tables"
    for name, one in made.items():
        yield from figure_section(study, claims, name, one)
    yield "## The diagnosis"
    yield ("The paper says that the members' training errors in the first epochs tell whether an "
           f"ensemble is over capacity for end-to-end training. Told so here: at λ = 1, the "
           f"lowest and the second lowest after epoch 3 are at least {common.DIAGNOSIS[1]} points "
           "apart (`--diagnose` prints it while training). It is right if end-to-end then loses to "
           "independent training of the same trial, and otherwise does not.")
    rows = list(diagnosis(study))
    yield table(["configuration", "trials", "gap (points)", "told over capacity", "best member "
                 "after epoch 3 is best at the end", "by chance", "one dominates at the end",
                 "end-to-end worse than independent", "diagnosis right"], rows) if rows else (
        "No run at λ = 1 of more than two epochs is there.")
    readme = (common.HERE / "README.md").read_text()
    yield "## Deviations and open questions"
    yield from re.search(r"\n## Open questions\n+(.*?)\n+## ", readme, re.S)[1].split("\n\n")
    yield "## Made with"
    packages = ", ".join(f"{name} {here[name]}" for name in ("torch", "torchvision", "numpy"))
    yield (f"Python {here['python']}, {packages}; code of commit {here['commit']}. The versions of "
           "every run are in its run.json and in runs.csv.")


def counts_in_words(counts):
    words = {HOLDS: "hold", FAILS: "do not hold", UNDECIDED: "are undecided",
             NOT_RUN: "were not run"}
    return ", ".join(f"{counts[verdict]} {words[verdict]}" for verdict in words if counts[verdict])


def figure_section(study, claims, name, one):
    """A figure or table, what it shows, and what it was made from."""
    yield f"### {titled(name)}"
    told = [c for c in claims if study.published["claims"][c.name].get("figure") == name]
    for claim in told:
        yield f"**{claim.name}: {claim.verdict}{', ' * bool(claim.on)}{claim.on}.** {claim.claim}"
    if one.state == "NOT DRAWN":
        yield "Not drawn: none of its runs is there."
    elif one.table:
        yield table(one.table.columns, one.table.cells)
        yield from one.table.notes
    else:
        seen = " ".join(f"{c.name}, {c.verdict}: " + "; ".join(
            f"{what} {mean}" for what, mean, *_ in (part.cells for part in c.parts)) + "."
            for c in told)
        about = " ".join(make_figures.FIGURES[name].__doc__.split())
        yield f"![{about} {seen} The numbers are in {name}.csv.]({name}.png)"
    if one.used:
        minutes = sum(record["seconds"] for record in one.used.values()) / 60
        yield (f"{len(one.used)} runs of {minutes:.1f} minutes in all"
               + (f"; {len(one.missing)} are missing" if one.missing else "") + ". "
               + " ".join(f"{line}." for line in one.provenance.split("\n")))
    runs = [(r["experiment"], r["configuration"], joint(r["lambda"]) if r["method"] == "joint" else
             r["method"], r["trial"]) for r in one.used.values()]
    commands = [*study.commands([*runs, *one.missing], one.used),
                f"python make_figures.py {name} --preset {study.name}{study.results_flag}"]
    yield "\n".join(f"    {command}" for command in commands)


CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 1rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .6rem; } h1 { margin-top: 0; font-size: 1.7rem; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { border: 1px solid #ccc; padding: .3rem .5rem; text-align: left; vertical-align: top;
  overflow-wrap: normal; } td:nth-child(2) { min-width: 4rem; }
th { background: #f2f2f2; }
td.holds, td.agrees { background: #e3f1e7; } td.fails, td.differs { background: #f8e2dc; }
td.undecided { background: #fdf3d8; } td.open { color: #595959; }
img { max-width: 100%; height: auto; }
pre { background: #f6f6f6; padding: .6rem; white-space: pre-wrap; font-size: .82rem; }
code { font-size: .92em; }
@media (max-width: 40rem) { body { padding: .6rem; } table { font-size: .8rem; } }
@media print { body { max-width: none; font-size: 10pt; } .table { overflow: visible; }
  h2, h3, img, tr { break-inside: avoid; break-after: auto; } }
"""


def as_html(blocks, folder):
    """The report's Markdown as one page; pictures are taken in from `folder`."""
    body = "\n".join(block_as_html(block, folder) for block in blocks)
    title = html.escape(blocks[0].removeprefix("# "))
    return ("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
            "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
            f"<title>{title}</title>\n<link rel=\"icon\" href=\"data:,\">\n<style>{CSS}</style>\n"
            f"</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n")


def block_as_html(block, folder):
    """A heading, picture, table, listing or paragraph of Markdown, as this report has them."""
    if heading := re.fullmatch(r"(#+) (.*)", block):
        level = len(heading[1])
        return f"<h{level}>{inline(heading[2])}</h{level}>"
    if picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", block, re.S):
        content = base64.b64encode((folder / picture[2]).read_bytes()).decode()
        return (f'<p><img alt="{html.escape(picture[1])}" '
                f'src="data:image/png;base64,{content}"></p>')
    if block.startswith("|"):
        rows = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                for line in block.split("\n")]
        head = "".join(f"<th>{inline(cell)}</th>" for cell in rows[0])
        lines = ("".join(f"<td{verdict_class(cell)}>{inline(cell)}</td>" for cell in row)
                 for row in rows[2:])
        return (f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>'
                + "".join(f"<tr>{line}</tr>" for line in lines) + "</tbody></table></div>")
    if block.startswith("    "):
        return f"<pre>{html.escape(re.sub('(?m)^    ', '', block))}</pre>"
    return f"<p>{inline(block)}</p>"


def inline(text):
    """Code, bold and italics of Markdown as HTML."""
    parts = re.split(r"`([^`]*)`", text)
    for i, part in enumerate(parts):
        safe = html.escape(part, quote=False)
        if i % 2:
            parts[i] = f"<code>{safe}</code>"
            continue
        safe = re.sub(r"(?<!\\)\*\*(.+?)\*\*", r"<strong>\1</strong>", safe)
        safe = re.sub(r"(?<![\\*])\*([^*\s][^*]*)\*", r"<em>\1</em>", safe)
        parts[i] = safe.replace(r"\*", "*")
    return "".join(parts)


def verdict_class(cell):
    for words, kind in ((HOLDS, "holds"), (FAILS, "fails"), (UNDECIDED, "undecided"),
                        (NOT_RUN, "open"), ("agrees", "agrees"), ("differs", "differs")):
        if cell == words or cell.startswith(f"{words}, "):
            return f' class="{kind}"'
    return ""


# --- main --------------------------------------------------------------------------------

def main():
    study, folder = make_figures.open_study(make_figures.parser(__doc__).parse_args())
    common.commit()                     # before figures change the checkout, as in expected/
    made = {name: make_figures.make(study, name, folder)
            for name in make_figures.FIGURES | make_figures.TABLES}
    make_figures.finish(study, made, folder)
    claims = [judge(study, name) for name in study.published["claims"]]
    blocks = list(report(study, claims, made))
    common.make_writable(folder)
    for name, text in (("report.md", "\n\n".join(blocks) + "\n"),
                       ("report.html", as_html(blocks, folder))):
        common.write(folder / name, lambda file, text=text: file.write(text.encode()))
    print("\nThe paper's claims, on these runs:")
    for claim in claims:
        print(f"  {claim.name:<4} {claim.verdict:<13} {claim.claim}"
              + (f" ({claim.on})" if claim.on else ""))
    print(f"{len(claims)} claims: "
          f"{counts_in_words(collections.Counter(claim.verdict for claim in claims))}\n"
          f"report: {folder / 'report.html'}")
    sys.exit(0 if all(one.state != "NOT DRAWN" for one in made.values()) else 1)


if __name__ == "__main__":
    common.command_line(main)
