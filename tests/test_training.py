"""Networks, data splits and the training loop."""

import math
from dataclasses import replace

import common
import train_mlp_fmnist
from train_mlp_fmnist import EXPERIMENT, MLPEnsemble

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

SETTINGS = {"members": 4, "hidden": 3, "seed": 0, "lr": 0.4, "epochs": 4, "train": 300,
            "validation": 100, "test": 150, "batch": 40, "momentum": 0.9, "weight_decay": 0.0}


def a_run(method="joint", lam=0.0, trial=0, weights=False, **changes):
    return common.Run("test", "mlp_fmnist", "4x3H", method, lam, trial, SETTINGS | changes, weights)


@pytest.fixture(scope="module")
def data():
    return common.synthetic(10, (1, 28, 28), 400, 150)


def stock_networks(ensemble):
    """The M stock networks that an MLPEnsemble stands for, with its weights."""
    members, hidden, inputs = ensemble.hidden_weight.shape
    networks = []
    for m in range(members):
        network = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU(),
                                nn.Linear(hidden, ensemble.output_bias.shape[1]))
        for p, q in zip(network.parameters(), ensemble.parameters(), strict=True):
            p.data = q.data[m].clone()
        networks.append(network.to(ensemble.hidden_weight.dtype))
    return networks


# --- Networks ----------------------------------------------------------------------------------

@pytest.mark.parametrize("shared", [True, False])
def test_the_vectorised_mlps_equal_stock_networks(shared):
    ensemble = MLPEnsemble(5, 3, 28 * 28, 10, torch.Generator().manual_seed(0)).double()
    networks = stock_networks(ensemble)
    images = torch.randn(6, *(() if shared else (5,)), 1, 28, 28, dtype=torch.double)
    logits = ensemble(images)
    one_by_one = torch.stack([network(images if shared else images[:, m])
                              for m, network in enumerate(networks)], 1)
    assert logits.shape == (6, 5, 10)
    torch.testing.assert_close(logits, one_by_one, rtol=0, atol=1e-12)
    upstream = torch.randn(6, 5, 10, dtype=torch.double)
    logits.backward(upstream)
    one_by_one.backward(upstream)
    for m, network in enumerate(networks):
        for p, q in zip(network.parameters(), ensemble.parameters(), strict=True):
            torch.testing.assert_close(q.grad[m], p.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, count", [("1x1024H", 814_090), ("16x64H", 814_240),
                                         ("64x16H", 814_720), ("256x4H", 816_640)])
def test_every_configuration_spends_the_same_parameters(name, count):
    block = common.load_preset("paper")["mlp_fmnist"]["configurations"][name]
    ensemble = train_mlp_fmnist.build(block, (1, 28, 28), 10, torch.Generator())
    assert sum(p.numel() for p in ensemble.parameters()) == count
    assert sum(p.numel() for net in stock_networks(ensemble) for p in net.parameters()) == count


def test_initial_weights_are_pytorchs_default():
    ensemble = MLPEnsemble(64, 16, 784, 10, torch.Generator().manual_seed(0))
    for p, fan_in in zip(ensemble.parameters(), (784, 784, 16, 16), strict=True):
        bound = fan_in ** -0.5
        assert p.abs().max() <= bound
        assert p.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_lambda_0_is_independent_training_at_lr_over_m(data):
    """k steps of SGD with momentum at lambda 0 and lr = M networks, each alone, at lr / M."""
    ensemble, optimizer = common.new_ensemble(EXPERIMENT, a_run(), data)
    ensemble.double()
    networks = stock_networks(ensemble)
    alone = [torch.optim.SGD(net.parameters(), lr=SETTINGS["lr"] / 4, momentum=0.9)
             for net in networks]
    optimizer = torch.optim.SGD(ensemble.parameters(), lr=SETTINGS["lr"], momentum=0.9)
    scores = common.Scores(4, "cpu")
    for rows in torch.arange(200).split(40):
        images, targets = data.normalise(data.train_images[rows]).double(), data.train_labels[rows]
        common.training_step(ensemble, optimizer, scores, images, targets, 0)
        for network, sgd in zip(networks, alone, strict=True):
            sgd.zero_grad()
            F.cross_entropy(network(images), targets).backward()
            sgd.step()
    for m, network in enumerate(networks):
        for p, q in zip(network.parameters(), ensemble.parameters(), strict=True):
            torch.testing.assert_close(q[m], p, rtol=0, atol=1e-12)


# --- Seeds, splits, bootstraps -----------------------------------------------------------------

def test_the_splits_are_the_authors():
    """First validation indices of their RandomState(trial).choice, from their code."""
    _, held_out = common.split(60_000, 0, 10_000)
    assert held_out[:5].tolist() == [3048, 19563, 58303, 8870, 40228]
    _, held_out = common.split(50_000, 0, 10_000)
    assert held_out[:5].tolist() == [11841, 19602, 45519, 25747, 42642]


@pytest.mark.parametrize("trial", [0, 4])
def test_a_split_is_disjoint_and_complete(trial):
    training, validation = common.split(60_000, trial, 10_000)
    assert len(training) == 50_000 and len(validation) == 10_000
    assert torch.cat([training, validation]).unique().numel() == 60_000
    assert torch.equal(common.split(60_000, trial, 10_000, 2_000)[0], training[:2_000])
    assert not torch.equal(common.split(60_000, trial + 1, 10_000)[1], validation)


def test_the_seed_moves_everything_but_the_split(data, monkeypatch):
    splits = []
    real = common.split
    monkeypatch.setattr(common, "split", lambda *a: splits.append(real(*a)) or splits[-1])
    outcome = [common.train(EXPERIMENT, a_run(seed=seed, epochs=1), data) for seed in (0, 0, 1)]
    assert torch.equal(splits[0][1], splits[2][1])
    first, again, other = (ensemble.hidden_weight for ensemble, *_ in outcome)
    assert torch.equal(first, again) and not torch.equal(first, other)
    for purpose in ("initialisation", "order", "bootstrap"):
        here, there = (torch.rand(4, generator=a_run(seed=s).generator(purpose)) for s in (0, 1))
        assert not torch.equal(here, there)


def test_the_lambdas_of_a_trial_share_initial_weights_and_order():
    one, other = a_run(lam=0), a_run(lam=1, lr=0.1)
    bagged, next_trial = a_run("bagging"), a_run(trial=1)
    for purpose in ("initialisation", "order"):
        draw = torch.rand(9, generator=one.generator(purpose))
        assert torch.equal(draw, torch.rand(9, generator=other.generator(purpose)))
        assert torch.equal(draw, torch.rand(9, generator=bagged.generator(purpose)))
        assert not torch.equal(draw, torch.rand(9, generator=next_trial.generator(purpose)))


def test_a_bootstrap_has_n_draws():
    draws = common.bootstraps(5_000, 6, torch.Generator().manual_seed(0))
    counts = common.multiplicities(draws)
    assert draws.shape == counts.shape == (5_000, 6)
    assert counts.sum(0).tolist() == [5_000] * 6
    share = (counts > 0).double().mean(0)
    assert ((share - (1 - math.exp(-1))).abs() < 0.02).all()              # 63 % of the images
    assert not torch.equal(counts[:, 0], counts[:, 1])


def test_weighing_by_multiplicity_is_the_bootstraps_own_gradient(data):
    """Over the whole split, weights and resampled copies give every member the same gradient."""
    draws = common.bootstraps(120, 4, torch.Generator().manual_seed(0))
    gradients = []
    for resample in (False, True):
        ensemble, _ = common.new_ensemble(EXPERIMENT, a_run(), data)
        ensemble.double()
        rows = draws if resample else torch.arange(120)
        weights = None if resample else common.multiplicities(draws).double()
        images = data.normalise(data.train_images[rows]).double()
        common.fused_joint_loss(ensemble(images), data.train_labels[rows], 0, weights)[0].backward()
        gradients.append([p.grad for p in ensemble.parameters()])
    for weighed, copied in zip(*gradients, strict=True):
        torch.testing.assert_close(weighed, copied, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bagging", ["weights", "resample"])
def test_bagging_gives_each_member_its_own_bootstrap(data, bagging):
    """A member of a bagged ensemble equals the stock network trained on its own bootstrap."""
    run = a_run("bagging", bagging=bagging, epochs=1)
    start, _ = common.new_ensemble(EXPERIMENT, run, data)
    networks = stock_networks(start)
    trained, *_ = common.train(EXPERIMENT, run, data)
    training, _ = common.split(400, 0, 100, 300)
    draws = common.bootstraps(300, 4, run.generator("bootstrap"))
    counts = common.multiplicities(draws)
    order = torch.randperm(300, generator=run.generator("order"))
    for m, network in enumerate(networks):
        sgd = torch.optim.SGD(network.parameters(), lr=SETTINGS["lr"] / 4, momentum=0.9)
        for rows in order.split(40):
            own = training[draws[rows, m] if bagging == "resample" else rows]
            losses = F.cross_entropy(network(data.normalise(data.train_images[own])),
                                     data.train_labels[own], reduction="none")
            sgd.zero_grad()
            (losses * (1 if bagging == "resample" else counts[rows, m])).mean().backward()
            sgd.step()
        for p, q in zip(network.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(q[m], p, rtol=0, atol=1e-5)


# --- The training loop -------------------------------------------------------------------------

def test_the_reported_epoch_is_the_first_minimum_of_validation_error(data):
    run = a_run(lam=0.9, epochs=8, lr=4.0)
    ensemble, history, epoch, test = common.train(EXPERIMENT, run, data)
    errors = [validation["ensemble_error"] for _, validation in history]
    assert len(errors) == 8 and epoch == 1 + int(np.argmin(errors))
    assert epoch < 8, "the case worth testing: the last epoch is not the best"
    _, held_out = common.split(400, 0, 100, 300)
    there = common.evaluate(ensemble, data, data.train_images[held_out],
                            data.train_labels[held_out])
    assert there["ensemble_error"] == errors[epoch - 1]
    assert test["ensemble_error"] == common.evaluate(
        ensemble, data, data.test_images, data.test_labels)["ensemble_error"]


def test_of_equal_epochs_the_first_is_reported(data):
    """At a learning rate that moves nothing every epoch has the same validation error."""
    _, history, epoch, _ = common.train(EXPERIMENT, a_run(lr=1e-12, epochs=3), data)
    assert len({validation["ensemble_error"] for _, validation in history}) == 1 and epoch == 1


def test_test_labels_decide_nothing(data, tmp_path):
    """With other test labels the same weights, epoch and stacking penalty come out."""
    shuffled = replace(data, test_labels=data.test_labels.flip(0))
    outcome = []
    for name, images in (("a", data), ("b", shuffled)):
        common.do_run(EXPERIMENT, a_run(weights=True), images, tmp_path / name, lambda *_: None)
        stacking = a_run("stacking", stacking="validation", folds=2, penalties=[0.01, 1.0])
        result = common.do_run(EXPERIMENT, stacking, images, tmp_path / name, lambda *_: None)
        folder = tmp_path / name / stacking.path
        outcome.append((common.load_weights(tmp_path / name / a_run().path, "cpu"),
                        common.load_history(folder)["cross_validated_loss"], result["penalty"]))
    (one, losses, penalty), (other, other_losses, other_penalty) = outcome
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses.tolist() == other_losses.tolist() and penalty == other_penalty


def test_stacking_starts_from_plain_averaging(data, tmp_path):
    """A penalty without bound leaves the combiner at the mean; a mild one fits the split better."""
    joint = common.do_run(EXPERIMENT, a_run(weights=True), data, tmp_path, lambda *_: None)
    losses = {}
    for penalty in (1e9, 1e-3):
        run = a_run("stacking", stacking="training", folds=2, penalties=[penalty])
        result = common.do_run(EXPERIMENT, run, data, tmp_path, lambda *_: None)
        losses[penalty] = common.load_history(tmp_path / run.path)["cross_validated_loss"][0]
    assert losses[1e-3] < losses[1e9]
    run = a_run("stacking", stacking="validation", folds=2, penalties=[1e9])
    result = common.do_run(EXPERIMENT, run, data, tmp_path, lambda *_: None)
    # Only the bias, which is not penalised, can have moved.
    assert result["test_ensemble_loss"] == pytest.approx(joint["test_ensemble_loss"], abs=0.1)


def test_the_penalty_of_stacking_is_chosen_on_images_held_out(data, tmp_path):
    """The stored loss of a penalty is that of combiners fitted without the images it is read on."""
    common.do_run(EXPERIMENT, a_run(weights=True), data, tmp_path, lambda *_: None)
    run = a_run("stacking", stacking="validation", folds=2, penalties=[100.0, 0.1, 1e-3])
    result = common.do_run(EXPERIMENT, run, data, tmp_path, lambda *_: None)
    stored = common.load_history(tmp_path / run.path)
    assert stored["penalty"].tolist() == [100.0, 0.1, 1e-3]
    assert result["penalty"] == stored["penalty"][stored["cross_validated_loss"].argmin()]

    _, held_out = common.split(400, 0, 100, 300)
    ensemble, _ = common.new_ensemble(EXPERIMENT, run, data)
    ensemble.load_state_dict(common.load_weights(tmp_path / a_run().path, "cpu"))
    x = common.predict(ensemble, data, data.train_images[held_out]).flatten(1).double()
    y = data.train_labels[held_out]
    fold = torch.randperm(100, generator=run.generator("folds")) % 2
    average = torch.eye(10, dtype=torch.double).repeat(1, 4) / 4
    losses = []
    for k in (0, 1):
        step, bias = (torch.zeros(size, dtype=torch.double, requires_grad=True)
                      for size in ((10, 40), 10))
        newton = torch.optim.LBFGS([step, bias], max_iter=2000, tolerance_change=0,
                                   line_search_fn="strong_wolfe")

        def closure(k=k, step=step, bias=bias, newton=newton):
            newton.zero_grad()
            logits = F.linear(x[fold != k], average + step, bias)
            loss = F.cross_entropy(logits, y[fold != k]) + 0.1 * step.square().sum()
            loss.backward()
            return loss
        newton.step(closure)
        logits = F.linear(x[fold == k], average + step, bias)
        losses.append(F.cross_entropy(logits, y[fold == k]).item())
    assert stored["cross_validated_loss"][1] == pytest.approx(sum(losses) / 2, rel=5e-3)


def test_a_diverged_run_is_recorded_and_leaves_no_numbers(data, tmp_path):
    run = a_run(lr=1e30, weights=True)
    result = common.do_run(EXPERIMENT, run, data, tmp_path, lambda *_: None)
    assert result["diverged_at_epoch"] == 1 and "test_ensemble_error" not in result
    assert common.finished(run, tmp_path) and not (tmp_path / run.path / "weights.pt").exists()
    stacking = a_run("stacking", stacking="validation", folds=2, penalties=[1.0])
    result = common.do_run(EXPERIMENT, stacking, data, tmp_path, lambda *_: None)
    assert result == {"diverged_at_epoch": 1}


# --- The known order of the lambdas ------------------------------------------------------------

def gain_of_joint_training():
    """Test error at lambda 0 minus at lambda 0.95 of many tiny networks: above 0 (Sec. 4)."""
    data = common.synthetic(10, (1, 28, 28), 2_500, 500)
    errors = []
    for lam in (0.0, 0.95):
        run = a_run(lam=lam, members=64, hidden=4, lr=1.28, train=2_000, validation=500, epochs=15)
        *_, test = common.train(EXPERIMENT, run, data)
        errors.append(test["ensemble_error"])
    return errors[0] - errors[1]


def test_joint_training_beats_independent_training_of_tiny_networks():
    assert gain_of_joint_training() > 0.02


def test_a_broken_loss_loses_that_order(monkeypatch):
    whole = common.fused_joint_loss
    monkeypatch.setattr(common, "fused_joint_loss", lambda z, y, lam, weights=None:
                        whole(z, y, -lam, weights))
    assert gain_of_joint_training() <= 0.02
