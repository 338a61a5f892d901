"""Several runs at once: processes that share a study, what they leave, how they end, and what is said of them."""

import concurrent.futures
import contextlib
import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import study
import common
import folders
import presets
import robustness
import train_mlp_fmnist

import pytest
import torch

SCRIPT = [sys.executable, train_mlp_fmnist.__file__, "--preset", "smoke"]
SMALL = ("--only", "1x1024H", "256x4H", "--lambdas", "0", "1", "--methods", "joint", "stacking", "--trials", "1")
LABELS = ["1x1024H lambda 1 trial 0", "256x4H lambda 0 trial 0", "256x4H lambda 1 trial 0", "256x4H stacking trial 0"]


def command(folder, *more, cores=1):
    """Gives a command in a folder, as on a machine with so many cores."""
    folder.mkdir(exist_ok=True)
    return subprocess.run([*SCRIPT, *more], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(cores)})


def trained(done):
    """The labels of the runs that a command trained, in order of their names."""
    assert done.returncode == 0, done.stderr
    return sorted(re.findall(r"\] (.+): test error", done.stdout))


def outcomes(folder):
    """What came out of each run, and the checksums of its files."""
    records = {path.parent.relative_to(folder): folders.whole_run(path.parent) for path in folder.rglob("run.json")}
    return {path: (record["result"], record["sha256"]) for path, record in records.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What SMALL leaves if one process trains one run after the other."""
    folder = tmp_path_factory.mktemp("alone")
    assert trained(command(folder, *SMALL, "--jobs", "1")) == LABELS
    assert len(outcomes(folder)) == 4
    return outcomes(folder)


# --- What is trained -----------------------------------------------------------------------------


def test_runs_at_once_equal_runs_one_after_the_other(alone, tmp_path):
    """To the bit, each trained once, though the machine has more cores; stacking waits for its members."""
    done = command(tmp_path, *SMALL, "--jobs", "2", cores=2)
    assert trained(done) == LABELS and "\n  2 at once on " in done.stdout
    assert outcomes(tmp_path) == alone
    assert {folders.read_run(path.parent)["machine"]["threads"] for path in tmp_path.rglob("run.json")} == {1}


def test_measurements_at_once_equal_those_one_after_the_other(tmp_path, script):
    assert script(train_mlp_fmnist, "--preset", "smoke", "--figure", 7, "--trials", 1, "--epochs", 1)[0] == 0
    left = []
    for jobs in (1, 2):
        status, out, _ = script(robustness, "--preset", "smoke", "--jobs", jobs)
        assert status == 0 and out.count("with all members") == 3 and "[3/3]" in out
        folder = Path("results/smoke/robustness-example")
        left.append(outcomes(folder))
        folder.rename(f"{jobs}")
    assert left[0] == left[1] and len(left[0]) == 3


def test_threads_per_run_share_the_cores(tmp_path):
    done = command(tmp_path, "--only", "16x64H", "--trials", "1", "--lambdas", "0", "1", "--epochs", "1",
                   "--threads", "2", cores=2)
    assert trained(done) == ["16x64H lambda 0 trial 0", "16x64H lambda 1 trial 0"]
    assert "\n  1 at once on " in done.stdout and "2 threads per run: last digits differ" in done.stdout
    assert {folders.read_run(path.parent)["machine"]["threads"] for path in tmp_path.rglob("run.json")} == {2}


def test_four_commands_at_one_folder_train_each_run_once(alone, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as four:
        done = list(four.map(lambda jobs: command(tmp_path, *SMALL, "--jobs", str(jobs)), (1, 1, 2, 2)))
    assert sorted(label for one in done for label in trained(one)) == LABELS
    assert outcomes(tmp_path) == alone


def test_a_run_that_another_process_trains_is_passed_over_until_that_ends(script, tmp_path, monkeypatch):
    folder = tmp_path / "results/smoke/mlp_fmnist/256x4H/joint-0/trial0"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        passed, began = [], time.perf_counter()

        def nap(seconds):       # nothing else is left to do: half a minute later the other process ends
            passed.append(sorted(path.parent.parent.name for path in Path("results").rglob("run.json")))
            monkeypatch.setattr(time, "perf_counter", lambda: began + 100)
            if len(passed) == 2:
                lock.close()
        monkeypatch.setattr(time, "sleep", nap)
        status, out, _ = script(train_mlp_fmnist, "--preset", "smoke", *SMALL)
    assert status == 0 and passed == 2 * [["joint-1", "joint-1"]]   # neither lambda 0 nor its stacking
    assert re.search(r"^\[2/4\] waiting for runs that other processes train, about", out, re.M)
    assert len(list(Path("results").rglob("run.json"))) == 4 and not list(Path("results").rglob(".lock"))


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)
    runs, done = [study.Run("p", "e", "c", "joint", 0.0, trial, {}, False) for trial in (0, 1)], []
    folders.run_missing(runs, tmp_path, done.append)
    assert done == runs
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"WARNING: {tmp_path} is on a file system without locks (Function not") and "--shard" in line


def test_without_locks_one_process_trains(script, monkeypatch):
    """They share the runs out among several."""
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr(fcntl, "flock", flock)
    status, _, err = script(train_mlp_fmnist, "--preset", "smoke", *SMALL, "--jobs", 2)
    assert status == 2 and err.count("\n") == 1 and "without locks (Function not" in err and "--jobs 1" in err
    assert script(train_mlp_fmnist, "--preset", "smoke", *SMALL, "--jobs", 1)[0] == 0


def test_the_lock_of_another_user_is_passed_over(tmp_path, monkeypatch):
    """It may be read and not written."""
    run = study.Run("p", "e", "c", "joint", 0.0, 0, {}, False)
    (tmp_path / run.path).mkdir(parents=True)
    (tmp_path / run.path / ".lock").touch()

    def open_to_read(path, mode="r", **options):
        if mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, mode, **options)
    monkeypatch.setattr(folders, "open", open_to_read, raising=False)
    with open(tmp_path / run.path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with folders.lock(run, tmp_path) as mine:
            assert not mine
    with folders.lock(run, tmp_path) as mine:
        assert mine


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    run = study.Run("p", "e", "c", "joint", 0.0, 0, {}, False)
    folder = tmp_path / run.path
    folder.mkdir(parents=True)
    for name in (".weights.pt.4711", ".checkpoint.pt.12", "checkpoint.pt", "damaged-1-checkpoint.pt"):
        (folder / name).touch()
    there = []
    folders.run_missing([run], tmp_path, lambda run: there.extend(sorted(path.name for path in folder.iterdir())))
    assert there == [".lock", "checkpoint.pt", "damaged-1-checkpoint.pt"]


def test_nobody_waits_for_a_run_that_nobody_trains(tmp_path):
    """Stacking whose members were removed after the plan was made."""
    run = study.Run("p", "e", "c", "stacking", 0.0, 0, {}, False)
    with pytest.raises(common.Refused, match=r"^c stacking trial 0 needs a run that is not finished and that nobody"):
        folders.run_missing([run], tmp_path, pytest.fail, ready=lambda run: False)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 500])
def test_shards_are_the_study_and_share_nothing(parts):
    experiment = train_mlp_fmnist.EXPERIMENT
    block = presets.experiment_settings(presets.load_preset("paper"), "paper", experiment.name)
    runs = study.list_runs("paper", experiment, block, {})
    shards = [study.shard(runs, part, parts) for part in range(parts)]
    assert sorted(run.path for shard in shards for run in shard) == sorted(run.path for run in runs)
    for shard in shards:
        there = {(run.configuration, run.trial) for run in shard if run.method_name == "joint-0"}
        assert {(run.configuration, run.trial) for run in shard if run.method == "stacking"} <= there
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 6                 # five trials of stacking go with their members


def test_a_part_without_runs_is_said(tmp_path):
    done = command(tmp_path, "--shard", "99/100")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "mlp_fmnist: no run of this selection is in part 99/100\n"
    assert not list(tmp_path.iterdir())


# --- How it ends ---------------------------------------------------------------------------------


def processes():
    """The parent of each process of this machine that is no zombie (who inherits one may not wait for it)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):          # it has just ended
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


@pytest.fixture(params=[2])
def training(request, tmp_path, heed_ctrl_c):
    """A command that trains, one run or two at once, for as long as it is let, in a group as on a terminal."""
    command = [*SCRIPT, "--only", "16x64H", "--epochs", "100000", "--jobs", str(request.param)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_ctrl_c, start_new_session=True)
    assert any("epoch" in line for line in process.stdout)
    workers = {child for child, parent in processes().items() if parent == process.pid}
    assert len(workers) == (request.param if request.param > 1 else 0)
    yield process, workers
    process.kill()
    process.communicate()


@pytest.mark.parametrize("training, send", [(1, os.kill), (2, os.kill), (2, os.killpg)], indirect=["training"])
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_and_its_workers(training, tmp_path, send, number, status):
    process, workers = training
    send(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and err.startswith("\nstopped; ") and err.count("\n") == 2
    assert "finished runs are kept" in err and "give the same command again to go on" in err
    assert not workers & set(processes())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]     # no half-written file, no lock


def test_a_killed_command_takes_its_workers_with_it_and_leaves_its_runs_to_the_next(training, tmp_path):
    process, workers = training
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while workers & set(processes()):
        assert time.monotonic() < deadline, "a worker goes on without its parent"
        time.sleep(0.1)
    done = command(tmp_path, "--only", "16x64H", "--trials", "1", "--epochs", "1", cores=2)
    assert len(trained(done)) == 7 and f"\n  {min(2, os.cpu_count())} at once on " in done.stdout


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_worker_that_is_killed_ends_the_command_in_one_line(training, number, status):
    process, workers = training
    os.kill(min(workers), number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2 and err.count("\n") == 1
    assert f"ended with status {status} " in err and "fewer --jobs" in err and "give the same command again" in err
    assert not workers & set(processes())


def test_a_signal_that_comes_while_workers_are_forked_is_not_lost(tmp_path):
    code = ("import os, signal, study, train_mlp_fmnist; "
            "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM)); "
            "study.command_line(train_mlp_fmnist.main)")
    command = [sys.executable, "-c", code, *SCRIPT[2:], "--only", "16x64H", "--jobs", "2", "--epochs", "100000"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(folders.HERE)})
    assert done.returncode == 143 and done.stderr.startswith("\nstopped; ") and done.stderr.count("\n") == 2


def test_a_worker_that_fails_ends_the_command_in_one_line(tmp_path):
    blocked = tmp_path / "results/smoke/mlp_fmnist/1x1024H/joint-1/trial0/history.npz"
    blocked.mkdir(parents=True)
    done = command(tmp_path, *SMALL, "--jobs", "2")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "history.npz cannot be written: Is a directory" in done.stderr


# --- How many at once, and for how long ----------------------------------------------------------


@pytest.mark.parametrize("runs, jobs, cores, gigabytes, device, at_once", [
    (5, None, 3, 100, "cpu", 3),        # as many as there are cores
    (2, None, 3, 100, "cpu", 2),        # and runs,
    (5, None, 3, 3.1, "cpu", 2),        # and as memory allows: here 1 GB each, and half for what goes with it
    (5, None, 3, 0.1, "cpu", 1),
    (0, None, 3, 100, "cpu", 1),
    (5, 4, 3, 0.1, "cpu", 4),           # unless --jobs says,
    (2, 4, 3, 100, "cpu", 2),           # as far as there are runs
    (5, None, 3, 100, "cuda", 1)])
def test_runs_at_once(monkeypatch, runs, jobs, cores, gigabytes, device, at_once):
    monkeypatch.setattr(study, "bytes_saved_for_backward", lambda build, settings, shape, classes: settings["needs"])
    monkeypatch.setattr(Path, "read_text", lambda path: f"MemAvailable:   {gigabytes * 1e9 / 1024:.0f} kB\n")
    some = [study.Run("p", "e", f"{i}", "joint", 0, 0, {"needs": 1e9 if i == 1 else 1e3}, False) for i in range(runs)]
    data = common.Data({}, "", 10, *[torch.zeros(1, 1, 2, 2, device="meta")] * 6)
    monkeypatch.setattr(common.Data, "device", torch.device(device))
    assert study.runs_at_once(train_mlp_fmnist.EXPERIMENT, some, lambda run: data, jobs, cores) == at_once


@pytest.fixture
def clock(monkeypatch):
    """The time as time.perf_counter has it, in a list: a test sets it."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def finish(folder, *paths):
    """Makes the folders of finished runs."""
    for path in paths:
        (folder / path).mkdir(parents=True)
        (folder / path / "run.json").touch()


def test_progress_in_a_log(tmp_path, clock, capsys):
    """A line for each run that ends, and every half minute one of those that train."""
    progress = study.Progress({"a": 10.0, "b": 30.0, "c": 60.0}, tmp_path, jobs=2)
    progress("a", 0.4, "a: epoch 2/5", step=0.4)    # too early to know more than the costs, two at once
    assert capsys.readouterr().out == "[0/3] a: epoch 2/5, about 48 s left\n"
    clock[0] += 20
    finish(tmp_path, "a")
    progress("a", 1, "", "a: test error 9 %")       # 20 s for a cost of 10; 90 are left
    assert capsys.readouterr().out == "[1/3] a: test error 9 %, about 3 min left\n"
    clock[0] += 20
    progress("b", 0.8, "b: epoch 4/5", step=0.5)    # 40 s for a cost of 10 + 15 here; 6 + 60 are left
    assert capsys.readouterr().out == "[1/3] b: epoch 4/5, about 2 min left\n"
    clock[0] += 20
    finish(tmp_path, "c")                           # by another command
    progress("b", 0.9, "b: epoch 9/10", step=0.1)   # too early for another line
    finish(tmp_path, "b")
    progress("b", 1, "", "b: test error 8 %")
    assert capsys.readouterr().out == "[3/3] b: test error 8 %, about 0 s left\n"


def test_a_run_that_has_begun_is_shown_before_it_has_anything_to_report(tmp_path, clock, capsys):
    """Stacking has no epochs, and an epoch of a large network takes minutes."""
    progress = study.Progress({"a": 10.0, "b": 10.0}, tmp_path, jobs=1)
    progress("a", 0, "a: started", None, 0)
    assert capsys.readouterr().out == "[0/2] a: started, about 20 s left\n"
    clock[0] += 31
    progress(None, 0, "")                           # another of our processes waits for it
    assert capsys.readouterr().out == "[0/2] a: started, about 20 s left\n"
    finish(tmp_path, "a")
    progress("a", 1, "", "a: test error 9 %")
    assert capsys.readouterr().out == "[1/2] a: test error 9 %, about 31 s left\n"


def test_a_run_that_is_made_anew_counts_once_it_is_written(tmp_path, clock, capsys):
    finish(tmp_path, "a")                           # damaged, or without the weights it must keep
    progress = study.Progress({"a": 10.0, "b": 10.0}, tmp_path, jobs=1)
    progress("a", 0.5, "a: epoch 1/2", step=0.5)
    os.utime(tmp_path / "a" / "run.json", ns=(1, 1))
    progress("a", 1, "", "a: test error 9 %")
    progress(None, 0, "")                           # another process trains b
    assert capsys.readouterr().out == "".join(f"{line} left\n" for line in (
        "[0/2] a: epoch 1/2, about 15 s", "[1/2] a: test error 9 %, about 10 s"))
    clock[0] += 31
    progress(None, 0, "")
    assert capsys.readouterr().out.startswith("[1/2] waiting for runs that other processes train, about ")


def test_the_time_left_is_right(tmp_path, clock, capsys):
    """Four runs of three epochs of 10 s, whose cost was taken for 3 s; two epochs of the first were trained before."""
    settings = {"epochs": 3, "validation": 1, "members": 2}
    runs = [study.Run("p", "e", "c", "joint", 0.0, trial, settings, False) for trial in range(4)]
    progress = study.Progress({run.path: 3.0 for run in runs}, tmp_path, jobs=1)
    for run in runs:
        report = study.told(run, progress)
        progress(run.path, 0, "started", None, 0)
        for epoch in (1, 2, 3) if run.trial else (3,):
            clock[0] += 10
            report(epoch, [({}, {"ensemble_error": 0.1})])
        finish(tmp_path, run.path)
        progress(run.path, 1, "", "end")
    assert re.findall("end, about (.+) left", capsys.readouterr().out) == ["90 s", "60 s", "30 s", "0 s"]


def test_progress_on_a_terminal(tmp_path, clock, capsys, monkeypatch):
    """One line that is written over and never longer than the terminal is wide; what is to stay goes above it."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    progress = study.Progress({"a": 10.0, "b": 10.0}, tmp_path, jobs=1)
    progress("a", 0.5, "a: epoch 1/2", step=0.5)
    progress("b", 0.5, "b: epoch 1/2", step=0.5)
    finish(tmp_path, "a")
    progress("a", 1, "", "a: test error 9 %")
    assert capsys.readouterr().out == "".join("\r\033[K" + line for line in (
        "[0/2] a: epoch 1/2, about 15 ", "[0/2] a: epoch 1/2; b: epoch ", "[1/2] a: test error 9 %, about 5 s left\n",
        "[1/2] b: epoch 1/2, about 5 s"))


def test_nothing_is_left_on_the_last_line_of_a_terminal(script, monkeypatch):
    """Where the prompt, or an error, comes next."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    small = ("--preset", "smoke", "--only", "16x64H", "--trials", 1, "--epochs", 1, "--lambdas", 0)
    assert script(train_mlp_fmnist, *small)[1].endswith(("\n", "\033[K"))
    (Path("blocked") / next(Path("results").rglob("history.npz")).relative_to("results")).mkdir(parents=True)
    status, out, _ = script(train_mlp_fmnist, *small, "--results", "blocked")
    assert status == 2 and "epoch 1/1" in out and out.endswith(("\n", "\033[K"))
