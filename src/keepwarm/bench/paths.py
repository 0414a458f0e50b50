"""The ways by which a prompt's KV can come to be where it is: the paths of EXP-005.

Each takes cases to recordings of their replies and raises PathNotTaken when the engine did not do
what the path is there to show. A first turn says a part of the prompt itself, by script, so that
the second turn's prompt continues it and its logits can be compared with a plain run's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from keepwarm.bench.durable_paths import FirstTurn, killed, parked, restarted, temporary_store
from keepwarm.bench.lab import ROOMY_BYTES, Case, Lab, Setting, Turn
from keepwarm.bench.prompts import prompt_ids
from keepwarm.bench.recording import Recording
from keepwarm.bench.requiring import require
from keepwarm.core.agent import Tier
from keepwarm.core.events import FinishReason
from keepwarm.core.layout import BLOCK_TOKENS, capacity_for
from keepwarm.core.policies import EngineConfig

FIRST_REPLY_TOKENS = 8
CHUNK_TOKENS = 100
UNTHROTTLED = 1000.0
SLACK_TOKENS = 64

Run = Callable[[Setting, Sequence[Case]], list[Recording]]


@dataclass(frozen=True, slots=True)
class Path:
    """A named path. `group_size` cases run together; a prompt shorter than `min_tokens` cannot take
    it.
    """

    name: str
    run: Run
    group_size: int = 1
    min_tokens: int = 0


def _alone(run: Callable[[Setting, Case], Recording]) -> Run:
    return lambda setting, cases: [run(setting, case) for case in cases]


def split_of(setting: Setting, case: Case) -> FirstTurn:
    """Cut the prompt shortly before its end, where the seed says."""
    num_tokens = len(case.prompt)
    num_left = int(np.random.default_rng([setting.seed, num_tokens]).integers(4, 20))
    start = num_tokens - FIRST_REPLY_TOKENS - num_left
    return FirstTurn(case.prompt[:start], case.prompt[start : start + FIRST_REPLY_TOKENS])


def _other_ids(setting: Setting, num_tokens: int) -> tuple[int, ...]:
    """Return text that no case begins with."""
    return prompt_ids(setting.loaded.tokenizer, num_tokens, seed=setting.seed + 1000)


def first_turn(lab: Lab, setting: Setting, case: Case, agent_id: str = "ada") -> Turn:
    split = split_of(setting, case)
    return lab.say(agent_id, split.prompt, split.reply)


# -- one agent -----------------------------------------------------------------------------------


def cold(setting: Setting, case: Case) -> Recording:
    lab = setting.lab()
    turn = lab.run_case("ada", case)
    lab.require_reuse(turn, Tier.NONE, 0)
    return lab.recording(turn)


def hot(setting: Setting, case: Case) -> Recording:
    """Resume after a reply that ended by its length."""
    lab = setting.lab()
    first_turn(lab, setting, case)
    turn = lab.run_case("ada", case)
    lab.require_reuse(turn, Tier.HOT, split_of(setting, case).num_held)
    return lab.recording(turn)


def warm(setting: Setting, case: Case) -> Recording:
    lab = setting.lab()
    first_turn(lab, setting, case)
    lab.engine.demote("ada")
    turn = lab.run_case("ada", case)
    lab.require_reuse(turn, Tier.WARM, split_of(setting, case).num_held)
    return lab.recording(turn)


def after_stop(setting: Setting, case: Case) -> Recording:
    """Resume after a first reply that a stop string ended in the middle."""
    lab = setting.lab()
    split = split_of(setting, case)
    detokenizer = setting.loaded.tokenizer.detokenizer()
    text = "".join(detokenizer.push(token_id) for token_id in split.reply)
    stop = text[len(text) // 2 :][:6]
    first = lab.start("ada", split.prompt, len(split.reply), script=split.reply, stop=stop)
    lab.finish(first)
    reason = lab.completed(first).finish_reason
    require(reason is FinishReason.STOP, f"the first reply ended by {reason}, not by {stop!r}")
    turn = lab.run_case("ada", case)
    lab.require_reuse(turn, Tier.HOT, len(split.prompt))
    return lab.recording(turn)


def after_cancel(setting: Setting, case: Case) -> Recording:
    lab = setting.lab()
    split = split_of(setting, case)
    first = lab.start("ada", split.prompt, len(split.reply), script=split.reply)
    while lab.num_draws(first) < FIRST_REPLY_TOKENS // 2:
        lab.step()
    require(lab.engine.cancel(first.request_id), "the first reply had ended before the cancel")
    lab.finish(first)
    turn = lab.run_case("ada", case)
    lab.require_reuse(turn, Tier.HOT, len(split.prompt))
    return lab.recording(turn)


def rollback(setting: Setting, case: Case) -> Recording:
    """Resume after a second turn that had gone elsewhere and was taken back."""
    lab = setting.lab()
    split = split_of(setting, case)
    first_turn(lab, setting, case)
    elsewhere = (*split.prompt, *split.reply, *_other_ids(setting, 40))
    lab.finish(lab.start("ada", elsewhere, 8))
    lab.engine.rollback("ada", turn=1)
    turn = lab.run_case("ada", case)
    lab.require_reuse(turn, Tier.HOT, split_of(setting, case).num_held)
    return lab.recording(turn)


def _durably(run: Callable[[Setting, FirstTurn, Case], Recording]) -> Run:
    return _alone(lambda setting, case: run(setting, split_of(setting, case), case))


def chunked(setting: Setting, case: Case) -> Recording:
    """Prefill in chunks that end where no block does."""
    lab = setting.lab(config=EngineConfig(prefill_chunk_tokens=CHUNK_TOKENS))
    turn = lab.run_case("ada", case)
    return lab.recording(turn)


# -- several agents ------------------------------------------------------------------------------


def fork(setting: Setting, case: Case) -> Recording:
    """Resume a fork while its parent says something else."""
    lab = setting.lab()
    split = split_of(setting, case)
    first_turn(lab, setting, case)
    lab.engine.fork("ada", "bob")
    elsewhere = (*split.prompt, *split.reply, *_other_ids(setting, 20))
    parent = lab.start("ada", elsewhere, 16)
    turn = lab.start_case("bob", case)
    lab.finish(parent, turn)
    lab.require_reuse(turn, Tier.WARM, split_of(setting, case).num_held)
    return lab.recording(turn)


def forked_from(setting: Setting, case: Case) -> Recording:
    """Resume a parent whose fork has written elsewhere."""
    lab = setting.lab()
    split = split_of(setting, case)
    first_turn(lab, setting, case)
    lab.engine.fork("ada", "bob")
    elsewhere = (*split.prompt, *split.reply, *_other_ids(setting, 20))
    lab.finish(lab.start("bob", elsewhere, 8))
    turn = lab.run_case("ada", case)
    lab.require_reuse(turn, Tier.HOT, split_of(setting, case).num_held)
    return lab.recording(turn)


def shared_hot(setting: Setting, case: Case) -> Recording:
    """Begin with the slab of another agent that begins alike."""
    return _shared(setting, case, demoted=False)


def shared_warm(setting: Setting, case: Case) -> Recording:
    """Begin with the blocks of another agent that begins alike."""
    return _shared(setting, case, demoted=True)


def _shared(setting: Setting, case: Case, *, demoted: bool) -> Recording:
    lab = setting.lab()
    num_alike = len(case.prompt) - 1
    num_shared = num_alike - num_alike % BLOCK_TOKENS
    lab.finish(lab.start("ada", (*case.prompt[:num_alike], *_other_ids(setting, 20)), 4))
    if demoted:
        lab.engine.demote("ada")
    turn = lab.run_case("bob", case)
    lab.require_reuse(turn, Tier.WARM, num_shared)
    return lab.recording(turn)


def preempted(setting: Setting, case: Case) -> Recording:
    """Have an older row grow into the memory of this one, which waits and comes back."""
    capacity = capacity_for(len(case.prompt))
    slack_bytes = SLACK_TOKENS * setting.loaded.layout.token_bytes
    filler_bytes = setting.slab_bytes(2 * BLOCK_TOKENS)
    config = EngineConfig(
        max_rows=2,  # so that a row grows no more than two tokens ahead
        reserve_reply_tokens=0,
        max_step_stretch=UNTHROTTLED,
        fresh_bytes_per_step=ROOMY_BYTES,
    )
    lab = setting.lab(
        config=config, budget_bytes=filler_bytes + setting.slab_bytes(capacity) + slack_bytes
    )
    num_until_full = _num_prefill_steps(len(case.prompt)) + 5
    older = lab.start("filler", _other_ids(setting, 2 * BLOCK_TOKENS - num_until_full), 40)
    while not lab.num_draws(older):
        lab.step()
    turn = lab.start_case("ada", case)
    lab.finish(older, turn)
    num_preemptions = lab.completed(turn).timing.num_preemptions
    require(num_preemptions > 0, "the row was never preempted")
    return lab.recording(turn)


def _num_prefill_steps(num_tokens: int) -> int:
    """Return how many steps a prefill beside decode takes, where the throttle leaves it a block in
    each, and none in the step in which it measures decode alone.
    """
    return -(-num_tokens // BLOCK_TOKENS) + 1


def beside_decode(setting: Setting, case: Case) -> Recording:
    """Prefill in what the decode steps of another agent leave."""
    lab = setting.lab()
    companion = lab.start("companion", _other_ids(setting, 40), 4000)
    while lab.num_draws(companion) < 2:
        lab.step()
    num_before = lab.num_draws(companion)
    turn = lab.start_case("ada", case)
    while not lab.num_draws(turn):
        lab.step()
    num_beside = lab.num_draws(companion) - num_before
    require(num_beside >= 2, f"only {num_beside} tokens were decoded beside the prefill")
    lab.finish(turn)
    lab.engine.cancel(companion.request_id)
    return lab.recording(turn)


def batch(setting: Setting, cases: Sequence[Case]) -> list[Recording]:
    """Resume hot agents that join one after the other, and leave as their replies end."""
    # Throttled, a prompt on a busy machine waits until the first of these short replies has ended.
    lab = setting.lab(config=EngineConfig(max_step_stretch=UNTHROTTLED))
    names = [f"agent-{index}" for index in range(len(cases))]
    for name, case in zip(names, cases, strict=True):
        first_turn(lab, setting, case, name)
    lab.recorder.widest_batch = 0
    turns: list[Turn] = []
    for name, case in zip(names, cases, strict=True):
        turns.append(lab.start_case(name, case))
        lab.step()
    lab.finish(*turns)
    widest = lab.recorder.widest_batch
    require(widest == len(cases), f"at most {widest} rows decoded together")
    return [lab.recording(turn) for turn in turns]


def swapped(setting: Setting, cases: Sequence[Case]) -> list[Recording]:
    """Have the weights go and come back while every other agent rests and the others reply."""
    with temporary_store() as store:
        lab = setting.lab(store=store)
        names = [f"agent-{index}" for index in range(len(cases))]
        for name, case in zip(names, cases, strict=True):
            first_turn(lab, setting, case, name)
        turns = {n: lab.start_case(n, c) for n, c in zip(names[::2], cases[::2], strict=True)}
        while any(lab.num_draws(turn) < 2 for turn in turns.values()):
            lab.step()
        require(not any(map(lab.has_finished, turns.values())), "a reply had ended too early")
        require(lab.engine.suspend(), "the disk did not take all KV")
        require(not lab.engine.tiers.pool.used_bytes, f"in memory: {lab.engine.tiers.pool!r}")
        lab.engine.resume(setting.loaded)
        for name, case in zip(names[1::2], cases[1::2], strict=True):
            turns[name] = lab.start_case(name, case)
        lab.finish(*turns.values())
        for name, case in zip(names[1::2], cases[1::2], strict=True):
            lab.require_reuse(turns[name], Tier.COLD, split_of(setting, case).num_held)
        return [lab.recording(turns[name]) for name in names]


PATHS = (
    Path("cold", _alone(cold)),
    Path("hot", _alone(hot)),
    Path("warm", _alone(warm)),
    Path("parked on disk", _durably(parked)),
    Path("after a restart", _durably(restarted)),
    Path("after SIGKILL", _durably(killed), min_tokens=BLOCK_TOKENS + SLACK_TOKENS),
    Path("shared prefix, hot", _alone(shared_hot), min_tokens=BLOCK_TOKENS + 1),
    Path("shared prefix, warm", _alone(shared_warm), min_tokens=BLOCK_TOKENS + 1),
    Path("fork", _alone(fork)),
    Path("forked from", _alone(forked_from)),
    Path("rollback", _alone(rollback)),
    Path("after a stop string", _alone(after_stop)),
    Path("after a cancel", _alone(after_cancel)),
    Path("preempted", _alone(preempted)),
    Path("chunks", _alone(chunked), min_tokens=CHUNK_TOKENS + 2),
    Path("beside decode", _alone(beside_decode)),
    Path("swapped out and back", swapped, group_size=8),
    Path("batch of 2", batch, group_size=2),
    Path("batch of 4", batch, group_size=4),
    Path("batch of 8", batch, group_size=8),
)
