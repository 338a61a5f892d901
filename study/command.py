"""The scripts' command line: what is asked for -> the plan -> runs at once, with progress."""

import argparse
import collections
import concurrent.futures
import datetime
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import common
import fast
from study import bf16_is_fast, choose_device, folders, machine, plan
from common import Refused
from study.folders import run_is_finished

import numpy as np
import torch

# --- One run -------------------------------------------------------------------------------------


def do_run(experiment, run, data, results, report=lambda epoch, history: None, eager=False):
    """Trains one run and writes its folder. Returns its result, as run.json has it. `eager`: as in common.train."""
    checkpoint, ensemble = folders.Checkpoint(run, results), None
    with errors_in_one_line(run.label):
        if run.method == "stacking":
            test, arrays, result = stack(experiment, run, data, results)
        else:
            ensemble, history, epoch, test = common.train(experiment.build, run, data, report, eager, checkpoint,
                                                          loss=experiment.loss)
            arrays, result = folders.arrays_and_result(run, history, epoch)
    return folders.write_run(run, results, data, checkpoint.began, arrays, result, ensemble, test or {})["result"]


def stack(experiment, run, data, results):
    """common.stack on the members of the trial's lambda 0 run; a run that diverged has none to combine."""
    members = results / run.path_of_members
    diverged = folders.read_run(members)["result"]["diverged_at_epoch"]
    if diverged is not None:
        return None, {}, {"diverged_at_epoch": diverged}
    ensemble, _ = common.new_ensemble(experiment.build, run, data)
    ensemble.load_state_dict(folders.load_weights(members))
    return common.stack(ensemble, run, data)


def summary_line(run, result):
    """The line on a finished run."""
    if result["diverged_at_epoch"] is not None:
        return f"{run.label}: DIVERGED at epoch {result['diverged_at_epoch']}"
    remark = f"epoch {result['epoch']}" if "epoch" in result else f"penalty {result['penalty']:g}"
    if result.get("penalty_is_outermost") or result.get("fits_not_converged"):
        remark += ", at an end of the grid or not converged: change `penalties` in presets.yaml"
    return f"{run.label}: test error {100 * result['test_ensemble_error']:.2f} % ({remark})"


FIXES = {       # words of an error of PyTorch -> what a user can do about it
    "use_deterministic_algorithms": "leave --deterministic out",
    "more than 1 value per channel": "the last batch has one image, too few for batch norm: use --set batch=N",
    "loading state_dict": "the saved weights are of another network: remove the run's folder, or use other --results",
    "Nesterov momentum": "set momentum above 0, or nesterov=false",
    "zip() argument": "`filters` and `strides` of a ConvNet have an entry per layer each",
    **dict.fromkeys(("Kernel size can't be greater", "Output size is too small"),
                    "the images are too small for the network (a ConvNet: lower its strides, or set padding=1)"),
    "captured": "add --eager, which launches each step and is slower"}      # fast.CannotCapture


@contextmanager
def errors_in_one_line(what="the images"):
    """Turns an error that a user can mend into Refused with the fix."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        said = str(error).split("\n")[0].rstrip(":")
        fix = next((fix for words, fix in FIXES.items() if words in said), None)
        if isinstance(error, MemoryError) or fast.out_of_memory(error):
            fix = "lower members or batch, with --set and another --results folder, or free memory"
        if fix is None:
            raise
        raise Refused(f"{what}: {said}: {fix}; finished runs are kept") from error


def print_tuned(runs, results):
    """The rates of the lowest mean validation error, as presets.yaml takes them."""
    errors = collections.defaultdict(list)      # (configuration, lambda, rate) -> errors, inf of a diverged run
    for run in runs:
        result = folders.read_run(results / run.path)["result"]
        errors[run.configuration, run.lam, run.settings["lr"]].append(result.get("validation_error", math.inf))
    rates = collections.defaultdict(dict)
    for configuration, lam in sorted({key[:2] for key in errors}):
        tried = [rate for *key, rate in errors if key == [configuration, lam]]
        best = min(tried, key=lambda rate: np.mean(errors[configuration, lam, rate]))
        if len(tried) == 1 or math.isinf(np.mean(errors[configuration, lam, best])):
            said = f"no rate to recommend: {'one was tried' if len(tried) == 1 else 'each diverged in a trial'}"
        else:
            rates[configuration][lam] = best
            said = f"{best:g} is at an end of the grid" if best in (min(tried), max(tried)) else ""
        if said:
            print(f"{configuration}, lambda {lam:g}: {said}; widen `tune` in presets.yaml")
    for configuration, best in rates.items():
        print(f"{configuration}: lr: {{{', '.join(f'{lam:g}: {rate:g}' for lam, rate in best.items())}}}")


# --- The plan ------------------------------------------------------------------------------------


def runs_to_do(runs, results):
    """The runs that are not finished, and before them the members of those stacking runs, if their weights are gone."""
    left = [run for run in runs if not run_is_finished(run, results)]
    members = {run.path_of_members for run in left if run.method == "stacking"}
    needed = [replace(run, weights_needed=True) for run in runs if run.path in members and run not in left]
    return [run for run in needed if not run_is_finished(run, results)] + left


def seconds_of_step(experiment, run, data, eager):
    """Seconds of a training step: of the fastest of a few, since others may share the machine."""
    ensemble, optimizer = common.new_ensemble(experiment.build, run, data)
    batches = common.Batches(run, data, torch.arange(run.settings["batch"], device=data.device))
    scores = common.Scores(run.settings["members"], data.device)
    step = common.stepper(run, ensemble, optimizer, scores, batches, eager, experiment.loss)
    (rows,), seconds = batches.epoch(), []
    while len(seconds) < 5 and sum(seconds) < 1:
        began = time.perf_counter()
        step(rows)
        if data.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def estimate(experiment, runs, data_of, eager=False):
    """Seconds of the training steps of each run on one core or on the GPU, by its path; 0 for stacking."""
    of_step, seconds = {}, {}
    for run in runs:
        s, data = run.settings, data_of(run)
        kind = run.configuration, run.method if run.method in ("bagging", "stacking") else "joint"
        if kind not in of_step:
            with errors_in_one_line(run.label):
                of_step[kind] = 0.0 if run.method == "stacking" else seconds_of_step(experiment, run, data, eager)
        images = s["train"] or len(data.train_labels) - s["validation"]
        seconds[run.path] = s["epochs"] * math.ceil(images / s["batch"]) * of_step[kind]
    return seconds


def runs_at_once(runs, data_of, jobs, cores):
    """How many runs to train at once: --jobs; else one on a GPU, and on a CPU one per core that memory allows."""
    if jobs or not runs or data_of(runs[0]).device.type == "cuda":
        return max(1, min(jobs or 1, len(runs)))
    used = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss        # of a process that took a step of each
    available = 1024 * int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    return max(1, min(cores, len(runs), available // used))


def print_plan(args, block, data, runs, seconds, jobs, figures):
    """Prints what is to do; of a dry run, by figure and by run. seconds: of the runs to do, by path."""
    def amount(some):
        left = [seconds[run.path] for run in some if run.path in seconds]
        return f"{len(left)} of {len(some)} runs to do, about {duration(sum(left) / jobs)} of training steps"

    where, about = machine(data.device)["device"], data.description
    print(f"{runs[0].experiment}: {amount(runs)}; evaluation and stacking come on top\n  {jobs} at once on {where} "
          f"({data.device.type}), with {about['name']} ({about['source']}; {data.origin})", flush=True)
    for name, figure in figures.items() if args.dry_run else ():
        if some := [run for run in runs if (run.method, run.lam) in plan.runs_of_figure(
                figure, run.configuration, block["configurations"][run.configuration])]:
            print(f"  {name if name.startswith('table') else f'figure {name}'}: {amount(some)}")
    for run in runs if args.dry_run else ():
        print(f"    {run.label}: {'to do' if run.path in seconds else 'finished'}")


# --- Progress ------------------------------------------------------------------------------------


def duration(seconds):
    """Seconds as text, such as 1:02:03."""
    return str(datetime.timedelta(seconds=round(seconds)))


class Progress:
    """Prints a line for each run that ends, and every half minute one for those in training, with the time left."""

    def __init__(self, seconds, jobs):
        self.seconds, self.left, self.jobs = seconds, dict(seconds), jobs       # of each run, by its path
        self.training = {}                  # what is said of a run in training, by its path
        self.began = self.said = time.perf_counter()

    def epoch_ended(self, path, epoch, epochs, text):
        self.training[path], self.left[path] = text, (1 - epoch / epochs) * self.seconds[path]
        if time.perf_counter() - self.said > 30:
            self.say("; ".join(self.training.values()))

    def run_ended(self, run, line):
        """A run has its line, or None if it was skipped."""
        self.training.pop(run.path, None)
        del self.left[run.path]
        if line:
            self.say(line)

    def say(self, line):
        self.said, left = time.perf_counter(), sum(self.left.values())
        worked = sum(self.seconds.values()) - left
        pace = (self.said - self.began) / worked if worked and self.said - self.began > 5 else 1 / self.jobs
        print(f"[{len(self.seconds) - len(self.left)}/{len(self.seconds)}] {line}, about {duration(pace * left)} left",
              flush=True)


def reporter(run, epoch_ended):
    """The report of common.train on a run, as calls of Progress.epoch_ended."""
    part, name = (1, "validation") if run.settings["validation"] else (0, "training")
    epochs = run.settings["epochs"]

    def report(epoch, history):
        error = 100 * history[-1][part]["ensemble_error"]
        epoch_ended(run.path, epoch, epochs, f"{run.label}: epoch {epoch}/{epochs}, {name} error {error:.1f} %")
    return report


# --- Runs at once --------------------------------------------------------------------------------


def run_at_once(to_do, results, do, jobs, seconds):
    """do(run, say) for each run, `jobs` at once, with progress; it returns the line on the run.

    A run that another command trains is skipped, and so is stacking of its members: then the exit status is 1.
    """
    progress = Progress(seconds, jobs)

    def attempt(run, say):
        """The line on a run, or None if it is skipped."""
        if run.method == "stacking" and not folders.has_members(results / run.path_of_members):
            return None
        with folders.locked(results / run.path) as mine:
            if not mine:
                return None
            if run_is_finished(run, results, set_damaged_aside=True):
                return f"{run.label}: finished by another command"
            return do(run, say)

    if jobs > 1:
        in_processes(to_do, attempt, jobs, progress)
    else:
        for run in to_do:
            progress.run_ended(run, attempt(run, progress.epoch_ended))
    if missing := [run for run in to_do if not run_is_finished(run, results)]:
        print(f"runs left to another command, which trains them or their members now: {len(missing)}; give this one "
              "again when that has ended")
        sys.exit(1)


def in_processes(to_do, attempt, jobs, progress):
    """attempt(run, say) for each run, `jobs` at once, in processes that are forked and so share the data in memory.

    Stacking begins when its members are finished. Whatever ends this process ends the others.
    """
    fork = multiprocessing.get_context("fork")
    messages, left, running = fork.SimpleQueue(), list(to_do), {}
    with concurrent.futures.ProcessPoolExecutor(jobs, fork, begin_worker, (attempt, messages)) as pool:
        try:
            while left or running:
                unfinished = {run.path for run in (*left, *running.values())}
                ready = [run for run in left if run.method != "stacking" or run.path_of_members not in unfinished]
                for run in ready:
                    left.remove(run)
                    running[pool.submit(work, run)] = run
                done, _ = concurrent.futures.wait(running, 0.5, concurrent.futures.FIRST_COMPLETED)
                while not messages.empty():
                    progress.epoch_ended(*messages.get())
                for future in done:
                    progress.run_ended(running.pop(future), future.result())
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()                  # a file that has its name is whole: they may end anywhere
            if isinstance(error, BrokenProcessPool):
                raise Refused("a process that trained was ended, maybe by the system for lack of memory (fewer --jobs "
                              "need less); finished runs are kept: give the same command again") from error
            raise


worker = {}         # in a forked process: what it does with a run, which cannot be pickled


def begin_worker(attempt, messages):
    """Readies a forked process. Ctrl-C and SIGTERM often go to all: its parent ends it, or ends, be it by SIGKILL."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    worker.update(attempt=attempt, say=lambda *message: messages.put(message))


def work(run):
    return worker["attempt"](run, worker["say"])


# --- The command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with the docstring as it stands, and bad arguments refused in one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)        # run_all.sh hands each script the flags that it knows

    def error(self, message):
        raise Refused(f"{message}; see --help")


def part_of(text):
    """The parts of a --shard such as 0/4."""
    if not re.fullmatch(r"\d+/\d+", text) or int(text.split("/")[0]) >= int(text.split("/")[1]):
        raise argparse.ArgumentTypeError(f"'{text}' is not I/N with I from 0 to N - 1, such as 0/4")
    return tuple(map(int, text.split("/")))


def parser(description):
    """The flags that training and robustness.py share, with one meaning."""
    p, several = Parser(description), {"nargs": "+", "action": "extend"}
    p.add_argument("--preset", help="paper, short, overnight, quick or smoke: a block of presets.yaml (default: short "
                   "if torch can use a CUDA GPU, else quick)")
    p.add_argument("--figure", **several, metavar="F", help="only the runs of these figures and tables")
    p.add_argument("--only", **several, metavar="NAME", help="only these configurations")
    p.add_argument("--lambdas", **several, metavar="L", type=float, help="only joint training, at these lambdas; a "
                   "single network is the same at each and is trained once, as lambda 1")
    p.add_argument("--trials", type=int, metavar="N", help="N trials of each configuration (default: the preset's)")
    p.add_argument("--data-dir", metavar="DIR", help="a folder with the real data (default: data/, then the system's "
                   "package, then a download into data/)")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="changes all that is random but the split")
    p.add_argument("--jobs", type=int, metavar="N", help="train N runs at once (default: on a CPU one per core, as far "
                   "as memory allows; on a GPU one)")
    p.add_argument("--dry-run", action="store_true", help="print the runs and the time for those to do, and stop")
    return p


def training_parser(description):
    """The flags of a training script."""
    p, several = parser(description), {"nargs": "+", "action": "extend"}
    p.add_argument("--methods", **several, choices=plan.METHODS, metavar="METHOD",
                   help=f"only these methods: {', '.join(plan.METHODS)}")
    p.add_argument("--epochs", type=int, metavar="N", help="the number of epochs (default: the preset's)")
    p.add_argument("--data", choices=plan.POLICIES, help="real: the real data, or stop; auto: the stand-in if they "
                   "cannot be downloaded; synthetic: the stand-in (default: the preset's)")
    p.add_argument("--set", **several, default=[], metavar="KEY=VALUE", help="other values than the preset's, e.g. "
                   "bagging=resample, or CONFIGURATION.KEY=VALUE for one configuration")
    p.add_argument("--tune", action="store_true", help="tune the learning rates on validation error, as the authors "
                   "did, and print them in the format of presets.yaml")
    p.add_argument("--shard", metavar="I/N", default=(0, 1), type=part_of, help="only part I, from 0, of N of the runs")
    p.add_argument("--eager", action="store_true", help="on CUDA, launch each step, which is slower, instead of "
                   "replaying a captured one")
    p.add_argument("--deterministic", action="store_true", help="on CUDA, use only kernels that repeat exactly")
    p.add_argument("--fetch", action="store_true", help="get the data and stop (exit status 3: the stand-in)")
    return p


def choose_preset(name, device):
    """The preset, by default one that fits the device: `paper` takes weeks of a GPU and is asked for by name."""
    return name or ("short" if device.type == "cuda" else "quick")


def figure_names(words, figures):
    """The names of figures as FIGURES has them: 2, fig2 or figure2 -> 2; table2."""
    return [word if word in figures else plan.checked_name(
        re.sub("^fig(ure)?", "", word.lower()) or word, figures, "figure or table") for word in words or []]


def prepare(experiment, args):
    """What the command line selects: the experiment's settings, a function from a run to its data, and the runs."""
    device = choose_device(args.device, args.jobs)
    name = choose_preset(args.preset, device)
    preset = plan.load_preset(name)
    own = [f"{key}={value}" for key in ("trials", "epochs") if (value := getattr(args, key)) is not None]
    block = plan.experiment_settings(preset, name, experiment.name, args.set + own)
    for word in args.only or []:
        plan.checked_name(word, block["configurations"], "configuration")
    if args.lambdas:
        plan.check("lambdas", args.lambdas, [], "--lambdas")
    if args.deterministic:                              # only kernels that repeat exactly
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # PyTorch asks for one of two
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False     # no number here is read before it is written
    for c in block["configurations"].values():
        if c.get("precision") == "auto":
            c["precision"] = "bf16" if bf16_is_fast(device) else "fp32"
    runs = plan.list_runs(name, experiment, block, None, args.seed, args.only, args.lambdas, args.methods,
                          figure_names(args.figure, experiment.figures))
    if args.tune:
        runs = plan.tuning_runs(runs, block["tune"])
    dataset, policy = block["dataset"], args.data or preset["data"]
    found = folders.find_data(dataset, policy, args.data_dir, not args.dry_run)
    if args.fetch:
        print(f"data: {dataset}: {found.origin if found else 'the synthetic stand-in'}")
        sys.exit(0 if found or policy == "synthetic" else 3)
    with errors_in_one_line():
        data = {classes: folders.cut_data(found, dataset, policy, block | {"classes": classes}).to(device)
                for classes in {run.settings["classes"] for run in runs}}

    def data_of(run):
        return data[run.settings["classes"]]

    if loss := experiment.loss_setting(min(each.classes for each in data.values())):
        print(f"loss: {loss['loss']} trains as it is written, in place of Eq. 4 and its quick form", flush=True)
    runs = [replace(run, settings=run.settings | {"data": data_of(run).description} | loss) for run in runs]
    return block, data_of, plan.shard(runs, *args.shard)


def train_study(experiment, args):
    """What a training script does: trains the selected runs that are not in their folders yet."""
    cores, results = torch.get_num_threads(), args.results
    if args.tune and args.shard[1] > 1:
        raise Refused("--tune compares all runs of a configuration: leave --shard out")
    block, data_of, runs = prepare(experiment, args)
    if not runs:
        print(f"{experiment.name}: no run of this selection is in part {args.shard[0]}/{args.shard[1]}")
        return
    to_do = runs_to_do(runs, results)
    seconds = estimate(experiment, to_do, data_of, args.eager)
    jobs = runs_at_once(to_do, data_of, args.jobs, cores)
    print_plan(args, block, data_of(runs[0]), runs, seconds, jobs, experiment.figures)
    if args.dry_run:
        return

    def do(run, say):
        return summary_line(run, do_run(experiment, run, data_of(run), results, reporter(run, say), args.eager))

    run_at_once(to_do, results, do, jobs, seconds)
    if args.tune:
        print_tuned(runs, results)


def command_line(main):
    """Runs a script's `main`; bad input becomes one line on stderr and exit status 2, Ctrl-C 130, SIGTERM 143."""
    def stop(number, frame):
        signal.signal(number, signal.SIG_IGN)           # a second one, of whoever signals all, would disturb the end
        raise KeyboardInterrupt(number)

    status, text = 0, ""
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(errors="replace")            # a λ in a locale that has none
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
    except Refused as error:
        status, text = 2, f"error: {error}"
    except BrokenPipeError:                             # the reader of the output, such as head, has enough
        os._exit(1)                                     # (Python's own end would write what is left)
    except OSError as error:                            # no access, a full disk, a folder that went away
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        status, text = 2, f"error: {what}; finished runs are kept: mend this, and give the same command again"
    except KeyboardInterrupt as stopped:
        status = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        text = ("\nstopped; finished runs are kept, and of the others all but the last minute or epoch: give the same "
                "command again to go on")
    if status:
        print(text, file=sys.stderr)
        sys.exit(status)
