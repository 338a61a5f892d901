"""What is left of an ensemble when members are dropped."""

import math

import common
import robustness

import pytest
import torch


@pytest.fixture(scope="module")
def trained():
    """Member logits (N, M, K) and targets (N,) of an ensemble that is better than its members."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(700, 6, 4, generator=g)
    targets = torch.randint(4, (700,), generator=g)
    logits[torch.arange(700), :, targets] += 0.5
    return logits, targets


def errors(logits, targets):
    return (logits.argmax(1) != targets).double().mean().item()


def test_nothing_dropped_is_the_ensembles_own_error(trained):
    logits, targets = trained
    for drop in common.DROPS:
        curve = robustness.repeat(logits, targets, drop, torch.Generator().manual_seed(1))
        assert curve[0].item() == errors(logits.mean(1), targets)


def test_all_single_survivors_have_the_mean_member_error(trained):
    """Over the M orders in which each member comes first, exhaustively."""
    logits, targets = trained
    n, members, _ = logits.shape
    alone = []
    for shift in range(members):
        order = torch.arange(members).roll(-shift).expand(n, -1)
        wrong = robustness.wrong_by_survivors(logits, targets, order)
        assert wrong.shape == (n, members)
        alone.append(wrong[:, 0].double().mean().item())
        assert wrong[:, -1].double().mean().item() == errors(logits.mean(1), targets)
    expected = sum(errors(logits[:, m], targets) for m in range(members)) / members
    assert sum(alone) / members == pytest.approx(expected, abs=1e-15)


def test_the_first_s_members_of_an_order_are_averaged(trained):
    logits, targets = trained
    order = torch.rand(700, 6, generator=torch.Generator().manual_seed(2)).argsort(1)
    wrong = robustness.wrong_by_survivors(logits, targets, order)
    for example in (0, 499, 500, 699):                                    # blocks end at 500
        for survivors in range(1, 7):
            left = logits[example, order[example, :survivors]].mean(0)
            assert wrong[example, survivors - 1] == (left.argmax() != targets[example])


def test_each_example_loses_its_own_members_or_all_the_same(trained, monkeypatch):
    seen = []
    monkeypatch.setattr(robustness, "wrong_by_survivors", lambda z, y, order:
                        seen.append(order) or torch.zeros(order.shape, dtype=torch.bool))
    for drop in ("example", "set"):
        robustness.repeat(*trained, drop, torch.Generator().manual_seed(3))
    per_example, per_set = seen
    for order in seen:
        assert torch.equal(order.sort(1).values, torch.arange(6).expand(700, -1))
    assert not (per_example == per_example[:1]).all() and (per_set == per_set[:1]).all()


def test_dropping_with_a_probability_keeps_a_binomial_number(trained, monkeypatch):
    """Where s survivors of M err on s / M of the examples, the curve is their mean share."""
    members, n = 6, 20_000
    share = torch.arange(1, members + 1) / members
    draw = torch.rand(n, 1, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(robustness, "wrong_by_survivors", lambda z, y, order: draw < share)
    curve = robustness.repeat(torch.zeros(n, members, 4), torch.zeros(n, dtype=torch.long),
                              "probability", torch.Generator().manual_seed(4))
    for p, found in zip(robustness.PROBABILITIES, curve.tolist(), strict=True):
        none_left = p ** members / members                                # one is kept then
        assert found == pytest.approx(1 - p + none_left, abs=4 * math.sqrt(0.25 / n))
