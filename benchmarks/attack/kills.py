"""SIGKILL right behind an acknowledgement: what a server has acknowledged is there when it is back.

Clients change agents of their own side by side. As soon as one of them has read an answer, its
thread kills the server. The next server, on the same home, is asked about every agent: a change
that was on its way may be there or not, one that was acknowledged must be.
"""

import http.client
import multiprocessing
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.attack.clients import ANSWER_S, Asker, Client, Document, agent_path, message
from benchmarks.server.process import FAKE, bench_settings, serve
from keepwarm.bench.progress import OnProgress, no_progress
from keepwarm.bench.report import Figure, Report
from keepwarm.bench.requiring import require

MAX_ANSWERS = 6
"""How many answers the killing client reads in a round, at most."""
MAX_ROWS = 8
MODEL_AGENT = "bundled"
START_S = 60.0
END_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KillPlan:
    """`num_kills` rounds of `num_clients` clients, each with agents of its own."""

    num_kills: int = 200
    num_clients: int = 3
    seed: int = 0


@dataclass(slots=True)
class Findings:
    """How often each kind of change was acknowledged, behind which a kill came, and what was
    undone.
    """

    acknowledged: Counter[str] = field(default_factory=Counter)
    killed_behind: Counter[str] = field(default_factory=Counter)
    num_not_durable: int = 0
    undone: list[str] = field(default_factory=list)


def run(plan: KillPlan | None = None, on_progress: OnProgress = no_progress) -> Report:
    """Kill servers on the fake generator; the figures say what was undone."""
    plan = plan or KillPlan()
    with TemporaryDirectory(prefix="keepwarm-bench-kills-") as home:
        found = _Campaign(Path(home), plan, on_progress).run()
    return Report(
        (
            _counted("kills behind acknowledgements", found.killed_behind, plan.num_kills),
            Figure(
                "acknowledged changes that were undone",
                float(len(found.undone)),
                0.0,
                unit="",
                facts={kind: float(count) for kind, count in sorted(found.acknowledged.items())},
            ),
            Figure("answers that were not durable", float(found.num_not_durable), 0.0, unit=""),
        ),
        tuple(found.undone),
    )


def _counted(name: str, counts: Counter[str], limit: int) -> Figure:
    facts = {kind: float(count) for kind, count in sorted(counts.items())}
    return Figure(name, float(counts.total()), float(limit), "", at_least=True, facts=facts)


class _Campaign:
    """Owns the home and the clients, and compares what they know with what is there."""

    def __init__(self, home: Path, plan: KillPlan, on_progress: OnProgress) -> None:
        self._home = home
        self._plan = plan
        self._on_progress = on_progress
        self._found = Findings()
        self._rng = random.Random(plan.seed)  # noqa: S311 - for reproduction, not for secrets
        seeds = [self._rng.getrandbits(64) for _ in range(plan.num_clients)]
        self._clients = [Client(f"c{number}", seed) for number, seed in enumerate(seeds)]

    def run(self) -> Findings:
        with _servers(self._home) as open_next:
            server = open_next()
            with Asker(server.port) as ask:
                self._make_bundle(ask)
            for number in range(1, self._plan.num_kills + 1):
                self._on_progress("kills", number - 1, self._plan.num_kills)
                kind = self._round(server)
                server = open_next()
                with Asker(server.port) as ask:
                    self._compare(ask, f"kill {number}, behind {kind}")
        return self._found

    def _make_bundle(self, ask: Asker) -> None:
        ask("PUT", agent_path(MODEL_AGENT), {"system": "You are brief."})
        for content in ("Hello", "And now?"):
            ask("POST", agent_path(MODEL_AGENT, "messages"), message(content))
        bundle, bundled = ask.raw("GET", agent_path(MODEL_AGENT, "export")), ask.look(MODEL_AGENT)
        for client in self._clients:
            client.bundle, client.bundled = bundle, bundled

    def _round(self, server: "_Server") -> str:
        """Have all clients work until one of them kills the server. Returns behind what kind of
        change.
        """
        killer = self._rng.choice(self._clients)
        num_answers = self._rng.randint(1, MAX_ANSWERS)
        rounds = [
            _Round(client, server, num_answers if client is killer else None)
            for client in self._clients
        ]
        for each in rounds:
            each.start()
        for each in rounds:
            each.end()
            self._found.acknowledged += each.acknowledged
            self._found.num_not_durable += each.num_not_durable
        server.wait()
        kind = rounds[self._clients.index(killer)].last_kind
        self._found.killed_behind[kind] += 1
        return kind

    def _compare(self, ask: Asker, when: str) -> None:
        """Ask about every agent that is there or must be, and go on with what is true."""
        present = {str(row["id"]) for row in ask("GET", "/v1/agents?limit=1000")["agents"]}
        for client in self._clients:
            for name in client.names(present):
                actual = ask.look(name) if name in present else None
                problem = client.problem_with(name, actual)
                if problem:
                    self._found.undone.append(f"{when}: {problem}")
                client.go_on_with(name, actual)
            client.pending = None


class _Round:
    """One client's changes until the server is gone, on a thread of its own."""

    def __init__(self, client: Client, server: "_Server", kill_behind: int | None) -> None:
        self.acknowledged: Counter[str] = Counter()
        self.num_not_durable = 0
        self.last_kind = ""
        self._client = client
        self._server = server
        self._kill_behind = kill_behind
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=client.name)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Wait for the thread. Raises what went wrong, unless it was the server's end."""
        self._thread.join(2 * ANSWER_S)
        require(not self._thread.is_alive(), f"{self._client} hangs")
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            with Asker(self._server.port) as ask:
                self._work(ask)
        except (OSError, http.client.HTTPException):
            return
        except BaseException as error:  # noqa: BLE001 - it is raised where the round ends
            self._failure = error
            self._server.kill()

    def _work(self, ask: Asker) -> None:
        while self.acknowledged.total() != self._kill_behind:
            change = self._client.pending = self._client.choose()
            document = ask(change.method, change.path, change.body)
            if self.acknowledged.total() + 1 == self._kill_behind:
                self._server.kill()
            change.acknowledge(document)
            self._client.pending = None
            self.last_kind = change.kind
            self.acknowledged[change.kind] += 1
            self.num_not_durable += not _is_durable(change.kind, document)


def _is_durable(kind: str, document: Document) -> bool:
    if kind == "delete":
        return bool(document["deleted"])
    return bool(document["is_durable" if kind == "import" else "durable"])


class _Server:
    """A server process of its own, forked from one that has imported everything already."""

    def __init__(self, home: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        port, ours = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(str(home), ours), daemon=True)
        self._process.start()
        ours.close()
        require(port.poll(START_S), "a server did not start")
        self.port = int(port.recv())
        port.close()

    def kill(self) -> None:
        """Send SIGKILL; from any thread."""
        if self._process.pid is not None:
            os.kill(self._process.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait for its end. Raises PathNotTaken unless it was killed."""
        self._process.join(END_S)
        require(self._process.exitcode == -signal.SIGKILL, f"it ended: {self._process.exitcode}")


@contextmanager
def _servers(home: Path) -> Iterator[Callable[[], _Server]]:
    """Open one server after another, each when the one before it has ended."""
    opened: list[_Server] = []

    def open_next() -> _Server:
        opened.append(_Server(home))
        return opened[-1]

    try:
        yield open_next
    finally:
        if opened:
            opened[-1].kill()
            opened[-1].wait()


def _serve(home: str, port: Connection) -> None:
    settings = bench_settings(FAKE, max_rows=MAX_ROWS, more={})
    serve(settings, Path(home), announce=port.send)
