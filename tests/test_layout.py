"""The modules import each other in one direction only."""

import ast
from pathlib import Path

FILES = {path.stem: path for path in Path(__file__).resolve().parent.parent.glob("*.py")}
TRAINING = ["train_mlp_fmnist", "train_densenet_cifar", "train_convnet_cifar"]
MAY_IMPORT = {"fast": "", "fast_densenet": "", "common": "fast",
              "folders": "common", "presets": "common folders",
              "progress": "common", "study": "fast common folders presets progress",
              **dict.fromkeys(TRAINING, "study common fast_densenet"),
              "robustness": "study presets common folders train_mlp_fmnist",
              "finished": "study presets common folders robustness",
              "make_figures": "study common folders robustness finished",
              "identities": "presets common finished make_figures",
              "claims": "study presets common folders finished make_figures identities",
              "report": "study common folders finished make_figures claims"}


def imported(name):
    """The modules of this package that a module imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & set(FILES)


def test_the_arrows_point_one_way():
    assert set(MAY_IMPORT) <= set(FILES)
    assert all(name.startswith("train_") for name in set(FILES) - set(MAY_IMPORT))      # studies of your own
    for name, allowed in MAY_IMPORT.items():
        assert imported(name) <= set(allowed.split()), name
    assert imported("robustness") == set(MAY_IMPORT["robustness"].split())      # `imported` finds what there is
