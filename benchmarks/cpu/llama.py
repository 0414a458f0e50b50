"""llama.cpp as a side of the benchmark: the server inside the wheel `xllamacpp`, without HTTP.

Its times are the ones that it reports with each reply, so Python's part is not in them.
"""

import importlib
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Self

BATCH_TOKENS = 512


class LlamaSide:
    """One file of weights, served in `num_slots` slots of `slot_tokens` each.

    Raises ImportError without `xllamacpp`.
    """

    def __init__(
        self, name: str, weights: Path, *, num_threads: int, num_slots: int, slot_tokens: int
    ) -> None:
        self.name = name
        module: Any = importlib.import_module("xllamacpp")
        params = module.CommonParams()
        params.model.path = str(weights)
        params.n_ctx = num_slots * slot_tokens
        params.n_parallel = num_slots
        params.n_ubatch = BATCH_TOKENS
        params.n_gpu_layers = 0
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
        self._server: Any = module.Server(params)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server = None

    def prefill_s(self, prompt: Sequence[int]) -> float:
        """Return the seconds from nothing to the first token's logits."""
        return 1e-3 * float(self._complete(0, prompt, 1, is_cached=False)["prompt_ms"])

    def decode_s(self, prompts: Sequence[Sequence[int]], num_steps: int) -> float:
        """Return the seconds of a step in which each prompt, one a slot, gets its next token.

        What a slot holds of its prompt from the call before is not computed again.
        """
        seconds = [0.0] * len(prompts)

        def run(slot: int) -> None:
            times = self._complete(slot, prompts[slot], num_steps + 1, is_cached=True)
            seconds[slot] = 1e-3 * float(times["predicted_ms"]) / num_steps

        threads = [threading.Thread(target=run, args=(slot,)) for slot in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return median(seconds)

    def _complete(
        self, slot: int, prompt: Sequence[int], num_tokens: int, *, is_cached: bool
    ) -> dict[str, Any]:
        """Return the times of a greedy reply of exactly `num_tokens`."""
        reply = self._server.handle_completions(
            {
                "prompt": list(prompt),
                "n_predict": num_tokens,
                "id_slot": slot,
                "cache_prompt": is_cached,
                "ignore_eos": True,
                "temperature": 0.0,
                "top_k": 1,
                "samplers": ["top_k"],
            }
        )
        times: dict[str, Any] = reply["timings"]
        return times
