"""A run or a study that is interrupted, by whatever, goes on and gives the same numbers; nothing damaged is used."""

import contextlib
import fcntl
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import common
import train_densenet_cifar
import train_mlp_fmnist
from study import command, folders, plan

import pytest
import torch
from conftest import outcomes
from test_training import a_densenet, a_run, builder, small_images

MORE = {"epochs": 5, "decay": [0.5], "weight_decay": 1e-3}
RUNS = [replace(run, weights=True) for run in (
    a_run(**MORE), a_run("bagging", bagging="weights", **MORE),
    a_densenet("bagging", bagging="resample", train=40, validation=20, **MORE))]


@pytest.fixture
def every_epoch(monkeypatch):
    monkeypatch.setattr(folders, "CHECKPOINT_SECONDS", 0)


def train(run, results, end=None):
    """Trains a run, or until an epoch `end`, at which it is interrupted; returns the epochs that were trained."""
    epochs, data = [], small_images(1 if run.experiment == "mlp_fmnist" else 3)

    def report(epoch, history):
        epochs.append(epoch)
        if epoch == end:
            raise KeyboardInterrupt
    (results / run.path).mkdir(parents=True, exist_ok=True)
    with pytest.raises(KeyboardInterrupt) if end else contextlib.nullcontext():
        command.do_run(plan.Experiment(run.experiment, builder(run)), run, data, results, report)
    return epochs


# --- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.experiment} {run.method}")
def test_a_run_interrupted_twice_equals_one_that_was_not(tmp_path, run, every_epoch):
    assert train(run, tmp_path / "whole") == [1, 2, 3, 4, 5]
    assert train(run, tmp_path / "parts", 2) == [1, 2]
    assert train(run, tmp_path / "parts", 4) == [2, 3, 4]
    assert train(run, tmp_path / "parts") == [4, 5]
    assert outcomes(tmp_path / "whole") == outcomes(tmp_path / "parts")
    assert not list(tmp_path.rglob("checkpoint.pt"))


def garbled(content):
    """A file's content with 200 bytes in its middle inverted."""
    middle = len(content) // 2
    return content[:middle] + bytes(255 - byte for byte in content[middle:middle + 200]) + content[middle + 200:]


DAMAGE = [lambda content: b"", lambda content: content[:-1], garbled]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damage, capsys, every_epoch):
    train(RUNS[0], tmp_path / "whole")
    train(RUNS[0], tmp_path / "parts", 3)
    (path,) = tmp_path.rglob("checkpoint.pt")
    content = damage(path.read_bytes())
    path.write_bytes(content)
    assert train(RUNS[0], tmp_path / "parts") == [1, 2, 3, 4, 5]
    (aside,) = path.parent.glob("damaged-*-checkpoint.pt")
    said = capsys.readouterr().out
    assert said.startswith(f"{path} cannot be used (") and said.count("\n") == 1
    assert f"set aside as {aside.name}; the run begins anew" in said and aside.read_bytes() == content
    assert outcomes(tmp_path / "whole") == outcomes(tmp_path / "parts")


def test_a_checkpoint_of_other_settings_or_of_another_network_is_refused(tmp_path, every_epoch):
    run, other = RUNS[0], replace(RUNS[0], settings=RUNS[0].settings | {"batch": 20})
    train(run, tmp_path, 3)
    with pytest.raises(common.Refused, match=r"checkpoint.pt holds results from .* batch is 40 there and 20 now"):
        train(other, tmp_path)
    (path,) = tmp_path.rglob("checkpoint.pt")
    state = torch.load(path)
    state["parts"]["ensemble"].pop("output_bias")
    torch.save(state, path)
    with pytest.raises(common.Refused, match=r"^[^\n]*saved weights are of another network[^\n]*$"):
        train(run, tmp_path)


# --- Finished runs -------------------------------------------------------------------------------

SELECT = ("--preset", "smoke", "--only", "64x16H", "--lambdas", "0", "--trials", "1")


@pytest.fixture
def folder(smoke_study, script):
    """The folder of a finished run, a copy of the smoke study's, below the current folder."""
    folder = Path("results/smoke/mlp_fmnist/64x16H/joint-0/trial0")
    shutil.copytree(smoke_study / folder, folder)
    return folder


@pytest.mark.parametrize("name, damage", [
    *(("run.json", damage) for damage in DAMAGE), ("history.npz", DAMAGE[1]), ("weights.pt", garbled)])
def test_a_damaged_run_is_never_read_and_is_made_anew(script, folder, name, damage):
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / name).write_bytes(damage(whole[name]))
    with pytest.raises(folders.Damaged, match=f"^{folder / name} is damaged .* sets it aside and trains"):
        folders.read_whole_run(folder)
    status, out, _ = script(train_mlp_fmnist, *SELECT)
    (aside,) = folder.glob("damaged-*")
    assert status == 0 and f"{folder / name} cannot be used (" in out and aside.name in out
    assert aside.read_bytes() == damage(whole[name])
    assert all((folder / other).read_bytes() == whole[other] for other in ("history.npz", "weights.pt"))
    assert "0 of 1 runs to do" in script(train_mlp_fmnist, *SELECT)[1]


def test_a_run_without_its_weights_is_trained_again_only_for_who_needs_them(script, smoke_study):
    """Records in expected/ have none. Figures 7 and 8 and stacking need them."""
    for name in ("mlp_fmnist/64x16H/joint-0", "densenet_cifar/DN-High/joint-0", "densenet_cifar/DN-High/stacking"):
        place = Path("results/smoke", name, "trial0")
        shutil.copytree(smoke_study / place, place, ignore=shutil.ignore_patterns("weights.pt"))

    def left(module, *arguments):
        out = script(module, "--preset", "smoke", "--trials", 1, *arguments, "--dry-run")[1]
        return re.findall(r"^    (.+) trial 0: to do$", out, re.MULTILINE)

    stacking = train_densenet_cifar, "--only", "DN-High", "--methods", "stacking"
    assert left(*stacking) == left(train_mlp_fmnist, "--figure", 9, "--lambdas", 0) == []
    assert left(train_mlp_fmnist, "--figure", 8, "--lambdas", 0) == ["64x16H lambda 0"]
    shutil.rmtree(place)
    assert left(*stacking) == ["DN-High lambda 0", "DN-High stacking"]


# --- A whole study, killed again and again, or trained by several commands -----------------------

STUDY = {train_mlp_fmnist: ["--only", "16x64H", "--lambdas", "1", "--methods", "joint", "bagging", "--epochs", "4"],
         train_densenet_cifar: ["--only", "DN-High", "--methods", "bagging", "stacking"]}


def do_study(folder, jobs):
    """Gives the commands of STUDY in a folder, in a process that has imported everything."""
    os.chdir(folder)
    folders.CHECKPOINT_SECONDS = 0
    command.estimate = lambda experiment, runs, *_: {run.path: 1.0 for run in runs}     # training begins at once
    for module, arguments in STUDY.items():
        sys.argv = [module.__file__, "--preset", "smoke", "--trials", "1", "--jobs", str(jobs), *arguments]
        command.command_line(module.main)


def start(folder, jobs):
    """A process that gives the commands of STUDY."""
    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=do_study, args=(folder, jobs))
    process.start()
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What STUDY leaves undisturbed."""
    folder = tmp_path_factory.mktemp("study") / "whole"
    torch.set_num_threads(1)
    process = start(folder, 1)
    process.join(100)
    expected = outcomes(folder / "results")
    assert process.exitcode == 0 and len(expected) == 5
    return expected


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_study_killed_again_and_again_equals_one_that_was_not(tmp_path, whole, one_thread, jobs):
    """kill -9 whenever it has come on, and the same command again. Workers, if there are, end with it."""
    def state():
        return len(list(tmp_path.rglob("checkpoint.pt"))), len(list(tmp_path.rglob("run.json")))
    moments, states, process = random.Random(0), [], start(tmp_path / "study", jobs)
    while process.exitcode != 0:
        if len(states) < 4:
            while process.exitcode is None and state() in states:
                process.join(0.02)
            process.join(moments.uniform(0, 0.3))
            process.kill()
            states.append(state())
        process.join(100)
        if process.exitcode:        # killed; or 1, while a worker of the one that was killed has yet to end
            assert process.exitcode in (1, -9)
            process = start(tmp_path / "study", jobs)
    assert outcomes(tmp_path / "study/results") == whole
    assert not [*tmp_path.rglob("damaged-*"), *tmp_path.rglob("checkpoint.pt")]
    assert len(set(states)) > 1, "killed always in the same state"


def test_two_commands_at_one_folder_train_each_run_once(tmp_path, whole, one_thread):
    """Each skips what the other trains, and ends with 1 if such a run is left."""
    pair = [start(tmp_path / "pair", jobs) for jobs in (1, 2)]
    while pair:
        for process in pair:
            process.join(100)
        assert {process.exitcode for process in pair} <= {0, 1}
        pair = [start(tmp_path / "pair", 1)] if any(process.exitcode for process in pair) else []
    assert outcomes(tmp_path / "pair" / "results") == whole


# --- How a command ends --------------------------------------------------------------------------


@pytest.mark.parametrize("jobs, number, to, status, words", [
    (1, signal.SIGTERM, "command", 143, "stopped; finished runs are kept"),
    (2, signal.SIGINT, "all", 130, "give the same command again to go on"),     # as Ctrl-C on a terminal does
    (2, signal.SIGKILL, "command", -9, ""),
    (2, signal.SIGKILL, "worker", 2, "fewer --jobs need less); finished runs are kept: give the same command again")])
def test_a_signal_ends_a_command_and_its_workers(tmp_path, heed_ctrl_c, jobs, number, to, status, words):
    process = subprocess.Popen(
        [sys.executable, train_mlp_fmnist.__file__, "--preset", "smoke", "--only", "16x64H", "--lambdas", "1",
         "--epochs", "100000", "--jobs", str(jobs)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, preexec_fn=heed_ctrl_c, start_new_session=True)
    limit = threading.Timer(60, process.kill)
    limit.start()
    try:
        while len(list(tmp_path.rglob(".lock"))) < jobs:            # until each run is in training
            assert process.poll() is None
            time.sleep(0.05)
        workers = list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
        assert len(workers) == (jobs if jobs > 1 else 0)
        (os.killpg if to == "all" else os.kill)(workers[0] if to == "worker" else process.pid, number)
        _, err = process.communicate(timeout=60)            # until its workers, who have its stderr, have ended, too
    finally:
        process.kill()
        limit.cancel()
    assert process.returncode == status and words in err and err.strip().count("\n") == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]


def test_what_another_command_trains_is_skipped_and_said(script, tmp_path):
    """And so is the stacking of its members. Of the rest, each run is trained."""
    held = tmp_path / "results/smoke/densenet_cifar/DN-High/joint-0/trial0"
    held.mkdir(parents=True)
    arguments = ["--preset", "smoke", "--trials", 1, "--only", "DN-High", "--methods", "joint", "stacking", "--lambdas"]
    arguments += [0, 1]
    with open(held / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for jobs in (1, 2):
            status, out, err = script(train_densenet_cifar, *arguments, "--jobs", jobs)
            assert status == 1 and "or their members now: 2; give this one again when that has ended" in out, err
    assert list(outcomes(tmp_path)) == [Path("results/smoke/densenet_cifar/DN-High/joint-1/trial0")]
    assert script(train_densenet_cifar, *arguments)[0] == 0 and len(outcomes(tmp_path)) == 3


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_is_one_line_and_the_command_goes_on_when_there_is_room(script, jobs):
    """A limit of 100 kB a file stands in for the disk: weights of 3 MB do not fit."""
    command = ("--preset", "smoke", "--only", "256x4H", "--lambdas", 0, "--trials", jobs, "--epochs", 2, "--jobs", jobs)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        status, _, err = script(train_mlp_fmnist, *command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and err.count("\n") == 1 and "weights.pt: File too large; finished runs are kept" in err
    assert not [*Path().rglob("weights.pt"), *Path().rglob("run.json")]
    assert script(train_mlp_fmnist, *command)[0] == 0
    assert len(list(Path().rglob("run.json"))) == jobs
