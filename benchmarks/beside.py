"""What spread.py and one_densenet.py share: one run of an experiment, trained in several ways on a CPU."""

import sys
from dataclasses import replace
from pathlib import Path

import study
import folders

import torch


def trained(description, experiment, flags, ways):
    """Trains the run that `flags` of the experiment's script select once in each of `ways`, {name: Experiment}.

    Runs that are in the results folder are kept. Returns {name: its folder} and the results folder.
    """
    p = study.Parser(description)
    p.add_argument("--preset", default="paper", help="a block of presets.yaml (default: paper)")
    p.add_argument("--data-dir", metavar="DIR", help="a folder with the real data")
    p.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    args = study.training_parser(description).parse_args(["--device", "cpu", *flags])
    vars(args).update(vars(p.parse_args()))
    cores = torch.get_num_threads()
    _, data_of, (run,) = study.prepare(experiment, args)
    runs = {name: replace(run, preset=f"{Path(sys.argv[0]).stem}/{run.preset}-{name}") for name in ways}
    way_of = {run.path: ways[name] for name, run in runs.items()}
    folders.make_writable(args.results)

    def do(run, say):
        return study.outcome(run, study.do_run(way_of[run.path], run, data_of(run), args.results, study.told(run, say)))

    to_do = [run for run in runs.values() if folders.to_be_done(run, args.results)]
    study.run_at_once(to_do, args.results, do, max(1, min(cores, len(to_do))),
                      {run.path: study.cost(way_of[run.path], run, data_of(run)) for run in to_do})
    return {name: args.results / run.path for name, run in runs.items()}, args.results
