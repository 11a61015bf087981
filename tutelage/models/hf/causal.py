"""Any causal language model of `transformers` with our interface: the slow path, for families that are not ours.

Samples stay isolated because each piece of a packed row runs as its own row, right-padded, in groups of similar length. That
is right for every kind of model (rotary, learned or ALiBi positions, sliding windows, recurrent states), where a four-dimensional
mask is right for some. Our key-value cache is not for these models (`traits.cache` is False): a generator lets them keep their
own (`begin`, `extend`). Encoder-decoders are in `seq2seq.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.models import shard
from tutelage.models.adapters.hf_virtual_tokens import prepend_virtual
from tutelage.models.adapters.virtual_tokens import VirtualTokens, count_virtual
from tutelage.models.divergence import Distillation, Teacher, TopTokens
from tutelage.models.heads import LmHead, distilled
from tutelage.models.hf.state import State
from tutelage.models.interface import Batch, Output, Traits

MLP_WIDTHS = ("intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim")  # what families call it


@dataclass(slots=True, frozen=True)
class AdapterConfig:
    """What others read of a model that is not ours."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    source: dict[str, Any]

    @classmethod
    def of(cls, hf: Any) -> AdapterConfig:
        text = hf.get_text_config()
        heads = getattr(text, "num_attention_heads", None) or 1
        width = text.hidden_size
        eos = getattr(text, "eos_token_id", None)
        return cls(
            model_type=hf.model_type, vocab_size=text.vocab_size, hidden_size=width,
            num_hidden_layers=text.num_hidden_layers, num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or width // heads,
            intermediate_size=next((v for n in MLP_WIDTHS if (v := getattr(text, n, None))), 4 * width),
            max_position_embeddings=getattr(text, "max_position_embeddings", None) or 1 << 20,
            tie_word_embeddings=bool(hf.tie_word_embeddings), bos_token_id=getattr(text, "bos_token_id", None),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_token_id=getattr(text, "pad_token_id", None), source=hf.to_dict(),
        )  # fmt: skip

    def to_hf(self) -> dict[str, Any]:
        return dict(self.source)


class LogitsHead(nn.Module):
    """Stands in for LmHead where a model does more after its last hidden state than a product: `hidden` is the logits.

    `own` is the model's module of the same name, whose parameters are held here under the names that they had.
    """

    def __init__(self, own: nn.Module | None = None) -> None:
        super().__init__()
        if own is not None:
            for name, parameter in own.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, module in own.named_children():
                self.add_module(name, module)

    def forward(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum of weights * cross-entropy: [N,V], [N], [N] -> scalar."""
        return -(torch.where(weights != 0, self.logprobs(hidden, targets), 0) * weights).sum()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return hidden.float().log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)

    def distil(
        self, hidden: Tensor, targets: Tensor, weights: Tensor, teacher: Teacher | TopTokens, how: Distillation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `LmHead.distil`."""
        return distilled(hidden, None, None, targets, weights, 1.0, None, teacher, how)

    def logprobs_and_entropy(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        hidden = hidden / temperature
        return self.logprobs(hidden, targets), self.entropy(hidden)

    def entropy(self, hidden: Tensor) -> Tensor:
        logprobs = hidden.float().log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1)


class Wrapped(nn.Module):
    """A `transformers` model whose parameters keep their own names."""

    hf: Any
    config: AdapterConfig
    virtual: VirtualTokens | None

    def __init__(self, hf: Any) -> None:
        super().__init__()
        # The modules are registered, the model itself is not: a name would otherwise begin with its attribute.
        self.__dict__["hf"] = hf
        for name, module in hf.named_children():
            self.add_module(name, module)
        self.config = AdapterConfig.of(hf.config)
        self.training = hf.training
        self.virtual = None  # the virtual tokens of a prompt or prefix adapter

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.hf.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Its own buffers have to move with its modules (BART has one).
        self.hf._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def traits(self) -> Traits:
        return Traits(virtual_tokens=count_virtual(self))

    @property
    def body(self) -> Wrapped:
        """The model under the heads: itself, whose heads are part of it."""
        return self

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the modules that are heads of classes, and trained whole with an adapter."""
        return ()

    @property
    def active_virtual(self) -> VirtualTokens | None:
        """The virtual tokens that come before every text now; None while the adapter is disabled."""
        return None if self.virtual is None or self.virtual.disabled else self.virtual

    @property
    def checkpointing(self) -> str:
        """ "none" or "layer", as for our decoder; models that do not offer it raise ValueError."""
        on = any(getattr(m, "gradient_checkpointing", False) for m in self.hf.modules())  # its property has changed its name
        return "layer" if on else "none"

    @checkpointing.setter
    def checkpointing(self, value: str) -> None:
        assert value in ("none", "layer"), value
        if value == "layer":
            self.hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif self.checkpointing == "layer":
            self.hf.gradient_checkpointing_disable()

    def groups(self, segments: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What `pieces` gives, and of which tokens the hidden states are wanted. Ranks of a sharded model run its layers equally
        often: those with fewer groups add some with one token that is not wanted."""
        found = [(index, real, real) for index, real in pieces(segments)]
        one = torch.ones(1, 1, dtype=torch.bool, device=segments.device)
        return found + [(one.long() - 1, one, ~one)] * (shard.most(self, len(found)) - len(found))


class Adapter(Wrapped):
    """A causal model as `model(batch) -> Output`."""

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        self.whole = not _head_is_linear(hf)
        own = self._modules.get("lm_head")
        if self.whole:
            self.lm_head: nn.Module = LogitsHead(own)
        else:
            output = hf.get_output_embeddings()
            self.lm_head = LmHead(output.weight, getattr(output, "bias", None))
        if own is not None:
            self.lm_head_of_hf = own  # stays among our modules: who replaces its parameters by shards finds it

    def forward(self, batch: Batch) -> Output:
        """Hidden states after the last norm [B,T,H] (logits where `whole`); those of padding are 0."""
        return Output(hidden=run_pieces(self, batch, self.config.vocab_size if self.whole else self.config.hidden_size))

    def run(self, ids: Tensor, real: Tensor) -> Tensor:
        tokens = self.active_virtual
        if tokens is None:
            return self._run(ids, real, use_cache=False)
        how = prepend_virtual(self.hf, tokens, {"input_ids": ids, "attention_mask": real})
        hidden = self._run(how.pop("input_ids", None), how.pop("attention_mask"), use_cache=tokens.is_prefix, **how)
        return hidden[:, -ids.shape[1] :]

    def begin(self, sources: Sequence[Sequence[int]]) -> State:
        """Nothing read yet. A causal model has no sources; there are as many empty ones as rows."""
        return State.new(len(sources))

    def extend(self, ids: Tensor, state: State) -> Tensor:
        """Hidden states [B,T,H] (logits where `whole`) of the next tokens [B,T] of the state's rows, taken up by the state."""
        real = torch.ones(state.rows, state.length + ids.shape[1], dtype=torch.bool, device=ids.device)
        return self._run(ids, real, past_key_values=state.cache, use_cache=True)

    def _run(self, ids: Tensor | None, real: Tensor, **how: Any) -> Tensor:
        inner = self.hf if self.whole else self.hf.base_model
        got = inner(input_ids=ids, attention_mask=real.long(), **how)
        return got.logits if self.whole else got.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, batch: Batch) -> Tensor:
        """Logits of every token, [B,T,V]."""
        logits: Tensor = self.lm_head.logits(self(batch).hidden)  # type: ignore[operator]
        return logits


def run_pieces(model: Any, batch: Batch, width: int) -> Tensor:
    """What `model.run` makes of each piece of a batch by itself, in the places of the batch: [B,T,width]; 0 for padding."""
    assert batch.cache is None, "this model has no key-value cache of ours; run the whole sequence"
    assert batch.attention == "causal" and batch.embeds is None and batch.tree is None
    flat_ids = batch.ids.flatten()
    out: Tensor | None = None
    for index, real, wanted in model.groups(batch.segments):
        hidden = model.run(flat_ids[index], real)
        if out is None:
            out = hidden.new_zeros(*batch.shape, hidden.shape[-1])
        at = index[wanted]
        out = out.index_put((at // batch.shape[1], at % batch.shape[1]), hidden[wanted])
    return torch.zeros(*batch.shape, width, device=batch.ids.device) if out is None else out


def pieces(segments: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The segments of packed rows as rows of their own, in groups whose lengths differ by less than a factor of two.

    Gives ([n,L] flat places of the tokens, filled up with any place, [n,L] which of them are real).
    """
    length = segments.shape[1]
    spans: dict[int, list[tuple[int, int]]] = {}  # by number of bits of the length: (first place, length)
    for row, marks in enumerate(segments.tolist()):
        start = 0
        for stop in range(1, length + 1):
            if stop == length or marks[stop] != marks[start]:
                if marks[start]:
                    size = stop - start
                    spans.setdefault(size.bit_length(), []).append((row * length + start, size))
                start = stop
    for members in spans.values():
        first, sizes = torch.tensor(members).unbind(1)
        step = torch.arange(int(sizes.max()))
        real = step < sizes[:, None]
        index = first[:, None] + torch.where(real, step, 0)
        yield index.to(segments.device), real.to(segments.device)


@torch.no_grad()
def _head_is_linear(hf: Any) -> bool:
    """Whether logits are the output matrix times the base model's last hidden state, tried on three tokens."""
    output = hf.get_output_embeddings()
    if not isinstance(output, nn.Linear) or hf.base_model is hf:
        return False
    ids = torch.arange(3, device=output.weight.device)[None]
    was, _ = hf.training, hf.eval()
    expected = hf(input_ids=ids, use_cache=False).logits
    hidden = getattr(hf.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    hf.train(was)
    if hidden is None or hidden.shape[-1] != output.weight.shape[1]:
        return False
    got = F.linear(hidden, output.weight, output.bias)
    return got.shape == expected.shape and torch.allclose(got.float(), expected.float(), rtol=1e-3, atol=1e-3)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's own progress bars and reports, inside."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def save_hf(model: Wrapped, state: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, shard_bytes: int) -> None:
    """Writes the adapter's model with the weights `state` to the existing `folder`, stored as `dtype` (as they are when None)."""
    if dtype is not None:
        state = {k: v.to(dtype) for k, v in state.items()}
    with quiet():
        model.hf.save_pretrained(folder, state_dict=state, max_shard_size=shard_bytes, safe_serialization=True)
