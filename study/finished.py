"""The finished runs of one preset: those of a figure, those that are missing, and what they were made from.

make_figures.py, claims.py and report.py read run folders through this file and no other.
"""

import collections
import csv
import functools
import importlib
import io
import math
import shlex
from pathlib import Path

import common
from study import folders, plan
from common import Refused
from study.plan import experiment_of

import numpy as np
import torch
import yaml

MLP, DENSENET, CONVNET = "mlp_fmnist", "densenet_cifar", "convnet_cifar"
LEARNING = 0.8          # an ensemble learns if its test error is at most this share of the error of guessing
OF_A_METHOD = {"lr", "bagging", "stacking", "folds", "penalties"}       # settings in which the trials of a method agree
# Settings in which the runs of an experiment agree (but `independent`, with a weight decay of its own). In the others,
# those of a configuration do.
OF_AN_EXPERIMENT = {"data", "seed", "classes", "precision", "loss", "padding", "batchnorm", *plan.SHARED}


def joint(lam):
    return folders.method_name("joint", lam)


def stem(name):
    """The name of a figure's files: 2 -> fig2, table2 -> table2."""
    return name if name.startswith("table") else f"fig{name}"


def trained_in(experiment):
    """The training experiment: itself, and for robustness runs that of the MLPs, which they measure."""
    return MLP if experiment.startswith("robustness") else experiment


def trained(record):
    """The settings that a run was trained with; for a robustness run, those of the run that it measured."""
    return record["settings"].get("trained", record["settings"])


def diverged(record):
    return record["result"].get("diverged_at_epoch") is not None


def trials_of(counts):
    """Numbers of trials as text: "3", or "1 to 3"."""
    counts = [count for count in counts if count] or [0]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(min(counts))


def mean_and_error(values):
    """The mean over trials, the first axis, and its standard error (ddof 1; nan for a single trial)."""
    values = np.asarray(values, float)
    if not len(values):
        return math.nan, math.nan
    error = values.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan * values[0]
    return values.mean(0), error


# --- CSV files -----------------------------------------------------------------------------------


def write_csv(path, rows, provenance=""):
    """Rows (dicts) as CSV, with a column for every key; the last one has the provenance, in the first row.

    It has no comma there: numpy.genfromtxt, which knows no quotes, would find more cells in that row.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if provenance:
        columns.append("provenance")
        provenance = provenance.replace("\n", " · ").replace(",", ";")
        rows = [row | {"provenance": "" if i else provenance} for i, row in enumerate(rows)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folders.write(path, lambda file: file.write(text.getvalue().encode()))


def read_csv(path):
    """The rows (dicts of text) of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- Numbers of one run --------------------------------------------------------------------------


def error_share(record, folder):
    """An ensemble's test error over that of guessing; 0 if it diverged, which gives no number."""
    if diverged(record):
        return 0
    error = record["result"].get("test_ensemble_error")
    if error is None:                       # a robustness run: with all members
        error = folders.load_history(folder)["error"].mean(0)[0]
    s = trained(record)
    return error / (1 - 1 / (s.get("classes") or common.DATASETS[s["dataset"]].classes))    # (older runs: all classes)


def dominance(record, history):
    """How far one member is ahead of the others, in points of error: a row of Fig. 6's numbers.

    dominance is the median member's error minus the best member's, at the reported epoch. In runs of at least ten
    epochs, in which epoch 3 is early, gap_at_epoch_3 is that between the two lowest training errors.
    """
    at, epochs = record["result"]["epoch"] - 1, record["settings"]["epochs"]
    row = {"configuration": record["configuration"], "method": joint(record["lambda"]), "trial": record["trial"],
           "epochs": epochs}
    for part, errors, ensemble in (
            ("train", history["train_member_error"][at], history["train_ensemble_error"][at]),
            ("test", history["reported_test_member_error"], record["result"]["test_ensemble_error"])):
        best, second = np.sort(errors)[:2]
        row |= {f"{part}_{name}": 100 * float(value) for name, value in (
            ("ensemble_error", ensemble), ("best_member_error", best), ("second_best_member_error", second),
            ("median_member_error", np.median(errors)), ("dominance", np.median(errors) - best))}
    if epochs >= 10:
        early, end = history["train_member_error"][2], int(history["train_member_error"][at].argmin())
        best, second = np.sort(early)[:2]
        row |= {"best_member_at_epoch_3": int(early.argmin()) + 1, "best_member_at_end": end + 1,
                "same": int(early.argmin()) == end, "gap_at_epoch_3": 100 * float(second - best)}
    return row


def first_layer(folder, record):
    """The first filters (M, F, C, 3, 3) of ConvNets, and their distance (M,) from the initial ones, over their norm."""
    s, dataset = record["settings"], common.DATASETS[record["settings"]["dataset"]]
    run = plan.Run("", record["experiment"], record["configuration"], "joint", 0, record["trial"], s, False)
    classes = s.get("classes") or dataset.classes                       # (runs of earlier versions have all)
    start = experiment_of(CONVNET).build(s, dataset.shape, classes, run.generator("initialisation")).state_dict()
    before, now = (torch.stack([w[f"members.{m}.0.weight"] for m in range(s["members"])])
                   for w in (start, folders.load_weights(folder)))
    return now, (now - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)


def parameters(experiment, settings, classes=100):
    """The parameters of all members for 32x32 images; takes no memory."""
    build, one = experiment_of(experiment).build, settings | {"members": 1, "precision": "fp32"}
    with torch.device("meta"):
        member = build(one, (3, 32, 32), classes, torch.Generator("cpu"))
    return settings["members"] * sum(p.numel() for p in member.parameters())


# --- The runs of a preset ------------------------------------------------------------------------


class FinishedRuns:
    """The finished runs of one preset in a results folder. `used` has those that were asked for since begin()."""

    def __init__(self, results, name, drop):
        self.results, self.name, self.drop = results, name, drop
        self.results_flag = f" --results {shlex.quote(str(results))}" if results != Path("results") else ""
        preset, paper = plan.load_preset(name), plan.load_preset("paper")
        self.block, self.paper = ({experiment: plan.experiment_settings(settings, which, experiment)
                                   for experiment in (MLP, DENSENET, CONVNET)}
                                  for settings, which in ((preset, name), (paper, "paper")))
        self.measured = {"drop": "example", "repeats": paper["robustness"]["repeats"]}     # as the paper has it
        self.published = yaml.safe_load((folders.HERE / "study/paper.yaml").read_text(encoding="utf-8"))
        self.whole_run = functools.cache(folders.read_whole_run)     # every run is checked once
        self.begin()

    def begin(self):
        self.used = {}                                          # folder -> run.json
        self.asked = set()                                      # configurations
        self.agreed = {}                                        # (where, setting) -> its value in the runs in use

    def planned(self, figure):
        """(experiment, configuration, method, trial) of every run that the preset has for a figure."""
        for experiment in (MLP, DENSENET, CONVNET):
            block, draws = self.block[experiment], experiment_of(experiment).figures.get(figure, {})
            keys = [(configuration, folders.method_name(*which), trial)
                    for configuration, c in block["configurations"].items()
                    for which in plan.runs_of_figure(draws, configuration, c) for trial in range(block["trials"])
                    if plan.has_trial(c, *which, trial)]
            yield from ((experiment, *key) for key in keys)
            if figure in importlib.import_module("robustness").FIGURES:
                yield from ((f"robustness-{self.drop}", *key) for key in keys)

    def missing(self, figure):
        """The planned runs that are not finished (one that diverged is); of Fig. 5 also those without weights."""
        missing, file = [], "weights.pt" if figure == "5" else "run.json"
        for experiment, *kind, trial in self.planned(figure):
            folder, training = (Path(self.results, self.name, name, *kind, f"trial{trial}")
                                for name in (experiment, trained_in(experiment)))
            record = folders.read_run(training)
            if not (folder / file).exists() and not (record and diverged(record)):
                missing.append((experiment, *kind, trial))
        return missing

    def commands(self, figure, used):
        """The commands that make the runs of a figure, on the data of those in use."""
        flags = f"--preset {self.name} --figure {figure}{self.results_flag}"
        synthetic = {trained_in(record["experiment"]) for record in used.values()
                     if trained(record)["data"]["source"] == "synthetic"}
        for experiment in dict.fromkeys(experiment for experiment, *_ in self.planned(figure)):
            if experiment == trained_in(experiment):
                yield f"python train_{experiment}.py {flags}" + " --data synthetic" * (experiment in synthetic)
            else:
                yield f"python robustness.py {flags}" + f" --drop {self.drop}" * (self.drop != "example")

    def runs(self, experiment, configuration, method):
        """(run.json, folder) by trial of the finished runs of one method. Raises Refused if settings are mixed."""
        place = self.results / self.name / experiment / configuration
        found = [(self.whole_run(path), path) for path in folders.run_folders(place, method)]
        self.asked.add(configuration)
        for record, path in found:
            self.refuse_mixture(path, record)
            self.used[path] = record
        return found

    def histories(self, experiment, configuration, method):
        """(run.json, history.npz) by trial of the runs of one method that did not diverge."""
        return [(record, folders.load_history(folder)) for record, folder in self.runs(
            experiment, configuration, method) if not diverged(record)]

    def dominances(self, experiment, configuration, lam):
        """The rows of `dominance` by trial of the joint runs at one lambda; a run of one member has none."""
        return [dominance(record, history) for record, history in self.histories(experiment, configuration, joint(lam))
                if record["settings"]["members"] > 1]

    def lambdas(self, experiment, configuration):
        """The lambdas planned for a configuration, and any others that were run."""
        there = folders.run_folders(self.results / self.name / experiment / configuration, "joint-*")
        planned = self.block[experiment]["configurations"][configuration]["lambdas"]
        return sorted({folders.read_run(path)["lambda"] for path in there} | set(planned))

    def point(self, experiment, configuration, method, key="test_ensemble_error", name="test_error_percent"):
        """One number of a configuration and method over its trials, as a row of a figure's CSV."""
        records = [record for record, _ in self.runs(experiment, configuration, method)]
        scale = 100 if name.endswith("_percent") else 1
        values = [scale * record["result"][key] for record in records if not diverged(record)]
        mean, error = mean_and_error(values)
        return {"configuration": configuration, "method": method, "n": len(values),
                "diverged": len(records) - len(values), name: mean, "standard_error": error}

    def every_run(self):
        """A row for every training run: what it is, what came out, on what and when."""
        for path in folders.run_folders(self.results / self.name, "*/*/*"):
            record = folders.read_run(path)
            if not record["experiment"].startswith("robustness"):
                s = record["settings"]
                yield {"run": str(path.relative_to(self.results)), **record["result"], "lr": s["lr"],
                       "epochs": s["epochs"], "data": s["data"]["name"], "parameters": record.get("parameters"),
                       "seconds": record["seconds"], "finished": record["finished"], **record["machine"]}

    def refuse_mixture(self, path, record):
        """Raises Refused unless a run was made as those in use: in its method, its configuration or its experiment."""
        experiment, s, own = trained_in(record["experiment"]), trained(record), record["settings"]
        settings = s if s is own else s | {f"{key} of robustness.py": own[key] for key in ("drop", "repeats", "seed")}
        for key in sorted(OF_AN_EXPERIMENT | settings.keys()):
            where = experiment if key in OF_AN_EXPERIMENT else (experiment, record["configuration"])
            if key in OF_A_METHOD or (key == "weight_decay" and record["method"] == "independent"):
                where = path.parent
            value, other = settings.get(key), self.agreed.setdefault((where, key), settings.get(key))
            if value != other:
                raise Refused(f"{self.results / self.name} mixes runs with {key} {other!r} and {value!r}, as in "
                              f"{path}: remove those of one kind")

    def at_protocol(self):
        """Is every setting of the runs in use, but trial, seed and kept weights, that of the block `paper`?"""
        for record in self.used.values():
            block, which = self.paper[trained_in(record["experiment"])], (record["method"], record["lambda"])
            c = block["configurations"].get(record["configuration"])
            if not c or which not in plan.planned_methods(c):
                return False
            theirs = plan.run_settings(block, c, *which) | {
                "seed": 0, "data": common.DATASETS[block["dataset"]].description}
            if folders.first_difference(trained(record) | {"seed": 0}, theirs) or any(
                    record["settings"].get(key, value) != value for key, value in self.measured.items()):
                return False
        return True

    def at_chance(self):
        """Is an ensemble of the runs in use at the level of guessing?"""
        return any(error_share(record, folder) > LEARNING for folder, record in self.used.items())

    def provenance(self):
        """Lines that say what was used: data, trials and what was reduced of each experiment; machines and commits."""
        if not self.used:
            return "computed from the definitions of the networks; nothing was trained for it"
        lines = []
        for experiment in dict.fromkeys(trained_in(record["experiment"]) for record in self.used.values()):
            used = {path: r for path, r in self.used.items() if trained_in(r["experiment"]) == experiment}
            paper, s = self.paper[experiment], trained(next(iter(used.values())))
            data = s["data"]["name"] if s["data"]["source"] == "real" else "SYNTHETIC STAND-IN DATA"
            trials = trials_of(collections.Counter(path.parent for path in used).values())
            wanted = f" (paper: {paper['trials']})" if trials != str(paper["trials"]) else ""
            left_out, names = sum(map(diverged, used.values())), reduced(paper, used.values())
            parts = [f"{experiment}: {data}", f"{s['classes']} classes" if s.get("classes") else "",    # (or all)
                     f"preset {self.name}, n = {trials}{wanted}", s.get("precision"),
                     f"loss {s['loss']}" if "loss" in s else "",
                     f"{left_out} diverged, left out of the means" if left_out else "",
                     f"reduced: {', '.join(names)}" if names else ""]
            lines.append(" · ".join(filter(None, parts)))
        devices, commits = (", ".join(sorted({str(record["machine"][key]) for record in self.used.values()}))
                            for key in ("device", "commit"))
        return "\n".join([*lines, f"{devices} · code: {commits}"])


def reduced(paper, records):
    """Names of the settings, but classes and precision, that are not the paper's; presets.yaml has the values."""
    names = {}                              # in order
    for record in records:
        theirs = paper | paper["configurations"].get(record["configuration"], {})
        apart = OF_A_METHOD | {"precision", "dataset", "classes"}
        apart |= {"weight_decay"} if record["method"] == "independent" else set()
        names |= {key: None for key, value in trained(record).items()
                  if key in theirs.keys() - apart and value != theirs[key]}
    return list(names)
