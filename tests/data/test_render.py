"""The renderer: ids and mask together, equal to `transformers`, equal to what is served, for any template that allows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from tutelage.chat.messages import plain_messages
from tutelage.chat.render import Renderer, check_supervision, coloured_sample
from tutelage.chat.templates import compile_template, style, styles, variables
from tutelage.data.sources.conversations import to_conversation
from tutelage.errors import ArtifactError, ConfigError, DataError
from tutelage.records import Conversation, Message
from tutelage.tokenizer.load import TokenizerFolder
from tutelage.tokenizer.train import train

CORPUS = [
    "What does `os.path.join` do? It joins path components. system user assistant model tool\n\n",
    '{"name": "add", "arguments": {"a": 2}, "type": "function", "parameters": {"type": "object"}}\n',
    "naïve café — “quoted” 漢字 😀 12345\r\n\tend of turn\n",
] * 6
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds “ü”.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 'x\n"y" ü'}}}
SPELT = [
    "<|endoftext|>",
    "<|end|>",
    "<|im_end|>\n<|im_start|>system\n",
    "<|eot_id|>",
    "</s>",
    "<end_of_turn>",
    "[INST]",
    "<|im_<|im_end|>end|>",
    "\ue000",
    "{{ x }}",
    "\n",
    " ",
]
WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
NASTY = st.lists(st.one_of(WORDS, st.sampled_from(SPELT)), min_size=1, max_size=4).map("".join)
SAID = NASTY.filter(lambda s: bool(s.strip()))
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def talk(*turns: tuple[str, str], tools: tuple[dict[str, Any], ...] = (), **rest: Any) -> Conversation:
    return Conversation.make([Message(role=r, content=c) for r, c in turns], source="test", tools=tools, **rest)


CHAT = talk(
    ("system", "Be brief. "), ("user", "2+2?"), ("assistant", "4."), ("user", " And\n3+3?"), ("assistant", "It is 6 — “six”.")
)
TOOLS = Conversation.make(
    [
        Message(role="system", content="Use tools."),
        Message(role="user", content="2+2?"),
        Message(role="assistant", content="", tool_calls=(CALL,)),
        Message(role="tool", content='{"sum": 4}', tool_call_id="call00001", name="add"),
        Message(role="assistant", content="It is 4."),
    ],
    source="test",
    tools=(TOOL,),
)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Renderer]:
    made: dict[str, Renderer] = {}

    def one(name: str) -> Renderer:
        if name not in made:
            folder = tmp_path_factory.mktemp("renderers") / name
            train(CORPUS, vocab_size=400, template=name, out=folder)
            made[name] = Renderer(folder)
        return made[name]

    return one


def supervised(renderer: Renderer, rendered: Any) -> str:
    return renderer.tokenizer.decode(rendered.ids[rendered.mask == 1])


@pytest.mark.parametrize("conversation", [CHAT, TOOLS], ids=["chat", "tools"])
@pytest.mark.parametrize("name", styles())
def test_equal_to_transformers(make: Callable[[str], Renderer], name: str, conversation: Conversation) -> None:
    """Guards against template mismatch: text and ids of training are those of `apply_chat_template` of the same template."""
    from transformers import AutoTokenizer

    if conversation.tools and not styles()[name].tools:
        with pytest.raises(DataError, match="no tools"):
            make(name).render(conversation)
        return
    renderer, theirs = make(name), AutoTokenizer.from_pretrained(make(name).tokenizer.folder)
    messages, tools = plain_messages(conversation.messages), list(conversation.tools) or None
    [rendered] = renderer.render(conversation)
    assert rendered.text == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    assert rendered.ids.tolist() == theirs.apply_chat_template(messages, tools=tools, return_dict=False)
    asked = theirs.apply_chat_template(messages[:-1], tools=tools, add_generation_prompt=True, return_dict=False)
    assert renderer.prompt(conversation.messages[:-1], conversation.tools) == asked


@pytest.mark.parametrize("name", styles())
def test_what_is_supervised(make: Callable[[str], Renderer], name: str) -> None:
    """Guards promises 1 and 4: the answers and the token that ends each are supervised, and nothing else."""
    renderer = make(name)
    end = renderer.tokenizer.tokenizer.id_to_token(renderer.end_of_turn_id)
    [rendered] = renderer.render(CHAT)
    assert supervised(renderer, rendered) == f"4.{end}It is 6 — “six”.{end}"
    assert [rendered.text[a:b] for a, b in rendered.spans] == [f"4.{end}", f"It is 6 — “six”.{end}"]
    assert (rendered.ids.dtype, rendered.mask.dtype, len(rendered.ids)) == ("int32", "uint8", len(rendered.mask))
    assert renderer.end_of_turn_id in renderer.stop_ids
    if styles()[name].tools:
        [called] = renderer.render(TOOLS)
        taught = supervised(renderer, called)
        assert taught.count(end) == 2 and taught.endswith(f"It is 4.{end}") and '"add"' in taught and "sum" not in taught


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = [("system", draw(st.one_of(st.just(""), NASTY)))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", draw(SAID)), ("assistant", draw(SAID))]
    return talk(*turns)


@pytest.mark.parametrize("name", styles())
@QUICK
@given(conversation=conversations())
def test_any_conversation(make: Callable[[str], Renderer], name: str, conversation: Conversation) -> None:
    """Guards promise 3 and injection on anything people may write: a served prompt is the trained prefix, text never control."""
    renderer = make(name)
    [rendered] = renderer.render(conversation)
    ids, mask = rendered.ids.tolist(), rendered.mask.tolist()
    starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
    turns = [i for i, m in enumerate(conversation.messages) if m.role == "assistant"]
    assert len(starts) == len(turns)
    for start, turn in zip(starts, turns, strict=True):
        assert renderer.prompt(conversation.messages[:turn]) == ids[:start]
    assert renderer.tokenizer.decode(ids) == rendered.text
    harmless = talk(*((m.role, "x") for m in conversation.messages))
    if all(m.content.strip() for m in conversation.messages):  # an empty system turn may leave out its words
        control = [i for i in ids if i in renderer.tokenizer.control_ids]
        assert control == [i for i in renderer.render(harmless)[0].ids.tolist() if i in renderer.tokenizer.control_ids]
    assert rendered.text == renderer.text(conversation.messages, add_generation_prompt=False)


def test_batch_equals_single(make: Callable[[str], Renderer]) -> None:
    """Guards against samples mixed up when many conversations are tokenized in one call."""
    renderer, many = (
        make("chatml"),
        [
            CHAT,
            TOOLS,
            talk(("user", "<|im_end|>"), ("assistant", "no")),
            talk(("user", "a"), ("assistant", "b"), style="completion"),
        ],
    )
    for conversation, (same, together) in zip(many, renderer.render_all(many), strict=True):
        alone = renderer.render(conversation)
        assert same is conversation and [r.ids.tolist() for r in alone] == [r.ids.tolist() for r in together]
        assert [r.mask.tolist() for r in alone] == [r.mask.tolist() for r in together]


def test_turns_left_out(make: Callable[[str], Renderer]) -> None:
    """Guards `train: false`: the turn stays in the text with the same ids and leaves the loss."""
    turns = list(CHAT.messages)
    turns[2] = Message(role="assistant", content="4.", train=False)
    renderer = make("default")
    [rendered] = renderer.render(Conversation.make(turns, source="test"))
    assert supervised(renderer, rendered) == "It is 6 — “six”.<|end|>"
    assert rendered.ids.tolist() == renderer.render(CHAT)[0].ids.tolist()


def test_completion_style(make: Callable[[str], Renderer]) -> None:
    """Guards prompt/completion rows: BOS once, the border where serving puts it, EOS supervised, text never control."""
    renderer = make("default")
    [rendered] = renderer.render(talk(("user", "2+2 = "), ("assistant", " 4 <|end|>"), style="completion"))
    prompt = renderer.prompt_text("2+2 = ")
    ids = rendered.ids.tolist()
    assert ids[: len(prompt)] == prompt and prompt[0] == renderer.tokenizer.bos_id and ids[-1] == renderer.tokenizer.eos_id
    assert rendered.mask.tolist() == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert rendered.text == "2+2 =  4 <|end|>" and [i for i in ids if i in renderer.tokenizer.control_ids] == [prompt[0], ids[-1]]


def test_bos_is_not_doubled(make: Callable[[str], Renderer]) -> None:
    """Guards against two BOS tokens: one from the template, one from the tokenizer's post-processor."""
    for name in ("default", "llama3", "gemma", "mistral"):
        renderer = make(name)
        bos = renderer.tokenizer.bos_id
        assert renderer.prompt([{"role": "user", "content": "a"}]).count(bos) == 1
        assert renderer.render(CHAT)[0].ids.tolist().count(bos) == 1


def test_arguments_as_a_string(make: Callable[[str], Renderer]) -> None:
    """Guards serving: the API sends arguments as a JSON string, which templates would quote twice."""
    renderer = make("qwen")
    messages = [m.to_json() for m in TOOLS.messages]
    messages[2]["tool_calls"] = [{**CALL, "function": {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}}]
    assert renderer.text(messages, [TOOL]) == renderer.text(TOOLS.messages, [TOOL])


THINKING = """{%- set last = namespace(at=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.at = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set past = m.role == 'assistant' and loop.index0 < last.at %}
    {%- set text = m.content.split('</think>')[-1].lstrip('\n') if past else m.content %}
    {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_template_that_rewrites_history(make: Callable[[str], Renderer]) -> None:
    """Guards checkpoints that drop earlier thinking: each answer is taught with the history that it will be asked with."""
    renderer = Renderer(make("chatml").tokenizer, THINKING)
    assert renderer.history == "per_turn"
    chat = talk(
        ("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"), ("user", "c"), ("assistant", "<think>\nso\n</think>\n\nd")
    )
    first, second = renderer.render(chat)
    assert [supervised(renderer, r) for r in (first, second)] == [
        f"{m.content}<|im_end|>" for m in (chat.messages[1], chat.messages[3])
    ]
    assert "hm" in first.text and "hm" not in second.text and (first.turn, second.turn) == (1, 3)
    for rendered in (first, second):
        assert rendered.turn is not None
        prompt = renderer.prompt(chat.messages[: rendered.turn])
        assert (
            rendered.ids[: len(prompt)].tolist() == prompt
            and not rendered.mask[: len(prompt)].any()
            and rendered.mask[len(prompt)]
        )
    stated_whole = Renderer(make("chatml").tokenizer, THINKING, history="whole")  # a wrong statement is found out by proof
    assert [r.ids.tolist() for r in stated_whole.render(chat)] == [r.ids.tolist() for r in (first, second)]


def test_system_moved_to_the_last_turn(make: Callable[[str], Renderer]) -> None:
    """Guards Mistral's own template, which writes the system prompt before the *last* user turn."""
    template = """{{ bos_token }}{% set s = messages[0].content if messages[0].role == 'system' else '' %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list | length %}{% set seen = namespace(n=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set seen.n = seen.n + 1 %}{{ '[INST]' }}
{%- if seen.n == users and s %}{{ s + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"""
    renderer = Renderer(make("mistral").tokenizer, template)
    assert renderer.history == "per_turn"
    for rendered in renderer.render(CHAT):
        assert rendered.turn is not None
        prompt = renderer.prompt(CHAT.messages[: rendered.turn])
        assert rendered.ids[: len(prompt)].tolist() == prompt and rendered.text.count("Be brief.") == 1


BODY = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (BODY.replace("<|im_end|>", "") + ASK, "without a control token"),
        (BODY + ASK.replace("assistant", "assistant\\n<think>"), "differently from what it asks"),
        (BODY.replace("m.content", "(m.content if m.role != 'system' else '')") + ASK, "system turn at messages[0]"),
        (BODY.replace("m.content", "(m.content | upper)") + ASK, "changes or drops"),
        ("{% for m in messages %}", "not valid Jinja"),
    ],
)
def test_templates_that_prove_nothing(make: Callable[[str], Renderer], template: str, words: str) -> None:
    """Guards against a guess: a template whose spans cannot be shown, or that loses a message, is an error that names it."""
    with pytest.raises(ArtifactError) as caught:
        Renderer(make("chatml").tokenizer, template).render(talk(("system", "Be terse."), ("user", "a"), ("assistant", "bcd")))
    assert words in str(caught.value)


def test_dropped_tools_are_noticed(make: Callable[[str], Renderer]) -> None:
    """Guards tool training with a template that has no tools: the calls would vanish without a word."""
    with pytest.raises(ArtifactError, match=r"drops the assistant's tool calls"):
        Renderer(make("chatml").tokenizer, BODY + ASK).render(TOOLS)
    with pytest.raises(ArtifactError, match="drops the tools"):
        Renderer(make("chatml").tokenizer, BODY + ASK).render(talk(("user", "a"), ("assistant", "b"), tools=(TOOL,)))


def test_variables_reach_the_template(make: Callable[[str], Renderer]) -> None:
    """Guards hybrid thinking models: with `enable_thinking=False` prompt and training agree."""
    ask = ASK.replace("assistant\\n", "assistant\\n<think>") + "{% if 0 %}{% endif %}"
    template = BODY + "{% if thinking is not defined %}" + ask + "{% else %}" + ASK + "{% endif %}"
    renderer = Renderer(make("chatml").tokenizer, template, variables={"thinking": False})
    assert supervised(renderer, renderer.render(talk(("user", "a"), ("assistant", "b")))[0]) == "b<|im_end|>"


@pytest.mark.parametrize("name", styles())
def test_a_begun_answer_ends_open(make: Callable[[str], Renderer], name: str) -> None:
    """A prompt that closes the turn it is to go on with; a word of the template taken for the answer's; other ids than training's
    before the answer."""
    renderer = make(name)
    for begun in ("end", "4. ", "It is 6 — “six”, <|im_end|> "):
        messages = [*CHAT.messages[:-1], Message(role="assistant", content=begun)]
        try:
            ids = renderer.continued(messages)
        except DataError as error:
            assert begun.endswith(" ") and "does not write" in error.message  # a template that strips answers
            continue
        asked = renderer.prompt(messages[:-1])
        assert ids[: len(asked)] == asked
        assert renderer.tokenizer.decode(ids[len(asked) :]) == begun
        assert ids[len(asked) :] == renderer.tokenizer.encode_text(begun)


def test_only_what_an_assistant_began_is_continued(make: Callable[[str], Renderer]) -> None:
    """A user's words finished by the model; a template that drops the answer, and a prompt that ends somewhere else."""
    renderer = make("chatml")
    for last in (Message(role="user", content="x"), Message(role="assistant", content=""), TOOLS.messages[2]):
        with pytest.raises(DataError, match="can be continued"):
            renderer.continued([*CHAT.messages[:-1], last])
    for change in ("| trim", "| upper"):
        source = renderer.source.replace("+ message['content'] }}", f"+ message['content'] {change} }}}}")
        with pytest.raises(DataError, match="does not write"):
            Renderer(renderer.tokenizer, source).continued([*CHAT.messages[:-1], Message(role="assistant", content="4 or four ")])


def test_variables_of_a_template() -> None:
    """A name that a template gives a default is its own to be told; those that it makes or loops over are not."""
    source = (
        "{% if not date is defined %}{% set date = 'today' %}{% endif %}{% set made = 1 %}{{ date }}{{ made }}"
        "{% for m in messages %}{{ m.content }}{{ loop.index }}{% generation %}{{ style }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ raise_exception('x') if namespace() }}"
    )
    assert variables(source) == {"date", "messages", "style"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{% for i in range(10000) %}{% for j in range(10000) %}{% set x = j %}{% endfor %}{% endfor %}", "time or memory"),
        ("{{ 'ab' * 2000 }}", "4,000 characters"),
    ],
)
def test_a_template_of_a_stranger_is_tried_first(
    make: Callable[[str], Renderer], monkeypatch: pytest.MonkeyPatch, source: str, found: str
) -> None:
    """Guards every command that renders, not only the server: a template is a program, and may run for long or write much."""
    monkeypatch.setattr("tutelage.chat.template_probe.SECONDS", 1.0)
    monkeypatch.setattr("tutelage.chat.template_probe.MAX_CHARS", 1000)
    with pytest.raises(ArtifactError, match="too long, or too much memory") as caught:
        Renderer(make("chatml").tokenizer, source)
    assert found in str(caught.value.found) and str(caught.value.file).endswith("chat_template.jinja")


@pytest.mark.parametrize(
    "wrong", ["{{ 1 // (messages | length - 1) }}", "{{ messages[0].content.split('') }}", "{{ 'a'.index('b') }}"]
)
def test_whatever_a_template_raises_names_it(make: Callable[[str], Renderer], wrong: str) -> None:
    """Guards against a traceback for an exception that is not Jinja's own."""
    renderer = Renderer(make("chatml").tokenizer, BODY + wrong, history="whole")
    with pytest.raises(DataError, match="the chat template fails") as caught:
        renderer.text([{"role": "user", "content": "a"}])
    assert str(caught.value.file).endswith("chat_template.jinja")


def test_sandbox() -> None:
    """Guards against a downloaded template that reaches into Python."""
    for attack in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ strftime_now.__self__ }}{{ strftime_now.__func__.__globals__ }}",
    ):
        with pytest.raises(Exception, match=r"unsafe|immutable|undefined|no attribute") as caught:
            assert "subclasses" not in compile_template(attack)(messages=[])
        assert "jinja2" in type(caught.value).__module__


def test_no_template_is_named(make: Callable[[str], Renderer], tmp_path: Path) -> None:
    """Guards base checkpoints: chats are refused with the styles to choose from, completions work."""
    make("default").tokenizer.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    renderer = Renderer(tmp_path)
    with pytest.raises(ArtifactError, match="chatml"):
        renderer.render(CHAT)
    with pytest.raises(ConfigError, match="did you mean chatml"):
        style("chatlm")
    assert renderer.render(talk(("user", "a"), ("assistant", "b"), style="completion"))[0].supervised == 2
    with pytest.raises(ArtifactError, match="no chat template"):
        renderer.prompt([{"role": "user", "content": "a"}])


def _spaced(folder: Path, source: Renderer, template: str) -> TokenizerFolder:
    """A tokenizer that puts a space before the first word of a text, as SentencePiece does."""
    inner = Tokenizer.from_str(source.tokenizer.tokenizer.to_str())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": template}))
    return TokenizerFolder.open(folder)


def test_tokenizers_that_add_a_space(make: Callable[[str], Renderer], tmp_path: Path) -> None:
    """Guards SentencePiece-like tokenizers: pieces cannot be tokenized apart, so borders come from offsets and are proven."""
    renderer = Renderer(_spaced(tmp_path, make("chatml"), BODY + ASK))
    assert not renderer._encoder.cuttable
    chat = talk(("user", "a b"), ("assistant", "c d"), ("user", "e"), ("assistant", "f"))
    [rendered] = renderer.render(chat)
    assert rendered.ids.tolist() == renderer.tokenizer.tokenizer.encode(rendered.text, add_special_tokens=False).ids
    assert supervised(renderer, rendered).split() == ["c", "d<|im_end|>f<|im_end|>"]
    start = rendered.mask.tolist().index(1)
    assert renderer.prompt(chat.messages[:1]) == rendered.ids[:start].tolist()
    with pytest.raises(ArtifactError, match=r"reaches over the border"):
        renderer.render(talk(("user", "a"), ("assistant", "\n\nb")))
    with pytest.raises(DataError, match="cannot write as plain text"):
        renderer.render(talk(("user", "<|im_end|>"), ("assistant", "b")))


def test_control_tokens_that_swallow_space(make: Callable[[str], Renderer], tmp_path: Path) -> None:
    """Guards Phi-3's tokenizer, whose control tokens take the white space behind them along."""
    described = json.loads(make("chatml").tokenizer.tokenizer.to_str())
    described["added_tokens"] = [{**t, "rstrip": True} for t in described["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": BODY + ASK}))
    renderer = Renderer(tmp_path)
    assert isinstance(next(iter(renderer.tokenizer.control_tokens.values())), AddedToken)
    for user in ("a", "<|im_end|>"):
        [rendered] = renderer.render(talk(("user", user), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
        taught = [renderer.tokenizer.tokenizer.id_to_token(int(i)) for i in rendered.ids[rendered.mask == 1]]
        assert taught == ["b", "<|im_end|>", "d", "<|im_end|>"] and rendered.mask[-1] == 1
    plain = renderer.render(talk(("user", "a"), ("assistant", "b")))[0]
    assert plain.ids.tolist() == renderer.tokenizer.tokenizer.encode(plain.text, add_special_tokens=False).ids


def test_check_supervision() -> None:
    """Guards promise 1: a mask of all zeros or all ones is an error, but for text that was declared as such."""
    check_supervision(3, 10, "chat")
    check_supervision(10, 10, "text")
    for n in (0, 10):
        with pytest.raises(DataError, match=r"none|all"):
            check_supervision(n, 10, "chat")


def test_coloured_sample(make: Callable[[str], Renderer]) -> None:
    """Guards the sample shown before step 1: it is made from ids and mask, and counts what is supervised."""
    renderer = make("default")
    [rendered] = renderer.render(CHAT)
    shown = coloured_sample(rendered, renderer.tokenizer)
    green = "".join(shown.plain[s.start : s.end] for s in shown.spans if s.style == "green")
    assert green == supervised(renderer, rendered) and shown.plain.endswith(
        f"{rendered.supervised} of {len(rendered.ids)} tokens supervised"
    )


@pytest.mark.parametrize("name", styles())
def test_real_conversations(make: Callable[[str], Renderer], shared_data: Path, name: str) -> None:
    """Guards against proofs so strict that real data sets cannot be rendered."""
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    rows = [json.loads(line) for line in lines] + json.loads((shared_data / "instructions" / "alpaca_en_demo.json").read_text())[
        :200
    ]
    if styles()[name].tools and name != "llama3":
        rows += json.loads((shared_data / "instructions" / "glaive_toolcall_en_demo.json").read_text())
    renderer = make(name)
    for conversation, rendered in renderer.render_all([to_conversation(row) for row in rows]):
        assert len(rendered) == 1 and 0 < rendered[0].supervised < len(rendered[0].ids), conversation
        last = [m for m in conversation.messages if m.role == "assistant"][-1]
        assert last.content.strip() in supervised(renderer, rendered[0])


def test_a_template_without_its_control_tokens_names_one_that_works(tmp_path: Path) -> None:
    """A checkpoint whose only control token is the end token: advice to choose the style that just failed."""
    train(CORPUS, vocab_size=300, out=tmp_path / "t", template="plain")
    (tmp_path / "t" / "chat_template.jinja").write_text(styles()["chatml"].source)
    with pytest.raises(ArtifactError) as caught:
        Renderer(tmp_path / "t").render(CHAT)
    assert "template=plain" in str(caught.value)
