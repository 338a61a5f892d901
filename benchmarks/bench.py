"""What a training step costs: this package's way, beside the other ways to train such ensembles.

    pip install -r benchmarks/requirements.txt      # TorchEnsemble, which is one of them
    python benchmarks/bench.py                      # under ten minutes on two cores
    python benchmarks/bench.py --all                # all twelve networks
    python benchmarks/bench.py --check              # exit status 1 if a ratio falls short

At the batch size of the paper:

- ours, in each precision, gathering of the batch and augmentation included;

- textbook: a DataLoader with two workers and torchvision's transforms, the stock networks in a
  list, one loss each, `.item()` at every step, fp32, as someone would write it;
- one network: all members in one, by grouped convolutions (channels last and plain, fp32 and bf16,
  the best of them) or batched products on the shared input repeated M times (the MLPs);
- vmap: torch.func's stack_module_state and vmap, which batch norm does not allow;
- TorchEnsemble: its FusionClassifier (lambda 1) and VotingClassifier (lambda 0);
- floor: of the MLPs, their matrix products alone; of the others, their multiplications at the rate
  of a large product, or what autograd keeps for the backward pass, written and read once, at the
  rate of a large copy, whichever takes longer.

All but ours and the textbook are given their batch, normalised and on the device. Ways of the same
experiment are timed in turn over several rounds, so that a machine whose speed drifts hits all
alike, and medians are compared.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import make_figures
import train_convnet_cifar
import train_densenet_cifar
import train_mlp_fmnist

import torch
import torchvision
from PIL import Image
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.utils import data as loading
from torch.utils.flop_counter import FlopCounterMode

try:
    import torchensemble
except ImportError:
    torchensemble = None

MODULES = {module.EXPERIMENT.name: module
           for module in (train_mlp_fmnist, train_convnet_cifar, train_densenet_cifar)}
SHORT = ("256x4H", "ConvNet-0.29M", "DN-Low")
LAMBDA = 0.5
STEPS = {"mlp_fmnist": 30, "convnet_cifar": 2, "densenet_cifar": 1}         # timed in a row
TEST = {"mlp_fmnist": 5000, "convnet_cifar": 128, "densenet_cifar": 32}     # images evaluated
SECONDS, ROUNDS = 60, (3, 15)       # of one experiment: at least 3 rounds, at most 15

# --- What is timed -----------------------------------------------------------------------------


@dataclass
class Case:
    """One configuration of the paper, with the data of its experiment on the device."""
    experiment: common.Experiment
    name: str
    block: dict
    data: common.Data

    def run(self, precision):
        c = self.block["configurations"][self.name]
        settings = self.block | c | {"lr": common.learning_rate(c["lr"], LAMBDA), "seed": 0,
                                     "precision": precision}
        for method in ("bagging", "stacking"):
            del settings[method]
        return common.Run("bench", self.experiment.name, self.name, "joint", LAMBDA, 0, settings,
                          weights=False)

    def stock(self):
        """The members as a reader of PyTorch would write them."""
        c = self.block["configurations"][self.name]
        if self.experiment.name != "mlp_fmnist":
            ensemble = self.experiment.build(self.run("fp32").settings, self.data.shape,
                                             self.data.classes, torch.Generator())
            return [member.to(memory_format=torch.contiguous_format).to(self.data.device)
                    for member in ensemble.members]
        return [nn.Sequential(nn.Flatten(), nn.Linear(784, c["hidden"]), nn.ReLU(),
                              nn.Linear(c["hidden"], 10)).to(self.data.device)
                for _ in range(c["members"])]

    @property
    def batch(self):
        """A batch that is ready: normalised images and labels."""
        n = self.block["batch"]
        return self.data.normalise(self.data.train_images[:n]), self.data.train_labels[:n]

    def sgd(self, parameters, **options):
        s = self.run("fp32").settings
        return torch.optim.SGD(parameters, s["lr"], s["momentum"], weight_decay=s["weight_decay"],
                               **options)


@dataclass
class Way:
    """A way to train: step() takes one step, evaluate() answers for the test images."""
    case: Case
    name: str
    precision: str
    step: object              # in_a_row: takes STEPS, and returns the seconds of one
    evaluate: object = None
    in_a_row: bool = False


def ours(case, precision):
    run = case.run(precision)
    ensemble, optimizer = common.new_ensemble(case.experiment, run, case.data)
    batches = common.Batches(run, case.data, torch.arange(
        len(case.data.train_labels), device=case.data.device))
    rows, scores = batches.epoch()[0], common.Scores(run.settings["members"], case.data.device)
    test = case.data.test_images, case.data.test_labels

    step = common.stepper(run, ensemble, optimizer, scores, batches)

    def train():
        ensemble.train()
        step(rows)
    return Way(case, "ours", precision, train, lambda: common.evaluate(ensemble, case.data, *test))


class Images(loading.Dataset):
    """Images as torchvision.datasets gives them: a PIL image through transforms."""

    def __init__(self, data, augment, part):
        channels, size, _ = data.shape
        self.images = getattr(data, f"{part}_images").cpu().movedim(1, 3).numpy()
        self.labels = getattr(data, f"{part}_labels").tolist()
        self.mode = "L" if channels == 1 else "RGB"
        transforms = torchvision.transforms
        moves = [transforms.RandomCrop(size, 4), transforms.RandomHorizontalFlip()]
        self.transform = transforms.Compose([
            *(moves if augment else []), transforms.ToTensor(),
            transforms.Normalize(data.mean.flatten().tolist(), data.std.flatten().tolist())])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        pixels = self.images[i][..., 0] if self.mode == "L" else self.images[i]
        return self.transform(Image.fromarray(pixels)), self.labels[i]


def textbook(case):
    networks, device = case.stock(), case.data.device
    sgd = case.sgd([p for network in networks for p in network.parameters()])
    workers = {"batch_size": case.block["batch"], "num_workers": 2, "persistent_workers": True}
    training = loading.DataLoader(Images(case.data, case.block["augment"], "train"), shuffle=True,
                                  drop_last=True, **workers)
    test = loading.DataLoader(Images(case.data, False, "test"), **workers)

    def steps():
        total = 0.0
        while True:
            for images, targets in training:
                images, targets = images.to(device), targets.to(device)
                for network in networks:
                    network.train()
                outputs = [network(images) for network in networks]
                mean = torch.stack(outputs).mean(0)
                loss = LAMBDA * F.cross_entropy(mean, targets) + (1 - LAMBDA) * sum(
                    F.cross_entropy(output, targets) for output in outputs) / len(outputs)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                total += loss.item()
                yield

    def evaluate():
        wrong = 0
        for images, targets in test:
            with torch.no_grad():
                logits = sum(network.eval()(images.to(device)) for network in networks)
            wrong += (logits.argmax(1).cpu() != targets).sum().item()
    return Way(case, "textbook", "fp32", steps().__next__, evaluate)


def with_our_step(case, name, precision, network):
    """The way of a network (N, C, H, W) -> (N, M, K) in our training step, its batch given."""
    images, targets = case.batch
    optimizer = case.sgd(network.parameters(), fused=True)
    scores = common.Scores(case.block["configurations"][case.name]["members"], case.data.device)
    test = case.data.normalise(case.data.test_images)

    def step():
        network.train()
        common.training_step(network, optimizer, scores, LAMBDA, images, targets)

    def evaluate():
        network.eval()
        with torch.no_grad():
            for part in test.split(case.block["batch"]):
                network(part)
    return Way(case, name, precision, step, evaluate)


class BatchedMLPs(nn.Module):
    """The MLPs as one batched product a layer, on the images repeated for every member."""

    def __init__(self, networks):
        super().__init__()
        for name, i in (("hidden", 1), ("output", 3)):
            for kind in ("weight", "bias"):
                values = torch.stack([getattr(network[i], kind) for network in networks])
                self.register_parameter(f"{name}_{kind}", nn.Parameter(values.detach()))

    def forward(self, images):
        x = images.flatten(1).expand(len(self.hidden_bias), -1, -1)                 # (M, N, D)
        h = torch.baddbmm(self.hidden_bias[:, None], x, self.hidden_weight.mT).relu()
        return torch.baddbmm(self.output_bias[:, None], h, self.output_weight.mT).transpose(0, 1)


class InOne(nn.Module):
    """M equal convolutional networks as one: (N, C, H, W) -> (N, M, K).

    Feature maps of all members stand side by side, (N, M*C, H, W). The first convolution needs no
    groups, since the images are shared.
    """

    def __init__(self, networks, bf16, memory_format):
        super().__init__()
        self.count, self.bf16, self.memory_format = len(networks), bf16, memory_format
        self.layers = self.joined(networks, first=True).to(memory_format=memory_format)

    def joined(self, parts, first=False):
        """One module for equal modules, one of each member."""
        one = parts[0]

        def together(kind):
            return torch.cat([getattr(part, kind).detach() for part in parts])
        if isinstance(one, nn.Sequential):
            return nn.Sequential(*(self.joined(each, first and i == 0)
                                   for i, each in enumerate(zip(*parts, strict=True))))
        if isinstance(one, train_densenet_cifar.Bottleneck):
            return Concatenating(self.joined([part.layers for part in parts]), self.count,
                                 self.memory_format)
        if isinstance(one, nn.Conv2d):
            layer = nn.Conv2d(one.in_channels * (1 if first else self.count),
                              one.out_channels * self.count, one.kernel_size, one.stride,
                              one.padding, groups=1 if first else self.count,
                              bias=one.bias is not None)
        elif isinstance(one, nn.BatchNorm2d):
            layer = nn.BatchNorm2d(one.num_features * self.count)
        elif isinstance(one, nn.Linear):
            return Heads(parts)
        else:
            return one
        layer.weight.data = together("weight")
        if layer.bias is not None:
            layer.bias.data = together("bias")
        return layer

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.layers(images.contiguous(memory_format=self.memory_format))
        return logits.float()


class Concatenating(nn.Module):
    """A bottleneck of all members: each one's new feature maps go behind its own."""

    def __init__(self, layers, count, memory_format):
        super().__init__()
        self.layers, self.count = layers, count
        self.last = memory_format == torch.channels_last

    def forward(self, x):
        parts = x, self.layers(x)
        if not self.last:
            return torch.cat([part.unflatten(1, (self.count, -1)) for part in parts],
                             2).flatten(1, 2)
        parts = [part.permute(0, 2, 3, 1).unflatten(3, (self.count, -1)) for part in parts]
        return torch.cat(parts, 4).flatten(3, 4).permute(0, 3, 1, 2)


class Heads(nn.Module):
    """The linear layers of all members: (N, M*C) -> (N, M, K)."""

    def __init__(self, layers):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([one.weight.detach() for one in layers]))
        self.bias = nn.Parameter(torch.stack([one.bias.detach() for one in layers]))

    def forward(self, x):
        x = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)                  # (M, N, C)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT).transpose(0, 1)


def one_network(case, precisions):
    """The ways of one network: of the convolutional ones the faster memory format."""
    if case.experiment.name == "mlp_fmnist":
        return [with_our_step(case, "one network", "fp32", BatchedMLPs(case.stock()))]
    fastest = []
    for precision in precisions:
        tried = []
        for name, layout in (("channels last", torch.channels_last),
                             ("plain", torch.contiguous_format)):
            networks = case.stock()
            network = InOne(networks, precision == "bf16", layout).to(case.data.device)
            images, _ = case.batch
            images = images[:len(images) // 4]
            with torch.no_grad():       # it is what it says
                expected = torch.stack([one.eval()(images) for one in networks], 1)
                torch.testing.assert_close(network.eval()(images), expected, rtol=0, atol=(
                    1e-3 if precision == "fp32" else 0.1) * expected.abs().max().item())
            way = with_our_step(case, f"one network, {name}", precision, network)

            def probe(network=network, images=images):
                network.train()(images).sum().backward()
            probe()
            tried.append((common.seconds_per(probe, 1, case.data.device), way))
        fastest.append(min(tried, key=lambda pair: pair[0])[1])
    return fastest


class Vmapped(nn.Module):
    """The members by torch.func, as its documentation has it: (N, C, H, W) -> (N, M, K)."""

    def __init__(self, networks, bf16):
        super().__init__()
        weights, _ = stack_module_state(networks)
        self.names = list(weights)
        self.weights = nn.ParameterList(w.detach() for w in weights.values())
        self.base, self.bf16 = [networks[0]], bf16              # (a list: no submodule)

    def forward(self, images):
        def one(weights):
            return functional_call(self.base[0], weights, (images,))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = vmap(one)(dict(zip(self.names, self.weights, strict=True)))
        return logits.transpose(0, 1).float()


def vmapped(case, precisions):
    if case.experiment.name == "densenet_cifar":
        return []
    return [with_our_step(case, "vmap", precision, Vmapped(case.stock(), precision == "bf16"))
            for precision in precisions]


class Stopwatch:
    """A loader of the same batch that measures how long its user takes for `steps` of them."""

    def __init__(self, batch, classes, steps):
        self.batch, self.steps, self.seconds = batch, steps, 0.0
        self.dataset = argparse.Namespace(classes=range(classes))

    def __iter__(self):
        for i in range(-(self.steps > 1), self.steps):          # one goes before: see `timed`
            began = time.perf_counter()
            yield self.batch
            if self.batch[0].is_cuda:
                torch.cuda.synchronize()
            self.seconds += (i >= 0) * (time.perf_counter() - began)


def torch_ensemble(case, kind):
    s = case.run("fp32").settings
    steps = STEPS[case.experiment.name]

    def step():         # of a new ensemble, whose making is not in the time
        model = getattr(torchensemble, f"{kind}Classifier")(
            estimator=case.stock()[0], n_estimators=s["members"],
            cuda=case.data.device.type == "cuda")
        model.set_optimizer("SGD", lr=s["lr"], momentum=s["momentum"],
                            weight_decay=s["weight_decay"])
        watch = Stopwatch(case.batch, case.data.classes, steps)
        with contextlib.redirect_stdout(io.StringIO()):
            model.fit(watch, epochs=1, log_interval=10**6, save_model=False)
        return watch.seconds / steps
    return Way(case, f"TorchEnsemble, {kind}", "fp32", step, in_a_row=True)


def floors(case, precisions, rates):
    """{precision: function that returns seconds} of what no way can do without."""
    if case.experiment.name == "mlp_fmnist":
        return {"fp32": lambda: common.seconds_per(products(case), 1, case.data.device)}
    s = case.run("fp32").settings
    with torch.device("meta"):
        ensemble = case.experiment.build(s, case.data.shape, case.data.classes,
                                         torch.Generator("cpu"))
    images = torch.empty(s["batch"], *case.data.shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        ensemble(images).sum().backward()
    found = {}
    for precision in precisions:
        ensemble.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        moved = 2 * make_figures.bytes_saved_for_backward(ensemble, s["batch"])
        found[precision] = lambda p=precision, moved=moved: max(
            counter.get_total_flops() / rates[p](), moved / rates["copy"]())
    return found


def products(case):
    """The matrix products of one step of an MLP ensemble: two forward, three backward."""
    c, device, n = case.block["configurations"][case.name], case.data.device, case.block["batch"]
    members, hidden = c["members"], c["hidden"]
    x = torch.rand(784, n, device=device)
    first, h = torch.rand(members * hidden, 784, device=device), torch.rand(
        members, hidden, n, device=device)
    second, logits = torch.rand(members, 10, hidden, device=device), torch.rand(
        members, 10, n, device=device)

    def work():
        torch.mm(first, x)
        torch.bmm(second, h)
        torch.bmm(logits, h.mT)
        torch.bmm(second.mT, logits)
        torch.mm(h.flatten(0, 1), x.T)
    return work


def machine_rates(device):
    """Functions that measure FLOP/s of a large product (fp32, bf16) and bytes/s of a copy."""
    a = torch.rand(2048, 2048, device=device)
    b, block = a.bfloat16(), torch.rand(32 * 2**20, device=device)
    target = torch.empty_like(block)
    return {"fp32": lambda: 2 * 2048**3 / common.seconds_per(lambda: a @ a, 3, device),
            "bf16": lambda: 2 * 2048**3 / common.seconds_per(lambda: b @ b, 3, device),
            "copy": lambda: 2 * 4 * len(block) / common.seconds_per(
                lambda: target.copy_(block), 3, device)}


# --- Timing ------------------------------------------------------------------------------------

def resident(key):
    """A figure of /proc/self/status in bytes, or None on systems that have no such file."""
    if not Path("/proc/self/status").is_file():
        return None
    line = next(line for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith(key))
    return 1024 * int(line.split()[1])


def give_back(device):
    """Gives freed memory back to the system, where the C library can (glibc)."""
    gc.collect()
    if device.type == "cpu" and sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def memory_of(work, device):
    """Bytes that `work` needs beyond what is there before, at its peak; nan if that is unknown."""
    give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if resident("VmRSS") is None:
        work()
        return math.nan
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")       # the peak starts from here
    work()
    return resident("VmHWM") - before


def timed(way):
    """Seconds of a step, the mean over STEPS in a row.

    Where a step is short, one goes before, for the memory that the way before it has left.
    """
    if way.in_a_row:
        return way.step()
    steps = STEPS[way.case.experiment.name]
    if steps > 1:
        way.step()
    return common.seconds_per(way.step, steps, way.case.data.device)


def measure(ways, floor, device):
    """Rows, one a way, of medians over rounds in which all ways take their turn.

    floor is {(configuration, precision): function that returns seconds}.
    """
    rows = [{"configuration": way.case.name, "way": way.name, "precision": way.precision,
             "peak_MB": memory_of(way.step, device) / 1e6} for way in ways]     # warms up as well
    steps, evaluations = [[] for _ in ways], [[] for _ in ways]
    lowest, began = {key: [] for key in floor}, time.perf_counter()
    while len(steps[0]) < ROUNDS[0] or (len(steps[0]) < ROUNDS[1]
                                        and time.perf_counter() - began < SECONDS):
        for i, way in enumerate(ways):
            if STEPS[way.case.experiment.name] == 1:    # what it frees adds up to 24 GB otherwise
                give_back(device)
            steps[i].append(timed(way))
            if way.evaluate:
                evaluations[i].append(common.seconds_per(way.evaluate, 1, device))
        for key, seconds in floor.items():
            lowest[key].append(seconds())
        print(f"  round {len(steps[0])} of {ROUNDS[0]} to {ROUNDS[1]}, "
              f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    for row, way, step, evaluation in zip(rows, ways, steps, evaluations, strict=True):
        seconds = statistics.median(step)
        key = row["configuration"], row["precision"]
        least = statistics.median(lowest[key]) if key in lowest else math.nan
        row |= {"rounds": len(step), "step_ms": 1000 * seconds,
                "examples_per_s": way.case.block["batch"] / seconds,
                "evaluation_of_1000_ms": (1e6 * statistics.median(evaluation) / len(
                    way.case.data.test_labels) if evaluation else math.nan),
                "floor_ms": 1000 * least, "times_floor": seconds / least}
    for row in rows:
        row["times_ours"] = row["step_ms"] / next(
            r["step_ms"] for r in rows if r["way"] == "ours"
            and (r["configuration"], r["precision"]) == (row["configuration"], row["precision"]))
    return rows


def bench(name, configurations, device):
    """The rows of one experiment's configurations."""
    experiment = MODULES[name].EXPERIMENT
    block = common.experiment_settings(common.load_preset("paper"), "paper", experiment)
    block |= {"test": TEST[name]}
    dataset = block["dataset"]
    on_disk = common.find_data(dataset, "auto", download=False)
    data = common.load_data(dataset, "real" if on_disk else "synthetic", block).to(device)
    precisions = ["fp32"]
    if name != "mlp_fmnist" and common.bf16_is_fast(device):
        precisions.append("bf16")
    rates, ways, floor = machine_rates(device), [], {}
    for configuration in configurations:
        print(f"{configuration} ...", file=sys.stderr, flush=True)
        case = Case(experiment, configuration, block, data)
        ways += [ours(case, precision) for precision in precisions]
        ways += [textbook(case), *one_network(case, precisions), *vmapped(case, precisions)]
        if torchensemble:
            ways += [torch_ensemble(case, kind) for kind in ("Fusion", "Voting")]
        floor |= {(configuration, p): f for p, f in floors(case, precisions, rates).items()}
    if name == "mlp_fmnist":            # what an epoch of the others costs is a claim of its own
        for other in block["configurations"]:
            if other not in configurations:
                case = Case(experiment, other, block, data)
                ways.append(ours(case, "fp32"))
                floor |= {(other, p): f for p, f in floors(case, precisions, rates).items()}
    rows = measure(ways, floor, device)
    for row in rows:                    # an epoch by the paper's protocol, real data or not
        steps = math.ceil((len(data.train_labels) - block["validation"]) / block["batch"])
        held_out = (block["validation"] or 10_000) / 1000 * row["evaluation_of_1000_ms"]
        row |= {"epoch_s": (steps * row["step_ms"] + held_out) / 1000, "data": data.description[
            "name"], "evaluation_share": held_out / (steps * row["step_ms"] + held_out)}
    return rows


# --- What it must reach ------------------------------------------------------------------------

def checks(rows):
    """(what, ratio, "at most" or "at least", bound) of what is asked of ours on two cores."""
    def pick(configuration, way, key="step_ms"):
        """The best of a way's precisions and formats."""
        return min((row[key] for row in rows if row["configuration"] == configuration
                    and row["way"].startswith(way)), default=None)

    single = pick("1x1024H", "ours", "epoch_s")
    for name, bound in (("256x4H", 1.5), ("64x16H", 1.25), ("16x64H", 1.1)):
        if single:
            yield (f"an epoch of {name} / an epoch of 1x1024H", pick(name, "ours", "epoch_s")
                   / single, "at most", bound)
    for name in ("1x1024H", "16x64H", "64x16H", "256x4H"):
        if single:
            yield (f"a step of {name} / its matrix products", pick(name, "ours", "times_floor"),
                   "at most", 2.5 if name == "256x4H" else 2)
    if textbook_epoch := pick("256x4H", "textbook", "epoch_s"):
        yield ("256x4H: an epoch of the textbook way / ours", textbook_epoch
               / pick("256x4H", "ours", "epoch_s"), "at least", 15)
    for configuration in dict.fromkeys(row["configuration"] for row in rows):
        convolutional = configuration in ("ConvNet-0.29M", "DN-Low")
        for way, bound in (("textbook", 3), ("one network", 1.4), ("vmap", 1),
                           ("TorchEnsemble, Fusion", 1), ("TorchEnsemble, Voting", 1)):
            theirs = pick(configuration, way)
            if theirs and (convolutional or bound == 1):
                yield (f"{configuration}: a step of {way} / ours", theirs
                       / pick(configuration, "ours"), "at least", bound)


# --- main --------------------------------------------------------------------------------------

def number(value, digits):
    return "" if math.isnan(value) else f"{value:,.{digits}f}"


def main():
    p = common.Parser(__doc__)
    p.add_argument("--all", action="store_true", help="all twelve networks")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these networks")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers here as well")
    p.add_argument("--device", default="auto", help="auto (the default), cpu or cuda")
    p.add_argument("--check", action="store_true", help="exit with status 1 if a ratio falls short")
    args = p.parse_args()
    device = common.choose_device(args.device)
    preset = common.load_preset("paper")
    known = {name: key for key in MODULES for name in preset[key]["configurations"]
             if name != "10xConvNet-0.29M"}             # 0.29M, but with fewer members
    names = args.only or (list(known) if args.all else SHORT)
    for name in names:
        common.nearest(name, known, "configuration")
    if args.check and torchensemble is None:
        raise common.Refused("--check compares with TorchEnsemble, which is not installed: "
                             "pip install -r benchmarks/requirements.txt")
    where, rows = common.machine(device), []
    for key in MODULES:
        if chosen := [name for name in names if known[name] == key]:
            rows += bench(key, chosen, device)
    print(f"{where['device']}, {device.type}, {where['threads']} threads, torch {where['torch']}; "
          "medians\n")
    print("| network | way | precision | / ours | / floor | step (ms) | examples/s | evaluation of "
          "1,000 (ms) | peak (MB) |\n" + "|---" * 9 + "|")
    for row in rows:
        figures = [(row["times_ours"], 2), (row["times_floor"], 2), (row["step_ms"], 1), (
            row["examples_per_s"], 0), (row["evaluation_of_1000_ms"], 1), (row["peak_MB"], 0)]
        print(f"| {row['configuration']} | {row['way']} | {row['precision']} | "
              + " | ".join(number(*figure) for figure in figures) + " |")
    print()
    for row in rows:
        if row["way"] == "ours":
            print(f"{row['configuration']} {row['precision']}: an epoch takes {row['epoch_s']:.1f} "
                  f"s, {100 * row['evaluation_share']:.0f} % of it evaluation")
    if torchensemble is None:
        print("TorchEnsemble is not installed: pip install -r benchmarks/requirements.txt")
    if args.csv:
        make_figures.write_csv(args.csv, [{**row, **where} for row in rows])
    print("\n| what | is | asked |\n|---|---|---|")
    short = False
    for what, ratio, relation, bound in checks(rows):
        met = ratio <= bound if relation == "at most" else ratio >= bound
        short |= not met
        print(f"| {what} | {ratio:.2f} | {relation} {bound}{'' if met else ': NOT MET'} |")
    if args.check and short:
        sys.exit(1)


if __name__ == "__main__":
    common.command_line(main)
