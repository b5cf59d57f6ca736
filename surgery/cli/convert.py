"""`surgery convert`: a mergekit configuration as a recipe of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Recipe
from surgery.cli.render import Output
from surgery.errors import PlanError


def register(app: typer.Typer) -> None:
    app.command()(convert)


def convert(
    recipe: Recipe,
    to: Annotated[Path | None, typer.Argument(help="The new file (default: print it).")] = None,
) -> None:
    """Rewrite a mergekit YAML as a recipe."""
    import yaml

    from surgery.recipe.load import load_recipe

    loaded = load_recipe(recipe)
    text = yaml.safe_dump(loaded.recipe.resolved(), sort_keys=False, allow_unicode=True)
    if to is None:
        typer.echo(text, nl=False)
        return
    if to.exists():
        raise PlanError(f"{to} exists", hint="choose another name")
    to.write_text(text, encoding="utf-8")
    Output().say(str(to))
