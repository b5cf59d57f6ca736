"""What goes into the matrices of a layer: sums over the calibration tokens, from which solvers work.

For a linear map y = W x and the tokens t that pass it,

    gram        Σ_t x_t x_tᵀ      [columns, columns], the Hessian of ‖(W − W')X‖² up to a factor
    squares     Σ_t x_t²          its diagonal
    magnitudes  Σ_t |x_t|         [columns]

in float32, added up in the order of batches. Maps that share their input (queries, keys and values; gate and
up projection) share the sums. Tokens of padding do not count; an expert sees the tokens routed to it.

On a GPU products of bfloat16 are exact in the tensor cores' float32, whose sum is cut now and then: the error
grows with the rows of a call, so that rows go in pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch

from surgery.errors import CheckpointError

if TYPE_CHECKING:
    from surgery.calibrate.batches import Batch
    from surgery.calibrate.experts import ExpertObserver, Routing
    from surgery.calibrate.layers import BuiltLayer

Site = Literal["in", "inner"]
"""What goes into an expert's gate and up projections, or into its down projection."""
PIECE = 4096
"""Rows of one product."""


@dataclass
class InputSums:
    """See the module docstring. `gram` is None where only its diagonal was asked for."""

    squares: torch.Tensor
    magnitudes: torch.Tensor
    gram: torch.Tensor | None
    tokens: int = 0

    @classmethod
    def zeros(cls, columns: int, device: torch.device, *, gram: bool) -> InputSums:
        squares = torch.zeros(columns, device=device)
        full = torch.zeros(columns, columns, device=device) if gram else None
        return cls(squares, torch.zeros_like(squares), full)

    def add(self, inputs: torch.Tensor) -> None:
        """Count tokens [n, columns]."""
        self.tokens += inputs.shape[0]
        for piece in torch.split(inputs, PIECE):
            wide = piece.float()
            self.squares += wide.square().sum(0)
            self.magnitudes += wide.abs().sum(0)
            if self.gram is None:
                continue
            if piece.is_cuda and piece.dtype in (torch.bfloat16, torch.float16):
                torch.addmm(self.gram, piece.t(), piece, out_dtype=torch.float32, out=self.gram)
            else:
                self.gram.addmm_(wide.t(), wide)


class LayerInputs:
    """Takes the sums of one layer while it runs.

    `modules` are paths of linear modules inside the layer, `experts` the routed experts that count.
    Afterwards `of_module` and `of_expert` have the sums.
    """

    def __init__(self, layer: int, modules: Sequence[str], experts: Collection[int], *, gram: bool) -> None:
        self._layer = layer
        self._modules = modules
        self._wanted = frozenset(experts)
        self._gram = gram
        self._valid: torch.Tensor | None = None
        self._device_valid: torch.Tensor | None = None
        self._sums: dict[str, InputSums] = {}
        self._leader: dict[str, str] = {}
        self._seen: list[tuple[str, ref[torch.Tensor]]] = []
        self._experts: dict[tuple[int, Site], InputSums] = {}

    @property
    def experts(self) -> Sequence[ExpertObserver]:
        return (self,) if self._wanted else ()

    @contextmanager
    def watch(self, layer: BuiltLayer) -> Iterator[None]:
        handles = []
        try:
            for path in self._modules:
                module = _linear(layer, path)
                hook = self._hook(path)
                handles.append(module.register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def batch(self, batch: Batch) -> None:
        self._valid = batch.valid(torch.device("cpu"))
        self._device_valid = None
        self._seen.clear()

    def routed(self, routing: Routing) -> None:
        """Nothing to do before the experts run."""

    def expert(
        self, expert: int, place: slice, inputs: torch.Tensor, inner: torch.Tensor, out: torch.Tensor
    ) -> None:
        if expert in self._wanted:
            self._of(expert, "in", inputs).add(inputs)
            self._of(expert, "inner", inner).add(inner)

    def combined(self, routing: Routing, out: torch.Tensor) -> None:
        """Nothing to do behind the experts."""

    def of_module(self, path: str) -> tuple[str, InputSums | None]:
        """(the first of the modules that share this one's input, its sums; None where no token came by)."""
        leader = self._leader.get(path, path)
        return leader, self._sums.get(leader)

    def of_expert(self, expert: int, site: Site) -> InputSums | None:
        """The sums of an expert; None where no token was routed to it."""
        return self._experts.get((expert, site))

    def _of(self, expert: int, site: Site, inputs: torch.Tensor) -> InputSums:
        found = self._experts.get((expert, site))
        if found is None:
            found = InputSums.zeros(inputs.shape[-1], inputs.device, gram=self._gram)
            self._experts[expert, site] = found
        return found

    def _hook(self, path: str) -> Any:
        def take(module: Any, args: tuple[Any, ...]) -> None:
            inputs: torch.Tensor = args[0]
            known = self._leader.get(path)
            shared = next((leader for leader, other in self._seen if other() is inputs), None)
            if known is None:
                known = self._leader[path] = shared or path
            elif known != (shared or path):
                raise TypeError(f"layer {self._layer}: what {path} shares its input with changes")
            if known != path:
                return
            self._seen.append((path, ref(inputs)))
            if path not in self._sums:
                self._sums[path] = InputSums.zeros(inputs.shape[-1], inputs.device, gram=self._gram)
            self._sums[path].add(self._without_padding(inputs.flatten(0, -2)))

        return take

    def _without_padding(self, rows: torch.Tensor) -> torch.Tensor:
        if self._valid is None:
            return rows
        if self._valid.numel() != rows.shape[0]:
            raise CheckpointError(
                f"layer {self._layer} computes with {rows.shape[0]} rows where the batch has "
                f"{self._valid.numel()} tokens: its inputs cannot be told from padding",
                hint="calibrate with sequences of one length (calibration.packed: true)",
            )
        if self._device_valid is None:
            self._device_valid = self._valid.to(rows.device)
        return rows[self._device_valid]


def _linear(layer: BuiltLayer, path: str) -> Any:
    try:
        return layer.module.get_submodule(path)
    except AttributeError:
        raise CheckpointError(
            f"layer {layer.index} of transformers' model has no module {path}: its tensors cannot be watched",
            hint="leave it as it is with `schemes: {re:...: keep}` or `select`",
        ) from None
