"""The README's commands are understood, and its examples work as they stand."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import claims
import common
import make_figures
import robustness
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist

import numpy as np
import pytest
import yaml

ROOT = Path(common.__file__).parent
README = (ROOT / "README.md").read_text()
TRAINING = {"train_mlp_fmnist.py": train_mlp_fmnist,
            "train_densenet_cifar.py": train_densenet_cifar,
            "train_convnet_cifar.py": train_convnet_cifar}
SCRIPTS = TRAINING | {"robustness.py": robustness, "make_figures.py": make_figures,
                      "claims.py": claims}
COMMANDS = sorted(set(re.findall(r"`python (\w+\.py[^`]*)`", README)))


@pytest.mark.parametrize("command", [c for c in COMMANDS if "mystudy" not in c])
def test_commands_are_understood(script, command):
    name, *arguments = shlex.split(command)
    plan = ["--dry-run"] if name in TRAINING else []
    status, out, err = script(SCRIPTS[name], *arguments, *plan)
    said = {"robustness.py": "no trained weights", "make_figures.py": "NOT DRAWN",
            "claims.py": "NOT DRAWN"}
    said = "to do" if name in TRAINING else said[name]
    if set(arguments) & {"table1", "table3"}:                   # which need no runs
        said = f"figures: complete: {arguments[0]}"
    if "--compare" in arguments:                                # the copy has no expected/
        said = "expected/quick is not a folder"
    assert said in out + err, (status, out, err)


def test_presets_are_those_of_the_file():
    named = set(re.findall(r"bash run_all\.sh (\w+)", README)) - {"test"}
    assert named == set(yaml.safe_load((ROOT / "presets.yaml").read_text()))


def test_every_file_of_the_table_exists():
    named = re.findall(r"^\| `([\w/.]+)` \| ", README, re.M)
    assert len(named) >= 8 and all((ROOT / name).is_file() for name in named)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with the README's own study in it, as the README says to put it there."""
    folder = tmp_path_factory.mktemp("copy")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.yaml")):
        shutil.copy(path, folder)
    script, dataset = re.findall(r"```python\n(.*?)```", README, re.S)
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (folder / "train_mystudy.py").write_text(script)
    paper, others = (folder / "presets.yaml").read_text().split("  robustness:", 1)
    (folder / "presets.yaml").write_text(f"{paper}{block}  robustness:{others}")
    before, after = script.split("EXPERIMENT =")
    (folder / "train_mine.py").write_text(f"{before}{dataset}\n\nEXPERIMENT ={after}")
    with open(folder / "presets.yaml", "a") as file:                      # on the data set's size
        file.write("\nmine: {mystudy: {dataset: mine, train: 600, validation: 200}}\n")
    return folder


def run(folder, *arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_study_of_ones_own(copy):
    out = run(copy, "train_mystudy.py", "--preset", "quick", "--data", "synthetic", "--epochs", "2",
              "--trials", "1", "--set", "train=1000", "validation=500", "test=500")
    assert "4 runs, 0 finished, 4 to do" in out and "4xCNN stacking trial 0: test error" in out
    out = run(copy, "robustness.py", "--preset", "quick")
    assert "4xCNN lambda 1 trial 0: test error" in out
    history = common.load_history(copy / "results/quick/mystudy/4xCNN/joint-0.9/trial0")
    assert history["validation_member_error"].shape == (2, 4)


def test_a_data_set_of_ones_own(copy):
    g = np.random.default_rng(0)
    y = g.integers(3, size=1200)
    x = (g.random((1200, 3, 16, 16)) * 100 + 50 * y[:, None, None, None]).astype(np.uint8)
    (copy / "mine").mkdir()
    np.savez(copy / "mine" / "mine.npz", x=x[:900], y=y[:900], test_x=x[900:], test_y=y[900:])
    out = run(copy, "train_mine.py", "--preset", "mine", "--data", "real", "--data-dir", "mine",
              "--lambdas", "0.9", "--methods", "joint", "--trials", "1")
    error = float(re.search(r"test error ([\d.]+) %", out)[1])
    assert "with mine (real; mine)" in out and error < 20
