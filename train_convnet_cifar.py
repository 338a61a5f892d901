"""Intermediate capacity: ensembles of 16 small ConvNets on CIFAR-100 (Sec. 4, appendix B.3).

Five networks, from 63,000 to 1.2 million parameters per member, each trained from independent (lambda 0) to end-to-end
(lambda 1) in steps of 0.1. The claim: the larger the members, the smaller the best lambda; for the largest it lies
strictly between the extremes. A sixth configuration, of 10 members, is for a look inside: end-to-end, few members have
strong filters in their first layer.

    python train_convnet_cifar.py                   # all runs, at a size that fits the machine
    python train_convnet_cifar.py --figure 5        # only the runs of Figure 5

Figures 4 and 5 are made from these runs, Table 4 from the networks.
"""

from study import command, plan
from common import Ensemble

from torch import nn

# --- The model -----------------------------------------------------------------------------------


def convnet(filters, strides, padding, batchnorm, channels, classes):
    """3x3 convolutions with ReLU, global average pooling, one linear layer: (N, C, H, W) -> (N, K).

    Initial weights are PyTorch's default.
    """
    layers = []
    for outputs, stride in zip(filters, strides, strict=True):
        layers.append(nn.Conv2d(channels, outputs, 3, stride, padding, bias=not batchnorm))
        layers += [nn.BatchNorm2d(outputs)] if batchnorm else []
        layers.append(nn.ReLU(inplace=True))
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(channels, classes))


def build(settings, shape, classes, generator):
    filters, strides, padding = (settings[key] for key in ("filters", "strides", "padding"))
    return Ensemble(lambda: convnet(filters, strides, padding, settings["batchnorm"], shape[0], classes),
                    settings["members"], generator, settings["precision"])


# --- The runs ------------------------------------------------------------------------------------

# presets.yaml has all runs, in the block convnet_cifar; FIGURES says which a figure draws (`joint`: each lambda).
FIGURES = {
    "4": {f"ConvNet-{size}M": ["joint"] for size in ("0.07", "0.14", "0.29", "0.60", "1.20")},
    "5": {"10xConvNet-0.29M": ["joint-0", "joint-1"]},
}
EXPERIMENT = plan.Experiment("convnet_cifar", build, FIGURES, weights=("5",))


def main():
    command.train_study(EXPERIMENT, command.training_parser(__doc__).parse_args())


if __name__ == "__main__":
    command.command_line(main)
