"""Each function of fast.py gives what its plain twin gives: values, gradients, trained weights."""

import contextlib
import math
import multiprocessing
import os
import select
import signal
import sys
import time
import types

import study
import common
import fast
import folders
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
    assert common.for_each_member is fast.side_by_side


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

    def warm_up(work):                  # as the recording does, it changes all that a step does
        for _ in range(3):
            work()

    def record(work):
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
def test_a_step_that_cannot_be_captured_raises(data, monkeypatch, replaying, why):
    captures(monkeypatch, replaying)
    with pytest.raises(fast.CannotCapture, match=why):
        train(a_run(), data)
    assert train(a_run(epochs=1), data, eager=True)[2] == 1                 # --eager captures nothing


@pytest.mark.parametrize("where", ["warm_up", "record"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
                                   RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
                                   RuntimeError("CUDA error: out of memory")], ids=str)
def test_too_little_memory_is_no_failed_capture(data, monkeypatch, where, error):
    captures(monkeypatch)
    monkeypatch.setattr(fast, where, lambda work: masked(error))
    with pytest.raises(RuntimeError) as raised:
        train(a_run(), data)
    assert fast.out_of_memory(raised.value) and not isinstance(raised.value, fast.CannotCapture)


def test_an_error_of_the_step_itself_ends_training(data, monkeypatch):
    captures(monkeypatch)
    monkeypatch.setattr(fast, "warm_up", lambda work: fail(RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes"):
        train(a_run(), data)


def test_the_plan_times_the_step_that_is_recorded(data, monkeypatch):
    """On a GPU a smaller batch is launched from Python, which may take a hundred times as long."""
    class Cuda(str):
        type = "cuda"
    sizes = []
    monkeypatch.setattr(common.Data, "device", Cuda("cpu"))
    monkeypatch.setattr(common, "stepper", lambda *_: lambda rows: sizes.append(len(rows)))
    monkeypatch.setattr(study, "fastest", lambda work, *_: 1.0 + bool(work()))
    run = a_run()
    study.cost(study.Experiment("mlp_fmnist", builder(run)), run, data)
    assert set(sizes) == {run.settings["batch"]}


def test_eager_reaches_the_plan(data, monkeypatch):
    captures(monkeypatch, lambda work: fail(AssertionError("captured")))
    run = a_run()
    experiment, eager = study.Experiment("mlp_fmnist", builder(run)), []
    assert study.cost(experiment, run, data, eager=True) > 0
    with pytest.raises(AssertionError, match="captured"):
        study.cost(experiment, run, data)
    monkeypatch.setattr(study, "cost", lambda *arguments: eager.append(arguments[3]) or 1.0)
    study.estimate(experiment, [run], lambda run: data, True)
    assert eager == [True]


def test_a_study_whose_step_cannot_be_captured_begins_again_with_eager(monkeypatch, capsys):
    """In a new process: PyTorch does not clean up after a recording that failed."""
    why, started = "a training step cannot be captured (a copy to the host)", []
    monkeypatch.setattr(study, "train_missing", lambda *_: fail(fast.CannotCapture(why)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "train.py", "--preset", "smoke"])
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append((program, arguments)))
    study.train_study(None, None)
    assert f"{why}: going on with --eager" in capsys.readouterr().out
    said = f"in this command {why}"
    assert started == [(sys.executable, [sys.executable, "-u", "train.py", "--preset", "smoke", "--eager", said])]
    assert study.training_parser("").parse_args(started[0][1][3:]).eager == said
    assert study.training_parser("").parse_args(["--eager"]).eager == "asked for"


def test_run_json_says_why_steps_were_not_captured(data, monkeypatch, tmp_path):
    run, experiment = a_run(epochs=1), study.Experiment("mlp_fmnist", builder(a_run()))
    monkeypatch.setattr(common.Data, "device", OnCuda("cpu"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(folders, "machine", lambda device: {"device": "a GPU"})
    folders.run_missing([run], tmp_path, lambda run: study.do_run(experiment, run, data, tmp_path, eager="too new"))
    result = folders.read_run(tmp_path / run.path)["result"]
    assert (result["eager"], result["peak_memory_bytes"]) == ("too new", 7)


def test_a_learning_rate_on_a_gpu_is_a_float(data):
    """The fused kernel of SGD cannot read another."""
    images = types.SimpleNamespace(shape=data.shape, classes=data.classes, device=torch.device("meta"))
    run = a_run(lr=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "SGD", lambda parameters, lr, **more: lr)
        assert common.new_ensemble(builder(run), run, images)[1].dtype == torch.float32


# --- Members on streams --------------------------------------------------------------------------


class Stream:
    """A stand-in for a CUDA stream that writes down who waits for whom."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("count, at_once", [(3, 2), (2, 2), (2, 8)])
def test_members_fork_from_one_stream_and_join_it(monkeypatch, count, at_once):
    log, on = [], []
    side = [Stream(f"side {i}", log) for i in range(min(count, at_once))]
    main = Stream("main", log)

    @contextlib.contextmanager
    def stream(which):
        on.append(which.name)
        yield
    monkeypatch.setattr(fast, "STREAMS", at_once)
    monkeypatch.setattr(fast, "streams", lambda number: side[:number])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    results = fast.side_by_side(lambda m: (log.append(f"member {m}"), m)[1], count, OnCuda("cpu"))
    assert results == list(range(count)) and on == [f"side {m % len(side)}" for m in range(count)]
    assert log == [*(f"{one.name} waits for main" for one in side), *(f"member {m}" for m in range(count)),
                   *(f"main waits for {one.name}" for one in side)]


def test_on_a_cpu_members_are_run_one_after_the_other():
    assert fast.side_by_side(lambda m: m, 3, torch.device("cpu")) == [0, 1, 2]


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
