r"""The memory that a rank needs to fine-tune a model, as arithmetic on sizes.

All sizes are bytes. With P parameters of which T train, b bytes a stored parameter and N ranks:

- *Weights*: ``P b``, a copy on each rank under DDP, ``P b / N`` under FSDP (ZeRO stage 3,
  arXiv:1910.02054, section 5). QLoRA keeps the linear layers but the head in NF4
  (arXiv:2305.14314, section 3): 4 bits a parameter and one float32 for each block of 64, 4.5 bits
  in all; with double quantization 8 bits a block and one float32 for each 256 blocks,
  ``4 + 8 / 64 + 32 / (64 * 256) = 4.127`` bits. bitsandbytes keeps the constants beside the
  parameters and not in them, so that FSDP does not divide them.
- *Gradients*: the bytes of the trained parameters, divided by N under FSDP. Lightning runs the
  forward pass before it clears the gradients of the step before, so that they are there beside all
  activations.
- *Optimizer*: AdamW keeps two values a trained parameter in its dtype (``K`` in ZeRO's table 1),
  8 bytes in float32; SGD none, or one with momentum; 8-bit Adam 2 bytes (arXiv:2110.02861).
- *Activations*: what autograd keeps. Metered on the model itself (`metering.py`) wherever it runs
  without values; else Korthikanti et al., arXiv:2205.05198, equation 1 with the attention matrix
  left out, as in their section 4.2 and in fused kernels: ``34 s b h`` bytes a layer at two bytes a
  value, for which they count linear inputs, those of nonlinearities, and masks of dropout. A frozen
  linear layer needs no input for the gradient of its weight, but LoRA on it does (``dA`` takes x),
  as `functional.py` keeps it: x and the skinny ``A x^T``, and nothing of the output's size. So LoRA
  on all linear layers saves no activations, and this formula serves it too. With checkpointing
  ``2 s b h`` a layer remain, and one layer whole (their section 5).
- *Communication*: DDP reduces gradients from buckets of their whole size. FSDP gathers a unit
  while the one before computes, ``2 U`` for the largest unit U in the dtype of the computation, and
  what is in no unit (embeddings, head) for the whole step (PyTorch FSDP, arXiv:2304.11277, section
  3.3); in the backward pass trained units also have their gradients whole, and once more for the
  reduction. Most activations are there when the forward pass ends, so the units of the second half
  count; a larger one at the beginning (embeddings) meets few activations.
- *Working memory*: what lives for a moment beyond these when most memory is in use: temporaries and
  gradients of activations (the logits' are as large as the logits), the largest weight while QLoRA
  has it dequantized, and the optimizer's update, for which PyTorch's `foreach` implementation (the
  default on GPUs) takes one more copy of the trained parameters.

Not counted: the CUDA context, the libraries' workspaces and what the allocator loses to
fragmentation, for which `fits` leaves room.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
NF4_BLOCK, NF4_GROUP = 64, 256
# Room for what is not counted: a share of the total, and GiB for the CUDA context and workspaces.
MARGIN_SHARE, MARGIN_GIB = 0.1, 1.0
STRATEGIES = ("ddp", "fsdp")


@dataclass(frozen=True)
class States:
    """What a method keeps of a model on one device, undivided, in bytes.

    Attributes:
        weights: All parameters, in the form in which they are stored.
        constants: Of these, what sharding doesn't divide: quantization constants.
        buffers: Buffers of the model.
        gradients: Gradients of the trained parameters.
        optimizer: Optimizer state.
        update: Temporaries of the optimizer's update.
        unit: Parameters of the largest sharded unit in the model's second half, in the dtype of the
            computation.
        unit_gradients: Gradients of the trained parameters in the unit there that has most of them.
        largest_unit: As `unit`, in the whole model.
        largest_unit_gradients: As `unit_gradients`, in the whole model.
        root: Parameters in no unit, in the dtype of the computation.
        root_gradients: Gradients of the trained ones of these.
        dequantized: The largest weight that is dequantized to be used.
        largest_gradient: Gradient of the largest trained parameter.
    """

    weights: float
    constants: float = 0.0
    buffers: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    update: float = 0.0
    unit: float = 0.0
    unit_gradients: float = 0.0
    largest_unit: float = 0.0
    largest_unit_gradients: float = 0.0
    root: float = 0.0
    root_gradients: float = 0.0
    dequantized: float = 0.0
    largest_gradient: float = 0.0


@dataclass(frozen=True)
class Step:
    """What a training step holds beyond the states, in bytes; see `metering.StepMemory`.

    Attributes:
        activations: Kept when the forward pass has ended.
        forward: Most in the forward pass.
        backward: Most in the backward pass, gradients of parameters left aside.
        backward_with_gradients: Most in the backward pass, with the gradients made so far.
    """

    activations: float
    forward: float
    backward: float
    backward_with_gradients: float


@dataclass(frozen=True)
class RankMemory:
    """The peak memory of a rank, in bytes.

    Attributes:
        weights: Parameters and buffers.
        gradients: Gradients of the trained parameters.
        optimizer: Optimizer state.
        activations: Kept for backward when the forward pass has ended.
        communication: Buckets of DDP, or gathered units of FSDP.
        working: What else lives when most memory is in use.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    communication: float
    working: float

    @property
    def total(self) -> float:
        """The sum: the peak."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.communication
            + self.working
        )

    def fits(self, capacity: float) -> str:
        """Say whether a card of so many bytes is enough.

        Returns:
            `"yes"` with the margin for what is not counted, `"tight"` without, or `"no"`.

        Example:
            >>> memory = RankMemory(40 * GIB, 0, 0, 0, 0, 0)
            >>> memory.fits(80 * GIB), memory.fits(42 * GIB), memory.fits(39 * GIB)
            ('yes', 'tight', 'no')
        """
        if self.total * (1 + MARGIN_SHARE) + MARGIN_GIB * GIB <= capacity:
            return "yes"
        return "tight" if self.total <= capacity else "no"


def nf4_bytes(parameters: int, double_quantization: bool = True) -> tuple[float, float]:
    """Return the bytes of so many NF4 parameters and those of their constants.

    Args:
        parameters: Number of parameters.
        double_quantization: Whether the constants are quantized themselves, as QLoRA has it.

    Example:
        >>> [round(8 * sum(nf4_bytes(2**20, double)) / 2**20, 3) for double in (True, False)]
        [4.127, 4.5]
    """
    constants = 1 + 4 / NF4_GROUP if double_quantization else 4
    return parameters / 2, parameters / NF4_BLOCK * constants


def transformer_step(
    rows: int, tokens: int, hidden: int, layers: int, logits: int, value: int, checkpointing: bool
) -> Step:
    """Return what a transformer's step holds, by formula, for models that cannot be metered.

    Args:
        rows: Rows of the batch.
        tokens: Tokens of a row.
        hidden: Width of the model.
        layers: Number of layers.
        logits: Outputs of the head for the batch, in all.
        value: Bytes of a value in the computation.
        checkpointing: Whether layers are computed again in the backward pass.

    Example:
        >>> step = transformer_step(2, 8, 16, 3, 0, 2, checkpointing=False)
        >>> step.activations == 3 * 34 * 2 * 8 * 16
        True
    """
    stream = rows * tokens * hidden * value
    layer = 17.0 * stream
    kept = layers * (stream if checkpointing else layer) + logits * value
    # The gradient of the logits, or of a layer's widest activation (4 h).
    working = max(logits * value, 4.0 * stream) + (layer if checkpointing else 0.0)
    return Step(kept, kept, kept + working, kept + working)


def rank_memory(
    states: States, step: Step, strategy: str = "ddp", ranks: int = 1, accumulates: bool = False
) -> RankMemory:
    """Return the peak memory of a rank.

    Args:
        states: What the method keeps, undivided.
        step: What a step holds.
        strategy: `"ddp"` or `"fsdp"`; one rank is the same under both.
        ranks: Number of ranks, N.
        accumulates: Whether gradients are accumulated over several batches, and so are there
            throughout the backward pass.

    Example:
        >>> states = States(weights=100, gradients=20, optimizer=40)
        >>> step = Step(activations=50, forward=55, backward=60, backward_with_gradients=64)
        >>> rank_memory(states, step).total  # the forward pass, beside the gradients before
        215.0
        >>> rank_memory(states, step, "fsdp", 4).total
        99.0
    """
    sharded = strategy == "fsdp" and ranks > 1
    share = 1 / ranks if sharded else 1
    weights = (states.weights - states.constants) * share + states.constants + states.buffers
    gradients, optimizer = states.gradients * share, states.optimizer * share
    gathered = reduced = outer = 0.0
    if sharded:
        gathered = 2 * states.unit + states.root
        reduced = 2 * states.unit_gradients + states.root_gradients
        outer = 2 * (states.largest_unit + states.largest_unit_gradients)
        outer += states.root + states.root_gradients
    elif ranks > 1:
        # Buckets are there from the start, and gradients are copied into them.
        gathered = states.gradients
    backward = gradients + step.backward
    if accumulates:
        backward += states.largest_gradient
    else:
        backward = min(backward, step.backward_with_gradients)
    peak = max(
        gradients + step.forward + states.dequantized + gathered,
        backward + states.dequantized + gathered + reduced,
        gradients + outer,
        gradients + states.update * share + (0.0 if sharded else gathered),
    )
    beyond = peak - gradients - step.activations
    communication = min(gathered + reduced, beyond)
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=step.activations,
        communication=communication,
        working=beyond - communication,
    )
