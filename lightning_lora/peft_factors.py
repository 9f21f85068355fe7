"""The factors of one layer as PEFT keeps them, where that differs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_lora.errors import CheckpointError
from lightning_lora.layers import LoRAExperts, adapted_class
from lightning_lora.peft_convolutions import over_all_channels
from lightning_lora.plan import Target, TokenTarget

# Where PEFT keeps the rows of an embedding that train, behind the name of the embedding.
PEFT_ROWS = "token_adapter.trainable_tokens_delta"

PEFT_MAGNITUDE = ".lora_magnitude_vector"


def peft_multiple(module: nn.Module, target: Target) -> int:
    """How often the rank r goes into the rank that the layer has in PEFT.

    PEFT has no factors for parts of a layer: k parts of rank r become factors of rank ``k * r`` for
    the whole of it, with zeros where a part does not reach. Factors that go with what they started
    from have twice the rank.
    """
    times = 2 if target.keeps_start else 1
    if target.slices is not None and target.slices.widths is None:
        return times * len(target.slices.adapted)
    return module.groups if isinstance(module, _ConvNd) else times


def peft_alpha(module: nn.Module, target: Target, use_rslora: bool) -> float:
    """The alpha that gives the same scaling with PEFT's rank."""
    k = peft_multiple(module, target)
    return target.alpha * (math.sqrt(k) if use_rslora else k)


def refuse_for_peft(module: nn.Module, target: Target) -> None:
    """PEFT must compute the same with a layer.

    Raises:
        CheckpointError: It computes something else, or cannot adapt the layer.
    """
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        raise CheckpointError(
            f"PEFT cannot adapt {target.name!r}: its query, key and value projections have "
            "separate weights. Export the merged model."
        )
    if not isinstance(module, _ConvNd):
        return
    if target.dora and module.groups > 1:
        raise CheckpointError(
            f"PEFT has no DoRA for grouped convolutions, and {target.name!r} has groups="
            f"{module.groups}. Export the merged model."
        )
    if any(step != 1 for step in module.dilation) or module.padding_mode != "zeros":
        raise CheckpointError(
            f"PEFT leaves dilation and padding_mode out of the factors of a convolution, and "
            f"{target.name!r} has dilation={module.dilation} and "
            f"padding_mode={module.padding_mode!r}: it would compute something else. Export the "
            "merged model."
        )


def refuse_tokens_for_peft(
    model: nn.Module, modules: Mapping[str, nn.Module], target: TokenTarget
) -> None:
    """PEFT must train the same rows of the same layers.

    Args:
        model: What PEFT will know as the model.
        modules: All modules by name.
        target: The embedding.

    Raises:
        CheckpointError: It would leave a tied layer as it is, or a bias out.
    """
    if not target.tied:
        return
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not tied or modules[target.name] is not model.get_input_embeddings():  # type: ignore[operator]
        raise CheckpointError(
            f"PEFT would not know that {target.tied[0]!r} shares the rows of {target.name!r} that "
            "train: the config of the model does not say that they are tied. Export the merged "
            "model."
        )
    for name in target.tied:
        if getattr(modules[name], "bias", None) is not None:
            raise CheckpointError(
                f"PEFT leaves the bias of {name!r} out where rows of its weight train: it would "
                "compute something else. Export the merged model."
            )


def peft_parameters(module: nn.Module, target: Target) -> tuple[str, ...]:
    """The 3-D parameters of experts, which PEFT wraps one by one; of another layer none."""
    adapted = adapted_class(type(module)) or type(module)
    return target.weights if issubclass(adapted, LoRAExperts) else ()


def peft_factors(
    module: nn.Module, target: Target, leaf: str, value: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """PEFT's name (behind the layer's) and value of a factor; one for each weight of experts.

    Args:
        module: The adapted layer, or what it is without LoRA.
        target: Its target.
        leaf: ``"A"``, ``"B"`` or ``"magnitude"``.
        value: The factor, whole.
    """
    if leaf == "magnitude":
        ones = (1,) * len(module.kernel_size) if isinstance(module, _ConvNd) else None
        yield PEFT_MAGNITUDE[1:], value if ones is None else value.reshape(1, -1, *ones)
        return
    slices = target.slices
    if slices is not None and peft_parameters(module, target):
        sizes = slices.adapted_widths() if leaf == "A" else [rows for _, rows in slices.parts]
        assert sizes is not None
        first, second = value.split(sizes, dim=1 if leaf == "A" else 0)
        # PEFT wraps what it has wrapped already.
        yield f"base_layer.lora_{leaf}.weight", first
        yield f"lora_{leaf}.weight", second
        return
    if slices is not None and leaf == "B":
        value = slices.spread(value)
    if isinstance(module, _ConvNd) and leaf == "A":
        value = over_all_channels(value, module.groups)
    embedding = isinstance(module, nn.Embedding)
    yield f"lora_embedding_{leaf}" if embedding else f"lora_{leaf}.weight", value


def refuse_half_of_experts(parameters: Iterable[str], source: str) -> None:
    """Both weights of experts have to be adapted.

    Args:
        parameters: ``target_parameters`` of PEFT.
        source: What to call the adapter in errors.

    Raises:
        CheckpointError: PEFT has adapted one of them alone.
    """
    leaves: dict[str, set[str]] = {}
    for parameter in parameters:
        owner, _, leaf = parameter.rpartition(".")
        leaves.setdefault(owner.rpartition(".")[2], set()).add(leaf)
    for owner, found in leaves.items():
        if len(found) == 1 and found != {"weight"}:
            raise CheckpointError(
                f"{source} adapts {next(iter(found))!r} of {owner!r} alone (target_parameters), "
                "and here both weights of experts are adapted together. Train it with both, for "
                "instance gate_up_proj and down_proj, or merge it with PEFT."
            )


def joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of PEFT with the factors of the two weights of experts in one, as it is here."""
    result = dict(tensors)
    for key in tensors:
        for leaf, dim in (("A", 1), ("B", 0)):
            inner, outer = f".base_layer.lora_{leaf}.weight", f".lora_{leaf}.weight"
            other = key.removesuffix(inner) + outer
            if key.endswith(inner) and other in result:
                result[other] = torch.cat([result.pop(key), result[other]], dim=dim)
    return result


def attention_of(name: str, targets: Mapping[str, Target], modules: Mapping[str, nn.Module]) -> str:
    """The adapted `torch.nn.MultiheadAttention` whose output projection a layer is, or ``""``.

    To PEFT the two are one layer with one rank, and the projection has no settings of its own.

    Args:
        name: Name of an adapted layer.
        targets: All targets by name.
        modules: The model's modules by name.

    Raises:
        CheckpointError: The projection has another rank or alpha than PEFT would give it.
    """
    outer = name.rpartition(".")[0]
    if outer not in targets or not isinstance(modules[outer], nn.MultiheadAttention):
        return ""
    inner, around = targets[name], targets[outer]
    k, own = peft_multiple(modules[outer], around), peft_multiple(modules[name], inner)
    if (own * inner.r, own * inner.alpha) != (k * around.r, k * around.alpha):
        raise CheckpointError(
            f"PEFT has one rank and alpha for {outer!r} and its output projection. Give them the "
            "same, and adapt the whole of it."
        )
    return outer


def without_effect(module: nn.Module, target: Target) -> dict[str, Tensor]:
    """Factors without effect for the output projection of an attention, which PEFT adapts whenever
    it adapts the attention.
    """
    assert isinstance(module, nn.MultiheadAttention)
    r = peft_multiple(module, target) * target.r
    return {
        "A": torch.zeros(r, module.embed_dim),
        "B": torch.zeros(module.embed_dim, r),
    }
