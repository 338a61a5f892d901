"""The DenseNets of an ensemble on CUDA, all members in each kernel. The twin is the loop of common.Ensemble.

A loop over sixteen DenseNets launches 22,800 kernels a step, each on small tensors. Here activations are planar,
(M, C, P) with P = N H W pixels: k new channels are k whole rows of a dense block's buffer, without torch.cat, and a
layer of all members is two Triton kernels forward and three backward.

- A feature map's mean and variance are computed once, when it is made; each later layer has its own scale and shift.
- The backward pass computes ReLU(batch norm(x)) again, from the buffer and the bottlenecks' 4k maps.
- Batch norm's backward pass adds bias + slope x to the gradient G of a feature map x. By channel, these add up over the
  later layers in two tables (M, C), applied where G is used. So a layer takes one pass: it reads x and G, and writes G.
- Sums over pixels: a program writes one row for its pixels, and the one that ends last adds the rows up: no launch, and
  always the same order. Variances are joined from means and squares about them (Chan), not E[x^2] - E[x]^2.

With TRITON_INTERPRET=1 it runs on a CPU, where tests/test_fast_densenet.py holds it equal to the loop in float64.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

BLOCKS = 3
EPSILON, MOMENTUM = tl.constexpr(1e-5), 0.1         # nn.BatchNorm2d's
PRECISION = tl.constexpr("tf32x3")      # of products of fp32: as good as fp32
TILE, NARROW = 128, 64                  # pixels of a tile; in the last two kernels, which hold more rows of each
PROGRAMS, LEAST, WIDEST = 256, 4, 128   # of a launch, two for each of 132 multiprocessors; least tiles; most channels
# As compiled for sm_90 in bf16: no kernel spills, and two programs fit a multiprocessor (one of 128 channels). Forward,
# stages of cp.async would cost many instructions, of which those two kernels have too many for memory's speed as it is.
OPTIONS = {"bottleneck": {"num_stages": 1}, "conv": {"num_warps": 4, "num_stages": 1},
           "conv_backward": {"num_warps": 4, "num_stages": 2}, "bottleneck_backward": {"num_stages": 2}}
kernel = triton.jit(do_not_specialize=["c", "stride", "per", "whole", "size"],          # no variants for their values
                    do_not_specialize_on_alignment=["count", "of_w"])


@triton.jit
def wide(v):
    """Half precision as fp32; float64 stays."""
    return v if v.dtype == tl.float64 else v.to(tl.float32)


@triton.jit
def product(a, b, acc):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def normal(mean, variance, gamma, beta, live):
    """Mean, 1 / deviation, scale and shift of the channels that are pointed at; scale and shift are 0 if not live."""
    mean, rstd = tl.load(mean, live, 0.), tl.rsqrt(tl.load(variance, live, 1.) + EPSILON)
    scale = tl.load(gamma, live, 0.) * rstd
    return mean, rstd, scale, tl.load(beta, live, 0.) - scale * mean


@triton.jit
def join(v, inside, before, mean, square):
    """Adds a tile v (R, T) to the mean (R), and the sum of squares about it, of `before` pixels."""
    here = tl.sum(inside.to(v.dtype), 0)
    average = tl.sum(tl.where(inside[None, :], v, 0.), 1) / here
    off = tl.where(inside[None, :], v - average[:, None], 0.)
    delta, share = average - mean, here / (before + here)
    return mean + delta * share, square + tl.sum(off * off, 1) + delta * delta * (before * share)


@triton.jit
def ends_last(row, first, second, at, live, width, count, programs):
    """Writes a row; then, whether all other programs have written theirs. The barrier: so have this one's threads."""
    tl.store(row + at, first, live)
    tl.store(row + width + at, second, live)
    tl.debug_barrier()
    return tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def rows_from(first, rows, at, live, width, programs):
    """Both parts of the next sixteen rows. (.cg: not from the L1 cache, as other programs wrote them.)"""
    n = first + tl.arange(0, 16)
    row, mask = rows + n[:, None] * 2 * width + at[None, :], (n < programs)[:, None] & live[None, :]
    return tl.load(row, mask, 0., cache_modifier=".cg"), tl.load(row + width, mask, 0., cache_modifier=".cg")


@triton.jit
def finish(rows, s, mu, square, at, live, width, count, programs, pixels, P, mean, variance):
    """Mean and variance of P pixels from those of the programs, of `pixels` each."""
    if ends_last(rows + s * 2 * width, mu, square, at, live, width, count, programs):
        before, mu, square = tl.sum(mu * 0., 0), mu * 0., square * 0.
        for first in range(0, programs, 16):
            means, squares = rows_from(first, rows, at, live, width, programs)
            n = tl.maximum(tl.minimum(P - (first + tl.arange(0, 16)) * pixels, pixels), 0).to(mu.dtype)
            here = tl.sum(n, 0)
            both, average = tl.maximum(before + here, 1.), tl.sum(means * n[:, None], 0) / tl.maximum(here, 1.)
            off, delta = means - average[None, :], average - mu
            mu += delta * (here / both)
            square += tl.sum(squares + off * off * n[:, None], 0)
            square += delta * delta * (before * here / both)
            before += here
        tl.store(mean + at, mu, live)
        tl.store(variance + at, square / P, live)


@triton.jit
def add_rows(rows, at, live, width, programs, rstd, of_gamma, of_beta):
    """The sums of both parts of all rows, and from them the gradients of gamma and beta."""
    sum_d, sum_dx = tl.zeros_like(rstd), tl.zeros_like(rstd)
    for first in range(0, programs, 16):
        ds, dxs = rows_from(first, rows, at, live, width, programs)
        sum_d += tl.sum(ds, 0)
        sum_dx += tl.sum(dxs, 0)
    tl.store(of_beta, sum_d, live)
    tl.store(of_gamma, rstd * sum_dx, live)
    return sum_d, sum_dx


# --- Kernels. Program (s, chunk of channels, m): member m's tiles of T pixels from s * per, `per` of them --


@kernel
def bottleneck(x, mean, variance, stride, gamma, beta, w, u, rows, count, new_mean, new_variance, c, total, P, per,
               R: tl.constexpr, RP: tl.constexpr, BC: tl.constexpr, T: tl.constexpr):
    """u (M, R, P) = w^T relu(norm(x[:, :c])), and its mean and variance (M, R): x (M, total, P), w (M, c, R).

    Those of x are (M, stride). RP: R made a power of two.
    """
    s, m, programs, r = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0), tl.arange(0, RP)
    live, none = r < R, tl.zeros((RP,), gamma.dtype.element_ty)
    x, u, w, mu, square = x + m * total * P, u + m * R * P, w + m * c * R, none, none
    for tile in range(s * per, tl.minimum((s + 1) * per, tl.cdiv(P, T))):
        p = tile * T + tl.arange(0, T)
        inside, acc = p < P, tl.zeros((RP, T), gamma.dtype.element_ty)
        for first in range(0, c, BC):
            ch = first + tl.arange(0, BC)
            there, at, at_c = ch < c, m * stride + ch, m * c + ch
            _, _, scale, shift = normal(mean + at, variance + at, gamma + at_c, beta + at_c, there)
            v = tl.load(x + ch[:, None] * P + p[None, :], there[:, None] & inside[None, :], 0.)
            a = tl.maximum(wide(v) * scale[:, None] + shift[:, None], 0.).to(v.dtype)
            part = tl.load(w + ch[:, None] * R + r[None, :], there[:, None] & live[None, :], 0.).to(v.dtype)
            acc = product(tl.trans(part), a, acc)
        out = acc.to(u.dtype.element_ty)
        tl.store(u + r[:, None] * P + p[None, :], out, live[:, None] & inside[None, :])
        mu, square = join(wide(out), inside, (tile - s * per) * T, mu, square)     # those of what is stored
    finish(rows + m * programs * 2 * R, s, mu, square, r, live, R, count + m, programs, per * T, P,
           new_mean + m * R, new_variance + m * R)


@kernel
def conv(u, mean, variance, gamma, beta, w, x, rows, count, all_mean, all_variance, c, total, P, per, H: tl.constexpr,
         W: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, T: tl.constexpr):
    """x[:, c:c + K] = the 3x3 convolution of relu(norm(u)), w (M, R, 9 K), and its statistics, at c of (M, total).

    A tile is whole rows of images. A row of taps reads u that many rows off; the taps of a column have a sum of their
    own, and two of the three sums are moved by a pixel at the end: u is read and normed three times, not nine.
    """
    s, m, programs = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    r, j, i = tl.arange(0, RP), tl.arange(0, KP), tl.arange(0, T)
    live, new, at = r < R, j < K, m * R + r
    _, _, scale, shift = normal(mean + at, variance + at, gamma + at, beta + at, live)
    mask, none = new[:, None] & live[None, :], tl.zeros((KP, T), gamma.dtype.element_ty)
    mu, square = tl.zeros((KP,), gamma.dtype.element_ty), tl.zeros((KP,), gamma.dtype.element_ty)
    u, x, w = u + m * R * P, x + m * total * P + c * P, w + m * R * 9 * K + r[None, :] * (9 * K) + j[:, None]
    from_left = tl.broadcast_to(tl.maximum(i - 1, 0)[None, :], KP, T)
    from_right = tl.broadcast_to(tl.minimum(i + 1, T - 1)[None, :], KP, T)
    for tile in range(s * per, tl.minimum((s + 1) * per, tl.cdiv(P, T))):
        p = tile * T + i
        inside, row, column, left, middle, right = p < P, (p // W) % H, p % W, none, none, none
        for dy in range(3):             # not unrolled: nine tiles of w would not fit the registers
            there = inside & (row + dy >= 1) & (row + dy <= H)
            v = tl.load(u + r[:, None] * P + (p + (dy - 1) * W)[None, :], live[:, None] & there[None, :], 0.)
            a = tl.maximum(wide(v) * scale[:, None] + shift[:, None], 0.)
            a = tl.where(there[None, :], a, 0.).to(v.dtype)         # the padding is of relu(norm(u)): not relu(shift)
            left = product(tl.load(w + dy * 3 * K, mask, 0.).to(v.dtype), a, left)
            middle = product(tl.load(w + dy * 3 * K + K, mask, 0.).to(v.dtype), a, middle)
            right = product(tl.load(w + dy * 3 * K + 2 * K, mask, 0.).to(v.dtype), a, right)
        middle += tl.where((column > 0)[None, :], tl.gather(left, from_left, 1), 0.)
        middle += tl.where((column < W - 1)[None, :], tl.gather(right, from_right, 1), 0.)
        out = middle.to(x.dtype.element_ty)
        tl.store(x + j[:, None] * P + p[None, :], out, new[:, None] & inside[None, :])
        mu, square = join(wide(out), inside, (tile - s * per) * T, mu, square)
    finish(rows + m * programs * 2 * K, s, mu, square, j, new, K, count + m, programs, per * T, P,
           all_mean + m * total + c, all_variance + m * total + c)


@kernel
def spread(g, x, slope, bias, taps, c, total, P, W: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, T: tl.constexpr):
    """taps (M, 3 K, P): the gradient of x[:, c:c + K], g + bias + slope x, moved by -1, 0 and 1 pixels in its row.

    Three copies, so that what conv_backward reads three times is aligned. (They mostly stay in the L2 cache.)
    """
    m, j, p = tl.program_id(1).to(tl.int64), tl.arange(0, KP), tl.program_id(0) * T + tl.arange(0, T)
    new, at = j < K, m * total + c + j
    add, times = tl.load(bias + at, new, 0.)[:, None], tl.load(slope + at, new, 0.)[:, None]
    g, x, taps = g + (m * total + c) * P, x + (m * total + c) * P, taps + m * 3 * K * P
    for dx in tl.static_range(3):
        column, of = p % W + 1 - dx, j[:, None] * P + (p + 1 - dx)[None, :]
        mask = new[:, None] & ((p < P) & (column >= 0) & (column < W))[None, :]
        v = wide(tl.load(g + of, mask, 0.)) + add + times * wide(tl.load(x + of, mask, 0.))
        at = (dx * K + j)[:, None] * P + p[None, :]
        tl.store(taps + at, tl.where(mask, v, 0.), new[:, None] & (p < P)[None, :])


@kernel
def conv_backward(taps, u, mean, variance, gamma, beta, w, of_a, rows, count, of_gamma, of_beta, of_w, P, per, whole,
                  H: tl.constexpr, W: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, K: tl.constexpr,
                  KK: tl.constexpr, T: tl.constexpr):
    """of_a (M, R, P): the gradient of norm(u), from `taps` of spread. Also those of w (M, R, 9 K), gamma and beta.

    Nine taps in one product: row q of its operand is (tap, channel), as a column of w, so that 9 K is made a power of
    two, KK, and not each K 16. of_w: one row of `whole` numbers per s.
    """
    s, m, programs = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(0)
    r, q = tl.arange(0, RP), tl.arange(0, KK)
    live, real, dy, at = r < R, q < 9 * K, q // (3 * K) - 1, m * R + r
    center, rstd, scale, shift = normal(mean + at, variance + at, gamma + at, beta + at, live)
    at_w, mask_w = m * R * 9 * K + r[:, None] * (9 * K) + q[None, :], live[:, None] & real[None, :]
    part = tl.load(w + at_w, mask_w, 0.).to(u.dtype.element_ty)
    u, of_a, taps, rows = u + m * R * P, of_a + m * R * P, taps + m * 3 * K * P, rows + m * programs * 2 * R
    sum_d, sum_du, acc = tl.zeros_like(rstd), tl.zeros_like(rstd), tl.zeros((RP, KK), rstd.dtype)
    for tile in range(s * per, tl.minimum((s + 1) * per, tl.cdiv(P, T))):
        p = tile * T + tl.arange(0, T)
        inside, to = p < P, ((p // W) % H)[None, :] - dy[:, None]           # to: the row of the tap's output pixel
        d_out = tl.load(taps + (q % (3 * K) * P - dy * W)[:, None] + p[None, :],
                        real[:, None] & inside[None, :] & (to >= 0) & (to < H), 0.)
        at_u, mask = r[:, None] * P + p[None, :], live[:, None] & inside[None, :]
        v = wide(tl.load(u + at_u, mask, 0.))
        before = v * scale[:, None] + shift[:, None]
        d = product(part, d_out, tl.zeros((RP, T), gamma.dtype.element_ty)).to(of_a.dtype.element_ty)
        d = tl.where(before > 0, d, 0.)
        tl.store(of_a + at_u, d, mask)
        sum_d += tl.sum(wide(d), 1)
        sum_du += tl.sum(wide(d) * (v - center[:, None]), 1)
        acc = product(tl.maximum(before, 0.).to(d_out.dtype), tl.trans(d_out), acc)
    tl.store(of_w + s.to(tl.int64) * whole + at_w, acc, mask_w)
    if ends_last(rows + s * 2 * R, sum_d, sum_du, r, live, R, count + m, programs):
        add_rows(rows, r, live, R, programs, rstd, of_gamma + at, of_beta + at)


@kernel
def bottleneck_backward(of_a, u, mean2, variance2, gamma2, of_gamma2, of_beta2, x, mean, variance, gamma, beta, w, old,
                        new, slope, bias, rows, count, of_gamma, of_beta, of_w, c, total, P, per, whole, size,
                        R: tl.constexpr, RP: tl.constexpr, BC: tl.constexpr, T: tl.constexpr):
    """new = old + the gradient of x[:, :c] but for what is affine in x, which slope and bias get. Also of w (M, c, R).

    A program has `size` of the channels, so that its part of w's gradient fits the registers.
    """
    s, chunk, m, programs = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(0)
    r, ch = tl.arange(0, RP), chunk * size + tl.arange(0, BC)
    live, there, at2, at, at1 = r < R, ch < tl.minimum(c, (chunk + 1) * size), m * R + r, m * total + ch, m * c + ch
    center2, rstd2, scale2, _ = normal(mean2 + at2, variance2 + at2, gamma2 + at2, gamma2 + at2, live)
    flat, tilt = tl.load(of_beta2 + at2, live, 0.) / P, tl.load(of_gamma2 + at2, live, 0.) * rstd2 / P
    center, rstd, scale, shift = normal(mean + at, variance + at, gamma + at1, beta + at1, there)
    at_w, mask_w = m * c * R + ch[:, None] * R + r[None, :], there[:, None] & live[None, :]
    part = tl.load(w + at_w, mask_w, 0.).to(u.dtype.element_ty)
    u, of_a, x, rows = u + m * R * P, of_a + m * R * P, x + m * total * P, rows + m * programs * 2 * total
    old, new = old + m * total * P, new + m * total * P
    sum_d, sum_dx, acc = tl.zeros_like(rstd), tl.zeros_like(rstd), tl.zeros((BC, RP), rstd.dtype)
    for tile in range(s * per, tl.minimum((s + 1) * per, tl.cdiv(P, T))):
        p = tile * T + tl.arange(0, T)
        at_u, mask = r[:, None] * P + p[None, :], live[:, None] & (p < P)[None, :]
        v = wide(tl.load(u + at_u, mask, 0.))
        of_u = wide(tl.load(of_a + at_u, mask, 0.)) - flat[:, None] - (v - center2[:, None]) * tilt[:, None]
        of_u = tl.where((p < P)[None, :], of_u * scale2[:, None], 0.).to(u.dtype.element_ty)
        at_x, mask = ch[:, None] * P + p[None, :], there[:, None] & (p < P)[None, :]
        v = wide(tl.load(x + at_x, mask, 0.))
        before = v * scale[:, None] + shift[:, None]
        d = wide(product(part, of_u, tl.zeros((BC, T), gamma.dtype.element_ty)).to(u.dtype.element_ty))
        d = tl.where(before > 0, d, 0.)
        tl.store(new + at_x, wide(tl.load(old + at_x, mask, 0.)) + scale[:, None] * d, mask)
        sum_d += tl.sum(d, 1)
        sum_dx += tl.sum(d * (v - center[:, None]), 1)
        acc = product(tl.maximum(before, 0.).to(of_u.dtype), tl.trans(of_u), acc)
    tl.store(of_w + s.to(tl.int64) * whole + at_w, acc, mask_w)
    count += m * tl.num_programs(1) + chunk
    if ends_last(rows + s * 2 * total, sum_d, sum_dx, ch, there, total, count, programs):
        sum_d, sum_dx = add_rows(rows, ch, there, total, programs, rstd, of_gamma + at1, of_beta + at1)
        lean = -scale * rstd * rstd * sum_dx / P                            # of x - mean
        tl.store(slope + at, tl.load(slope + at, there, 0.) + lean, there)
        tl.store(bias + at, tl.load(bias + at, there, 0.) - scale * sum_d / P - lean * center, there)


# --- A dense block -------------------------------------------------------------------------------


class Plan:
    """Sizes of the launches of a block with features (M, total, P)."""

    def __init__(self, members, size, growth, total):
        (n, h, w), self.members, self.growth = size, members, growth
        self.p, self.chunks = n * h * w, triton.cdiv(total, WIDEST)
        self.many, self.per = self.ranges(TILE, 1, 1)                       # programs of a member, tiles of a program
        self.fewer, self.more = self.ranges(NARROW, 1, LEAST)
        self.few, self.most = self.ranges(NARROW, self.chunks, LEAST)
        rp, kp, kk = (max(16, triton.next_power_of_2(rows)) for rows in (4 * growth, growth, 9 * growth))
        dot = {"R": 4 * growth, "RP": rp}
        self.spread = {"W": w, "K": growth, "KP": kp, "T": TILE}
        warps = {"num_warps": 8, "maxnreg": 128} if rp > 32 else {"num_warps": 4}
        self.bottleneck = dot | warps | OPTIONS["bottleneck"] | {"T": TILE, "BC": 64}
        self.conv = dot | OPTIONS["conv"] | self.spread | {"H": h}
        self.conv_backward = dot | OPTIONS["conv_backward"] | {"H": h, "W": w, "K": growth, "KK": kk, "T": NARROW}
        self.bottleneck_backward = dot | OPTIONS["bottleneck_backward"] | {"T": NARROW}

    def ranges(self, tile, share, least):
        tiles = triton.cdiv(self.p, tile)
        programs = 1 << (max(1, min(PROGRAMS // share // self.members, tiles // least)).bit_length() - 1)
        return programs, triton.cdiv(tiles, programs)


class DenseBlock(torch.autograd.Function):
    """x (M, C0, P) -> all features (M, C, P) and, by turns, the mean and the variance of each norm's input.

    C = C0 + layers k. weights: for each layer gamma, beta (M, c), w (M, c, 4k), gamma, beta (M, 4k), w (M, 4k, 9k).
    running: None, or in evaluation what to use as those means and variances, (M, c) and (M, 4k) by turns.
    """

    @staticmethod
    def forward(ctx, x, size, running, *weights):
        layers, (members, c, p), growth = len(weights) // 6, x.shape, weights[2].shape[2] // 4
        total, empty, statistics, saved = c + layers * growth, weights[0].new_empty, [], []
        plan = ctx.plan = Plan(members, size, growth, total)
        features, (mean, variance) = x.new_empty(members, total, p), empty(2, members, total)
        features[:, :c] = x
        variance[:, :c], mean[:, :c] = torch.var_mean(x.to(mean.dtype), 2, correction=0)
        rows = empty(members * plan.many * 2 * 4 * growth)
        counts = torch.zeros(2 * layers, members, dtype=torch.int32, device=x.device)
        for i in range(layers):
            gamma1, beta1, w1, gamma2, beta2, w2 = weights[6 * i:6 * i + 6]
            u, found = x.new_empty(members, 4 * growth, p), empty(2, members, 4 * growth)
            statistics += [mean[:, :c], variance[:, :c], *found]
            mean1, variance1, mean2, variance2 = (running or statistics)[4 * i:4 * i + 4]
            bottleneck[plan.many, members](features, mean1, variance1, mean1.stride(0), gamma1, beta1, w1, u, rows,
                                           counts[2 * i], *found, c, total, p, plan.per, **plan.bottleneck)
            conv[plan.many, members](u, mean2, variance2, gamma2, beta2, w2, features, rows, counts[2 * i + 1], mean,
                                     variance, c, total, p, plan.per, **plan.conv)
            saved += [u, mean2, variance2]
            c += growth
        ctx.save_for_backward(features, mean, variance, *saved, *weights)
        ctx.mark_non_differentiable(*statistics)
        return features, *statistics

    @staticmethod
    def backward(ctx, g, *_):
        features, mean, variance, *saved = ctx.saved_tensors
        plan, growth, (members, c, p), layers = ctx.plan, ctx.plan.growth, features.shape, len(saved) // 9
        total, weights, empty = c, saved[3 * layers:], mean.new_empty
        old, new = g.contiguous(), torch.empty_like(features)       # (the first `old` is not ours to write to)
        affine, taps = mean.new_zeros(2, members, total), new.new_empty(members, 3 * growth, p)
        counts = torch.zeros(layers, 1 + plan.chunks, members, dtype=torch.int32, device=g.device)
        rows = empty(members * 2 * max(plan.fewer * 4 * growth, plan.few * total))
        sizes1, sizes2 = ([w.numel() for w in weights[at::6]] for at in (2, 5))
        of_w1, of_w2 = empty(plan.few, sum(sizes1)), empty(plan.fewer, sum(sizes2))
        gradients = [torch.empty_like(w) for w in weights]          # those of w, at 2 and 5, come last
        for i in reversed(range(layers)):
            c -= growth
            u, *norm2 = saved[3 * i:3 * i + 3]                      # norm2: the mean and the variance of u
            gamma1, beta1, w1, gamma2, beta2, w2 = weights[6 * i:6 * i + 6]
            of_gamma1, of_beta1, _, of_gamma2, of_beta2, _ = gradients[6 * i:6 * i + 6]
            of_a, chunks = torch.empty_like(u), triton.cdiv(c, WIDEST)
            size = triton.cdiv(c, chunks)
            padded = max(16, triton.next_power_of_2(size))
            spread[triton.cdiv(p, TILE), members](old, features, *affine, taps, c, total, p, **plan.spread)
            conv_backward[plan.fewer, members](
                taps, u, *norm2, gamma2, beta2, w2, of_a, rows, counts[i], of_gamma2, of_beta2,
                of_w2[:, sum(sizes2[:i]):], p, plan.more, of_w2.shape[1], **plan.conv_backward)
            bottleneck_backward[plan.few, chunks, members](
                of_a, u, *norm2, gamma2, of_gamma2, of_beta2, features, mean, variance, gamma1, beta1, w1, old, new,
                *affine, rows, counts[i, 1:], of_gamma1, of_beta1, of_w1[:, sum(sizes1[:i]):], c, total, p, plan.most,
                of_w1.shape[1], size, BC=padded, num_warps=8 if padded > 64 else 4, **plan.bottleneck_backward)
            old = new
        for at, of_w, sizes in (2, of_w1, sizes1), (5, of_w2, sizes2):
            gradients[at::6] = [g.view_as(w) for g, w in zip(of_w.sum(0).split(sizes), weights[at::6], strict=True)]
        slope, bias = affine[:, :, :c, None]
        return (new[:, :c] + bias + slope * features[:, :c]).to(g.dtype), None, None, *gradients


# --- All members ---------------------------------------------------------------------------------


def stack(tensors):
    """One tensor of all members' (K, c, ...), as (c, ... K), or of their vectors (K). They become views of it."""
    stacked = torch.stack([each.detach().movedim(0, -1).reshape(*each.shape[1:2], -1) for each in tensors])
    for each, part in zip(tensors, stacked, strict=True):
        each.data = for_member(part, each.shape)
    return stacked


def for_member(part, shape):
    """The way back from (c, ... K)."""
    return part.view(*shape[1:], shape[0]).movedim(-1, 0)


class Joined(torch.autograd.Function):
    """The stacks of the members' parameters. Hardly a gradient is copied."""

    @staticmethod
    def forward(ctx, stacks, *parameters):
        ctx.shapes = [p.shape for p in parameters]
        return tuple(stacked.detach() for stacked in stacks)

    @staticmethod
    def backward(ctx, *gradients):
        parts = itertools.chain(*gradients)
        return None, *(for_member(part, shape) for part, shape in zip(parts, ctx.shapes, strict=True))


class DenseNets:
    """The M members of an Ensemble of densenet_bc as one: images (N, C, H, W) or (N, M, C, H, W) -> (N, M, K).

    The members keep their parameters and running statistics, which become views of tensors with all members first. So
    state dicts, optimizers and checkpoints are those of the loop.
    """

    def __init__(self, members, bf16):
        self.members, self.bf16 = members, bf16
        _, *weights = zip(*(network.parameters() for network in members), strict=True)      # (the first is in stem)
        self.parameters, self.stacks = [*itertools.chain(*weights)], [stack(each) for each in weights]
        statistics = zip(*(network.buffers() for network in members), strict=True)      # means and variances by turns
        self.running = [stack(each) for each in statistics]
        self.layers = len(self.running) // 12       # of a block: three blocks of two norms a layer, and one after each

    def stem(self, images):
        """The first convolution: images (N, C, H, W), one product for all, or (N, M, C, H, W) -> (M, 2k, P)."""
        w = torch.cat([network[0].weight for network in self.members]).to(images.dtype)         # (M 2k, C, 3, 3)
        x = F.conv2d(images.flatten(1, -3), w, padding=1, groups=len(self.members) if images.dim() == 5 else 1)
        return x.unflatten(1, (len(self.members), -1)).movedim(0, 2).flatten(2)

    def __call__(self, images):
        training, dtype = self.members.training, torch.bfloat16 if self.bf16 else images.dtype
        weights, running = iter(Joined.apply(self.stacks, *self.parameters)), iter(self.running)
        n, (h, w), x = len(images), images.shape[-2:], self.stem(images.to(dtype))
        for block in range(BLOCKS):
            pixels, own = n * h * w, [*itertools.islice(running, 4 * self.layers)]
            x, *found = DenseBlock.apply(x, (n, h, w), None if training else own,
                                         *itertools.islice(weights, 6 * self.layers))
            if training:
                with torch.no_grad():           # the running variance is unbiased
                    torch._foreach_lerp_(own[::2], found[::2], MOMENTUM)
                    torch._foreach_lerp_(own[1::2], torch._foreach_mul(found[1::2], pixels / (pixels - 1)), MOMENTUM)
            x = F.batch_norm(x.view(1, -1, pixels), next(running).view(-1), next(running).view(-1),
                             next(weights).flatten(), next(weights).flatten(), training, MOMENTUM, EPSILON.value).relu()
            if block < BLOCKS - 1:          # the mean of 2x2 pixels commutes with a 1x1 convolution
                x, h, w = F.avg_pool2d(x.view(-1, n, h, w), 2), h // 2, w // 2
                x = next(weights).to(dtype).transpose(1, 2) @ x.view(len(self.members), -1, n * h * w)
        head, bias = weights
        x = x.view(len(self.members), -1, n, h * w).mean(3, dtype=head.dtype).transpose(1, 2)   # (M, N, C)
        return torch.baddbmm(bias[:, None], x, head).transpose(0, 1)
