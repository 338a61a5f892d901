"""High-capacity members: ensembles of DenseNets on CIFAR-100 (Sec. 4, appendix B.2).

Three ways to fill a GPU, from 4 large networks (DN-High) to 16 smaller ones (DN-Low), each trained from independent
(lambda 0) to end-to-end (lambda 1). The claim: here end-to-end fails. Its test error is higher than that of independent
training in all three (22.1 against 17.8 % for DN-High), and at lambda 1 one member learns while the others stay poor:
one network dominates.

    python train_densenet_cifar.py                      # all runs, at a size that fits the machine
    python train_densenet_cifar.py --figure table2      # only the runs of Table 2

Table 2 and the DenseNets of Figure 6 are made from these runs, Tables 1 and 3 from the networks.
"""

from study import command, plan
from common import Ensemble, Refused

import torch
from torch import nn

# --- The model -----------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """Adds `growth` feature maps to those it is given: (N, C, H, W) -> (N, C + growth, H, W)."""

    def __init__(self, channels, growth):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth), nn.ReLU(inplace=True),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False))

    def forward(self, x):
        return torch.cat([x, self.layers(x)], 1)


def densenet_bc(depth, growth, channels, classes):
    """DenseNet-BC (Huang et al. 2017) for small images: (N, C, H, W) -> logits (N, K).

    Three dense blocks of (depth - 4) / 6 bottlenecks; between them the feature maps are halved in
    number (compression 0.5) and in size. Initial weights as in Amos and Kolter's implementation.
    """
    width = 2 * growth
    layers = [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range((depth - 4) // 6):
            layers.append(Bottleneck(width, growth))
            width += growth
        if block < 2:
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True),
                       nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
    layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
               nn.Linear(width, classes)]
    network = nn.Sequential(*layers)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):        # normal, variance 2 / (kernel area * outputs)
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    nn.init.zeros_(layers[-1].bias)
    return network


def at_once(members, bf16):
    """The members as one on CUDA: images -> member logits. None on a card older than the one measured: the loop."""
    if torch.cuda.get_device_capability() < (9, 0):
        return None
    from fast_densenet import DenseNets  # needs Triton, which torch brings where it can use a GPU
    return DenseNets(members, bf16)


def build(settings, shape, classes, generator):
    if settings["depth"] < 10 or settings["depth"] % 6 != 4:
        raise Refused(f"depth {settings['depth']}: a DenseNet-BC has a depth of 6n + 4 with n of at least 1 (10, 16, "
                      "22, ...)")
    # All members in each kernel where an H100 was measured to be faster so (docs/costs.md); elsewhere the loop.
    measured = settings["precision"] == "bf16" and settings["growth"] in (6, 8, 12) and shape[1:] == (32, 32)
    return Ensemble(lambda: densenet_bc(settings["depth"], settings["growth"], shape[0], classes),
                    settings["members"], generator, settings["precision"], at_once if measured else None)


# --- The runs ------------------------------------------------------------------------------------

# presets.yaml has all runs, in the block densenet_cifar; FIGURES says which a figure draws (`joint`: each lambda).
EVERY = ["joint", "independent", "bagging", "stacking"]      # independent: lambda 0, each member at the rate lr itself
FIGURES = {
    "table2": {"DN-Low": EVERY, "DN-Mid": EVERY, "DN-High": EVERY},
    "6": {"DN-High": ["joint"]},
}
EXPERIMENT = plan.Experiment("densenet_cifar", build, FIGURES)


def main():
    command.train_study(EXPERIMENT, command.training_parser(__doc__).parse_args())


if __name__ == "__main__":
    command.command_line(main)
