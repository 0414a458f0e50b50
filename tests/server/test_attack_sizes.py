"""Too large in every way, against a server in a process of its own: refused, and no memory stays.

`python -m benchmarks attack` measures how long others wait; tests of each bound show that it is
checked before anything is computed.
"""

import sys

import pytest

from benchmarks.attack.sizes import MEBIBYTE, SizesPlan, run
from benchmarks.server.process import FAKE

pytestmark = pytest.mark.slow

PLAN = SizesPlan(
    steady_s=1.0, num_times=1, header_bytes=32 * MEBIBYTE, sent_of_claim_bytes=32 * MEBIBYTE
)
NUM_KINDS = 9


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_nothing_is_taken_and_no_memory_stays() -> None:
    result = run(FAKE, PLAN)
    assert len(result.notes) == NUM_KINDS
    by_name = {figure.name: figure for figure in result.figures}
    for name in (
        "memory that stays (MiB)",
        "memory at its peak over the largest body",
        "too large requests that were not refused",
    ):
        assert by_name[name].passed, (by_name[name], result.notes)
