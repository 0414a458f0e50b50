"""The table of the maintainers' benchmarks, one row a command."""

from dataclasses import replace

from benchmarks.attack import benchmark as attack
from benchmarks.chaos import plan as chaos
from benchmarks.chaos.benchmark import run_chaos
from benchmarks.cpu import benchmark as cpu
from benchmarks.server import benchmark as server
from benchmarks.store import benchmark as store
from benchmarks.swap import benchmark as swap
from benchmarks.turns import benchmark as turns
from keepwarm.bench.report import Report
from keepwarm.cli.benchmark import Benchmark, Order


def _store(order: Order) -> Report:
    return store.run_store(order.load(), order.plan(store.StorePlan, store.QUICK), order.tell)


def _chaos(order: Order) -> Report:
    plan = order.plan(chaos.ChaosPlan, chaos.QUICK)
    return run_chaos(replace(plan, model=order.model), order.tell)


def _attack(order: Order) -> Report:
    plan = order.plan(attack.AttackPlan, attack.QUICK)
    return attack.run_attack(order.model, plan, order.tell)


def _server(order: Order) -> Report:
    plan = order.plan(server.ServerPlan, server.QUICK)
    return server.run_server(order.model, plan, order.tell)


def _swap(order: Order) -> Report:
    return swap.run_swap(order.model, order.plan(swap.SwapPlan, swap.QUICK), order.tell)


def _turns(order: Order) -> Report:
    plan = order.plan(turns.TurnsPlan, turns.QUICK)
    return turns.run_turns(order.model, plan, order.tell)


def _cpu(order: Order) -> Report:
    return cpu.run_cpu(order.model, order.plan(cpu.CpuPlan, cpu.QUICK), order.tell)


BENCHMARKS = (
    Benchmark(
        name="store",
        title="Agents on disk",
        question="What does the disk cost, and what does it give?",
        aims="restoring at 0.7 of reading, 1.15 bytes written for one of KV, commits within 10 ms",
        run=_store,
    ),
    Benchmark(
        name="chaos",
        title="Killed in every phase",
        question="Does anything get lost or wrong when the process is killed?",
        aims="every phase hit; nothing lost, wrong, damaged or left over",
        run=_chaos,
    ),
    Benchmark(
        name="attack",
        title="Attacks, crowds and crashes",
        question="Do requests that are too large, crowds that hang up, or SIGKILL behind an answer "
        "hurt others, or lose anything?",
        aims="streams and /health go on, memory comes back, nothing is left or undone",
        run=_attack,
    ),
    Benchmark(
        name="server",
        title="The server on top of the engine",
        question="What does the server cost on top of the engine, and does anything sent to it "
        "break it?",
        aims="3 ms to the first token and 1.03 in time per token, no request answered wrongly",
        run=_server,
    ),
    Benchmark(
        name="swap",
        title="Two models in turn",
        question="What does it cost when two models share memory that holds one of them?",
        aims="within 1.2 times a bare load, no memory left, no request lost or answered wrongly",
        run=_swap,
    ),
    Benchmark(
        name="turns",
        title="Agents that take turns",
        question="How long do agents wait for their turns over HTTP, and beside other servers?",
        aims="half of cold prompts within 0.6 of all; 0.6 and 0.3 of others' total and later TTFT",
        run=_turns,
    ),
    Benchmark(
        name="cpu",
        title="The native CPU step",
        question="How fast is the native step on a CPU, beside llama.cpp and MLX?",
        aims="decode 1.5 to 2.5 times and prefill 1.5 times as fast as llama.cpp",
        run=_cpu,
    ),
)
