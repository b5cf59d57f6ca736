"""The table of operators: recipe name -> import path. This is the only registration there is.

Third parties need no entry: a step may name its class as `op: package.module:Class`.
"""

from __future__ import annotations

from importlib import import_module

from surgery.errors import UsageError
from surgery.operators.protocol import Operator

OPERATORS: dict[str, str] = {
    "merge.aoe": "surgery.operators.merge.aoe:AssemblyOfExperts",
    "merge.arcee_fusion": "surgery.operators.merge.arcee_fusion:ArceeFusion",
    "merge.breadcrumbs": "surgery.operators.merge.breadcrumbs:Breadcrumbs",
    "merge.dare_linear": "surgery.operators.merge.dare:DareLinear",
    "merge.dare_ties": "surgery.operators.merge.dare:DareTies",
    "merge.della": "surgery.operators.merge.della:Della",
    "merge.della_linear": "surgery.operators.merge.della:DellaLinear",
    "merge.karcher": "surgery.operators.merge.karcher:Karcher",
    "merge.linear": "surgery.operators.merge.linear:Linear",
    "merge.model_stock": "surgery.operators.merge.model_stock:ModelStock",
    "merge.nuslerp": "surgery.operators.merge.nuslerp:NuSlerp",
    "merge.passthrough": "surgery.operators.merge.passthrough:Passthrough",
    "merge.sce": "surgery.operators.merge.sce:Sce",
    "merge.slerp": "surgery.operators.merge.slerp:Slerp",
    "merge.task_arithmetic": "surgery.operators.merge.task_arithmetic:TaskArithmetic",
    "merge.ties": "surgery.operators.merge.ties:Ties",
    "experts.easy_ep": "surgery.operators.experts.easy_ep:EasyEP",
    "experts.reap": "surgery.operators.experts.reap:Reap",
    "experts.frequency": "surgery.operators.experts.frequency:Frequency",
    "experts.gating": "surgery.operators.experts.gating:Gating",
    "experts.ean": "surgery.operators.experts.ean:ExpertActivationNorm",
    "experts.man": "surgery.operators.experts.man:MeanActivationNorm",
    "experts.aimer": "surgery.operators.experts.aimer:Aimer",
    "experts.random": "surgery.operators.experts.random:RandomExperts",
    "experts.drop": "surgery.operators.experts.drop:DropByList",
    "sparsify.sparsegpt": "surgery.operators.sparsify.sparsegpt:SparseGPT",
    "sparsify.wanda": "surgery.operators.sparsify.wanda:Wanda",
    "sparsify.magnitude": "surgery.operators.sparsify.magnitude:Magnitude",
    "sparsify.admm": "surgery.operators.sparsify.admm:Admm",
    "quantize.rtn": "surgery.operators.quantize.rtn:RoundToNearest",
    "quantize.gptq": "surgery.operators.quantize.gptq:GPTQ",
    "quantize.awq": "surgery.operators.quantize.awq:AWQ",
}


def operator_class(op: str) -> type[Operator]:
    """The class behind a name of the table or a `package.module:Class` path; UsageError for neither."""
    path = OPERATORS.get(op, op)
    module, _, name = path.partition(":")
    if not name:
        raise UsageError(
            f"unknown operator {op}", hint=f"known: {', '.join(OPERATORS)}, or package.module:Class"
        )
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"operator {op} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Operator)):
        raise UsageError(f"{op} is no operator: it must derive from surgery.operators.protocol.Operator")
    return found
