"""`python -m benchmarks turns`, quick: agents talk over HTTP, and what no speed changes holds."""

from pathlib import Path

import pytest

from benchmarks.turns.benchmark import QUICK, run_turns
from benchmarks.turns.workload import _pieces, _text
from keepwarm.bench.report import Report
from tiny_models import write_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(keepwarm_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)
    return run_turns(str(model), QUICK())


def test_cold_prompts_and_turns_are_measured(result: Report) -> None:
    cold, later = result.figures
    assert 0.0 < cold.facts["median_s"] <= cold.facts["last_s"]
    assert 0.0 < later.facts["later_s"] < later.facts["total_s"]


def test_other_servers_are_left_out_of_other_models(result: Report) -> None:
    assert "Other servers were not run" in result.notes[0]


def test_agents_say_different_things() -> None:
    texts = [_text(80, start=31 * agent + 7 * turn) for agent in range(8) for turn in range(3)]
    assert len({text[:40] for text in texts}) == len(texts)
    assert len({len(text) for text in texts}) == 1


def test_only_events_with_text_count_as_tokens() -> None:
    lines = [
        b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n',
        b"\r\n",
        b'data: {"choices": [{"delta": {"content": "one"}}]}\r\n',
        b'data: {"choices": []}\n',
        b'data: {"choices": [{"delta": {"content": ""}}]}\n',
        b"data: [DONE]\n",
    ]
    assert _pieces(lines) == ["one"]
