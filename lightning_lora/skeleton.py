"""The model of an adapter on disk, built on the meta device and adapted: its layers, names and
plan, without its weights and without the code that trained it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import CheckpointError, LightningLoRAError
from lightning_lora.injection import Injection, inject_lora, require_injection
from lightning_lora.model_record import dtype_named
from lightning_lora.names import listed, modules_by_name
from lightning_lora.on_meta import model_on_meta
from lightning_lora.peft_ties import without_copies
from lightning_lora.state import audit_state
from lightning_lora.stored import StoredAdapter
from lightning_lora.stored_starts import starts_from_files

# The classes that PEFT's task types stand for.
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
# What the last layer of a head is called, whose rows are the classes.
_OUTPUTS = ("out_proj", "classifier", "score", "dense", "decoder")


@dataclass(frozen=True)
class Skeleton:
    """An adapted Hugging Face model on the meta device.

    Attributes:
        adapter: The adapter, with each weight that the model shares once, and with what its factors
            started from.
        root: Holds the model under the path that it has in the checkpoint's names.
        part: That path, or ``""``.
        model: The Hugging Face model.
        config: Its config.
        names: The model's own names of its parameters, without what LoRA has added.
        dtypes: Dtype of each parameter that is known to differ from ``dtype``.
        dtype: Dtype of the parameters in the fit; ``None`` where it is not known.
    """

    adapter: StoredAdapter
    root: nn.Module
    part: str
    model: Any
    config: Any
    names: frozenset[str]
    dtypes: Mapping[str, torch.dtype]
    dtype: torch.dtype | None

    @property
    def prefix(self) -> str:
        """What the checkpoint's names have in front of the model's own."""
        return f"{self.part}." if self.part else ""

    @property
    def injection(self) -> Injection:
        """What was injected."""
        return require_injection(self.root)


def build_skeleton(
    adapter: StoredAdapter, folder: Path | None = None, class_name: str | None = None
) -> Skeleton:
    """Build the adapted model without weights.

    Args:
        adapter: The adapter.
        folder: The folder of the base, whose config says what the adapter does not; needed for an
            adapter without a record of its model.
        class_name: The model's class in `transformers`, where the adapter does not record it.

    Raises:
        CheckpointError: The class is not known, or the adapter does not fit the model.
    """
    record = adapter.record
    dtypes: dict[str, torch.dtype] = {}
    dtype = None
    if record is not None:
        model_class = _class_named(record["class"], adapter)
        config = _from_record(model_class, record, adapter)
        dtype = dtype_named(record["dtype"])
        for name, others in record["other_dtypes"].items():
            dtypes |= dict.fromkeys(others, dtype_named(name))
    else:
        if folder is None or "model" in adapter.base:
            raise CheckpointError(
                f"{adapter.path} adapts no Hugging Face model, or trains something outside of it. "
                f"{_IN_PYTHON}"
            )
        model_class, config = class_and_config(adapter, folder, class_name)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"The base {folder} holds quantized weights. Give --base with the weights that they "
            "were made from."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built_in = dtype or getattr(config, "dtype", None)
        options = {} if built_in is None else {"dtype": built_in}
        model = model_on_meta(model_class, config, **options)
    part = record["part"] if record is not None else _part_of(adapter, model)
    names = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
    root = around(model, part)
    try:
        inject_lora(root, adapter.config, seed=0, initialize=False)
        if adapter.peft:
            state = without_copies(root, adapter.state, str(adapter.path))
            # Without a record of its model, there is a folder.
            assert folder is not None
            adapter = replace(
                adapter, state={**starts_from_files(adapter, root, part, folder), **state}
            )
        audit_state(root, adapter.state, str(adapter.path))
    except LightningLoRAError as error:
        raise CheckpointError(
            f"{adapter.path} does not fit {type(model).__name__}: {error}"
        ) from error
    _check_targets(adapter, root)
    return Skeleton(adapter, root, part, model, config, names, dtypes, dtype)


_IN_PYTHON = (
    "Load it into its model in Python (load_lightning_module, load_adapter), and use save_adapter "
    "or merge_lora there."
)


def _class_named(name: str, adapter: StoredAdapter) -> Any:
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        raise CheckpointError(
            f"{adapter.path} adapts a {name}, which transformers has not: its code came with the "
            f"model. {_IN_PYTHON}"
        )
    return found


def _from_record(model_class: Any, record: Mapping[str, Any], adapter: StoredAdapter) -> Any:
    try:
        config = model_class.config_class.from_dict(dict(record["config"]))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{adapter.path} holds a config of {record['class']} that this version of transformers "
            f"does not understand ({error})."
        ) from error
    # Where the adapter was trained, not what it was trained on.
    config._name_or_path = adapter.base_name or ""
    return config


def class_and_config(
    adapter: StoredAdapter, folder: Path, class_name: str | None = None
) -> tuple[Any, Any]:
    """Class and config of a model by what the base's folder and PEFT's task type say.

    Args:
        adapter: The adapter; of a classifier its head says how many classes there are.
        folder: The base's folder.
        class_name: The class, where it is known.

    Raises:
        CheckpointError: The config cannot be read, or no class is named.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"The config of the base {folder} cannot be read: {error}") from error
    config._name_or_path = adapter.base_name or str(folder)
    named = class_name or _AUTO_CLASSES.get(str(adapter.peft.get("task_type")))
    named = named or (config.architectures or [None])[0]
    if named is None:
        raise CheckpointError(
            f"Neither {adapter.path} nor the base's config.json says which model class it is. "
            f"{_IN_PYTHON}"
        )
    rows = _rows_of_head(adapter.state)
    if rows is not None and named.endswith("Classification"):
        config.num_labels = rows
    return _class_named(named, adapter), config


def _rows_of_head(state: Mapping[str, Tensor]) -> int | None:
    """Number of classes, by the last matrix of a head that was trained whole."""
    heads = [
        tensor
        for name, tensor in state.items()
        if name.endswith(".weight")
        and tensor.ndim == 2
        and any(name.removesuffix(".weight").endswith(end) for end in _OUTPUTS)
    ]
    return heads[-1].shape[0] if heads else None


def _part_of(adapter: StoredAdapter, model: nn.Module) -> str:
    """What stands in front of the model's own names in those of the adapter."""
    modules = modules_by_name(model)
    names = list(adapter.metadata.get("targets", ())) or [
        name.removesuffix(".lora.A") for name in adapter.state if name.endswith(".lora.A")
    ]
    parts = names[0].split(".")
    for depth in range(len(parts)):
        part = ".".join(parts[:depth])
        prefix = f"{part}." if part else ""
        if all(n.startswith(prefix) and n.removeprefix(prefix) in modules for n in names):
            return part
    unknown = [name for name in names if name not in modules]
    raise CheckpointError(
        f"{adapter.path} adapts layers that {type(model).__name__} does not have: "
        f"{listed(unknown, limit=3)}. Give --base with the model that it was trained on."
    )


def around(model: nn.Module, part: str) -> nn.Module:
    """A module that holds the model at this path."""
    for name in reversed(part.split(".") if part else []):
        outer = nn.Module()
        outer.add_module(name, model)
        model = outer
    return model


def _check_targets(adapter: StoredAdapter, root: nn.Module) -> None:
    """The layers, ranks and scalings of the checkpoint are those that the plan has come to."""
    theirs = adapter.metadata.get("targets")
    if theirs is None:
        return
    ours = {target.name: target for target in require_injection(root).plan.targets}
    different = [name for name in theirs if name not in ours] + [
        name for name in ours if name not in theirs
    ]
    different += [
        name
        for name, target in theirs.items()
        if name in ours and (ours[name].r, ours[name].scaling) != (target["r"], target["scaling"])
    ]
    if different:
        raise CheckpointError(
            f"{adapter.path} adapts other layers, or with another rank or scaling, than its "
            f"settings give for this model: {listed(different, limit=3)}. {_IN_PYTHON}"
        )
