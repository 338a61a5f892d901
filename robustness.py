"""Robustness to dropped members (Sec. 5): the test error of the members that are left of a trained ensemble.

A random subset of the members answers for every test example, 20 times over. The claim: at lambda 0.99 the 256x4H
ensemble is as accurate as end-to-end training (lambda 1) and stays so with more than half of its members dropped, while
the end-to-end ensemble falls apart.

    python robustness.py                        # every run whose weights were kept
    python robustness.py --figure 7             # only the runs of Figure 7
    python make_figures.py 7 8

Reads run folders and trains nothing. One random order of the members per example gives every number of survivors at
once: the logits summed along the order are those of its first 1, 2, ... M members.
"""

import shlex
import time

import study
import common
import folders
import presets
import train_mlp_fmnist

import numpy as np
import torch

# --- What is dropped -----------------------------------------------------------------------------

DROPS = {
    "example": "a random subset of the members for every test example, as the paper says",
    "set": "one random subset for the whole test set, as the authors' code has it",
    "probability": "every member with probability p for every test example (one is always left)",
}
PROBABILITIES = np.linspace(0, 0.95, 20)


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
    """The test error of one repeat, by number of members dropped 0 ... M-1, or by PROBABILITIES."""
    n, members, _ = member_logits.shape
    if drop == "set":
        order = torch.randperm(members, generator=generator).expand(n, -1)
    else:
        order = torch.rand(n, members, generator=generator).argsort(1)
    wrong = wrong_by_survivors(member_logits, targets, order.to(targets.device))
    if drop != "probability":
        return wrong.double().mean(0).flip(0)
    keep = torch.from_numpy(1 - PROBABILITIES).float().expand(n, -1)
    left = torch.binomial(torch.full_like(keep, members), keep, generator).long().clamp_(min=1)
    return wrong.gather(1, left.to(wrong.device) - 1).double().mean(0)


# --- The runs ------------------------------------------------------------------------------------

FIGURES = {name: train_mlp_fmnist.FIGURES[name] for name in ("7", "8")}


def trained_runs(preset, args):
    """(run.json, folder) of the finished joint runs of a preset that kept their weights."""
    figures = study.figure_names(args.figure, FIGURES)
    for path in folders.run_folders(args.results / preset, "*/*/joint-*"):
        record = folders.read_run(path)
        kept = record and "weights.pt" in record["sha256"] and (path / "weights.pt").exists()
        if (kept and (not args.only or record["configuration"] in args.only)
                and (not args.lambdas or record["lambda"] in args.lambdas)
                and (not args.trials or record["trial"] < args.trials)
                and (not figures or any(path.parent.name in FIGURES[name].get(record["configuration"], ())
                                        for name in figures))):
            yield record, path


def robustness_run(record, folder, drop, repeats, seed):
    """The run that measures a trained one; the checksum of the trained weights is one of its settings."""
    settings = {"drop": drop, "repeats": repeats, "seed": seed, "trained": record["settings"],
                "weights": record["sha256"]["weights.pt"]}
    return study.Run(record["preset"], f"robustness-{drop}", record["configuration"], record["method"],
                     record["lambda"], record["trial"], settings, weights=False)


def data_of(record, folder, data_dir):
    """The data that a run was trained on. Raises Refused if other data is found."""
    s = record["settings"]
    study.experiment_of(record["experiment"])                   # its script may declare a data set of its own
    data = folders.load_data(s["dataset"], s["data"]["source"], s, data_dir)
    if other := folders.difference(s["data"], data.description):
        raise common.Refused(f"{folder} was trained on other data: {other[0]} is {other[1]} there and {other[2]} here; "
                             "pass its --data-dir")
    return data


def measure(run, record, folder, data, results):
    """Measures one trained run on its test images and writes the curve as a run folder; returns the line on it."""
    began, drop = time.perf_counter(), run.settings["drop"]
    build = study.experiment_of(record["experiment"]).build
    ensemble = build(record["settings"], data.shape, data.classes, torch.Generator())
    ensemble.load_state_dict(folders.load_weights(folder, data.device))
    logits = common.predict(ensemble.to(data.device), data, data.test_images)       # (N, M, K)
    generator = run.generator("drop")
    errors = torch.stack([repeat(logits, data.test_labels, drop, generator)
                          for _ in range(run.settings["repeats"])]).cpu().numpy()
    at = {"probability": PROBABILITIES} if drop == "probability" else {"dropped": np.arange(logits.shape[1])}
    folders.write_run(run, results, data, began, at | {"error": errors}, {}, ensemble)
    mean = 100 * errors.mean(0)
    return (f"{run.label}: test error {mean[0]:.2f} % with all members, {mean[len(mean) // 2]:.2f} % with about half "
            "of them")


# --- main ----------------------------------------------------------------------------------------


def main():
    p = study.parser(__doc__)
    p.add_argument("--drop", default="example", choices=DROPS, help="; ".join(
        f"{name}: {text}" for name, text in DROPS.items()) + " (default: example)")
    args, cores = p.parse_args(), torch.get_num_threads()
    device = study.choose_device(args.device, args.jobs)
    preset = study.choose_preset(args.preset, device)
    blocks = presets.load_preset(preset)
    for word in args.only or []:
        presets.known(word, [key for block in blocks.values() if isinstance(block, dict)
                             for key in block.get("configurations", [])], "configuration")
    trained = list(trained_runs(preset, args))
    if not trained:
        command = (f"python train_mlp_fmnist.py --preset {preset} --figure {' '.join(args.figure or FIGURES)} "
                   f"--results {shlex.quote(str(args.results))}")
        raise common.Refused(f"{args.results / preset} holds no trained weights of that selection (presets.yaml keeps "
                             f"those of a few lambdas): make them with `{command}`")
    runs = [robustness_run(record, folder, args.drop, blocks["robustness"]["repeats"], args.seed)
            for record, folder in trained]
    to_do = [run for run in runs if folders.to_be_done(run, args.results)]
    print(f"robustness: {len(runs)} trained runs, {len(runs) - len(to_do)} measured before", flush=True)
    if args.dry_run:
        for run in runs:
            print(f"  {run.label}: {'to do' if run in to_do else 'finished'}")
        return
    folders.make_writable(args.results)
    source, loaded = {run.path: of for run, of in zip(runs, trained, strict=True)}, {}

    def which(record):
        return repr([record["settings"].get(key) for key in (
            "dataset", "data", "classes", "train", "validation", "test")])

    def do(run, say):
        record, folder = source[run.path]
        return measure(run, record, folder, loaded[which(record)], args.results)

    for record, folder in (source[run.path] for run in to_do):          # before several processes need it
        if which(record) not in loaded:
            with study.fix_told():
                loaded[which(record)] = data_of(record, folder, args.data_dir).to(device)

    jobs = max(1, min(args.jobs or (cores if device.type == "cpu" else 1), len(to_do)))
    study.run_at_once(to_do, args.results, do, jobs, {run.path: 1.0 for run in to_do})


if __name__ == "__main__":
    study.command_line(main)
