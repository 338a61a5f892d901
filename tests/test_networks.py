"""The form and the initial weights of networks. How they train is in test_training.py, against stock networks."""

import common
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
from study import finished, plan
from train_convnet_cifar import convnet
from train_densenet_cifar import densenet_bc
from train_mlp_fmnist import MLPEnsemble

import pytest
import torch
from torch import nn
from torch.nn import functional as F


def test_the_initial_weights_of_an_mlp_are_pytorchs_default():
    mlps = MLPEnsemble(64, 16, 784, 10, torch.Generator().manual_seed(0))
    for p, fan_in in zip(mlps.parameters(), (784, 784, 16, 16), strict=True):
        assert p.abs().max() <= fan_in ** -0.5 and p.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.05)


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
    block = plan.experiment_settings(plan.load_preset("paper"), "paper", module.EXPERIMENT.name)
    network = finished.untrained_on_meta(module.build, block["configurations"][name], *form)
    assert sum(p.numel() for p in network.parameters()) == total


@pytest.mark.parametrize("batchnorm", [True, False])
def test_a_convnet_is_its_layers_written_out(batchnorm):
    network, x = convnet([4, 6], [1, 2], 1, batchnorm, 3, 5).double(), torch.randn(2, 3, 12, 12, dtype=torch.double)
    weights = [p.data for p in network.parameters()]
    nn.init.normal_(weights[1])
    h = x
    for stride in (1, 2):
        h = F.conv2d(h, weights.pop(0), None if batchnorm else weights.pop(0), stride, padding=1)
        h = F.batch_norm(h, None, None, weights.pop(0), weights.pop(0), training=True).relu() if batchnorm else h.relu()
    torch.testing.assert_close(network(x), h.mean((2, 3)) @ weights[0].T + weights[1], rtol=0, atol=1e-12)


def test_initial_weights_are_of_each_member_and_of_the_generators_seed():
    """Convolutions are normal with variance 2 / (k * k * outputs of one member). The global state stays as it is."""
    before = torch.get_rng_state()
    nets, same, other = (common.Ensemble(lambda: densenet_bc(40, 12, 3, 100), 2, torch.Generator().manual_seed(seed))
                         for seed in (3, 3, 4))
    one, same, other = (each.members[1][0].weight for each in (nets, same, other))
    assert torch.equal(one, same) and not torch.equal(one, other)
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
    assert torch.equal(torch.get_rng_state(), before)
