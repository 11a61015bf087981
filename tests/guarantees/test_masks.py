"""Promise 1: the loss mask comes from the messages, and a mask that teaches nothing or everything stops the run."""

from __future__ import annotations

import pytest

from tests.guarantees import tiny
from tutelage.chat.render import check_supervision, coloured_sample
from tutelage.errors import DataError
from tutelage.records import Conversation, Message


def talk(*turns: tuple[str, str, bool | None], **rest) -> Conversation:
    return Conversation.make([Message(role=r, content=c, train=t) for r, c, t in turns], source="tiny", **rest)


@pytest.mark.parametrize("template", ["default", "chatml", "llama3", "qwen", "gemma", "mistral"])
def test_exactly_the_trained_answers_are_supervised(template):
    """Guards against masks found by searching token patterns: an answer that repeats the question, or contains a role's name, is
    supervised exactly where it is the answer, together with the token that ends it."""
    renderer = tiny.renderer(template)
    conversation = talk(
        ("user", "mat assistant mat", None), ("assistant", "mat assistant mat", None), ("user", "sat", None),
        ("assistant", "not this", False), ("user", "on", None), ("assistant", "yes this", True),
    )  # fmt: skip
    taught = []
    for sample in renderer.render(conversation):
        run: list[int] = []
        for token, on in zip([*sample.ids.tolist(), 0], [*sample.mask.tolist(), 0], strict=True):
            if on:
                run.append(token)
            elif run:
                assert run[-1] in renderer.stop_ids
                taught.append(renderer.tokenizer.decode(run, skip_special=True).strip())
                run = []
    assert taught == ["mat assistant mat", "yes this"]


def test_of_a_completion_row_the_completion_alone_is_supervised():
    """Guards against prompts that are trained: the usual mistake with prompt/completion rows."""
    renderer = tiny.renderer()
    (sample,) = renderer.render(talk(("user", "door red mat", None), ("assistant", " old dog", None), style="completion"))
    taught = sample.ids[sample.mask.astype(bool)].tolist()
    assert renderer.tokenizer.decode(taught) == " old dog<|endoftext|>"


def test_the_mask_on_disk_is_the_renderers():
    """Guards against a mask that is made again, or shifted, on the way from the renderer to the batch."""
    renderer = tiny.renderer()
    data = tiny.segments("conversations")
    for i, conversation in enumerate(tiny.conversations()[: len(data)]):
        (sample,) = renderer.render(conversation)
        assert data.ids(i).tolist() == sample.ids.tolist() and data.mask(i).tolist() == sample.mask.tolist()
    (batch,) = tiny.source("conversations", rows_per_step=4, micro_rows=4).next(0).micro
    answers = renderer.tokenizer.decode(batch.targets[batch.weights > 0].tolist())
    assert answers.count("<|end|>") == sum(int(r.max()) for r in batch.segments)
    assert "?" not in answers and "<|user|>" not in answers


@pytest.mark.parametrize(("supervised", "word"), [(0, "none"), (100, "all")])
def test_no_or_full_supervision_is_refused(supervised, word):
    """Guards against silent all-zero and all-one masks; plain text is declared as such, and is all supervised."""
    with pytest.raises(DataError, match=f"{word} of the 100 tokens are supervised"):
        check_supervision(supervised, 100, "chat")
    check_supervision(50, 100, "chat")
    check_supervision(100, 100, "text")


def sft(name: str, rows: list[Conversation]) -> tiny.Process:
    folder = tiny.records_folder(tiny.home() / name / "records", rows, 2)
    return tiny.start(
        tiny.home() / name, stage="sft", model=tiny.checkpoint(), data=folder, steps=2, evaluate_every=1, sample_every=1
    )


def test_fine_tuning_shows_its_mask_and_refuses_one_that_is_wrong():
    """Guards against a run that trains on nothing, or on the prompts: real `sft` processes on sound conversations, on answers
    that are all marked `train: false`, and on completions without a prompt."""
    sound = [talk(("user", f"{i}?", None), ("assistant", tiny.sentence(i, 4), None)) for i in range(12)]
    muted = [talk(("user", f"{i}?", None), ("assistant", tiny.sentence(i, 4), False)) for i in range(12)]
    bare = [talk(("assistant", tiny.sentence(i, 4), None), style="completion") for i in range(12)]
    runs = {name: sft(f"mask-{name}", rows) for name, rows in (("sound", sound), ("muted", muted), ("bare", bare))}
    codes = {name: run.wait() for name, run in runs.items()}
    assert codes == {"sound": 0, "muted": 2, "bare": 2}, {n: r.said[-800:] for n, r in runs.items()}
    said = runs["sound"].said
    before, _, after = said.partition("step 0  validation loss")
    assert after and " tokens supervised" in before and "<|assistant|>" in before
    assert "supervised" in runs["muted"].said and "supervised" in runs["bare"].said
    assert not list((tiny.home() / "mask-bare").glob("cli/sft-*/model"))


def test_the_sample_is_coloured_by_the_mask():
    """Guards against a preview that is made from the text and not from what is trained."""
    renderer = tiny.renderer()
    (sample,) = renderer.render(talk(("user", "door?", None), ("assistant", "red mat", None)))
    text = coloured_sample(sample, renderer.tokenizer)
    green = "".join(text.plain[s.start : s.end] for s in text.spans if str(s.style) == "green")
    assert green == "red mat<|end|>"
    assert f"{int(sample.mask.sum())} of {len(sample.ids)} tokens supervised" in text.plain
