"""Verify and bundles on the embedded model: what was kept is what a cold run computes."""

from pathlib import Path
from typing import Any

import pytest

from engines import run
from keepwarm import AgentCacheStore, BlockPool, BlockPoolBatchEngine
from keepwarm.core.ports import LoadedModel

pytestmark = pytest.mark.slow

MESSAGE = {
    "role": "user",
    "content": "Tell me more. "
    + " ".join(f"Guest {number} has left the house at noon." for number in range(26)),
}


def engine_on(smollm2: LoadedModel, store: AgentCacheStore, **more: Any) -> BlockPoolBatchEngine:
    return BlockPoolBatchEngine(smollm2, pool=BlockPool(1 << 30), store=store, **more)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("computed_by", ["smollm2", "smollm2_on_mlx"])
def test_an_agent_is_verified_from_disk_and_moves_to_another_home(
    request: pytest.FixtureRequest, tmp_path: Path, computed_by: str, deterministic: bool
) -> None:
    model: LoadedModel = request.getfixturevalue(computed_by)
    with AgentCacheStore(tmp_path / "one") as store:
        engine = engine_on(model, store, deterministic=deterministic)
        first = run(engine, agent_id="ada", messages=[MESSAGE], max_tokens=12)
        num_held = first.usage.prompt_tokens + len(first.token_ids) - 1
        hot = engine.verify("ada")
        assert hot.passed, hot
        assert engine.close()
    with AgentCacheStore(tmp_path / "one") as store:
        engine = engine_on(model, store, deterministic=deterministic)
        cold = engine.verify("ada")
        assert cold.passed, cold
        assert cold.num_compared >= num_held > 256
        assert cold.bound == (0.0 if deterministic or model.is_reproducible else 5e-4)
        engine.export("ada", tmp_path / "ada")
        here = run(
            engine, agent_id="ada", append=[{"role": "user", "content": "Who?"}], max_tokens=8
        )
    with AgentCacheStore(tmp_path / "two") as store:
        engine = engine_on(model, store, deterministic=deterministic)
        assert engine.import_agent(tmp_path / "ada").num_records == 2
        there = run(
            engine, agent_id="ada", append=[{"role": "user", "content": "Who?"}], max_tokens=8
        )
        assert there.cache.cached_tokens == here.cache.cached_tokens >= num_held
        assert there.token_ids == here.token_ids
        report = engine.verify("ada")
        assert report.passed
        assert report.became_shared
        engine.check()
