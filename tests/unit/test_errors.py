"""Every error carries the facts that it was decided on, in its fields and in its words."""

import inspect
from pathlib import Path

import pytest

from keepwarm.core import errors
from keepwarm.core.errors import (
    AgentBusy,
    AgentExists,
    BadBundle,
    BundleFailed,
    ConfigError,
    ContextTooLong,
    GeneratorFailed,
    InvalidRequest,
    InvariantBroken,
    KeepwarmError,
    ModelLoadError,
    NeverFits,
    NoAgentStore,
    PoolExhausted,
    QueueFull,
    RequestBroke,
    TemplateRefused,
    TooManyMessages,
    UnknownAgent,
)

CAUSE = RuntimeError("out of memory")
EXAMPLES = [
    (InvalidRequest("seed", "is negative"), ["seed", "is negative"]),
    (
        ContextTooLong(num_prompt_tokens=901, max_context_tokens=900),
        ["prompt is too long: 901 tokens > 899 maximum", "maximum context length is 900 tokens"],
    ),
    (
        NeverFits(
            num_prompt_tokens=600, max_prompt_tokens=511, needed_bytes=4001, budget_bytes=4000
        ),
        ["prompt is too long: 600 tokens > 511 maximum", "4,001", "4,000"],
    ),
    (
        TooManyMessages(num_messages=9001, max_messages=8192),
        ["prompt is too long: 9001 messages > 8192 maximum"],
    ),
    (UnknownAgent("ada"), ["'ada'"]),
    (AgentExists("ada"), ["'ada'"]),
    (AgentBusy("ada", "fork it"), ["'ada'", "fork it"]),
    (QueueFull(num_waiting=7), ["7"]),
    (PoolExhausted(needed_bytes=5001, free_bytes=5000), ["5,001", "5,000"]),
    (ConfigError("max_rows", "must be at least 1"), ["max_rows", "at least 1"]),
    (ModelLoadError("/a/b", "is torn", "Fetch it again."), ["/a/b", "is torn", "Fetch it again."]),
    (NoAgentStore("exporting an agent"), ["exporting"]),
    (BadBundle(Path("/a/b"), "it is no bundle"), ["/a/b", "no bundle"]),
    (BundleFailed(Path("/a/b"), "no space left"), ["/a/b", "no space left"]),
    (GeneratorFailed(CAUSE), ["out of memory"]),
    (RequestBroke(CAUSE), ["out of memory"]),
    (TemplateRefused("one at a time"), ["chat template", "one at a time"]),
]


@pytest.mark.parametrize(("error", "facts"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_the_message_says_the_facts(error: KeepwarmError, facts: list[str]) -> None:
    for fact in facts:
        assert fact in str(error)


@pytest.mark.parametrize(("error", "_"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_the_fields_hold_the_facts(error: KeepwarmError, _: list[str]) -> None:
    parameters = inspect.signature(type(error)).parameters
    # `action` of AgentBusy is advice, not a fact.
    for name in parameters.keys() - {"action"}:
        assert hasattr(error, name)


def test_all_but_bugs_share_one_base() -> None:
    classes = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    ]
    outside = [value for value in classes if not issubclass(value, KeepwarmError)]
    assert outside == [InvariantBroken]
