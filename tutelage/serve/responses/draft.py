"""A response's output while it is written: items, and the events that tell a client how they grow."""

from __future__ import annotations

from typing import Any

from tutelage.chat.tool_calls import CallStyle, Delta, ToolCallStream
from tutelage.engine import Event
from tutelage.serve.responses.items import Item, new_id, output_text
from tutelage.serve.responses.scores import PlacedScores

Told = dict[str, Any]
"""An event without its sequence number."""


class Draft:
    """The output of one response, streamed or not. `style`: of tool calls, where the model may make some. `scores`: of the text's
    tokens, where asked for."""

    def __init__(self, style: CallStyle | None, scores: PlacedScores | None) -> None:
        self.items: list[Item] = []
        self.cut = False  # the answer did not end by itself
        self._reader = ToolCallStream(style) if style else None
        self._scores = scores
        self._length = 0  # of the text so far
        self._text: list[str] | None = None  # of the message that is being written: the last item
        self._logprobs: list[dict[str, Any]] = []  # of its text

    def feed(self, event: Event) -> list[Told]:
        """What an engine's event adds. The last one closes the output."""
        if self._scores is not None:
            self._scores.add(score for score in event.scores if score.id not in event.sequence.ends)
        told = [said for delta in self._deltas(event) for said in self._take(delta)]
        if event.finish_reason is not None:
            self.cut = event.finish_reason == "length"
            if not self.items:
                told += self._open()
            told += self._close("incomplete" if self.cut else "completed")
        return told

    def break_off(self) -> list[Told]:
        """Closes what is open: nothing more will come."""
        return self._close("incomplete")

    def _deltas(self, event: Event) -> list[Delta]:
        if self._reader is not None:
            return self._reader.feed(event.text) + (self._reader.finish() if event.finish_reason else [])
        at, self._length = self._length, self._length + len(event.text)
        return [Delta(content=event.text, at=at)] if event.text else []

    def _take(self, delta: Delta) -> list[Told]:
        if delta.index is None:
            return self._write(delta)
        if delta.name is not None:
            return self._close("completed") + self._call(delta)
        item, place = self.items[-1], self._place()
        item |= {"arguments": delta.arguments, "status": "completed"}
        return [
            {"type": "response.function_call_arguments.delta", **place, "delta": delta.arguments},
            {"type": "response.function_call_arguments.done", **place, "name": item["name"], "arguments": delta.arguments},
            self._item("done"),
        ]

    def _write(self, delta: Delta) -> list[Told]:
        told = self._open() if self._text is None else []
        logprobs = self._scores.take(delta.at, delta.at + len(delta.content)) if self._scores is not None else []
        assert self._text is not None
        self._text.append(delta.content)
        self._logprobs += logprobs
        return [*told, {"type": "response.output_text.delta", **self._part(), "delta": delta.content, "logprobs": logprobs}]

    def _open(self) -> list[Told]:
        """Begins a message."""
        self._text, self._logprobs = [], []
        self.items.append(
            {"id": new_id("message"), "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        )
        return [self._item("added"), {"type": "response.content_part.added", **self._part(), "part": output_text("")}]

    def _close(self, status: str) -> list[Told]:
        """Ends the message that is being written, if there is one."""
        if self._text is None:
            return []
        text, self._text = "".join(self._text), None
        part = output_text(text, self._logprobs)
        self.items[-1] |= {"content": [part], "status": status}
        return [
            {"type": "response.output_text.done", **self._part(), "text": text, "logprobs": self._logprobs},
            {"type": "response.content_part.done", **self._part(), "part": part},
            self._item("done"),
        ]

    def _call(self, delta: Delta) -> list[Told]:
        """Begins a call."""
        self.items.append(
            {"id": new_id("function_call"), "type": "function_call", "status": "in_progress", "call_id": delta.id,
             "name": delta.name, "arguments": ""}
        )  # fmt: skip
        return [self._item("added")]

    def _item(self, what: str) -> Told:
        # A copy: the item goes on changing, and events may be written later.
        return {"type": f"response.output_item.{what}", "output_index": len(self.items) - 1, "item": dict(self.items[-1])}

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _part(self) -> dict[str, Any]:
        return {**self._place(), "content_index": 0}
