"""What stages that ask a model share: prompts with room for an answer, the engine that answers them, the rewards that judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from tutelage.chat.render import Renderer
from tutelage.config.rewards import terms_of
from tutelage.config.stages import Rl, Sample
from tutelage.data.groups.dropped import say_left_out
from tutelage.engine import Engine, Sampling
from tutelage.errors import DataError
from tutelage.models.adapters.attach import inference_view, sync_merged_weights
from tutelage.models.kernels.decoder import FusedDecoder
from tutelage.models.open_scorer import load_scorer
from tutelage.models.scorer import Scorer, score_answers
from tutelage.plan.memory import cache
from tutelage.records import Conversation, Prompt, read_records
from tutelage.rewards.build import build
from tutelage.rewards.rubric import Rubric
from tutelage.rollout.sampler import Sampler
from tutelage.rundir import RunDir
from tutelage.setup import answers
from tutelage.setup.inputs import record_type, require_record_type
from tutelage.tokenizer.load import TokenizerFolder

SLOTS = 64  # answers in the making at a time


def read_prompts(run: RunDir, part: str) -> list[Prompt]:
    """The prompts of one part of the data."""
    records = run.input("data")
    kind = record_type(records)
    require_record_type(kind, ("Prompt", "Conversation"), file=records)
    file = records / f"{part}.jsonl"
    return list(read_records(file, Prompt)) if kind == "Prompt" else [Prompt.of(c) for c in read_records(file, Conversation)]


def prompts_of(run: RunDir, part: str, fix: str) -> list[Prompt]:
    """Those of one part. Raises `DataError` where there are none."""
    found = read_prompts(run, part)
    if not found:
        raise DataError(
            f"there are no prompts in the {part} part", file=run.input("data") / f"{part}.jsonl", found="0 prompts",
            expected="one or more to ask", fix=fix,
        )  # fmt: skip
    return found


def engine_for(model: Any, renderer: Renderer, max_length: int, slots: int = SLOTS) -> Engine:
    """An engine that gives the same bits in any company where it can, so that a resumed run is the run that was not killed."""
    return Engine(model, renderer, slots=slots, max_length=max_length, batch_invariant=invariant(model))


def invariant(model: Any) -> bool:
    """Whether the engine can give the same bits in any company, which an exact resume needs."""
    return model.traits.cache and FusedDecoder.of(model, model.new_cache(1, 2), "float32") is not None


def sampler_for(model: Any, renderer: Renderer, max_length: int, max_tokens: int, temperature: float) -> Sampler:
    plain, lora = inference_view(model)
    return Sampler(engine_for(plain, renderer, max_length), Sampling(max_tokens=max_tokens, temperature=temperature), lora)


def kv_cache_bytes(engine: Engine, texts: int, tokens: int) -> int:
    """Bytes of the cache for texts of at most so many tokens; on a GPU all of it is there from the start."""
    whole = engine.device.type != "cpu"
    return cache(engine.model.config.to_hf(), SLOTS if whole else min(SLOTS, texts), engine.context_length if whole else tokens)


def sync_engine_weights(model: Any, engine: Engine) -> Callable[[], None]:
    """Tells an engine of `sampler_for` that training has changed the model's weights."""

    def tell() -> None:
        sync_merged_weights(model, engine.model)
        engine.weights_changed()

    return tell


class Room(Protocol):
    """A sampler of answers or of episodes."""

    def room(self, prompt: Prompt) -> bool: ...


def with_room(sampler: Room, prompts: Sequence[Prompt], part: str) -> list[Prompt]:
    """Those with room for the longest answer; says how many are left out. Raises `DataError` where none is left."""
    out = [p for p in prompts if sampler.room(p)]
    if len(out) < len(prompts):
        counts = {"prompts": len(prompts), "left out, too long for an answer behind them": len(prompts) - len(out)}
        say_left_out(counts, fix="lower max_tokens, or give shorter prompts", part=part)
    if prompts and not out:
        raise DataError(
            "no prompt leaves room for an answer", field="max_tokens", found=f"{len(prompts)} prompts, all too long",
            expected="prompt and answer within the model's context", fix="lower max_tokens",
        )  # fmt: skip
    return out


def reward_model_of(config: Rl | Sample, run: RunDir, device: torch.device) -> Scorer | None:
    """What a reward of the kind `model` asks, where there is one."""
    if config.reward_model is None:
        return None
    answers.check_tokens(run, "reward_model")
    return load_scorer(run.input("reward_model"), device=device)


def rubric_of(config: Rl | Sample, words: TokenizerFolder, scorer: Scorer | None) -> Rubric:
    """The rewards with what they need of this stage."""
    wired: dict[str, Any] = {"asked": lambda rollout: words.decode(list(rollout.prompt_ids))}
    if scorer is not None:
        wired["score_texts"] = lambda texts: score_answers(scorer, texts)[:, 0].tolist()
    return build(terms_of(config.rewards), **wired)
