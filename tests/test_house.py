"""The house: who may import whom, and how long things may get."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "bigtrain"
FLOORS = [
    {"errors", "recipe", "load", "rundir", "fault"},
    {"plan", "dsconfig", "slurm", "status", "compare", "sweep"},
    {"models", "tasks", "data", "optim", "footprint"},
    {"engine"},
    {"loop", "checkpoint", "track", "stop", "watch"},
    {"run", "export", "predict", "prove", "doctor"},
    {"cli", "__main__", "__init__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
ROOMS = {"accelerate": {"engine"}, "deepspeed": {"engine"}, "wandb": {"track"}}


def imports() -> Iterator[tuple[str, str, ast.AST]]:
    """(our module, what it imports, the node) over the whole package, imports inside functions included."""
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name, node) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                name = node.module or ""
                names = [f"{name}.{alias.name}" for alias in node.names] if name == "bigtrain" else [name]
                yield from ((module, each, node) for each in names)


def test_a_file_imports_only_from_its_floor_and_below() -> None:
    for module, name, _ in imports():
        if name.startswith("bigtrain."):
            assert FLOOR[name.split(".")[1]] <= FLOOR[module], f"{module} imports {name}"


def test_each_framework_has_one_room_and_the_low_floors_have_no_torch() -> None:
    for module, name, _ in imports():
        root = name.split(".")[0]
        assert module in ROOMS.get(root, {module}), f"{module} imports {name}"
        assert not (root == "torch" and FLOOR[module] < 2), f"{module} imports {name}"


def test_the_code_stays_thin() -> None:
    """Under 5,200 lines of code, counted as tinygrad's sz.py does: nobody is paid for leaving out a docstring."""
    total = 0
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in SILENT:
                lines |= set(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                lines -= set(range(node.lineno, (node.end_lineno or 0) + 1))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                assert node.end_lineno - node.lineno < 61, f"{path.name}: {node.name} does not fit on a screen"
        total += len(lines)
    assert total < 5200
