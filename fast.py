"""The same numbers, sooner. Each function names its plain twin; tests/test_fast.py holds them equal.

Nothing here is needed to understand the paper: read common.py, which chooses in one place
("What runs") between a twin and its fast form.
"""

import contextlib
import functools
import gc
import itertools
import math
import multiprocessing.connection
import os
import signal
import threading

import torch

# --- The loss: twins are common.joint_loss, bagging_loss and cross_entropies ---------------------


def log_probabilities(member_logits, targets):
    """log q_j and log q-bar, (M, K, N) and (K, N), and the targets as an index (M, 1, N).

    Members come first, as the vectorised MLPs lay out their logits: the softmax then runs over
    whole rows of examples.
    """
    logits = member_logits.permute(1, 2, 0)
    members, _, n = logits.shape
    index = targets.expand(members, n) if targets.dim() == 1 else targets.T
    return logits.log_softmax(1), logits.mean(0).log_softmax(0), index.unsqueeze(1)


def cross_entropies(member_logits, targets):
    """common.cross_entropies: the ensemble's (N,), Eq. 3, and the members' (N, M).

    member_logits (N, M, K); targets (N,), or (N, M) in bagging, where the ensemble's is nan.
    """
    log_q, log_q_bar, index = log_probabilities(member_logits, targets)
    members = -log_q.gather(1, index).squeeze(1).T
    if targets.dim() == 2:
        return members.new_full((len(targets),), math.nan), members
    return -log_q_bar.gather(0, targets[None])[0], members


class _JointLoss(torch.autograd.Function):
    """Eq. 4 with the gradient of Eq. 9: one softmax serves the loss, its gradient and the scores.

    With common.joint_loss and PyTorch's backward a step of 256x4H takes 2.9 times as long (one thread of an AMD EPYC).
    """

    @staticmethod
    def forward(ctx, member_logits, targets, lam, weights):
        log_q, log_q_bar, index = log_probabilities(member_logits, targets)
        members = -log_q.gather(1, index).squeeze(1)                        # (M, N)
        ctx.save_for_backward(log_q, log_q_bar, index, weights)
        ctx.lam, ctx.shared = lam, weights is None and targets.dim() == 1
        loss = (1 - lam) * (members if weights is None else members * weights.T).mean()
        ensemble = members.new_full((members.shape[1],), math.nan)
        if targets.dim() == 1:
            ensemble = -log_q_bar.gather(0, targets[None])[0]
            loss = loss + lam * ensemble.mean()
        members = members.T
        ctx.mark_non_differentiable(ensemble, members)
        return loss, ensemble, members

    @staticmethod
    def backward(ctx, upstream, *_):
        log_q, log_q_bar, index, weights = ctx.saved_tensors
        lam, scale = ctx.lam, upstream / (log_q.shape[0] * log_q.shape[2])  # 1 / (M N)
        if ctx.shared:
            minus_one = scale.neg().expand_as(index[0])
            common = (lam * scale * log_q_bar.exp()).scatter_add_(0, index[0], minus_one)
            gradient = (common.expand_as(log_q) if lam == 1 else     # (lambda q-bar - y) / (M N)
                        common.addcmul(log_q.exp(), (1 - lam) * scale))
        else:
            gradient = scale * log_q.exp()
            gradient.scatter_add_(1, index, scale.neg().expand_as(index))
            if weights is not None:
                gradient.mul_(weights.T.unsqueeze(1))
        return gradient.permute(2, 0, 1), None, None, None


def joint_loss(member_logits, targets, lam, weights=None):
    """The loss, and the cross entropies (N,) and (N, M) that it is made of, for the scores.

    common.joint_loss for targets (N,); common.bagging_loss for weights (N, M) or targets (N, M),
    at lambda 0.
    """
    return _JointLoss.apply(member_logits, targets, lam, weights)


# --- Members at once on CUDA: the twin is [work(m) for m in range(count)] -----------------------

STREAMS = 8     # on an H200 a step of DN-Low in bf16 takes 2.4 times as long with 1, 1.15 with 4, and as long with 16


def side_by_side(work, count, device):
    """[work(m) for m in range(count)], on CUDA on streams whose kernels run at the same time.

    A member's kernels are too small to fill a GPU. The streams fork from the current one and join it again. The
    backward pass runs on the streams of the forward pass.
    """
    if device.type != "cuda" or count == 1:
        return [work(m) for m in range(count)]
    main, side, results = torch.cuda.current_stream(), streams(min(count, STREAMS)), []
    for stream in side:
        stream.wait_stream(main)
    for m in range(count):
        with torch.cuda.stream(side[m % len(side)]):
            results.append(work(m))
    for stream in side:
        main.wait_stream(stream)
    return results


@functools.cache
def streams(count):
    """`count` streams, always the same: the libraries keep workspace for each that they have seen."""
    return [torch.cuda.Stream() for _ in range(count)]


# --- Predicted classes: the twin is Tensor.argmax(-1) -------------------------------------------


def argmax(member_logits):
    """member_logits.argmax(-1): (N, M, K) -> (N, M), the first class of the highest logit.

    On a CPU PyTorch's own goes through the classes of one example after the other: a tenth of the
    step of 256x4H.
    """
    if member_logits.is_cuda:
        return member_logits.argmax(-1)
    logits = member_logits.permute(2, 1, 0)                                 # (K, M, N)
    classes = len(logits)
    rank = torch.arange(classes, 0, -1, dtype=torch.int16, device=logits.device)[:, None, None]
    return (classes - ((logits == logits.amax(0)) * rank).amax(0)).T


# --- A training step on CUDA: the twin is the eager step -----------------------------------------


class CannotCapture(RuntimeError):
    """A training step cannot be recorded, or its replay differs from the eager step.

    PyTorch does not clean up after a recording that fails: what this process does on the GPU afterwards may fail, too.
    """


def out_of_memory(error):
    """Is this, or what it came from, an error of too little memory? CUDA's, cuDNN's and cuBLAS's have no type."""
    words = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return any(word in str(one) for one in (error, root(error)) for word in words)


def root(error):
    """The error that came first: one within a recording makes its end fail as well."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def captured(step, ensemble, optimizer, scores, rows):
    """step(rows), recorded once as a CUDA graph: a function of rows (N,) that replays it.

    A replay saves launching each kernel from Python: thousands in a step of an ensemble. Whatever a step reads and
    writes stays in place in memory, and rows are copied in; a batch of another size is taken eagerly. Recording takes
    steps of its own: what they change is put back. Raises CannotCapture if recording fails or if a replayed step and an
    eager one differ by more than the error of the precision, and whatever an eager step raises.
    """
    def state():
        momenta = [buffer for each in optimizer.state.values() for buffer in each.values()
                   if buffer is not None]
        return [*ensemble.state_dict().values(), *vars(scores).values(), *momenta]

    def restore():
        for now, then in itertools.zip_longest(state(), before):
            now.zero_() if then is None else now.copy_(then)    # no momentum is one of zero

    def weights():
        return torch.cat([p.detach().flatten() for p in ensemble.parameters()])

    def take(batch):
        if len(batch) != len(rows):
            step(batch)
            return
        rows.copy_(batch)
        replay()

    ensemble.train()
    before, start, moved = [tensor.clone() for tensor in state()], weights(), []
    warm_up(lambda: step(rows))
    try:
        replay = record(lambda: step(rows))
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise CannotCapture(f"a training step cannot be captured ({str(root(error)).splitlines()[0]})") from error
    for work in (replay, lambda: step(rows)):
        restore()
        work()
        moved.append(weights() - start)
    restore()
    torch.cuda.empty_cache()            # the graph has memory of its own: what eager steps took would double it
    error = ((moved[0] - moved[1]).norm() / moved[1].norm()).item()
    if not error < 0.05:                # another order of summation differs by less, in bf16 too
        raise CannotCapture(f"a captured training step differs from an eager one by {100 * error:.0f} % of its length")
    return take


def warm_up(work):
    """Calls work() aside, so that libraries choose their kernels and their workspace before it is recorded."""
    (aside,) = streams(1)
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)


def record(work):
    """Records the CUDA work of a call and returns the function that replays it."""
    gc.collect()                        # what Python frees during a recording would end it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams(1)[0]):
        work()
    return graph.replay


# --- Several runs at once on a CPU: the twin is work(say), one run after the other --------------


def in_processes(work, count, say, expected):
    """work(say) in `count` processes at once, each of which finds its own part of the work.

    The processes are forked, so that they share the data in memory. What they say reaches `say` of this process. An
    exception of the types `expected` in one of them ends all and is raised here; so does the death of one, as
    ChildProcessError. Nothing is forked for a count of at most 1.
    """
    if count <= 1:
        work(say)
        return
    context, workers = multiprocessing.get_context("fork"), {}
    try:
        with _signals_held() as came:
            for _ in range(count):
                reader, writer = context.Pipe(duplex=False)
                worker = context.Process(target=_in_process, args=(work, writer, expected, came), daemon=True)
                worker.start()
                workers[reader] = worker
                writer.close()                  # from here on the reader ends with the process
        while workers:
            for reader in multiprocessing.connection.wait(list(workers)):
                try:
                    message = reader.recv()
                except EOFError:
                    worker = workers.pop(reader)
                    worker.join()
                    if worker.exitcode:
                        raise ChildProcessError(f"a process that trained ended with status {worker.exitcode} (-9: the "
                                                "system killed it, maybe for lack of memory; fewer --jobs need less)"
                                                ) from None
                    continue
                if isinstance(message, Exception):
                    raise message
                say(*message)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join(30)
            worker.kill()                       # if the signal was lost on it: what it leaves is as after a kill -9
            worker.join()


@contextlib.contextmanager
def _signals_held():
    """Holds Ctrl-C and SIGTERM back: Python drops an exception that is raised in the hooks of a fork.

    A signal mask does not: the threads of a library take the signal, and Python runs its handler all the same.
    """
    came, handlers = [], {n: h for n in (signal.SIGINT, signal.SIGTERM) if callable(h := signal.getsignal(n))}
    for number in handlers:
        signal.signal(number, lambda *stop: came.append(stop))
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in came[:1]:
        handlers[number](number, frame)


def _in_process(work, writer, expected, came):
    def ignore(number, frame):                          # (SIG_IGN complains of a signal that has just come)
        pass

    def stop(number, frame):
        signal.signal(signal.SIGTERM, ignore)           # a second one, to all or of the parent, would disturb the end
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ignore)                # Ctrl-C goes to all; the parent ends its children
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        signal.signal(signal.SIGTERM, stop)
        if came:                                        # while this process was forked
            raise KeyboardInterrupt
        try:
            work(lambda *message: writer.send(message))
        except expected as error:
            writer.send(error)
        signal.signal(signal.SIGTERM, ignore)
    except KeyboardInterrupt:                           # SIGTERM, of the parent or of somebody else
        os._exit(128 + signal.SIGTERM)


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)
