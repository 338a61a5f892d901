"""What a training step costs: this package's way, beside the other ways to train such ensembles.

    pip install -r benchmarks/requirements.txt      # TorchEnsemble, which is one of them
    python benchmarks/bench.py                      # three networks, one of each experiment
    python benchmarks/bench.py --all                # all twelve networks
    python benchmarks/bench.py --check              # exit status 1 if a ratio falls short

Every way computes on one thread, since a run of this package has one. The textbook way has two more processes, which
load its images. Each way takes batches of the paper's size:

- ours: in each precision; it gathers and augments its batch as well;
- textbook: a DataLoader with two workers and torchvision's transforms, the stock networks in a list, one loss each,
  `.item()` at every step, fp32, as someone would write it;
- one network: all members in one, by grouped convolutions (channels last and plain, fp32 and bf16, the best of them)
  or batched products on the shared input repeated M times (the MLPs);
- vmap: torch.func's stack_module_state and vmap;
- TorchEnsemble: its FusionClassifier (lambda 1) and VotingClassifier (lambda 0);
- floor: the least that any way must do. For the MLPs that is their matrix products. For the others it is their
  multiplications at the rate of a large product, or what autograd keeps for the backward pass, written and read once,
  at the rate of a large copy, whichever takes longer.

On CUDA a step of ours is a replayed graph. So the ways that take a given batch are timed both launched from Python, as
someone would run them, and captured in the same way.

Ours and the textbook way make their own batch. The others get it normalised and on the device. The ways of one
experiment take turns over several rounds, so that a machine whose speed drifts slows all alike. The table has medians.
"""

import contextlib
import csv
import ctypes
import gc
import io
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
import fast
import folders
import presets
import train_densenet_cifar

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

SHORT = ("256x4H", "ConvNet-0.29M", "DN-Low")
LAMBDA = 0.5
STEPS = {"mlp_fmnist": 30, "convnet_cifar": 2, "densenet_cifar": 1}         # timed in a row
EXPERIMENTS = {name: study.experiment_of(name) for name in STEPS}
TEST = {"mlp_fmnist": 5000, "convnet_cifar": 128, "densenet_cifar": 32}     # images evaluated
SECONDS, ROUNDS = 60, (3, 15)       # of one experiment: at least 3 rounds, at most 15


def seconds_per(work, n, device):
    """The mean time of n calls of `work`, with what they do on the device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    for _ in range(n):
        work()
    wait()
    return (time.perf_counter() - began) / n


# --- What is timed -------------------------------------------------------------------------------


@dataclass
class Case:
    """One configuration of the paper, with the data of its experiment on the device."""
    experiment: study.Experiment
    name: str
    block: dict
    data: common.Data

    def settings(self, precision="fp32"):
        c = self.block["configurations"][self.name]
        return self.block | c | {"lr": study.learning_rate(c["lr"], LAMBDA), "seed": 0, "precision": precision,
                                 "bagging": None}

    def stock(self):
        """The members as a reader of PyTorch would write them."""
        s, data = self.settings(), self.data
        if self.experiment.name != "mlp_fmnist":
            ensemble = self.experiment.build(s, data.shape, data.classes, torch.Generator())
            return [member.to(memory_format=torch.contiguous_format).to(data.device) for member in ensemble.members]
        return [nn.Sequential(nn.Flatten(), nn.Linear(784, s["hidden"]), nn.ReLU(), nn.Linear(s["hidden"], 10)).to(
            data.device) for _ in range(s["members"])]

    @property
    def batch(self):
        """A batch that is ready: normalised images and labels."""
        n = self.block["batch"]
        return self.data.normalise(self.data.train_images[:n]), self.data.train_labels[:n]

    def sgd(self, parameters, **options):
        s = self.settings()
        return torch.optim.SGD(parameters, s["lr"], s["momentum"], weight_decay=s["weight_decay"], **options)


@dataclass
class Way:
    """A way to train: step() takes one step, evaluate() answers for the test images."""
    case: Case
    name: str
    precision: str
    step: object
    evaluate: object = None
    eager: object = None      # the step without a graph, whose replay allocates nothing: for the memory
    in_a_row: bool = False    # does step() take STEPS steps, and return the seconds of one?


def ours(case, precision):
    settings, data = case.settings(precision), case.data
    run = study.Run("bench", case.experiment.name, case.name, "joint", LAMBDA, 0, settings, weights=False)
    ensemble, optimizer = common.new_ensemble(case.experiment.build, run, data)
    batches = common.Batches(run, data, torch.arange(len(data.train_labels), device=data.device))
    rows, scores = batches.epoch()[0], common.Scores(settings["members"], data.device)
    eager = common.stepper(run, ensemble, optimizer, scores, batches, eager=True)
    step = common.stepper(run, ensemble, optimizer, scores, batches)

    def train(step=step):
        ensemble.train()
        step(rows)
    return Way(case, "ours", precision, train,
               lambda: common.evaluate(ensemble, data, data.test_images, data.test_labels), lambda: train(eager))


class Images(loading.Dataset):
    """Images as torchvision.datasets gives them: a PIL image through transforms."""

    def __init__(self, data, augment, part):
        self.images = getattr(data, f"{part}_images").cpu().movedim(1, 3).squeeze(3).numpy()
        self.labels = getattr(data, f"{part}_labels").tolist()
        transforms = torchvision.transforms
        moves = [transforms.RandomCrop(data.shape[1], 4), transforms.RandomHorizontalFlip()] if augment else []
        self.transform = transforms.Compose([
            *moves, transforms.ToTensor(),
            transforms.Normalize(data.mean.flatten().tolist(), data.std.flatten().tolist())])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def textbook(case):
    networks, device = case.stock(), case.data.device
    sgd = case.sgd([p for network in networks for p in network.parameters()])
    workers = {"batch_size": case.block["batch"], "num_workers": 2, "persistent_workers": True}
    training = loading.DataLoader(Images(case.data, case.block["augment"], "train"), shuffle=True, drop_last=True,
                                  **workers)
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
    """The ways of a network (N, C, H, W) -> (N, M, K): our training step takes it on a given batch; on CUDA, captured
    as well."""
    images, targets = case.batch
    optimizer = case.sgd(network.parameters(), fused=True)
    scores = common.Scores(case.settings()["members"], case.data.device)
    test = case.data.normalise(case.data.test_images)

    def step():
        network.train()
        common.training_step(network, optimizer, scores, LAMBDA, images, targets)

    def evaluate():
        network.eval()
        with torch.no_grad():
            for part in test.split(case.block["batch"]):
                network(part)
    ways = [Way(case, name, precision, step, evaluate)]
    if images.is_cuda:
        network.train()
        fast.warm_up(step)
        ways.append(Way(case, f"{name}, captured", precision, fast.record(step), evaluate, step))
    return ways


class Linears(nn.Module):
    """The linear layers of all members, as one batched product: (M, N, C), or (N, M*C), -> (M, N, K)."""

    def __init__(self, layers):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([one.weight.detach() for one in layers]))
        self.bias = nn.Parameter(torch.stack([one.bias.detach() for one in layers]))

    def forward(self, x):
        if x.dim() == 2:
            x = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT)


class BatchedMLPs(nn.Module):
    """The MLPs as one batched product a layer, on the images repeated for every member."""

    def __init__(self, networks):
        super().__init__()
        self.hidden, self.output = (Linears([network[i] for network in networks]) for i in (1, 3))

    def forward(self, images):
        x = images.flatten(1).expand(len(self.hidden.weight), -1, -1)               # (M, N, D)
        return self.output(self.hidden(x).relu()).transpose(0, 1)


class InOne(nn.Module):
    """M equal convolutional networks as one: (N, C, H, W) -> (N, M, K).

    Feature maps of all members stand side by side, (N, M*C, H, W). All members share the images, so the first
    convolution needs no groups.
    """

    def __init__(self, networks, bf16, memory_format):
        super().__init__()
        self.count, self.bf16, self.memory_format = len(networks), bf16, memory_format
        self.layers = self.joined(networks, first=True).to(memory_format=memory_format)

    def joined(self, parts, first=False):
        """One module for equal modules, one of each member."""
        one = parts[0]
        if isinstance(one, nn.Sequential):
            return nn.Sequential(*(self.joined(each, first and i == 0) for i, each in enumerate(
                zip(*parts, strict=True))))
        if isinstance(one, train_densenet_cifar.Bottleneck):
            return Concatenating(self.joined([part.layers for part in parts]), self.count, self.memory_format)
        if isinstance(one, nn.Conv2d):
            groups = 1 if first else self.count
            layer = nn.Conv2d(one.in_channels * groups, one.out_channels * self.count, one.kernel_size, one.stride,
                              one.padding, groups=groups, bias=one.bias is not None)
        elif isinstance(one, nn.BatchNorm2d):
            layer = nn.BatchNorm2d(one.num_features * self.count)
        elif isinstance(one, nn.Linear):
            return Linears(parts)
        else:
            return one
        for name, parameter in layer.named_parameters():
            parameter.data = torch.cat([getattr(part, name).detach() for part in parts])
        return layer

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.layers(images.contiguous(memory_format=self.memory_format))
        return logits.transpose(0, 1).float()


class Concatenating(nn.Module):
    """A bottleneck of all members: the new feature maps of each member go behind its own."""

    def __init__(self, layers, count, memory_format):
        super().__init__()
        self.layers, self.count = layers, count
        self.last = memory_format == torch.channels_last

    def forward(self, x):
        parts = x, self.layers(x)
        if not self.last:
            return torch.cat([part.unflatten(1, (self.count, -1)) for part in parts], 2).flatten(1, 2)
        parts = [part.permute(0, 2, 3, 1).unflatten(3, (self.count, -1)) for part in parts]
        return torch.cat(parts, 4).flatten(3, 4).permute(0, 3, 1, 2)


def one_network(case, precisions):
    """The ways of one network, in each precision; a convolutional network takes its faster memory format."""
    if case.experiment.name == "mlp_fmnist":
        return with_our_step(case, "one network", "fp32", BatchedMLPs(case.stock()))
    fastest = []
    for precision in precisions:
        tried = []
        for name, layout in (("channels last", torch.channels_last), ("plain", torch.contiguous_format)):
            networks = case.stock()
            network = InOne(networks, precision == "bf16", layout).to(case.data.device)
            images, _ = case.batch
            images = images[:len(images) // 4]
            with torch.no_grad():       # it gives the numbers of its members
                expected = torch.stack([one.eval()(images) for one in networks], 1)
                error = (1e-3 if precision == "fp32" else 0.1) * expected.abs().max().item()
                torch.testing.assert_close(network.eval()(images), expected, rtol=0, atol=error)

            def probe(network=network, images=images):
                network.train()(images).sum().backward()
            probe()
            tried.append((seconds_per(probe, 1, case.data.device), f"one network, {name}", network))
        _, name, network = min(tried, key=lambda one: one[0])
        fastest += with_our_step(case, name, precision, network)
    return fastest


class Vmapped(nn.Module):
    """The members by torch.func, as its documentation does it: (N, C, H, W) -> (N, M, K)."""

    def __init__(self, networks, bf16):
        super().__init__()
        weights, self.statistics = stack_module_state(networks)        # batch norm's are changed in place
        self.names = list(weights)
        self.weights = nn.ParameterList(w.detach() for w in weights.values())
        self.base, self.bf16 = [networks[0]], bf16              # (a list: no submodule)

    def forward(self, images):
        def one(weights, statistics):
            return functional_call(self.base[0], (weights, statistics), (images,))
        self.base[0].train(self.training)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = vmap(one)(dict(zip(self.names, self.weights, strict=True)), self.statistics)
        return logits.transpose(0, 1).float()


def vmapped(case, precisions):
    return [way for precision in precisions
            for way in with_our_step(case, "vmap", precision, Vmapped(case.stock(), precision == "bf16"))]


class Stopwatch:
    """A loader that gives the same batch `steps` times and measures how long its user takes."""

    def __init__(self, batch, classes, steps):
        self.batch, self.steps, self.seconds = batch, steps, 0.0
        self.dataset = types.SimpleNamespace(classes=range(classes))

    def __iter__(self):
        for i in range(-(self.steps > 1), self.steps):          # one goes first: see `timed`
            began = time.perf_counter()
            yield self.batch
            if self.batch[0].is_cuda:
                torch.cuda.synchronize()
            self.seconds += (i >= 0) * (time.perf_counter() - began)


def torch_ensemble(case, kind):
    s, steps = case.settings(), STEPS[case.experiment.name]

    def step():         # of a new ensemble; the time leaves out how long that takes to make
        model = getattr(torchensemble, f"{kind}Classifier")(
            estimator=case.stock()[0], n_estimators=s["members"], cuda=case.data.device.type == "cuda")
        model.set_optimizer("SGD", lr=s["lr"], momentum=s["momentum"], weight_decay=s["weight_decay"])
        watch = Stopwatch(case.batch, case.data.classes, steps)
        with contextlib.redirect_stdout(io.StringIO()):
            model.fit(watch, epochs=1, log_interval=10**6, save_model=False)
        return watch.seconds / steps
    return Way(case, f"TorchEnsemble, {kind}", "fp32", step, in_a_row=True)


def floors(case, precisions, rates):
    """{(configuration, precision): function that returns seconds} of the least that any way must do."""
    build, s, data = case.experiment.build, case.settings(), case.data
    if case.experiment.name == "mlp_fmnist":
        work = products(case)
        if data.device.type == "cuda":          # five launches from Python take longer than the products
            fast.warm_up(work)
            work = fast.record(work)
        return {(case.name, "fp32"): lambda: seconds_per(work, 10, data.device)}
    with torch.device("meta"):
        ensemble = build(s, data.shape, data.classes, torch.Generator("cpu"))
    with FlopCounterMode(display=False) as counter:
        ensemble(torch.empty(s["batch"], *data.shape, device="meta")).sum().backward()
    flops, kept = counter.get_total_flops(), study.bytes_saved_for_backward(build, s, data.shape, data.classes)
    moved = {"fp32": 2 * kept, "bf16": kept}            # written and read, at 4 or 2 bytes a number
    return {(case.name, p): lambda p=p: max(flops / rates[p](), moved[p] / rates["copy"]()) for p in precisions}


def products(case):
    """The matrix products of one step of an MLP ensemble: two forward, three backward."""
    s, device = case.settings(), case.data.device
    n, members, hidden = s["batch"], s["members"], s["hidden"]
    x, first = torch.rand(784, n, device=device), torch.rand(members * hidden, 784, device=device)
    h, second = torch.rand(members, hidden, n, device=device), torch.rand(members, 10, hidden, device=device)
    logits = torch.rand(members, 10, n, device=device)

    def work():
        torch.mm(first, x)
        torch.bmm(second, h)
        torch.bmm(logits, h.mT)
        torch.bmm(second.mT, logits)
        torch.mm(h.flatten(0, 1), x.T)
    return work


def machine_rates(device):
    """Functions that measure FLOP/s of a large product (fp32, bf16) and bytes/s of a copy."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.rand(size, size, device=device)
    b, block = a.bfloat16(), torch.rand(size // 64 * 2**20, device=device)
    target = torch.empty_like(block)
    return {"fp32": lambda: 2 * size**3 / seconds_per(lambda: a @ a, 3, device),
            "bf16": lambda: 2 * size**3 / seconds_per(lambda: b @ b, 3, device),
            "copy": lambda: 2 * 4 * len(block) / seconds_per(lambda: target.copy_(block), 3, device)}


# --- Timing --------------------------------------------------------------------------------------


def resident(key):
    """A figure of /proc/self/status in bytes, or None on systems that have no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), None)


def give_back(device):
    """Gives freed memory back to the system, where the C library can (glibc)."""
    gc.collect()
    torch.cuda.empty_cache()
    if device.type == "cpu" and sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def memory_of(work, device):
    """Bytes that `work` adds at its peak to what is there before; nan if the system does not tell."""
    give_back(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if before := resident("VmRSS"):
        Path("/proc/self/clear_refs").write_text("5")       # the peak starts from here
    work()
    return resident("VmHWM") - before if before else math.nan


def timed(way):
    """Seconds of a step: the mean over STEPS in a row."""
    if way.in_a_row:
        return way.step()
    steps = STEPS[way.case.experiment.name]
    if steps > 1:       # the way before left the memory in another state, so one short step goes first, untimed
        way.step()
    return seconds_per(way.step, steps, way.case.data.device)


def measure(ways, floor, device):
    """A row for each way: medians over rounds in which all ways take their turn. floor: as in `floors`."""
    rows = [{"configuration": way.case.name, "way": way.name, "precision": way.precision,
             "peak_MB": memory_of(way.eager or way.step, device) / 1e6} for way in ways]    # warms up as well
    steps, evaluations = [[] for _ in ways], [[] for _ in ways]
    lowest, began = {key: [] for key in floor}, time.perf_counter()
    while len(steps[0]) < ROUNDS[0] or (len(steps[0]) < ROUNDS[1] and time.perf_counter() - began < SECONDS):
        for i, way in enumerate(ways):
            if STEPS[way.case.experiment.name] == 1:    # what it frees adds up to 24 GB otherwise
                give_back(device)
            steps[i].append(timed(way))
            if way.evaluate:
                evaluations[i].append(seconds_per(way.evaluate, 1, device))
        for key, seconds in floor.items():
            lowest[key].append(seconds())
        print(f"  round {len(steps[0])} of {ROUNDS[0]} to {ROUNDS[1]}, {time.perf_counter() - began:.0f} s",
              file=sys.stderr, flush=True)
    for row, way, step, evaluation in zip(rows, ways, steps, evaluations, strict=True):
        seconds = statistics.median(step)
        key = row["configuration"], row["precision"]
        least = statistics.median(lowest[key]) if key in lowest else math.nan
        images = len(way.case.data.test_labels)
        row |= {"rounds": len(step), "step_ms": 1000 * seconds, "examples_per_s": way.case.block["batch"] / seconds,
                "evaluation_of_1000_ms": 1e6 * statistics.median(evaluation) / images if evaluation else math.nan,
                "floor_ms": 1000 * least, "times_floor": seconds / least}
    own = {(row["configuration"], row["precision"]): row["step_ms"] for row in rows if row["way"] == "ours"}
    for row in rows:
        row["times_ours"] = row["step_ms"] / own[row["configuration"], row["precision"]]
    return rows


def bench(experiment, configurations, device):
    """The rows of one experiment's configurations."""
    block = presets.experiment_settings(presets.load_preset("paper"), "paper", experiment.name)
    block |= {"test": TEST[experiment.name]}
    data = folders.load_data(block["dataset"], "auto", block, may_download=False).to(device)
    mlps = experiment.name == "mlp_fmnist"
    precisions = ["fp32", "bf16"] if not mlps and folders.bf16_is_fast(device) else ["fp32"]
    rates, ways, floor = machine_rates(device), [], {}
    others = [name for name in block["configurations"] if mlps and name not in configurations]
    for name in [*configurations, *others]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        case = Case(experiment, name, block, data)
        ways += [ours(case, precision) for precision in precisions]
        floor |= floors(case, precisions, rates)
        if name in others:              # `checks` compares the epochs of all MLPs, ours alone
            continue
        ways += [textbook(case), *one_network(case, precisions), *vmapped(case, precisions)]
        if torchensemble:
            ways += [torch_ensemble(case, kind) for kind in ("Fusion", "Voting")]
    rows = measure(ways, floor, device)
    for row in rows:                    # an epoch by the paper's protocol, real data or not
        steps = math.ceil((len(data.train_labels) - block["validation"]) / block["batch"])
        held_out = (block["validation"] or 10_000) / 1000 * row["evaluation_of_1000_ms"]
        total = steps * row["step_ms"] + held_out
        row |= {"epoch_s": total / 1000, "data": data.description["name"], "evaluation_share": held_out / total}
    return rows


# --- What it must reach --------------------------------------------------------------------------


def checks(rows):
    """(what, ratio, "at most" or "at least", bound) of what is asked of ours on a CPU.

    The bounds lie a tenth or more below what one thread of an AMD EPYC gave (docs/costs.md).
    """
    def pick(configuration, way, key="step_ms"):
        """The best of a way's precisions and formats."""
        return min((row[key] for row in rows if row["configuration"] == configuration
                    and row["way"].startswith(way)), default=None)

    if single := pick("1x1024H", "ours", "epoch_s"):
        for name, bound in (("256x4H", 1.5), ("64x16H", 1.25), ("16x64H", 1.1)):
            ratio = pick(name, "ours", "epoch_s") / single
            yield f"an epoch of {name} / an epoch of 1x1024H", ratio, "at most", bound
        for name, bound in (("1x1024H", 2), ("16x64H", 2), ("64x16H", 2), ("256x4H", 2.5)):
            yield f"a step of {name} / its matrix products", pick(name, "ours", "times_floor"), "at most", bound
    if theirs := pick("256x4H", "textbook", "epoch_s"):
        ratio = theirs / pick("256x4H", "ours", "epoch_s")
        yield "256x4H: an epoch of the textbook way / ours", ratio, "at least", 7
    for name in dict.fromkeys(row["configuration"] for row in rows):
        convolutional = name in ("ConvNet-0.29M", "DN-Low")
        for way, bound in (("textbook", 1.7), ("one network", 1.1), ("vmap", 1), ("TorchEnsemble, Fusion", 1),
                           ("TorchEnsemble, Voting", 1)):
            theirs = pick(name, way)
            if theirs and (convolutional or bound == 1):
                yield f"{name}: a step of {way} / ours", theirs / pick(name, "ours"), "at least", bound


# --- main ----------------------------------------------------------------------------------------


def main():
    p = study.Parser(__doc__)
    p.add_argument("--all", action="store_true", help="all twelve networks")
    p.add_argument("--only", nargs="+", metavar="NAME", help="these networks")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers here as well")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    p.add_argument("--check", action="store_true", help="exit with status 1 if a ratio falls short")
    args = p.parse_args()
    device, preset = study.choose_device(args.device), presets.load_preset("paper")
    networks = {name: key for key in EXPERIMENTS for name in preset[key]["configurations"]
                if name != "10xConvNet-0.29M"}          # 0.29M, but with fewer members
    names = args.only or (list(networks) if args.all else SHORT)
    for name in names:
        presets.known(name, networks, "configuration")
    if args.check and torchensemble is None:
        raise common.Refused("--check compares with TorchEnsemble, which is not installed: pip install -r "
                             "benchmarks/requirements.txt")
    where, rows = folders.machine(device), []
    for key, experiment in EXPERIMENTS.items():
        if chosen := [name for name in names if networks[name] == key]:
            rows += bench(experiment, chosen, device)
    print(f"{where['device']}, {device.type}, torch {where['torch']}; medians. Threads per way: {where['threads']}; "
          "the textbook way has two more processes, which load its images\n")
    print("| network | way | precision | / ours | / floor | step (ms) | examples/s | evaluation of 1,000 (ms) | "
          "peak (MB) |\n" + "|---" * 9 + "|")
    for row in rows:
        figures = ["" if math.isnan(row[key]) else f"{row[key]:,.{digits}f}" for key, digits in (
            ("times_ours", 2), ("times_floor", 2), ("step_ms", 1), ("examples_per_s", 0), ("evaluation_of_1000_ms", 1),
            ("peak_MB", 0))]
        print("| " + " | ".join([row["configuration"], row["way"], row["precision"], *figures]) + " |")
    print()
    for row in rows:
        if row["way"] == "ours":
            print(f"{row['configuration']} {row['precision']}: an epoch takes {row['epoch_s']:.1f} s, "
                  f"{100 * row['evaluation_share']:.0f} % of it evaluation")
    if torchensemble is None:
        print("TorchEnsemble is not installed: pip install -r benchmarks/requirements.txt")
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | where for row in rows)
    print("\n| what | is | asked |\n|---|---|---|")
    short = False
    for what, ratio, relation, bound in checks(rows):
        met = ratio <= bound if relation == "at most" else ratio >= bound
        short |= not met
        print(f"| {what} | {ratio:.2f} | {relation} {bound}{'' if met else ': NOT MET'} |")
    if args.check and short:
        sys.exit(1)


if __name__ == "__main__":
    study.command_line(main)
