"""Taking LoRA out of a model again."""

from __future__ import annotations

from torch import nn

from lightning_lora.fast_paths import return_to_fast_paths
from lightning_lora.freezing import release
from lightning_lora.initialization import put_back
from lightning_lora.injection import ATTRIBUTE, require_injection, restore_class
from lightning_lora.layers.siblings import part_siblings
from lightning_lora.merging import refuse_reparametrized, unmerge_lora
from lightning_lora.names import modules_by_name, unwrap
from lightning_lora.quantization import allow_repacking
from lightning_lora.tokens import remove_tokens


def remove_lora(model: nn.Module) -> None:
    """Undo `inject_lora`: the same classes, the same module and parameter objects, the same
    state-dict keys.

    A merged model is unmerged first. Base parameters that were trained in place keep their trained
    values.

    Raises:
        ConfigError: The model has no LoRA, a weight was pruned or reparametrized since, or LoftQ
            quantized its base anew and it is sharded by now.
    """
    record = require_injection(model)
    refuse_reparametrized(model, record)
    unmerge_lora(model)
    put_back(model, record.originals)
    modules = modules_by_name(model)
    for target in record.plan.targets:
        module = modules[target.name]
        restore_class(module)
        del module.lora
        part_siblings(module)
    remove_tokens(modules, record.plan.tokens)
    return_to_fast_paths(model)
    allow_repacking(model, record.repacked)
    release(model, record.requires_grad)
    delattr(unwrap(model), ATTRIBUTE)
