"""Reads mergekit's YAML as a recipe of ours, or says by name what of it has no counterpart.

Written from the format's documentation. What keeps its meaning: precedence (model over step), gradients
(spread over the layers; embeddings, final norm and head take the first value), filters (a plain substring of
the name, the first that matches wins), defaults of `normalize` and `rescale` by method, half-open layer
ranges. What differs: arithmetic is always float32, and a `dtype` of float32 leaves tensors stored as the
base has them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from surgery.recipe.document import Document
from surgery.recipe.problems import DocPath, Problem, suggest

_TOP = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "name",
)  # fmt: skip
_UNSUPPORTED = {
    "modules": "merging module by module", "tokenizer": "the `tokenizer` section (union, per-token sources)",
    "chat_template": "`chat_template`",
}  # fmt: skip
_MODEL_PARAMS: dict[str, dict[str, tuple[str, Any]]] = {
    "linear": {"weight": ("weight", None)},
    "slerp": {},
    "nuslerp": {"weight": ("weight", None)},
    "karcher": {},
    "model_stock": {},
    "task_arithmetic": {"weight": ("weight", None)},
    "ties": {"weight": ("weight", None), "density": ("density", 1.0)},
    "dare_linear": {"weight": ("weight", None), "density": ("density", 1.0)},
    "dare_ties": {"weight": ("weight", None), "density": ("density", 1.0)},
    "della": {"weight": ("weight", None), "density": ("density", 1.0), "epsilon": ("epsilon", 0.15)},
    "della_linear": {"weight": ("weight", None), "density": ("density", 1.0), "epsilon": ("epsilon", 0.15)},
    "breadcrumbs": {"weight": ("weight", None), "density": ("density", 1.0), "gamma": ("gamma", 0.01)},
    "breadcrumbs_ties": {"weight": ("weight", None), "density": ("density", 1.0), "gamma": ("gamma", 0.01)},
    "sce": {},
    "arcee_fusion": {},
    "passthrough": {},
}
"""Settings of a model by method: our name and the default; None where the value is required."""
_STEP_PARAMS: dict[str, tuple[str, ...]] = {
    "linear": ("normalize",), "slerp": ("t",), "nuslerp": ("nuslerp_flatten", "nuslerp_row_wise"),
    "karcher": ("max_iter", "tol"), "model_stock": ("filter_wise",), "sce": ("select_topk", "int8_mask"),
    **dict.fromkeys(("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"),
                    ("normalize", "lambda", "int8_mask")),
    **dict.fromkeys(("dare_linear", "dare_ties", "della", "della_linear"),
                    ("normalize", "lambda", "int8_mask", "rescale")),
}  # fmt: skip
_NORMALIZED = ("linear", "ties", "della")
_BASED = tuple(name for name in _MODEL_PARAMS if name not in ("linear", "nuslerp", "karcher", "passthrough"))


def is_mergekit(data: object) -> bool:
    """Whether plain data is a configuration of mergekit rather than a recipe."""
    return isinstance(data, Mapping) and "merge_method" in data and "steps" not in data


def from_mergekit(document: Document) -> Document:
    """The same merge as a recipe. Raises RecipeError with every place that has no counterpart."""
    reader = _Reader(document)
    recipe = reader.recipe()
    if reader.problems:
        raise document.places.error([*document.problems, *reader.problems])
    return Document(document.filename, document.text, recipe, problems=document.problems)


class _Reader:
    def __init__(self, document: Document) -> None:
        self.data: Mapping[str, Any] = document.data
        self.problems: list[Problem] = []
        self.names: dict[str, str] = {}

    def recipe(self) -> dict[str, Any]:
        data = self.data
        method = data["merge_method"]
        for key in data:
            if key in _UNSUPPORTED:
                self.bad((key,), f"{_UNSUPPORTED[key]} of mergekit is not supported", at_key=True)
            elif key not in _TOP:
                self.bad((key,), f"unknown key `{key}`", suggest(key, _TOP, "mergekit's keys"), at_key=True)
        if method not in _MODEL_PARAMS:
            hint = suggest(method, list(_MODEL_PARAMS), "supported")
            self.bad(("merge_method",), f"mergekit's method `{method}` is not supported", hint)
            return {}
        base = self.model(data.get("base_model"), ("base_model",)) if data.get("base_model") else None
        if method in _BASED and base is None:
            self.bad((), f"{method} needs a base_model")
        if ("models" in data) == ("slices" in data):
            self.bad((), "a merge has either `models` or `slices`")
            return {}
        steps = self.slices(method, base) if "slices" in data else [self.step(method, base, self.models())]
        # The base comes first: it is whose form and config the child has.
        parents = {name: model for model, name in self.names.items()}
        output = self.output(base)
        return {"parents": parents, "steps": steps, "output": output}

    def bad(self, path: DocPath, message: str, hint: str = "", *, at_key: bool = False) -> None:
        self.problems.append(Problem(path, message, hint, at_key))

    def model(self, value: Any, path: DocPath) -> str:
        """The name of a model in the recipe."""
        if not isinstance(value, str):
            self.bad(path, "a model is written as a path or a hub id; other forms are not supported")
            return "?"
        if "+" in value:
            self.bad(path, f"`{value}` asks for a LoRA to be merged in, which is not supported")
            return "?"
        if value not in self.names:
            plain = value.partition("@")[0].rstrip("/").rpartition("/")[2]
            name = stem = re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-") or "model"
            number = 2
            while name in self.names.values():
                name, number = f"{stem}-{number}", number + 1
            self.names[value] = name
        return self.names[value]

    def items(self, path: DocPath, value: Any, keys: tuple[str, ...]) -> list[dict[str, Any]]:
        """A list of mappings with known keys."""
        if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value) or not value:
            self.bad(path, f"`{path[-1]}` is a list of mappings")
            return []
        for index, each in enumerate(value):
            for key in each:
                if key not in keys:
                    hint = suggest(key, keys, "keys here")
                    self.bad((*path, index, key), f"unknown key `{key}`", hint, at_key=True)
        return [dict(each) for each in value]

    def models(self) -> list[tuple[str, Mapping[str, Any], DocPath]]:
        found = []
        given = self.items(("models",), self.data["models"], ("model", "parameters"))
        for index, each in enumerate(given):
            path: DocPath = ("models", index)
            params = each.get("parameters") or {}
            found.append((self.model(each.get("model"), (*path, "model")), params, (*path, "parameters")))
        return found

    def slices(self, method: str, base: str | None) -> list[dict[str, Any]]:
        slices = self.items(("slices",), self.data["slices"], ("sources",))
        if method != "passthrough" and len(slices) != 1:
            self.bad(
                ("slices",), f"several slices with {method} are not supported", "merge first, then stack"
            )
            return []
        cuts: list[dict[str, Any]] = []
        models: list[tuple[str, Mapping[str, Any], DocPath]] = []
        for index, each in enumerate(slices):
            path: DocPath = ("slices", index, "sources")
            for place, source in enumerate(
                self.items(path, each.get("sources"), ("model", "layer_range", "parameters"))
            ):
                here = (*path, place)
                name = self.model(source.get("model"), (*here, "model"))
                layers = source.get("layer_range")
                if (
                    not isinstance(layers, list)
                    or len(layers) != 2
                    or not all(type(n) is int for n in layers)
                ):
                    self.bad((*here, "layer_range"), "`layer_range` is two whole numbers, [first, end)")
                    continue
                if not 0 <= layers[0] < layers[1]:
                    self.bad((*here, "layer_range"), f"the layer range {layers} is empty")
                    continue
                params = source.get("parameters") or {}
                if method == "passthrough" and (params or place):
                    self.bad(here, "passthrough takes one source for each slice, without parameters")
                models.append((name, params, (*here, "parameters")))
                cuts.append({"model": name, "layers": f"{layers[0]}-{layers[1] - 1}"})
        if method == "passthrough":
            return [{"op": "merge.passthrough", "slices": cuts}]
        # One slice: cut each model to it, then merge what is left.
        if base is not None and base not in {name for name, _, _ in models}:
            self.bad(("slices", 0, "sources"), "the base model is not among the sources of the slice")
        steps: list[dict[str, Any]] = [
            {"op": "merge.passthrough", "name": f"{cut['model']}-cut", "slices": [cut]} for cut in cuts
        ]
        renamed = [(f"{name}-cut", params, path) for name, params, path in models]
        return [*steps, self.step(method, f"{base}-cut" if base else None, renamed)]

    def step(
        self, method: str, base: str | None, models: list[tuple[str, Mapping[str, Any], DocPath]]
    ) -> dict[str, Any]:
        shared = self.data.get("parameters") or {}
        mine = _MODEL_PARAMS[method]
        known = (*_STEP_PARAMS.get(method, ()), *mine)
        self.known(shared, ("parameters",), known)
        if method == "passthrough":
            self.bad(("models",), "passthrough without slices is a copy; name slices")
        written: dict[str, Any] = {}
        for name, params, path in models:
            self.known(params, path, tuple(mine))
            if name == base:
                continue
            settings = {}
            for key, (ours, default) in mine.items():
                value = params.get(key, shared.get(key, default))
                if value is None:
                    self.bad(path, f"{method} needs a `{key}` for {name}")
                    continue
                fallback = shared.get(key, default) if key in params else default
                where = (*path, key) if key in params else ("parameters", key)
                settings[ours] = self.setting(value, where, fallback)
            written[name] = settings
        op = "breadcrumbs" if method == "breadcrumbs_ties" else method
        step: dict[str, Any] = {"op": f"merge.{op}", "models": written}
        if base is not None and (method in _BASED or method == "nuslerp"):
            step["base"] = base
        elif base is not None and base not in written:
            self.bad(("base_model",), f"{method} uses no base_model beside its models")
        return step | self.step_params(method, shared)

    def flag(self, shared: Mapping[str, Any], key: str, default: bool) -> bool:
        value = shared.get(key, default)
        if not isinstance(value, bool):
            self.bad(("parameters", key), f"`{key}` is true or false")
        return bool(value)

    def step_params(self, method: str, shared: Mapping[str, Any]) -> dict[str, Any]:
        found = self.step_flags(method, shared)
        known = _STEP_PARAMS.get(method, ())
        if method == "slerp" and "t" not in shared:
            self.bad(("parameters",), "slerp needs `t`")
        for key, ours in {"t": "t", "lambda": "scale", "select_topk": "topk"}.items():
            if key in known and key in shared:
                found[ours] = self.setting(shared[key], ("parameters", key), None)
        for key, ours in {"max_iter": "max_iterations", "tol": "tolerance"}.items():
            if key in known and key in shared:
                found[ours] = shared[key]
        return found

    def step_flags(self, method: str, shared: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        known = _STEP_PARAMS.get(method, ())
        if "normalize" in known:
            normalize = self.flag(shared, "normalize", method in _NORMALIZED)
            found["normalize"] = normalize if method == "linear" else "weights" if normalize else "none"
        if "rescale" in known:
            found["rescale"] = "l1" if self.flag(shared, "rescale", True) else "none"
        if "int8_mask" in known:
            self.flag(shared, "int8_mask", False)
        if method == "breadcrumbs_ties":
            found["elect_signs"] = True
        if "filter_wise" in known and self.flag(shared, "filter_wise", False):
            self.bad(("parameters", "filter_wise"), "model_stock by filters is not supported")
        if method == "nuslerp" and not self.flag(shared, "nuslerp_flatten", True):
            if not self.flag(shared, "nuslerp_row_wise", False):
                self.bad(("parameters", "nuslerp_flatten"), "nuslerp by columns is not supported")
            found["rows"] = True
        return found

    def known(self, params: Any, path: DocPath, keys: tuple[str, ...]) -> None:
        if not isinstance(params, Mapping):
            self.bad(path, "`parameters` is a mapping")
            return
        for key in params:
            if key not in keys:
                hint = suggest(key, keys, "parameters here")
                self.bad((*path, key), f"unknown parameter `{key}`", hint, at_key=True)

    def setting(self, value: Any, path: DocPath, fallback: Any) -> Any:
        """A value, a gradient or a list of filters in our form."""
        if _is_number(value):
            return value
        if isinstance(value, list) and value and all(map(_is_number, value)):
            return _gradient(value)
        if isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value):
            return self.filters(value, path, fallback)
        self.bad(path, "this is neither a number, a list of numbers, nor a list of filters")
        return 0.0

    def filters(self, value: list[Mapping[str, Any]], path: DocPath, fallback: Any) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = []
        closed = False
        for index, each in enumerate(value):
            self.items((*path,), [each], ("filter", "value"))
            inner = self.setting(each.get("value"), (*path, index, "value"), None)
            pattern = each.get("filter")
            if pattern in (None, "*"):
                choices.append({"value": inner})
                closed = True
                break
            choices.append({"match": re.escape(str(pattern)), "value": inner})
        if not closed and fallback is not None:
            rest = self.setting(fallback, path, None)
            choices += rest if isinstance(rest, list) else [{"value": rest}]
        return choices

    def output(self, base: str | None) -> dict[str, Any]:
        output: dict[str, Any] = {}
        for key in ("dtype", "out_dtype"):
            allowed = ("bfloat16", "float32") if key == "dtype" else ("bfloat16",)
            if key in self.data and self.data[key] not in allowed:
                hint = f"supported: {', '.join(allowed)}"
                self.bad((key,), f"`{key}: {self.data[key]}` is not supported", hint)
        if "bfloat16" in (self.data.get("out_dtype"), self.data.get("dtype")):
            output["format"] = "bf16"
        source = self.data.get("tokenizer_source")
        if source == "base":
            if base is not None:
                output["tokenizer_from"] = base
        elif source is not None and source in self.names:
            output["tokenizer_from"] = self.names[source]
        elif source is not None:
            message = f"`tokenizer_source: {source}` is not supported"
            self.bad(("tokenizer_source",), message, "supported: base, or a model")
        return output


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _gradient(values: list[float]) -> Any:
    if len(values) == 1:
        return values[0]
    last = len(values) - 1
    places: dict[int | str, float] = {
        f"{index * 100 / last:.12g}%": each for index, each in enumerate(values)
    }
    return places | {"embedding": values[0], "head": values[0]}
