"""Who takes part in the race: the sparse model of a recipe, its dense twin of equal active parameters, and dense models of other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..accounting import count_parameters
from ..config import ModelConfig
from ..errors import UsageError

ROUND = 32  # widths of dense models, so that the kernels need no padding
SPARSE, TWIN = "sparse", "dense twin"
# (hidden size, layers) of the other dense models, as factors of the sparse model's
DEFAULT_SIZES = ((0.75, 0.75), (1.0, 0.5), (1.5, 1.0))


@dataclass(frozen=True)
class Racer:
    """One model that takes part; all are trained alike but for the learning rate."""

    name: str
    config: ModelConfig
    learning_rate: float


def racers_of(model: ModelConfig, learning_rate: float, sizes: Sequence[tuple[int, int]] = ()) -> list[Racer]:
    """The sparse model, its twin, and a dense model of each of `sizes` (hidden size, layers); without sizes, of the usual ones.

    No multi-token prediction: it would cost all of them time for what bits per byte do not show. Raises `UsageError` where the model
    has no experts, and for a hidden size that is no multiple of the head dimension.
    """
    sparse = model.replace(num_nextn_predict_layers=0)
    if sparse.first_k_dense_replace >= sparse.num_hidden_layers:
        raise UsageError("model: has no layer with experts, so there is nothing to race against; lower first_k_dense_replace")
    configs = {SPARSE: sparse, TWIN: dense_twin(sparse)}
    for hidden, layers in sizes or default_sizes(sparse):
        configs[f"dense {hidden}x{layers}"] = dense_of_size(sparse, hidden, layers)
    return [Racer(name, config, learning_rate) for name, config in configs.items()]


def dense_twin(sparse: ModelConfig) -> ModelConfig:
    """The dense model with as many active parameters: same hidden size, layers and attention, one width of MLP for all layers.

    The width is rounded up, in favour of the dense model.
    """
    layers, hidden = sparse.num_hidden_layers, sparse.hidden_size
    dense = sparse.replace(first_k_dense_replace=layers)
    without_mlp = count_parameters(dense).active - layers * count_parameters(dense).dense_mlp
    width = (count_parameters(sparse).active - without_mlp) / (3 * hidden * layers)
    return dense.replace(intermediate_size=rounded_up(width))


def dense_of_size(sparse: ModelConfig, hidden: int, layers: int) -> ModelConfig:
    """A dense model of the sparse model's proportions: heads, key heads and MLP width grow with the hidden size."""
    head_dim = sparse.head_dim
    if hidden % head_dim:
        raise UsageError(f"--dense: {hidden} is no multiple of the head dimension {head_dim}; give a hidden size that is")
    heads = hidden // head_dim
    most = max(1, round(heads * sparse.num_key_value_heads / sparse.num_attention_heads))
    width = dense_twin(sparse).intermediate_size * hidden / sparse.hidden_size
    return sparse.replace(
        hidden_size=hidden, num_hidden_layers=layers, first_k_dense_replace=layers, num_attention_heads=heads,
        num_key_value_heads=next(kv for kv in range(most, 0, -1) if heads % kv == 0), intermediate_size=rounded_up(width),
    )


def default_sizes(sparse: ModelConfig) -> list[tuple[int, int]]:
    """Dense sizes below and above the sparse model's."""
    sizes = []
    for wider, deeper in DEFAULT_SIZES:
        heads = max(1, round(wider * sparse.hidden_size / sparse.head_dim))
        sizes.append((heads * sparse.head_dim, max(1, round(deeper * sparse.num_hidden_layers))))
    return sizes


def rounded_up(width: float) -> int:
    """The next multiple of `ROUND`."""
    return max(ROUND, -int(-width // ROUND) * ROUND)
