"""The paper's equations, held against the loss that trains the ensembles."""

import common

import pytest
import torch
from torch.nn import functional as F

LAMBDAS = (0.0, 0.3, 0.5, 0.95, 1.0)


@pytest.fixture
def logits():
    """Member logits (N, M, K) in double precision, and targets (N,)."""
    g = torch.Generator().manual_seed(1)
    return (3 * torch.randn(7, 5, 4, generator=g, dtype=torch.double),
            torch.randint(4, (7,), generator=g))


def kl(log_p, log_q):
    """D(p || q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_eq_4_equals_eq_5(logits, lam):
    z, y = logits
    log_q = z.log_softmax(-1)
    log_q_bar = z.mean(1, keepdim=True).log_softmax(-1)
    members = F.nll_loss(log_q.flatten(0, 1), y.repeat_interleave(5))   # D(p || q_j), p one-hot
    eq5 = members - lam * kl(log_q_bar, log_q).mean()
    assert common.joint_loss(z, y, lam).item() == pytest.approx(eq5.item(), abs=1e-12)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_gradient_is_eq_9(logits, lam):
    z, y = logits
    z.requires_grad_()
    common.joint_loss(z, y, lam).backward()
    one_hot = F.one_hot(y, 4)[:, None]
    q, q_bar = z.softmax(-1), z.mean(1, keepdim=True).softmax(-1)
    eq9 = ((1 - lam) * q + lam * q_bar - one_hot) / 5 / len(y)            # mean over N examples
    torch.testing.assert_close(z.grad, eq9.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_fused_loss_equals_the_visible_one(logits, lam):
    z, y = logits
    plain, fused = z.clone().requires_grad_(), z.clone().requires_grad_()
    expected = common.joint_loss(plain, y, lam)
    loss, ensemble, members = common.fused_joint_loss(fused, y, lam)
    (3 * expected).backward()
    (3 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    torch.testing.assert_close(fused.grad, plain.grad, rtol=0, atol=1e-14)
    assert members.shape == (7, 5) and ensemble.shape == (7,)
    assert (lam * ensemble.mean() + (1 - lam) * members.mean()).item() == pytest.approx(loss.item())


@pytest.mark.parametrize("weighted", [False, True])
def test_fused_loss_with_targets_and_weights_of_each_member(weighted):
    g = torch.Generator().manual_seed(2)
    z = torch.randn(6, 3, 4, generator=g, dtype=torch.double)
    own = torch.randint(4, (6, 3), generator=g)
    weights = torch.randint(3, (6, 3), generator=g).double() if weighted else torch.ones(6, 3)
    plain, fused = z.clone().requires_grad_(), z.clone().requires_grad_()
    losses = F.cross_entropy(plain.permute(0, 2, 1), own, reduction="none")
    (losses * weights).mean().backward()
    loss, ensemble, _ = common.fused_joint_loss(fused, own, 0, weights if weighted else None)
    loss.backward()
    assert loss.item() == pytest.approx((losses * weights).mean().item(), abs=1e-13)
    torch.testing.assert_close(fused.grad, plain.grad, rtol=0, atol=1e-14)
    assert ensemble.isnan().all()           # members with examples of their own form no ensemble


def test_fused_loss_does_not_depend_on_memory_order(logits):
    z, y = logits
    other = z.permute(1, 2, 0).contiguous().permute(2, 0, 1)              # as the vectorised MLPs'
    assert other.stride() != z.stride()
    a, b = common.fused_joint_loss(z, y, 0.7), common.fused_joint_loss(other, y, 0.7)
    for x, w in zip(a, b, strict=True):
        torch.testing.assert_close(x, w, rtol=0, atol=1e-14)


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9, 0.99])
def test_condition_number_of_appendix_c(lam):
    """kappa(H) = 1 / (1 - lambda) at the stationary point of M scalar (Bernoulli) outputs."""
    y, members = 0.3, 4
    eta = torch.logit(torch.tensor(y, dtype=torch.double)).repeat(members)     # all predict y
    targets = torch.tensor([[1 - y, y]], dtype=torch.double)

    def loss(eta):
        return common.joint_loss(torch.stack([torch.zeros_like(eta), eta], -1)[None], targets, lam)

    assert torch.autograd.functional.jacobian(loss, eta).abs().max() < 1e-15   # it is stationary
    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, eta))
    assert (eigenvalues[-1] / eigenvalues[0]).item() == pytest.approx(1 / (1 - lam), rel=1e-9)


def test_dutts_ll_and_sm_are_independent_training_over_m(logits):
    """Appendix D: LL (Eq. 18) and SM (Eq. 22) have the gradient of independent training, over M."""
    z, y = logits
    members = z.shape[1]

    def gradient(loss):
        leaf = z.clone().requires_grad_()
        loss(leaf).backward()
        return leaf.grad

    independent = gradient(lambda z: sum(F.cross_entropy(z[:, m], y) for m in range(members)))
    ll = gradient(lambda z: torch.stack(
        [F.cross_entropy(z[:, m], y) for m in range(members)]).mean())
    sm = gradient(lambda z: F.nll_loss(z.log_softmax(-1).mean(1), y))
    ours = gradient(lambda z: common.joint_loss(z, y, 0))
    for other in (ll, sm, ours):
        torch.testing.assert_close(other, independent / members, rtol=0, atol=1e-15)


def test_softmax_of_the_mean_logits_is_the_central_model(logits):
    """Eq. 1 to 3: it minimises the mean divergence to the members, and every step away is worse."""
    log_q = logits[0].log_softmax(-1)

    def spread(z):                                                        # Eq. 1, summed over N
        return kl(z.log_softmax(-1)[:, None], log_q).mean(1).sum()

    central = logits[0].mean(1).requires_grad_()
    (gradient,) = torch.autograd.grad(spread(central), central)
    assert gradient.abs().max() < 1e-14
    g = torch.Generator().manual_seed(3)
    for size in (1e-3, 0.1, 3):
        step = size * torch.randn(central.shape, generator=g, dtype=torch.double)
        assert spread(central + step - step.mean(1, keepdim=True)) > spread(central)


def test_scores_are_exact_counts_and_diversity_is_eq_7(logits):
    z, y = logits
    scores = common.Scores(5, z.device)
    for rows in torch.arange(7).split(3):                                 # 3, 3 and 1 examples
        scores.add(z[rows], y[rows], *common.cross_entropies(z[rows], y[rows]))
    s = scores.summary()
    assert s["ensemble_error"] == (z.mean(1).argmax(1) != y).sum().item() / 7
    wrong = (z.argmax(2) != y[:, None]).sum(0).tolist()
    assert s["member_error"].tolist() == [n / 7 for n in wrong]
    assert s["ensemble_loss"] == pytest.approx(F.cross_entropy(z.mean(1), y).item())
    log_q_bar = z.mean(1, keepdim=True).log_softmax(-1)
    assert s["diversity"] == pytest.approx(kl(log_q_bar, z.log_softmax(-1)).mean().item())
