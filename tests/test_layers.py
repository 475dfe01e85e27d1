"""Imports run down the layers of docs/architecture.md, wherever they stand in a file."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "headrace"
GROUND = {"params", "schema", "lineage", "storage", "record", "errors", "memory", "project"}
# A layer may import the layers behind it, and itself; blocks of one tuple do not import each other.
LAYERS = [
    ("__main__",),
    ("cli",),
    ("commands", "flows"),
    ("stages",),
    ("models",),
    ("training",),
    ("data", "evaluation", "sources", "tracking"),
    ("kernels",),
    ("ground",),
]
# The flow runs in the process that `headrace run` starts, and calls back into commands.
ALLOWED = {("commands", "flows"), ("flows", "commands")}


def _layer_of(module: str) -> str:
    parts = module.split(".")
    if parts[0] == "flows":
        return "flows"
    if len(parts) == 1:
        return "top"
    return "ground" if parts[1] in GROUND else parts[1]


def _rank(layer: str) -> int:
    return next(i for i, blocks in enumerate(LAYERS) if layer in blocks)


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
    return {name for name in names if name.split(".")[0] in ("headrace", "flows")}


def _modules() -> list[tuple[str, Path]]:
    files = [*SOURCE.rglob("*.py"), *(ROOT / "flows").rglob("*.py")]
    found = []
    for path in files:
        base = SOURCE.parent if path.is_relative_to(SOURCE) else ROOT
        found.append((".".join(path.relative_to(base).with_suffix("").parts), path))
    return found


def test_imports_run_down_the_layers():
    faults = []
    for module, path in _modules():
        if path.name == "__init__.py":
            continue
        layer = _layer_of(module)
        if layer == "access":  # the documented Python access stands beside the CLI
            continue
        for name in _imports(path):
            other = _layer_of(name)
            if other in ("top", layer) or (layer, other) in ALLOWED:
                continue
            if _rank(other) <= _rank(layer):
                faults.append(f"{module} imports {name}")
    assert not faults, faults


def test_stages_and_below_know_neither_prefect_nor_dvc_nor_mlflow():
    forbidden = {"prefect", "dvc", "mlflow", "typer", "rich"}
    faults = []
    for module, path in _modules():
        if _layer_of(module) in ("cli", "commands", "flows", "tracking"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            faults += [f"{module}: {n}" for n in names if n.split(".")[0] in forbidden]
    assert not faults, faults


def test_package_init_files_hold_no_logic():
    for path in SOURCE.rglob("__init__.py"):
        if path.parent == SOURCE:
            continue
        kinds = {type(node) for node in ast.parse(path.read_text()).body}
        assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign}, path


def test_nothing_seeds_a_global_generator():
    names = ("np.random.seed", "random.seed(", "torch.manual_seed(", "cuda.manual_seed")
    faults = [
        f"{path.name}: {name}"
        for _, path in _modules()
        for name in names
        if name in path.read_text().replace(f"generator.{name}", "")
    ]
    assert not faults, faults
