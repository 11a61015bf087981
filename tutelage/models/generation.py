"""What a checkpoint's generation_config.json says: what belongs to the model, and what its makers suggest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tutelage.errors import ArtifactError

NEUTRAL = {
    "transformers_version", "use_cache", "pad_token_id", "bos_token_id", "max_time", "remove_invalid_values", "disable_compile",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "compile_config",
}  # fmt: skip
"""Settings that change no token."""

SEARCH = {
    "num_beams": "beams", "length_penalty": "length_penalty", "early_stopping": "early_stopping",
    "no_repeat_ngram_size": "no_repeat_ngram", "repetition_penalty": "repetition_penalty", "temperature": "temperature",
    "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "num_return_sequences": "n",
}  # fmt: skip
"""Settings that are fields of `Sampling`, and their names there."""


@dataclass(slots=True, frozen=True)
class GenerationSettings:
    """How targets begin and end is the model's own and always done. How to search is the user's choice: `suggested` are
    arguments of `Sampling`, done where they are asked for. `undone`: what this engine does not do, by its name in the file."""

    start: tuple[int, ...]  # what every target begins with: the decoder's first token, and one that is forced after it
    ends: tuple[int, ...]
    last: int | None  # made in the last place that an answer may have, whatever the model says
    never: tuple[int, ...]  # never made
    suggested: dict[str, Any]
    undone: dict[str, Any]

    @classmethod
    def of(cls, hf: Any) -> GenerationSettings:
        """Those of an encoder-decoder of `transformers`. Raises ArtifactError when it does not say how targets begin."""
        given = {k: v for k, v in hf.generation_config.to_dict().items() if v is not None and not k.startswith("_")}
        start = _start(given, hf.name_or_path or None)
        banned = [words for words in given.pop("bad_words_ids", ()) if words[:1] != [given.get("eos_token_id")]]
        never = {words[0] for words in banned if len(words) == 1} | set(given.pop("suppress_tokens", ()))
        suggested = _suggested(given, len(start))
        known = {*NEUTRAL, *SEARCH, *LENGTHS, "decoder_start_token_id", "forced_bos_token_id", "do_sample"}
        ends, last = given.pop("eos_token_id", ()), given.pop("forced_eos_token_id", None)
        several = {"bad_words_ids": longer} if (longer := [words for words in banned if len(words) > 1]) else {}
        return cls(
            start, _ids(ends), None if last is None else _ids(last)[0], tuple(sorted(never)), suggested,
            undone=several | {k: v for k, v in given.items() if k not in known and v not in (False, 0, 1.0, [], {})},
        )  # fmt: skip

    def note(self) -> str | None:
        """For people: what the file asks for and nobody gets without asking; None where there is nothing."""
        parts = []
        if {"beams", "no_repeat_ngram", "repetition_penalty", "min_tokens"} & self.suggested.keys():
            parts.append(f"suggests {_listed(self.suggested)}, which is done where it is asked for")
        if self.undone:
            parts.append(f"has {_listed(self.undone)}, which this engine does not do")
        return f"generation_config.json {' and '.join(parts)}" if parts else None


LENGTHS = {"min_length", "max_length", "min_new_tokens", "max_new_tokens"}


def _start(given: dict[str, Any], name: str | None) -> tuple[int, ...]:
    first = given.get("decoder_start_token_id", given.get("bos_token_id"))
    if first is None:
        raise ArtifactError(
            "the model does not say what its decoder starts with", file=name,
            field="decoder_start_token_id", fix="set decoder_start_token_id in generation_config.json",
        )  # fmt: skip
    forced = given.get("forced_bos_token_id")
    return (first,) if forced is None else (first, forced)


def _suggested(given: dict[str, Any], start: int) -> dict[str, Any]:
    """Arguments of `Sampling`. Lengths in the file count what a target begins with, or (`new`) all but its first token."""
    neutral = {"num_beams": 1, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0, "num_return_sequences": 1}
    found = {SEARCH[k]: v for k, v in given.items() if k in SEARCH and v != neutral.get(k)}
    if "beams" not in found:
        found = {k: v for k, v in found.items() if k not in ("length_penalty", "early_stopping")}
    if "beams" in found or not given.get("do_sample"):
        found = {k: v for k, v in found.items() if k not in ("top_k", "top_p", "min_p")} | {"temperature": 0.0}
    for ours, whole, new in (("min_tokens", "min_length", "min_new_tokens"), ("max_tokens", "max_length", "max_new_tokens")):
        count = given[new] - (start - 1) if new in given else given.get(whole, 0) - start
        if count > 0:
            found[ours] = count
    return found


def _ids(value: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items())
