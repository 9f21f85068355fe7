"""What a recipe's quantized base is made with: bitsandbytes' settings, filled in from the run.

Which modules stay as they are, and in which dtype layers compute, follows from what is trained and
from the Trainer's precision, so that one word is enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_lora.callback import LoRACallback
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.heads import output_heads
from lightning_lora.matching import suggest
from lightning_lora.names import modules_by_name
from lightning_lora.recipes.files import nearest
from lightning_lora.trained import saved_modules, trained_parameters
from lightning_lora.validation import is_name_list, is_number

QUANTIZATIONS = ("nf4", "fp4", "int8")


@dataclass(frozen=True)
class QuantizationOptions:
    """The finer settings of a quantized base.

    Args:
        double: Whether the scales of 4-bit weights are quantized too, which saves 0.37 bits a
            weight (QLoRA, arXiv:2305.14314, section 3).
        compute_dtype: What 4-bit layers compute in: `float32`, `bfloat16` or `float16`; by default
            the Trainer's precision.
        skip_modules: Names of further modules that stay as they are.
        threshold: From which size on activations of 8-bit layers are outliers, which are
            multiplied in 16 bits (LLM.int8(), arXiv:2208.07339, section 3.2).
    """

    double: bool = True
    compute_dtype: str | None = None
    skip_modules: tuple[str, ...] = ()
    threshold: float = 6.0

    @classmethod
    def read(cls, kind: str | None, values: Mapping[str, Any] | None) -> QuantizationOptions:
        """Check the two settings of a recipe.

        Raises:
            ConfigError: An unknown kind, an unknown option, or options without a kind.
        """
        if kind is not None and kind not in QUANTIZATIONS:
            raise ConfigError(
                f"model.quantization is {kind!r}{nearest(kind, QUANTIZATIONS)}; give one of "
                f"{', '.join(QUANTIZATIONS)}, or leave it out."
            )
        if values and kind is None:
            raise ConfigError("model.quantization_options are set without model.quantization.")
        values = dict(values or {})
        problems = [problem for name, value in values.items() if (problem := _problem(name, value))]
        if problems:
            raise ConfigError("; ".join(problems) + ".")
        return cls(**{**values, "skip_modules": tuple(values.get("skip_modules") or ())})


_WANTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "double": ("true or false", lambda value: isinstance(value, bool)),
    "compute_dtype": (
        "float32, bfloat16 or float16",
        lambda value: value in (None, "float32", "bfloat16", "float16"),
    ),
    "skip_modules": (
        "a list of names",
        lambda value: value is None or is_name_list(value, empty=True),
    ),
    "threshold": ("a number of at least 0", lambda value: is_number(value) and value >= 0),
}


def _problem(name: str, value: Any) -> str | None:
    if name not in _WANTED:
        return (
            f"model.quantization_options has no {name!r}{nearest(name, _WANTED)}; it takes "
            f"{', '.join(_WANTED)}"
        )
    wanted, accepts = _WANTED[name]
    if accepts(value):
        return None
    return f"model.quantization_options.{name} must be {wanted}, got {value!r}"


def precision_dtype(precision: str | None) -> torch.dtype:
    """The dtype that a Trainer's precision computes in; float32 without one."""
    name = str(precision or "32")
    if name.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if name.startswith("16") else torch.float32


def lora_settings(trainer: Any) -> LoRAConfig:
    """The settings of the Trainer's `LoRACallback`, or the defaults where there is none."""
    callbacks = getattr(trainer, "callbacks", None) or ()
    found = [each.config for each in callbacks if isinstance(each, LoRACallback)]
    return found[0] if found else LoRAConfig()


@dataclass(frozen=True)
class Quantization:
    """How the base of a run is quantized.

    Attributes:
        kind: `nf4`, `fp4` or `int8`.
        options: The finer settings.
        compute_dtype: What 4-bit layers compute in if the options do not say.
        lora: Tells which modules train whole.
    """

    kind: str
    options: QuantizationOptions
    compute_dtype: torch.dtype
    lora: LoRAConfig


def quantization_config(
    auto_class: str, source: str, quantization: Quantization, **settings: Any
) -> Any:
    """The `BitsAndBytesConfig` for `from_pretrained`.

    Args:
        auto_class: As for `load_model`.
        source: What `from_pretrained` takes.
        quantization: How the base is quantized.
        **settings: What decides on the shape of the model: `trust_remote_code`, `num_labels`, ...

    Raises:
        ConfigError: bitsandbytes cannot be imported, or there is no module to leave as it is.
    """
    kind, options = quantization.kind, quantization.options
    compute_dtype = quantization.compute_dtype
    import transformers

    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # it raises what its native library makes it raise
        raise ConfigError(
            f"model.quantization={kind!r} needs bitsandbytes, which cannot be imported here "
            f"({error}). Install it, or leave the setting out."
        ) from error
    code = settings.get("trust_remote_code", False)
    config = transformers.AutoConfig.from_pretrained(source, **settings)
    with torch.device("meta"):
        skeleton = getattr(transformers, auto_class).from_config(config, trust_remote_code=code)
    modules = modules_by_name(skeleton)
    _refuse_unknown(options.skip_modules, modules)
    kept = [
        *output_heads(modules),
        *saved_modules(modules, quantization.lora),
        *options.skip_modules,
    ]
    if options.compute_dtype is not None:
        compute_dtype = getattr(torch, options.compute_dtype)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=kind != "int8",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4" if kind == "int8" else kind,
        bnb_4bit_use_double_quant=options.double,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_threshold=options.threshold,
        llm_int8_skip_modules=list(dict.fromkeys(kept)) or None,
    )


def _refuse_unknown(skip_modules: tuple[str, ...], modules: Mapping[str, torch.nn.Module]) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    for wanted in skip_modules:
        try:
            missing = all(should_convert_module(name, [wanted]) for name in modules)
        except re.error as error:
            raise ConfigError(
                f"model.quantization_options.skip_modules: {wanted!r} is no regular expression "
                f"({error})."
            ) from error
        if missing:
            raise ConfigError(
                f"model.quantization_options.skip_modules: {wanted!r} matches no module. "
                f"{suggest(wanted, modules)}"
            )


def keep_trained_in_float32(model: torch.nn.Module, lora: LoRAConfig) -> None:
    """Let the few parameters that train beside the factors be float32 masters, for autocast."""
    saved = saved_modules(modules_by_name(model), lora)
    trained = {each.name for each in trained_parameters(model, lora, saved, set())}
    for name, parameter in model.named_parameters():
        if name in trained and parameter.is_floating_point():
            parameter.data = parameter.data.float()
