"""Robustness to dropped members (Sec. 5): the test error of what is left of a trained ensemble.

A random subset of the members answers for every test example, 20 times over. The claim: at lambda
0.99 the 256x4H ensemble is as accurate as end-to-end training (lambda 1) and keeps that with more
than half of its members dropped, where the end-to-end ensemble falls apart.

    python robustness.py                       # every run whose weights were kept
    python make_figures.py fig7 fig8

Reads run folders, trains nothing. One random order of the members per example gives every number of
survivors at once: the logits summed along the order are those of its first 1, 2, ... M members.
"""

import hashlib
import time

import common

import numpy as np
import torch

# --- What is dropped ---------------------------------------------------------------------------

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


# --- The runs ----------------------------------------------------------------------------------

def trained_runs(preset, args):
    """(run.json, folder) of the finished joint runs of a preset whose weights were kept."""
    for path in sorted((args.results / preset).glob("*/*/joint-*/trial*/weights.pt")):
        record = common.read_run(path.parent)
        if (record and (not args.only or record["configuration"] in args.only)
                and (not args.lambdas or record["lambda"] in args.lambdas)
                and (not args.trials or record["trial"] < args.trials)):
            yield record, path.parent


def robustness_run(record, folder, drop, repeats, seed):
    """The run that measures a trained one; the trained weights are one of its settings."""
    settings = {"drop": drop, "repeats": repeats, "seed": seed, "trained": record["settings"],
                "weights": hashlib.sha256((folder / "weights.pt").read_bytes()).hexdigest()}
    return common.Run(record["preset"], f"robustness-{drop}", record["configuration"],
                      record["method"], record["lambda"], record["trial"], settings, weights=False)


def data_of(record, folder, data_dir):
    """The data that a run was trained on. Raises Refused if what is found is other data."""
    s = record["settings"]
    data = common.load_data(s["dataset"], s["data"]["source"], s, data_dir)
    if other := common.difference(s["data"], data.description):
        raise common.Refused(f"{folder} was trained on other data: {other[0]} is {other[1]} there "
                             f"and {other[2]} here; name its --data-dir")
    return data


def measure(run, record, folder, data, results):
    """Measures one trained run on its test images and writes the curve as a run folder."""
    began, drop = time.perf_counter(), run.settings["drop"]
    experiment = common.experiment_of(record["experiment"])
    ensemble = experiment.build(record["settings"], data.shape, data.classes, torch.Generator())
    ensemble.load_state_dict(common.load_weights(folder, data.device))
    logits = common.predict(ensemble.to(data.device), data, data.test_images)       # (N, M, K)
    generator = run.generator("drop")
    errors = torch.stack([repeat(logits, data.test_labels, drop, generator)
                          for _ in range(run.settings["repeats"])]).cpu().numpy()
    at = {"probability": PROBABILITIES} if drop == "probability" else {
        "dropped": np.arange(logits.shape[1])}
    common.write_run(run, results, data, began, at | {"error": errors}, {}, ensemble)
    return errors.mean(0)


# --- main --------------------------------------------------------------------------------------

def main():
    p = common.parser(__doc__)
    p.add_argument("--drop", default="example", metavar="HOW", help="; ".join(
        f"{name}: {text}" for name, text in common.DROPS.items()) + " (default: example)")
    args = p.parse_args()
    common.nearest(args.drop, common.DROPS, "value of --drop")
    preset = common.choose_preset(args.preset)
    blocks = common.load_preset(preset)
    repeats = blocks["robustness"]["repeats"]
    planned = [key for block in blocks.values() if isinstance(block, dict)
               for key in block.get("configurations", [])]
    for word in args.only or []:
        common.nearest(word, planned, "configuration")
    trained = list(trained_runs(preset, args))
    if not trained:
        raise common.Refused(f"{args.results / preset} holds no trained weights of that selection: "
                             f"make them with `python train_mlp_fmnist.py --preset {preset}`")
    runs = [robustness_run(record, folder, args.drop, repeats, args.seed)
            for record, folder in trained]
    to_do = [run for run in runs if common.to_be_done(run, args.results)]
    print(f"robustness: {len(runs)} trained runs, {len(runs) - len(to_do)} measured before",
          flush=True)
    if args.dry_run:
        for run in runs:
            print(f"  {run.label}: {'to do' if run in to_do else 'finished'}")
        return
    common.make_writable(args.results)
    measured = {run.path: of for run, of in zip(runs, trained, strict=True)}
    device, loaded = common.choose_device(args.device), {}

    def do(run):
        record, folder = measured[run.path]
        which = repr([record["settings"][key] for key in (
            "dataset", "data", "train", "validation", "test")])
        if which not in loaded:
            loaded[which] = data_of(record, folder, args.data_dir).to(device)
        with common.memory_told(device, run.label, "free memory, or use --device cpu"):
            error = 100 * measure(run, record, folder, loaded[which], args.results)
        print(f"[{runs.index(run) + 1}/{len(runs)}] {run.label}: test error {error[0]:.2f} % with "
              f"all members, {error[len(error) // 2]:.2f} % with about half of them", flush=True)
    common.each_once(to_do, args.results, do)


if __name__ == "__main__":
    common.command_line(main)
