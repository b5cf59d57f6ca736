"""The demo: build a Chimera from the two shipped parents, verify it, and measure all three models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import PlanError, VerificationError
from surgery.evaluate.run import evaluate
from surgery.evaluate.table import Evaluation
from surgery.recipe.load import load_recipe
from surgery.recipe.run import REPORT, run_recipe
from surgery.recipe.verify import Progress, Verification, verify
from surgery.report.html import render_report
from surgery.resources import recipe_folder
from surgery.stream.manifest import NAME as MANIFEST
from surgery.stream.save import SaveOptions

PARENTS = ("terse", "deliberate")
CHILD = "chimera"


@dataclass(frozen=True)
class Demo:
    folder: Path
    manifest: Mapping[str, Any]
    verification: Verification
    evaluation: Evaluation
    report: Path

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery demo --json`."""
        return {
            "schema": 1,
            "folder": str(self.folder),
            "report": str(self.report),
            "verification": self.verification.as_dict(),
            "evaluation": self.evaluation.as_dict(),
        }


def run_demo(out: Path, *, options: SaveOptions, limit: int | None = None, progress: Progress) -> Demo:
    """Build in `out` (a demo that is there already is replaced). `limit` is problems per task."""
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise PlanError(f"{out} exists and is no demo", hint="choose another folder: surgery demo -o FOLDER")
    folder = recipe_folder() / "demo"
    parents = {name: folder / name for name in PARENTS}
    loaded = load_recipe(
        folder / "chimera.yaml", [f"parents.{name}={path}" for name, path in parents.items()]
    )
    result = run_recipe(loaded, out, replace(options, overwrite=True, progress=progress))
    checked = verify(out, recompute=None, threads=options.threads, progress=progress)
    if not checked.ok:
        failed = "; ".join(check.detail for check in checked.checks if check.state == "failed")
        raise VerificationError(f"the demo's child failed verification: {failed}")
    measured = evaluate(
        {**{name: str(path) for name, path in parents.items()}, CHILD: str(out)},
        tasks=folder / "problems.jsonl",
        limit=limit,
        progress=progress,
    )
    report = out / REPORT
    report.write_text(render_report(result.manifest, measured.as_dict()), encoding="utf-8")
    return Demo(out, result.manifest, checked, measured, report)
