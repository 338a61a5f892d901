"""DenseNets and ConvNets, and ensembles of them, against the definitions and stock networks."""

import copy
import math

import common
import make_figures
import train_convnet_cifar
import train_densenet_cifar
from train_convnet_cifar import convnet
from train_densenet_cifar import densenet_bc

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F


def paper(module):
    return common.experiment_settings(common.load_preset("paper"), "paper", module.EXPERIMENT)


def ensemble(members=3, precision="fp32", seed=0):
    """A small ensemble with batch norm."""
    return common.Ensemble(lambda: densenet_bc(10, 4, 3, 7), members,
                           torch.Generator().manual_seed(seed), precision)


def images(*shape, seed=0):
    return torch.randn(*shape, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


# --- The architectures -------------------------------------------------------------------------

@pytest.mark.parametrize("name, member, total", [
    ("DN-High", 800_032, 3_200_128), ("DN-Mid", 266_556, 2_132_448),
    ("DN-Low", 105_316, 1_685_056)])
def test_densenets_have_the_papers_parameters(name, member, total):
    c = paper(train_densenet_cifar)["configurations"][name]
    network = densenet_bc(c["depth"], c["growth"], 3, 100)
    assert sum(p.numel() for p in network.parameters()) == member
    assert make_figures.parameters(make_figures.untrained("densenet_cifar", c)) == total


@pytest.mark.parametrize("name, plain, normalised", [
    ("ConvNet-0.07M", 62_820, 62_980), ("ConvNet-0.14M", 143_076, 143_364),
    ("ConvNet-0.29M", 290_660, 291_076), ("ConvNet-0.60M", 598_628, 599_300),
    ("ConvNet-1.20M", 1_188_708, 1_189_636)])
def test_convnets_have_the_counted_parameters(name, plain, normalised):
    c = paper(train_convnet_cifar)["configurations"][name]
    assert c["members"] == 16 and len(c["filters"]) == len(c["strides"])
    for batchnorm, count in ((False, plain), (True, normalised)):
        network = convnet(c["filters"], c["strides"], 0, batchnorm, 3, 100)
        assert sum(p.numel() for p in network.parameters()) == count
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("depth, growth", [(100, 12), (82, 8), (64, 6), (16, 8)])
def test_densenet_bc_has_the_layers_of_its_definition(depth, growth):
    """Each 3x3 convolution adds k maps, each bottleneck has 4k, transitions halve what there is."""
    n, width = (depth - 4) // 6, 2 * growth
    expected = [(3, width, 3)]
    for block in range(3):
        for _ in range(n):
            expected += [(width, 4 * growth, 1), (4 * growth, growth, 3)]
            width += growth
        if block < 2:
            expected.append((width, width // 2, 1))
            width //= 2
    network = densenet_bc(depth, growth, 3, 100)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == expected
    assert all(c.bias is None and c.stride == (1, 1) for c in convolutions)
    assert len(convolutions) + 1 == depth and network[-1].in_features == width
    norms = [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [inputs for inputs, _, _ in expected[1:]] + [width]


@pytest.mark.parametrize("training", [True, False])
def test_densenet_bc_computes_what_torchvisions_densenet_does(training):
    """torchvision's is for large images: its stem is replaced by the plain convolution."""
    mine = densenet_bc(22, 6, 3, 10).double()
    other = torchvision.models.DenseNet(6, (3, 3, 3), num_init_features=12, num_classes=10)
    other.features.conv0 = nn.Conv2d(3, 12, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        delattr(other.features, name)
    other.double()
    with torch.no_grad():
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            q.copy_(p.normal_(std=0.3))
    x = torch.randn(4, 3, 32, 32, dtype=torch.double)
    y, z = (network.train(training)(x) for network in (mine, other))
    torch.testing.assert_close(y, z, rtol=0, atol=1e-9)
    for out in (y, z):
        F.cross_entropy(out, torch.arange(4)).backward()
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-9)


def test_initial_weights_are_of_each_member():
    """Convolutions are normal with variance 2 / (k * k * outputs of one member)."""
    nets = common.Ensemble(lambda: densenet_bc(40, 12, 3, 100), 2, torch.Generator().manual_seed(3))
    for member in nets.members:
        for layer in member.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 5_000:
                variance = 2 / (layer.kernel_size[0] ** 2 * layer.out_channels)
                assert layer.weight.var().item() == pytest.approx(variance, rel=0.1)
            if isinstance(layer, nn.BatchNorm2d):
                assert (layer.weight == 1).all() and (layer.bias == 0).all()
        linear = member[-1]
        assert (linear.bias == 0).all()
        assert linear.weight.abs().max() <= linear.in_features ** -0.5
        assert linear.weight.std().item() == pytest.approx(
            (linear.in_features * 3) ** -0.5, rel=0.05)
    one, other = nets.members
    assert not torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(ensemble().members[1][0].weight, ensemble().members[1][0].weight)
    assert not torch.equal(ensemble().members[1][0].weight, ensemble(seed=1).members[1][0].weight)


def test_building_an_ensemble_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    ensemble()
    assert torch.equal(torch.get_rng_state(), before)


# --- An ensemble is M networks -----------------------------------------------------------------

@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_equals_its_members_run_alone(shared, training):
    """Logits, gradients and batch norm's running statistics, shared images or own ones."""
    nets = ensemble().double()
    alone = [copy.deepcopy(member) for member in nets.members]
    x = images(6, *(() if shared else (3,))).double()
    upstream = torch.randn(6, 3, 7, dtype=torch.double)
    logits = nets.train(training)(x)
    assert logits.shape == (6, 3, 7)
    logits.backward(upstream)
    for m, network in enumerate(alone):
        out = network.train(training)(x if shared else x[:, m])
        out.backward(upstream[:, m])
        torch.testing.assert_close(logits[:, m], out, rtol=0, atol=1e-12)
        for p, q in zip(nets.members[m].parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_each_members_own(training):
    nets = ensemble()
    alone = [copy.deepcopy(member).train(training) for member in nets.members]
    for seed in range(3):
        x = 2 + 3 * images(5, 3, seed=seed)
        nets.train(training)(x)
        for m, network in enumerate(alone):
            network(x[:, m])
    for member, network in zip(nets.members, alone, strict=True):
        for p, q in zip(member.buffers(), network.buffers(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        moved = member[1].layers[0].running_mean.abs().max() > 0
        assert moved == training


def test_at_lambda_0_the_gradient_is_the_independent_one_over_m():
    nets, targets = ensemble(4).double(), torch.arange(6) % 7
    alone = copy.deepcopy(nets)
    x = images(6).double()
    common.fused_joint_loss(nets.train()(x), targets, 0)[0].backward()
    for m, member in enumerate(alone.members):
        F.cross_entropy(member.train()(x), targets).backward()
        for p, q in zip(nets.members[m].parameters(), member.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_members_side_by_side_equal_those_one_after_the_other(precision, shared, one_thread):
    """A thread a member, two at a time, gives what one thread gives, to the bit."""
    x = images(8, *(() if shared else (3,)))
    seen = {}
    for threads in (1, 2):
        nets = ensemble(precision=precision).train()
        torch.set_num_threads(threads)
        logits = nets(x)
        assert ("SideBySide" in type(logits.grad_fn).__name__) == (threads == 2)
        logits.square().sum().backward()
        nets.eval()
        with torch.no_grad():
            evaluated = nets(x)
        assert torch.get_num_threads() == threads
        assert not evaluated.requires_grad
        seen[threads] = [logits, evaluated, *nets.buffers(), *(p.grad for p in nets.parameters())]
    assert all(map(torch.equal, seen[1], seen[2]))


def test_members_side_by_side_may_have_frozen_and_unused_weights(one_thread):
    seen = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        nets = ensemble().train()
        for member in nets.members:
            member.unused = nn.Identity()
            member.unused.weight = nn.Parameter(torch.ones(2))
            member[0].weight.requires_grad_(False)
            member.forward = lambda x, layers=list(member)[:-1]: nn.Sequential(*layers)(x)
        nets(images(8)).square().sum().backward()
        seen[threads] = [p.grad for p in nets.parameters()]
    assert sum(grad is None for grad in seen[1]) == 2 * 3       # the frozen one, the unused one
    for one, other in zip(seen[1], seen[2], strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_member_gets_a_copy_of_the_shared_images(precision, one_thread):
    """Not of its own making either: one copy is kept for the backward pass of all members."""
    nets, kept = ensemble(precision=precision), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nets(images(4))
    kept = [tensor for tensor in kept if tensor.shape == images(4).shape]
    assert len(kept) == 3 and len({tensor.data_ptr() for tensor in kept}) == 1


# --- Precision ---------------------------------------------------------------------------------

def test_bf16_agrees_with_fp32_within_its_error():
    """Five steps of SGD: the losses agree to a few of bf16's last places (2 ** -8)."""
    losses = {}
    for precision in ("fp32", "bf16"):
        nets = ensemble(precision=precision)
        sgd = torch.optim.SGD(nets.parameters(), lr=0.1, momentum=0.9)
        targets = torch.arange(24) % 7
        nets.train()
        for step in range(5):
            logits = nets(images(24, seed=step))
            assert logits.dtype == torch.float32
            loss = common.fused_joint_loss(logits, targets, 0.5)[0]
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.setdefault(precision, []).append(loss.item())
        for layer in nets.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_var.dtype == layer.weight.dtype == torch.float32
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=4 * 2 ** -8)
    assert losses["bf16"] != losses["fp32"]


def test_precision_auto_is_what_the_device_multiplies_in(script, monkeypatch):
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(common, "bf16_is_fast", lambda device, fast=fast: fast)
        args = common.training_parser("").parse_args(["--preset", "smoke"])
        _, _, runs = common.prepare(train_densenet_cifar.EXPERIMENT, args)
        assert {run.settings["precision"] for run in runs} == {precision}


# --- What is measured of them ------------------------------------------------------------------

def test_the_distance_from_the_initial_weights():
    nets, moved = ensemble(), ensemble()
    with torch.no_grad():
        for p in moved.members[1].parameters():
            p.mul_(1.5)
        for p in moved.members[2].parameters():
            p.zero_()
    assert common.distances(moved, nets).tolist() == pytest.approx([0, 0.5, 1])


def test_bytes_saved_for_backward_are_those_that_a_step_keeps(one_thread):
    """Counted without memory, they equal those of a real forward pass."""
    c = {"depth": 16, "growth": 4, "members": 2}
    counted = make_figures.bytes_saved_for_backward(
        make_figures.untrained("densenet_cifar", c), 5)
    nets = train_densenet_cifar.build({**c, "precision": "fp32"}, (3, 32, 32), 100,
                                      torch.Generator())
    kept, weights = {}, {p.data_ptr() for p in nets.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nets.train()(torch.randn(5, 3, 32, 32))
    assert counted == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    activations = 2 * 5 * 32 * 32 * 4 * (8 + 8 + 16)            # of the first bottlenecks alone
    assert counted > activations


def test_a_filter_montage_has_one_scale():
    filters = torch.zeros(2, 3, 3, 3, 3).numpy()
    filters[1, 2] = 0.5
    tiles = make_figures.filter_montage(filters, 0.5)
    assert tiles.shape == (13, 9, 3)
    assert (tiles[1:4, 1:4] == 0.5).all()                       # a filter of zeros is grey
    assert (tiles[9:12, 5:8] == 1).all() and math.isclose(tiles[5:8, 5:8].mean(), 0.5)
