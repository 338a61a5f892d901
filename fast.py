"""The same numbers as common.py's, sooner. Each function names its plain twin; tests/test_fast.py holds them equal."""

import functools
import gc
import itertools

import torch
from torch.nn import functional as F

# --- The loss: its twin is common.losses ---------------------------------------------------------


def log_probabilities(member_logits, targets):
    """log q_j (M, K, N), log q-bar (K, N), targets as an index (M, 1, N), and both cross entropies, (N,) and (M, N).

    Members come first, as the vectorised MLPs lay out their logits: a softmax then runs over whole rows of examples.
    """
    logits = member_logits.permute(1, 2, 0)
    members, _, n = logits.shape
    log_q, log_q_bar = logits.log_softmax(1), logits.mean(0).log_softmax(0)
    shared = targets.dim() == 1
    index = (targets.expand(members, n) if shared else targets.T).unsqueeze(1)
    ensemble = -log_q_bar.gather(0, targets[None])[0] if shared else logits.new_full((n,), torch.nan)
    return log_q, log_q_bar, index, ensemble, -log_q.gather(1, index).squeeze(1)


def cross_entropies(member_logits, targets):
    """F.cross_entropy of the mean logits (Eq. 3) and of each member's, by example: (N,) and (N, M).

    member_logits (N, M, K); targets (N,), or (N, M) in bagging, where the ensemble's is nan.
    """
    *_, ensemble, members = log_probabilities(member_logits, targets)
    return ensemble, members.T


class _JointLoss(torch.autograd.Function):
    """Eq. 4 with the gradient of Eq. 9: one softmax serves the loss, its gradient and the scores.

    With common.joint_loss and PyTorch's backward a step of 256x4H takes 2.9 times as long (one thread of an AMD EPYC).
    """

    @staticmethod
    def forward(ctx, member_logits, targets, lam, weights):
        log_q, log_q_bar, index, ensemble, members = log_probabilities(member_logits, targets)
        ctx.save_for_backward(log_q, log_q_bar, index, weights)
        ctx.lam, ctx.shared = lam, weights is None and targets.dim() == 1
        loss = (1 - lam) * (members if weights is None else members * weights.T).mean()
        if targets.dim() == 1:
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
    """common.losses: Eq. 4, or at lambda 0 the loss of bagging, and the cross entropies (N,) and (N, M)."""
    return _JointLoss.apply(member_logits, targets, lam, weights)


@functools.cache
def agrees_with(losses):
    """Does common.losses, which may have been edited, give what joint_loss gives for random logits, and its gradient?

    The logits are of wrong and of right examples, at scales at which a loss that is cut off somewhere shows it.
    """
    g = torch.Generator().manual_seed(0)
    targets, own, counts = (torch.randint(5, shape, generator=g) for shape in ((8,), (8, 3), (8, 3)))
    wrong = torch.randn(8, 3, 5, generator=g, dtype=torch.double)
    right = wrong + 5 * F.one_hot(targets, 5)[:, None]
    cases = [(targets, lam / 100) for lam in (*range(0, 100, 5), 99, 100)] + [(targets, 0, counts), (own, 0)]
    for scale, logits, case in itertools.product((0.1, 1, 10, 100), (wrong, right), cases):
        z = (scale * logits).requires_grad_()
        try:
            plain, quick = ((*found, *torch.autograd.grad(found[0], z)) for found in (
                losses(z, *case), joint_loss(z, *case)))
            torch.testing.assert_close(plain, quick, equal_nan=True)
        except Exception:           # also if what was edited does not take such logits
            return False
    return True


# --- Members at once on CUDA: the twin is [work(m) for m in range(count)] -----------------------

STREAMS = 8     # on an H200 a step of DN-Low in bf16 takes 2.4 times as long with 1, 1.15 with 4, and as long with 16


def side_by_side(work, count, device):
    """[work(m) for m in range(count)], on CUDA on streams whose kernels run at the same time.

    A member's kernels are too small to fill a GPU. The streams fork from the current one and join it again; the
    backward pass runs on them, too.
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
    """(N, M, K) -> (N, M), the first class of the highest logit. On a CPU PyTorch's own takes nine times as long."""
    if member_logits.is_cuda:
        return member_logits.argmax(-1)
    logits = member_logits.permute(2, 1, 0)                                 # (K, M, N)
    classes = len(logits)
    rank = torch.arange(classes, 0, -1, dtype=torch.int16, device=logits.device)[:, None, None]
    return (classes - ((logits == logits.amax(0)) * rank).amax(0)).T


# --- A training step on CUDA: the twin is the eager step -----------------------------------------


class CannotCapture(RuntimeError):
    """A training step cannot be recorded, or its replay differs. What this process does on the GPU later may fail."""


def out_of_memory(error):
    """Is this, or what it came from, an error of too little memory? CUDA's, cuDNN's and cuBLAS's have no type."""
    words = ("out of memory", "can't allocate memory", "STATUS_ALLOC_FAILED")
    return any(word in str(one) for one in (error, error.__context__) for word in words)


def captured(step, ensemble, optimizer, scores, rows):
    """step(rows), recorded once as a CUDA graph: a function of rows (N,) that replays it.

    A replay saves launching each kernel from Python: thousands in a step of an ensemble. What a step reads and writes
    stays in place in memory, and rows are copied in; a batch of another size is taken eagerly. What recording changes
    is put back. Raises CannotCapture if it fails, or if a replay differs from an eager step by more than rounding.
    """
    def state():
        momenta = [buffer for each in optimizer.state.values() for buffer in each.values() if buffer is not None]
        return [*ensemble.state_dict().values(), *vars(scores).values(), *momenta]

    def restore():
        for now, then in itertools.zip_longest(state(), before):
            now.zero_() if then is None else now.copy_(then)    # no momentum is one of zero

    def weights():
        return torch.cat([p.detach().flatten() for p in ensemble.parameters()])

    def take(batch):
        if len(batch) == len(rows):
            rows.copy_(batch)
            replay()
        else:
            step(batch)

    ensemble.train()
    before, start, moved = [tensor.clone() for tensor in state()], weights(), []
    warm_up(lambda: step(rows))
    try:
        replay = record(lambda: step(rows))
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        first = error.__context__ or error      # an error within a recording makes its end fail as well
        raise CannotCapture(f"a training step cannot be captured ({str(first).splitlines()[0]})") from error
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
