"""Put an output on the hub: refused unless it is whole, private unless said otherwise, resumable.

The upload is huggingface_hub's `upload_folder`, which its documentation recommends for large folders as
well: run again after a stop, it skips what is committed and what storage already holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

from surgery.errors import PlanError, SurgeryError, Table, UsageError, VerificationError
from surgery.recipe.verify import wrong_files
from surgery.stream.hub import Hub, is_hub_id
from surgery.stream.journal import LOCK
from surgery.stream.journal import NAME as JOURNAL
from surgery.stream.manifest import NAME as MANIFEST
from surgery.stream.manifest import read_manifest
from surgery.stream.refusals import explain

T = TypeVar("T")


@dataclass(frozen=True)
class PushPlan:
    """What will be uploaded where. `files` are names (with slashes) and bytes."""

    folder: Path
    repo: str
    public: bool
    files: tuple[tuple[str, int], ...]
    folders: tuple[str, ...]
    """Folders of parents on this machine, which the manifest names and the upload makes known."""

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self.files)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `surgery push --json`."""
        return {
            "schema": 1, "folder": str(self.folder), "repo": self.repo, "public": self.public,
            "bytes": self.nbytes, "folders": list(self.folders),
            "files": [{"name": name, "bytes": size} for name, size in self.files],
        }  # fmt: skip


def plan_push(folder: Path, repo: str, *, public: bool = False) -> PushPlan:
    """The files of a whole output. Asks nothing of the network.

    Raises UsageError where `repo` is no ORG/NAME, VerificationError where the folder has no manifest or is
    not what its manifest says.
    """
    if not is_hub_id(repo) or "@" in repo:
        raise UsageError(f"{repo} is no repo", hint="give ORG/NAME, with a user or an organization as ORG")
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", hint="give a folder that surgery wrote")
    manifest = read_manifest(folder)
    wrong = wrong_files(folder, manifest)
    if wrong:
        raise VerificationError(
            f"{folder} is not what its {MANIFEST} says: {wrong[0]}",
            hint="build it again: surgery run … --overwrite",
            table=Table(("problem",), tuple((each,) for each in wrong)),
        )
    files = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(piece.startswith(".") for piece in relative.parts)
        if path.is_file() and not hidden and relative.name not in (JOURNAL, LOCK):
            files.append((relative.as_posix(), path.stat().st_size))
    folders = tuple(entry["model"] for entry in manifest["inputs"].values() if not entry["revision"])
    return PushPlan(folder, repo, public, tuple(files), folders)


def push(plan: PushPlan, hub: Hub | None = None) -> str:
    """Create the repo where there is none and upload; returns the commit's address. The same call resumes.

    Raises PlanError where the repo may not be created, or exists and is seen by others than asked for, and
    SurgeryError where the upload fails.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    api = (hub or Hub()).api()

    def visibility() -> bool | None:
        try:
            return bool(api.model_info(plan.repo).private)
        except RepositoryNotFoundError:
            return None

    private = _asked(plan, visibility, PlanError)
    if private is None:
        _asked(plan, lambda: api.create_repo(plan.repo, private=not plan.public, exist_ok=True), PlanError)
    elif private is plan.public:
        if private:
            raise PlanError(
                f"{plan.repo} exists and is private, but --public was given",
                hint="push without --public, or change its visibility in its settings first",
            )
        raise PlanError(
            f"{plan.repo} exists and is public, but --public was not given",
            hint="push with --public, or to another repo",
        )
    names = [escape(name) for name, _ in plan.files]
    message = "Upload with surgery"
    done = _asked(
        plan,
        lambda: api.upload_folder(
            repo_id=plan.repo, folder_path=plan.folder, allow_patterns=names, commit_message=message
        ),
        SurgeryError,
    )
    return str(done.commit_url)


def _asked(plan: PushPlan, question: Callable[[], T], kind: type[SurgeryError]) -> T:
    """The hub's answer, or an error that says what to do."""
    from httpx import HTTPError

    try:
        return question()
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        reason, hint = explain(error)
        again = "" if kind is PlanError else "; the same command resumes"
        raise kind(f"{plan.repo}: {reason}", hint=f"{hint}{again}".lstrip("; ")) from error
