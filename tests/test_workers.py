"""Several processes at one study."""

import concurrent.futures
import fcntl
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import common
import train_mlp_fmnist

import numpy as np
import pytest

ROOT = Path(common.__file__).parent
SMALL = ("--preset", "smoke", "--only", "1x1024H", "256x4H", "--lambdas", "0", "1", "--methods",
         "joint", "stacking", "--trials", "1")


def command(folder, *more, threads=1):
    return subprocess.run([sys.executable, ROOT / "train_mlp_fmnist.py", *SMALL, *more], cwd=folder,
                          capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": str(threads)})


def arrays(results):
    return {path.relative_to(results): dict(np.load(path, allow_pickle=False))
            for path in sorted(results.rglob("history.npz"))}


def same(one, other):
    assert one.keys() == other.keys() and len(one) == 4
    for path, values in one.items():
        for key, value in values.items():
            np.testing.assert_array_equal(value, other[path][key], err_msg=f"{path} {key}")


def test_runs_at_once_equal_runs_one_after_the_other(tmp_path):
    """At the same thread count, to the bit, each trained once; stacking waits for its members."""
    for name, more, threads in (("one", (), 1), ("two", ("--jobs", "2"), 2)):
        (tmp_path / name).mkdir()
        done = command(tmp_path / name, *more, threads=threads)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("to do: about") == 1
        finished = re.findall(r"\] (.+): test error", done.stdout)
        assert sorted(finished) == ["1x1024H lambda 1 trial 0", "256x4H lambda 0 trial 0",
                                    "256x4H lambda 1 trial 0", "256x4H stacking trial 0"]
    same(*(arrays(tmp_path / name / "results") for name in ("one", "two")))
    record = common.read_run(tmp_path / "two/results/smoke/mlp_fmnist/1x1024H/joint-1/trial0")
    assert record["machine"]["threads"] == 1


def test_a_run_that_another_process_is_at_is_passed_over_until_that_is_gone(script, tmp_path,
                                                                           monkeypatch):
    folder = tmp_path / "results/smoke/mlp_fmnist/256x4H/joint-0/trial0"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        passed = []

        def nap(seconds):       # nothing else is left to do: the other process ends now
            passed.append(sorted(p.parent.parent.name for p in Path("results").rglob("run.json")))
            lock.close()
        monkeypatch.setattr(time, "sleep", nap)
        status, out, _ = script(train_mlp_fmnist, *SMALL)
    assert status == 0
    assert passed == [["joint-1", "joint-1"]]           # neither lambda 0 nor its stacking
    assert "waiting for 2 runs that other processes are at" in out
    assert len(list(Path("results").rglob("run.json"))) == 4
    assert not list(Path("results").rglob(".lock"))


def test_a_killed_process_leaves_its_run_to_the_others(tmp_path):
    began = subprocess.Popen([sys.executable, ROOT / "train_mlp_fmnist.py", *SMALL, "--epochs",
                              "100000"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob(".lock")):
        time.sleep(0.1)
    began.kill()
    began.communicate()
    assert command(tmp_path).returncode == 0
    assert len(list(tmp_path.rglob("run.json"))) == 4


def test_four_processes_at_one_folder_train_each_run_once(tmp_path):
    (tmp_path / "alone").mkdir()
    assert command(tmp_path / "alone").returncode == 0
    (tmp_path / "four").mkdir()
    with concurrent.futures.ThreadPoolExecutor(4) as four:
        done = list(four.map(lambda _: command(tmp_path / "four"), range(4)))
    assert [one.returncode for one in done] == [0] * 4, done
    trained = re.findall(r"\] (.+): test error", "".join(one.stdout for one in done))
    assert sorted(trained) == sorted(set(trained)) and len(trained) == 4
    same(arrays(tmp_path / "alone/results"), arrays(tmp_path / "four/results"))


def test_a_worker_that_fails_is_told(tmp_path):
    (tmp_path / "results/smoke/mlp_fmnist/1x1024H/joint-1/trial0").mkdir(parents=True)
    (tmp_path / "results/smoke/mlp_fmnist/1x1024H/joint-1/trial0/history.npz").mkdir()
    done = command(tmp_path, "--jobs", "2", threads=2)
    assert done.returncode == 2
    assert "history.npz cannot be written" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 500])
def test_shards_are_the_study_and_share_nothing(parts):
    experiment = train_mlp_fmnist.EXPERIMENT
    block = common.experiment_settings(common.load_preset("paper"), "paper", experiment)
    runs = common.list_runs("paper", experiment, block, {})
    shards = [common.shard(runs, part, parts) for part in range(parts)]
    assert sorted(run.path for shard in shards for run in shard) == sorted(r.path for r in runs)
    for shard in shards:
        there = {(run.configuration, run.trial) for run in shard if run.method_name == "joint-0"}
        assert {(r.configuration, r.trial) for r in shard if r.method == "stacking"} <= there
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 6                 # five trials of stacking ride along
