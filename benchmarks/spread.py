"""How far one trial moves by rounding alone: 1x1024H, trial 0, at the paper's protocol, one bit of one weight changed.

    python benchmarks/spread.py             # five runs of about 15 minutes of one core, in results/spread/

Data, split, order and all other bits of the initial weights are equal. Prints the test error and the reported epoch of
each run and their standard deviation, and writes them to results/spread.csv; expected/paper/spread.csv is that file.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import study
import folders
import make_figures
import train_mlp_fmnist

import numpy as np
import torch

RUNS = 5


def nudged(which):
    """The experiment in whose initial weights one of the hidden layer is the next larger float."""
    def build(*arguments):
        ensemble = train_mlp_fmnist.build(*arguments)
        weights = ensemble.hidden_weight.data.view(-1)
        weights[which] = torch.nextafter(weights[which], weights.new_tensor(torch.inf))
        return ensemble
    return study.Experiment("mlp_fmnist", build)


def main():
    p = study.training_parser(__doc__)
    p.set_defaults(preset="paper", only=["1x1024H"], trials=1)
    args, cores = p.parse_args(), torch.get_num_threads()
    _, data_of, (run,) = study.prepare(train_mlp_fmnist.EXPERIMENT, args)
    runs = [replace(run, preset=f"spread/{run.preset}-bit{which}") for which in range(RUNS)]
    folders.make_writable(args.results)

    def do(run, say):
        return study.outcome(run, study.do_run(nudged(int(run.preset[-1])), run, data_of(run), args.results,
                                               study.told(run, say)))

    to_do = [run for run in runs if folders.to_be_done(run, args.results)]
    study.run_at_once(to_do, args.results, do, max(1, min(cores, len(to_do))),
                      {run.path: study.cost(train_mlp_fmnist.EXPERIMENT, run, data_of(run)) for run in to_do})
    records = [folders.read_run(args.results / run.path) for run in runs]
    make_figures.write_csv(args.results / "spread.csv", [
        {"bit": which, "test_error_percent": 100 * record["result"]["test_ensemble_error"],
         "epoch": record["result"]["epoch"], "seconds": record["seconds"], "finished": record["finished"],
         **record["machine"]} for which, record in enumerate(records)])
    errors = [100 * record["result"]["test_ensemble_error"] for record in records]
    print(f"test errors {', '.join(f'{error:.2f}' for error in errors)} %: standard deviation "
          f"{np.std(errors, ddof=1):.2f} points; {args.results / 'spread.csv'}")


if __name__ == "__main__":
    study.command_line(main)
