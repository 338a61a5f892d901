"""How far one trial moves by rounding alone: 1x1024H, trial 0, at the paper's protocol, one bit of one weight changed.

    python benchmarks/spread.py             # five runs of about 15 minutes of one core, in results/spread/

Data, split, order and all other bits of the initial weights are equal. Prints the test error and the reported epoch of
each run and their standard deviation, and writes them to results/spread.csv; expected/paper/spread.csv is that file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import study
import beside
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
    places, results = beside.trained(__doc__, train_mlp_fmnist.EXPERIMENT, ["--only", "1x1024H", "--trials", "1"],
                                     {f"bit{which}": nudged(which) for which in range(RUNS)})
    records = [folders.read_run(place) for place in places.values()]
    make_figures.write_csv(results / "spread.csv", [
        {"bit": which, "test_error_percent": 100 * record["result"]["test_ensemble_error"],
         "epoch": record["result"]["epoch"], "seconds": record["seconds"], "finished": record["finished"],
         **record["machine"]} for which, record in enumerate(records)])
    errors = [100 * record["result"]["test_ensemble_error"] for record in records]
    print(f"test errors {', '.join(f'{error:.2f}' for error in errors)} %: standard deviation "
          f"{np.std(errors, ddof=1):.2f} points; {results / 'spread.csv'}")


if __name__ == "__main__":
    study.command_line(main)
