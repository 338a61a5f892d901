"""presets.yaml -> the runs of an experiment, with all their settings. The block `paper` is the schema of the others."""

import contextlib
import difflib
import hashlib
import importlib
import inspect
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import common
import fast
from common import Refused
from study.folders import HERE, method_name

import torch
import yaml

# --- The schema ----------------------------------------------------------------------------------

METHODS = ("joint", "independent", "bagging", "stacking")
POLICIES = ("real", "auto", "synthetic")
# The settings of every run of an experiment, the rest of its block, and those of each configuration.
SHARED = ("dataset", "batch", "train", "test", "validation", "augment", "momentum", "nesterov", "weight_decay", "decay")
OTHERS = ("evaluate", "tune", "bagging", "penalties", "stacking", "folds")
CONFIGURATION = ("classes", "trials", "epochs", "members", "lr", "methods", "lambdas", "weights", "first")


def at_least(n, *others):
    """An entry of VALUES: a whole number of at least n, or one of the others."""
    words = [f"a whole number of at least {n}", *("null" if other is None else other for other in others)]
    return (int, *map(type, others)), lambda x: x in others or (type(x) is int and x >= n), " or ".join(words)


NUMBER, WORD = (int, float), (str,)
LAMBDA = (NUMBER, lambda x: 0 <= x <= 1 and float(f"{x:g}") == x, "a number in [0, 1], of at most six digits")
VALUES = {      # (types, test, words) of a value, or of each entry of a list; others have the type they have in `paper`
    **dict.fromkeys(("epochs", "evaluate", "batch", "trials", "members", "repeats", "hidden", "depth", "growth",
                     "filters", "strides"), at_least(1)),
    "classes": at_least(2, None), "train": at_least(1, None), "test": at_least(1, None, "unused"), "folds": at_least(2),
    **dict.fromkeys(("validation", "padding"), at_least(0)),
    **dict.fromkeys(("lambdas", "weights"), LAMBDA),
    **dict.fromkeys(("lr", "penalties", "tune"), (NUMBER, lambda x: x > 0, "a number above 0")),
    **dict.fromkeys(("momentum", "weight_decay"), (NUMBER, lambda x: x >= 0, "a number of at least 0")),
    "first": (WORD, lambda x: x.split("-")[0] in METHODS[:3], "a method such as joint-0.5, and not stacking"),
    "decay": (NUMBER, lambda x: 0 < x < 1, "a share of the epochs, above 0 and below 1"),
    **{key: (WORD, words.__contains__, f"one of {', '.join(words)}") for key, words in (
        ("data", POLICIES), ("methods", METHODS), ("bagging", ("weights", "resample")),
        ("stacking", ("validation", "training")), ("precision", ("fp32", "bf16", "auto")))}}


def checked_name(word, words, what):
    """`word` if it is one of `words`; otherwise a refusal that names the nearest of them."""
    if word in (words := [str(w) for w in words]):
        return word
    nearest = difflib.get_close_matches(str(word), words, 1, 0.4) if len(str(word)) > 2 else []
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise Refused(f"unknown {what} '{word}': expected one of {', '.join(words)}{hint}")


def check(key, value, like, where):
    """Raises Refused unless a value is what VALUES says, or of the type of `like`, its value in the block `paper`."""
    types, test, words = VALUES.get(key, ((type(like),), lambda x: True, f"of the type of {like!r}"))
    entries = [value]
    if key == "lr":
        if not isinstance(value, dict) or 1 not in value:
            raise Refused(f"{where}: {value!r} is not a block of learning rates by the largest lambda of each, the "
                          "last of them for 1, such as {0.95: 0.3, 1: 0.1}")
        check("lambdas", list(value), [], where)
        entries = value.values()
    elif isinstance(like, list) and key in VALUES:
        if not isinstance(value, list) or (key == "penalties" and not value):
            raise Refused(f"{where}: {value!r} is not a list such as {like}")
        entries = value
    for entry in entries:
        if not (type(entry) in types and test(entry)):
            raise Refused(f"{where}: {entry!r} is not {words}")


# --- Presets -------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in a block is an error, and 1e-4 is a number."""

    def compose_mapping_node(self, anchor):
        node, there = super().compose_mapping_node(anchor), []
        for key, _ in node.value:
            if key.value in there:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value} stands twice", key.start_mark)
            there.append(key.value)
        return node


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
                             list("-+0123456789"))      # as YAML 1.2 has it; PyYAML wants 1.0e-4


def load_preset(name, path=HERE / "presets.yaml"):
    """The block `paper` of presets.yaml with the changes of another block."""
    try:
        presets = yaml.load(path.read_text(encoding="utf-8"), Loader)
        schema = {key: value | complete(value) if key not in ("data", "robustness") else value
                  for key, value in presets["paper"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise Refused(f"{path.name} cannot be read, or has no block `paper` that the other presets change: "
                      f"{' '.join(str(error).split())}") from error
    paper = merge({}, schema, presets["paper"], f"{path.name}: paper")
    return merge(paper, schema, presets[checked_name(name, presets, "preset")], f"{path.name}: {name}")


def complete(block):
    """An experiment's block, in which each configuration has every setting of its own."""
    of_all = {key: value for key, value in block.items() if key not in (*SHARED, *OTHERS, "configurations")}
    return {key: value for key, value in block.items() if key not in of_all} | {
        "configurations": {name: of_all | own for name, own in block["configurations"].items()}}


def merge(base, schema, changes, where):
    """`base` with the values of `changes`: only keys that `schema` has, each value as `check` wants it."""
    if not isinstance(changes, dict):
        raise Refused(f"{where} is {changes!r}: expected a block of settings")
    merged = dict(base)
    for key, value in changes.items():
        like = schema[checked_name(key, schema, f"key in {where}")]
        if isinstance(like, dict) and key != "lr":
            merged[key] = merge(base.get(key, {}), like, value, f"{where}.{key}")
        else:
            check(key, value, like, f"{where}.{key}")
            merged[key] = value
    return merged


def experiment_settings(preset, name, experiment, changes=()):
    """The block of one experiment in a preset; each configuration has every setting of its own.

    `changes` are those of --set: KEY=VALUE for all configurations, or CONFIGURATION.KEY=VALUE.
    """
    if experiment not in preset:
        raise Refused(f"presets.yaml: {name} has no block '{experiment}'")
    block = complete(preset[experiment])
    for each in block["configurations"].values():
        if missing := {*SHARED, *OTHERS, *CONFIGURATION} - block.keys() - each.keys():
            raise Refused(f"presets.yaml: {name}.{experiment}: {', '.join(sorted(missing))} is missing")
    for change in changes:
        block = merge(block, block, parse_change(block, change), f"--set {experiment}")
    checked_name(block["dataset"], common.DATASETS, f"data set of {name}.{experiment}")
    return block


def parse_change(block, text):
    """A change of --set as a part of a block; its value is read as YAML."""
    name, given, value = text.partition("=")
    configuration, _, key = name.rpartition(".")
    if not given:
        raise Refused(f"--set {text}: a key and a value were expected, such as --set batch=50")
    with contextlib.suppress(ValueError, yaml.YAMLError):       # else it stays text, which `check` refuses
        value = yaml.load(value, Loader)
    owners = [configuration] if configuration else [name for name, c in block["configurations"].items() if key in c]
    return {"configurations": {owner: {key: value} for owner in owners}} if owners else {key: value}


# --- Runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments, as its script declares it.

    build(settings, shape, classes, generator) returns the untrained ensemble of a run, an nn.Module from images
    (N, *shape) or (N, M, *shape) to member logits (N, M, K); `generator` draws the initial weights. `figures` is
    {figure: {configuration: methods}}; the method `joint` stands for every lambda of the preset. loss(member_logits,
    targets, lam) is a scalar; None means common.joint_loss. `weights` names the figures that are drawn from weights.
    """
    name: str
    build: object
    figures: dict = field(default_factory=dict)
    loss: object = None
    weights: tuple = ()

    def loss_setting(self, classes):
        """The setting `loss` of runs on another loss than Eq. 4: a name, and a hash of its values on fixed logits.

        Runs of two losses never mix, be it that a constant in a helper differs. classes: as many as the data has.
        """
        if common.losses_that_run(self.loss) is fast.joint_loss:
            return {}
        loss, generator = self.loss or common.joint_loss, torch.Generator().manual_seed(0)
        logits = torch.randn(64, 3, classes, generator=generator)
        targets = torch.randint(classes, (64,), generator=generator)
        values = [loss(scale * logits, targets, lam) for scale in (0.1, 1, 10) for lam in (0, 0.5, 1)]
        if shapes := {tuple(value.shape) for value in values} - {()}:
            raise Refused(f"the loss of {self.name} has the shape {shapes.pop()}: one number was expected")
        words = [f"{value.item():.4g}" for value in values] + [inspect.getsource(common.losses)]
        digest = hashlib.sha256(" ".join(words).encode()).hexdigest()
        return {"loss": f"{getattr(loss, '__name__', type(loss).__name__)} {digest[:8]}"}


def experiment_of(name):
    """The Experiment that train_NAME.py declares."""
    return importlib.import_module(f"train_{name}").EXPERIMENT


@dataclass(frozen=True)
class Run:
    """configuration x method (x lambda) x trial: the unit of work."""
    preset: str
    experiment: str
    configuration: str
    method: str           # one of METHODS
    lam: float            # lambda; 0 for the other methods
    trial: int
    settings: dict        # all that decides its numbers
    weights: bool         # are the trained weights kept?
    weights_needed: bool = False        # is it trained again if it is finished and its weights are not there?

    @property
    def method_name(self):
        return method_name(self.method, self.lam)

    @property
    def label(self):
        return f"{self.configuration} {self.method_name.replace('joint-', 'lambda ')} trial {self.trial}"

    @property
    def path(self):
        return Path(self.preset, self.experiment, self.configuration, self.method_name, f"trial{self.trial}")

    @property
    def path_of_members(self):
        """The path of the lambda 0 run whose members a stacking run combines."""
        return replace(self, method="joint").path

    def generator(self, purpose):
        """A generator for one purpose: initialisation, order, augmentation, bootstrap, folds, drop.

        Its seed depends on (experiment, configuration, trial, --seed) alone. So the lambdas of one trial share
        initial weights and order, and a run alone equals the same run in a sweep.
        """
        words = (self.experiment, self.configuration, self.trial, self.settings["seed"], purpose)
        digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def planned_methods(c, lambdas=None, methods=None):
    """The runs (method, lambda) of a configuration: the preset's, or those that the two flags select.

    lambdas alone mean joint runs. A single network is the same at every lambda and is trained once, as lambda 1.
    """
    chosen = methods or (["joint"] if lambdas else c["methods"])
    joint = [("joint", lam) for lam in dict.fromkeys(lambdas or c["lambdas"])] if "joint" in chosen else []
    if c["members"] == 1:
        return [("joint", 1)] if joint else []
    return joint + [(method, 0) for method in METHODS[1:] if method in chosen]


def runs_of_figure(figure, configuration, c):
    """The planned runs (method, lambda) of a configuration that a figure, a value of FIGURES, draws."""
    words = set(figure.get(configuration, ()))
    return [(method, lam) for method, lam in planned_methods(c) if {method, method_name(method, lam)} & words]


def run_settings(block, c, method, lam):
    """All that decides the numbers of a run, but data and seed."""
    settings = {key: value for key, value in c.items() if key not in CONFIGURATION}
    settings |= {key: c[key] for key in ("members", "classes", "epochs")} | {key: block[key] for key in SHARED}
    if block["evaluate"] > 1 and not block["validation"]:
        settings["evaluate"] = block["evaluate"]
    settings["lr"] = next(c["lr"][upper] for upper in sorted(c["lr"]) if lam <= upper)   # {0.95: a, 1: b}: b for 0.97
    if method == "independent":
        # SGD on the sum of the members' losses at rate r and decay d. The loss at lambda 0 is that sum over M: its
        # gradient takes M times the rate, and the decay, which is not divided by M, d / M.
        settings["lr"] *= c["members"]
        settings["weight_decay"] /= c["members"]
    if method == "bagging":
        settings["bagging"] = block["bagging"]
    if method == "stacking":
        settings |= {key: block[key] for key in ("stacking", "folds", "penalties")}
        images = block["validation" if block["stacking"] == "validation" else "train"]
        if images is not None and images < block["folds"]:
            raise Refused(f"stacking is fitted on the {block['stacking']} split, which has {images} images for "
                          f"{block['folds']} folds: raise it, or use --set stacking=training or validation")
    return settings


def list_runs(preset, experiment, block, data, seed=0, only=None, lambdas=None, methods=None, figures=None):
    """The runs of an experiment, narrowed by the last arguments: the methods in `first`, then the others, by trial."""
    runs = []
    for trial in range(max(c["trials"] for c in block["configurations"].values())):
        for name in dict.fromkeys(only or block["configurations"]):
            c = block["configurations"][name]
            wanted = planned_methods(c, lambdas, methods) if trial < c["trials"] else []
            drawn = {figure: runs_of_figure(experiment.figures[figure], name, c) for figure in figures or ()}
            if figures:
                wanted = [each for each in wanted if any(each in some for some in drawn.values())]
            if ("stacking", 0) in wanted and ("joint", 0) not in wanted:        # whose members it combines
                wanted.insert(0, ("joint", 0))
            stacked = "stacking" in c["methods"] or ("stacking", 0) in wanted
            for method, lam in wanted:
                keep = method == "joint" and (lam in c["weights"] or (lam == 0 and stacked))
                needed = keep and any((method, lam) in drawn.get(figure, ()) for figure in experiment.weights)
                settings = {"data": data, "seed": seed, **run_settings(block, c, method, lam)}
                runs.append(Run(preset, experiment.name, name, method, lam, trial, settings, keep, needed))
    if not runs:
        raise Refused("no run matches this selection of configurations, methods, lambdas and figures (bagging, "
                      "stacking and independent need more than one member); see --dry-run without it")
    return sorted(runs, key=lambda run: run.method_name not in block["configurations"][run.configuration]["first"])


def shard(runs, part, parts):
    """Every `parts`-th run from `part` on, counted from 0; stacking goes with the members it combines."""
    keys = [run.path_of_members if run.method == "stacking" else run.path for run in runs]
    place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return [run for run, key in zip(runs, keys, strict=True) if place[key] % parts == part]


def tuning_runs(runs, rates):
    """Each joint run at each rate, times M since Eq. 9 divides by M, in folders tune-lrX."""
    joint = [run for run in runs if run.method == "joint"]
    if not joint or not joint[0].settings["validation"]:
        raise Refused("--tune compares validation errors of joint training: leave --methods out, or set validation=N")
    return [replace(run, preset=f"{run.preset}/tune-lr{lr:g}", weights=False, weights_needed=False,
                    settings=run.settings | {"lr": lr})
            for run in joint for lr in sorted(rate * run.settings["members"] for rate in rates)]
