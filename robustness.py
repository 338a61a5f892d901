"""Robustness to dropped members (Sec. 5): the test error of the members that are left of a trained ensemble.

A random subset of the members answers for every test example, 20 times over. The claim: at lambda 0.99 the 256x4H
ensemble is as accurate as end-to-end training (lambda 1) and stays so with more than half of its members dropped, while
the end-to-end ensemble falls apart.

    python robustness.py                        # every run whose weights were kept
    python robustness.py --figure 7             # only the runs of Figure 7
    python make_figures.py 7 8

Nothing is trained. One random order of the members gives every number of survivors: the logits summed along it.
"""

import functools
import hashlib
import shlex
import time

import train_mlp_fmnist
from study import command, folders, plan
from common import Refused, predict

import numpy as np
import torch

# --- What is dropped -----------------------------------------------------------------------------

DROPS = {
    "example": "a random subset of the members for every test example, as the paper says (default)",
    "set": "one random subset for the whole test set, as the authors' code has it",
}


def wrong_by_survivors(member_logits, targets, order):
    """(N, M) bool: column s - 1 tells which examples the first s members of their order get wrong.

    member_logits (N, M, K), targets (N,), order (N, M): each row a permutation of the members.
    """
    wrong = []
    for z, y, o in zip(member_logits.split(500), targets.split(500), order.split(500), strict=True):
        rows = o + torch.arange(len(o), device=o.device)[:, None] * o.shape[1]
        sums = z.flatten(0, 1)[rows.flatten()].view_as(z).cumsum_(1)    # same argmax as the mean
        wrong.append(sums.max(2).indices != y[:, None])
    return torch.cat(wrong)


def repeat(member_logits, targets, drop, generator):
    """The test error (M,) of one repeat, by the number of members dropped, 0 to M - 1."""
    n, members, _ = member_logits.shape
    if drop == "set":
        order = torch.randperm(members, generator=generator).expand(n, -1)
    else:
        order = torch.rand(n, members, generator=generator).argsort(1)
    return wrong_by_survivors(member_logits, targets, order.to(targets.device)).double().mean(0).flip(0)


# --- The runs ------------------------------------------------------------------------------------

FIGURES = {name: train_mlp_fmnist.FIGURES[name] for name in ("7", "8")}


def runs_to_measure(preset, args, repeats):
    """(run, run.json, folder): `run` is to measure a finished joint run of the preset that kept its weights."""
    figures = [FIGURES[name] for name in command.figure_names(args.figure, FIGURES)]
    for folder in folders.run_folders(args.results / preset, "*/*/joint-*"):
        record, weights = folders.read_run(folder), folder / "weights.pt"
        name, lam, trial = record["configuration"], record["lambda"], record["trial"]
        if (weights.exists() and (not args.only or name in args.only) and (not args.lambdas or lam in args.lambdas)
                and (not args.trials or trial < args.trials)
                and (not figures or any(folder.parent.name in figure.get(name, ()) for figure in figures))):
            settings = {"drop": args.drop, "repeats": repeats, "seed": args.seed, "trained": record["settings"],
                        "weights": hashlib.sha256(weights.read_bytes()).hexdigest()}    # other weights are another run
            own = "" if record["experiment"] == "mlp_fmnist" else f"-{record['experiment']}"
            run = plan.Run(preset, f"robustness-{args.drop}{own}", name, "joint", lam, trial, settings, weights=False)
            yield run, record, folder


def measure(run, record, folder, find_data, results, device):
    """Measures one trained run on its test images and writes the curve as a run folder; returns the line on it."""
    began, s = time.perf_counter(), record["settings"]
    build, source = plan.experiment_of(record["experiment"]).build, s["data"]["source"]
    data = folders.cut_data(find_data(s["dataset"], source), s["dataset"], source, s).to(device)
    if other := folders.first_difference(s["data"], data.description):
        raise Refused(f"{folder} was trained on data with another {other[0]}: pass its --data-dir")
    ensemble = build(s, data.shape, data.classes, torch.Generator())
    ensemble.load_state_dict(folders.load_weights(folder))
    logits, own, generator = predict(ensemble.to(device), data, data.test_images), run.settings, run.generator("drop")
    errors = [repeat(logits, data.test_labels, own["drop"], generator) for _ in range(own["repeats"])]
    arrays = {"dropped": np.arange(logits.shape[1]), "error": torch.stack(errors).cpu().numpy()}
    folders.write_run(run, results, data, began, arrays, {}, ensemble)
    whole, half = 100 * arrays["error"].mean(0)[[0, logits.shape[1] // 2]]
    return f"{run.label}: test error {whole:.2f} % with all members, {half:.2f} % with about half of them"


def main():
    p = command.parser(__doc__)
    p.add_argument("--drop", default="example", choices=DROPS, help="; ".join(map(": ".join, DROPS.items())))
    args, cores = p.parse_args(), torch.get_num_threads()
    device = command.choose_device(args.device, args.jobs)
    preset = command.choose_preset(args.preset, device)
    blocks = plan.load_preset(preset)
    names = [name for block in blocks.values() if isinstance(block, dict) for name in block.get("configurations", [])]
    for word in args.only or []:
        plan.checked_name(word, names, "configuration")
    work = {each[0].path: each for each in runs_to_measure(preset, args, blocks["robustness"]["repeats"])}
    if not work:
        raise Refused(f"{args.results / preset} has no trained weights of that selection: `python train_mlp_fmnist.py "
                      f"--preset {preset} --figure {' '.join(args.figure or FIGURES)} --results "
                      f"{shlex.quote(str(args.results))}` makes them")
    runs = [run for run, *_ in work.values()]
    to_do = [run for run in runs if not folders.run_is_finished(run, args.results)]
    print(f"robustness: {len(runs)} trained runs, {len(runs) - len(to_do)} measured before", flush=True)
    if args.dry_run:
        for run in runs:
            print(f"  {run.label}: {'to do' if run in to_do else 'finished'}")
        return
    find_data = functools.cache(lambda name, source: folders.find_data(name, source, args.data_dir))

    def do(run, say):
        with command.errors_in_one_line(run.label):
            return measure(*work[run.path], find_data, args.results, device)

    jobs = max(1, min(args.jobs or (cores if device.type == "cpu" else 1), len(to_do)))
    command.run_at_once(to_do, args.results, do, jobs, {run.path: 1.0 for run in to_do})


if __name__ == "__main__":
    command.command_line(main)
