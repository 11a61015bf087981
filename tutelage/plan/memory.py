"""Memory that a training step needs beyond the process before the model is built, term by term, from a config.json.

The activations are those that our decoder keeps for its backward pass, in values per token and layer (H width, Q and K
widths of all query and key heads, I feed-forward width):

    with our kernels    4H (input and output of both norms) + 2 (Q + K) (before and after norm and rotation) + K (values)
                        + Q (attention's output) + heads (its row sums) + 3I (gate and up, and their product)
    plain torch         the same, and 4H more for the norms, 4 (Q + K) for norm and rotation, 2I for the activation
    checkpointing       H (a layer's input), and while a layer is computed again twice what it keeps (measured)

Gradients count in full only where batches accumulate: in a single pass they grow while activations are freed. The optimizer's
temporaries count only where they pass what the backward pass needed. Weights that are concatenated for one product are kept
until the backward pass. No logits of a whole batch are held: the head works in chunks of 16 MiB. What the allocator and the
threads add is not known beforehand, so there is a range.

Other models of a step stand under their names: a value function with all that is trained and kept of it, a teacher with its
weights and one layer's values; a reference and a reward model, which are asked between steps, with their weights.

Ranks with `shard=full` share weights, gradients and optimizer state evenly. Whole on each of them are the root and the layers at
work, concatenated weights, and Muon's temporaries.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tutelage.plan.parameters import Shape, count, layer_matrices

HEAD_CHUNK_BYTES = 1 << 24  # models/heads.py: logits held at a time
HEAD_COPIES = 3  # logits, their softmax in float32, and a temporary
LOW, HIGH = 0.85, 1.35  # range of the sum: what the allocator gives back late, thread buffers, library workspaces
WORKSPACE = 64 << 20  # oneDNN and OpenMP, measured for an empty step
CACHE_MOST = 2 << 30  # bytes (engine/blocks.py)
IN_TURN = ("backward", "head", "workspace", "update")  # terms that models trained together do not need at the same time
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by term. `low` and `high` bound the peak."""

    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())

    @property
    def low(self) -> int:
        return int(self.total * LOW)

    @property
    def high(self) -> int:
        return int(self.total * HIGH)

    def with_terms(self, terms: Mapping[str, int]) -> Memory:
        """What is held besides, by name."""
        return Memory({**self.terms, **terms})

    def with_model(self, name: str, other: Memory) -> Memory:
        """Another model that is trained in the same step. What the two need in turn counts once."""
        return self.with_terms({name: sum(value for term, value in other.terms.items() if term not in IN_TURN)})

    def explain(self) -> str:
        """One line: the terms in MB, largest first, and the range."""
        parts = sorted(self.terms.items(), key=lambda kv: -kv[1])
        text = " + ".join(f"{value / 1e6:,.0f} {name}" for name, value in parts if value >= 1e5)
        return f"{self.low / 1e9:.2f} to {self.high / 1e9:.2f} GB ({text} MB)"


def frozen(config: Mapping[str, Any], tokens: int = 0, dtype: str = "float32", ranks: int = 1) -> int:
    """Bytes of a model that is only asked: its weights (of `ranks` that share them), and what one layer has at a time where it
    reads so many tokens in the middle of a step. Between steps that is less than what a step needs."""
    s = Shape.of(config)
    return -(-4 * count(s).total // ranks) + (8 * s.hidden + 3 * s.intermediate) * tokens * BYTES[dtype]


def cache(config: Mapping[str, Any], texts: int, tokens: int) -> int:
    """Bytes of the keys and values of texts of at most `tokens` tokens that are made at a time."""
    s = Shape.of(config)
    return min(CACHE_MOST, 4 * texts * tokens * s.layers * 2 * s.kv_heads * s.head_dim)


def layer_values_per_token(s: Shape, kernels: bool = True) -> int:
    """Values that one layer keeps for the backward pass, per token."""
    q, k = s.heads * s.head_dim, s.kv_heads * s.head_dim
    mlp = (3 if s.traits.gated else 2) * s.intermediate
    values = 4 * s.hidden + 2 * (q + k) + k + q + s.heads + mlp
    if not kernels:
        values += 4 * s.hidden + 4 * (q + k) + 2 * s.intermediate
    return values


def estimate(
    config: Mapping[str, Any],
    micro_rows: int,
    row_length: int,
    optimizer: Literal["adamw", "muon"] = "muon",
    dtype: str = "float32",
    checkpointing: str = "none",
    kernels: bool = True,
    accumulate: bool = True,
    ranks: int = 1,
    trained: int | None = None,
    quantized: bool = False,
) -> Memory:
    """Memory of training the model of a config.json with `micro_rows` rows of `row_length` tokens in a forward pass.

    `accumulate`: a step has more than one forward pass. Weights, gradients and optimizer state are float32 whatever `dtype` the
    products have. `ranks`: how many share one copy of them (`shard=full`); the layers at work are whole on each. `trained`:
    values of an adapter, beside which everything is frozen; `quantized`: the frozen matrices take 4.5 bits a weight.
    """
    if trained is not None:
        return _beside_frozen(Shape.of(config), micro_rows * row_length, dtype, checkpointing, kernels, ranks, trained, quantized)
    s = Shape.of(config)
    counts, tokens, size = count(s), micro_rows * row_length, BYTES[dtype]
    again = 2 if checkpointing == "layer" else 1
    layer = layer_values_per_token(s, kernels) * tokens * size
    activations = s.layers * s.hidden * tokens * size + again * layer if again == 2 else s.layers * layer
    inputs = s.heads * s.head_dim * s.hidden + s.intermediate * s.hidden  # of o_proj and down_proj, which are not fused
    weights = gradients = -(-4 * counts.total // ranks)
    state, temporaries = _optimizer_bytes(s, optimizer)
    state = -(-state // ranks)
    terms = {
        "weights": weights,
        "gradients": gradients if accumulate else max(0, gradients - activations),
        "optimizer": state,
        "fused weights": (1 if again == 2 else s.layers) * (layer_matrices(s) - inputs) * size,
        "activations": activations,
        "ends": 4 * s.hidden * tokens * size,  # embedding, last norm, hidden states and their gradient
        "backward": again * (3 * s.intermediate + 2 * s.hidden) * tokens * size,  # gradients inside one layer
        "head": HEAD_COPIES * HEAD_CHUNK_BYTES + 4 * s.outputs * s.hidden,
        "workspace": WORKSPACE,
    }
    if ranks > 1:
        terms["whole"] = _whole_bytes(s)
    at_update = terms["weights"] + gradients + state + temporaries + WORKSPACE
    terms["update"] = max(0, at_update - sum(terms.values()))
    return Memory(terms)


def _beside_frozen(
    s: Shape, tokens: int, dtype: str, checkpointing: str, kernels: bool, ranks: int, trained: int, quantized: bool
) -> Memory:
    """The same with an adapter on a frozen base: gradients and optimizer state are the adapter's alone, and the changed weights
    of one layer are there at a time, twice while they are joined."""
    counts, size = count(s), BYTES[dtype]
    again = 2 if checkpointing == "layer" else 1
    layer = layer_values_per_token(s, kernels) * tokens * size
    base = counts.matrices * (4.5 / 8 if quantized else 4) + 4 * (counts.total - counts.matrices)
    return Memory({
        "weights": -(-int(base) // ranks),
        "adapter": -(-4 * trained // ranks),
        "gradients": -(-4 * trained // ranks),
        "optimizer": -(-8 * trained // ranks),
        "changed weights": 2 * layer_matrices(s) * size,
        "activations": s.layers * s.hidden * tokens * size + again * layer if again == 2 else s.layers * layer,
        "ends": 4 * s.hidden * tokens * size,
        "backward": again * (3 * s.intermediate + 2 * s.hidden) * tokens * size,
        "head": HEAD_COPIES * HEAD_CHUNK_BYTES,
        "workspace": WORKSPACE,
    })  # fmt: skip


def _optimizer_bytes(s: Shape, optimizer: str) -> tuple[int, int]:
    """State and temporaries: Muon works on all matrices of one shape at once and holds five copies of them."""
    counts = count(s)
    if optimizer == "adamw":
        return 8 * counts.total, 0
    largest = s.layers * s.hidden * s.intermediate * (2 if s.traits.gated else 1)
    return 4 * counts.matrices + 8 * (counts.total - counts.matrices), 4 * 5 * largest


def _whole_bytes(s: Shape) -> int:
    """What a rank with shards holds whole: the root's weights, and of the layer at work and the one fetched meanwhile weights
    and gradient; each of both once more in the buffer that it comes or goes in."""
    layers = layer_matrices(s) * s.layers
    return 4 * (2 * (count(s).total - layers) + 4 * layer_matrices(s))


def largest_micro_rows(config: Mapping[str, Any], row_length: int, available_bytes: int, most: int = 1024, **options: Any) -> int:
    """The most rows in a forward pass whose upper estimate fits in `available_bytes`; 0 when not even one does."""
    rows = 0
    while rows < most and estimate(config, rows + 1, row_length, **options).high <= available_bytes:
        rows += 1
    return rows


def peak_rss() -> int:
    """The most memory that this program has held, in bytes."""
    try:
        # Not ru_maxrss, which is at least what the parent held when it started this process.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


@dataclass(frozen=True, slots=True)
class Comparison:
    """A prediction beside what was measured."""

    predicted: Memory
    measured: int  # bytes: peak less the process before the model was built

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted.total

    @property
    def inside(self) -> bool:
        return self.predicted.low <= self.measured <= self.predicted.high


def compare(predicted: Memory, base_bytes: int, peak_bytes: int) -> Comparison:
    """The estimate against a run: `base_bytes` before the model was built, `peak_bytes` (`peak_rss`) after some steps."""
    return Comparison(predicted, peak_bytes - base_bytes)
