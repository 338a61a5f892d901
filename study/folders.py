"""Folders: where the data is found; what a run leaves behind, how it is read back, and which process trains it.

results/PRESET/EXPERIMENT/CONFIGURATION/METHOD/trialN holds history.npz, weights.pt if something needs the weights, and
run.json, written last: it exists if and only if the run is finished. Before, there are checkpoint.pt and .lock.
"""

import contextlib
import datetime
import fcntl
import io
import json
import os
import pickle
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import common
from study import machine
from common import Refused

import numpy as np
import torch
import torchvision

HERE = Path(__file__).resolve().parents[1]

# --- Finding the data ----------------------------------------------------------------------------


def find_data(name, policy, data_dir=None, may_download=True):
    """The data set, or None if the policy takes the stand-in. Its `origin` says in words where it was found.

    The places, in this order: `data_dir`, which must hold it if given; data/; the system's package; a download into
    data/. If none has it, `real` raises Refused, and `auto` says so and takes the stand-in.
    """
    dataset = common.DATASETS[name]
    if policy == "synthetic":
        if data_dir is not None:
            raise Refused(f"--data-dir {data_dir}: the data is to be synthetic: add --data real, or leave it out")
        return None
    places = {"data/": common.DATA_DIR, "the system's package": dataset.system}
    for origin, folder in places.items() if data_dir is None else [("--data-dir", Path(data_dir))]:
        if folder and (data := dataset.read(folder)):
            return replace(data, origin=origin)
    if data_dir is not None:
        there = "has no files of" if Path(data_dir).is_dir() else "is no folder: it should have"
        raise Refused(f"--data-dir {data_dir} {there} {name}: leave it out to search and download; {dataset.ways}")
    if not may_download:
        return None
    try:
        download(name)
    except Refused as error:
        if policy == "real":
            raise
        print(f"data: {error}. Now --data auto takes the SYNTHETIC STAND-IN, and every figure says so", flush=True)
        return None
    return replace(dataset.read(common.DATA_DIR), origin="data/")


def download(name):
    """Downloads a data set into data/ by torchvision, which shows its progress. Raises Refused if that fails."""
    dataset = common.DATASETS[name]
    if dataset.torchvision is None:
        raise Refused(f"{name} is not on disk: {dataset.ways}")
    print(f"data: downloading {name} into {common.DATA_DIR}", flush=True)
    try:
        common.DATA_DIR.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=common.DATA_DIR) as scratch:       # no half of it has its name in data/
            for part in (True, False):
                getattr(torchvision.datasets, dataset.torchvision)(scratch, train=part, download=True)
            for path in Path(scratch).iterdir():
                if not (common.DATA_DIR / path.name).exists():      # another command was quicker
                    path.rename(common.DATA_DIR / path.name)
    except (OSError, RuntimeError) as error:
        raise Refused(f"{name} is not on disk, and its download failed ({' '.join(str(error).split())}): be online and "
                      f"run this again, or {dataset.ways}") from error


def cut_data(data, name, policy, settings):
    """What find_data found, or the stand-in, cut to the classes and sizes in the settings of runs."""
    dataset, s, size = common.DATASETS[name], settings, None if settings["test"] == "unused" else settings["test"]
    classes = s.get("classes") or dataset.classes           # (runs of earlier versions have all)
    if data is None:
        train = s["train"] + s["validation"] if s["train"] else dataset.train * classes // dataset.classes
        test = size or dataset.test * classes // dataset.classes
        data = common.synthetic(classes, dataset.shape, train, test)
        if policy == "real":            # in a plan, which downloads nothing
            data.description, data.origin = dataset.description, "to be downloaded first"
    if classes < data.classes:
        data = common.first_classes(data, classes)
    if s["test"] == "unused" and s["train"]:
        data = common.test_on_the_rest(data, s["train"] + s["validation"])
    n, tests, name = len(data.train_labels), len(data.test_labels), data.description["name"]
    train = s["train"] or max(n - s["validation"], 1)
    for what, asked, most, of in (
            (f"classes {classes}", classes, dataset.classes, "classes"),
            (f"train {train} and validation {s['validation']}", train + s["validation"], n, "training images"),
            (f"batch {s['batch']}", s["batch"], train, "images to train on"),
            (f"test {size}", size or 0, tests, "test images")):
        if asked > most:
            raise Refused(f"{what}: more than the {most} {of} of {name}; lower it with --set or in presets.yaml")
    return replace(data, test_images=data.test_images[:size], test_labels=data.test_labels[:size])


# --- Writing a finished run ----------------------------------------------------------------------


def write(path, save):
    """Writes a file under a temporary name and renames it: a file that has its name is whole and on disk."""
    content = io.BytesIO()          # in memory first: torch.save hides a full disk's OSError
    save(content)
    temporary = path.with_name(f".{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())     # else a power cut may leave the name and not the content
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error        # a full disk does not say which
    finally:
        temporary.unlink(missing_ok=True)


def arrays_and_result(run, history, epoch):
    """What history.npz and run.json hold of a trained run: arrays with an axis (epoch) or (epoch, member), by part of
    the data; and the reported epoch, None if the run diverged."""
    second = "validation" if run.settings["validation"] else "test"
    arrays = {f"{part}_{key}": np.array([scores[i][key] for scores in history], np.float32)
              for i, part in enumerate(("train", second)) for key in history[0][i]}
    result = {"epoch": epoch, "diverged_at_epoch": None if epoch else len(history)}
    if epoch and run.settings["validation"]:
        result["validation_error"] = history[epoch - 1][1]["ensemble_error"]
    return arrays, result


def write_run(run, results, data, began, arrays, result, ensemble=None, test=()):
    """Writes a run folder, run.json last, and returns that. `began` is the run's start by time.perf_counter; arrays and
    result get the scores `test` on the test set."""
    for key, value in dict(test).items():
        if np.ndim(value) == 0:
            result[f"test_{key}"] = float(value)
        else:
            arrays[f"reported_test_{key}"] = value
    folder = results / run.path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)       # of a run without the weights that are needed now
    write(folder / "history.npz", lambda file: np.savez(file, **arrays))
    if run.weights and result["diverged_at_epoch"] is None:
        write(folder / "weights.pt", lambda file: torch.save(ensemble.state_dict(), file))
    record = {"experiment": run.experiment, "preset": run.preset, "configuration": run.configuration,
              "method": run.method, "lambda": run.lam, "trial": run.trial, "settings": run.settings, "result": result}
    if ensemble is not None:
        record["parameters"] = sum(p.numel() for p in ensemble.parameters())
    record |= {"seconds": round(time.perf_counter() - began, 2),
               "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
               "data_from": data.origin, "machine": machine(data.device)}
    write(folder / "run.json", lambda file: file.write(json.dumps(record, indent=1).encode()))
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return record


# --- Reading a finished run ----------------------------------------------------------------------


class Damaged(Refused):
    """Damaged(path, why): a file of a run folder is not as it was written."""

    def __str__(self):
        path, why = self.args
        return f"{path} is damaged ({why}): the command that made this run sets it aside and trains the run again"


def method_name(method, lam):
    return f"joint-{lam + 0:g}" if method == "joint" else method        # + 0: of -0.0, too


def run_folders(place, pattern):
    """The folders of finished runs PATTERN/trialN below `place`, sorted."""
    return sorted(path.parent for path in place.glob(f"{pattern}/trial*/run.json"))


def read_run(folder):
    """The run.json of a finished run, or None. Raises Damaged if it is no record, Refused if it is another run's."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_bytes())
        own = Path(*(record[key] for key in ("preset", "experiment", "configuration")),
                   method_name(record["method"], record["lambda"]), f"trial{record['trial']}")
    except FileNotFoundError:
        return None
    except (KeyError, ValueError, TypeError) as error:
        raise Damaged(path, error) from error
    if folder.absolute().parts[-len(own.parts):] != own.parts:
        raise Refused(f"{path} is the record of the run {own}: the folder was moved, copied or renamed; move it back, "
                      "or remove it")
    return record


def check_zip(path):
    """Raises Damaged unless a file .npz or .pt, which is a zip, is there and has the check sums within it."""
    if not path.exists():
        raise Damaged(path, "it is missing")
    content = io.BytesIO(path.read_bytes())         # (a disk that fails here is no damage)
    try:
        with zipfile.ZipFile(content) as file:
            part = file.testzip()
    except Exception as error:                      # which one depends on the byte that is damaged
        raise Damaged(path, str(error)) from error
    if part is not None:
        raise Damaged(path, f"{part} in it has another check sum")


def read_whole_run(folder):
    """The run.json of a finished run, or None. Raises Damaged if it, or a file beside it, is. Weights may be absent."""
    if record := read_run(folder):
        check_zip(folder / "history.npz")
        if (folder / "weights.pt").exists():
            check_zip(folder / "weights.pt")
    return record


def has_members(folder):
    """Is this run finished, with weights that stacking can combine? One that diverged has none to wait for."""
    record = read_run(folder)
    return bool(record) and (record["result"]["diverged_at_epoch"] is not None or (folder / "weights.pt").exists())


def load_history(folder):
    """The arrays of history.npz, by name. Raises Damaged if it is not as it was written."""
    check_zip(folder / "history.npz")
    with np.load(folder / "history.npz", allow_pickle=False) as file:
        return dict(file)


def load_weights(folder, name="weights.pt"):
    """What torch.save wrote, on the CPU: the state_dict of the reported epoch. Raises Damaged if it is damaged."""
    check_zip(folder / name)
    try:
        return torch.load(folder / name, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:     # the zip's directory has no check sum
        raise Damaged(folder / name, str(error).splitlines()[0]) from error


def first_difference(there, here):
    """The first setting in which two runs differ, as (key, there, here), or None."""
    keys = (key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
    return next(((key, there.get(key), here.get(key)) for key in keys), None)


def refuse_other_settings(run, settings, path):
    """Raises Refused if the settings found at `path` are not those of the run."""
    if other := first_difference(settings, json.loads(json.dumps(run.settings))):
        raise Refused(f"{path} holds results from other settings: {other[0]} is {other[1]!r} there and {other[2]!r} "
                      f"now; use another --results folder, or remove {path}")


# --- A run that is to be trained -----------------------------------------------------------------


def run_is_finished(run, results, set_damaged_aside=False):
    """Is this run in its folder, undamaged, with its weights if they are needed? Refused if its settings differ."""
    folder = results / run.path
    try:
        record = read_whole_run(folder)
    except Damaged as error:
        record = None
        if set_damaged_aside:
            set_aside(*error.args)
    if record is None:
        return False
    refuse_other_settings(run, record["settings"], folder)
    diverged = record["result"].get("diverged_at_epoch") is not None
    return not run.weights_needed or diverged or (folder / "weights.pt").exists()


def set_aside(path, why):
    """Renames a file of a run that cannot be used, and says so."""
    aside = path.with_name(f"damaged-{time.time_ns()}-{path.name}")
    if path.exists():
        path.rename(aside)
    print(f"{path} cannot be used ({why}): set aside as {aside.name}; the run begins anew", flush=True)


@contextlib.contextmanager
def locked(folder):
    """Locks a run's folder: yields False if another process has it. The lock disappears with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            print(f"WARNING: {folder} cannot be locked ({error.strerror}): start one command at a time", flush=True)
        yield True
        (folder / ".lock").unlink(missing_ok=True)      # the run is finished: whoever locks this file next sees that


CHECKPOINT_SECONDS = 60


class Checkpoint:
    """The state of a run after an epoch, at most every CHECKPOINT_SECONDS: an interrupted run goes on from there."""

    def __init__(self, run, results):
        self.run, self.path = run, results / run.path / "checkpoint.pt"
        self.began = self.written = time.perf_counter()

    def save(self, parts, history, best):
        """parts: {name: object with a state_dict}; history, best: as in common.train."""
        if time.perf_counter() - self.written >= CHECKPOINT_SECONDS:
            state = {"settings": json.dumps(self.run.settings), "seconds": time.perf_counter() - self.began,
                     "history": history, "best": best,
                     "parts": {name: part.state_dict() for name, part in parts.items()}}
            write(self.path, lambda file: torch.save(state, file))
            self.written = time.perf_counter()

    def resume(self, parts):
        """Puts the state of `parts` back; returns history and best: [] and None if the run begins. Sets a checkpoint
        aside that is damaged. Raises Refused if it is of other settings, RuntimeError if it is of another network."""
        if not self.path.is_file():
            return [], None
        try:
            state = load_weights(self.path.parent, self.path.name)
        except Damaged as error:
            set_aside(*error.args)
            return [], None
        refuse_other_settings(self.run, json.loads(state["settings"]), self.path)
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        self.began -= state["seconds"]
        return state["history"], state["best"]
