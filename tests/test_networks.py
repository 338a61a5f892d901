"""MLPs, DenseNets and ConvNets, and ensembles of them, against the definitions and stock networks."""

import contextlib
import copy
import csv
import importlib
import math
import subprocess
import sys
from dataclasses import replace

import study
import common
import folders
import presets
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist
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
    """The configurations of an experiment in the paper's preset."""
    return presets.experiment_settings(presets.load_preset("paper"), "paper", name)["configurations"]


def count(network):
    return sum(p.numel() for p in network.parameters())


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
    assert logits.shape == (6, 5, 10)
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
        bound = fan_in ** -0.5
        assert p.abs().max() <= bound and p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


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
    assert count(module.build(paper(module.EXPERIMENT.name)[name], *form, torch.Generator())) == total


def test_convnets_with_batch_norm_have_the_counted_parameters():
    counts = [62_980, 143_364, 291_076, 599_300, 1_189_636]
    for c, expected in zip(list(paper("convnet_cifar").values())[:5], counts, strict=True):
        network = convnet(c["filters"], c["strides"], 0, True, 3, 100)
        assert count(network) == expected and network(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


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


@pytest.fixture
def one_densenet(monkeypatch):
    """benchmarks/one_densenet.py, which has torchvision's DenseNet for small images."""
    monkeypatch.syspath_prepend(folders.HERE / "benchmarks")
    return importlib.import_module("one_densenet")


@pytest.mark.parametrize("training", [True, False])
def test_densenet_bc_computes_what_torchvisions_densenet_does(one_densenet, training):
    mine = densenet_bc(22, 6, 3, 10).double()
    for p in mine.parameters():
        nn.init.normal_(p, std=0.3)
    other = one_densenet.with_weights_of(mine, one_densenet.torchvisions_densenet(22, 6, 10).double())
    x = torch.randn(4, 3, 32, 32, dtype=torch.double)
    y, z = (network.train(training)(x) for network in (mine, other))
    equal(y, z, 1e-9)
    for out in (y, z):
        F.cross_entropy(out, torch.arange(4)).backward()
    for p, q in zip(mine.parameters(), other.parameters(), strict=True):
        equal(p.grad, q.grad, 1e-9)


def test_one_densenet_trains_as_torchvisions_does(monkeypatch, one_densenet):
    """50 steps with crops, flips, momentum, weight decay and both falls of the rate, on CIFAR-100 where data/ holds it,
    in double precision: the same weights and statistics."""
    normalise = common.Data.normalise
    monkeypatch.setattr(common.Data, "normalise", lambda data, images: normalise(data, images).double())
    real = common.DATASETS["CIFAR-100"].read(folders.HERE / "data")
    data = common.first_classes(real, 10) if real else common.synthetic(10, (3, 32, 32), 300, 50)
    data = replace(data, test_images=data.test_images[:50], test_labels=data.test_labels[:50])
    block = presets.experiment_settings(presets.load_preset("paper"), "paper", "densenet_cifar")
    s = {key: block[key] for key in presets.SHARED} | {
        "members": 1, "depth": 22, "growth": 6, "precision": "fp32", "lr": 0.1, "seed": 0, "epochs": 5, "train": 300,
        "batch": 30}
    run = study.Run("test", "densenet_cifar", "one", "joint", 1.0, 0, s, False)
    start, trained = (make(lambda *form: train_densenet_cifar.build(*form).double(), run, data)[0]
                      for make in (common.new_ensemble, common.train))
    other = one_densenet.with_weights_of(start, one_densenet.torchvisions_densenet(22, 6, 10).double())
    sgd = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    rows, _ = common.split(len(data.train_labels), 0, 0, 300)
    order, augmentation = run.generator("order"), run.generator("augmentation")
    padded, labels = F.pad(data.train_images[rows], [4] * 4), data.train_labels[rows]
    for epoch in range(5):
        for group in sgd.param_groups:
            group["lr"] = 0.1 ** (1 + (epoch >= 3) + (epoch >= 4))      # from half and three quarters on
        moves = common.draw_moves((300,), augmentation)
        for batch in torch.randperm(300, generator=order).split(30):
            images = torch.stack([tv.crop(padded[i], *moves[i, :2].tolist(), 32, 32) if not moves[i, 2] else tv.crop(
                tv.hflip(padded[i]), *moves[i, :2].tolist(), 32, 32) for i in batch.tolist()])
            sgd.zero_grad()
            F.cross_entropy(other(data.normalise(images)), labels[batch]).backward()
            sgd.step()
    statistics = [buffer for buffer in other.buffers() if buffer.dim()]             # not the number of batches
    for mine, theirs in ((trained.parameters(), other.parameters()), (trained.buffers(), statistics)):
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
    assert not torch.equal(next(start.parameters()), next(trained.parameters()))


def test_an_epoch_of_one_densenet_beside_torchvisions(one_densenet, tmp_path):
    """benchmarks/one_densenet.py on the stand-in: the two networks end with the same losses and errors."""
    settings = {"depth": 10, "growth": 4, "members": 1, "precision": "fp32"}
    (theirs,) = one_densenet.build(settings, (3, 32, 32), 7, torch.Generator().manual_seed(0)).members
    assert isinstance(theirs, torchvision.models.DenseNet)
    done = subprocess.run([sys.executable, one_densenet.__file__, "--preset", "smoke"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "torchvision: training loss" in done.stdout, done.stderr
    with open(tmp_path / "results" / "one_densenet.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    mine, theirs = rows
    assert [row["network"] for row in rows] == ["package", "torchvision"]
    for key in one_densenet.PARTS:
        assert float(mine[key]) == pytest.approx(float(theirs[key]), abs=1e-4), key


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
        assert (linear.bias == 0).all() and linear.weight.abs().max() <= linear.in_features ** -0.5
        assert linear.weight.std().item() == pytest.approx((linear.in_features * 3) ** -0.5, rel=0.05)
    assert not torch.equal(*(member[0].weight for member in nets.members))


def test_initial_weights_are_of_the_generators_seed_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    one, same, other = (ensemble(seed=seed).members[1][0].weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


# --- An ensemble is M networks -------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_equals_its_members_run_alone(shared, training):
    """Logits, gradients and batch norm's running statistics over three batches, of shared images or of own ones."""
    nets = ensemble().double()
    alone = [copy.deepcopy(member).train(training) for member in nets.members]
    upstream = torch.randn(6, 3, 7, dtype=torch.double)
    for seed in range(3):
        x = 2 + 3 * images(6, *(() if shared else (3,)), seed=seed).double()
        logits = nets.train(training)(x)
        assert logits.shape == (6, 3, 7)
        logits.backward(upstream)
        for m, network in enumerate(alone):
            out = network(x if shared else x[:, m])
            out.backward(upstream[:, m])
            equal(logits[:, m], out)
    for member, network in zip(nets.members, alone, strict=True):
        for p, q in zip(member.parameters(), network.parameters(), strict=True):
            equal(p.grad, q.grad, 1e-11)
        for p, q in zip(member.buffers(), network.buffers(), strict=True):
            equal(p, q)
        assert (member[1].layers[0].running_mean.abs().max() > 0) == training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_member_gets_a_copy_of_the_shared_images(precision):
    """Not of its own making either: one copy is kept for the backward pass of all members."""
    nets, kept = ensemble(precision=precision), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nets(images(4))
    kept = [tensor for tensor in kept if tensor.shape == images(4).shape]
    assert len(kept) == 3 and len({tensor.data_ptr() for tensor in kept}) == 1


def test_weights_with_counters_of_batches_load(tmp_path):
    """Earlier versions kept one for each batch norm; and so does a network whose batch norm needs it."""
    nets, other = ensemble(), ensemble(seed=1)
    assert not any(key.endswith("num_batches_tracked") for key in nets.state_dict())
    old = nets.state_dict()
    for key in [key for key in old if key.endswith("running_var")]:
        old[key.replace("running_var", "num_batches_tracked")] = torch.tensor(3)
    torch.save(old, tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert all(torch.equal(p, q) for p, q in zip(nets.state_dict().values(), other.state_dict().values(), strict=True))
    own = common.Ensemble(lambda: nn.BatchNorm2d(2, momentum=None), 2, torch.Generator())
    assert own.members[0].num_batches_tracked == 0 and len(own.state_dict()) == 10
    inside = nn.ModuleDict({"own": own, "beside": nn.BatchNorm2d(2)})          # others keep theirs
    inside.load_state_dict(inside.state_dict())


# --- Precision -----------------------------------------------------------------------------------


def test_bf16_agrees_with_fp32_within_its_error():
    """Five steps of SGD: the losses agree to a few of bf16's last places (2 ** -8)."""
    losses = {}
    for precision in ("fp32", "bf16"):
        nets = ensemble(precision=precision).train()
        sgd = torch.optim.SGD(nets.parameters(), lr=0.1, momentum=0.9)
        for step in range(5):
            logits = nets(images(24, seed=step))
            assert logits.dtype == torch.float32
            loss = common.joint_loss(logits, torch.arange(24) % 7, 0.5)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.setdefault(precision, []).append(loss.item())
        for layer in nets.modules():
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.running_var.dtype == layer.weight.dtype == torch.float32
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=4 * 2 ** -8)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("fast, precision", [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_what_the_device_multiplies_in(monkeypatch, fast, precision):
    monkeypatch.setattr(folders, "bf16_is_fast", lambda device: fast)
    args = study.training_parser("").parse_args(["--preset", "smoke"])
    _, _, runs = study.prepare(train_densenet_cifar.EXPERIMENT, args)
    assert {run.settings["precision"] for run in runs} == {precision}


@pytest.mark.parametrize("batch, size, refused", [(20, 4, True), (20, 8, False), (21, 4, False), (1, 4, True)])
def test_a_last_batch_of_one_image_that_batch_norm_cannot_take_is_refused(batch, size, refused):
    """61 images: three batches of 20 and one image, whose last feature maps have one pixel if it has 4x4."""
    data = common.synthetic(10, (3, size, size), 61, 10)
    settings = {"depth": 10, "growth": 2, "members": 2, "batch": batch, "train": None, "validation": 0}
    run = study.Run("test", "densenet_cifar", "small", "joint", 1.0, 0, settings, False)
    with pytest.raises(common.Refused, match=rf"batch {batch}: the last batch of 61 .* one image") if refused else (
            contextlib.nullcontext()):
        study.refuse_lone_images(train_densenet_cifar.EXPERIMENT, [run], lambda run: data)


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
    counted = study.bytes_saved_for_backward(build, settings, *form)
    assert counted == sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert counted > 2 * 5 * 32 * 32 * 4 * (8 + 8 + 16)         # activations of the first bottlenecks alone
