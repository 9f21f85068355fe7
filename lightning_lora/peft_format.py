"""The PEFT adapter format: names and settings, translated both ways. No file is touched here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.injection import require_injection
from lightning_lora.matching import suffix_matches
from lightning_lora.names import modules_by_name
from lightning_lora.peft_factors import (
    PEFT_MAGNITUDE,
    PEFT_ROWS,
    attention_of,
    joined,
    peft_alpha,
    peft_factors,
    peft_multiple,
    peft_parameters,
    refuse_for_peft,
    refuse_half_of_experts,
    refuse_tokens_for_peft,
    without_effect,
)
from lightning_lora.peft_patterns import patterns_of_attention, patterns_of_experts, used_keys
from lightning_lora.peft_reading import INIT
from lightning_lora.peft_ties import ties_for_peft
from lightning_lora.peft_whole import refuse_reached, task_type, trained_whole, whole_from_peft
from lightning_lora.start import keeps_start, without_starts
from lightning_lora.tokens import CHILD

_PREFIX = "base_model.model."
# Settings of PEFT that change the mathematics and have no counterpart here.
_UNSUPPORTED = (
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
# Initialisations that PEFT repeats on the base whenever it loads; PiSSA and OLoRA are the same
# here.
_CHANGING_BASE = ("corda", "lora_ga")


def to_peft_tensors(
    model: nn.Module, prefix: str, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The adapter's state under PEFT's names, contiguous and on the CPU.

    Args:
        model: The module that LoRA was injected into.
        prefix: Path of the part that PEFT will know as the model, with a trailing dot
            (``"model."``).
        state: The adapter's state in whole tensors.

    Raises:
        CheckpointError: Part of the state lies outside that part, or is nothing that PEFT stores.
    """
    plan = require_injection(model).plan
    modules = modules_by_name(model)
    adapted = {target.name: target for target in plan.targets}
    if not plan.targets:
        raise CheckpointError(
            "PEFT's LoRA format needs adapted layers, and r=0 adapts none. Keep the checkpoint, or "
            "export the merged model."
        )
    if any(target.keeps_prior for target in plan.targets):
        raise CheckpointError(
            "loftq_iter above 1 quantized the base anew for this adapter, which PEFT would load on "
            "the base as it was. Keep the checkpoint, or export the merged model."
        )
    tied = [target.name for target in plan.targets if target.tied_to is not None]
    if tied:
        raise CheckpointError(
            f"PEFT cannot express factors that tied layers share ({tied[0]}). Leave one of them "
            "out with exclude_modules."
        )
    for name, target in adapted.items():
        refuse_for_peft(modules[name], target)
    # The output projection of an attention lies behind PEFT's layer for the attention.
    paths = {
        name: f"{outer}.base_layer.out_proj" if outer else name
        for name in adapted
        for outer in [attention_of(name, adapted, modules)]
    }
    parts = {name: len(t.slices.adapted) for name, t in adapted.items() if t.slices is not None}
    state, _ = without_starts(state, parts)
    tokens = {f"{target.name}.{CHILD}": target for target in plan.tokens}
    ties = ties_for_peft(model, prefix, trained_whole(plan))
    tensors = {}
    for name, tensor in state.items():
        if not name.startswith(prefix):
            raise CheckpointError(
                f"{name} is trained but lies outside {prefix.rstrip('.')!r}, which is exported."
            )
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".lora") and owner.removesuffix(".lora") in adapted:
            layer = owner.removesuffix(".lora")
            theirs = peft_factors(modules[layer], adapted[layer], leaf, tensor)
            keys = {f"{paths[layer]}.{key}": value for key, value in theirs}
        elif owner in tokens:
            refuse_tokens_for_peft(model.get_submodule(prefix.rstrip(".")), modules, tokens[owner])
            keys = {f"{tokens[owner].name}.{PEFT_ROWS}": tensor}
        elif owner in adapted:
            keys = {f"{paths[owner]}.base_layer.{leaf}": tensor}
        else:
            # Files of safetensors hold no memory twice.
            keys = {name: tensor} | {each: tensor.clone() for each in ties.copies.get(name, ())}
        for key, value in keys.items():
            tensors[_PREFIX + key.removeprefix(prefix)] = value.cpu().contiguous()
    for name, target in adapted.items():
        module = modules[name]
        if isinstance(module, nn.MultiheadAttention) and f"{name}.out_proj" not in adapted:
            for leaf, tensor in without_effect(module, target).items():
                key = f"{name}.base_layer.out_proj.lora_{leaf}.weight"
                tensors[_PREFIX + key.removeprefix(prefix)] = tensor
    return tensors


def to_peft_config(model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """The ``adapter_config.json`` of the adapter; arguments as for `to_peft_tensors`."""
    record = require_injection(model)
    config, plan = record.config, record.plan
    part = model.get_submodule(prefix.rstrip("."))
    modules, adapted = modules_by_name(model), {target.name: target for target in plan.targets}
    targets = [t for t in plan.targets if not attention_of(t.name, adapted, modules)]
    names: list[str] = []
    parameters: list[str] = []
    # What PEFT adapts, its rank and its alpha: layers, and the single weights of experts.
    settings: list[tuple[str, int, float]] = []
    for target in targets:
        name, module = target.name.removeprefix(prefix), modules[target.name]
        leaves = peft_parameters(module, target)
        theirs = [f"{name}.{leaf}" for leaf in leaves] or [name]
        (parameters if leaves else names).extend(theirs)
        rank = peft_multiple(module, target) * target.r
        alpha = peft_alpha(module, target, config.use_rslora)
        settings += [(each, rank, alpha) for each in theirs]
    own = trained_whole(plan)
    ties = ties_for_peft(model, prefix, own)
    whole = [name.removeprefix(prefix) for name in dict.fromkeys([*own, *ties.modules])]
    refuse_reached(part, whole)

    default_r = _default([rank for _, rank, _ in settings], config.r)
    default_alpha = _default([alpha for *_, alpha in settings], config.alpha)
    # To PEFT a key is a regex for the end of a name; the ^ makes it the whole name.
    ranks = {f"^{re.escape(name)}": rank for name, rank, _ in settings if rank != default_r}
    alphas = {f"^{re.escape(name)}": a for name, _, a in settings if a != default_alpha}
    return {
        "peft_type": "LORA",
        "task_type": task_type(part, whole),
        "base_model_name_or_path": getattr(getattr(part, "config", None), "_name_or_path", None)
        or None,
        "inference_mode": True,
        "r": default_r,
        "lora_alpha": default_alpha,
        "lora_dropout": config.dropout,
        "target_modules": _short_names(part, names),
        "target_parameters": parameters or None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "modules_to_save": whole or None,
        "ensure_weight_tying": bool(ties.modules),
        "trainable_token_indices": {
            target.name.removeprefix(prefix): list(target.indices) for target in plan.tokens
        }
        or None,
        "fan_in_fan_out": any(target.kind == "Conv1D" for target in plan.targets),
        "init_lora_weights": True,
    }


def _default(values: Sequence[Any], wanted: Any) -> Any:
    """The value of the settings if a layer has it, else the most frequent one."""
    return wanted if wanted in values else Counter(values).most_common(1)[0][0]


def from_peft_config(
    values: Mapping[str, Any], state: Mapping[str, Tensor], source: str
) -> LoRAConfig:
    """The settings that an ``adapter_config.json`` of PEFT means here.

    PEFT lets patterns match nothing, and often writes such patterns; only what the adapter's
    tensors bear out is taken over.

    Args:
        values: The parsed file, from `read_peft_files`.
        state: The adapter's state under this project's names.
        source: What to call the adapter in errors.

    Raises:
        CheckpointError: The adapter is of another kind, or uses what is not supported, with the
            reason.
    """
    init = str(values.get("init_lora_weights"))
    if init.startswith(_CHANGING_BASE):
        raise CheckpointError(
            f"{source} belongs to a base that init_lora_weights={init!r} changed, and would be "
            "wrong on the original one. Save it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    if init.startswith("pissa_niter"):
        raise CheckpointError(
            f"{source} started by init_lora_weights={init!r}, which PEFT draws at random and does "
            "not save. Save it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)."
        )
    if not keeps_start(init):
        # Factors of LoftQ belong to a quantized base, which PEFT has no place to say.
        init = "loftq" if values.get(INIT) == "loftq" else "kaiming"
    if values.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{source} is a {values.get('peft_type')} adapter of PEFT; only LORA can be loaded."
        )
    refuse_half_of_experts(values.get("target_parameters") or (), source)
    values = {**values, **patterns_of_experts(values)}
    values = {**values, **patterns_of_attention(values, state)}
    used = [name for name in _UNSUPPORTED if values.get(name)]
    if used:
        raise CheckpointError(f"{source} uses {', '.join(used)} of PEFT, which is not supported.")
    adapted = [name.removesuffix(".lora.A") for name in state if name.endswith(".lora.A")]
    if not adapted:
        raise CheckpointError(f"{source} holds no factors of adapted linear layers.")
    targets = values["target_modules"] or []
    chosen_otherwise = ("exclude_modules", "layers_to_transform")
    if isinstance(targets, str) or any(values.get(s) not in (None, []) for s in chosen_otherwise):
        targets = "|".join(re.escape(name) for name in adapted)
    else:
        targets = sorted(t for t in targets if any(suffix_matches(t, name) for name in adapted))
        # PEFT adapts the output projection of an attention without naming it, and names the
        # parameters of experts.
        targets += [n for n in adapted if not any(suffix_matches(t, n) for t in targets)]
    owners = {name.rpartition(".")[0] for name in state}
    whole = whole_from_peft(values.get("modules_to_save") or [], owners)
    try:
        return LoRAConfig(
            r=values["r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            target_modules=targets,
            rank_pattern=used_keys(values.get("rank_pattern"), adapted),
            alpha_pattern=used_keys(values.get("alpha_pattern"), adapted),
            bias=values.get("bias", "none"),
            modules_to_save=whole,
            trainable_token_indices=values.get("trainable_token_indices"),
            use_rslora=values.get("use_rslora", False),
            use_dora=values.get("use_dora", False),
            init=init,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source} has settings that cannot be: {error}") from error


def from_peft_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's state under this project's names."""
    state = {}
    for key, tensor in joined(tensors).items():
        # PEFT never trains the weight of an adapted layer, but copies embedding tables beside it.
        if key.endswith(".base_layer.weight"):
            continue
        # With bias="all" PEFT writes the biases of wrapped modules under their wrappers' names once
        # more.
        if ".modules_to_save." in key or ".original_module." in key:
            continue
        name = key.removeprefix(_PREFIX)
        for factor in ("A", "B"):
            name = name.replace(f".lora_{factor}.weight", f".lora.{factor}")
            name = name.replace(f".lora_embedding_{factor}", f".lora.{factor}")
        if name.endswith(PEFT_MAGNITUDE):
            # That of a convolution has the dimensions of its output.
            name, tensor = name.replace(PEFT_MAGNITUDE, ".lora.magnitude"), tensor.reshape(-1)
        name = name.replace(f".{PEFT_ROWS}", f".{CHILD}.rows")
        state[name.replace(".base_layer.", ".")] = tensor
    return state


def _short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last components of the names if PEFT would match exactly those layers with them, else the
    full names.
    """
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in names})
    matched = {
        name for name in modules_by_name(model) if any(suffix_matches(s, name) for s in suffixes)
    }
    return suffixes if matched == set(names) else sorted(names)
