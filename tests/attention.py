"""Which rows of a projection are queries, keys or values, found out from what attention is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.plan import Target


def distinct(model: nn.Module) -> Any:
    """The model with weights so large, and numbers so precise, that influences stand out."""
    model = model.double()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.2)
    # The faster kernels for experts know no double precision.
    model.config._experts_implementation = "eager"  # type: ignore[union-attr]
    return model


def influence(model: nn.Module, layer: str, tokens: Tensor) -> Tensor:
    """`influence_of` for an attention layer of a language model, over some tokens."""
    seen: list[Tensor] = []

    def attended(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, (tuple, list)) else out)

    inputs = {"input_ids": tokens}
    if getattr(model.config, "is_encoder_decoder", False):  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = tokens

    def run() -> Tensor:
        model(**inputs)
        return seen[0]

    hook = model.get_submodule(layer.rpartition(".")[0]).register_forward_hook(attended)
    found = influence_of(model.get_submodule(layer), run)
    hook.remove()
    return found


def influence_of(projection: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """Which elements of a projection's output what the attention says of the last token depends on;
    bool, shape (tokens, rows).

    Args:
        projection: The projection.
        run: Runs the attention over one sequence; returns what it says, shape (..., width).
    """
    seen: list[Tensor] = []

    def projected(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        # DeBERTa projects its relative positions by a second call.
        if seen:
            return None
        seen.append(out.detach().requires_grad_())
        return seen[0]

    hook = projection.register_forward_hook(projected)
    out = run()
    hook.remove()
    last = out.reshape(-1, out.shape[-1])[-1]
    weights = torch.randn(last.shape, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((last * weights).sum(), seen, allow_unused=True)
    if grad is None:
        return torch.zeros(seen[0].shape, dtype=torch.bool).flatten(0, -2)
    # Where a gradient is zero, rounding may leave 1e-8 of the others.
    return grad.flatten(0, -2).abs() > (1e-6 * grad.abs().max()).clamp(min=1e-7)


def rows_by_role(model: nn.Module, layer: str, tokens: Tensor) -> dict[str, list[int]]:
    """Which rows of a projection are queries, keys and values.

    Args:
        model: A model without LoRA, made `distinct`.
        layer: Name of the projection.
        tokens: Shape (1, tokens).
    """
    return roles(influence(model, layer, tokens[:, :1]), influence(model, layer, tokens))


def roles(over_one: Tensor, over_several: Tensor) -> dict[str, list[int]]:
    """Queries, keys and values, from the influence over a single token and over several.

    Over a single token attention is constant, so only values count; and what is said of one token
    does not depend on the queries of the others.
    """
    alone, of_others = over_one[0], over_several[0]
    assert bool((alone <= of_others).all())
    return {
        "q": (~of_others).nonzero().flatten().tolist(),
        "k": (of_others & ~alone).nonzero().flatten().tolist(),
        "v": alone.nonzero().flatten().tolist(),
    }


def adapted_rows(target: Target) -> dict[str, list[int]]:
    """Which rows of a fused projection the factors of each part feed."""
    assert target.slices is not None
    marks = target.slices.spread(torch.ones(target.B_shape))
    blocks = marks.split(target.r, dim=1)
    return {
        part: block.any(1).nonzero().flatten().tolist()
        for part, block in zip(target.slices.adapted, blocks, strict=True)
    }
