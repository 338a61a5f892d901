"""The paper's equations, held against the loss that trains the ensembles."""

import claims
import common

import pytest
import torch
from torch.nn import functional as F

LAMBDAS = (0.0, 0.3, 0.5, 0.95, 1.0)


@pytest.fixture
def logits():
    return claims.example()


@pytest.mark.parametrize("claim", [claims.c15, claims.c16, claims.c17, claims.c18, claims.c19,
                                   claims.c20])
def test_what_the_paper_proves(claim):
    """Eq. 1 to 5, Appendices C and D: as the report has it. What breaks them: test_claims.py."""
    parts = list(claim())
    assert parts and all(part.verdict == claims.HOLDS for part in parts), parts


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


@pytest.mark.parametrize("values", [1000, 3])                            # rare and many equal ones
def test_the_predicted_class_is_the_first_of_the_highest(values):
    z = torch.randint(values, (9, 6, 5), generator=torch.Generator().manual_seed(4)).float()
    for layout in (z, z.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert torch.equal(common.predicted(layout).long(), z.argmax(-1))


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
    from_mean = claims.divergence(z.mean(1, keepdim=True).log_softmax(-1), z.log_softmax(-1))
    assert s["diversity"] == pytest.approx(from_mean.mean().item())
