"""Remakes gptqmodel.safetensors and bitsandbytes.safetensors: what the consumers' own packers write.

Run each half where its package is installed (torch 2.13.0; gptqmodel 7.6.0 wants an environment of its own):

    python tests/golden/remake_layouts.py gptqmodel
    python tests/golden/remake_layouts.py bitsandbytes

Names are `case|part`. Codes, scales and zero points of the integer cases are in the file, so that tests need
none of these packages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent
ROWS, COLS = 32, 64


def integers(bits: int, groups: int, symmetric: bool, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Codes, fp16 scales and zero points; asymmetric ones take every zero point, 0 and the largest too."""
    top = (1 << bits) - 1
    codes = torch.randint(0, top + 1, (ROWS, COLS), generator=generator)
    zeros = torch.full((ROWS, groups), 1 << (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, top + 1, (ROWS, groups), generator=generator)
        zeros.view(-1)[:2] = torch.tensor([0, top])
    scales = (0.01 + torch.rand(ROWS, groups, generator=generator)).half().float()
    return {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8), "scales": scales}


def linear_of(found: dict[str, torch.Tensor]) -> torch.nn.Linear:
    spread = COLS // found["scales"].shape[1]
    zeros = found["zeros"].float().repeat_interleave(spread, 1)
    linear = torch.nn.Linear(COLS, ROWS, bias=False)
    linear.weight.data = (found["codes"].float() - zeros) * found["scales"].repeat_interleave(spread, 1)
    return linear


def gptqmodel() -> dict[str, torch.Tensor]:
    from types import SimpleNamespace

    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    generator = torch.Generator().manual_seed(7)
    made: dict[str, torch.Tensor] = {}

    def keep(case: str, module: torch.nn.Module, parts: tuple[str, ...]) -> None:
        made.update({f"{case}|{part}": getattr(module, part).clone().contiguous() for part in parts})

    shape = {"in_features": COLS, "out_features": ROWS, "bias": False, "pack_dtype": torch.int32}
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            group = 32 if bits != 8 else COLS
            case = f"gptq {bits} {group} {'sym' if symmetric else 'asym'}"
            found = integers(bits, COLS // group, symmetric, generator)
            made.update({f"{case}|{key}": value for key, value in found.items()})
            options = {"bits": bits, "group_size": group, "sym": symmetric, "desc_act": False}
            module = TorchLinear(**options, **shape, register_buffers=True)
            g_idx = (torch.arange(COLS) // group).to(torch.int32)
            module.pack_original(linear_of(found), found["scales"].clone(), found["zeros"].float(), g_idx)
            keep(f"{case}|v2", module, ("qweight", "qzeros", "scales", "g_idx"))
            convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
            keep(f"{case}|v1", module, ("qzeros",))
            made[f"{case}|values"] = dequantized(module, options | shape)
    for symmetric in (True, False):
        case = f"awq 4 32 {'sym' if symmetric else 'asym'}"
        found = integers(4, 2, symmetric, generator)
        made.update({f"{case}|{key}": value for key, value in found.items()})
        options = {"bits": 4, "group_size": 32, "sym": symmetric, "desc_act": False}
        module = AwqTorchLinear(**options, **shape, register_buffers=True)
        module.pack(linear_of(found), found["scales"].half(), found["zeros"].half())
        keep(case, module, ("qweight", "qzeros", "scales"))
    return made


def dequantized(v1: torch.nn.Module, options: dict[str, object]) -> torch.Tensor:
    """What GPTQModel makes of a version 1 file."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    module = TorchLinear(**options, register_buffers=True)
    module.load_state_dict(v1.state_dict())
    convert_gptq_v1_to_v2_format_module(module, bits=module.bits, pack_dtype=torch.int32)
    module.post_init()
    return module.dequantize_weight().T.half().contiguous()


def bitsandbytes() -> dict[str, torch.Tensor]:
    import bitsandbytes.functional as bnb

    generator = torch.Generator().manual_seed(8)
    made: dict[str, torch.Tensor] = {}
    cases = (("nf4", 64, False, (6, 128)), ("nf4", 64, False, (3, 51)), ("nf4", 32, True, (265, 32)),
             ("nf4", 128, False, (4, 128)), ("fp4", 64, False, (6, 64)))  # fmt: skip
    for kind, block, nested, shape in cases:
        case = f"{kind} {block}{' nested' if nested else ''} {shape[0]}x{shape[1]}"
        values = torch.randn(shape, generator=generator).to(torch.bfloat16)
        packed, state = bnb.quantize_4bit(
            values, blocksize=block, quant_type=kind, compress_statistics=nested
        )
        made[f"{case}|values"] = values
        made[f"{case}|weight"] = packed
        made.update({f"{case}|{key}": value for key, value in state.as_dict(packed=True).items()})
        made[f"{case}|read"] = bnb.dequantize_4bit(packed, state)
    return made


if __name__ == "__main__":
    (half,) = sys.argv[1:]
    found = {"gptqmodel": gptqmodel, "bitsandbytes": bitsandbytes}[half]()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in found.items()}, FOLDER / f"{half}.safetensors"
    )
