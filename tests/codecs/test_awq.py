"""AWQ's GEMM form: against words put together field by field, and against what GPTQModel's packer writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from quantized_codes import random_codes
from safetensors.torch import load_file

from surgery.codecs.awq import Awq
from surgery.codecs.codec import IntCodec
from surgery.codecs.grid import Quantized
from surgery.codecs.schemes import IntScheme
from surgery.errors import CheckpointError

GOLDEN = Path(__file__).parent.parent / "golden" / "gptqmodel.safetensors"
FIELD_HOLDS = (0, 2, 4, 6, 1, 3, 5, 7)


def words_of(rows: torch.Tensor) -> np.ndarray:
    """[n, rows/8] words of codes [n, rows], field by field."""
    count, width = rows.shape
    words = np.zeros((count, width // 8), np.uint32)
    for n in range(count):
        for word in range(width // 8):
            for field, place in enumerate(FIELD_HOLDS):
                words[n, word] |= np.uint32(int(rows[n, 8 * word + place]) << 4 * field)
    return words


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("rows", "cols", "group"), [(8, 32, 32), (24, 40, 0), (40, 48, 16), (8, 1, 0)])
def test_every_part_field_by_field_and_back(symmetric: bool, rows: int, cols: int, group: int) -> None:
    scheme = IntScheme(4, group, symmetric)
    want, shape = random_codes(scheme, rows, cols, rows + cols), (rows, cols)
    codec = Awq(scheme)
    assert isinstance(codec, IntCodec)
    raw = codec.pack(want)
    sizes = {key: stop for key, (_, stop) in codec.spans(shape, 0, rows).items()}
    assert {key: data.nbytes for key, data in raw.items()} == sizes
    assert (raw["qweight"].view(np.uint32).reshape(cols, -1) == words_of(want.codes.T)).all()
    assert (raw["qzeros"].view(np.uint32).reshape(-1, rows // 8) == words_of(want.zeros.T)).all()
    assert (raw["scales"].view(np.float16).reshape(-1, rows) == want.scales.T.numpy()).all()
    assert all(torch.equal(a, b) for a, b in zip(codec.quantized(shape, raw), want, strict=True))
    assert torch.equal(codec.decode(shape, 0, rows, raw), want.values())


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_what_gptqmodel_writes(kind: str) -> None:
    prefix = f"awq 4 32 {kind}|"
    golden = {name.removeprefix(prefix): each for name, each in load_file(GOLDEN).items() if prefix in name}
    codec = Awq(IntScheme(4, 32, kind == "sym"))
    raw = codec.pack(Quantized(golden["codes"], golden["scales"].T.float(), golden["zeros"]))
    for part in codec.parts((32, 64)):
        assert part.shape == tuple(golden[part.key].shape)
        assert raw[part.key].tobytes() == golden[part.key].view(-1).view(torch.uint8).numpy().tobytes()


def test_a_config_that_lies_about_zero_points_is_caught() -> None:
    asymmetric = IntScheme(4, 16, symmetric=False)
    raw = Awq(asymmetric).pack(random_codes(asymmetric, 32, 64, 2))
    with pytest.raises(CheckpointError, match="zero points other than 8"):
        Awq(IntScheme(4, 16)).quantized((32, 64), raw)


def test_rounding_to_nearest() -> None:
    values = torch.randn(24, 96, generator=torch.Generator().manual_seed(4))
    for symmetric in (True, False):
        codec = Awq(IntScheme(4, 32, symmetric))
        raw = codec.encode(values)
        found = codec.quantized((24, 96), raw)
        steps = ((found.values() - values).view(24, 3, 32).abs() / found.scales[..., None]).amax()
        assert steps <= 0.54
    values[3, 5] = torch.inf
    assert not codec.finite("scales", codec.encode(values)["scales"])


@pytest.mark.parametrize(
    ("shape", "group", "words"),
    [((12, 64), 32, "12 rows"), ((16, 60), 32, "groups of 32"), ((0, 8), 0, "0 rows")],
)
def test_shapes_without_such_a_form(shape: tuple[int, int], group: int, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        Awq(IntScheme(4, group)).parts(shape)
