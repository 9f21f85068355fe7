"""YAML recipes, installed with the package; `--config NAME` finds them by name."""
