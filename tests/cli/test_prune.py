"""`surgery prune` on the command line: what it writes, says and refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import factories
import pytest
import torch
from folders import MANIFEST, change_shards, file_hashes, opaque_experts
from tiny_models import write_tokenizer
from walk_models import Families, demos

import surgery
from surgery.calibrate.walk import Walk
from surgery.cli.app import main
from surgery.cli.one_step import domains_of
from surgery.errors import UsageError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return demos(tmp_path / "d.jsonl")


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def prune(model: Path, out: Path, *more: str) -> int:
    return main(["prune", str(model), "-o", str(out), *more])


def test_one_step(tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prune(tiny("deepseek_v3"), out, "--calibration", str(data), "--set", "keep=0.5") == 0
    said = capsys.readouterr()
    assert "4 of 8 experts stay" in said.out
    assert f"surgeryverify{out}" in "".join(said.err.split())
    config = json.loads((out / "config.json").read_text())
    assert (config["n_routed_experts"], config["n_group"], config["topk_group"]) == (4, 1, 1)
    recipe = (out / "surgery_recipe.yaml").read_text()
    assert "experts.easy_ep" in recipe and "keep: 0.5" in recipe
    assert main(["verify", str(out), "--recompute", "all", "--json"]) == 0
    assert document(capsys)["ok"]
    page = (out / "surgery_report.html").read_text()
    assert "experts.easy_ep" in page and "<svg" in page


def test_the_written_recipe_makes_the_same_again(tiny: Families, tmp_path: Path, data: Path) -> None:
    arguments = ("--calibration", f"x={data}", "--set", "keep=4", "--set", "groups=equal_per_group", "--json")
    assert prune(tiny("deepseek_v3"), tmp_path / "a", *arguments) == 0
    assert (
        main(["run", str(tmp_path / "a" / "surgery_recipe.yaml"), "-o", str(tmp_path / "b"), "--json"]) == 0
    )
    one, two = (file_hashes(tmp_path / name) for name in ("a", "b"))
    for name in ("model.safetensors", "config.json", "surgery_keep.json", "surgery_experts.json"):
        assert one[name] == two[name], name


def test_json_and_dry_run(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--calibration", str(data), "--set", "keep=3", "--json")
    assert prune(tiny("qwen3_moe"), tmp_path / "out", *given, "--dry-run") == 0
    walk, _ = document(capsys)["passes"]
    assert walk["walk"] and walk["device_bytes"] > 0 and walk["calibration"]["sequences"] == 4
    assert not (tmp_path / "out").exists()
    assert prune(tiny("qwen3_moe"), tmp_path / "out", *given) == 0
    ran = document(capsys)
    assert ran["folder"] == str(tmp_path / "out") and len(ran["dropped"]) == 2 * 3 * 3
    assert prune(tiny("qwen3_moe"), tmp_path / "out", *given) == 5
    capsys.readouterr()
    assert prune(tiny("qwen3_moe"), tmp_path / "out", *given, "--overwrite") == 0


def test_plan_of_a_recipe_says_what_the_walk_needs(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = "{op: experts.reap, keep: 3, calibration: d.jsonl}"
    text = f"parents: {{m: {tiny('mixtral')}}}\nsteps:\n  - {step}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "r.yaml")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"pass 1 +walk for experts.reap: reads .* tokens in float32 on cpu", said)
    assert re.search(r"device .*, host .*, disk ", said) and re.search(r"pass 2 +experts.reap: reads", said)


def test_domains_by_name() -> None:
    assert domains_of(["a.jsonl", "b.jsonl"]) == {"all": ["a.jsonl", "b.jsonl"]}
    assert domains_of(["x=a", "y=b", "x=c"]) == {"x": ["a", "c"], "y": ["b"]}
    assert domains_of(["dir/a=b.jsonl"]) == {"all": ["dir/a=b.jsonl"]}
    for given in (["x=a", "b"], ["b", "x=a", "y=c"], ["=a"], ["x="]):
        with pytest.raises(UsageError):
            domains_of(given)


def test_domains_reach_the_output(tiny: Families, tmp_path: Path, data: Path) -> None:
    other = demos(tmp_path / "e.jsonl", ("1 2 3", "4 5 6"))
    given = ("--calibration", f"x={data}", "--calibration", f"y={other}", "--set", "keep=3", "--json")
    assert prune(tiny("olmoe"), tmp_path / "out", *given) == 0
    row = json.loads((tmp_path / "out" / MANIFEST).read_text())["measurements"][-1]
    assert row["domains"] == ["x", "y"] and len(row["overlap"]) == 1
    assert 0 <= row["overlap"][0]["share"] <= 1


REFUSED: list[tuple[str, list[str], int, str]] = [
    ("qwen3_moe", ["--set", "keep=3"], 3, "calibration"),
    ("qwen3_moe", ["--calibration", "DATA"], 3, "keep"),
    ("qwen3_moe", ["--calibration", "none.jsonl", "--set", "keep=3"], 2, "none.jsonl"),
    ("qwen3_moe", ["--calibration", "EMPTY", "--set", "keep=3"], 2, "no document"),
    ("qwen3_moe", ["--calibration", "BLANK", "--set", "keep=3"], 2, "d.jsonl:1.*empty|blank.jsonl:1.*empty"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=6"], 5, "nothing would be dropped"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=60"], 5, "nothing would be dropped"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=1"], 5, "fewer than the 2"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=0.01"], 5, "fewer than the 2"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=2.5"], 5, "whole number"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=0"], 3, "keep"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=-1"], 3, "keep"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=half"], 3, "keep"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=.nan"], 3, "keep"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=true"], 3, "keep"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=3", "--set", "groups=some"], 3, "groups"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=3", "--set", "kepe=3"], 3, "did you mean `keep`"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep"], 3, "keep"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep.a=3"], 3, "keep"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=3", "--set", "mtp=keep"], 3, "mtp"),
    (
        "qwen3_moe",
        ["--calibration", "DATA", "--set", "keep=3", "--set", "statistics=s.json"],
        3,
        "statistics",
    ),
    ("qwen3_moe", ["--set", "statistics=s.json", "--set", "keep=3"], 2, "s.json"),
    ("qwen3_moe", ["--calibration", "x=DATA", "--calibration", "DATA", "--set", "keep=3"], 2, "domain"),
    (
        "qwen3_moe",
        ["--calibration", "DATA", "--set", "keep=3", "--set", "calibration.sequence_length=300"],
        5,
        "256",
    ),
    ("qwen3_moe", ["--op", "experts.eazy_ep", "--calibration", "DATA"], 3, "did you mean `experts.easy_ep`"),
    ("qwen3_moe", ["--op", "merge.aoe", "--set", "keep=3"], 3, "keep|base"),
    ("qwen3_moe", ["--op", "experts.drop"], 3, "keep_list"),
    ("qwen3_moe", ["--op", "experts.drop", "--set", "keep_list=no.json"], 2, "no.json"),
    ("qwen3_moe", ["--op", "experts.random", "--set", "keep=3", "--calibration", "DATA"], 3, "calibration"),
    (
        "deepseek_v3",
        ["--calibration", "DATA", "--set", "keep=5", "--set", "groups=regrouped"],
        5,
        "equal groups",
    ),
    (
        "deepseek_v3",
        ["--calibration", "DATA", "--set", "keep=5", "--set", "groups=best_groups"],
        5,
        "whole groups",
    ),
    ("llama", ["--calibration", "DATA", "--set", "keep=0.5"], 4, "no routed experts"),
    ("llama", ["--op", "experts.random", "--set", "keep=0.5"], 4, "no routed experts"),
    ("llama4_text", ["--calibration", "DATA", "--set", "keep=2"], 4, "one operation"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=3", "--device", "warp"], 2, "warp"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=3", "--dtype", "float8"], 2, "float8"),
    ("qwen3_moe", ["--calibration", "DATA", "--set", "keep=3", "--memory", "1MB"], 5, "256"),
]


@pytest.mark.parametrize(("family", "arguments", "code", "told"), REFUSED)
def test_refused_with_nothing_written(
    tiny: Families, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path, family: str,
    arguments: list[str], code: int, told: str,
) -> None:  # fmt: skip
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    before = sorted(tmp_path.rglob("*"))
    names = {"DATA": data, "EMPTY": tmp_path / "empty.jsonl", "BLANK": tmp_path / "blank.jsonl"}
    for name, path in names.items():
        arguments = [each.replace(name, str(path)) for each in arguments]
    found = prune(tiny(family), tmp_path / "out", *arguments)
    said = capsys.readouterr()
    text = " ".join(said.err.split())
    assert found == code, text
    assert re.search(told, text), text
    assert "Traceback" not in text and "unexpected" not in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["template", "tokenizer", "none"])
def test_tokenizers_that_do_not_serve(
    tiny: Families, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    rows = {"text": "plain text"}
    if what == "template":
        write_tokenizer(folder, chat_template=None)
        rows = {"prompt": "p", "reply": "r"}
    elif what == "tokenizer":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))

        def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            ends = ("embed_tokens.weight", "lm_head.weight")
            return {name: each[:60] if name.endswith(ends) else each for name, each in tensors.items()}

        change_shards(folder, cut)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    (tmp_path / "x.jsonl").write_text(json.dumps(rows) + "\n")
    found = prune(folder, tmp_path / "out", "--calibration", str(tmp_path / "x.jsonl"), "--set", "keep=3")
    text = " ".join(capsys.readouterr().err.split())
    code, told = {
        "template": (4, "no chat template"),
        "tokenizer": (5, "vocabulary has 60"),
        "none": (4, "tokenizer"),
    }[what]
    assert found == code and told in text and "unexpected" not in text, text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x.jsonl"]


def test_opaque_experts_and_calibration(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = opaque_experts(factories.qwen3_moe(tmp_path / "model", 1, experts=4))
    assert prune(folder, tmp_path / "out", "--calibration", str(data), "--set", "keep=2") == 4
    assert "hqq" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "model"]
    assert prune(folder, tmp_path / "out", "--op", "experts.random", "--set", "keep=2", "--quiet") == 0


def test_other_formats(tiny: Families, tmp_path: Path, data: Path) -> None:
    given = ("--calibration", str(data), "--set", "keep=3", "--json", "--format", "bf16")
    assert prune(tiny("mixtral"), tmp_path / "out", *given) == 0
    for ref in surgery.open(tmp_path / "out").tensors.values():
        assert ref.codec.name == ("f32" if ref.info.role == "router" else "bf16")  # fp32 routers stay


def test_stopped_runs_say_how_to_go_on(
    tiny: Families, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    layer = Walk._layer

    def stop(self: Walk, number: int) -> None:
        if number == 1:
            raise KeyboardInterrupt
        layer(self, number)

    given = ("--calibration", str(data), "--set", "keep=3")
    monkeypatch.setattr(Walk, "_layer", stop)
    assert prune(tiny("mixtral"), tmp_path / "out", *given) == 130
    assert "resume" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(Walk, "_layer", layer)
    assert prune(tiny("mixtral"), tmp_path / "out", *given) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "out"]


def test_plans_without_layer_steps_need_no_torch(tiny: Families, tmp_path: Path) -> None:
    document = {
        "kind": "surgery-keep-list", "schema": 1, "n_group": 1, "topk_group": 1,
        "layers": {"0": [0, 3], "1": [1, 2]},
    }  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps(document))
    model = tiny("qwen3_moe")
    merge = "{op: merge.aoe, base: a, weights: {b: 0.5}}"
    drop = "{op: experts.drop, keep_list: k.json}"
    for name, parents, step in (("m", f"{{a: {model}, b: {model}}}", merge), ("d", f"{{m: {model}}}", drop)):
        (tmp_path / f"{name}.yaml").write_text(f"parents: {parents}\nsteps:\n  - {step}\n")
    program = (
        "import sys; from surgery.cli.app import main\n"
        f"codes = [main(['plan', '{tmp_path}/' + name]) for name in ('m.yaml', 'd.yaml')]\n"
        "print('torch' in sys.modules, codes)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False [0, 0]", done.stderr
