"""Agents that go to another home in one file, and files that nobody should trust."""

import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines import (
    FakeFactory,
    completed,
    drain,
    fake_engine,
    fake_loaded,
    fresh_reply,
    generator_of,
    ids,
    main_blocks,
    run,
    user,
)
from keepwarm import AgentCacheStore, BlockPoolBatchEngine
from keepwarm.core.agent import Tier
from keepwarm.core.agent_store import BundleTicket
from keepwarm.core.block import BlockHash, chain_hashes
from keepwarm.core.errors import (
    AgentExists,
    BadBundle,
    BundleFailed,
    InvalidRequest,
    KeepwarmError,
    NoAgentStore,
    UnknownAgent,
)
from keepwarm.core.stored import (
    DEFAULT_SETTINGS,
    AgentState,
    BundleTerms,
    KVFamily,
    LineState,
    Record,
)
from keepwarm.core.transcript import EMPTY, Receipt, Span, Transcript, Turn
from keepwarm.engine.agents import agent_state
from keepwarm.store.agent_cache_store import StoreConfig
from keepwarm.store.bundle.agent_json import (
    MAX_SIBLINGS,
    Unsound,
    decode_agent,
    encode_agent,
)
from keepwarm.store.bundle.archive import write_bundle
from keepwarm.store.bundle.manifest import Exported, Manifest
from keepwarm.store.disk.record import encode
from keepwarm.testing.generator import FAKE_LAYOUT
from keepwarm.testing.tokenizer import FakeTokenizer
from stores import finish

NewEngine = Callable[..., BlockPoolBatchEngine]


class OtherTokenizer(FakeTokenizer):
    """Spells words by other ids, as far as the engine can know."""

    @property
    def fingerprint(self) -> str:
        return "other"


@pytest.fixture
def homes(tmp_path: Path) -> Iterator[NewEngine]:
    """Engines by the name of their home; the one that had it open before is closed."""
    opened: dict[str, tuple[BlockPoolBatchEngine, AgentCacheStore]] = {}

    def engine_at(name: str, *, store_config: StoreConfig | None = None, **more: Any) -> Any:
        if name in opened:
            engine, store = opened.pop(name)
            assert engine.close()
            store.close()
        store = AgentCacheStore(tmp_path / name, config=store_config)
        opened[name] = (fake_engine(store=store, **more), store)
        return opened[name][0]

    yield engine_at
    for _, store in opened.values():
        store.check()
        store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ada.keepwarm"


def num_prefilled(engine: BlockPoolBatchEngine) -> int:
    return sum(length for _, length in generator_of(engine).prefilled)


def state_of(engine: BlockPoolBatchEngine, agent_id: str) -> AgentState:
    """What was said and decided, without what differs between homes."""
    state = agent_state.state_of(engine.book.get(agent_id))
    lines = (replace(ln, block_hashes=(), last_used=0, namespace="") for ln in state.lines)
    return replace(state, lines=tuple(lines))


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class TestRoundTrip:
    @pytest.mark.parametrize("num_tokens", [5, 255, 256, 257, 700])
    def test_the_other_home_resumes_and_says_the_same(
        self, homes: NewEngine, path: Path, num_tokens: int
    ) -> None:
        one, two = homes("one"), homes("two")
        first = run(one, agent_id="ada", token_ids=ids(num_tokens), max_tokens=20)
        said = [*ids(num_tokens), *first.token_ids]
        exported = one.export("ada", path)
        assert exported.num_tokens == len(said) - 1
        assert exported.num_left_out == 0
        assert exported.file_bytes == path.stat().st_size
        assert path.stat().st_mode & 0o777 == 0o600
        imported = two.import_agent(path)
        assert (imported.agent_id, imported.num_tokens) == ("ada", len(said))
        assert imported.is_durable
        assert imported.num_records == exported.num_records
        turn = run(two, agent_id="ada", token_ids=[*said, 3], max_tokens=9)
        assert turn.cache.cached_tokens == len(said) - 1
        assert turn.cache.tier is Tier.COLD
        assert turn.token_ids == fresh_reply([*said, 3], max_tokens=9)
        assert state_of(one, "ada").lines[0].turns == state_of(two, "ada").lines[0].turns[:1]

    def test_it_is_a_tar_that_other_tools_can_list(self, homes: NewEngine, path: Path) -> None:
        one = homes("one")
        run(one, agent_id="ada", token_ids=ids(300), max_tokens=2)
        one.export("ada", path)
        with tarfile.open(path) as tar:
            names = tar.getnames()
        assert names[:3] == ["manifest.json", "agent.json", "records/00000.safetensors"]

    def test_a_conversation_goes_on(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        run(one, agent_id="ada", messages=[user("Grüße, 你好 👋!")], max_tokens=9)
        run(one, agent_id="ada", append=[user("And?")], max_tokens=9)
        one.configure("ada", priority=7, quota_bytes=1 << 20, pinned=True)
        one.export("ada", path)
        two.import_agent(path)
        assert state_of(two, "ada") == state_of(one, "ada")
        turns = [run(e, agent_id="ada", append=[user("More")], max_tokens=9) for e in (one, two)]
        assert turns[0].token_ids == turns[1].token_ids
        two.rollback("ada", turn=1)
        assert two.agent("ada").num_turns == 1

    def test_it_survives_a_restart_and_stays_private(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        first = run(one, agent_id="ada", token_ids=ids(600), max_tokens=3)
        one.export("ada", path)
        two.import_agent(path)
        two = homes("two")
        assert [view.is_private for view in two.agents()] == [True]
        said = [*ids(600), *first.token_ids]
        assert run(two, agent_id="bob", token_ids=said, max_tokens=2).cache.cached_tokens == 0
        assert two.agent("ada").is_private
        assert run(two, agent_id="ada", token_ids=said, max_tokens=2).cache.cached_tokens == 602

    def test_a_fork_at_a_turn(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        first = run(one, agent_id="ada", token_ids=ids(600), max_tokens=4)
        said = [*ids(600), *first.token_ids]
        run(one, agent_id="ada", token_ids=[*said, *ids(300, 1)], max_tokens=4)
        one.fork("ada", "bob", at_turn=1)
        one.export("bob", path)
        assert two.import_agent(path).num_tokens == len(said)
        turn = run(two, agent_id="bob", token_ids=[*said, 1], max_tokens=4)
        assert turn.cache.cached_tokens >= 603

    def test_side_lines_come_along(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        requests = [
            one.submit(agent_id="ada", token_ids=[*ids(300), *ids(300, salt)], max_tokens=5)
            for salt in range(3)
        ]
        events = drain(one)
        replies = [completed(events, request).token_ids for request in requests]
        exported = one.export("ada", path)
        assert exported.num_records == 1 + 3 * 2
        two.import_agent(path)
        assert two.agent("ada").num_side_lines == 2
        for salt, reply in enumerate(replies):
            prompt = [*ids(300), *ids(300, salt), *reply, 1]
            turn = run(two, agent_id="ada", token_ids=prompt, max_tokens=5)
            assert turn.cache.cached_tokens == 604
            assert turn.token_ids == fresh_reply(prompt, max_tokens=5)

    def test_under_another_name(self, homes: NewEngine, path: Path) -> None:
        one = homes("one")
        run(one, agent_id="ada", token_ids=ids(300), max_tokens=2)
        one.export("ada", path)
        with pytest.raises(AgentExists):
            one.import_agent(path)
        assert one.import_agent(path, "eve").agent_id == "eve"
        with pytest.raises(AgentExists):
            one.import_agent(path, "eve")
        with pytest.raises(InvalidRequest):
            one.import_agent(path, "../eve")

    def test_an_imported_agent_can_be_exported(self, homes: NewEngine, path: Path) -> None:
        one, two, three = homes("one"), homes("two"), homes("three")
        first = run(one, agent_id="ada", token_ids=ids(600), max_tokens=3)
        one.export("ada", path)
        two.import_agent(path)
        second = run(two, agent_id="ada", token_ids=[*ids(600), *first.token_ids, 1], max_tokens=3)
        two.export("ada", path)
        three.import_agent(path)
        said = [*ids(600), *first.token_ids, 1, *second.token_ids]
        assert run(three, agent_id="ada", token_ids=said, max_tokens=2).cache.cached_tokens == 606
        assert main_blocks(three, "ada").namespace != main_blocks(two, "ada").namespace

    def test_an_agent_that_was_parked(self, homes: NewEngine, path: Path) -> None:
        one = homes("one")
        run(one, agent_id="ada", token_ids=ids(600), max_tokens=2)
        one.park("ada")
        assert one.export("ada", path).num_tokens == 601

    def test_what_the_disk_did_not_take_is_left_out(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        one._store.accepts = lambda nbytes: False  # type: ignore[method-assign]
        run(one, agent_id="ada", token_ids=ids(600), max_tokens=2)
        exported = one.export("ada", path, timeout_s=0.1)
        assert (exported.num_tokens, exported.num_left_out) == (0, 601)
        two.import_agent(path)
        assert not two.agent("ada").is_private
        turn = run(two, agent_id="ada", token_ids=ids(600), max_tokens=2)
        assert turn.cache.cached_tokens == 0

    def test_a_damaged_record_is_left_out_with_what_follows(
        self, homes: NewEngine, path: Path, tmp_path: Path
    ) -> None:
        one, two = homes("one"), homes("two")
        run(one, agent_id="ada", token_ids=ids(1000), max_tokens=2)
        one = homes("one")
        store = one._store
        records = store.plan(one.tiers.family_of(""), one.tiers.family_of("").root, ids(1000))
        name = records[1].hash.hex()
        file = tmp_path / "one" / "blocks" / name[:2] / f"{name}.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        exported = one.export("ada", path)
        assert (exported.num_records, exported.num_tokens) == (1, 256)
        assert store.health().num_damaged == 1
        assert two.import_agent(path).num_records == 1

    def test_within_the_quota_that_it_brings(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        run(one, agent_id="ada", token_ids=ids(1000), max_tokens=2)
        one.export("ada", path)
        one.configure("ada", quota_bytes=12_000)
        one.export("ada", path)
        imported = two.import_agent(path)
        assert (imported.num_records, imported.num_left_out) == (2, 2)

    def test_deleting_it_leaves_nothing(self, homes: NewEngine, path: Path, tmp_path: Path) -> None:
        one, two = homes("one"), homes("two")
        run(one, agent_id="ada", token_ids=ids(600), max_tokens=2)
        one.export("ada", path)
        two.import_agent(path)
        two.delete("ada")
        assert two.flush()
        homes("two")
        assert not [name for name in files_of(tmp_path / "two") if name.endswith("safetensors")]


class TestRefusals:
    def test_without_a_store(self, path: Path) -> None:
        engine = fake_engine()
        run(engine, agent_id="ada", token_ids=ids(10), max_tokens=2)
        with pytest.raises(NoAgentStore):
            engine.export("ada", path)
        with pytest.raises(NoAgentStore):
            engine.import_agent(path)

    def test_an_unknown_agent(self, homes: NewEngine, path: Path) -> None:
        one = homes("one")
        with pytest.raises(UnknownAgent):
            one.export("nobody", path)

    def test_a_folder_that_is_not_there(self, homes: NewEngine, tmp_path: Path) -> None:
        one = homes("one")
        run(one, agent_id="ada", token_ids=ids(10), max_tokens=2)
        with pytest.raises(BundleFailed):
            one.export("ada", tmp_path / "nowhere" / "ada")
        with pytest.raises(BundleFailed):
            one.export("ada", tmp_path)
        with pytest.raises(BundleFailed):
            one.import_agent(tmp_path / "nowhere")
        assert not list(tmp_path.glob(".keepwarm-*"))

    def test_what_is_no_file(self, homes: NewEngine, tmp_path: Path) -> None:
        one = homes("one")
        os.mkfifo(tmp_path / "pipe")
        for bad in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises((BadBundle, BundleFailed)):
                one.import_agent(bad)


class TestPrivacy:
    def test_other_agents_find_it_only_after_verify(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        first = run(one, agent_id="ada", token_ids=ids(600), max_tokens=3)
        prompt = [*ids(600), *first.token_ids, 1]
        one.export("ada", path)
        two.import_agent(path)
        root = two.tiers.family_of("").root
        for move in (two.prefetch, two.demote, two.park):
            move("ada")
            drain(two)
            assert not two._store.plan(two.tiers.family_of(""), root, prompt)
            assert not two.tiers.memory.index.longest_run(chain_hashes(root, prompt))
        turn = run(two, agent_id="ada", token_ids=prompt, max_tokens=3)
        assert turn.cache.cached_tokens == 602
        stranger = run(two, agent_id="bob", token_ids=prompt, max_tokens=3)
        assert stranger.cache.cached_tokens == 0
        two.delete("bob")
        assert two.flush()
        assert two.verify("ada").became_shared
        stranger = run(two, agent_id="bob", token_ids=prompt, max_tokens=3)
        assert stranger.cache.cached_tokens == 512

    def test_and_from_disk(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        first = run(one, agent_id="ada", token_ids=ids(600), max_tokens=3)
        prompt = [*ids(600), *first.token_ids]
        one.export("ada", path)
        two.import_agent(path)
        two = homes("two")
        assert two.verify("ada").became_shared
        assert not two.agent("ada").is_private
        two = homes("two")
        assert two.snapshot().store.num_records == 3
        turn = run(two, agent_id="bob", token_ids=prompt, max_tokens=2)
        assert turn.cache.cached_tokens == 602
        assert turn.cache.tier is Tier.COLD

    def test_forks_and_side_lines_share_it_among_themselves(
        self, homes: NewEngine, path: Path
    ) -> None:
        one, two = homes("one"), homes("two")
        first = run(one, agent_id="ada", token_ids=ids(600), max_tokens=3)
        prompt = [*ids(600), *first.token_ids, 1]
        one.export("ada", path)
        two.import_agent(path)
        two.fork("ada", "fork")
        turn = run(two, agent_id="fork", token_ids=prompt, max_tokens=3)
        assert turn.cache.cached_tokens == 602
        assert two.agent("fork").is_private
        side = [
            two.submit(agent_id="ada", token_ids=[*prompt[:580], salt], max_tokens=2)
            for salt in range(2)
        ]
        events = drain(two)
        assert all(completed(events, request).cache.cached_tokens >= 512 for request in side)
        two.verify("ada")
        two = homes("two")
        assert two.agent("fork").is_private
        turn = run(two, agent_id="fork", token_ids=[*prompt, *turn.token_ids, 2], max_tokens=3)
        assert turn.cache.cached_tokens >= 512

    def test_two_imports_of_the_same_bundle_do_not_meet(self, homes: NewEngine, path: Path) -> None:
        one, two = homes("one"), homes("two")
        run(one, agent_id="ada", token_ids=ids(600), max_tokens=3)
        one.export("ada", path)
        two.import_agent(path, "a")
        two.import_agent(path, "b")
        assert two.snapshot().store.num_records == 6
        assert main_blocks(two, "a").namespace != main_blocks(two, "b").namespace


class TestOtherModels:
    def test_other_weights_keep_the_transcript_and_its_ids(
        self, homes: NewEngine, path: Path
    ) -> None:
        one, two = homes("one"), homes("two", fingerprint="other")
        run(one, agent_id="ada", messages=[user("Hello")], max_tokens=300)
        one.export("ada", path)
        imported = two.import_agent(path)
        assert (imported.num_records, imported.num_dropped) == (0, 2)
        assert state_of(two, "ada").lines[0].transcript == state_of(one, "ada").lines[0].transcript
        assert not two.agent("ada").is_private
        assert two.agent("ada").held_tokens == 0
        turn = run(two, agent_id="ada", append=[user("And?")], max_tokens=5)
        assert turn.cache.cached_tokens == 0
        assert turn.cache.reason == "evicted"

    def test_another_tokenizer_keeps_what_was_said(self, homes: NewEngine, path: Path) -> None:
        one = homes("one")
        two = homes("two", fingerprint="other", tokenizer=OtherTokenizer())
        run(one, agent_id="ada", messages=[user("Hello")], max_tokens=300)
        one.export("ada", path)
        assert two.import_agent(path).num_dropped == 2
        turn = run(two, agent_id="ada", append=[user("And?")], max_tokens=5)
        assert turn.cache.reason == "new_line"
        assert two.agent("ada").num_turns == 2
        assert len(state_of(two, "ada").lines) == 2

    def test_and_back_again(self, homes: NewEngine, path: Path) -> None:
        one = homes("one")
        two = homes("two", fingerprint="other", tokenizer=OtherTokenizer())
        run(one, agent_id="ada", messages=[user("Hello")], max_tokens=9)
        one.export("ada", path)
        two.import_agent(path)
        two.export("ada", path)
        assert one.import_agent(path, "back").num_tokens == one.agent("ada").num_tokens

    def test_canonical_shapes_are_another_family(self, path: Path, tmp_path: Path) -> None:
        terms = []
        for deterministic in (False, True):
            with AgentCacheStore(tmp_path / str(deterministic)) as store:
                engine = fake_engine(store=store)
                if deterministic:
                    loaded, pool = fake_loaded(), engine.tiers.pool
                    engine = BlockPoolBatchEngine(
                        loaded, pool=pool, store=store, deterministic=True
                    )
                    terms.append(engine.import_agent(path))
                else:
                    run(engine, agent_id="ada", token_ids=ids(600), max_tokens=2)
                    engine.export("ada", path)
        assert (terms[0].num_records, terms[0].num_dropped) == (0, 3)


# -- files that nobody should trust ----------------------------------------------------------------

FAMILY = KVFamily("fake", FAKE_LAYOUT)
VOCABULARY = FakeTokenizer().vocab_size


def line_of(token_ids: list[int], **fields: Any) -> LineState:
    transcript = Transcript((Span(None, tuple(token_ids)),)) if token_ids else EMPTY
    line = LineState(0, "fake", transcript, (), (), (), 0)
    return replace(line, **fields)


def exported_of(
    token_ids: list[int], family: KVFamily = FAMILY, **fields: Any
) -> tuple[Exported, dict[BlockHash, bytes]]:
    """An agent with KV of zeros for all of its ids, and the files of its records."""
    files: dict[BlockHash, bytes] = {}
    records = []
    parent = family.root
    for depth, start in enumerate(range(0, len(token_ids), 256)):
        block = token_ids[start : start + 256]
        record = Record.of_run(parent, depth, block)
        pieces = [memoryview(bytes(t.nbytes)) for t in family.layout.tensors(len(block))]
        files[record.hash] = b"".join(bytes(p) for p in encode(family, record, block, pieces))
        records.append((record, len(files[record.hash])))
        parent = record.hash
    state = AgentState("ada", DEFAULT_SETTINGS, (line_of(token_ids, **fields),))
    content = Exported(family, "fake", "ada", encode_agent(state), tuple(records))
    return content, files


def write(path: Path, content: Exported, files: dict[BlockHash, bytes]) -> None:
    finish(write_bundle(path, content, files.__getitem__))


@pytest.fixture
def home(homes: NewEngine) -> BlockPoolBatchEngine:
    return homes("home")


def refused(engine: BlockPoolBatchEngine, path: Path, tmp_path: Path) -> str:
    """The problem that the import names; nothing was left behind."""
    before = files_of(tmp_path)
    with pytest.raises(BadBundle) as caught:
        engine.import_agent(path)
    assert caught.value.path == path
    assert files_of(tmp_path) == before
    assert engine.agents() == ()
    health = engine.snapshot().store
    assert (health.num_records, health.num_damaged) == (0, 0)
    engine.check()
    return caught.value.problem


def test_the_handmade_bundle_is_sound(home: BlockPoolBatchEngine, path: Path) -> None:
    write(path, *exported_of(ids(600)))
    assert home.import_agent(path).num_records == 3


@pytest.mark.parametrize(
    ("token_ids", "fields", "problem"),
    [
        ([0, VOCABULARY], {}, "vocabulary"),
        ([0, 2**32 - 1], {}, "vocabulary"),
        ([0], {"namespace": "a/b"}, "namespace"),
        ([0], {"namespace": "x" * 65}, "namespace"),
        ([0], {"tokenizer": "\n"}, "name"),
        ([0], {"number": 2}, "main line"),
        ([0], {"number": -1}, "number"),
        ([0], {"transcript": Transcript(())}, "open text"),
        ([0], {"transcript": Transcript((Span("a", ()), Span("b", ()), Span("", ())))}, "turns"),
        (
            [0],
            {"transcript": Transcript((Span("a", ()), Span("b", (), True, True), Span("", ())))},
            "special",
        ),
        ([0], {"messages": ({"role": "god", "content": "Let there be"},)}, "role"),
        ([0], {"messages": ({"role": "user", "content": ["x"]},)}, "text"),
    ],
)
def test_a_state_that_no_agent_has(
    home: BlockPoolBatchEngine,
    path: Path,
    tmp_path: Path,
    token_ids: list[int],
    fields: dict[str, Any],
    problem: str,
) -> None:
    content, _ = exported_of([], **{"transcript": line_of(token_ids).transcript, **fields})
    write(path, content, {})
    assert problem in refused(home, path, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "nul",
        "\xff",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 10_000,
        '{"agent_id":"ada","settings":{},"lines":[]}',
        '{"agent_id":"ada","settings":null,"lines":null}',
        '{"agent_id":1,"settings":{},"lines":{}}',
    ],
)
def test_json_that_is_no_agent(
    home: BlockPoolBatchEngine, path: Path, tmp_path: Path, text: str
) -> None:
    content, _ = exported_of([])
    write(path, replace(content, agent=text.encode("latin-1")), {})
    refused(home, path, tmp_path)


def damaged_states() -> Iterator[tuple[str, Any]]:
    """Every value of an agent's JSON, one after the other, replaced by one of another kind."""
    message = {"role": "user", "content": "Hello", "more": {"a": [1]}}
    state = AgentState(
        "ada",
        DEFAULT_SETTINGS,
        (line_of([1, 2], messages=(message,), turns=()),),
    )
    document = json.loads(encode_agent(state))
    document["lines"][0]["turns"] = [[2, 1]]
    wrong: tuple[Any, ...] = (None, -1, 1 << 70, 1.5, "\ud800", [], {}, [[]], True, "x" * 600)
    for where, parent, key in list(_places(document, "")):
        if "more" in where:
            continue
        for value in wrong:
            old = parent[key]
            if type(old) is type(value) or (old is None and value is None):
                continue
            parent[key] = value
            yield f"{where}={value!r:.12}", json.loads(json.dumps(document))
            parent[key] = old


def _places(value: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield f"{where}/{key}", value, key
        if isinstance(inner, dict | list):
            yield from _places(inner, f"{where}/{key}")


def test_values_of_other_kinds_are_refused_or_mean_something() -> None:
    """What is accepted can be written again, and is the same then."""
    num_refused = 0
    for where, document in damaged_states():
        data = json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")
        try:
            state = decode_agent(data)
        except Unsound:
            num_refused += 1
            continue
        assert decode_agent(encode_agent(state)) == state, where
    assert num_refused > 100


def test_a_message_that_is_too_deep() -> None:
    message: dict[str, Any] = {"role": "user", "content": ""}
    inner = message
    for _ in range(70):
        inner["more"] = {}
        inner = inner["more"]
    state = AgentState("ada", DEFAULT_SETTINGS, (line_of([], messages=(message,)),))
    with pytest.raises(Unsound, match="deep"):
        decode_agent(encode_agent(state))


def test_numbers_that_are_none() -> None:
    text = encode_agent(
        AgentState(
            "ada",
            DEFAULT_SETTINGS,
            (line_of([], messages=({"role": "user", "content": "", "n": 12345},)),),
        )
    )
    for number in (b"1e999", b"NaN", b"-Infinity"):
        with pytest.raises(Unsound):
            decode_agent(text.replace(b"12345", number))


def agent_saying(**line: Any) -> bytes:
    """An agent as no Keepwarm writes it, with these values in its main line."""
    state = AgentState("ada", DEFAULT_SETTINGS, (line_of([]),))
    document = json.loads(encode_agent(state))
    document["lines"][0] |= line
    return json.dumps(document).encode()


@pytest.mark.parametrize("half", ["\ud83d", "\ude00\ud83d", "x\udc00"])
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(half: str) -> None:
    message = {"role": "user", "content": "Hello"}
    for bad in (
        {"messages": [[0, {**message, "content": half}]]},
        {"messages": [[0, {**message, half: "x"}]]},
        {"messages": [[0, {**message, "tool_calls": [{"arguments": {"a": [half]}}]}]]},
        {"spans": [[half, [], True, False]]},
        {"turns": [[0, None, {**RECEIPT, "key": half}]]},
        {"turns": [[0, None, {**RECEIPT, "digest": half}]]},
    ):
        with pytest.raises(Unsound):
            decode_agent(agent_saying(**bad))


def test_two_halves_that_are_one_character_are_taken() -> None:
    message = {"role": "user", "content": "👋"}
    data = agent_saying(messages=[[0, message]], head=1)
    assert b"\\ud83d\\udc4b" in data
    assert decode_agent(data).lines[0].messages == (message,)


RECEIPT = {
    "key": "k",
    "digest": "d",
    "finish_reason": "stop",
    "prompt_tokens": 1,
    "cached_tokens": 0,
    "completion_tokens": 2,
}


@pytest.mark.parametrize(
    "change",
    [
        {"key": ""},
        {"key": "x" * 256},
        {"key": "\n"},
        {"key": 7},
        {"digest": None},
        {"digest": "x" * 65},
        {"finish_reason": "cancelled"},
        {"finish_reason": "tired"},
        {"finish_reason": []},
        {"prompt_tokens": -1},
        {"cached_tokens": 1.0},
        {"completion_tokens": True},
        {"more": 1},
    ],
)
def test_receipts_that_no_request_has(change: dict[str, Any]) -> None:
    sound = decode_agent(agent_saying(turns=[[0, None, RECEIPT]]))
    assert sound.lines[0].turns[0].receipt == Receipt(**RECEIPT)
    with pytest.raises(Unsound):
        decode_agent(agent_saying(turns=[[0, None, RECEIPT | change]]))


def test_a_bundle_of_the_first_version_is_read(home: BlockPoolBatchEngine, path: Path) -> None:
    """Its turns have no receipts."""
    message = {"role": "user", "content": "Hello"}
    agent = agent_saying(messages=[[0, message]], head=1, turns=[[0, 1]])
    manifest = replace(exported_of([])[0].manifest(), version=1, agent_bytes=len(agent))
    members = [entry("manifest.json", manifest.sealed(agent).render()), entry("agent.json", agent)]
    path.write_bytes(raw_tar(*members, kind=tarfile.USTAR_FORMAT))
    assert home.import_agent(path).num_turns == 1
    assert home.turns("ada") == (Turn(0, (message,)),)


def test_conversations_that_would_fill_memory() -> None:
    """A long one that thousands of turns repeat, and one with very many continuations."""
    long = [[node, {"role": "user", "content": ""}] for node in range(50_000)]
    wide = [[0, {"role": "user", "content": ""}]] * (MAX_SIBLINGS + 1)
    state = AgentState("ada", DEFAULT_SETTINGS, (line_of([]),))
    for messages, turns in ((long, [[0, 50_000]] * 400), (wide, [])):
        document = json.loads(encode_agent(state))
        document["lines"][0] |= {"messages": messages, "turns": turns}
        with pytest.raises(Unsound, match="too many"):
            decode_agent(json.dumps(document).encode())


def raw_tar(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def entry(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o600
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def sound_parts() -> tuple[bytes, bytes, list[bytes]]:
    content, files = exported_of(ids(300))
    records = [files[record.hash] for record, _ in content.records]
    return content.manifest().render(), content.agent, records


def malicious() -> Iterator[tuple[str, bytes]]:
    manifest, agent, records = sound_parts()
    first = [entry("manifest.json", manifest), entry("agent.json", agent)]
    rest = [entry(f"records/{n:05}.safetensors", data) for n, data in enumerate(records)]
    yield "nothing", b""
    yield "an empty tar", raw_tar()
    yield "zeros", bytes(10_240)
    yield "a gzip", b"\x1f\x8b" + bytes(600)
    yield "no agent", raw_tar(first[0])
    yield "no records", raw_tar(*first)
    yield "the agent first", raw_tar(first[1], first[0], *rest)
    yield "one member more", raw_tar(*first, *rest, entry("../../evil", b"x"))
    yield "the manifest twice", raw_tar(first[0], *first, *rest)
    yield "a record twice", raw_tar(*first, rest[0], *rest)
    yield "records swapped", raw_tar(*first, *reversed(rest))
    for name in ("../../evil", "/etc/evil", "agent.json/../../evil", "a" * 300, "agent.json\x00x"):
        yield f"named {name:.20}", raw_tar(first[0], entry(name, agent), *rest)
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_SPARSE,
        tarfile.XHDTYPE,
    ):
        link = entry("agent.json", b"", type=kind, linkname="/etc/passwd")
        yield f"of type {kind!r}", raw_tar(first[0], link, *rest)
        info, data = entry("manifest.json", manifest, type=kind)
        yield f"begins with type {kind!r}", info.tobuf(tarfile.USTAR_FORMAT) + data
    yield "with owners", raw_tar(first[0], entry("agent.json", agent, uid=1000), *rest)
    yield (
        "with extended headers",
        raw_tar(
            entry("manifest.json", manifest, pax_headers={"comment": "x" * 9999}), first[1], *rest
        ),
    )
    for size in (1 << 20, (1 << 20) + 1, 8**11 - 1, 1 << 62):
        info, _ = entry("manifest.json")
        info.size = size
        yield f"a manifest of {size}", info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    yield "a tail", raw_tar(*first, *rest) + bytes(10_240)


@pytest.mark.parametrize(
    ("_", "data"), list(malicious()), ids=lambda v: v if type(v) is str else ""
)
def test_tars_that_are_no_bundles(
    home: BlockPoolBatchEngine, path: Path, tmp_path: Path, _: str, data: bytes
) -> None:
    path.write_bytes(data)
    refused(home, path, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"agent_bytes": 1 << 40},
        {"agent_bytes": 31 << 20},
        {"agent_bytes": -1},
        {"record_bytes": [1 << 29, 1 << 29]},
        {"record_bytes": [1 << 62]},
        {"record_bytes": [0] * 70_000},
        {"record_bytes": [-512, 512]},
        {"record_bytes": "many"},
        {"agent_id": "eve"},
        {"agent_id": 7},
        {"tokenizer": None},
        {"version": 0},
        {"version": 1},
        {"version": 3},
        {"version": True},
        {"version": 2.0},
        {"format": "zip"},
        {"more": 1},
    ],
)
def test_manifests_that_lie(
    home: BlockPoolBatchEngine, path: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    manifest, agent, records = sound_parts()
    document = json.loads(manifest) | change
    members = [
        entry("manifest.json", json.dumps(document, indent=1).encode()),
        entry("agent.json", agent),
        *(entry(f"records/{n:05}.safetensors", data) for n, data in enumerate(records)),
    ]
    path.write_bytes(raw_tar(*members, kind=tarfile.USTAR_FORMAT))
    refused(home, path, tmp_path)


def test_a_name_that_is_no_agents(home: BlockPoolBatchEngine, path: Path, tmp_path: Path) -> None:
    state = AgentState("../../evil", DEFAULT_SETTINGS, (line_of([1]),))
    content = Exported(FAMILY, "fake", "../../evil", encode_agent(state), ())
    write(path, content, {})
    assert "evil" in refused(home, path, tmp_path)
    assert home.import_agent(path, "good").agent_id == "good"


class TestRecords:
    """Sound files that are not what the agent needs, or not of the family that they claim."""

    def refused_records(
        self,
        home: BlockPoolBatchEngine,
        path: Path,
        tmp_path: Path,
        content: Exported,
        files: list[bytes],
    ) -> str:
        records = [record for record, _ in content.records]
        sizes = tuple((r, len(data)) for r, data in zip(records, files, strict=True))
        by_hash = {r.hash: data for r, data in zip(records, files, strict=True)}
        write(path, replace(content, records=sizes), by_hash)
        return refused(home, path, tmp_path)

    def test_of_another_prompt(
        self, home: BlockPoolBatchEngine, path: Path, tmp_path: Path
    ) -> None:
        content, files = exported_of(ids(300))
        other, others = exported_of(ids(300, 1))
        swapped = replace(content, records=other.records)
        problem = self.refused_records(home, path, tmp_path, swapped, list(others.values()))
        assert "no line" in problem
        assert files

    def test_without_what_they_follow(
        self, home: BlockPoolBatchEngine, path: Path, tmp_path: Path
    ) -> None:
        content, files = exported_of(ids(600))
        tail = replace(content, records=content.records[1:])
        problem = self.refused_records(home, path, tmp_path, tail, list(files.values())[1:])
        assert "follow" in problem

    def test_twice(self, home: BlockPoolBatchEngine, path: Path, tmp_path: Path) -> None:
        content, files = exported_of(ids(300))
        (first, nbytes), *_ = content.records
        write(path, replace(content, records=((first, nbytes), (first, nbytes))), files)
        assert "twice" in refused(home, path, tmp_path)

    @pytest.mark.parametrize(
        "family",
        [
            replace(FAMILY, fingerprint="other"),
            replace(FAMILY, lineage="q8"),
            replace(FAMILY, namespace="team"),
            KVFamily("fake", replace(FAKE_LAYOUT, dtype="float16")),
            KVFamily("fake", replace(FAKE_LAYOUT, layers=FAKE_LAYOUT.layers * 2)),
        ],
    )
    def test_of_another_family_than_the_manifest_says(
        self, home: BlockPoolBatchEngine, path: Path, tmp_path: Path, family: KVFamily
    ) -> None:
        content, _ = exported_of(ids(300))
        _, files = exported_of(ids(300), family)
        assert self.refused_records(home, path, tmp_path, content, list(files.values()))

    def test_torn(self, home: BlockPoolBatchEngine, path: Path, tmp_path: Path) -> None:
        content, files = exported_of(ids(300))
        for size in (0, 1, 8, 100, 1000):
            torn = [data[:size] for data in files.values()]
            assert self.refused_records(home, path, tmp_path, content, torn)

    def test_with_a_header_that_claims_the_world(
        self, home: BlockPoolBatchEngine, path: Path, tmp_path: Path
    ) -> None:
        content, files = exported_of(ids(300))
        for claim in (1 << 20, 1 << 63):
            lying = [claim.to_bytes(8, "little") + data[8:] for data in files.values()]
            assert self.refused_records(home, path, tmp_path, content, lying)

    def test_larger_than_any_could_be(
        self, home: BlockPoolBatchEngine, path: Path, tmp_path: Path
    ) -> None:
        content, files = exported_of(ids(300))
        large = [data + bytes(1 << 20) for data in files.values()]
        assert self.refused_records(home, path, tmp_path, content, large)


def answer_of(engine: BlockPoolBatchEngine, ticket: BundleTicket[Any]) -> Any:
    """The store's answer; its error is raised."""
    while ticket.answer is None:
        engine._commits.hear()
    if ticket.answer.error is not None:
        raise ticket.answer.error
    return ticket.answer


def test_a_file_that_changes_between_two_looks(
    home: BlockPoolBatchEngine, path: Path, tmp_path: Path
) -> None:
    write(path, *exported_of(ids(600)))
    terms = BundleTerms(replace(FAMILY, namespace="import:x"), "fake", VOCABULARY)
    store = home._store
    bundle = answer_of(home, store.read_bundle(path, terms)).bundle
    assert bundle is not None
    data = bytearray(path.read_bytes())
    data[data.index(b"records/00001") + 512 + 3000] ^= 1
    path.write_bytes(data)
    before = files_of(tmp_path / "home")
    with pytest.raises(BadBundle):
        answer_of(home, store.store_bundle(bundle, "ada"))
    assert files_of(tmp_path / "home") == before
    assert store.health().num_records == 0
    store.check()


@pytest.fixture(scope="module")
def sound_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, AgentState]:
    """A bundle with messages, side lines and records, as an engine writes it."""
    folder = tmp_path_factory.mktemp("sound")
    with AgentCacheStore(folder / "one") as store:
        engine = fake_engine(store=store, factory=FakeFactory(vocab_size=200))
        run(engine, agent_id="ada", messages=[user("Hello, 你好")], max_tokens=300)
        for salt in range(2):
            engine.submit(agent_id="ada", token_ids=ids(300, salt), max_tokens=2)
        drain(engine)
        engine.export("ada", folder / "ada")
        return (folder / "ada").read_bytes(), state_of(engine, "ada")


def test_five_hundred_damaged_bundles(
    home: BlockPoolBatchEngine,
    path: Path,
    tmp_path: Path,
    sound_bundle: tuple[bytes, AgentState],
) -> None:
    """One flipped bit, one lost or doubled piece, one overwritten run: each is noticed."""
    data, state = sound_bundle
    before = files_of(tmp_path) | {path.name}
    num_refused = 0
    for seed in range(500):
        path.write_bytes(damaged(data, random.Random(seed)))  # noqa: S311 - a test repeats its chances
        try:
            home.import_agent(path)
        except BadBundle:
            num_refused += 1
            continue
        except KeepwarmError as error:
            raise AssertionError(f"seed {seed}") from error
        assert state_of(home, "ada") == state, seed
        home.delete("ada")
        assert home.flush()
    assert files_of(tmp_path) == before
    assert home.snapshot().store.num_records == 0
    assert num_refused >= 490


def damaged(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    place = chance.randrange(len(data))
    length = chance.choice([1, 7, 512, 5000])
    way = chance.randrange(5)
    if way <= 1:
        changed[place] ^= 1 << chance.randrange(8)
    elif way == 2:
        del changed[place:]
    elif way == 3:
        del changed[place : place + length]
    else:
        changed[place : place + length] = chance.randbytes(min(length, len(data) - place))
    return bytes(changed)


def test_the_manifest_survives_its_own_reading() -> None:
    manifest = Manifest("ada", "f", "exact", "l", "t", 7, (1, 2)).sealed(b"agent")
    assert manifest.sealed(b"agent") == manifest
    assert manifest.sealed(b"Agent") != manifest
