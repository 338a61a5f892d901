"""What the experiments share: data -> batches -> ensemble -> joint loss -> training -> run folder.

A training script defines its networks and its `Experiment`; all else is here, in the order in which
a number is made. Shapes: N examples, M members, K classes; an ensemble maps a batch of images
(N, C, H, W), or one batch per member (N, M, C, H, W), to member logits (N, M, K).
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (someone will try)
    print(f"error: Python {sys.version.split()[0]} is too old: 3.11 or newer is needed; "
          "`bash run_all.sh` looks for one", file=sys.stderr)
    sys.exit(2)

import argparse
import copy
import datetime
import difflib
import functools
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import platform
import shutil
import subprocess
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

try:
    import numpy as np
    import torch
    import torchvision
    import yaml
    from torch import nn
    from torch.nn import functional as F
except (ImportError, RuntimeError, OSError) as error:
    # A torchvision beside another release's torch fails inside torch, with a RuntimeError.
    pair = ("; torch and torchvision are not of one release pair"
            if "torchvision::" in str(error) else "")
    print(f"error: the packages cannot be imported ({str(error).splitlines()[0]}){pair}: "
          "`pip install -r requirements.txt`, or `bash run_all.sh`, which makes a .venv",
          file=sys.stderr)
    sys.exit(2)

HERE = Path(__file__).resolve().parent


class Refused(Exception):
    """Bad input: one line that names the value, what was expected and the fix. Exit status 2."""


def nearest(word, known, what):
    """`word` if it is one of `known`; else a refusal that names the nearest known one."""
    known = [str(k) for k in known]
    if word in known:
        return word
    close = difflib.get_close_matches(str(word), known, 1, 0.3)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise Refused(f"unknown {what} '{word}': expected one of {', '.join(known)}{hint}")


# --- Presets -----------------------------------------------------------------------------------

def _is(kind, low=-math.inf, high=math.inf):
    """A test for a number of one kind within [low, high]; true and false are not numbers."""
    return lambda x: isinstance(x, kind) and not isinstance(x, bool) and low <= x <= high


def _all(test):
    return lambda x: isinstance(x, list) and x != [] and all(map(test, x))


COUNT = (_is(int, 1), "a whole number of at least 1")
COUNT_OR_ALL = (lambda x: x is None or COUNT[0](x), "a whole number of at least 1, or null for all")
RATE = (lambda x: _is((int, float), 0)(x) and 0 < x < math.inf, "a number above 0")
FRACTION = (_is((int, float), 0, 1), "a number in [0, 1]")
LAMBDAS = (_all(FRACTION[0]), "a list of numbers in [0, 1]")
METHODS = ("joint", "bagging", "stacking")
POLICIES = ("real", "auto", "synthetic")


def _one_of(words):
    return lambda x: x in words, "one of " + ", ".join(words)


SETTINGS = {  # what an experiment's block in presets.yaml may hold, and what each value must be
    "trials": COUNT, "epochs": COUNT, "batch": COUNT,
    "train": COUNT_OR_ALL, "validation": COUNT, "test": COUNT_OR_ALL,
    "momentum": (_is((int, float), 0, 0.999999), "a number in [0, 1)"),
    "weight_decay": (lambda x: _is((int, float), 0)(x) and x < math.inf, "a number of at least 0"),
    "lambdas": LAMBDAS,
    "bagging": _one_of(("weights", "resample")),
    "stacking": _one_of(("validation", "training")),
    "folds": (_is(int, 2), "a whole number of at least 2"),
    "penalties": (_all(RATE[0]), "a list of numbers above 0"),
    "tune": (_all(RATE[0]), "a list of numbers above 0"),
}
CONFIGURATION = {  # what each configuration may hold; its script adds the sizes of its network
    "members": COUNT,
    "lr": (lambda x: isinstance(x, dict) and x != {} and all(map(FRACTION[0], x))
           and max(x) == 1 and all(map(RATE[0], x.values())),
           "learning rates per range of lambda, the last of them for 1"),
    "methods": (_all(lambda x: x in METHODS), "a list of " + ", ".join(METHODS)),
    "weights": (lambda x: x == [] or LAMBDAS[0](x), "a list of lambdas whose weights are kept"),
}
ROBUSTNESS = {"repeats": COUNT}


def _check(block, schema, where):
    if not isinstance(block, dict):
        raise Refused(f"presets.yaml: {where} is {block!r}: expected a block of settings")
    for key, value in block.items():
        nearest(key, schema, f"key in presets.yaml, {where}")
        test, expected = schema[key]
        if not test(value):
            raise Refused(f"presets.yaml, {where}.{key}: {value!r} is not {expected}")
    missing = [key for key in schema if key not in block]
    if missing:
        raise Refused(f"presets.yaml, {where}: {missing[0]} is missing")


def _merge(base, override, where):
    """`base` with the values of `override`; a key that `base` does not have is refused."""
    if not isinstance(override, dict):
        raise Refused(f"presets.yaml: {where} is {override!r}: expected a block of settings")
    merged = dict(base)
    for key, value in override.items():
        nearest(key, base, f"key in presets.yaml, {where}")
        block = isinstance(base[key], dict) and key != "lr"      # a learning rate is one value
        merged[key] = _merge(base[key], value, f"{where}.{key}") if block else value
    return merged


def load_preset(name, path=HERE / "presets.yaml"):
    """The preset `name`: `paper` with that preset's overrides. Raises Refused on unknown keys."""
    try:
        presets = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise Refused(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(presets, dict) or not isinstance(presets.get("paper"), dict):
        raise Refused(f"{path.name}: expected a block `paper` that the other presets change")
    nearest(name, presets, "preset")
    preset = _merge(presets["paper"], presets[name], name)
    nearest(preset.get("data"), POLICIES, f"value of {name}.data in presets.yaml")
    _check(preset.get("robustness"), ROBUSTNESS, f"{name}.robustness")
    return preset


def experiment_settings(preset, name, experiment):
    """The block of one experiment in a preset (`load_preset`), every value of it checked."""
    if experiment.name not in preset:
        raise Refused(f"presets.yaml: {name} has no block '{experiment.name}'")
    block, where = preset[experiment.name], f"{name}.{experiment.name}"
    _check(block, SETTINGS | {"configurations": (lambda x: isinstance(x, dict) and x != {},
                                                 "a block of configurations")}, where)
    for key, values in block["configurations"].items():
        _check(values, CONFIGURATION | experiment.network, f"{where}.configurations.{key}")
    return block


# --- Runs --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments, as its script declares it.

    build(settings, shape, classes, generator) returns the untrained ensemble of a run, an nn.Module
    from images (N, *shape) or (N, M, *shape) to member logits (N, M, K); `settings` are the run's,
    `generator` draws the initial weights.
    """
    name: str
    dataset: str          # a key of DATASETS
    network: dict         # the network's own keys in presets.yaml -> (test, what is expected)
    build: object


def experiment_of(name):
    """The Experiment that train_NAME.py declares, for code that starts from a run folder."""
    try:
        return importlib.import_module(f"train_{name}").EXPERIMENT
    except ModuleNotFoundError as error:
        raise Refused(f"there are results of experiment '{name}' but no train_{name}.py: put the "
                      "script back, or remove its results") from error


def lambda_name(lam):
    """0.95 -> "0.95", 1.0 -> "1", 1e-05 -> "0.00001": no two lambdas share a name."""
    return np.format_float_positional(lam, trim="-")


@dataclass(frozen=True)
class Run:
    """configuration x method (x lambda) x trial: the unit of work."""
    preset: str
    experiment: str
    configuration: str
    method: str           # joint | bagging | stacking
    lam: float            # lambda; 0 for bagging and stacking
    trial: int
    settings: dict        # all that decides its numbers
    weights: bool         # are the trained weights kept?

    @property
    def method_name(self):
        return f"joint-{lambda_name(self.lam)}" if self.method == "joint" else self.method

    @property
    def label(self):
        method = f"lambda {lambda_name(self.lam)}" if self.method == "joint" else self.method
        return f"{self.configuration} {method} trial {self.trial}"

    @property
    def path(self):
        return Path(self.preset, self.experiment, self.configuration, self.method_name,
                    f"trial{self.trial}")

    def generator(self, purpose):
        """A generator for one purpose: initialisation, order, bootstrap, folds or drop.

        It depends on (experiment, configuration, trial, --seed) and nothing else, so the lambdas
        of one trial share their initial weights and their order, and a run alone equals the same
        run in a sweep.
        """
        words = (self.experiment, self.configuration, self.trial, self.settings["seed"], purpose)
        digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


DROPS = {      # what robustness.py drops
    "example": "a random subset of the members for every test example, as the paper says",
    "set": "one random subset for the whole test set, as the authors' code has it",
    "probability": "every member with probability p for every test example (one is always left)",
}


def learning_rate(rates, lam):
    """The rate of the first range that reaches `lam`: {0.95: a, 1: b} gives b for 0.97."""
    return rates[min(upper for upper in rates if upper >= lam)]


def list_runs(preset, experiment, block, data, seed=0, only=None, lambdas=None, methods=None):
    """The runs of an experiment, trial by trial, so that the first trial is complete early.

    `only`, `lambdas` and `methods` narrow them; lambdas alone mean the joint runs at them. A single
    network (M = 1) is the same at every lambda and is trained once, as lambda 1. Stacking combines
    the frozen members of its trial's lambda 0 run, which therefore comes before it.
    """
    names = dict.fromkeys(only or block["configurations"])
    methods = methods or (["joint"] if lambdas else None)
    lambdas = dict.fromkeys(lambdas or block["lambdas"])
    shared = {k: block[k] for k in ("epochs", "train", "validation", "test", "batch", "momentum",
                                    "weight_decay")}
    own = {"bagging": ["bagging"], "stacking": ["stacking", "folds", "penalties"]}
    runs = []
    for trial in range(block["trials"]):
        for name in names:
            c = block["configurations"][name]
            chosen = methods or c["methods"]
            wanted = [("joint", lam) for lam in lambdas if "joint" in chosen]
            if c["members"] == 1:
                wanted = [("joint", 1)] if wanted else []
            else:
                if "stacking" in chosen and ("joint", 0) not in wanted:
                    wanted.append(("joint", 0))
                wanted += [(m, 0) for m in ("bagging", "stacking") if m in chosen]
            for method, lam in wanted:
                settings = {"data": data, "seed": seed, "members": c["members"],
                            **{k: c[k] for k in experiment.network},
                            "lr": learning_rate(c["lr"], lam), **shared,
                            **{k: block[k] for k in own.get(method, [])}}
                weights = method == "joint" and (
                    lam in c["weights"] or (lam == 0 and "stacking" in chosen))
                runs.append(Run(preset, experiment.name, name, method, lam, trial, settings,
                                weights))
    if not runs:
        raise Refused(f"no run is left of {' '.join(names)}: bagging and stacking need more than "
                      "one member; name other --methods or configurations")
    return runs


# --- Data --------------------------------------------------------------------------------------

@dataclass
class Data:
    """uint8 images (n, C, H, W), labels (n,); mean and std (C, 1, 1) of pixels in [0, 1]."""
    description: dict     # name, source (real | synthetic), checksum or seed: a setting of a run
    origin: str           # where it was found: told, but it decides no number
    classes: int
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def device(self):
        return self.train_images.device

    @property
    def shape(self):
        """(C, H, W)"""
        return tuple(self.train_images.shape[1:])

    def to(self, device):
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Data(**vars(self) | moved)

    def normalise(self, images):
        """uint8 images (..., C, H, W) -> float32, mean 0 and standard deviation 1 per channel."""
        return images.float().sub_(self.mean * 255).div_(self.std * 255)


FASHION_MNIST = {  # SHA-256 of the four files, decompressed
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
DEFAULT_DATA_DIR = HERE / "data"
DOWNLOAD_MINUTES = 5      # after which `auto` gives a download up


def _idx_file(folder, name):
    """The bytes of one of the four files under `folder`, plain or .gz; None if it is not there."""
    for place in (folder, folder / "FashionMNIST" / "raw", folder / "fashion-mnist"):
        for path, opener in ((place / name, open), (place / f"{name}.gz", gzip.open)):
            if not path.is_file():
                continue
            try:
                with opener(path, "rb") as file:
                    content = file.read()
            except (OSError, EOFError, zlib.error) as error:
                raise Refused(f"{path} cannot be read ({error}): it is truncated or damaged; fetch "
                              "it anew, or remove it") from error
            if hashlib.sha256(content).hexdigest() != FASHION_MNIST[name]:
                raise Refused(f"{path} has the wrong SHA-256 (expected {FASHION_MNIST[name][:12]}"
                              "...): it is truncated or of another data set; fetch it anew, or "
                              "remove it")
            return content
    return None


def read_fashion_mnist(folder):
    """Fashion-MNIST from a folder, checked by SHA-256; None if nothing of it is there.

    Raises Refused if the files are incomplete, truncated or not the data set's own.
    """
    files = {name: _idx_file(folder, name) for name in FASHION_MNIST}
    missing = [name for name, content in files.items() if content is None]
    if len(missing) == len(files):
        return None
    if missing:
        raise Refused(f"{folder} holds Fashion-MNIST without {missing[0]}: expected "
                      f"{', '.join(files)}, each plain or .gz")
    images, labels, test_images, test_labels = files.values()

    def array(content, header):
        return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy())

    return Data(DATASETS["Fashion-MNIST"].description, str(folder), 10,
                array(images, 16).view(-1, 1, 28, 28), array(labels, 8).long(),
                array(test_images, 16).view(-1, 1, 28, 28), array(test_labels, 8).long(),
                torch.tensor(0.2860).view(1, 1, 1), torch.tensor(0.3530).view(1, 1, 1))


def synthetic(classes, shape, train, test, seed=0):
    """A stand-in made from a seed: it has the form of the real data and some of its difficulty.

    Every class is three smooth prototypes. An image is one of them, moved by up to two pixels and
    faded, over part of a prototype of another class, in noise. One boundary per class does not
    separate that, as it does not separate clothes.
    """
    channels, size, _ = shape
    g = torch.Generator().manual_seed(seed)
    modes, n = 3, train + test
    coarse = torch.randn(classes * modes, channels, 7, 7, generator=g)
    prototypes = F.interpolate(coarse, size=(size + 4, size + 4), mode="bicubic")
    labels = torch.randint(classes, (n,), generator=g)
    other = (labels + torch.randint(1, classes, (n,), generator=g)) % classes
    pick = torch.randint(modes, (2, n), generator=g)
    shift = torch.randint(5, (2, n), generator=g)
    fade = torch.rand(2, n, 1, 1, 1, generator=g)
    images = torch.empty(n, channels, size, size, dtype=torch.uint8)
    for dy in range(5):
        for dx in range(5):
            here = ((shift[0] == dy) & (shift[1] == dx)).nonzero().squeeze(1)
            view = prototypes[:, :, dy:dy + size, dx:dx + size]
            own, foreign = (view[c[here] * modes + p[here]] for c, p in
                            ((labels, pick[0]), (other, pick[1])))
            mixed = (0.5 + 0.5 * fade[0, here]) * own + 0.9 * fade[1, here] * foreign
            mixed += 0.6 * torch.randn(mixed.shape, generator=g)
            images[here] = (128 + 40 * mixed).clamp_(0, 255).to(torch.uint8)
    pixels = images[:train].float().div_(255)
    description = {"name": "synthetic stand-in", "source": "synthetic", "seed": seed}
    return Data(description, "made from a seed", classes,
                images[:train], labels[:train], images[train:], labels[train:],
                pixels.mean((0, 2, 3)).view(-1, 1, 1), pixels.std((0, 2, 3)).view(-1, 1, 1))


@dataclass(frozen=True)
class Dataset:
    """Where a data set comes from, and the form of its stand-in."""

    description: dict     # what the real data is: a setting of every run on it
    read: object          # folder -> Data, or None if nothing is there
    system: Path | None   # where a system package puts it, if one does
    torchvision: str | None     # the class that downloads it, if one does
    classes: int
    shape: tuple
    train: int
    test: int
    ways: str             # how else to get it, for a message


DATASETS = {
    "Fashion-MNIST": Dataset(
        {"name": "Fashion-MNIST", "source": "real",
         "sha256": FASHION_MNIST["train-images-idx3-ubyte"]},
        read_fashion_mnist, DEBIAN_FASHION_MNIST, "FashionMNIST", 10, (1, 28, 28), 60000, 10000,
        "`apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or put the four files "
        "*-ubyte.gz of Fashion-MNIST into a folder and pass --data-dir FOLDER"),
}


def _download(name, minutes):
    """Fetches a data set into data/ by torchvision, in a process of its own that can be given up.

    Returns None, or in one line why it failed. What is half there never reaches data/.
    """
    dataset = DATASETS[name]
    if dataset.torchvision is None:
        return "torchvision does not have it"
    try:
        DEFAULT_DATA_DIR.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".download-", dir=DEFAULT_DATA_DIR)
    except OSError as error:
        return f"{DEFAULT_DATA_DIR} cannot be written: {error.strerror}"
    limit = f"up to {minutes} minutes" if minutes else "for as long as it takes"
    print(f"data: downloading {name} by torchvision, {limit}", flush=True)
    code = (f"import torchvision; d = torchvision.datasets.{dataset.torchvision}; "
            f"[d({scratch!r}, train=t, download=True) for t in (True, False)]")
    try:
        done = subprocess.run([sys.executable, "-c", code], timeout=minutes and minutes * 60,
                              stderr=None if sys.stderr.isatty() else subprocess.PIPE, text=True)
        if done.returncode:
            return ((done.stderr or "").strip().splitlines() or ["torchvision failed"])[-1]
        for path in Path(scratch).iterdir():
            shutil.rmtree(DEFAULT_DATA_DIR / path.name, ignore_errors=True)
            path.rename(DEFAULT_DATA_DIR / path.name)
        return None
    except subprocess.TimeoutExpired:
        return f"not there after {minutes} minutes"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_data(name, policy, data_dir=None, download=True):
    """The real data set, or None where the policy says to take the stand-in.

    `data_dir` is a folder that must hold it; without one, data/ is looked at, then the system's
    package, then torchvision downloads into data/. Under `real` a failure raises Refused; under
    `auto` it is said, and the stand-in is taken.
    """
    dataset = DATASETS[name]
    if policy == "synthetic":
        if data_dir is not None:
            raise Refused(f"--data-dir {data_dir}: the data is to be synthetic; add --data real to "
                          "read that folder, or leave it out")
        return None
    if data_dir is not None:
        data = dataset.read(Path(data_dir)) if Path(data_dir).is_dir() else None
        if data is None:
            state = "holds nothing of it" if Path(data_dir).is_dir() else "is not a folder"
            raise Refused(f"--data-dir {data_dir} {state}: {name} was expected there; "
                          f"{dataset.ways}, or leave --data-dir out to download it")
        return data
    for folder in (DEFAULT_DATA_DIR, dataset.system):
        if folder is not None and (data := dataset.read(folder)):
            return data
    if not download:
        return None
    failure = _download(name, DOWNLOAD_MINUTES if policy == "auto" else None)
    if failure is None and (data := dataset.read(DEFAULT_DATA_DIR)):
        return data
    if policy == "real":
        raise Refused(f"{name} is not on disk and its download failed ({failure}). Three ways to "
                      f"get it: be online and run this again; {dataset.ways}")
    print(f"data: {name} cannot be had ({failure}); by --data auto the SYNTHETIC STAND-IN takes "
          f"its place, and every figure says so. For the real one: {dataset.ways}", flush=True)
    return None


def load_data(name, policy, block, data_dir=None, download=True):
    """The data of an experiment, real or stand-in, cut to the sizes that its settings name.

    Without `download`, for a plan, the stand-in takes the place of what is not on disk; under
    `real` it has the real data's description, by which finished runs are known.
    """
    dataset = DATASETS[name]
    data = find_data(name, policy, data_dir, download)
    if data is None:
        train = block["train"] + block["validation"] if block["train"] else dataset.train
        data = synthetic(dataset.classes, dataset.shape, train, block["test"] or dataset.test)
        if not download and policy == "auto":
            data.origin += f", unless {name} can be downloaded"
        if not download and policy == "real":
            data.description, data.origin = dataset.description, "to be downloaded first"
    n = len(data.train_labels)
    available = n - block["validation"]
    if block["validation"] >= n or (block["train"] or 1) > available:
        raise Refused(f"train {block['train']} and validation {block['validation']} are more than "
                      f"the {n} training images of {name}: lower one of them in presets.yaml")
    if block["batch"] > (block["train"] or available):
        raise Refused(f"batch {block['batch']} is larger than the training split of "
                      f"{block['train'] or available} images: lower batch or raise train")
    if block["test"] and block["test"] > len(data.test_labels):
        raise Refused(f"test {block['test']} is more than the {len(data.test_labels)} test images "
                      f"of {name}: lower it in presets.yaml")
    data.test_images = data.test_images[:block["test"]]
    data.test_labels = data.test_labels[:block["test"]]
    return data


def split(n, trial, validation, train=None):
    """Indices of the training and the validation split of one trial, the authors' procedure.

    It depends on the trial alone. `train` keeps the first so many of what is left to train on.
    """
    held_out = np.random.RandomState(trial).choice(range(n), validation, replace=False)
    rest = np.setdiff1d(np.arange(n), held_out)[:train]
    return torch.from_numpy(rest), torch.from_numpy(held_out)


def bootstraps(n, members, generator):
    """(n, M): column m holds the n draws with replacement from range(n) that member m trains on."""
    return torch.randint(n, (n, members), generator=generator)


def multiplicities(draws):
    """(n, M) uint8: how often each example stands in each member's bootstrap."""
    n, members = draws.shape
    return torch.stack([torch.bincount(draws[:, m], minlength=n).to(torch.uint8)
                        for m in range(members)], 1)


# --- The joint loss ----------------------------------------------------------------------------

def joint_loss(member_logits, targets, lam):
    """Eq. 4: lambda CE(softmax of the mean logits) + (1 - lambda) mean of the members' CE.

    member_logits (N, M, K), targets (N,), or probabilities (N, K). Training uses
    `fused_joint_loss`, which equals it.
    """
    ensemble = F.cross_entropy(member_logits.mean(1), targets)
    members = F.cross_entropy(member_logits.flatten(0, 1),
                              targets.repeat_interleave(member_logits.shape[1], 0))
    return lam * ensemble + (1 - lam) * members


def _log_probabilities(member_logits, targets):
    """log q_j and log q-bar, (M, K, N) and (K, N), and the targets as an index (M, 1, N).

    Members come first because the vectorised MLPs lay their logits out so: the softmax then runs
    over whole rows of examples.
    """
    logits = member_logits.permute(1, 2, 0)
    members, _, n = logits.shape
    index = targets.expand(members, n) if targets.dim() == 1 else targets.T
    return logits.log_softmax(1), logits.mean(0).log_softmax(0), index.unsqueeze(1)


def cross_entropies(member_logits, targets):
    """The ensemble's cross entropy (N,), Eq. 3, and the members' (N, M).

    targets (N,), or (N, M) where every member has examples of its own: the ensemble's is nan then.
    """
    log_q, log_q_bar, index = _log_probabilities(member_logits, targets)
    members = -log_q.gather(1, index).squeeze(1).T
    if targets.dim() == 2:
        return members.new_full((len(targets),), math.nan), members
    return -log_q_bar.gather(0, targets[None])[0], members


class _FusedJointLoss(torch.autograd.Function):
    """Eq. 4 with its gradient by hand, Eq. 9: one softmax serves loss, gradient and statistics."""

    @staticmethod
    def forward(ctx, member_logits, targets, lam, weights):
        log_q, log_q_bar, index = _log_probabilities(member_logits, targets)
        members = -log_q.gather(1, index).squeeze(1)                        # (M, N)
        ctx.save_for_backward(log_q, log_q_bar, index, weights)
        ctx.lam, ctx.shared = lam, weights is None and targets.dim() == 1
        loss = (1 - lam) * (members if weights is None else members * weights.T).mean()
        ensemble = members.new_full((members.shape[1],), math.nan)
        if targets.dim() == 1:
            ensemble = -log_q_bar.gather(0, targets[None])[0]
            loss = loss + lam * ensemble.mean()
        members = members.T
        ctx.mark_non_differentiable(ensemble, members)
        return loss, ensemble, members

    @staticmethod
    def backward(ctx, upstream, *_):
        log_q, log_q_bar, index, weights = ctx.saved_tensors
        lam, scale = ctx.lam, upstream / (log_q.shape[0] * log_q.shape[2])  # 1 / (M N)
        if ctx.shared:
            minus_one = scale.neg().expand_as(index[0])
            common = (lam * scale * log_q_bar.exp()).scatter_add_(0, index[0], minus_one)
            gradient = (common.expand_as(log_q) if lam == 1 else     # (lambda q-bar - y) / (M N)
                        common.addcmul(log_q.exp(), (1 - lam) * scale))
        else:
            gradient = scale * log_q.exp()
            gradient.scatter_add_(1, index, scale.neg().expand_as(index))
            if weights is not None:
                gradient.mul_(weights.T.unsqueeze(1))
        return gradient.permute(2, 0, 1), None, None, None


def fused_joint_loss(member_logits, targets, lam, weights=None):
    """`joint_loss` and, for statistics, the cross entropies (N,) and (N, M) that it is made of.

    weights (N, M), or None, multiplies the members' losses: an example's multiplicity in each
    member's bootstrap. Weights, and targets (N, M), are for lambda 0.
    """
    return _FusedJointLoss.apply(member_logits, targets, lam, weights)


# --- Ensembles ---------------------------------------------------------------------------------

class Ensemble(nn.Module):
    """M networks of any kind: images (N, C, H, W), or (N, M, C, H, W) -> member logits (N, M, K).

    make() builds one network, whose initial weights are drawn as PyTorch draws them, from the
    generator's seed and not from the global state.
    """

    def __init__(self, make, members, generator):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            self.members = nn.ModuleList(make() for _ in range(members))

    def forward(self, images):
        shared = images.dim() == 4
        return torch.stack([member(images if shared else images[:, m])
                            for m, member in enumerate(self.members)], 1)


# --- Scores ------------------------------------------------------------------------------------

class Scores:
    """Losses and errors of the ensemble and of every member, summed over batches on the device.

    Errors are exact counts over examples. Nothing reaches the host before `summary`.
    """

    def __init__(self, members, device):
        self.n = 0
        self.ensemble = torch.zeros(2, dtype=torch.float64, device=device)          # loss, wrong
        self.members = torch.zeros(2, members, dtype=torch.float64, device=device)

    def add(self, member_logits, targets, ensemble_loss, member_loss):
        """One batch: member_logits (N, M, K), targets (N,) or (N, M), losses (N,) and (N, M)."""
        self.n += len(targets)
        own = targets if targets.dim() == 2 else targets[:, None]
        # max().indices is argmax, and on the CPU ten times as fast.
        wrong = member_logits.max(-1).indices != own
        self.members += torch.stack([member_loss.sum(0), wrong.sum(0)])
        wrong = member_logits.mean(1).max(-1).indices != own[:, 0]
        self.ensemble += torch.stack([ensemble_loss.sum(), wrong.sum()])

    def summary(self):
        """Means over the examples; diversity is the last term of Eq. 7, by that equation."""
        ensemble_loss, ensemble_error = (self.ensemble / self.n).tolist()
        member_loss, member_error = (self.members / self.n).cpu().numpy()
        if math.isnan(ensemble_loss):       # members with examples of their own have no ensemble
            ensemble_error = math.nan
        return {"ensemble_loss": ensemble_loss, "ensemble_error": ensemble_error,
                "mean_member_loss": member_loss.mean(), "mean_member_error": member_error.mean(),
                "member_loss": member_loss, "member_error": member_error,
                "diversity": member_loss.mean() - ensemble_loss}


EVALUATION_BATCH = 2000


@torch.no_grad()
def evaluate(ensemble, data, images, labels):
    """`Scores.summary` of an ensemble on images (n, C, H, W) with labels (n,)."""
    ensemble.eval()
    scores = None
    for part, targets in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH),
                             strict=True):
        member_logits = ensemble(data.normalise(part))
        scores = scores or Scores(member_logits.shape[1], labels.device)
        scores.add(member_logits, targets, *cross_entropies(member_logits, targets))
    return scores.summary()


@torch.no_grad()
def predict(ensemble, data, images):
    """All member logits (n, M, K) of images (n, C, H, W)."""
    ensemble.eval()
    logits = None
    for rows in torch.arange(len(images), device=images.device).split(EVALUATION_BATCH):
        part = ensemble(data.normalise(images[rows]))
        if logits is None:      # one block: half a gigabyte for 256x4H on the training split
            logits = part.new_empty(len(images), *part.shape[1:])
        logits[rows] = part
    return logits


# --- Training ----------------------------------------------------------------------------------

def training_step(ensemble, optimizer, scores, images, targets, lam, weights=None):
    """One step of SGD on the joint loss; its losses and errors are added to `scores`."""
    member_logits = ensemble(images)
    loss, ensemble_loss, member_loss = fused_joint_loss(member_logits, targets, lam, weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scores.add(member_logits.detach(), targets, ensemble_loss, member_loss)


def new_ensemble(experiment, run, data):
    """The untrained ensemble of a run, on the device of its data, and its optimizer."""
    s = run.settings
    ensemble = experiment.build(s, data.shape, data.classes, run.generator("initialisation"))
    ensemble = ensemble.to(data.device)
    return ensemble, torch.optim.SGD(ensemble.parameters(), lr=s["lr"], momentum=s["momentum"],
                                     weight_decay=s["weight_decay"], fused=True)


def train(experiment, run, data, progress=lambda epoch, history: None):
    """Trains one run by the paper's protocol (appendix B): early stopping on validation error.

    Returns the ensemble, with the weights of the reported epoch; the history, a pair of
    `Scores.summary` an epoch (training, running over the epoch's steps, and validation); the
    reported epoch, counted from 1; and the test scores there. The last two are None of a run whose
    loss is no longer finite.
    """
    s = run.settings
    ensemble, optimizer = new_ensemble(experiment, run, data)
    training, validation = (part.to(data.device) for part in split(
        len(data.train_images), run.trial, s["validation"], s["train"]))
    held_out = data.train_images[validation], data.train_labels[validation]
    n, bagging = len(training), s.get("bagging")
    if bagging:
        draws = bootstraps(n, s["members"], run.generator("bootstrap")).to(data.device)
        counts = multiplicities(draws)
    order = run.generator("order")
    history, lowest = [], math.inf
    for epoch in range(1, s["epochs"] + 1):
        ensemble.train()
        scores = Scores(s["members"], data.device)
        for rows in torch.randperm(n, generator=order).to(data.device).split(s["batch"]):
            batch = training[draws[rows] if bagging == "resample" else rows]   # (N, M) or (N,)
            training_step(ensemble, optimizer, scores, data.normalise(data.train_images[batch]),
                          data.train_labels[batch], run.lam,
                          counts[rows].float() if bagging == "weights" else None)
        history.append((scores.summary(), evaluate(ensemble, data, *held_out)))
        progress(epoch, history)
        if not all(math.isfinite(part["mean_member_loss"]) for part in history[-1]):
            return ensemble, history, None, None
        error = history[-1][1]["ensemble_error"]
        if error < lowest:                              # the first minimum, as the authors take it
            lowest, reported, best = error, epoch, copy.deepcopy(ensemble.state_dict())
    ensemble.load_state_dict(best)
    return ensemble, history, reported, evaluate(ensemble, data, data.test_images, data.test_labels)


def stack(experiment, run, data, results):
    """Stacking (Wolpert 1992): a linear combiner on the M*K logits of the frozen lambda 0 members.

    The combiner starts at plain averaging and is penalised, by squared distance, towards it; the
    penalty with the lowest cross-validated cross entropy is taken. Returns the test scores of the
    combination, as an ensemble of one (None if the lambda 0 run diverged), and what history.npz and
    run.json tell of the penalty. A penalty at the end of those tried is told as such.
    """
    s = run.settings
    source = results / replace(run, method="joint").path
    diverged = read_run(source)["result"]["diverged_at_epoch"]
    if diverged is not None:                            # there are no members to combine
        return None, {}, {"diverged_at_epoch": diverged}
    ensemble, _ = new_ensemble(experiment, run, data)
    ensemble.load_state_dict(load_weights(source, data.device))
    training, validation = split(len(data.train_images), run.trial, s["validation"], s["train"])
    fitted = (validation if s["stacking"] == "validation" else training).to(data.device)
    x = predict(ensemble, data, data.train_images[fitted]).flatten(1)              # (n, M*K)
    y = data.train_labels[fitted]
    averaging = torch.eye(data.classes, device=data.device).repeat(1, s["members"]) / s["members"]

    def objective(step, bias, rows, penalty):
        loss = F.cross_entropy(F.linear(x, averaging + step, bias), y, reduction="none")
        return (loss * rows).sum() / rows.sum() + penalty * step.square().sum()

    def fit(step, bias, rows, penalty):
        """Moves step (K, M*K) and bias (K,) towards the minimum over the examples where rows is 1.

        It ends where no entry of the gradient exceeds 0.001. For 256x4H that leaves less than
        0.0005 of the loss.
        """
        optimizer = torch.optim.LBFGS([step, bias], max_iter=300, tolerance_grad=1e-3,
                                      tolerance_change=0, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = objective(step, bias, rows, penalty)
            loss.backward()
            return loss
        optimizer.step(closure)

    def start():
        return (torch.zeros_like(averaging, requires_grad=True),
                torch.zeros(data.classes, device=data.device, requires_grad=True))

    penalties = sorted(s["penalties"], reverse=True)        # from the strongest, each a warm start
    fold = torch.randperm(len(y), generator=run.generator("folds")).to(data.device) % s["folds"]
    losses = np.zeros(len(penalties))
    for k in range(s["folds"]):
        step, bias = start()
        for i, penalty in enumerate(penalties):
            fit(step, bias, (fold != k).float(), penalty)
            with torch.no_grad():
                losses[i] += objective(step, bias, (fold == k).float(), 0).item() / s["folds"]
    chosen = penalties[losses.argmin()]
    step, bias = start()
    fit(step, bias, torch.ones(len(y), device=data.device), chosen)

    test, targets = Scores(1, data.device), data.test_labels
    with torch.no_grad():
        x = predict(ensemble, data, data.test_images).flatten(1)
        logits = F.linear(x, averaging + step, bias).unsqueeze(1)                  # (N, 1, K)
        test.add(logits, targets, *cross_entropies(logits, targets))
    return (test.summary(), {"penalty": penalties, "cross_validated_loss": losses},
            {"penalty": chosen, "diverged_at_epoch": None, "penalty_is_outermost":
             len(penalties) > 1 and chosen in (penalties[0], penalties[-1])})


# --- Run folders -------------------------------------------------------------------------------

def write(path, save):
    """Writes a file under a temporary name and renames it: what has the name is whole.

    Raises Refused if it cannot be written: the disk is full, or the folder is gone.
    """
    content = io.BytesIO()          # in memory first: torch.save hides a full disk's OSError
    save(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.getbuffer())
        temporary.replace(path)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}; what was finished is kept: "
                      "make room, and give the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_run(folder):
    """The run.json of a finished run, or None. Raises Refused if it cannot be read."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
        if not {"settings", "result", "trial"} <= record.keys():
            raise ValueError("it is no record of a run")
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as error:
        raise Refused(f"{path} cannot be read ({error}): remove {folder}, and the run is done "
                      "again") from error


def load_history(folder):
    """The arrays of history.npz, by name. Raises Refused if it is not there or not whole."""
    path = folder / "history.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Refused(f"{path} cannot be read ({error}): remove {folder}, and the run is done "
                      "again") from error


def load_weights(folder, device):
    """The state_dict of the reported epoch. Raises Refused if it is not there or not whole."""
    path = folder / "weights.pt"
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Refused(f"{path} cannot be read ({reason}): remove {folder}, and the run is done "
                      "again") from error


def difference(there, here):
    """The first setting in which two runs differ, as (key, there, here), or None."""
    keys = (key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
    return next(((key, there.get(key), here.get(key)) for key in keys), None)


def finished(run, results, remedy="use another --results folder, or remove that one"):
    """Is this run in its folder, with what it must keep? Raises Refused on other settings there."""
    folder = results / run.path
    record = read_run(folder)
    if record is None:
        return False
    if other := difference(record["settings"], json.loads(json.dumps(run.settings))):
        key, there, here = other
        raise Refused(f"{folder} holds results from other settings: {key} is {there!r} there and "
                      f"{here!r} now; {remedy}")
    return (not run.weights or (folder / "weights.pt").is_file() or
            record["result"]["diverged_at_epoch"] is not None)


def machine(device):
    """What a number depends on beside its settings, for run.json."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "system": platform.system(), "commit": commit()}


@functools.cache        # of the code that runs, whatever is changed while it runs
def commit():
    """The git commit of the code, marked if it was changed since; None outside a checkout."""
    try:
        git = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty", "--exclude=*"],
                             capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() or None


def write_run(run, results, data, began, arrays, result, ensemble=None):
    """Writes a run folder; run.json, which makes it a finished run, comes last.

    arrays go to history.npz, `result` and what else is worth knowing to run.json, and the weights
    to weights.pt where the run keeps them. `began` is the run's start by time.perf_counter.
    """
    folder = results / run.path
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "history.npz", lambda file: np.savez(file, **arrays))
    record = {"experiment": run.experiment, "preset": run.preset,
              "configuration": run.configuration, "method": run.method, "lambda": run.lam,
              "trial": run.trial, "settings": run.settings, "result": result}
    if ensemble is not None:
        record["parameters"] = sum(p.numel() for p in ensemble.parameters())
    if run.weights and result["diverged_at_epoch"] is None:
        write(folder / "weights.pt", lambda file: torch.save(ensemble.state_dict(), file))
    record |= {"seconds": round(time.perf_counter() - began, 2),
               "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
               "data_from": data.origin, "machine": machine(data.device)}
    write(folder / "run.json", lambda file: file.write(json.dumps(record, indent=1).encode()))


def do_run(experiment, run, data, results, progress):
    """Trains one run and writes its folder. Returns its result, as run.json has it."""
    began, ensemble = time.perf_counter(), None
    if run.method == "stacking":
        test, arrays, result = stack(experiment, run, data, results)
    else:
        ensemble, history, epoch, test = train(experiment, run, data, progress)
        arrays = {f"{part}_{key}": np.array([scores[i][key] for scores in history], np.float32)
                  for i, part in enumerate(("train", "validation")) for key in history[0][i]}
        result = {"epoch": epoch, "diverged_at_epoch": None if epoch else len(history)}
        if epoch:
            result["validation_error"] = history[epoch - 1][1]["ensemble_error"]
    for key, value in (test or {}).items():
        arrays[f"test_{key}"] = value
        if np.ndim(value) == 0:
            result[f"test_{key}"] = float(value)
    write_run(run, results, data, began, arrays, result, ensemble)
    return result


# --- Plan and progress -------------------------------------------------------------------------

def seconds_per(work, repeats, device):
    """The mean time of one call of `work`, device work included."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - began) / repeats


def cost(experiment, run, data):
    """What a run will take, from a few of its own steps on the device at hand.

    Returns seconds, bytes of its history and bytes of its weights, should they be kept.
    """
    s, device = run.settings, data.device
    ensemble, optimizer = new_ensemble(experiment, run, data)
    scores = Scores(s["members"], device)
    own = (s["members"],) if s.get("bagging") == "resample" else ()
    index = torch.randint(len(data.train_labels), (s["batch"], *own), device=device)
    part = data.train_images[:EVALUATION_BATCH], data.train_labels[:EVALUATION_BATCH]

    def seconds(work, repeats):
        work()                                          # the first is slower
        return seconds_per(work, repeats, device)

    example = seconds(lambda: evaluate(ensemble, data, *part), 2) / len(part[1])
    n = s["train"] or len(data.train_labels) - s["validation"]
    if run.method == "stacking":        # a fit costs about as much as a dozen evaluations
        fits = s["folds"] * len(s["penalties"]) + 1
        return 12 * fits * example * (
            s["validation"] if s["stacking"] == "validation" else n), 0, 0
    step = seconds(lambda: training_step(
        ensemble, optimizer, scores, data.normalise(data.train_images[index]),
        data.train_labels[index], run.lam), 2 if own else 15)
    return (s["epochs"] * (math.ceil(n / s["batch"]) * step + s["validation"] * example),
            16 * s["epochs"] * s["members"], 4 * sum(p.numel() for p in ensemble.parameters()))


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else (
        f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h")


def plan(experiment, runs, to_do, data):
    """Prints what is to be done and what it takes; returns the seconds of each run to do."""
    known, seconds, size = {}, [], 0
    for run in to_do:
        kind = (run.configuration, run.method)
        if kind not in known:
            known[kind] = cost(experiment, run, data)
        time_taken, history, weights = known[kind]
        seconds.append(time_taken)
        size += history + run.weights * weights
    name, source = data.description["name"], data.description["source"]
    print(f"{experiment.name}: {len(runs)} runs, {len(runs) - len(to_do)} finished, {len(to_do)} "
          f"to do: about {duration(sum(seconds))}, {size / 1e6:.0f} MB\n"
          f"  on {machine(data.device)['device']} ({data.device.type}, {torch.get_num_threads()} "
          f"threads), with {name} ({source}; {data.origin})", flush=True)
    return seconds


class Progress:
    """Says where the work is and when it will end: one living line; in a log, one now and then."""

    def __init__(self, seconds):
        self.seconds, self.done, self.began, self.said = seconds, 0, time.perf_counter(), 0.0
        self.live = sys.stdout.isatty()

    def start(self, run):
        self.run = run

    def left(self, part):
        """Seconds left: the estimate of what is to come, scaled by how it has held so far."""
        past = sum(self.seconds[:self.done]) + part * self.seconds[self.done]
        spent = time.perf_counter() - self.began
        return (sum(self.seconds) - past) * (spent / past if past and spent > 5 else 1)

    def say(self, text, living=False):
        line = f"[{self.done + 1}/{len(self.seconds)}] {self.run.label}: {text}"
        print(f"\r{line:<100}" if self.live else line, end="" if living else "\n", flush=True)
        self.said = time.perf_counter()

    def epoch(self, epoch, history):
        if not self.live and time.perf_counter() - self.said < 30:
            return
        error = 100 * history[-1][1]["ensemble_error"]
        epochs = self.run.settings["epochs"]
        self.say(f"epoch {epoch}/{epochs}, validation error {error:.1f} %, "
                 f"about {duration(self.left(epoch / epochs))} left", living=self.live)

    def finish(self, result):
        if "test_ensemble_error" in result:
            text = f"test error {100 * result['test_ensemble_error']:.2f} %"
            text += f" (epoch {result['epoch']})" if "epoch" in result else ""
            if result.get("penalty_is_outermost"):
                text += (f" (penalty {result['penalty']:g} is the outermost tried: "
                         "widen `penalties` in presets.yaml)")
        else:
            text = f"DIVERGED at epoch {result['diverged_at_epoch']}"
        self.say(f"{text}, about {duration(self.left(1))} left")
        self.done += 1


# --- The command line --------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse, with the docstring as it stands and a refusal in one line."""

    def __init__(self, description):
        super().__init__(description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise Refused(f"{message}; see --help")


def _number(kind, test, expected):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not test(value):
            raise argparse.ArgumentTypeError(f"'{text}' is not {expected}")
        return value
    return parse


count = _number(int, *COUNT)
lambda_number = _number(float, *FRACTION)
seed_number = _number(int, _is(int, 0, 2**63 - 1), "a whole number of at least 0")


def parser(description):
    """The flags that training and robustness.py share, with one meaning."""
    p = Parser(description)
    p.add_argument("--preset", help="a size of the study, from presets.yaml: paper, short, quick "
                   "or smoke; without it, short where CUDA can be used, else quick")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these configurations only")
    p.add_argument("--lambdas", nargs="+", type=lambda_number, metavar="L",
                   help="joint training at these lambdas only, numbers in [0, 1]")
    p.add_argument("--trials", type=count, metavar="N", help="the first N trials")
    p.add_argument("--data-dir", metavar="DIR", help="a folder that holds the real data; without "
                   "it: data/, then the system's package, then a download into data/")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR",
                   help="where run folders are (default: results)")
    p.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")
    p.add_argument("--seed", type=seed_number, default=0, metavar="N", help="moves initial "
                   "weights, order, bootstraps and dropped members, never the split (default: 0)")
    p.add_argument("--dry-run", action="store_true",
                   help="print the runs, what is finished and what the rest will take, and stop")
    return p


def training_parser(description):
    """The flags of a training script."""
    p = parser(description)
    p.add_argument("--methods", nargs="+", metavar="METHOD",
                   help=f"these methods only: {', '.join(METHODS)}")
    p.add_argument("--epochs", type=count, metavar="N", help="so many epochs")
    p.add_argument("--data", help="real: the real data or nothing; auto: the stand-in where the "
                   "real cannot be had in 5 minutes; synthetic: the stand-in; "
                   "without it, the preset's policy")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                   help="other values of the preset, e.g. bagging=resample, stacking=training")
    p.add_argument("--fetch", action="store_true",
                   help="get the data and stop; exit status 3 if the stand-in takes its place")
    return p


def choose_device(name):
    """The torch device for --device. Raises Refused if it cannot be used."""
    nearest(name, ("auto", "cpu", "cuda"), "value of --device")
    if name == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no usable CUDA GPU; use --device cpu, or install "
                      f"a driver that fits torch {torch.__version__}")
    torch.set_flush_denormal(True)      # the momenta of dead nodes decay into slow denormal numbers
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_preset(name):
    """The driver's rule: `paper` is weeks of one GPU and is asked for by name."""
    return name or ("short" if torch.cuda.is_available() else "quick")


def override(block, pairs):
    """The block with each KEY=VALUE of --set, read as YAML."""
    for pair in pairs:
        key, _, text = pair.partition("=")
        nearest(key, [k for k in block if k != "configurations"], "key in --set")
        test, expected = SETTINGS[key]
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = math.nan
        if not test(value):
            raise Refused(f"--set {pair}: '{text}' is not {expected}")
        block = block | {key: value}
    return block


def prepare(experiment, args):
    """What the command line selects: the experiment's settings, its data and its runs."""
    name = choose_preset(args.preset)
    preset = load_preset(name)
    block = override(experiment_settings(preset, name, experiment), args.set)
    block |= {k: v for k in ("trials", "epochs") if (v := getattr(args, k))}
    for word in args.methods or []:
        nearest(word, METHODS, "method")
    for word in args.only or []:
        nearest(word, block["configurations"], "configuration")
    policy = nearest(args.data or preset["data"], POLICIES, "value of --data")
    device = choose_device(args.device)
    if args.fetch:
        data = find_data(experiment.dataset, policy, args.data_dir)
        print(f"data: {experiment.dataset}: {data.origin if data else 'the synthetic stand-in'}")
        sys.exit(0 if data or policy == "synthetic" else 3)
    fitted = block["validation" if block["stacking"] == "validation" else "train"] or math.inf
    if block["folds"] > fitted:
        raise Refused(f"folds {block['folds']} is more than the {fitted} images that stacking is "
                      "fitted on: lower it")
    data = load_data(experiment.dataset, policy, block, args.data_dir, download=not args.dry_run)
    return block, data.to(device), list_runs(
        name, experiment, block, data.description, args.seed, args.only, args.lambdas, args.methods)


def train_missing(experiment, runs, data, args):
    """Trains the runs that are not in their folders yet, or with --dry-run prints the plan."""
    to_do = [run for run in runs if not finished(run, args.results)]
    if not args.dry_run:
        make_writable(args.results)
    seconds = plan(experiment, runs, to_do, data)
    if args.dry_run:
        for run in runs:
            print(f"  {run.label}: {'to do' if run in to_do else 'finished'}")
        return
    progress = Progress(seconds)
    for run in to_do:
        progress.start(run)
        progress.finish(do_run(experiment, run, data, args.results, progress.epoch))


def make_writable(folder):
    """Makes a folder for what is to be written. Raises Refused if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refused(f"{folder} cannot be written: {error.strerror}; name another one") from error


def command_line(main):
    """Runs a script's `main`; bad input becomes one line on stderr and exit status 2."""
    try:
        main()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                 # whoever read the output, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:                # a folder went away, or may not be read
        print(f"error: {error}; what was finished is kept: mend this and give the same command "
              "again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; finished runs are kept: the same command goes on with the others",
              file=sys.stderr)
        sys.exit(130)
