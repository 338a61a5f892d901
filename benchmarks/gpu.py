"""Is this GPU all right, and how fast is it? Assertions, then times of full-size training steps; about ten minutes.

    python benchmarks/gpu.py                        # exit status 1 if an assertion fails
    python benchmarks/gpu.py --csv FILE             # writes the times as well
    python benchmarks/gpu.py --assertions           # these alone, about three minutes
    python benchmarks/gpu.py --seconds 200          # the times that begin within 200 s; the most telling come first

Asserted: a captured step is an eager step and a step on the CPU, within the error of the precision; evaluation between
steps and a shorter last batch change nothing; rate 0 moves nothing; runs that end give their memory back; a run that
is resumed is the run in one go, to the bit, with --deterministic; the preset `smoke` ends with status 0.

Timed: "as it is" is what training does: the members share eight streams, which a GPU runs at the same time. Other rows
change that: another number of streams; "benchmark", cuDNN times its kernels and takes the fastest; "compiled", by
torch.compile, member by member. benchmarks/h200_first.csv has two more that brought no more: plain instead of channels
last, and all weights cast to bf16 in one call.

Each is a step of the paper's size as a replayed graph, beside the floor of benchmarks/bench.py. "off" is how far its
weights move away from those of "as it is", in percent of the way; kernels_ms adds up the times of all kernels; peak_GB
is of the eager steps before, since a replay allocates nothing. Without a GPU both parts run at the size of `smoke` on
the CPU: that says whether this script works, and nothing else.
"""

import contextlib
import csv
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import study
import common
import fast
import folders
import presets

import bench
import torch

ONE_OF = {name: experiment for experiment in bench.EXPERIMENTS for name in presets.load_preset("paper")[experiment][
    "configurations"]}


def a_run(name, preset, precision="fp32", **changes):
    """The experiment and a joint run of a configuration, at the size of a preset."""
    experiment = bench.EXPERIMENTS[ONE_OF[name]]
    block = presets.experiment_settings(presets.load_preset(preset), preset, experiment.name)
    settings = bench.Case(experiment, name, block, None).settings(precision) | {"train": None} | changes
    return experiment, study.Run("gpu", experiment.name, name, "joint", bench.LAMBDA, 0, settings, weights=True)


def stand_in(experiment, train, test, device):
    shape, classes = ((1, 28, 28), 10) if experiment.name == "mlp_fmnist" else ((3, 32, 32), 100)
    return common.synthetic(classes, shape, train, test).to(device)


def flat(ensemble):
    return torch.cat([p.detach().flatten() for p in ensemble.parameters()])


# --- Is it right? --------------------------------------------------------------------------------


def few_steps(case, device, eager):
    """Nine steps, the third of each epoch on an odd batch: how far the weights move, the mean member loss of the last
    epoch, and whether a step at rate 0 leaves the weights alone."""
    experiment, run = case
    data = stand_in(experiment, 80, 40, device)                             # batches of 32, 32 and 16
    ensemble, optimizer = common.new_ensemble(experiment.build, run, data)
    scores = common.Scores(run.settings["members"], device)
    batches = common.Batches(run, data, torch.arange(80, device=device))
    step = common.stepper(run, ensemble, optimizer, scores, batches, eager)
    start = flat(ensemble)

    def set_rate(rate):
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else rate
    for epoch in range(1, 4):
        set_rate(0.1 / epoch)
        ensemble.train()
        scores.reset()
        for rows in batches.epoch():
            step(rows)
        common.evaluate(ensemble, data, data.test_images, data.test_labels)
    ensemble.train()
    weights, loss = flat(ensemble), scores.summary()["mean_member_loss"]
    set_rate(0.0)
    step(torch.arange(32, device=device))
    return (weights - start).cpu(), loss, torch.equal(flat(ensemble), weights)


def steps_agree(device):
    """(what, whether it holds, figures): captured, eager and CPU steps of each kind of network and batch."""
    for name, precision, bagging in (
            ("256x4H", "fp32", None), ("256x4H", "fp32", "weights"), ("DN-Low", "fp32", None),
            ("DN-Low", "fp32", "resample"), ("DN-Low", "bf16", None), ("ConvNet-0.29M", "fp32", None),
            ("ConvNet-0.29M", "bf16", None)):
        case = a_run(name, "smoke", precision, batch=32, bagging=bagging)
        (captured, loss, still), (eager, other_loss, _) = (few_steps(case, device, way) for way in (False, True))
        cpu, cpu_loss, _ = few_steps(case, torch.device("cpu"), True)
        off, far = (((one - other).norm() / other.norm()).item() for one, other in ((captured, eager), (eager, cpu)))
        near, wide = (1e-3, 2e-2) if precision == "fp32" else (2e-2, 0.2)       # shares of the way that weights move
        holds = (off < near and far < wide and still and math.isclose(loss, other_loss, rel_tol=near)
                 and math.isclose(loss, cpu_loss, rel_tol=5 * near))
        yield (f"steps of {name} {precision}{f', bagging by {bagging}' * bool(bagging)}", holds,
               f"captured and eager apart by {100 * off:.2g} % of the way, eager and CPU by {100 * far:.2g} %; rate 0 "
               f"{'moves nothing' if still else 'MOVES THE WEIGHTS'}")


def memory_returns(device):
    """(what, whether it holds, figures): three runs in a row reserve no more than two."""
    reserved = []
    for _ in range(3):
        few_steps(a_run("DN-Low", "smoke", batch=32), device, eager=False)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved() / 2**20 if device.type == "cuda" else 0)
    yield ("memory after each of three runs", reserved[2] <= reserved[1] + 64,
           f"{', '.join(f'{each:.0f}' for each in reserved)} MiB reserved")


class Interrupted(Exception):
    pass


def resume(device, folder):
    """Exits with status 0 if a run that stops after its second epoch and goes on equals a run in one go, to the bit."""
    study.choose_device(device.type)
    study.be_deterministic()
    folders.CHECKPOINT_SECONDS = 0
    experiment, run = a_run("DN-Low", "smoke", batch=32, epochs=4)
    data = stand_in(experiment, 80, 40, device)

    def stop(epoch, history):
        if epoch == 3:
            raise Interrupted
    whole, parts = Path(folder, "whole"), Path(folder, "parts")
    folders.run_missing([run], whole, lambda run: study.do_run(experiment, run, data, whole))
    with contextlib.suppress(Interrupted):
        folders.run_missing([run], parts, lambda run: study.do_run(experiment, run, data, parts, stop))
    assert (parts / run.path / "checkpoint.pt").is_file()
    folders.run_missing([run], parts, lambda run: study.do_run(experiment, run, data, parts))
    one, other = (folders.load_weights(place / run.path, "cpu") for place in (whole, parts))
    sys.exit(not all(torch.equal(one[key], other[key]) for key in one))


def resumes(device):
    """(what, whether it holds, figures), from a process of its own: its settings are of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("spawn").Process(target=resume, args=(device, folder))
        child.start()
        child.join()
    yield "a run that is resumed, --deterministic", child.exitcode == 0, f"exit status {child.exitcode}"


def smoke(device):
    """The preset `smoke` on this device, started; `ended` waits for it."""
    folder = tempfile.TemporaryDirectory()
    command = ["bash", folders.HERE / "run_all.sh", "smoke", "--device", device.type, "--results",
               f"{folder.name}/results", "--figures-dir", f"{folder.name}/figures"]
    return folder, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(folder, process):
    """(what, whether it holds, figures) of the preset `smoke`."""
    said, _ = process.communicate()
    folder.cleanup()
    lines = said.splitlines() or [""]
    eagerly = sum("going on with --eager" in line for line in lines)
    good = process.returncode == 0 and not eagerly
    yield "run_all.sh smoke", good, f"exit status {process.returncode}, {eagerly} steps not captured; {lines[-1]}" + (
        "" if good else "\n" + "\n".join(lines[-30:]))


def assertions(device):
    """Whether all of them hold; each is printed as it is known."""
    started = smoke(device) if device.type == "cuda" else None          # (on a CPU the tests run it)
    good = True
    for check in (steps_agree(device), memory_returns(device), resumes(device), ended(*started) if started else ()):
        for what, holds, figures in check:
            good &= bool(holds)
            print(f"{'ok    ' if holds else 'FAILED'} {what}: {figures}", flush=True)
    return good


# --- How fast is it? -----------------------------------------------------------------------------


ROWS = [                                # (network, precision, what is different): the most telling first
    ("256x4H", "fp32", {}), ("DN-Low", "bf16", {}), ("DN-Low", "bf16", {"streams": 1}), ("DN-Low", "fp32", {}),
    ("DN-Low", "fp32", {"streams": 1}), ("DN-High", "bf16", {}), ("DN-High", "bf16", {"streams": 1}),
    ("DN-High", "fp32", {}), ("DN-High", "fp32", {"streams": 1}), ("ConvNet-0.29M", "bf16", {}),
    ("ConvNet-0.29M", "bf16", {"streams": 1}), ("ConvNet-0.29M", "fp32", {}), ("ConvNet-0.29M", "fp32", {"streams": 1}),
    *((name, precision, {}) for name in ("1x1024H", "16x64H", "64x16H", "DN-Mid", "ConvNet-0.07M", "ConvNet-0.14M",
                                         "ConvNet-0.60M", "ConvNet-1.20M", "10xConvNet-0.29M")
      for precision in ("fp32", "bf16") if not name.endswith("H") or precision == "fp32"),
    *((name, precision, {"streams": count}) for name, precision in (
        ("DN-Low", "bf16"), ("DN-Low", "fp32"), ("ConvNet-0.29M", "bf16"), ("ConvNet-0.29M", "fp32"))
      for count in (4, 16)),
    ("DN-Low", "fp32", {"benchmark": True}), ("ConvNet-0.29M", "fp32", {"benchmark": True}),
    ("ConvNet-0.29M", "bf16", {"compiled": True}), ("DN-Low", "bf16", {"compiled": True}),
]


def milliseconds(work, device):
    """The median time of a call, of up to twenty within two seconds."""
    times = []
    while len(times) < 3 or (len(times) < 20 and sum(times) < 2000):
        times.append(1000 * bench.seconds_per(work, 1, device))
    return sorted(times)[len(times) // 2]


def kernels(work):
    """How many kernels a replay runs, and their times added up, in ms: more than the step's if they overlap."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"kernels": len(events), "kernels_ms": sum(event.device_time_total for event in events) / 1000}


def row_of(name, precision, changes, device, rates, references):
    """Times one way of one network."""
    cuda, began, others = device.type == "cuda", time.perf_counter(), torch.cuda.memory_allocated()
    experiment, run = a_run(name, "paper" if cuda else "smoke", precision)
    batch = run.settings["batch"]
    data = stand_in(experiment, 2 * batch, 8, device)
    ensemble, optimizer = common.new_ensemble(experiment.build, run, data)
    if changes.get("compiled"):
        for member in ensemble.members:
            member.compile(dynamic=False)
    torch.backends.cudnn.benchmark = changes.get("benchmark", False)
    scores = common.Scores(run.settings["members"], device)
    batches = common.Batches(run, data, torch.arange(2 * batch, device=device))
    rows = torch.arange(batch, device=device)
    eager = common.stepper(run, ensemble, optimizer, scores, batches, eager=True)
    ensemble.train()
    row = {"network": name, "precision": precision, "way": ", ".join(
        key if value is True else f"{value} {key}" for key, value in changes.items()) or "as it is"}
    if cuda:                # of the eager steps: a replay allocates nothing
        torch.cuda.reset_peak_memory_stats()
        step = fast.captured(eager, ensemble, optimizer, scores, rows)      # refuses a replay that differs
        row["peak_GB"] = (torch.cuda.max_memory_allocated() - others) / 1e9
    else:
        step = eager
    start = flat(ensemble)
    step(rows.clone())
    moved = flat(ensemble) - start
    base = references.setdefault((name, precision), moved)
    row |= {"made_s": time.perf_counter() - began, "off_percent": 100 * ((moved - base).norm() / base.norm()).item()}
    step(rows.clone())
    row["step_ms"] = milliseconds(lambda: step(rows), device)
    row["again_ms"] = milliseconds(lambda: step(rows), device)      # what differs between the two is noise
    if not changes:
        row["eager_ms"] = milliseconds(lambda: eager(rows), device)
        if cuda:
            row |= kernels(lambda: step(rows))
        block = presets.experiment_settings(presets.load_preset("paper" if cuda else "smoke"), "", experiment.name)
        floor = bench.floors(bench.Case(experiment, name, block, data), [precision], rates)
        row["floor_ms"] = 1000 * min(floor[name, precision]() for _ in range(3))
        row["times_floor"] = row["step_ms"] / row["floor_ms"]
    return row


def times(device, seconds):
    """The rows, printed as they come, of those that begin within `seconds`."""
    measured = {name: max(rate() for _ in range(5)) for name, rate in bench.machine_rates(device).items()}
    rates = {name: lambda rate=rate: rate for name, rate in measured.items()}
    print("rates: " + ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in measured.items())
          + " (TFLOP/s of a large product, TB/s of a large copy)", flush=True)
    began, usual, references, rows = time.perf_counter(), fast.STREAMS, {}, []
    for name, precision, changes in ROWS:
        if time.perf_counter() - began > seconds:
            print(f"{name} {precision} {changes}: no time left", flush=True)
            continue
        fast.STREAMS = changes.get("streams", usual)
        try:
            row = row_of(name, precision, changes, device, rates, references)
        except (RuntimeError, OSError) as error:        # one way that fails does not end the others
            print(f"{name} {precision} {changes}: FAILED, {type(error).__name__}: {str(error).splitlines()[0]}",
                  flush=True)
            continue
        finally:
            bench.give_back(device)
        rows.append(row)
        print("  ".join([f"{row['network']:14s}", row["precision"], f"{row['way']:22s}",
                         *(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, (int, float)))]),
              flush=True)
    return rows


def best(rows):
    """A line for each network and precision with several ways: the fastest."""
    for key in dict.fromkeys((row["network"], row["precision"]) for row in rows):
        first, *others = [row for row in rows if (row["network"], row["precision"]) == key]
        if others:
            least = min((first, *others), key=lambda row: row["step_ms"])
            share = least["step_ms"] / first["step_ms"]
            print(f"{' '.join(key)}: fastest is \"{least['way']}\", in {share:.2f} of the time of \"{first['way']}\"")


# --- main ----------------------------------------------------------------------------------------


def main():
    p = study.Parser(__doc__)
    p.add_argument("--assertions", action="store_true", help="no times")
    p.add_argument("--seconds", type=study.argument(float, (lambda s: s >= 0, "a number of at least 0")), default=360,
                   metavar="N", help="no row begins later than N seconds after the first (default: 360)")
    p.add_argument("--csv", type=Path, metavar="FILE", help="write the times here")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    args = p.parse_args()
    device, driver = study.choose_device(args.device), ""
    if device.type == "cuda":
        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                                capture_output=True, text=True).stdout.split("\n")[0]
    about = {**folders.machine(device), "driver": driver, "cuda": torch.version.cuda or "",
             "date": date.today().isoformat()}
    print(f"{about['device']}, driver {driver or 'none'}, torch {about['torch']}, CUDA {about['cuda'] or 'none'}"
          + (": A REHEARSAL on the CPU, at the size of smoke" if device.type == "cpu" else ""), flush=True)
    good = assertions(device)
    if not args.assertions:
        rows = times(device, args.seconds)
        best(rows)
        if args.csv:
            with open(args.csv, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [*dict.fromkeys(key for row in rows for key in row), *about],
                                        lineterminator="\n")
                writer.writeheader()
                writer.writerows(row | about for row in rows)
    print("all assertions hold" if good else "NOT ALL assertions hold")
    sys.exit(not good)


if __name__ == "__main__":
    study.command_line(main)
