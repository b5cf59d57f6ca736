"""Task arithmetic (arXiv 2212.04089): base + λ Σ w_i (W_i − W_base).

`normalize: weights` divides by Σ w_i; `norms` see `task_vectors.py`.
"""

from __future__ import annotations

from typing import ClassVar

from surgery.operators.merge.task_vectors import TaskVectors


class TaskArithmetic(TaskVectors):
    """Params of `merge.task_arithmetic`."""

    op: ClassVar[str] = "merge.task_arithmetic"
