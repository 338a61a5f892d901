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
def test_nothing_dropped_is_the_ensembles_own_error(trained, drop):
    curve = robustness.repeat(*trained, drop, torch.Generator().manual_seed(1))
    assert curve.shape == (M,) and curve[0].item() == error(trained[0].mean(1), trained[1])


def test_single_survivors_have_the_mean_member_error(trained):
    """Over M orders, in each of which another member comes first; repeat has one survivor at the end of its curve."""
    logits, targets = trained
    orders = [torch.arange(M).roll(-shift).expand(N, -1) for shift in range(M)]
    alone = [robustness.wrong_by_survivors(logits, targets, order)[:, 0].double().mean().item() for order in orders]
    assert alone == [error(logits[:, m], targets) for m in range(M)]
    assert robustness.repeat(*trained, "set", torch.Generator().manual_seed(1))[-1].item() in alone


def test_the_first_s_members_of_an_order_are_averaged(trained):
    logits, targets = trained
    order = torch.rand(N, M, generator=torch.Generator().manual_seed(2)).argsort(1)
    wrong = robustness.wrong_by_survivors(logits, targets, order)
    assert wrong.shape == (N, M)
    for example in (0, 499, 500, 699):                                      # blocks end at 500
        for survivors in range(1, M + 1):
            left = logits[example, order[example, :survivors]].mean(0)
            assert wrong[example, survivors - 1] == (left.argmax() != targets[example])


def test_each_example_loses_its_own_members_or_all_the_same(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(robustness, "wrong_by_survivors",
                        lambda z, y, order: seen.append(order) or torch.zeros(order.shape, dtype=torch.bool))
    for drop in ("example", "set"):
        robustness.repeat(*trained, drop, torch.Generator().manual_seed(3))
    per_example, per_set = seen
    for order in seen:
        assert torch.equal(order.sort(1).values, torch.arange(M).expand(N, -1))
    assert not (per_example == per_example[:1]).all() and (per_set == per_set[:1]).all()
