"""What knows how models are sharded over processes."""

from lightning_lora.strategies.exporting import write_tensors
from lightning_lora.strategies.fsdp2 import FSDP2Strategy
from lightning_lora.strategies.sharding import Replicated, sharding_of

__all__ = ["FSDP2Strategy", "Replicated", "sharding_of", "write_tensors"]
