"""Children saved together hold what each would hold alone, share files, and cost one reading."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import pytest
from folders import check_written, file_hashes
from hub_client import weights_of

from surgery.errors import InterruptedRun, PlanError, SurgeryError
from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.operators.merge.ties import Ties
from surgery.recipe.verify import verify
from surgery.stream import together
from surgery.stream.checkpoint import Checkpoint
from surgery.stream.save import SaveOptions, Saving, save
from surgery.stream.source import open_checkpoint
from surgery.stream.together import Family, family_of, save_together

SHARD = 1_000_000
LAMBDAS = (0.0, 0.3, 0.7, 1.0)


def alone(child: Checkpoint, folder: Path) -> Path:
    """The same child saved by itself, beside `folder`."""
    return save(child, folder.with_name(f"{folder.name}-alone"), options()).folder


def refuse(*given: object) -> None:
    raise OSError(95, "Operation not supported")


def opened(parents: dict[str, Path]) -> dict[str, Checkpoint]:
    return {name: open_checkpoint(parents[name], name) for name in ("base", "reasoner")}


def children(parents: dict[str, Checkpoint], *select: str) -> list[Checkpoint]:
    return [
        AssemblyOfExperts(base="base", weights={"reasoner": weight}, select=(entry,)).apply(parents)
        for entry in select
        for weight in LAMBDAS
    ]


def family(found: list[Checkpoint], **changes: Any) -> Family:
    made = family_of(found, changes.get("format", "source"), changes.get("shard_bytes", SHARD))
    assert made is not None
    return made


def options(**changes: Any) -> SaveOptions:
    return SaveOptions(**{"shard_bytes": SHARD, "threads": 2, **changes})


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Stored bytes by name, whatever the shard."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                found[name] = raw[8 + length + begin : 8 + length + end]
    return found


def test_children_that_share_nothing_are_as_if_saved_alone(parents: dict[str, Path], tmp_path: Path) -> None:
    """Not only tensors: whole files, metrics in the manifest included."""
    found = children(opened(parents), "all")
    folders = [tmp_path / f"child-{number}" for number in range(len(found))]
    save_together(family(found), folders, [options()] * len(found))
    for number, child in enumerate(found):
        by_itself = save(child, tmp_path / f"alone-{number}", options())
        assert file_hashes(folders[number]) == file_hashes(by_itself.folder)
        manifest = json.loads((folders[number] / "surgery_manifest.json").read_text())
        assert {**manifest, "run": 0} == {**json.loads(json.dumps(by_itself.manifest)), "run": 0}


@pytest.mark.parametrize("form", ["source", "bf16"])
def test_children_that_share_tensors_hold_equal_bytes_and_share_files(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    monkeypatch.setattr(together, "ioctl", refuse)  # blocks that are shared do not show
    found = children(opened(parents), "routed_expert", "attention")
    made = family(found, format=form)
    folders = [tmp_path / f"child-{number}" for number in range(len(found))]
    save_together(made, folders, [options(format=form)] * len(found))
    for number, child in enumerate(found):
        by_itself = save(child, tmp_path / f"alone-{number}", options(format=form))
        assert tensors_of(folders[number]) == tensors_of(by_itself.folder)
        check_written(folders[number], list(child.tensors))
        assert verify(folders[number], recompute=8, load=False).ok
    written: dict[tuple[int, int], int] = {}
    for folder in folders:
        for path in folder.glob("*.safetensors"):
            status = path.stat()
            written[status.st_dev, status.st_ino] = status.st_size
    assert len(written) < len(found) * len(list(folders[0].glob("*.safetensors")))
    side = sum(plan.side_bytes for plan in made.plans)
    assert sum(written.values()) == made.output_bytes - side < made.whole_bytes - side
    # λ = 0 of both selections is the base, in every byte.
    assert made.twin(len(LAMBDAS)) == 0 and made.twin(1) == 1
    for name in (path.name for path in folders[0].glob("*.safetensors")):
        assert os.path.samefile(folders[0] / name, folders[len(LAMBDAS)] / name)


@pytest.mark.parametrize("factory", [factories.gpt_oss_bf16, factories.llama, factories.qwen3_moe])
def test_fused_and_plain_layouts(tmp_path: Path, factory: Callable[..., Path]) -> None:
    for seed, name in enumerate(("base", "reasoner")):
        factory(tmp_path / name, seed)
    found = children(opened({name: tmp_path / name for name in ("base", "reasoner")}), "all", "attention")
    folders = [tmp_path / f"child-{number}" for number in range(len(found))]
    save_together(family(found), folders, [options()] * len(found))
    for number, child in enumerate(found):
        by_itself = save(child, tmp_path / f"alone-{number}", options())
        assert tensors_of(folders[number]) == tensors_of(by_itself.folder)


def test_kernels_that_do_not_compare_are_written_for_each_child(
    parents: dict[str, Path], tmp_path: Path
) -> None:
    """TIES with equal and with different settings: nothing is taken for equal that might not be."""
    start = opened(parents)
    found = [
        Ties(base="base", models={"reasoner": {"density": density}}, select=("attention",)).apply(start)  # type: ignore[dict-item]
        for density in (0.3, 0.8, 0.8)
    ]
    folders = [tmp_path / f"child-{number}" for number in range(3)]
    save_together(family(found), folders, [options()] * 3)
    for folder, child in zip(folders, found, strict=True):
        assert tensors_of(folder) == tensors_of(alone(child, folder))
    assert weights_of(folders[0]) != weights_of(folders[1]) == weights_of(folders[2])


def test_children_of_other_shapes_are_no_family(parents: dict[str, Path]) -> None:
    start = opened(parents)
    assert family_of([start["base"], children(start, "all")[1]], "source", SHARD) is not None
    smaller = start["base"].replace(tensors=dict(list(start["base"].tensors.items())[:-1]))
    assert family_of([start["base"], smaller], "source", SHARD) is None


@pytest.mark.parametrize("lacking", ["clone", "clone and link"])
def test_where_the_file_system_cannot_share(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    monkeypatch.setattr(together, "ioctl", refuse)
    if lacking != "clone":
        monkeypatch.setattr(os, "link", refuse)
    found = children(opened(parents), "attention")
    folders = [tmp_path / f"child-{number}" for number in range(len(found))]
    save_together(family(found), folders, [options()] * len(found))
    names = sorted(path.name for path in folders[0].glob("*.safetensors"))
    same = [os.path.samefile(folders[0] / name, folders[1] / name) for name in names]
    assert any(same) == (lacking == "clone")
    for number, child in enumerate(found):
        by_itself = save(child, tmp_path / f"alone-{number}", options())
        assert tensors_of(folders[number]) == tensors_of(by_itself.folder)
        check_written(folders[number], list(child.tensors))
        assert not list(folders[number].glob("*.tmp"))


@pytest.mark.parametrize("after", [1, 5])
def test_an_interrupted_family_resumes_to_equal_files(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    made = family(children(opened(parents), "routed_expert"))
    count = len(LAMBDAS)
    whole = [tmp_path / f"whole-{number}" for number in range(count)]
    save_together(made, whole, [options()] * count)
    real, seen = Saving.finish, []

    def stopping(self: Saving, *given: Any) -> None:
        if len(seen) >= after:
            raise SurgeryError("stopped by the test")
        seen.append(given)
        real(self, *given)

    monkeypatch.setattr(Saving, "finish", stopping)
    folders = [tmp_path / f"child-{number}" for number in range(count)]
    with pytest.raises(SurgeryError, match="stopped by the test"):
        save_together(made, folders, [options(threads=1)] * count)
    assert not any(folder.exists() for folder in folders)
    monkeypatch.setattr(Saving, "finish", real)
    writes: list[str] = []
    save_together(
        made, folders, [options(progress=lambda stage, done, total: writes.append(f"{done}/{total}"))] * count
    )
    for one, other in zip(whole, folders, strict=True):
        assert file_hashes(one) == file_hashes(other)


def test_some_children_of_a_family_alone(parents: dict[str, Path], tmp_path: Path) -> None:
    """A child of a family is the same whichever of its siblings are written with it."""
    made = family(children(opened(parents), "routed_expert"))
    all_of_them = [tmp_path / f"all-{number}" for number in range(4)]
    save_together(made, all_of_them, [options()] * 4)
    save_together(made, [None, tmp_path / "one", None, None], [options()] * 4)
    assert file_hashes(tmp_path / "one") == file_hashes(all_of_them[1])


def test_refusals_come_before_anything_is_written(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = family(children(opened(parents), "attention"))
    folders: list[Path | None] = [tmp_path / "out" / str(number) for number in range(4)]
    need = made.output_bytes
    monkeypatch.setattr("surgery.stream.survey.free_bytes", lambda folder: need - 1)
    with pytest.raises(PlanError, match=str(need)):
        save_together(made, folders, [options()] * 4)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("surgery.stream.survey.free_bytes", lambda folder: need)
    save_together(made, folders, [options()] * 4)
    with pytest.raises(PlanError, match="not empty"):
        save_together(made, folders, [options()] * 4)


def test_stopped_by_the_user(parents: dict[str, Path], tmp_path: Path) -> None:
    made = family(children(opened(parents), "all"))

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises((InterruptedRun, KeyboardInterrupt)):
        save_together(made, [tmp_path / str(n) for n in range(4)], [options(progress=stop)] * 4)
    assert not any((tmp_path / str(number)).exists() for number in range(4))
