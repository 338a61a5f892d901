"""Intermediate capacity: ensembles of 16 small ConvNets on CIFAR-100 (Sec. 4, appendix B.3).

Five networks, from 63,000 to 1.2 million parameters a member, each trained from independent
(lambda 0) to end-to-end (lambda 1) in steps of 0.1. The claim: the larger the members, the smaller
the best lambda; for the largest it lies strictly between the extremes. A sixth configuration, of 10
members, is for a look inside: end-to-end, few members have strong filters in their first layer.

    python train_convnet_cifar.py                       # all runs, at a size that fits the machine
    python train_convnet_cifar.py --only ConvNet-0.29M --lambdas 0 0.5 1 --trials 1

Figures 4 and 5 are made from its runs.
"""

import common

from torch import nn

# --- The model ---------------------------------------------------------------------------------


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
    if len(filters) != len(strides):
        raise common.Refused(f"a ConvNet with filters {filters} has strides {strides}: one stride "
                             "a layer was expected in presets.yaml")
    size = min(shape[1:])
    for stride in strides:
        size = (size + 2 * padding - 3) // stride + 1
        if size < 1:
            raise common.Refused(f"images of {shape[2]}x{shape[1]} pixels are too small for a "
                                 f"ConvNet with strides {strides} and padding {padding}: nothing "
                                 "is left after its layers; --set padding=1, or lower strides")
    return common.Ensemble(
        lambda: convnet(filters, strides, padding, settings["batchnorm"], shape[0], classes),
        settings["members"], generator, settings["precision"])


COUNTS = (common.list_of(common.COUNT[0]), "a list of whole numbers of at least 1, one a layer")
PADDING = (lambda x: x in (0, 1) and not isinstance(x, bool), "0 or 1")

# --- The runs ----------------------------------------------------------------------------------

# presets.yaml, block convnet_cifar, names them: every configuration at every lambda over the
# trials; the sixth at lambda 0 and 1, with its weights kept. Which of them a figure draws:
EXPERIMENT = common.Experiment("convnet_cifar", {
    "filters": COUNTS, "strides": COUNTS, "padding": PADDING, "batchnorm": common.SWITCH,
    "precision": common.PRECISION}, build, {
    "Fig. 4": lambda run: run.configuration != "10xConvNet-0.29M",
    "Fig. 5": lambda run: run.configuration == "10xConvNet-0.29M"})


# --- main --------------------------------------------------------------------------------------

def main():
    common.run_study(EXPERIMENT, common.training_parser(__doc__).parse_args())


if __name__ == "__main__":
    common.command_line(main)
