"""Draws the paper's figures, writes its tables and judges its claims from run folders; trains nothing.

    python make_figures.py                              # figures, tables, claims.csv, report.html
    python make_figures.py table2 7                     # only these
    python make_figures.py --compare expected/quick     # draws nothing: are the numbers near those of another study?

A figure is a PDF and a PNG beside a CSV of exactly the numbers drawn, in figures/PRESET/; a table is Markdown and CSV.
Each says what it was made from: a figure at its foot, a table at its head, a CSV in its last column. Errors are means
over trials; bars and bands are standard errors (ddof 1). If runs are missing, the output names the command for them.
"""

import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import common
import robustness
from study import claims, command, finished, folders, report
from study.finished import CONVNET, DENSENET, MLP, FinishedRuns, joint, mean_and_error, stem, trained, trials_of

import matplotlib
import numpy as np
import torch
from torchvision.utils import make_grid

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
BLUE, ORANGE, GREEN, PURPLE, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#555555"
STYLES = [{"color": BLUE, "marker": "o", "linestyle": "-"},
          {"color": ORANGE, "marker": "s", "linestyle": "--"},
          {"color": GREEN, "marker": "^", "linestyle": "-."},
          {"color": PURPLE, "marker": "D", "linestyle": ":"},
          {"color": YELLOW, "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))}]
# A lambda has one colour in all figures that compare a few of them.
LAMBDA = {"joint-0": STYLES[0], "joint-0.95": STYLES[2], "joint-0.99": STYLES[3], "joint-1": STYLES[1]}
PAPER = {"linestyle": "none", "marker": "*", "markersize": 11, "markerfacecolor": "white",
         "markeredgecolor": "black", "zorder": 5}
AT_CHANCE = "at the level of guessing: shows nothing"

# --- Figures -------------------------------------------------------------------------------------


def lambda_axis(ax, lambdas, label="λ  (0: independent, 1: end-to-end; not to scale)"):
    """Spreads 0.9 ... 1 apart: lambda is drawn at -log10(1.01 - lambda)."""
    ax.set_xscale("function", functions=(lambda x: -np.log10(np.clip(1.01 - x, 1e-3, None)),
                                         lambda y: 1.01 - 10.0 ** -y))
    ax.set(xlim=(-0.12, 1.0012), xlabel=label)
    lambda_ticks(ax, lambdas)


def lambda_ticks(ax, lambdas):
    """A tick for each lambda, from the last on, and its value where that of the one before is not in the way."""
    places = ax.transLimits.transform(ax.transScale.transform([(lam, 1) for lam in lambdas]))[:, 0]
    labels, right = {}, math.inf
    for lam, place in zip(lambdas[::-1], places[::-1], strict=True):
        if right - place > 0.07:                # of the axis
            labels[lam], right = f"{lam:g}", place
    ax.set_xticks(lambdas, [labels.get(lam, "") for lam in lambdas])
    ax.set_xticks([], minor=True)


def lambda_of(row):
    return float(row["method"].removeprefix("joint-"))


def line_over_lambda(ax, rows, style, label, key="test_error_percent"):
    """A line with standard errors through the rows (of FinishedRuns.point) that have runs; returns these rows."""
    there = [row for row in rows if row["n"]]
    if there:
        ax.errorbar([lambda_of(row) for row in there], [row[key] for row in there],
                    np.nan_to_num([row["standard_error"] for row in there]), **style, capsize=2, markersize=4.5,
                    label=label)
    return there


def single_network(ax, row):
    """The 1x1024H network, as a dashed line with a band of one standard error."""
    mean, error = row["test_error_percent"], row["standard_error"]
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
    bars = [("256x4H", "bagging", "Bagging", GREY), ("256x4H", "stacking", "Stacking", GREY),
            ("256x4H", "joint-0", "Independent\nλ = 0", BLUE), ("256x4H", "joint-1", "End-to-end\nλ = 1", ORANGE),
            ("256x4H", "joint-0.95", "Joint\nλ = 0.95", GREEN),
            ("1x1024H", "joint-1", "One network\n1x1024H", "black")]
    printed, rows = runs.published["fig2"]["test_error_percent"], []
    for x, (configuration, method, _, colour) in enumerate(bars):
        row = runs.point(MLP, configuration, method)
        row["published_percent"] = printed[configuration].get(method, "")
        rows.append(row)
        mean, error = row["test_error_percent"], row["standard_error"]
        if row["n"]:
            ax.bar(x, mean, 0.62, color=colour, alpha=0.85, yerr=error if row["n"] > 1 else None, capsize=3)
        ax.annotate(f"{mean:.1f}" if row["n"] else no_number(row), (x, 0), (0, 4), textcoords="offset points",
                    ha="center", color="white" if row["n"] else "black", fontweight="bold" if row["n"] else None)
    single_network(ax, rows[-1])
    if runs.at_protocol():
        theirs = [(x, row["published_percent"]) for x, row in enumerate(rows) if row["published_percent"]]
        ax.plot(*zip(*theirs, strict=True), **PAPER, label="printed in the paper")
    ax.set_xticks(range(len(bars)), [label for _, _, label, _ in bars])
    ax.set_xlim(-0.5, len(bars) - 0.5)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.2)
    ax.set(ylabel="test error (%)", title=f"256x4H ensembles and one large network, {n_of(rows)}")
    ax.grid(axis="x", visible=False)
    return fig, rows


def no_number(row):
    """Why a row without runs in use has no number."""
    return "diverged" if row["diverged"] else "not run"


def fig3(runs):
    """Fig. 3: test error against lambda, four ways to spend 815,000 parameters."""
    fig, ax = plt.subplots()
    rows, printed = [], runs.published["fig2"]["test_error_percent"]
    for configuration, style in zip(("256x4H", "64x16H", "16x64H"), STYLES, strict=False):
        points = [runs.point(MLP, configuration, joint(lam)) for lam in runs.lambdas(MLP, configuration)]
        line_over_lambda(ax, points, style, configuration)
        rows += points
    rows.append(runs.point(MLP, "1x1024H", "joint-1"))
    single_network(ax, rows[-1])
    for row in rows:
        row["published_percent"] = printed.get(row["configuration"], {}).get(row["method"], "")
    ax.set_ylim(ax.get_ylim())                              # from our runs alone
    if runs.at_protocol():
        theirs = [(lambda_of(row), row["published_percent"]) for row in rows[:-1] if row["published_percent"]]
        ax.plot(*zip(*theirs, strict=True), **PAPER, label="256x4H, printed in the paper")
    lambda_axis(ax, sorted({lambda_of(row) for row in rows}))
    ax.set(ylabel="test error (%)", title=f"Ways to spend a fixed number of parameters, {n_of(rows)}")
    return fig, rows


def robustness_figure(runs, configuration):
    """Test error against the share of members dropped: all of it, and up to 80 % where one point can be seen."""
    fig, (whole, near) = plt.subplots(1, 2, figsize=(4.8, 3.1))
    rows, flat = [], []
    for method, word in {"joint-0": ", independent", "joint-0.99": "", "joint-1": ", end-to-end"}.items():
        label = f"λ = {method.removeprefix('joint-')}{word}"
        histories = runs.histories(f"robustness-{runs.drop}", configuration, method)
        if not histories:
            state = no_number(runs.point(MLP, configuration, method))
            whole.plot([], [], **LAMBDA[method], label=f"{label}: {state}")
            continue
        dropped, members = histories[0][1]["dropped"], trained(histories[0][0])["members"]
        share = 100 * dropped / members
        mean, error = mean_and_error([100 * history["error"].mean(0) for _, history in histories])
        for ax in (whole, near):
            ax.plot(share, mean, **LAMBDA[method], markevery=max(1, members // 12), markersize=4, label=label)
            ax.fill_between(share, mean - error, mean + error, color=LAMBDA[method]["color"], alpha=0.2, linewidth=0)
        if method != "joint-1":
            flat += mean[share <= 80].tolist()
        rows += [{"configuration": configuration, "method": method, "n": len(histories), "dropped": at,
                  "dropped_percent": part, "test_error_percent": m, "standard_error": e}
                 for at, part, m, e in zip(dropped, share, mean, error, strict=True)]
    for ax in (whole, near):
        ax.axvline(50, color="black", linewidth=0.8, linestyle=":", label="half of them" if ax is whole else None)
        ax.set_xlabel("members dropped (%)")
    whole.set_ylabel("test error (%)")
    near.set(xlim=(-2, 80), title="up to 80 %, enlarged")
    if flat:
        low = math.floor(min(row["test_error_percent"] for row in rows))
        near.set_ylim(low, max(low + 5, math.ceil(max(flat)) + 1))
    if rows:
        how = {"example": "for every example", "set": "once for all examples"}[runs.drop]
        fig.legend(*whole.get_legend_handles_labels(), loc="outside upper center", ncols=4, columnspacing=1,
                   title_fontsize=8,
                   title=f"{configuration}: {members} members, dropped at random {how}, {n_of(rows)}")
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
        line_over_lambda(ax, points, style, label, "cross_entropy")
        rows += [{"loss": key, **row} for row in points]
    lambda_axis(ax, lambdas)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.set(ylabel="test cross entropy (nats, logarithmic)", title=f"64x16H, {n_of(rows)}")
    return fig, rows


def fig4(runs):
    """Fig. 4: test error of five ConvNet ensembles against lambda, the minimum of each marked."""
    fig, ax = plt.subplots()
    rows, ring = [], {"marker": "o", "linestyle": "none", "markersize": 11, "markerfacecolor": "none"}
    for configuration, style in zip(runs.published["table4"]["rows"], STYLES, strict=True):
        points = []
        for lam in runs.lambdas(CONVNET, configuration):
            point = runs.point(CONVNET, configuration, joint(lam))
            validation = [100 * record["result"].get("validation_error", math.nan)
                          for record, _ in runs.histories(CONVNET, configuration, joint(lam))]
            points.append(point | {"validation_error_percent": mean_and_error(validation)[0]})
        if there := line_over_lambda(ax, points, style, configuration):
            best = min(there, key=lambda row: row["test_error_percent"])
            ax.plot(lambda_of(best), best["test_error_percent"], **ring, markeredgecolor=style["color"], clip_on=False)
            for row in points:
                row["minimum"] = row is best
        rows += points
    ax.plot([], [], **ring, markeredgecolor=GREY, label="minimum")
    lambda_ticks(ax, sorted({lambda_of(row) for row in rows}))
    ax.set(xlabel="λ  (0: independent, 1: end-to-end)", ylabel="test error (%)",
           title=f"ConvNet ensembles, {n_of(rows)}")
    fig.legend(loc="outside upper center", ncols=3)
    return fig, rows


def filter_montage(filters, scale):
    """Filters (M, F, C, 3, 3) as one image, columns for each member, not taller than wide: grey is 0, scale is full."""
    members, count, channels = filters.shape[:3]
    columns = next(k for k in range(1, count + 1) if 4 * math.ceil(count / k) <= members * (4 * k + 1))
    pixels = 0.5 + (filters if channels == 3 else filters.mean(2, keepdim=True)) / (2 * scale)
    grids = [make_grid(member, columns, padding=1, pad_value=1) for member in pixels]
    return torch.cat(grids, 2).clamp(0, 1).movedim(0, 2).numpy()


def fig5(runs):
    """Fig. 5: first-layer filters of ten ConvNets, independent and end-to-end, to one scale."""
    sides, rows, shown = {"joint-0": "independent, λ = 0", "joint-1": "end-to-end, λ = 1"}, [], {}
    for method in sides:
        for record, folder in runs.runs(CONVNET, "10xConvNet-0.29M", method):
            if finished.diverged(record) or not (folder / "weights.pt").exists():
                continue                                            # FinishedRuns.missing names it
            filters, moved = finished.first_layer(folder, record)
            norms = filters.flatten(1).norm(dim=1)
            rows += [{"configuration": record["configuration"], "method": method, "trial": record["trial"],
                      "member": m + 1, "filter_norm": norms[m].item(),
                      "distance_from_initial_filters": moved[m].item()} for m in range(len(moved))]
            shown.setdefault(method, (record, filters, moved.numpy()))          # (the first trial)
    if not shown:
        return plt.figure(), rows
    # Full black and white belong to the largest in 200: one filter of a strong member would leave all others grey.
    scale = np.quantile(torch.stack([filters for _, filters, _ in shown.values()]).abs(), 0.995)
    montages = [filter_montage(filters, scale) for _, filters, _ in shown.values()]
    aspect = max(len(montage) / montage.shape[1] for montage in montages)
    fig, axes = plt.subplots(2, len(shown), figsize=(4.8, 2.5 + 2 * aspect), sharex="col", sharey="row",
                             height_ratios=[2 * aspect, 0.7], squeeze=False)
    for (image, distances), montage, (method, (record, _, moved)) in zip(axes.T, montages, shown.items(), strict=True):
        x = np.arange(1, len(moved) + 1)
        image.imshow(montage, aspect="auto", interpolation="nearest", extent=(0.5, len(moved) + 0.5, 0, 1))
        image.set_box_aspect(aspect)                                    # square pixels
        image.set_title(f"{sides[method]}\ntest error {100 * record['result']['test_ensemble_error']:.1f} %, "
                        f"trial {record['trial']}")
        image.set_axis_off()
        distances.bar(x, moved, 0.7, color=LAMBDA[method]["color"])
        distances.axhline(moved.max() / 2, color="black", linestyle=":")                # the threshold of C11
        distances.set_title(f"{(moved >= moved.max() / 2).sum()} of {len(x)} reach half of the largest", fontsize=7)
        distances.set_xticks(x, x)
        distances.set_xlabel("member")
    axes[0, 0].set_ylim(0, 1)
    axes[1, 0].set_ylabel("relative distance\nof the filters\nfrom the start", fontsize=7)
    return fig, rows


QUANTILES = (0.05, 0.25, 0.75, 0.95)        # of more than 20 members these are drawn, as two bands


def draw_members(ax, x, members, mark=""):
    """Errors of members, an array (trials, M) for each x: a mark or a line for each, or of more than 20 two bands."""
    if members[0].shape[1] > 20:
        edges = np.transpose([np.quantile(some, QUANTILES, axis=1).mean(1) for some in members])
        for low, high, alpha in ((0, 3, 0.2), (1, 2, 0.35)):
            ax.fill_between(x, edges[low], edges[high], color=GREY, alpha=alpha, linewidth=0)
    elif mark:
        for at, some in zip(x, members, strict=True):
            ax.plot(np.full(some.size, at), some.ravel(), mark, color=GREY, alpha=0.7, markersize=9, clip_on=False)
    else:
        ax.plot(x, np.concatenate(members), color=GREY, alpha=0.7, linewidth=0.8)


def error_rows(record, part, epoch, ensemble, members, best=None):
    """Rows of Fig. 6's CSV: the errors of the ensemble, and of each member or of more than 20 those that are drawn."""
    at = {"configuration": record["configuration"], "method": joint(record["lambda"]), "trial": record["trial"],
          "part": part, "epoch": epoch}
    shown = {f"member {m + 1}": error for m, error in enumerate(members)}
    if len(members) > 20:
        shown = {f"{100 * q:g} % of the members": np.quantile(members, q) for q in QUANTILES}
    if best is not None:
        shown["best in training at the end"] = members[best]
    return [{**at, "who": who, "error_percent": 100 * float(error)}
            for who, error in ({"ensemble": ensemble} | shown).items()]


def draw_ends(ax, found, part):
    """Fig. 6, at the end: errors against lambda, of all trials. found: {lambda: histories}. Returns rows of the CSV."""
    ends = {lam: [finished.errors_at_the_end(*one, part) for one in histories] for lam, histories in found.items()}
    lambdas = list(ends)
    draw_members(ax, lambdas, [100 * np.stack([members for _, members in some]) for some in ends.values()], "_")
    mean, error = np.transpose([mean_and_error([100 * ensemble for ensemble, _ in some]) for some in ends.values()])
    ax.errorbar(lambdas, mean, np.nan_to_num(error), **STYLES[0], markersize=4, capsize=2)
    lambda_axis(ax, lambdas, "λ, not to scale")
    ax.tick_params("x", rotation=60)
    ax.set_title(f"{'training' if part == 'train' else part} error at the end, "
                 f"n = {trials_of(len(some) for some in ends.values())}")
    return [row for lam, some in ends.items() for (record, _), errors in zip(found[lam], some, strict=True)
            for row in error_rows(record, part, "end", *errors)]


def draw_epochs(ax, record, history, part):
    """Fig. 6, epoch by epoch: one run at lambda 1. Returns rows of the CSV."""
    members, ensemble = history[f"{part}_member_error"], history[f"{part}_ensemble_error"]     # (epochs, M), (epochs,)
    best = finished.errors_at_the_end(record, history, "train")[1].argmin()
    x = 1 + np.flatnonzero(np.isfinite(ensemble))                       # (the test set is not evaluated in every epoch)
    draw_members(ax, x, [100 * members[epoch - 1:epoch] for epoch in x])
    ax.plot(x, 100 * members[x - 1, best], color=ORANGE, linewidth=1.3, linestyle="--")
    ax.plot(x, 100 * ensemble[x - 1], color=BLUE, linewidth=1.5)
    if len(members) >= 10:
        ax.axvline(3, color="black", linewidth=0.8, linestyle=":")
    ax.set_title(f"{'training' if part == 'train' else part} error, λ = 1")
    ax.set_xlabel(f"epoch (trial {record['trial']})")
    ax.xaxis.get_major_locator().set_params(integer=True)
    return [row for epoch in x.tolist()
            for row in error_rows(record, part, epoch, ensemble[epoch - 1], members[epoch - 1], best)]


def fig6(runs):
    """Fig. 6: errors of the ensemble and of every member, at the end and epoch by epoch."""
    rows, numbers, lines = [], [], []           # lines: {lambda: histories}, or the first run at lambda 1 alone
    for experiment, configuration in ((DENSENET, "DN-High"), (MLP, "256x4H")):
        found = {}
        for lam in runs.lambdas(experiment, configuration):
            if histories := runs.histories(experiment, configuration, joint(lam)):
                found[lam] = histories
            numbers += runs.dominances(experiment, configuration, lam)
        lines += [(configuration, some) for some in (found, found.get(1)) if some]
    fig, axes = plt.subplots(max(1, len(lines)), 2, figsize=(4.8, 0.6 + 1.75 * max(1, len(lines))), sharey="row",
                             squeeze=False)
    for (left, right), (configuration, some) in zip(axes, lines, strict=False):
        left.set_ylabel(f"{configuration}: error (%)")
        if isinstance(some, dict):
            rows += draw_ends(left, some, "train") + draw_ends(right, some, "test")
        else:
            held_out = "validation" if "validation_member_error" in some[0][1] else "test"
            rows += draw_epochs(left, *some[0], "train") + draw_epochs(right, *some[0], held_out)
    handles = [plt.Line2D([], [], color=BLUE, marker="o", markersize=4, label="ensemble"),
               plt.Line2D([], [], color=GREY, linewidth=4, alpha=0.5, label="members (over 20: 5 to 95, 25 to 75 %)"),
               plt.Line2D([], [], color=ORANGE, linestyle="--", label="member best in training at the end"),
               plt.Line2D([], [], color="black", linestyle=":", linewidth=0.8, label="epoch 3 (of at least ten)")]
    fig.legend(handles=handles, loc="outside upper center", ncols=2)
    return fig, {"": rows, "-dominance": numbers}


FIGURES = {"2": fig2, "3": fig3, "4": fig4, "5": fig5, "6": fig6, "7": fig7, "8": fig8, "9": fig9}

# --- Tables --------------------------------------------------------------------------------------


@dataclass
class Table:
    """A table as it is printed, its cells as text (**bold**)."""
    caption: str
    columns: list
    cells: list           # rows of str
    notes: list


def beside_paper(text, theirs):
    return f"{text} (paper: {theirs})" if theirs != "" else text


def densenets(runs):
    """The paper's DenseNet ensembles for 100 classes, with computed parameters: the rows of Tables 1 and 3."""
    for name, printed in runs.published["table1"]["rows"].items():
        c = runs.paper[DENSENET]["configurations"][name]
        yield {"configuration": name, "depth": c["depth"], "k": c["growth"], "M": c["members"],
               "parameters": finished.parameters(DENSENET, c), "published_parameters": printed["parameters"]}


def densenet_cells(row):
    return [*(str(row[key]) for key in ("configuration", "depth", "k", "M")),
            beside_paper(f"{row['parameters']:,}", row["published_parameters"])]


def table1(runs):
    """Table 1: the DenseNet ensembles, and what a training step takes."""
    rows, cells = list(densenets(runs)), []
    steps = {row["network"]: row for row in finished.read_csv(folders.HERE / "benchmarks/h200.csv")
             if (row["precision"], row["way"]) == ("fp32", "as it is")}
    for row in rows:
        step, printed = steps[row["configuration"]], runs.published["table1"]["rows"][row["configuration"]]["memory"]
        peak = f"at most {float(step['peak_GB']):.1f} GB for a step on an {step['device']}"
        row |= {"peak_cuda_memory": peak, "published_memory": printed}
        cells.append([*densenet_cells(row), beside_paper(peak, printed)])
    return Table("DenseNet ensembles on 32x32 images of 100 classes.",
                 ["Name", "Depth", "k", "M", "Parameters", "Peak on a GPU"], cells,
                 ["The peak is that of benchmarks/h200.csv, whose own tensors of 1.5 GB are in it."]), rows


def table2(runs):
    """Table 2: test error of the DenseNet ensembles by method."""
    methods = {"joint-0": "λ = 0 (independent)", "joint-0.5": "λ = 0.5", "joint-0.9": "λ = 0.9",
               "joint-1": "λ = 1 (end-to-end)", "bagging": "Bagging", "stacking": "Stacking",
               "independent": "Independent (own lr)"}
    printed, rows = runs.published["table2"]["test_error_percent"], []
    for lam in sorted({lam for name in printed for lam in runs.lambdas(DENSENET, name)}):
        methods.setdefault(joint(lam), f"λ = {lam:g}")
    cells = {method: [words] for method, words in methods.items()}
    columns = {name: [runs.point(DENSENET, name, method) for method in methods] for name in printed}
    for name, column in columns.items():
        lowest = min((row["test_error_percent"] for row in column if row["n"]), default=None)
        for row in column:
            row["published_percent"] = printed[name].get(row["method"], "") if runs.at_protocol() else ""
            row["minimum"] = bool(row["n"]) and row["test_error_percent"] == lowest
            text = f"{row['test_error_percent']:.1f}" if row["n"] else no_number(row)
            text = f"**{text}**" if row["minimum"] else text
            text += f" ± {row['standard_error']:.1f}" if row["n"] > 1 else ""
            text += f", n = {row['n']}" if row["n"] else ""
            cells[row["method"]].append(beside_paper(text, row["published_percent"]))
        rows += column
    notes = ["Mean ± standard error over n trials. Independent (own lr) is no row of the paper: each member trains at "
             "the whole learning rate, at λ = 0 at 1/M of it."]
    return Table("Test error (%) of DenseNet ensembles; the minimum of each column is bold.", ["", *printed],
                 list(cells.values()), notes), rows


def table3(runs):
    """Table 3: the DenseNet architectures, with computed counts."""
    rows = list(densenets(runs))
    return Table("DenseNet architectures, for 100 classes.", ["Name", "Depth", "k", "Modules", "Parameters"],
                 [densenet_cells(row) for row in rows], ["Parameters are those of all modules together."]), rows


def table4(runs):
    """Table 4: the ConvNet architectures, with computed counts."""
    block, cells, rows, notes = runs.paper[CONVNET], [], [], []
    for name, printed in runs.published["table4"]["rows"].items():
        c = block["configurations"][name]
        count, theirs = finished.parameters(CONVNET, c) // c["members"], printed["parameters"]
        differs = theirs != f"{count / 1e6:.2f}M"
        rows.append({"configuration": name, "filters": " ".join(map(str, c["filters"])),
                     "strides": " ".join(map(str, c["strides"])), "parameters": count,
                     "published_parameters": theirs, "differs": differs})
        filters = ", ".join(f"**{f}**" if stride > 1 else str(f)
                            for f, stride in zip(c["filters"], c["strides"], strict=True))
        cells.append([name, beside_paper(f"{count:,}", theirs) + "*" * differs, str(len(c["filters"])), filters])
        if differs:
            notes.append(f"* does not round to what the paper prints: {theirs} computes to {count / 1e6:.3f}M.")
    return Table("ConvNet architectures: 3x3 convolutions, stride 2 in bold, for 100 classes.",
                 ["Name", "Parameters of a member", "Layers", "Filters"], cells,
                 [*notes, "Strides of the first and the last row are our reading: docs/open-questions.md."]), rows


TABLES = {"table1": table1, "table2": table2, "table3": table3, "table4": table4}

# --- Writing -------------------------------------------------------------------------------------


@dataclass
class Made:
    """A figure or table: what it shows, what became of it, and what it was made from."""
    about: str
    state: str            # complete | incomplete | NOT DRAWN
    table: object         # the Table, of a table
    used: dict            # folder -> run.json
    missing: list         # (experiment, configuration, method, trial)
    provenance: str


def save_table(table, provenance, path, at_chance):
    """Writes path.md, with the provenance at the head."""
    lines = [f"**Table {path.name[-1]}. {table.caption}**", "", *[f"**{AT_CHANCE.capitalize()}.**  "] * at_chance,
             *(f"{line}  " for line in provenance.split("\n")), "",
             "| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns),
             *("| " + " | ".join(row) + " |" for row in table.cells), "",
             *(note.replace("*", r"\*") for note in table.notes), ""]
    folders.write(path.with_suffix(".md"), lambda file: file.write("\n".join(lines).encode()))


def save_figure(fig, provenance, path, at_chance):
    """Writes path.pdf and path.png, with the provenance at the figure's foot."""
    width, height = fig.get_size_inches()
    if fig.axes[0].get_legend_handles_labels()[0] and not fig.legends:
        fig.axes[0].legend()
    foot = [part for line in provenance.split("\n") for part in textwrap.wrap(line, int(18.5 * width))]
    bottom = (0.06 + 0.12 * len(foot)) / height
    fig.get_layout_engine().set(rect=(0, bottom, 1, 1 - bottom))
    fig.text(0.01, 0.03 / height, "\n".join(foot), fontsize=7, color=GREY)
    if at_chance:
        fig.text(0.5, 0.55, AT_CHANCE.replace(": ", ":\n"), fontsize=13, color=ORANGE, rotation=20, ha="center",
                 va="center", bbox={"facecolor": "white", "edgecolor": ORANGE, "alpha": 0.85})
    folders.write(path.with_suffix(".png"), lambda file: fig.savefig(
        file, format="png", dpi=200, metadata={"Software": None}))          # (the same bytes each time)
    folders.write(path.with_suffix(".pdf"), lambda file: fig.savefig(
        file, format="pdf", metadata=dict.fromkeys(("CreationDate", "Creator", "Producer"))))


def make(runs, name, folder):
    """Draws a figure or writes a table into a folder, and says what it was made from."""
    runs.begin()
    draw, save = (TABLES[name], save_table) if name in TABLES else (FIGURES[name], save_figure)
    drawn, rows = draw(runs)
    rows = rows if isinstance(rows, dict) else {"": rows}           # of several CSV files, by what their names add
    missing, provenance, state = runs.missing(name), runs.provenance(), "NOT DRAWN"
    another_drop = name in robustness.FIGURES and runs.drop != "example"
    path = folder / (f"{stem(name)}-{runs.drop}" if another_drop else stem(name))
    if any(row.get("n", 1) for row in rows[""]):                    # is there a point?
        state = "incomplete" if missing else "complete"
        save(drawn, provenance, path, runs.at_chance())
        for more, some in rows.items():
            finished.write_csv(path.with_name(f"{path.name}{more}.csv"), some, provenance)
        print(f"{stem(name)}: {state}, {path}.*", flush=True)
    else:
        gone = runs.used and all(map(finished.diverged, runs.used.values()))
        why = "" if missing else ", all its runs diverged" if gone else ", the preset has no run of it"
        print(f"{stem(name)}: {state}{why}", flush=True)
    plt.close("all")
    if missing:
        print(f"  {len(missing)} runs are missing:", *(f"    {line}" for line in what_is_missing(missing)),
              "  to make them:", *(f"    {command}" for command in runs.commands(name, runs.used)), sep="\n")
    about = " ".join(draw.__doc__.split()).removesuffix(".")
    return Made(about, state, drawn if name in TABLES else None, runs.used, missing, provenance)


def what_is_missing(missing):
    """A line with the trials for every experiment, configuration and method of FinishedRuns.missing."""
    trials = {}
    for experiment, configuration, method, trial in missing:
        trials.setdefault(f"{experiment} {configuration} {method}", []).append(str(trial))
    return [f"{what}, trial {' '.join(which)}" for what, which in trials.items()]


def judge(runs, made, folder):
    """Judges the claims, and writes claims.csv and the report."""
    judged = [claims.judge(runs, name) for name in [*runs.published["claims"], *claims.EXPLORATORY]]
    finished.write_csv(folder / "claims.csv", list(claims.rows_of(judged)))
    claims.print_claims(judged)
    page = report.page(runs, folder, made, judged)
    folders.write(folder / "report.html", lambda file: file.write(page.encode()))
    print(f"every statistic: {folder / 'claims.csv'}", f"report: {folder / 'report.html'}", sep="\n")


# --- Comparing -----------------------------------------------------------------------------------

# How far cells of two runs of one preset may lie apart, as math.isclose takes it; other columns name a row or follow.
TOLERANCES = {
    **{key: {"rel_tol": 0} for key in ("n", "diverged", "depth", "k", "M", "parameters")},
    **{key: {"abs_tol": 3} for key in ("test_error_percent", "validation_error_percent")},
    "error_percent": {"abs_tol": 10},
    **{key: {"rel_tol": 0.15} for key in ("cross_entropy", "filter_norm", "distance_from_initial_filters")}}
KEYS = ("configuration", "method", "trial", "part", "epoch", "who", "member", "dropped", "loss", "claim")


def compare(ours, theirs, names):
    """Prints which numbers and verdicts of two folders are apart; returns an exit status, 0 if none is."""
    total = far = 0
    for path in (path for name in names for path in sorted(theirs.glob(f"{name}*.csv"))):
        if not (ours / path.name).exists():
            raise common.Refused(f"{ours / path.name} does not exist: draw it first, with the same --preset")
        mine, expected = ({tuple(row.get(key, "") for key in KEYS): row for row in finished.read_csv(place / path.name)}
                          for place in (ours, theirs))
        for key, row in expected.items():
            for column in ["outcome"] if "outcome" in row else sorted(row.keys() & TOLERANCES.keys()):
                cell, total = mine.get(key, {}).get(column, ""), total + 1
                if cell != row[column] and (column == "outcome" or not math.isclose(
                        float(cell or "nan"), float(row[column] or "nan"), **TOLERANCES[column])):
                    far += 1
                    print(f"{path.name}: {' '.join(filter(None, key))}: {column} {cell}, expected {row[column]}")
    if not total:
        raise common.Refused(f"--compare {theirs} has no numbers of these figures: try expected/quick")
    print(f"{total - far} of {total} numbers and verdicts are within their tolerances of {theirs}")
    return 1 if far else 0


def main():
    every, p = FIGURES | TABLES, command.Parser(__doc__)
    place = {"type": Path, "metavar": "DIR"}
    p.add_argument("figures", nargs="*", metavar="FIGURE", help=f"any of {', '.join(every)} (default: all)")
    p.add_argument("--preset", help="whose runs to draw (default: short if torch can use a CUDA GPU, else quick)")
    p.add_argument("--results", default="results", help="the folder of the run folders (default: results)", **place)
    p.add_argument("--figures-dir", default="figures", help="the folder of the figures (default: figures)", **place)
    p.add_argument("--drop", default="example", choices=robustness.DROPS,
                   help="the --drop of robustness.py, of Figs 7 and 8 (default: example)")
    p.add_argument("--compare", help="draw nothing: compare the numbers of the figures, and all verdicts, with those "
                   "in DIR; exit status 1 if any is apart", **place)
    args = p.parse_args()
    names = list(dict.fromkeys(command.figure_names(args.figures, every))) or list(every)
    preset = command.choose_preset(args.preset, command.choose_device("auto"))
    runs, folder = FinishedRuns(args.results, preset, args.drop), args.figures_dir / preset
    if args.compare:
        sys.exit(compare(folder, args.compare, [*map(stem, names)] + ["claims"] * (not args.figures)))
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: make(runs, name, folder) for name in names}
    if rows := list(runs.every_run()):
        finished.write_csv(folder / "runs.csv", rows)
        print(f"all {len(rows)} training runs, a line each: {folder / 'runs.csv'}")
    print("figures: " + ", ".join(f"{stem(name)} {one.state}" for name, one in made.items()))
    if not args.figures:
        judge(runs, made, folder)
    sys.exit(1 if any(one.state == "NOT DRAWN" for one in made.values()) else 0)


if __name__ == "__main__":
    command.command_line(main)
