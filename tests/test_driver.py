"""run_all.sh as people start and stop it: shells, links, options, arrays, signals, a Python without the packages."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from study import folders

import pytest

DRIVER = folders.HERE / "run_all.sh"
NAMES = ("mlp_fmnist", "densenet_cifar", "convnet_cifar")
PYTHON = """#!/bin/bash
# A stand-in that writes down what it is called with. Training of the MLPs fails, or goes on until a signal comes.
here=${0%/*}
case $1 in
  -c|--version) exit ;;
  -) cat > /dev/null; echo smoke; exit ;;
esac
echo "${1##*/} ${*:2}" >> "$here/calls"
[[ $1 == *train_mlp_fmnist.py && $* != *--dry-run* && $* != *--fetch* ]] || exit 0
[ ! -e "$here/fail" ] || exit 2
[ -e "$here/wait" ] || exit 0
trap 'sleep 0.5; touch "$here/ended"; exit 143' TERM INT
touch "$here/begun"
while :; do sleep 0.05; done
"""


def outside(first="", **more):
    """The environment of a driver that SLURM has not started; a folder comes first on PATH, then this Python's."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    path = os.pathsep.join([str(first), str(Path(sys.executable).parent), os.environ["PATH"]])
    return own | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""} | more


def driver(folder, *arguments, shell="bash", program=DRIVER, **environment):
    return subprocess.run([shell, program, *arguments], capture_output=True, text=True, timeout=100, cwd=folder,
                          env=outside(**environment))


@pytest.fixture
def stand_in(tmp_path):
    """The folder of a python3 that is the stand-in; its `calls` are lines of what it was called with."""
    folder = tmp_path / "stand-in"
    folder.mkdir()
    (folder / "python3").write_text(PYTHON)
    (folder / "python3").chmod(0o755)
    return folder


def test_any_shell_and_a_link_start_it(tmp_path):
    (tmp_path / "link").symlink_to(DRIVER)
    one, *others = (driver(tmp_path, "--help"), driver(tmp_path, "--help", shell="sh"),
                    driver(tmp_path, "--help", program="link"))
    assert one.returncode == 0 and one.stdout.startswith("Regenerates the paper's") and "SLURM array" in one.stdout
    assert all((other.returncode, other.stdout, other.stderr) == (0, one.stdout, "") for other in others)


@pytest.mark.parametrize("arguments, words", [
    (["quik", "--jobs=2"], "did you mean quick?"), (["quick", "smoke"], "one preset at a time")])
def test_it_refuses_in_one_line_before_any_stage(tmp_path, arguments, words):
    done = driver(tmp_path, *arguments)
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1 and words in done.stderr
    assert not list(tmp_path.iterdir())


def test_why_a_python_does_not_do_is_told(tmp_path):
    """Here numpy is missing; pip, which would set up .venv, fails."""
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy')")
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'pip' in sys.orig_argv: sys.exit('no network')")
    (package := tmp_path / "package").mkdir()
    for name in ("run_all.sh", "common.py", "requirements.txt"):
        shutil.copy(folders.HERE / name, package)
    done = driver(tmp_path, "smoke", program=package / "run_all.sh", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and "setting up .venv" in done.stdout and "no numpy" in done.stdout
    assert "could not be installed into .venv: the lines above say why" in done.stderr and "no network" in done.stderr


def test_each_script_gets_the_options_that_it_knows(tmp_path, stand_in):
    options = ["--results=r", "--figures-dir", "f", "--jobs", "2", "--set", "a=1", "b=2", "--eager"]
    done = driver(tmp_path, "smoke", *options, first=stand_in)
    assert done.returncode == 0 and "== robustness" in done.stdout, done.stderr
    calls = (stand_in / "calls").read_text().splitlines()
    flags = "--preset smoke --results r --jobs 2 --set a=1 b=2 --eager"
    assert calls == [
        f"train_mlp_fmnist.py {flags} --fetch", f"train_densenet_cifar.py {flags} --fetch",
        *(f"train_{name}.py {flags} --dry-run" for name in NAMES), *(f"train_{name}.py {flags}" for name in NAMES),
        "robustness.py --preset smoke --figure 7 8 --results r --jobs 2",
        "make_figures.py --preset smoke --results r --figures-dir f"]


def test_a_task_of_an_array_trains_its_part_and_draws_nothing(tmp_path, stand_in):
    array = {"ID": "6", "MIN": "2", "STEP": "2", "COUNT": "4"}
    array = {f"SLURM_ARRAY_TASK_{key}": value for key, value in array.items()}
    done = driver(tmp_path, "paper", first=stand_in, **array)
    calls = [call for call in (stand_in / "calls").read_text().splitlines() if "--fetch" not in call]
    assert done.returncode == 0 and calls == [f"train_{name}.py --preset smoke --shard 2/4" for name in NAMES]


def test_a_stage_that_fails_stops_no_other_and_is_named_at_the_end(tmp_path, stand_in):
    (stand_in / "fail").touch()
    done = driver(tmp_path, "smoke", first=stand_in)
    assert done.returncode == 1 and "== figures and verdicts" in done.stdout
    assert re.search(r"NOT COMPLETE after .* failed:\n  MLPs on Fashion-MNIST \(exit status 2\)\nfinished", done.stdout)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_to_the_driver_ends_what_it_has_started(tmp_path, stand_in, heed_ctrl_c, number, status):
    """Sent to the driver alone, as by a scheduler or `docker stop`. It waits for Python, here the stand-in, to end."""
    (stand_in / "wait").touch()
    started = subprocess.Popen(["bash", DRIVER, "smoke"], stdout=subprocess.DEVNULL, env=outside(stand_in),
                               cwd=tmp_path, preexec_fn=heed_ctrl_c, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not (stand_in / "begun").exists():
            assert time.monotonic() < until and started.poll() is None
            time.sleep(0.02)
        started.send_signal(number)
        assert started.wait(60) == status and (stand_in / "ended").exists()
    finally:
        started.kill()
    assert (stand_in / "calls").read_text().endswith("train_mlp_fmnist.py --preset smoke\n")
