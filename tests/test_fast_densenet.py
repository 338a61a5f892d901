"""All DenseNets in each kernel (fast_densenet.py) against the loop over the members, in float64 on a CPU."""

import os
import subprocess
import sys

import study
import fast_densenet
from common import Ensemble, joint_loss
from train_densenet_cifar import densenet_bc

import pytest
import torch


def ensemble(depth=16, growth=6, members=3):
    generator = torch.Generator().manual_seed(1)
    return Ensemble(lambda: densenet_bc(depth, growth, 3, 10), members, generator).double()


@pytest.mark.parametrize("own_images", [False, True], ids=["shared images", "bagging's own images"])
def test_it_equals_the_loop(own_images):
    loop, other = ensemble(), ensemble()
    at_once = fast_densenet.DenseNets(other.members, bf16=False)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4) for each in (loop, other)]
    images = torch.randn(*((6, 3) if own_images else (6,)), 3, 16, 16, dtype=torch.double)
    labels = torch.randint(10, (6,))
    for _ in range(5):
        logits = loop(images), at_once(images)
        torch.testing.assert_close(*logits, rtol=0, atol=1e-12)
        for each, optimizer in zip(logits, optimizers, strict=True):
            optimizer.zero_grad()
            joint_loss(each, labels, 0.9).backward()
            optimizer.step()
        for p, q in zip(loop.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)
    for net in (loop, other):
        net.eval()
    with torch.no_grad():
        torch.testing.assert_close(loop(images), at_once(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(loop.state_dict(), other.state_dict(), rtol=0, atol=1e-12)


def test_state_goes_both_ways(tmp_path):
    """Weights and the optimizer's state of one form continue in the other, through a file."""
    images, labels = torch.randn(4, 3, 16, 16, dtype=torch.double), torch.randint(10, (4,))

    def take_step(forward, optimizer):
        optimizer.zero_grad()
        joint_loss(forward(images), labels, 0.5).backward()
        optimizer.step()

    def new(at_once):
        net = ensemble()
        forward = fast_densenet.DenseNets(net.members, bf16=False) if at_once else net
        return net, forward, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    ends = []
    for first, second in ((False, False), (False, True), (True, False)):
        net, forward, optimizer = new(first)
        take_step(forward, optimizer)
        torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
        net, forward, optimizer = new(second)
        for part, state in zip((net, optimizer), torch.load(tmp_path / "state.pt"), strict=True):
            part.load_state_dict(state)
        take_step(forward, optimizer)
        ends.append(net.state_dict())
    for end in ends[1:]:
        torch.testing.assert_close(ends[0], end, rtol=0, atol=1e-12)


INTERPRETED = """
import triton.runtime.interpreter as interpreter
plain = interpreter._patch_lang_tensor

def patch(tensor, scope):           # numpy 2.4 makes no int of an array of one number, which Triton 3.6 asks for
    plain(tensor, scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())

interpreter._patch_lang_tensor = patch
import os, torch, fast_densenet
from common import Ensemble
from train_densenet_cifar import densenet_bc
torch.manual_seed(0)
torch.use_deterministic_algorithms(True)        # fills what torch.empty makes with nan
images, labels, nets = torch.randn(3, 3, 8, 8), torch.randint(10, (3,)), {}
for form in ("triton", "compiled"):
    net = Ensemble(lambda: densenet_bc(10, 6, 3, 10), 3, torch.Generator().manual_seed(1))
    nets[form] = net, fast_densenet.DenseNets(net.members, False), torch.optim.SGD(net.parameters(), 0.05, 0.9)
for step in range(4):
    for form, (net, forward, optimizer) in nets.items():
        os.environ["DENSE_BLOCK"] = form
        net.train(step < 3).zero_grad()
        logits = forward(images)
        if step < 3:
            torch.nn.functional.cross_entropy(logits.mean(1), labels).backward()
            optimizer.step()
        nets[form] = net, forward, optimizer
        net.logits = logits
(one, *_), (other, *_) = nets.values()
torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
"""


def test_the_triton_form_equals_the_compiled_one_interpreted():
    done = subprocess.run([sys.executable, "-c", INTERPRETED], cwd=study.folders.HERE, capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
