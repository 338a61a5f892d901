"""Draws the paper's figures and writes its tables from run folders; trains nothing.

    python make_figures.py                   # every figure and table that the finished runs allow
    python make_figures.py table2 7          # only these

A figure is a PDF and a PNG beside a CSV of exactly the numbers drawn, in figures/PRESET/; a table is Markdown and CSV.
Each says what it was made from: a figure at its foot, a table at its head. runs.csv has a line for every run. Errors
are means over trials; bars and bands are standard errors (ddof 1). If runs are missing, the output names them and the
command that makes them.
"""

import csv
import io
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import study
import common
import finished
import folders
import robustness
from study import experiment_of
from finished import CONVNET, DENSENET, MLP, FinishedRuns, joint, mean_and_error, trained_in, trials_of

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

matplotlib.rcdefaults()             # whatever the user's own matplotlibrc has
plt.rcParams.update({
    "figure.figsize": (4.8, 3.4), "figure.constrained_layout.use": True,    # the paper's text width
    "font.size": 8, "legend.fontsize": 7, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.alpha": 0.3, "pdf.fonttype": 42, "legend.frameon": False,
})
# Okabe and Ito's colours, for colour-blind readers; markers and dashes tell them apart in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
STYLES = [{"color": BLUE, "marker": "o", "linestyle": "-"},
          {"color": ORANGE, "marker": "s", "linestyle": "--"},
          {"color": GREEN, "marker": "^", "linestyle": "-."},
          {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
          {"color": "#E69F00", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))}]
PAPER = {"linestyle": "none", "marker": "*", "markersize": 11, "markerfacecolor": "white",
         "markeredgecolor": "black", "zorder": 5}
AT_CHANCE = "at the level of guessing: shows nothing"

# --- Figures -------------------------------------------------------------------------------------


def percent(row):
    return row["test_error_percent"], row["standard_error"]


def lambda_axis(ax, lambdas):
    """Spreads 0.9 ... 1 apart: lambda is drawn at -log10(1.01 - lambda)."""
    ax.set_xscale("function", functions=(lambda x: -np.log10(np.clip(1.01 - x, 1e-3, None)),
                                         lambda y: 1.01 - 10.0 ** -y))
    ax.set_xticks(lambdas, [f"{lam:g}" for lam in lambdas])
    ax.set_xticks([], minor=True)
    ax.set_xlim(-0.12, 1.0012)
    ax.set_xlabel("λ  (0: independent, 1: end-to-end; not to scale)")


def error_line(ax, lambdas, rows, style, label, key="test_error_percent", markersize=5):
    """A line over lambda with standard errors, of the rows that have runs; returns its (lambdas, means)."""
    some = [(lam, row[key], row["standard_error"]) for lam, row in zip(lambdas, rows, strict=True) if row["n"]]
    if not some:
        return [], []
    x, mean, error = zip(*some, strict=True)
    ax.errorbar(x, mean, np.nan_to_num(error), **style, capsize=2, markersize=markersize, label=label)
    return x, mean


def single_network(ax, runs, rows):
    """The 1x1024H network, as a dashed line with a band of one standard error."""
    row = runs.point(MLP, "1x1024H", "joint-1")
    rows.append(row)
    mean, error = percent(row)
    if row["n"]:
        ax.axhline(mean, color=GREY, linestyle=(0, (5, 2)), label=f"1x1024H, one network ({mean:.1f} %)")
        if row["n"] > 1:
            ax.axhspan(mean - error, mean + error, color=GREY, alpha=0.2, linewidth=0)


def n_of(rows):
    """How many trials the rows of a figure have."""
    return f"n = {trials_of(row['n'] for row in rows)}"


def fig2(runs):
    """Fig. 2: one large network against the 256x4H ensemble, trained in five ways."""
    fig, ax = plt.subplots()
    methods = {"bagging": "Bagging", "stacking": "Stacking", "joint-0": "Independent\nλ = 0",
               "joint-1": "End-to-end\nλ = 1", "joint-0.95": "Joint\nλ = 0.95"}
    rows = [runs.point(MLP, "256x4H", method) for method in methods]
    printed = runs.published["fig2"]["test_error_percent"]
    for x, (row, colour) in enumerate(zip(rows, [GREY, GREY, BLUE, ORANGE, GREEN], strict=True)):
        row["published_percent"] = printed["256x4H"].get(row["method"], "")
        mean, error = percent(row)
        if row["n"]:
            ax.bar(x, mean, 0.62, color=colour, alpha=0.85, yerr=error if row["n"] > 1 else None, capsize=3)
        ax.annotate(f"{mean:.1f}" if row["n"] else "not run", (x, 0), (0, 4), textcoords="offset points", ha="center",
                    color="white" if row["n"] else "black", fontweight="bold" if row["n"] else None)
    single_network(ax, runs, rows)
    rows[-1]["published_percent"] = printed["1x1024H"]["joint-1"]
    if runs.at_protocol():
        at = {method: x for x, method in enumerate(methods)}
        ax.plot([*(at[method] for method in printed["256x4H"]), len(methods) - 0.2],
                [*printed["256x4H"].values(), printed["1x1024H"]["joint-1"]], **PAPER, label="printed in the paper")
    ax.set_xticks([*range(len(methods)), len(methods) - 0.2], [*methods.values(), "1x1024H\n(dashed)"])
    ax.set_xlim(-0.5, len(methods) + 0.2)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.2)
    ax.set_ylabel("test error (%)")
    ax.set_title(f"256x4H ensembles and one large network, {n_of(rows)}")
    ax.grid(axis="x", visible=False)
    return fig, rows


def fig3(runs):
    """Fig. 3: test error against lambda, four ways to spend 815,000 parameters."""
    fig, ax = plt.subplots()
    rows, every = [], set()
    printed = runs.published["fig2"]["test_error_percent"]
    for configuration, style in zip(("256x4H", "64x16H", "16x64H"), STYLES, strict=False):
        lambdas = runs.lambdas(MLP, configuration)
        every |= set(lambdas)
        points = [runs.point(MLP, configuration, joint(lam)) for lam in lambdas]
        rows += points
        error_line(ax, lambdas, points, style, configuration)
    single_network(ax, runs, rows)
    for row in rows:
        own = row["configuration"] == "256x4H"
        row["published_percent"] = printed["256x4H"].get(row["method"], "") if own else ""
    rows[-1]["published_percent"] = printed["1x1024H"]["joint-1"]
    ax.set_ylim(ax.get_ylim())                              # from our runs alone
    if runs.at_protocol():
        ax.plot([float(method.removeprefix("joint-")) for method in printed["256x4H"]],
                printed["256x4H"].values(), **PAPER, label="256x4H, printed in the paper")
    lambda_axis(ax, sorted(every))
    ax.set_ylabel("test error (%)")
    ax.set_title(f"Ensembles of 815,000 parameters, {n_of(rows)}")
    return fig, rows


def robustness_figure(runs, configuration):
    """Test error against the share of members dropped: all of it, and up to 80 % where one point can be seen."""
    fig, (whole, near) = plt.subplots(1, 2, figsize=(4.8, 3.1))
    rows, flat = [], []
    for (method, word), style in zip({"joint-0": ", independent", "joint-0.99": "", "joint-1": ", end-to-end"}.items(),
                                     STYLES, strict=False):
        curves = runs.curves(configuration, method)
        if not curves:
            continue
        x = curves[0][0]
        share = 100 * (x if runs.drop == "probability" else x / (x[-1] + 1))
        mean, error = mean_and_error([errors for _, errors in curves], 0)
        for ax in (whole, near):
            ax.plot(share, mean, **style, markevery=max(1, len(x) // 12), markersize=4,
                    label=f"λ = {method.removeprefix('joint-')}{word}")
            ax.fill_between(share, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
        if method != "joint-1":
            flat += mean[share <= 80].tolist()
        rows += [{"configuration": configuration, "method": method, "n": len(curves), "dropped": at,
                  "dropped_percent": part, "test_error_percent": m, "standard_error": e}
                 for at, part, m, e in zip(x, share, mean, error, strict=True)]
    unit = "probability of a drop (%)" if runs.drop == "probability" else "members dropped (%)"
    for ax in (whole, near):
        ax.axvline(50, color="black", linewidth=0.8, linestyle=":", label="half of them" if ax is whole else None)
        ax.set_xlabel(unit)
    whole.set_ylabel("test error (%)")
    near.set_xlim(-2, 80)
    if flat:
        low = math.floor(min(row["test_error_percent"] for row in rows))
        near.set_ylim(low, max(low + 5, math.ceil(max(flat)) + 1))
        near.yaxis.set_major_locator(matplotlib.ticker.MultipleLocator(max(1, round((near.get_ylim()[1] - low) / 8))))
        members = runs.block(MLP)["configurations"][configuration]["members"]
        how = {"example": "at random for every example", "set": "the same at random for all examples",
               "probability": "each with a probability"}[runs.drop]
        fig.legend(*whole.get_legend_handles_labels(), loc="outside upper center", ncols=4, columnspacing=1,
                   title=f"{configuration}: {members} members, dropped {how}, {n_of(rows)}", title_fontsize=8)
    near.set_title("up to 80 %, enlarged")
    return fig, rows


def fig7(runs):
    """Fig. 7: test error of 256x4H against the share of members dropped."""
    return robustness_figure(runs, "256x4H")


def fig8(runs):
    """Fig. 8: test error of 64x16H against the share of members dropped."""
    return robustness_figure(runs, "64x16H")


def fig9(runs):
    """Fig. 9: ensemble and mean member test loss of 64x16H against lambda."""
    fig, ax = plt.subplots()
    rows, lambdas = [], runs.lambdas(MLP, "64x16H")
    for key, label, style in (("test_mean_member_loss", "mean of the members", STYLES[1]),
                              ("test_ensemble_loss", "ensemble", STYLES[0])):
        points = [runs.point(MLP, "64x16H", joint(lam), key, "cross_entropy") for lam in lambdas]
        rows += [{"loss": key, **row} for row in points]
        error_line(ax, lambdas, points, style, label, "cross_entropy")
    lambda_axis(ax, lambdas)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("test cross entropy (nats)")
    ax.set_title(f"64x16H, {n_of(rows)}")
    return fig, rows


def fig4(runs):
    """Fig. 4: test error of five ConvNet ensembles against lambda, the minimum of each marked."""
    fig, ax = plt.subplots()
    rows, every = [], set()
    for configuration, style in zip(runs.published["table4"]["rows"], STYLES, strict=True):
        lambdas = runs.lambdas(CONVNET, configuration)
        every |= set(lambdas)
        points = []
        for lam in lambdas:
            points.append(runs.point(CONVNET, configuration, joint(lam)))
            validation = [100 * record["result"].get("validation_error", math.nan)
                          for record, _ in runs.histories(CONVNET, configuration, joint(lam))]
            points[-1]["validation_error_percent"] = mean_and_error(validation)[0]
        x, mean = error_line(ax, lambdas, points, style, configuration, markersize=4)
        if x:
            best = int(np.argmin(mean))
            ax.plot(x[best], mean[best], "o", markersize=12, markerfacecolor="none",
                    markeredgecolor=style["color"], clip_on=False)
            for row in points:
                row["minimum"] = row["method"] == joint(x[best])
        rows += points
    ax.plot([], [], "o", markersize=10, markerfacecolor="none", markeredgecolor=GREY, label="minimum")
    ax.set_xticks(sorted(every), [f"{lam:g}" for lam in sorted(every)])
    ax.set_xlabel("λ  (0: independent, 1: end-to-end)")
    ax.set_ylabel("test error (%)")
    ax.set_title(f"ConvNet ensembles, {n_of(rows)}")
    fig.legend(loc="outside upper center", ncols=3)
    return fig, rows


def filter_montage(filters, scale):
    """Filters (M, F, C, 3, 3) as one image, columns for each member, not taller than wide: grey is 0, scale is full."""
    members, count, channels = filters.shape[:3]
    columns = next(k for k in range(1, count + 1) if 4 * math.ceil(count / k) <= members * (4 * k + 1))
    width = 4 * columns + 1
    tiles = np.ones((4 * math.ceil(count / columns) + 1, members * width + 1, 3))
    for m in range(members):
        for f in range(count):
            patch = (0.5 + filters[m, f] / (2 * scale)).transpose(1, 2, 0)
            y, x = 4 * (f // columns) + 1, width * m + 1 + 4 * (f % columns)
            tiles[y:y + 3, x:x + 3] = patch if channels == 3 else patch.mean(2, keepdims=True)
    return tiles.clip(0, 1)


def first_layer(folder, record):
    """The first filters (M, F, C, 3, 3) of ConvNets, and their distance (M,) from the initial ones, over their norm."""
    s, dataset = record["settings"], common.DATASETS[record["settings"]["dataset"]]
    run = study.Run("", record["experiment"], record["configuration"], "joint", 0, record["trial"], s, False)
    classes = s.get("classes") or dataset.classes                       # (runs of earlier versions have all)
    start = experiment_of(CONVNET).build(s, dataset.shape, classes, run.generator("initialisation")).state_dict()
    before, now = (torch.stack([w[f"members.{m}.0.weight"] for m in range(s["members"])])
                   for w in (start, folders.load_weights(folder, "cpu")))
    return now, (now - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)


def fig5(runs):
    """Fig. 5: first-layer filters of ten ConvNets, independent and end-to-end, to one scale."""
    configuration = "10xConvNet-0.29M"
    sides = {"joint-0": "independent, λ = 0", "joint-1": "end-to-end, λ = 1"}
    rows, shown = [], {}
    for method in sides:
        for record, folder in runs.runs(CONVNET, configuration, method):
            if record["result"]["diverged_at_epoch"] is not None or not (folder / "weights.pt").exists():
                continue                                            # FinishedRuns.missing names it
            filters, moved = first_layer(folder, record)
            norms = filters.flatten(1).norm(dim=1)
            rows += [{"configuration": configuration, "method": method, "trial": record["trial"], "member": m,
                      "filter_norm": norm, "distance_from_initial_filters": distance}
                     for m, (norm, distance) in enumerate(zip(norms.tolist(), moved.tolist(), strict=True), 1)]
            shown.setdefault(method, (record, filters.numpy(), norms.numpy(), moved.numpy()))   # (the first trial)
    if not shown:
        runs.begin()                                                # nothing is used, so that nothing is drawn
    # Full black and white belong to the largest in 200: one filter of a strong member would leave all others grey.
    scale = np.quantile(np.abs([filters for _, filters, *_ in shown.values()]), 0.995) if shown else 1
    montages = {method: filter_montage(filters, scale) for method, (_, filters, *_) in shown.items()}
    aspect = max((len(montage) / montage.shape[1] for montage in montages.values()), default=1)
    fig, axes = plt.subplots(3, max(1, len(shown)), figsize=(4.8, 3.2 + 2 * aspect), sharex="col", sharey="row",
                             height_ratios=[2 * aspect, 0.7, 0.7], squeeze=False)
    for (image, sizes, distances), (method, (record, _, norms, moved)) in zip(axes.T, shown.items(), strict=False):
        x = np.arange(1, len(moved) + 1)
        image.imshow(montages[method], aspect="auto", interpolation="nearest", extent=(0.5, len(moved) + 0.5, 0, 1))
        image.set_box_aspect(aspect)                                    # square pixels
        image.set_title(f"{sides[method]}\ntest error {100 * record['result']['test_ensemble_error']:.1f} %, "
                        f"trial {record['trial']}")
        image.set_axis_off()
        sizes.bar(x, norms, 0.7, color=BLUE)
        distances.bar(x, moved, 0.7, color=ORANGE)
        distances.axhline(moved.max() / 2, color="black", linestyle=":")                # the threshold of C11
        distances.set_title(f"{(moved >= moved.max() / 2).sum()} of {len(x)} reach half of the largest", fontsize=7)
        distances.set_xticks(x, x)
        distances.set_xlabel("member")
    axes[0, 0].set_ylim(0, 1)
    axes[1, 0].set_ylabel("norm of\nthe filters", fontsize=7)
    axes[2, 0].set_ylabel("their relative\ndistance\nfrom the start", fontsize=7)
    return fig, rows


def dominance(record, history):
    """How far one member is ahead of the others, in points of error: a row of Fig. 6's numbers.

    dominance is the median member's error minus the best member's, at the reported epoch. The gap at epoch 3 is that
    between the two lowest training errors.
    """
    at = record["result"]["epoch"] - 1
    row = {"configuration": record["configuration"], "method": joint(record["lambda"]), "trial": record["trial"]}
    for part, errors, ensemble in (
            ("train", history["train_member_error"][at], history["train_ensemble_error"][at]),
            ("test", history["reported_test_member_error"], record["result"]["test_ensemble_error"])):
        best, second = np.sort(errors)[:2]
        row |= {f"{part}_{name}": 100 * float(value) for name, value in (
            ("ensemble_error", ensemble), ("best_member_error", best), ("second_best_member_error", second),
            ("median_member_error", np.median(errors)), ("dominance", np.median(errors) - best))}
    if len(history["train_member_error"]) > 2:
        early, end = history["train_member_error"][2], int(history["train_member_error"][at].argmin())
        best, second = np.sort(early)[:2]
        row |= {"best_member_at_epoch_3": int(early.argmin()) + 1, "best_member_at_end": end + 1,
                "same": int(early.argmin()) == end, "gap_at_epoch_3": 100 * float(second - best)}
    return row


def spread(ax, x, members, mark=""):
    """Errors of members, an array (M,) for each x: a mark or a line for each member, or of more than 20 two bands."""
    if len(members[0]) > 20:
        for low, high, alpha in ((0.05, 0.95, 0.2), (0.25, 0.75, 0.35)):
            ends = np.transpose([np.quantile(some, (low, high)) for some in members])
            ax.fill_between(x, *ends, color=GREY, alpha=alpha, linewidth=0)
    elif mark:
        for at, some in zip(x, members, strict=True):
            ax.plot(np.full(len(some), at), some, mark, color=GREY, alpha=0.7, markersize=9)
    else:
        ax.plot(x, members, color=GREY, alpha=0.7, linewidth=0.8)


def fig6(runs):
    """Fig. 6: errors of the ensemble and of every member, at the end and epoch by epoch."""
    rows, numbers, drawn = [], [], []
    for experiment, configuration in ((DENSENET, "DN-High"), (MLP, "256x4H")):
        found = {lam: some for lam in runs.lambdas(experiment, configuration)
                 if (some := runs.histories(experiment, configuration, joint(lam)))}
        ends = {"training": {}, "test": {}}     # {lambda: (ensemble (trials,), members (trials, M))}
        for lam, some in found.items():
            numbers += [dominance(*one) for one in some if one[0]["settings"]["members"] > 1]
            for part, key in (("training", "train"), ("test", "test")):
                scores = [(history["train_ensemble_error"][record["result"]["epoch"] - 1],
                           history["train_member_error"][record["result"]["epoch"] - 1]) if key == "train" else
                          (record["result"]["test_ensemble_error"], history["reported_test_member_error"])
                          for record, history in some]
                for (record, _), (ensemble, members) in zip(some, scores, strict=True):
                    rows += error_rows(configuration, lam, record["trial"], key, "end", ensemble, members)
                ends[part][lam] = [100 * np.array(values) for values in zip(*scores, strict=True)]
        if found:
            drawn.append((experiment, configuration, "end", ends))
        if found.get(1):
            held_out = "validation" if found[1][0][0]["settings"]["validation"] else "test"
            drawn.append((experiment, configuration, "epochs", {"training": found[1], held_out: found[1]}))
    fig, axes = plt.subplots(max(1, len(drawn)), 2, figsize=(4.8, 0.6 + 1.75 * max(1, len(drawn))), sharey="row",
                             squeeze=False)
    for line, (experiment, configuration, kind, parts) in zip(axes, drawn, strict=False):
        line[0].set_ylabel(f"{configuration}: error (%)")
        for ax, (part, content) in zip(line, parts.items(), strict=True):
            if kind == "end":
                ax.set_title(f"{part} error at the end, "
                             f"n = {trials_of(len(ensembles) for ensembles, _ in content.values())}")
                spread(ax, list(content), [members.flatten() for _, members in content.values()], "_")
                mean, error = zip(*(mean_and_error(ensembles) for ensembles, _ in content.values()), strict=True)
                ax.errorbar(list(content), mean, np.nan_to_num(error), **STYLES[0], markersize=4, capsize=2)
                if experiment == MLP:
                    lambda_axis(ax, list(content))
                    ax.tick_params("x", rotation=60)
                else:
                    ax.set_xticks(list(content), [f"{lam:g}" for lam in content])
                ax.set_xlabel("λ, not to scale" if experiment == MLP else "λ")
                continue
            key = "train" if part == "training" else part
            for record, history in content:
                ensemble, members = history[f"{key}_ensemble_error"], history[f"{key}_member_error"]  # (epochs, M)
                for epoch in range(len(members)):
                    rows += error_rows(configuration, 1.0, record["trial"], key, epoch + 1, ensemble[epoch],
                                       members[epoch])
            record, history = content[0]                                # the first trial is drawn
            members, x = 100 * history[f"{key}_member_error"], np.arange(1, len(history[f"{key}_member_error"]) + 1)
            best = history["train_member_error"][record["result"]["epoch"] - 1].argmin()
            spread(ax, x, members)
            ax.plot(x, members[:, best], color=ORANGE, linewidth=1.3, linestyle="--")
            ax.plot(x, 100 * history[f"{key}_ensemble_error"], color=BLUE, linewidth=1.5)
            ax.axvline(3, color="black", linewidth=0.8, linestyle=":")
            ax.set_title(f"{part} error, λ = 1")
            ax.set_xlabel(f"epoch (trial {record['trial']})")
            ax.xaxis.get_major_locator().set_params(integer=True)
    handles = [plt.Line2D([], [], color=BLUE, marker="o", markersize=4, label="ensemble"),
               plt.Line2D([], [], color=GREY, linewidth=4, alpha=0.5, label="members (over 20: 5 to 95, 25 to 75 %)"),
               plt.Line2D([], [], color=ORANGE, linestyle="--", label="member best in training at the end"),
               plt.Line2D([], [], color="black", linestyle=":", linewidth=0.8, label="epoch 3")]
    fig.legend(handles=handles, loc="outside upper center", ncols=2)
    return fig, {"": rows, "-dominance": numbers}


def error_rows(configuration, lam, trial, part, epoch, ensemble, members):
    """Rows of Fig. 6's CSV: the ensemble's error and every member's, numbered from 1."""
    at = {"configuration": configuration, "method": joint(lam), "trial": trial, "part": part, "epoch": epoch}
    return [{**at, "who": who, "error_percent": 100 * float(value)} for who, value in
            (("ensemble", ensemble), *((f"member {m + 1}", e) for m, e in enumerate(members)))]


FIGURES = {"2": fig2, "3": fig3, "4": fig4, "5": fig5, "6": fig6, "7": fig7, "8": fig8, "9": fig9}

# --- Tables --------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table as it is printed, its cells as text (**bold**), and the rows of its CSV."""
    caption: str
    columns: list
    cells: list           # rows of str
    rows: list            # of dicts
    notes: list


def parameters(experiment, settings, classes=100):
    """The parameters of an ensemble for 32x32 images; takes no memory."""
    ensemble = study.untrained_on_meta(experiment_of(experiment).build, settings, (3, 32, 32), classes)
    return sum(p.numel() for p in ensemble.parameters())


def table1(runs):
    """Table 1: the DenseNet ensembles, and what a training step takes."""
    paper, mine = (runs.block(DENSENET, preset) for preset in (runs.paper, runs.preset))
    sizes, rows = ("depth", "growth", "members", "classes"), []
    for name, printed in runs.published["table1"]["rows"].items():
        for block in (paper, mine):
            c, ours = (each["configurations"][name] for each in (block, mine))
            classes = c["classes"] or common.DATASETS[block["dataset"]].classes
            as_trained = all(c[key] == ours[key] for key in sizes)
            if block is mine and all(c[key] == paper["configurations"][name][key] for key in sizes):
                continue
            saved = study.bytes_saved_for_backward(experiment_of(DENSENET).build, c | {"batch": paper["batch"]},
                                                   (3, 32, 32), classes)
            row = {"configuration": name if block is paper else f"{name}, preset {runs.name}", "depth": c["depth"],
                   "k": c["growth"], "M": c["members"], "classes": classes,
                   "parameters": parameters(DENSENET, c, classes), "bytes_saved_for_backward": saved,
                   "peak_cuda_memory": (as_trained and finished.peak_of_runs(runs, name)) or (
                       finished.peak_of_a_step(name) if block is paper else "not measured on CUDA")}
            if block is paper:
                row |= {"published_parameters": printed["parameters"], "published_memory": printed["memory"]}
            rows.append(row)

    def beside(text, row, key):
        return f"{text} (paper: {row[key]})" if key in row else text

    cells = [[row["configuration"], *(str(row[key]) for key in ("depth", "k", "M", "classes")),
              beside(f"{row['parameters']:,}", row, "published_parameters"),
              f"{row['bytes_saved_for_backward'] / 1e9:.1f} GB",
              beside(row["peak_cuda_memory"], row, "published_memory")] for row in rows]
    return Table("DenseNet ensembles on 32x32 images.", [
        "Name", "Depth", "k", "M", "Classes", "Parameters", "Saved for backward", "Peak on a GPU"], cells, rows, [
            f"Saved for backward: the bytes that autograd keeps of one forward pass at batch {paper['batch']} in fp32, "
            "counted and not measured; weights, gradients and momenta are not in it.",
            "Peak on a GPU: of a run of this preset; without one, of benchmarks/h200.csv, whose own tensors of 1.5 GB "
            "are in it."])


def table2(runs):
    """Table 2: test error of the DenseNet ensembles by method."""
    methods = {"joint-0": "λ = 0 (independent)", "joint-0.5": "λ = 0.5", "joint-0.9": "λ = 0.9",
               "joint-1": "λ = 1 (end-to-end)", "bagging": "Bagging", "stacking": "Stacking",
               "independent": "Independent (own lr)"}
    printed, rows = runs.published["table2"]["test_error_percent"], {}
    others = sorted({joint(lam) for name in printed for lam in runs.lambdas(DENSENET, name)} - set(methods))
    for name, theirs in printed.items():
        for method in [*methods, *others]:
            rows[method, name] = runs.point(DENSENET, name, method)
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

    cells = [[methods.get(method, f"λ = {method.removeprefix('joint-')}"), *(cell(rows[method, name])
                                                                           for name in printed)]
             for method in [*methods, *others]]
    apart = [] if runs.at_protocol() else ["The paper's values are of its own protocol: results of another do not "
                                           "compare."]
    return Table("Test error (%) of DenseNet ensembles; the minimum of each column is bold.",
                 ["", *printed], cells, list(rows.values()),
                 [*apart, "Mean ± standard error over n trials. Independent (own lr): the sum of the members' losses, "
                  "each member at the learning rate and weight decay of the shared loss; at λ = 0 the gradient is "
                  "divided by M and the weight decay is not. It is not a row of the paper."])


def table3(runs):
    """Table 3: the DenseNet architectures, with computed counts."""
    block, cells, rows = runs.block(DENSENET, runs.paper), [], []
    for name, theirs in runs.published["table1"]["rows"].items():
        c = block["configurations"][name]
        count = parameters(DENSENET, c)
        rows.append({"configuration": name, "depth": c["depth"], "k": c["growth"], "modules": c["members"],
                     "parameters": count, "published_parameters": theirs["parameters"]})
        cells.append([name, str(c["depth"]), str(c["growth"]), str(c["members"]),
                      f"{count:,} (paper: {theirs['parameters']})"])
    return Table("DenseNet architectures, for 100 classes.", ["Name", "Depth", "k", "Modules", "Parameters"], cells,
                 rows, ["Parameters are those of all modules together."])


def table4(runs):
    """Table 4: the ConvNet architectures, with computed counts."""
    block, cells, rows = runs.block(CONVNET, runs.paper), [], []
    for name, theirs in runs.published["table4"]["rows"].items():
        c = block["configurations"][name]
        count, theirs = parameters(CONVNET, c) // c["members"], theirs["parameters"]
        differs = theirs != f"{count / 1e6:.2f}M"
        rows.append({"configuration": name, "filters": " ".join(map(str, c["filters"])),
                     "strides": " ".join(map(str, c["strides"])), "parameters": count,
                     "published_parameters": theirs, "differs": differs})
        filters = ", ".join(f"**{f}**" if stride > 1 else str(f)
                            for f, stride in zip(c["filters"], c["strides"], strict=True))
        cells.append([name, f"{count:,} (paper: {theirs})" + "*" * differs, str(len(c["filters"])), filters])
    return Table("ConvNet architectures: 3x3 convolutions, stride 2 in bold, for 100 classes.",
                 ["Name", "Parameters of a member", "Layers", "Filters"], cells, rows,
                 [f"* does not round to what the paper prints: {row['published_parameters']} computes to "
                  f"{row['parameters'] / 1e6:.3f}M." for row in rows if row["differs"]]
                 + ["Strides of the first and the last row are our reading: docs/open-questions.md."])


TABLES = {"table1": table1, "table2": table2, "table3": table3, "table4": table4}

# --- Writing -------------------------------------------------------------------------------------


def stem(name):
    """The name of a figure's files: 2 -> fig2, table2 -> table2."""
    return name if name in TABLES else f"fig{name}"


def title(name):
    return f"Table {name[-1]}" if name in TABLES else f"Figure {name}"


def write_csv(path, rows):
    """Rows (dicts) as CSV, with a column for every key of any of them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folders.write(path, lambda file: file.write(text.getvalue().encode()))


def with_provenance(rows, provenance):
    """Rows of a CSV, the first of which says what all were made from."""
    return [{**row, "provenance": "" if i else provenance.replace("\n", " · ")} for i, row in enumerate(rows)]


def save_table(table, provenance, path, at_chance=False):
    """Writes path.md and path.csv, with the provenance at the head."""
    lines = [f"**Table {path.name[-1]}. {table.caption}**", "", *[f"**{AT_CHANCE.capitalize()}.**  "] * at_chance,
             *(f"{line}  " for line in provenance.split("\n")), "",
             "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns),
             *("| " + " | ".join(row) + " |" for row in table.cells), "",
             *(note.replace("*", r"\*") for note in table.notes), ""]
    folders.write(path.with_suffix(".md"), lambda file: file.write("\n".join(lines).encode()))
    write_csv(path.with_suffix(".csv"), with_provenance(table.rows, provenance))


def save_figure(fig, rows, provenance, path, at_chance=False):
    """Writes path.pdf, path.png and path.csv, with the provenance at the figure's foot, in four lines.

    rows are those of the CSV, or of several, by what is added to the path.
    """
    width, height = fig.get_size_inches()
    if fig.axes[0].get_legend_handles_labels()[0] and not fig.legends:
        fig.axes[0].legend()
    foot = [part for line in provenance.split("\n") for part in textwrap.wrap(line, int(18.5 * width))]
    if len(foot) > 4:
        kept = textwrap.shorten(foot[3], int(18.5 * width) - 23, placeholder="")
        whole, cut, _ = kept.rpartition("), ")
        foot[3:] = [(whole + cut if cut else kept + " ") + "… (all in the CSV)"]
    bottom = (0.06 + 0.12 * len(foot)) / height
    fig.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))
    fig.text(0.01, 0.03 / height, "\n".join(foot), fontsize=7, color=GREY)
    if at_chance:
        fig.text(0.5, 0.55, AT_CHANCE.replace(": ", ":\n"), fontsize=13, color=ORANGE, rotation=20, ha="center",
                 va="center", bbox={"facecolor": "white", "edgecolor": ORANGE, "alpha": 0.85})
    for name, table in (rows if isinstance(rows, dict) else {"": rows}).items():
        write_csv(path.with_name(f"{path.name}{name}.csv"), with_provenance(table, provenance))
    for kind, options in (("png", {"dpi": 200, "metadata": {"Software": None}}),
                          ("pdf", {"metadata": dict.fromkeys(("CreationDate", "Creator", "Producer"))})):
        folders.write(path.with_suffix(f".{kind}"), lambda file, kind=kind, options=options: fig.savefig(
            file, format=kind, **options))


@dataclass
class Made:
    """What became of a figure or table, and what it was made from."""
    state: str            # complete | incomplete | NOT DRAWN
    table: object         # the Table, of a table
    used: dict            # folder -> run.json
    missing: list         # (experiment, configuration, method, trial)
    provenance: str


def what_is_missing(missing):
    """A line for every configuration and method of FinishedRuns.missing, with its trials."""
    trials = {}
    for experiment, configuration, method, trial in missing:
        kind = "" if experiment == trained_in(experiment) else f" {experiment}"
        trials.setdefault(f"{configuration} {method}{kind}", []).append(str(trial))
    return [f"{what}, trial {' '.join(which)}" for what, which in trials.items()]


def make(runs, name, folder):
    """Draws a figure or writes a table into a folder, and says what it was made from."""
    runs.begin()
    missing, table = runs.missing(name), None
    other = name in robustness.FIGURES and runs.drop != "example"
    path = folder / (f"{stem(name)}-{runs.drop}" if other else stem(name))
    if name in TABLES:
        table = TABLES[name](runs)
    else:
        fig, rows = FIGURES[name](runs)
    possible = runs.used or not missing                         # three tables need no runs
    if possible:
        provenance, at_chance = runs.provenance(), runs.at_chance()
        folders.make_writable(folder)
        save_table(table, provenance, path, at_chance) if table else save_figure(fig, rows, provenance, path, at_chance)
    if not table:
        plt.close(fig)
    state = ("incomplete" if missing else "complete") if possible else "NOT DRAWN"
    print(f"{stem(name)}: {state}" + (f", {path}{'.md' if table else '.pdf, .png'}, .csv" if possible else ""),
          flush=True)
    if not possible and path.with_suffix(".csv").exists():
        print(f"  {path}.csv is of an earlier drawing")
    if missing:
        print(f"  {len(missing)} runs are missing:", *(f"    {line}" for line in what_is_missing(missing)),
              "  to make them:", *(f"    {command}" for command in runs.commands(name, runs.used)), sep="\n")
    return Made(state, table, runs.used, missing, runs.provenance())


def finish(runs, made, folder):
    """Writes runs.csv, and says in a line which figures and tables are complete."""
    if rows := list(runs.every_run()):
        folders.make_writable(folder)
        write_csv(folder / "runs.csv", rows)
        print(f"all {len(rows)} training runs, a line each: {folder / 'runs.csv'}")
    by_state = {state: [stem(name) for name, one in made.items() if one.state == state]
                for state in ("complete", "incomplete", "NOT DRAWN")}
    print("figures: " + "; ".join(f"{state}: {' '.join(names)}" for state, names in by_state.items() if names))


# --- Comparing -----------------------------------------------------------------------------------

# How far numbers of two runs of one preset may lie apart, absolute and relative; other columns name a row or follow.
TOLERANCES = {
    **dict.fromkeys(("n", "diverged", "depth", "k", "M", "modules", "parameters", "bytes_saved_for_backward"), (0, 0)),
    **dict.fromkeys(("test_error_percent", "validation_error_percent"), (3, 0)), "error_percent": (10, 0),
    **dict.fromkeys(("cross_entropy", "filter_norm", "distance_from_initial_filters"), (0, 0.15))}
KEYS = ("configuration", "method", "trial", "part", "epoch", "who", "member", "dropped", "loss")


def read_csv(path):
    """The rows of a CSV by what they are of, such as a configuration and a method."""
    if not path.is_file():
        raise common.Refused(f"{path} does not exist: draw that figure first, with the same --preset and --figures-dir")
    with open(path, newline="", encoding="utf-8") as file:
        return {tuple(row.get(key, "") for key in KEYS): row for row in csv.DictReader(file)}


def compare(ours, theirs, wanted):
    """Prints which numbers in the CSV files of two folders are apart; returns an exit status, 0 if none is."""
    if not any(theirs.glob("*.csv")):
        raise common.Refused(f"--compare {theirs} is not a folder with the CSV files of figures: try expected/quick")
    total = near = 0
    for path in (path for name in wanted for path in sorted(theirs.glob(f"{stem(name)}*.csv"))):
        mine, apart = read_csv(ours / path.name), []
        for key, row in read_csv(path).items():
            for column in row.keys() & TOLERANCES.keys():
                a, b = (float(one.get(column) or "nan") for one in (mine.get(key, {}), row))
                within = math.isclose(a, b, rel_tol=TOLERANCES[column][1], abs_tol=TOLERANCES[column][0]) or (
                    math.isnan(a) and math.isnan(b))
                total, near = total + 1, near + within
                apart += [] if within else [f"    {' '.join(filter(None, key))}: {column} {a:.6g}, expected {b:.6g}"]
        print(f"{path.name}: {len(apart)} numbers are apart" if apart else f"{path.name}: all within", *apart[:10],
              *["    ..."] * (len(apart) > 10), sep="\n")
    print(f"{near} of {total} numbers are within their tolerances of {theirs}")
    return 0 if near == total else 1


# --- main ----------------------------------------------------------------------------------------


def parser(description):
    """The flags of every script that reads run folders."""
    p = study.Parser(description)
    p.add_argument("--preset", help="the preset whose runs to draw (default: short if torch can use a CUDA GPU, else "
                   "quick)")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR",
                   help="the folder of the run folders (default: results)")
    p.add_argument("--figures-dir", type=Path, default=Path("figures"), metavar="DIR",
                   help="the folder of the figures (default: figures)")
    p.add_argument("--drop", default="example", choices=robustness.DROPS,
                   help="how the members of Figs 7 and 8 were dropped: the --drop of robustness.py (default: example)")
    return p


def open_study(args):
    """The finished runs that the command line names, and the folder of its figures."""
    name = study.choose_preset(args.preset, study.choose_device("auto"))
    return FinishedRuns(args.results, name, args.drop), args.figures_dir / name


def main():
    every, p = FIGURES | TABLES, parser(__doc__)
    p.add_argument("figures", nargs="*", metavar="FIGURE", help=f"any of {', '.join(every)}")
    p.add_argument("--compare", type=Path, metavar="DIR", help="draw nothing: compare the CSV files of the figures "
                   "with those in DIR, number by number")
    args = p.parse_args()
    wanted = study.figure_names(args.figures, every) or list(every)
    runs, folder = open_study(args)
    if args.compare:
        sys.exit(compare(folder, args.compare, wanted))
    made = {name: make(runs, name, folder) for name in dict.fromkeys(wanted)}
    finish(runs, made, folder)
    sys.exit(1 if any(one.state == "NOT DRAWN" for one in made.values()) else 0)


if __name__ == "__main__":
    study.command_line(main)
