"""Factors that begin by correcting what quantization took away (LoftQ, arXiv:2310.08659).

This is the first round of its algorithm 1: ``Q = q(W)``, and then the best update of rank r for
what is left, ``s B A = SVD_r(W - Q)``. Further rounds quantize ``W - s B A`` anew; they would make
the base another one for each rank and target, which no other adapter and no checkpoint of a first
round could share, so that the base stays as it is here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.layers import LoRAFactors
from lightning_lora.names import listed
from lightning_lora.plan import Plan
from lightning_lora.pretrained import stored_weights
from lightning_lora.quantization import as_linear, dequantized, quantized_layers
from lightning_lora.sharded import is_sharded


@torch.no_grad()
def initialize_from_error(model: nn.Module, plan: Plan, factors: Mapping[str, LoRAFactors]) -> None:
    """Set the factors of quantized layers so that base and update are nearest to the original.

    Args:
        model: A Hugging Face model, or one that holds such models, quantized on loading.
        plan: What is adapted; layers that are not quantized keep the factors they have.
        factors: The factors by the name of their target.

    Raises:
        ConfigError: No adapted layer is quantized, or the original weights cannot be read.
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
    with stored_weights(model) as stored:
        missing = [t.name for t in targets if f"{t.name}.weight" not in stored]
        if missing:
            raise ConfigError(
                f"init='loftq': the base model's files hold no weights for {listed(missing)}."
            )
        for target in targets:
            layer, lora = layers[target.name], factors[target.name]
            packed = dequantized(layer, torch.float32)
            error = as_linear(layer, stored[f"{target.name}.weight"]).to(packed) - packed
            A, B = error_factors(error, target.r, target.scaling)
            lora.A.copy_(A)
            lora.B.copy_(B)


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
