"""The demo: build a Chimera from the two shipped parents, verify it, and measure all models.

With `compress` a second child as well, whose experts are pruned and whose weights are quantized in one pass.
"""

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
from surgery.stream.save import SaveOptions, SaveResult

PARENTS = ("terse", "deliberate")
CHILD = "chimera"
SMALL = "compressed"


@dataclass(frozen=True)
class Demo:
    folder: Path
    manifest: Mapping[str, Any]
    verification: Verification
    evaluation: Evaluation
    report: Path
    sizes: Mapping[str, int]
    """Bytes of the weights of every model that was measured."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery demo --json`."""
        return {
            "schema": 1,
            "folder": str(self.folder),
            "report": str(self.report),
            "sizes": dict(self.sizes),
            "verification": self.verification.as_dict(),
            "evaluation": self.evaluation.as_dict(),
        }


def run_demo(
    out: Path,
    *,
    options: SaveOptions,
    limit: int | None = None,
    compress: bool = False,
    progress: Progress,
) -> Demo:
    """Build in `out` (a demo that is there already is replaced). `limit` is problems per task; `compress`
    also builds OUT-compressed."""
    folder = recipe_folder() / "demo"
    models = {name: folder / name for name in PARENTS}
    options = replace(options, overwrite=True, progress=progress)
    result, checked = _built(CHILD, out, options)
    models[CHILD] = out
    if compress:
        models[SMALL] = out.with_name(f"{out.name}-{SMALL}")
        _built("compress", models[SMALL], options)
    measured = evaluate(
        {name: str(path) for name, path in models.items()},
        tasks=folder / "problems.jsonl",
        limit=limit,
        progress=progress,
    )
    report = out / REPORT
    report.write_text(render_report(result.manifest, measured.as_dict()), encoding="utf-8")
    sizes = {
        name: sum(file.stat().st_size for file in path.glob("*.safetensors")) for name, path in models.items()
    }
    return Demo(out, result.manifest, checked, measured, report, sizes)


def _built(recipe: str, out: Path, options: SaveOptions) -> tuple[SaveResult, Verification]:
    """A child of the demo's parents, verified."""
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise PlanError(f"{out} exists and is no demo", hint="choose another folder: surgery demo -o FOLDER")
    loaded = load_recipe(recipe_folder() / "demo" / f"{recipe}.yaml")
    result = run_recipe(loaded, out, options)
    checked = verify(out, recompute=None, threads=options.threads, progress=options.progress)
    if not checked.ok:
        failed = "; ".join(check.detail for check in checked.checks if check.state == "failed")
        raise VerificationError(f"the demo's {out.name} failed verification: {failed}")
    return result, checked
