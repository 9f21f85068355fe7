"""YAML recipes that are installed with the package; `lightning-lora fit --config NAME` finds them."""
