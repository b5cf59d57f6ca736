"""A model whose decoder layers are built one at a time, from any checkpoint, lazy ones included.

The modules are transformers' own. The model is made on the meta device; a layer gets its tensors when it is
asked for and gives them back afterwards. What a layer is called with (masks, position embeddings) comes from
transformers' own forward of the base model, run once per shape with recorders in place of the layers; the
logits come from the forward of the whole model, with the last recorder returning the hidden states in hand.

Experts of families that transformers dispatches through its experts interface stay on the meta device: they
run through `surgery.calibrate.experts`, which brings in the weights of one expert at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from surgery.calibrate.skeleton import build_skeleton, quiet_transformers
from surgery.calibrate.state import decode_refs
from surgery.calibrate.tokenizer import side_folder
from surgery.errors import CheckpointError, Table

if TYPE_CHECKING:
    from surgery.stream.checkpoint import Checkpoint, TensorRef

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with beside the hidden states."""


@dataclass(frozen=True)
class BuiltLayer:
    """A decoder layer ready to run. `experts` is the module whose experts are brought in one by one."""

    index: int
    module: nn.Module
    experts: nn.Module | None


class LayeredModel:
    """The model of `checkpoint` in `dtype` on `device`, layer by layer.

    Raises CheckpointError where transformers cannot build it, or where its decoder has no list of layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.checkpoint = checkpoint
        self.device = device
        self.dtype = dtype
        with side_folder(checkpoint) as folder, quiet_transformers():
            model: Any = build_skeleton(checkpoint, folder, trust_remote_code, dtype)
            self._mapping = get_model_conversion_mapping(model)
        self._model = model.eval()
        candidates = (model.get_decoder(), model.base_model, getattr(model, "model", None))
        self._base: Any = next((each for each in candidates if hasattr(each, "layers")), None)
        if self._base is None:
            raise CheckpointError(
                f"{checkpoint.label}: the decoder of transformers' {type(model).__name__} has no `layers`",
                hint="this architecture cannot be walked layer by layer",
            )
        self._layers: list[nn.Module] = list(self._base.layers)[: checkpoint.architecture.num_hidden_layers]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._by_layer: dict[int | None, list[TensorRef]] = {}
        for ref in checkpoint.tensors.values():
            if not ref.info.mtp:
                self._by_layer.setdefault(ref.info.layer, []).append(ref)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[0])

    @property
    def hidden_size(self) -> int:
        return int(self._model.get_input_embeddings().weight.shape[1])

    def share_calls(self, other: LayeredModel) -> None:
        """Use what another model of the same architecture recorded of calls."""
        self._calls = other._calls

    def refs(self, layer: int) -> list[TensorRef]:
        """The tensors of a layer, as they are in the checkpoint."""
        return self._by_layer.get(layer, [])

    def experts_of(self, layer: int) -> nn.Module | None:
        """The module of a layer whose experts stay on the meta device, if it has one."""
        found = [module for module in self._layers[layer].modules() if is_dispatched(module)]
        return found[0] if found else None

    def load_layer(self, index: int, refs: Sequence[TensorRef]) -> BuiltLayer:
        """The layer with these tensors in place. Raises CheckpointError for whatever has none."""
        module, experts = self._layers[index], self.experts_of(index)
        wanted = [ref for ref in refs if experts is None or ref.info.role != "routed_expert"]
        self._load(wanted, module, skip=experts)
        return BuiltLayer(index, module, experts)

    def free_layer(self, layer: BuiltLayer) -> None:
        """Give the layer's memory back."""
        layer.module.to_empty(device="meta")

    def _load(self, refs: Sequence[TensorRef], into: nn.Module, skip: nn.Module | None = None) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        state = decode_refs(refs, self.dtype, self.checkpoint.label, device=self.device)
        settings = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self._model._get_dtype_plan(self.dtype),
            weight_mapping=cast("Any", self._mapping),
            device_map={"": self.device},
        )
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self._model, state, settings)
        faults = [(str(name), "has no place") for name in sorted(info.unexpected_keys)]
        faults += [(str(each[0]), "another shape") for each in sorted(info.mismatched_keys)]
        faults += [(str(name), str(why)) for name, why in info.conversion_errors.items()]
        faults += [(name, "missing") for name in self._settle(into, skip)]
        if faults:
            raise CheckpointError(
                f"{self.checkpoint.label} does not fit transformers' {type(self._model).__name__}: "
                f"{len(faults)} tensors, first {faults[0][0]} ({faults[0][1]})",
                hint="config.json and weights must be of one model: surgery inspect shows both",
                table=Table(("tensor", "problem"), tuple(faults)),
            )

    def _settle(self, into: nn.Module, skip: nn.Module | None) -> list[str]:
        """Make the buffers that no checkpoint holds (rotary frequencies); names that are still missing."""
        missing = []
        for path, module in into.named_modules():
            if module is skip:
                continue
            unsaved: set[str] = getattr(module, "_non_persistent_buffers_set", set())
            own = dict(module.named_buffers(recurse=False))
            if any(own[name].is_meta for name in unsaved if name in own):
                for name in unsaved & own.keys():
                    # Under its own name, so that a parameter beside it stays as it was loaded.
                    setattr(module, name, own[name].new_empty(own[name].shape, device=self.device))
                self._model._init_weights(module)
            left = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            missing += [f"{path}.{name}".lstrip(".") for name, tensor in left if tensor.is_meta]
        prefix = self._names[id(into)]
        return [f"{prefix}.{name}".lstrip(".") for name in missing]

    @contextmanager
    def begin(self) -> Iterator[Embedder]:
        """The part in front of the layers, loaded while the context lasts."""
        with self._ends(head=False):
            yield Embedder(self)

    @contextmanager
    def end(self) -> Iterator[Head]:
        """The part behind the layers: final norm and head, loaded while the context lasts."""
        with self._ends(head=True):
            yield Head(self)

    @contextmanager
    def _ends(self, *, head: bool) -> Iterator[None]:
        recorders = [Recorder(layer) for layer in self._layers]
        self._base.layers = nn.ModuleList(recorders)
        try:
            roles = ("embedding", "norm", "head") if head else ("embedding", "norm")
            refs = [ref for ref in self._by_layer.get(None, []) if ref.info.role in roles]
            self._load(refs, self._base)
            if head:
                self._model.tie_weights()
                output = self._model.get_output_embeddings()
                if output is None or output.weight.is_meta:
                    raise CheckpointError(
                        f"{self.checkpoint.label} has no head: no lm_head.weight, and config.json ties none",
                        hint="the checkpoint is incomplete; fetch it again",
                    )
            yield
        finally:
            self._base.to_empty(device="meta")
            self._model.get_output_embeddings().to_empty(device="meta")
            self._base.layers = nn.ModuleList(self._layers)

    def call(self, layer: int, shape: tuple[int, ...]) -> Call:
        """What this layer is called with for ids of this shape; recorded by the embedder."""
        return self._calls[shape][layer]


class Embedder:
    """Ids to the hidden states in front of the first layer; records what layers are called with."""

    def __init__(self, model: LayeredModel) -> None:
        self._model = model

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] ids to [batch, tokens, hidden]."""
        base = self._model._base
        with torch.no_grad():
            base(input_ids=ids.to(self._model.device), use_cache=False)
        recorders = cast("list[Recorder]", list(base.layers))
        shape = tuple(ids.shape)
        if shape not in self._model._calls:
            self._model._calls[shape] = [each.call for each in recorders]
        first = recorders[0].hidden
        for each in recorders:
            each.forget()
        if first is None:
            raise CheckpointError(f"{self._model.checkpoint.label}: its decoder runs no layers")
        return first


class Head:
    """Hidden states behind the last layer to logits, by transformers' own forward."""

    def __init__(self, model: LayeredModel) -> None:
        self._model = model

    def logits(self, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] ids and [batch, tokens, hidden] to [batch, tokens, vocabulary]."""
        recorders = cast("list[Recorder]", list(self._model._base.layers))
        recorders[-1].inject = hidden.to(self._model.device)
        try:
            with torch.no_grad():
                out: Any = self._model._model(input_ids=ids.to(self._model.device), use_cache=False)
        finally:
            for each in recorders:
                each.forget()
        logits: torch.Tensor = out.logits
        return logits


class Recorder(nn.Module):
    """Stands in for a layer: remembers its call and passes hidden states through, or gives out `inject`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # Not as a submodule: the layer's tensors must not count as the model's while this stands in.
        self.__dict__["layer"] = layer
        self.forget()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forget(self) -> None:
        self.hidden: torch.Tensor | None = None
        self.inject: torch.Tensor | None = None
        self.call: Call = ((), {})

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
        self.hidden, self.call = hidden, (tuple(rest), kwargs)
        return hidden if self.inject is None else self.inject


def is_dispatched(module: nn.Module) -> bool:
    """Whether transformers runs this module's experts through its experts interface."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_concatenated")
