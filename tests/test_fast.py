"""Each function of fast.py gives what its plain twin gives: values, gradients, trained weights."""

import common
import fast
from study import command, plan

import pytest
import torch
from test_training import a_densenet, a_run, builder, small_images
from torch.nn import functional as F

N, M, K = 7, 5, 4


@pytest.fixture(params=["examples first", "examples last"])
def logits(request):
    """Member logits (N, M, K) in the memory layout of an Ensemble or of the MLPs."""
    z = 3 * torch.randn(N, M, K, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    return z if request.param == "examples first" else z.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def draw(most, *shape):
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(2))


def same(one, other):
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14, equal_nan=True)


# --- The loss ------------------------------------------------------------------------------------


def losses_and_gradient(losses, logits, *arguments):
    z = logits.clone().requires_grad_()
    loss, *others = losses(z, *arguments)
    (3 * loss).backward()                                   # the gradient from above is not 1
    return loss.detach(), z.grad, *others


@pytest.mark.parametrize("arguments", [
    *((draw(K, N), lam) for lam in (0.0, 0.3, 0.95, 1.0)), (draw(K, N), 0, draw(3, N, M).double()), (draw(K, N, M), 0)],
    ids=["0", "0.3", "0.95", "1", "bagging by weights", "bagging by copies"])
def test_the_losses(logits, arguments):
    same(losses_and_gradient(fast.joint_loss, logits, *arguments),
         losses_and_gradient(common.losses, logits, *arguments))


def test_the_cross_entropies_and_the_loss_of_bagging_are_pytorchs(logits):
    """Weights weigh the loss, not the scores; members with examples of their own form no ensemble."""
    y, own, counts = draw(K, N), draw(K, N, M), draw(3, N, M).double()
    ensemble = F.cross_entropy(logits.mean(1), y, reduction="none")
    members, of_own = (torch.stack([F.cross_entropy(logits[:, m], t[:, m], reduction="none") for m in range(M)], 1)
                       for t in (y[:, None].expand(N, M), own))
    same(fast.cross_entropies(logits, y), (ensemble, members))
    same(fast.joint_loss(logits, y, 0, counts), ((members * counts).sum() / (M * N), ensemble, members))
    same(fast.joint_loss(logits, own, 0), (of_own.mean(), ensemble * torch.nan, of_own))


@pytest.mark.parametrize("values", [1000, 3])               # rare and many equal logits
def test_the_predicted_class_is_the_first_of_the_highest(values):
    z = draw(values, 9, 6, 5).float()
    for layout in (z, -z, z.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert torch.equal(fast.argmax(layout).long(), layout.argmax(-1))


# --- What you read is what runs ------------------------------------------------------------------


EQ_4, STEPS = common.joint_loss, iter(range(10 ** 6))
EDITED = {
    "another lambda": lambda z, y, lam: EQ_4(z, y, min(lam, 0.95)),
    "schedule": lambda z, y, lam: EQ_4(z, y, lam * (next(STEPS) > 9)),
    "clamp": lambda z, y, lam: EQ_4(z.clamp(-100, 100), y, lam),
    "cap": lambda z, y, lam: EQ_4(z, y, lam).clamp(max=100),
    "flooding": lambda z, y, lam: (EQ_4(z, y, lam) - 0.01).abs() + 0.01,                # of examples that are right
    "gradient": lambda z, y, lam: EQ_4(z, y, lam).detach() + 0 * z.sum(),
    "of ten classes": lambda z, y, lam: F.cross_entropy(z.mean(1), y, torch.ones(10)),
}


def written_out(z, y, lam):
    log_q = F.one_hot(y, z.shape[2])[:, None] * torch.cat([z, z.mean(1, keepdim=True)], 1).log_softmax(2)
    return -(1 - lam) * log_q[:, :-1].sum() / (z.shape[0] * z.shape[1]) - lam * log_q[:, -1].sum() / len(y)


@pytest.fixture
def edit(monkeypatch):
    """A function that puts another one in the place of a function of common.py."""
    fast.agrees_with.cache_clear()
    yield lambda name, function: monkeypatch.setattr(common, name, function)
    fast.agrees_with.cache_clear()


def test_the_quick_form_runs_in_place_of_eq_4_however_it_is_written(edit):
    edit("joint_loss", written_out)
    assert common.losses_that_run() is fast.joint_loss
    assert common.losses_that_run(own=EQ_4) is not fast.joint_loss          # an Experiment's own: as it is


@pytest.mark.parametrize("name", EDITED)
def test_an_edited_loss_runs_in_place_of_the_quick_form(edit, name):
    edit("joint_loss", EDITED[name])
    assert common.losses_that_run() is not fast.joint_loss


def test_an_edited_loss_of_bagging_does_so_too(edit):
    plain = common.losses
    edit("losses", lambda z, y, lam, weights=None: plain(z, y, lam, None if weights is None else weights.sqrt()))
    assert common.losses_that_run() is not fast.joint_loss


# --- Captured steps ------------------------------------------------------------------------------


class OnCuda(str):
    """A device that says it is of CUDA and is the CPU."""
    type = "cuda"


class Labels(torch.Tensor):
    """Labels that say they are on CUDA; what is computed from them is a plain tensor."""
    device = OnCuda("cpu")
    __torch_function__ = torch._C._disabled_torch_function_impl


def captures(monkeypatch, replaying=lambda work: work):
    """Makes training on the CPU take the road of CUDA, with a stand-in for the graph alone.

    `replaying` makes of the recorded call what a replay does.
    """
    stepper, new_ensemble = common.stepper, common.new_ensemble

    def warm_up(work):                  # as the recording does, it changes all that a step does
        for _ in range(3):
            work()

    def record(work):
        work()
        return replaying(work)

    def stepper_on_cuda(run, ensemble, optimizer, scores, batches, *rest):
        batches.labels = batches.labels.as_subclass(Labels)
        step = stepper(run, ensemble, optimizer, scores, batches, *rest)
        assert not any(total.any() for total in vars(scores).values())      # recording leaves no trace
        return step

    def rate_in_memory(*arguments):
        ensemble, optimizer = new_ensemble(*arguments)
        optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.double)
        return ensemble, optimizer
    monkeypatch.setattr(fast, "warm_up", warm_up)
    monkeypatch.setattr(fast, "record", record)
    monkeypatch.setattr(common, "stepper", stepper_on_cuda)
    monkeypatch.setattr(common, "new_ensemble", rate_in_memory)


def train(run, data, **options):
    return common.train(builder(run), run, data, **options)


@pytest.fixture(scope="module")
def data():
    return small_images(1)


@pytest.mark.parametrize("changes", [{}, {"bagging": "weights"}, {"bagging": "resample"}, "batch norm",
                                     {"augment": True, "decay": [0.5], "weight_decay": 0.01}], ids=str)
def test_captured_steps_equal_eager_ones(data, monkeypatch, changes):
    """A whole run, to the bit: order, odd last batch, rates, momentum, scores, and the draws of each epoch."""
    run = a_densenet() if changes == "batch norm" else a_run(**changes)
    images, replays = small_images(3) if changes == "batch norm" else data, []
    eager = train(run, images)
    captures(monkeypatch, lambda work: lambda: replays.append(work()))
    captured = train(run, images)
    whole_batches = run.settings["train"] // run.settings["batch"]
    assert len(replays) == 1 + run.settings["epochs"] * whole_batches       # one is for the comparison
    for one, other in ((captured[0].state_dict(), eager[0].state_dict()), *(
            pair for epochs in zip(captured[1], eager[1], strict=True) for pair in zip(*epochs, strict=True))):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert captured[2] == eager[2]


def fail(error):
    raise error


def masked(error):
    """Raises an error of the end of a recording, which hides the one within it."""
    try:
        raise error
    finally:
        raise RuntimeError("capture_end: invalidated")


@pytest.mark.parametrize("replaying, why", [
    (lambda work: lambda: None, "a captured training step differs from an eager one by 100 % of its length"),
    (lambda work: lambda: (work(), work()), "a captured training step differs from an eager one by "),
    (lambda work: fail(RuntimeError("stream is capturing\nmore")), r"cannot be captured \(stream is capturing\)$"),
    (lambda work: masked(RuntimeError("a copy to the host")), r"cannot be captured \(a copy to the host\)$")],
    ids=["nothing", "twice", "cannot record", "masked"])
def test_a_step_that_cannot_be_captured_is_refused_and_eager_takes_it(data, monkeypatch, tmp_path, replaying, why):
    captures(monkeypatch, replaying)
    with pytest.raises(fast.CannotCapture, match=why):
        train(a_run(), data)
    experiment = plan.Experiment("mlp_fmnist", builder(a_run()))
    with pytest.raises(common.Refused, match="add --eager"):
        command.do_run(experiment, a_run(), data, tmp_path)
    assert command.do_run(experiment, a_run(epochs=1), data, tmp_path, eager=True)["epoch"] == 1
    assert command.seconds_of_step(experiment, a_run(), data, True) > 0


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")], ids=str)
def test_too_little_memory_is_no_failed_capture(data, monkeypatch, error):
    captures(monkeypatch)
    monkeypatch.setattr(fast, "record", lambda work: masked(error))
    with pytest.raises(RuntimeError) as raised:
        train(a_run(), data)
    assert fast.out_of_memory(raised.value) and not isinstance(raised.value, fast.CannotCapture)

