"""Floating-point operations of a decoder, from its config.json.

What is counted: a multiply and an add are two. Every weight of a matrix takes part in one product forward and two
backward (2 + 4 FLOPs a token); the token table is a look-up and costs nothing, the output head is a matrix whether tied or
not. Attention scores and mixing take 4 * heads * head_dim FLOPs forward for each token that a token sees: half of the
sequence on average (`causal="half"`, what is computed at least), or all of it (`causal="full"`, as PaLM and nanochat
count). Norms, activations, softmax and the optimizer are left out, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tutelage.plan.parameters import Shape, layer_matrices

Causal = Literal["half", "full"]
FORWARD, BACKWARD = 2, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of one token in one forward pass, by what they are spent on."""

    layers: float  # matrices of all layers
    head: float  # output head
    attention: float  # scores and mixing

    @property
    def forward(self) -> float:
        return self.layers + self.head + self.attention

    def train(self, *, recompute: bool = False) -> float:
        """FLOPs of training on one token. `recompute`: the layers' forward pass is run twice (activation checkpointing);
        the share of a machine's rate (MFU) is by convention taken of the count without it."""
        extra = self.layers + self.attention if recompute else 0.0
        return 3 * self.forward + extra


def mean_seen(length: int, window: int | None, causal: Causal = "half") -> float:
    """Tokens that a token sees on average in a sequence of `length`."""
    if causal == "full":
        return float(min(length, window or length))
    if window is None or window >= length:
        return length / 2
    return window - window * window / (2 * length)


def count_flops(config: Mapping[str, Any], sequence_length: int, causal: Causal = "half") -> Flops:
    """FLOPs per token of the model of a config.json in sequences of `sequence_length` tokens.

    With packed rows the length that matters is that of a sample, since no token sees another sample.
    """
    s = Shape.of(config)
    seen = sum(mean_seen(sequence_length, w, causal) for w in s.windows)
    return Flops(
        layers=FORWARD * s.layers * layer_matrices(s),
        head=FORWARD * s.hidden * s.outputs,
        attention=4 * s.heads * s.head_dim * seen,
    )


def train_flops_per_token(
    config: Mapping[str, Any], sequence_length: int, causal: Causal = "half", frozen: bool = False
) -> float:
    """Training FLOPs of one token: 6 per matrix weight, the head included, plus attention; 4 where weights are `frozen`, so that
    gradients only pass through them to an adapter, whose own work is not counted."""
    found = count_flops(config, sequence_length, causal)
    return found.train() - (found.layers + found.head if frozen else 0)


def generate_flops(config: Mapping[str, Any], prompt_tokens: int, new_tokens: int) -> float:
    """FLOPs of generating with a key-value cache: the prompt once (one row of logits), then one token at a time."""
    s = Shape.of(config)
    length = prompt_tokens + new_tokens
    matrices = FORWARD * s.layers * layer_matrices(s) * length
    head = FORWARD * s.hidden * s.outputs * new_tokens
    seen = sum(mean_seen(length, w) for w in s.windows) * length
    return matrices + head + 4 * s.heads * s.head_dim * seen


def explain(config: Mapping[str, Any], sequence_length: int, causal: Causal = "half") -> str:
    """The count as one line of text, with its formula."""
    f = count_flops(config, sequence_length, causal)
    parts = (
        f"6 x {f.layers / 2 / 1e6:,.2f}M layer weights",
        f"6 x {f.head / 2 / 1e6:,.2f}M head weights",
        f"{3 * f.attention / 1e6:,.2f} MFLOP attention over {sequence_length} tokens (causal: {causal} of the square)",
    )
    guess = "" if Shape.of(config).exact else " (an unknown family, counted like Llama)"
    return f"{f.train() / 1e6:,.1f} MFLOP a token = {' + '.join(parts)}{guess}"


def six_nd(parameters: float, tokens: float) -> float:
    """The usual estimate of training FLOPs, 6 N D (Kaplan et al. 2020): attention left out."""
    return 6.0 * parameters * tokens


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation: the share of a rate that a run used."""
    return tokens_per_second * flops_per_token / peak_flops
