"""Opening models: what a folder says against what it holds, the hub's cache, and what must be refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import huggingface_hub
import numpy as np
import oracle
import pytest
import torch
from folders import INDEX, Tensors, change_config, change_shards
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError, UsageError
from surgery.stream.files import natural_key
from surgery.stream.source import open_checkpoint

KV_A = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def folder(parents: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(parents["base"], tmp_path / "model")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return factories.llama(tmp_path / "llama", 1, shards=3)


def refused(model: Path | str, *words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(model)
    for word in words:
        assert word in caught.value.message, caught.value.message
    return caught.value


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


# What a right folder gives


def test_a_folder_opens_to_its_logical_tensors_in_natural_order(parents: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(parents["base"], "base")
    stored = oracle.read_folder(parents["base"])
    logical = {name for name in stored if not name.endswith("_scale_inv")}
    assert set(checkpoint.tensors) == logical
    assert list(checkpoint.tensors) == sorted(logical, key=natural_key)
    assert checkpoint.nbytes == sum(len(raw) for _, _, raw in stored.values())
    assert checkpoint.label == "base"
    assert not checkpoint.events
    assert checkpoint.config == json.loads((parents["base"] / "config.json").read_text())


def test_reading_gives_what_the_oracle_decodes(parents: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(parents["base"])
    for name, want in oracle.model_tensors(parents["base"]).items():
        found = checkpoint.tensors[name].read()
        assert found.dtype is torch.float32
        assert torch.equal(found, want), name
    rows = checkpoint.tensors[KV_A].read(slice(128, 192))
    assert torch.equal(rows, oracle.model_tensors(parents["base"])[KV_A][128:192])


@pytest.mark.parametrize("factory", [factories.gpt_oss_bf16, factories.llama4_text], ids=lambda f: f.__name__)
def test_fused_experts_read_as_their_slices(tmp_path: Path, factory: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(factory(tmp_path / "m", 3))
    raw = oracle.model_tensors(tmp_path / "m")
    name = next(name for name in raw if name.endswith("experts.gate_up_proj"))
    fused = raw[name]
    half = fused.shape[2] // 2
    even = factory is factories.gpt_oss_bf16
    gate, up = (fused[..., ::2], fused[..., 1::2]) if even else (fused[..., :half], fused[..., half:])
    prefix = name.removesuffix("gate_up_proj")
    for expert in range(fused.shape[0]):
        assert torch.equal(checkpoint.tensors[f"{prefix}{expert}.gate_proj.weight"].read(), gate[expert].T)
        assert torch.equal(checkpoint.tensors[f"{prefix}{expert}.up_proj.weight"].read(), up[expert].T)


@pytest.mark.parametrize("name", ["1.gate_proj.weight", "1.down_proj.weight", "1.gate_proj.bias"])
def test_some_rows_of_a_fused_expert_are_those_rows(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(factories.gpt_oss_bf16(tmp_path / "m", 3))
    ref = checkpoint.tensors[f"model.layers.0.mlp.experts.{name}"]
    assert torch.equal(ref.read(slice(0, 2)), ref.read()[:2])


def test_a_hub_cache_of_symlinks_is_read(
    parents: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--org--model"
    snapshot = repo / "snapshots" / commit
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for number, path in enumerate(sorted(parents["base"].iterdir())):
        shutil.copy(path, repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    want = open_checkpoint(parents["base"])
    for name in ("org/model", f"org/model@{commit}"):
        found = open_checkpoint(name)
        assert found.inputs[0].revision == commit
        assert found.nbytes == want.nbytes
        assert set(found.side_files) == set(want.side_files)
        assert torch.equal(found.tensors[KV_A].read(), want.tensors[KV_A].read())
    open_checkpoint(snapshot)
    # A shard whose blob has gone makes the cache incomplete, and the folder unusable.
    shard_of(snapshot, KV_A).resolve().unlink()
    refused("org/model", "not whole in the local cache")
    refused(snapshot, "lacks 1 of")


def test_side_files_travel_and_weights_and_our_own_files_do_not(folder: Path) -> None:
    for name in (
        "SHA256SUMS",
        "surgery_manifest.json",
        "surgery_report.html",
        "old.bin",
        ".hidden",
        "README.md",
    ):
        (folder / name).write_text("x")
    (folder / "sub" / "deeper").mkdir(parents=True)
    (folder / "sub" / "deeper" / "vocab.txt").write_text("x")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    assert set(open_checkpoint(folder).side_files) == {
        "chat_template.jinja", "config.json", "configuration_deepseek.py", "generation_config.json",
        "modeling_deepseek.py", "sub/deeper/vocab.txt", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_the_journal_of_a_killed_run_is_no_side_file(folder: Path) -> None:
    (folder / "surgery-journal.jsonl").write_text("")
    (folder / "surgery-lock").write_text("")
    assert not {name for name in open_checkpoint(folder).side_files if name.startswith("surgery")}


# Folders that are not whole


def test_no_folder_and_no_file_of_a_model(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist")
    refused(str(tmp_path / "absent"), "does not exist")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no safetensors files")


def test_missing_shards_are_all_named(folder: Path) -> None:
    gone = sorted(folder.glob("*.safetensors"))[:2]
    for path in gone:
        path.unlink()
    error = refused(folder, "lacks 2 of 4", gone[0].name)
    assert error.table is not None
    assert error.table.rows == tuple((path.name,) for path in gone)


@pytest.mark.parametrize("cut", [1, 4096, "header", "all"])
def test_truncated_shards_are_found_without_reading_tensors(folder: Path, cut: int | str) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    size = {"header": 200, "all": 0}.get(str(cut)) if isinstance(cut, str) else shard.stat().st_size - cut
    os.truncate(shard, size or 0)
    refused(folder, shard.name)


def test_a_missing_index_is_asked_for(folder: Path) -> None:
    (folder / INDEX).unlink()
    refused(folder, "4 safetensors files and no")


def test_a_lone_shard_of_several_is_no_whole_model(dense: Path) -> None:
    (dense / INDEX).unlink()
    for path in sorted(dense.glob("*.safetensors"))[1:]:
        path.unlink()
    refused(dense)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "\xff", ""]
)
def test_an_index_that_is_none(dense: Path, text: str) -> None:
    (dense / INDEX).write_bytes(text.encode("latin-1"))
    refused(dense, INDEX)


def test_an_index_that_names_nothing(dense: Path) -> None:
    (dense / INDEX).write_text('{"weight_map": {}}')
    refused(dense)


def test_an_index_that_lies_is_refused_with_every_lie(dense: Path) -> None:
    wrong = shard_of(dense, "model.norm.weight").name
    edit_index(dense, lambda names: names.update({"model.absent.weight": wrong}))
    error = refused(dense, "wrong about 1 tensors", "model.absent.weight", "no shard")
    edit_index(dense, lambda names: names.update({"model.embed_tokens.weight": wrong}))
    error = refused(dense, "wrong about 2 tensors")
    assert error.table is not None
    assert {row[0] for row in error.table.rows} == {"model.absent.weight", "model.embed_tokens.weight"}


def test_an_index_cannot_point_outside_its_folder(dense: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"x": torch.zeros(1)}, outside)
    for name in ("../outside.safetensors", str(outside), "..", "."):
        edit_index(dense, lambda names, name=name: names.update({"x": name}))
        refused(dense, "lacks")


def test_tensors_the_index_forgets_are_kept_and_told(dense: Path) -> None:
    edit_index(dense, lambda names: names.pop("model.norm.weight"))
    checkpoint = open_checkpoint(dense)
    assert "model.norm.weight" in checkpoint.tensors
    assert [event for event in checkpoint.events if "model.norm.weight" in event.message]


def test_a_tensor_in_two_shards(dense: Path) -> None:
    first, second = sorted(dense.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second)
    refused(dense, name, "two shards", first.name, second.name)


def test_stray_shards_are_ignored_and_told(dense: Path) -> None:
    save_file({"stray": torch.zeros(3)}, dense / "consolidated.safetensors")
    checkpoint = open_checkpoint(dense)
    assert "stray" not in checkpoint.tensors
    assert "consolidated.safetensors" not in checkpoint.side_files
    assert any("consolidated.safetensors" in event.message for event in checkpoint.events)


@pytest.mark.parametrize("text", ["{", "[]", "3", "", "\xff\xfe"])
def test_a_config_that_is_none(dense: Path, text: str) -> None:
    (dense / "config.json").write_bytes(text.encode("latin-1"))
    refused(dense, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": None}, {"model_type": ["llama"]}, {"num_hidden_layers": "2"}, {"text_config": 3},
        {"quantization_config": None}, {"quantization_config": {}},
        {"quantization_config": "fp8"}, {"quantization_config": ["fp8"]},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
    ],
    ids=str,
)  # fmt: skip
def test_odd_values_in_a_config_are_no_crash(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, **changes)
    try:
        assert open_checkpoint(folder).tensors
    except CheckpointError as error:
        assert error.message


def test_a_config_nested_too_deep(dense: Path) -> None:
    (dense / "config.json").write_text('{"a":' * 100_000)
    refused(dense, "config.json")


# Weights and scales


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def test_an_fp8_weight_without_its_scale(folder: Path) -> None:
    change_shards(folder, without(f"{KV_A}_scale_inv"))
    error = refused(folder, KV_A, "without")
    assert error.hint


def test_a_scale_without_its_weight(folder: Path) -> None:
    change_shards(folder, without(KV_A))
    refused(folder, f"{KV_A}_scale_inv", "without its weight")


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 3), (4,), (2, 2, 1), ()], ids=str)
def test_scales_of_another_shape(folder: Path, shape: tuple[int, ...]) -> None:
    name = f"{KV_A}_scale_inv"
    change_shards(
        folder, lambda tensors: {**tensors, name: torch.ones(shape)} if name in tensors else tensors
    )
    refused(folder, KV_A, "scales of shape")


def test_all_faults_of_weights_and_scales_stand_in_one_table(folder: Path) -> None:
    other = "model.layers.1.self_attn.o_proj.weight"
    change_shards(folder, lambda tensors: without(other)(without(f"{KV_A}_scale_inv")(tensors)))
    error = refused(folder, "2 tensors cannot be understood")
    assert error.table is not None
    assert {row[0] for row in error.table.rows} == {KV_A, f"{other}_scale_inv"}


@pytest.mark.parametrize("gone", ["_scales", "_blocks"])
def test_mxfp4_blocks_without_scales(tmp_path: Path, gone: str) -> None:
    folder = change_shards(factories.gpt_oss_mxfp4(tmp_path / "m", 1), without(f"{GATE_UP}{gone}"))
    refused(folder, "experts")


@pytest.mark.parametrize("family", [factories.gpt_oss_bf16, factories.llama4_text], ids=lambda f: f.__name__)
def test_no_stored_tensor_of_a_fused_fp8_checkpoint_is_lost(
    tmp_path: Path, family: Callable[..., Path]
) -> None:
    def to_fp8(tensors: Tensors) -> Tensors:
        found = dict(tensors)
        for name, tensor in tensors.items():
            if name.endswith("experts.gate_up_proj"):
                found[name] = tensor.to(torch.float8_e4m3fn)
                found[f"{name}_scale_inv"] = torch.ones(tensor.shape[0], 1, 1)
        return found

    folder = change_shards(family(tmp_path / "m", 1), to_fp8)
    change_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError:
        return
    held = {part.stored.name for ref in checkpoint.tensors.values() for part in ref.parts}
    assert held == set(oracle.read_folder(folder))


def test_forms_without_a_codec_are_carried_as_they_are(dense: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change_shards(dense, lambda tensors: {
        key: value.to(torch.float8_e5m2) if key == name else value for key, value in tensors.items()
    })  # fmt: skip
    ref = open_checkpoint(dense).tensors[name]
    assert not ref.codec.decodable
    with pytest.raises(CheckpointError, match="F8_E5M2"):
        ref.read()


def test_fused_experts_of_a_wrong_shape(tmp_path: Path) -> None:
    folder = factories.llama4_text(tmp_path / "m", 1)
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    change_shards(folder, lambda tensors: {
        key: value[..., :-1].contiguous() if key == name else value for key, value in tensors.items()
    })  # fmt: skip
    refused(folder, name)


# The hub


def test_a_hub_id_that_is_not_cached_is_one_error_at_once_when_offline(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from surgery.errors import CheckpointError\n"
        "from surgery.stream.source import open_checkpoint\n"
        "try: open_checkpoint('org/absent')\n"
        "except CheckpointError as error: print(error.exit_code, error.message, '|', error.hint)\n"
        "assert 'torch' not in sys.modules\n"
    )
    places = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **places},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 org/absent is no local folder")
    assert "hf download org/absent" in done.stdout
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_index_in_the_cache_is_one_error(
    dense: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (dense / INDEX).write_text(text)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(dense))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("org/model")


@pytest.mark.parametrize("name", ["", "a/b/c", "org/", "/org", "org/model name", "org/mo:del", "../x"])
def test_names_that_are_no_hub_id(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if name == "":
        monkeypatch.chdir("/")
    refused(name)


def test_a_home_of_nobody() -> None:
    refused("~no-such-user/model")


def test_reading_a_file_that_shrank_is_named(dense: Path) -> None:
    checkpoint = open_checkpoint(dense)
    last = max(
        checkpoint.tensors.values(),
        key=lambda ref: (ref.parts[0].stored.file.name, ref.parts[0].stored.offset),
    )
    file = last.parts[0].stored.file
    assert file is not None
    os.truncate(file.path, file.size - 2)
    with pytest.raises(CheckpointError, match="ends at byte") as caught:
        last.read()
    assert file.path.name in caught.value.message


def test_rows_must_begin_at_a_block(parents: dict[str, Path]) -> None:
    ref = open_checkpoint(parents["base"]).tensors[KV_A]
    with pytest.raises(UsageError, match="multiple of 128"):
        ref.read(slice(64, 128))
    assert np.array_equal(ref.read(slice(0, 5)), ref.read()[:5])


def test_no_rows_are_no_values(parents: dict[str, Path]) -> None:
    assert open_checkpoint(parents["base"]).tensors[KV_A].read(slice(128, 128)).shape == (0, 256)
