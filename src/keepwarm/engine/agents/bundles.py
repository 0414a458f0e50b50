"""Agents that go to another machine in one file, and what comes from there."""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path

from keepwarm.core.agent import PRIVATE, home_namespace, in_namespace
from keepwarm.core.errors import BadBundle, InvalidRequest
from keepwarm.core.ports import Tokenizer
from keepwarm.core.stored import AgentState, Bundle, BundleTerms, KVFamily, LineState
from keepwarm.core.transcript import Span, Transcript
from keepwarm.engine.jobs import Pause, Steps
from keepwarm.engine.prompt.continuation import vouching
from keepwarm.engine.requests import valid_agent_id

VOUCH_TOKENS = 1024
"""Looked at in a step: a few milliseconds."""


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


def private_terms(family: KVFamily, tokenizer: str, vocab_size: int) -> BundleTerms:
    """Terms under which nobody else can ever find the imported KV."""
    namespace = f"{PRIVATE}{secrets.token_hex(16)}"
    return BundleTerms(replace(family, namespace=namespace), tokenizer, vocab_size)


def name_of(bundle: Bundle) -> str:
    """The name that the agent had where it came from. Raises BadBundle."""
    try:
        valid_agent_id(bundle.state.agent_id)
    except InvalidRequest as error:
        raise BadBundle(bundle.path, error.problem) from error
    return bundle.state.agent_id


def vouched_for(bundle: Bundle, tokenizer: Tokenizer) -> Steps[Bundle]:
    """The bundle, with what its ids say looked at where they are this tokenizer's.

    Nothing of others' is believed. A step looks at a few messages.
    """
    lines: list[LineState] = []
    num_tokens = 0
    for line in bundle.state.lines:
        is_readable = line.tokenizer == tokenizer.fingerprint
        spans: list[Span] = []
        for span in vouching(line.transcript, tokenizer.detokenizer if is_readable else None):
            spans.append(span)
            num_tokens += len(span.token_ids)
            if num_tokens >= VOUCH_TOKENS:
                num_tokens = 0
                yield Pause.READY
        lines.append(replace(line, transcript=Transcript(tuple(spans))))
    return replace(bundle, state=replace(bundle.state, lines=tuple(lines)))


def imported_state(bundle: Bundle, agent_id: str, num_records: int) -> AgentState:
    """The agent under its name here; lines without any KV have no secrets to keep.

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
