"""surgery: model surgery and compression, tensor by tensor.

    import surgery

    base, reasoner = surgery.open("path/to/base", "base"), surgery.open("path/to/r1", "reasoner")
    child = surgery.merge.aoe(
        {"base": base, "reasoner": reasoner},
        base="base", weights={"reasoner": 1.0}, select=["routed_expert"],
    )
    child.save("child")

Names are imported on first use, so that `import surgery` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.evaluate.run import evaluate
    from surgery.operators.protocol import RunContext
    from surgery.recipe.api import (
        allocate,
        diff,
        experts,
        inspect,
        merge,
        open,
        plan,
        quantize,
        run,
        sparsify,
        sweep,
        validate,
    )
    from surgery.recipe.sweep import Measuring
    from surgery.recipe.verify import verify
    from surgery.stream.checkpoint import Checkpoint, TensorRef

__all__ = [
    "Checkpoint",
    "Measuring",
    "RunContext",
    "TensorRef",
    "allocate",
    "diff",
    "evaluate",
    "experts",
    "inspect",
    "merge",
    "open",
    "plan",
    "quantize",
    "run",
    "sparsify",
    "sweep",
    "validate",
    "verify",
]

_PLACES = {
    "Checkpoint": "surgery.stream.checkpoint",
    "TensorRef": "surgery.stream.checkpoint",
    "RunContext": "surgery.operators.protocol",
    "evaluate": "surgery.evaluate.run",
    "Measuring": "surgery.recipe.sweep",
    "verify": "surgery.recipe.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from surgery.stream.manifest import tool_version

        return tool_version()
    if name not in __all__:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    return getattr(import_module(_PLACES.get(name, "surgery.recipe.api")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
