"""The catalogue: what was committed comes back, only what is new is written, faults are typed."""

import random
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepwarm.core.block import BlockHash, child_hash
from keepwarm.core.errors import DamagedAgent, InvariantBroken
from keepwarm.core.layout import CacheLayout, LayerLayout
from keepwarm.core.ports import Message
from keepwarm.core.stored import (
    AgentSettings,
    AgentState,
    AgentSummary,
    KVFamily,
    LineState,
    Overflow,
    Record,
)
from keepwarm.core.transcript import NO_TEXT, Receipt, Span, Transcript, Turn
from keepwarm.store.catalog import recent, schema, seals
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.errors import (
    CatalogCorrupt,
    CatalogTooNew,
    CatalogUnavailable,
    UnstorableMessage,
)
from keepwarm.store.catalog.reader import CatalogReader
from keepwarm.store.catalog.rows import RecordRow
from keepwarm.store.catalog.schema import set_aside

FAMILY = KVFamily(
    "weights", CacheLayout((LayerLayout(3, 64, 64), LayerLayout(3, 64, 32)), "float32")
)
OTHER_FAMILY = replace(FAMILY, lineage="q8", namespace="team")
LAST_ID = 2**32 - 1
MARKER = "xyzzy-plugh"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "catalog.db"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    with Catalog.open(path) as catalog:
        yield catalog


def block_hash(number: int) -> BlockHash:
    return child_hash(BlockHash(b"root"), (number + 1,))


def line(transcript: Transcript, turns: tuple[Turn, ...] = (), **fields: Any) -> LineState:
    messages = turns[-1].messages if turns else ()
    defaults: dict[str, Any] = {"number": 0, "block_hashes": (), "last_used": len(turns)}
    return LineState(
        **{
            "tokenizer": "tok",
            "transcript": transcript,
            "messages": messages,
            "turns": turns,
            **defaults,
            **fields,
        }
    )


def agent(name: str, *lines: LineState, model: str = "", **fields: Any) -> AgentState:
    return AgentState(name, AgentSettings(**fields), lines, model)


def chat(name: str, num_turns: int, *, text: str = "t" * 200) -> Iterator[AgentState]:
    """The states of a chat, one for each turn; messages are new objects in every turn."""
    spans, turns = [NO_TEXT], list[Turn]()
    for index in range(num_turns):
        for role in ("user", "assistant"):
            spans.append(Span(f"<{role}>", (1,), is_special=True))
            spans.append(Span(f"{index} {text}", tuple(range(60))))
        transcript = Transcript(tuple(spans))
        conversation: tuple[Message, ...] = tuple(
            {"role": role, "content": f"{turn} {text}"}
            for turn in range(index + 1)
            for role in ("user", "assistant")
        )
        turns.append(Turn(transcript.num_tokens, conversation))
        hashes = tuple(block_hash(i) for i in range(transcript.num_tokens // 256))
        yield agent(name, line(transcript, tuple(turns), block_hashes=hashes))


def last(states: Iterator[AgentState]) -> AgentState:
    return list(states)[-1]


def record_row(number: int, family: KVFamily = FAMILY, maker: str | None = "ada") -> RecordRow:
    before = block_hash(number - 1)
    record = Record(block_hash(number), before, before, depth=number, start=0, stop=256)
    return RecordRow.of(record, family, file_bytes=1000 + number, maker=maker)


def written_bytes(catalog: Catalog, act: Callable[[], None]) -> int:
    """How much the act appends to an empty log."""
    catalog._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    act()
    return catalog.path.with_name("catalog.db-wal").stat().st_size


# -- what comes back -------------------------------------------------------------------------------

texts = st.text(st.characters(), max_size=12)  # lone surrogates included
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda children: st.lists(children, max_size=2) | st.dictionaries(texts, children, max_size=2),
    max_leaves=4,
)
messages = st.fixed_dictionaries({"role": st.just("user"), "content": texts | json_values})
conversations = st.none() | st.lists(messages, max_size=4).map(tuple)
token_ids = st.lists(st.integers(0, LAST_ID), max_size=5).map(tuple)
text_spans = st.builds(Span, st.none() | texts, token_ids, st.booleans())
special_spans = st.builds(
    lambda token_id: Span("<s>", (token_id,), is_special=True), st.integers(0, LAST_ID)
)
receipts = st.none() | st.builds(
    Receipt,
    *(texts.filter(lambda text: text.isprintable()) for _ in range(3)),
    *(st.integers(0, 99) for _ in range(3)),
)
hashes = st.lists(st.integers(0, 5).map(block_hash), max_size=4, unique=True).map(tuple)


@st.composite
def lines(draw: st.DrawFn, number: int, before: LineState | None) -> LineState:
    """A line that keeps a random part of the one before it, as a turn, rollback or edit does."""
    old = before or line(Transcript())
    spans = list(
        old.transcript.spans[: 2 * draw(st.integers(0, len(old.transcript.spans) // 2)) + 1]
    )
    for _ in range(draw(st.integers(0, 3))):
        spans += [draw(special_spans), draw(text_spans)]
    turns = list(old.turns[: draw(st.integers(0, len(old.turns)))])
    for _ in range(draw(st.integers(0, 2))):
        start = turns[-1].messages if turns and draw(st.booleans()) else ()
        more = draw(conversations)
        joined = None if more is None or start is None else (*map(dict, start), *more)
        turns.append(Turn(draw(st.integers(0, 99)), joined, draw(receipts)))
    return LineState(
        number=number,
        tokenizer=draw(st.sampled_from(["tok", "other"])),
        transcript=Transcript(tuple(spans)),
        messages=draw(conversations) if draw(st.booleans()) else old.messages,
        turns=tuple(turns),
        block_hashes=(*old.block_hashes[: draw(st.integers(0, 3))], *draw(hashes)),
        last_used=draw(st.integers(0, 2**62)),
    )


@st.composite
def states(draw: st.DrawFn, name: str, before: AgentState | None) -> AgentState:
    known = {old.number: old for old in before.lines} if before else {}
    numbers = draw(st.sets(st.integers(0, 3), max_size=3))
    agent_settings = st.builds(
        AgentSettings,
        st.booleans(),
        st.integers(-9, 9),
        st.none() | st.integers(0, 2**62),
        st.sampled_from(["exact", "q8"]),
        st.sampled_from(Overflow),
    )
    return AgentState(
        name,
        before.settings if before and draw(st.booleans()) else draw(agent_settings),
        tuple(draw(lines(number, known.get(number))) for number in sorted(numbers)),
        draw(st.sampled_from(["", "other", "org/a model"])),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_sequence_of_states_comes_back_equal(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("catalog") / "catalog.db"
    model: dict[str, AgentState] = {}
    with Catalog.open(path) as catalog, CatalogReader.open(path) as reader:
        for _ in range(data.draw(st.integers(1, 6))):
            name = data.draw(st.sampled_from(["ada", "bob", "çağ"]))
            action = data.draw(st.sampled_from(["commit", "commit", "fork", "forget", "delete"]))
            if action == "commit":
                model[name] = data.draw(states(name, model.get(name)))
            elif action == "fork" and model:
                parent = data.draw(st.sampled_from(sorted(model)))
                model[name] = replace(model[parent], agent_id=name)
            elif action == "delete":
                model.pop(name, None)
                catalog.delete_agent(name, scrub=False)
            if action == "forget":
                catalog._recent.take(name)
            elif name in model:
                catalog.commit(model[name])
            assert {name: reader.load_agent(name) for name in reader.names()} == model
            catalog.check()
    with Catalog.open(path) as catalog:
        assert {name: catalog.load_agent(name) for name in catalog.names()} == model
        catalog.check()


def test_two_lone_surrogates_do_not_become_one_letter(catalog: Catalog) -> None:
    halves = "\ud83d\ude00"
    turns = (Turn(1, ({"role": "user", "content": halves},)),)
    catalog.commit(agent("ada", line(Transcript((Span(halves, (LAST_ID,)),)), turns)))
    loaded = catalog.load_agent("ada")
    assert loaded is not None
    assert loaded.lines[0].transcript.spans[0].text == halves
    assert loaded.lines[0].messages == ({"role": "user", "content": halves},)


def test_no_messages_and_unknown_messages_are_two_things(catalog: Catalog) -> None:
    state = agent("ada", line(Transcript(), (Turn(0, ()), Turn(0, None)), messages=()))
    catalog.commit(state)
    loaded = catalog.load_agent("ada")
    assert loaded is not None
    assert [turn.messages for turn in loaded.lines[0].turns] == [(), None]
    assert loaded.lines[0].messages == ()


def test_an_agent_that_was_never_committed_is_none(catalog: Catalog) -> None:
    assert catalog.load_agent("nobody") is None


def test_a_message_that_is_not_json_is_refused_and_nothing_is_kept(catalog: Catalog) -> None:
    first, second = chat("ada", 2)
    catalog.commit(first)
    bad = replace(second.lines[0], messages=({"role": "user", "content": object()},))
    with pytest.raises(UnstorableMessage):
        catalog.commit(agent("ada", bad))
    assert catalog.load_agent("ada") == first
    catalog.commit(second)
    assert catalog.load_agent("ada") == second
    catalog.check()


def test_lines_out_of_order_are_a_bug(catalog: Catalog) -> None:
    side, main = line(Transcript(), number=1), line(Transcript())
    with pytest.raises(InvariantBroken, match="in this order"):
        catalog.commit(agent("ada", side, main))


def test_summaries_are_of_the_main_line(catalog: Catalog, path: Path) -> None:
    (main,) = last(chat("ada", 3)).lines
    side = line(Transcript((Span("x", (1, 2)),)), number=2, last_used=9)
    catalog.commit(agent("ada", main, side, pinned=True, quota_bytes=5))
    catalog.commit(agent("empty", model="other"))
    settings = AgentSettings(pinned=True, quota_bytes=5)
    expected = [
        AgentSummary("ada", settings, 366, num_turns=3, num_lines=2, last_used=9),
        AgentSummary(
            "empty", AgentSettings(), 0, num_turns=0, num_lines=0, last_used=0, model="other"
        ),
    ]
    assert catalog.summaries() == expected
    with CatalogReader.open(path) as reader:
        assert reader.summaries() == expected
        assert reader.names() == ["ada", "empty"]
    assert catalog.clock() == 9


# -- only what is new ------------------------------------------------------------------------------


def test_a_late_turn_costs_what_an_early_one_does(catalog: Catalog) -> None:
    costs, rows = [], []
    for state in chat("ada", 50):
        before = catalog._db.total_changes
        costs.append(written_bytes(catalog, partial(catalog.commit, state)))
        rows.append(catalog._db.total_changes - before)
    assert max(rows[5:]) <= max(rows[:5])
    assert sum(costs[40:]) <= 1.5 * sum(costs[5:15])
    assert max(costs) < 64 * 1024


def test_a_late_turn_costs_the_same_after_a_restart(path: Path) -> None:
    *earlier, state = chat("ada", 50)
    with Catalog.open(path) as catalog:
        catalog.commit(earlier[-1])
    with Catalog.open(path) as catalog:
        before = catalog._db.total_changes
        catalog.commit(state)
        assert catalog._db.total_changes - before < 15


def test_the_same_state_writes_nothing(catalog: Catalog) -> None:
    state, again = last(chat("ada", 3)), last(chat("ada", 3))
    catalog.commit(state)
    before = catalog._db.total_changes
    assert written_bytes(catalog, lambda: catalog.commit(again)) == 0
    catalog._recent.take("ada")
    assert written_bytes(catalog, lambda: catalog.commit(state)) == 0
    assert catalog._db.total_changes == before


def test_rolling_back_removes_what_no_turn_needs(catalog: Catalog) -> None:
    early, *_, late = chat("ada", 5)
    catalog.commit(late)
    catalog.commit(early)
    assert catalog.load_agent("ada") == early
    for table, rows in {"messages": 2, "turns": 1, "spans": 5, "line_blocks": 0}.items():
        assert catalog._db.execute(f"SELECT count(*) FROM {table}").fetchone() == (rows,)


def test_turns_that_only_became_shorter_keep_their_messages(catalog: Catalog) -> None:
    state = last(chat("ada", 4))
    catalog.commit(state)
    (main,) = state.lines
    shorter = tuple(replace(turn, num_tokens=turn.num_tokens - 1) for turn in main.turns)
    stripped = agent("ada", replace(main, turns=shorter))
    before = catalog._db.total_changes
    catalog.commit(stripped)
    assert catalog._db.total_changes - before == len(shorter)
    assert catalog.load_agent("ada") == stripped
    catalog.check()


def test_few_agents_and_tokens_are_remembered(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recent, "MAX_RECENT_AGENTS", 2)
    monkeypatch.setattr(recent, "MAX_RECENT_TOKENS", 1000)
    for name in ("a", "b", "c"):
        catalog.commit(last(chat(name, 1)))
    assert [known.state.agent_id for known in catalog._recent] == ["b", "c"]
    catalog.commit(last(chat("long", 20)))
    assert [known.state.agent_id for known in catalog._recent] == ["long"]


# -- deleting --------------------------------------------------------------------------------------


def traces(path: Path) -> int:
    files = (path.with_name(path.name + suffix) for suffix in ("", "-wal"))
    return sum(file.read_bytes().count(MARKER.encode()) for file in files if file.exists())


def test_no_trace_of_a_deleted_agent_is_left(path: Path) -> None:
    """Agents grow side by side, so that SQLite splits and merges pages of both."""
    rng = random.Random(5)  # noqa: S311
    with Catalog.open(path) as catalog:
        chats = [chat(f"open-{i}", 12, text="o" * rng.randrange(600)) for i in range(8)]
        chats += [chat(f"{MARKER}-{i}", 12, text=MARKER * rng.randrange(30)) for i in range(8)]
        while chats:
            growing = rng.choice(chats)
            state = next(growing, None)
            if state is None:
                chats.remove(growing)
            else:
                catalog.commit(state)
        catalog.add_records([record_row(1, maker=f"{MARKER}-0"), record_row(2, maker="open-1")])
        assert traces(path)
        for index in range(8):
            catalog.delete_agent(f"{MARKER}-{index}", scrub=False)
        assert catalog.needs_scrub
    with Catalog.open(path) as catalog:
        assert catalog.needs_scrub
        catalog.delete_agent(f"{MARKER}-0")
        assert not catalog.needs_scrub
        assert traces(path) == 0
        assert [row.maker for row in catalog.load_records()] == [None, "open-1"]
        assert catalog.names() == [f"open-{i}" for i in range(8)]
        catalog.check()


def test_a_deleted_agent_may_come_back_as_another(catalog: Catalog) -> None:
    catalog.commit(last(chat("ada", 3)))
    catalog.delete_agent("ada")
    assert catalog.load_agent("ada") is None
    assert catalog.names() == []
    state = last(chat("ada", 1, text="anew"))
    catalog.commit(state)
    assert catalog.load_agent("ada") == state
    catalog.check()


def test_a_reader_in_the_way_of_a_scrub_is_named(catalog: Catalog, path: Path) -> None:
    catalog._db.execute("PRAGMA busy_timeout=0")
    catalog.commit(last(chat("ada", 1)))
    with CatalogReader.open(path) as reader, reader._snapshot("hold"):
        reader._db.execute("SELECT * FROM agents").fetchall()
        with pytest.raises(CatalogUnavailable) as caught:
            catalog.delete_agent("ada")
        assert caught.value.errorname == "SQLITE_BUSY"
    assert catalog.needs_scrub
    catalog.delete_agent("ada")
    assert not catalog.needs_scrub


# -- records ---------------------------------------------------------------------------------------


def test_records_come_back_in_the_order_of_their_creation(path: Path) -> None:
    rows = [record_row(3), record_row(1, OTHER_FAMILY, maker=None), record_row(2)]
    with Catalog.open(path) as catalog:
        catalog.add_records([])
        catalog.add_records(rows[:2])
        catalog.add_records(row for row in rows[2:])
        assert catalog.load_records() == rows
    with Catalog.open(path) as catalog:
        assert catalog.load_records() == rows
        assert catalog.load_records()[0].record == rows[0].record
        catalog.add_records([rows[0]._replace(file_bytes=7)])
        assert catalog.load_records() == [*rows[1:], rows[0]._replace(file_bytes=7)]
        catalog.remove_records([rows[1].hash, block_hash(99)])
        catalog.remove_records([])
        assert [row.hash for row in catalog.load_records()] == [rows[2].hash, rows[0].hash]
        catalog.check()


def test_usage_counts_lines_over_all_agents(catalog: Catalog) -> None:
    shared, own, pinned = block_hash(1), block_hash(2), block_hash(3)
    main = line(Transcript(), block_hashes=(shared, own), last_used=4)
    side = line(Transcript(), number=1, block_hashes=(shared,), last_used=6)
    catalog.commit(agent("ada", main, side))
    catalog.commit(agent("bob", replace(main, block_hashes=(shared, pinned)), pinned=True))
    usage = catalog.load_usage()
    assert usage.num_lines == {shared: 3, own: 1, pinned: 1}
    assert usage.last_used == {shared: 6, own: 4, pinned: 4}


def test_the_log_stays_small_and_the_files_private(catalog: Catalog, path: Path) -> None:
    catalog.add_records([record_row(i) for i in range(20_000)])
    for number in range(20_000, 30_000, 100):
        catalog.add_records([record_row(i) for i in range(number, number + 100)])
    files = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm")]
    assert files[1].stat().st_size < 3 << 20
    assert catalog.size_bytes() == sum(file.stat().st_size for file in files)
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 3


def test_the_connection_is_set_up_as_promised(catalog: Catalog) -> None:
    pragmas = {"journal_mode": "wal", "page_size": 4096, "secure_delete": 1, "foreign_keys": 1}
    for name, value in pragmas.items():
        assert catalog._db.execute(f"PRAGMA {name}").fetchone() == (value,)
    catalog.commit(agent("ada"))
    assert catalog._db.execute("PRAGMA synchronous").fetchone() == (2,)
    catalog.add_records([record_row(1)])
    assert catalog._db.execute("PRAGMA synchronous").fetchone() == (1,)


def test_a_reader_cannot_write(catalog: Catalog, path: Path) -> None:
    with CatalogReader.open(path) as reader, pytest.raises(sqlite3.OperationalError):
        reader._db.execute("DELETE FROM agents")


# -- opening ---------------------------------------------------------------------------------------


def add_note(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE agents ADD COLUMN note TEXT NOT NULL DEFAULT 'migrated'")


def test_an_older_catalogue_is_migrated(path: Path) -> None:
    state = last(chat("ada", 3))
    with Catalog.open(path) as catalog:
        catalog.commit(state)
    with Catalog.open(path, (*schema.STEPS, add_note)) as catalog:
        assert catalog._db.execute("SELECT note FROM agents").fetchall() == [("migrated",)]
        assert catalog._db.execute("PRAGMA user_version").fetchone() == (len(schema.STEPS) + 1,)
        assert catalog.load_agent("ada") == state


def test_agents_of_before_there_were_models_are_at_the_default_one(path: Path) -> None:
    old = schema.open_for_writing(path, schema.STEPS[:2])
    old.execute("INSERT INTO agents VALUES (1, 'ada', 1, 3, NULL, 'exact', 'error')")
    old.close()
    with Catalog.open(path) as catalog:
        assert catalog.load_agent("ada") == agent("ada", pinned=True, priority=3)
        assert catalog.find_damaged() == {}


def test_rows_of_before_there_were_seals_are_sealed_as_they_are(path: Path) -> None:
    states = [last(chat("ada", 3)), last(chat("bob", 2))]
    with Catalog.open(path) as catalog:
        for state in states:
            catalog.commit(state)
        catalog.add_records([record_row(number) for number in range(3)])
        for table in seals.COLUMNS:
            catalog._db.execute(f"ALTER TABLE {table} DROP COLUMN seal")
        catalog._db.execute("ALTER TABLE agents DROP COLUMN num_lines")
        catalog._db.execute(f"PRAGMA user_version={len(schema.STEPS) - 1}")
    with Catalog.open(path) as catalog:
        assert [catalog.load_agent(state.agent_id) for state in states] == states
        assert catalog.load_records() == [record_row(number) for number in range(3)]
        catalog.check()


def test_a_failed_migration_changes_nothing(path: Path) -> None:
    def fail(db: sqlite3.Connection) -> None:
        raise RuntimeError("half way")

    Catalog.open(path).close()
    with pytest.raises(RuntimeError, match="half way"):
        Catalog.open(path, (*schema.STEPS, add_note, fail))
    with Catalog.open(path) as catalog:
        columns = [row[1] for row in catalog._db.execute("PRAGMA table_info(agents)")]
        assert "note" not in columns


def test_a_newer_catalogue_is_left_alone(path: Path) -> None:
    Catalog.open(path, (*schema.STEPS, add_note)).close()
    before = path.read_bytes()
    with pytest.raises(CatalogTooNew, match="newer Keepwarm") as caught:
        Catalog.open(path)
    known = len(schema.STEPS)
    facts = (caught.value.path, caught.value.found, caught.value.supported)
    assert facts == (path, known + 1, known)
    assert path.read_bytes() == before


def full_of_records(path: Path) -> None:
    with Catalog.open(path) as catalog:
        catalog.add_records([record_row(i) for i in range(2000)])


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database" * 1000)


def garbage_tables(path: Path) -> None:
    full_of_records(path)
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))


def cut_short(path: Path) -> None:
    full_of_records(path)
    path.write_bytes(path.read_bytes()[:4096])


def foreign(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE bookmarks (url)")
    db.close()


def without_a_table(path: Path) -> None:
    Catalog.open(path).close()
    db = sqlite3.connect(path)
    db.execute("DROP TABLE spans")
    db.close()


@pytest.mark.parametrize(
    "damage",
    [garbage, garbage_tables, cut_short, foreign, without_a_table],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_file_is_typed_and_can_be_set_aside(
    path: Path, damage: Callable[[Path], None]
) -> None:
    damage(path)
    before = path.read_bytes()
    with pytest.raises(CatalogCorrupt) as caught:
        Catalog.open(path)
    assert caught.value.path == path
    moved = set_aside(path)
    assert not path.exists()
    assert moved.read_bytes() == before
    with Catalog.open(path) as catalog:
        assert catalog.names() == []
        catalog.check()


def test_damage_in_the_middle_is_found_by_reading(path: Path) -> None:
    full_of_records(path)
    data = bytearray(path.read_bytes())
    half = len(data) // 2 // 4096 * 4096
    data[half : half + 20 * 4096] = b"\xa5" * (20 * 4096)
    path.write_bytes(data)
    with Catalog.open(path) as catalog, pytest.raises(CatalogCorrupt):
        catalog.load_records()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE messages SET json = '{'",
        "UPDATE messages SET parent = 7",
        "UPDATE turns SET head = 9",
        "UPDATE spans SET token_ids = x'010203'",
        "UPDATE spans SET text = x'ff'",
    ],
)
@pytest.mark.parametrize("is_sealed", [False, True])
def test_rows_that_cannot_be_decoded_are_damage_and_are_written_anew(
    catalog: Catalog, damage: str, is_sealed: bool
) -> None:
    catalog.commit(last(chat("bob", 2)))
    catalog.commit(last(chat("ada", 2)))
    catalog._recent.take("ada")
    catalog._db.execute(damage.replace("'{'", "x'7b'"))
    if is_sealed:
        seals.seal_all(catalog._db)
    with pytest.raises(DamagedAgent, match="ada"):
        catalog.load_agent("ada")
    state = last(chat("ada", 1))
    catalog.commit(state)
    catalog._recent.take("ada")
    assert catalog.load_agent("ada") == state


def test_damaged_rows_about_records_are_dropped(path: Path) -> None:
    full_of_records(path)
    with Catalog.open(path) as catalog:
        catalog.add_records([record_row(5000, OTHER_FAMILY)])
        catalog._db.execute("UPDATE records SET stop = 1 << 40 WHERE depth = 7")
        catalog._db.execute("UPDATE records SET hash = x'00' WHERE depth = 8")
        catalog._db.execute("UPDATE families SET layout = '{}' WHERE lineage = 'q8'")
    with Catalog.open(path) as catalog:
        rows = catalog.load_records()
        assert rows == [record_row(number) for number in range(2000) if number not in (7, 8)]
        catalog.add_records([record_row(7), record_row(5000, OTHER_FAMILY)])
    with Catalog.open(path) as catalog:
        assert len(catalog.load_records()) == 2000
        catalog.check()


def test_set_aside_takes_the_log_along_and_never_overwrites(path: Path) -> None:
    for number in (1, 2):
        for suffix in ("", "-wal", "-shm"):
            path.with_name(path.name + suffix).write_text(f"{number}{suffix}")
        moved = set_aside(path)
        assert moved.name == f"catalog.db.aside-{number}"
        assert moved.with_name(f"{moved.name}-wal").read_text() == f"{number}-wal"
        assert moved.with_name(f"{moved.name}-shm").read_text() == f"{number}-shm"
    assert [p for p in path.parent.iterdir() if "aside" not in p.name] == []


def test_a_log_whose_database_was_moved_is_not_believed(path: Path) -> None:
    with Catalog.open(path) as catalog:
        catalog.commit(last(chat("ada", 1)))
        log = path.with_name("catalog.db-wal").read_bytes()
    path.unlink()
    path.with_name("catalog.db-wal").write_bytes(log)
    with Catalog.open(path) as catalog:
        assert catalog.names() == []


def test_a_place_that_cannot_hold_a_file_is_unavailable(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing" / "catalog.db"):
        with pytest.raises(CatalogUnavailable) as caught:
            Catalog.open(place)
        assert caught.value.operation == "open"
    with pytest.raises(CatalogUnavailable):
        CatalogReader.open(tmp_path / "none.db")


# -- a disk that refuses ---------------------------------------------------------------------------


def limited_pages(catalog: Catalog) -> Callable[[], None]:
    (pages,) = catalog._db.execute("PRAGMA page_count").fetchone()
    catalog._db.execute(f"PRAGMA max_page_count={pages}")
    return lambda: catalog._db.execute("PRAGMA max_page_count=1000000") and None


def limited_file(catalog: Catalog) -> Callable[[], None]:
    """The kernel refuses to extend any file of this process beyond what the log has."""
    catalog._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_only(catalog: Catalog) -> Callable[[], None]:
    catalog._db.execute("PRAGMA query_only=ON")
    return lambda: catalog._db.execute("PRAGMA query_only=OFF") and None


@pytest.mark.parametrize(
    ("fail", "errorname"),
    [
        (limited_pages, "SQLITE_FULL"),
        (limited_file, "SQLITE_IOERR_WRITE"),
        (read_only, "SQLITE_READONLY"),
    ],
)
def test_a_refused_commit_keeps_nothing_and_can_be_tried_again(
    catalog: Catalog, fail: Callable[[Catalog], Callable[[], None]], errorname: str
) -> None:
    small, large = last(chat("ada", 2)), last(chat("ada", 60))
    catalog.commit(small)
    end = fail(catalog)
    try:
        for _ in range(2):
            with pytest.raises(CatalogUnavailable) as caught:
                catalog.commit(large)
            assert (caught.value.operation, caught.value.errorname) == ("commit", errorname)
            assert catalog.load_agent("ada") == small
        with pytest.raises(CatalogUnavailable):
            catalog.add_records([record_row(i) for i in range(500)])
        assert catalog.load_records() == []
    finally:
        end()
    catalog.commit(large)
    catalog.add_records([record_row(1)])
    assert catalog.load_agent("ada") == large
    catalog.check()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_state_until_there_is_room(tiny_disk: Path) -> None:
    ballast = tiny_disk / "ballast"
    ballast.write_bytes(bytes(150_000))
    with Catalog.open(tiny_disk / "catalog.db") as catalog:
        committed = None
        for state in chat("ada", 200):
            try:
                catalog.commit(state)
            except CatalogUnavailable as error:
                assert error.errorname == "SQLITE_FULL"
                break
            committed = state
        assert catalog.load_agent("ada") == committed
        ballast.unlink()
        catalog.commit(state)
        assert catalog.load_agent("ada") == state
        catalog.check()
    with Catalog.open(tiny_disk / "catalog.db") as catalog:
        assert catalog.load_agent("ada") == state


# -- a process that dies ---------------------------------------------------------------------------

COMMITTER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_catalog import Catalog, chat, record_row
with Catalog.open(Path(sys.argv[1])) as catalog:
    for number, state in enumerate(chat("ada", 100_000), 1):
        catalog.add_records([record_row(number)])
        catalog.commit(state)
        print(number, flush=True)
"""


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_process_loses_nothing_that_it_had_acknowledged(path: Path, seed: int) -> None:
    num_turns = random.Random(seed).randrange(1, 120)  # noqa: S311
    folder = str(Path(__file__).parent)
    child = subprocess.Popen(
        [sys.executable, "-c", COMMITTER, str(path), folder], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child, child.stdout as acknowledged:
        for _ in range(num_turns):
            acknowledged.readline()
        child.kill()
        last_turn = max([num_turns, *map(int, acknowledged.read().split())])
    with Catalog.open(path) as catalog:
        state = catalog.load_agent("ada")
        assert state is not None
        num_kept = len(state.lines[0].turns)
        assert num_kept in (last_turn, last_turn + 1)
        assert state == last(chat("ada", num_kept))
        assert len(catalog.load_records()) in (num_kept, num_kept + 1)
        catalog.check()


# -- bookkeeping that contradicts itself -----------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE lines SET num_tokens = num_tokens + 1",
        "UPDATE lines SET num_turns = num_turns + 1",
        "UPDATE lines SET head = 77",
        "DELETE FROM spans WHERE position = 1",
        "UPDATE spans SET is_special = 1 - is_special",
        "DELETE FROM turns WHERE position = 0",
        "DELETE FROM line_blocks WHERE depth = 0",
        "UPDATE line_blocks SET hash = x'00'",
        "DELETE FROM messages WHERE node = 1",
        "INSERT INTO messages SELECT line, 99, node, json, 0 FROM messages LIMIT 1",
        "DELETE FROM agents",
        "UPDATE agents SET priority = 3",
    ],
)
def test_check_finds_what_contradicts(catalog: Catalog, damage: str) -> None:
    catalog.commit(last(chat("ada", 10)))
    catalog.check()
    catalog._db.execute("PRAGMA foreign_keys=OFF")
    catalog._db.execute(damage)
    with pytest.raises(InvariantBroken):
        catalog.check()
