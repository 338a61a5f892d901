"""The test error of the members that are left of an ensemble when others are dropped."""

import robustness

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
