"""What the routed experts of a layer did: sums from which every criterion of expert pruning is read out.

For domain d, layer l and expert e, over the tokens t that are routed to e,

    count      1                    gate       g            gate_sq    g²
    norm       ‖e(x)‖               norm_sq    ‖e(x)‖²      gate_norm  g · ‖e(x)‖
    gate_norm_token   g · ‖e(x)‖ · s,    s = max(0, 1 − cos(h, h + Σ_i g_i e_i(x)))
    max_norm   the largest ‖e(x)‖

where g is the router's final gate value (normalised and scaled as the model does it), e(x) the expert's
output before the gate, and h the residual stream behind the attention, in front of the norm of the MLP; the
sum has the routed experts only, not the shared one (EASY-EP, arXiv 2504.06792, section 4). Norms and cosines
are taken in float32 (1 − cos from the difference of unit vectors, where the authors subtract a cosine) and
summed in float64, in an order that the batches fix.

One pass gives all of them, a few hundred kilobytes for the largest models; kept in a JSON file with the hash
of the calibration data, they give other criteria and other ratios without another walk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.calibrate.lines import read_json_file
from surgery.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

    from surgery.calibrate.batches import Batch
    from surgery.calibrate.experts import ExpertObserver, Routing
    from surgery.calibrate.layers import BuiltLayer
    from surgery.calibrate.ranks import Ranks

FIELDS = ("count", "gate", "gate_sq", "norm", "norm_sq", "gate_norm", "gate_norm_token", "max_norm")
KIND = "surgery-expert-statistics"
SCHEMA = 1

Sums = np.ndarray[Any, np.dtype[np.float64]]
"""[domains, fields, experts] of one layer."""


@dataclass(frozen=True)
class ExpertStatistics:
    """Sums by layer, with what they were taken on. `provenance` has the hash of the calibration data, the
    model's fingerprint, the routing mode, dtype and device kind."""

    domains: tuple[str, ...]
    layers: Mapping[int, Sums]
    provenance: Mapping[str, Any]

    def of(self, layer: int, field: str) -> Sums:
        """[domains, experts] of one field."""
        return self.layers[layer][:, FIELDS.index(field)]

    def digest(self) -> str:
        return sha256(self.dump().encode()).hexdigest()

    def dump(self) -> str:
        """As JSON; numbers read back to the same bits."""
        return json.dumps({
            "kind": KIND, "schema": SCHEMA, "domains": list(self.domains), "fields": list(FIELDS),
            "provenance": dict(self.provenance),
            "layers": {str(layer): sums.tolist() for layer, sums in self.layers.items()},
        })  # fmt: skip


def read_statistics(path: Path) -> ExpertStatistics:
    """The statistics in a file; UsageError where it holds none."""
    found = read_json_file(path)
    if found.get("kind") != KIND:
        raise UsageError(
            f"{path} holds no expert statistics", hint="`surgery prune` writes them beside weights"
        )
    if found.get("schema") != SCHEMA or tuple(found.get("fields", ())) != FIELDS:
        raise UsageError(f"{path} has schema {found.get('schema')}, this version reads {SCHEMA}")
    try:
        domains = tuple(map(str, found["domains"]))
        layers = {int(layer): np.array(sums, np.float64) for layer, sums in found["layers"].items()}
        provenance = dict(found["provenance"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} is no whole file of statistics: {type(error).__name__}: {error}",
            hint="take them again, or give `calibration`",
        ) from error
    for layer, sums in layers.items():
        if sums.ndim != 3 or sums.shape[:2] != (len(domains), len(FIELDS)) or not np.isfinite(sums).all():
            raise UsageError(f"{path}: the sums of layer {layer} are no table of numbers for each expert")
    if not layers or not domains:
        raise UsageError(f"{path} has no layers, or no domains: it is no whole file of statistics")
    return ExpertStatistics(domains, layers, provenance)


class LayerStatistics:
    """Takes the sums of one layer while it runs; `sums` is complete when all batches have passed.

    `norm` names the module in front of the experts, whose input is the residual stream.
    """

    def __init__(self, layer: int, num_experts: int, num_domains: int, norm: str, ranks: Ranks) -> None:
        self.sums: Sums = np.zeros((num_domains, len(FIELDS), num_experts))
        self._layer = layer
        self._norm = norm
        self._ranks = ranks
        self._domain = 0
        self._residual: torch.Tensor | None = None
        self._norms: torch.Tensor | None = None

    @property
    def experts(self) -> Sequence[ExpertObserver]:
        return (self,)

    @contextmanager
    def watch(self, layer: BuiltLayer) -> Iterator[None]:
        def keep_input(module: Any, args: tuple[Any, ...]) -> None:
            self._residual = args[0].flatten(0, -2)

        handle = layer.module.get_submodule(self._norm).register_forward_pre_hook(keep_input)
        try:
            yield
        finally:
            handle.remove()
            self._residual = None

    def batch(self, batch: Batch) -> None:
        self._domain = batch.domain

    def routed(self, routing: Routing) -> None:
        self._norms = routing.weights.new_zeros(routing.num_entries, dtype=_float32())

    def expert(
        self, expert: int, place: slice, inputs: torch.Tensor, inner: torch.Tensor, out: torch.Tensor
    ) -> None:
        if self._norms is None:
            raise TypeError("an expert ran before the routing was known")
        row_norms(out, self._norms[place])

    def combined(self, routing: Routing, out: torch.Tensor) -> None:
        norms, residual = self._norms, self._residual
        if norms is None or residual is None:
            raise TypeError(f"{self._norm} did not run in front of the experts of layer {self._layer}")
        self._ranks.add_up(norms)
        weight = token_contributions(residual, out)
        gate = routing.gates.float()
        product = gate * norms
        token = weight[routing.tokens]
        columns = (gate, gate.square(), norms, norms.square(), product, product * token)
        table = self.sums[self._domain]
        counts = np.array(routing.counts, np.float64)
        table[0] += counts
        table[1:-1] += _by_expert(columns, routing.counts, "sum")
        table[-1] = np.maximum(table[-1], _by_expert((norms,), routing.counts, "max")[0])
        if not np.isfinite(table).all():
            raise CheckpointError(
                f"layer {self._layer}: an expert's output or its gate is NaN or infinity",
                hint="look for NaN in the weights (surgery verify), or compute in float32 (--dtype float32)",
            )


def row_norms(values: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """‖·‖₂ of each row of [n, hidden], computed in float32, into `out` where that is given."""
    import torch

    norms: torch.Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32, out=out)
    return norms


def token_contributions(residual: torch.Tensor, routed: torch.Tensor) -> torch.Tensor:
    """s [tokens] = 1 − cos(h, h + routed) in float32, of [tokens, hidden] each.

    Taken as ‖u − v‖² / 2 of the unit vectors: the same number, never negative, and without the digits that
    1 − cos loses where the experts change little (a quarter of the value at a change of 0.1 %).
    """
    from torch.nn.functional import normalize

    before = residual.float()
    after = before + routed.float()
    half = (normalize(before, dim=-1) - normalize(after, dim=-1)).square().sum(dim=-1) / 2
    # A cosine with nothing is 0.
    return half.where(before.any(dim=-1) & after.any(dim=-1), 1.0)


def _by_expert(columns: Sequence[torch.Tensor], counts: list[int], reduce: str) -> Sums:
    """[columns, experts] float64 reductions of values that are sorted by expert; 0 where there are none."""
    import torch

    lengths = torch.tensor(counts, device=columns[0].device)
    reduced = [torch.segment_reduce(each.double(), reduce, lengths=lengths, initial=0.0) for each in columns]
    return np.asarray(torch.stack(reduced).cpu().numpy())


def _float32() -> torch.dtype:
    import torch

    return torch.float32
