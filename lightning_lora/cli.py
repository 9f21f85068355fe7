"""The command `lightning-lora`: fit, validate, test and predict from one YAML file.

Everything that takes long to import is imported once the arguments ask for it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_lora.cli_paths import bundled_configs, complete_arguments
from lightning_lora.errors import LightningLoRAError

TRACEBACK_VARIABLE = "LIGHTNING_LORA_TRACEBACK"
SUBCOMMANDS = ("fit", "validate", "test", "predict")

_HELP = """\
usage: lightning-lora {{fit,validate,test,predict}} --config CONFIG [--KEY VALUE ...]

Fine-tune a model with LoRA, score it, and predict with it.

  fit       train the adapter; write checkpoints, the merged model and the adapter
  validate  score a checkpoint on the validation data
  test      score a checkpoint on the test data
  predict   write the predictions for data without labels to a file

  --config CONFIG     a YAML file, or one of these: {configs}
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
        ...
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP.format(configs=", ".join(bundled_configs()), variable=TRACEBACK_VARIABLE))
        return
    if arguments[0] == "--version":
        from lightning_lora import __version__

        print(f"lightning-lora {__version__}")
        return
    try:
        arguments = complete_arguments(arguments, SUBCOMMANDS)
        # Classes of the user's own are named by class_path and lie in the working directory.
        sys.path.insert(0, str(Path.cwd()))
        from lightning_lora.cli_run import LoRACLI

        LoRACLI(arguments)
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None or os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def _mistake_behind(error: BaseException | None) -> LightningLoRAError | None:
    """Find the mistake of the user's; the parser wraps what a constructor raises in its own."""
    while error is not None and not isinstance(error, LightningLoRAError):
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
