"""The main line is the conversation: the line that goes on, whichever was asked for first."""

from dataclasses import replace
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import pytest

from engines import assistant, drain, fake_engine, run, user
from fleets import Setup, create, opened
from keepwarm import BlockPoolBatchEngine
from keepwarm.core.events import Completed
from keepwarm.core.stored import LineState
from keepwarm.core.transcript import Span, Transcript
from keepwarm.testing.agent_store import MemoryAgentStore
from keepwarm.testing.tokenizer import FakeTokenizer
from stores import Restart

TITLE = [{"role": "system", "content": "Give a title. " * 20}, user("Fix the bug")]
CODE = [{"role": "system", "content": "You write code. " * 20}, user("Fix the bug")]
HELP = [{"role": "system", "content": "You look for files. " * 20}, user("Where is it?")]


class Client:
    """Keeps its conversations, as a client of the standard APIs does."""

    def __init__(self, engine: BlockPoolBatchEngine, **more: Any) -> None:
        self.engine = engine
        self.more = {"agent_id": "ada", "max_tokens": 8, **more}
        self.said: dict[str, list[Any]] = {}

    def ask(self, name: str, opening: list[Any], content: str = "Go on") -> Completed:
        """The opening at first; then what was said so far, and something new."""
        known = self.said.get(name)
        messages = [*opening] if known is None else [*known, user(content)]
        turn = run(self.engine, messages=messages, **self.more)
        self.said[name] = [*messages, assistant(turn.text)]
        self.engine.check()
        return turn


def main_says(engine: BlockPoolBatchEngine) -> list[Any]:
    return list(engine.book.get("ada").main.messages or ())


def numbers(engine: BlockPoolBatchEngine) -> list[int]:
    return sorted(line.number for line in engine.book.get("ada").lines)


class TestElection:
    def test_a_title_first(self, restart: Restart) -> None:
        engine = restart()
        client = Client(engine)
        assert client.ask("title", TITLE).turn == 1
        assert client.ask("code", CODE).turn is None
        assert main_says(engine) == client.said["title"]
        second = client.ask("code", CODE)
        assert second.turn == 2
        assert second.usage.cached_tokens > 300
        assert main_says(engine) == client.said["code"]
        assert [len(turn.messages or ()) for turn in engine.turns("ada")] == [3, 5]
        assert engine.agent("ada").num_turns == 2
        assert engine.system("ada") == CODE[0]["content"]
        assert client.ask("code", CODE).turn == 3
        assert numbers(engine) == [0, 1]

    @pytest.mark.parametrize("kill", [False, True])
    def test_after_a_restart(self, restart: Restart, kill: bool) -> None:
        engine = restart()
        client = Client(engine)
        client.ask("title", TITLE)
        client.ask("code", CODE)
        client.engine = restart(clean=not kill)
        client.ask("code", CODE)
        before = main_says(client.engine)
        assert before == client.said["code"]
        client.engine = engine = restart(clean=not kill)
        assert [s.num_turns for s in engine._store.summaries()] == [2]
        assert main_says(engine) == before
        assert [len(turn.messages or ()) for turn in engine.turns("ada")] == [3, 5]
        assert numbers(engine) == [0, 1]
        turn = client.ask("code", CODE)
        assert turn.turn == 3
        if not kill:
            assert turn.cache.tier == "cold"
        engine._store.check()

    def test_forks_and_appended_messages_follow(self, restart: Restart) -> None:
        engine = restart()
        client = Client(engine)
        client.ask("title", TITLE)
        client.ask("code", CODE)
        client.ask("code", CODE)
        engine.fork("ada", "eve", at_turn=1)
        (turn,) = engine.turns("eve")
        assert list(turn.messages or ()) == client.said["code"][:3]
        appended = run(engine, agent_id="ada", append=[user("And?")], max_tokens=3)
        assert appended.turn == 3
        assert main_says(engine)[:-2] == client.said["code"]

    def test_a_pin_follows(self, restart: Restart) -> None:
        engine = restart()
        engine.create("ada")
        engine.pin("ada")
        client = Client(engine)
        client.ask("title", TITLE)
        client.ask("code", CODE)
        client.ask("code", CODE)
        agent = engine.book.get("ada")
        assert [line.blocks.pinned for line in agent.lines] == [True, False]

    def test_an_agent_that_was_created_first(self, restart: Restart) -> None:
        engine = restart()
        engine.create("ada")
        client = Client(engine)
        client.ask("title", TITLE)
        client.ask("code", CODE)
        assert client.ask("code", CODE).turn == 2


class TestWhatStays:
    def test_a_conversation_that_went_on_first(self, restart: Restart) -> None:
        """A helper of a coding agent says more than the coding agent, and under its name."""
        engine = restart()
        client = Client(engine)
        client.ask("code", CODE)
        client.ask("code", CODE)
        for _ in range(4):
            assert client.ask("help", HELP).turn is None
        assert main_says(engine) == client.said["code"]

    def test_a_helper_before_the_second_turn(self, restart: Restart) -> None:
        """The conversation began before the helper, and is the main line once it goes on."""
        engine = restart()
        client = Client(engine)
        client.ask("title", TITLE)
        client.ask("code", CODE)
        for _ in range(3):
            client.ask("help", HELP)
        assert main_says(engine) == client.said["help"]
        assert client.ask("code", CODE).turn == 2
        assert main_says(engine) == client.said["code"]
        assert client.ask("help", HELP).turn is None
        assert main_says(engine) == client.said["code"]
        assert numbers(engine) == [0, 1, 2]

    def test_the_same_again_does_not_go_on(self, restart: Restart) -> None:
        engine = restart()
        client = Client(engine)
        client.ask("title", TITLE)
        for _ in range(3):
            run(engine, agent_id="ada", messages=CODE, max_tokens=8)
        assert main_says(engine) == client.said["title"]

    def test_what_is_known_here_alone(self, restart: Restart) -> None:
        """Over the agents API only new messages come; no client could say the rest again."""
        engine = restart()
        engine.create("ada", system=str(CODE[0]["content"]))
        run(engine, agent_id="ada", append=[user("Hello")], max_tokens=3)
        said = main_says(engine)
        client = Client(restart())
        client.ask("title", TITLE)
        client.ask("title", TITLE)
        assert main_says(client.engine) == said

    @pytest.mark.parametrize("how", ["fork", "rollback", "import"])
    def test_what_a_client_decided(self, how: str, tmp_path: Path) -> None:
        engine = fake_engine(store=MemoryAgentStore())
        client = Client(engine, agent_id="old")
        client.ask("code", CODE)
        client.ask("code", CODE)
        if how == "fork":
            engine.fork("old", "ada", at_turn=1)
        elif how == "import":
            engine.rollback("old", turn=1)
            engine.export("old", tmp_path / "old")
            engine.import_agent(tmp_path / "old", "ada")
        else:
            engine.fork("old", "ada")
            engine.book.get("ada").has_fixed_main = False
            engine.rollback("ada", turn=1)
        client.more["agent_id"] = "ada"
        client.ask("help", HELP)
        client.ask("help", HELP)
        assert main_says(engine) == client.said["code"][:3]

    def test_one_that_runs_is_not_put_aside(self) -> None:
        engine = fake_engine()
        client = Client(engine)
        client.ask("title", TITLE)
        client.ask("code", CODE)
        running = engine.submit(
            agent_id="ada", messages=[*client.said["title"], user("Shorter")], max_tokens=500
        )
        for _ in range(3):
            engine.step()
        messages = [*client.said["code"], user("Go on")]
        other = engine.submit(agent_id="ada", messages=messages, max_tokens=3)
        events = drain(engine)
        ends = {e.request_id: e for e in events if isinstance(e, Completed)}
        assert ends[other].turn is None
        assert ends[running].turn == 2
        assert main_says(engine)[:3] == client.said["title"]


class TestEarlierCatalogues:
    """They numbered an agent's side lines in each tokenizer on its own."""

    def side(self, tokenizer: str, said: list[Any], last_used: int) -> LineState:
        token_ids = FakeTokenizer().encode(said[0]["content"])
        return LineState(
            number=1,
            tokenizer=tokenizer,
            transcript=Transcript((Span(None, tuple(token_ids)),)),
            messages=tuple(said),
            turns=(),
            block_hashes=(),
            last_used=last_used,
        )

    def sides(self, tmp_path: Path, *sides: LineState) -> list[tuple[int, list[Any]]]:
        """The side lines that an agent is read with where its catalogue has these."""
        with opened(tmp_path) as setup:
            create(setup, "ada")
            setup.say("ada", "Hello")
            setup.settle()
            state = setup.store.load_agent("ada")
            assert state is not None
            setup.store.commit(
                replace(state, lines=(*state.lines, *sorted(sides, key=attrgetter("key")))),
                lambda _: None,
            )
            setup.settle()
        with opened(tmp_path) as setup:
            agent = setup.fleet.book.get("ada")
            setup.fleet.check()
            return [(line.number, list(line.messages or ())) for line in agent.sides]

    def test_two_conversations_with_one_number_stay_two(self, tmp_path: Path) -> None:
        fake = FakeTokenizer().fingerprint
        first, second = [user("A title?")], [user("A summary?")]
        sides = self.sides(tmp_path, self.side(fake, first, 3), self.side("bytes", second, 4))
        assert sorted(sides, key=itemgetter(0)) == [(1, second), (2, first)]

    def test_one_in_two_tokenizers_stays_one(self, tmp_path: Path) -> None:
        fake = FakeTokenizer().fingerprint
        first = [user("A title?")]
        longer = [*first, assistant("Yes"), user("Go on")]
        sides = self.sides(tmp_path, self.side(fake, first, 3), self.side("bytes", longer, 4))
        assert sides == [(1, longer)]


class TestFleets:
    def test_the_other_model_follows(self, tmp_path: Path) -> None:
        """Its KV of the conversation becomes that of the main line there as well."""
        with opened(tmp_path) as setup:
            setup.attach("third")
            said = {name: asked(setup, "third", opening) for name, opening in OPENINGS}
            said["code"] = asked(setup, "small", [*said["code"], user("Go on")])
            small = setup.fleet.engine("small")
            assert list(small.book.get("ada").main.messages or ()) == said["code"]
            turn = ask(setup, "third", [*said["code"], user("Go on")])
            third = setup.fleet.engine("third")
            assert turn.turn == 3
            assert turn.usage.cached_tokens > 200
            assert list(third.book.get("ada").main.messages or ())[:-2] == said["code"]
            setup.settle()
        with opened(tmp_path) as setup:
            setup.attach("third")
            assert len(setup.fleet.of("ada").turns("ada")) == 3
            setup.store.check()


OPENINGS = (("title", TITLE), ("code", CODE))


def ask(setup: Setup, model: str, messages: list[Any]) -> Completed:
    return setup.run(model, agent_id="ada", messages=messages, max_tokens=8)


def asked(setup: Setup, model: str, messages: list[Any]) -> list[Any]:
    return [*messages, assistant(ask(setup, model, messages).text)]
