"""The command `lightning-lora`: fit, validate, test and predict from a YAML file, bundled or not.

Everything that takes long to import is imported once the arguments ask for it.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_lora.cli_paths import complete_arguments
from lightning_lora.errors import LightningLoRAError
from lightning_lora.files import is_full_disk

TRACEBACK_VARIABLE = "LIGHTNING_LORA_TRACEBACK"
SUBCOMMANDS = ("fit", "validate", "test", "predict")
CONFIGS = "configs"
PLAN = "plan"
# Where the function of each further subcommand is.
_COMMANDS = {
    CONFIGS: ("cli_configs", "run_configs"),
    "inspect": ("cli_inspect", "run_inspect"),
    "diff": ("cli_inspect", "run_diff"),
    "analyze": ("cli_analyze", "run_analyze"),
    "merge": ("cli_merge", "run_merge"),
    "export": ("cli_export", "run_export"),
    "convert": ("cli_export", "run_convert"),
    "push": ("cli_push", "run_push"),
    "sweep": ("cli_sweep", "run_sweep"),
}
_KNOWN = (*SUBCOMMANDS, PLAN, *_COMMANDS)

_HELP = """\
usage: lightning-lora {{fit,validate,test,predict}} --config CONFIG [--KEY VALUE ...]
       lightning-lora plan --config CONFIG [--gpus N,N] [--memory GiB] [--json] [--KEY VALUE ...]
       lightning-lora configs {{list,show,copy}} [NAME] [DEST]
       lightning-lora inspect CKPT [--json]
       lightning-lora diff CKPT CKPT [--json]
       lightning-lora analyze CKPT [CKPT ...] [--base FOLDER] [--output FOLDER] [--json]
       lightning-lora merge CKPT --output DIR [--base FOLDER_OR_NAME] [--dtype DTYPE] [--json]
       lightning-lora export CKPT DIR [--json]
       lightning-lora convert SRC DST [--base FOLDER_OR_NAME] [--alpha N] [--json]
       lightning-lora push DIR NAME [--private] [--json]
       lightning-lora sweep --config CONFIG --KEY V,V [--seeds N,N] [--baselines NAME,NAME] [--json]

Fine-tune a model with LoRA, score it, and predict with it.

  fit       train the adapter; write checkpoints, the merged model and the adapter
  validate  score a checkpoint on the validation data
  test      score a checkpoint on the test data
  predict   write the predictions for data without labels to a file
  plan      say what would be adapted and the memory that it needs; nothing is loaded
  configs   list the configs in the package, print one, or copy one to a file of your own
  inspect   say what is in an adapter checkpoint: base, settings, sizes, which layers moved most
  diff      say what differs between two adapter checkpoints
  analyze   compare what adapters have learned, with each other and with the base's weights
  merge     write base and adapter as one model, a layer at a time
  export    write the adapter in PEFT's format, with a model card
  convert   make a checkpoint of an adapter that other code wrote
  push      upload an adapter or a merged model to the Hugging Face hub
  sweep     fit every combination of settings and seeds, and compare the scores

  --config CONFIG     a YAML file, or the name of a config in the package
  --KEY VALUE         overrides a key of the config: --lora.r 16 --trainer.max_epochs 5
  --ckpt_path PATH    the checkpoint to use: a file, `best` or `last`. The config saved beside it
                      is used where --config is not given
  --print_config      print the config with all its keys and values, and stop
  --help              after a subcommand: every key

Try:      lightning-lora fit --config quickstart
Keys:     lightning-lora fit --help, lightning-lora fit --model.help TextClassifier
Defects:  {variable}=1 shows the traceback behind an error message
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The arguments; None takes those the program was started with.

    Raises:
        SystemExit: With code 1 or 2 after a message for a mistake of the user's.

    Example:
        >>> main(["--help"])  # doctest: +ELLIPSIS
        usage: lightning-lora {fit,validate,test,predict} --config CONFIG [--KEY VALUE ...]
               lightning-lora plan --config CONFIG [--gpus N,N] ...
               lightning-lora configs {list,show,copy} [NAME] [DEST]
        ...
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP.format(variable=TRACEBACK_VARIABLE))
        return
    if arguments[0] == "--version":
        from lightning_lora import __version__

        print(f"lightning-lora {__version__}")
        return
    try:
        if arguments[0] in _COMMANDS:
            module, function = _COMMANDS[arguments[0]]
            with _ending_on_sigterm():
                run = getattr(importlib.import_module(f"lightning_lora.{module}"), function)
                run(arguments[1:])
                sys.stdout.flush()
            return
        # Classes of the user's own are named by class_path and lie in the working directory.
        sys.path.insert(0, str(Path.cwd()))
        if arguments[0] == PLAN:
            from lightning_lora.cli_plan import run_plan

            run_plan(arguments[1:])
            return
        arguments = complete_arguments(arguments, _KNOWN)
        from lightning_lora.cli_run import LoRACLI

        LoRACLI(arguments)
    except BrokenPipeError:
        # Whoever read the output has left. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        mistake = _mistake_behind(error) or _full_disk(error)
        if mistake is None or os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {_message_of(mistake)}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as an exception does, so that nothing half-written is left.

    Not for fits, where Lightning has a use for it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _mistake_behind(error: BaseException | None) -> LightningLoRAError | None:
    """Find the mistake of the user's; the parser wraps what a constructor raises in its own."""
    while error is not None and not isinstance(error, LightningLoRAError):
        error = error.__cause__
    return error


def _full_disk(error: BaseException) -> LightningLoRAError | None:
    """What is said where a logger or another library had no room to write."""
    if not is_full_disk(error):
        return None
    return LightningLoRAError(
        f"There is no room left: {error}. Make room, or choose another place (--output_dir)."
    )


def _message_of(mistake: LightningLoRAError) -> str:
    """Return what a mistake says; what a data worker found is wrapped in the worker's traceback."""
    text = str(mistake)
    if not text.startswith("Caught "):
        return text
    return text.rpartition(f"{type(mistake).__module__}.{type(mistake).__name__}: ")[2].rstrip()


if __name__ == "__main__":
    main()
