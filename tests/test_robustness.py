"""The test error of the members that are left of an ensemble when others are dropped."""

import os
import shutil
from pathlib import Path

import common
import robustness
from study import folders

import numpy as np
import pytest
import torch

N, M, K = 700, 6, 4


@pytest.fixture(scope="module")
def trained():
    """Member logits (N, M, K) and targets (N,) of an ensemble that is better than its members."""
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(N, M, K, generator=g), torch.randint(K, (N,), generator=g)
    logits[torch.arange(N), :, targets] += 0.5
    return logits, targets


def error(logits, targets):
    return (logits.argmax(1) != targets).double().mean().item()


@pytest.mark.parametrize("drop", robustness.DROPS)
def test_a_curve_begins_with_the_ensembles_error_and_ends_with_a_members(trained, drop):
    logits, targets = trained
    curve = robustness.repeat(logits, targets, drop, torch.Generator().manual_seed(1))
    assert curve.shape == (M,) and curve[0].item() == error(logits.mean(1), targets)
    alone = [error(logits[:, m], targets) for m in range(M)]
    assert curve[-1].item() == pytest.approx(sum(alone) / M, abs=0.05)
    assert (curve[-1].item() in alone) == (drop == "set")           # that of one member for all examples


def test_the_first_s_members_of_an_order_are_averaged(trained):
    logits, targets = trained
    order = torch.rand(N, M, generator=torch.Generator().manual_seed(2)).argsort(1)
    wrong = robustness.wrong_by_survivors(logits, targets, order)
    assert wrong.shape == (N, M)
    for example in (0, 499, 500, 699):                                      # blocks end at 500
        for survivors in range(1, M + 1):
            left = logits[example, order[example, :survivors]].mean(0)
            assert wrong[example, survivors - 1] == (left.argmax() != targets[example])


@pytest.mark.skipif(not os.environ.get("CI") and not common.DATASETS["Fashion-MNIST"].system.is_dir(),
                    reason="Fashion-MNIST is not installed")
def test_the_committed_networks_give_the_committed_curve(script, tmp_path):
    """As ARTIFACT.md has it; on another processor an image of 10,000 may fall on the other side."""
    kept, run = folders.HERE / "expected/paper/results/paper", Path("256x4H/joint-1/trial0")
    shutil.copytree(kept / "mlp_fmnist" / run, tmp_path / "results/paper/mlp_fmnist" / run)
    assert script(robustness, "--preset", "paper")[0] == 0
    here, theirs = (folders.load_history(place / "robustness-example" / run)["error"]
                    for place in (tmp_path / "results/paper", kept))
    assert np.abs(here - theirs).max() < 5.5e-4
    whole, half = 100 * theirs.mean(0)[[0, 128]]
    said = f"lambda 1 trial 0: test error {whole:.2f} % with all members, {half:.2f} % with about half of them"
    assert said in (folders.HERE / "ARTIFACT.md").read_text()
