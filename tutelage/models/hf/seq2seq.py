"""Encoder-decoder models of `transformers` (T5, BART, Marian): a source is encoded once, a target is written token by token.

Shapes: B rows, S tokens of the longest source, T of the longest target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tutelage.errors import ConfigError
from tutelage.models.adapters.hf_virtual_tokens import cache_of, prepend_virtual
from tutelage.models.adapters.virtual_tokens import VirtualTokens, count_virtual
from tutelage.models.generation import GenerationSettings
from tutelage.models.hf.causal import LogitsHead, Wrapped
from tutelage.models.hf.config import new_config, new_weights
from tutelage.models.hf.state import State
from tutelage.models.interface import Batch, Output, Traits

ENCODE_TOKENS = 4096
"""Tokens, padding included, of one pass of the encoder."""


class Seq2Seq(Wrapped):
    """An encoder-decoder, to train, to generate with and to score. Its hidden states are its logits: such heads scale and add
    biases."""

    def __init__(self, hf: Any) -> None:
        super().__init__(hf)
        self.lm_head = LogitsHead(self._modules.get("lm_head"))
        self.generation = GenerationSettings.of(hf)
        self.start, self.ends = self.generation.start, self.generation.ends

    @property
    def traits(self) -> Traits:
        sources = self.virtual is not None and not self.virtual.is_prefix
        return Traits(encoder_decoder=True, virtual_tokens=count_virtual(self), virtual_sources=sources)

    def forward(self, batch: Batch) -> Output:
        """Logits [B,T,V] of targets after their sources. Raises ConfigError for rows of text, which do not say what is source
        and what is target."""
        if batch.source_ids is None or batch.source_segments is None:
            raise ConfigError(
                "an encoder-decoder model cannot read rows of plain text", found=self.config.model_type,
                expected="a decoder-only model", fix="train it with `tutelage translate`, generate with it, or score targets",
            )  # fmt: skip
        return Output(hidden=self._read(batch.source_ids, batch.source_segments != 0, batch.ids))

    def logits(self, batch: Batch) -> Tensor:
        return self(batch).hidden  # type: ignore[no-any-return]

    def begin(self, sources: Sequence[Sequence[int]]) -> State:
        """Encodes the sources; of the targets nothing is read yet."""
        ids, mask = self._padded(sources)
        rows = max(1, ENCODE_TOKENS // ids.shape[1])
        encoder, tokens = self.hf.get_encoder(), self.active_virtual
        parts = [self._source(i, m) for i, m in zip(ids.split(rows), mask.split(rows), strict=True)]
        states = [encoder(**how).last_hidden_state for how in parts]
        state = State.new(len(sources), torch.cat(states), torch.cat([how["attention_mask"] != 0 for how in parts]))
        if tokens is not None and tokens.is_prefix:
            state.cache, state.virtual = self._prefix(tokens, len(sources)), len(tokens)
        return state

    def _source(self, ids: Tensor, real: Tensor) -> dict[str, Any]:
        """The encoder's arguments for sources [n,S], after a prompt where there is one."""
        how = {"input_ids": ids, "attention_mask": real.long()}
        tokens = self.active_virtual
        return how if tokens is None or tokens.is_prefix else prepend_virtual(self.hf, tokens, how)

    def _prefix(self, tokens: VirtualTokens, rows: int) -> Any:
        """The decoder's cache after a prefix."""
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(cache_of(self.hf, tokens, rows), DynamicCache())

    def _read(self, ids: Tensor, real: Tensor, targets: Tensor) -> Tensor:
        """Logits [n,T,V] of targets [n,T] after sources [n,S]."""
        how, tokens = self._source(ids, real), self.active_virtual
        prefix = tokens is not None and tokens.is_prefix
        if tokens is not None and prefix:
            how["past_key_values"] = self._prefix(tokens, len(ids))
        return self.hf(decoder_input_ids=targets, use_cache=prefix, **how).logits  # type: ignore[no-any-return]

    def extend(self, ids: Tensor, state: State) -> Tensor:
        """Logits [B,T,V] of the next tokens [B,T] of the state's targets; the state takes them up."""
        from transformers.modeling_outputs import MoEModelOutput

        assert state.source is not None and state.mask is not None
        # The widest of the records that models expect here: mixtures of experts look for their routers' logits.
        encoded = MoEModelOutput(last_hidden_state=state.source)  # type: ignore[arg-type]
        got = self.hf(
            encoder_outputs=encoded, attention_mask=state.mask.long(), decoder_input_ids=ids,
            past_key_values=state.cache, use_cache=True,
        )  # fmt: skip
        return got.logits  # type: ignore[no-any-return]

    def read(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B,T,V] of whole targets, read at once and without a cache. Targets are padded at the right."""
        return self._read(*self._padded(sources), self._padded(targets)[0])

    def _padded(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """ids [B,T], filled up at the right, and which of them are real."""
        device = next(self.parameters()).device
        lengths = torch.tensor([len(t) for t in texts])
        ids = torch.full((len(texts), int(lengths.max())), self.config.pad_token_id or 0)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        return ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device)


def new_seq2seq(shape: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> Seq2Seq:
    """An encoder-decoder from scratch: random weights in the shape of a config.json, T5 where it names no `model_type`. `base`:
    defaults for keys that `shape` leaves out.

    Raises `ConfigError` for keys that the family does not have, and for a model of another kind; `MissingExtra`.
    """
    config = new_config(shape, base or {}, "t5")
    if not config.is_encoder_decoder:
        raise ConfigError("not an encoder-decoder", field="architecture.model_type", found=config.model_type,
                          expected="t5, bart, marian, …")  # fmt: skip
    from transformers import AutoModelForSeq2SeqLM

    return Seq2Seq(new_weights(AutoModelForSeq2SeqLM, config).eval())
