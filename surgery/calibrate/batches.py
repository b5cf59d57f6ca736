"""Calibration sequences as batches of ids: one domain each, shorter rows filled up on the right.

Decoders are causal, so what stands on the right of a token does not change it: padding needs no mask, only
not to be counted. Within a domain sequences go by length, so that little is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Rows of ids [rows, longest], their lengths, and the number of the domain that they are from."""

    ids: torch.Tensor
    lengths: tuple[int, ...]
    domain: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.ids.shape[0], self.ids.shape[1]

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    def valid(self, device: torch.device) -> torch.Tensor | None:
        """[rows · longest] booleans, False for padding; None where there is none."""
        if min(self.lengths) == self.ids.shape[1]:
            return None
        lengths = torch.tensor(self.lengths)
        return (torch.arange(self.ids.shape[1]) < lengths[:, None]).reshape(-1).to(device)


def make_batches(
    sequences: Sequence[tuple[int, Sequence[int]]], batch_tokens: int, pad: int = 0
) -> tuple[Batch, ...]:
    """Batches of at most `batch_tokens` ids, padding included (a longer sequence is its own batch), from
    (domain, ids) pairs."""
    ordered = sorted(sequences, key=lambda each: (each[0], -len(each[1])))
    batches: list[Batch] = []
    rows: list[Sequence[int]] = []
    domain = 0
    for number, ids in ordered:
        longest = len(rows[0]) if rows else len(ids)
        if rows and (number != domain or (len(rows) + 1) * longest > batch_tokens):
            batches.append(_batch(rows, domain, pad))
            rows = []
        rows.append(ids)
        domain = number
    if rows:
        batches.append(_batch(rows, domain, pad))
    return tuple(batches)


def _batch(rows: list[Sequence[int]], domain: int, pad: int) -> Batch:
    longest = len(rows[0])
    filled = [[*ids, *[pad] * (longest - len(ids))] for ids in rows]
    return Batch(torch.tensor(filled), tuple(len(ids) for ids in rows), domain)
