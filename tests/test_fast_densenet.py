"""All DenseNets in each kernel (fast_densenet.py) against the loop over the members, in float64.

The Triton kernels are interpreted on a CPU: conftest.py says so, before anything imports Triton.
"""

import copy

from common import Ensemble, joint_loss, lay_out_momenta
from fast_densenet import DenseNets
from train_densenet_cifar import densenet_bc

import pytest
import torch
import triton.runtime.interpreter as interpreter

of_tensor = interpreter._patch_lang_tensor


def with_index(tensor, scope):      # numpy 2.4 makes no int of an array of one number, as Triton 3.6 asks for
    of_tensor(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """What torch.empty makes is filled with nan."""
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def ensemble(growth=6, members=3):
    generator = torch.Generator().manual_seed(1)
    return Ensemble(lambda: densenet_bc(10, growth, 3, 10), members, generator).double()


def batch(n, *own):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(n, *own, 3, 8, 8, dtype=torch.double, generator=generator),
            torch.randint(10, (n,), generator=generator))


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("growth, own, steps", [(6, (), 2), (12, (3,), 1), (8, (), 1)],
                         ids=["DN-Low", "DN-High, bagging's own images", "DN-Mid"])
def test_it_equals_the_loop(growth, own, steps):
    """Logits, gradients, steps of SGD, running statistics, evaluation. Hardly a gradient is copied.

    Either form goes on from the weights, statistics and momenta of the other.
    """
    nets = loop, other = ensemble(growth), ensemble(growth)
    at_once = DenseNets(other.members, bf16=False)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, fused=True)
                  for net in nets]
    images, labels = batch(3, *own)
    for step in range(steps):
        if step == 1:
            for parts in (nets, optimizers):
                states = [copy.deepcopy(part.state_dict()) for part in parts]
                for part, state in zip(parts, states[::-1], strict=True):
                    part.load_state_dict(state)
            for optimizer in optimizers:
                lay_out_momenta(optimizer)
        logits = loop(images), at_once(images)
        assert_equal(*logits)
        for each, optimizer in zip(logits, optimizers, strict=True):
            optimizer.zero_grad()
            joint_loss(each, labels, 0.9).backward()
            optimizer.step()
        assert_equal(*([p.grad for p in net.parameters()] for net in nets))
    copied = [name for name, p in other.named_parameters() if p.grad.untyped_storage().nbytes() <= 8 * p.numel()]
    assert len(copied) == 2 * len(other.members)        # only those of the convolutions between the blocks
    for net in nets:
        net.eval()
    with torch.no_grad():
        assert_equal(loop(images), at_once(images))
    assert_equal(loop.state_dict(), other.state_dict())
