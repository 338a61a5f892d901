"""Runs that were interrupted go on from their checkpoints, and nothing damaged is believed."""

import collections
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import make_figures
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist

import numpy as np
import pytest
import torch

ROOT = Path(common.__file__).parent
SETTINGS = {"members": 3, "seed": 0, "epochs": 5, "train": 60, "validation": 20, "test": 40,
            "batch": 25, "augment": False, "momentum": 0.9, "nesterov": False,
            "weight_decay": 1e-3, "decay": [0.5]}
MLP = {"hidden": 3, "lr": 0.4}
DENSENET = {"depth": 10, "growth": 2, "lr": 0.1, "precision": "fp32", "augment": True}
CASES = {
    "MLP": (train_mlp_fmnist, "joint", MLP),
    "MLP, no momentum, no validation": (train_mlp_fmnist, "joint",
                                        MLP | {"momentum": 0.0, "validation": 0}),
    "bagging by weights": (train_mlp_fmnist, "bagging", MLP | {"bagging": "weights"}),
    "DenseNet": (train_densenet_cifar, "joint", DENSENET),
    "bagging by copies": (train_densenet_cifar, "bagging", DENSENET | {"bagging": "resample"})}


@pytest.fixture(scope="module")
def data():
    return {train_mlp_fmnist: common.synthetic(10, (1, 28, 28), 100, 40),
            train_densenet_cifar: common.synthetic(5, (3, 16, 16), 100, 40)}


def case(name):
    module, method, changes = CASES[name]
    return module, common.Run("test", module.EXPERIMENT.name, "small", method, 0.0, 0,
                              SETTINGS | changes, weights=True)


def do(name, data, results, end=None):
    """Trains a run, or until an epoch `end`, at which it is interrupted."""
    def progress(epoch, history):
        if epoch == end:
            raise KeyboardInterrupt
    module, run = case(name)
    return common.do_run(module.EXPERIMENT, run, data[module], results, progress)


def outcome(name, results):
    """All that a run leaves, but for its times."""
    folder = results / case(name)[1].path
    assert {path.name for path in folder.iterdir()} >= {"run.json", "history.npz", "weights.pt"}
    record = common.read_run(folder)
    arrays = common.load_history(folder) | {
        f"weights {key}": value.numpy()
        for key, value in common.load_weights(folder, "cpu").items()}
    return record["result"], arrays


def same(one, other):
    assert one[0] == other[0] and one[1].keys() == other[1].keys()
    for key, value in one[1].items():
        np.testing.assert_array_equal(value, other[1][key], err_msg=key)
    return True


damaged = pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:len(content) // 2],
    lambda content: content[:-1],
    *(lambda content, at=at: content[:int(at * len(content))] + bytes([
        content[int(at * len(content))] ^ 4]) + content[int(at * len(content)) + 1:]
      for at in (0.0, 0.3, 0.6, 0.999))])


@pytest.fixture
def every_epoch(monkeypatch):
    monkeypatch.setattr(common, "CHECKPOINT_SECONDS", 0)


@pytest.mark.parametrize("name", CASES)
def test_a_run_interrupted_twice_equals_one_that_was_not(data, tmp_path, name, every_epoch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        (folder / case(name)[1].path).mkdir(parents=True)
    do(name, data, whole)
    for end in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            do(name, data, parts, end)
    seen = []
    module, run = case(name)
    common.do_run(module.EXPERIMENT, run, data[module], parts, lambda epoch, _: seen.append(epoch))
    assert seen == [4, 5]                   # what was checkpointed is not done again
    assert same(outcome(name, whole), outcome(name, parts))
    assert not (parts / run.path / "checkpoint.pt").exists()


def test_checkpoints_are_a_minute_apart(data, tmp_path):
    (tmp_path / case("MLP")[1].path).mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        do("MLP", data, tmp_path, 4)
    assert not list(tmp_path.rglob("checkpoint.pt"))


@damaged
def test_a_damaged_checkpoint_is_set_aside_and_told(data, tmp_path, damage, capsys, every_epoch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        (folder / case("MLP")[1].path).mkdir(parents=True)
    do("MLP", data, whole)
    with pytest.raises(KeyboardInterrupt):
        do("MLP", data, parts, 3)
    (path,) = parts.rglob("checkpoint.pt")
    content = damage(path.read_bytes())
    path.write_bytes(content)
    do("MLP", data, parts)
    assert f"{path} is damaged: it is set aside as damaged-" in capsys.readouterr().out
    (aside,) = path.parent.glob("damaged-*-checkpoint.pt")
    assert aside.read_bytes() == content
    assert same(outcome("MLP", whole), outcome("MLP", parts))


SELECT = ("--preset", "smoke", "--only", "64x16H", "--lambdas", "0", "--trials", "1")
SHORT = (*SELECT, "--epochs", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which SHORT was trained."""
    folder = tmp_path_factory.mktemp("finished")
    subprocess.run([sys.executable, ROOT / "train_mlp_fmnist.py", *SHORT], cwd=folder, check=True)
    return folder


@pytest.fixture
def folder(trained, script):
    """That run's folder, in a copy that is the current one."""
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    return Path("results/smoke/mlp_fmnist/64x16H/joint-0/trial0")


@damaged
@pytest.mark.parametrize("name", ["run.json", "history.npz", "weights.pt"])
def test_a_damaged_run_is_never_drawn_and_is_done_anew(script, folder, name, damage):
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    content = damage(whole[name])
    (folder / name).write_bytes(content)
    reader = {"history.npz": (make_figures, "fig9", "--preset", "smoke"),
              "weights.pt": (robustness, *SELECT),
              "run.json": (make_figures, "fig3", "--preset", "smoke")}[name]
    status, _, err = script(*reader)
    assert status == 2 and err.count("\n") == 1 and f"{folder / name} is damaged" in err
    status, out, _ = script(train_mlp_fmnist, *SHORT)
    assert status == 0 and f"{folder}: what is damaged there is set aside as damaged-" in out
    (aside,) = folder.glob("damaged-*")
    assert (aside / name).read_bytes() == content
    for other in ("history.npz", "weights.pt"):
        assert (folder / other).read_bytes() == whole[other]
    assert script(train_mlp_fmnist, *SHORT)[1].count("0 to do") == 1


def test_a_damaged_measurement_is_done_anew_and_one_that_is_being_made_is_left(
        script, folder, monkeypatch):
    assert script(robustness, *SELECT)[0] == 0
    (path,) = Path("results/smoke/robustness-example").rglob("history.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    status, _, err = script(make_figures, "fig8", "--preset", "smoke")
    assert status == 2 and f"{path} is damaged" in err
    status, out, _ = script(robustness, *SELECT)
    assert status == 0 and "0 measured before" in out and "set aside as damaged-" in out
    assert path.read_bytes() == whole
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    with open(path.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(time, "sleep", lambda seconds: lock.close())    # the other ends
        status, out, _ = script(robustness, *SELECT)
    assert status == 0 and "waiting for 1 runs that other processes are at" in out
    assert path.read_bytes() == whole


def test_weights_that_are_code_are_not_run(script, folder):
    """With a checksum that fits, as someone who sends both can make it."""
    record = common.read_run(folder)
    torch.save({"hidden_weight": Malice()}, folder / "weights.pt")
    content = (folder / "weights.pt").read_bytes()
    record["sha256"]["weights.pt"] = hashlib.sha256(content).hexdigest()
    (folder / "run.json").write_text(json.dumps(record | {"seal": common.seal(record)}))
    status, _, err = script(robustness, *SELECT)
    assert status == 2 and "weights.pt is damaged (it holds more than weights)" in err


def test_a_checkpoint_of_other_settings_is_refused(data, tmp_path, every_epoch, monkeypatch):
    (tmp_path / case("MLP")[1].path).mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        do("MLP", data, tmp_path, 3)
    monkeypatch.setitem(SETTINGS, "batch", 20)
    with pytest.raises(common.Refused, match="batch is 25 there and 20 now"):
        do("MLP", data, tmp_path)


class Malice:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_checkpoint_is_data_and_not_code(data, tmp_path, every_epoch, monkeypatch, capsys):
    (tmp_path / case("MLP")[1].path).mkdir(parents=True)
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: real(state | {"best": Malice()}, file))
    with pytest.raises(KeyboardInterrupt):
        do("MLP", data, tmp_path, 3)
    monkeypatch.setattr(torch, "save", real)
    do("MLP", data, tmp_path)               # it does not leave with "executed"
    assert "checkpoint.pt is damaged: it is set aside as damaged-" in capsys.readouterr().out


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_and_says_how_to_go_on(tmp_path, heed_ctrl_c, number, status):
    command = [sys.executable, ROOT / "train_mlp_fmnist.py", "--preset", "smoke", "--only",
               "1x1024H", "--trials", "1", "--epochs", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c)
    while not list(tmp_path.rglob(".lock")):
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert err.strip().startswith("stopped;") and "the same command goes on" in err
    assert "Traceback" not in err


# --- A whole study, killed again and again --------------------------------------------------------

STUDY = {train_mlp_fmnist: ["--only", "256x4H", "--lambdas", "1", "--methods", "joint", "bagging",
                             "--epochs", "6"],
         train_densenet_cifar: ["--only", "DN-High", "--methods", "bagging", "stacking"]}


def do_study(folder):
    """The commands of STUDY in a folder, in a process that has all imported."""
    os.chdir(folder)
    torch.set_num_threads(1)
    common.CHECKPOINT_SECONDS = 0
    common.estimate = lambda experiment, runs, data: [(1, 1, 1)] * len(runs)    # and begin at once
    for module, arguments in STUDY.items():
        sys.argv = [module.__file__, "--preset", "smoke", "--trials", "1", *arguments]
        common.command_line(module.main)


def test_a_study_killed_at_twenty_moments_equals_one_that_was_not(tmp_path, monkeypatch):
    """kill -9, and the same command again; when a study comes to its end, another one begins."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))     # of the server, which imports
    context = multiprocessing.get_context("forkserver")             # torch once for all processes
    context.set_forkserver_preload([__name__])

    def start(folder):
        folder.mkdir(exist_ok=True)
        process = context.Process(target=do_study, args=(folder,))
        process.start()
        return process

    def outcomes(folder):
        """What came out of each run, and the checksums of its files."""
        rows = {}
        for path in sorted(folder.rglob("run.json")):
            record = common.whole_run(path.parent)
            rows[str(path.parent.relative_to(folder))] = record["result"], record["sha256"]
        return rows

    whole = start(tmp_path / "whole")
    began = time.perf_counter()
    whole.join()
    took = time.perf_counter() - began
    assert whole.exitcode == 0
    expected = outcomes(tmp_path / "whole")
    assert len(expected) == 5
    moments, kills, studies, states = random.Random(0), 0, 0, collections.Counter()
    while kills < 20:
        studies += 1
        folder = tmp_path / f"study{studies}"
        while True:
            process = start(folder)
            process.join(moments.uniform(0, took / 3) if kills < 20 else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            states[len(list(folder.rglob("checkpoint.pt"))), len(list(folder.rglob(".*")))] += 1
        assert process.exitcode == 0
        assert outcomes(folder) == expected
        assert not [path for path in folder.rglob("*") if path.name.startswith("damaged-")
                    or path.name == "checkpoint.pt"]
    assert len(states) > 1, "killed always in the same state"


# --- Disks ---------------------------------------------------------------------------------------

@pytest.fixture
def mounted(tmp_path):
    """A file system of its own: mounted(options) -> its folder. Root is needed for that."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
                              capture_output=True, text=True)
        if done.returncode:
            assert not os.environ.get("CI"), done.stderr
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        return folder
    yield mount
    subprocess.run(["umount", folder], check=False, capture_output=True)


TINY = ("--preset", "smoke", "--only", "256x4H", "--lambdas", 0, "--trials", 1, "--epochs", 2)


def test_a_disk_that_gets_full_loses_nothing_and_goes_on_when_there_is_room(script, mounted,
                                                                            monkeypatch):
    disk = mounted("size=5m")
    command = (*TINY, "--results", disk)
    monkeypatch.setattr(common, "need_room", lambda folder, costs: None)    # it fills up meanwhile
    (disk / "others").write_bytes(bytes(3_000_000))
    status, _, err = script(train_mlp_fmnist, *command)
    assert status == 2 and err.count("\n") == 1
    assert "weights.pt cannot be written: No space left on device" in err
    assert not list(disk.rglob("*weights.pt*")) and not list(disk.rglob("run.json"))
    (disk / "others").unlink()
    assert script(train_mlp_fmnist, *command)[0] == 0
    assert len(list(disk.rglob("run.json"))) == 1


def test_a_disk_without_room_for_the_plan_is_told_before_anything_is_done(script, mounted):
    disk = mounted("size=5m")
    status, _, err = script(train_mlp_fmnist, *TINY, "--results", disk)
    assert status == 2 and err.count("\n") == 1
    assert "MB free and the runs to do need about 13 MB: make room" in err
    assert not list(disk.iterdir())


def test_a_folder_that_is_read_only_is_told(script, mounted):
    disk = mounted("ro")
    for module in (train_mlp_fmnist, make_figures):
        flags = (*TINY, "--results", disk) if module is train_mlp_fmnist else (
            "table3", "--preset", "smoke", "--figures-dir", disk)
        status, _, err = script(module, *flags)
        assert status == 2 and err.count("\n") == 1
        assert str(disk) in err and "cannot be written: Read-only file system" in err


# --- The same numbers every time -----------------------------------------------------------------

def test_deterministic_algorithms_are_enough_for_every_network(script):
    """None is missing, which would raise an error; on the CPU nothing changes by them."""
    select = ("--preset", "smoke", "--trials", 1, "--epochs", 1, "--methods", "joint", "bagging",
              "--lambdas", 0.5)
    for flags in ((), ("--deterministic",)):
        try:
            for module, only in ((train_mlp_fmnist, "256x4H"), (train_densenet_cifar, "DN-Low"),
                                 (train_convnet_cifar, "ConvNet-0.07M")):
                assert script(module, *select, "--only", only, "--results", f"results{len(flags)}",
                              *flags)[0] == 0
        finally:
            torch.use_deterministic_algorithms(False)
    plain, other = ({path.parent.relative_to(folder): common.read_run(path.parent)
                     for path in Path(folder).rglob("run.json")}
                    for folder in ("results0", "results1"))
    assert len(plain) == len(other) == 6
    for path, record in plain.items():
        assert record["sha256"] == other[path]["sha256"], path
        assert not record["machine"]["deterministic"] and other[path]["machine"]["deterministic"]
