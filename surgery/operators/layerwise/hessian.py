"""Damped Hessians of linear layers, and the factor of their inverse that column sweeps walk along.

The Hessian of a row of weights is H = Σ x xᵀ + λ · mean(diag) · I. Its inverse enters sweeps through the
upper Cholesky factor R of H⁻¹ (RᵀR = H⁻¹; GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774). With J the
reversal of rows and columns and J H J = L Lᵀ,

    H = (J L J)(J L J)ᵀ,    hence R = (J L J)⁻¹ = J L⁻¹ J

so one Cholesky and one triangular inverse do, where the papers' code takes two Cholesky and a full inverse
(1024 columns, one CPU core: 22 against 40 ms). The inverse is by products of matrices and in place, twice as
fast as `solve_triangular` or more (1024 columns on a core 8 against 30 ms, 8192 on an H100 8 against 18 ms).

Deviations: the mean of the diagonal is taken over the inputs that occur, so that damping does not depend on
how many do not; sums are not divided by tokens, which changes no result (damping is relative). A matrix that
is not positive definite raises its own damping tenfold, up to 1; one that cannot be factorized gets the
identity and a fault to count: with it GPTQ rounds to nearest and SparseGPT prunes by magnitude.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Fault = Literal["no inputs", "not finite", "not positive definite"]

_BASE = 128
"""Of 64, 128 and 256 the fastest or as fast, for 512 to 8192 columns on a CPU core and on an H100."""
_CHUNK = 1 << 27
"""Elements that are factorized at once: 32 matrices of 2048 columns."""
_LEAST, _MOST = 1e-4, 1.0


class Gram(NamedTuple):
    """Σ x xᵀ over the inputs of each layer, [B, C, C], and how many they were."""

    sums: torch.Tensor
    tokens: list[int]


class Factors(NamedTuple):
    """`upper` [B, C, C] with upperᵀ·upper = H⁻¹; by matrix the relative damping that was used and the fault
    for which it is the identity; `dead` bool [B, C]: inputs that are always 0; `order` int64 [B, C]: the
    columns of H in the order in which `upper` has them (None: as they are)."""

    upper: torch.Tensor
    damping: list[float]
    faults: list[Fault | None]
    dead: torch.Tensor
    order: torch.Tensor | None


def factorize(gram: torch.Tensor, damping: float, *, act_order: bool = False) -> Factors:
    """Factors of Gram matrices [B, C, C], symmetric and left as they are; `act_order` takes columns by
    descending diagonal. Needs the memory of the result, and little beside it."""
    size = gram.shape[-1]
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    faults = faults_of(gram)
    healthy = torch.tensor([fault is None for fault in faults], device=gram.device)
    dead = (diagonal == 0) & healthy[:, None]
    mean = diagonal.sum(-1) / (~dead).sum(-1).clamp(min=1)
    order = diagonal.argsort(dim=-1, descending=True, stable=True) if act_order else None
    upper = torch.empty_like(gram, memory_format=torch.contiguous_format)
    used = [damping if fault is None else 0.0 for fault in faults]
    step = _at_once(len(gram), size)

    def fill(part: slice, strength: float) -> None:
        extra = dead[part].to(gram.dtype) + strength * mean[part, None]
        _reverse(upper[part], gram[part], extra, None if order is None else order[part])

    for start in range(0, len(gram), step):
        part = slice(start, start + step)
        fill(part, damping)
        for b in range(start, min(start + step, len(gram))):
            if faults[b] is not None:
                _identity(upper[b])
        failed = torch.nonzero(_cholesky(upper[part])).flatten().tolist()
        for b in (start + each for each in failed):
            one, strength = slice(b, b + 1), damping
            while strength < _MOST:
                strength = min(max(10 * strength, _LEAST), _MOST)
                fill(one, strength)
                if not _cholesky(upper[one]).any():
                    used[b] = strength
                    break
            else:
                used[b], faults[b] = 0.0, "not positive definite"
                _identity(upper[b])
        lower = upper[part].mT
        invert_lower(lower)
        upper[part] = lower.flip(-1, -2)
    dead &= torch.tensor([fault is None for fault in faults], device=gram.device)[:, None]
    return Factors(upper, used, faults, dead, order)


def faults_of(gram: torch.Tensor) -> list[Fault | None]:
    """What is wrong with Gram matrices [B, C, C] before any is factorized."""
    finite = gram.sum(-1).isfinite().all(-1).tolist()
    empty = (gram.diagonal(dim1=-2, dim2=-1) == 0).all(-1).tolist()
    return ["not finite" if not f else "no inputs" if e else None for f, e in zip(finite, empty, strict=True)]


def invert_lower(matrix: torch.Tensor) -> None:
    """Invert lower triangular matrices [B, n, n] in place.

    Diagonal blocks first, then pairs of neighbours of doubling width: [[A, 0], [B, D]]⁻¹ has −D⁻¹ B A⁻¹ in
    its corner, two products of matrices.
    """
    size, width = matrix.shape[-1], _BASE
    whole = size // width
    for start, count, rows in ((0, whole, width), (whole * width, 1, size - whole * width)):
        if count and rows:
            block = _blocks(matrix, (start, start), (rows, rows), rows, count)
            eye = torch.eye(rows, dtype=matrix.dtype, device=matrix.device).expand(block.shape)
            block.copy_(torch.linalg.solve_triangular(block, eye, upper=False))
    while width < size:
        pairs = size // (2 * width)
        done = 2 * width * pairs
        for start, count, rows in ((0, pairs, width), (done, 1, size - done - width)):
            if count and rows > 0:
                step = width + rows
                first = _blocks(matrix, (start, start), (width, width), step, count)
                second = _blocks(matrix, (start + width, start + width), (rows, rows), step, count)
                corner = _blocks(matrix, (start + width, start), (rows, width), step, count)
                corner.copy_((second @ corner) @ first).neg_()
        width *= 2


def _at_once(count: int, size: int) -> int:
    """Matrices of a call. On an H100 a batched Cholesky takes as long as one by one at size / 256 matrices
    (8 of 2048 columns), less above; from 4096 columns on it is no faster even for 32."""
    return 1 if size >= 4096 or count < size // 256 else max(1, _CHUNK // size**2)


def _blocks(
    matrix: torch.Tensor, at: tuple[int, int], shape: tuple[int, int], step: int, count: int
) -> torch.Tensor:
    """`count` blocks of a shape, each `step` further down the diagonal: a view [B, count, rows, cols]."""
    batch, down, across = matrix.stride()
    offset = matrix.storage_offset() + at[0] * down + at[1] * across
    return matrix.as_strided(
        (len(matrix), count, *shape), (batch, step * (down + across), down, across), offset
    )


def _reverse(out: torch.Tensor, gram: torch.Tensor, extra: torch.Tensor, order: torch.Tensor | None) -> None:
    """J H J of the columns in `order`, for H with `extra` [B, C] on the diagonal."""
    for b in range(len(gram)):
        if order is None:
            out[b] = gram[b].flip(0, 1)
            out[b].diagonal().add_(extra[b].flip(0))
        else:
            backwards = order[b].flip(0)
            out[b] = gram[b][backwards][:, backwards]
            out[b].diagonal().add_(extra[b][backwards])


def _cholesky(matrices: torch.Tensor) -> torch.Tensor:
    """Put L of each symmetric matrix into the lower triangle of its transposed view; 0 where that worked."""
    place = matrices.mT
    info = torch.empty(len(matrices), dtype=torch.int32, device=matrices.device)
    torch.linalg.cholesky_ex(place, out=(place, info))
    # CUDA's batched form reports success on what is not a number.
    return info | ~matrices.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)


def _identity(matrix: torch.Tensor) -> None:
    matrix.zero_()
    matrix.diagonal().fill_(1.0)
