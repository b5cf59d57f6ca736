"""Params that vary over a model: a number, a gradient over the layers, anchors, or values by condition.

    0.5                                     the same everywhere
    [0.2, 0.8, 0.4]                         a gradient: equally spaced over the layers, linear in between
    {0: 0.75, 53: 0.75, 80: 0.125}          anchors at layers, also at shares of the depth (`50%`)
    {0: 0.75, 80: 0.1, embedding: 1, head: 0}    what lies before the first layer and after the last
    [{role: attention, value: 0.5}, {value: 0.1}]    the first entry whose conditions hold

Without `embedding` and `head` the first and the last value hold there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from surgery.operators.merge.weights import Where, weight_at
from surgery.stream.checkpoint import Checkpoint, TensorRef

Number = Annotated[float, Field(allow_inf_nan=False)]
_SHARE = re.compile(r"^(\d{1,3}(?:\.\d+)?)%$")


def is_place(key: object) -> bool:
    """Whether a key of anchors: a layer, a share of the depth, `embedding` or `head`."""
    return type(key) is int or (
        isinstance(key, str)
        and (key in ("embedding", "head") or key.isdecimal() or _SHARE.match(key) is not None)
    )


def _check_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        odd = [key for key in value if not is_place(key)]
        if odd:
            raise ValueError(f"`{odd[0]}` is no layer, no share like 50%, and neither embedding nor head")
        if all(key in ("embedding", "head") for key in value):
            raise ValueError("the anchors name no layer")
        # JSON, as in written recipes, has layer numbers as text.
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: value[key] for key in value}
    return value


Places = Annotated[dict[int | str, Number], BeforeValidator(_check_places)]
Gradient = Annotated[tuple[Number, ...], Field(min_length=1)]


class Choice(Where):
    """A value for the tensors of which every given condition holds."""

    value: Number | Places | Gradient


def _check_choices(value: tuple[Choice, ...]) -> tuple[Choice, ...]:
    if not value:
        raise ValueError("the list is empty")
    return value


Setting = Number | Places | Gradient | Annotated[tuple[Choice, ...], AfterValidator(_check_choices)]


def setting_at(setting: Setting, ref: TensorRef, layers: int) -> float:
    """The value for one tensor of a model of `layers` decoder layers; ValueError where no entry matches."""
    if isinstance(setting, tuple) and isinstance(setting[0], Choice):
        for choice in setting:
            if isinstance(choice, Choice) and choice.matcher()(ref):
                return setting_at(choice.value, ref, layers)
        raise ValueError("no entry of the list takes this tensor; add one without conditions")
    if isinstance(setting, float | int):
        return setting
    last = max(layers - 1, 0)
    if isinstance(setting, tuple):
        steps = max(len(setting) - 1, 1)
        numbers = [value for value in setting if isinstance(value, float | int)]
        return weight_at({index / steps * last: value for index, value in enumerate(numbers)}, ref.info)
    return weight_at({_place(key, last): value for key, value in setting.items()}, ref.info)


def _place(key: int | str, last: int) -> float | str:
    share = _SHARE.match(key) if isinstance(key, str) else None
    return float(share[1]) / 100 * last if share else key


def decoder_layers(checkpoint: Checkpoint) -> int:
    """How many decoder layers a checkpoint has, MTP layers not counted."""
    return 1 + max(
        (
            ref.info.layer
            for ref in checkpoint.tensors.values()
            if ref.info.layer is not None and not ref.info.mtp
        ),
        default=-1,
    )
