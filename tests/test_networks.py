"""MLPs, DenseNets and ConvNets, and ensembles of them, against the definitions and stock networks."""

import common
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
from study import command, plan
from train_convnet_cifar import convnet
from train_densenet_cifar import densenet_bc
from train_mlp_fmnist import MLPEnsemble

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as tv


def paper(name):
    """The block of an experiment in the paper's preset."""
    return plan.experiment_settings(plan.load_preset("paper"), "paper", name)


def ensemble(members=3, precision="fp32", seed=0):
    """A small ensemble with batch norm."""
    return common.Ensemble(lambda: densenet_bc(10, 4, 3, 7), members, torch.Generator().manual_seed(seed), precision)


def images(*shape, seed=0):
    return torch.randn(*shape, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def equal(one, other, error=1e-12):
    torch.testing.assert_close(one, other, rtol=0, atol=error)


# --- The MLPs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_the_vectorised_mlps_equal_stock_networks(shared):
    mlps = MLPEnsemble(5, 3, 28 * 28, 10, torch.Generator().manual_seed(0)).double()
    networks = []
    for m in range(5):
        networks.append(nn.Sequential(nn.Flatten(), nn.Linear(784, 3), nn.ReLU(), nn.Linear(3, 10)).double())
        for p, q in zip(networks[m].parameters(), mlps.parameters(), strict=True):
            p.data = q.data[m].clone()
    x = torch.randn(6, *(() if shared else (5,)), 1, 28, 28, dtype=torch.double)
    logits = mlps(x)
    one_by_one = torch.stack([network(x if shared else x[:, m]) for m, network in enumerate(networks)], 1)
    equal(logits, one_by_one)
    upstream = torch.randn(6, 5, 10, dtype=torch.double)
    logits.backward(upstream)
    one_by_one.backward(upstream)
    for m, network in enumerate(networks):
        for p, q in zip(network.parameters(), mlps.parameters(), strict=True):
            equal(q.grad[m], p.grad)


def test_the_initial_weights_of_an_mlp_are_pytorchs_default():
    mlps = MLPEnsemble(64, 16, 784, 10, torch.Generator().manual_seed(0))
    for p, fan_in in zip(mlps.parameters(), (784, 784, 16, 16), strict=True):
        assert p.abs().max() <= fan_in ** -0.5 and p.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)


# --- The architectures ---------------------------------------------------------------------------


@pytest.mark.parametrize("module, name, total", [
    (train_mlp_fmnist, "1x1024H", 814_090), (train_mlp_fmnist, "16x64H", 814_240),
    (train_mlp_fmnist, "64x16H", 814_720), (train_mlp_fmnist, "256x4H", 816_640),
    (train_densenet_cifar, "DN-High", 4 * 800_032), (train_densenet_cifar, "DN-Mid", 8 * 266_556),
    (train_densenet_cifar, "DN-Low", 16 * 105_316), (train_convnet_cifar, "ConvNet-0.07M", 16 * 62_820),
    (train_convnet_cifar, "ConvNet-0.14M", 16 * 143_076), (train_convnet_cifar, "ConvNet-0.29M", 16 * 290_660),
    (train_convnet_cifar, "ConvNet-0.60M", 16 * 598_628), (train_convnet_cifar, "ConvNet-1.20M", 16 * 1_188_708),
    (train_convnet_cifar, "10xConvNet-0.29M", 10 * 290_660)])
def test_every_configuration_has_the_counted_parameters(module, name, total):
    form = ((1, 28, 28), 10) if module is train_mlp_fmnist else ((3, 32, 32), 100)
    settings = paper(module.EXPERIMENT.name)["configurations"][name]
    assert sum(p.numel() for p in command.untrained_on_meta(module.build, settings, *form).parameters()) == total


@pytest.mark.parametrize("batchnorm", [True, False])
def test_a_convnet_is_its_layers_written_out(batchnorm):
    network, x = convnet([4, 6], [1, 2], 1, batchnorm, 3, 5).double(), images(2).double()
    weights = [p.data for p in network.parameters()]
    nn.init.normal_(weights[1])
    h = x
    for stride in (1, 2):
        h = F.conv2d(h, weights.pop(0), None if batchnorm else weights.pop(0), stride, padding=1)
        h = F.batch_norm(h, None, None, weights.pop(0), weights.pop(0), training=True).relu() if batchnorm else h.relu()
    equal(network(x), h.mean((2, 3)) @ weights[0].T + weights[1])


def torchvisions_densenet(mine, depth, growth):
    """torchvision's DenseNet-BC for small images, with the weights of mine: a plain convolution replaces its stem."""
    network = torchvision.models.DenseNet(growth, 3 * ((depth - 4) // 6,), num_init_features=2 * growth, num_classes=10)
    network.features.conv0 = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        delattr(network.features, name)
    for p, q in zip(mine.parameters(), network.parameters(), strict=True):          # in the same order
        q.data = p.detach().clone()
    return network.double()


def test_one_densenet_trains_as_torchvisions_does(monkeypatch):
    """12 steps in float64, with crops, flips, momentum, weight decay and both falls of the rate: the same weights.

    The same running statistics as well, and the same logits in evaluation.
    """
    normalise = common.Data.normalise
    monkeypatch.setattr(common.Data, "normalise", lambda data, images: normalise(data, images).double())
    data = common.synthetic(10, (3, 16, 16), 60, 20)
    s = {key: paper("densenet_cifar")[key] for key in plan.SHARED} | {
        "members": 1, "depth": 16, "growth": 4, "precision": "fp32", "lr": 0.1, "seed": 0, "epochs": 4, "batch": 20}
    run = plan.Run("test", "densenet_cifar", "one", "joint", 1.0, 0, s, False)
    start, trained = (make(lambda *form: train_densenet_cifar.build(*form).double(), run, data)[0]
                      for make in (common.new_ensemble, common.train))
    other = torchvisions_densenet(start, 16, 4)
    sgd = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    order, augmentation = run.generator("order"), run.generator("augmentation")
    padded = F.pad(data.train_images, [4] * 4)
    for epoch in range(4):
        for group in sgd.param_groups:
            group["lr"] = 0.1 ** (1 + (epoch >= 2) + (epoch >= 3))      # from half and three quarters on
        corners = torch.randint(9, (60, 2), generator=augmentation).tolist()
        flips = torch.randint(2, (60,), generator=augmentation).tolist()
        for batch in torch.randperm(60, generator=order).split(20):
            crops = [tv.crop(tv.hflip(padded[i]) if flips[i] else padded[i], *corners[i], 16, 16) for i in batch]
            sgd.zero_grad()
            F.cross_entropy(other(data.normalise(torch.stack(crops))), data.train_labels[batch]).backward()
            sgd.step()
    statistics = [buffer for buffer in other.buffers() if buffer.dim()]             # not the number of batches
    for mine, theirs in ((trained.parameters(), other.parameters()), (trained.buffers(), statistics)):
        for p, q in zip(mine, theirs, strict=True):
            equal(p, q, 1e-8)
    test_images = data.normalise(data.test_images)
    equal(trained.eval()(test_images)[:, 0], other.eval()(test_images), 1e-8)
    assert not torch.equal(next(start.parameters()), next(trained.parameters()))


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
        assert (member[-1].bias == 0).all()
        assert member[-1].weight.std().item() == pytest.approx((member[-1].in_features * 3) ** -0.5, rel=0.05)
    assert not torch.equal(*(member[0].weight for member in nets.members))


def test_initial_weights_are_of_the_generators_seed_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    one, same, other = (ensemble(seed=seed).members[1][0].weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_member_gets_a_copy_of_the_shared_images(precision):
    """Not of its own making either: one copy is kept for the backward pass of all members."""
    nets, kept = ensemble(precision=precision), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nets(images(4))
    kept = [tensor for tensor in kept if tensor.shape == images(4).shape]
    assert len(kept) == 3 and len({tensor.data_ptr() for tensor in kept}) == 1


# --- Memory and precision -----------------------------------------------------------------------------------


def test_bf16_agrees_with_fp32_within_its_error():
    """Five steps of SGD: the losses agree to a few of bf16's last places (2 ** -8)."""
    losses = {"fp32": [], "bf16": []}
    for precision, found in losses.items():
        nets = ensemble(precision=precision).train()
        sgd = torch.optim.SGD(nets.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            logits = nets(images(24, seed=step))
            assert logits.dtype == torch.float32
            loss = common.joint_loss(logits, torch.arange(24) % 7, 0.5)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            found.append(loss.item())
        assert {tensor.dtype for tensor in nets.state_dict().values()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=4 * 2 ** -8) and losses["bf16"] != losses["fp32"]


def test_bytes_saved_for_backward_are_those_that_a_step_keeps():
    """Counted without memory, they equal those of a real forward pass in fp32."""
    settings = {"depth": 16, "growth": 4, "members": 2, "batch": 5, "precision": "bf16"}
    build, form = train_densenet_cifar.build, ((3, 32, 32), 100)
    nets = build({**settings, "precision": "fp32"}, *form, torch.Generator())
    kept, weights = {}, {p.data_ptr() for p in nets.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nets.train()(torch.randn(5, 3, 32, 32))
    counted = command.bytes_saved_for_backward(build, settings, *form)
    assert counted == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
