"""Agents that go to another machine in one file, and agents that come from one."""

import logging
import secrets
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from keepwarm.core.agent import PRIVATE, home_namespace, in_namespace
from keepwarm.core.agent_store import AgentStore, BundleAnswer, BundleTicket
from keepwarm.core.errors import (
    AgentExists,
    BadBundle,
    DamagedAgent,
    InvalidRequest,
    InvariantBroken,
)
from keepwarm.core.ports import LoadedModel, Tokenizer
from keepwarm.core.steps import Pause, Steps
from keepwarm.core.stored import (
    AgentState,
    Bundle,
    BundleStored,
    BundleTerms,
    BundleWritten,
    KVFamily,
    LineState,
)
from keepwarm.core.transcript import Span, Transcript
from keepwarm.engine.agents.agent import Agent, Line, Place
from keepwarm.engine.agents.agent_state import agent_of, state_of
from keepwarm.engine.agents.book import AgentBook
from keepwarm.engine.agents.commits import Commits
from keepwarm.engine.jobs import Jobs
from keepwarm.engine.requests import valid_agent_id, valid_namespace

T = TypeVar("T")

NAMELESS = "damaged"
"""The name in its file of an agent whose own name was damaged."""
VOUCH_TOKENS = 1024
"""Looked at in a step: a few milliseconds."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """An agent in a file.

    `num_tokens` of its lines have their KV in it; that of `num_left_out` more was in memory, and
    the disk had not taken it. `damage`: why it is not all that was said.
    """

    agent_id: str
    path: Path
    file_bytes: int
    num_records: int
    num_tokens: int
    num_left_out: int
    damage: str = ""


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """An agent out of a file.

    `num_tokens`: of its main line. `num_records` of KV were stored; `num_dropped` were of another
    model or layout, and `num_left_out` did not fit. `is_durable`: the agent is on disk.
    """

    agent_id: str
    num_tokens: int
    num_turns: int
    num_records: int
    num_dropped: int
    num_left_out: int
    is_durable: bool


class Transfers:
    """Exports and imports agents, between the engine's steps: the store's thread does the work."""

    def __init__(
        self,
        loaded: LoadedModel,
        family: KVFamily,
        place: Place,
        *,
        store: AgentStore,
        commits: Commits,
        book: AgentBook,
        jobs: Jobs,
    ) -> None:
        self._tokenizer = loaded.tokenizer
        self._vocab_size = loaded.vocab_size
        self._family = family
        self._place = place
        self._tiers = place.tiers
        self._store = store
        self._commits = commits
        self._book = book
        self._jobs = jobs
        self._arriving: set[str] = set()

    def export(self, agent_id: str, path: Path | str, *, timeout_s: float = 30.0) -> ExportSummary:
        """Write the agent with its KV into one file, for another machine.

        It may be in the middle of a reply: then the file has it as its last turn left it. What the
        disk has not taken within `timeout_s` is left out and counted. Waits for the disk, and
        nothing else runs meanwhile; see `begin_export`. Raises UnknownAgent, NoAgentStore,
        BundleFailed.
        """
        answer: Future[ExportSummary] = Future()
        self.begin_export(agent_id, path, answer, timeout_s=timeout_s)
        return self._wait_for(answer)

    def begin_export(
        self,
        agent_id: str,
        path: Path | str,
        answer: "Future[ExportSummary]",
        *,
        timeout_s: float = 30.0,
    ) -> None:
        """Begin an export between steps: `answer` gets what `export` returns or raises.

        Cancelling `answer` ends the export, which then leaves no file.
        """
        self._jobs.begin(self._exporting(agent_id, Path(path), timeout_s), answer)

    def import_agent(
        self, path: Path | str, agent_id: str | None = None, *, namespace: str = ""
    ) -> ImportSummary:
        """Make an agent of a file that `export` wrote, anywhere; None keeps its name.

        `namespace` is then that of the name.

        Other agents find its KV only after `verify` has recomputed it. From another model only
        what was said is kept. Waits for the disk, and nothing else runs meanwhile; see
        `begin_import`.
        Raises BadBundle (nothing is left behind), AgentExists, InvalidRequest, NoAgentStore,
        BundleFailed.
        """
        answer: Future[ImportSummary] = Future()
        self.begin_import(path, agent_id, answer, namespace=namespace)
        return self._wait_for(answer)

    def begin_import(
        self,
        path: Path | str,
        agent_id: str | None,
        answer: "Future[ImportSummary]",
        *,
        namespace: str = "",
    ) -> None:
        """Begin an import between steps: `answer` gets what `import_agent` returns or raises.

        Cancelling `answer` before the agent is there leaves nothing behind.
        """
        steps = self._importing(Path(path), agent_id, valid_namespace(namespace))
        self._jobs.begin(steps, answer)

    def _exporting(self, agent_id: str, path: Path, timeout_s: float) -> Steps[ExportSummary]:
        """Return the agent as its last turn left it, whatever it does meanwhile.

        What the disk has not taken within `timeout_s` is left out and counted; of a damaged agent,
        what cannot be read.
        """
        try:
            agent = self._book.get_staying(agent_id)
        except DamagedAgent as error:
            return (yield from self._exporting_rest(agent_id, path, error.problem))
        if agent.place is not self._place:
            agent = self._book.bring(agent_id, self._place, "export it")
        state = self._exported(agent)
        held = {line.number: line.num_held() for line in agent.lines}
        yield from self._saving(agent, timeout_s)
        written = yield from self._writing(state, path)
        own = [line for line in state.lines if line.tokenizer == self._tokenizer.fingerprint]
        stored = {line.number: self._num_stored(line) for line in own}
        missing = (max(held[number] - num, 0) for number, num in stored.items())
        return ExportSummary(
            agent_id,
            path,
            written.file_bytes,
            written.num_records,
            sum(stored.values()),
            sum(missing),
        )

    def _importing(
        self,
        path: Path,
        agent_id: str | None,
        namespace: str,
    ) -> Steps[ImportSummary]:
        """Make the agent; only it finds its KV before that was verified. None keeps its name."""
        valid_agent_id(agent_id)
        if agent_id is not None:
            self._check_is_new(agent_id)
        terms = private_terms(self._family, self._tokenizer.fingerprint, self._vocab_size)
        bundle = (yield from _answered(self._store.read_bundle(path, terms))).bundle
        if bundle is None:
            raise InvariantBroken(f"the store answered for {path} without a bundle")
        name = agent_id or in_namespace(namespace, name_of(bundle))
        self._check_is_new(name)
        self._arriving.add(name)
        try:
            bundle = yield from vouched_for(bundle, self._tokenizer)
            agent, stored = yield from self._taking_in(bundle, name)
        finally:
            self._arriving.remove(name)
        return ImportSummary(
            agent_id=name,
            num_tokens=agent.main.transcript.num_tokens,
            num_turns=len(agent.turns),
            num_records=stored.num_records,
            num_dropped=bundle.num_dropped,
            num_left_out=len(bundle.records) - stored.num_records,
            is_durable=(yield from self._commits.committed(agent)),
        )

    def log_unsaved(self) -> None:
        """Warn of KV that is lost with this process; what was said is not."""
        for agent in self._book:
            if agent.place is not self._place:
                continue
            num_unsaved = sum(map(self._num_unsaved, agent.lines))
            if num_unsaved:
                _log.warning(
                    "the disk has not taken the KV of %s tokens of agent %r: it is computed again",
                    f"{num_unsaved:,}",
                    agent.agent_id,
                )

    # -- inside ----------------------------------------------------------------------------------

    def _wait_for(self, answer: "Future[T]") -> T:
        while not answer.done():
            if not self._jobs.is_ready:
                self._commits.hear()
            self._tiers.save_some()
            self._jobs.advance()
        return answer.result()

    def _exporting_rest(self, agent_id: str, path: Path, damage: str) -> Steps[ExportSummary]:
        """Export what can be read of a damaged agent. Raises DamagedAgent where that is nothing."""
        state = self._store.salvage_agent(agent_id)
        try:
            valid_agent_id(agent_id)
        except InvalidRequest:  # the name is what was damaged
            state = replace(state, agent_id=NAMELESS)
        written = yield from self._writing(state, path)
        stored = self._tiers.saves.stored_tokens
        own = [line for line in state.lines if line.tokenizer == self._tokenizer.fingerprint]
        num_stored = sum(stored(line.transcript.token_ids, line.namespace) for line in own)
        return ExportSummary(
            agent_id, path, written.file_bytes, written.num_records, num_stored, 0, damage
        )

    def _exported(self, agent: Agent) -> AgentState:
        """Return the agent's state without what was taken back, which another tokenizer's line
        still has.

        A bundle does not say which line was used last: it is the one that knows the most.
        """
        state, own = state_of(agent), self._place.tokenizer
        lines = (s for s in state.lines if s.tokenizer == own or _is_part_of(agent.main, s))
        return replace(state, lines=tuple(lines))

    def _writing(self, state: AgentState, path: Path) -> Steps[BundleWritten]:
        ticket = self._store.write_bundle(self._family, self._tokenizer.fingerprint, state, path)
        return (yield from _answered(ticket))

    def _saving(self, agent: Agent, timeout_s: float) -> Steps[None]:
        """Wait until the disk has taken the KV of what was said, unless it refuses or is slow."""
        saves, until = self._tiers.saves, time.monotonic() + timeout_s
        names = [
            name for line in agent.lines for name in saves.offer_first(line.blocks, line.num_held())
        ]
        while any(map(saves.is_unsaved, names)) and time.monotonic() < until:
            if self._store.health().fault is not None:
                return
            yield Pause.WAITING

    def _taking_in(self, bundle: Bundle, name: str) -> Steps[tuple[Agent, BundleStored]]:
        """Store the KV, and then the agent itself, unless its name was taken meanwhile."""
        ticket = self._store.store_bundle(bundle, name)
        stored = yield from _answered(ticket)
        try:
            self._check_is_new(name, is_own=True)
        except AgentExists:
            ticket.cancel()
            raise
        state = imported_state(bundle, name, stored.num_records)
        return self._book.add(agent_of(state, self._place)), stored

    def _check_is_new(self, name: str, *, is_own: bool = False) -> None:
        self._book.check_is_new(name)
        if name in self._arriving and not is_own:
            raise AgentExists(name)

    def _num_unsaved(self, line: Line) -> int:
        """Return how many of the line's tokens have their KV in memory only."""
        stored = self._tiers.saves.stored_tokens
        return max(line.num_held() - stored(line.transcript.token_ids, line.blocks.namespace), 0)

    def _num_stored(self, line: LineState) -> int:
        return self._tiers.saves.stored_tokens(line.transcript.token_ids, line.namespace)


def private_terms(family: KVFamily, tokenizer: str, vocab_size: int) -> BundleTerms:
    """Make terms under which no other agent can find the imported KV."""
    namespace = f"{PRIVATE}{secrets.token_hex(16)}"
    return BundleTerms(replace(family, namespace=namespace), tokenizer, vocab_size)


def name_of(bundle: Bundle) -> str:
    """Return the name that the agent had where it came from. Raises BadBundle."""
    try:
        valid_agent_id(bundle.state.agent_id)
    except InvalidRequest as error:
        raise BadBundle(bundle.path, error.problem) from error
    return bundle.state.agent_id


def vouched_for(bundle: Bundle, tokenizer: Tokenizer) -> Steps[Bundle]:
    """Return the bundle after a look at what its ids say, where they are this tokenizer's.

    Nothing of others' is believed. A step looks at a few messages.
    """
    lines: list[LineState] = []
    num_tokens = 0
    for line in bundle.state.lines:
        is_readable = line.tokenizer == tokenizer.fingerprint
        spans: list[Span] = []
        for span in line.transcript.spans:
            spans.append(span.checked(tokenizer.detokenizer if is_readable else None))
            num_tokens += len(span.token_ids)
            if num_tokens >= VOUCH_TOKENS:
                num_tokens = 0
                yield Pause.READY
        lines.append(replace(line, transcript=Transcript(tuple(spans))))
    return replace(bundle, state=replace(bundle.state, lines=tuple(lines)))


def imported_state(bundle: Bundle, agent_id: str, num_records: int) -> AgentState:
    """Return the agent under its name here; lines without any KV have no secrets to keep.

    Its main line stays its main line. Under another name than it had it is another agent, and none
    of its receipts is its own.
    """
    home = home_namespace(agent_id)
    is_same = in_namespace("", agent_id) == in_namespace("", bundle.state.agent_id)
    lines = tuple(
        replace(
            line,
            namespace=line.namespace if num_records and line.namespace else home,
            turns=line.turns if is_same else tuple(turn.without_receipt() for turn in line.turns),
        )
        for line in bundle.state.lines
    )
    return replace(bundle.state, agent_id=agent_id, lines=lines, has_fixed_main=True)


def _answered(ticket: BundleTicket[BundleAnswer]) -> Steps[BundleAnswer]:
    """Wait between steps for the store's answer; its error is raised. Closing it cancels."""
    try:
        while ticket.answer is None:
            yield Pause.WAITING
    except GeneratorExit:
        ticket.cancel()
        raise
    if ticket.answer.error is not None:
        raise ticket.answer.error
    return ticket.answer


def _is_part_of(main: Line, other: LineState) -> bool:
    """Whether the other line, of another tokenizer, knows nothing that was taken back here."""
    if other.number or other.messages is None or main.messages is None:
        return True
    return main.messages[: len(other.messages)] == other.messages
