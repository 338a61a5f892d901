"""Seeds and splits, the training loop, its schedule, bagging, stacking, and what a run says when it fails."""

import copy
import importlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import study
import common
import folders
import presets
import train_densenet_cifar
import train_mlp_fmnist
from train_mlp_fmnist import EXPERIMENT, build

import numpy as np
import pytest
import torch
from torch.nn import functional as F

SETTINGS = {"members": 4, "hidden": 3, "seed": 0, "lr": 0.4, "epochs": 4, "train": 300, "validation": 100, "test": 150,
            "batch": 40, "augment": False, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "decay": []}


def a_run(method="joint", lam=0.0, trial=0, weights=False, **changes):
    return study.Run("test", "mlp_fmnist", "4x3H", method, lam, trial, SETTINGS | changes, weights)


def a_densenet(method="joint", trial=0, **changes):
    """A run of a small DenseNet ensemble on `small_images(3)`."""
    settings = SETTINGS | {"members": 3, "depth": 10, "growth": 3, "precision": "fp32", "lr": 0.1, "train": 60,
                           "validation": 0, "epochs": 1, "batch": 20, "augment": True, "weight_decay": 1e-3}
    return study.Run("test", "densenet_cifar", "small", method, 0, trial, settings | changes, False)


def small_images(channels):
    return common.synthetic(10, *{1: ((1, 28, 28), 400, 150), 3: ((3, 16, 16), 60, 30)}[channels])


def builder(run):
    return train_mlp_fmnist.build if run.experiment == "mlp_fmnist" else train_densenet_cifar.build


@pytest.fixture(scope="module")
def data():
    return small_images(1)


# --- Splits, seeds, bootstraps -------------------------------------------------------------------


def test_the_splits_are_the_authors():
    """First validation indices of their RandomState(trial).choice, from their code."""
    for n, first in ((60_000, [3048, 19563, 58303, 8870, 40228]), (50_000, [11841, 19602, 45519, 25747, 42642])):
        assert common.split(n, 0, 10_000)[1][:5].tolist() == first


@pytest.mark.parametrize("validation", [0, 10_000])
def test_a_split_is_disjoint_complete_and_of_the_trial(validation):
    training, held_out = common.split(60_000, 4, validation)
    assert len(training) == 60_000 - validation and len(held_out) == validation
    assert torch.cat([training, held_out]).unique().numel() == 60_000
    assert not validation or not torch.equal(common.split(60_000, 5, validation)[1], held_out)

    few, same_held_out = common.split(60_000, 4, validation, 2_000)
    assert torch.equal(same_held_out, held_out)
    assert len(few) == few.unique().numel() == 2_000 and torch.isin(few, training).all() and few.max() > 50_000
    assert torch.isin(common.split(60_000, 5, validation, 2_000)[0], few).sum() < 200
    assert torch.equal(common.split(60_000, 4, validation, len(training))[0], training)


@pytest.mark.parametrize("purpose", ["initialisation", "order", "augmentation", "bootstrap", "folds", "drop"])
def test_random_numbers_are_of_the_purpose_the_trial_and_the_seed(purpose):
    """The lambdas and methods of a trial share them."""
    def draw(run, purpose=purpose):
        return torch.rand(9, generator=run.generator(purpose)).tolist()
    for run in (a_run(), a_run(lam=1, lr=0.1), a_run("bagging")):
        assert draw(run) == draw(a_run())
    others = (a_run(trial=1), a_run(seed=1), replace(a_run(), configuration="5x3H"),
              replace(a_run(), experiment="convnet_cifar"))
    assert all(draw(run) != draw(a_run()) for run in others) and draw(a_run()) != draw(a_run(), "other")


def test_the_initial_weights_are_of_the_seed(data):
    first, again, other = (common.new_ensemble(build, a_run(seed=seed), data)[0].hidden_weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_bootstrap_is_n_draws_and_its_multiplicities_weigh_the_loss_as_copies_do():
    draws = common.bootstraps(500, 6, torch.Generator().manual_seed(0))
    counts = common.multiplicities(draws)
    assert torch.equal(counts, F.one_hot(draws, 500).sum(0).T)
    assert ((counts > 0).double().mean(0) - (1 - math.exp(-1))).abs().max() < 0.04      # 63 % of the images
    assert not torch.equal(counts[:, 0], counts[:, 1])
    z, y = torch.randn(500, 6, 10, dtype=torch.double), torch.arange(500) % 10
    copies = common.bagging_loss(z[draws, torch.arange(6)], y[draws])
    assert common.bagging_loss(z, y, counts).item() == pytest.approx(copies.item(), rel=1e-13)


def single(ensemble, m):
    """A copy of member m, as an ensemble of one."""
    one = copy.deepcopy(ensemble)
    if isinstance(one, common.Ensemble):
        one.members = one.members[m:m + 1]
    else:
        for p in one.parameters():
            p.data = p.data[m:m + 1].clone()
    return one


@pytest.mark.parametrize("run", [
    *(a_run(method, 0, 1, validation=0, epochs=2, seed=2, bagging=bagging) for method, bagging in (
        ("joint", None), ("bagging", "weights"), ("bagging", "resample"))),
    *(a_densenet(method, 1, epochs=2, seed=2, bagging=bagging) for method, bagging in (
        ("joint", None), ("independent", None), ("bagging", "resample")))],
    ids=lambda run: f"{run.experiment} {run.method} {run.settings['bagging']}")
def test_a_member_equals_the_network_alone_on_its_own_images_labels_and_moves(run, monkeypatch):
    """At lambda 0 and in bagging at lr / M and M times the decay, which make up for Eq. 9's 1/M; and at lr itself in
    independent training. Batch norm's statistics are the member's own. All is in double precision."""
    normalise = common.Data.normalise
    monkeypatch.setattr(common.Data, "normalise", lambda data, images: normalise(data, images).double())
    s, data = run.settings, small_images(1 if run.experiment == "mlp_fmnist" else 3)
    rate, decay = s["lr"] / s["members"], s["weight_decay"] * s["members"]
    if run.method == "independent":
        run, rate, decay = replace(run, settings=s | study.own_rate(s)), s["lr"], s["weight_decay"]
    members, copies = s["members"], s["bagging"] == "resample"
    start, trained = (f(lambda *form: builder(run)(*form).double(), run, data)[0]
                      for f in (common.new_ensemble, common.train))
    training, _ = common.split(len(data.train_labels), 1, s["validation"], s["train"])
    n, labels = len(training), data.train_labels[training]
    draws = common.bootstraps(n, members, run.generator("bootstrap"))
    counts = common.multiplicities(draws)
    padded = F.pad(data.train_images[training], [4] * 4)
    for m in range(members):
        order, augmentation = run.generator("order"), run.generator("augmentation")
        network = single(start, m).train()
        sgd = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=decay)
        for _ in range(s["epochs"]):
            moves = torch.tensor([4, 4, 0]).expand(n, 3)                    # the image as it is
            if s["augment"]:
                moves = common.draw_moves(draws.shape, augmentation)[:, m] if copies else common.draw_moves(
                    (n,), augmentation)
            for rows in torch.randperm(n, generator=order).split(s["batch"]):
                own = draws[rows, m] if copies else rows
                logits = network(data.normalise(common.crop_and_flip(padded, own, moves[rows])))[:, 0]
                losses = F.cross_entropy(logits, labels[own], reduction="none")
                sgd.zero_grad()
                (losses * (counts[rows, m] if s["bagging"] == "weights" else 1)).mean().backward()
                sgd.step()
        for p, q in zip(network.state_dict().values(), single(trained, m).state_dict().values(), strict=True):
            torch.testing.assert_close(q, p, rtol=0, atol=1e-10)


def test_bagging_by_weights_is_refused_where_batch_norm_sees_all_images():
    run = a_densenet("bagging", bagging="weights")
    with pytest.raises(common.Refused, match="--set bagging=resample"):
        common.new_ensemble(builder(run), run, small_images(3))


# --- The reported epoch --------------------------------------------------------------------------


def unlearn(monkeypatch, since):
    """From an epoch on, the loss is climbed: the last epoch is not the best."""
    schedules = torch.optim.lr_scheduler
    monkeypatch.setattr(schedules, "MultiStepLR", lambda optimizer, *_: schedules.LambdaLR(
        optimizer, lambda epochs_done: 1 if epochs_done + 1 < since else -1))


def test_the_reported_epoch_is_the_first_minimum_of_validation_error(data, monkeypatch):
    unlearn(monkeypatch, since=6)
    ensemble, history, epoch, test = common.train(build, a_run(lam=0.9, epochs=8), data)
    errors = [validation["ensemble_error"] for _, validation in history]
    assert len(errors) == 8 and epoch == 1 + int(np.argmin(errors)) and epoch < 8, "the case worth testing"
    _, held_out = common.split(400, 0, 100, 300)
    there = common.evaluate(ensemble, data, data.train_images[held_out], data.train_labels[held_out])
    assert there["ensemble_error"] == errors[epoch - 1]
    assert test["ensemble_error"] == common.evaluate(ensemble, data, data.test_images,
                                                     data.test_labels)["ensemble_error"]


def test_of_equal_epochs_the_first_is_reported(data):
    """At a learning rate that moves next to nothing every epoch has the same validation error."""
    ensemble, history, epoch, _ = common.train(build, a_run(lr=1e-5, epochs=3), data)
    assert len({validation["ensemble_error"] for _, validation in history}) == 1 and epoch == 1
    assert torch.equal(ensemble.hidden_weight, common.train(build, a_run(lr=1e-5, epochs=1), data)[0].hidden_weight)


def test_without_a_validation_split_the_last_epoch_is_reported(data, tmp_path, monkeypatch):
    unlearn(monkeypatch, since=6)
    run = a_run(lam=0.9, epochs=8, validation=0, train=None)
    result = study.do_run(EXPERIMENT, run, data, tmp_path)
    history = folders.load_history(tmp_path / run.path)
    assert result["epoch"] == 8 and "validation_error" not in result
    assert result["test_ensemble_error"] == pytest.approx(history["test_ensemble_error"][-1])
    assert history["test_ensemble_error"].argmin() < 7, "the case worth testing"
    assert history["reported_test_member_error"].shape == (4,)
    assert not any(key.startswith("validation") for key in history)


@pytest.mark.parametrize("stacking, validation", [("validation", 100), ("training", 100), ("training", 0)])
def test_test_labels_decide_nothing(data, monkeypatch, stacking, validation):
    """With other test labels the same weights, epoch, penalty and stacked logits come out."""
    outcome, scored, add = [], [], common.Scores.add
    monkeypatch.setattr(common.Scores, "add", lambda self, logits, *rest: (
        scored.append(logits), add(self, logits, *rest)))
    stacked = a_run("stacking", stacking=stacking, folds=2, penalties=[0.01, 1.0], validation=validation)
    for images in (data, replace(data, test_labels=data.test_labels.flip(0))):
        ensemble, _, epoch, _ = common.train(build, a_run(validation=validation), images)
        _, arrays, result = common.stack(ensemble, stacked, images)
        outcome.append(([p.tolist() for p in ensemble.parameters()], epoch, arrays["cross_validated_loss"].tolist(),
                        result["penalty"], scored[-1].tolist()))
    assert outcome[0] == outcome[1]
    assert scored[-1].shape == (len(data.test_labels), 1, 10)


# --- Stacking ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacking, best", [("training", 0.1), ("validation", 1.0)])
def test_stacking_takes_the_penalty_that_is_best_on_images_held_out(data, tmp_path, stacking, best):
    """The penalty holds a combiner at plain averaging; it is judged on images that the combiner was not fitted on."""
    study.do_run(EXPERIMENT, a_run(weights=True), data, tmp_path)
    penalties = [10.0, 1.0, 0.1]
    run = a_run("stacking", stacking=stacking, folds=2, penalties=penalties)
    result = study.do_run(EXPERIMENT, run, data, tmp_path)
    stored = folders.load_history(tmp_path / run.path)

    rows = common.split(400, 0, 100, 300)[stacking == "validation"]
    ensemble, _ = common.new_ensemble(build, run, data)
    ensemble.load_state_dict(folders.load_weights(tmp_path / a_run().path, "cpu"))
    logits, test_logits = (common.predict(ensemble, data, images).double()
                           for images in (data.train_images[rows], data.test_images))
    labels, fold = data.train_labels[rows], torch.randperm(len(rows), generator=run.generator("folds")) % 2

    def loss_after_fit(penalty, fitted, x, y):
        """The loss at x (N, M, K), y (N,) of a combiner that is fitted on some of the images."""
        step, bias = (torch.zeros(*size, dtype=torch.double, requires_grad=True) for size in ((10, 40), (10,)))
        newton = torch.optim.LBFGS([step, bias], max_iter=2000, tolerance_change=0, line_search_fn="strong_wolfe")

        def combine(z):
            return z.mean(1) + F.linear(z.flatten(1), step, bias)

        def closure():
            newton.zero_grad()
            loss = F.cross_entropy(combine(logits[fitted]), labels[fitted]) + penalty * step.square().sum()
            loss.backward()
            return loss
        newton.step(closure)
        return F.cross_entropy(combine(x), y).item()
    losses = [sum(loss_after_fit(penalty, fold != k, logits[fold == k], labels[fold == k]) for k in (0, 1)) / 2
              for penalty in penalties]
    assert stored["penalty"].tolist() == penalties
    assert stored["cross_validated_loss"].tolist() == pytest.approx(losses, rel=1e-3)
    assert result["penalty"] == best == penalties[np.argmin(losses)]
    assert result["penalty_is_outermost"] == (best == 0.1)
    assert result["test_ensemble_loss"] == pytest.approx(
        loss_after_fit(best, fold >= 0, test_logits, data.test_labels), rel=1e-3)
    assert result["fits_not_converged"] == 0


@pytest.mark.parametrize("penalty", [1e-3, 1e3])
def test_a_fit_of_the_combiner_that_does_not_converge_is_told(data, tmp_path, monkeypatch, penalty):
    study.do_run(EXPERIMENT, a_run(weights=True), data, tmp_path)
    run, lbfgs = a_run("stacking", stacking="validation", folds=2, penalties=[penalty]), torch.optim.LBFGS
    result = study.do_run(EXPERIMENT, run, data, tmp_path)
    assert result["fits_not_converged"] == 0 and "converge" not in study.outcome(run, result)
    monkeypatch.setattr(torch.optim, "LBFGS", lambda *args, max_iter, **others: lbfgs(*args, max_iter=2, **others))
    result = study.do_run(EXPERIMENT, run, data, tmp_path)
    assert result["fits_not_converged"] == 3 and "3 fits of the combiner did not conv" in study.outcome(run, result)


# --- The known order of the lambdas --------------------------------------------------------------


def test_joint_training_beats_independent_training_of_tiny_networks():
    """Test errors of Sec. 4's order; a loss with the sign of lambda turned round loses it."""
    data = common.synthetic(10, (1, 28, 28), 2_500, 500)
    joint, independent, broken = (
        common.train(build, a_run(lam=lam, members=64, hidden=2, lr=1.28, train=2_000, validation=500, batch=100,
                                  epochs=8), data)[3]["ensemble_error"] for lam in (0.95, 0, -0.95))
    assert joint + 0.1 < independent < broken


# --- The schedule --------------------------------------------------------------------------------


def rates(monkeypatch, data, **changes):
    """The learning rate of each epoch, as the optimizer has it at both of its steps."""
    seen = []

    def step(ensemble, optimizer, scores, *_):
        seen.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()                                        # without gradients: moves nothing
        scores.n += 1
    monkeypatch.setattr(common, "training_step", step)
    monkeypatch.setattr(common, "evaluate", lambda *_: {"ensemble_error": 0.0, "mean_member_loss": 0.0})
    common.train(build, a_run(batch=150, **changes), data)
    assert seen[::2] == seen[1::2]
    return seen[::2]


@pytest.mark.parametrize("name, expected", [                    # epoch -> learning rate, appendix B.2 and B.3
    ("densenet_cifar", {1: 0.1, 150: 0.1, 151: 0.01, 225: 0.01, 226: 0.001, 300: 0.001}),
    ("convnet_cifar", {1: 0.1, 200: 0.1, 201: 0.01, 300: 0.01, 301: 0.001, 400: 0.001})])
def test_the_learning_rate_of_each_epoch_is_the_papers(data, monkeypatch, name, expected):
    block = presets.experiment_settings(presets.load_preset("paper"), "paper", name)
    run, *_ = study.list_runs("paper", study.experiment_of(name), block, {}, lambdas=[0])
    found = rates(monkeypatch, data, **{key: run.settings[key] for key in ("lr", "epochs", "decay")})
    assert len(found) == max(expected) and found == sorted(found, reverse=True)
    assert {epoch: found[epoch - 1] for epoch in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("expected", [[1], [1, 0.1], [1, 1, 0.1], [1, 1, 0.1, 0.01]], ids=len)
def test_few_epochs_begin_at_the_full_rate(data, monkeypatch, expected):
    """The rate falls once a share of the epochs has passed, and not within an epoch or before."""
    assert rates(monkeypatch, data, lr=1.0, epochs=len(expected), decay=[0.5, 0.75]) == pytest.approx(expected)


# --- Runs that fail ------------------------------------------------------------------------------


def test_a_diverged_run_is_recorded_and_leaves_no_numbers(data, tmp_path):
    run = a_run(lr=1e30, weights=True)
    result = study.do_run(EXPERIMENT, run, data, tmp_path)
    assert result["diverged_at_epoch"] == 1 and "test_ensemble_error" not in result
    assert not folders.to_be_done(run, tmp_path) and not (tmp_path / run.path / "weights.pt").exists()
    stacking = a_run("stacking", stacking="validation", folds=2, penalties=[1.0])
    assert study.do_run(EXPERIMENT, stacking, data, tmp_path) == {"diverged_at_epoch": 1}


@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total"), "2.50 GiB more"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes. Error "
                  "code 12"), "123 bytes more"),
    (MemoryError("Unable to allocate 1.2 GiB for an array"), ""),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None)], ids=["CUDA", "CPU", "NumPy", "another error"])
def test_too_little_memory_is_told_and_nothing_is_written(data, tmp_path, monkeypatch, error, words):
    def fail(*_):
        raise error
    monkeypatch.setattr(common, "training_step", fail)
    with pytest.raises(RuntimeError if words is None else common.Refused) as refusal:
        study.do_run(EXPERIMENT, a_run(), data, tmp_path)
    for word in (words, "4x3H lambda 0 trial 0", "lower members or batch (40)", "--results") if words is not None else (
            "mat1",):
        assert word in str(refusal.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step, flags", [("find_data", []), ("find_data", ["--fetch"]), ("cut_data", [])])
def test_too_little_memory_for_the_images_is_told(script, monkeypatch, step, flags):
    def fail(*_):
        raise MemoryError("Unable to allocate 1.2 GiB for an array")
    monkeypatch.setattr(folders, step, fail)
    status, _, err = script(train_mlp_fmnist, "--preset", "smoke", *flags)
    assert (status, err) == (2, "error: the images: not enough memory: free memory; finished runs are kept\n")
    assert not list(Path().iterdir())


# --- The spread of one trial (benchmarks/spread.py) ----------------------------------------------


def test_five_runs_that_differ_in_one_bit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(folders.HERE / "benchmarks")
    spread = importlib.import_module("spread")
    settings, shape = SETTINGS | {"members": 1, "hidden": 8}, (1, 28, 28)
    plain, *others = (experiment.build(settings, shape, 10, torch.Generator().manual_seed(1))
                      for experiment in (EXPERIMENT, *map(spread.nudged, range(spread.RUNS))))
    for which, other in enumerate(others):
        changed = (plain.hidden_weight != other.hidden_weight).flatten().nonzero().flatten().tolist()
        bits = (plain.hidden_weight.detach().view(torch.int32) - other.hidden_weight.detach().view(torch.int32)).abs()
        assert changed == [which] and bits.sum() == 1 and torch.equal(plain.output_weight, other.output_weight)
    done = subprocess.run([sys.executable, spread.__file__, "--preset", "smoke"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "standard deviation" in done.stdout, done.stderr
    rows = (tmp_path / "results" / "spread.csv").read_text().splitlines()
    assert len(rows) == 1 + spread.RUNS and rows[0].startswith("bit,test_error_percent,epoch,seconds,finished,device")
