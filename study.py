"""The machinery: runs -> one run -> plan and progress -> command line. No science here.

A run is configuration x method x trial: presets.py reads its settings, folders.py keeps what it leaves behind.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (someone will try)
    print(f"error: Python {sys.version.split()[0]} is too old: 3.11 or newer is needed; `bash run_all.sh` finds one",
          file=sys.stderr)
    sys.exit(2)

import argparse
import collections
import contextlib
import hashlib
import importlib
import math
import os
import re
import signal
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("USER", str(os.getuid()))     # PyTorch asks for the name of a user who may have none
os.environ.pop("MPLBACKEND", None)                  # Jupyter's is none of ours

try:
    import common
    import fast
    import folders
    import presets
    from common import Refused
    from folders import method_name, to_be_done
    from presets import CONFIGURATION, COUNT, METHODS, SHARED, known
    from progress import Progress, duration, outcome, told

    import numpy as np
    import torch
except (ImportError, RuntimeError, OSError) as error:       # RuntimeError: torch and torchvision of two releases
    pair = "; torch and torchvision are not of one release pair" if "torchvision::" in str(error) else ""
    print(f"error: the packages cannot be imported ({str(error).splitlines()[0]}){pair}: `pip install -r "
          "requirements.txt`; or `bash run_all.sh`, which makes a .venv, and then `. .venv/bin/activate`",
          file=sys.stderr)
    sys.exit(2)


# --- Runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments, as its script declares it.

    build(settings, shape, classes, generator) returns the untrained ensemble of a run, an nn.Module from images
    (N, *shape) or (N, M, *shape) to member logits (N, M, K); `generator` draws the initial weights. `figures` is
    {figure: {configuration: methods}}; the method `joint` stands for every lambda of the preset.
    """
    name: str
    build: object
    figures: dict = field(default_factory=dict)


def experiment_of(name):
    """The Experiment that train_NAME.py declares."""
    return importlib.import_module(f"train_{name}").EXPERIMENT


@dataclass(frozen=True)
class Run:
    """configuration x method (x lambda) x trial: the unit of work."""
    preset: str
    experiment: str
    configuration: str
    method: str           # one of METHODS
    lam: float            # lambda; 0 for the other methods
    trial: int
    settings: dict        # all that decides its numbers
    weights: bool         # are the trained weights kept?

    @property
    def method_name(self):
        return method_name(self.method, self.lam)

    @property
    def label(self):
        return f"{self.configuration} {self.method_name.replace('joint-', 'lambda ')} trial {self.trial}"

    @property
    def path(self):
        return Path(self.preset, self.experiment, self.configuration, self.method_name, f"trial{self.trial}")

    def generator(self, purpose):
        """A generator for one purpose: initialisation, order, augmentation, bootstrap, folds, drop.

        Its seed depends on (experiment, configuration, trial, --seed) alone. So the lambdas of one trial share
        initial weights and order, and a run alone equals the same run in a sweep.
        """
        words = (self.experiment, self.configuration, self.trial, self.settings["seed"], purpose)
        digest = hashlib.sha256("/".join(map(str, words)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def learning_rate(rates, lam):
    """The rate of the first range that reaches `lam`: {0.95: a, 1: b} gives b for 0.97."""
    return rates[min(upper for upper in rates if upper >= lam)]


def own_rate(settings):
    """What makes lambda 0 train each member at the rate and the weight decay of `settings`.

    SGD on the sum of the members' losses at rate r and decay d. The loss at lambda 0 is that sum over M: its gradient
    takes M times the rate, and the decay, which is not divided by M, d / M.
    """
    return {"lr": settings["lr"] * settings["members"], "weight_decay": settings["weight_decay"] / settings["members"]}


def planned(c, lambdas=None, methods=None):
    """The runs (method, lambda) of a configuration: the preset's, or those that the two flags select.

    lambdas alone mean joint runs. A single network is the same at every lambda and is trained once, as lambda 1.
    """
    chosen = methods or (["joint"] if lambdas else c["methods"])
    joint = [("joint", lam) for lam in dict.fromkeys(lambdas or c["lambdas"])] if "joint" in chosen else []
    if c["members"] == 1:
        return [("joint", 1)] if joint else []
    return joint + [(method, 0) for method in METHODS[1:] if method in chosen]


def drawn(figure, configuration, c):
    """The planned runs (method, lambda) of a configuration that a figure, a value of FIGURES, draws."""
    words = set(figure.get(configuration, ()))
    return [(method, lam) for method, lam in planned(c) if {method, method_name(method, lam)} & words]


def trains(c, method, lam, trial):
    """Does a preset train this trial of a method of a configuration? Of those in `once`, it trains the first only."""
    return trial == 0 or method_name(method, lam) not in c["once"]


def list_runs(preset, experiment, block, data, seed=0, only=None, lambdas=None, methods=None, figures=None):
    """The runs of an experiment, trial by trial, so that the first trial is complete early; those in `once` come last.

    `only`, `lambdas`, `methods` and `figures` narrow them. Stacking combines the members of its trial's lambda 0 run,
    which comes before it.
    """
    extra = {"bagging": ["bagging"], "stacking": ["stacking", "folds", "penalties"]}
    runs = []
    for trial in range(block["trials"]):
        for name in dict.fromkeys(only or block["configurations"]):
            c = block["configurations"][name]
            wanted = [each for each in planned(c, lambdas, methods) if trains(c, *each, trial)]
            if figures:
                there = [each for figure in figures for each in drawn(experiment.figures[figure], name, c)]
                wanted = [each for each in wanted if each in there]
            if ("stacking", 0) in wanted and ("joint", 0) not in wanted:
                wanted.insert(0, ("joint", 0))
            stacked = "stacking" in c["methods"] or ("stacking", 0) in wanted
            for method, lam in wanted:
                settings = {"data": data, "seed": seed, "members": c["members"], "classes": c["classes"],
                            **{key: value for key, value in c.items() if key not in CONFIGURATION},
                            "lr": learning_rate(c["lr"], lam), **{key: block[key] for key in SHARED},
                            **{key: block[key] for key in extra.get(method, [])}}
                if method == "independent":
                    settings |= own_rate(settings)
                keep = method == "joint" and (lam in c["weights"] or (lam == 0 and stacked))
                runs.append(Run(preset, experiment.name, name, method, lam, trial, settings, keep))
    if not runs:
        raise Refused("no run matches this selection of configurations, methods, lambdas and figures (bagging, "
                      "stacking and independent need more than one member); see --dry-run without it")
    return sorted(runs, key=lambda run: run.method_name in block["configurations"][run.configuration]["once"])


def shard(runs, part, parts):
    """Every `parts`-th run from `part` on, counted from 0; stacking goes with the members it combines."""
    place, own = {}, []
    for run in runs:
        key = replace(run, method="joint").path if run.method == "stacking" else run.path
        if place.setdefault(key, len(place)) % parts == part:
            own.append(run)
    return own


def tuning_runs(runs, rates):
    """Each joint run at each rate, times M since Eq. 9 divides by M, in folders tune-lrX."""
    return [replace(run, preset=f"{run.preset}/tune-lr{lr:g}", weights=False, settings=run.settings | {"lr": lr})
            for run in runs if run.method == "joint" for lr in sorted(rate * run.settings["members"] for rate in rates)]


def print_tuned(runs, results):
    """The rates of the lowest mean validation error, as presets.yaml takes them."""
    errors = collections.defaultdict(list)      # (configuration, lambda, rate) -> errors, inf of a diverged run
    for run in runs:
        result = folders.read_run(results / run.path)["result"]
        errors[run.configuration, run.lam, run.settings["lr"]].append(result.get("validation_error", math.inf))
    for configuration in dict.fromkeys(run.configuration for run in runs):
        best = {}
        for lam in sorted({run.lam for run in runs if run.configuration == configuration}):
            tried = {rate: np.mean(e) for (name, at, rate), e in errors.items() if (name, at) == (configuration, lam)}
            best[lam] = min(tried, key=tried.get)
            if len(tried) > 1 and best[lam] in (min(tried), max(tried)):
                print(f"{configuration}, lambda {lam:g}: {best[lam]:g} is at an end of the grid: widen `tune` in "
                      "presets.yaml")
        print(f"{configuration}: lr: {{{', '.join(f'{lam:g}: {rate:g}' for lam, rate in best.items())}}}")


# --- One run -------------------------------------------------------------------------------------


def do_run(experiment, run, data, results, report=lambda epoch, history: None, eager=None):
    """Trains one run and writes its folder. Returns its result, as run.json has it.

    eager: the reason to launch each step on CUDA instead of a recorded one, or None.

    Raises Refused, and writes nothing, if the device has too little memory.
    """
    checkpoint, ensemble, cuda = folders.Checkpoint(run, results), None, data.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with fix_told(run):
        if run.method == "stacking":
            test, arrays, result = stack(experiment, run, data, results)
        else:
            ensemble, history, epoch, test = common.train(experiment.build, run, data, report, eager, checkpoint)
            arrays, result = reported(run, history, epoch)
            result |= {"eager": eager} if cuda and eager else {}
    if cuda:
        result["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    for key, value in (test or {}).items():
        if np.ndim(value) == 0:
            result[f"test_{key}"] = float(value)
        else:
            arrays[f"reported_test_{key}"] = value
    folders.write_run(run, results, data, checkpoint.began, arrays, result, ensemble)
    checkpoint.path.unlink(missing_ok=True)
    return result


def stack(experiment, run, data, results):
    """common.stack on the members of the trial's lambda 0 run; a run that diverged has none to combine."""
    source = results / replace(run, method="joint").path
    diverged = folders.read_run(source)["result"]["diverged_at_epoch"]
    if diverged is not None:
        return None, {}, {"diverged_at_epoch": diverged}
    ensemble, _ = common.new_ensemble(experiment.build, run, data)
    ensemble.load_state_dict(folders.load_weights(source, data.device))
    return common.stack(ensemble, run, data)


def refuse_lost_members(run, source):
    """Raises Refused if the finished run that stacking combines is there without its weights."""
    diverged = folders.read_run(source)["result"]["diverged_at_epoch"]
    if diverged is None and not (source / "weights.pt").exists():
        raise Refused(f"{run.label} combines the members of {source}, whose weights.pt is not there: remove {source} "
                      "and give the same command again")


def reported(run, history, epoch):
    """What history.npz and run.json hold of a trained run: arrays with an axis (epoch) or (epoch, member), by part of
    the data; and the reported epoch, None if the run diverged."""
    second = "validation" if run.settings["validation"] else "test"
    arrays = {f"{part}_{key}": np.array([scores[i][key] for scores in history], np.float32)
              for i, part in enumerate(("train", second)) for key in history[0][i]}
    result = {"epoch": epoch, "diverged_at_epoch": None if epoch else len(history)}
    if epoch and run.settings["validation"]:
        result["validation_error"] = history[epoch - 1][1]["ensemble_error"]
    return arrays, result


@contextlib.contextmanager
def fix_told(run=None):
    """Turns an error of too little memory, of a run or of the data, or of --deterministic, into Refused, with a fix."""
    who = run.label if run else "the images"
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if "use_deterministic_algorithms" in str(error):
            raise Refused(f"{who}: --deterministic: {str(error).split(',')[0]}: use another operation in the "
                          "network, or leave --deterministic out") from error
        if not (isinstance(error, MemoryError) or fast.out_of_memory(error)):
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(fast.root(error)))
        more = f" ({asked[1]} more were needed)" if asked else ""
        fix = ("" if run is None or run.method == "stacking" else
               f"lower members or batch ({run.settings['batch']}), with --set and another --results folder, or ")
        raise Refused(f"{who}: not enough memory{more}: {fix}free memory; finished runs are kept") from error


# --- The plan ------------------------------------------------------------------------------------


def fastest(work, device, limit=0.2):
    """Seconds of the fastest call of `work`, of as many as fit into `limit`: others may share the machine."""
    seconds = []
    while not seconds or (sum(seconds) < limit and len(seconds) < 50):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def cost(experiment, run, data, eager=False):
    """Seconds that a run will take on one core or on the GPU, from a few of its own steps."""
    s, device = run.settings, data.device
    ensemble, optimizer = common.new_ensemble(experiment.build, run, data)
    part = data.train_images[:100], data.train_labels[:100]
    example = fastest(lambda: common.evaluate(ensemble, data, *part), device) / len(part[1])
    n, held_out = s["train"] or len(data.train_labels) - s["validation"], s["validation"] or len(data.test_labels)
    if run.method == "stacking":        # predictions, and fits of about 60 products and gradients
        fitted = s["validation"] if s["stacking"] == "validation" else n
        logits = torch.zeros(500, s["members"] * data.classes, device=device, dtype=torch.double)
        product = fastest(lambda: logits.T @ (logits @ logits.new_zeros(logits.shape[1], data.classes)), device) / 500
        fits = s["folds"] * len(s["penalties"]) + 1
        return (fitted + len(data.test_labels)) * example + 60 * fits * fitted * product
    ensemble.train()
    batches = common.Batches(run, data, torch.arange(n, device=device))
    step = common.stepper(run, ensemble, optimizer, common.Scores(s["members"], device), batches, eager)
    rows = batches.epoch()[0]
    # On a CPU a step of the largest DenseNets takes half a minute. On a GPU a smaller batch than that of the recorded
    # step is launched from Python, which takes longer.
    few = rows if device.type == "cuda" else rows[:max(2, len(rows) // 8)]
    seconds = fastest(lambda: step(few), device, 0) * len(rows) / len(few)
    if seconds < 2:
        seconds = fastest(lambda: step(rows), device)
    return s["epochs"] * (math.ceil(n / s["batch"]) * seconds + held_out * example)


def estimate(experiment, runs, data_of, eager=False):
    """The cost of each run by its path; runs of one configuration and method cost the same."""
    costs, seconds = {}, {}
    for run in runs:
        kind = (run.configuration, "joint" if run.method == "independent" else run.method)
        if kind not in costs:
            with fix_told(run):
                costs[kind] = cost(experiment, run, data_of(run), eager)
        seconds[run.path] = costs[kind]
    return seconds


def untrained_on_meta(build, settings, shape, classes):
    """The ensemble in fp32 without memory: for its shapes."""
    with torch.device("meta"):
        return build(settings | {"precision": "fp32"}, shape, classes, torch.Generator("cpu")).train()


def bytes_saved_for_backward(build, settings, shape, classes):
    """What autograd keeps of one forward pass for the backward pass in fp32, weights left out; takes no memory."""
    ensemble = untrained_on_meta(build, settings, shape, classes)
    kept, weights = {}, {p.untyped_storage()._cdata for p in ensemble.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage              # held, so that no two share an address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ensemble(torch.empty(settings["batch"], *shape, device="meta"))
    return sum(storage.nbytes() for storage in kept.values())


def refuse_lone_images(experiment, runs, data_of):
    """Raises Refused if a last batch of one image leaves batch norm one value, of which it has no deviation."""
    for run in {run.configuration: run for run in runs}.values():
        s, data = run.settings, data_of(run)
        n = s["train"] or len(data.train_labels) - s["validation"]
        if n % s["batch"] == 1 % s["batch"]:        # (batches of one image, too)
            try:
                untrained_on_meta(experiment.build, s, data.shape, data.classes)(
                    torch.empty(1, *data.shape, device="meta"))
            except ValueError as error:
                raise Refused(f"batch {s['batch']}: the last batch of {n} training images has one image, which is too "
                              f"few for this network's batch norm ({error}): use another batch") from error


def runs_at_once(experiment, runs, data_of, jobs, cores):
    """How many runs to train at once: --jobs; else one on a GPU, and on a CPU one per core that memory allows."""
    if jobs or not runs or data_of(runs[0]).device.type == "cuda" or sys.platform != "linux":
        return max(1, min(jobs or 1, len(runs)))
    needed = max(bytes_saved_for_backward(experiment.build, run.settings, data_of(run).shape, data_of(run).classes)
                 for run in {run.configuration: run for run in runs}.values())
    available = 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    return max(1, min(cores, len(runs), int(available / (needed + 5e8))))


def print_plan(args, block, data, runs, seconds, jobs, figures):
    """Prints what is to do; of a dry run, by figure and by run. seconds: the cost of the runs to do, by path."""
    def amount(some):
        left = [seconds[run.path] for run in some if run.path in seconds]
        return f"{len(left)} of {len(some)} runs to do, about {duration(sum(left) / jobs)}"

    where, about = folders.machine(data.device)["device"], data.description
    print(f"{runs[0].experiment}: {amount(runs)}\n  {jobs} at once on {where} ({data.device.type}), with "
          f"{about['name']} ({about['source']}; {data.origin})", flush=True)
    if args.threads > 1:
        print(f"  {args.threads} threads per run: last digits differ from those of one thread")
    if args.dry_run:
        for name, figure in figures.items():
            if some := [run for run in runs if (run.method, run.lam) in drawn(
                    figure, run.configuration, block["configurations"][run.configuration])]:
                print(f"  {name if name.startswith('table') else f'figure {name}'}: {amount(some)}")
        for run in runs:
            print(f"    {run.label}: {'to do' if run.path in seconds else 'finished'}")


# --- The command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with the docstring as it stands, and bad arguments refused in one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise Refused(f"{message}; see --help")


def argument(kind, rule):
    """A type for argparse: a value of one kind that follows a rule (test, words)."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if rule[0](value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"'{text}' is not {rule[1]}")
    return parse


WHOLE = argument(int, COUNT)


def parser(description):
    """The flags that training and robustness.py share, with one meaning."""
    p = Parser(description)
    p.add_argument("--preset", help="a block of presets.yaml: paper, short, overnight, quick or smoke (default: short "
                   "if torch can use a CUDA GPU, else quick)")
    p.add_argument("--figure", nargs="+", metavar="F", help="only the runs of these figures and tables, by "
                   "their names in FIGURES of the script")
    p.add_argument("--only", nargs="+", metavar="NAME", help="only these configurations")
    p.add_argument("--lambdas", nargs="+", type=argument(float, presets.LAMBDA), metavar="L",
                   help="only joint training, at these lambdas, numbers in [0, 1]; a network alone is the same at each "
                   "and is trained once, as lambda 1")
    p.add_argument("--trials", type=WHOLE, metavar="N", help="only the first N trials (default: the preset's)")
    p.add_argument("--data-dir", metavar="DIR", help="a folder with the real data (default: data/, then the system's "
                   "package, then a download into data/)")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR",
                   help="the folder of the run folders (default: results)")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    seed = presets.number(int, 0, 2**63 - 1, "a whole number of at least 0")
    p.add_argument("--seed", type=argument(int, seed), default=0, metavar="N",
                   help="changes initial weights, order, bootstraps and dropped members, not the split")
    p.add_argument("--jobs", type=WHOLE, metavar="N", help="train N runs at once (default: on a CPU one per core, as "
                   "far as memory allows; on a GPU one)")
    p.add_argument("--dry-run", action="store_true", help="print the runs and the time for those to do, and stop")
    return p


def training_parser(description):
    """The flags of a training script."""
    p = parser(description)
    p.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD",
                   help=f"only these methods: {', '.join(METHODS)}")
    p.add_argument("--epochs", type=WHOLE, metavar="N", help="the number of epochs (default: the preset's)")
    p.add_argument("--data", choices=presets.POLICIES, help="real: the real data, or stop; auto: the stand-in if "
                   "the download takes more than 5 minutes; synthetic: the stand-in (default: the preset's)")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other values than the preset's, e.g. "
                   "bagging=resample, or CONFIGURATION.KEY=VALUE for one configuration")
    p.add_argument("--tune", action="store_true", help="tune the learning rate of each configuration and lambda on "
                   "validation error, as the authors did, and print the rates in the format of presets.yaml")
    p.add_argument("--threads", type=WHOLE, default=1, metavar="N", help="threads per run (default: 1): more speed "
                   "up one run, slow down a whole study, and change the last digits")
    rule = (lambda x: len(x) == 2 and 0 <= x[0] < x[1], "I/N with I from 0 to N - 1, such as 0/4")
    p.add_argument("--shard", type=argument(lambda text: tuple(map(int, text.split("/"))), rule), default=(0, 1),
                   metavar="I/N", help="only part I, from 0, of N parts of the runs: for machines that share no folder")
    p.add_argument("--eager", nargs="?", const="asked for", metavar="WHY", help="on CUDA, do not use CUDA graphs: "
                   "launch each step (slower); WHY is kept in run.json")
    p.add_argument("--deterministic", action="store_true", help="on CUDA, use only kernels that repeat exactly; on "
                   "a CPU all do")
    p.add_argument("--fetch", action="store_true", help="get the data and stop; exit status 3 if synthetic images must "
                   "be used instead")
    return p


def choose_device(name, jobs=None):
    """The torch device for --device. Raises Refused if torch cannot use it, or for several jobs on a GPU.

    On a CPU a run has one thread unless --threads says otherwise: no number depends on how many cores there are.
    """
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""         # processes that are forked must not meet a GPU
    if name == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no usable CUDA GPU; use --device cpu, or install a driver that fits "
                      f"torch {torch.__version__}")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)      # the momenta of dead nodes decay into slow denormal numbers
    torch.backends.cudnn.allow_tf32 = False     # fp32 means fp32, in convolutions as well
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if (jobs or 1) > 1:
        raise Refused(f"--jobs {jobs}: on a GPU one run is worked on at a time; for several GPUs start this command "
                      "once for each, with CUDA_VISIBLE_DEVICES")
    return torch.device("cuda")


def be_deterministic():
    """Only kernels that repeat exactly, from now on."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # PyTorch asks for one of two
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # no number here is read before it is written


def choose_preset(name, device):
    """The preset, by default one that fits the device: `paper` takes weeks of a GPU and is asked for by name."""
    return name or ("short" if device.type == "cuda" else "quick")


def figure_names(words, figures):
    """The names of figures as FIGURES has them: 2, fig2 or figure2 -> 2; table2."""
    return [word if word in figures else
            known(re.sub("^fig(ure)?", "", word.lower()) or word, figures, "figure or table") for word in words or []]


def prepare(experiment, args):
    """What the command line selects: the experiment's settings, a function from a run to its data, and the runs."""
    device = choose_device(args.device, args.jobs)
    name = choose_preset(args.preset, device)
    preset = presets.load_preset(name)
    block = presets.experiment_settings(preset, name, experiment.name, args.set)
    block |= {k: v for k in ("trials", "epochs") if (v := getattr(args, k))}
    for word in args.only or []:
        known(word, block["configurations"], "configuration")
    figures, policy = figure_names(args.figure, experiment.figures), args.data or preset["data"]
    if args.deterministic:
        be_deterministic()
    for c in block["configurations"].values():
        if c.get("precision") == "auto":
            c["precision"] = "bf16" if folders.bf16_is_fast(device) else "fp32"
    if args.fetch:
        with fix_told():
            data = folders.find_data(block["dataset"], policy, args.data_dir)
        print(f"data: {block['dataset']}: {data.origin if data else 'the synthetic stand-in'}")
        sys.exit(0 if data or policy == "synthetic" else 3)
    runs = list_runs(name, experiment, block, None, args.seed, args.only, args.lambdas, args.methods, figures)
    refuse_contradictions(block, runs, args.tune)
    with fix_told():
        found = folders.find_data(block["dataset"], policy, args.data_dir, not args.dry_run)
        data = {classes: folders.cut_data(found, block["dataset"], policy, block | {"classes": classes},
                                          not args.dry_run).to(device)
                for classes in {run.settings["classes"] for run in runs}}

    def data_of(run):
        return data[run.settings["classes"]]

    runs = [replace(run, settings=run.settings | {"data": data_of(run).description}) for run in runs]
    refuse_lone_images(experiment, runs, data_of)
    return block, data_of, shard(runs, *args.shard)


def refuse_contradictions(block, runs, tune):
    """Raises Refused if two settings of the runs contradict each other or do not fit the data set."""
    most, asked = common.DATASETS[block["dataset"]].classes, max(run.settings["classes"] or 0 for run in runs)
    if asked > most:
        raise Refused(f"classes {asked} is more than the {most} of {block['dataset']}: lower classes, or set null for "
                      "all")
    if block["nesterov"] and not block["momentum"]:
        raise Refused("nesterov needs momentum above 0: set momentum, or nesterov=false")
    if tune and not block["validation"]:
        raise Refused("--tune compares validation errors, and validation is 0: use --set validation=N")
    if tune and not any(run.method == "joint" for run in runs):
        raise Refused("--tune is of joint training: leave --methods out, or add joint")
    if any(run.method == "stacking" for run in runs):
        fitted = block["validation" if block["stacking"] == "validation" else "train"]
        if fitted == 0:
            raise Refused("stacking is to be fitted on the validation split, and validation is 0: use --set "
                          "stacking=training, or --set validation=N")
        if block["folds"] > (fitted or math.inf):
            raise Refused(f"folds {block['folds']} is more than the {fitted} images that stacking is fitted on: lower "
                          "folds")


def run_at_once(runs, results, do, jobs, seconds, ready=lambda run: True, threads=1):
    """do(run, say) for each run that is not finished, `jobs` at once; it returns the line on the run. Shows progress.

    seconds: the cost of each run by its path. ready: as in folders.run_missing.
    """
    def work(say):
        def one(run):
            say(run.path, 0, f"{run.label}: started", None, 0)
            say(run.path, 1, "", do(run, say))

        torch.set_num_threads(threads)
        folders.run_missing(runs, results, one, ready, lambda: say(None, 0, ""))

    with contextlib.closing(Progress(seconds, results, jobs)) as progress:
        fast.in_processes(work, jobs, progress, (Refused, OSError))


def train_study(experiment, args):
    """What a training script does: trains the selected runs that are not in their folders yet.

    If a step cannot be captured, it says so and starts the same command again with --eager.
    """
    try:
        train_missing(experiment, args)
    except fast.CannotCapture as error:
        print(f"\n{error}: going on with --eager, which launches each step and is slower", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--eager", f"in this command {error}"])


def train_missing(experiment, args):
    """Trains the selected runs that are not in their folders yet. Raises fast.CannotCapture."""
    cores, results = torch.get_num_threads(), args.results
    if args.tune and args.shard[1] > 1:
        raise Refused("--tune compares all runs of a configuration: leave --shard out")
    block, data_of, runs = prepare(experiment, args)
    if not runs:
        print(f"{experiment.name}: no run of this selection is in part {args.shard[0]}/{args.shard[1]}")
        return
    if args.tune:
        runs = tuning_runs(runs, block["tune"])
    to_do = [run for run in runs if to_be_done(run, results)]
    source = {(run.configuration, run.trial): run for run in runs       # of the members that are stacked
              if (run.method, run.lam) == ("joint", 0)}
    for run in to_do:
        if run.method == "stacking" and not to_be_done(members := source[run.configuration, run.trial], results):
            refuse_lost_members(run, results / members.path)
    seconds = estimate(experiment, to_do, data_of, args.eager)
    jobs = runs_at_once(experiment, to_do, data_of, args.jobs, max(1, cores // args.threads))
    print_plan(args, block, data_of(runs[0]), runs, seconds, jobs, experiment.figures)
    if args.dry_run:
        return
    folders.make_writable(results)

    def ready(run):
        return run.method != "stacking" or not to_be_done(source[run.configuration, run.trial], results)

    def do(run, say):
        return outcome(run, do_run(experiment, run, data_of(run), results, told(run, say), args.eager))

    run_at_once(to_do, results, do, jobs, seconds, ready, args.threads)
    if args.tune:
        print_tuned(runs, results)


def command_line(main):
    """Runs a script's `main`; bad input becomes one line on stderr and exit status 2.

    Ctrl-C and SIGTERM end it within a step, with exit status 130 and 143.
    """
    def stop(number, frame):
        signal.signal(number, lambda *_: None)      # a second one, of whoever signals all processes, disturbs the end
        raise KeyboardInterrupt(number)

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")      # noqa: SIM115 (a closed one is None)
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):          # (a notebook's has not)
            stream.reconfigure(errors="replace")    # a λ in a locale that has none
    handler = signal.signal(signal.SIGTERM, stop)
    leaving = None
    try:
        try:
            main()
        except SystemExit as error:         # as by --help
            leaving = error
        sys.stdout.flush()
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:                 # the reader of the output, such as head, has enough
        sys.exit(1)
    except OSError as error:                # a folder went away, or may not be read
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        print(f"error: {what}; finished runs are kept: mend this, and give the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print("\nstopped; finished runs are kept, and of the others all but the last minute or epoch: give the same "
              "command again to go on", file=sys.stderr)
        sys.exit(128 + (stopped.args or [signal.SIGINT])[0])
    finally:
        signal.signal(signal.SIGTERM, handler)
        try:
            sys.stdout.flush()
        except OSError:                     # what is left, Python would try to write at its end, and complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if leaving:
        raise leaving
