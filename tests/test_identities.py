"""The paper's equations, identities and errata, on several random shapes: `pytest tests/test_identities.py -v`.

A reader starts here. Member j predicts q_j, the softmax of its logits z_j; the ensemble predicts q-bar, the softmax of
the mean logits; y is the target. A test of a claim bears its name. C20 and E1 to E3 are wrong as printed: their tests
show that, and the right form. N examples, M members, K classes; in double precision.
"""

import common
import fast
from study import finished, plan

import pytest
import torch
from torch.nn import functional as F

MEMBERS = (2, 4, 9)
LAMBDAS = (0, 0.3, 0.5, 0.95, 1)


def examples():
    """Member logits (N, M, K) and targets (N,), of three shapes."""
    g = torch.Generator().manual_seed(1)
    for n, members, classes in ((7, 5, 4), (3, 2, 10), (11, 8, 3)):
        yield (3 * torch.randn(n, members, classes, generator=g, dtype=torch.double),
               torch.randint(classes, (n,), generator=g))


def targets(z, y):
    """The targets of logits z as classes y (N,), as the same in probabilities (N, K), and as others that are soft."""
    return y, F.one_hot(y, z.shape[2]).double(), z.flip(0).mean(1).softmax(-1)


def probabilities(z, y):
    return y if y.dim() == 2 else F.one_hot(y, z.shape[2]).double()


def divergence(log_p, log_q):
    """D(p || q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def gradient(loss, at):
    """The gradient of a function of one tensor."""
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def farthest(one, other):
    return (one - other).abs().max().item()


def bernoulli(lam, y=0.3):
    """Eq. 4 as a function of M scalar outputs eta (M,), for a target that is 1 with probability y."""
    def loss(eta):
        logits = torch.stack([torch.zeros_like(eta), eta], -1)[None]                    # (1, M, 2)
        return common.joint_loss(logits, torch.tensor([[1 - y, y]], dtype=torch.double), lam)
    return loss


def all_agree(members, y=0.3):
    """Outputs (M,) at which each member predicts y: a stationary point."""
    return torch.logit(torch.tensor(y, dtype=torch.double)).repeat(members)


def some_disagree(members):
    """Outputs (M,) that differ, with the mean of those that agree on y."""
    return all_agree(members) + torch.linspace(-1, 1, members, dtype=torch.double)


def eigenvalues(lam, members):
    """Those of the Hessian where all members predict y, ascending."""
    eta, loss = all_agree(members), bernoulli(lam)
    assert gradient(loss, eta).abs().max() < 1e-12              # a stationary point
    return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, eta))


# --- The equations of what trains and is measured ------------------------------------------------


def test_eq_3_the_softmax_of_the_mean_logits_is_the_normalised_geometric_mean():
    for z, y in examples():
        n, members, _ = z.shape
        product = z.softmax(-1).prod(1) ** (1 / members)
        q_bar = product / product.sum(-1, keepdim=True)
        assert farthest(fast.cross_entropies(z, y)[0], -q_bar[range(n), y].log()) < 1e-12


@pytest.mark.parametrize("lam", LAMBDAS)
def test_the_gradient_is_eq_9(lam):
    """(1 - lambda) q_j + lambda q-bar - y, over M N. It holds for the plain loss and for the one that runs."""
    for z, classes in examples():
        q, q_bar = z.softmax(-1), z.mean(1, keepdim=True).softmax(-1)
        for y in targets(z, classes):
            eq9 = ((1 - lam) * q + lam * q_bar - probabilities(z, y)[:, None]) / (z.shape[0] * z.shape[1])
            assert farthest(gradient(lambda z, y=y: common.joint_loss(z, y, lam), z), eq9) < 1e-15
            if y is classes:
                assert farthest(gradient(lambda z, y=y: fast.joint_loss(z, y, lam)[0], z), eq9) < 1e-15


def test_scores_are_exact_counts_and_diversity_is_eq_7():
    """Eq. 7: the loss of the ensemble is the mean loss of its members minus their diversity, mean D(q-bar || q_j)."""
    z, _ = next(examples())
    n, members, classes = z.shape
    y = z.mean(1).argmax(1)
    y[0] = (y[0] + 1) % classes                                             # the ensemble has one example wrong
    scores = common.Scores(members, "cpu")
    for rows in torch.arange(n).split(3):                                   # 3, 3 and 1 examples
        scores.add(z[rows], y[rows], *fast.cross_entropies(z[rows], y[rows]))
    s = scores.summary()
    wrong = (z.argmax(2) != y[:, None]).sum(0).tolist()
    assert s["member_error"].tolist() == [count / n for count in wrong] and min(wrong) > 1
    assert s["mean_member_error"] == pytest.approx(sum(wrong) / (members * n)) and s["ensemble_error"] == 1 / n
    assert s["member_loss"].tolist() == pytest.approx([F.cross_entropy(z[:, m], y).item() for m in range(members)])
    assert s["mean_member_loss"] == pytest.approx(s["member_loss"].mean().item())
    assert s["ensemble_loss"] == pytest.approx(F.cross_entropy(z.mean(1), y).item())
    diversity = divergence(z.mean(1, keepdim=True).log_softmax(-1), z.log_softmax(-1)).mean().item()
    assert s["diversity"] == pytest.approx(diversity) == pytest.approx(s["mean_member_loss"] - s["ensemble_loss"])


# --- Claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", LAMBDAS)
def test_C15_the_two_forms_of_the_loss_are_equal(lam):
    """lambda CE(y, q-bar) + (1 - lambda) mean CE(y, q_j) = mean CE(y, q_j) - lambda mean D(q-bar || q_j)."""
    for z, classes in examples():
        log_q, log_q_bar = z.log_softmax(-1), z.mean(1, keepdim=True).log_softmax(-1)
        for y in targets(z, classes):
            p = probabilities(z, y)
            members, loss = -(p[:, None] * log_q).sum(-1).mean(), common.joint_loss(z, y, lam)
            eq4 = lam * -(p * log_q_bar[:, 0]).sum(-1).mean() + (1 - lam) * members
            eq5 = members - lam * divergence(log_q_bar, log_q).mean()
            assert abs(loss - eq4) < 1e-12 and abs(loss - eq5) < 1e-12


@pytest.mark.parametrize("lam", [0.1, 0.5, 0.9, 0.99])
def test_C16_the_condition_number_is_1_over_1_minus_lambda(lam):
    for values in (eigenvalues(lam, members) for members in MEMBERS):
        assert values[-1] / values[0] == pytest.approx(1 / (1 - lam), rel=1e-9)


def test_C17_LL_and_SM_of_Dutt_et_al_are_independent_training_over_M():
    losses = [lambda z, y: torch.stack([F.cross_entropy(z[:, m], y) for m in range(z.shape[1])]).mean(),   # LL, Eq. 18
              lambda z, y: F.nll_loss(z.log_softmax(-1).mean(1), y),                                       # SM, Eq. 22
              lambda z, y: common.joint_loss(z, y, 0)]
    for z, y in examples():
        alone = gradient(lambda z, y=y: sum(F.cross_entropy(z[:, m], y) for m in range(z.shape[1])), z) / z.shape[1]
        for loss in losses:
            assert farthest(gradient(lambda z, y=y, loss=loss: loss(z, y), z), alone) < 1e-14


def test_C18_the_softmax_of_mean_logits_minimises_the_mean_divergence_to_the_members():
    g = torch.Generator().manual_seed(3)
    for z, y in examples():
        n, members, classes = z.shape
        slope = gradient(lambda z, y=y: common.joint_loss(z, y, 1), z)[:, 0]            # Eq. 9: (q-bar - y) / (M N)
        log_q_bar = (n * members * slope + F.one_hot(y, classes)).log()                 # of the loss that trains

        def mean_divergence(logits, z=z):                                               # Eq. 1
            return divergence(logits.log_softmax(-1)[:, None], z.log_softmax(-1)).mean(1).sum()
        assert gradient(mean_divergence, log_q_bar).abs().max() < 1e-11
        for size in (1e-3, 0.1, 3):
            step = size * torch.randn(log_q_bar.shape, generator=g, dtype=torch.double)
            assert mean_divergence(log_q_bar + step) > mean_divergence(log_q_bar)


@pytest.mark.parametrize("lam", [0, 0.3, 1])
def test_C19_for_gaussian_targets_the_loss_is_negative_correlation_learning(lam):
    def eq4(f, y):                  # for Gaussians D(p || q) is half the squared error
        return (lam * (f.mean(1, keepdim=True) - y).square() / 2
                + (1 - lam) * (f - y).square().mean(1, keepdim=True) / 2).sum()

    def liu_and_yao(f, y):          # each member's own loss, the ensemble held fixed
        apart = f - f.mean(1, keepdim=True).detach()
        others = (apart.sum(1, keepdim=True) - apart).detach()
        return ((f - y).square() / 2 + lam * apart * others).sum()

    g = torch.Generator().manual_seed(2)
    for n, members in ((7, 5), (3, 2), (11, 8)):
        f, y = (torch.randn(n, width, generator=g, dtype=torch.double) for width in (members, 1))
        ours, theirs = (gradient(lambda f, y=y, loss=loss: loss(f, y), f) for loss in (eq4, liu_and_yao))
        assert farthest(members * ours, theirs) < 1e-13


def test_C20_stationary_points_are_saddles_for_lambda_above_1_and_not_above_0():
    for members in MEMBERS:
        assert eigenvalues(0.5, members)[0] > 0
        for values in (eigenvalues(lam, members) for lam in (1.01, 1.5, 3)):
            assert values[0] < 0 < values[-1]


def test_E1_predictions_may_disagree_at_a_stationary_point_only_for_lambda_1():
    for members in MEMBERS:
        assert gradient(bernoulli(1), some_disagree(members)).abs().max() < 1e-12
        assert gradient(bernoulli(0), some_disagree(members)).abs().max() > 1e-3


@pytest.mark.parametrize("lam", [0.3, 0.9])
def test_E2_eq_10_is_the_hessian_at_the_stationary_point_only(lam):
    def eq10(eta):
        members, slope = len(eta), torch.sigmoid(eta) * torch.sigmoid(-eta)             # g' of each member
        mean = torch.sigmoid(eta.mean()) * torch.sigmoid(-eta.mean())
        matrix = (lam / members**2 * mean).expand(members, members).clone().fill_diagonal_(0)
        return matrix + torch.diag((1 - lam * (1 - 1 / members)) / members * slope)

    for members in MEMBERS:
        there, elsewhere = (farthest(torch.autograd.functional.hessian(bernoulli(lam), eta), eq10(eta))
                            for eta in (all_agree(members), some_disagree(members)))
        assert there < 1e-12 and elsewhere > 1e-4


def test_E3_the_convnet_of_0_07M_has_0_063M_parameters():
    block = plan.load_preset("paper")["convnet_cifar"]
    settings = block | block["configurations"]["ConvNet-0.07M"] | {"members": 1}
    member = finished.untrained_on_meta(plan.experiment_of("convnet_cifar").build, settings, (3, 32, 32), 100)
    assert sum(p.numel() for p in member.parameters()) == 62_820                        # 0.07M is 65,000 to 75,000
