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
import collections
import concurrent.futures
import contextlib
import copy
import datetime
import difflib
import fcntl
import functools
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import reprlib
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass, field, replace
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
          "`pip install -r requirements.txt`; or `bash run_all.sh`, which makes a .venv, and then "
          "`. .venv/bin/activate`",
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
    word = word[:100] if isinstance(word, str) else shown(word)
    close = difflib.get_close_matches(word, known, 1, 0.3)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise Refused(f"unknown {what} '{word}': expected one of {', '.join(known)}{hint}")


# --- Presets -----------------------------------------------------------------------------------

def _is(kind, low=-math.inf, high=math.inf):
    """A test for a number of one kind within [low, high]; true and false are not numbers."""
    return lambda x: isinstance(x, kind) and not isinstance(x, bool) and low <= x <= high


def list_of(test):
    """A test for a list, not empty, of what passes a test."""
    return lambda x: isinstance(x, list) and x != [] and all(map(test, x))


_shortener = reprlib.Repr()
_shortener.maxlevel, _shortener.maxstring, _shortener.maxother = 2, 60, 60


def shown(value):
    """A value for a message: what YAML's references blow up, and long numbers, are cut short."""
    try:
        return _shortener.repr(value)
    except ValueError:                          # Python prints no number of thousands of digits
        return "a number of thousands of digits"


MOST = 1_000_000
COUNT = (_is(int, 1, MOST), f"a whole number of at least 1, at most {MOST}")
COUNT_OR_ALL = (lambda x: x is None or COUNT[0](x), f"{COUNT[1]}, or null for all")
RATE = (lambda x: _is((int, float), 0)(x) and 0 < x < math.inf, "a number above 0")
FRACTION = (_is((int, float), 0, 1), "a number in [0, 1]")
LAMBDAS = (list_of(FRACTION[0]), "a list of numbers in [0, 1]")
SWITCH = (lambda x: isinstance(x, bool), "true or false")
METHODS = ("joint", "independent", "bagging", "stacking")
POLICIES = ("real", "auto", "synthetic", "folder")


def _one_of(words):
    return lambda x: x in words, "one of " + ", ".join(words)


PRECISION = _one_of(("fp32", "bf16", "auto"))      # auto: bf16 where the device computes in it
SETTINGS = {  # what an experiment's block in presets.yaml holds, and what each value must be
    "dataset": (lambda x: isinstance(x, str) and x in DATASETS, "a data set of common.DATASETS"),
    "trials": COUNT, "epochs": COUNT, "batch": COUNT,
    "train": COUNT_OR_ALL, "test": COUNT_OR_ALL,
    "validation": (_is(int, 0, MOST), f"a whole number of at least 0, at most {MOST}"),
    "augment": SWITCH,
    "momentum": (_is((int, float), 0, 0.999999), "a number in [0, 1)"),
    "nesterov": SWITCH,
    "weight_decay": (lambda x: _is((int, float), 0)(x) and x < math.inf, "a number of at least 0"),
    "decay": (lambda x: x == [] or list_of(lambda share: RATE[0](share) and share < 1)(x),
              "a list of shares of the epochs, each above 0 and below 1 (the end)"),
    "bagging": _one_of(("weights", "resample")),
    "stacking": _one_of(("validation", "training")),
    "folds": (_is(int, 2, MOST), f"a whole number of at least 2, at most {MOST}"),
    "penalties": (list_of(RATE[0]), "a list of numbers above 0"),
    "tune": (list_of(RATE[0]), "a list of numbers above 0"),
}
# What each configuration has; its script adds the keys of its network. What is the same for all may
# stand in the experiment's block.
CONFIGURATION = {
    "members": COUNT,
    "lr": (lambda x: isinstance(x, dict) and x != {} and all(map(FRACTION[0], x))
           and max(x) == 1 and all(map(RATE[0], x.values())),
           "learning rates per range of lambda, the last of them for 1"),
    "methods": (list_of(lambda x: x in METHODS), "a list of " + ", ".join(METHODS)),
    "lambdas": LAMBDAS,
    "weights": (lambda x: x == [] or LAMBDAS[0](x), "a list of lambdas whose weights are kept"),
}
ROBUSTNESS = {"repeats": COUNT}


def _check(block, schema, where, optional=()):
    if not isinstance(block, dict):
        raise Refused(f"presets.yaml: {where} is {shown(block)}: expected a block of settings")
    for key, value in block.items():
        if nearest(key, [*schema, *optional], f"key in presets.yaml, {where}") in schema:
            test, expected = schema[key]
            if not test(value):
                raise Refused(f"presets.yaml, {where}.{key}: {shown(value)} is not {expected}")
    missing = [key for key in schema if key not in block]
    if missing:
        raise Refused(f"presets.yaml, {where}: {missing[0]} is missing")


def _merge(base, override, where):
    """`base` with the values of `override`; a key that `base` does not have is refused."""
    if not isinstance(override, dict):
        raise Refused(f"presets.yaml: {where} is {shown(override)}: expected a block of settings")
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
        if not isinstance(presets, dict) or not isinstance(presets.get("paper"), dict):
            raise Refused(f"{path.name}: expected a block `paper` that the other presets change")
        nearest(name, presets, "preset")
        preset = _merge(presets["paper"], presets[name], name)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        # ValueError: not text, or a date or a number that is none
        raise Refused(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    nearest(preset.get("data"), POLICIES, f"value of {name}.data in presets.yaml")
    _check(preset.get("robustness"), ROBUSTNESS, f"{name}.robustness")
    return preset


def experiment_settings(preset, name, experiment, changes=()):
    """The block of one experiment in a preset (`load_preset`), every value of it checked.

    Each of its configurations comes with what stands in the block for all of them. `changes` are
    the KEY=VALUE of --set, which hold for all, and CONFIGURATION.KEY=VALUE, for one.
    """
    if experiment.name not in preset:
        raise Refused(f"presets.yaml: {name} has no block '{experiment.name}'")
    block, where = preset[experiment.name], f"{name}.{experiment.name}"
    own = CONFIGURATION | experiment.network
    _check(block, SETTINGS | {"configurations": (
        lambda x: isinstance(x, dict) and x != {} and all(isinstance(c, dict) for c in x.values()),
        "a block of configurations")}, where, optional=own)
    shared = {key: block[key] for key in own if key in block}
    block = {key: value for key, value in block.items() if key not in own}
    block["configurations"] = {key: shared | values
                               for key, values in block["configurations"].items()}
    for change in changes:
        _change(block, change, own)
    for key, values in block["configurations"].items():
        _check(values, own, f"{where}.configurations.{key}")
    return block


def _change(block, change, own):
    """Makes one change of --set, read as YAML, in the block of an experiment."""
    name, _, text = change.partition("=")
    configuration, _, key = name.rpartition(".")
    test, expected = (SETTINGS | own)[nearest(key, [*SETTINGS, *own], "key in --set")]
    try:
        value = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        value = math.nan
    if not test(value):
        raise Refused(f"--set {shown(change)[1:-1]}: the value is not {expected}")
    if configuration:
        nearest(configuration, block["configurations"], "configuration in --set")
    if key in own:
        for each in [configuration] if configuration else block["configurations"]:
            block["configurations"][each] = block["configurations"][each] | {key: value}
    elif configuration:
        raise Refused(f"--set {change}: {key} holds for all configurations; leave "
                      f"'{configuration}.' out")
    else:
        block[key] = value


# --- Runs --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments, as its script declares it.

    build(settings, shape, classes, generator) returns the untrained ensemble of a run, an nn.Module
    from images (N, *shape) or (N, M, *shape) to member logits (N, M, K); `settings` are the run's,
    `generator` draws the initial weights. `figures` tells which runs are drawn where: for a plan.
    """
    name: str
    network: dict         # the network's own keys in presets.yaml -> (test, what is expected)
    build: object
    figures: dict = field(default_factory=dict)     # "Fig. 3" -> test of a Run


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
    method: str           # one of METHODS
    lam: float            # lambda; 0 for the other methods
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
        """A generator for one purpose: initialisation, order, augmentation, bootstrap, folds, drop.

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
    shared = {k: block[k] for k in ("dataset", "epochs", "train", "validation", "test", "batch",
                                    "momentum", "nesterov", "weight_decay", "decay", "augment")}
    own = {"bagging": ["bagging"], "stacking": ["stacking", "folds", "penalties"]}
    runs = []
    for trial in range(block["trials"]):
        for name in names:
            c = block["configurations"][name]
            chosen = methods or c["methods"]
            wanted = [("joint", lam) for lam in dict.fromkeys(lambdas or c["lambdas"])
                      if "joint" in chosen]
            if c["members"] == 1:
                wanted = [("joint", 1)] if wanted else []
            else:
                if "stacking" in chosen and ("joint", 0) not in wanted:
                    wanted.append(("joint", 0))
                wanted += [(m, 0) for m in METHODS[1:] if m in chosen]
            for method, lam in wanted:
                settings = {"data": data, "seed": seed, "members": c["members"],
                            **{k: c[k] for k in experiment.network},
                            "lr": learning_rate(c["lr"], lam), **shared,
                            **{k: block[k] for k in own.get(method, [])}}
                if method == "independent":
                    settings |= own_rate(settings)
                weights = method == "joint" and (
                    lam in c["weights"] or (lam == 0 and "stacking" in chosen))
                runs.append(Run(preset, experiment.name, name, method, lam, trial, settings,
                                weights))
    if not runs:
        raise Refused(f"no run is left of {' '.join(names)}: bagging, stacking and independent "
                      "need more than one member; name other --methods or configurations")
    return runs


def shard(runs, part, parts):
    """Every `parts`-th run from `part` on, counted from 0; stacking goes with what it combines."""
    place, own = {}, []
    for run in runs:
        key = replace(run, method="joint").path if run.method == "stacking" else run.path
        if place.setdefault(key, len(place)) % parts == part:
            own.append(run)
    return own


def own_rate(settings):
    """What makes lambda 0 train each member at the rate and the weight decay of `settings`.

    SGD on the sum of the members' losses at rate r and decay d. The loss at lambda 0 is that sum
    over M: so its gradient takes M times the rate, and the decay, which is not divided by M, d / M.
    """
    return {"lr": settings["lr"] * settings["members"],
            "weight_decay": settings["weight_decay"] / settings["members"]}


# --- Data --------------------------------------------------------------------------------------

@dataclass
class Data:
    """uint8 images (n, C, H, W), labels (n,); mean and std (C, 1, 1) of pixels in [0, 1]."""
    description: dict     # name, source (real | synthetic | folder), checksum or seed: a setting
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
        """Itself, on the device. Raises Refused if the device has too little memory."""
        with memory_told(device, self.description["name"], "free memory, or use --device cpu"):
            moved = {k: v.to(device) for k, v in vars(self).items()
                     if isinstance(v, torch.Tensor)}
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


CIFAR_MEAN_AND_STD = {
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def read_cifar(name, folder):
    """CIFAR-10 or -100 from a folder with torchvision's archive, or what it unpacks to, or None.

    torchvision checks the MD5 of every file. Raises Refused if the archive or its content is
    incomplete, truncated or not the data set's own.
    """
    dataset = getattr(torchvision.datasets, DATASETS[name].torchvision)
    archive, unpacked = folder / dataset.filename, folder / dataset.base_folder
    if not archive.is_file() and not unpacked.is_dir():
        return None
    with tempfile.TemporaryDirectory() as scratch:
        where = folder
        if not unpacked.is_dir():
            where = scratch
            if not torchvision.datasets.utils.check_integrity(archive, dataset.tgz_md5):
                raise Refused(f"{archive} has the wrong MD5 (expected {dataset.tgz_md5}): it is "
                              "truncated or damaged; fetch it anew, or remove it")
            torchvision.datasets.utils.extract_archive(str(archive), scratch)
        try:
            train, test = (dataset(where, train=part, download=False) for part in (True, False))
        except RuntimeError as error:               # torchvision's "not found or corrupted"
            raise Refused(f"{unpacked} is incomplete or damaged (a file is missing or has the "
                          f"wrong MD5): remove it and put {dataset.filename} into {folder}"
                          ) from error
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in CIFAR_MEAN_AND_STD[name])
    (images, labels), (test_images, test_labels) = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test))
    return Data(DATASETS[name].description, str(folder), len(train.classes), images, labels,
                test_images, test_labels, mean, std)


def read_image_folder(folder):
    """Images in `folder`/train/<class>/ and `folder`/test/<class>/, in RGB, all of one size.

    They are decoded once and kept under data/, and come in one random order, the same every time.
    Raises Refused on what is not of this form, naming the file or class.
    """
    if not folder.is_dir():
        raise Refused(f"--data-dir {folder} is not a folder: expected one with train/<class>/ and "
                      "test/<class>/ images")
    parts = []
    for part in ("train", "test"):
        for path in sorted((folder / part).glob("*/*")):
            if not path.name.startswith(".") and not torchvision.datasets.folder.is_image_file(
                    path.name):
                raise Refused(f"{path} is not an image that torchvision reads (its name does not "
                              "end like one): move it out of there")
        try:
            parts.append(torchvision.datasets.ImageFolder(folder / part))
        except FileNotFoundError as error:          # no classes, or one without images
            raise Refused(f"{folder / part} is no folder of images ({str(error).splitlines()[0]}): "
                          f"expected {part}/<class>/ with images in each") from error
    train, test = parts
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[0]
        raise Refused(f"{folder}: class '{odd}' is in one of train/ and test/ and not in the "
                      "other: both must have the same classes")
    if len(train.classes) < 2:
        raise Refused(f"{folder}/train has one class, '{train.classes[0]}': at least two folders "
                      "of images were expected")
    state = hashlib.sha256()
    for path, _ in train.samples + test.samples:
        stat, name = os.stat(path), os.path.relpath(path, folder)
        state.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = DEFAULT_DATA_DIR / f"folder-{state.hexdigest()[:16]}.npz"
    if cache.is_file():
        try:
            with np.load(cache, allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise Refused(f"{cache}, the decoded images of {folder}, cannot be read ({error}): "
                          "remove it, and they are decoded again") from error
    else:
        arrays = _decode(folder, train, test)
        try:
            DEFAULT_DATA_DIR.mkdir(parents=True, exist_ok=True)
            write(cache, lambda file: np.savez(file, **arrays))
        except (OSError, Refused) as error:
            print(f"data: the decoded images are not kept for the next time ({error})", flush=True)
    checksum = hashlib.sha256()
    for array in arrays.values():
        checksum.update(array)
    images, labels, test_images, test_labels = map(torch.from_numpy, arrays.values())
    mean, std = pixel_statistics(images)
    if not std.all():
        raise Refused(f"{folder}/train: a colour is the same in every pixel of every image, and "
                      "cannot be normalised: images with differences were expected")
    description = {"name": f"images of folder {folder.resolve().name}", "source": "folder",
                   "classes": len(train.classes), "sha256": checksum.hexdigest()}
    return Data(description, str(folder), len(train.classes), images, labels, test_images,
                test_labels, mean, std)


def _decode(folder, train, test):
    """The arrays of two torchvision ImageFolders, each in one random order."""
    print(f"data: decoding {len(train) + len(test)} images of {folder}, once", flush=True)
    shape, arrays = None, {}
    for name, part in (("train", train), ("test", test)):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0)).tolist()
        images = None
        for row, i in enumerate(order):
            path, _ = part.samples[i]
            try:
                pixels = np.asarray(part.loader(path))              # (H, W, 3)
            except (OSError, SyntaxError, ValueError) as error:     # PIL's, of a damaged image
                raise Refused(f"{path} cannot be decoded ({error}): mend or remove it") from error
            shape = shape or pixels.shape
            if pixels.shape != shape:
                raise Refused(f"{path} is {pixels.shape[1]}x{pixels.shape[0]} and others are "
                              f"{shape[1]}x{shape[0]}: all images must have one size")
            images = np.empty((len(part), 3, *shape[:2]), np.uint8) if images is None else images
            images[row] = pixels.transpose(2, 0, 1)
        arrays |= {f"{name}_images": images, f"{name}_labels": np.array(part.targets)[order]}
    return arrays


def pixel_statistics(images):
    """Mean and std (C, 1, 1) of uint8 images (n, C, H, W) as pixels in [0, 1], exactly."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256)
                          for c in range(images.shape[1])]).double()
    values, n = torch.arange(256) / 255, counts.sum(1)
    mean = counts @ values.double() / n
    std = ((counts * (values - mean[:, None]).square()).sum(1) / n).sqrt()
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def synthetic(classes, shape, train, test, seed=0):
    """A stand-in made from a seed: it has the form of the real data and some of its difficulty.

    Every class is three smooth prototypes. An image is one of them, moved by up to two pixels and
    faded, in every other image as a negative, over part of a prototype of another class, in noise.
    A linear network learns next to nothing of that, and a larger network more than a small one.
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
    sign = 2 * torch.randint(2, (n, 1, 1, 1), generator=g) - 1
    images = torch.empty(n, channels, size, size, dtype=torch.uint8)
    for dy in range(5):
        for dx in range(5):
            here = ((shift[0] == dy) & (shift[1] == dx)).nonzero().squeeze(1)
            view = prototypes[:, :, dy:dy + size, dx:dx + size]
            own, foreign = (view[c[here] * modes + p[here]] for c, p in
                            ((labels, pick[0]), (other, pick[1])))
            mixed = (0.5 + 0.5 * fade[0, here]) * sign[here] * own + 0.9 * fade[1, here] * foreign
            mixed += 0.6 * torch.randn(mixed.shape, generator=g)
            images[here] = (128 + 40 * mixed).clamp_(0, 255).to(torch.uint8)
    description = {"name": "synthetic stand-in", "source": "synthetic", "seed": seed}
    return Data(description, "made from a seed", classes,
                images[:train], labels[:train], images[train:], labels[train:],
                *pixel_statistics(images[:train]))


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


def _cifar(name, classes, md5):
    return Dataset(
        {"name": name, "source": "real", "md5": md5},
        functools.partial(read_cifar, name), None, name.replace("-", ""), classes, (3, 32, 32),
        50000, 10000,
        f"put torchvision's archive of it ({name.lower()}-python.tar.gz) into a folder and pass "
        "--data-dir FOLDER; or images of your own: --data folder --data-dir FOLDER")


DATASETS = {
    "Fashion-MNIST": Dataset(
        {"name": "Fashion-MNIST", "source": "real",
         "sha256": FASHION_MNIST["train-images-idx3-ubyte"]},
        read_fashion_mnist, DEBIAN_FASHION_MNIST, "FashionMNIST", 10, (1, 28, 28), 60000, 10000,
        "`apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or put the four files "
        "*-ubyte.gz of Fashion-MNIST into a folder and pass --data-dir FOLDER"),
    "CIFAR-100": _cifar("CIFAR-100", 100, "eb9058c3a382ffc7106e4002c42a8d85"),
    "CIFAR-10": _cifar("CIFAR-10", 10, "c58f30108f718f92721af3b95e74349a"),
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
    """The data set, or None where the policy says to take the stand-in.

    `data_dir` is a folder that must hold it; without one, data/ is looked at, then the system's
    package, then torchvision downloads into data/. Under `folder` it holds images of any kind.
    Under `real` a failure raises Refused; under `auto` it is said, and the stand-in is taken.
    """
    dataset = DATASETS[name]
    if policy == "synthetic":
        if data_dir is not None:
            raise Refused(f"--data-dir {data_dir}: the data is to be synthetic; add --data real to "
                          "read that folder, or leave it out")
        return None
    if policy == "folder":
        if data_dir is None:
            raise Refused("--data folder: which one? Add --data-dir FOLDER, one with "
                          "train/<class>/ and test/<class>/ images")
        return read_image_folder(Path(data_dir))
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
                      f"the {n} training images of {data.description['name']}: lower one of them "
                      "in presets.yaml")
    if block["batch"] > (block["train"] or available):
        raise Refused(f"batch {block['batch']} is larger than the training split of "
                      f"{block['train'] or available} images: lower batch or raise train")
    if block["test"] and block["test"] > len(data.test_labels):
        raise Refused(f"test {block['test']} is more than the {len(data.test_labels)} test images "
                      f"of {data.description['name']}: lower it in presets.yaml")
    data.test_images = data.test_images[:block["test"]]
    data.test_labels = data.test_labels[:block["test"]]
    return data


def split(n, trial, validation, train=None):
    """Indices of the training and the validation split of one trial, the authors' procedure.

    It depends on the trial alone. Of what is left to train on, `train` draws so many.
    """
    generator = np.random.RandomState(trial)
    held_out = generator.choice(n, validation, replace=False)
    rest = np.setdiff1d(np.arange(n), held_out)
    if train is not None:
        rest = np.sort(generator.choice(rest, train, replace=False))
    return torch.from_numpy(rest), torch.from_numpy(held_out)


PADDING = 4     # black pixels on each side of an image that is cropped


def crop_and_flip(padded, rows, moves):
    """Augmented images (..., C, H, W), one for each entry of rows (...), as torchvision makes them.

    padded (n, C, H + 8, W + 8) uint8; moves (..., 3): top and left of the crop, each 0 to 8, and 1
    where the image is flipped first. Equal to hflip, pad(4) and crop(top, left, H, W).
    """
    height, width = (size - 2 * PADDING for size in padded.shape[2:])
    top, left, flip = (move.unsqueeze(-1) for move in moves.unbind(-1))
    y = top + torch.arange(height, device=padded.device)                    # (..., H)
    x = left + torch.arange(width, device=padded.device)                    # (..., W)
    x = torch.where(flip == 1, padded.shape[3] - 1 - x, x)
    images = padded[rows[..., None, None], :, y.unsqueeze(-1), x.unsqueeze(-2)]
    return images.movedim(-1, -3)                                           # from (..., H, W, C)


def draw_moves(shape, generator):
    """The moves (*shape, 3) of `crop_and_flip`: uniform crops, every other image flipped."""
    return torch.cat([torch.randint(2 * PADDING + 1, (*shape, 2), generator=generator),
                      torch.randint(2, (*shape, 1), generator=generator)], -1)


def bootstraps(n, members, generator):
    """(n, M): column m holds the n draws with replacement from range(n) that member m trains on."""
    return torch.randint(n, (n, members), generator=generator)


def multiplicities(draws):
    """(n, M) uint8: how often each example stands in each member's bootstrap."""
    n, members = draws.shape
    return torch.stack([torch.bincount(draws[:, m], minlength=n).to(torch.uint8)
                        for m in range(members)], 1)


class Batches:
    """The training images of one run, as bytes on the device, and its batches, gathered by index.

    An epoch takes the images `rows` of the data in one random order; where the run asks for it they
    are cropped and flipped, each member's own copies in bagging apart.
    """

    def __init__(self, run, data, rows):
        s, n, device = run.settings, len(rows), data.device
        self.data, self.size = data, s["batch"]
        self.images, self.labels = data.train_images[rows], data.train_labels[rows]
        self.order, self.augmentation = run.generator("order"), run.generator("augmentation")
        self.draws = self.counts = self.moves = None
        if s.get("bagging"):
            draws = bootstraps(n, s["members"], run.generator("bootstrap")).to(device)      # (n, M)
            if s["bagging"] == "resample":
                self.draws = draws
            else:
                self.counts = multiplicities(draws)
        if s["augment"]:
            shape = (n,) if self.draws is None else self.draws.shape
            self.images = F.pad(self.images, [PADDING] * 4)
            self.moves = torch.zeros(*shape, 3, dtype=torch.int64, device=device)

    def epoch(self):
        """A new order and new moves; returns the rows (N,) of each batch."""
        if self.moves is not None:
            self.moves.copy_(draw_moves(self.moves.shape[:-1], self.augmentation))
        return torch.randperm(len(self.labels), generator=self.order).to(
            self.labels.device).split(self.size)

    def take(self, rows):
        """Images (N, C, H, W), targets (N,) and weights (N, M), or None, of the rows (N,).

        Where members have images of their own, images are (N, M, C, H, W) and targets (N, M).
        """
        batch = rows if self.draws is None else self.draws[rows]
        images = (self.images[batch] if self.moves is None else
                  crop_and_flip(self.images, batch, self.moves[rows]))
        weights = None if self.counts is None else self.counts[rows].float()
        return self.data.normalise(images), self.labels[batch], weights


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

    make() builds one network, whose initial weights are drawn from the generator's seed and not
    from the global state. Images and filters are laid out channels last, which convolutions on
    both kinds of device prefer. At precision bf16 the networks run under autocast, with their
    batch-norm statistics in fp32, and the logits come back as fp32. On the CPU the members run
    side by side, each on a thread of its own as long as there are threads.
    """

    def __init__(self, make, members, generator, precision="fp32"):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            self.members = nn.ModuleList(make() for _ in range(members))
        self.to(memory_format=torch.channels_last)
        self.bf16 = precision == "bf16"

    def forward(self, images):
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.bf16:       # once: autocast would keep a copy of the shared images for each member
            images = images.to(torch.bfloat16)
        if images.device.type == "cpu" and torch.get_num_threads() > 1:
            return _SideBySide.apply(self, torch.is_grad_enabled(), images, *trainable(self))
        return torch.stack([self.one(m, images) for m in range(len(self.members))], 1)

    def one(self, m, images):
        """The logits (N, K) of member m."""
        if images.dim() == 5:
            images = images[:, m].contiguous(memory_format=torch.channels_last)
        if not self.bf16:
            return self.members[m](images)
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            return self.members[m](images).float()          # (each weight is used once: no cache)


def trainable(network):
    return [p for p in network.parameters() if p.requires_grad]


class _SideBySide(torch.autograd.Function):
    """The members of an `Ensemble` on threads of their own, forward and backward.

    Two threads on two members keep two cores busier than two threads on one: a member's layers are
    small. Each member has a graph of its own, which backward follows on the thread it is given.
    """

    @staticmethod
    def forward(ctx, ensemble, train, images, *parameters):
        def run(m):
            with torch.set_grad_enabled(train):         # of this thread
                return ensemble.one(m, images)

        ctx.ensemble, ctx.logits = ensemble, _in_threads(run, len(ensemble.members))
        return torch.stack([logits.detach() for logits in ctx.logits], 1)

    @staticmethod
    def backward(ctx, gradient):
        def run(m):
            return torch.autograd.grad(ctx.logits[m], trainable(ctx.ensemble.members[m]),
                                       gradient[:, m], allow_unused=True)

        parts = _in_threads(run, len(ctx.logits))
        return None, None, None, *(g for part in parts for g in part)


def _in_threads(run, count):
    """[run(0), ..., run(count - 1)], as many at a time as PyTorch has threads, which they share."""
    threads = torch.get_num_threads()
    share = threads // min(count, threads)
    torch.set_num_threads(share)        # MKL has one setting for the whole process
    try:
        return list(_pool(min(count, threads), share).map(run, range(count)))
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _pool(workers, share):
    """Threads that use `share` of PyTorch's each."""
    return concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads,
                                                 initargs=(share,))


def bf16_is_fast(device):
    """Does the device multiply in bf16? (It computes in it in any case, if need be slowly.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_information("flags", "Features")))


def cpu_information(*keys):
    """The words of the first line of /proc/cpuinfo under one of the keys; none on other systems."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.split()
    return []


@torch.no_grad()
def distances(ensemble, untrained):
    """(M,): how far each member of an `Ensemble` is from its initial weights, over their norm."""
    def vector(member):
        return torch.cat([p.flatten() for p in member.parameters()])
    return torch.stack([(vector(one) - vector(other)).norm() / vector(other).norm()
                        for one, other in zip(ensemble.members, untrained.members, strict=True)])


# --- Scores ------------------------------------------------------------------------------------

def predicted(member_logits):
    """The class of the highest logit, the first of several: (N, M, K) -> (N, M).

    It is argmax(-1), of which PyTorch's on the CPU goes through the classes of one example after
    the other: a tenth of the step of 256 members.
    """
    logits = member_logits.permute(2, 1, 0)                                         # (K, M, N)
    classes = len(logits)
    before = torch.arange(classes, 0, -1, dtype=torch.int16, device=logits.device)[:, None, None]
    return (classes - ((logits == logits.amax(0)) * before).amax(0)).T


class Scores:
    """Losses and errors of the ensemble and of every member, summed over batches on the device.

    Errors are exact counts over examples. Nothing reaches the host before `summary`.
    """

    def __init__(self, members, device):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.ensemble = torch.zeros(2, dtype=torch.float64, device=device)          # loss, wrong
        self.members = torch.zeros(2, members, dtype=torch.float64, device=device)

    def reset(self):
        for total in vars(self).values():
            total.zero_()

    def add(self, member_logits, targets, ensemble_loss, member_loss):
        """One batch: member_logits (N, M, K), targets (N,) or (N, M), losses (N,) and (N, M)."""
        self.n += len(targets)
        own = targets if targets.dim() == 2 else targets[:, None]
        wrong = predicted(member_logits) != own
        self.members += torch.stack([member_loss.sum(0), wrong.sum(0)])
        wrong = predicted(member_logits.mean(1, keepdim=True)) != own[:, :1]
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


def images_at_once(images):
    """How many of images (n, C, H, W) are evaluated at once: fewer if they are above 32x32 pixels.

    On two cores 500 is within a few per cent of the best for the MLPs and the DenseNets (their
    activations must stay in cache). 2000 was not measured on CUDA.
    """
    pixels = images.shape[2] * images.shape[3]
    return max(1, {"cpu": 500, "cuda": 2000}[images.device.type] * 1024 // max(1024, pixels))


@torch.no_grad()
def evaluate(ensemble, data, images, labels):
    """`Scores.summary` of an ensemble on images (n, C, H, W) with labels (n,)."""
    ensemble.eval()
    scores = None
    size = images_at_once(images)
    for part, targets in zip(images.split(size), labels.split(size), strict=True):
        member_logits = ensemble(data.normalise(part))
        scores = scores or Scores(member_logits.shape[1], labels.device)
        scores.add(member_logits, targets, *cross_entropies(member_logits, targets))
    return scores.summary()


@torch.no_grad()
def predict(ensemble, data, images):
    """All member logits (n, M, K) of images (n, C, H, W)."""
    ensemble.eval()
    logits = None
    for rows in torch.arange(len(images), device=images.device).split(images_at_once(images)):
        part = ensemble(data.normalise(images[rows]))
        if logits is None:      # one block: half a gigabyte for 256x4H on the training split
            logits = part.new_empty(len(images), *part.shape[1:])
        logits[rows] = part
    return logits


# --- Training ----------------------------------------------------------------------------------

def train(experiment, run, data, progress=lambda epoch, history: None, eager=False,
          checkpoint=None):
    """Trains one run by the paper's protocol (appendix B).

    With a validation split the reported epoch is the first with the lowest validation error; with
    none it is the last. Returns the ensemble, with the weights of that epoch; the history, a pair
    of `Scores.summary` an epoch (training, running over the epoch's steps; and validation, or test
    where there is no validation split); the reported epoch, counted from 1; and the test scores
    there. The last two are None of a run whose loss is no longer finite. A `Checkpoint` is kept
    up to date, and gone on from if it holds something.
    """
    s = run.settings
    ensemble, optimizer = new_ensemble(experiment, run, data)
    training, validation = (part.to(data.device) for part in split(
        len(data.train_images), run.trial, s["validation"], s["train"]))
    test = data.test_images, data.test_labels
    held_out = (data.train_images[validation], data.train_labels[validation]
                ) if s["validation"] else test
    batches, scores = Batches(run, data, training), Scores(s["members"], data.device)
    history, lowest, reported, best = [], math.inf, None, None
    if checkpoint and (saved := checkpoint.load(ensemble, optimizer, batches)):
        history, lowest, reported, best = saved
    step = stepper(run, ensemble, optimizer, scores, batches, eager)
    for epoch in range(len(history) + 1, s["epochs"] + 1):
        set_rate(optimizer, rate_at(s, epoch))
        ensemble.train()
        scores.reset()
        for rows in batches.epoch():
            step(rows)
        history.append((scores.summary(), evaluate(ensemble, data, *held_out)))
        progress(epoch, history)
        if not all(math.isfinite(part["mean_member_loss"]) for part in history[-1]):
            return ensemble, history, None, None
        error = history[-1][1]["ensemble_error"]
        if s["validation"] and error < lowest:          # the first minimum, as the authors take it
            lowest, reported, best = error, epoch, copy.deepcopy(ensemble.state_dict())
        if checkpoint:
            checkpoint.save(ensemble, optimizer, batches, history, lowest, reported, best)
    if not s["validation"]:
        return ensemble, history, s["epochs"], history[-1][1]
    ensemble.load_state_dict(best)
    return ensemble, history, reported, evaluate(ensemble, data, *test)


def training_step(ensemble, optimizer, scores, lam, images, targets, weights=None):
    """One step of SGD on the joint loss; its losses and errors are added to `scores`."""
    member_logits = ensemble(images)
    loss, ensemble_loss, member_loss = fused_joint_loss(member_logits, targets, lam, weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scores.add(member_logits.detach(), targets, ensemble_loss, member_loss)


def stepper(run, ensemble, optimizer, scores, batches, eager=False):
    """A function of rows (N,) that takes a training step; on CUDA one that was captured."""
    def step(rows):
        training_step(ensemble, optimizer, scores, run.lam, *batches.take(rows))

    if batches.labels.device.type == "cuda" and not eager:
        return captured(step, ensemble, optimizer, scores,
                        torch.arange(batches.size, device=batches.labels.device))
    return step


def captured(step, ensemble, optimizer, scores, rows):
    """A function of rows (N,) that replays `step`, which is recorded once as a CUDA graph.

    A replay saves the launch of each kernel from Python: thousands in a step of an ensemble. What a
    step reads and writes stays where it is in memory, and rows are copied in; a batch that is not
    of the size of `rows` is not replayed. What the steps taken here change is put back. Raises
    Refused if a step cannot be captured, or a captured one and an eager one are not equal within
    the precision's error.
    """
    def state():
        momenta = [buffer for each in optimizer.state.values() for buffer in each.values()
                   if buffer is not None]
        return [*ensemble.state_dict().values(), *vars(scores).values(), *momenta]

    def restore():
        for now, then in itertools.zip_longest(state(), before):
            now.zero_() if then is None else now.copy_(then)    # no momentum is one of zero

    def weights():
        return torch.cat([p.detach().flatten() for p in ensemble.parameters()])

    ensemble.train()
    before, start = [tensor.clone() for tensor in state()], weights()
    try:
        replay = record(lambda: step(rows))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Refused(f"a training step cannot be captured ({str(error).splitlines()[0]}): add "
                      "--eager") from error
    moved = []
    for work in (replay, lambda: step(rows)):
        restore()
        work()
        moved.append(weights() - start)
    restore()
    error = ((moved[0] - moved[1]).norm() / moved[1].norm()).item()
    if not error < 0.05:                # sums in another order leave less, in bf16 as well
        raise Refused(f"a captured training step differs from an eager one by {100 * error:.0f} % "
                      "of its length: add --eager")

    def take(batch):
        if len(batch) != len(rows):
            step(batch)
            return
        rows.copy_(batch)
        replay()
    return take


def record(work):
    """Records the CUDA work of a call and returns the function that replays it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):              # libraries choose their kernels and their workspace
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def new_ensemble(experiment, run, data):
    """The untrained ensemble of a run, on the device of its data, and its optimizer."""
    s = run.settings
    ensemble = experiment.build(s, data.shape, data.classes, run.generator("initialisation"))
    if s.get("bagging") == "weights" and any(hasattr(part, "running_mean")
                                             for part in ensemble.modules()):
        raise Refused(f"{run.label}: bagging by weights is none for a network with batch norm, "
                      "which would see all images: --set bagging=resample")
    ensemble = ensemble.to(data.device)
    rate = s["lr"] if data.device.type == "cpu" else torch.tensor(s["lr"], device=data.device)
    return ensemble, torch.optim.SGD(
        ensemble.parameters(), lr=rate, momentum=s["momentum"], nesterov=s["nesterov"],
        weight_decay=s["weight_decay"], fused=True)


def set_rate(optimizer, rate):
    """Sets the learning rate; in place where it is a tensor, which a captured step reads."""
    (group,) = optimizer.param_groups
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def rate_at(settings, epoch):
    """The learning rate of an epoch, from 1: a tenth after each share of the epochs in `decay`."""
    passed = sum(epoch - 1 >= share * settings["epochs"] for share in settings["decay"])
    return settings["lr"] * 0.1 ** passed


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

        It ends where no entry of the gradient exceeds 0.0015 of the largest at plain averaging. For
        256x4H that leaves less than 0.0005 of the loss.
        """
        optimizer = torch.optim.LBFGS([step, bias], max_iter=300, tolerance_grad=enough,
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

    every = torch.ones(len(y), device=data.device)
    step, bias = start()
    (slope,) = torch.autograd.grad(objective(step, bias, every, 0), step)
    enough = 0.0015 * slope.abs().max().item()
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
    fit(step, bias, every, chosen)

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
    """Writes a file under a temporary name and renames it: what has the name is whole and on disk.

    Returns its SHA-256. Raises Refused if it cannot be written: the disk is full, or the folder is
    gone.
    """
    content = io.BytesIO()          # in memory first: torch.save hides a full disk's OSError
    save(content)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())     # else a power cut may leave the name and not the content
        temporary.replace(path)
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}; what was finished is kept: "
                      "make room, and give the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(content.getbuffer()).hexdigest()


CHECKPOINT_SECONDS = 60


class Checkpoint:
    """What an interrupted run goes on from: its state at the end of an epoch, in its folder.

    It is written at most every CHECKPOINT_SECONDS, with its SHA-256 at the end.
    """

    def __init__(self, run, results):
        self.path, self.run = results / run.path / "checkpoint.pt", run
        self.began = self.written = time.perf_counter()

    def save(self, ensemble, optimizer, batches, history, lowest, reported, best):
        """Writes the state of a run after an epoch, if the last time is long enough ago."""
        if time.perf_counter() - self.written < CHECKPOINT_SECONDS:
            return
        state = {
            "settings": json.dumps(self.run.settings, sort_keys=True),
            "weights": ensemble.state_dict(), "momenta": [
                optimizer.state[p].get("momentum_buffer") for p in ensemble.parameters()],
            "order": batches.order.get_state(), "augmentation": batches.augmentation.get_state(),
            "history": [{key: torch.from_numpy(np.array([epoch[part][key] for epoch in history]))
                         for key in history[0][part]} for part in range(2)],
            "lowest": lowest, "reported": reported, "best": best,
            "seconds": time.perf_counter() - self.began}
        content = io.BytesIO()
        torch.save(state, content)
        content.write(hashlib.sha256(content.getbuffer()).digest())
        write(self.path, lambda file: file.write(content.getbuffer()))
        self.written = time.perf_counter()

    def load(self, ensemble, optimizer, batches):
        """Puts the state back; returns history, lowest, reported and best as they were, or None.

        A checkpoint that is not whole is set aside, and this is told. Raises Refused if it is of a
        run with other settings.
        """
        if not self.path.is_file():
            return None
        content, device = self.path.read_bytes(), batches.labels.device
        try:
            if hashlib.sha256(content[:-32]).digest() != content[-32:]:
                raise ValueError
            state = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
        except (ValueError, pickle.UnpicklingError):
            aside = self.path.with_name(f"damaged-{time.time_ns()}-{self.path.name}")
            self.path.rename(aside)
            print(f"{self.path} is damaged: it is set aside as {aside.name}, and the run begins "
                  "anew", flush=True)
            return None
        if other := difference(json.loads(state["settings"]),
                               json.loads(json.dumps(self.run.settings))):
            raise Refused(f"{self.path} is of a run with other settings: {other[0]} is {other[1]!r}"
                          f" there and {other[2]!r} now; use another --results folder, or remove "
                          "that file")
        self.began -= state["seconds"]
        ensemble.load_state_dict(state["weights"])
        for p, momentum in zip(ensemble.parameters(), state["momenta"], strict=True):
            if momentum is not None:
                optimizer.state[p]["momentum_buffer"] = momentum.to(device)
        batches.order.set_state(state["order"])
        batches.augmentation.set_state(state["augmentation"])
        parts = [{key: values.numpy() for key, values in part.items()}
                 for part in state["history"]]
        history = [tuple({key: values[i] for key, values in part.items()} for part in parts)
                   for i in range(len(parts[0]["ensemble_loss"]))]
        return history, state["lowest"], state["reported"], state["best"]


class Damaged(Refused):
    """A run folder holds something that is not as it was written."""

    def __init__(self, path, why):
        super().__init__(f"{path} is damaged ({why}): the command that made it, given again, sets "
                         f"it aside and does that run anew; or remove {path.parent}")


def seal(record):
    """SHA-256 of a run.json, but for the seal that is in it."""
    content = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_run(folder):
    """The run.json of a finished run, or None. Raises Damaged if it is not as it was written."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
        if record["seal"] != seal(record):
            raise ValueError("it was changed after it was written")
        return record
    except FileNotFoundError:
        return None
    except KeyError as error:
        raise Damaged(path, "it has no seal") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Damaged(path, error) from error


def read_file(folder, name):
    """A file of a finished run, in memory. Raises Damaged if it is not as it was written."""
    path, record = folder / name, read_run(folder)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Damaged(path, error.strerror) from error
    if record is None or hashlib.sha256(content).hexdigest() != record["sha256"].get(name):
        raise Damaged(path, "it does not have the checksum that is in run.json")
    return io.BytesIO(content)


def whole_run(folder):
    """The run.json of a finished run, or None. Raises Damaged if it, or a file beside it, is."""
    record = read_run(folder)
    for name in record["sha256"] if record else ():
        read_file(folder, name)
    return record


def load_history(folder):
    """The arrays of history.npz, by name. Raises Damaged if it is not as it was written."""
    with np.load(read_file(folder, "history.npz"), allow_pickle=False) as file:
        return dict(file)


def load_weights(folder, device):
    """The state_dict of the reported epoch. Raises Damaged if it is not as it was written."""
    try:
        return torch.load(read_file(folder, "weights.pt"), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:         # more than weights, checksum or not
        raise Damaged(folder / "weights.pt", "it holds more than weights") from error


def set_aside(folder):
    """Moves the files of a damaged run into a folder beside them, and says so."""
    aside = folder / f"damaged-{time.time_ns()}"
    aside.mkdir()
    for name in ("run.json", "history.npz", "weights.pt"):
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    print(f"{folder}: what is damaged there is set aside as {aside.name}, and the run is done anew",
          flush=True)


def difference(there, here):
    """The first setting in which two runs differ, as (key, there, here), or None."""
    keys = (key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
    return next(((key, there.get(key), here.get(key)) for key in keys), None)


def finished(run, results):
    """Is this run in its folder, with what it must keep?

    Raises Refused on other settings there, and Damaged if something is not as it was written.
    """
    folder = results / run.path
    record = whole_run(folder)
    if record is None:
        return False
    if other := difference(record["settings"], json.loads(json.dumps(run.settings))):
        key, there, here = other
        raise Refused(f"{folder} holds results from other settings: {key} is {there!r} there and "
                      f"{here!r} now; use another --results folder, or remove that one")
    return (not run.weights or "weights.pt" in record["sha256"] or
            record["result"]["diverged_at_epoch"] is not None)


def to_be_done(run, results):
    """Is this run not finished, or damaged?"""
    try:
        return not finished(run, results)
    except Damaged:
        return True


def machine(device):
    """What a number depends on beside its settings, for run.json."""
    cpu = (" ".join(cpu_information("model name")) or platform.processor() or platform.machine())
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "system": platform.system(), "commit": commit(),
            "deterministic": torch.are_deterministic_algorithms_enabled()}


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
    files = {"history.npz": write(folder / "history.npz",
                                  lambda file: np.savez(file, **arrays))}
    record = {"experiment": run.experiment, "preset": run.preset,
              "configuration": run.configuration, "method": run.method, "lambda": run.lam,
              "trial": run.trial, "settings": run.settings, "result": result}
    if ensemble is not None:
        record["parameters"] = sum(p.numel() for p in ensemble.parameters())
    if run.weights and result["diverged_at_epoch"] is None:
        files["weights.pt"] = write(folder / "weights.pt",
                                    lambda file: torch.save(ensemble.state_dict(), file))
    record |= {"sha256": files, "seconds": round(time.perf_counter() - began, 2),
               "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
               "data_from": data.origin, "machine": machine(data.device)}
    record["seal"] = seal(record)
    write(folder / "run.json", lambda file: file.write(json.dumps(record, indent=1).encode()))


@contextlib.contextmanager
def claim(run, results):
    """Whether this process has a run to itself: by a lock of the kernel's, gone with its owner."""
    path = results / run.path / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        if not (path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())):
            yield False                 # another process was done with this file just now
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def do_run(experiment, run, data, results, progress, eager=False):
    """Trains one run and writes its folder. Returns its result, as run.json has it.

    Raises Refused, and writes nothing, if the device has too little memory.
    """
    checkpoint, ensemble = Checkpoint(run, results), None
    cuda = data.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with memory_told(data.device, run.label, lower_the_batch(run)):
        if run.method == "stacking":
            test, arrays, result = stack(experiment, run, data, results)
        else:
            ensemble, history, epoch, test = train(experiment, run, data, progress, eager,
                                                   checkpoint)
            arrays, result = reported(run, history, epoch)
            if isinstance(ensemble, Ensemble):
                arrays["member_distance"] = distances(
                    ensemble, new_ensemble(experiment, run, data)[0]).cpu().numpy()
    if cuda:
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    for key, value in (test or {}).items():
        if np.ndim(value) == 0:
            result[f"test_{key}"] = float(value)
        else:
            arrays[f"reported_test_{key}"] = value
    write_run(run, results, data, checkpoint.began, arrays, result, ensemble)
    checkpoint.path.unlink(missing_ok=True)
    return result


def reported(run, history, epoch):
    """What history.npz and run.json hold of a trained run's history: arrays with an axis (epoch)
    or (epoch, member), by part of the data, and the reported epoch, None if the run diverged."""
    second = "validation" if run.settings["validation"] else "test"
    arrays = {f"{part}_{key}": np.array([scores[i][key] for scores in history], np.float32)
              for i, part in enumerate(("train", second)) for key in history[0][i]}
    result = {"epoch": epoch, "diverged_at_epoch": None if epoch else len(history)}
    if epoch and run.settings["validation"]:
        result["validation_error"] = history[epoch - 1][1]["ensemble_error"]
    return arrays, result


def lower_the_batch(run):
    """How a run that does not fit into memory may fit."""
    batch = run.settings["batch"]
    return (f"lower the batch (--set batch={max(1, batch // 2)} instead of {batch}) or the members,"
            " or free memory; nothing of this run was written")


@contextlib.contextmanager
def memory_told(device, what, fix):
    """Turns an error of too little memory into Refused, with how much was needed and the fix."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            free, total = torch.cuda.mem_get_info(device)
            used = f"{(total - free) / 1e9:.1f} of {total / 1e9:.1f} GB of GPU memory were in use"
            asked = re.search(r"Tried to allocate ([\d.]+ \w+)", text)
        elif "can't allocate memory" in text:               # PyTorch's allocator on the CPU
            used = "the machine's memory was full"
            asked = re.search(r"tried to allocate (\d+ bytes)", text)
        else:
            raise
        more = f" and {asked[1]} more were needed" if asked else ""
        raise Refused(f"{what}: {used}{more}: {fix}") from error


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


def seconds_about(work, device, limit=0.5):
    """The time of one call of `work`, from as many calls as fit into about `limit` seconds."""
    first = seconds_per(work, 1, device)                                # slower than the others
    if first > limit:
        return first
    return seconds_per(work, 1 + int(limit / max(first, 0.01)), device)


def cost(experiment, run, data):
    """What a run will take, from a few of its own steps on the device at hand.

    Returns seconds, bytes of its history, and bytes of its weights, should they be kept.
    """
    s, device = run.settings, data.device
    ensemble, optimizer = new_ensemble(experiment, run, data)
    size = images_at_once(data.train_images)
    part = data.train_images[:size], data.train_labels[:size]
    example = seconds_about(lambda: evaluate(ensemble, data, *part), device) / len(part[1])
    n = s["train"] or len(data.train_labels) - s["validation"]
    if run.method == "stacking":        # predictions, and fits of about 100 products and gradients
        fitted = s["validation"] if s["stacking"] == "validation" else n
        logits = torch.zeros(len(part[1]), s["members"] * data.classes, device=device)
        product = seconds_about(lambda: logits.T @ (logits @ logits.new_zeros(
            logits.shape[1], data.classes)), device, 0.1) / len(logits)
        fits = s["folds"] * len(s["penalties"]) + 1
        return (fitted + len(data.test_labels)) * example + 100 * fits * fitted * product, 0, 0
    ensemble.train()
    scores = Scores(s["members"], device)
    batches = Batches(run, data, torch.arange(n, device=device))
    rows = batches.epoch()[0]
    step = stepper(run, ensemble, optimizer, scores, batches)
    seconds = seconds_about(lambda: step(rows), device)
    held_out = s["validation"] or len(data.test_labels)
    return (s["epochs"] * (math.ceil(n / s["batch"]) * seconds + held_out * example),
            16 * s["epochs"] * s["members"], 4 * sum(p.numel() for p in ensemble.parameters()))


def estimate(experiment, to_do, data):
    """What each run will take on the device at hand: [(seconds, bytes of disk, and of a checkpoint
    while it is trained)]."""
    known, costs = {}, []
    for run in to_do:
        kind = (run.configuration, "joint" if run.method == "independent" else run.method)
        if kind not in known:
            with memory_told(data.device, run.label, lower_the_batch(run)):
                known[kind] = cost(experiment, run, data)
        seconds, history, weights = known[kind]
        costs.append((seconds, history + run.weights * weights, history + 3 * weights))
    return costs


def amount(costs):
    """A sum of `estimate` in words."""
    seconds, size, _ = map(sum, zip(*costs, strict=True)) if costs else (0, 0, 0)
    return f"about {duration(seconds)}, {size / 1e6:.0f} MB"


def need_room(folder, costs):
    """Raises Refused if a folder's disk has not room for what is to be written."""
    needed = sum(size for _, size, _ in costs) + max((part for *_, part in costs), default=0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise Refused(f"{folder} has {free / 1e6:.0f} MB free and the runs to do need about "
                      f"{needed / 1e6:.0f} MB: make room, or name another --results folder")


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else (
        f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h")


DIAGNOSIS = (3, 5)      # an epoch; a gap in points of error. Fixed before any run


def diagnose(run, errors):
    """The paper's early sign of over-capacity for end-to-end training (Sec. 4), as a line.

    errors (M,) are the members' training errors over epoch 3: does one lead the others by far?
    """
    (epoch, least), (first, second) = DIAGNOSIS, 100 * np.sort(errors)[:2]
    over = second - first >= least
    return (f"{run.label}: over epoch {epoch} the two best members have {first:.1f} and "
            f"{second:.1f} % training error, {second - first:.1f} points apart ("
            f"{least} tell): {'OVER CAPACITY' if over else 'not over capacity'} for end-to-end "
            "training, by the paper's diagnosis")


class Progress:
    """Says where the work is and when it will end: one living line; in a log, one now and then.

    What other processes finish in the same folder counts as well.
    """

    def __init__(self, runs, costs, results, diagnose):
        self.seconds = {run.path: cost[0] for run, cost in zip(runs, costs, strict=True)}
        self.results, self.diagnose = results, diagnose
        self.began, self.said, self.live = time.perf_counter(), 0.0, sys.stdout.isatty()

    def say(self, run, part, text, living=False):
        """A line on a run of which `part` is done, and how long the others will take.

        What is left is the estimate of what is to come, scaled by how it has held so far.
        """
        done = {path for path in self.seconds if (self.results / path / "run.json").exists()}
        past = sum(self.seconds[path] for path in done) + part * (
            self.seconds[run.path] if run.path not in done else 0)
        spent = time.perf_counter() - self.began
        left = max(0, sum(self.seconds.values()) - past)
        left *= spent / past if past and spent > 5 else 1
        line = (f"[{len(done | {run.path})}/{len(self.seconds)}] {run.label}: {text}, "
                f"about {duration(left)} left")
        print(f"\r{line:<100}" if self.live else line, end="" if living else "\n", flush=True)
        self.said = time.perf_counter()

    def epoch(self, run, epoch, history):
        if (self.diagnose and epoch == DIAGNOSIS[0] and run.lam == 1
                and run.settings["members"] > 1):
            print("\n" * self.live + diagnose(run, history[-1][0]["member_error"]), flush=True)
        if not self.live and time.perf_counter() - self.said < 30:
            return
        part = "validation" if run.settings["validation"] else "test"
        epochs, error = run.settings["epochs"], 100 * history[-1][1]["ensemble_error"]
        self.say(run, epoch / epochs, f"epoch {epoch}/{epochs}, {part} error {error:.1f} %",
                 living=self.live)

    def finish(self, run, result):
        if "test_ensemble_error" in result:
            text = f"test error {100 * result['test_ensemble_error']:.2f} %"
            text += f" (epoch {result['epoch']})" if "epoch" in result else ""
            if result.get("penalty_is_outermost"):
                text += (f" (penalty {result['penalty']:g} is the outermost tried: "
                         "widen `penalties` in presets.yaml)")
        else:
            text = f"DIVERGED at epoch {result['diverged_at_epoch']}"
        self.say(run, 1, text)


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
shard_numbers = _number(
    lambda text: tuple(map(int, text.split("/"))),
    lambda x: len(x) == 2 and 0 <= x[0] < x[1], "I/N with I from 0 to N - 1, such as 0/4")
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
                   "real cannot be had in 5 minutes; synthetic: the stand-in; folder: the images "
                   "in --data-dir, train/<class>/ and test/<class>/; without it, the preset's "
                   "policy")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                   help="other values of the preset, e.g. bagging=resample; "
                   "CONFIGURATION.KEY=VALUE for one configuration alone")
    p.add_argument("--tune", action="store_true", help="tune the learning rate of every "
                   "configuration and lambda on validation error, as the authors did, and print it "
                   "as presets.yaml takes it")
    p.add_argument("--jobs", type=count, default=1, metavar="N", help="train N runs at once, in "
                   "processes that share the cores (default: 1)")
    p.add_argument("--shard", type=shard_numbers, default=(0, 1), metavar="I/N", help="only the "
                   "I-th of N equal parts of the runs, from 0: for machines that share no folder")
    p.add_argument("--eager", action="store_true", help="on CUDA, launch every step from Python "
                   "instead of replaying one that was captured (the default there)")
    p.add_argument("--deterministic", action="store_true", help="on CUDA, only kernels that "
                   "give the same numbers every time (on a CPU they do in any case)")
    p.add_argument("--diagnose", action="store_true", help="of end-to-end runs (lambda 1) say "
                   f"after epoch {DIAGNOSIS[0]} whether the members are over capacity for that, by "
                   "the paper's sign; nothing else changes")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)     # one of those
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
    torch.backends.cudnn.allow_tf32 = False     # fp32 means fp32, in convolutions as well
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_preset(name):
    """The driver's rule: `paper` is weeks of one GPU and is asked for by name."""
    return name or ("short" if torch.cuda.is_available() else "quick")


def prepare(experiment, args):
    """What the command line selects: the experiment's settings, its data and its runs."""
    name = choose_preset(args.preset)
    preset = load_preset(name)
    block = experiment_settings(preset, name, experiment, args.set)
    block |= {k: v for k in ("trials", "epochs") if (v := getattr(args, k))}
    for word in args.methods or []:
        nearest(word, METHODS, "method")
    for word in args.only or []:
        nearest(word, block["configurations"], "configuration")
    policy = nearest(args.data or preset["data"], POLICIES, "value of --data")
    device = choose_device(args.device)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # PyTorch asks for one of two
        torch.use_deterministic_algorithms(True)
    for c in block["configurations"].values():
        if c.get("precision") == "auto":
            c["precision"] = "bf16" if bf16_is_fast(device) else "fp32"
    if args.fetch:
        data = find_data(block["dataset"], policy, args.data_dir)
        place = "in place of " * (policy == "folder")
        print(f"data: {place}{block['dataset']}: "
              f"{data.origin if data else 'the synthetic stand-in'}")
        sys.exit(0 if data or policy == "synthetic" else 3)
    if block["nesterov"] and not block["momentum"]:
        raise Refused("nesterov needs momentum above 0: set momentum, or nesterov=false")
    stacked = any("stacking" in (args.methods or c["methods"])
                  for c in block["configurations"].values())
    if stacked and block["stacking"] == "validation" and not block["validation"]:
        raise Refused("stacking is to be fitted on the validation split, and validation is 0: "
                      "--set stacking=training, or hold images out")
    fitted = block["validation" if block["stacking"] == "validation" else "train"] or math.inf
    if stacked and block["folds"] > fitted:
        raise Refused(f"folds {block['folds']} is more than the {fitted} images that stacking is "
                      "fitted on: lower it")
    data = load_data(block["dataset"], policy, block, args.data_dir, download=not args.dry_run)
    runs = list_runs(name, experiment, block, data.description, args.seed, args.only, args.lambdas,
                     args.methods)
    return block, data.to(device), shard(runs, *args.shard)


def run_study(experiment, args):
    """What a training script does: the runs that are selected and not in their folders yet."""
    block, data, runs = prepare(experiment, args)
    if args.tune:
        if not block["validation"]:
            raise Refused("--tune compares validation errors, and validation is 0: hold images out "
                          "with --set validation=N")
        runs = tuning_runs(runs, block["tune"])
    train_missing(experiment, runs, data, args)
    if args.tune and not args.dry_run and not args.worker:
        print_tuned(runs, args.results)


def train_missing(experiment, runs, data, args):
    """Trains the runs that are not in their folders yet, or with --dry-run prints the plan."""
    to_do = [run for run in runs if to_be_done(run, args.results)]
    costs = estimate(experiment, to_do, data)
    if not args.worker:
        name, source, where = (data.description["name"], data.description["source"],
                               machine(data.device))
        print(f"{experiment.name}: {len(runs)} runs, {len(runs) - len(to_do)} finished, "
              f"{len(to_do)} to do: {amount(costs)}\n"
              f"  on {where['device']} ({data.device.type}, {where['threads']} threads), with "
              f"{name} ({source}; {data.origin})", flush=True)
    if args.dry_run:
        for figure, drawn in experiment.figures.items():
            if wanted := [run for run in runs if drawn(run)]:
                left = [cost for run, cost in zip(to_do, costs, strict=True) if drawn(run)]
                print(f"  {figure}: {len(left)} of {len(wanted)} runs to do, {amount(left)}")
        for run in runs:
            print(f"    {run.label}: {'to do' if run in to_do else 'finished'}")
        return
    make_writable(args.results)
    need_room(args.results, costs)
    if args.jobs > 1 and to_do:
        at_once(args.jobs)
        return
    progress = Progress(to_do, costs, args.results, args.diagnose)
    source = {(run.configuration, run.trial): run for run in runs
              if run.method == "joint" and run.lam == 0}        # of the members that are stacked

    def ready(run):
        return run.method != "stacking" or not to_be_done(source[run.configuration, run.trial],
                                                          args.results)

    def do(run):
        progress.finish(run, do_run(experiment, run, data, args.results,
                                    functools.partial(progress.epoch, run), args.eager))
    each_once(to_do, args.results, do, ready)


def each_once(runs, results, do, ready=lambda run: True):
    """do(run) for those that are not finished, when they are ready; damaged ones are set aside.

    Any number of processes may do so in one folder: each takes runs that no other is at, and ends
    when all are finished.
    """
    said = False
    while runs:
        others = []
        for run in runs:
            if not ready(run):
                others.append(run)
                continue
            with claim(run, results) as mine:
                if not mine:
                    others.append(run)
                elif to_be_done(run, results):
                    if (results / run.path / "run.json").exists():
                        set_aside(results / run.path)
                    do(run)
        if others == runs:
            if not said:
                print(f"waiting for {len(others)} runs that other processes are at", flush=True)
            said = True
            time.sleep(1)
        runs = others


def at_once(jobs):
    """Runs this command in `jobs` processes, each with its part of the threads."""
    threads = max(1, torch.get_num_threads() // jobs)
    reading, writing = os.pipe()
    workers = [subprocess.Popen([sys.executable, *sys.argv, "--jobs", "1", "--worker"],
                                stdout=writing, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
               for _ in range(jobs)]
    os.close(writing)
    try:
        with open(reading) as lines:
            for line in lines:
                print(line, end="", flush=True)
        if failed := [status for worker in workers if (status := worker.wait())]:
            sys.exit(max(failed) if max(failed) > 0 else 1)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()


def tuning_runs(runs, rates):
    """Each joint run at each rate, times M since Eq. 9 divides by M, in folders tune-lrX."""
    return [replace(run, preset=f"{run.preset}/tune-lr{lr:g}", weights=False,
                    settings=run.settings | {"lr": lr})
            for run in runs if run.method == "joint"
            for lr in sorted(rate * run.settings["members"] for rate in rates)]


def print_tuned(runs, results):
    """The rates of the lowest mean validation error, as presets.yaml takes them."""
    errors = collections.defaultdict(list)
    for run in runs:
        result = read_run(results / run.path)["result"]
        errors[run.configuration, run.lam, run.settings["lr"]].append(
            result.get("validation_error", math.inf))       # of a diverged run
    for configuration in dict.fromkeys(run.configuration for run in runs):
        best = {}
        for lam in sorted({run.lam for run in runs if run.configuration == configuration}):
            tried = {rate: sum(e) / len(e) for (name, at, rate), e in errors.items()
                     if (name, at) == (configuration, lam)}
            best[lam] = min(tried, key=tried.get)
            if len(tried) > 1 and best[lam] in (min(tried), max(tried)):
                print(f"{configuration}, lambda {lam:g}: {best[lam]:g} is the outermost tried: "
                      "widen `tune` in presets.yaml")
        print(f"{configuration}: lr: {{{', '.join(f'{k:g}: {v:g}' for k, v in best.items())}}}")


def make_writable(folder):
    """Makes a folder for what is to be written. Raises Refused if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refused(f"{folder} cannot be written: {error.strerror}; name another one") from error


def command_line(main):
    """Runs a script's `main`; bad input becomes one line on stderr and exit status 2.

    Ctrl-C and SIGTERM end it within a step, with exit status 130 and 143.
    """
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    handler = signal.signal(signal.SIGTERM, stop)
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
    except KeyboardInterrupt as stopped:
        print("\nstopped; finished runs are kept, and of the others what is at most a minute or an "
              "epoch old: the same command goes on from there", file=sys.stderr)
        sys.exit(128 + (stopped.args or [signal.SIGINT])[0])
    finally:
        signal.signal(signal.SIGTERM, handler)
