"""Loading recipes: what is accepted, from where, and where each part of it is said to be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError
from recipe_texts import CHIMERA, TWO_STEPS, edited, load, params

from surgery.errors import RecipeError
from surgery.recipe.load import load_recipe, recipe_from_dict, shipped_recipes
from surgery.recipe.schema import Output, Recipe, Step
from surgery.stream.units import parse_size


def test_a_recipe_becomes_typed() -> None:
    loaded = load(CHIMERA)
    recipe = loaded.recipe
    assert recipe.parents == {"base": "org/base", "reasoner": "org/r1"}
    (step,) = recipe.steps
    assert (step.op, step.name) == ("merge.aoe", None)
    assert step.operator.input_names() == ("base", "reasoner")
    assert params(loaded)["weights"] == {"reasoner": 1.0}
    assert recipe.output == Output(format="source", tokenizer_from="base")
    assert (loaded.filename, loaded.text) == ("r.yaml", CHIMERA)


def test_output_may_be_left_out() -> None:
    assert load(CHIMERA[: CHIMERA.index("output:")]).recipe.output == Output()


@pytest.mark.parametrize(
    "written, value", [("1e-3", 0.001), ("1E-3", 0.001), ('"0.25"', 0.25), ("1", 1.0), (".5", 0.5)]
)
def test_numbers_in_all_spellings(written: str, value: float) -> None:
    assert params(load(edited("threshold: 0.0", f"threshold: {written}")))["threshold"] == value


def test_layer_anchors_have_whole_numbers_as_keys() -> None:
    text = edited("{reasoner: 1.0}", '{reasoner: {0: 0.0, 010: 0.25, "60": 1.0, head: 0.5}}')
    assert params(load(text))["weights"] == {"reasoner": {0: 0.0, 10: 0.25, 60: 1.0, "head": 0.5}}


@pytest.mark.parametrize(
    "written", ["2024-05-28", "12:30:00", "0x1f", "010", "=", "1e3", "true-base", "/a b/#c"]
)
def test_text_that_yaml_1_1_would_read_as_something_else_stays_text(written: str) -> None:
    assert load(edited("org/base", written)).recipe.parents["base"] == written


def test_truth_values_in_all_spellings() -> None:
    for written in ("true", "yes", "On"):
        text = edited("format: source", f"allow_nonfinite: {written}")
        assert load(text).recipe.output.allow_nonfinite is True


def test_aliases_are_followed() -> None:
    text = CHIMERA.replace("org/base", "&p org/base").replace("org/r1", "*p")
    assert load(text).recipe.parents == {"base": "org/base", "reasoner": "org/base"}


def test_later_steps_read_earlier_ones_by_name() -> None:
    recipe = load(TWO_STEPS).recipe
    assert [step.name for step in recipe.steps] == ["first", None]
    assert recipe.steps[1].operator.input_names() == ("a", "first")


@pytest.mark.parametrize(
    "text, size",
    [
        ("5GB", 5_000_000_000), ("500MB", 500_000_000), ("1GiB", 1 << 30), ("123", 123), ("1.5 kB", 1500),
        ("2tb", 2_000_000_000_000), ("64B", 64), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_shard_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert load(edited("format: source", f"shard_size: {text}")).recipe.output.shard_bytes == size


@pytest.mark.parametrize("text", ["", "0", "0.1B", "-5GB", "5 G B", "5XB", "GB", "1e9", "5GBit", "٣", "inf"])
def test_what_is_no_shard_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|byte"):
        parse_size(text)


def test_recipes_are_frozen() -> None:
    recipe = load(CHIMERA).recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.output.format = "bf16"


@pytest.mark.parametrize(
    "path, place",
    [
        ((), "1:1"), (("parents",), "2:3"), (("parents", "base"), "2:9"), (("steps", 0), "5:5"),
        (("steps", 0, "weights", "reasoner"), "7:25"), (("steps", 0, "select", 0), "8:14"),
        (("steps", 0, "select", 7, "role"), "8:13"), (("steps", 3), "5:3"), (("nowhere", 1), "1:1"),
    ],
)  # fmt: skip
def test_locate(path: tuple[str | int, ...], place: str) -> None:
    assert load(CHIMERA).locate(path) == f"r.yaml:{place}"


def test_locate_the_key() -> None:
    assert load(CHIMERA).locate(("steps", 0, "weights", "reasoner"), at_key=True) == "r.yaml:7:15"
    assert load(CHIMERA).locate(("steps", 0, "weights", "other"), at_key=True) == "r.yaml:7:14"


def test_attach_fills_the_location_of_errors_that_come_later() -> None:
    loaded = load(CHIMERA)
    error = RecipeError("matches nothing", path=("steps", 0, "select", 0))
    assert loaded.attach(error) is error
    assert str(error) == "r.yaml:8:14: matches nothing"
    assert loaded.attach(RecipeError("elsewhere", location="x:1:1")).location == "x:1:1"


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + CHIMERA.replace("\n", "\r\n").encode())
    for source in (path, str(path)):
        loaded = load_recipe(source, ["output.format=bf16"])
        assert loaded.recipe.output.format == "bf16"
        assert loaded.locate(("steps", 0, "base")) == f"{path}:6:11"


def test_undecodable_bytes_are_located(tmp_path: Path) -> None:
    path = tmp_path / "latin1.yaml"
    path.write_bytes("parents:\n  bäse: 'ü".encode() + b"\xfc'\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.location == f"{path}:2:11"
    assert caught.value.message == "this is no text in UTF-8: byte 0xfc cannot be decoded"


def test_large_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RecipeError, match="larger than any recipe"):
        load_recipe(path)


@pytest.mark.parametrize(
    "source, message, hint",
    [
        ("chimra", "no file chimra, and no recipe of that name", "did you mean `chimera`?"),
        ("a\0b", "no file a", "shipped recipes: "),
        ("x" * 5000, "cannot read", ""),
        ("../pyproject", "no file", "shipped recipes: "),
    ],
)
def test_missing_files(source: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(source)
    assert caught.value.hint.startswith(hint)
    assert caught.value.location == source


def test_folders_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("source", ["chimera", "chimera.yaml", "recipes/chimera.yaml"])
def test_shipped_recipes_are_found_from_anywhere(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(source).recipe
    assert recipe.parents == {"base": "deepseek-ai/DeepSeek-V3-0324", "reasoner": "deepseek-ai/DeepSeek-R1"}
    assert recipe.steps[0].resolved() == {
        "op": "merge.aoe", "base": "base", "weights": {"reasoner": 1.0}, "select": ["routed_expert"],
        "threshold": 0.0, "norm": "rms",
    }  # fmt: skip


def test_a_file_wins_over_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chimera.yaml").write_text(CHIMERA)
    assert load_recipe("chimera.yaml").filename == "chimera.yaml"
    assert load_recipe("chimera.yaml").recipe.parents["base"] == "org/base"


def test_the_catalogue_names_every_recipe() -> None:
    shipped = shipped_recipes()
    assert {"chimera", "chimera-half", "tri-mind"} <= set(shipped)
    catalogue = (shipped["chimera"].parent / "README.md").read_text()
    for name, path in shipped.items():
        assert f"({name}.yaml)" in catalogue
        assert path.read_text().startswith("# "), "recipes begin with a comment that says what they make"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_again_from_what_they_resolve_to(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert recipe_from_dict(recipe.resolved()).recipe == recipe
    assert load(yaml.safe_dump(recipe.resolved())).recipe == recipe


def test_plain_data() -> None:
    data = yaml.safe_load(CHIMERA)
    loaded = recipe_from_dict(data, ["output.format=bf16"])
    assert loaded.recipe.output.format == "bf16"
    assert data["output"]["format"] == "source", "the caller's data stays as it is"
    assert loaded.locate(("steps", 0, "select")) == "steps.0.select"
    data["steps"][0]["weights"] = {"resoner": True}
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(data)
    assert caught.value.location == "steps.0.weights.resoner"
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        recipe_from_dict([])  # type: ignore[arg-type]


def test_steps_take_operators_that_exist_already() -> None:
    step = load(CHIMERA).recipe.steps[0]
    same = Step(op="merge.aoe", operator=step.operator)
    assert same == step
    recipe = Recipe(parents={"base": "a", "reasoner": "b"}, steps=(same,))
    assert recipe_from_dict(recipe.resolved()).recipe == recipe


def test_pydantic_users_get_validation_errors() -> None:
    with pytest.raises(ValidationError, match="no parent and no earlier step"):
        Recipe.model_validate(
            {"parents": {"a": "x"}, "steps": [{"op": "merge.aoe", "base": "b", "weights": {}}]}
        )


def test_loading_imports_no_torch() -> None:
    code = (
        "import sys; from surgery.recipe.load import load_recipe\n"
        "load_recipe('chimera'); load_recipe('experts/domain'); sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
