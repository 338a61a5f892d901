"""Draws the paper's figures from run folders; trains nothing.

    python make_figures.py                   # every figure that the runs at hand allow
    python make_figures.py fig3 fig7         # these

Each figure is a PDF and a PNG, with a CSV of exactly the numbers drawn, in figures/PRESET/, and
says at its foot what it was made from; runs.csv beside them has a line for every run. Errors are
means over trials; bars and bands are standard errors (ddof 1). Where runs are missing it says
which, and the command that makes them.
"""

import csv
import io
import math
import sys
from pathlib import Path

import common

import matplotlib
import numpy as np
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
          {"color": GREEN, "marker": "^", "linestyle": "-."}]
PAPER = {"linestyle": "none", "marker": "*", "markersize": 11, "markerfacecolor": "white",
         "markeredgecolor": "black", "zorder": 5}

# --- The runs of a figure ----------------------------------------------------------------------


class Study:
    """The runs of one preset for one figure: it finds them, and knows which are missing."""

    def __init__(self, results, name, drop):
        self.results, self.name, self.drop = results, name, drop
        experiment = common.experiment_of("mlp_fmnist")
        self.block = common.experiment_settings(common.load_preset(name), name, experiment)
        self.published = yaml.safe_load((common.HERE / "published.yaml").read_text())
        self.used, self.missing = {}, {}    # folder -> run.json; (experiment, configuration, ...)

    def find(self, experiment, configuration, method):
        """(run.json, folder) by trial of the finished runs of one method; notes what is missing."""
        folder = self.results / self.name / experiment / configuration / method
        found = [(common.read_run(path.parent), path.parent)
                 for path in sorted(folder.glob("trial*/run.json"))]
        there = {record["trial"] for record, _ in found}
        self.missing |= {(experiment, configuration, method, trial): None
                         for trial in range(self.block["trials"]) if trial not in there}
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
        if len(found) < self.block["trials"]:                       # is it trained at all?
            self.find("mlp_fmnist", configuration, method)
        histories = [common.load_history(folder) for _, folder in found]
        x = "probability" if self.drop == "probability" else "dropped"
        return [(history[x], 100 * history["error"].mean(0)) for history in histories]

    def lambdas(self, configuration):
        """The lambdas planned for a configuration, and any others that were run."""
        there = (self.results / self.name / "mlp_fmnist" / configuration).glob("joint-*/trial*")
        return sorted({float(path.parent.name.removeprefix("joint-")) for path in there}
                      | set(self.block["lambdas"]))

    def point(self, configuration, method, key="test_ensemble_error", name="test_error_percent"):
        """One number of a configuration and method over its trials, as a row of a figure's CSV."""
        results = [record["result"] for record, _ in self.runs("mlp_fmnist", configuration, method)]
        scale = 100 if name.endswith("_percent") else 1
        values = [scale * r[key] for r in results if r["diverged_at_epoch"] is None]
        mean, error = mean_and_error(values)
        return {"configuration": configuration, "method": method, "n": len(values),
                "diverged": len(results) - len(values), name: mean, "standard_error": error}

    def provenance(self):
        """Two lines that say what was used. Raises Refused if runs of other settings are mixed."""
        shared = ("data", "epochs", "train", "validation", "test", "batch", "momentum",
                  "weight_decay", "seed")
        settings = {path: {key: trained(record)[key] for key in shared}
                    for path, record in self.used.items()}
        s = next(iter(settings.values()))
        for path, other in settings.items():
            self.refuse_difference(s, other, path)
        records = self.used.values()
        data = f"{s['data']['name']} (real)" if self.real() else "SYNTHETIC STAND-IN DATA"
        images = f"{s['train']:,} training images" if s["train"] else "all training images"
        trials = len({record["trial"] for record in records})
        devices = ", ".join(sorted({record["machine"]["device"] for record in records}))
        commits = ", ".join(sorted({str(record["machine"]["commit"]) for record in records}))
        diverged = sum(r["result"].get("diverged_at_epoch") is not None for r in records)
        note = f" · {diverged} diverged, left out of the means" if diverged else ""
        return (f"{data} · preset {self.name}: {images}, {s['epochs']} epochs, {trials} "
                f"trial{'s' * (trials != 1)}{note}\n{devices} · commit {commits}")

    def real(self):
        """Only beside results on the real data do the paper's numbers mean anything."""
        return all(trained(record)["data"]["source"] == "real" for record in self.used.values())

    def commands(self):
        """What makes the missing runs."""
        def flags(runs):
            names = dict.fromkeys(configuration for _, configuration, _, _ in runs)
            lambdas = sorted({float(method.removeprefix("joint-")) for _, _, method, _ in runs
                              if method.startswith("joint-")})
            return " ".join([
                f"--preset {self.name} --only {' '.join(names)}",
                *(["--lambdas", *map(common.lambda_name, lambdas)] if lambdas else []),
                *(["--results", str(self.results)] if self.results != Path("results") else [])])

        training = [run for run in self.missing if run[0] == "mlp_fmnist"]
        dropping = [run for run in self.missing if run[0] != "mlp_fmnist"]
        if training:
            methods = dict.fromkeys(method.split("-")[0] for _, _, method, _ in training)
            yield (f"python train_mlp_fmnist.py {flags(training)} --methods {' '.join(methods)}"
                   + ("" if self.real() else " --data synthetic"))
        if dropping:
            yield f"python robustness.py {flags(dropping)}" + (
                "" if self.drop == "example" else f" --drop {self.drop}")

    def what_is_missing(self):
        """A line for every configuration and method, with its trials."""
        trials = {}
        for experiment, configuration, method, trial in self.missing:
            kind = "" if experiment == "mlp_fmnist" else f" {experiment}"
            trials.setdefault(f"{configuration} {method}{kind}", []).append(str(trial))
        return [f"{what}, trial {' '.join(which)}" for what, which in trials.items()]


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
    row = study.point("1x1024H", "joint-1")
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
    rows = [study.point("256x4H", method) for method in methods]
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
    for configuration, style in zip(("256x4H", "64x16H", "16x64H"), STYLES, strict=True):
        lambdas = study.lambdas(configuration)
        every |= set(lambdas)
        points = [study.point(configuration, f"joint-{common.lambda_name(lam)}")
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
    for method, style in zip(("joint-0", "joint-0.99", "joint-1"), STYLES, strict=True):
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
    rows, lambdas = [], study.lambdas("64x16H")
    for key, label, style in (("test_mean_member_loss", "mean of the members", STYLES[1]),
                              ("test_ensemble_loss", "ensemble", STYLES[0])):
        points = [study.point("64x16H", f"joint-{common.lambda_name(lam)}", key, "cross_entropy")
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


FIGURES = {"fig2": fig2, "fig3": fig3, "fig7": fig7, "fig8": fig8, "fig9": fig9}

# --- main --------------------------------------------------------------------------------------


def write_csv(path, rows):
    """Rows (dicts) as CSV, with a column for every key of any of them."""
    table = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    common.write(path, lambda file: file.write(table.getvalue().encode()))


def list_runs(results, name):
    """A row for every training run of a preset: what it is, what came out, on what and when."""
    for path in sorted((results / name).glob("*/*/*/trial*/run.json")):
        record = common.read_run(path.parent)
        if not record["experiment"].startswith("robustness"):
            yield {"run": str(path.parent.relative_to(results)), **record["result"],
                   "lr": record["settings"]["lr"], "epochs": record["settings"]["epochs"],
                   "data": record["settings"]["data"]["name"], "parameters":
                   record.get("parameters"), "seconds": record["seconds"],
                   "finished": record["finished"], **record["machine"]}


def save(fig, rows, study, path):
    """Writes path.pdf, path.png and path.csv, with the provenance at the figure's foot."""
    provenance = study.provenance()
    common.make_writable(path.parent)
    if fig.axes[0].get_legend_handles_labels()[0]:
        fig.axes[0].legend(frameon=False)
    fig.get_layout_engine().set(rect=(0, 0.07, 1, 0.93))
    fig.text(0.01, 0.012, provenance, fontsize=5.5, color=GREY)
    write_csv(path.with_suffix(".csv"),
              [{**row, "provenance": provenance.replace("\n", " · ")} for row in rows])
    common.write(path.with_suffix(".png"), lambda file: fig.savefig(file, format="png", dpi=200))
    common.write(path.with_suffix(".pdf"), lambda file: fig.savefig(
        file, format="pdf", metadata={"CreationDate": None}))


def main():
    p = common.Parser(__doc__)
    p.add_argument("figures", nargs="*", metavar="FIGURE", help=f"any of {', '.join(FIGURES)}")
    p.add_argument("--preset", help="the preset whose runs to draw (default: the driver's rule)")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR",
                   help="where run folders are (default: results)")
    p.add_argument("--figures-dir", type=Path, default=Path("figures"), metavar="DIR",
                   help="where the figures go (default: figures)")
    p.add_argument("--drop", default="example", metavar="HOW",
                   help="draw Figs 7 and 8 from robustness.py --drop HOW (default: example)")
    args = p.parse_args()
    name = common.choose_preset(args.preset)
    wanted = [common.nearest(figure, FIGURES, "figure") for figure in args.figures or FIGURES]
    common.nearest(args.drop, common.DROPS, "value of --drop")
    folder, made = args.figures_dir / name, {"complete": [], "incomplete": [], "NOT DRAWN": []}
    for figure in wanted:
        study = Study(args.results, name, args.drop)
        fig, rows = FIGURES[figure](study)
        other = figure in ("fig7", "fig8") and args.drop != "example"
        path = folder / (f"{figure}-{args.drop}" if other else figure)
        if study.used:
            save(fig, rows, study, path)
        plt.close(fig)
        state = ("incomplete" if study.missing else "complete") if study.used else "NOT DRAWN"
        made[state].append(figure)
        print(f"{figure}: {state}" + (f", {path}.pdf, .png, .csv" if study.used else ""))
        if not study.used and path.with_suffix(".pdf").exists():
            print(f"  {path}.pdf is of an earlier drawing")
        if study.missing:
            print(f"  {len(study.missing)} runs are missing:")
            print(*(f"    {line}" for line in study.what_is_missing()), sep="\n")
            print("  to make them:")
            print(*(f"    {command}" for command in study.commands()), sep="\n")
    if runs := list(list_runs(args.results, name)):
        common.make_writable(folder)
        write_csv(folder / "runs.csv", runs)
        print(f"all {len(runs)} training runs, a line each: {folder / 'runs.csv'}")
    print("figures: " + "; ".join(f"{state}: {' '.join(which)}" for state, which in made.items()
                                  if which))
    sys.exit(1 if made["NOT DRAWN"] else 0)


if __name__ == "__main__":
    common.command_line(main)
