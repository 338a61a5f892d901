"""What an epoch of the MLP ensembles costs, beside the textbook way of training one.

    python benchmarks/bench.py                 # about two minutes on two cores
    python benchmarks/bench.py --csv FILE      # and the numbers as CSV

An epoch is the paper's: 500 steps at batch 100 and an evaluation of the 10,000 validation images.
The textbook way is a DataLoader with workers and torchvision's transforms, one stock network per
member in a Python list, one loss each, and `.item()` for the running loss at every step. All are
timed in turn, a few steps each, over several rounds, so that a machine whose speed drifts hits all
alike; the medians are compared.
"""

import argparse
import resource
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import make_figures
import train_mlp_fmnist

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

ROUNDS, STEPS, TEXTBOOK_STEPS = 7, 60, 8
STEPS_PER_EPOCH, VALIDATION = 500, 10_000


class Textbook(Dataset):
    """Images as torchvision.datasets gives them: a PIL image through transforms."""

    def __init__(self, data):
        self.images, self.labels = data.train_images.cpu(), data.train_labels.cpu()
        self.transform = torchvision.transforms.Compose([
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((data.mean.item(),), (data.std.item(),))])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i, 0].numpy())), int(self.labels[i])


def textbook(block, data):
    """Generators that take one textbook step, and one textbook batch of evaluation, at a time."""
    members, hidden, device = block["members"], block["hidden"], data.device
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(),
                              nn.Linear(hidden, 10)).to(device) for _ in range(members)]
    sgd = torch.optim.SGD([p for net in networks for p in net.parameters()],
                          lr=common.learning_rate(block["lr"], 0), momentum=0.9)
    workers = {"batch_size": 100, "num_workers": 2, "persistent_workers": True}
    training, validation = common.split(len(data.train_labels), 0, VALIDATION)
    dataset = Textbook(data)

    def steps():
        total = 0.0
        while True:
            for images, targets in DataLoader(Subset(dataset, training), shuffle=True, **workers):
                images, targets = images.to(device), targets.to(device)
                loss = sum(F.cross_entropy(net(images), targets) for net in networks) / members
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                total += loss.item()
                yield

    def evaluations():
        wrong = 0
        while True:
            for images, targets in DataLoader(Subset(dataset, validation), **workers):
                with torch.no_grad():
                    logits = sum(net(images.to(device)) for net in networks)
                wrong += (logits.argmax(1).cpu() != targets).sum().item()
                yield

    return steps(), evaluations()


def ours(name, block, data, training):
    """Functions that take one of our steps and one of our evaluations."""
    settings = block["configurations"][name]
    settings = settings | {"lr": common.learning_rate(settings["lr"], 0.95), "seed": 0,
                           **{k: block[k] for k in ("momentum", "nesterov", "weight_decay")}}
    run = common.Run("bench", "mlp_fmnist", name, "joint", 0.95, 0, settings, False)
    ensemble, optimizer = common.new_ensemble(train_mlp_fmnist.EXPERIMENT, run, data)
    scores = common.Scores(settings["members"], data.device)
    _, held_out = common.split(len(data.train_labels), 0, VALIDATION)
    held_out = held_out.to(data.device)
    held_out = data.train_images[held_out], data.train_labels[held_out]

    def step():
        rows = training[torch.randint(len(training), (block["batch"],), device=data.device)]
        common.training_step(ensemble, optimizer, scores, data.normalise(data.train_images[rows]),
                             data.train_labels[rows], run.lam)

    return step, lambda: common.evaluate(ensemble, data, *held_out)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--csv", type=Path, help="write the numbers here")
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    device = common.choose_device(args.device)
    block = common.experiment_settings(common.load_preset("paper"), "paper",
                                       train_mlp_fmnist.EXPERIMENT)
    on_disk = common.find_data("Fashion-MNIST", "auto", download=False)
    data = common.load_data("Fashion-MNIST", "real" if on_disk else "synthetic", block).to(device)
    training = common.split(len(data.train_labels), 0, VALIDATION)[0].to(device)
    ways = {name: ours(name, block, data, training) for name in block["configurations"]}
    textbook_step, textbook_evaluation = textbook(block["configurations"]["256x4H"], data)

    times = {way: ([], []) for way in [*ways, "256x4H, textbook"]}
    for _ in range(ROUNDS + 1):                                           # the first warms up
        for name, (step, evaluate) in ways.items():
            times[name][0].append(common.seconds_per(step, STEPS, device))
            times[name][1].append(common.seconds_per(evaluate, 1, device))
        step, evaluation = times["256x4H, textbook"]
        step.append(common.seconds_per(lambda: next(textbook_step), TEXTBOOK_STEPS, device))
        evaluation.append(common.seconds_per(lambda: next(textbook_evaluation), TEXTBOOK_STEPS,
                                             device) * VALIDATION / 100)

    rows = []
    for way, (step, evaluation) in times.items():
        step, evaluation = (statistics.median(values[1:]) for values in (step, evaluation))
        rows.append({"way": way, "step_ms": 1000 * step, "evaluation_s": evaluation,
                     "epoch_s": STEPS_PER_EPOCH * step + evaluation})
    epoch = {row["way"]: row["epoch_s"] for row in rows}
    where = common.machine(device)
    print(f"{where['device']}, {device.type}, {where['threads']} threads, torch {where['torch']}, "
          f"{data.description['name']}, median of {ROUNDS} rounds\n")
    print("| way | epoch / epoch of 1x1024H | step (ms) | evaluation (s) | epoch (s) |")
    print("|---|---|---|---|---|")
    for row in rows:
        row["ratio"] = row["epoch_s"] / epoch["1x1024H"]
        print(f"| {row['way']} | {row['ratio']:.2f} | {row['step_ms']:.2f} | "
              f"{row['evaluation_s']:.2f} | {row['epoch_s']:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss     # bytes on macOS, else kilobytes
    print(f"\n256x4H: {epoch['256x4H, textbook'] / epoch['256x4H']:.1f} times faster than the "
          f"textbook way; peak memory of this process "
          f"{peak / (1e6 if sys.platform == 'darwin' else 1e3):.0f} MB")
    if args.csv:
        make_figures.write_csv(args.csv, [{**row, **where} for row in rows])


if __name__ == "__main__":
    common.command_line(main)
