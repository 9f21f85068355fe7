"""LightningCLI with a `lora` section, a folder for each run, and a summary at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

import lightning_lora.recipes  # noqa: F401  (its classes are found by their bare names)
from lightning_lora.callback import LoRACallback
from lightning_lora.checkpoints import read_checkpoint
from lightning_lora.cli_closing import KeepConfusion, close_fit, close_test, merge_scores
from lightning_lora.cli_defaults import (
    MergeBest,
    checkpoint_callbacks,
    clear_unstarted,
    loggers,
    missing_folders,
    progress_callbacks,
    quieten,
    scores,
)
from lightning_lora.cli_errors import ExplainingParser, ParsingError, explain
from lightning_lora.cli_paths import find_checkpoint, next_run, run_of_checkpoint
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.reporting import Scores, Summary, print_summary

DEFAULT_SEED = 42
DEFAULT_EPOCHS = 3


class SaveConfigOnStart(SaveConfigCallback):
    """Writes the config once training starts.

    A resume that is refused on the way there leaves the run's own config as it was.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class LoRACLI(LightningCLI):
    """Parse the arguments, build model, data and trainer, and run the subcommand.

    Args:
        arguments: The subcommand and its arguments, with configs by their paths.

    Raises:
        LightningLoRAError: For every mistake in arguments, files and settings.
    """

    def __init__(self, arguments: list[str]) -> None:
        quieten(resumes=arguments[0] == "fit")
        self._predictions: Path | None = None
        self._evaluated: Path | None = None
        self._made: list[Path] | None = None
        try:
            super().__init__(
                args=arguments,
                parser_class=ExplainingParser,
                parser_kwargs={"prog": "lightning-lora"},
                save_config_callback=SaveConfigOnStart,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=DEFAULT_SEED,
                trainer_defaults={
                    "enable_model_summary": False,
                    "log_every_n_steps": 10,
                    "gradient_clip_val": 1.0,
                },
                # A top-level optimizer would be built before the adapter and never train it.
                auto_configure_optimizers=False,
            )
        except BaseException:
            if self._made is not None:
                clear_unstarted(self.run_dir, self._made)
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the `lora` section and the folder for what is written."""
        parser.add_lightning_class_args(LoRACallback, "lora")
        # Settled once the arguments are known: the run's own folder, and "best" where one is kept.
        parser.set_defaults({"lora.export_dir": "auto", "lora.merge_from": "auto"})
        parser.add_argument(
            "--output_dir",
            type=str | None,
            default=None,
            help="Folder that each run makes a folder of its own in: outputs/CONFIG by default.",
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--predictions",
                type=str | None,
                default=None,
                help="File to write: predictions.csv or predictions.json in the run by default.",
            )
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the parser's messages in plain words."""
        try:
            self.config = parser.parse_args(args)
        except ParsingError as error:
            raise explain(str(error), self._subcommand_parsers[args[0]], args) from error

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint, and take settings that the config leaves open from it."""
        settings = self.config[self.config["subcommand"]]
        settings["output_dir"] = str(_output_dir(settings))
        if not settings.get("ckpt_path"):
            return
        path = find_checkpoint(str(settings["ckpt_path"]), Path(settings["output_dir"]))
        settings["ckpt_path"] = str(path)
        self._evaluated = path
        arguments = settings["model"].get("init_args", {})
        for name, value in _hyperparameters(path).items():
            if name in arguments and arguments[name] is None and name != "optimizer":
                arguments[name] = value

    def before_instantiate_classes(self) -> None:
        """Settle the run's folder and when training ends."""
        settings = self._settings
        output_dir = Path(settings["output_dir"])
        run = None if self._evaluated is None else run_of_checkpoint(self._evaluated)
        if self.subcommand == "fit":
            # A checkpoint is resumed in its own run, so that its best and last stay one history.
            self.run_dir = run or next_run(output_dir)
            self._made = missing_folders(self.run_dir)
        else:
            self.run_dir = run or output_dir
        trainer = settings["trainer"]
        if trainer["default_root_dir"] is None:
            trainer["default_root_dir"] = str(output_dir)
        if trainer["max_epochs"] is None and trainer["max_steps"] == -1 and not trainer["max_time"]:
            trainer["max_epochs"] = DEFAULT_EPOCHS
        self.parser.add_instantiator(self._build_lora, LoRACallback, subclasses=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with loggers and callbacks where the config has none of its own."""
        settings = self._get(self.config_init, "trainer")
        given = settings.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if self.datamodule is not None and hasattr(self.model, "adopt"):
            # What is best may depend on the data, and the checkpoint callback asks for it.
            self.model.adopt(self.datamodule)
        extra = self._default_callbacks(given, settings)
        if settings["logger"] in (None, True):
            kwargs["logger"] = loggers(self.run_dir) if self.subcommand == "fit" else False
        if self.subcommand != "fit":
            self.save_config_callback = None
        self.trainer_defaults["callbacks"] = extra
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as error:
            raise ConfigError(f"Settings of trainer: {error}") from error

    def after_fit(self) -> None:
        """Draw what there is to see, and say what the fit has written."""
        # Every rank takes part in finding the folder of logs and in scoring what was merged.
        log_dir = self.trainer.log_dir
        self._close_fit(log_dir, merge_scores(self.trainer, self.model, self.datamodule))

    def after_validate(self) -> None:
        """Show the scores."""
        self._print("validate", Scores({"value": scores(self.trainer)}), {}, [])

    def after_test(self) -> None:
        """Show the scores."""
        self._close_test()

    def after_predict(self) -> None:
        """Say where the predictions are."""
        files = {} if self._predictions is None else {"predictions": self._predictions}
        self._print("predict", Scores(), files, [])

    @rank_zero_only
    def _close_fit(self, log_dir: str | None, merged: dict[str, dict[str, float]]) -> None:
        closing = close_fit(self.trainer, self.model, self.run_dir, log_dir)
        closing.scores.columns.update(merged)
        commands = [] if closing.checkpoint is None else self._next_commands(closing.checkpoint)
        self._print("fit", closing.scores, closing.files, commands)

    @rank_zero_only
    def _close_test(self) -> None:
        files = close_test(self.model, self.run_dir, self._evaluated)
        self._print("test", Scores({"value": scores(self.trainer)}), files, [])

    @property
    def _settings(self) -> Any:
        return self.config[self.config["subcommand"]]

    def _build_lora(self, cls: type[LoRACallback], **kwargs: Any) -> LoRACallback:
        if kwargs["export_dir"] == "auto":
            kwargs["export_dir"] = str(self.run_dir)
        if kwargs["merge_from"] == "auto":
            kwargs["merge_from"] = "last"
        # Whoever scores or predicts has seen the plan when it was fitted.
        kwargs["verbose"] = kwargs["verbose"] and self.subcommand == "fit"
        return cls(**kwargs)

    def _default_callbacks(self, given: list[Callback], settings: Any) -> list[Callback]:
        extra: list[Callback] = []
        if settings["enable_progress_bar"] is not False and not _any(given, ProgressBar):
            extra += progress_callbacks()
        if self.subcommand == "predict" and hasattr(self.model, "prediction_writer"):
            wanted = self._settings["predictions"]
            suffix = getattr(self.model, "predictions_suffix", ".csv")
            self._predictions = Path(wanted or self.run_dir / f"predictions{suffix}")
            extra.append(self.model.prediction_writer(self._predictions))
        if self.subcommand == "fit" and self._settings["lora"]["merge_from"] == "auto":
            extra.append(MergeBest(self._get(self.config_init, "lora")))
        if self.subcommand != "fit" or settings["fast_dev_run"]:
            return extra
        if hasattr(self.model, "confusion"):
            extra.append(KeepConfusion())
        if settings["enable_checkpointing"] is not False and not _any(given, ModelCheckpoint):
            validates = settings["limit_val_batches"] != 0
            extra += checkpoint_callbacks(self.model, self.run_dir, validates)
        if settings["logger"] is not False and not _any(given, LearningRateMonitor):
            extra.append(LearningRateMonitor(logging_interval="step"))
        return extra

    def _next_commands(self, checkpoint: Path) -> list[tuple[str, str]]:
        name = _relative(checkpoint)
        commands = []
        if getattr(self.datamodule, "provides", lambda _: True)("test"):
            command = f"lightning-lora test --ckpt_path {name}"
            commands.append((f"Next, score the {name.stem} checkpoint on the test data", command))
        data = self._settings.get("data")
        predicts = data is not None and "predict_file" in data.get("init_args", {})
        if predicts and hasattr(self.model, "prediction_writer"):
            command = f"lightning-lora predict --ckpt_path {name} --data.predict_file FILE"
            commands.append(("Predict data of your own", command))
        return commands

    @rank_zero_only
    def _print(
        self,
        title: str,
        table: Scores,
        files: dict[str, Path],
        commands: list[tuple[str, str]],
    ) -> None:
        if self._evaluated is not None:
            title = f"{title} ({self._evaluated})"
        relative = {label: _relative(path) for label, path in files.items()}
        print_summary(Summary(title, table, relative, commands))


def _output_dir(settings: Any) -> Path:
    if settings.get("output_dir"):
        return Path(settings["output_dir"])
    files = settings.get("config") or []
    name = Path(str(files[-1])).stem if files else "run"
    return Path("outputs") / name


def _any(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)


def _hyperparameters(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return {}
    try:
        return read_checkpoint(path).get("hyper_parameters", {})
    except IndexError as error:  # what torch's unpickler makes of some files that are no pickle
        raise CheckpointError(f"{path} is no checkpoint that can be read.") from error


def _relative(path: Path) -> Path:
    resolved = path.resolve()
    return resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else path
