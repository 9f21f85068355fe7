"""Rows of embeddings that train: found, put in place, merged, and taken out again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_lora.bypassed import is_read_by_head
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, TargetError
from lightning_lora.heads import input_embeddings
from lightning_lora.layers.tokens import TokenLayer, TokenRows, token_class
from lightning_lora.matching import inside, suffix_matches, suggest
from lightning_lora.names import listed, modules_by_name, unwrap
from lightning_lora.plan import TokenTarget
from lightning_lora.sharded import extent, is_sharded, local, whole

CHILD = "trainable_tokens"


def token_targets(
    modules: dict[str, nn.Module],
    config: LoRAConfig,
    saved: Sequence[str],
    adapted: Sequence[str],
) -> Iterator[TokenTarget]:
    """The embeddings of which rows train, each with the layers that share its weight.

    Args:
        modules: The model's modules by name.
        config: The settings.
        saved: Names of the modules that train whole.
        adapted: Names of the layers that get factors.

    Raises:
        TargetError: What is asked for is no embedding, has no such rows, or trains already.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return
    chosen = _named(modules, wanted) if isinstance(wanted, dict) else {_only(modules): wanted}
    owners: dict[int, str] = {}
    for name, indices in chosen.items():
        module = modules[name]
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Embedding) or not isinstance(weight, Tensor):
            raise TargetError(
                f"trainable_token_indices: {name!r} is a {type(module).__name__}, and rows of "
                "embeddings alone can train. A tied head follows its embedding."
            )
        tied = [
            other
            for other, each in modules.items()
            if other != name and each._parameters.get("weight") is weight
        ]
        for layer in (name, *tied):
            why = _obstacle(layer, modules[layer], indices, saved, adapted)
            if is_read_by_head(layer, modules):
                why = "has a weight that the head reads too, to which the rows would be unknown"
            if why is not None:
                raise TargetError(f"trainable_token_indices: {layer!r} {why}.")
        if (first := owners.setdefault(id(weight), name)) != name:
            raise TargetError(
                f"trainable_token_indices: {name!r} and {first!r} share one weight. Name one."
            )
        yield TokenTarget(
            name, type(module).__name__, tuple(indices), int(weight.shape[1]), tuple(tied)
        )


def _only(modules: dict[str, nn.Module]) -> str:
    """The embedding that a list of tokens is about."""
    found = input_embeddings(modules)
    if not found:
        found = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
    if len(found) == 1:
        return found[0]
    raise TargetError(
        "trainable_token_indices: a list of tokens is about the input embeddings, and the model "
        + (f"has several embeddings ({listed(found)})" if found else "has no embedding")
        + ". Name one: {'embed_tokens': [5, 6]}."
    )


def _named(modules: dict[str, nn.Module], wanted: Mapping[str, list[int]]) -> dict[str, list[int]]:
    embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
    chosen: dict[str, list[int]] = {}
    for pattern, indices in wanted.items():
        names = [name for name in modules if suffix_matches(pattern, name)]
        if not names:
            raise TargetError(
                f"trainable_token_indices: {pattern!r} matched nothing. "
                f"{suggest(pattern, embeddings)}"
            )
        chosen.update(dict.fromkeys(names, indices))
    return chosen


def _obstacle(
    name: str,
    module: nn.Module,
    indices: Sequence[int],
    saved: Sequence[str],
    adapted: Sequence[str],
) -> str | None:
    if inside(name, saved):
        return "trains whole (modules_to_save)"
    if name in adapted:
        return "gets factors; leave it out with exclude_modules"
    if token_class(type(module)) is None:
        return f"is a {type(module).__name__}, which has a forward of its own"
    if "forward" in module.__dict__:
        return "has a forward that was replaced on the instance, which would bypass the rows"
    if getattr(module, "max_norm", None) is not None:
        return "rescales its rows in place (max_norm)"
    weight = getattr(module, "weight", None)
    assert isinstance(weight, Tensor)
    if is_sharded(weight):
        return "is sharded already; inject LoRA before"
    outside = [index for index in indices if index >= weight.shape[0]]
    if outside:
        return (
            f"has the rows 0 to {weight.shape[0] - 1}, and not {listed(list(map(str, outside)))}; "
            "resize the embeddings first"
        )
    if getattr(module, "padding_idx", None) in indices:
        return f"has its padding row at {module.padding_idx}, which gets no gradient"
    return None


def add_tokens(
    modules: Mapping[str, nn.Module],
    targets: Sequence[TokenTarget],
    made: Mapping[str, TokenRows] | None = None,
) -> None:
    """Put rows that train in the place of rows of the tables.

    Args:
        modules: The model's modules by name.
        targets: The embeddings.
        made: Rows that were made before, by the name of the embedding; otherwise those of the
            tables.
    """
    for target in targets:
        weight = modules[target.name].weight
        assert isinstance(weight, Tensor)
        if made is None:
            rows = TokenRows(weight, target.indices)
        else:
            rows = made[target.name].to(weight.device)
        for name in (target.name, *target.tied):
            setattr(modules[name], CHILD, rows)
        swap_tokens(modules, [target])


def remove_tokens(modules: Mapping[str, nn.Module], targets: Sequence[TokenTarget]) -> None:
    """Undo `add_tokens`."""
    restore_tokens(modules, targets)
    for target in targets:
        for name in (target.name, *target.tied):
            delattr(modules[name], CHILD)


def swap_tokens(modules: Mapping[str, nn.Module], targets: Sequence[TokenTarget]) -> None:
    """Let the layers use their rows, also in state dicts."""
    for target in targets:
        for name in (target.name, *target.tied):
            own = token_class(type(modules[name]))
            assert own is not None
            modules[name].__class__ = own
        rows_of(modules, target).hidden = False


def restore_tokens(modules: Mapping[str, nn.Module], targets: Sequence[TokenTarget]) -> None:
    """Let the layers be of their original classes; the rows stay, hidden from state dicts."""
    for target in targets:
        for name in (target.name, *target.tied):
            module = modules[name]
            if isinstance(module, TokenLayer):
                module.__class__ = module.base_class  # type: ignore[assignment]
        rows_of(modules, target).hidden = True


def rows_of(modules: Mapping[str, nn.Module], target: TokenTarget) -> TokenRows:
    """The rows that train of an embedding."""
    rows = unwrap(getattr(modules[target.name], CHILD))
    assert isinstance(rows, TokenRows)
    return rows


@torch.no_grad()
def merge_tokens(
    model: nn.Module, targets: Sequence[TokenTarget]
) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Write the rows into the tables.

    Returns:
        Each table and its value before, by the parameter's name.

    Raises:
        ConfigError: A row is not finite; nothing has been changed then.
    """
    modules = modules_by_name(model)
    values = {target.name: whole(rows_of(modules, target).rows) for target in targets}
    for name, rows in values.items():
        if not bool(rows.isfinite().all()):
            raise ConfigError(
                f"Not merged: {name}.{CHILD}.rows holds NaN or infinity, so training diverged. "
                "Nothing was changed. Resume from an earlier checkpoint with a lower learning rate."
            )
    before = {}
    for target in targets:
        weight = modules[target.name].weight
        assert isinstance(weight, nn.Parameter)
        table, offset = local(weight.detach()), extent(weight)[0][0]
        after = table.clone()
        rows_of(modules, target).write_into(after, values[target.name].to(table.device), offset)
        if is_sharded(weight):
            kept = table.to("cpu", copy=True)
            table.copy_(after)
        else:
            kept, weight.data = table.cpu(), after
        before[f"{target.name}.weight"] = weight, kept
    restore_tokens(modules, targets)
    return before


@torch.no_grad()
def unmerge_tokens(
    model: nn.Module,
    targets: Sequence[TokenTarget],
    before: Mapping[str, tuple[nn.Parameter, Tensor]],
) -> None:
    """Undo `merge_tokens`, bit for bit."""
    modules = modules_by_name(model)
    for target in targets:
        _, kept = before[f"{target.name}.weight"]
        weight = modules[target.name].weight
        assert isinstance(weight, nn.Parameter)
        if is_sharded(weight):
            local(weight.detach()).copy_(kept)
        else:
            weight.data = kept.to(device=weight.device, dtype=weight.dtype)
    swap_tokens(modules, targets)


def without_rows(table: Tensor, rows: TokenRows) -> Tensor:
    """A copy of a table, or of this process's shard of it, with zeros in the rows that train."""
    copy = table.detach().clone()
    part, offset = local(copy), extent(copy)[0][0]
    rows.write_into(part, part.new_zeros(len(rows.indices), part.shape[1]), offset)
    return copy
