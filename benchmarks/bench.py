"""What a training step costs on a CPU, beside other ways to train such ensembles; and two checks that train.

    python benchmarks/bench.py steps        # 256x4H, ConvNet-0.29M, DN-Low, or --only NAME ...
    python benchmarks/bench.py spread       # how far one trial moves by rounding alone
    python benchmarks/bench.py densenet     # one DenseNet beside torchvision's, for an epoch

`steps` takes steps at the paper's batch size, each way on one thread, as a run has. The ways of a network take turns
over several rounds, so that a machine whose speed drifts slows all alike. The table has medians.

- ours: common.stepper, which gathers and augments its batch as well;
- textbook: a DataLoader with two workers and torchvision's transforms, the stock networks in a list, `.item()` at
  every step, as someone would write it;
- vmap: torch.func's, which makes of the members' layers batched products and grouped convolutions; its batch is ready;
- floor: operations at the rate of a large product, or what autograd keeps for the backward pass, written and read once,
  at the rate of a large copy, whichever takes longer.

`spread` trains trial 0 of 1x1024H five times at the paper's protocol, each time with one bit of another initial weight
changed, about 15 minutes a run; `--only 256x4H --lambdas 0.95 1` does so for that ensemble. results/spread.csv has all
such runs that are finished there; expected/paper/spread.csv has those of 1x1024H. `densenet` trains DenseNet-BC-100-12
of this package and of torchvision, from equal weights on equal batches, for the first epoch of the paper's protocol on
CIFAR-100, about 35 minutes a run; benchmarks/one_densenet.csv is its results/densenet.csv.
"""

import collections
import ctypes
import functools
import math
import statistics
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import study
import common
import train_densenet_cifar
import train_mlp_fmnist
from study import command, finished, folders, plan

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils import data as loading
from torch.utils.flop_counter import FlopCounterMode

CPU, LAMBDA = torch.device("cpu"), 0.5
STEPS = {"mlp_fmnist": 30, "convnet_cifar": 2, "densenet_cifar": 1}         # timed in a row
EXPERIMENT_OF = {name: experiment for experiment in STEPS
                 for name in plan.load_preset("paper")[experiment]["configurations"]}

# --- What is timed -------------------------------------------------------------------------------


@dataclass
class Case:
    """A joint run of a configuration, and synthetic images with the form of its data."""
    experiment: plan.Experiment
    run: plan.Run
    data: common.Data

    def ready(self):
        """What common.stepper takes: an untrained ensemble, its optimizer, scores and batches."""
        ensemble, optimizer = common.new_ensemble(self.experiment.build, self.run, self.data)
        scores = common.Scores(self.run.settings["members"], self.data.device)
        everything = torch.arange(len(self.data.train_labels), device=self.data.device)
        return ensemble, optimizer, scores, common.Batches(self.run, self.data, everything)

    def stock(self):
        """The members as a reader of PyTorch would write them."""
        s, data = self.run.settings, self.data
        if "hidden" in s:
            return [nn.Sequential(nn.Flatten(), nn.Linear(math.prod(data.shape), s["hidden"]), nn.ReLU(),
                                  nn.Linear(s["hidden"], data.classes)) for _ in range(s["members"])]
        ensemble = self.experiment.build(s, data.shape, data.classes, torch.Generator())
        return list(ensemble.members.to(memory_format=torch.contiguous_format))

    def sgd(self, networks, **options):
        s = self.run.settings
        return torch.optim.SGD(nn.ModuleList(networks).parameters(), s["lr"], s["momentum"],
                               weight_decay=s["weight_decay"], **options)


def new_case(name, preset, device=CPU, batches=2, test=8, **changes):
    """A configuration at the size of a preset, with images for some batches. `changes`: other settings."""
    experiment = plan.experiment_of(EXPERIMENT_OF[name])
    block = plan.experiment_settings(plan.load_preset(preset), preset, experiment.name)
    settings = plan.run_settings(block, block["configurations"][name], "joint", LAMBDA)
    settings |= {"seed": 0, "train": None, "precision": "fp32", **changes}
    run = plan.Run("benchmark", experiment.name, name, "joint", LAMBDA, 0, settings, weights=True)
    dataset = common.DATASETS[block["dataset"]]
    data = common.synthetic(dataset.classes, dataset.shape, int(batches * settings["batch"]), test)
    return Case(experiment, run, data.to(device))


def seconds_per(work, device, n):
    """The mean time of n calls of `work`, with what they do on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(n):
        work()
    wait()
    return (time.perf_counter() - began) / n


# --- Ways: each is a function of n that takes n steps and returns the seconds of one -------------


def ours(case):
    ensemble, optimizer, scores, batches = case.ready()
    step, rows = common.stepper(case.run, ensemble, optimizer, scores, batches), batches.epoch()[0]
    return functools.partial(seconds_per, lambda: step(rows), CPU)


class Images(loading.Dataset):
    """Images as torchvision.datasets gives them: a PIL image through transforms."""

    def __init__(self, data, augment):
        self.images, self.labels = data.train_images.movedim(1, 3).squeeze(3).numpy(), data.train_labels.tolist()
        transforms = torchvision.transforms
        moves = [transforms.RandomCrop(data.shape[1], 4), transforms.RandomHorizontalFlip()] if augment else []
        normalise = transforms.Normalize(data.mean.flatten().tolist(), data.std.flatten().tolist())
        self.transform = transforms.Compose([*moves, transforms.ToTensor(), normalise])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def textbook(case):
    networks, s = case.stock(), case.run.settings
    sgd, images = case.sgd(networks), Images(case.data, s["augment"])
    loader = loading.DataLoader(images, s["batch"], shuffle=True, num_workers=2, persistent_workers=True)

    def steps():
        while True:
            for images, targets in loader:
                outputs = [network(images) for network in networks]
                ensemble_loss = F.cross_entropy(sum(outputs) / len(outputs), targets)
                member_loss = sum(F.cross_entropy(output, targets) for output in outputs) / len(outputs)
                loss = LAMBDA * ensemble_loss + (1 - LAMBDA) * member_loss
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                loss.item()         # which a progress bar would show
                yield
    return functools.partial(seconds_per, steps().__next__, CPU)


class Vmapped(nn.Module):
    """The members by torch.func, as its documentation does it: (N, C, H, W) -> (N, M, K)."""

    def __init__(self, networks, bf16):
        super().__init__()
        weights, self.statistics = stack_module_state(networks)         # batch norm's are changed in place
        self.names, self.weights = list(weights), nn.ParameterList(w.detach() for w in weights.values())
        self.base, self.bf16 = [networks[0]], bf16                      # (a list: no submodule)

    def forward(self, images):
        def one(weights, statistics):
            return functional_call(self.base[0], (weights, statistics), (images,))

        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = vmap(one)(dict(zip(self.names, self.weights, strict=True)), self.statistics)
        return logits.transpose(0, 1).float()


def vmapped(case):
    s = case.run.settings
    images, labels = case.data.normalise(case.data.train_images[:s["batch"]]), case.data.train_labels[:s["batch"]]
    ready = types.SimpleNamespace(labels=labels, take=lambda rows: (images, labels, None))  # in place of common.Batches
    network, scores = Vmapped(case.stock(), s["precision"] == "bf16"), common.Scores(s["members"], CPU)
    step = common.stepper(case.run, network, case.sgd([network], fused=True), scores, ready)
    return functools.partial(seconds_per, lambda: step(None), CPU)


# --- The floor -----------------------------------------------------------------------------------


def machine_rates(device):
    """FLOP/s of a large product in fp32 and bf16, and bytes/s of a large copy."""
    size = 8192 if device.type == "cuda" else 1024
    a, block = torch.rand(size, size, device=device), torch.rand(size // 64 * 2**20, device=device)
    b, target = a.bfloat16(), torch.empty_like(block)
    of_product, of_copy = 2 * size**3, 2 * 4 * len(block)
    rates = {}
    for name, amount, work in (("fp32", of_product, lambda: a @ a), ("bf16", of_product, lambda: b @ b),
                               ("copy", of_copy, lambda: target.copy_(block))):
        work()
        rates[name] = amount / seconds_per(work, device, 3)
    return rates


def least_seconds(case):
    """A function of a machine's rates: seconds of the least that a step must do."""
    s, form, precision = case.run.settings, (case.data.shape, case.data.classes), case.run.settings["precision"]
    ensemble, kept = finished.untrained_on_meta(case.experiment.build, s, *form), {}

    def keep(tensor):
        return kept.setdefault(tensor.untyped_storage()._cdata, tensor)     # held, so that no two share an address

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        ensemble(torch.empty(s["batch"], *case.data.shape, device="meta")).sum().backward()
    for weight in ensemble.parameters():
        kept.pop(weight.untyped_storage()._cdata, None)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    moved = saved if precision == "bf16" else 2 * saved         # written and read, at 2 or 4 bytes a number
    return lambda rates: max(counter.get_total_flops() / rates[precision], moved / rates["copy"])


def floor(case):
    least = least_seconds(case)
    return lambda n: least(machine_rates(CPU))


# --- steps ---------------------------------------------------------------------------------------


WAYS = {"ours": ours, "textbook": textbook, "vmap": vmapped, "floor": floor}


def ways_of(name, preset):
    """{(way, precision): function}; in bf16, too, where the CPU multiplies in it."""
    fast_bf16, ways = EXPERIMENT_OF[name] != "mlp_fmnist" and study.bf16_is_fast(CPU), {}
    for precision in ("fp32", "bf16") if fast_bf16 else ("fp32",):
        case = new_case(name, preset, batches=40, precision=precision)
        ways |= {(kind, precision): make(case) for kind, make in WAYS.items()
                 if (kind, precision) != ("textbook", "bf16")}
    return ways


def measure(name, preset, seconds):
    """A row for each way: the median over 3 to 15 rounds, which begin within `seconds`, of STEPS in turn."""
    ways, times, began = ways_of(name, preset), collections.defaultdict(list), time.perf_counter()
    for rounds in range(1, 16):
        for way, work in ways.items():
            ctypes.CDLL(None).malloc_trim(0)            # what DN-Low's ways free adds up to 24 GB otherwise
            times[way].append(work(STEPS[EXPERIMENT_OF[name]]))
        print(f"{name}, round {rounds}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if rounds >= 3 and time.perf_counter() - began > seconds:
            break
    medians = {way: statistics.median(own) for way, own in times.items()}
    return [{"configuration": name, "way": kind, "precision": precision, "rounds": rounds, "step_ms": 1000 * median,
             "times_ours": median / medians["ours", precision]} for (kind, precision), median in medians.items()]


def steps(args):
    names = [plan.checked_name(name, EXPERIMENT_OF, "configuration")
             for name in args.only or ("256x4H", "ConvNet-0.29M", "DN-Low")]
    study.choose_device("cpu")
    rows, about = [row for name in names for row in measure(name, args.preset, args.seconds)], study.machine(CPU)
    print(f"{about['device']}, torch {about['torch']}, one thread; medians\n")
    print("| network | way | precision | step (ms) | step / ours |\n|---|---|---|---|---|")
    for row in rows:
        print("| {configuration} | {way} | {precision} | {step_ms:,.1f} | {times_ours:.2f} |".format(**row))
    return [row | about for row in rows]


# --- spread, densenet: the same runs of several experiments --------------------------------------


def train_variants(args, variants, **selection):
    """Trains the first trial of a selection with each of `variants`, {name: Experiment}, in results/WHAT/NAME.

    Yields (name, record, history) of each run there that is finished.
    """
    flags = command.training_parser("").parse_args(["--device", "cpu", "--trials", "1"])
    vars(flags).update(preset=args.preset, data_dir=args.data_dir, jobs=args.jobs or torch.get_num_threads(),
                       **selection)
    for name, experiment in variants.items():
        print(f"{name} ...", flush=True)
        flags.results = args.results / args.what / name
        command.train_study(experiment, flags)
        for folder in folders.run_folders(flags.results / args.preset, "*/*/*"):
            yield name, folders.read_run(folder), folders.load_history(folder)


def nudged(which, *form):
    """The MLPs of train_mlp_fmnist with one weight of the first layer, by its number, made the next larger float."""
    ensemble = train_mlp_fmnist.build(*form)
    weights = ensemble.hidden_weight.data.view(-1)
    weights[which] = torch.nextafter(weights[which], weights.new_tensor(torch.inf))
    return ensemble


def spread(args):
    rows, errors = [], collections.defaultdict(list)
    variants = {f"bit{which}": plan.Experiment("mlp_fmnist", functools.partial(nudged, which)) for which in range(5)}
    for name, record, _ in train_variants(args, variants, only=args.only or ["1x1024H"], lambdas=args.lambdas or [1]):
        error = 100 * record["result"].get("test_ensemble_error", math.nan)         # nan: it diverged
        errors[record["configuration"], record["lambda"]].append(error)
        rows.append({"configuration": record["configuration"], "lambda": record["lambda"],
                     "bit": name.removeprefix("bit"), "test_error_percent": error, "epoch": record["result"]["epoch"],
                     "seconds": record["seconds"], "finished": record["finished"], **record["machine"]})
    for (name, lam), some in errors.items():
        print(f"{name}, lambda {lam:g}: test errors {', '.join(f'{error:.2f}' for error in some)} %: "
              f"standard deviation {torch.tensor(some).std():.2f} points")
    return rows


def torchvisions(settings, shape, classes, generator):
    """An ensemble of one of torchvision's DenseNets, with the initial weights that the package draws.

    Theirs is for larger images: a plain convolution replaces its stem.
    """
    start = train_densenet_cifar.build(settings, shape, classes, generator)

    def make():
        growth, layers = settings["growth"], (settings["depth"] - 4) // 6
        network = torchvision.models.DenseNet(growth, 3 * (layers,), num_init_features=2 * growth, num_classes=classes)
        network.features.conv0 = nn.Conv2d(shape[0], 2 * growth, 3, padding=1, bias=False)
        for name in ("norm0", "relu0", "pool0"):
            delattr(network.features, name)
        for p, q in zip(start.parameters(), network.parameters(), strict=True):         # in the same order
            q.data = p.detach().clone()
        return network
    return common.Ensemble(make, 1, generator, settings["precision"])


def densenet(args):
    variants, rows = {"package": train_densenet_cifar.EXPERIMENT,
                      "torchvision": plan.Experiment("densenet_cifar", torchvisions)}, []
    parts = ("train_ensemble_loss", "train_ensemble_error", "test_ensemble_loss", "test_ensemble_error")
    for name, record, history in train_variants(args, variants, only=["DN-High"], lambdas=[1], set=[
            "members=1", "epochs=1", "decay=[]"]):      # at the rate of the first 150: no fall within one epoch
        rows.append({"network": name, "epoch": 1, **{key: history[key][0] for key in parts},
                     "seconds": record["seconds"], "finished": record["finished"], **record["machine"]})
        print("{}: training loss {:.4f}, training error {:.2%}, test loss {:.4f}, test error {:.2%}".format(
            name, *(rows[-1][key] for key in parts)))
    return rows


# --- main ----------------------------------------------------------------------------------------


def main():
    parts = {"steps": steps, "spread": spread, "densenet": densenet}
    p, several = command.Parser(__doc__), {"nargs": "+", "action": "extend"}
    p.add_argument("what", choices=parts)
    p.add_argument("--only", **several, metavar="NAME", help="steps, spread: these configurations")
    p.add_argument("--lambdas", **several, metavar="L", type=float, help="spread: these lambdas (default: 1)")
    p.add_argument("--preset", default="paper", help="a block of presets.yaml (default: paper)")
    p.add_argument("--seconds", type=float, default=60, metavar="N", help="steps: for each of them (default: 60)")
    p.add_argument("--data-dir", metavar="DIR", help="spread, densenet: a folder with the real data")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    p.add_argument("--jobs", type=int, metavar="N", help="spread, densenet: runs at once (default: one per core)")
    args = p.parse_args()
    path, rows = args.results / f"{args.what}.csv", parts[args.what](args)
    path.parent.mkdir(parents=True, exist_ok=True)
    finished.write_csv(path, rows)
    print(path)


if __name__ == "__main__":
    command.command_line(main)
