"""Packed examples kept apart: what a model needs for it is found out by trying.

Models of `transformers` differ. Most build a block-diagonal mask from position ids that start
anew, if there is neither an attention mask nor a cache; OPT and others do not and need the mask
itself; flash attention takes packed examples in a single row only; and where a state runs along
the sequence (Mamba), or positions come from the mask (BLOOM), examples cannot be kept apart. (Seen
with transformers 5.24 for 22 architectures, eager and SDPA attention.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError

BY_POSITIONS, BY_MASK, BY_ONE_ROW = "positions", "mask", "one row"
_TRIED = (BY_POSITIONS, BY_MASK, BY_ONE_ROW)
# Shares of a real leak's effect. Rounding differs between shapes, hence the second.
_LEAK, _SHIFT = 0.01, 0.1
_LENGTH = 7


def accepts(model: nn.Module, name: str) -> bool:
    """Say whether a model's forward takes an argument of that name."""
    inner: Any = model
    if hasattr(model, "get_base_model"):  # PEFT's wrapper passes everything on
        inner = model.get_base_model()  # type: ignore[operator]
    return name in _parameters(type(inner).forward)


@lru_cache(maxsize=8)
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def packed_inputs(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, way: str
) -> dict[str, Any]:
    """Return the arguments with which a model keeps packed examples apart.

    Args:
        model: The model.
        input_ids: int64 `[rows, tokens]`.
        position_ids: int64 `[rows, tokens]`, from 0 on in each example.
        way: `BY_POSITIONS`, `BY_MASK` or `BY_ONE_ROW`; with the last the outputs have one row
            `[1, rows * tokens]`.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids}
    if way == BY_ONE_ROW:
        inputs = {name: values.reshape(1, -1) for name, values in inputs.items()}
    elif way == BY_MASK:
        # Additive: eager attention would add a mask of booleans as 0 and 1.
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs["attention_mask"] = block_mask(position_ids, dtype)
    if not accepts(model, "position_ids"):
        del inputs["position_ids"]
    return {**inputs, **without_cache(model)}


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument that switches a model's cache off, for models that have one.

    With a cache no mask is built from position ids.
    """
    return {"use_cache": False} if accepts(model, "use_cache") else {}


def block_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that shows each token its own example up to itself.

    Args:
        position_ids: int64 `[rows, tokens]`, from 0 on in each example.
        dtype: Floating point.

    Returns:
        `[rows, 1, tokens, tokens]`: 0 where a token may look, the dtype's minimum elsewhere.

    Example:
        >>> block_mask(torch.tensor([[0, 1, 0]]), torch.float32)[0, 0] == 0
        tensor([[ True, False, False],
                [ True,  True, False],
                [False, False,  True]])
    """
    examples = (position_ids == 0).cumsum(1)
    shown = (examples[:, :, None] == examples[:, None, :]).tril()
    mask = torch.zeros(shown.shape, dtype=dtype, device=position_ids.device)
    return mask.masked_fill_(~shown, torch.finfo(dtype).min)[:, None]


def find_way(model: nn.Module) -> str:
    """Find out how a model keeps packed examples apart, by changing a neighbour of one.

    Args:
        model: The model, where it will run.

    Returns:
        `BY_POSITIONS`, `BY_MASK` or `BY_ONE_ROW`.

    Raises:
        ConfigError: If the examples see each other whatever is tried.
    """
    with _evaluation(model):
        first, other, example = _samples(model)
        alone = _logits(model, {"input_ids": example, **without_cache(model)})
        joined = {"input_ids": torch.cat([first, example], 1), **without_cache(model)}
        leak = _furthest(_logits(model, joined)[:, -_LENGTH:], alone)
        rounding = 16 * torch.finfo(alone.dtype).eps * float(alone.abs().max())
        for way in _TRIED:
            try:
                found = [
                    _packed_logits(model, [neighbour, example], way) for neighbour in (first, other)
                ]
            except (TypeError, ValueError, RuntimeError, IndexError):
                continue  # not a way for this model
            moved = _furthest(*found)
            shifted = _furthest(found[0], alone)
            if moved <= _LEAK * leak and shifted <= max(_SHIFT * leak, rounding):
                return way
    raise ConfigError(
        f"{_name(model)} cannot take several examples in one sequence without letting them see "
        "each other. Set data.packing to false."
    )


def require_causal(model: nn.Module) -> None:
    """Refuse a model whose tokens see the ones that follow, by changing the last token.

    Args:
        model: The model, where it will run.

    Raises:
        ConfigError: If it is such a model: an encoder.
    """
    with _evaluation(model):
        tokens, other, _ = _samples(model)
        changed = tokens.clone()
        changed[:, -1] = other[:, -1]
        before, after = (
            _logits(model, {"input_ids": ids, **without_cache(model)}) for ids in (tokens, changed)
        )
        earlier = _furthest(before[:, :-1], after[:, :-1])
        if earlier > _LEAK * _furthest(before[:, -1:], after[:, -1:]):
            raise ConfigError(
                f"{_name(model)} is no causal language model: its tokens see those that follow "
                "them. Take a decoder, such as GPT-2, OPT, Llama or Qwen."
            )


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Run without dropout and gradients, and leave every module in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _samples(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Three different sequences `[2, tokens]`: two neighbours and an example."""
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    device = next(model.parameters()).device
    tokens = (torch.arange(3 * 2 * _LENGTH, device=device) * 5 + 3) % vocabulary
    first, other, example = tokens.view(3, 2, _LENGTH)
    return first, other, example


def _packed_logits(model: nn.Module, parts: list[Tensor], way: str) -> Tensor:
    ids = torch.cat(parts, 1)
    positions = torch.arange(_LENGTH, device=ids.device).repeat(len(ids), len(parts))
    logits = _logits(model, packed_inputs(model, ids, positions, way))
    return logits.reshape(*ids.shape, -1)[:, -_LENGTH:]


def _logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def _furthest(one: Tensor, two: Tensor) -> float:
    return float((one.float() - two.float()).abs().max())


def _name(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    return getattr(config, "name_or_path", "") or type(model).__name__
