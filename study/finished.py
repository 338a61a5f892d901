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
TOLD = {"data", "classes", "precision", "loss"}         # settings that provenance tells by their values
OF_A_METHOD = {"lr", "bagging", "stacking", "folds", "penalties"}       # settings in which the trials of a method agree
# In which the runs of an experiment agree (but `independent`, in its weight decay); in others those of a configuration.
OF_AN_EXPERIMENT = {"data", "seed", "classes", "precision", "loss", "padding", "batchnorm", "evaluate", *plan.SHARED}


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


def plain(cell):
    """A cell of a CSV file as numpy.genfromtxt takes it, which knows no quotes: no comma, no line break."""
    return cell.replace("\n", " · ").replace(",", ";") if isinstance(cell, str) else cell


def write_csv(path, rows, provenance=""):
    """Rows (dicts) as CSV, with a column for every key; the last one has the provenance, in the first row."""
    columns, text = list(dict.fromkeys(key for row in rows for key in row)), io.StringIO()
    if provenance:
        columns.append("provenance")
        rows = [row | {"provenance": "" if i else provenance} for i, row in enumerate(rows)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: plain(cell) for key, cell in row.items()} for row in rows)
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


def errors_at_the_end(record, history, part):
    """The errors of the ensemble and of the members (M,) at the reported epoch, in training or test."""
    if part == "test":
        return record["result"]["test_ensemble_error"], history["reported_test_member_error"]
    at = record["result"]["epoch"] - 1
    return history["train_ensemble_error"][at], history["train_member_error"][at]


def dominance(record, history):
    """How far one member is ahead of the others at the reported epoch, in points of error: a row of Fig. 6's numbers.

    In runs of at least ten epochs, in which epoch 3 is early, gap_at_epoch_3 is between the two lowest training errors.
    """
    row = {"configuration": record["configuration"], "method": joint(record["lambda"]), "trial": record["trial"],
           "epochs": record["settings"]["epochs"]}
    for part in ("train", "test"):
        ensemble, errors = errors_at_the_end(record, history, part)
        best, second = np.sort(errors)[:2]
        row |= {f"{part}_{name}": 100 * float(value) for name, value in (
            ("ensemble_error", ensemble), ("best_member_error", best), ("second_best_member_error", second),
            ("median_member_error", np.median(errors)), ("dominance", np.median(errors) - best))}
    if row["epochs"] >= 10:
        early, end = history["train_member_error"][2], int(errors_at_the_end(record, history, "train")[1].argmin())
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


def untrained_on_meta(build, settings, shape, classes):
    """The ensemble in fp32 without memory: for its shapes."""
    with torch.device("meta"):
        return build(settings | {"precision": "fp32"}, shape, classes, torch.Generator("cpu"))


def parameters(experiment, settings):
    """The parameters of all members for CIFAR-100."""
    one = untrained_on_meta(experiment_of(experiment).build, settings | {"members": 1}, (3, 32, 32), 100)
    return settings["members"] * sum(p.numel() for p in one.parameters())


# --- The runs of a preset ------------------------------------------------------------------------


def undamaged(folder):
    """The run.json of a finished run; or None, and a line if it or a file beside it is damaged: figures do without."""
    try:
        return folders.read_whole_run(folder)
    except folders.Damaged as error:
        print(f"left out: {error}", flush=True)


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
        self.whole_run = functools.cache(undamaged)             # every run is checked once
        self.begin()

    def begin(self):
        self.used = {}                                          # folder -> run.json
        self.asked = {}                                         # configuration -> has it a run?
        self.agreed = {}                                        # (where, setting) -> its value in the runs in use

    def planned(self, figure):
        """(experiment, configuration, method, trial) of every run that the preset has for a figure."""
        for experiment in (MLP, DENSENET, CONVNET):
            block, draws = self.block[experiment], experiment_of(experiment).figures.get(figure, {})
            keys = [(configuration, folders.method_name(*which), trial)
                    for configuration, c in block["configurations"].items()
                    for which in plan.runs_of_figure(draws, configuration, c) for trial in range(c["trials"])]
            yield from ((experiment, *key) for key in keys)
            if figure in importlib.import_module("robustness").FIGURES:
                yield from ((f"robustness-{self.drop}", *key) for key in keys)

    def missing(self, figure):
        """The planned runs that are not finished (one that diverged is); of Fig. 5 also those without weights."""
        missing = []
        for experiment, *kind, trial in self.planned(figure):
            folder, training = (Path(self.results, self.name, name, *kind, f"trial{trial}")
                                for name in (experiment, trained_in(experiment)))
            there = self.whole_run(folder) and (figure != "5" or (folder / "weights.pt").exists())
            if not there and not ((record := self.whole_run(training)) and diverged(record)):
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

    def records(self, pattern):
        """(run.json, folder) of the undamaged runs EXPERIMENT/CONFIGURATION/METHOD that match a pattern."""
        there = folders.run_folders(self.results / self.name, pattern)
        return [(record, path) for path in there if (record := self.whole_run(path))]

    def runs(self, experiment, configuration, method):
        """(run.json, folder) by trial of the finished runs of one method. Raises Refused if settings are mixed."""
        found = self.records(f"{experiment}/{configuration}/{method}")
        self.asked[configuration] = bool(found) or self.asked.get(configuration, False)
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
        there = {record["lambda"] for record, _ in self.records(f"{experiment}/{configuration}/joint-*")}
        return sorted(there | set(self.block[experiment]["configurations"][configuration]["lambdas"]))

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
        for record, path in self.records("*/*/*"):
            if not record["experiment"].startswith("robustness"):
                s = record["settings"]
                yield {"run": str(path.relative_to(self.results)), **record["result"], "lr": s["lr"],
                       "epochs": s["epochs"], "data": s["data"]["name"], "parameters": record.get("parameters"),
                       "seconds": record["seconds"], "finished": record["finished"], **record["machine"],
                       "commit": commit if " " in (commit := record["machine"]["commit"]) else f"g{commit}"}  # text

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

    def not_the_papers(self, record):
        """Names of the settings of a run, but trial, seed and kept weights, that are not those of the block `paper`."""
        block, which = self.paper[trained_in(record["experiment"])], (record["method"], record["lambda"])
        c = block["configurations"].get(record["configuration"])
        if c is None:
            return ["configuration"]
        own, theirs = trained(record), plan.run_settings(block, c, *which)
        theirs |= {"seed": own["seed"], "data": common.DATASETS[block["dataset"]].description}
        names = [key for key in theirs | own if own.get(key) != theirs.get(key)]
        names += [key for key, value in self.measured.items() if record["settings"].get(key, value) != value]
        return names if which in plan.planned_methods(c) else [*names, "lambda"]

    def at_protocol(self):
        """Are the settings of all runs in use the paper's?"""
        return not any(map(self.not_the_papers, self.used.values()))

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
            epochs = {record["configuration"]: trained(record)["epochs"] for record in used.values()}
            tf32 = s.get("precision") == "fp32" and any(record["machine"].get("tf32") for record in used.values())
            trials = trials_of(collections.Counter(path.parent for path in used).values())
            most = max(c["trials"] for c in paper["configurations"].values())
            wanted = f" (paper: {most})" if trials != str(most) else ""
            left_out, names = sum(map(diverged, used.values())), dict.fromkeys(
                key for record in used.values() for key in self.not_the_papers(record) if key not in TOLD)
            parts = [f"{experiment}: {data}", f"{s['classes']} classes" if s.get("classes") else "",    # (or all)
                     f"preset {self.name}, n = {trials}{wanted}", s.get("precision", ""),
                     "convolutions in TF32" if tf32 else "",
                     f"loss {s['loss']}" if "loss" in s else "",
                     "other training images are test images, too" if s.get("test") == "unused" and s["train"] else "",
                     ", ".join(f"{c} {n} epochs" for c, n in epochs.items()) if len({*epochs.values()}) > 1 else "",
                     f"{left_out} diverged, left out of the means" if left_out else "",
                     f"other than the paper's: {', '.join(names)}" if names else ""]
            lines.append(" · ".join(filter(None, parts)))
        if without := [name for name, there in self.asked.items() if not there]:
            lines.append(f"no run yet: {', '.join(without)}")
        devices, commits = (", ".join(sorted({str(record["machine"][key]) for record in self.used.values()}))
                            for key in ("device", "commit"))
        return "\n".join([*lines, f"{devices} · code: {commits}"])
