"""An interrupted run goes on from its checkpoint, and nothing that is damaged is used."""

import contextlib
import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import study
import common
import folders
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist

import numpy as np
import pytest
import torch

SETTINGS = {"members": 3, "seed": 0, "epochs": 5, "train": 60, "validation": 20, "test": 40, "batch": 25,
            "augment": False, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-3, "decay": [0.5]}
MLP = {"hidden": 3, "lr": 0.4}
DENSENET = {"depth": 10, "growth": 2, "lr": 0.1, "precision": "fp32", "augment": True}
CASES = {
    "MLP": (train_mlp_fmnist, "joint", MLP),
    "MLP, no momentum, no validation": (train_mlp_fmnist, "joint", MLP | {"momentum": 0.0, "validation": 0}),
    "bagging by weights": (train_mlp_fmnist, "bagging", MLP | {"bagging": "weights"}),
    "DenseNet": (train_densenet_cifar, "joint", DENSENET),
    "bagging by copies": (train_densenet_cifar, "bagging", DENSENET | {"bagging": "resample"})}


@pytest.fixture(scope="module")
def data():
    return {train_mlp_fmnist: common.synthetic(10, (1, 28, 28), 100, 40),
            train_densenet_cifar: common.synthetic(5, (3, 16, 16), 100, 40)}


@pytest.fixture
def every_epoch(monkeypatch):
    monkeypatch.setattr(folders, "CHECKPOINT_SECONDS", 0)


def case(name):
    module, method, changes = CASES[name]
    return module, study.Run("test", module.EXPERIMENT.name, "small", method, 0.0, 0, SETTINGS | changes, weights=True)


def train(name, data, results, end=None):
    """Trains a run, or until an epoch `end`, at which it is interrupted; returns the epochs that were trained."""
    epochs, (module, run) = [], case(name)

    def report(epoch, history):
        epochs.append(epoch)
        if epoch == end:
            raise KeyboardInterrupt
    (results / run.path).mkdir(parents=True, exist_ok=True)
    with pytest.raises(KeyboardInterrupt) if end else contextlib.nullcontext():
        study.do_run(module.EXPERIMENT, run, data[module], results, report)
    return epochs


def equal(name, one, other):
    """Holds all that a run left in two folders equal, to the bit, but for its times."""
    results, arrays = [], []
    for folder in (one / case(name)[1].path, other / case(name)[1].path):
        results.append(folders.whole_run(folder)["result"])
        arrays.append(folders.load_history(folder) | folders.load_weights(folder, "cpu"))
        assert not (folder / "checkpoint.pt").exists()
    assert results[0] == results[1] and arrays[0].keys() == arrays[1].keys()
    for key, value in arrays[0].items():
        np.testing.assert_array_equal(value, arrays[1][key], err_msg=key)


class Malice:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def flip(at):
    """Damages one bit of a file's content, at a share of its length."""
    return lambda content: b"".join((content[:int(at * len(content))], bytes([content[int(at * len(content))] ^ 4]),
                                     content[int(at * len(content)) + 1:]))


damage = pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: content[:len(content) // 2], lambda content: content[:-1],
    flip(0), flip(0.3), flip(0.6), flip(0.999)])


# --- Checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_run_interrupted_twice_equals_one_that_was_not(data, tmp_path, name, every_epoch):
    assert train(name, data, tmp_path / "whole") == [1, 2, 3, 4, 5]
    assert train(name, data, tmp_path / "parts", 2) == [1, 2]
    assert train(name, data, tmp_path / "parts", 4) == [2, 3, 4]
    assert train(name, data, tmp_path / "parts") == [4, 5]
    equal(name, tmp_path / "whole", tmp_path / "parts")


def test_checkpoints_are_a_minute_apart_and_count_the_time_before_them(data, tmp_path, monkeypatch):
    """Each look at the clock takes no time, and each epoch 35 seconds."""
    clock, written, (module, run), write = [0], [], case("MLP"), folders.write
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(folders, "write", lambda path, save: written.append((path.name, clock[0])) or write(path, save))
    (tmp_path / run.path).mkdir(parents=True)

    def report(epoch, history):
        clock[0] += 35
        if clock[0] == 4 * 35:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        study.do_run(module.EXPERIMENT, run, data[module], tmp_path, report)
    assert written == [("checkpoint.pt", 70)]
    study.do_run(module.EXPERIMENT, run, data[module], tmp_path, report)        # three epochs more
    assert written[1:3] == [("checkpoint.pt", 210), ("history.npz", 245)]
    assert folders.read_run(tmp_path / run.path)["seconds"] == 5 * 35


@pytest.mark.parametrize("alter, reason", [
    *((each, "damaged") for each in damage.args[1]),
    (lambda content: sealed({"settings": "{}", "weights": {}, "momenta": [], "lowest": 0.5}), "of another version"),
    *((lambda content, key=key, value=value: sealed(torch.load(io.BytesIO(content[:-32])) | {key: value}),
       "of another version") for key, value in (
           ("best", Malice()), ("settings", 3), ("settings", "{"), ("parts", {}), ("parts", [])))])
def test_a_checkpoint_that_cannot_be_used_is_set_aside_with_its_reason(data, tmp_path, alter, reason, capsys,
                                                                       every_epoch):
    """And it is data, not code: `Malice` would end the tests."""
    train("MLP", data, tmp_path / "whole")
    train("MLP", data, tmp_path / "parts", 3)
    (path,) = tmp_path.rglob("checkpoint.pt")
    content = alter(path.read_bytes())
    path.write_bytes(content)
    assert train("MLP", data, tmp_path / "parts") == [1, 2, 3, 4, 5]
    (aside,) = path.parent.glob("damaged-*-checkpoint.pt")
    assert f"{path} is {reason}: it is set aside as {aside.name}, and the run begins anew" in capsys.readouterr().out
    assert aside.read_bytes() == content
    equal("MLP", tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_of_another_network_leaves_the_new_one_as_it_was(data, tmp_path, capsys, every_epoch):
    """The first layer fits and the second does not: nothing of the first stays."""
    def other(content):
        state = torch.load(io.BytesIO(content[:-32]))
        weights = state["parts"]["ensemble"]
        weights["hidden_weight"] += 1
        weights["output_bias"] = torch.zeros(3)
        return sealed(state)
    test_a_checkpoint_that_cannot_be_used_is_set_aside_with_its_reason(
        data, tmp_path, other, "of another version", capsys, every_epoch)


def sealed(state):
    """The content of a checkpoint whose checksum fits."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue() + hashlib.sha256(content.getvalue()).digest()


def test_a_checkpoint_of_other_settings_is_refused(data, tmp_path, every_epoch, monkeypatch):
    train("MLP", data, tmp_path, 3)
    monkeypatch.setitem(SETTINGS, "batch", 20)
    with pytest.raises(common.Refused, match=r"checkpoint.pt holds results from .* batch is 25 there and 20 now"):
        train("MLP", data, tmp_path)


# --- Finished runs -------------------------------------------------------------------------------

SELECT = ("--preset", "smoke", "--only", "64x16H", "--lambdas", "0", "--trials", "1")
SHORT = (*SELECT, "--epochs", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which SHORT was trained."""
    folder = tmp_path_factory.mktemp("finished")
    subprocess.run([sys.executable, train_mlp_fmnist.__file__, *SHORT], cwd=folder, check=True)
    return folder


@pytest.fixture
def folder(trained, script):
    """The folder of that run, in a copy that is the current folder."""
    shutil.copytree(trained, ".", dirs_exist_ok=True)
    return Path("results/smoke/mlp_fmnist/64x16H/joint-0/trial0")


@damage
@pytest.mark.parametrize("name", ["run.json", "history.npz", "weights.pt"])
def test_a_damaged_run_is_never_read_and_is_made_anew(script, folder, name, damage):
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / name).write_bytes(damage(whole[name]))
    with pytest.raises(folders.Damaged,
                       match=f"{folder / name} is damaged .* keeps the files aside .* remove {folder}$"):
        folders.whole_run(folder)
    if name != "history.npz":           # which robustness.py does not read
        status, _, err = script(robustness, *SELECT)
        assert status == 2 and err.count("\n") == 1 and f"{folder / name} is damaged" in err
    status, out, _ = script(train_mlp_fmnist, *SHORT)
    (aside,) = folder.glob("damaged-*")
    assert status == 0 and f"{folder}: the damaged run is set aside as {aside.name} and made anew" in out
    assert (aside / name).read_bytes() == damage(whole[name])
    assert all((folder / other).read_bytes() == whole[other] for other in ("history.npz", "weights.pt"))
    assert "0 of 1 runs to do" in script(train_mlp_fmnist, *SHORT)[1]


@pytest.mark.parametrize("name", ["run.json", "history.npz"])
def test_a_file_that_cannot_be_read_is_not_damaged(script, folder, monkeypatch, name):
    """A bad night of the network ends the command; nothing is set aside or trained again."""
    for method in ("read_text", "read_bytes"):
        read = getattr(Path, method)

        def fails(path, *arguments, read=read, **others):
            if path.name == name:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return read(path, *arguments, **others)
        monkeypatch.setattr(Path, method, fails)
    before = sorted(Path().rglob("*"))
    status, _, err = script(train_mlp_fmnist, *SHORT)
    assert status == 2 and "Stale file handle" in err and name in err and err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_a_damaged_measurement_is_made_anew(script, folder):
    assert script(robustness, *SELECT)[0] == 0
    (path,) = Path("results/smoke/robustness-example").rglob("history.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    status, out, _ = script(robustness, *SELECT)
    assert status == 0 and "0 measured before" in out and "set aside as damaged-" in out
    assert path.read_bytes() == whole


def test_damaged_weights_are_told_of_and_not_their_measurement(script, folder):
    assert script(robustness, *SELECT)[0] == 0
    with open(folder / "weights.pt", "ab") as file:
        file.write(b"1")
    shutil.rmtree("results/smoke/robustness-example")
    status, _, err = script(robustness, *SELECT)
    assert status == 2 and f"{folder / 'weights.pt'} is damaged" in err and err.count("\n") == 1


def test_a_run_folder_without_its_weights_is_finished_and_robustness_passes_over_it(script, folder):
    assert script(train_mlp_fmnist, *SHORT, "--lambdas", "1")[0] == 0
    (folder / "weights.pt").unlink()
    assert folders.whole_run(folder) and "train_ensemble_loss" in folders.load_history(folder)
    assert "0 of 1 runs to do" in script(train_mlp_fmnist, *SHORT)[1]
    status, out, _ = script(robustness, "--preset", "smoke")
    assert status == 0 and "robustness: 1 trained runs" in out and "64x16H lambda 1 trial 0: test error" in out


def test_stacking_says_that_the_weights_of_its_members_are_missing(script):
    assert script(train_mlp_fmnist, *TINY)[0] == 0
    (path,) = Path().rglob("weights.pt")
    path.unlink()
    for more in ([], ["--dry-run"]):
        status, out, err = script(train_mlp_fmnist, *TINY, "--methods", "bagging", "stacking", *more)
        assert status == 2 and err.count("\n") == 1 and str(path.parent) in err and "remove" in err
        assert out == ""                                # before anything is trained
    assert "sets the run aside" not in err              # since a run that is whole but for them is not


def test_a_run_that_was_made_without_the_weights_it_must_keep_is_made_anew(script):
    assert script(train_mlp_fmnist, *SHORT, "--set", "weights=[]", "methods=[joint]")[0] == 0
    assert not list(Path().rglob("weights.pt"))
    for to_do in (1, 0):
        assert f"{to_do} of 1 runs to do" in script(train_mlp_fmnist, *SHORT)[1]
        assert len(list(Path().rglob("weights.pt"))) == 1


def seal(folder, name):
    """Gives a file of a run a checksum that fits, as someone who sends both can."""
    record = folders.read_run(folder)
    record["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "run.json").write_text(json.dumps(record | {"seal": folders.seal(record)}))


@pytest.mark.parametrize("content", ["code", b"", b"PK\x03\x04 no archive", b"text"])
def test_weights_that_are_code_or_something_else_are_not_loaded(script, folder, content):
    if content == "code":
        torch.save({"hidden_weight": Malice()}, folder / "weights.pt")
    else:
        (folder / "weights.pt").write_bytes(content)
    seal(folder, "weights.pt")
    status, _, err = script(robustness, *SELECT)
    assert status == 2 and "weights.pt is damaged (it holds something else than weights)" in err


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"text"])
def test_a_history_that_is_none_is_told(folder, content):
    (folder / "history.npz").write_bytes(content)
    seal(folder, "history.npz")
    with pytest.raises(folders.Damaged, match=r"history\.npz is damaged \(it holds no arrays\)"):
        folders.load_history(folder)


# --- A whole study, killed again and again -------------------------------------------------------

STUDY = {train_mlp_fmnist: ["--only", "256x4H", "--lambdas", "1", "--methods", "joint", "bagging", "--epochs", "6"],
         train_densenet_cifar: ["--only", "DN-High", "--methods", "bagging", "stacking"]}


def do_study(folder, jobs):
    """Gives the commands of STUDY in a folder, in a process that has imported everything."""
    os.chdir(folder)
    folders.CHECKPOINT_SECONDS = 0
    study.estimate = lambda experiment, runs, data, eager: {run.path: 1.0 for run in runs}  # training begins at once
    for module, arguments in STUDY.items():
        sys.argv = [module.__file__, "--preset", "smoke", "--trials", "1", "--jobs", str(jobs), *arguments]
        study.command_line(module.main)


def test_a_study_killed_at_twenty_moments_equals_one_that_was_not(tmp_path, monkeypatch):
    """kill -9, and the same command again; when a study comes to its end, another one begins.

    Every other study trains its runs in worker processes, which end with the process that is killed.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))     # of the server, which imports torch once for all
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def start(folder, jobs):
        folder.mkdir(exist_ok=True)
        process = context.Process(target=do_study, args=(folder, jobs))
        process.start()
        return process

    def outcomes(folder):
        """What came out of each run, and the checksums of its files."""
        records = {path.relative_to(folder): folders.whole_run(path.parent) for path in folder.rglob("run.json")}
        return {path: (record["result"], record["sha256"]) for path, record in records.items()}

    whole, began = start(tmp_path / "whole", 1), time.perf_counter()
    whole.join()
    took, expected = time.perf_counter() - began, outcomes(tmp_path / "whole")
    assert whole.exitcode == 0 and len(expected) == 5
    moments, kills, studies, states = random.Random(0), 0, 0, set()
    while kills < 20:
        studies += 1
        folder = tmp_path / f"study{studies}"
        while True:
            process = start(folder, 1 + studies % 2)
            process.join(moments.uniform(0, took / 3) if kills < 20 else None)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            states.add((len(list(folder.rglob("checkpoint.pt"))), len(list(folder.rglob(".*")))))
        assert process.exitcode == 0 and outcomes(folder) == expected
        assert not [*folder.rglob("damaged-*"), *folder.rglob("checkpoint.pt")]
    assert len(states) > 1, "killed always in the same state"


# --- Disks ---------------------------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """A file system of its own: mounted(options) -> its folder. Root is needed for that."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            assert not os.environ.get("CI"), done.stderr
            pytest.skip(f"no file system can be mounted here: {done.stderr}")
        return folder
    yield mount
    subprocess.run(["umount", folder], check=False, capture_output=True)


TINY = ("--preset", "smoke", "--only", "256x4H", "--lambdas", 0, "--trials", 1, "--epochs", 2)


@pytest.mark.parametrize("jobs, trials", [(1, 1), (2, 2)])
def test_a_full_disk_loses_nothing_and_the_command_goes_on_when_there_is_room(script, mounted, jobs, trials):
    disk = mounted("size=9m")
    command = (*TINY, "--results", disk, "--jobs", jobs, "--trials", trials)
    (disk / "others").write_bytes(bytes(7_000_000))
    status, _, err = script(train_mlp_fmnist, *command)
    assert status == 2 and err.count("\n") == 1
    assert re.search(r"(weights\.pt|history\.npz) cannot be written: No space left on device", err)  # (two at once)
    assert not list(disk.rglob("*weights.pt*")) and not list(disk.rglob("run.json"))
    (disk / "others").unlink()
    assert script(train_mlp_fmnist, *command)[0] == 0
    assert len(list(disk.rglob("run.json"))) == trials


def test_a_read_only_disk(script, mounted):
    disk = mounted("ro")
    status, _, err = script(train_mlp_fmnist, *TINY, "--results", disk)
    assert status == 2 and err.count("\n") == 1
    assert err.startswith(f"error: {disk} cannot be written: Read-only file system")


# --- The same numbers every time -----------------------------------------------------------------


def test_deterministic_algorithms_are_enough_for_every_network(script):
    """None is missing, which would raise an error; on the CPU nothing changes by them."""
    records = []
    for flags in ((), ("--deterministic",)):
        for module, only in ((train_mlp_fmnist, "256x4H"), (train_densenet_cifar, "DN-Low"),
                             (train_convnet_cifar, "ConvNet-0.07M")):
            assert script(module, "--preset", "smoke", "--trials", 1, "--epochs", 1, "--methods", "joint", "bagging",
                          "--lambdas", 0.5, "--only", only, *flags)[0] == 0
        assert not (flags and torch.utils.deterministic.fill_uninitialized_memory)     # it would fill every new tensor
        torch.use_deterministic_algorithms(False)
        records.append({path: folders.read_run(path.parent) for path in Path("results").rglob("run.json")})
        shutil.rmtree("results")
    assert records[0].keys() == records[1].keys() and len(records[0]) == 6
    for path, record in records[0].items():
        assert record["sha256"] == records[1][path]["sha256"], path
        assert (record["machine"]["deterministic"], records[1][path]["machine"]["deterministic"]) == (False, True)


def test_an_operation_that_is_not_deterministic_gets_advice_that_fits():
    """In a network of one's own; the words are PyTorch's."""
    run = study.Run("test", "mine", "own", "joint", 0, 0, {"batch": 4}, False)
    error = ("avg_pool3d_backward_cuda does not have a deterministic implementation, but you set "
             "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, or")
    words = ("^own lambda 0 trial 0: --deterministic: avg_pool3d_backward_cuda does not have a deterministic "
             "implementation: use another operation in the network, or leave --deterministic out$")
    with pytest.raises(common.Refused, match=words), study.fix_told(run):
        raise RuntimeError(error)
