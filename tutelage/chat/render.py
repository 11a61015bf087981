"""THE renderer: turns a conversation into token ids and its loss mask together. Training, evaluation and serving all use it.

How it knows what the assistant wrote, for any checkpoint's own Jinja template: by proof. For the assistant's turn k it renders
the messages before it with the generation prompt (what a server would send) and the messages up to it. The second text must
begin with the first; what follows is what a model has to write, and is supervised up to and including the last control token
(the end of the turn). Where that cannot be shown it is an `ArtifactError`, never a guess.

The text is tokenized in pieces cut at those borders, so the ids before an answer are the ids a served prompt has, always. On
templates with a control token (and at most fixed text) at the border this gives the same ids as tokenizing the text whole.

`history` says whether a whole conversation is one sample ("whole": rendering a prefix of the messages gives a prefix of the text)
or the template rewrites earlier turns (drops their thinking, moves the system prompt) and each assistant turn is its own sample
("per_turn").

Content never becomes control: where a message contains the characters of a control token, a mark is put inside them before
rendering and taken out when the text is tokenized, so they stay characters. (`transformers` would make them control tokens.)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.text import Text

from tutelage.chat import spans, templates
from tutelage.chat.message_keys import REASONING
from tutelage.chat.messages import plain_messages
from tutelage.chat.spans import Sample
from tutelage.chat.template_probe import probe_template
from tutelage.chat.templates import compile_template, style, styles
from tutelage.errors import ArtifactError, DataError, Setting
from tutelage.records import Conversation, Message
from tutelage.tokenizer.load import TokenizerFolder

CHUNK = 512  # conversations tokenized in one call
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})
"""What a template is told by the renderer alone."""


@dataclass(slots=True, frozen=True, eq=False)
class Rendered:
    """One training sample."""

    ids: np.ndarray  # int32 [T]
    mask: np.ndarray  # uint8 [T]: 1 = supervised
    text: str  # what was tokenized (for completions: prompt and completion, without BOS and EOS)
    spans: tuple[tuple[int, int], ...]  # supervised parts of `text`, in characters
    turn: int | None = None  # the message this sample ends with, where each turn is its own sample

    @property
    def supervised(self) -> int:
        return int(self.mask.sum())


class Renderer:
    """Renders with one tokenizer and one chat template.

    `template`: None = the folder's own; the name of a shipped style; or Jinja source. `variables` are passed to the template
    every time (`enable_thinking=False`, `date_string=...`). `history`: None = what the folder says, or else found out by proof.
    Raises `ArtifactError` when the template is broken or its spans cannot be proven.
    """

    def __init__(
        self,
        tokenizer: TokenizerFolder | Path | str,
        template: str | None = None,
        *,
        variables: Mapping[str, Any] | None = None,
        history: str | None = None,
        now: datetime | None = None,
    ) -> None:
        self.tokenizer = tokenizer if isinstance(tokenizer, TokenizerFolder) else TokenizerFolder.open(tokenizer)
        self.source = style(template).source if template in styles() else template or self.tokenizer.template
        self.variables = dict(variables or {})
        self._check: Callable[[str], None] = _any_text
        if self.source:
            probe_template(self.source, {**self.tokenizer.special_tokens, **self.variables}, self._where())
        self._render = compile_template(self.source, now) if self.source else None
        self._thinks = bool(self.source and not templates.keys_read(self.source).isdisjoint(REASONING))
        self._encoder = spans.PieceEncoder(self.tokenizer)
        own = template is None or self.source == self.tokenizer.template
        self.history = history or (self.tokenizer.history if own else None) or "whole"
        if self._render and not (history or (own and self.tokenizer.history)):
            self.history = self._probe_history()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which generation stops: EOS, and what ends an assistant turn in this template (by proof)."""
        ids = set(self.tokenizer.stop_ids)
        if self._render:
            ids.add(self.end_of_turn_id)
        return tuple(sorted(ids))

    @property
    def end_of_turn_id(self) -> int:
        """The control token that this template puts after an assistant's answer."""
        region = self._region(_as_messages([("user", "a"), ("assistant", "b")]), [], 1)
        return self._encoder.last_control_id(region.after)

    def text(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The template's text, equal to `transformers`' `apply_chat_template(tokenize=False)`. Raises
        `DataError` for what that would leave out."""
        return self._text(self._plain(messages), list(tools or []), add_generation_prompt)

    def render(self, conversation: Conversation) -> list[Rendered]:
        """Ids and mask of the conversation: one sample, or one for each assistant turn (see `history`).

        Raises `ArtifactError` when the template's spans cannot be proven, `DataError` when the template refuses the messages.
        """
        return self.render_batch([conversation])[0]

    def render_batch(self, conversations: Sequence[Conversation]) -> list[list[Rendered]]:
        """`render` of each; tokenized together, which is several times faster."""
        plans = [self._plan(conversation) for conversation in conversations]
        flat = iter(self._encode([sample for plan in plans for sample in plan]))
        return [[next(flat) for _ in plan] for plan in plans]

    def render_all(self, conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, list[Rendered]]]:
        """Each conversation with its samples, in order, a chunk at a time."""
        chunk: list[Conversation] = []
        for conversation in conversations:
            chunk.append(conversation)
            if len(chunk) == CHUNK:
                yield from zip(chunk, self.render_batch(chunk), strict=True)
                chunk = []
        if chunk:
            yield from zip(chunk, self.render_batch(chunk), strict=True)

    def prompt(
        self,
        messages: Iterable[Message | Mapping[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids to serve: exactly the ids before the assistant's next answer in a training sample of the same messages."""
        turns, offered, mark = self._encoder.guard(self._plain(messages), list(tools or []))
        text = self._text(turns, offered, add_generation_prompt)
        self._check(text)
        return self._encoder.prompt(text, _inside(text, self._earlier(turns, offered)), mark)

    def continued(
        self, messages: Iterable[Message | Mapping[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Ids to serve so that the model goes on with the last message, which is the assistant's: they end where its content
        does. Raises `DataError` for another last message, and for a template that does not write it as it is."""
        turns, offered, mark = self._encoder.guard(self._plain(messages), list(tools or []))
        last = turns[-1]
        if last["role"] != "assistant" or not last["content"] or last.get("tool_calls"):
            raise DataError(
                "only a text that the assistant began can be continued", field="messages", found=last["role"],
                expected="a last message of the assistant with content, without tool calls",
            )  # fmt: skip
        region = self._border(turns, offered, len(turns) - 1)
        self._check(region.after)
        sign = next(chr(code) for code in reversed(spans.MARKS) if chr(code) not in region.after)
        signed = self._text([*turns[:-1], {**last, "content": last["content"] + sign}], offered, False)
        text, closing = signed.split(sign, 1) if signed.count(sign) == 1 else ("", "")
        if not (text.startswith(region.before) and text.endswith(last["content"]) and text + closing == region.after):
            raise DataError(
                "the chat template does not write the last message as it is, so that it cannot be continued",
                field="messages", fix="leave out white space at its end, or ask for an answer of its own",
            )  # fmt: skip
        open_end = spans.Region(len(turns) - 1, region.before, text, end=len(text))
        return self._encoder.prompt(text, _inside(text, [*self._earlier(turns[:-1], offered), open_end]), mark)

    def following(
        self, messages: Iterable[Message | Mapping[str, Any]], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Ids from the end of the last answer to where the next one begins. Behind the very ids of an answer that a model made
        they let it go on, and nothing that it wrote is tokenized again. Raises `DataError` for a template that changes earlier
        turns."""
        turns, offered, mark = self._encoder.guard(self._plain(messages), list(tools or []))
        last = max(i for i, m in enumerate(turns) if m["role"] == "assistant")
        region, text = self._border(turns, offered, last), self._text(turns, offered, True)
        if region.end is None or not text.startswith(region.after[: region.end]) or not self._encoder.cuttable:
            raise DataError(
                "the chat template does not keep an answer as it was when the conversation goes on", file=self._where(),
                fix="choose a template that leaves earlier turns as they are, or episodes of one answer",
            )  # fmt: skip
        return self._encoder.prompt(text[region.end :], [], mark)

    def checked(self, check: Callable[[str], None]) -> Renderer:
        """The same renderer, whose prompts `check` sees as texts, and may refuse, before they are tokenized."""
        other = copy.copy(self)
        other._check = check
        return other

    def with_variables(self, variables: Mapping[str, Any]) -> Renderer:
        """The same renderer, with more told to the template. Raises `DataError` for a name that it does not read, or that
        others tell it, and for a value that spells a control token."""
        told = templates.variables(self.source or "") - RESERVED - self.tokenizer.special_tokens.keys()
        for name, value in variables.items():
            if name not in told:
                raise DataError(
                    "the chat template does not read this variable", field=name, expected=", ".join(sorted(told)) or "none"
                )
            if self._encoder.spells_control(value):
                raise DataError("a control token in a variable of the chat template", field=name, found=value)
        other = copy.copy(self)
        other.variables = {**self.variables, **variables}
        return other

    def prompt_text(self, text: str) -> list[int]:
        """Ids to serve for a bare text (`/v1/completions`): BOS where the tokenizer wants one, then the text."""
        return [*self.tokenizer.document_prefix, *self.tokenizer.encode_text(text)]

    # -- planning ---------------------------------------------------------------------------------------------------------

    def _plan(self, conversation: Conversation) -> list[Sample]:
        if conversation.style == "completion":
            return [self._completion(conversation)]
        try:
            return self._samples(
                self._plain(conversation.messages), list(conversation.tools), [m.train for m in conversation.messages]
            )
        except DataError as error:
            raise DataError(
                error.message,
                file=error.file or conversation.source,
                field=error.field,
                found=error.found,
                expected=error.expected,
                fix=error.fix,
            ) from error

    def _plain(self, messages: Iterable[Message | Mapping[str, Any]]) -> list[dict[str, Any]]:
        """`plain_messages`. Raises `DataError` for reasoning that the template has no place for."""
        turns = plain_messages(messages)
        for i, turn in enumerate(turns):
            if turn.get(REASONING[0]) and not self._thinks:
                raise DataError(
                    "the chat template writes no reasoning, so that it would be lost", field=f"messages[{i}].{REASONING[0]}",
                    found=turn[REASONING[0]], expected=f"a template that reads one of: {', '.join(REASONING)}",
                    fix=f"choose another style ({Setting('template', 'chatml')}, default, qwen or plain), or put the reasoning "
                    "into content",
                )  # fmt: skip
        return turns

    def _completion(self, conversation: Conversation) -> Sample:
        *before, last = conversation.messages
        if last.role != "assistant":
            raise DataError(
                "a completion row must end with its completion", file=conversation.source, found=last.role, expected="assistant"
            )
        return spans.completion("".join(m.content for m in before), last.content)

    def _samples(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], train: Sequence[bool | None]) -> list[Sample]:
        messages, tools, mark = self._encoder.guard(messages, tools)
        regions = [self._region(messages, tools, i) for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.history == "whole":
            text = regions[-1].after if regions and regions[-1].turn == len(messages) - 1 else self._text(messages, tools, False)
            if len(_inside(text, regions)) == len(regions):
                return [spans.cut(text, regions, [train[r.turn] is not False for r in regions], mark)]
        out = []
        for i, region in enumerate(regions):
            if train[region.turn] is not False:
                used = [*_inside(region.before, regions[:i]), region]
                out.append(spans.cut(region.after, used, [r is region for r in used], mark, turn=region.turn))
        return out

    def _earlier(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[spans.Region]:
        """The borders of the answers given so far."""
        return [self._border(messages, tools, i) for i, m in enumerate(messages) if i and m["role"] == "assistant"]

    def _border(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], turn: int) -> spans.Region:
        """The answer of message `turn` in the text that ends with it; its `end` is None where that cannot be shown."""
        before = self._text(messages[:turn], tools, True)
        after = self._text(messages[: turn + 1], tools, False)
        end = self._encoder.last_control(after, len(before)) if after.startswith(before) else None
        return spans.Region(turn=turn, before=before, after=after, end=end)

    def _region(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], turn: int) -> spans.Region:
        """`_border`, proven: raises `ArtifactError` where the template does not let us know what the model is to write."""
        if turn == 0:
            raise DataError(
                "the conversation begins with the assistant",
                field="messages[0].role",
                found="assistant",
                expected="system or user",
            )
        region = self._border(messages, tools, turn)
        before, after = region.before, region.after
        if not after.startswith(before):
            at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
            raise ArtifactError(
                f"the chat template writes message {turn} differently from what it asks the model to continue",
                file=self._where(),
                found=f"asked: …{before[max(0, at - 30) : at + 30]!r} written: …{after[max(0, at - 30) : at + 30]!r}",
                expected="the text with the answer to begin with the generation prompt",
                fix="mend the template, pass variables that make both agree (enable_thinking=False), or choose a style",
            )
        if reason := spans.missing(region, messages, tools):
            raise ArtifactError(
                f"the chat template {reason}",
                file=self._where(),
                found=after[region.start :][:120],
                expected="every message in the text, each answer followed by a control token",
                fix="mend the template ({{ message['content'] }}, then {{ eos_token }}), or choose "
                f"{Setting('template', 'plain')}, which needs no control token but the end token",
            )
        return region

    def _text(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        if self._render is None:
            raise ArtifactError(
                "this tokenizer has no chat template",
                file=self.tokenizer.folder,
                expected="chat_template.jinja, or `chat_template` in tokenizer_config.json",
                fix=f"fine-tune it with a style, {Setting('template', 'NAME')} ({', '.join(styles())}; plain suits any "
                "checkpoint), or use prompt/completion rows",
            )
        try:
            return self._render(
                messages=messages,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.tokenizer.special_tokens, **self.variables},
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise DataError(
                f"the chat template refuses these messages: {error}",
                field="messages",
                found=" ".join(str(m["role"]) for m in messages),
                fix=f"change the conversation, or choose another style: {Setting('template', 'NAME')}",
            ) from error
        except Exception as error:  # a template is a program of a stranger's, which may raise anything
            raise DataError(
                f"the chat template fails on these messages ({type(error).__name__}: {str(error)[:200]})",
                file=self._where(), field="messages", found=" ".join(str(m["role"]) for m in messages),
                fix="mend the template, or choose a style: template=NAME",
            ) from error  # fmt: skip

    def _where(self) -> Path:
        return self.tokenizer.folder / "chat_template.jinja"

    def _probe_history(self) -> str:
        """Two exchanges, the first with thinking: is a rendered prefix still there when the conversation goes on?"""
        turns = _as_messages(
            [("system", "a"), ("user", "b"), ("assistant", "<think>\nc\n</think>\n\nd"), ("user", "e"), ("assistant", "f")]
        )
        for messages in (turns, turns[1:]):
            try:
                text = self._text(messages, [], False)
                shorter = [self._text(messages[: i + 1], [], False) for i, m in enumerate(messages) if m["role"] == "assistant"]
            except DataError:  # no system turn in this template
                continue
            return "whole" if all(text.startswith(s) for s in shorter) else "per_turn"
        return "per_turn"

    def _encode(self, samples: list[Sample]) -> list[Rendered]:
        out = []
        for sample, (ids, mask) in zip(samples, self._encoder.encode(samples), strict=True):
            text, borders = spans.supervised_spans(sample)
            out.append(Rendered(ids=ids, mask=mask, text=text, spans=borders, turn=sample.turn))
        return out


def _any_text(_: str) -> None:
    """Refuses nothing."""


def _as_messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def _inside(text: str, regions: Sequence[spans.Region]) -> list[spans.Region]:
    """The regions that stand in `text` where they stood when they were the last turn."""
    out: list[spans.Region] = []
    at = 0
    for region in regions:
        if region.end is not None and at <= region.start and text.startswith(region.after):
            out.append(region)
            at = region.end
    return out


def coloured_sample(rendered: Rendered, tokenizer: TokenizerFolder) -> Text:
    """What a model is taught by this sample, for the console: supervised tokens green, the rest dim, and their count.

    Made from the ids and the mask, not from the text they came from, so it shows what training will see.
    """
    out = Text()
    for supervised, run in itertools.groupby(range(len(rendered.ids)), key=lambda i: bool(rendered.mask[i])):
        out.append(tokenizer.decode(rendered.ids[list(run)]), style="green" if supervised else "dim")
    out.append(f"\n{rendered.supervised:,} of {len(rendered.ids):,} tokens supervised", style="bold")
    return out


def check_supervision(supervised: int, total: int, kind: str) -> None:
    """Promise 1. Raises `DataError` when none or (for anything but plain text) all of `total` tokens are supervised.

    `kind`: "text" (plain documents, declared as fully supervised), "chat" or "completion".
    """
    if kind == "text" or 0 < supervised < total:
        return
    share = "none" if supervised == 0 else "all"
    raise DataError(
        f"{share} of the {total:,} tokens are supervised",
        field="mask",
        found=f"{supervised:,} of {total:,}",
        expected="some, not all, in conversations",
        fix='set "train" to true on some assistant turns, or check that rows have answers'
        if supervised == 0
        else "check that every row has a prompt; plain text belongs into `pretrain`",
    )
