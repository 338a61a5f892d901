"""The finished runs of one preset: those of a figure, those that are missing, what they were made from.

make_figures.py and claims.py read run folders through this file and no other.
"""

import collections
import csv
import functools
import math
import shlex
from pathlib import Path

import study
import common
import folders
import presets
import robustness
from study import experiment_of
from common import Refused

import numpy as np
import yaml

MLP, DENSENET, CONVNET = "mlp_fmnist", "densenet_cifar", "convnet_cifar"


LEARNING = 0.8          # an ensemble learns if its test error is at most this share of the error of guessing


def joint(lam):
    return study.method_name("joint", lam)


def trained_in(experiment):
    """The training experiment: itself, and for robustness runs that of the MLPs, which they measure."""
    return MLP if experiment.startswith("robustness") else experiment


def trained(record):
    """The settings that a run was trained with; for a robustness run, those of the run that it measured."""
    return record["settings"].get("trained", record["settings"])


def trials_of(counts):
    """Numbers of trials as text: "3", or "1 to 3"."""
    counts = [count for count in counts if count]
    return " to ".join(str(count) for count in dict.fromkeys((min(counts, default=0), max(counts, default=0))))


def mean_and_error(values, axis=None):
    """The mean over trials and its standard error (ddof 1; nan for a single trial)."""
    values = np.asarray(values, float)
    if values.size == 0:
        return math.nan, math.nan
    n = values.size if axis is None else values.shape[axis]
    if n == 1:
        return values.mean(axis), np.full_like(values.mean(axis), math.nan)[()]
    return values.mean(axis), values.std(axis, ddof=1) / math.sqrt(n)


@functools.cache
def paper_settings(experiment):
    """{(configuration, method): settings} of the paper's protocol on the real data."""
    block = presets.experiment_settings(presets.load_preset("paper"), "paper", experiment) | {"trials": 1}
    about = common.DATASETS[block["dataset"]].description
    return {(run.configuration, run.method_name): run.settings for run in study.list_runs(
        "paper", study.experiment_of(experiment), block, about)}


def at_protocol(record, repeats):
    """Is every setting of a run but trial, seed and kept weights that of the block `paper`?"""
    name = study.method_name(record["method"], record["lambda"])
    theirs = paper_settings(trained_in(record["experiment"])).get((record["configuration"], name))
    s = record["settings"]
    measured = s.get("drop", "example") == "example" and s.get("repeats", repeats) == repeats
    return theirs is not None and measured and not folders.difference(trained(record) | {"seed": 0}, theirs)


def error_share(record, folder):
    """An ensemble's test error over that of guessing; 0 if it diverged, which gives no number."""
    if record["result"].get("diverged_at_epoch") is not None:
        return 0
    error = record["result"].get("test_ensemble_error")
    if error is None:                       # a robustness run: with all members
        error = folders.load_history(folder)["error"].mean(0)[0]
    s = trained(record)
    return error / (1 - 1 / (s.get("classes") or common.DATASETS[s["dataset"]].classes))    # (older runs: all classes)


class FinishedRuns:
    """The finished runs of one preset in a results folder. `used` has those that were asked for since begin()."""

    def __init__(self, results, name, drop):
        self.results, self.name, self.drop = results, name, drop
        self.preset, self.paper = presets.load_preset(name), presets.load_preset("paper")
        self.published = yaml.safe_load((folders.HERE / "published.yaml").read_text(encoding="utf-8"))
        self.whole_run = functools.cache(folders.whole_run)     # every run is checked once
        self.begin()

    def begin(self):
        self.used = {}                                          # folder -> run.json

    def block(self, experiment, preset=None):
        """The settings of an experiment in this preset, or in another."""
        return presets.experiment_settings(preset or self.preset, self.name, experiment)

    # --- What a figure needs

    def planned(self, figure):
        """(experiment, configuration, method, trial) of every run that the preset has for a figure."""
        for experiment in (MLP, DENSENET, CONVNET):
            block, draws = self.block(experiment), experiment_of(experiment).figures.get(figure, {})
            keys = [(configuration, study.method_name(*which), trial)
                    for configuration, c in block["configurations"].items()
                    for which in study.drawn(draws, configuration, c) for trial in range(block["trials"])
                    if study.trains(c, *which, trial)]
            yield from ((experiment, *key) for key in keys)
            if figure in robustness.FIGURES:
                yield from ((f"robustness-{self.drop}", *key) for key in keys)

    def missing(self, figure):
        """The planned runs that are not finished; of Fig. 5, which draws filters, also those without weights."""
        file = "weights.pt" if figure == "5" else "run.json"
        return [(*kind, trial) for *kind, trial in self.planned(figure)
                if not Path(self.results, self.name, *kind, f"trial{trial}", file).exists()]

    @property
    def results_flag(self):
        return f" --results {shlex.quote(str(self.results))}" if self.results != Path("results") else ""

    def commands(self, figure, used):
        """The commands that make the runs of a figure, on the data of those in use."""
        flags = f"--preset {self.name} --figure {figure}{self.results_flag}"
        for experiment in dict.fromkeys(experiment for experiment, *_ in self.planned(figure)):
            if experiment != trained_in(experiment):
                yield f"python robustness.py {flags}" + (f" --drop {self.drop}" if self.drop != "example" else "")
                continue
            sources = {trained(record)["data"]["source"] for record in used.values()
                       if trained_in(record["experiment"]) == experiment}
            yield f"python train_{experiment}.py {flags}" + " --data synthetic" * ("synthetic" in sources)

    # --- What there is

    def runs(self, experiment, configuration, method):
        """(run.json, folder) by trial of the finished runs of one method, which must have equal settings."""
        folder = self.results / self.name / experiment / configuration / method
        found = [(self.whole_run(path), path) for path in folders.run_folders(folder.parent, method)]
        settings = [{key: value for key, value in record["settings"].items() if key != "weights"}
                    for record, _ in found]         # a robustness run names the weights it measured
        for other, (_, path) in zip(settings, found, strict=True):
            self.refuse_difference(settings[0], other, path)
        self.used |= {path: record for record, path in found}
        return found

    def refuse_difference(self, one, other, folder):
        """Runs of other settings must not meet in a mean, nor in a figure."""
        if found := folders.difference(one, other):
            key, value, another = found
            raise Refused(f"{self.results / self.name} mixes runs with {key} {value!r} and {another!r}, as in "
                          f"{folder}: remove those of one kind")

    def histories(self, experiment, configuration, method):
        """(run.json, history.npz) by trial of the runs of one method that did not diverge."""
        return [(record, folders.load_history(folder)) for record, folder in self.runs(
            experiment, configuration, method) if record["result"]["diverged_at_epoch"] is None]

    def curves(self, configuration, method):
        """The robustness curves of one method by trial: x (X,) and mean error over repeats (X,)."""
        x = "probability" if self.drop == "probability" else "dropped"
        histories = [folders.load_history(folder)
                     for _, folder in self.runs(f"robustness-{self.drop}", configuration, method)]
        return [(history[x], 100 * history["error"].mean(0)) for history in histories]

    def lambdas(self, experiment, configuration):
        """The lambdas planned for a configuration, and any others that were run."""
        there = folders.run_folders(self.results / self.name / experiment / configuration, "joint-*")
        planned = self.block(experiment)["configurations"][configuration]["lambdas"]
        return sorted({float(path.parent.name.removeprefix("joint-")) for path in there} | set(planned))

    def point(self, experiment, configuration, method, key="test_ensemble_error", name="test_error_percent"):
        """One number of a configuration and method over its trials, as a row of a figure's CSV."""
        results = [record["result"] for record, _ in self.runs(experiment, configuration, method)]
        scale = 100 if name.endswith("_percent") else 1
        values = [scale * r[key] for r in results if r["diverged_at_epoch"] is None]
        mean, error = mean_and_error(values)
        return {"configuration": configuration, "method": method, "n": len(values),
                "diverged": len(results) - len(values), name: mean, "standard_error": error}

    def every_run(self):
        """A row for every training run: what it is, what came out, on what and when."""
        for path in folders.run_folders(self.results / self.name, "*/*/*"):
            record = folders.read_run(path)
            if not record["experiment"].startswith("robustness"):
                s = record["settings"]
                yield {"run": str(path.relative_to(self.results)), **record["result"], "lr": s["lr"],
                       "epochs": s["epochs"], "data": s["data"]["name"], "parameters": record.get("parameters"),
                       "seconds": record["seconds"], "finished": record["finished"], **record["machine"]}

    # --- What it was made from

    def at_protocol(self):
        """Are all runs in use at the paper's protocol? Only then do the paper's numbers stand beside ours."""
        return all(at_protocol(record, self.paper["robustness"]["repeats"]) for record in self.used.values())

    def at_chance(self):
        """Is an ensemble of the runs in use at the level of guessing?"""
        return any(error_share(record, folder) > LEARNING for folder, record in self.used.items())

    def provenance(self):
        """Lines that say what was used. Raises Refused if runs of other settings are mixed."""
        if not self.used:
            return "computed from the definitions of the networks; nothing was trained for it"
        data, reductions = zip(*(self._provenance_of(experiment) for experiment in dict.fromkeys(
            trained_in(record["experiment"]) for record in self.used.values())), strict=True)
        devices, commits = (", ".join(sorted({str(record["machine"][key]) for record in self.used.values()}))
                            for key in ("device", "commit"))
        commits = commits if commits.startswith("no commit") else f"commit {commits}"
        return "\n".join([*data, f"{devices} · {commits}", *filter(None, reductions)])

    def _provenance_of(self, experiment):
        """A line on the data and the size of one experiment, and one on what was reduced, or ""."""
        used = {path: record for path, record in self.used.items() if trained_in(record["experiment"]) == experiment}
        first, *_ = map(trained, used.values())
        for path, record in used.items():
            keys = {"data", "seed", "classes", "precision", "padding", "batchnorm", *presets.SHARED}
            if "independent" in (record["method"], next(iter(used.values()))["method"]):
                keys -= {"weight_decay"}                # of its own
            self.refuse_difference(*({key: s.get(key) for key in keys} for s in (first, trained(record))), path)
        paper = self.block(experiment, self.paper)
        few = f", {number} classes" if (number := first.get("classes")) else ""     # (runs of earlier versions: all)
        data = (f"{first['data']['name']} (real{few})" if first["data"]["source"] == "real" else
                f"SYNTHETIC STAND-IN DATA{few}")
        trials = trials_of(collections.Counter(path.parent for path in used).values())
        diverged = sum(r["result"].get("diverged_at_epoch") is not None for r in used.values())
        text = "; ".join(reduced(paper, used.values()))
        return (f"{experiment}: {data} · preset {self.name}: n = {trials}"
                + (f" (paper: {paper['trials']})" if trials != str(paper["trials"]) else "")
                + (f", {first['precision']}" if "precision" in first else "")
                + (f" · {diverged} diverged, left out of the means" if diverged else ""),
                text and f"{experiment}, reduced: {text}")


def reduced(paper, records):
    """How the settings of runs differ from the paper's: a part for what all have, one for each configuration. The
    number of classes stands with the data."""
    own = {}
    for record in records:
        mine, theirs = trained(record), paper | paper["configurations"].get(record["configuration"], {})
        apart = ("lr", "precision", "bagging", "stacking", "folds", "penalties", "dataset", "classes",
                 *(["weight_decay"] if record["method"] == "independent" else []))
        own.setdefault(record["configuration"], [
            f"{key} {setting(mine[key])} (paper: {setting(theirs[key])})" for key in mine
            if key in theirs and key not in apart and mine[key] != theirs[key]])
    first, *others = own.values()
    everywhere = [text for text in first if all(text in other for other in others)]
    parts = {name: [text for text in texts if text not in everywhere] for name, texts in own.items()}
    return [", ".join(everywhere)] * bool(everywhere) + [
        f"{name}: {', '.join(texts)}" for name, texts in parts.items() if texts]


def setting(value):
    """A value of presets.yaml as a caption has it."""
    if value is None or value == []:
        return "all" if value is None else "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:,}" if isinstance(value, int) else str(value)


def peak_of_runs(runs, configuration):
    """The largest peak of a configuration's joint runs on a GPU, as text, or None."""
    peaks = [(record["result"]["peak_memory_bytes"], trained(record)) for path in folders.run_folders(
        runs.results / runs.name / DENSENET / configuration, "joint-*")
        if "peak_memory_bytes" in (record := folders.read_run(path))["result"]]
    peak, s = max(peaks, key=lambda pair: pair[0], default=(None, None))
    return peak and f"{peak / 1e9:.1f} GB (batch {s['batch']}, {s['precision']})"


def peak_of_a_step(configuration):
    """The peak of a training step of the paper's size, in fp32, on the GPU of benchmarks/h200.csv, as text."""
    with open(folders.HERE / "benchmarks/h200.csv", newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if (row["network"], row["precision"], row["way"]) == (
            configuration, "fp32", "as it is"))
    return f"at most {float(row['peak_GB']):.1f} GB for a step on an {row['device']}"
