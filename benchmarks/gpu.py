"""Is this GPU all right, and how fast is it? Checks, about two minutes; then times of steps at the paper's size.

    python benchmarks/gpu.py                        # exit status 1 if a check fails
    python benchmarks/gpu.py --networks DN-High     # only these networks; --part checks or times: only this part
    python benchmarks/gpu.py --kernels              # DN-High and DN-Low with other options of their kernels

Checked: a captured step is an eager step and a step on the CPU, within the error of the precision; all members of a
DenseNet at once (fast_densenet.py) are as near to fp32 as the loop over them; runs that end give their memory back; a
run that is resumed is the run in one go, to the bit, with --deterministic; the preset `smoke` ends with status 0.

Timed, the most telling first: a captured step of the DenseNets in bf16, all members at once and as the loop on streams;
of the ConvNets in bf16, fp32 and TF32; of the MLPs. step_ms is a median, least_ms the fastest, eager_ms of a step
launched from Python, floor_ms that of bench.py; kernels_ms adds up all kernels, more than a step takes if they overlap;
peak_GB is of the eager steps before: a replay allocates nothing. Each row goes into the CSV at once.

Checks and DenseNets have processes of their own: a kernel that fails ends no other. Without a GPU, what a CPU can do
runs there on three networks at the size of `smoke`: that says whether this script works, and nothing else.
"""

import contextlib
import gc
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import study
import common
import fast
from study import command, finished, folders, plan

import bench
import torch

DENSENETS = "DN-High", "DN-Low", "DN-Mid"
CONVNETS = "ConvNet-0.29M", "ConvNet-1.20M", "ConvNet-0.60M", "ConvNet-0.14M", "ConvNet-0.07M", "10xConvNet-0.29M"
MLPS = "256x4H", "1x1024H", "16x64H", "64x16H"
NETWORKS, REHEARSED = DENSENETS + CONVNETS + MLPS, ("DN-High", "ConvNet-0.29M", "256x4H")
AT_ONCE, LOOP = "all members at once", "members on streams"
KERNELS = [     # fast_densenet.OPTIONS, and what to try in their place
    {}, {"conv": {"num_warps": 8}}, {"conv_backward": {"num_stages": 1}},
    {"conv_backward": {"num_warps": 8, "num_stages": 1}}, {"bottleneck_backward": {"num_stages": 1}}]


def flat(ensemble):
    return torch.cat([p.detach().flatten() for p in ensemble.parameters()])


def apart(one, other):
    """The distance of two vectors, as a share of the length of the second."""
    return ((one - other).norm() / other.norm()).item()


# --- Processes -----------------------------------------------------------------------------------


def start(work, *arguments):
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def ended_well(process, what, deadline):
    """Waits for a process until the deadline, and ends it then. Says what went wrong."""
    process.join(max(0, deadline - time.monotonic()))
    why = "no time left" if process.exitcode is None else f"exit status {process.exitcode}"
    process.terminate()
    process.join()
    if process.exitcode:
        print(f"FAILED {what}: {why}", flush=True)
    return process.exitcode == 0


def in_one_line(error):
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {error}".split("\n")[0]


# --- Is it right? A check yields (what, whether it holds, figures) -------------------------------


def report(check, kind, *arguments):
    """Prints what a check finds; in a process of its own, with exit status 1 unless all of it holds."""
    good = True
    try:
        device = study.choose_device(kind)
        torch.backends.cudnn.allow_tf32 = False         # what is said of fp32 is of fp32
        for what, holds, figures in check(device, *arguments):
            good &= holds
            print(f"{'ok    ' if holds else 'FAILED'} {what}: {figures}", flush=True)
    except Exception as error:          # also of a CUDA context that is lost
        good = False
        print(f"FAILED {check.__name__}: {in_one_line(error)}", flush=True)
    sys.exit(not good)


def few_steps(name, device, precision, eager=True, **changes):
    """Two epochs, each of two steps and one on an odd batch: how far weights move, and the last mean member loss."""
    case = bench.new_case(name, "smoke", device, batches=2.5, test=40, batch=32, epochs=2, decay=[0.5], validation=0,
                          precision=precision, growth=6, **changes)      # DN-Low's: that of smoke is never at once
    start, _ = common.new_ensemble(case.experiment.build, case.run, case.data)
    ensemble, history, *_ = common.train(case.experiment.build, case.run, case.data, eager=eager)
    return (flat(ensemble) - flat(start)).cpu(), history[-1][0]["mean_member_loss"]


def steps_agree(device):
    cpu = torch.device("cpu")
    for name, precision, bagging in (
            ("256x4H", "fp32", None), ("256x4H", "fp32", "weights"), ("DN-Low", "fp32", "resample"),
            ("DN-Low", "bf16", None), ("ConvNet-0.29M", "fp32", None), ("ConvNet-0.29M", "bf16", None)):
        truth, _ = few_steps(name, cpu, "fp32", bagging=bagging)
        rounding = 0.01 if precision == "fp32" else apart(few_steps(name, cpu, precision, bagging=bagging)[0], truth)
        captured, loss = few_steps(name, device, precision, eager=False, bagging=bagging)
        eager, other_loss = few_steps(name, device, precision, bagging=bagging)
        near, far = apart(captured, eager), apart(eager, truth)
        holds = near <= rounding and far <= 3 * rounding and abs(loss - other_loss) <= 0.01 * other_loss
        yield (f"steps of {name} {precision}{f', bagging by {bagging}' * bool(bagging)}", holds,
               f"captured and eager {100 * near:.2g} % of the weights' way apart (at most {100 * rounding:.2g}), eager "
               f"and the CPU in fp32 {100 * far:.2g} % (at most {300 * rounding:.2g})")


def at_once_agrees(device, name):
    """Two steps of the paper's network, on 16 images each."""
    moved, logits = {}, {}
    for form in ("truth", LOOP, AT_ONCE):
        case = bench.new_case(name, "paper", device, batch=16, precision="fp32" if form == "truth" else "bf16")
        ensemble, optimizer, scores, batches = case.ready()
        if form == LOOP:
            ensemble.joined = None
        assert bool(ensemble.joined) == (form == AT_ONCE)
        step, before = common.stepper(case.run, ensemble, optimizer, scores, batches, eager=True), flat(ensemble)
        for rows in batches.epoch():
            step(rows)
        moved[form] = flat(ensemble) - before
        logits[form] = common.predict(ensemble, case.data, case.data.test_images)
    for what, found in (("the way of the weights", moved), ("test logits", logits)):
        off, usual = (apart(found[form], found["truth"]) for form in (AT_ONCE, LOOP))
        yield (f"{name}, all members at once, {what}", off <= 2 * usual,
               f"{100 * off:.2g} % off the loop in fp32 (the loop in bf16: {100 * usual:.2g} %)")


def memory_returns(device):
    reserved = []
    for _ in range(3):
        few_steps("DN-Low", device, "bf16", eager=False)
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved() / 2**20)
    yield ("memory after each of three runs", reserved[2] <= reserved[1] + 64,
           f"{', '.join(f'{each:.0f}' for each in reserved)} MiB reserved")


def resumes(device, precision, folder):
    """A run that stops in its third epoch and goes on is a run in one go."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"       # these three as --deterministic has them
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    folders.CHECKPOINT_SECONDS = 0
    case = bench.new_case("DN-Low", "smoke", device, batches=2.5, batch=32, epochs=4, growth=6, precision=precision)
    whole, parts = Path(folder, precision, "whole"), Path(folder, precision, "parts")

    def train(results, report=lambda epoch, history: None):
        (results / case.run.path).mkdir(parents=True, exist_ok=True)
        command.do_run(case.experiment, case.run, case.data, results, report)

    def stop(epoch, history):
        if epoch == 3:
            raise InterruptedError

    train(whole)
    with contextlib.suppress(InterruptedError):
        train(parts, stop)
    assert (parts / case.run.path / "checkpoint.pt").exists()
    train(parts)
    one, other = (folders.load_weights(results / case.run.path) for results in (whole, parts))
    differ = sum(not torch.equal(one[key], other[key]) for key in one)
    yield f"a resumed run of DN-Low {precision}, --deterministic", not differ, f"{differ} tensors of {len(one)} differ"


def smoke(device, folder, seconds):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["timeout", str(seconds), "bash", folders.HERE / "run_all.sh", "smoke", "--device", device.type, "--results",
         f"{folder}/results", "--figures-dir", f"{folder}/figures"], capture_output=True, text=True,
        env=os.environ | {"PATH": path})
    good = done.returncode == 0
    yield "run_all.sh smoke", good, done.stdout.splitlines()[-1] if good else f"{done.stdout}\n{done.stderr}"


def checks(device, networks, deadline):
    """Whether all checks hold, which run at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"steps": (steps_agree,), "resumed run": (resumes, "fp32", folder)}
        if device.type == "cuda":       # (on a CPU members are never at once, and the tests run smoke)
            wanted |= {"memory": (memory_returns,), "resumed run, at once": (resumes, "bf16", folder),
                       "smoke": (smoke, folder, deadline - time.monotonic() - 10)}
            wanted |= {f"{name} at once": (at_once_agrees, name) for name in networks if name in DENSENETS}
        started = {what: start(report, check, device.type, *more) for what, (check, *more) in wanted.items()}
        good = all([ended_well(process, what, deadline) for what, process in started.items()])
    print("all checks hold" if good else "NOT ALL checks hold", flush=True)
    return good


# --- How fast is it? -----------------------------------------------------------------------------


def milliseconds(work, device):
    """The median and the least time of a call, of up to twenty within a second."""
    found = []
    while len(found) < 3 or (len(found) < 20 and sum(found) < 1000):
        found.append(1000 * bench.seconds_per(work, device, 1))
    return statistics.median(found), min(found)


def kernels(work):
    """The kernels of a replay, in a list of (name, launches, ms), the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    found = [(event.key, event.count, event.device_time_total / 1000) for event in profile.key_averages()
             if event.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(found, key=lambda kernel: -kernel[2])


def row_of(device, rates, name, precision, way, options):
    """Times one way of one network: its row, and its kernels."""
    if options:
        from fast_densenet import OPTIONS
        for kernel, changes in options.items():
            OPTIONS[kernel] |= changes
    began, cuda, size = time.perf_counter(), device.type == "cuda", "paper" if device.type == "cuda" else "smoke"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    case = bench.new_case(name, size, device, precision="bf16" if precision == "bf16" else "fp32")
    ensemble, optimizer, scores, batches = case.ready()
    if way == LOOP:
        ensemble.joined = None
    step = eager = common.stepper(case.run, ensemble.train(), optimizer, scores, batches, eager=True)
    rows, found = batches.epoch()[0], []
    row = {"network": name, "precision": precision, "way": way, "options": str(options or "")}
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        step = fast.captured(eager, ensemble, optimizer, scores, rows.clone())      # refuses a replay that differs
        row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    row["made_s"] = time.perf_counter() - began
    row["step_ms"], row["least_ms"] = milliseconds(lambda: step(rows), device)
    if cuda:
        row["eager_ms"], _ = milliseconds(lambda: eager(rows), device)
        found = kernels(lambda: step(rows))
        row |= {"kernels": sum(count for _, count, _ in found), "kernels_ms": sum(ms for *_, ms in found)}
    if precision != "tf32":             # its rate is not measured
        row["floor_ms"] = 1000 * bench.least_seconds(case)(rates)
    return row, found


def time_ways(kind, rates, ways, about, path, by_kernel):
    """Times ways (network, precision, way, options) one after the other, in a process of its own."""
    device = study.choose_device(kind)
    for way in ways:
        what = " ".join(str(part) for part in way if part)
        try:
            gc.collect()
            torch.cuda.empty_cache()
            row, found = row_of(device, rates, *way)
        except Exception as error:      # one way that fails does not end the others, unless the CUDA context is lost
            print(f"{what}: FAILED, {in_one_line(error)}", flush=True)
            continue
        numbers = [f"{key} {value:.4g}" for key, value in row.items() if not isinstance(value, str)]
        print(f"{what}:", ", ".join(numbers), flush=True)
        for kernel, launches, ms in found[:12] if by_kernel else ():
            print(f"    {ms:.3f} ms in {launches} of {kernel[:90]}", flush=True)
        finished.write_csv(path, [*(finished.read_csv(path) if path.exists() else []), row | about])


def jobs(networks, cuda, by_kernel):
    """Lists of ways (network, precision, way, options), the most telling first. Each is for one process."""
    dense, conv, mlp = ([name for name in some if name in networks] for some in (DENSENETS, CONVNETS, MLPS))
    if by_kernel:
        return [[(name, "bf16", AT_ONCE, options)] for options in KERNELS for name in dense]
    lists = [[(name, "bf16", form, {})] for name in dense for form in ((AT_ONCE, LOOP) if cuda else (LOOP,))]
    lists.append([(name, precision, LOOP, {}) for name in conv for precision in ("bf16", "fp32", "tf32")])
    lists.append([(name, "fp32", "one module", {}) for name in mlp])
    return [ways for ways in lists if ways]


def times(device, networks, by_kernel, path, about, deadline):
    rates = bench.machine_rates(device)
    torch.cuda.empty_cache()
    print(f"rates: {rates['fp32'] / 1e12:.2f} and {rates['bf16'] / 1e12:.2f} TFLOP/s of a large product in fp32 and "
          f"bf16, {rates['copy'] / 1e12:.2f} TB/s of a large copy", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for ways in jobs(networks, device.type == "cuda", by_kernel):
        process = start(time_ways, device.type, rates, ways, about, path, by_kernel)
        ended_well(process, "times from {} {} {} on".format(*ways[0]), deadline)


# --- main ----------------------------------------------------------------------------------------


def main():
    p, several = command.Parser(__doc__), {"nargs": "+", "action": "extend"}
    p.add_argument("--part", choices=("checks", "times"), help="only this part")
    p.add_argument("--networks", **several, metavar="NAME", help="only these (default: all)")
    p.add_argument("--kernels", action="store_true", help="times of other options of the DenseNets' kernels")
    p.add_argument("--seconds", type=float, default=900, metavar="N", help="end after N seconds (default: 900)")
    p.add_argument("--csv", type=Path, default=Path("results/gpu.csv"), metavar="FILE", help="add times here")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: auto")
    args = p.parse_args()
    deadline, device = time.monotonic() + args.seconds, study.choose_device(args.device)
    cuda = device.type == "cuda"
    if args.kernels and not cuda:
        raise common.Refused("--kernels needs a CUDA GPU")
    usual = DENSENETS[:2] if args.kernels else NETWORKS if cuda else REHEARSED
    networks = [plan.checked_name(name, NETWORKS, "network") for name in args.networks or usual]
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    driver = subprocess.getoutput(query).split("\n")[0] if cuda else ""
    about = study.machine(device) | {"driver": driver, "cuda": torch.version.cuda or "", "date": str(date.today())}
    print(f"{about['device']}, driver {driver or 'none'}, torch {about['torch']}, CUDA {about['cuda'] or 'none'}"
          + (": A REHEARSAL on the CPU, at the size of smoke" * (not cuda)), flush=True)
    good = args.part == "times" or checks(device, networks, min(deadline, time.monotonic() + 300))
    if args.part != "checks":
        times(device, networks, args.kernels, args.csv, about, deadline)
    sys.exit(not good)


if __name__ == "__main__":
    command.command_line(main)
