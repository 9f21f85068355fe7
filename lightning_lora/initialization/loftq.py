"""Factors that begin by correcting what quantization took away (LoftQ, arXiv:2310.08659).

The first round of its algorithm 1 leaves the base as it is: ``Q = q(W)``, and then the best update
of rank r for what is left, ``s B A = SVD_r(W - Q)``. Each further round quantizes ``W - s B A``
anew, which makes the base another one. The factors of the round before say which one it is: they go
with the adapter, and with the original weights' files they give the base back wherever it is
loaded. The base that the model came with is put back when LoRA is removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.layers import LoRAFactors
from lightning_lora.names import listed
from lightning_lora.plan import Plan
from lightning_lora.quantization import (
    as_linear,
    dequantized,
    is_4bit,
    put_packed,
    quantized_layers,
    requantized,
)
from lightning_lora.sharded import is_sharded, whole
from lightning_lora.start import PRIOR
from lightning_lora.weight_files import stored_weights

_Originals = dict[str, nn.Parameter]


@torch.no_grad()
def initialize_from_error(
    model: nn.Module, plan: Plan, factors: Mapping[str, LoRAFactors], rounds: int = 1
) -> _Originals:
    """Set the factors of quantized layers so that base and update are nearest to the original.

    Args:
        model: A Hugging Face model, or one that holds such models, quantized on loading.
        plan: What is adapted; layers that are not quantized keep the factors they have.
        factors: The factors by the name of their target.
        rounds: How often quantization and decomposition take turns; beyond the first time the
            packed weights are replaced.

    Returns:
        The packed weights that were replaced, by the name of the layer.

    Raises:
        ConfigError: No adapted layer is quantized, the original weights cannot be read, or further
            rounds are asked for of layers in 8 bits.
    """
    layers = quantized_layers(model)
    targets = [t for t in plan.targets if t.name in layers and t.tied_to is None]
    if not targets:
        raise ConfigError(
            "init='loftq' corrects the error of a quantized base, and no adapted layer is "
            "quantized. Use init='kaiming'."
        )
    if any(is_sharded(layers[t.name].weight) for t in targets):
        raise ConfigError("init='loftq' needs whole weights: inject LoRA before sharding.")
    if rounds > 1 and (others := [t.name for t in targets if not is_4bit(layers[t.name])]):
        raise ConfigError(
            f"loftq_iter={rounds} quantizes weights anew, and {listed(others, limit=3)} is in 8 "
            "bits. Use loftq_iter=1, or a 4-bit base."
        )
    originals: _Originals = {}
    with stored_weights(model) as stored:
        _require([target.name for target in targets], stored)
        for target in targets:
            layer, lora = layers[target.name], factors[target.name]
            W = as_linear(layer, stored[f"{target.name}.weight"])
            W = W.to(device=lora.A.device, dtype=torch.float32)
            pair = error_factors(W - dequantized(layer, W.dtype), target.r, target.scaling)
            for _ in range(rounds - 1):
                _write(lora, PRIOR.values(), pair)
                _replace(target.name, layer, W, lora, originals)
                pair = error_factors(W - dequantized(layer, W.dtype), target.r, target.scaling)
            _write(lora, PRIOR, pair)
    return originals


@torch.no_grad()
def restore_rounds(
    model: nn.Module, plan: Plan, originals: _Originals, state: Mapping[str, Tensor], source: str
) -> None:
    """Make the base the one that an adapter was trained on, before the adapter is loaded.

    Args:
        model: The adapted model.
        plan: What is adapted.
        originals: The packed weights that the model came with, where they were replaced; those
            that are replaced now are added.
        state: The adapter's state.
        source: What to call the adapter in errors.

    Raises:
        CheckpointError: The base has to be quantized anew, and the original weights cannot be read
            or the model is sharded; nothing has been changed then.
    """
    layers = quantized_layers(model)
    changed: dict[str, dict[str, Tensor]] = {}
    for target in plan.targets if any(t.keeps_prior for t in plan.targets) else ():
        lora: Any = layers[target.name].lora if target.keeps_prior else None
        if lora is None or target.tied_to is not None:
            continue
        prior = {leaf: state[f"{target.name}.lora.{leaf}"] for leaf in PRIOR.values()}
        if any(not torch.equal(whole(getattr(lora, n)).cpu(), p.cpu()) for n, p in prior.items()):
            changed[target.name] = prior
    if not changed:
        return
    if any(is_sharded(layers[name].weight) for name in changed):
        raise CheckpointError(
            f"{source} was trained on weights that LoftQ quantized in another way than here, and a "
            "sharded base cannot be quantized anew. Load it in one process."
        )
    try:
        with stored_weights(model) as stored:
            _require(changed, stored)
            for name, prior in changed.items():
                layer = layers[name]
                W = as_linear(layer, stored[f"{name}.weight"])
                W = W.to(device=layer.lora.A.device, dtype=torch.float32)
                _write(layer.lora, prior, prior.values())
                _replace(name, layer, W, layer.lora, originals)
    except ConfigError as error:
        raise CheckpointError(
            f"{source} was trained on a base that LoftQ quantized from the original weights, which "
            f"are needed here too. {error}"
        ) from error


def put_back(model: nn.Module, originals: _Originals) -> None:
    """Give every layer the packed weight that it came with, the same object.

    Raises:
        ConfigError: The weights are sharded by now.
    """
    layers = quantized_layers(model)
    if any(is_sharded(layers[name].weight) for name in originals):
        raise ConfigError(
            "LoftQ quantized the base anew, and the weights that the model came with cannot be put "
            "back into shards. Load the model again."
        )
    for name, weight in originals.items():
        device = layers[name].weight.device
        weight.data = weight.data.to(device)
        weight.quant_state.to(device)  # type: ignore[attr-defined]
        put_packed(layers[name], weight)
    originals.clear()


@torch.no_grad()
def put_anew(model: nn.Module, packed: Mapping[str, nn.Parameter], originals: _Originals) -> None:
    """Undo `put_back`.

    Args:
        model: The model.
        packed: The packed weights that the layers had before it, by the name of the layer.
        originals: Where the weights that the model came with are kept.
    """
    layers = quantized_layers(model)
    for name, weight in packed.items():
        originals[name] = original = layers[name].weight
        put_packed(layers[name], weight)
        original.data = original.data.cpu()


def _replace(name: str, layer: Any, W: Tensor, lora: LoRAFactors, originals: _Originals) -> None:
    """Quantize what the factors of the round before leave of a weight."""
    A, B = (getattr(lora, leaf).double() for leaf in PRIOR.values())
    # In double precision, so that every machine rounds to the same codes.
    left = (W.double() - lora.scaling * B @ A).float()
    packed = requantized(layer, left)
    if name not in originals:
        originals[name] = original = layer.weight
        put_packed(layer, packed)
        # Not needed for training.
        original.data = original.data.cpu()
    else:
        put_packed(layer, packed)


def _write(lora: Any, leaves: Iterable[str], values: Iterable[Tensor]) -> None:
    for leaf, value in zip(leaves, values, strict=True):
        getattr(lora, leaf).copy_(value)


def _require(layers: Iterable[str], stored: Any) -> None:
    missing = [name for name in layers if f"{name}.weight" not in stored]
    if missing:
        raise ConfigError(
            f"init='loftq': the base model's files hold no weights for {listed(missing)}."
        )


def error_factors(error: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of rank r: ``s B A`` is nearest to ``error``.

    Args:
        error: Shape ``(out, in)``, float32.
        r: Rank; where it exceeds that of the error the rest of the factors is zero.
        scaling: The factor s, above 0.

    Returns:
        A, shape ``(r, in)``, and B, shape ``(out, r)``, of equal norms.

    Example:
        >>> A, B = error_factors(torch.ones(3, 4), r=2, scaling=2.0)
        >>> torch.allclose(2.0 * B @ A, torch.ones(3, 4), atol=1e-5)
        True
    """
    U, S, Vh = torch.linalg.svd(error, full_matrices=False)
    rank = min(r, len(S))
    root = (S[:rank] / scaling).sqrt()
    A, B = error.new_zeros(r, error.shape[1]), error.new_zeros(error.shape[0], r)
    A[:rank] = root[:, None] * Vh[:rank]
    B[:, :rank] = U[:, :rank] * root
    return A, B
