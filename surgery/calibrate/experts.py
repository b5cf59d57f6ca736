"""The routed experts of one layer, run from per-expert tensors: routed tokens only, weights on demand.

transformers calls its experts interface with the router's choice; the function registered here computes

    out[t] = Σ_k  g[t, k] · down_e( gate(x[t] · gate_up_eᵀ) ),     e = index[t, k]

with the module's own gating (`_apply_gate`) and in the order of transformers' eager loop (expert by expert,
within an expert by rank of choice, then by token), so that the results are equal bit for bit where both
compute in one matrix layout on one device. Tokens of padding go through no expert.

With several ranks, rank r computes the experts e with e mod ranks = r; what they give is exchanged and added
up in the order of experts, so that the sum does not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from surgery.calibrate.carried import StoredForm, stored_form
from surgery.calibrate.ranks import ONE_RANK, Ranks
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    from surgery.stream.checkpoint import TensorRef
    from surgery.stream.roles import ExpertRules

IMPLEMENTATION = "surgery_walk"
"""Our name in transformers' experts interface."""
AHEAD = 2
"""Experts that are fetched before they are needed."""


@dataclass(frozen=True)
class Routing:
    """The router's choice for the tokens of one batch, sorted for the experts.

    index, weights: [tokens, k], the experts chosen and the final gate values. An entry is a token with one
    of its choices; those that count (no padding) are sorted by expert, then by rank of choice, then by
    token. `order` [entries] holds their positions rank · tokens + token, `tokens` and `gates` [entries] the
    token and the gate value of each; `counts` has the entries of each expert.
    """

    index: torch.Tensor
    weights: torch.Tensor
    order: torch.Tensor
    tokens: torch.Tensor
    gates: torch.Tensor
    counts: list[int]

    @property
    def num_entries(self) -> int:
        return self.order.shape[0]

    def places(self) -> Iterator[tuple[int, slice]]:
        """(expert, where its entries stand) for every expert that was chosen."""
        begin = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(begin, begin + count)
            begin += count


def sort_routing(
    index: torch.Tensor, weights: torch.Tensor, num_experts: int, valid: torch.Tensor | None = None
) -> Routing:
    """Sort a router's choice. `valid` [tokens] is False for tokens of padding."""
    flat = index.t().reshape(-1)
    if valid is not None:
        flat = torch.where(valid.repeat(index.shape[1]), flat, num_experts)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts].tolist()
    order = order[: sum(counts)]
    return Routing(index, weights, order, order % index.shape[0], weights.t().reshape(-1)[order], counts)


class ExpertObserver(Protocol):
    """Looks on while the experts of a layer run."""

    def routed(self, routing: Routing) -> None:
        """Called before the experts of a batch run."""

    def expert(
        self, expert: int, place: slice, inputs: torch.Tensor, inner: torch.Tensor, out: torch.Tensor
    ) -> None:
        """One expert's tokens: where its entries stand in the routing, inputs [n, hidden], what goes into the
        down projection [n, intermediate], and outputs [n, hidden] before the gate value."""

    def combined(self, routing: Routing, out: torch.Tensor) -> None:
        """Called with the weighted sum of the routed experts, [tokens, hidden]."""


@dataclass(frozen=True)
class ExpertWeights:
    """One expert on the computing device: gate_up [2I, H] and down [H, I], or transposed as the module is."""

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(frozen=True)
class _Carried:
    """One expert on its way: stacked where its form allows, gate and up side by side where not."""

    gate_up: tuple[StoredForm, ...]
    down: StoredForm
    gate_up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        biases = [each.nbytes for each in (self.gate_up_bias, self.down_bias) if each is not None]
        return sum(each.nbytes for each in (*self.gate_up, self.down)) + sum(biases)

    def move(self, change: Callable[[StoredForm], StoredForm]) -> _Carried:
        return _Carried(
            tuple(change(each) for each in self.gate_up), change(self.down), self.gate_up_bias, self.down_bias
        )


@dataclass
class ExpertBank:
    """The weights of one layer's experts, fetched when they are needed and kept while there is room.

    `refs` are the experts' tensors by expert and by name behind the expert's index. `room_bytes` bounds what
    is kept: on a CPU decoded weights, elsewhere stored ones on the device (`keep="device"`) or in page-locked
    host memory (`keep="host"`). What is not kept is read again for the next batch.
    """

    module: Any
    refs: dict[int, dict[str, TensorRef]]
    rules: ExpertRules
    device: torch.device
    dtype: torch.dtype
    room_bytes: int
    keep: str = "device"
    side: torch.cuda.Stream | None = None
    """The stream to copy on; one for all banks of a walk, since memory is pooled by stream."""
    _kept: dict[int, _Carried] = field(default_factory=dict)
    _decoded: dict[int, ExpertWeights] = field(default_factory=dict)
    _used: int = 0

    def stream(self, experts: Sequence[int]) -> Iterator[tuple[int, ExpertWeights]]:
        """The weights of these experts in turn; the next ones are fetched meanwhile."""
        if self.device.type == "cpu":
            with ThreadPoolExecutor(1) as pool:
                yield from self._stream_here(experts, pool)
        else:
            with ThreadPoolExecutor(1) as pool:
                yield from self._stream_there(experts, pool)

    def _stream_here(
        self, experts: Sequence[int], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, ExpertWeights]]:
        pending: dict[int, Future[ExpertWeights]] = {}
        for place, expert in enumerate(experts):
            for ahead in experts[place : place + AHEAD]:
                if ahead not in self._decoded and ahead not in pending:
                    pending[ahead] = pool.submit(self._decode, ahead)
            found = self._decoded.get(expert)
            if found is None:
                found = pending.pop(expert).result()
                nbytes = found.gate_up.nbytes + found.down.nbytes
                if self._used + nbytes <= self.room_bytes:
                    self._decoded[expert] = found
                    self._used += nbytes
            yield expert, found

    def _decode(self, expert: int) -> ExpertWeights:
        return self._weights(self._fetch(expert))

    def _stream_there(
        self, experts: Sequence[int], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[int, ExpertWeights]]:
        """Copies run on a stream of their own, `AHEAD` experts in front of the computation. Once all experts
        are kept on the device there is nothing to copy."""
        if self.keep == "device" and all(expert in self._kept for expert in experts):
            for expert in experts:
                yield expert, self._weights(self._kept[expert])
            return
        side = self.side or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        fetching: dict[int, Future[_Carried]] = {}
        copied: dict[int, tuple[_Carried, torch.cuda.Event]] = {}
        for place, expert in enumerate(experts):
            for ahead in experts[place : place + 2 * AHEAD]:
                if ahead not in self._kept and ahead not in fetching and ahead not in copied:
                    fetching[ahead] = pool.submit(self._fetch, ahead, pinned=True)
            for ahead in experts[place : place + AHEAD]:
                if ahead in copied:
                    continue
                carried = self._kept.get(ahead)
                if carried is None:
                    carried = fetching.pop(ahead).result()
                    if self.keep == "host":
                        self._put(ahead, carried)
                with torch.cuda.stream(side):
                    there = carried.move(lambda form: form.to(self.device))
                    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    event.record(side)
                copied[ahead] = (there, event)
                if self.keep == "device" and ahead not in self._kept:
                    self._put(ahead, there)
            there, event = copied.pop(expert)
            here = torch.cuda.current_stream(self.device)
            here.wait_event(event)
            for form in (*there.gate_up, there.down):
                form.record(here)
            yield expert, self._weights(there)

    def _put(self, expert: int, carried: _Carried) -> None:
        if self._used + carried.nbytes <= self.room_bytes:
            self._kept[expert] = carried
            self._used += carried.nbytes

    def _fetch(self, expert: int, pinned: bool = False) -> _Carried:
        """The stored form of one expert in host memory."""
        gate, up, down = (self._form(expert, name) for name in self.rules.projections)
        stacked = StoredForm.stack([gate, up]) if self._concatenated else None
        forms = (stacked,) if stacked is not None else (gate, up)
        gate_up_bias = down_bias = None
        if self.module.has_bias:
            biases = [self._bias(expert, name) for name in self.rules.projections]
            gate_up_bias, down_bias = self._side_by_side(biases[0], biases[1]), biases[2]
        carried = _Carried(forms, down, gate_up_bias, down_bias)
        return carried.move(lambda form: form.pinned()) if pinned else carried

    @property
    def _concatenated(self) -> bool:
        return bool(self.module.is_concatenated)

    def _form(self, expert: int, projection: str) -> StoredForm:
        return stored_form(self._ref(expert, f"{projection}.weight"), self.dtype)

    def _bias(self, expert: int, projection: str) -> torch.Tensor:
        values = self._ref(expert, f"{projection}.bias").read().view(-1)
        return values.to(self.dtype).to(self.device)

    def _ref(self, expert: int, name: str) -> TensorRef:
        try:
            return self.refs[expert][name]
        except KeyError:
            raise CheckpointError(
                f"expert {expert} has no {name}",
                hint="the checkpoint is incomplete: surgery inspect shows it",
            ) from None

    def _side_by_side(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Gate and up rows as the module has them: one block after the other, or row by row in turn."""
        if self._concatenated:
            return torch.cat([gate, up])
        return torch.stack([gate, up], dim=1).reshape(2 * gate.shape[0], *gate.shape[1:])

    def _weights(self, carried: _Carried) -> ExpertWeights:
        """Decoded, fused and laid out as the module computes with them."""
        decoded = [form.values(self.dtype) for form in carried.gate_up]
        gate_up = decoded[0] if len(decoded) == 1 else self._side_by_side(decoded[0], decoded[1])
        down = carried.down.values(self.dtype)
        if self.module.is_transposed:
            gate_up, down = gate_up.t().contiguous(), down.t().contiguous()
        return ExpertWeights(gate_up, down, carried.gate_up_bias, carried.down_bias)


@dataclass
class RoutedExperts:
    """The experts of one layer as transformers' experts module calls them.

    `valid` [tokens] says which tokens of the batch are no padding (None: all). With `count_only` no expert
    runs and the sum is zero; observers hear of the routing alone.
    """

    bank: ExpertBank
    observers: Sequence[ExpertObserver] = ()
    ranks: Ranks = ONE_RANK
    valid: torch.Tensor | None = None
    count_only: bool = False

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[tokens, H] with the choice of the router [tokens, k], to the routed sum [tokens, H]."""
        routing = sort_routing(index, weights, int(self.bank.module.num_experts), self.valid)
        for observer in self.observers:
            observer.routed(routing)
        if self.count_only:
            return torch.zeros_like(hidden)
        one_by_one = self.ranks.count == 1 and hidden.device.type == "cpu"
        out = self._added(hidden, routing) if one_by_one else self._gathered(hidden, routing)
        for observer in self.observers:
            observer.combined(routing, out)
        return out

    def _added(self, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Each expert's outputs are added as they come, while they are in the cache."""
        out = torch.zeros_like(hidden)
        gates = routing.gates[:, None]
        for place, output in self._outputs(hidden, routing):
            out.index_add_(0, routing.tokens[place], (output * gates[place]).to(hidden.dtype))
        return out

    def _gathered(self, hidden: torch.Tensor, routing: Routing) -> torch.Tensor:
        """All outputs first, then the sums in a few operations: less to launch on a GPU, and what ranks
        exchange. Every entry has one rank that computes it, so the sum over ranks is exact, -0 aside."""
        outputs = hidden.new_zeros(routing.num_entries, hidden.shape[1])
        for place, output in self._outputs(hidden, routing):
            outputs[place] = output
        outputs.mul_(routing.gates[:, None])
        self.ranks.add_up(outputs)
        return sum_in_order(outputs, routing, torch.zeros_like(hidden))

    def _outputs(self, hidden: torch.Tensor, routing: Routing) -> Iterator[tuple[slice, torch.Tensor]]:
        """(where the entries stand, their outputs) of each expert of this rank."""
        mine = {
            expert: place
            for expert, place in routing.places()
            if expert % self.ranks.count == self.ranks.index
        }
        module = self.bank.module
        for expert, weights in self.bank.stream(list(mine)):
            place = mine[expert]
            inputs = hidden[routing.tokens[place]]
            inner = module._apply_gate(
                _project(inputs, weights.gate_up, weights.gate_up_bias, module.is_transposed)
            )
            out = _project(inner, weights.down, weights.down_bias, module.is_transposed)
            for observer in self.observers:
                observer.expert(expert, place, inputs, inner, out)
            yield place, out


def sum_in_order(weighted: torch.Tensor, routing: Routing, out: torch.Tensor) -> torch.Tensor:
    """Adds the weighted outputs [entries, hidden] of each token to `out` [tokens, hidden] (zeros), in the
    order of experts and rounded after each, as adding expert by expert does."""
    if not routing.num_entries:
        return out
    # Entries are sorted by expert, so a stable sort by token leaves each token's in the order of experts.
    by_token = torch.sort(routing.tokens, stable=True).indices.view(-1, routing.index.shape[1])
    total = weighted[by_token[:, 0]]
    for choice in range(1, by_token.shape[1]):
        total += weighted[by_token[:, choice]]
    return out.index_copy_(0, routing.tokens[by_token[:, 0]], total)


def _project(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> torch.Tensor:
    out = inputs @ weight if transposed else linear(inputs, weight)
    return out if bias is None else out + bias


@contextmanager
def attached(module: nn.Module, experts: RoutedExperts) -> Iterator[None]:
    """Let transformers' experts module compute with `experts`; it holds on to them no longer than that."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run_attached)
    config: Any = module.config
    config._experts_implementation = IMPLEMENTATION
    module.__dict__["surgery_experts"] = experts
    try:
        yield
    finally:
        del module.__dict__["surgery_experts"]


def _run_attached(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    experts: RoutedExperts = module.__dict__["surgery_experts"]
    return experts(hidden_states, top_k_index, top_k_weights)
