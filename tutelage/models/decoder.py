"""Our decoder: every family in `families.yaml`, with the parameter names of Hugging Face and the logits of `transformers`.

GPT-2 and Phi-3 have Llama's names in memory and their own on disk (`load.py`, `export.py`). Dropout is not applied: one pass over
data has no use for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tutelage.models import ops
from tutelage.models.adapters.virtual_tokens import Prefix, VirtualTokens, count_virtual, with_virtual
from tutelage.models.attention import layout
from tutelage.models.config import DecoderConfig
from tutelage.models.heads import LmHead
from tutelage.models.interface import Batch, KVCache, Output, Traits
from tutelage.models.layers import Context, Layer, Places, is_plain, make_norm
from tutelage.models.rotary import Rotary


class Backbone(nn.Module):
    """Embeddings, layers and the last norm: what `transformers` calls `model`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)


class Decoder(nn.Module):
    """`model(batch) -> Output`; `model.lm_head` turns its hidden states into losses or logits.

    The weights are what torch's modules start with: `init.build` and `load.load` give a model that is ready for use.
    """

    virtual: VirtualTokens | None
    heads: tuple[str, ...] = ()  # modules of score heads: a scorer has some

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.virtual = None  # the virtual tokens of a prompt or prefix adapter
        self.model = Backbone(config)
        self.lm_head = LmHead(nn.Parameter(torch.zeros(config.vocab_size, config.hidden_size)), softcap=config.logit_softcap)
        self.tie()
        self.rotary = Rotary(config)
        self._checkpointing = "none"

    @property
    def traits(self) -> Traits:
        # With virtual tokens whole texts are read: a cache would have to hold them, too.
        return Traits(
            cache=self.active_virtual is None, cache_limit=self.rotary.steady, trees=True, virtual_tokens=count_virtual(self)
        )

    @property
    def body(self) -> Decoder:
        """The model under the heads: itself."""
        return self

    @property
    def active_virtual(self) -> VirtualTokens | None:
        """The virtual tokens that come before every text now; None while the adapter is disabled."""
        return None if self.virtual is None or self.virtual.disabled else self.virtual

    def tie(self) -> None:
        """Makes the head share the embeddings where the config says so."""
        if self.config.tie_word_embeddings:
            shared = self.model.embed_tokens.weight
            assert isinstance(shared, nn.Parameter)
            self.lm_head.weight = shared

    @property
    def checkpointing(self) -> str:
        """What the backward pass finds: "none" keeps every activation, "layer" each layer's input and redoes the rest."""
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, value: str) -> None:
        assert value in ("none", "layer"), value
        self._checkpointing = value

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def forward(self, batch: Batch, keep_layers: bool = False) -> Output:
        """Hidden states after the last norm [B,T,H]; those of padding mean nothing. `keep_layers` adds every layer's output."""
        assert batch.attention == "causal", f"this decoder is causal, not {batch.attention}"
        if self.active_virtual is not None:
            return self._after_virtual(self.active_virtual, batch, keep_layers)
        x = self.embed(batch)
        return self._run(x, self.context(batch, x.dtype), batch.cache is None, keep_layers)

    def _after_virtual(self, virtual: VirtualTokens, batch: Batch, keep_layers: bool) -> Output:
        """`forward` of every text after the virtual tokens, which are not in the output."""
        assert batch.cache is None and batch.embeds is None, "virtual tokens need whole texts, as tokens"
        count = len(virtual)
        wide = with_virtual(batch, count)
        x = self.look_up(wide.ids)
        own = x.new_zeros(1, count, x.shape[2]) if virtual.is_prefix else virtual.values.to(x.dtype)[None] / self.scale_of(x)
        x = self.embed(replace(wide, embeds=torch.cat((own, x[:, count:]), 1)))
        context = self.context(wide, x.dtype)
        if virtual.is_prefix:
            assert wide.tree is not None
            context = replace(context, prefix=Prefix.of(virtual, wide.tree.index, x.dtype))
        out = self._run(x, context, whole=True, keep_layers=keep_layers)
        return Output(
            hidden=out.hidden[:, count:].reshape(*batch.shape, -1),
            layers=None if out.layers is None else tuple(h[:, count:].reshape(*batch.shape, -1) for h in out.layers),
        )

    def _run(self, x: Tensor, context: Context, whole: bool, keep_layers: bool) -> Output:
        kept = [x] if keep_layers else []
        again = self.checkpointing == "layer" and torch.is_grad_enabled() and whole
        for layer in self.model.layers:
            x = checkpoint(layer, x, context, use_reentrant=False) if again else layer(x, context)
            if keep_layers:
                kept.append(x)
        return Output(hidden=self.model.norm(x), layers=tuple(kept) if keep_layers else None)

    def embed(self, batch: Batch) -> Tensor:
        x = self.look_up(batch.ids) if batch.embeds is None else batch.embeds
        if self.config.embedding_scale != 1.0:
            x = x * self.scale_of(x)
        if self.config.learned_positions:
            x = x + self.model.embed_positions(batch.positions)
        return x

    def look_up(self, ids: Tensor) -> Tensor:
        table = self.model.embed_tokens
        return ops.embedding(ids, table.weight) if is_plain(table, nn.Embedding) else table(ids)  # type: ignore[no-any-return]

    def scale_of(self, x: Tensor) -> float:
        """The factor of embeddings. The reference rounds it to the weights' type first; in bfloat16 that is another product."""
        return torch.tensor(self.config.embedding_scale).to(x.dtype).item()

    def context(self, batch: Batch, dtype: torch.dtype) -> Context:
        """Attention layout, rotary positions and cache places, shared by the layers."""
        if batch.tree is not None:
            return Context(layout(batch.tree.segments), self.rotary(batch.positions[:, batch.tree.index], dtype), tree=batch.tree)
        turns = self.rotary(batch.positions, dtype)
        if batch.cache is None:
            return Context(layout(batch.segments), turns)
        places = Places.of(batch.cache, batch.segments)
        return Context(layout(batch.segments) if places.fresh else None, turns, places)

    def logits(self, batch: Batch) -> Tensor:
        """Logits of every token, [B,T,V]."""
        return self.lm_head.logits(self(batch).hidden)

    def new_cache(self, slots: int, length: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `slots` sequences of up to `length` tokens, on the model's device."""
        c = self.config
        return KVCache(
            c.num_hidden_layers, slots, length, c.num_key_value_heads, c.head_dim, device=self.device, dtype=dtype or self.dtype
        )
