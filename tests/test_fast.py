"""Each function of fast.py gives what its plain twin gives: values, gradients, trained weights."""

import math
import multiprocessing
import os
import select
import signal
import time

import common
import fast
from common import Refused

import pytest
import torch
from test_training import a_densenet, a_run, builder, small_images

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


def test_the_fast_forms_are_what_runs():
    assert common.loss_and_cross_entropies is fast.joint_loss
    assert common.evaluation_cross_entropies is fast.cross_entropies and common.predicted is fast.argmax


# --- The loss ------------------------------------------------------------------------------------


def loss_and_gradient(loss, logits):
    z = logits.clone().requires_grad_()
    value = loss(z)
    (3 * value).backward()                                  # the gradient from above is not 1
    return value.detach(), z.grad


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_the_joint_loss(logits, lam):
    y = draw(K, N)
    same(loss_and_gradient(lambda z: fast.joint_loss(z, y, lam)[0], logits),
         loss_and_gradient(lambda z: common.joint_loss(z, y, lam), logits))


@pytest.mark.parametrize("y, weights", [(draw(K, N), draw(3, N, M).double()), (draw(K, N, M), None)],
                         ids=["by weights", "by copies"])
def test_the_loss_of_bagging(logits, y, weights):
    same(loss_and_gradient(lambda z: fast.joint_loss(z, y, 0, weights)[0], logits),
         loss_and_gradient(lambda z: common.bagging_loss(z, y, weights), logits))


def test_the_cross_entropies(logits):
    """Weights weigh the loss, not the scores; members with examples of their own form no ensemble."""
    y, own = draw(K, N), draw(K, N, M)
    plain = common.cross_entropies(logits, y)
    assert [one.shape for one in plain] == [(N,), (N, M)]
    same(fast.cross_entropies(logits, y), plain)
    same(fast.joint_loss(logits, y, 0.3)[1:], plain)
    same(fast.joint_loss(logits, y, 0, draw(3, N, M).double())[1:], plain)
    members = torch.stack([common.cross_entropies(logits, own[:, m])[1][:, m] for m in range(M)], 1)
    plain = plain[0] * math.nan, members
    same(fast.cross_entropies(logits, own), plain)
    same(fast.joint_loss(logits, own, 0)[1:], plain)


@pytest.mark.parametrize("values", [1000, 3])               # rare and many equal logits
def test_the_predicted_class_is_the_first_of_the_highest(values):
    z = draw(values, 9, 6, 5).float()
    for layout in (z, -z, z.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert torch.equal(fast.argmax(layout).long(), layout.argmax(-1))


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

    def record(work):
        for _ in range(4):              # the warm-up and the recording change all that a step does
            work()
        return replaying(work)

    def stepper_on_cuda(run, ensemble, optimizer, scores, batches, eager=False):
        batches.labels = batches.labels.as_subclass(Labels)
        step = stepper(run, ensemble, optimizer, scores, batches, eager)
        assert not any(total.any() for total in vars(scores).values())      # recording leaves no trace
        return step

    def rate_in_memory(*arguments):
        ensemble, optimizer = new_ensemble(*arguments)
        optimizer.param_groups[0]["lr"] = torch.tensor(optimizer.param_groups[0]["lr"], dtype=torch.double)
        return ensemble, optimizer
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


@pytest.mark.parametrize("replaying, raised, words", [
    (lambda work: lambda: None, Refused, "differs from an eager one by 100 % .* add --eager"),
    (lambda work: lambda: (work(), work()), Refused, "differs from an eager one by .* add --eager"),
    (lambda work: fail(RuntimeError("stream is capturing\nmore")), Refused, r"is capturing\): add --eager"),
    (lambda work: fail(torch.OutOfMemoryError("CUDA out of memory")), torch.OutOfMemoryError, "CUDA out of memory")],
    ids=["nothing", "twice", "cannot record", "no memory"])
def test_a_replay_that_is_not_the_step_is_refused(data, monkeypatch, replaying, raised, words):
    captures(monkeypatch, replaying)
    with pytest.raises(raised, match=words):
        train(a_run(), data)
    assert train(a_run(epochs=1), data, eager=True)[2] == 1                 # --eager captures nothing


# --- Several processes ---------------------------------------------------------------------------


FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_processes_train_what_one_process_trains(data, count):
    """To the bit, with the data in shared memory. Nothing is forked for a count of at most 1."""
    runs, said = [a_run(lam=lam, epochs=2) for lam in (0, 0.9, 1)], []
    (parts, end), every = os.pipe(), FORK.Barrier(max(count, 1))
    os.write(end, bytes(range(len(runs))))
    os.close(end)

    def weights(run):
        return train(run, data)[0].hidden_weight.tolist()

    def work(say):
        say("process", os.getpid())
        every.wait()
        while part := os.read(parts, 1):
            say(part[0], weights(runs[part[0]]))
    fast.in_processes(work, count, lambda *message: said.append(message), (Refused,))
    os.close(parts)
    processes = {what for word, what in said if word == "process"}
    assert len(processes) == max(count, 1) and (os.getpid() in processes) == (count <= 1)
    assert sorted(message for message in said if message[0] != "process") == list(enumerate(map(weights, runs)))


@pytest.mark.parametrize("end, raised, words", [
    (lambda: fail(Refused("lower the batch")), Refused, "^lower the batch$"),
    (lambda: fail(ZeroDivisionError()), ChildProcessError, "ended with status 1 .*fewer --jobs"),
    (lambda: os.kill(os.getpid(), signal.SIGKILL), ChildProcessError, r"ended with status -9 \(-9: the system"),
    (lambda: fail(KeyboardInterrupt()), ChildProcessError, "ended with status 143 ")],     # command_line's, of SIGTERM
    ids=["expected", "unexpected", "killed", "stopped"])
def test_the_end_of_one_process_ends_all(capfd, end, raised, words):
    every = FORK.Barrier(3)

    def work(say):
        if every.wait() == 0:
            end()
        signal.pause()
    with pytest.raises(raised, match=words):
        fast.in_processes(work, 3, print, (Refused,))
    assert not multiprocessing.active_children()
    assert ("ZeroDivisionError" in capfd.readouterr().err) == ("status 1 " in words)


def test_processes_end_with_their_parent():
    """Their end is seen from the pipe that they hold open."""
    reader, writer = os.pipe()

    def work(say):
        os.write(writer, b"x")
        time.sleep(100)
    parent = FORK.Process(target=fast.in_processes, args=(work, 2, print, ()))
    parent.start()
    os.close(writer)
    assert os.read(reader, 1) + os.read(reader, 1) == b"xx"
    parent.kill()
    parent.join()
    assert select.select([reader], [], [], 60)[0] and os.read(reader, 1) == b""
    os.close(reader)
