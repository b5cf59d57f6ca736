"""Tiles computed on a GPU: the same bytes as on the CPU, and one clear refusal where there is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from folders import strict_manifest
from kernel_sets import kernels

from surgery.cli.app import main
from surgery.codecs import dispatch, native
from surgery.codecs.ops import Operand
from surgery.errors import PlanError, UsageError
from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.operators.merge.arcee_fusion import ArceeFusion
from surgery.operators.merge.dare import DareTies
from surgery.operators.merge.linear import Linear
from surgery.operators.merge.slerp import Slerp
from surgery.operators.merge.ties import Ties
from surgery.operators.protocol import Operator
from surgery.stream import lanes
from surgery.stream import save as save_module
from surgery.stream.buffers import ThreadBuffers
from surgery.stream.source import open_checkpoint

GPU = torch.cuda.is_available()
SIZES: dict[str, Any] = {"layers": 3, "experts": 3, "hidden": 776, "moe_intermediate": 520}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize(
    "method",
    [
        AssemblyOfExperts(base="a", weights={"a": 0.4, "b": 0.6}),
        Linear.model_validate({"models": {"a": 0.3, "b": 0.9}}),
        Slerp.model_validate({"base": "a", "models": {"b": {}}, "t": 0.3}),
        ArceeFusion.model_validate({"base": "a", "models": {"b": {}}}),
        Ties.model_validate({"base": "a", "models": {"b": {"density": 0.3}}, "normalize": "norms"}),
        DareTies.model_validate({"base": "a", "models": {"b": {"density": 0.4}}, "rescale": "l1"}),
    ],
    ids=["aoe", "linear", "slerp", "fusion", "ties", "dare"],
)
def test_a_gpu_writes_the_bytes_of_the_cpu(
    method: Operator, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = {
        "a": factories.deepseek_v3(tmp_path / "a", 1, **SIZES),
        "b": factories.deepseek_v3(tmp_path / "b", 2, base=1, delta=0.3, **SIZES),
    }
    made, went = {}, []
    computed = lanes.Lanes.computed

    def counted(self: lanes.Lanes, parents: Any, work: Any) -> Any:
        went.append(len(parents))
        return computed(self, parents, work)

    monkeypatch.setattr(lanes.Lanes, "computed", counted)
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        child = method.apply({name: open_checkpoint(path, name) for name, path in parents.items()})
        child.save(out, device=device, threads=threads)
        made[device] = strict_manifest(out)
    shards = sorted(path.name for path in (tmp_path / "cpu").glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (tmp_path / "cuda" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes(), name
    assert set(went) == {2}
    run = made["cuda"]["run"]
    assert run["device"] == "cuda" and run["kernels"]["gpu_path"] and run["gpu_passes"] == len(went)
    assert made["cpu"]["run"]["device"] == "cpu" and "gpu_passes" not in made["cpu"]["run"]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_without_its_kernels_a_gpu_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_KERNELS", "cpu")
    parents = {
        "a": open_checkpoint(factories.deepseek_v3(tmp_path / "a", 1, **SIZES), "a"),
        "b": open_checkpoint(factories.deepseek_v3(tmp_path / "b", 2, base=1, **SIZES), "b"),
    }
    method = ArceeFusion.model_validate({"base": "a", "models": {"b": {}}})
    run = method.apply(parents).save(tmp_path / "out", device="cuda").manifest["run"]
    assert (run["device"], run["gpu_passes"]) == ("cpu", 0)
    assert run["kernels"]["gpu_reason"] == "SURGERY_KERNELS=cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_a_gpu_without_room_is_one_clear_error() -> None:
    def work(there: Sequence[Operand]) -> torch.Tensor:
        return torch.empty(1 << 50, dtype=torch.uint8, device=there[0].values.device)

    lane = lanes.Lanes("cuda", lanes.GpuUse())
    with pytest.raises(PlanError, match=r"no room for a tile of 2 parents of \[3, 4\]"):
        lane.computed([Operand(torch.zeros(3, 4))] * 2, work)


@pytest.mark.skipif(GPU, reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "warp"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(
    device: str, tmp_path: Path
) -> None:
    base = open_checkpoint(factories.deepseek_v3(tmp_path / "a", 1, **SIZES), "a")
    with pytest.raises(UsageError, match=device):
        base.save(tmp_path / "out", device=device)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.skipif(GPU, reason="there is a CUDA device")
def test_auto_takes_the_cpu_where_there_is_no_gpu() -> None:
    assert lanes.gpu_of("auto") is None and lanes.gpu_of("cpu") is None


class Pretended(lanes.Lanes):
    """To a device that is not there, and that must not be asked."""

    def __init__(self, device: str, use: lanes.GpuUse) -> None:
        self.device, self._use = torch.device("cuda", 99), use

    def computed(self, parents: Any, work: Any) -> Any:
        raise AssertionError("a tile was sent")


def test_a_gpu_that_makes_no_tile_is_not_said_to_have_made_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles as small as these are not worth the way."""
    monkeypatch.setattr(save_module, "gpu_of", lambda device: "cuda")
    monkeypatch.setattr(save_module, "Lanes", Pretended)
    monkeypatch.setattr(save_module, "ThreadBuffers", lambda pinned: ThreadBuffers())
    parents = {
        "a": open_checkpoint(factories.deepseek_v3(tmp_path / "a", 1, layers=2, experts=2), "a"),
        "b": open_checkpoint(factories.deepseek_v3(tmp_path / "b", 2, layers=2, experts=2), "b"),
    }
    method = Ties.model_validate({"base": "a", "models": {"b": {"density": 0.5}}})
    run = method.apply(parents).save(tmp_path / "out", device="cuda").manifest["run"]
    assert (run["device"], run["gpu_passes"]) == ("cpu", 0)
    assert run["kernels"]["path"] and "gpu_path" not in run["kernels"]


def test_tiles_of_more_parents_than_kernels_take_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "cuda_library", lambda device: native.Native(object(), "pretended"))
    use = lanes.GpuUse()
    lane, tile = Pretended("cuda", use), Operand(torch.zeros(600, 600))
    assert lane.takes([tile] * 16) and not lane.takes([tile] * 17)
    assert not lane.takes([Operand(torch.zeros(512, 512))] * 2)
    assert not use.reasons
    monkeypatch.setattr(dispatch, "cuda_library", lambda device: native.Native(None, "reference", "no nvcc"))
    assert not lane.takes([tile] * 2) and use.reasons == {"no nvcc"}


@kernels
def test_a_gpu_without_kernels_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the manifest, and by the command in one line."""
    monkeypatch.setattr(dispatch, "cuda_library", lambda device: native.Native(None, "reference", "no nvcc"))
    monkeypatch.setattr(save_module, "gpu_of", lambda device: "cuda")
    monkeypatch.setattr(save_module, "Lanes", Pretended)
    monkeypatch.setattr(save_module, "ThreadBuffers", lambda pinned: ThreadBuffers())
    for name, seed in (("a", 1), ("b", 2)):
        factories.deepseek_v3(tmp_path / name, seed, **SIZES)
    recipe = tmp_path / "recipe.yaml"
    steps = [{"op": "merge.linear", "models": {"a": 0.3, "b": 0.7}}]
    recipe.write_text(json.dumps({"parents": {n: str(tmp_path / n) for n in "ab"}, "steps": steps}))
    assert main(["run", str(recipe), "-o", str(tmp_path / "out"), "--device", "cuda"]) == 0
    run = strict_manifest(tmp_path / "out")["run"]
    assert (run["device"], run["gpu_passes"]) == ("cpu", 0)
    assert run["kernels"]["gpu_reason"] == "no nvcc" and "gpu_path" not in run["kernels"]
    told = capsys.readouterr()
    assert "every tile was made on the CPU: no nvcc" in " ".join((told.out + told.err).split())
