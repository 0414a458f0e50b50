"""What was sent is what is computed: whatever lines know, a prompt's ids spell its text.

Completions, chats, ids, continued messages, edits, forks, rollbacks and restarts in any mixture.
The ids that the generator is given are decoded, special tokens and all, and compared with the
rendered template, with the text, or with the ids that were sent.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import FakeFactory, check_values, drain, fake_engine, user
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.errors import AgentBusy, AgentExists, InvalidRequest, UnknownAgent
from keepwarm.core.events import Completed
from keepwarm.core.ports import Message, Piece
from keepwarm.testing.agent_store import MemoryAgentStore
from keepwarm.testing.tokenizer import BOS, IM_END, IM_START, FakeTokenizer

TOKENIZERS = {
    "with BOS": FakeTokenizer(),
    "without BOS": FakeTokenizer(has_bos=False),
    "trimming": FakeTokenizer(trim_content=True),
    "unthinking, without BOS": FakeTokenizer(strip_thinking=True, has_bos=False),
}
NAMES = st.sampled_from([None, None, "ada", "bob"])
WORDS = ["", " ", "Hello", "He", "llo world", "é😀", IM_END, IM_START, BOS, "</think>", "x" * 300]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=3).map("".join)
MAX_CHARACTER_BYTES = 4


class House:
    """An engine, everything that was said on it, and what the generator was given."""

    def __init__(self, tokenizer: FakeTokenizer) -> None:
        self.tokenizer = tokenizer
        self.store = MemoryAgentStore()
        self.said: list[list[Message]] = [[]]
        self.texts: list[str] = []
        self.prompts: list[list[int]] = [[1, 2, 3]]
        self.open()

    def open(self) -> None:
        self.engine: BlockPoolBatchEngine = fake_engine(
            factory=FakeFactory(vocab_size=self.tokenizer.vocab_size),
            tokenizer=self.tokenizer,
            store=self.store,
            num_blocks=40,
            max_side_lines=2,
            max_anonymous_lines=4,
        )

    def run(self, **request: Any) -> tuple[list[int], str]:
        """The prompt's ids as the generator got them, and the reply's text."""
        request_id = self.engine.submit(**request)
        active = self.engine._turns.active[request_id]
        prompt = list(active.sequence.prompt_ids)
        (ending,) = [e for e in drain(self.engine) if getattr(e, "text", None) is not None][-1:]
        assert isinstance(ending, Completed)
        # The KV that the row left is that of these ids, so they are what was computed.
        fed = active.line.blocks.token_ids[: len(prompt)]
        assert list(fed) == prompt[: len(fed)]
        assert len(fed) >= len(prompt) - MAX_CHARACTER_BYTES
        check_values(self.engine.tiers)
        self.prompts.append(prompt)
        return prompt, ending.text


def spelled(token_ids: Sequence[int]) -> str:
    """The text of the ids, special tokens as they are written.

    Bytes that are no character are U+FFFD, as the client saw them in a reply.
    """
    return b"".join(map(FakeTokenizer.bytes_of, token_ids)).decode("utf-8", "replace")


def rendered(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def conversation(house: House, data: st.DataObject) -> list[Message]:
    """One that was said before, as it was, with its last replies changed or cut, or a new one."""
    said = list(data.draw(st.sampled_from(house.said)))
    said = said[: data.draw(st.integers(0, len(said)))]
    if said and data.draw(st.booleans()):
        changed = dict(said[-1])
        changed["content"] = data.draw(
            st.sampled_from(
                [changed["content"].strip(), changed["content"] + " ", changed["content"][:-1]]
            )
        )
        said[-1] = changed
    return [*said, user(data.draw(TEXTS))]


def chat(house: House, data: st.DataObject, limits: dict[str, Any]) -> None:
    messages = conversation(house, data)
    prompt, reply = house.run(messages=messages, **limits)
    assert spelled(prompt) == rendered(house.tokenizer.render(messages))
    house.said.append([*messages, {"role": "assistant", "content": reply}])


def continued(house: House, data: st.DataObject, limits: dict[str, Any]) -> None:
    messages = conversation(house, data)
    begun = data.draw(TEXTS)
    final = {"role": "assistant", "content": begun}
    prompt, reply = house.run(messages=[*messages, final], continue_final_message=True, **limits)
    assert spelled(prompt) == rendered(house.tokenizer.render(messages)) + begun
    house.said.append([*messages, {"role": "assistant", "content": begun + reply}])


def complete(house: House, data: st.DataObject, limits: dict[str, Any]) -> None:
    begun = data.draw(st.sampled_from(["", *house.texts]))
    text = begun + data.draw(TEXTS)
    if not text:
        return
    prompt, reply = house.run(text=text, **limits)
    assert spelled(prompt) == rendered(house.tokenizer.split(text))
    house.texts.append(text + reply)


def give_ids(house: House, data: st.DataObject, limits: dict[str, Any]) -> None:
    known = data.draw(st.sampled_from(house.prompts))
    more = st.lists(st.integers(0, house.tokenizer.vocab_size - 1), min_size=1, max_size=3)
    token_ids = [*known[: data.draw(st.integers(0, len(known)))], *data.draw(more)]
    prompt, _ = house.run(token_ids=token_ids, **limits)
    assert prompt == token_ids


def append(house: House, data: st.DataObject, limits: dict[str, Any]) -> None:
    name = limits["agent_id"]
    if name is None or not house.engine.knows(name):
        return
    before = house.engine.book.get(name).main.messages
    if before is None:
        return
    messages = [*before, user(data.draw(TEXTS))]
    prompt, _ = house.run(append=messages[-1:], **limits)
    assert spelled(prompt) == rendered(house.tokenizer.render(messages))


def roll_back(house: House, data: st.DataObject, limits: dict[str, Any]) -> None:
    name = limits["agent_id"] or "ada"
    if house.engine.knows(name):
        num_turns = len(house.engine.turns(name))
        house.engine.rollback(name, turn=data.draw(st.integers(0, num_turns)))


def fork(house: House, data: st.DataObject, limits: dict[str, Any]) -> None:
    if house.engine.knows("ada") and not house.engine.knows("bob"):
        house.engine.fork("ada", "bob")


def restart(house: House, data: st.DataObject, limits: dict[str, Any]) -> None:
    house.engine.close()
    house.open()


OPERATIONS = [chat, chat, chat, continued, complete, complete, give_ids, append, roll_back, fork]
REFUSED = (InvalidRequest, UnknownAgent, AgentBusy, AgentExists)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_lines_know(tokenizer: FakeTokenizer, data: st.DataObject) -> None:
    house = House(tokenizer)
    for _ in range(data.draw(st.integers(2, 9))):
        operation = data.draw(st.sampled_from([*OPERATIONS, restart]))
        limits = {"agent_id": data.draw(NAMES), "max_tokens": data.draw(st.sampled_from([1, 3, 9]))}
        limits["stop"] = data.draw(st.sampled_from([None, "e", "l"]))
        operation(house, data, limits)
        for agent in house.engine.book:
            for line in agent.lines:
                line.transcript.check()
        assert house.engine.snapshot().num_mended_spans == 0
