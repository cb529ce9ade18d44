"""What the commands of cli.py, cli_use.py and cli_export.py have in common."""

from typing import Annotated, Any

import typer

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="a run's name below runs/, or its directory")
]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def print_json(result: Any) -> None:
    """Print a result for programs."""
    from bigtrain.runs.directory import to_json

    print(to_json(result))
