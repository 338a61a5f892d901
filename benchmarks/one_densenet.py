"""One DenseNet-BC-100-12 beside torchvision's, for the first epoch of the paper's protocol on CIFAR-100.

    python benchmarks/one_densenet.py       # two runs of about 40 minutes of one core, in results/one/

Initial weights, images, their order, crops and flips are equal; only the code of the network differs. Prints loss and
error of both after each epoch, and writes them to results/one_densenet.csv; benchmarks/one_densenet.csv is that file.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import study
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


EXPERIMENTS = {"package": train_densenet_cifar.EXPERIMENT, "torchvision": study.Experiment("densenet_cifar", build)}


def main():
    p = study.training_parser(__doc__)
    # one epoch at the rate of the first 150: without decay, which would fall within it
    p.set_defaults(preset="paper", only=["DN-High"], lambdas=[1], trials=1, set=["members=1", "epochs=1", "decay=[]"])
    args, cores = p.parse_args(), torch.get_num_threads()
    _, data_of, (run,) = study.prepare(train_densenet_cifar.EXPERIMENT, args)
    runs = {whose: replace(run, preset=f"one/{whose}") for whose in EXPERIMENTS}
    folders.make_writable(args.results)

    def of(run):
        return EXPERIMENTS[run.preset.removeprefix("one/")]

    def do(run, say):
        return study.outcome(run, study.do_run(of(run), run, data_of(run), args.results, study.told(run, say)))

    to_do = [run for run in runs.values() if folders.to_be_done(run, args.results)]
    study.run_at_once(to_do, args.results, do, max(1, min(cores, len(to_do))),
                      {run.path: study.cost(of(run), run, data_of(run)) for run in to_do})
    rows = []
    for whose, run in runs.items():
        record, history = folders.read_run(args.results / run.path), folders.load_history(args.results / run.path)
        for epoch in range(run.settings["epochs"]):
            rows.append({"network": whose, "epoch": epoch + 1, **{key: history[key][epoch] for key in PARTS},
                         "seconds": record["seconds"], "finished": record["finished"], **record["machine"]})
            print(f"{whose}, epoch {epoch + 1}: training loss {rows[-1][PARTS[0]]:.4f}, training error "
                  f"{rows[-1][PARTS[1]]:.2%}, test loss {rows[-1][PARTS[2]]:.4f}, test error {rows[-1][PARTS[3]]:.2%}")
    make_figures.write_csv(args.results / "one_densenet.csv", rows)
    print(args.results / "one_densenet.csv")


if __name__ == "__main__":
    study.command_line(main)
