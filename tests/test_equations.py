"""The paper's equations, and the loss that trains the ensembles. A reader starts here.

N examples, M members, K classes. Member j predicts q_j, the softmax of its logits z_j; the ensemble predicts q-bar, the
softmax of the mean logits; y is the target: a class, or probabilities. What else the paper proves: test_identities.py.
"""

import common
import fast

import pytest
import torch
from torch.nn import functional as F

N, M, K = 7, 5, 4
LAMBDAS = (0.0, 0.3, 0.5, 0.95, 1.0)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.fixture
def z():
    """Member logits (N, M, K)."""
    return 3 * normal(N, M, K)


@pytest.fixture(params=["classes", "probabilities"])
def y(request):
    """Targets: classes (N,), or probabilities (N, K)."""
    soft = normal(N, K, seed=2).softmax(-1)
    return soft if request.param == "probabilities" else soft.argmax(-1)


def probabilities(y):
    return y if y.dim() == 2 else F.one_hot(y, K).double()


def divergence(log_p, log_q):
    """D(p || q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def gradient(loss, at):
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def equal(one, other, error=1e-13):
    torch.testing.assert_close(one, other, rtol=0, atol=error)


# --- The ensemble --------------------------------------------------------------------------------


def test_eq_3_the_softmax_of_the_mean_logits_is_the_normalised_geometric_mean(z):
    product = z.softmax(-1).prod(1) ** (1 / M)
    q_bar = product / product.sum(-1, keepdim=True)
    y = torch.arange(N) % K
    ensemble, members = fast.cross_entropies(z, y)
    equal(ensemble, -q_bar[range(N), y].log())
    equal(members, torch.stack([F.cross_entropy(z[:, m], y, reduction="none") for m in range(M)], 1))


# --- The joint loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", LAMBDAS)
def test_eq_4_equals_eq_5(z, y, lam):
    """lambda CE(y, q-bar) + (1 - lambda) mean CE(y, q_j) = mean CE(y, q_j) - lambda mean D(q-bar || q_j)."""
    log_q, log_q_bar = z.log_softmax(-1), z.mean(1, keepdim=True).log_softmax(-1)
    p = probabilities(y)
    members = -(p[:, None] * log_q).sum(-1).mean()
    eq4 = lam * -(p * log_q_bar[:, 0]).sum(-1).mean() + (1 - lam) * members
    equal(common.joint_loss(z, y, lam), eq4)
    equal(common.joint_loss(z, y, lam), members - lam * divergence(log_q_bar, log_q).mean())


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_gradient_is_eq_9(z, y, lam):
    """(1 - lambda) q_j + lambda q-bar - y, over M N. It holds for the plain loss and for the one that runs."""
    q, q_bar = z.softmax(-1), z.mean(1, keepdim=True).softmax(-1)
    eq9 = ((1 - lam) * q + lam * q_bar - probabilities(y)[:, None]) / (M * N)
    equal(gradient(lambda z: common.joint_loss(z, y, lam), z), eq9, 1e-15)
    if y.dim() == 1:
        equal(gradient(lambda z: fast.joint_loss(z, y, lam)[0], z), eq9, 1e-15)


def test_scores_are_exact_counts_and_diversity_is_eq_7(z):
    """Eq. 7: the loss of the ensemble is the mean loss of its members minus their diversity, mean D(q-bar || q_j)."""
    y = z.mean(1).argmax(1)
    y[0] = (y[0] + 1) % K                                                   # the ensemble has one example wrong
    scores = common.Scores(M, "cpu")
    for rows in torch.arange(N).split(3):                                   # 3, 3 and 1 examples
        scores.add(z[rows], y[rows], *fast.cross_entropies(z[rows], y[rows]))
    s = scores.summary()
    wrong = (z.argmax(2) != y[:, None]).sum(0).tolist()
    assert s["member_error"].tolist() == [n / N for n in wrong] and min(wrong) > 1
    assert s["mean_member_error"] == pytest.approx(sum(wrong) / (M * N))
    assert s["ensemble_error"] == 1 / N
    equal(s["member_loss"], torch.stack([F.cross_entropy(z[:, m], y) for m in range(M)]))
    assert s["mean_member_loss"] == pytest.approx(s["member_loss"].mean().item())
    assert s["ensemble_loss"] == pytest.approx(F.cross_entropy(z.mean(1), y).item())
    diversity = divergence(z.mean(1, keepdim=True).log_softmax(-1), z.log_softmax(-1)).mean().item()
    assert s["diversity"] == pytest.approx(diversity) == pytest.approx(s["mean_member_loss"] - s["ensemble_loss"])
