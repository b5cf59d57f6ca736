"""Greedy replies to many prompts.

Prompts are sorted by length, padded on the left and masked, so that a reply does not depend on its batch
beyond the rounding of the matrix products; a row whose reply has ended leaves the batch. On two cores, 100
problems and a 5.8M-parameter mixture of experts that replies with 163 tokens on average, this takes less than
half of the CPU time of `generate`, which computes finished rows to the end of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import UsageError

if TYPE_CHECKING:
    import torch

    from surgery.evaluate.load import LoadedModel

BATCH_SIZE = 32
"""Fastest of 16 to 100 on two cores: larger batches outgrow the caches, smaller ones pay per operation."""
_RETIRE_FROM = 8
"""Finished rows leave when they are an eighth of the batch; taking them out copies the key-value cache."""


def replies(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    ends: frozenset[int],
    pad: int = 0,
    max_new_tokens: int = 512,
    batch_size: int = BATCH_SIZE,
    finished: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Ids of the greedy reply to each prompt, in the order of the prompts.

    A reply ends with one of `ends`, which is part of it, or is cut off at `max_new_tokens` or at the model's
    longest position. `finished` hears of the number of replies done. Raises UsageError for a prompt that is
    empty or leaves no position for a reply.
    """
    import torch

    longest = _positions(loaded)
    for index, prompt in enumerate(prompts):
        if not prompt or (longest is not None and len(prompt) >= longest):
            raise UsageError(
                f"prompt {index + 1} has {len(prompt)} tokens; {loaded.label} takes 1 to {longest}, "
                "the reply included"
            )
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    result: list[list[int]] = [[] for _ in prompts]
    done = 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        room = {
            index: min(max_new_tokens, longest - len(prompts[index])) if longest else max_new_tokens
            for index in batch
        }
        with torch.no_grad():
            for index, token in _decode(
                loaded, [(index, prompts[index]) for index in batch], pad, room, ends
            ):
                result[index].append(token)
                if token in ends or len(result[index]) == room[index]:
                    done += 1
                    if finished:
                        finished(done)
    return result


def _decode(
    loaded: LoadedModel,
    batch: Sequence[tuple[int, Sequence[int]]],
    pad: int,
    room: dict[int, int],
    ends: frozenset[int],
) -> Iterator[tuple[int, int]]:
    """(prompt index, next token) until every row has reached an end token or its room."""
    import torch

    model = loaded.model
    accepted = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    rows = [index for index, _ in batch]
    tokens, mask = _left_padded([ids for _, ids in batch], pad, loaded.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    live = [True] * len(rows)
    cache: Any = None
    step = 0
    while True:
        if "position_ids" in accepted:
            extra["position_ids"] = positions
        out: Any = model(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, **extra
        )
        cache = out.past_key_values
        following = out.logits[:, -1].argmax(dim=-1)
        step += 1
        for row, token in enumerate(following.tolist()):
            if live[row]:
                yield rows[row], token
                live[row] = token not in ends and step < room[rows[row]]
        if not any(live):
            return
        tokens = following[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if live.count(False) * _RETIRE_FROM >= len(live) and _can_select(cache):
            keep = torch.tensor([row for row, alive in enumerate(live) if alive], device=loaded.device)
            cache.batch_select_indices(keep)
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
            rows = [index for index, alive in zip(rows, live, strict=True) if alive]
            live = [True] * len(rows)


def _left_padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask as [prompts, longest prompt]."""
    import torch

    width = max(len(ids) for ids in prompts)
    tokens = [[pad] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)


def _can_select(cache: Any) -> bool:
    """Whether rows can be taken out of this cache; recurrent states, for one, stay as they are."""
    layers: Any = getattr(cache, "layers", None) or ()
    return bool(layers) and all(hasattr(layer, "batch_select_indices") for layer in layers)


def _positions(loaded: LoadedModel) -> int | None:
    config: Any = loaded.model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
