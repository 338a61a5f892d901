"""One DenseNet-BC-100-12 beside torchvision's, for the first epoch of the paper's protocol on CIFAR-100.

    python benchmarks/one_densenet.py       # two runs of about 35 minutes of one core, in results/one_densenet/

Initial weights, images, their order, crops and flips are equal; only the code of the network differs. Prints loss and
error of both, and writes them to results/one_densenet.csv; benchmarks/one_densenet.csv is that file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import study
import beside
import common
import folders
import make_figures
import train_densenet_cifar

import torch
import torchvision
from torch import nn

PARTS = ("train_ensemble_loss", "train_ensemble_error", "test_ensemble_loss", "test_ensemble_error")


def torchvisions_densenet(depth, growth, classes):
    """torchvision's DenseNet-BC for 32x32 images. Theirs is for larger ones: a plain convolution replaces its stem."""
    network = torchvision.models.DenseNet(growth, 3 * ((depth - 4) // 6,), num_init_features=2 * growth,
                                          num_classes=classes)
    network.features.conv0 = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        delattr(network.features, name)
    return network


def with_weights_of(start, network):
    """The network with the parameters of another one, which come in the same order."""
    with torch.no_grad():
        for p, q in zip(start.parameters(), network.parameters(), strict=True):
            q.copy_(p)
    return network


def build(s, shape, classes, generator):
    """An ensemble of one: torchvision's network with the initial weights that the package draws."""
    start = train_densenet_cifar.build(s, shape, classes, generator)
    return common.Ensemble(lambda: with_weights_of(start, torchvisions_densenet(s["depth"], s["growth"], classes)), 1,
                           generator, s["precision"])


def main():
    places, results = beside.trained(__doc__, train_densenet_cifar.EXPERIMENT, [
        "--only", "DN-High", "--lambdas", "1", "--trials", "1",
        "--set", "members=1", "epochs=1", "decay=[]"],      # at the rate of the first 150: no fall within one epoch
        {"package": train_densenet_cifar.EXPERIMENT, "torchvision": study.Experiment("densenet_cifar", build)})
    rows = []
    for whose, place in places.items():
        record, history = folders.read_run(place), folders.load_history(place)
        rows.append({"network": whose, "epoch": 1, **{key: history[key][0] for key in PARTS},
                     "seconds": record["seconds"], "finished": record["finished"], **record["machine"]})
        print("{}: training loss {:.4f}, training error {:.2%}, test loss {:.4f}, test error {:.2%}".format(
            whose, *(rows[-1][key] for key in PARTS)))
    make_figures.write_csv(results / "one_densenet.csv", rows)
    print(results / "one_densenet.csv")


if __name__ == "__main__":
    study.command_line(main)
