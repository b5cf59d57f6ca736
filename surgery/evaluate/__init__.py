"""Evaluation of checkpoints loaded through the stream.

`surgery.evaluate` is a function of the API and also this package, which Python puts in its place as soon as a
module of it is imported; so the package can be called, and is that function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from surgery.evaluate.run import evaluate

        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Package
