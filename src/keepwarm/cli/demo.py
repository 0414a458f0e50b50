"""`keepwarm demo`: agents take turns on one model, and each resumes its own memory."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from keepwarm.cli.demo_script import CAST, Part
from keepwarm.core.agent import Tier
from keepwarm.core.events import Completed, Delta, Failed, Progress
from keepwarm.core.pool import BlockPool
from keepwarm.core.ports import LoadedModel
from keepwarm.engine.batch_engine import BlockPoolBatchEngine
from keepwarm.mlx_backend.loader import load_model

BUDGET_BYTES = 1 << 30
REPLY_TOKENS = 40
STYLE_OF_TIER = {Tier.HOT: "bold red", Tier.WARM: "yellow", Tier.NONE: "dim"}


@dataclass(slots=True)
class Stage:
    """What the live view shows of one agent, and the conversation so far."""

    part: Part
    doing: str = "has not spoken yet"
    said: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class TurnResult:
    """One turn as it ran, and what the same prompt costs an engine that remembers nothing."""

    stage: Stage
    turn: int
    completed: Completed
    cold_s: float | None = None

    @property
    def first_token_s(self) -> float:
        return self.completed.timing.first_token_s or 0.0

    @property
    def tokens_per_s(self) -> float:
        decode_s = self.completed.timing.total_s - self.first_token_s
        return (self.completed.usage.completion_tokens - 1) / decode_s if decode_s > 0 else 0.0


HEADLINES = (
    "Turn 1: nobody is known yet; what the briefs have in common is computed once",
    "Turn 2: every agent's slab is still there (hot): nothing is copied, nothing computed again",
    "Turn 3: say that memory was needed elsewhere: slabs have become blocks (warm), copied back",
)
COLD_HEADLINE = "Turn 3 again, by an engine that remembers nothing: the whole context is prefilled"


class Demo:
    """Runs the turns and keeps what there is to show."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._engine = new_engine(loaded)
        self.stages = [Stage(part) for part in CAST]
        self.results: list[TurnResult] = []
        self.headline = ""

    def run(self) -> Iterator[None]:
        """All turns; yields whenever there is something new to see."""
        for turn, self.headline in enumerate(HEADLINES):
            for stage in self.stages:
                if turn == 2:
                    self._engine.demote(stage.part.agent_id)
                yield from self._turn(stage, turn)
        self.headline = COLD_HEADLINE
        for result in self.results[-len(self.stages) :]:
            yield from self._cold(result)
        self.headline = "Done"
        yield

    def _turn(self, stage: Stage, turn: int) -> Iterator[None]:
        """The agent is sent its new question only; the engine has the rest."""
        new = [{"role": "user", "content": stage.part.questions[turn]}]
        if turn == 0:
            new.insert(0, {"role": "system", "content": stage.part.system})
            self._engine.submit(agent_id=stage.part.agent_id, messages=new, max_tokens=REPLY_TOKENS)
        else:
            self._engine.submit(agent_id=stage.part.agent_id, append=new, max_tokens=REPLY_TOKENS)
        completed = yield from _watch(self._engine, stage)
        stage.messages += [*new, {"role": "assistant", "content": completed.text}]
        result = TurnResult(stage, turn + 1, completed)
        if not completed.usage.cached_tokens:
            result.cold_s = result.first_token_s
        self.results.append(result)

    def _cold(self, result: TurnResult) -> Iterator[None]:
        """The turn's prompt once more in a fresh engine."""
        fresh = new_engine(self._loaded)
        fresh.submit(messages=result.stage.messages[:-1], max_tokens=1)
        said = result.stage.said
        completed = yield from _watch(fresh, result.stage)
        result.stage.said = said
        result.cold_s = completed.timing.first_token_s


def new_engine(loaded: LoadedModel) -> BlockPoolBatchEngine:
    return BlockPoolBatchEngine(loaded, pool=BlockPool(budget_bytes=BUDGET_BYTES))


def _watch(engine: BlockPoolBatchEngine, stage: Stage) -> Generator[None, None, Completed]:
    """Step until the request has ended, telling the stage what happens."""
    stage.said, stage.doing = "", "waits"
    while True:
        for event in engine.step():
            if isinstance(event, Progress):
                stage.doing = f"prefills {event.num_done} of {event.num_total} tokens"
            elif isinstance(event, Delta):
                stage.doing, stage.said = "speaks", stage.said + event.text
            elif isinstance(event, Failed):
                raise event.error
            else:
                stage.doing = "rests"
                return event
        yield


def view(demo: Demo) -> Group:
    """The live view: each agent, what it does and what it says; then the table so far."""
    panels = [
        Panel(
            Text(" ".join(stage.said.split()) or " "),
            title=f"{stage.part.agent_id}: {stage.doing}",
            title_align="left",
            border_style="green" if stage.doing != "rests" else "dim",
            height=4,
        )
        for stage in demo.stages
    ]
    return Group(Text(demo.headline, style="bold"), *panels, table(demo.results))


def table(results: list[TurnResult]) -> Table:
    grid = Table(title="TTFT is the time from the request to its first token", title_style="dim")
    grid.add_column("agent")
    grid.add_column("tier")
    columns = (
        "turn",
        "context tokens",
        "cached",
        "TTFT cold",
        "TTFT resumed",
        "faster",
        "tokens/s",
    )
    for column in columns:
        grid.add_column(column, justify="right")
    for result in results:
        grid.add_row(*_cells(result))
    return grid


def _cells(result: TurnResult) -> tuple[str | Text, ...]:
    usage = result.completed.usage
    tier = result.completed.cache.tier
    resumed_s = result.first_token_s if usage.cached_tokens else None
    times = f"{result.cold_s / resumed_s:.0f}x" if result.cold_s and resumed_s else ""
    return (
        result.stage.part.agent_id,
        Text(tier.value, style=STYLE_OF_TIER[tier]),
        str(result.turn),
        str(usage.prompt_tokens + usage.completion_tokens),
        str(usage.cached_tokens),
        _milliseconds(result.cold_s),
        _milliseconds(resumed_s),
        times,
        f"{result.tokens_per_s:.1f}",
    )


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:,.0f} ms"


def demo(
    model: Annotated[str, typer.Option(help="smollm2, a folder, or a hub id.")] = "smollm2",
) -> None:
    """Agents take turns on one model, and each resumes its own memory."""
    console = Console()
    with console.status(f"Loading {model} (the first time, it is converted)"):
        show = Demo(load_model(model))
    if console.is_terminal:
        _play_live(console, show)
    else:
        _play_plain(console, show)


def _play_live(console: Console, show: Demo) -> None:
    with Live(view(show), console=console, refresh_per_second=8, transient=True) as live:
        for _ in show.run():
            live.update(view(show))
    console.print(table(show.results))


def _play_plain(console: Console, show: Demo) -> None:
    headline = ""
    num_shown = 0
    for _ in show.run():
        for result in show.results[num_shown:]:
            said = " ".join(result.completed.text.split())
            console.print(f"  {result.stage.part.agent_id}: {said}", markup=False)
        num_shown = len(show.results)
        if show.headline != headline:
            headline = show.headline
            console.print(headline)
    console.print(table(show.results))
