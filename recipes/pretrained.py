"""Pretrained Hugging Face models and tokenizers by hub name, folder or `bundled:` name.

`transformers` is imported when a model is loaded and not before, so that help texts and
configuration errors come at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_lora.errors import ConfigError, DataError, LightningLoRAError
from lightning_lora.pretrained import missing_parameters, pretrained_on_meta
from lightning_lora.recipes.files import BUNDLED, nearest, resolve_path
from lightning_lora.recipes.quantization import Quantization, quantization_config
from lightning_lora.weight_files import NotPlainlyStoredError

# RoBERTa's relatives number positions from the padding index on and so take fewer tokens than
# their table of positions has rows.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "xmod", "mpnet"}
_WITHOUT_WEIGHTS = ContextVar("without_weights", default=False)


def resolve_model(name_or_path: str) -> str:
    """Turn what the user calls a model into what `from_pretrained` takes.

    Args:
        name_or_path: A hub name, a folder with a `config.json`, or `bundled:quickstart`.

    Raises:
        ConfigError: If it can only be a folder, and none is there or it holds no model.
    """
    if name_or_path.startswith(BUNDLED):
        try:
            folder = resolve_path(name_or_path)
        except DataError as error:
            raise ConfigError(str(error)) from error
        base = folder / "base"
        return _checked_folder(base if base.is_dir() else folder, name_or_path)
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return _checked_folder(folder, name_or_path)
    if name_or_path.startswith((".", "~", "/")) or name_or_path.count("/") > 1:
        siblings = sorted(p.name for p in folder.parent.iterdir()) if folder.parent.is_dir() else []
        raise ConfigError(
            f"There is no model folder {name_or_path}{nearest(folder.name, siblings)}. "
            "Set model.model_name_or_path to a folder with a config.json or to a hub name."
        )
    return name_or_path


def load_model(
    auto_class: str,
    name_or_path: str,
    later: bool = False,
    quantization: Quantization | None = None,
    **options: Any,
) -> Any:
    """Load a model with its task's head, in training mode, and say which weights are new.

    Args:
        auto_class: The `transformers` class that picks the architecture, such as
            `"AutoModelForSequenceClassification"`.
        name_or_path: As in `resolve_model`.
        later: Leave the weights on disk for `lightning_lora.FSDP2Strategy`, of which each process
            reads its own part; a model that cannot be loaded so is loaded at once.
        quantization: How the linear layers are quantized on loading, if at all.
        **options: Passed on to `from_pretrained`.

    Raises:
        ConfigError: If the model cannot be found or loaded, has no such head, or the folder's
            weights have other shapes than the settings ask for; or it is an encoder-decoder.
    """
    import transformers

    source = resolve_model(name_or_path)
    with _readable_errors(name_or_path), _quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=options.get("trust_remote_code", False)
        )
        _require_one_stack(config, name_or_path)
        if _WITHOUT_WEIGHTS.get():
            return _empty_model(getattr(transformers, auto_class), source, options).train()
        if later:
            try:
                model = pretrained_on_meta(getattr(transformers, auto_class), source, **options)
                _say_fresh(name_or_path, missing_parameters(model))
                return model
            except NotPlainlyStoredError as reason:
                rank_zero_info(f"{reason} So every process loads the whole model.")
        if quantization is not None:
            shaping = {
                key: value
                for key, value in options.items()
                if key not in ("dtype", "device_map", "attn_implementation")
            }
            options["quantization_config"] = quantization_config(
                auto_class, source, quantization, **shaping
            )
        model, report = getattr(transformers, auto_class).from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    if report["mismatched_keys"]:
        keys = sorted(str(entry[0]) for entry in report["mismatched_keys"])
        raise ConfigError(
            f"{name_or_path} holds {', '.join(keys)} in other shapes than the settings ask for: "
            "its head was trained on another number of classes. Start from the base model, or "
            "set the same class names."
        )
    _say_fresh(name_or_path, sorted(report["missing_keys"]))
    # from_pretrained leaves dropout off, and the Trainer keeps each module's mode as it finds it.
    return model.train()


def _say_fresh(name_or_path: str, names: list[str]) -> None:
    if names:
        rank_zero_info(
            f"{name_or_path} holds no {', '.join(names)}: newly initialised, unless a checkpoint "
            "brings them."
        )


@contextmanager
def without_weights() -> Iterator[None]:
    """Let `load_model` build models on the meta device from their configs alone, for a while."""
    token = _WITHOUT_WEIGHTS.set(True)
    try:
        yield
    finally:
        _WITHOUT_WEIGHTS.reset(token)


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer that can pad and that knows how many tokens its model takes.

    Args:
        name_or_path: As in `resolve_model`.
        trust_remote_code: Whether code from the hub may run.

    Raises:
        ConfigError: If there is no tokenizer, or it has no token to pad with.
    """
    import transformers

    source = resolve_model(name_or_path)
    with _readable_errors(name_or_path), _quiet_transformers():
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"The tokenizer of {name_or_path} has no token to pad with.")
        tokenizer.pad_token = tokenizer.eos_token
    limit = position_limit(config)
    if limit is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return tokenizer


def dtype_of(name: str) -> torch.dtype | str:
    """Return the dtype of that name; `"auto"` keeps the one that the weights are stored in.

    >>> dtype_of("bfloat16")
    torch.bfloat16
    """
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        known = ["auto", "float32", "bfloat16", "float16"]
        raise ConfigError(
            f"model.dtype is {name!r}{nearest(name, known)}; give one of {', '.join(known)}."
        )
    return dtype


def _checked_folder(folder: Path, name: str) -> str:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"The folder {name} holds no config.json, so it is no Hugging Face model. It holds: "
            f"{', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}."
        )
    return str(folder)


def _empty_model(auto_class: Any, source: str, options: dict[str, Any]) -> Any:
    import transformers

    config, rest = transformers.AutoConfig.from_pretrained(
        source, return_unused_kwargs=True, **options
    )
    if rest.get("dtype") == "auto":
        rest["dtype"] = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        return auto_class.from_config(config, **rest)


def _require_one_stack(config: Any, name: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{name} is an encoder-decoder model ({config.model_type}); the recipes adapt encoders "
            "and decoders. Take such a model, or write a LightningModule of your own around this "
            "one and add LoRACallback."
        )


def position_limit(model_config: Any) -> int | None:
    """Return how many tokens a model takes, by its config; None where it says nothing.

    Args:
        model_config: A config of `transformers`.
    """
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet says -1: it has no limit
        return None
    if model_config.model_type in _OFFSET_POSITIONS:
        limit -= (model_config.pad_token_id or 0) + 1
    return limit


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the load report and its progress bar; what matters of it is said by `load_model`."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    try:
        yield
    except LightningLoRAError:
        raise
    except ImportError as error:
        raise ConfigError(f"{name} cannot be loaded: {error}") from error
    except (OSError, ValueError, KeyError) as error:
        if Path(name).expanduser().is_dir() or name.startswith(BUNDLED):
            advice = "Check that the folder holds a complete model with this kind of head."
        else:
            advice = (
                "Check the name and the network, or give a local folder; a model that was "
                "downloaded before loads offline with HF_HUB_OFFLINE=1."
            )
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"{name} cannot be loaded: {reason} {advice}") from error
