"""The DenseNets of an ensemble on CUDA, all members in each kernel. The twin is the loop of common.Ensemble.

A loop over sixteen DenseNets launches 22,800 kernels a step, each on one member's small tensors. Here

- activations are (M, P, C), channels last, with P = N H W pixels. A 1x1 convolution is one product per member, all in
  one kernel. A 3x3 convolution to k channels is one product to 9k columns, one group per tap, and the sum of the nine
  groups, each shifted by its tap.
- the features of a dense block stand in one buffer: no torch.cat. A feature map's mean and variance are computed once,
  when it is made, not again in each later layer, which has only its own scale and shift.
- the backward pass computes ReLU(batch norm(x)) again. It needs the buffer and the bottlenecks' 4k maps: a tenth of
  what autograd keeps.

The functions in "Element-wise" are fused by torch.compile on CUDA. On a CPU the loop is 3 to 10 times faster.
tests/test_fast.py holds both equal in float64.
"""

import functools
import itertools
import os

import torch
from torch.nn import functional as F

BLOCKS = 3
EPS, MOMENTUM = 1e-5, 0.1           # nn.BatchNorm2d's

# --- Element-wise: what torch.compile fuses -------------------------------------------------------


def fused(function):
    """Compiles a function for CUDA. Each width of a layer is another shape: one kernel serves them all."""
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def call(x, *others):
        return (compiled if x.is_cuda else function)(x, *others)
    return call


def wide(x):
    """Half precision as fp32; float64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


@fused
def statistics(x):
    """Mean and biased variance (M, C) of x (M, P, C)."""
    variance, mean = torch.var_mean(wide(x), 1, correction=0)
    return mean, variance


def scale_and_shift(mean, variance, gamma, beta):
    scale = gamma * torch.rsqrt(variance + EPS)
    return scale, beta - scale * mean


@fused
def norm_relu(x, scale, shift):
    """relu(batch norm(x)): x (M, P, C), scale and shift (M, C)."""
    return (wide(x) * scale[:, None] + shift[:, None]).relu().to(x.dtype)


@fused
def norm_relu_backward(g, x, mean, variance, scale, shift):
    """Gradients of norm_relu with respect to x (M, P, C), gamma and beta (M, C)."""
    x = wide(x)
    g = wide(g) * (x * scale[:, None] + shift[:, None] > 0)
    x_hat = (x - mean[:, None]) * torch.rsqrt(variance + EPS)[:, None]
    of_beta, of_gamma = g.sum(1), (g * x_hat).sum(1)
    return scale[:, None] * (g - (of_beta[:, None] + x_hat * of_gamma[:, None]) / x.shape[1]), of_gamma, of_beta


@fused
def sum_taps(z, n, h, w):
    """z (M, P, 9k), tap-major -> (M, P, k): output pixel (y, x) sums tap (dy, dx) of pixel (y + dy - 1, x + dx - 1)."""
    members, p, columns = z.shape
    z = F.pad(z.view(members * n, h, w, columns), (0, 0, 1, 1, 1, 1)).unflatten(3, (9, -1))
    return sum(wide(z[:, t // 3:t // 3 + h, t % 3:t % 3 + w, t]) for t in range(9)).to(z.dtype).view(members, p, -1)


@fused
def spread_taps(g, n, h, w):
    """The transpose of sum_taps: g (M, P, k) -> (M, P, 9k)."""
    members, p, k = g.shape
    g = F.pad(g.reshape(members * n, h, w, k), (0, 0, 1, 1, 1, 1))
    return torch.stack([g[:, 2 - t // 3:2 - t // 3 + h, 2 - t % 3:2 - t % 3 + w] for t in range(9)], 3).view(
        members, p, 9 * k)


# --- The layers ----------------------------------------------------------------------------------


class NormRelu(torch.autograd.Function):
    """relu(batch norm(x)) of x (M, P, C) with statistics (M, C) that are known; gamma and beta (M, C)."""

    @staticmethod
    def forward(ctx, x, mean, variance, gamma, beta):
        scale, shift = scale_and_shift(mean, variance, gamma, beta)
        ctx.save_for_backward(x, mean, variance, scale, shift)
        return norm_relu(x, scale, shift)

    @staticmethod
    def backward(ctx, g):
        of_x, of_gamma, of_beta = norm_relu_backward(g, *ctx.saved_tensors)
        return of_x.to(g.dtype), None, None, of_gamma, of_beta


class DenseBlock(torch.autograd.Function):
    """x (M, P, C0) -> all features (M, P, C0 + layers k), and their statistics (M, C) and the bottlenecks' (M, 4k).

    weights: for each layer gamma, beta (M, c), w (M, c, 4k), gamma, beta (M, 4k), w (M, 4k, 9k). running: None, or in
    evaluation for each layer mean, variance (M, c), mean, variance (M, 4k).
    """

    @staticmethod
    def forward(ctx, x, size, growth, running, *weights):
        layers, c = len(weights) // 6, x.shape[2]
        features = x.new_empty(*x.shape[:2], c + layers * growth)
        features[:, :, :c] = x
        mean = weights[0].new_empty(len(x), features.shape[2])
        variance = torch.empty_like(mean)
        mean[:, :c], variance[:, :c] = statistics(x)
        bottlenecks, theirs = [], []
        for i in range(layers):
            gamma1, beta1, w1, gamma2, beta2, w2 = weights[6 * i:6 * i + 6]
            at = running[4 * i:4 * i + 2] if running else (mean[:, :c], variance[:, :c])
            u = norm_relu(features[:, :, :c], *scale_and_shift(*at, gamma1, beta1)) @ w1.to(x.dtype)
            at = running[4 * i + 2:4 * i + 4] if running else statistics(u)
            z = norm_relu(u, *scale_and_shift(*at, gamma2, beta2)) @ w2.to(x.dtype)
            new = sum_taps(z, *size)
            features[:, :, c:c + growth] = new
            mean[:, c:c + growth], variance[:, c:c + growth] = statistics(new)
            bottlenecks.append(u)
            theirs += at
            c += growth
        ctx.size, ctx.growth, ctx.layers = size, growth, layers
        ctx.save_for_backward(features, mean, variance, *bottlenecks, *theirs, *weights)
        ctx.mark_non_differentiable(mean, variance, *theirs)
        return features, mean, variance, *theirs

    @staticmethod
    def backward(ctx, g, *_):
        features, mean, variance, *rest = ctx.saved_tensors
        layers = ctx.layers
        bottlenecks, theirs, weights = rest[:layers], rest[layers:3 * layers], rest[3 * layers:]
        g, gradients, c = g.clone(), [None] * len(weights), features.shape[2]
        for i in reversed(range(layers)):
            c -= ctx.growth
            gamma1, beta1, w1, gamma2, beta2, w2 = weights[6 * i:6 * i + 6]
            u, at = bottlenecks[i], theirs[2 * i:2 * i + 2]
            scale, shift = scale_and_shift(*at, gamma2, beta2)
            of_z = spread_taps(g[:, :, c:c + ctx.growth], *ctx.size)
            of_w2 = norm_relu(u, scale, shift).transpose(1, 2) @ of_z
            of_u, of_gamma2, of_beta2 = norm_relu_backward(of_z @ w2.to(g.dtype).transpose(1, 2), u, *at, scale, shift)
            of_u, x, at = of_u.to(g.dtype), features[:, :, :c], (mean[:, :c], variance[:, :c])
            scale, shift = scale_and_shift(*at, gamma1, beta1)
            of_w1 = norm_relu(x, scale, shift).transpose(1, 2) @ of_u
            of_x, of_gamma1, of_beta1 = norm_relu_backward(of_u @ w1.to(g.dtype).transpose(1, 2), x, *at, scale, shift)
            g[:, :, :c] += of_x.to(g.dtype)
            gradients[6 * i:6 * i + 6] = (of_gamma1, of_beta1, of_w1.to(w1.dtype),
                                          of_gamma2, of_beta2, of_w2.to(w2.dtype))
        return g[:, :, :c].contiguous(), None, None, None, *gradients


def dense_block():
    """The form of the dense block that runs: DENSE_BLOCK=triton in the environment asks for the one in Triton."""
    if os.environ.get("DENSE_BLOCK") == "triton":
        import fast_densenet_triton
        return fast_densenet_triton.DenseBlock
    return DenseBlock


# --- All members ---------------------------------------------------------------------------------


class Joined(torch.autograd.Function):
    """Stacked tensors (M, ...) of the members' parameters, which are views of them: nothing is copied either way."""

    @staticmethod
    def forward(ctx, stacks, views, *parameters):
        ctx.views = views
        return tuple(stack.detach() for stack in stacks)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *(view(part) for view, g in zip(ctx.views, gradients, strict=True) for part in g.unbind())


def same(tensor):
    return tensor


def matrix(w):
    """The weights (C, c, 1, 1) of a 1x1 convolution, or (C, c) of a linear layer, as a matrix (c, C)."""
    return w.flatten(1).T


def columns(w):
    """The weights (k, c, 3, 3) of a convolution as a matrix (c, 9k), tap-major."""
    return w.permute(1, 2, 3, 0).flatten(1)


def as_convolution_1x1(matrix):
    return matrix.T[:, :, None, None]


def as_convolution_3x3(matrix):
    return matrix.unflatten(1, (3, 3, -1)).permute(3, 0, 1, 2)


class DenseNets:
    """The M members of an Ensemble of densenet_bc as one: images (N, C, H, W) or (N, M, C, H, W) -> (N, M, K).

    The members keep their parameters and running statistics, which become views of tensors with all members first. So
    state dicts, optimizers and checkpoints are those of the loop.
    """

    def __init__(self, members, bf16):
        self.members, self.count, self.bf16 = members, len(members), bf16
        self.parameters, self.stacks, self.views, self.means, self.variances = [], [], [], [], []
        self.layers = sum(isinstance(part, torch.nn.BatchNorm2d) for part in members[0].modules()) // 6
        self.stack([network[0].weight for network in members], same, same)
        at = 1
        for block in range(BLOCKS):
            for _ in range(self.layers):
                bn1, _, conv1, bn2, _, conv2 = zip(*(network[at].layers for network in members), strict=True)
                self.stack_norm(bn1)
                self.stack([conv.weight for conv in conv1], matrix, as_convolution_1x1)
                self.stack_norm(bn2)
                self.stack([conv.weight for conv in conv2], columns, as_convolution_3x3)
                at += 1
            self.stack_norm([network[at] for network in members])
            if block < BLOCKS - 1:
                self.stack([network[at + 2].weight for network in members], matrix, as_convolution_1x1)
                at += 4
        self.stack([network[-1].weight for network in members], matrix, matrix)
        self.stack([network[-1].bias for network in members], same, same)
        self.growth = conv2[0].out_channels

    def stack(self, parameters, to, back):
        """Makes the parameters back(view) of one tensor of all to(parameter)."""
        stacked = torch.stack([to(p.detach()) for p in parameters])
        for p, part in zip(parameters, stacked, strict=True):
            p.data = back(part)
        self.parameters += parameters
        self.stacks.append(stacked)
        self.views.append(back)

    def stack_norm(self, norms):
        self.stack([norm.weight for norm in norms], same, same)
        self.stack([norm.bias for norm in norms], same, same)
        for name, stacks in (("running_mean", self.means), ("running_var", self.variances)):
            stacks.append(torch.stack([getattr(norm, name) for norm in norms]))
            for norm, part in zip(norms, stacks[-1], strict=True):
                setattr(norm, name, part)

    def running(self, first, count):
        return [each for pair in zip(self.means[first:first + count], self.variances[first:first + count], strict=True)
                for each in pair]

    @torch.no_grad()
    def track(self, first, found, p):
        """Moves the running statistics towards those found, of p values (the variance unbiased)."""
        running = self.running(first, len(found) // 2)
        torch._foreach_lerp_(running[::2], list(found[::2]), MOMENTUM)
        torch._foreach_lerp_(running[1::2], [v * (p / (p - 1)) for v in found[1::2]], MOMENTUM)

    def stem(self, images, w):
        """The first convolution: images (N, C, H, W), one product for all, or (N, M, C, H, W) -> (M, P, C)."""
        own = images.dim() == 5
        x = F.conv2d(images.flatten(1, 2) if own else images, w.flatten(0, 1).to(images.dtype), padding=1,
                     groups=self.count if own else 1)
        return x.unflatten(1, (self.count, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)

    def __call__(self, images):
        training, dtype = self.members.training, torch.bfloat16 if self.bf16 else images.dtype
        weights = iter(Joined.apply(self.stacks, self.views, *self.parameters))
        n, (h, w), norm, count = len(images), images.shape[-2:], 0, 2 * self.layers
        x = self.stem(images.to(dtype), next(weights)).contiguous()
        for block in range(BLOCKS):
            of_block = list(itertools.islice(weights, 6 * self.layers))
            x, mean, variance, *theirs = dense_block().apply(
                x, (n, h, w), self.growth, None if training else self.running(norm, count), *of_block)
            if training:
                found = []
                for i in range(self.layers):
                    c = of_block[6 * i].shape[1]
                    found += mean[:, :c], variance[:, :c], *theirs[2 * i:2 * i + 2]
                self.track(norm, [*found, mean, variance], n * h * w)
            else:
                mean, variance = self.running(norm + count, 1)
            norm += count + 1
            x = NormRelu.apply(x, mean, variance, next(weights), next(weights))
            if block < BLOCKS - 1:          # the mean of 2x2 pixels commutes with a 1x1 convolution
                x = x.view(self.count, n, h // 2, 2, w // 2, 2, -1).mean((3, 5), dtype=wide(x).dtype).to(dtype)
                h, w = h // 2, w // 2
                x = x.view(self.count, n * h * w, -1) @ next(weights).to(dtype)
        head, bias = weights
        x = wide(x).view(self.count, n, h * w, -1).mean(2)
        return torch.baddbmm(bias[:, None], x, head).transpose(0, 1)
