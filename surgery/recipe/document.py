"""YAML text to plain data, keeping the place of every key and value.

Values are read off PyYAML's node tree, so that every later complaint can name its line and column.
Stricter and plainer than YAML 1.1, which PyYAML implements:

- duplicate keys, `<<`, custom tags and keys that YAML makes something else of (`no`, `on`, `0.5`) are
  problems; values stay what YAML 1.1 says, but the text as written is kept for messages
- numbers are decimal: `010`, `0x1f` and `12:30` stay text, and so do dates
- aliases are expanded up to a limit and must not contain themselves; nesting is limited as well
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.error import Mark, MarkedYAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from surgery.errors import RecipeError
from surgery.recipe.problems import DocPath, Places, Position, Problem

MAX_CHARS = 1 << 20
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Values after aliases are expanded."""

_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = frozenset({f"{_TAG}str", f"{_TAG}timestamp", f"{_TAG}value"})
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,99})")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.IGNORECASE)
_INT_LIKE = re.compile(r"[-+]?[0-9]{1,100}")
_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_HINTS = {
    "cannot start any token": "indent with spaces; put text that starts with a sign such as @ ` % in quotes",
    "mapping values are not allowed": "put text that holds `: ` in quotes, and check the indentation",
}


@dataclass
class Document:
    """What a text says. Overrides change `data` and `positions`; `problems` collects what is odd."""

    filename: str
    text: str
    data: Any
    positions: dict[DocPath, Position] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def places(self) -> Places:
        return Places(self.filename, self.positions)


class _Loader(yaml.SafeLoader):
    """Composes nodes, up to a depth; the parser would go on to the end of Python's stack."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def parse_document(text: str, filename: str) -> Document:
    """Read one YAML document. Raises RecipeError where it cannot be read at all; `data` is None where
    there is nothing in it."""
    document = Document(filename, text, None)
    if len(text) > MAX_CHARS:
        raise RecipeError(
            f"a text of {len(text):,} characters is no recipe; the limit is {MAX_CHARS:,}",
            location=f"{filename}:1:1",
        )
    root = _compose(text, filename)
    if root is not None:
        document.data = _Walk(document).value(root, (), root.start_mark)
    return document


def _compose(text: str, filename: str) -> Node | None:
    try:
        node: Node | None = yaml.compose(text, Loader=_Loader)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{mark.line + 1}:{mark.column + 1}" if mark else "1:1"
        problem = ", ".join(filter(None, (error.context, error.problem)))
        hint = next((hint for start, hint in _HINTS.items() if start in problem), "")
        raise RecipeError(f"this is no YAML: {problem}", location=f"{filename}:{where}", hint=hint) from error
    except ReaderError as error:
        raise RecipeError(
            f"character {ord(text[error.position]):#x} is not allowed in YAML",
            location=f"{filename}:{line_and_column(text[: error.position])}",
        ) from error
    except (ValueError, OverflowError) as error:
        # PyYAML lets the built-ins complain about numbers in escapes and in %YAML directives.
        raise RecipeError(f"this is no YAML: {error}", location=f"{filename}:1:1") from error
    return node


class _Walk:
    """Builds the data of a document, node by node."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.num_values = 0
        self.open_nodes: set[int] = set()

    def value(self, node: Node, path: DocPath, key_mark: Mark) -> Any:
        """The plain data of `node`, which stands at `path` behind the key at `key_mark`."""
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise self._refused(node, f"aliases expand to more than {MAX_VALUES:,} values")
        if id(node) in self.open_nodes:
            raise self._refused(node, "an alias in here stands for the value that contains it")
        text = node.value if isinstance(node, ScalarNode) else ""
        self.document.positions[path] = _position(node.start_mark, key_mark, text)
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        self.open_nodes.add(id(node))
        try:
            if isinstance(node, SequenceNode) and node.tag == f"{_TAG}seq":
                return [
                    self.value(item, (*path, index), item.start_mark) for index, item in enumerate(node.value)
                ]
            if isinstance(node, MappingNode) and node.tag == f"{_TAG}map":
                return self._mapping(node, path)
        finally:
            self.open_nodes.discard(id(node))
        self._odd(node.start_mark, path, f"the tag `{_short(node.tag)}` has no meaning in a recipe")
        return None

    def _mapping(self, node: MappingNode, path: DocPath) -> dict[str | int, Any]:
        mapping: dict[str | int, Any] = {}
        seen: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            mark = key_node.start_mark
            key = self._key(key_node, path)
            if key is None:
                continue
            same = _canonical(key)
            if same in seen:
                first = seen[same]
                self._odd(mark, (*path, key), f"`{key}` is set twice, first in line {first.line + 1}")
                continue
            seen[same] = mark
            mapping[key] = self.value(value_node, (*path, key), mark)
        return mapping

    def _key(self, node: Node, path: DocPath) -> str | int | None:
        """The key, or None for what can be none."""
        if not isinstance(node, ScalarNode):
            self._odd(node.start_mark, path, "a key must be text, not a list or a mapping")
            return None
        text: str = node.value
        if node.tag == f"{_TAG}merge":
            self._odd(node.start_mark, path, "`<<` is not supported", "repeat the keys")
            return None
        key = self._scalar(node, (*path, text))
        if isinstance(key, str) or type(key) is int:
            return key
        reading = "nothing" if key is None else str(key).lower() if isinstance(key, bool) else "a number"
        self._odd(
            node.start_mark, (*path, text),
            f"`{text or '~'}` as a key means {reading} in YAML", f'put it in quotes: "{text or "~"}"',
        )  # fmt: skip
        return text

    def _scalar(self, node: ScalarNode, path: DocPath) -> str | int | float | bool | None:
        text: str = node.value
        tag = node.tag.removeprefix(_TAG)
        if tag == "int" and _INT.fullmatch(text):
            return int(text.replace("_", ""))
        if tag == "float" and _FLOAT.fullmatch(text):
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if tag == "bool" and text.lower() in _TRUTHS:
            return _TRUTHS[text.lower()]
        if tag == "null":
            return None
        if node.tag not in _TEXT_TAGS and tag not in ("int", "float", "bool"):
            self._odd(node.start_mark, path, f"the tag `{_short(node.tag)}` has no meaning in a recipe")
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._odd(node.start_mark, path, "half of a surrogate pair is no character")
            return text.encode("utf-8", "replace").decode()
        return text

    def _odd(self, mark: Mark, path: DocPath, message: str, hint: str = "") -> None:
        self.document.problems.append(Problem(path, message, hint, position=_position(mark, mark)))

    def _refused(self, node: Node, message: str) -> RecipeError:
        position = _position(node.start_mark, node.start_mark)
        return RecipeError(message, location=self.document.places.write(position))


def line_and_column(before: str) -> str:
    """The 1-based place of the character that follows this text."""
    lines = before.split("\n")
    return f"{len(lines)}:{len(lines[-1]) + 1}"


def _position(mark: Mark, key_mark: Mark, text: str = "") -> Position:
    return Position(mark.line + 1, mark.column + 1, key_mark.line + 1, key_mark.column + 1, text)


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")


def _canonical(key: str | int) -> str:
    """Equal for keys that an operator would take for the same layer number: 5, "5" and 05."""
    text = str(key)
    return str(int(text)) if _INT_LIKE.fullmatch(text) else text
