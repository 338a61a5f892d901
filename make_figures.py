"""Draws the paper's figures and writes its tables from run folders; trains nothing.

    python make_figures.py                   # every figure and table that the runs at hand allow
    python make_figures.py table2 fig7       # these

A figure is a PDF and a PNG, with a CSV of exactly the numbers drawn, in figures/PRESET/; a table is
Markdown, LaTeX (tables.tex puts all of them on a page) and CSV. Each says what it was made from,
figures at the foot and tables at the head; runs.csv beside them has a line for every run. Errors
are means over trials; bars and bands are standard errors (ddof 1). Where runs are missing it says
which, and the command that makes them.
"""

import csv
import functools
import io
import json
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import common

import matplotlib
import numpy as np
import torch
import yaml

matplotlib.use("Agg")
from matplotlib import pyplot as plt

plt.rcParams.update({
    "figure.figsize": (4.8, 3.5), "figure.constrained_layout.use": True,    # the paper's text width
    "font.size": 9, "legend.fontsize": 8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "pdf.fonttype": 42,
})
# Okabe and Ito's colours, which the colour-blind can tell apart; marker and dash do it in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
STYLES = [{"color": BLUE, "marker": "o", "linestyle": "-"},
          {"color": ORANGE, "marker": "s", "linestyle": "--"},
          {"color": GREEN, "marker": "^", "linestyle": "-."},
          {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
          {"color": "#E69F00", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))}]
PAPER = {"linestyle": "none", "marker": "*", "markersize": 11, "markerfacecolor": "white",
         "markeredgecolor": "black", "zorder": 5}

# --- The runs of a figure ----------------------------------------------------------------------


class Study:
    """The runs of one preset: it finds those of a figure, and knows which are missing for it."""

    def __init__(self, results, name, drop):
        self.results, self.name, self.drop = results, name, drop
        self.preset, self.paper = common.load_preset(name), common.load_preset("paper")
        self.published = yaml.safe_load((common.HERE / "published.yaml").read_text())
        self.whole_run = functools.cache(common.whole_run)      # every file is checked once
        self.begin()

    def begin(self):
        """What is found from here on is for one figure."""
        self.used, self.missing = {}, {}    # folder -> run.json; (experiment, configuration, ...)

    @property
    def results_flag(self):
        """For a command that reads these results."""
        return f" --results {self.results}" if self.results != Path("results") else ""

    def block(self, experiment, preset=None):
        """The settings of an experiment in this preset, or in another."""
        return common.experiment_settings(preset or self.preset, self.name,
                                          common.experiment_of(experiment))

    def find(self, experiment, configuration, method):
        """(run.json, folder) by trial of the finished runs of one method; notes what is missing."""
        folder = self.results / self.name / experiment / configuration / method
        found = [(self.whole_run(path.parent), path.parent)
                 for path in sorted(folder.glob("trial*/run.json"))]
        there = {record["trial"] for record, _ in found}
        self.missing |= {(experiment, configuration, method, trial): None
                         for trial in range(self.block(trained_in(experiment))["trials"])
                         if trial not in there}
        return found

    def runs(self, experiment, configuration, method):
        """`find`, for runs that are to be drawn: those of one method must have equal settings."""
        found = self.find(experiment, configuration, method)
        settings = [{key: value for key, value in record["settings"].items() if key != "weights"}
                    for record, _ in found]         # a robustness run names the weights it measured
        for other, (_, path) in zip(settings, found, strict=True):
            self.refuse_difference(settings[0], other, path)
        self.used |= {path: record for record, path in found}
        return found

    def refuse_difference(self, one, other, folder):
        """Runs of other settings must not meet in a mean, nor in a figure."""
        if found := common.difference(one, other):
            key, value, another = found
            raise common.Refused(f"{self.results / self.name} mixes runs with {key} {value!r} and "
                                 f"{another!r}, as in {folder}: remove those of one kind")

    def curves(self, configuration, method):
        """The robustness curves of one method by trial: x (X,) and mean error over repeats (X,)."""
        found = self.runs(f"robustness-{self.drop}", configuration, method)
        if len(found) < self.block("mlp_fmnist")["trials"]:         # is it trained at all?
            self.find("mlp_fmnist", configuration, method)
        histories = [common.load_history(folder) for _, folder in found]
        x = "probability" if self.drop == "probability" else "dropped"
        return [(history[x], 100 * history["error"].mean(0)) for history in histories]

    def lambdas(self, experiment, configuration):
        """The lambdas planned for a configuration, and any others that were run."""
        there = (self.results / self.name / experiment / configuration).glob("joint-*/trial*")
        planned = self.block(experiment)["configurations"][configuration]["lambdas"]
        return sorted({float(path.parent.name.removeprefix("joint-")) for path in there}
                      | set(planned))

    def histories(self, experiment, configuration, method):
        """(run.json, history.npz) by trial of the runs of one method, without diverged ones."""
        return [(record, common.load_history(folder))
                for record, folder in self.runs(experiment, configuration, method)
                if record["result"]["diverged_at_epoch"] is None]

    def point(self, experiment, configuration, method, key="test_ensemble_error",
              name="test_error_percent"):
        """One number of a configuration and method over its trials, as a row of a figure's CSV."""
        results = [record["result"] for record, _ in self.runs(experiment, configuration, method)]
        scale = 100 if name.endswith("_percent") else 1
        values = [scale * r[key] for r in results if r["diverged_at_epoch"] is None]
        mean, error = mean_and_error(values)
        return {"configuration": configuration, "method": method, "n": len(values),
                "diverged": len(results) - len(values), name: mean, "standard_error": error}

    def provenance(self):
        """Lines that say what was used. Raises Refused if runs of other settings are mixed."""
        if not self.used:
            return "computed from the definitions of the networks; nothing was trained for it"
        lines = [line for experiment in dict.fromkeys(
            trained_in(record["experiment"]) for record in self.used.values())
            for line in self._provenance_of(experiment)]
        records = self.used.values()
        devices = ", ".join(sorted({record["machine"]["device"] for record in records}))
        commits = ", ".join(sorted({str(record["machine"]["commit"]) for record in records}))
        return "\n".join([*lines, f"{devices} · commit {commits}"])

    def _provenance_of(self, experiment):
        """A line on the data and the size of one experiment, and one on what was reduced, if so."""
        used = {path: record for path, record in self.used.items()
                if trained_in(record["experiment"]) == experiment}
        keys = ("data", "epochs", "train", "validation", "test", "batch", "augment", "momentum",
                "nesterov", "decay", "seed", "precision", "padding", "batchnorm")
        settings = {path: {key: trained(record).get(key) for key in keys}
                    for path, record in used.items()}
        s = next(iter(settings.values()))
        for path, other in settings.items():
            self.refuse_difference(s, other, path)
        decays = {path: {"weight_decay": trained(record)["weight_decay"]} for path, record in
                  used.items() if record["method"] != "independent"}    # which has one of its own
        for path, other in decays.items():
            self.refuse_difference(next(iter(decays.values())), other, path)
        data = {"real": f"{s['data']['name']} (real)", "synthetic": "SYNTHETIC STAND-IN DATA",
                "folder": f"NOT THE PAPER'S DATA: {s['data']['name']}"}[s["data"]["source"]]
        images = f"{s['train']:,} training images" if s["train"] else "all training images"
        trials = len({record["trial"] for record in used.values()})
        diverged = sum(r["result"].get("diverged_at_epoch") is not None for r in used.values())
        paper = self.block(experiment, self.paper)

        def counted(n, key):
            paper_has = f" (paper: {paper[key]})" if n != paper[key] else ""
            return f"{n} {key if n != 1 else key.removesuffix('s')}{paper_has}"
        yield (f"{experiment}: {data} · preset {self.name}: {images}, "
               f"{counted(s['epochs'], 'epochs')}, {counted(trials, 'trials')}"
               + (f", {s['precision']}" if s["precision"] else "")
               + (f" · {diverged} diverged, left out of the means" if diverged else ""))
        shared = s | next(iter(decays.values()), {})
        if reduced := "; ".join(reductions(experiment, paper, shared, used.values())):
            yield f"reduced: {reduced}"

    def real(self):
        """Only then are the paper's numbers drawn beside ours, and compared in a table."""
        return all(trained(record)["data"]["source"] == "real" for record in self.used.values())

    def commands(self, wanted, used):
        """What makes the runs `wanted`, keys as in `missing`, on the data of those in use."""
        def flags(runs):
            names = dict.fromkeys(configuration for _, configuration, _, _ in runs)
            lambdas = sorted({float(method.removeprefix("joint-")) for _, _, method, _ in runs
                              if method.startswith("joint-")})
            return " ".join([
                f"--preset {self.name} --only {' '.join(names)}",
                *(["--lambdas", *map(common.lambda_name, lambdas)] if lambdas else [])]
            ) + self.results_flag

        dropping = [run for run in wanted if run[0] != trained_in(run[0])]
        training = [run for run in wanted if run not in dropping]
        for experiment in dict.fromkeys(run[0] for run in training):
            runs = [run for run in training if run[0] == experiment]
            methods = dict.fromkeys(method.split("-")[0] for _, _, method, _ in runs)
            record = next((record for record in used.values()
                           if trained_in(record["experiment"]) == experiment), None)
            source = trained(record)["data"]["source"] if record else "real"
            yield (f"python train_{experiment}.py {flags(runs)} --methods {' '.join(methods)}"
                   + (f" --data {source}" if source != "real" else "")
                   + (f" --data-dir {record['data_from']}" if source == "folder" else ""))
        if dropping:
            yield f"python robustness.py {flags(dropping)}" + (
                "" if self.drop == "example" else f" --drop {self.drop}")

    def what_is_missing(self):
        """A line for every configuration and method, with its trials."""
        trials = {}
        for experiment, configuration, method, trial in self.missing:
            kind = "" if experiment == trained_in(experiment) else f" {experiment}"
            trials.setdefault(f"{configuration} {method}{kind}", []).append(str(trial))
        return [f"{what}, trial {' '.join(which)}" for what, which in trials.items()]


def reductions(experiment, paper, shared, records):
    """What was trained otherwise than the paper has it: a part for all, one for a configuration."""
    def differences(keys, mine, theirs):
        return [f"{key} {setting(mine[key])} (paper: {setting(theirs[key])})"
                for key in keys if key in mine and mine[key] != theirs[key]]

    network = [key for key in ("members", *common.experiment_of(experiment).network)
               if key != "precision"]
    own = {record["configuration"]: differences(
        network, trained(record), paper["configurations"][record["configuration"]])
        for record in records if record["configuration"] in paper["configurations"]}
    first, *others = own.values() or [[]]
    all_have = [text for text in first if others and all(text in other for other in others)]
    everywhere = differences(("validation", "test", "batch", "augment", "decay", "momentum",
                              "nesterov", "weight_decay"), shared, paper) + all_have
    parts = {name: [text for text in texts if text not in all_have] for name, texts in own.items()}
    return [", ".join(everywhere)] * bool(everywhere) + [
        f"{name}: {', '.join(texts)}" for name, texts in parts.items() if texts]


def setting(value):
    """A value of presets.yaml as a caption has it."""
    if value is None or value == []:
        return "all" if value is None else "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def trained_in(experiment):
    """The training experiment: itself, and of the robustness runs that are drawn the MLPs'."""
    return "mlp_fmnist" if experiment.startswith("robustness") else experiment


def trained(record):
    """The settings that a run was trained with; of a robustness run, the run that it measured."""
    return record["settings"].get("trained", record["settings"])


def mean_and_error(values, axis=None):
    """The mean over trials and its standard error (ddof 1; nan for a single trial)."""
    values = np.asarray(values, float)
    if values.size == 0:
        return math.nan, math.nan
    n = values.size if axis is None else values.shape[axis]
    if n == 1:
        return values.mean(axis), np.full_like(values.mean(axis), math.nan)[()]
    return values.mean(axis), values.std(axis, ddof=1) / math.sqrt(n)


# --- Figures -----------------------------------------------------------------------------------

def percent(row):
    return row["test_error_percent"], row["standard_error"]


def lambda_axis(ax, lambdas):
    """Spreads 0.9 ... 1 apart: lambda is drawn at -log10(1.01 - lambda)."""
    ax.set_xscale("function", functions=(lambda x: -np.log10(np.clip(1.01 - x, 1e-3, None)),
                                         lambda y: 1.01 - 10.0 ** -y))
    ax.set_xticks(lambdas, [common.lambda_name(x) for x in lambdas])
    ax.set_xticks([], minor=True)
    ax.set_xlim(-0.12, 1.0012)
    ax.set_xlabel("λ  (0: independent, 1: end-to-end; not to scale)")


def single_network(ax, study, rows):
    """The 1x1024H network, as a dashed line with a band of one standard error."""
    row = study.point("mlp_fmnist", "1x1024H", "joint-1")
    rows.append(row)
    mean, error = percent(row)
    if row["n"]:
        ax.axhline(mean, color=GREY, linestyle=(0, (5, 2)),
                   label=f"1x1024H, one network ({mean:.1f} %)")
        if row["n"] > 1:
            ax.axhspan(mean - error, mean + error, color=GREY, alpha=0.2, linewidth=0)


def fig2(study):
    """Fig. 2: one large network against the 256x4H ensemble, trained in five ways."""
    fig, ax = plt.subplots()
    methods = {"bagging": "Bagging", "stacking": "Stacking", "joint-0": "Independent\nλ = 0",
               "joint-1": "End-to-end\nλ = 1", "joint-0.95": "Joint\nλ = 0.95"}
    rows = [study.point("mlp_fmnist", "256x4H", method) for method in methods]
    colours = [GREY, GREY, BLUE, ORANGE, GREEN]
    printed = study.published["fig2"]["test_error_percent"]
    for x, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        row["published_percent"] = printed["256x4H"].get(row["method"], "")
        mean, error = percent(row)
        if row["n"]:
            ax.bar(x, mean, 0.62, color=colour, alpha=0.85,
                   yerr=error if row["n"] > 1 else None, capsize=3)
            ax.annotate(f"{mean:.1f}", (x, 0), (0, 4), textcoords="offset points", ha="center",
                        color="white", fontweight="bold")
        else:
            ax.annotate("not run", (x, 0), (0, 4), textcoords="offset points", ha="center")
    single_network(ax, study, rows)
    rows[-1]["published_percent"] = printed["1x1024H"]["joint-1"]
    if study.real():
        at = list(methods)
        ax.plot([at.index(method) for method in printed["256x4H"]], printed["256x4H"].values(),
                **PAPER, label="printed in the paper")
        ax.axhline(printed["1x1024H"]["joint-1"], color="black", linewidth=0.8, linestyle=":",
                   label=f"printed in the paper, 1x1024H ({printed['1x1024H']['joint-1']} %)")
    ax.set_xticks(range(len(methods)), methods.values())
    ax.set_xlim(-0.5, len(methods) - 0.5)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.28)
    ax.set_ylabel("test error (%)")
    ax.set_title("256x4H ensembles and one large network", fontsize=9)
    ax.grid(axis="x", visible=False)
    return fig, rows


def fig3(study):
    """Fig. 3: test error against lambda, four ways to spend 815,000 parameters."""
    fig, ax = plt.subplots()
    rows, every = [], set()
    printed = study.published["fig2"]["test_error_percent"]
    for configuration, style in zip(("256x4H", "64x16H", "16x64H"), STYLES, strict=False):
        lambdas = study.lambdas("mlp_fmnist", configuration)
        every |= set(lambdas)
        points = [study.point("mlp_fmnist", configuration, f"joint-{common.lambda_name(lam)}")
                  for lam in lambdas]
        rows += points
        drawn = [(lam, *percent(row)) for lam, row in zip(lambdas, points, strict=True) if row["n"]]
        if drawn:
            x, mean, error = zip(*drawn, strict=True)
            ax.errorbar(x, mean, np.nan_to_num(error), **style, capsize=2, markersize=5,
                        label=f"{configuration}")
    single_network(ax, study, rows)
    for row in rows:
        own = row["configuration"] == "256x4H"
        row["published_percent"] = printed["256x4H"].get(row["method"], "") if own else ""
    rows[-1]["published_percent"] = printed["1x1024H"]["joint-1"]
    if study.real():
        ax.plot([float(method.removeprefix("joint-")) for method in printed["256x4H"]],
                printed["256x4H"].values(), **PAPER, label="256x4H, printed in the paper")
    lambda_axis(ax, sorted(every))
    ax.set_ylabel("test error (%)")
    return fig, rows


def robustness_figure(study, configuration):
    fig, ax = plt.subplots()
    rows = []
    for method, style in zip(("joint-0", "joint-0.99", "joint-1"), STYLES, strict=False):
        curves = study.curves(configuration, method)
        if not curves:
            continue
        x = curves[0][0]
        mean, error = mean_and_error([errors for _, errors in curves], 0)
        ax.plot(x, mean, **style, markevery=max(1, len(x) // 12), markersize=4,
                label=f"λ = {method.removeprefix('joint-')}")
        ax.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
        share = x if study.drop == "probability" else x / (x[-1] + 1)
        rows += [{"configuration": configuration, "method": method, "n": len(curves),
                  "dropped": at, "dropped_percent": 100 * part, "test_error_percent": m,
                  "standard_error": e}
                 for at, part, m, e in zip(x, share, mean, error, strict=True)]
    ax.set_ylabel("test error (%)")
    if study.drop == "probability":
        ax.set_xlabel("probability that a member is dropped")
    elif rows:
        members = 1 + max(row["dropped"] for row in rows)
        ax.set_xlabel(f"members dropped of {members}, " + (
            "at random for every test example" if study.drop == "example" else "the same at random "
            "for all test examples"))
        top = ax.secondary_xaxis("top", functions=(lambda x: 100 * x / members,
                                                   lambda x: x * members / 100))
        top.set_xlabel("members dropped (%)")
    ax.set_title(configuration, fontsize=9)
    return fig, rows


def fig7(study):
    """Fig. 7: test error of 256x4H against the number of members dropped."""
    return robustness_figure(study, "256x4H")


def fig8(study):
    """Fig. 8: test error of 64x16H against the number of members dropped."""
    return robustness_figure(study, "64x16H")


def fig9(study):
    """Fig. 9: ensemble and mean member test loss of 64x16H against lambda."""
    fig, ax = plt.subplots()
    rows, lambdas = [], study.lambdas("mlp_fmnist", "64x16H")
    for key, label, style in (("test_mean_member_loss", "mean of the members", STYLES[1]),
                              ("test_ensemble_loss", "ensemble", STYLES[0])):
        points = [study.point("mlp_fmnist", "64x16H", f"joint-{common.lambda_name(lam)}", key,
                              "cross_entropy")
                  for lam in lambdas]
        rows += [{"loss": key, **row} for row in points]
        drawn = [(lam, row["cross_entropy"], row["standard_error"])
                 for lam, row in zip(lambdas, points, strict=True) if row["n"]]
        if drawn:
            x, mean, error = zip(*drawn, strict=True)
            ax.errorbar(x, mean, np.nan_to_num(error), **style, capsize=2, markersize=5,
                        label=label)
    lambda_axis(ax, lambdas)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("test cross entropy (nats)")
    ax.set_title("64x16H", fontsize=9)
    return fig, rows


def fig4(study):
    """Fig. 4: test error of five ConvNet ensembles against lambda, the minimum of each marked."""
    fig, ax = plt.subplots()
    rows, every = [], set()
    for configuration, style in zip(study.published["table4"]["rows"], STYLES, strict=True):
        lambdas = study.lambdas("convnet_cifar", configuration)
        every |= set(lambdas)
        points = []
        for lam in lambdas:
            method = f"joint-{common.lambda_name(lam)}"
            points.append(study.point("convnet_cifar", configuration, method))
            validation = [100 * record["result"].get("validation_error", math.nan) for record, _ in
                          study.histories("convnet_cifar", configuration, method)]
            points[-1]["validation_error_percent"] = mean_and_error(validation)[0]
        drawn = [(lam, *percent(row)) for lam, row in zip(lambdas, points, strict=True) if row["n"]]
        if drawn:
            x, mean, error = zip(*drawn, strict=True)
            ax.errorbar(x, mean, np.nan_to_num(error), **style, capsize=2, markersize=4,
                        label=configuration)
            best = int(np.argmin(mean))
            ax.plot(x[best], mean[best], "o", markersize=12, markerfacecolor="none",
                    markeredgecolor=style["color"], clip_on=False)
            for row in points:
                row["minimum"] = row["method"] == f"joint-{common.lambda_name(x[best])}"
        rows += points
    ax.plot([], [], "o", markersize=10, markerfacecolor="none", markeredgecolor=GREY,
            label="minimum")
    ax.set_xticks(sorted(every), map(common.lambda_name, sorted(every)))
    ax.set_xlabel("λ  (0: independent, 1: end-to-end)")
    ax.set_ylabel("test error (%)")
    fig.legend(loc="outside upper center", ncols=3, frameon=False)
    return fig, rows


def filter_montage(filters, scale):
    """Filters (M, F, C, 3, 3) as one image, a column for each member: grey is 0, scale is full."""
    members, count, channels = filters.shape[:3]
    tiles = np.ones((count * 4 + 1, members * 4 + 1, 3))
    for m in range(members):
        for f in range(count):
            patch = (0.5 + filters[m, f] / (2 * scale)).transpose(1, 2, 0)
            tiles[4 * f + 1:4 * f + 4, 4 * m + 1:4 * m + 4] = patch if channels == 3 else (
                patch.mean(2, keepdims=True))
    return tiles.clip(0, 1)


def first_layer(folder, record):
    """The first filters (M, F, C, 3, 3) of a trained run of ConvNets."""
    weights = common.load_weights(folder, "cpu")
    return torch.stack([weights[f"members.{m}.0.weight"]
                        for m in range(record["settings"]["members"])])


def fig5(study):
    """Fig. 5: first-layer filters of ten ConvNets, independent and end-to-end, to one scale."""
    configuration = "10xConvNet-0.29M"
    sides = {"joint-0": "independent, λ = 0", "joint-1": "end-to-end, λ = 1"}
    fig, axes = plt.subplots(2, 2, figsize=(6.4, 6.2), height_ratios=[3.4, 1], sharey="row",
                             squeeze=False)
    rows, shown = [], {}
    for method in sides:
        for record, history in study.histories("convnet_cifar", configuration, method):
            folder = study.results / study.name / "convnet_cifar" / configuration / method
            filters = first_layer(folder / f"trial{record['trial']}", record)
            norms = filters.flatten(1).norm(dim=1).tolist()
            own = [{"configuration": configuration, "method": method, "trial": record["trial"],
                    "member": m + 1, "filter_norm": norm, "relative_filter_norm": norm / max(norms),
                    "relative_distance_from_initial_weights": float(history["member_distance"][m])}
                   for m, norm in enumerate(norms)]
            rows += own
            if method not in shown:                                     # the first trial is drawn
                shown[method] = record, filters.numpy(), own
    scale = max((np.abs(filters).max() for _, filters, _ in shown.values()), default=1)
    for column, (method, title) in enumerate(sides.items()):
        image, bars = axes[:, column]
        image.set_axis_off()
        if method not in shown:
            image.set_title(f"{title}: not run", fontsize=8)
            continue
        record, filters, own = shown[method]
        members = len(filters)
        image.imshow(filter_montage(filters, scale), aspect="auto", interpolation="nearest",
                     extent=(-0.5, members - 0.5, 0, 1))
        error = 100 * record["result"]["test_ensemble_error"]
        image.set_title(f"{title}\ntest error {error:.1f} %", fontsize=8)
        x = np.arange(members)
        bars.bar(x - 0.2, [row["filter_norm"] for row in own], 0.4, color=BLUE,
                 label="norm of the member's first-layer filters")
        bars.bar(x + 0.2, [row["relative_distance_from_initial_weights"] for row in own], 0.4,
                 color=ORANGE, label="its distance from its initial weights, over their norm")
        bars.set_xticks(x, x + 1)
        bars.set_xlabel(f"member (trial {record['trial']})")
    axes[1, 0].set_ylabel("norm, relative distance")
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2,
               frameon=False)
    return fig, rows


def dominance(record, history):
    """How far one member is ahead of the others, in points of error: a row of Fig. 6's numbers.

    dominance is the median member's error less the best member's, at the reported epoch. The gap at
    epoch 3 is that between the two lowest training errors.
    """
    at = record["result"]["epoch"] - 1
    row = {"configuration": record["configuration"],
           "method": f"joint-{common.lambda_name(record['lambda'])}", "trial": record["trial"]}
    for part, errors, ensemble in (
            ("train", history["train_member_error"][at], history["train_ensemble_error"][at]),
            ("test", history["reported_test_member_error"],
             record["result"]["test_ensemble_error"])):
        best, second = np.sort(errors)[:2]
        row |= {f"{part}_{name}": 100 * float(value) for name, value in (
            ("ensemble_error", ensemble), ("best_member_error", best),
            ("second_best_member_error", second), ("median_member_error", np.median(errors)),
            ("dominance", np.median(errors) - best))}
    early = history["train_member_error"][2] if len(history["train_member_error"]) > 2 else None
    end = int(history["train_member_error"][at].argmin())
    if early is not None:
        best, second = np.sort(early)[:2]
        row |= {"best_member_at_epoch_3": int(early.argmin()) + 1, "best_member_at_end": end + 1,
                "same": int(early.argmin()) == end, "gap_at_epoch_3": 100 * float(second - best)}
    return row


def fig6(study):
    """Fig. 6: errors of the ensemble and of every member, at the end and epoch by epoch."""
    fig, axes = plt.subplots(2, 4, figsize=(10, 5.2))
    rows, numbers = [], []
    for line, (experiment, configuration) in zip(axes, (
            ("densenet_cifar", "DN-High"), ("mlp_fmnist", "256x4H")), strict=True):
        lambdas = study.lambdas(experiment, configuration)
        ends, last = [], []
        for lam in lambdas:
            found = study.histories(experiment, configuration, f"joint-{common.lambda_name(lam)}")
            numbers += [dominance(*one) for one in found if one[0]["settings"]["members"] > 1]
            for record, history in found:
                at = record["result"]["epoch"] - 1
                ends.append((lam, record["trial"],
                             (history["train_ensemble_error"][at],
                              history["train_member_error"][at]),
                             (record["result"]["test_ensemble_error"],
                              history["reported_test_member_error"])))
            last = found if lam == 1 else last
        for part, ax in enumerate(line[:2]):
            ax.set_title(f"{configuration}: {('training', 'test')[part]} error, end", fontsize=8)
            for lam, trial, *scores in ends:
                ensemble, members = scores[part]
                ax.plot(np.full(len(members), lam), 100 * members, "_", color=GREY, alpha=0.5,
                        markersize=9)
                rows += error_rows(configuration, lam, trial, ("train", "test")[part], "end",
                                   ensemble, members)
            at = sorted({lam for lam, *_ in ends})
            means = [mean_and_error([100 * scores[part][0] for x, _, *scores in ends if x == lam])
                     for lam in at]
            if at:
                mean, error = zip(*means, strict=True)
                ax.errorbar(at, mean, np.nan_to_num(error), **STYLES[0], markersize=4, capsize=2)
            if experiment == "mlp_fmnist":
                lambda_axis(ax, lambdas)
                ax.tick_params("x", labelsize=6.5)
            else:
                ax.set_xticks(lambdas, map(common.lambda_name, lambdas), fontsize=6.5)
            ax.set_xlabel("λ" if experiment != "mlp_fmnist" else "λ (not to scale)")
            ax.set_ylabel("error (%)")
        if not ends:
            for ax in line:
                ax.annotate("not run", (0.5, 0.5), xycoords="axes fraction", ha="center")
        held_out = "validation" if study.block(experiment)["validation"] else "test"
        if last:                                            # as it was trained, whatever is planned
            held_out = "validation" if last[0][0]["settings"]["validation"] else "test"
        for ax, part in zip(line[2:], ("train", held_out), strict=True):
            words = {"train": "training"}.get(part, part)
            ax.set_title(f"{configuration}: {words} error, λ = 1", fontsize=8)
            for record, history in last:
                ensemble = history[f"{part}_ensemble_error"]
                members = history[f"{part}_member_error"]                       # (epochs, M)
                for epoch in range(len(members)):
                    rows += error_rows(configuration, 1.0, record["trial"], part, epoch + 1,
                                       ensemble[epoch], members[epoch])
            if last:                                                    # the first trial is drawn
                record, history = last[0]
                members = 100 * history[f"{part}_member_error"]
                best = history["train_member_error"][record["result"]["epoch"] - 1].argmin()
                x = np.arange(1, len(members) + 1)
                ax.plot(x, members, color=GREY, alpha=0.7 if members.shape[1] < 20 else 0.12,
                        linewidth=0.8)
                ax.plot(x, members[:, best], color=ORANGE, linewidth=1.5, linestyle="--")
                ax.plot(x, 100 * history[f"{part}_ensemble_error"], color=BLUE, linewidth=1.8)
            ax.axvline(3, color="black", linewidth=0.8, linestyle=":")
            ax.set_xlabel(f"epoch (trial {last[0][0]['trial'] if last else 0})")
            ax.xaxis.get_major_locator().set_params(integer=True)
    for axis_row in axes:                    # one scale a row and quantity: train beside test
        for pair in (axis_row[:2], axis_row[2:]):
            low, high = zip(*(ax.get_ylim() for ax in pair), strict=True)
            for ax in pair:
                ax.set_ylim(min(low), max(high))
    handles = [plt.Line2D([], [], color=BLUE, marker="o", markersize=4, label="ensemble"),
               plt.Line2D([], [], color=GREY, marker="_", label="a member"),
               plt.Line2D([], [], color=ORANGE, linestyle="--", label="the member with the lowest "
                          "training error at the end"),
               plt.Line2D([], [], color="black", linestyle=":", linewidth=0.8, label="epoch 3")]
    fig.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return fig, {"": rows, "-dominance": numbers}


def error_rows(configuration, lam, trial, part, epoch, ensemble, members):
    """Rows of Fig. 6's CSV: the ensemble's error and every member's, numbered from 1."""
    at = {"configuration": configuration, "method": f"joint-{common.lambda_name(lam)}",
          "trial": trial, "part": part, "epoch": epoch}
    return [{**at, "who": who, "error_percent": 100 * float(value)} for who, value in
            (("ensemble", ensemble), *((f"member {m + 1}", e) for m, e in enumerate(members)))]


FIGURES = {"fig2": fig2, "fig3": fig3, "fig4": fig4, "fig5": fig5, "fig6": fig6, "fig7": fig7,
           "fig8": fig8, "fig9": fig9}

# --- Tables ------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table as it is printed, its cells as text, and the rows of its CSV."""
    caption: str
    columns: list
    cells: list           # rows of str; **bold** and ± are turned into LaTeX's
    rows: list            # of dicts
    notes: list


def untrained(experiment, settings):
    """An ensemble that takes no memory: for counting, of 32x32 images in 100 classes."""
    return _untrained(experiment, json.dumps({**settings, "precision": "fp32"}))


@functools.cache        # three tables count the same networks
def _untrained(experiment, settings):
    with torch.device("meta"):
        return common.experiment_of(experiment).build(
            json.loads(settings), (3, 32, 32), 100, torch.Generator("cpu"))


def parameters(ensemble):
    return sum(p.numel() for p in ensemble.parameters())


def bytes_saved_for_backward(ensemble, batch):
    """What autograd keeps of a forward pass for the backward pass, weights left out, in bytes."""
    kept = {}
    weights = {p.untyped_storage()._cdata for p in ensemble.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage              # held, so that no two share an address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ensemble.train()(torch.empty(batch, 3, 32, 32, device="meta",
                                     dtype=next(ensemble.parameters()).dtype))
    return sum(storage.nbytes() for storage in kept.values())


def peak_on_cuda(study, experiment, configuration):
    """The largest peak of the joint runs of a configuration on a GPU, as text, or that none is.

    It is that of the training steps: evaluation keeps nothing for a backward pass.
    """
    peaks = [(record["result"]["peak_memory_bytes"], trained(record)) for path in sorted(
        (study.results / study.name / experiment / configuration).glob("joint-*/trial*/run.json"))
        if "peak_memory_bytes" in (record := common.read_run(path.parent))["result"]]
    if not peaks:
        return "not measured on CUDA"
    peak, s = max(peaks, key=lambda pair: pair[0])
    return f"{peak / 1e9:.1f} GB (batch {s['batch']}, {s['precision']})"


def table1(study):
    """Table 1: the DenseNet ensembles, and what a training step takes."""
    printed, cells, rows = study.published["table1"]["rows"], [], []
    paper, mine = (study.block("densenet_cifar", preset) for preset in (study.paper, study.preset))
    sizes = ("depth", "growth", "members")
    for name, theirs in printed.items():
        for block, label in ((paper, name), (mine, f"{name}, preset {study.name}")):
            c = block["configurations"][name]
            as_trained = all(c[k] == mine["configurations"][name][k] for k in sizes)
            if block is mine and all(c[k] == paper["configurations"][name][k] for k in sizes):
                continue
            ensemble = untrained("densenet_cifar", c)
            saved = bytes_saved_for_backward(ensemble, paper["batch"])
            peak = (peak_on_cuda(study, "densenet_cifar", name) if as_trained
                    else "not measured on CUDA")
            row = {"configuration": label, "depth": c["depth"], "k": c["growth"], "M": c["members"],
                   "parameters": parameters(ensemble), "bytes_saved_for_backward": saved,
                   "peak_cuda_memory": peak}
            row |= {"published_parameters": theirs["parameters"],
                    "published_memory": theirs["memory"]} if block is paper else {}
            rows.append(row)
            cells.append([label, str(c["depth"]), str(c["growth"]), str(c["members"]),
                          f"{row['parameters']:,}" + (
                              f" (paper: {theirs['parameters']})" if block is paper else ""),
                          f"{saved / 1e9:.1f} GB", peak + (
                              f" (paper: {theirs['memory']})" if block is paper else "")])
    return Table("DenseNet ensembles on 32x32 images with 100 classes.",
                 ["Name", "Depth", "k", "M", "Parameters", "Saved for backward", "Peak on a GPU"],
                 cells, rows, [f"Saved for backward: the bytes that autograd keeps of one forward "
                               f"pass at batch {paper['batch']} in fp32, counted and not measured; "
                               "weights, gradients and momenta are not in it."])


def table2(study):
    """Table 2: test error of the DenseNet ensembles by method."""
    methods = {"joint-0": "λ = 0 (independent)", "joint-0.5": "λ = 0.5", "joint-0.9": "λ = 0.9",
               "joint-1": "λ = 1 (end-to-end)", "bagging": "Bagging", "stacking": "Stacking",
               "independent": "Independent (own lr)"}
    printed = study.published["table2"]["test_error_percent"]
    others = {f"joint-{common.lambda_name(lam)}" for name in printed
              for lam in study.lambdas("densenet_cifar", name)} - set(methods)
    planned = study.block("densenet_cifar")["configurations"]
    rows = {}
    for name, theirs in printed.items():
        lambdas = [f"joint-{common.lambda_name(lam)}" for lam in planned[name]["lambdas"]]
        for method in [*methods, *sorted(others)]:
            wanted = method in lambdas or method in planned[name]["methods"]
            there = (study.results / study.name / "densenet_cifar" / name / method).is_dir()
            rows[method, name] = (study.point("densenet_cifar", name, method) if wanted or there
                                  else {"configuration": name, "method": method, "n": 0,
                                        "diverged": 0, "test_error_percent": math.nan,
                                        "standard_error": math.nan})
            rows[method, name]["published_percent"] = theirs.get(method, "")
        column = [row for (_, at), row in rows.items() if at == name]
        lowest = min((row["test_error_percent"] for row in column if row["n"]), default=None)
        for row in column:
            row["minimum"] = bool(row["n"]) and row["test_error_percent"] == lowest

    def cell(row):
        theirs = f" (paper: {row['published_percent']})" if row["published_percent"] != "" else ""
        if not row["n"]:
            return ("all diverged" if row["diverged"] else "not run") + theirs
        mean = f"{row['test_error_percent']:.1f}"
        error = f" ± {row['standard_error']:.1f}" if row["n"] > 1 else ""
        return (f"**{mean}**" if row["minimum"] else mean) + error + f", n = {row['n']}" + theirs

    cells = [[methods.get(method, f"λ = {method.removeprefix('joint-')}"),
              *(cell(rows[method, name]) for name in printed)] for method in
             [*methods, *sorted(others)]]
    apart = [] if study.real() else ["The paper's values are of CIFAR-100: beside results on "
                                     "other data they are no yardstick."]
    return Table("Test error (%) of DenseNet ensembles; the minimum of each column is bold.",
                 ["", *printed], cells, list(rows.values()),
                 [*apart,
                  "Mean ± standard error over n trials. Independent (own lr): the sum of the "
                  "members' losses, each member at the learning rate and weight decay of the "
                  "shared loss; at λ = 0 the gradient is divided by M and the weight decay is "
                  "not. It is not a row of the paper."])


def table3(study):
    """Table 3: the DenseNet architectures, with computed counts."""
    block, cells, rows = study.block("densenet_cifar", study.paper), [], []
    for name, theirs in study.published["table1"]["rows"].items():
        c = block["configurations"][name]
        count = parameters(untrained("densenet_cifar", c))
        rows.append({"configuration": name, "depth": c["depth"], "k": c["growth"],
                     "modules": c["members"], "parameters": count,
                     "published_parameters": theirs["parameters"]})
        cells.append([name, str(c["depth"]), str(c["growth"]), str(c["members"]),
                      f"{count:,} (paper: {theirs['parameters']})"])
    return Table("DenseNet architectures, for 100 classes.",
                 ["Name", "Depth", "k", "Modules", "Parameters"], cells, rows,
                 ["Parameters are those of all modules together."])


def table4(study):
    """Table 4: the ConvNet architectures, with computed counts."""
    block, cells, rows = study.block("convnet_cifar", study.paper), [], []
    for name, theirs in study.published["table4"]["rows"].items():
        c = block["configurations"][name]
        count = parameters(untrained("convnet_cifar", c)) // c["members"]
        theirs = theirs["parameters"]
        differs = theirs != f"{count / 1e6:.2f}M"
        rows.append({"configuration": name, "filters": " ".join(map(str, c["filters"])),
                     "strides": " ".join(map(str, c["strides"])), "parameters": count,
                     "published_parameters": theirs, "differs": differs})
        filters = ", ".join(f"**{f}**" if stride > 1 else str(f)
                            for f, stride in zip(c["filters"], c["strides"], strict=True))
        cells.append([name, f"{count:,} (paper: {theirs})" + ("*" if differs else ""),
                      str(len(c["filters"])), filters])
    return Table("ConvNet architectures: 3x3 convolutions, stride 2 in bold, for 100 classes.",
                 ["Name", "Parameters of a member", "Layers", "Filters"], cells, rows,
                 [f"* does not round to what the paper prints: {row['published_parameters']} "
                  f"computes to {row['parameters'] / 1e6:.3f}M." for row in rows
                  if row["differs"]]
                 + ["Strides of the first and the last row are our reading: README, Open "
                    "questions."])


TABLES = {"table1": table1, "table2": table2, "table3": table3, "table4": table4}


def latex(text):
    """Text with **bold** as LaTeX; a letter that LaTeX does not have becomes a question mark."""
    parts = text.split("**")
    special = {"\\": r"\textbackslash{}", "~": r"$\sim$", "^": r"\^{}", "λ": r"$\lambda$",
               "±": r"$\pm$", "·": r"$\cdot$"} | {c: "\\" + c for c in "%_&#${}"}
    parts = ["".join(special.get(c, c if c.isascii() else "?") for c in part) for part in parts]
    return "".join(rf"\textbf{{{part}}}" if i % 2 else part for i, part in enumerate(parts))


def save_table(table, study, path):
    """Writes path.md, path.tex and path.csv, with the provenance at the head, and tables.tex."""
    provenance = study.provenance()
    common.make_writable(path.parent)
    head = provenance.split("\n")
    number = path.name.removeprefix("table")
    notes = [note.replace("*", r"\*") for note in table.notes]
    lines = [f"**Table {number}. {table.caption}**", "", *(f"{line}  " for line in head), "",
             "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns),
             *("| " + " | ".join(row) + " |" for row in table.cells), "", *notes, ""]
    common.write(path.with_suffix(".md"), lambda file: file.write("\n".join(lines).encode()))
    rows = [" & ".join(map(latex, row)) + r" \\" for row in [table.columns, *table.cells]]
    tex = [r"\begin{table}", r"\footnotesize",
           rf"\setcounter{{table}}{{{int(number) - 1}}}\caption{{{latex(table.caption)}}}",
           *(latex(line) + r"\\" for line in head), r"\resizebox{\linewidth}{!}{%",
           rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}", r"\hline", rows[0], r"\hline",
           *rows[1:], r"\hline", r"\end{tabular}}", "", *map(latex, table.notes),
           r"\end{table}", ""]
    common.write(path.with_suffix(".tex"), lambda file: file.write("\n".join(tex).encode()))
    page = [r"\documentclass{article}", r"\usepackage[utf8]{inputenc}",
            r"\usepackage{graphicx}        % \resizebox", r"\begin{document}",
            *(rf"\IfFileExists{{{name}.tex}}{{\input{{{name}}}}}{{}}" for name in TABLES),
            r"\end{document}", ""]
    common.write(path.with_name("tables.tex"), lambda file: file.write("\n".join(page).encode()))
    write_csv(path.with_suffix(".csv"), with_provenance(table.rows, provenance))


# --- Writing -----------------------------------------------------------------------------------


def with_provenance(rows, provenance):
    """Rows of a CSV whose first says what all were made from."""
    return [{**row, "provenance": "" if i else provenance.replace("\n", " · ")}
            for i, row in enumerate(rows)]


def write_csv(path, rows):
    """Rows (dicts) as CSV, with a column for every key of any of them."""
    table = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    common.write(path, lambda file: file.write(table.getvalue().encode()))


def list_runs(study):
    """A row for every training run of a preset: what it is, what came out, on what and when."""
    for path in sorted((study.results / study.name).glob("*/*/*/trial*/run.json")):
        record = common.read_run(path.parent)
        if not record["experiment"].startswith("robustness"):
            yield {"run": str(path.parent.relative_to(study.results)), **record["result"],
                   "lr": record["settings"]["lr"], "epochs": record["settings"]["epochs"],
                   "data": record["settings"]["data"]["name"], "parameters":
                   record.get("parameters"), "seconds": record["seconds"],
                   "finished": record["finished"], **record["machine"]}


def save_figure(fig, rows, study, path):
    """Writes path.pdf, path.png and path.csv, with the provenance at the figure's foot.

    rows are those of the CSV, or of several, by what is added to the path.
    """
    provenance = study.provenance()
    common.make_writable(path.parent)
    if fig.axes[0].get_legend_handles_labels()[0] and not fig.legends:
        fig.axes[0].legend(frameon=False)
    width, height = fig.get_size_inches()
    foot = [part for line in provenance.split("\n")
            for part in textwrap.wrap(line, int(25 * width), subsequent_indent="   ")]
    bottom = (0.06 + 0.1 * len(foot)) / height
    fig.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))
    fig.text(0.01, 0.03 / height, "\n".join(foot), fontsize=5.5, color=GREY)
    for name, table in (rows if isinstance(rows, dict) else {"": rows}).items():
        write_csv(path.with_name(f"{path.name}{name}.csv"), with_provenance(table, provenance))
    common.write(path.with_suffix(".png"), lambda file: fig.savefig(file, format="png", dpi=200))
    common.write(path.with_suffix(".pdf"), lambda file: fig.savefig(
        file, format="pdf", metadata={"CreationDate": None}))


@dataclass
class Made:
    """What became of a figure or table, and what it was made from."""
    state: str            # complete | incomplete | NOT DRAWN
    table: object         # the Table, of a table
    used: dict            # folder -> run.json
    missing: dict         # (experiment, configuration, method, trial), as keys
    provenance: str


def make(study, name, folder):
    """Draws a figure or writes a table into a folder, and says what it was made from."""
    study.begin()
    other = name in ("fig7", "fig8") and study.drop != "example"
    path, table = folder / (f"{name}-{study.drop}" if other else name), None
    if name in TABLES:
        table = TABLES[name](study)
        possible = study.used or not study.missing              # three tables need no runs
        if possible:
            save_table(table, study, path)
    else:
        fig, rows = FIGURES[name](study)
        possible = study.used
        if possible:
            save_figure(fig, rows, study, path)
        plt.close(fig)
    state = ("incomplete" if study.missing else "complete") if possible else "NOT DRAWN"
    print(f"{name}: {state}" + (f", {path}{'.md, .tex' if table else '.pdf, .png'}, .csv"
                               if possible else ""), flush=True)
    if not possible and path.with_suffix(".csv").exists():
        print(f"  {path}.csv is of an earlier drawing")
    if study.missing:
        print(f"  {len(study.missing)} runs are missing:")
        print(*(f"    {line}" for line in study.what_is_missing()), sep="\n")
        print("  to make them:")
        print(*(f"    {command}" for command in study.commands(study.missing, study.used)),
              sep="\n")
    return Made(state, table, study.used, study.missing, study.provenance())


def finish(study, made, folder):
    """Writes runs.csv, and says in a line which figures and tables are complete."""
    if runs := list(list_runs(study)):
        common.make_writable(folder)
        write_csv(folder / "runs.csv", runs)
        print(f"all {len(runs)} training runs, a line each: {folder / 'runs.csv'}")
    by_state = {state: [name for name, one in made.items() if one.state == state]
                for state in ("complete", "incomplete", "NOT DRAWN")}
    print("figures: " + "; ".join(f"{state}: {' '.join(names)}"
                                  for state, names in by_state.items() if names))


# --- Comparing -----------------------------------------------------------------------------------

KEYS = ("configuration", "method", "trial", "part", "epoch", "who", "member", "dropped", "loss")
TOLERANCES = {      # how far numbers of two runs of one preset may lie apart: absolute, relative
    **dict.fromkeys(("n", "diverged", "depth", "k", "M", "modules", "parameters",
                     "bytes_saved_for_backward"), (0, 0)),
    **dict.fromkeys(("test_error_percent", "validation_error_percent"), (3, 0)),
    "error_percent": (10, 0), "cross_entropy": (0, 0.15),
    **dict.fromkeys(("filter_norm", "relative_distance_from_initial_weights"), (0, 0.15))}


def compare(ours, theirs, wanted):
    """Says for each number in the CSV files of a folder whether ours is within its tolerance.

    Returns an exit status: 0 if all are.
    """
    if not theirs.is_dir():
        raise common.Refused(f"--compare {theirs} is not a folder: expected one with the CSV files "
                             "of figures, such as expected/quick")
    total = near = 0
    for path in (path for name in wanted for path in sorted(theirs.glob(f"{name}*.csv"))):
        if not (ours / path.name).is_file():
            raise common.Refused(f"{ours / path.name} is not there: draw it first, with `python "
                                 f"make_figures.py --preset {ours.name}`")
        rows = {keys_of(row): row for row in read_csv(ours / path.name)}
        expected_rows, apart = read_csv(path), []
        columns = expected_rows[0].keys() & TOLERANCES.keys()
        if not columns:                 # it is made of the numbers of another
            continue
        for expected in expected_rows:
            row = rows.get(keys_of(expected), {})
            for column in columns:
                absolute, relative = TOLERANCES[column]
                theirs_is, ours_is = (float(one.get(column) or "nan") for one in (expected, row))
                within = abs(ours_is - theirs_is) <= absolute + relative * abs(theirs_is) or (
                    math.isnan(ours_is) and math.isnan(theirs_is))
                total, near = total + 1, near + within
                if not within:
                    apart.append(f"    {' '.join(filter(None, keys_of(expected)))}: {column} "
                                 f"{ours_is:.6g}, expected {theirs_is:.6g} within "
                                 f"{absolute + relative * abs(theirs_is):.2g}")
        print(f"{path.name}: " + (f"{len(apart)} numbers are apart" if apart else "all within"))
        print(*apart[:10], *(["    ..."] if len(apart) > 10 else []), sep="\n", end="\n" * bool(
            apart))
    print(f"{near} of {total} numbers are within their tolerances of {theirs}")
    return 0 if near == total else 1


def keys_of(row):
    return tuple(row.get(key, "") for key in KEYS)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- main ----------------------------------------------------------------------------------------

def parser(description):
    """The flags of what reads run folders."""
    p = common.Parser(description)
    p.add_argument("--preset", help="the preset whose runs to draw (default: the driver's rule)")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR",
                   help="where run folders are (default: results)")
    p.add_argument("--figures-dir", type=Path, default=Path("figures"), metavar="DIR",
                   help="where the figures go (default: figures)")
    p.add_argument("--drop", default="example", metavar="HOW",
                   help="draw Figs 7 and 8 from robustness.py --drop HOW (default: example)")
    return p


def open_study(args):
    """The Study that the command line names, and the folder of its figures."""
    name = common.choose_preset(args.preset)
    common.nearest(args.drop, common.DROPS, "value of --drop")
    return Study(args.results, name, args.drop), args.figures_dir / name


def main():
    every = FIGURES | TABLES
    p = parser(__doc__)
    p.add_argument("figures", nargs="*", metavar="FIGURE", help=f"any of {', '.join(every)}")
    p.add_argument("--compare", type=Path, metavar="DIR", help="draw nothing: compare the CSV "
                   "files of the figures with those in DIR, number by number")
    args = p.parse_args()
    wanted = [common.nearest(figure, every, "figure or table") for figure in args.figures or every]
    study, folder = open_study(args)
    if args.compare:
        sys.exit(compare(folder, args.compare, wanted))
    made = {name: make(study, name, folder) for name in dict.fromkeys(wanted)}
    finish(study, made, folder)
    sys.exit(1 if any(one.state == "NOT DRAWN" for one in made.values()) else 0)


if __name__ == "__main__":
    common.command_line(main)
