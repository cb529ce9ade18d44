"""How large the package is, and how dense: a table per package; exit 1 above the limits.

Counted as tinygrad's sz.py does: code lines and their tokens, without comments, blank lines and
docstrings.
"""

import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "bigtrain"
TOKENS_PER_LINE = 10.0  # in each file
FUNCTION_LINES = 60
FILE_LINES = 500
TOKENS = 130_000  # of the whole package
STEP_TOKENS = 50_000  # of the path of a training step
STEP_PATH = ("config", "data", "tasks", "engine", "checkpoint", "training")
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass
class Size:
    """Code lines and tokens of a file or of a package."""

    lines: int = 0
    tokens: int = 0

    @property
    def density(self) -> float:
        return self.tokens / max(self.lines, 1)


def docstring_lines(tree: ast.AST) -> set[int]:
    """The lines of all docstrings (and of other bare strings)."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        is_bare_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_bare_constant and isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def measure(text: str, tree: ast.AST) -> Size:
    """Code lines and tokens of one file's text."""
    silent_lines = docstring_lines(tree)
    lines: set[int] = set()
    tokens = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in SILENT or token.start[0] in silent_lines:
            continue
        tokens += 1
        lines.add(token.start[0])
    return Size(len(lines), tokens)


def long_functions(path: str, tree: ast.AST) -> list[str]:
    """A line about each function that does not fit on a screen."""
    problems = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            problems.append(f"{path}:{node.lineno}: {node.name} has {length} lines")
    return problems


def main() -> int:
    """Print the table and what passes a limit; the exit code."""
    packages: dict[str, Size] = {}
    problems: list[str] = []
    for file in sorted(PACKAGE.rglob("*.py")):
        path = str(file.relative_to(PACKAGE))
        text = file.read_text()
        tree = ast.parse(text)
        size = measure(text, tree)
        package = packages.setdefault(path.partition("/")[0], Size())
        package.lines += size.lines
        package.tokens += size.tokens
        problems += long_functions(path, tree)
        if size.density > TOKENS_PER_LINE:
            problems.append(f"{path}: {size.density:.2f} tokens per line")
        if text.count("\n") >= FILE_LINES:
            problems.append(f"{path}: {text.count(chr(10))} lines")
    total = Size(
        sum(size.lines for size in packages.values()),
        sum(size.tokens for size in packages.values()),
    )
    step = sum(packages[name].tokens for name in STEP_PATH)
    print(f"{'package':<14}{'lines':>8}{'tokens':>9}{'tokens/line':>13}")
    for name, size in [*packages.items(), ("total", total)]:
        print(f"{name:<14}{size.lines:>8,}{size.tokens:>9,}{size.density:>13.2f}")
    print(f"the path of a training step ({', '.join(STEP_PATH)}): {step:,} tokens")
    if total.tokens >= TOKENS:
        problems.append(f"{total.tokens:,} tokens in all; the limit is {TOKENS:,}")
    if step >= STEP_TOKENS:
        problems.append(f"{step:,} tokens on the path of a step; the limit is {STEP_TOKENS:,}")
    for problem in problems:
        print(f"too large: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
