"""Seeds and splits, the training loop, its loss and schedule, bagging, stacking, and what a run says when it fails."""

import copy
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import common
import train_densenet_cifar
import train_mlp_fmnist
from study import command, folders, plan
from train_mlp_fmnist import EXPERIMENT, build

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

SETTINGS = {"members": 4, "hidden": 3, "seed": 0, "lr": 0.4, "epochs": 4, "train": 300, "validation": 100, "test": 150,
            "batch": 40, "augment": False, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0, "decay": []}


def a_run(method="joint", lam=0.0, trial=0, weights=False, **changes):
    return plan.Run("test", "mlp_fmnist", "4x3H", method, lam, trial, SETTINGS | changes, weights)


def a_densenet(method="joint", trial=0, **changes):
    """A run of a small DenseNet ensemble on `small_images(3)`."""
    settings = SETTINGS | {"members": 3, "depth": 10, "growth": 3, "precision": "fp32", "lr": 0.1, "train": 60,
                           "validation": 0, "epochs": 1, "batch": 20, "augment": True, "weight_decay": 1e-3}
    return plan.Run("test", "densenet_cifar", "small", method, 0, trial, settings | changes, False)


def small_images(channels):
    return common.synthetic(10, *{1: ((1, 28, 28), 400, 150), 3: ((3, 16, 16), 60, 30)}[channels])


def builder(run):
    return train_mlp_fmnist.build if run.experiment == "mlp_fmnist" else train_densenet_cifar.build


@pytest.fixture(scope="module")
def data():
    return small_images(1)


# --- Splits, seeds, bootstraps -------------------------------------------------------------------


def test_a_split_is_the_authors_disjoint_complete_and_of_the_trial():
    """First validation indices of their RandomState(trial).choice, from their code."""
    for n, first in ((60_000, [3048, 19563, 58303, 8870, 40228]), (50_000, [11841, 19602, 45519, 25747, 42642])):
        assert common.split(n, 0, 10_000)[1][:5].tolist() == first
    training, held_out = common.split(60_000, 4, 10_000)
    assert torch.cat([training, held_out]).sort().values.tolist() == list(range(60_000))
    assert not torch.equal(common.split(60_000, 5, 10_000)[1], held_out)
    few, same_held_out = common.split(60_000, 4, 10_000, 2_000)
    assert torch.equal(same_held_out, held_out)
    assert len(few) == few.unique().numel() == 2_000 and torch.isin(few, training).all() and few.max() > 50_000
    assert common.split(60_000, 4, 0)[0].tolist() == list(range(60_000))


def test_random_numbers_are_of_the_purpose_the_trial_and_the_seed():
    """The lambdas and methods of a trial share them."""
    def draw(run, purpose="order"):
        return torch.rand(9, generator=run.generator(purpose)).tolist()
    for run in (a_run(), a_run(lam=1, lr=0.1), a_run("bagging")):
        assert draw(run) == draw(a_run())
    others = (a_run(trial=1), a_run(seed=1), replace(a_run(), configuration="5x3H"),
              replace(a_run(), experiment="convnet_cifar"))
    assert all(draw(run) != draw(a_run()) for run in others) and draw(a_run()) != draw(a_run(), "folds")


def stock(ensemble, m):
    """A stock network with the weights of member m: (N, C, H, W) -> (N, K)."""
    if isinstance(ensemble, common.Ensemble):
        return copy.deepcopy(ensemble.members[m])
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 3), nn.ReLU(), nn.Linear(3, 10))
    for p, q in zip(network.parameters(), ensemble.parameters(), strict=True):
        p.data = q.data[m].clone()
    return network


def train_alone(network, run, data, m=0):
    """Trains a network by hand as member m of a run at lambda 0.

    At lr / M and M times the decay, which make up for Eq. 9's 1/M; the rate falls once a share of the epochs is over.
    """
    s, order, augmentation = run.settings, run.generator("order"), run.generator("augmentation")
    members, copies = s["members"], s.get("bagging") == "resample"
    training, _ = common.split(len(data.train_labels), run.trial, s["validation"], s["train"])
    n, labels = len(training), data.train_labels[training]
    draws = torch.randint(n, (n, members), generator=run.generator("bootstrap"))
    counts = F.one_hot(draws, n).sum(0).T
    padded, moves = F.pad(data.train_images[training], [4] * 4), torch.tensor([4, 4, 0]).expand(n, 3)       # as it is
    sgd = torch.optim.SGD(network.train().parameters(), momentum=0.9, weight_decay=s["weight_decay"] * members)
    for epoch in range(s["epochs"]):
        for group in sgd.param_groups:
            group["lr"] = s["lr"] / members * 0.1 ** sum(epoch >= share * s["epochs"] for share in s["decay"])
        if s["augment"]:
            shape = draws.shape if copies else (n, 1)
            moves = torch.cat([torch.randint(9, (*shape, 2), generator=augmentation),
                               torch.randint(2, (*shape, 1), generator=augmentation)], 2)[:, m if copies else 0]
        for rows in torch.randperm(n, generator=order).split(s["batch"]):
            own = draws[rows, m] if copies else rows
            logits = network(data.normalise(common.crop_and_flip(padded, own, moves[rows])))            # (N, K)
            losses = F.cross_entropy(logits, labels[own], reduction="none")
            sgd.zero_grad()
            (losses * (counts[rows, m] if s.get("bagging") == "weights" else 1)).mean().backward()
            sgd.step()


@pytest.fixture
def in_double(monkeypatch):
    """in_double(run, data): the ensemble of a run, untrained and trained, in double precision."""
    normalise = common.Data.normalise
    monkeypatch.setattr(common.Data, "normalise", lambda data, images: normalise(data, images).double())
    return lambda run, data: [make(lambda *form: builder(run)(*form).double(), run, data)[0]
                              for make in (common.new_ensemble, common.train)]


@pytest.mark.parametrize("run", [
    *(a_run(method, 0, 1, validation=0, epochs=2, seed=2, bagging=bagging) for method, bagging in (
        ("joint", None), ("bagging", "weights"), ("bagging", "resample"))),
    *(a_densenet(method, 1, epochs=2, seed=2, bagging=bagging) for method, bagging in (
        ("joint", None), ("bagging", "resample")))],
    ids=lambda run: f"{run.experiment} {run.method} {run.settings['bagging']}")
def test_a_member_equals_a_stock_network_alone_on_its_own_images_labels_and_moves(in_double, run):
    """Batch norm's statistics are the member's own. `independent` is given the rate and decay of a network alone."""
    block = plan.experiment_settings(plan.load_preset("paper"), "paper", "densenet_cifar")
    given = plan.run_settings(block, block["configurations"]["DN-Low"], "independent", 0)
    assert (given["lr"], given["weight_decay"]) == pytest.approx((16 * 0.1, 1e-4 / 16))
    data = small_images(1 if run.experiment == "mlp_fmnist" else 3)
    start, trained = in_double(run, data)
    for m in range(run.settings["members"]):
        alone = stock(start, m)
        train_alone(alone, run, data, m)
        for p, q in zip(alone.state_dict().values(), stock(trained, m).state_dict().values(), strict=True):
            torch.testing.assert_close(q, p, rtol=0, atol=1e-10)


def test_one_densenet_trains_as_torchvisions_does(in_double):
    """torchvision's, with a plain convolution as its stem. Both falls of the rate, as in the paper, at few epochs.

    The same weights, running statistics, and logits in evaluation.
    """
    preset = plan.load_preset("paper")
    assert preset["densenet_cifar"]["decay"] == preset["convnet_cifar"]["decay"] == [0.5, 0.75]
    run = a_densenet(members=1, depth=16, growth=4, epochs=5, decay=[0.5, 0.75])
    data = small_images(3)
    start, trained = in_double(run, data)
    other = torchvision.models.DenseNet(4, (2, 2, 2), num_init_features=8, num_classes=10)
    other.features.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        delattr(other.features, name)
    for p, q in zip(start.parameters(), other.double().parameters(), strict=True):      # in the same order
        q.data = p.detach().clone()
    train_alone(other, run, data)
    statistics = [buffer for buffer in other.buffers() if buffer.dim()]                 # not the number of batches
    test_images = data.normalise(data.test_images)
    for mine, theirs in ((trained.parameters(), other.parameters()), (trained.buffers(), statistics),
                         (trained.eval()(test_images), other.eval()(test_images)[:, None])):
        for p, q in zip(mine, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
    assert not torch.equal(next(start.parameters()), next(trained.parameters()))


def test_bf16_agrees_with_fp32_within_its_error():
    """Six steps: the losses agree to a few of bf16's last places (2 ** -8). Weights and logits stay in fp32."""
    losses, data = {}, small_images(3)
    for precision in ("fp32", "bf16"):
        run = a_densenet(epochs=2, precision=precision)
        ensemble, history, *_ = common.train(builder(run), run, data)
        tensors = *ensemble.state_dict().values(), ensemble(data.normalise(data.test_images))
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        losses[precision] = [scores["mean_member_loss"] for epoch in history for scores in epoch]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=4 * 2 ** -8) and losses["bf16"] != losses["fp32"]


def test_bagging_by_weights_is_refused_where_batch_norm_sees_all_images():
    run = a_densenet("bagging", bagging="weights")
    with pytest.raises(common.Refused, match="--set bagging=resample"):
        common.new_ensemble(builder(run), run, small_images(3))


# --- What you read is what runs ------------------------------------------------------------------


def test_an_edited_loss_trains_and_its_runs_never_meet_others(script, tmp_path):
    """Eq. 4 is edited in a copy of the package: other weights, a line that says so, and a setting in run.json."""
    selected = ["--preset", "smoke", "--only", "64x16H", "--lambdas", "0.99", "--trials", "1", "--epochs", "1"]
    status, out, _ = script(train_mlp_fmnist, *selected)
    assert status == 0 and "loss:" not in out
    for path in (*folders.HERE.glob("*.py"), folders.HERE / "presets.yaml"):
        shutil.copy(path, tmp_path)
    shutil.copytree(folders.HERE / "study", tmp_path / "study")
    eq_4, text = "lam * ensemble_loss + (1 - lam) * mean_member_loss", (tmp_path / "common.py").read_text()
    (tmp_path / "common.py").write_text(text.replace(eq_4, f"{eq_4} + 0.01 * member_logits.square().mean()"))
    edited = subprocess.run([sys.executable, "train_mlp_fmnist.py", *selected, "--results", "edited"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert "loss: joint_loss " in edited.stdout, edited.stderr
    runs = [tmp_path / place / "smoke/mlp_fmnist/64x16H/joint-0.99/trial0" for place in ("results", "edited")]
    plain, other = (folders.load_weights(run)["hidden_weight"] for run in runs)
    assert not torch.equal(plain, other) and (plain - other).abs().max() < 0.1
    plain, other = (folders.read_run(run)["settings"] for run in runs)
    assert other.pop("loss").startswith("joint_loss ") and plain == other


def test_the_loss_of_an_experiment_trains(data):
    calls = []

    def own(member_logits, targets, lam):
        calls.append(lam)
        return common.joint_loss(member_logits, targets, lam)
    trained, plain = (common.train(build, a_run(lam=0.9, epochs=1), data, loss=loss)[0] for loss in (own, None))
    assert calls == [0.9] * 8                                   # batches of 300 images
    torch.testing.assert_close(trained.hidden_weight, plain.hidden_weight)


# --- The reported epoch, stacking, and runs that fail --------------------------------------------


@pytest.mark.parametrize("validation", [100, 0])
def test_the_reported_epoch_has_the_lowest_validation_error_or_is_the_last(data, tmp_path, monkeypatch, validation):
    schedules = torch.optim.lr_scheduler            # from epoch 6 on the loss is climbed: the last is not the best
    monkeypatch.setattr(schedules, "MultiStepLR", lambda optimizer, *_: schedules.LambdaLR(
        optimizer, lambda epochs_done: 1 if epochs_done < 5 else -1))
    run = a_run(lam=0.9, epochs=8, validation=validation, weights=True)
    result, history = command.do_run(EXPERIMENT, run, data, tmp_path), folders.load_history(tmp_path / run.path)
    errors = history["validation_ensemble_error" if validation else "test_ensemble_error"]
    assert len(errors) == 8 and errors.argmin() < 7, "the case worth testing"
    assert result["epoch"] == (1 + errors.argmin() if validation else 8)
    ensemble, _ = common.new_ensemble(build, run, data)
    ensemble.load_state_dict(folders.load_weights(tmp_path / run.path))
    test = common.evaluate(ensemble, data, data.test_images, data.test_labels)
    assert result["test_ensemble_error"] == test["ensemble_error"]
    if validation:          # the error on images held out of the training set: the test set selects nothing
        rows = common.split(400, 0, 100, 300)[1]
        own = common.evaluate(ensemble, data, data.train_images[rows], data.train_labels[rows])
        assert result["validation_error"] == own["ensemble_error"] == pytest.approx(errors.min())


def test_evaluate_leaves_test_scores_out_and_changes_no_other_number(data):
    (every, scores, *reported), (some, fewer, *same) = (
        common.train(build, a_run(epochs=14, validation=0, **change), data) for change in ({}, {"evaluate": 4}))
    assert torch.equal(every.hidden_weight, some.hidden_weight) and reported[0] == same[0] == 14
    assert reported[1]["ensemble_error"] == same[1]["ensemble_error"]
    for epoch, ((train, test), (same_train, there)) in enumerate(zip(scores, fewer, strict=True), 1):
        assert train["ensemble_loss"] == same_train["ensemble_loss"]
        due = epoch <= 10 or epoch in (12, 14)
        assert there["ensemble_error"] == test["ensemble_error"] if due else math.isnan(there["ensemble_error"])


def test_of_equal_epochs_the_first_is_reported(data):
    """At a learning rate that moves next to nothing every epoch has the same validation error."""
    ensemble, history, epoch, _ = common.train(build, a_run(lr=1e-5, epochs=3), data)
    assert len({validation["ensemble_error"] for _, validation in history}) == 1 and epoch == 1
    assert torch.equal(ensemble.hidden_weight, common.train(build, a_run(lr=1e-5, epochs=1), data)[0].hidden_weight)


@pytest.mark.parametrize("stacking, best", [("training", 0.1), ("validation", 1.0)])
def test_stacking_takes_the_penalty_that_is_best_on_images_held_out(data, monkeypatch, stacking, best):
    """The penalty holds a combiner at plain averaging; it is judged on images that the combiner was not fitted on.

    Fits that do not converge are counted.
    """
    penalties = [10.0, 1.0, 0.1]
    run = a_run("stacking", stacking=stacking, folds=2, penalties=penalties)
    ensemble = common.train(build, a_run(), data)[0]
    test, stored, result = common.stack(ensemble, run, data)
    rows = common.split(400, 0, 100, 300)[stacking == "validation"]
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
    assert stored["cross_validated_loss"].tolist() == pytest.approx(losses, rel=1e-3)
    assert result["penalty"] == best == penalties[np.argmin(losses)]
    assert result["penalty_is_outermost"] == (best == 0.1) and result["fits_not_converged"] == 0
    assert test["ensemble_loss"] == pytest.approx(
        loss_after_fit(best, fold >= 0, test_logits, data.test_labels), rel=1e-3)
    lbfgs = torch.optim.LBFGS
    monkeypatch.setattr(torch.optim, "LBFGS", lambda *args, max_iter, **others: lbfgs(*args, max_iter=1, **others))
    assert common.stack(ensemble, run, data)[2]["fits_not_converged"] > 0


def test_a_diverged_run_is_recorded_and_leaves_no_numbers(data, tmp_path):
    run = a_run(lr=1e30, weights=True)
    result = command.do_run(EXPERIMENT, run, data, tmp_path)
    assert result["diverged_at_epoch"] == 1 and "test_ensemble_error" not in result
    assert folders.run_is_finished(run, tmp_path) and not (tmp_path / run.path / "weights.pt").exists()
    stacking = a_run("stacking", stacking="validation", folds=2, penalties=[1.0])
    assert command.do_run(EXPERIMENT, stacking, data, tmp_path) == {"diverged_at_epoch": 1}


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB\nmore"), MemoryError("Unable to allocate"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes")], ids=type)
def test_too_little_memory_is_told_in_one_line(error):
    words = r"^4x3H: .*allocate.* lower members or batch[^\n]*$"
    with pytest.raises(common.Refused, match=words), command.errors_in_one_line("4x3H"):
        raise error
