"""The errors that a user can cause. Each message says what is wrong, where, and what to do.

Everything the library raises for a mistake of the caller's derives from `LightningLoRAError`, so
that the command line can print the message alone and leave tracebacks to real defects.
"""


def first_line(error: BaseException, most: int | None = 200) -> str:
    """The first line of what an error of another library says, or its kind if it says nothing.

    Args:
        error: The error.
        most: How many characters of it; None for all.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


class LightningLoRAError(Exception):
    """Base of every error that is explained by its message alone."""


class ConfigError(LightningLoRAError, ValueError):
    """A setting, or a combination of settings, that cannot be carried out."""


class SettingsError(ConfigError):
    """Everything that is wrong with some settings, reported at once.

    Args:
        problems: One line for each problem.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__(problems)
        self.problems = problems

    def __str__(self) -> str:
        count = len(self.problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        return f"{count} problem{'s' if count > 1 else ''} in the LoRA settings:{lines}"


class TargetError(LightningLoRAError, ValueError):
    """Names or patterns that match no layer of the model, or a layer that cannot be adapted."""


class CheckpointError(LightningLoRAError, RuntimeError):
    """A checkpoint or adapter that is missing, unreadable, or belongs to something else."""


class DataError(LightningLoRAError, ValueError):
    """A data file that is missing, empty, or does not hold what the settings say."""
