"""The prompts of `generate`: what a row says of its instructions."""

from __future__ import annotations

import pytest

from tutelage.errors import DataError
from tutelage.inference.prompts import Prompting


def test_a_row_may_have_its_own_system_prompt() -> None:
    """Guards against instructions beside a prompt that are dropped, and against a column of that name taken for them."""
    turns = [{"role": "user", "content": "q"}]
    said = [{"role": "system", "content": "P."}, *turns]
    assert Prompting().ask({"messages": turns, "system": "P."}).prompt == said
    assert Prompting(chat=True).ask({"prompt": "q", "system": "P."}).prompt == said
    assert Prompting().ask({"prompt": "q", "system": "P."}).prompt == "P.\n\nq"
    assert Prompting(template="{ask}").ask({"ask": "q", "system": "Linux"}).prompt == "q"
    assert Prompting(column="ask").ask({"ask": "q", "system": "Linux"}).prompt == "q"
    for prompting, row in (
        (Prompting(system="A."), {"prompt": "q", "system": "P."}),
        (Prompting(), {"messages": said, "system": "A."}),
    ):
        with pytest.raises(DataError, match="a system prompt of its own"):
            prompting.ask(row)
    with pytest.raises(DataError, match="is not text"):
        Prompting().ask({"prompt": "q", "system": 3})
    with pytest.raises(DataError, match="unknown key of a message") as caught:
        Prompting().ask({"messages": [{**turns[0], "weight_": 1}]})
    assert caught.value.field == "messages[0].weight_"
