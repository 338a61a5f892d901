"""Networks, data splits and the training loop."""

import copy
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
            "validation": 100, "test": 150, "batch": 40, "augment": False, "momentum": 0.9,
            "nesterov": False, "weight_decay": 0.0, "decay": []}


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
        common.training_step(ensemble, optimizer, scores, 0, images, targets)
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
    assert not torch.equal(common.split(60_000, trial + 1, 10_000)[1], validation)


@pytest.mark.parametrize("validation", [0, 10_000])
def test_a_reduced_split_is_drawn_by_trial(validation):
    everything, _ = common.split(60_000, 0, validation)
    few, held_out = common.split(60_000, 0, validation, 2_000)
    assert len(few) == 2_000 and torch.isin(few, everything).all()
    assert not torch.isin(few, held_out).any()
    assert few.max() > 50_000 and few.unique().numel() == 2_000
    assert torch.isin(common.split(60_000, 1, validation, 2_000)[0], few).sum() < 200
    assert torch.equal(common.split(60_000, 0, validation, len(everything))[0], everything)


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

def unlearn(monkeypatch, since):
    """From an epoch on, the loss is climbed: the last epoch is not the best."""
    monkeypatch.setattr(common, "rate_at", lambda s, epoch: s["lr"] * (1 if epoch < since else -1))


def test_the_reported_epoch_is_the_first_minimum_of_validation_error(data, monkeypatch):
    unlearn(monkeypatch, since=6)
    run = a_run(lam=0.9, epochs=8)
    ensemble, history, epoch, test = common.train(EXPERIMENT, run, data)
    errors = [validation["ensemble_error"] for _, validation in history]
    assert len(errors) == 8 and epoch == 1 + int(np.argmin(errors))
    assert epoch < 8, "the case worth testing"
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


@pytest.mark.parametrize("stacking, validation", [("validation", 100), ("training", 100),
                                                  ("training", 0)])
def test_test_labels_decide_nothing(data, tmp_path, monkeypatch, stacking, validation):
    """With other test labels the same weights, epoch, penalty and stacked logits come out."""
    shuffled = replace(data, test_labels=data.test_labels.flip(0))
    outcome, scored, add = [], [], common.Scores.add
    monkeypatch.setattr(common.Scores, "add", lambda self, logits, *rest: (
        scored.append(logits), add(self, logits, *rest)))
    for name, images in (("a", data), ("b", shuffled)):
        joint = a_run(weights=True, validation=validation)
        common.do_run(EXPERIMENT, joint, images, tmp_path / name, lambda *_: None)
        stacked = a_run("stacking", stacking=stacking, folds=2, penalties=[0.01, 1.0],
                        validation=validation)
        result = common.do_run(EXPERIMENT, stacked, images, tmp_path / name, lambda *_: None)
        folder = tmp_path / name / stacked.path
        outcome.append((common.load_weights(tmp_path / name / joint.path, "cpu"), scored[-1],
                        common.load_history(folder)["cross_validated_loss"], result["penalty"]))
    (one, logits, losses, penalty), (other, other_logits, other_losses, other_penalty) = outcome
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert losses.tolist() == other_losses.tolist() and penalty == other_penalty
    assert logits.shape == (len(data.test_labels), 1, 10) and torch.equal(logits, other_logits)


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


# --- The protocol of the networks with convolutions ---------------------------------------------

PAPERS_RATES = {     # epoch -> learning rate, appendix B.2 and B.3
    "densenet_cifar": {1: 0.1, 150: 0.1, 151: 0.01, 225: 0.01, 226: 0.001, 300: 0.001},
    "convnet_cifar": {1: 0.1, 200: 0.1, 201: 0.01, 300: 0.01, 301: 0.001, 400: 0.001},
}


@pytest.mark.parametrize("name", PAPERS_RATES)
def test_the_learning_rate_of_each_epoch(name):
    experiment = common.experiment_of(name)
    block = common.experiment_settings(common.load_preset("paper"), "paper", experiment)
    run, *_ = common.list_runs("paper", experiment, block, {}, lambdas=[0])
    rates = [common.rate_at(run.settings, epoch) for epoch in range(1, block["epochs"] + 1)]
    assert rates == sorted(rates, reverse=True)
    for epoch, rate in PAPERS_RATES[name].items():
        assert rates[epoch - 1] == pytest.approx(rate, rel=1e-12)


def test_few_epochs_begin_at_the_full_rate():
    """The rate falls once a share of the epochs has passed, and not within an epoch or before."""
    for epochs, expected in ((1, [1]), (2, [1, 0.1]), (3, [1, 1, 0.1]), (4, [1, 1, 0.1, 0.01])):
        settings = {"lr": 1.0, "epochs": epochs, "decay": [0.5, 0.75]}
        assert [common.rate_at(settings, epoch) for epoch in range(1, epochs + 1)] == (
            pytest.approx(expected))


def test_the_optimizer_steps_at_the_rate_of_the_epoch(data, monkeypatch):
    rates = []
    real = common.training_step
    monkeypatch.setattr(common, "training_step", lambda ensemble, optimizer, *a: rates.append(
        optimizer.param_groups[0]["lr"]) or real(ensemble, optimizer, *a))
    common.train(EXPERIMENT, a_run(decay=[0.5, 0.75], batch=300), data)
    assert rates == pytest.approx([0.4, 0.4, 0.04, 0.004])


def captures(monkeypatch, replaying=lambda work: work):
    """Makes training on the CPU take the road of CUDA, with a stand-in for the graph alone.

    `replaying` makes of the recorded call what a replay does.
    """
    def record(work):
        for _ in range(4):              # the warm-up and the recording change all that a step does
            work()
        return replaying(work)

    def stepper(run, ensemble, optimizer, scores, batches, eager=False):
        def step(rows):
            common.training_step(ensemble, optimizer, scores, run.lam, *batches.take(rows))
        optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"])
        return common.captured(step, ensemble, optimizer, scores, torch.arange(batches.size))
    monkeypatch.setattr(common, "record", record)
    monkeypatch.setattr(common, "stepper", stepper)


def equal(one, other):
    """Are two results of common.train the same, but for the last places of the rate in fp32?"""
    for p, q in zip(one[0].state_dict().values(), other[0].state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    for epoch, other_epoch in zip(one[1], other[1], strict=True):
        for scores, other_scores in zip(epoch, other_epoch, strict=True):
            for key in scores:
                assert scores[key] == pytest.approx(other_scores[key], rel=1e-3, nan_ok=True), key
    return one[2] == other[2]


@pytest.mark.parametrize("changes", [{}, {"bagging": "weights"}, {"bagging": "resample"},
                                     {"augment": True, "decay": [0.5], "weight_decay": 0.01}])
def test_captured_steps_equal_eager_ones(data, monkeypatch, changes):
    """A whole run: order, odd last batch, rates, momentum, scores, and the draws of each epoch."""
    eager = common.train(EXPERIMENT, a_run(lam=0.0, **changes), data)
    captures(monkeypatch)
    assert equal(common.train(EXPERIMENT, a_run(lam=0.0, **changes), data), eager)


def test_captured_steps_of_batch_norm_equal_eager_ones(colour, monkeypatch):
    experiment, run = common.experiment_of("densenet_cifar"), small_densenet()
    eager = common.train(experiment, run, colour)
    captures(monkeypatch)
    assert equal(common.train(experiment, run, colour), eager)


@pytest.mark.parametrize("wrong", [lambda work: lambda: None,                 # nothing, or twice
                                   lambda work: lambda: (work(), work())])
def test_a_replay_that_is_not_the_step_is_refused(data, monkeypatch, wrong):
    captures(monkeypatch, wrong)
    with pytest.raises(common.Refused, match=r"differs from an eager one by .* add --eager"):
        common.train(EXPERIMENT, a_run(), data)


def test_a_step_that_cannot_be_captured_is_told(data, monkeypatch):
    def record(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
    captures(monkeypatch)
    monkeypatch.setattr(common, "record", record)
    with pytest.raises(common.Refused, match=r"capturing\): add --eager"):
        common.train(EXPERIMENT, a_run(), data)


def test_without_a_validation_split_the_last_epoch_is_reported(data, tmp_path, monkeypatch):
    unlearn(monkeypatch, since=6)
    run = a_run(lam=0.9, epochs=8, validation=0, train=None)
    result = common.do_run(EXPERIMENT, run, data, tmp_path, lambda *_: None)
    history = common.load_history(tmp_path / run.path)
    assert result["epoch"] == 8 and "validation_error" not in result
    assert result["test_ensemble_error"] == pytest.approx(history["test_ensemble_error"][-1])
    assert history["test_ensemble_error"].argmin() < 7, "the case worth testing"
    assert history["reported_test_member_error"].shape == (4,)
    assert not any(key.startswith("validation") for key in history)
    training, held_out = common.split(400, 0, 0)
    assert training.tolist() == list(range(400)) and len(held_out) == 0


def small_densenet(method="joint", **changes):
    """A run of a small DenseNet ensemble on 3-channel images."""
    settings = SETTINGS | {"members": 3, "depth": 10, "growth": 3, "precision": "fp32", "lr": 0.1,
                           "train": 60, "validation": 0, "epochs": 1, "batch": 20,
                           "augment": True, "weight_decay": 1e-3}
    return common.Run("test", "densenet_cifar", "small", method, 0, 0, settings | changes, False)


@pytest.fixture(scope="module")
def colour():
    return common.synthetic(10, (3, 16, 16), 60, 30)


def test_independent_at_its_own_rate_minimises_the_sum_of_the_losses(colour):
    """Method `independent`: SGD on the sum, at the rate and the weight decay of the shared loss."""
    experiment = common.experiment_of("densenet_cifar")
    shared = small_densenet(augment=False)
    run = replace(shared, method="independent",
                  settings=shared.settings | common.own_rate(shared.settings))
    start, _ = common.new_ensemble(experiment, run, colour)
    trained, *_ = common.train(experiment, run, colour)
    sgd = torch.optim.SGD(start.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for rows in torch.randperm(60, generator=run.generator("order")).split(20):
        logits = start.train()(colour.normalise(colour.train_images[rows]))
        loss = sum(F.cross_entropy(logits[:, m], colour.train_labels[rows]) for m in range(3))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    for p, q in zip(start.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5)


def test_bagging_by_weights_is_refused_where_batch_norm_sees_all_images(colour):
    with pytest.raises(common.Refused, match="--set bagging=resample"):
        common.new_ensemble(common.experiment_of("densenet_cifar"),
                            small_densenet("bagging", bagging="weights"), colour)


def test_a_bagged_densenet_trains_on_its_own_images_labels_and_moves(colour):
    """Each member equals a DenseNet alone on its bootstrap, batch norm's statistics included."""
    experiment = common.experiment_of("densenet_cifar")
    run = small_densenet("bagging", bagging="resample")
    start, _ = common.new_ensemble(experiment, run, colour)
    networks = [copy.deepcopy(member) for member in start.members]
    trained, *_ = common.train(experiment, run, colour)
    draws = common.bootstraps(60, 3, run.generator("bootstrap"))
    moves = common.draw_moves((60, 3), run.generator("augmentation"))
    padded = F.pad(colour.train_images, [4] * 4)
    order = torch.randperm(60, generator=run.generator("order"))
    assert not torch.equal(draws[:, 0], draws[:, 1])
    for m, network in enumerate(networks):
        sgd = torch.optim.SGD(network.parameters(), lr=0.1 / 3, momentum=0.9, weight_decay=3e-3)
        for rows in order.split(20):
            own = draws[rows, m]
            images = common.crop_and_flip(padded, own, moves[rows, m])
            sgd.zero_grad()
            F.cross_entropy(network(colour.normalise(images)), colour.train_labels[own]).backward()
            sgd.step()
        for p, q in zip(network.state_dict().values(), trained.members[m].state_dict().values(),
                        strict=True):
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4)


def test_augmentation_is_of_the_trial_and_moves_with_the_seed(colour, monkeypatch):
    seen = []
    real = common.crop_and_flip
    monkeypatch.setattr(common, "crop_and_flip", lambda padded, rows, moves: seen.append(
        moves.sum().item()) or real(padded, rows, moves))
    experiment = common.experiment_of("densenet_cifar")
    for changes in ({}, {"lr": 0.01}, {"seed": 1}):
        common.train(experiment, small_densenet(**changes), colour)
    assert seen[:3] == seen[3:6] != seen[6:]


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"),
     ["2.50 GiB more", "70.0 of 80.0 GB"]),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to "
                  "allocate 123 bytes. Error code 12"), ["123 bytes more"])])
def test_too_little_memory_is_told_and_nothing_is_written(data, tmp_path, monkeypatch, error,
                                                          words):
    def fail(*_):
        raise error
    monkeypatch.setattr(common, "training_step", fail)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 10**9, 80 * 10**9))
    with pytest.raises(common.Refused) as refusal:
        common.do_run(EXPERIMENT, a_run(), data, tmp_path, lambda *_: None)
    for word in (*words, "4x3H lambda 0 trial 0", "--set batch=20 instead of 40", "members"):
        assert word in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_taken_for_too_little_memory(data, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(common, "training_step", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        common.do_run(EXPERIMENT, a_run(), data, tmp_path, lambda *_: None)
