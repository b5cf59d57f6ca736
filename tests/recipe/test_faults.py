"""What recipes are refused for: the exact place, the sentence and the suggestion of every kind of fault."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
from pydantic import field_validator
from recipe_texts import TWO_STEPS, edited, load, refused, rows

from surgery.errors import RecipeError
from surgery.operators.protocol import Kind, Operator
from surgery.recipe.document import MAX_CHARS, MAX_VALUES
from surgery.recipe.load import recipe_from_dict
from surgery.recipe.table import OPERATORS

# What the fault is, the recipe, the exact place, the message, the hint.
FAULTS: list[tuple[str, str, str, str, str]] = [
    ("unknown top key", edited("output:", "outptu:"), "10:1", "unknown key `outptu`",
     "did you mean `output`?"),
    ("unknown output key", edited("format: source", "fromat: source"), "11:3", "unknown key `fromat`",
     "did you mean `format`?"),
    ("unknown param", edited("threshold", "treshold"), "9:5", "unknown key `treshold`",
     "did you mean `threshold`?"),
    ("unknown param, nothing near", edited("threshold", "zzz"), "9:5", "unknown key `zzz`",
     "keys here: op, name, base, weights, select, threshold, norm"),
    ("misspelt required param", edited("weights", "wieghts"), "7:5", "unknown key `wieghts`",
     "did you mean `weights`?"),
    ("unknown key in a rule", edited("[routed_expert]", "[{rol: router}]"), "8:15", "unknown key `rol`",
     "did you mean `role`?"),
    ("unknown op", edited("merge.aoe", "merge.aeo"), "5:9", "unknown operator `merge.aeo`",
     "did you mean `merge.aoe`?"),
    ("op is no text", edited("op: merge.aoe", "op: 3"), "5:9", "`steps.0.op` must be text, not `3`",
     'put it in quotes: "3"'),
    ("op is missing", edited("op: merge.aoe", "name: x"), "5:5", "`steps.0.op` is missing",
     f"operators: {', '.join(OPERATORS)}"),
    ("unknown module", edited("merge.aoe", "no_such_package.ops:Merge"), "5:9",
     "operator no_such_package.ops:Merge cannot be imported: No module named 'no_such_package'", ""),
    ("unknown class", edited("merge.aoe", "surgery.errors:Merge"), "5:9",
     "operator surgery.errors:Merge cannot be imported: module 'surgery.errors' has no attribute 'Merge'",
     ""),
    ("no operator", edited("merge.aoe", "surgery.errors:Table"), "5:9",
     "surgery.errors:Table is no operator: "
     "it must derive from surgery.operators.protocol.Operator", ""),
    ("unknown role", edited("[routed_expert]", "[router, routed_exprt]"), "8:22",
     "`routed_exprt` is no role or selector; did you mean `routed_expert`?", ""),
    ("unknown role in a rule", edited("[routed_expert]", "[{role: routed_exprt}]"), "8:21",
     "`routed_exprt` is no role or selector; did you mean `routed_expert`?", ""),
    ("unknown parent", edited("base: base\n", "base: bsae\n"), "6:11",
     "`bsae` is no parent and no earlier step", "did you mean `base`?"),
    ("unknown parent as a key", edited("{reasoner:", "{resoner:"), "7:15",
     "`resoner` is no parent and no earlier step", "did you mean `reasoner`?"),
    ("unknown parent in a rule", edited("[routed_expert]", "[{role: router, weights: {r1: 0.5}}]"), "8:39",
     "`r1` is no parent and no earlier step", "known here: base, reasoner"),
    ("unknown tokenizer donor", edited("tokenizer_from: base", "tokenizer_from: reasner"), "12:19",
     "`reasner` is no parent and no step", "did you mean `reasoner`?"),
    ("weight out of range", edited("1.0", "1.5"), "7:25",
     "`steps.0.weights.reasoner` must be at most 1, not 1.5",
     ""),
    ("anchor out of range", edited("1.0", "{3: 0.5, 60: -2}"), "7:38",
     "`steps.0.weights.reasoner.60` must be at least 0, not -2", ""),
    ("anchor of unknown name", edited("1.0", "{3: 0.5, haed: 1}"), "7:34",
     "the key `haed` must be a whole number or `embedding` or `head`", "did you mean `head`?"),
    ("weight of no kind", edited("1.0", "much"), "7:25",
     "`steps.0.weights.reasoner` must be a number or a mapping, not `much`", ""),
    ("choice", edited("format: source", "format: bf-16"), "11:11",
     "`output.format` must be `source`, `bf16`, `fp8-block`, `compressed-tensors`, `gptq`, `gptq-v2`, `awq`, "
        "`bnb-nf4` or `mxfp4`, not `bf-16`", "did you mean `bf16`?"),
    ("size", edited("format: source", "shard_size: huge"), "11:15",
     "`huge` is no size; write it as 5GB, 500MB, 1GiB or a number of bytes", ""),
    ("number wanted", edited("threshold: 0.0", "threshold: none"), "9:16",
     "`steps.0.threshold` must be a number, not `none`", ""),
    ("truth value for a number", edited("threshold: 0.0", "threshold: on"), "9:16",
     "`steps.0.threshold` must be a number, not `on`", ""),
    ("truth value for an anchor", edited("1.0", "{0: yes}"), "7:29",
     "`steps.0.weights.reasoner.0` must be a number, not `yes`", ""),
    ("number for a truth value", edited("format: source", "allow_nonfinite: 1"), "11:20",
     "`output.allow_nonfinite` must be true or false, not `1`", ""),
    ("not finite", edited("threshold: 0.0", "threshold: .inf"), "9:16",
     "`steps.0.threshold` must be a finite number, not `.inf`", ""),
    ("parent called no", edited("  reasoner: org/r1", "  reasoner: org/r1\n  no: org/x"), "4:3",
     "`no` as a key means false in YAML", 'put it in quotes: "no"'),
    ("parent called on", edited("  base: org/base", "  base: org/base\n  On: org/x"), "3:3",
     "`On` as a key means true in YAML", 'put it in quotes: "On"'),
    ("parent called null", edited("  base: org/base", "  base: org/base\n  ~: org/x"), "3:3",
     "`~` as a key means nothing in YAML", 'put it in quotes: "~"'),
    ("parent called 0.5", edited("  base: org/base", "  base: org/base\n  0.5: org/x"), "3:3",
     "`0.5` as a key means a number in YAML", 'put it in quotes: "0.5"'),
    ("parent called 1.0", edited("  base: org/base", "  base: org/base\n  1.0: org/x"), "3:3",
     "`1.0` as a key means a number in YAML", 'put it in quotes: "1.0"'),
    ("parent called 7", edited("  base: org/base", "  base: org/base\n  7: org/x"), "3:3",
     "the key `7` must be text", 'put it in quotes: "7"'),
    ("yes for text", edited("tokenizer_from: base", "tokenizer_from: yes"), "12:19",
     "`output.tokenizer_from` must be text, not `yes`", 'put it in quotes: "yes"'),
    ("no path", edited("base: org/base", "base:"), "2:8", "`parents.base` must be text, but is empty", ""),
    ("empty path", edited("base: org/base", 'base: ""'), "2:9", "`parents.base` must not be empty", ""),
    ("empty parents", "parents: {}\nsteps: [{op: merge.aoe, base: a, weights: {}}]", "1:10",
     "`parents` must not be empty", ""),
    ("empty steps", "parents: {a: x}\nsteps: []", "2:8", "`steps` must not be empty", ""),
    ("steps missing", "# nothing more\nparents: {a: x}", "2:1", "`steps` is missing", ""),
    ("steps is a mapping", "parents: {a: x}\nsteps: {op: merge.aoe}", "2:8",
     "`steps` must be a list, not a mapping", ""),
    ("step is text", "parents: {a: x}\nsteps:\n  - merge.aoe", "3:5",
     "`steps.0` must be a mapping, not `merge.aoe`", ""),
    ("param missing", edited("    base: base\n", ""), "5:5", "`steps.0.base` is missing", ""),
    ("output is empty", edited("  format: source\n  tokenizer_from: base\n", ""), "10:8",
     "`output` must be a mapping, but is empty", ""),
    ("duplicate key", edited("  reasoner: org/r1", "  reasoner: org/r1\n  base: org/x"), "4:3",
     "`base` is set twice, first in line 2", ""),
    ("duplicate anchor", edited("1.0", "{5: 1.0, 05: 0.5}"), "7:34", "`05` is set twice, first in line 7",
     ""),
    ("merge key", edited("threshold: 0.0", "<<: {norm: rms}"), "9:5", "`<<` is not supported",
     "repeat the keys"),
    ("key is a list", edited("threshold: 0.0", "[a]: 1"), "9:5",
     "a key must be text, not a list or a mapping", ""),
    ("tag", edited("threshold: 0.0", "norm: !!python/name:os.system rms"), "9:11",
     "the tag `!!python/name:os.system` has no meaning in a recipe", ""),
    ("half a surrogate pair", edited("org/base", '"\\ud800"'), "2:9",
     "half of a surrogate pair is no character", ""),
    ("step reads itself", edited("base: a\n    weights: {b", "base: first\n    weights: {b", TWO_STEPS),
     "5:11",
     "`first` is no earlier step", "known here: a, b"),
    ("step called as a parent", TWO_STEPS.replace("first", "b"), "4:11",
     "`b` is already a parent or an earlier step", ""),
    ("step without a reader", edited("{first: 0.5}", "{b: 0.5}", TWO_STEPS), "3:5",
     "nothing reads the result of this step", "give the step a `name` and read it in a later step"),
    ("weights beyond 1", edited("{reasoner: 1.0}", "{reasoner: 1.0, base: 0.5}"), "7:14",
     "the weights sum to 1.5, not 1; leave out base and it gets what is left", ""),
]  # fmt: skip

# The same for texts that cannot be read as YAML, or hold no recipe.
UNREADABLE: list[tuple[str, str, str, str]] = [
    ("empty", "", "1:1", "the recipe is empty"),
    ("comments only", "# a\n\n# b\n", "1:1", "the recipe is empty"),
    ("list", "- a\n- b\n", "1:1", "a recipe is a mapping with the keys parents, steps and output"),
    ("text", "\n  hello", "2:3", "a recipe is a mapping with the keys parents, steps and output"),
    ("unclosed", "parents: {a: x\nsteps: []", "2:6", "this is no YAML: while parsing a flow mapping, "
     "expected ',' or '}', but got ':'"),
    ("tab", "parents:\n\ta: x", "2:1", "this is no YAML: while scanning for the next token, "
     "found character '\\t' that cannot start any token"),
    ("colon", "parents: a: b", "1:11", "this is no YAML: mapping values are not allowed here"),
    ("unknown alias", "parents: *x", "1:10", "this is no YAML: found undefined alias 'x'"),
    ("two documents", "a: 1\n---\nb: 1", "2:1", "this is no YAML: expected a single document in the stream, "
     "but found another document"),
    ("control character", "parents:\n  a: \x07", "2:6", "character 0x7 is not allowed in YAML"),
    ("escape beyond Unicode", 'a: "\\UFFFFFFFF"', "1:1", "this is no YAML: "),
    ("alias in itself", "parents: &a [*a]", "1:10", "an alias in here stands for the value that contains it"),
    ("deep", "x: " + "[" * 5000, "1:53", "this is no YAML: nested deeper than 50 levels"),
    ("huge", "#" * (MAX_CHARS + 1), "1:1", f"a text of {MAX_CHARS + 1:,} characters is no recipe; "
     f"the limit is {MAX_CHARS:,}"),
]  # fmt: skip


@pytest.mark.parametrize("text, place, message, hint", [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_faults_are_located(text: str, place: str, message: str, hint: str) -> None:
    error = refused(text)
    assert (error.location, error.message, error.hint) == (f"r.yaml:{place}", message, hint)
    assert error.exit_code == 3
    assert str(error) == f"r.yaml:{place}: {message}"
    assert rows(error) == []


@pytest.mark.parametrize("text, place, message", [f[1:] for f in UNREADABLE], ids=[f[0] for f in UNREADABLE])
def test_unreadable_texts_are_located(text: str, place: str, message: str) -> None:
    error = refused(text)
    assert error.location == f"r.yaml:{place}"
    assert error.message.startswith(message)


def test_alias_bombs_are_refused() -> None:
    lines = ["a: &a [1,1,1,1,1,1,1,1,1]"]
    lines += [f"{n}: &{n} [{','.join([f'*{b}'] * 9)}]" for b, n in zip("abcdefghi", "bcdefghij", strict=True)]
    assert refused("\n".join(lines)).message == f"aliases expand to more than {MAX_VALUES:,} values"


def test_all_faults_are_told_at_once_in_the_order_of_the_text() -> None:
    error = refused(
        "parents: {no: x, a: y, a: z}\n"
        "steps:\n"
        "  - {op: merge.aoe, base: aa, weights: {a: 0.5}}\n"
        "  - {op: merge.aoe, base: a, weights: {a: 3}, slect: all, norm: rsm}\n"
        "  - {op: merge.ao}\n"
        "output: {tokenizer_from: b}\n"
    )
    assert (error.location, error.message) == ("r.yaml:1:11", "`no` as a key means false in YAML")
    assert error.table and error.table.columns == ("location", "problem")
    assert rows(error) == [
        ("r.yaml:1:24", "`a` is set twice, first in line 1"),
        ("r.yaml:3:27", "`aa` is no parent and no earlier step; did you mean `a`?"),
        ("r.yaml:4:43", "`steps.1.weights.a` must be at most 1, not 3"),
        ("r.yaml:4:47", "unknown key `slect`; did you mean `select`?"),
        ("r.yaml:4:65", "`steps.1.norm` must be `rms` or `relative`, not `rsm`; did you mean `rms`?"),
        ("r.yaml:5:10", "unknown operator `merge.ao`; did you mean `merge.aoe`?"),
        ("r.yaml:6:26", "`b` is no parent and no step; known: no, a"),
    ]


class Graft(Operator):
    op: ClassVar[str] = "tests.graft"
    kind: ClassVar[Kind] = "weight"

    onto: str
    donors: tuple[str, ...] = ()
    depth: int = 1
    note: str | None = None

    @field_validator("depth")
    @classmethod
    def _depth_is_small(cls, value: int) -> int:
        if value == 13:
            raise RecipeError("13 is too deep", path=("depth",), hint="try 12")
        if value == 0:
            raise LookupError("no depth")
        return value

    def input_names(self) -> tuple[str, ...]:
        return (self.onto, *self.donors)


@pytest.fixture
def graft(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("grafting")
    module.Graft = Graft  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grafting", module)
    return "parents: {a: x, b: y}\nsteps:\n  - op: grafting:Graft\n    onto: a\n    donors: [b]\n"


def test_operators_by_path(graft: str) -> None:
    recipe = load(graft).recipe
    assert isinstance(recipe.steps[0].operator, Graft)
    resolved = {"op": "grafting:Graft", "onto": "a", "donors": ["b"], "depth": 1}
    assert recipe.steps[0].resolved() == resolved
    assert recipe_from_dict(recipe.resolved()).recipe == recipe


@pytest.mark.parametrize(
    "edit, place, message, hint",
    [
        ("    depht: 2", "6:5", "unknown key `depht`", "did you mean `depth`?"),
        ("    depth: 1.5", "6:12", "`steps.0.depth` must be a whole number, not `1.5`", ""),
        ("    depth: 0", "3:5", "grafting:Graft fails on its params: LookupError: no depth", ""),
        ("    depth: yes", "6:12", "`steps.0.depth` must be a number, not `yes`", ""),
        ("    depth: 13", "6:12", "13 is too deep", "try 12"),
        ("    note: off", "6:11", "`steps.0.note` must be text, not `off`", 'put it in quotes: "off"'),
        ("    onto: q", "6:5", "`onto` is set twice, first in line 4", ""),
    ],
)  # fmt: skip
def test_faults_in_params_of_others(graft: str, edit: str, place: str, message: str, hint: str) -> None:
    error = refused(graft + edit)
    assert (error.location, error.message, error.hint) == (f"r.yaml:{place}", message, hint)


def test_names_in_lists_are_located(graft: str) -> None:
    assert refused(edited("[b]", "[b, c]", graft)).location == "r.yaml:5:17"


def test_the_base_class_is_no_operator() -> None:
    error = refused(edited("merge.aoe", "surgery.operators.protocol:Operator"))
    assert error.location.startswith("r.yaml:")


def test_import_time_faults_of_others_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(str(tmp_path))
    error = refused(edited("merge.aoe", "broken_plugin:Op"))
    assert error.location == "r.yaml:5:9"
    assert "RuntimeError: no licence" in error.message
