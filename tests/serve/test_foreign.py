"""Checkpoints that another tool wrote: weights, tokenizer and chat template of `transformers`, served and answered as there.

One is of a family that runs on our own kernels, one runs through the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from tests.engine import small
from tests.pipeline import tutelage
from tests.serve.running import Running
from tests.serve.test_generate import Capture, read, write
from tutelage.chat.render import Renderer
from tutelage.engine import Engine
from tutelage.engine.hf_runner import HfRunner
from tutelage.models.decoder import Decoder
from tutelage.models.open import load
from tutelage.serve.app import create_app

NAME, NEAR, TOKENS = "foreign", 2e-4, 24
START, END, NOTHING = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
HI: list[Any] = [{"role": "system", "content": "one two"}, {"role": "user", "content": "the cat sat"}]
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 512,
    "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **SHAPE, "num_key_value_heads": 1, "head_dim": 16},
    "gpt_neox": {"model_type": "gpt_neox", **SHAPE},
}
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\nTools:' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function %}"
    """{{ '\\n<tool_call>\\n{"name": "' + f.name + '", "arguments": ' + f.arguments | tojson + '}\\n</tool_call>' }}"""
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"cat": {"type": "boolean"}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["cat", "age"], "additionalProperties": False,
}  # fmt: skip
FEED: Any = {"type": "function", "function": {"name": "feed", "description": "Feeds it", "parameters": SCHEMA}}


def write_checkpoint(kind: str, folder: Path) -> tuple[Any, Any]:
    """A model of random weights and a tokenizer with a template of its own, both saved by `transformers`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[NOTHING, START, END], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(small.TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=NOTHING, chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(**MODELS[kind], vocab_size=len(tokenizer), **ends)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer


@dataclass
class Foreign:
    """A checkpoint folder, what `transformers` makes of it, and a server of ours."""

    folder: Path
    model: Any
    tokenizer: Any
    engine: Engine
    server: Running
    client: openai.OpenAI

    def prompt(self, messages: list[Any], **how: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **how)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def greedy(self, ids: list[int], count: int = TOKENS) -> tuple[list[int], int]:
        """What `generate` says, and how many of its tokens come before a place where the best two are near."""
        given = torch.tensor([ids])
        got = self.model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        best = torch.stack(got.logits)[:, 0].topk(2).values
        near = (best[:, 0] - best[:, 1] < NEAR).tolist()
        return got.sequences[0, len(ids) :].tolist(), near.index(True) if True in near else len(near)

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.fixture(scope="module", params=MODELS)
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Foreign]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model, tokenizer = write_checkpoint(request.param, folder)
    engine = Engine(load(folder), Renderer(folder), slots=4)
    assert isinstance(engine.model, Decoder) == (request.param == "qwen3")
    assert isinstance(engine.runner, HfRunner) == (request.param == "gpt_neox")
    server = Running(create_app(engine, engine.renderer, NAME))
    yield Foreign(folder, model, tokenizer, engine, server, server.client())
    server.close()


def test_greedy_chat_equals_generate(foreign: Foreign) -> None:
    """A template rendered otherwise than its own tokenizer does, an end token that is not known, weights under other names."""
    want, sure = foreign.greedy(foreign.prompt(HI))
    got = foreign.client.chat.completions.create(
        model=NAME, messages=HI, max_completion_tokens=TOKENS, temperature=0, extra_body={"return_token_ids": True}
    )
    assert got.prompt_token_ids == foreign.prompt(HI)  # type: ignore[attr-defined]
    ids = got.choices[0].token_ids  # type: ignore[attr-defined]
    assert sure > 4 and ids[:sure] == want[:sure]
    assert got.usage and got.usage.prompt_tokens == len(foreign.prompt(HI))
    if sure >= len(want):
        assert ids == want and got.choices[0].message.content == foreign.text(want)
        assert got.choices[0].finish_reason == ("stop" if want[-1] == foreign.tokenizer.eos_token_id else "length")


def test_the_end_token_of_the_checkpoint_ends_an_answer(foreign: Foreign) -> None:
    """An answer that goes on past what another tool wrote down as the end."""
    end = foreign.tokenizer.eos_token_id
    got = foreign.client.chat.completions.create(model=NAME, messages=HI, max_tokens=TOKENS, logit_bias={str(end): 100})
    assert got.choices[0].finish_reason == "stop" and got.usage and got.usage.completion_tokens == 1


def test_streams_equal_wholes(foreign: Foreign) -> None:
    """Pieces cut in the middle of a character of a vocabulary that is not ours."""
    how: dict[str, Any] = {"model": NAME, "messages": HI, "max_tokens": 60, "temperature": 1.5, "seed": 3}
    whole = foreign.client.chat.completions.create(**how).choices[0]
    chunks = list(foreign.client.chat.completions.create(**how, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.message.content != ""
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_a_schema_is_kept(foreign: Foreign) -> None:
    """A grammar over tokens of another tool's vocabulary that is off by one, or over a special one."""
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "cat", "strict": True, "schema": SCHEMA}}
    for seed in range(3):
        got = foreign.client.chat.completions.create(
            model=NAME, messages=HI, max_tokens=200, temperature=1, seed=seed, response_format=wanted
        )
        found = json.loads(got.choices[0].message.content or "")
        assert found.keys() == {"cat", "age"} and isinstance(found["cat"], bool) and 0 <= found["age"] <= 99
        assert got.choices[0].finish_reason == "stop"


def test_a_required_tool_call_and_its_result(foreign: Foreign) -> None:
    """Calls that the checkpoint's own template writes and the server does not read, or a prompt without the tools in it."""
    turns, how = list(HI), {"model": NAME, "tools": [FEED], "max_tokens": 200, "seed": 1}
    got = foreign.client.chat.completions.create(**how, messages=turns, tool_choice="required", parallel_tool_calls=False)  # type: ignore[call-overload]
    (call,) = got.choices[0].message.tool_calls
    assert got.choices[0].finish_reason == "tool_calls" and call.function.name == "feed"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"cat", "age"} and got.usage.prompt_tokens == len(foreign.prompt(turns, tools=[FEED]))
    turns += [got.choices[0].message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "fed"}]
    after = foreign.client.chat.completions.create(  # type: ignore[call-overload]
        **{**how, "max_tokens": 4}, messages=turns, extra_body={"return_token_ids": True}
    )
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "feed", "arguments": arguments}}]}
    assert after.prompt_token_ids == foreign.prompt([*HI, called, turns[-1]], tools=[FEED])


@torch.no_grad()
def test_scores_of_a_prompt_equal_log_softmax(foreign: Foreign) -> None:
    """What evaluation harnesses ask for: `echo` with `logprobs`."""
    ids = foreign.tokenizer("the dog sat by the door — 日本語").input_ids
    got = foreign.client.completions.create(model=NAME, prompt=ids, max_tokens=1, echo=True, logprobs=2, temperature=0)
    scores = got.choices[0].logprobs
    assert scores and scores.token_logprobs and scores.token_logprobs[0] is None and len(scores.token_logprobs) == len(ids) + 1
    logprobs = foreign.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    want = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert scores.token_logprobs[1:-1] == pytest.approx(want, abs=1e-3)
    assert scores.token_logprobs[-1] == pytest.approx(float(logprobs[-1].max()), abs=1e-3)


@torch.no_grad()
def test_embeddings_are_the_mean_of_its_hidden_states(foreign: Foreign) -> None:
    """Vectors of another layer than the last, or with padding in their mean."""
    texts = [foreign.tokenizer(text).input_ids for text in ("the cat", "one two three four five")]
    got = foreign.client.embeddings.create(model=NAME, input=texts).data
    for ids, vector in zip(texts, got, strict=True):
        mean = foreign.model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert vector.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-4)


def test_responses_answer_as_chat_does(foreign: Foreign) -> None:
    how: dict[str, Any] = {"model": NAME, "temperature": 0}
    chat = foreign.client.chat.completions.create(**how, messages=HI, max_tokens=TOKENS)
    got = foreign.client.responses.create(**how, input="the cat sat", instructions="one two", max_output_tokens=TOKENS)
    assert got.output_text == chat.choices[0].message.content and got.usage and chat.usage
    assert (got.usage.input_tokens, got.usage.output_tokens) == (chat.usage.prompt_tokens, chat.usage.completion_tokens)


def test_tokens_are_those_of_its_tokenizer(foreign: Foreign) -> None:
    for text in ("the cat — naïve 日本語 🙂", "  two\n\nlines "):
        reply = httpx.post(f"{foreign.server.url}/tokenize", json={"model": NAME, "prompt": text, "add_special_tokens": False})
        assert reply.json()["tokens"] == foreign.tokenizer(text, add_special_tokens=False).input_ids, reply.text


def test_generate_answers_a_file(foreign: Foreign, tmp_path: Path, capsys: Capture) -> None:
    """The command on the same folder: chats are rendered, texts are gone on with, greedy answers are those of `generate`."""
    source = write(tmp_path / "in.jsonl", [{"id": 0, "messages": HI}, {"id": 1, "messages": HI[1:]}])
    output = tmp_path / "out.jsonl"
    said = tutelage(
        capsys, "generate", foreign.folder, source, "-o", output, "--temperature", 0, "--max-tokens", TOKENS, "--device", "cpu"
    )
    assert said.code == 0, said.err
    for row, messages in zip(read(output), (HI, HI[1:]), strict=True):
        ids = foreign.prompt(messages)
        want, sure = foreign.greedy(ids)
        assert row["usage"]["prompt_tokens"] == len(ids) and sure > 4
        if sure >= len(want):
            assert row["completion"] == foreign.text(want)


def test_the_command_serves_the_folder(foreign: Foreign, start: Any) -> None:
    """`tutelage serve` in a process of its own, from nothing but the path."""
    process = start(foreign.folder)
    how: dict[str, Any] = {"messages": HI, "max_tokens": TOKENS, "temperature": 0}
    got = process.client.chat.completions.create(model=foreign.folder.name, **how)
    assert got.choices[0].message == foreign.client.chat.completions.create(model=NAME, **how).choices[0].message
