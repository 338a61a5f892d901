"""A training step of 16 ConvNets: member by member, as this package runs them, or grouped.

    python benchmarks/bench_convnets.py                 # about five minutes on two cores
    python benchmarks/bench_convnets.py --csv FILE      # and the numbers as CSV

An ensemble of M equal networks is usually vectorised into one: each convolution with the filters of
all members, groups=M. The first needs no groups, since all members see the same images. Both ways
have the same weights, loss and optimizer, and give the same logits, which is checked first. They
are timed in turn, one step each over several rounds, and the medians compared.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import make_figures
import train_convnet_cifar

import torch
from torch import nn
from torch.nn import functional as F

ROUNDS, CONFIGURATION, LAMBDA = 7, "ConvNet-0.29M", 0.5


class Grouped(nn.Module):
    """The members of a `common.Ensemble` of ConvNets, without batch norm, as one network."""

    def __init__(self, ensemble, precision, memory_format):
        super().__init__()
        self.count, self.memory_format = len(ensemble.members), memory_format
        self.bf16 = precision == "bf16"
        self.convolutions = nn.ModuleList()
        for i, layer in enumerate(ensemble.members[0]):
            if not isinstance(layer, nn.Conv2d):
                continue
            own = [member[i] for member in ensemble.members]
            groups = 1 if i == 0 else self.count
            inputs = layer.in_channels * (1 if i == 0 else self.count)
            merged = nn.Conv2d(inputs, layer.out_channels * self.count, 3, layer.stride,
                               layer.padding, groups=groups)
            merged.weight.data = torch.cat([conv.weight for conv in own]).clone()
            merged.bias.data = torch.cat([conv.bias for conv in own]).clone()
            self.convolutions.append(merged.to(memory_format=memory_format))
        linear = [member[-1] for member in ensemble.members]
        self.weight = nn.Parameter(torch.stack([one.weight for one in linear]))     # (M, K, C)
        self.bias = nn.Parameter(torch.stack([one.bias for one in linear]))         # (M, K)

    def forward(self, images):
        """(N, C, H, W) -> (N, M, K)"""
        x = images.contiguous(memory_format=self.memory_format)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            for convolution in self.convolutions:
                x = F.relu(convolution(x), inplace=True)
            x = x.mean((2, 3)).unflatten(1, (self.count, -1)).transpose(0, 1)       # (M, N, C)
            logits = torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))
        return logits.transpose(0, 1).float()


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--csv", type=Path, help="write the numbers here")
    p.add_argument("--device", default="auto")
    args = p.parse_args()
    device = common.choose_device(args.device)
    preset = common.load_preset("paper")
    block = common.experiment_settings(preset, "paper", train_convnet_cifar.EXPERIMENT)
    data = common.synthetic(100, (3, 32, 32), block["batch"], 1).to(device)
    images, targets = data.normalise(data.train_images), data.train_labels
    c = block["configurations"][CONFIGURATION]
    settings = block | c | {"seed": 0, "lr": common.learning_rate(c["lr"], LAMBDA)}
    ways = {}
    for precision in ("fp32", "bf16"):
        run = common.Run("bench", "convnet_cifar", CONFIGURATION, "joint", LAMBDA, 0,
                         settings | {"precision": precision}, False)
        ours, optimizer = common.new_ensemble(train_convnet_cifar.EXPERIMENT, run, data)
        ways["member by member", precision, "channels last"] = ours, optimizer
        for name, memory_format in (("channels last", torch.channels_last),
                                    ("plain", torch.contiguous_format)):
            grouped = Grouped(ours, precision, memory_format).to(device)
            with torch.no_grad():
                torch.testing.assert_close(grouped(images), ours(images), rtol=0, atol=(
                    1e-4 if precision == "fp32" else 0.05))
            ways["grouped", precision, name] = grouped, torch.optim.SGD(
                grouped.parameters(), settings["lr"], settings["momentum"],
                weight_decay=settings["weight_decay"], fused=True)
    scores = common.Scores(c["members"], device)
    times = {way: [] for way in ways}
    for _ in range(ROUNDS + 1):                                           # the first warms up
        for way, (ensemble, optimizer) in ways.items():
            times[way].append(common.seconds_per(lambda e=ensemble, o=optimizer: (
                common.training_step(e, o, scores, images, targets, LAMBDA)), 1, device))
    step = {way: statistics.median(values[1:]) for way, values in times.items()}
    where = common.machine(device)
    print(f"{where['device']}, {device.type}, {where['threads']} threads, torch {where['torch']}, "
          f"{c['members']} x {CONFIGURATION}, batch {block['batch']}, median of {ROUNDS} rounds\n")
    print("| way | precision | memory format | step (ms) | ours in that precision is faster by |")
    print("|---|---|---|---|---|")
    rows = []
    for (name, precision, layout), seconds in step.items():
        ratio = seconds / step["member by member", precision, "channels last"]
        rows.append({"way": name, "precision": precision, "memory_format": layout,
                     "step_ms": 1000 * seconds, "ratio": ratio})
        print(f"| {name} | {precision} | {layout} | {1000 * seconds:.0f} | {ratio:.2f} |")
    if args.csv:
        make_figures.write_csv(args.csv, [{**row, **where} for row in rows])


if __name__ == "__main__":
    common.command_line(main)
