"""`surgery recipes ls|show|copy` and `surgery schema`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from surgery.cli.options import Json
from surgery.cli.render import Output
from surgery.errors import PlanError, UsageError

Name = Annotated[str, typer.Argument(help="A shipped recipe, e.g. chimera.")]


def register(app: typer.Typer) -> None:
    family = typer.Typer(help="List, show and copy the shipped recipes.", no_args_is_help=True)
    family.command("ls")(ls)
    family.command("show")(show)
    family.command("copy")(copy)
    app.add_typer(family, name="recipes")
    app.command()(schema)


def find(name: str) -> Path:
    from surgery.recipe.load import shipped_recipes

    found = shipped_recipes().get(name.removesuffix(".yaml"))
    if found is None:
        raise UsageError(f"no shipped recipe is called {name}", hint="see: surgery recipes ls")
    return found


def first_comment(path: Path) -> str:
    """The first line of the comment that a recipe opens with."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and "yaml-language-server" not in line:
            return line[2:]
        if line.strip() and not line.startswith("#"):
            break
    return ""


def ls(json: Json = False) -> None:
    """List the shipped recipes."""
    from surgery.recipe.load import shipped_recipes

    output = Output(json=json)
    found = {name: first_comment(path) for name, path in shipped_recipes().items()}
    if json:
        output.document({"schema": 1, "recipes": [{"name": n, "about": a} for n, a in found.items()]})
    output.table("", ("recipe", "what it makes"), list(found.items()))


def show(name: Name) -> None:
    """Print a shipped recipe."""
    typer.echo(find(name).read_text(encoding="utf-8"), nl=False)


def copy(
    name: Name,
    to: Annotated[Path | None, typer.Argument(help="The new file (default: NAME.yaml here).")] = None,
) -> None:
    """Copy a shipped recipe, to be edited."""
    source = find(name)
    target = to or Path(source.name)
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise PlanError(f"{target} exists", hint="choose another name")
    target.write_bytes(source.read_bytes())
    Output().say(escape(str(target)))


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from surgery.recipe.schema import json_schema

    Output().document(json_schema())
