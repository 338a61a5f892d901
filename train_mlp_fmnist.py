"""Spending a fixed parameter budget: ensembles of MLPs on Fashion-MNIST (Sec. 4, appendix B.1).

Four ways to spend about 815,000 parameters on networks with one hidden layer, from one network of 1024 nodes (1x1024H)
to 256 networks of four nodes (256x4H), each trained from independent (lambda 0) to end-to-end (lambda 1). The claim:
256 tiny networks trained independently lose to the single large one (16.3 against 10.2 % test error); trained jointly,
at lambda 0.95, they almost match it (10.3 %).

    python train_mlp_fmnist.py                  # all runs, at a size that fits the machine
    python train_mlp_fmnist.py --figure 2       # only the runs of Figure 2

Figures 2, 3, 9 and the MLPs of 6 are drawn from these runs; robustness.py measures 7 and 8 on their weights.
"""

from study import command, plan

import torch
from torch import nn

# --- The model -----------------------------------------------------------------------------------


class MLPEnsemble(nn.Module):
    """M networks of one hidden layer of H ReLU nodes, as one matrix product a layer.

    Member m is the stock network Flatten, Linear(D, H), ReLU, Linear(H, K) with the weights
    hidden_weight[m], hidden_bias[m], output_weight[m] and output_bias[m]: a test holds it to that.
    Examples run along the last axis throughout, so the first layer is one product (M*H, D) x (D, N)
    on the shared input, and all that follows works on whole rows of examples.
    """

    def __init__(self, members, hidden, inputs, classes, generator):
        super().__init__()

        def uniform(*shape, fan_in):        # PyTorch's default for a Linear's weights and biases
            bound = fan_in ** -0.5
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))

        self.hidden_weight = uniform(members, hidden, inputs, fan_in=inputs)
        self.hidden_bias = uniform(members, hidden, fan_in=inputs)
        self.output_weight = uniform(members, classes, hidden, fan_in=hidden)
        self.output_bias = uniform(members, classes, fan_in=hidden)

    def forward(self, images):
        """Images (N, C, H, W), or one batch a member (N, M, C, H, W) -> member logits (N, M, K)."""
        members, hidden, _ = self.hidden_weight.shape
        if images.dim() == 4:
            x = images.flatten(1).T                                             # (D, N)
            h = torch.addmm(self.hidden_bias.view(-1, 1), self.hidden_weight.flatten(0, 1), x)
            h = h.view(members, hidden, -1)                                     # (M, H, N)
        else:
            x = images.flatten(2).permute(1, 2, 0)                              # (M, D, N)
            h = torch.baddbmm(self.hidden_bias.unsqueeze(2), self.hidden_weight, x)
        logits = torch.baddbmm(self.output_bias.unsqueeze(2), self.output_weight, h.relu())
        return logits.permute(2, 0, 1)                                          # from (M, K, N)


def build(settings, shape, classes, generator):
    return MLPEnsemble(settings["members"], settings["hidden"], torch.Size(shape).numel(), classes, generator)


# --- The runs ------------------------------------------------------------------------------------

# presets.yaml has all runs, in the block mlp_fmnist; FIGURES says which a figure draws (`joint`: each lambda).
ENDS = ["joint-0", "joint-0.99", "joint-1"]
FIGURES = {
    "2": {"1x1024H": ["joint-1"], "256x4H": ["joint-0", "joint-0.95", "joint-1", "bagging", "stacking"]},
    "3": {"1x1024H": ["joint"], "16x64H": ["joint"], "64x16H": ["joint"], "256x4H": ["joint"]},
    "6": {"256x4H": ["joint"]},
    "7": {"256x4H": ENDS},
    "8": {"64x16H": ENDS},
    "9": {"64x16H": ["joint"]},
}
EXPERIMENT = plan.Experiment("mlp_fmnist", build, FIGURES, weights=("7", "8"))


def main():
    command.train_study(EXPERIMENT, command.training_parser(__doc__).parse_args())


if __name__ == "__main__":
    command.command_line(main)
