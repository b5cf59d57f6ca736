"""A checkpoint of compressed-tensors is measured as the model that its codes and scales stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

import surgery
from surgery.calibrate.carried import stored_form
from surgery.calibrate.state import decode_state
from surgery.codecs.fp8_scaled import Fp8Scaled
from surgery.codecs.packed_int import PackedInt
from surgery.codecs.plain import Plain
from surgery.codecs.schemes import IntScheme
from surgery.evaluate.run import evaluate
from surgery.stream.checkpoint import Checkpoint, TensorRef
from surgery.stream.formats import stored_as

CODECS = {"routed_expert": PackedInt(IntScheme(3, 16, False)), "attention": Fp8Scaled()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("quantized")
    plain = surgery.open(tiny_models.build_model(folder / "plain", "qwen3_moe"))

    def convert(ref: TensorRef) -> TensorRef:
        codec = CODECS.get(ref.info.role) if len(ref.shape) == 2 else None
        return stored_as(ref, codec) if codec else ref

    plain.replace(tensors={name: convert(ref) for name, ref in plain.tensors.items()}).save(
        folder / "packed", format="compressed-tensors"
    )
    return surgery.open(folder / "packed")


def test_figures_are_those_of_the_decoded_weights_in_memory_and_streamed(
    packed: Checkpoint, tmp_path: Path
) -> None:
    tensors = {name: stored_as(ref, Plain("F32")) for name, ref in packed.tensors.items()}
    config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
    packed.replace(tensors=tensors, config=config).save(tmp_path / "decoded")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9)
    models = {"decoded": str(tmp_path / "decoded"), "packed": str(packed.inputs[0].folder)}
    for streamed in (False, True):
        decoded, found = (
            row.perplexity for row in evaluate(models, text=text, context=48, streamed=streamed).rows
        )
        assert decoded is not None and found is not None
        assert found.tokens == decoded.tokens
        assert found.value == pytest.approx(decoded.value, rel=1e-6)


def test_what_travels_to_a_device_is_what_the_codec_decodes(packed: Checkpoint) -> None:
    state = decode_state(packed, torch.float32)
    assert state.keys() == packed.tensors.keys()
    for name, ref in packed.tensors.items():
        assert torch.equal(state[name].view(ref.rows, -1), ref.read().view(ref.rows, -1))
        assert torch.equal(stored_form(ref, torch.float32).values(torch.float32).view(ref.shape), state[name])
