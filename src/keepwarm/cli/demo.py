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
    """One agent in the live view, and its conversation so far."""

    part: Part
    doing: str = "has not spoken yet"
    said: str = ""
    replies: list[str] = field(default_factory=list)


@dataclass(slots=True)
class TurnResult:
    """A turn, and how long its prompt takes an engine that remembers nothing (`cold_s`)."""

    stage: Stage
    turn: int
    completed: Completed
    prompt: list[dict[str, str]]
    cold_s: float | None = None

    @property
    def first_token_s(self) -> float:
        """Seconds from request to first token."""
        return self.completed.timing.first_token_s or 0.0

    @property
    def tokens_per_s(self) -> float:
        decode_s = self.completed.timing.total_s - self.first_token_s
        return (self.completed.usage.completion_tokens - 1) / decode_s if decode_s > 0 else 0.0


HEADLINES = (
    "Turn 1: all agents are new; what their briefs have in common is computed once",
    "Turn 2: every agent's slab is still there (hot): nothing is copied, nothing computed again",
    "Turn 3: as if memory was needed elsewhere: slabs were made blocks (warm), now copied back",
    "Turn 4: a new process, which has only the files of the killed one (cold)",
)
KILL_HEADLINE = "The process is killed with SIGKILL, in the middle of a sentence"
COLD_HEADLINE = "Turns 3 and 4 again, by an engine that remembers nothing: the context is prefilled"
LAST_WARM_TURN = 2
DELTAS_BEFORE_KILL = 5


class DemoFailed(KeepwarmError):
    """The demo's process ended with an error that Keepwarm raised."""


class Player:
    """The process that has the model."""

    def __init__(self, model: str, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=play, args=(theirs, model, folder), daemon=True)
        self._process.start()
        theirs.close()
        self._next()

    def _next(self) -> Any:
        """Receive the next message. Raises DemoFailed when it says why the process ended."""
        said = self._orders.recv()
        if isinstance(said, Refusal):
            raise DemoFailed(said.reason)
        return said

    def order(self, order: Order) -> None:
        """Send the process an order, without waiting."""
        self._orders.send(order)

    def events(self, request: dict[str, Any], *, from_nothing: bool = False) -> Iterator[Event]:
        """Run a request, and yield its events as they come, up to Completed."""
        self.order(Say(request, from_nothing))
        event = None
        while not isinstance(event, Completed):
            event = self._next()
            yield event

    def kill(self) -> None:
        """Kill the process with SIGKILL: it has no chance to save anything."""
        self._process.kill()
        self._process.join()

    def stop(self) -> None:
        """Let the process save everything, and wait for its end."""
        self.order(Stop())
        self._process.join()


class Demo:
    """Directs the turns, and keeps what the view shows."""

    def __init__(self, model: str, folder: str) -> None:
        self._model = model
        self._folder = folder
        self._player = Player(model, folder)
        self.stages = [Stage(part) for part in CAST]
        self.results: list[TurnResult] = []
        self.headline = ""

    def run(self) -> Iterator[None]:
        """Run all turns; yields whenever there is something new to show."""
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
        """Send the agent its new question only; the engine has the rest."""
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
            other.doing = "gone: its process was killed"
        yield
        self._player = Player(self._model, self._folder)

    def _cold(self, result: TurnResult) -> Iterator[None]:
        """Run the turn's prompt once more, on an engine that remembers nothing."""
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
    """List the conversation up to the turn's question."""
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
    """Draw the live view: what each agent does and says, then the table so far."""
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
    """Draw the table of all turns so far."""
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
