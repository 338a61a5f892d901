"""run_all.sh and the scripts as people start and stop them: shells, links, signals, users, locales, closed outputs."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import folders
import make_figures

import pytest

DRIVER = folders.HERE / "run_all.sh"
HOME = Path(sys.executable).parent


def outside(**more):
    """The environment of a driver that SLURM has not started, with this Python first."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return own | {"PATH": os.pathsep.join([str(HOME), os.environ["PATH"]]), "CUDA_VISIBLE_DEVICES": ""} | more


def driver(*arguments, shell="bash", program=DRIVER, **environment):
    return subprocess.run([shell, program, *arguments], capture_output=True, text=True, timeout=100,
                          env=outside(**environment))


def refusal(done):
    assert done.returncode == 2 and not done.stdout and done.stderr.count("\n") == 1, (done.stdout, done.stderr)
    return done.stderr


# --- Where people are ----------------------------------------------------------------------------


def test_any_shell_and_a_link_start_it(tmp_path):
    link = tmp_path / "regenerate"
    link.symlink_to(DRIVER)
    one, *others = (driver("--help"), driver("--help", shell="sh"), driver("--help", program=link),
                    driver("--help", CDPATH=str(tmp_path)))
    assert one.returncode == 0 and "Regenerates the paper's" in one.stdout
    assert all((other.returncode, other.stdout, other.stderr) == (0, one.stdout, "") for other in others)


def test_a_value_may_stand_behind_an_equals_sign():
    assert "unknown value of --device 'gpu'" in refusal(driver("smoke", "--device=gpu"))
    assert "unknown option --bogus" in refusal(driver("smoke", "--bogus=1"))


@pytest.mark.parametrize("bad", ["--jobs=x", "--seed=-1", "--data=fake"])
def test_a_bad_value_is_refused_before_any_stage(bad):
    option, _, value = bad.partition("=")
    assert option in (said := refusal(driver("smoke", bad))) and f"'{value}'" in said


def test_sbatch_is_named_under_slurm_alone(tmp_path):
    copy = shutil.copy(DRIVER, tmp_path / "slurm_script")
    assert refusal(driver(program=copy)) == f"error: {tmp_path} is not the package's folder\n"
    assert "call sbatch in that folder" in refusal(driver(program=copy, SLURM_JOB_ID="1"))


@pytest.mark.parametrize("tasks, count", [("0 7", 3), ("3 9", 2)])
def test_an_array_with_gaps_is_refused_before_anything_else(tasks, count):
    first, last = tasks.split()
    for task in (first, last):
        array = {"ID": task, "MIN": first, "MAX": last, "STEP": "1", "COUNT": str(count)}
        said = refusal(driver("paper", **{f"SLURM_ARRAY_TASK_{key}": value for key, value in array.items()}))
        assert f"this array of {count} tasks has gaps between {first} and {last}" in said


def test_why_a_python_does_not_fit_is_told(tmp_path):
    """Here it has another numpy; pip, which would set up .venv, fails."""
    (tmp_path / "numpy.py").write_text("__version__ = '1.26.4'")
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'pip' in sys.orig_argv: sys.exit('no network')")
    package = tmp_path / "package"
    package.mkdir()
    for name in ("run_all.sh", "common.py", "requirements.txt"):
        shutil.copy(folders.HERE / name, package)
    done = driver("smoke", program=package / "run_all.sh", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and re.search(r"the active Python \(Python 3\S+\) does not fit: .*numpy", done.stdout)
    assert "could not be installed into .venv: the lines above say why" in done.stderr and "no network" in done.stderr


def test_a_user_without_a_name_and_jupyters_backend(tmp_path):
    """As with `docker run -u`, and in a notebook's terminal."""
    names = ("USER", "LOGNAME", "LNAME", "USERNAME")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    somebody = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    there = shutil.which("setpriv") and os.getuid() == 0 and not subprocess.run(
        [*somebody, sys.executable, "-c", ""], capture_output=True).returncode
    done = subprocess.run([*(somebody if there else []), sys.executable, make_figures.__file__, "fig99"],
                          capture_output=True, text=True, env=environment | {"HOME": "/nonexistent"}, cwd=tmp_path)
    assert done.returncode == 2 and "unknown figure or table '99'" in done.stderr, done.stderr


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"},
                                    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str)
def test_any_locale_does(tmp_path, locale):
    """Files are UTF-8; a λ that the terminal does not have becomes a question mark."""
    code = ("import sys, study, make_figures; sys.argv[1:] = ['table2', '--preset', 'quick', '--results', "
            f"'{folders.HERE}/expected/quick/results', '--figures-dir', '{tmp_path}']; "
            "study.command_line(lambda: print('\\u03bb \\u00b1') or make_figures.main())")
    done = subprocess.run([sys.executable, "-c", code], cwd=folders.HERE, capture_output=True, env=os.environ | locale)
    assert done.returncode == 0 and done.stdout.split(b"\n")[0] in (b"? ?", "λ ±".encode()), done.stderr
    assert "λ" in (tmp_path / "quick/table2.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_output_ends_nothing(tmp_path, closed):
    done = subprocess.run(["bash", "-c", f'"$@" {closed}>&-', "bash", sys.executable, make_figures.__file__, "table4",
                           "--preset", "smoke", "--figures-dir", tmp_path])
    assert done.returncode == 0 and (tmp_path / "smoke/table4.md").is_file()


@pytest.mark.parametrize("arguments", [["table4", "--preset", "smoke"], ["--help"]])
def test_a_full_output_ends_in_one_line(tmp_path, arguments):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, make_figures.__file__, *arguments, "--figures-dir", tmp_path],
                              stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left on device" in done.stderr


# --- Signals to the driver -----------------------------------------------------------------------

PYTHON = """#!/bin/bash
case $1 in
  -) cat > /dev/null; [ -z "$3" ] || echo "$2" ;;               # has it the packages? which preset?
  train_mlp_fmnist.py) [[ $* == *--dry-run* || $* == *--fetch* ]] || {
    trap 'sleep 0.5; touch "${0%/*}/ended"; exit 143' TERM INT
    touch "${0%/*}/begun"
    while :; do sleep 0.05; done; } ;;
esac
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_to_the_driver_ends_what_it_has_started(tmp_path, heed_ctrl_c, number, status):
    """Sent to the driver alone, as by a scheduler or `docker stop`. It waits for Python, here a stand-in, to end."""
    python, log = tmp_path / "python3", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o755)
    with open(log, "w") as file:
        started = subprocess.Popen(
            ["bash", DRIVER, "smoke", "--results", tmp_path / "results"], stdout=file, stderr=subprocess.STDOUT,
            preexec_fn=heed_ctrl_c, start_new_session=True,
            env=outside(PATH=os.pathsep.join([str(tmp_path), os.environ["PATH"]])))
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < until and started.poll() is None
            time.sleep(0.02)
        started.send_signal(signal.SIGTSTP)                     # Ctrl-Z, and then fg
        while Path(f"/proc/{started.pid}/stat").read_text().split()[2] != "T":
            assert time.monotonic() < until
            time.sleep(0.02)
        started.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        assert started.poll() is None
        started.send_signal(number)
        assert started.wait(60) == status and (tmp_path / "ended").exists()
    finally:
        started.kill()
    assert "== MLPs on Fashion-MNIST" in log.read_text() and "== DenseNets on CIFAR-100" not in log.read_text()
