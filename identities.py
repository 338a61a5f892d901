"""The paper's identities, and its errata, computed on several random shapes (Eq. 1 to 5, Sec. 6, Appendices A, C, D).

An identity is verified if every deviation is within rounding. A sentence that is wrong as printed is an erratum if the
computation shows it wrong and its corrected form right.
"""

from dataclasses import dataclass

import common
import make_figures
import presets
from finished import CONVNET

import torch
from torch.nn import functional as F


@dataclass
class Exact:
    """A number that is computed, and the most that rounding leaves of it."""
    what: str
    deviation: float
    most: float
    scope, reason, n = "identity", "", 0

    @property
    def true(self):
        return self.deviation <= self.most          # (nan is not)

    @property
    def outcome(self):
        return "met" if self.true else "refused"

    @property
    def asked(self):
        return f"at most {self.most:g}"

    @property
    def cells(self):
        return [f"{self.deviation:.1e}", ""]



def examples():
    """Member logits (N, M, K) in double precision and targets (N,), of three shapes."""
    g = torch.Generator().manual_seed(1)
    for n, members, classes in ((7, 5, 4), (3, 2, 10), (11, 8, 3)):
        yield (3 * torch.randn(n, members, classes, generator=g, dtype=torch.double),
               torch.randint(classes, (n,), generator=g))


def divergence(log_p, log_q):
    """D(p || q) over the last axis."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def gradient(loss, at):
    """The gradient of a function of one tensor."""
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def farthest(one, other):
    return (one - other).abs().max().item()


def trains(z, y, lam):
    """The loss that trains the ensembles."""
    return common.loss_and_cross_entropies(z, y, lam)[0]


def eq5(z, y, lam):
    log_q, log_q_bar = z.log_softmax(-1), z.mean(1, keepdim=True).log_softmax(-1)
    members = F.nll_loss(log_q.flatten(0, 1), y.repeat_interleave(z.shape[1]))      # p is one-hot
    return members - lam * divergence(log_q_bar, log_q).mean()


def c15():
    for lam in (0, 0.3, 0.95, 1):
        worst = []
        for z, y in examples():
            slopes = (gradient(lambda z, loss=loss, y=y, lam=lam: loss(z, y, lam), z) for loss in (trains, eq5))
            worst += [abs((trains(z, y, lam) - eq5(z, y, lam)).item()), farthest(*slopes)]
        yield Exact(f"λ = {lam}: Eq. 4, which trains, minus Eq. 5, value and gradient", max(worst), 1e-12)


def bernoulli(eta, lam, y=0.3):
    """Eq. 4 for M scalar outputs eta (M,) and a target that is 1 with probability y."""
    logits = torch.stack([torch.zeros_like(eta), eta], -1)[None]
    return common.joint_loss(logits, torch.tensor([[1 - y, y]], dtype=torch.double), lam)


def stationary(members, y=0.3):
    return torch.logit(torch.tensor(y, dtype=torch.double)).repeat(members)


def hessian(lam, eta):
    return torch.autograd.functional.hessian(lambda eta: bernoulli(eta, lam), eta)


def eigenvalues(lam, members):
    """Those of the Hessian where all members predict y, ascending, and the slope there, which must be 0."""
    eta = stationary(members)
    return torch.linalg.eigvalsh(hessian(lam, eta)), gradient(lambda eta: bernoulli(eta, lam), eta).abs().max().item()


def c16():
    for lam in (0.1, 0.5, 0.9, 0.99):
        found = [eigenvalues(lam, members) for members in (2, 4, 9)]
        yield Exact(f"λ = {lam}: condition number times (1 - λ), minus 1", max(
            abs((values[-1] / values[0]).item() * (1 - lam) - 1) + slope for values, slope in found), 1e-9)


def c17():
    losses = {"LL (Eq. 18)": lambda z, y: torch.stack([F.cross_entropy(z[:, m], y) for m in range(z.shape[1])]).mean(),
              "SM (Eq. 22)": lambda z, y: F.nll_loss(z.log_softmax(-1).mean(1), y),
              "the loss that trains, at λ = 0": lambda z, y: trains(z, y, 0)}
    for name, loss in losses.items():
        worst = []
        for z, y in examples():
            alone = gradient(lambda z, y=y: sum(F.cross_entropy(z[:, m], y) for m in range(z.shape[1])), z)
            worst.append(farthest(gradient(lambda z, y=y, loss=loss: loss(z, y), z), alone / z.shape[1]))
        yield Exact(f"gradient of {name} minus the independent one over M", max(worst), 1e-14)


def c18():
    g = torch.Generator().manual_seed(3)
    for z, y in examples():
        (n, members, classes), log_q = z.shape, z.log_softmax(-1)
        slope = gradient(lambda z, y=y: trains(z, y, 1), z)[:, 0]           # Eq. 9: (q-bar - y) / (M N)
        central = (n * members * slope + F.one_hot(y, classes)).log()       # q-bar of the loss that trains

        def spread(logits, log_q=log_q):                                            # Eq. 1
            return divergence(logits.log_softmax(-1)[:, None], log_q).mean(1).sum()
        yield Exact(f"M = {members}, K = {classes}: gradient of the mean divergence at q-bar",
                    gradient(spread, central).abs().max().item(), 1e-11)
        steps = [size * torch.randn(central.shape, generator=g, dtype=torch.double) for size in (1e-3, 0.1, 3)]
        yield Exact(f"M = {members}, K = {classes}: mean divergence at q-bar minus that of steps aside",
                    max((spread(central) - spread(central + step)).item() for step in steps), 0)


def c19():
    g = torch.Generator().manual_seed(2)
    for lam in (0, 0.3, 1):
        def eq4(f, y, lam=lam):                 # for Gaussians D(p || q) is half the squared error
            return (lam * (f.mean(1, keepdim=True) - y).square() / 2
                    + (1 - lam) * (f - y).square().mean(1, keepdim=True) / 2).sum()

        def ncl(f, y, lam=lam):     # Liu and Yao: each member's own loss, the ensemble held fixed
            apart = f - f.mean(1, keepdim=True).detach()
            others = (apart.sum(1, keepdim=True) - apart).detach()
            return ((f - y).square() / 2 + lam * apart * others).sum()
        worst = []
        for n, members in ((7, 5), (3, 2), (11, 8)):
            f, y = (torch.randn(n, width, generator=g, dtype=torch.double) for width in (members, 1))
            worst.append(farthest(members * gradient(lambda f, y=y, eq4=eq4: eq4(f, y), f),
                                  gradient(lambda f, y=y, ncl=ncl: ncl(f, y), f)))
        yield Exact(f"λ = {lam}: gradient of M times Eq. 4 minus that of their loss", max(worst), 1e-13)


def c20():
    positive = [eigenvalues(0.5, members) for members in (2, 4, 9)]
    yield Exact("λ = 0.5: the smallest eigenvalue at the stationary point, sign changed: no saddle",
                max(-values[0].item() + slope for values, slope in positive), 0)
    for lam in (1.01, 1.5, 3):
        found = [eigenvalues(lam, members) for members in (2, 4, 9)]
        yield Exact(f"λ = {lam}: the smallest eigenvalue, and the largest with its sign changed: a saddle",
                    max(max(values[0].item(), -values[-1].item()) + slope for values, slope in found), 0)


def apart(members):
    """Predictions that disagree, with the mean of those that agree on y."""
    return stationary(members) + torch.linspace(-1, 1, members, dtype=torch.double)


def e1():
    slopes = {lam: [gradient(lambda eta, lam=lam: bernoulli(eta, lam), apart(members)).abs().max().item()
                    for members in (2, 4, 9)] for lam in (0, 1)}
    yield Exact("λ = 1: largest slope where predictions disagree: a stationary point", max(slopes[1]), 1e-12)
    yield Exact("λ = 0: largest slope there, sign changed: none", -min(slopes[0]), -1e-3)


def e2():
    def eq10(lam, eta):
        members, slope = len(eta), torch.sigmoid(eta) * torch.sigmoid(-eta)          # g' of each member
        mean = torch.sigmoid(eta.mean()) * torch.sigmoid(-eta.mean())
        matrix = (lam / members**2 * mean).expand(members, members).clone()
        return matrix.fill_diagonal_(0) + torch.diag((1 - lam * (1 - 1 / members)) / members * slope)

    there, elsewhere = ([farthest(hessian(lam, eta(members)), eq10(lam, eta(members)))
                         for lam in (0.3, 0.9) for members in (2, 4, 9)] for eta in (stationary, apart))
    yield Exact("Hessian minus Eq. 10 at the stationary point", max(there), 1e-12)
    yield Exact("Hessian minus Eq. 10 elsewhere, sign changed", -min(elsewhere), -1e-4)


def e3():
    paper = presets.experiment_settings(presets.load_preset("paper"), "paper", CONVNET)
    c = paper["configurations"]["ConvNet-0.07M"]
    count = make_figures.parameters(CONVNET, c) / c["members"]
    yield Exact(f"{count:,.0f} parameters: distance from 0.07M beyond rounding, sign changed",
                5000 - abs(count - 70_000), 0)


IDENTITIES = {function.__name__.upper(): function for function in (c15, c16, c17, c18, c19, c20, e1, e2, e3)}
ERRATA = ("C20", "E1", "E2", "E3")      # the sentence is wrong as printed if its computation comes out
