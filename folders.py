"""Folders: where the data is found; what a run leaves behind, how it is read back, and who may write it.

results/PRESET/EXPERIMENT/CONFIGURATION/METHOD/trialN holds history.npz, weights.pt if something needs the weights, and
run.json, which is written last: it exists if and only if the run is finished. While a run is trained its folder holds
checkpoint.pt and .lock.
"""

import contextlib
import copy
import datetime
import errno
import fcntl
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import common
from common import Refused

import numpy as np
import torch
import torchvision

HERE = Path(__file__).resolve().parent

# --- Finding the data ----------------------------------------------------------------------------

DOWNLOAD_MINUTES = 5      # after which --data auto takes the stand-in


def download(name, minutes):
    """Downloads a data set into data/ by torchvision; returns None, or in one line why that failed.

    The download runs in a process and a folder of its own: it can be stopped, and no half of it reaches data/.
    """
    dataset = common.DATASETS[name]
    if dataset.torchvision is None:
        return "torchvision does not have it"
    try:
        common.DATA_DIR.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".download-", dir=common.DATA_DIR)
    except OSError as error:
        return f"{common.DATA_DIR} cannot be written: {error.strerror}"
    print(f"data: downloading {name}, {f'up to {minutes} minutes' if minutes else 'no time limit'}", flush=True)
    code = (f"import torchvision; d = torchvision.datasets.{dataset.torchvision}; "
            f"[d({scratch!r}, train=t, download=True) for t in (True, False)]")
    try:
        done = subprocess.run([sys.executable, "-c", code], timeout=minutes and minutes * 60, text=True,
                              stderr=None if sys.stderr.isatty() else subprocess.PIPE)
        if done.returncode:
            return ((done.stderr or "").strip().splitlines() or ["torchvision failed"])[-1]
        for path in Path(scratch).iterdir():
            shutil.rmtree(common.DATA_DIR / path.name, ignore_errors=True)
            path.rename(common.DATA_DIR / path.name)
        return None
    except subprocess.TimeoutExpired:
        return f"not finished after {minutes} minutes"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_data(name, policy, data_dir=None, may_download=True):
    """The data set, or None if the policy takes the stand-in.

    The places, in this order: `data_dir`, which must hold it if given; data/; the system's package; a download into
    data/. If none has it, `real` raises Refused, and `auto` says so and takes the stand-in.
    """
    dataset = common.DATASETS[name]

    def read(folder):
        try:
            return dataset.read(folder)
        except common.Damaged as error:
            raise Refused(f"{error}; to get {name} again, {dataset.ways}") from error

    if policy == "synthetic":
        if data_dir is not None:
            raise Refused(f"--data-dir {data_dir}: the data is to be synthetic; add --data real to read that folder, "
                          "or leave --data-dir out")
        return None
    if data_dir is not None:
        data = read(Path(data_dir)) if Path(data_dir).is_dir() else None
        if data is None:
            state = f"has no files of {name}" if Path(data_dir).is_dir() else f"is not a folder with {name}"
            raise Refused(f"--data-dir {data_dir} {state}: put them there, or leave --data-dir out to download them, "
                          f"or {dataset.ways}")
        return data
    for folder in (common.DATA_DIR, dataset.system):
        if folder is not None and (data := read(folder)):
            return data
    if not may_download:
        return None
    failure = download(name, DOWNLOAD_MINUTES if policy == "auto" else None)
    if failure is None and (data := read(common.DATA_DIR)):
        return data
    if policy == "real":
        raise Refused(f"{name} is not on disk and its download failed ({failure}). To get it, be online and "
                      f"run this again; {dataset.ways}")
    print(f"data: {name} is not on disk and its download failed ({failure}): --data auto takes the SYNTHETIC STAND-IN, "
          f"and every figure says so. For the real data: {dataset.ways}", flush=True)
    return None


def load_data(name, policy, settings, data_dir=None, may_download=True):
    """The data of runs with these settings, real or stand-in: find_data and cut_data."""
    return cut_data(find_data(name, policy, data_dir, may_download), name, policy, settings, may_download)


def cut_data(data, name, policy, settings, may_download=True):
    """What find_data found, or the stand-in, cut to the classes and sizes in the settings of runs.

    A plan downloads nothing: the stand-in takes the place of data that is not on disk; under `real` it carries the
    description of the real data, by which finished runs are recognised.
    """
    dataset, s = common.DATASETS[name], settings
    classes = s.get("classes") or dataset.classes           # (runs of earlier versions have all)
    if data is None:
        train = s["train"] + s["validation"] if s["train"] else dataset.train * classes // dataset.classes
        test = s["test"] or dataset.test * classes // dataset.classes
        data = common.synthetic(classes, dataset.shape, train, test)
        if not may_download and policy == "auto":
            data.origin += f", unless {name} can be downloaded"
        if not may_download and policy == "real":
            data.description, data.origin = dataset.description, "to be downloaded first"
    elif data.classes != dataset.classes:
        raise Refused(f"{data.origin}: {data.classes} classes were read, and common.DATASETS says that {name} has "
                      f"{dataset.classes}: mend the entry")
    if classes < data.classes:
        data = common.first_classes(data, classes)
    n, validation, test = len(data.train_labels), s["validation"], s["test"]
    train, name = s["train"] or max(n - validation, 1), data.description["name"]
    if train + validation > n:
        raise Refused(f"train {s['train']} and validation {validation} are more than the {n} training images of "
                      f"{name}: lower one of them in presets.yaml")
    if s["batch"] > train:
        raise Refused(f"batch {s['batch']} is larger than the training split of {train} images: lower batch or "
                      "raise train")
    if test and test > len(data.test_labels):
        raise Refused(f"test {test} is more than the {len(data.test_labels)} test images of {name}: lower test in "
                      "presets.yaml")
    return replace(data, test_images=data.test_images[:test], test_labels=data.test_labels[:test])


# --- Writing -------------------------------------------------------------------------------------


def write(path, save):
    """Writes a file under a temporary name and renames it: a file that has its name is whole and on disk.

    Returns its SHA-256. Raises Refused if the disk is full or the folder cannot be written.
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
        raise Refused(f"{path} cannot be written: {error.strerror}; finished runs are kept: make room, and give the "
                      "same command again") from error
    finally:
        temporary.unlink(missing_ok=True)
    return hashlib.sha256(content.getbuffer()).hexdigest()


def make_writable(folder):
    """Makes a folder. Raises Refused if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise Refused(f"{folder} cannot be written: {error.strerror}; name another folder") from error


# --- Writing a finished run ----------------------------------------------------------------------


def cpu_information(*keys):
    """The words of the first line of /proc/cpuinfo under one of the keys; none on other systems."""
    if Path("/proc/cpuinfo").is_file():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in keys:
                return value.split()
    return []


def bf16_is_fast(device):
    """Does the device multiply in bf16? (It computes in it in any case, if need be slowly.)"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_information("flags", "Features")))


@functools.cache        # of the code that runs, whatever is changed while it runs
def commit():
    """The git commit of the code, marked if it was changed since; or why there is none.

    Git is believed if the package's folder is the top of its checkout: another repository around it has other commits.
    """
    def git(*arguments):
        own = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        return subprocess.run(["git", "-C", HERE, *arguments], capture_output=True, text=True, env=own)

    try:
        top = git("rev-parse", "--show-toplevel")
    except OSError:
        return "no commit: git is not installed"
    if "dubious ownership" in top.stderr:
        return "no commit: git refuses (dubious ownership)"
    if top.returncode or Path(top.stdout.strip()).resolve() != HERE:
        return "no commit: not a checkout"
    return git("describe", "--always", "--dirty", "--exclude=*").stdout.strip() or "no commit: an empty checkout"


def machine(device):
    """What a number depends on beside its settings, for run.json."""
    cpu = " ".join(cpu_information("model name")) or platform.processor() or platform.machine()
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
            "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "numpy": np.__version__, "system": platform.system(),
            "commit": commit(), "deterministic": torch.are_deterministic_algorithms_enabled()}


def seal(record):
    """SHA-256 of a run.json, but for the seal that is in it."""
    content = {key: value for key, value in record.items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_run(run, results, data, began, arrays, result, ensemble=None):
    """Writes a run folder, run.json last. `began` is the run's start by time.perf_counter."""
    folder = results / run.path
    folder.mkdir(parents=True, exist_ok=True)
    files = {"history.npz": write(folder / "history.npz", lambda file: np.savez(file, **arrays))}
    record = {"experiment": run.experiment, "preset": run.preset, "configuration": run.configuration,
              "method": run.method, "lambda": run.lam, "trial": run.trial, "settings": run.settings, "result": result}
    if ensemble is not None:
        record["parameters"] = sum(p.numel() for p in ensemble.parameters())
    if run.weights and result["diverged_at_epoch"] is None:
        files["weights.pt"] = write(folder / "weights.pt", lambda file: torch.save(ensemble.state_dict(), file))
    record |= {"sha256": files, "seconds": round(time.perf_counter() - began, 2),
               "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
               "data_from": data.origin, "machine": machine(data.device)}
    record["seal"] = seal(record)
    write(folder / "run.json", lambda file: file.write(json.dumps(record, indent=1).encode()))


# --- Reading a finished run ----------------------------------------------------------------------


class Damaged(Refused):
    """A file of a run folder is not as it was written. (A file that cannot be read, OSError, may be whole.)"""


def damaged(path, why):
    return Damaged(f"{path} is damaged ({why}): repeat the command that made this run, which keeps the files aside and "
                   f"trains the run again; or remove {path.parent}")


METHOD_NAME = r"joint-\d(\.\d+)?(e-\d+)?|independent|bagging|stacking"         # as method_name writes it


def method_name(method, lam):
    return f"joint-{lam:g}" if method == "joint" else method


def run_folders(place, pattern):
    """The folders of finished runs PATTERN/trialN below `place`, sorted. Copies and the like are said, and ignored."""
    for path in sorted(place.glob(f"{pattern}/trial*/run.json")):
        method, trial = path.parts[-3:-1]
        if re.fullmatch(r"trial(0|[1-9]\d*)", trial) and re.fullmatch(METHOD_NAME, method):
            yield path.parent
        else:
            say_ignored(path.parent)


@functools.cache
def say_ignored(folder):
    print(f"ignored: {folder}, which is not named as the folder of a run (METHOD/trialN)", file=sys.stderr)


def content_of(path):
    """The bytes of a regular file. Raises Refused if it is something else: a pipe would be read for ever."""
    if path.exists() and not path.is_file():
        raise Refused(f"{path} is not a regular file: remove it, and repeat the command that made this run")
    return path.read_bytes()


def read_run(folder):
    """The run.json of a finished run, or None.

    Raises Damaged if it is not as it was written, Refused if it is that of another run than its path names or lies
    behind a link that leaves the results folder.
    """
    path = folder / "run.json"
    try:
        record = json.loads(content_of(path))
        if record["seal"] != seal(record):
            raise ValueError("it was changed after it was written")
        own = Path(*(record[key] for key in ("preset", "experiment", "configuration")),
                   method_name(record["method"], record["lambda"]), f"trial{record['trial']}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise damaged(path, "it has no seal" if isinstance(error, KeyError) else error) from error
    if folder.absolute().parts[-len(own.parts):] != own.parts:
        raise Refused(f"{path} is the record of the run {own}: the folder was moved, copied or renamed; move it back, "
                      "or remove it")
    refuse_elsewhere(path, folder.absolute().parents[len(own.parts) - 1])
    return record


def refuse_elsewhere(path, results):
    """Raises Refused if a path leaves its results folder by a link: what lies there is of another study."""
    real = path.resolve()
    if not real.is_relative_to(results.resolve()):
        raise Refused(f"{path} is {real}, by a link that leaves {results}: copy the runs, or make {results} itself the "
                      "link")


def read_file(folder, name, record=None):
    """A file of a finished run, in memory. Raises Damaged if it is not as it was written. record: its run.json."""
    path, record = folder / name, record or read_run(folder)
    try:
        content = content_of(path)
    except FileNotFoundError as error:
        raise damaged(path, "it is not there") from error
    if record is None or hashlib.sha256(content).hexdigest() != record["sha256"].get(name):
        raise damaged(path, "it does not have the checksum in run.json")
    return io.BytesIO(content)


def whole_run(folder):
    """The run.json of a finished run, or None. Raises Damaged if it, or a file beside it, is.

    Weights may be absent: a run folder without them serves everyone who does not need them.
    """
    record = read_run(folder)
    for name in record["sha256"] if record else ():
        if name != "weights.pt" or (folder / name).exists():
            read_file(folder, name, record)
    return record


def load_history(folder):
    """The arrays of history.npz, by name. Raises Damaged if it is not as it was written."""
    try:
        with np.load(read_file(folder, "history.npz"), allow_pickle=False) as file:
            return dict(file)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:     # sealed as it is
        raise damaged(folder / "history.npz", "it holds no arrays") from error


def load_weights(folder, device):
    """The state_dict of the reported epoch. Raises Damaged if it is not as it was written."""
    try:
        return torch.load(read_file(folder, "weights.pt"), map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:          # sealed as it is: on other bytes an unpickler raises anything
        raise damaged(folder / "weights.pt", "it holds something else than weights") from error


def difference(there, here):
    """The first setting in which two runs differ, as (key, there, here), or None."""
    keys = (key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key))
    return next(((key, there.get(key), here.get(key)) for key in keys), None)


def refuse_other_settings(run, settings, path):
    """Raises Refused if the settings found at `path` are not those of the run."""
    if other := difference(settings, json.loads(json.dumps(run.settings))):
        raise Refused(f"{path} holds results from other settings: {other[0]} is {other[1]!r} there and {other[2]!r} "
                      f"now; use another --results folder, or remove {path}")


def to_be_done(run, results):
    """Is this run not finished, damaged, or made without the weights it must keep? Refused if its settings differ."""
    folder = results / run.path
    try:
        record = whole_run(folder)
    except Damaged:
        return True
    if record is None:
        return True
    refuse_other_settings(run, record["settings"], folder)
    return run.weights and record["result"]["diverged_at_epoch"] is None and "weights.pt" not in record["sha256"]


def set_aside(folder):
    """Moves the files of a damaged run into a folder beside them, and says so."""
    try:
        whole_run(folder)
    except Damaged:
        aside = folder / f"damaged-{time.time_ns()}"
        aside.mkdir()
        for name in ("run.json", "history.npz", "weights.pt"):
            if (folder / name).exists():
                (folder / name).rename(aside / name)
        print(f"{folder}: the damaged run is set aside as {aside.name} and made anew", flush=True)


# --- A run that is being trained -----------------------------------------------------------------

CHECKPOINT_SECONDS = 60


class Checkpoint:
    """The state of a run after an epoch, at most every CHECKPOINT_SECONDS: an interrupted run goes on from there.

    The file ends with its SHA-256.
    """

    def __init__(self, run, results):
        self.path, self.run = results / run.path / "checkpoint.pt", run
        self.began = self.written = time.perf_counter()

    def save(self, parts, history, best):
        """parts: {name: object with a state_dict}; history, best: as in common.train."""
        if time.perf_counter() - self.written < CHECKPOINT_SECONDS:
            return
        content = io.BytesIO()
        torch.save({"settings": json.dumps(self.run.settings), "seconds": time.perf_counter() - self.began,
                    "history": history, "best": best,
                    "parts": {name: part.state_dict() for name, part in parts.items()}}, content)
        content.write(hashlib.sha256(content.getbuffer()).digest())
        write(self.path, lambda file: file.write(content.getbuffer()))
        self.written = time.perf_counter()

    def resume(self, parts):
        """Puts the state of `parts` back; returns history and best: [] and None without a checkpoint.

        Sets a checkpoint aside that is damaged or of another version. Raises Refused if its settings differ.
        """
        if not self.path.is_file():
            return [], None
        content = self.path.read_bytes()
        if hashlib.sha256(content[:-32]).digest() != content[-32:]:
            return self.set_aside("damaged")
        before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        try:
            state = torch.load(io.BytesIO(content[:-32]), map_location="cpu", weights_only=True)
            settings, seconds, history, best = (state[key] for key in ("settings", "seconds", "history", "best"))
            refuse_other_settings(self.run, json.loads(settings), self.path)
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError):
            for name, part in parts.items():
                part.load_state_dict(before[name])
            return self.set_aside("of another version")
        self.began -= seconds
        return history, best

    def set_aside(self, why):
        aside = self.path.with_name(f"damaged-{time.time_ns()}-{self.path.name}")
        self.path.rename(aside)
        print(f"{self.path} is {why}: it is set aside as {aside.name}, and the run begins anew", flush=True)
        return [], None


def opened(path):
    """A file for a lock. Another user's, which must not be written, can be locked as well."""
    try:
        return open(path, "a", encoding="utf-8")
    except PermissionError:
        return open(path, encoding="utf-8")


@contextlib.contextmanager
def lock(run, results):
    """Locks a run: yields False if another process has it. The lock disappears with its process."""
    path = results / run.path / ".lock"
    refuse_elsewhere(path.parent, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    with opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            if multiprocessing.parent_process():
                raise Refused(f"{results} is on a file system without locks ({error.strerror}), which share the runs "
                              "out among several: add --jobs 1") from error
            warn_once(f"{results} is on a file system without locks ({error.strerror}): nothing keeps two commands "
                      "there from training the same runs; start one at a time, or use --shard")
        try:
            same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            same = False
        if not same:                    # another process finished with this file just now
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


@functools.cache
def warn_once(text):
    print(f"WARNING: {text}", flush=True)


def run_missing(runs, results, do, ready=lambda run: True, waiting=lambda: None):
    """do(run) for each run that is not finished, once it is ready; a damaged run is set aside first.

    Any number of processes may do so in one folder: each takes runs that no other has locked, and all end when every
    run is finished. Calls waiting() now and then while other processes train what is left. Raises Refused if a run is
    not ready and nobody trains what it needs.
    """
    while runs:
        locked, unready = [], []
        for run in runs:
            if not ready(run):
                unready.append(run)
                continue
            with lock(run, results) as mine:
                if not mine:
                    locked.append(run)
                elif to_be_done(run, results):
                    for left in (results / run.path).glob(".*.[0-9]*"):     # half a file, of a process that was killed
                        left.unlink(missing_ok=True)
                    set_aside(results / run.path)
                    do(run)
        if unready == runs:
            raise Refused(f"{unready[0].label} needs a run that is not finished and that nobody trains: give the same "
                          "command again")
        if len(locked) + len(unready) == len(runs):
            waiting()
            time.sleep(0.5)
        runs = locked + unready
