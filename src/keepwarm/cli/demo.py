"""`keepwarm demo`: agents take turns, their process is killed, and each resumes its own memory."""

import multiprocessing
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from keepwarm.cli.demo_child import Demote, Order, Refusal, Say, Stop, play
from keepwarm.cli.demo_script import CAST, Part
from keepwarm.core.agent import Tier
from keepwarm.core.errors import KeepwarmError
from keepwarm.core.events import Completed, Delta, Event, Progress

REPLY_TOKENS = 40
STYLE_OF_TIER = {
    Tier.HOT: "bold red",
    Tier.WARM: "yellow",
    Tier.COLD: "bold cyan",
    Tier.NONE: "dim",
}


@dataclass(slots=True)
class Stage:
    """What the live view shows of one agent, and the conversation so far."""

    part: Part
    doing: str = "has not spoken yet"
    said: str = ""
    replies: list[str] = field(default_factory=list)


@dataclass(slots=True)
class TurnResult:
    """One turn as it ran, and what the same prompt costs an engine that remembers nothing."""

    stage: Stage
    turn: int
    completed: Completed
    prompt: list[dict[str, str]]
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
    "Turn 4: a new process, which has only the files of the one that was killed (cold)",
)
KILL_HEADLINE = "The process is killed with SIGKILL, in the middle of a sentence"
COLD_HEADLINE = "Turns 3 and 4 again, by an engine that remembers nothing: the context is prefilled"
LAST_WARM_TURN = 2
DELTAS_BEFORE_KILL = 5


class DemoFailed(KeepwarmError):
    """The demo's process has ended with an error of Keepwarm's."""


class Player:
    """The process that has the model. `kill` is SIGKILL: it gets no chance to save anything."""

    def __init__(self, model: str, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=play, args=(theirs, model, folder), daemon=True)
        self._process.start()
        theirs.close()
        self._next()

    def _next(self) -> Any:
        """What the process says next. Raises DemoFailed when it says why it has ended."""
        said = self._orders.recv()
        if isinstance(said, Refusal):
            raise DemoFailed(said.reason)
        return said

    def order(self, order: Order) -> None:
        self._orders.send(order)

    def events(self, request: dict[str, Any], *, from_nothing: bool = False) -> Iterator[Event]:
        """A request's events as they come, up to its Completed."""
        self.order(Say(request, from_nothing))
        event = None
        while not isinstance(event, Completed):
            event = self._next()
            yield event

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        self.order(Stop())
        self._process.join()


class Demo:
    """Directs the turns and keeps what there is to show."""

    def __init__(self, model: str, folder: str) -> None:
        self._model = model
        self._folder = folder
        self._player = Player(model, folder)
        self.stages = [Stage(part) for part in CAST]
        self.results: list[TurnResult] = []
        self.headline = ""

    def run(self) -> Iterator[None]:
        """All turns; yields whenever there is something new to see."""
        for turn, headline in enumerate(HEADLINES):
            if turn > LAST_WARM_TURN:
                yield from self._kill_in_mid_sentence(self.stages[0], turn)
            self.headline = headline
            for stage in self.stages:
                if turn == LAST_WARM_TURN:
                    self._player.order(Demote(stage.part.agent_id))
                yield from self._turn(stage, turn)
        self.headline = COLD_HEADLINE
        for result in self.results[-2 * len(self.stages) :]:
            yield from self._cold(result)
        self.headline = "Done"
        self._player.stop()
        yield

    def _turn(self, stage: Stage, turn: int) -> Iterator[None]:
        """The agent is sent its new question only; the engine has the rest."""
        request = _request(stage, turn)
        completed = yield from _watch(self._player.events(request), stage)
        result = TurnResult(stage, turn + 1, completed, _conversation(stage, turn))
        stage.replies.append(completed.text)
        if not completed.usage.cached_tokens:
            result.cold_s = result.first_token_s
        self.results.append(result)

    def _kill_in_mid_sentence(self, stage: Stage, turn: int) -> Iterator[None]:
        self.headline = KILL_HEADLINE
        yield
        num_deltas = 0
        stage.said = ""
        for event in self._player.events(_request(stage, turn)):
            _show(event, stage)
            yield
            num_deltas += isinstance(event, Delta)
            if num_deltas == DELTAS_BEFORE_KILL:
                break
        self._player.kill()
        for other in self.stages:
            other.doing = "is gone: its process was killed"
        yield
        self._player = Player(self._model, self._folder)

    def _cold(self, result: TurnResult) -> Iterator[None]:
        """The turn's prompt once more, for an engine that remembers nothing."""
        request = {"messages": result.prompt, "max_tokens": 1}
        said = result.stage.said
        events = self._player.events(request, from_nothing=True)
        completed = yield from _watch(events, result.stage)
        result.stage.said = said
        result.cold_s = completed.timing.first_token_s


def _request(stage: Stage, turn: int) -> dict[str, Any]:
    part = stage.part
    new = [{"role": "user", "content": part.questions[turn]}]
    if turn == 0:
        new.insert(0, {"role": "system", "content": part.system})
    prompt = {"messages" if turn == 0 else "append": new}
    return {"agent_id": part.agent_id, "max_tokens": REPLY_TOKENS, **prompt}


def _conversation(stage: Stage, turn: int) -> list[dict[str, str]]:
    """All that was said up to the turn's question."""
    messages = [{"role": "system", "content": stage.part.system}]
    for question, reply in zip(stage.part.questions, stage.replies[:turn], strict=False):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": reply})
    return [*messages, {"role": "user", "content": stage.part.questions[turn]}]


def _watch(events: Iterator[Event], stage: Stage) -> Generator[None, None, Completed]:
    """Show the events as they come."""
    stage.said, stage.doing = "", "waits"
    for event in events:
        _show(event, stage)
        if isinstance(event, Completed):
            return event
        yield
    raise RuntimeError("the reply has no end")


def _show(event: Event, stage: Stage) -> None:
    if isinstance(event, Progress):
        stage.doing = f"prefills {event.num_done} of {event.num_total} tokens"
    elif isinstance(event, Delta):
        stage.doing, stage.said = "speaks", stage.said + event.text
    else:
        stage.doing = "rests"


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
    grid = Table(
        title="context, cached: tokens; TTFT: from request to first token",
        title_style="dim",
        box=box.SIMPLE_HEAD,
        padding=0,
        collapse_padding=True,
        pad_edge=False,
    )
    for column in ("agent", "turn", "tier"):
        grid.add_column(column)
    for column in ("context", "cached", "TTFT cold", "resumed", "faster", "tokens/s"):
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
        str(result.turn),
        Text(tier.value, style=STYLE_OF_TIER[tier]),
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
    """Agents take turns, their process is killed, and each resumes its own memory."""
    console = Console()
    with TemporaryDirectory(prefix="keepwarm-demo-") as folder:
        with console.status(f"Loading {model} (the first time, it is converted)"):
            show = Demo(model, folder)
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
