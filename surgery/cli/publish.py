"""`surgery push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Json, Quiet
from surgery.cli.render import Output


def register(app: typer.Typer) -> None:
    app.command()(push)


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that surgery wrote.")],
    repo: Annotated[str, typer.Argument(help="The repo on the hub, ORG/NAME; it is made if there is none.")],
    public: Annotated[
        bool, typer.Option("--public", help="For everybody to see; without it a new repo is private.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List files and sizes, ask nothing of the network.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload an output to the hub, private by default. The same command resumes after a stop."""
    from surgery.recipe.push import plan_push
    from surgery.recipe.push import push as upload
    from surgery.stream.units import format_bytes

    output = Output(json=json, quiet=quiet or json)
    plan = plan_push(folder, repo, public=public)
    if plan.folders:
        output.note(f"the manifest names folders of this machine as parents: {', '.join(plan.folders)}")
    if not dry_run:
        address = upload(plan)
    if json:
        output.document({**plan.as_dict(), "commit": None if dry_run else address})
        return
    if dry_run:
        rows = [(name, format_bytes(size)) for name, size in plan.files]
        output.table("", ("file", "size"), rows, right=(1,))
    seen = "public" if public else "private"
    verb = "would go" if dry_run else "went"
    output.say(
        f"{len(plan.files)} files, {format_bytes(plan.nbytes)}, {verb} to {repo} ({seen})"
        + ("" if dry_run else f": {address}")
    )
