"""The modules import each other in one direction only."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["fast", "common", "study", "study.folders", "study.plan", "study.command", "study.finished", "study.claims",
          "study.report"]


def imported(name):
    """What a module imports, at its top or inside a function: a.b of `import a.b` and of `from a import b`."""
    path, names = ROOT / name.replace(".", "/"), set()
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_a_module_imports_only_those_below_it():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    for floor, name in enumerate(FLOORS):
        assert imported(name) & (scripts | set(FLOORS)) <= set(FLOORS[:floor]), name
    assert "study.plan" in imported("study.command") and "fast" in imported("common")       # `imported` finds them
    assert not imported("common") & {"argparse", "yaml", "json", "multiprocessing", "fcntl", "zipfile"}
