"""Factors that start from the error of the quantization."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import inject_lora, load_adapter, merge_lora, remove_lora, save_adapter
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.initialization.loftq import error_factors
from lightning_lora.offline_merging import prepare_merge
from lightning_lora.quantization import as_linear, dequantized, keep_trainable, quantized_layers
from lightning_lora.stored import read_stored_adapter
from tests.models import hugging_face, mlp
from tests.quantized import any_bits, quantized_hugging_face, quantized_mlp


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_layers_begin_as_near_to_the_original_as_the_rank_allows(
    name: str, kind: str, tmp_path: Path
) -> None:
    model = quantized_hugging_face(name, kind, tmp_path / "base").eval()
    original = load_file(tmp_path / "base" / "model.safetensors")
    ids = {"input_ids": torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(0))}
    plain = hugging_face(name).eval()
    # These layers are too small for the layout that bitsandbytes would bring them into.
    keep_trainable(model)
    packed = {n: any_bits(la.weight) for n, la in quantized_layers(model).items()}
    with torch.no_grad():
        expected = plain(**ids).logits
        before = (model(**ids).logits - expected).norm()
        plan = inject_lora(model, r=4, alpha=10, init="loftq")
        after = (model(**ids).logits - expected).norm()
    assert after != before
    modules = dict(model.named_modules())
    for target in plan.targets:
        layer = modules[target.name]
        weight = as_linear(layer, original[f"{target.name}.weight"])
        error = weight - dequantized(layer, torch.float32)
        best = torch.linalg.svdvals(error)[4:].norm()
        left = (error - layer.delta_weight()).norm().item()
        assert left == pytest.approx(best.item(), rel=1e-3), target.name
        assert left < error.norm()
    # The base is the same, for other adapters and for checkpoints.
    assert all(torch.equal(any_bits(modules[n].weight), bits) for n, bits in packed.items())


def test_magnitudes_begin_as_the_norms_of_the_corrected_weights(tmp_path: Path) -> None:
    ids = {"input_ids": torch.arange(3, 24).reshape(3, 7)}
    outputs = []
    for use_dora in (False, True):
        model = quantized_hugging_face("bert", "nf4", tmp_path / "base")
        plan = inject_lora(model, r=4, alpha=10, init="loftq", use_dora=use_dora)
        outputs.append(model.eval()(**ids).logits)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    layer = dict(model.named_modules())[plan.targets[0].name]
    weight = dequantized(layer, torch.float32)
    norm = (weight + layer.delta_weight()).norm(dim=1)
    torch.testing.assert_close(layer.lora.magnitude, norm)
    assert not torch.allclose(norm, weight.norm(dim=1), rtol=1e-5)


def test_factors_of_a_small_error() -> None:
    error = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    A, B = error_factors(error, 4, 2.5)
    torch.testing.assert_close(2.5 * B @ A, error)
    assert A.shape == (4, 5) and B.shape == (3, 4) and not A[3].any()
    torch.testing.assert_close(A.norm(), B.norm())


def test_where_it_cannot_be() -> None:
    with pytest.raises(ConfigError, match="no adapted layer is quantized"):
        inject_lora(mlp(), r=2, alpha=6, init="loftq")
    with pytest.raises(ConfigError, match="no Hugging Face model"):
        inject_lora(model := quantized_mlp("nf4"), r=2, alpha=6, init="loftq")
    assert all("LoRA" not in type(module).__name__ for module in model)


def test_a_saved_adapter_needs_the_files_no_more(tmp_path: Path) -> None:
    model = quantized_hugging_face("bert", "nf4", tmp_path / "base").eval()
    other = quantized_hugging_face("bert", "nf4", tmp_path / "base").eval()
    inject_lora(model, r=4, alpha=10, init="loftq")
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").unlink()
    load_adapter(other, tmp_path / "adapter")
    ids = torch.randint(3, 40, (2, 7))
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
    remove_lora(other)


def test_a_merge_keeps_the_correction_and_adds_it_to_no_other_weights(tmp_path: Path) -> None:
    model = quantized_hugging_face("bert", "nf4", tmp_path / "base").eval()
    ids = {"input_ids": torch.randint(3, 40, (2, 7))}
    inject_lora(model, r=4, alpha=10, init="loftq")
    with torch.no_grad():
        expected = model(**ids).logits
    with pytest.raises(ConfigError, match=r"does not go with init='loftq'.*'dequantized'"):
        merge_lora(model, base="original")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, expected)
        merge_lora(model)
        torch.testing.assert_close(model(**ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_what_was_exported_is_no_more_for_the_original_base_than_its_checkpoint(
    tmp_path: Path,
) -> None:
    model = quantized_hugging_face("bert", "nf4", tmp_path / "base").eval()
    inject_lora(model, r=4, alpha=10, init="loftq")
    folder = save_adapter(model, tmp_path / "adapter")
    assert read_stored_adapter(folder).config.init == "loftq"
    with pytest.raises(CheckpointError, match="trained with init='loftq'"):
        prepare_merge(folder, tmp_path / "base")
    other = quantized_hugging_face("bert", "nf4", tmp_path / "base").eval()
    load_adapter(other, folder)
    ids = {"input_ids": torch.arange(2, 12)[None]}
    assert torch.equal(other(**ids)[0], model(**ids)[0])
