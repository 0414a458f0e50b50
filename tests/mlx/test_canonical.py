"""Deterministic mode says so where it cannot promise equal bits."""

from dataclasses import replace

import pytest

from keepwarm.core.ports import LoadedModel
from keepwarm.mlx_backend import CPU_SETUP
from keepwarm.mlx_backend.compute import canonical


def test_another_blas_is_warned_about(
    smollm2_on_mlx: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical, "CPU_SETUP", replace(CPU_SETUP, needed=True, mkl_cbwr=None))
    with pytest.warns(UserWarning, match="not promised with this BLAS"):
        smollm2_on_mlx.batch_gen_factory(deterministic=True)


@pytest.mark.skipif(bool(canonical.why_not_promised()), reason="this device promises nothing")
def test_nothing_is_said_where_bits_are_equal(smollm2_on_mlx: LoadedModel) -> None:
    smollm2_on_mlx.batch_gen_factory(deterministic=True)


@pytest.mark.filterwarnings("error")
def test_the_native_step_needs_no_blas_for_equal_bits(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not smollm2.is_reproducible:
        pytest.skip(smollm2.computed_by)
    monkeypatch.setattr(canonical, "CPU_SETUP", replace(CPU_SETUP, needed=True, mkl_cbwr=None))
    smollm2.batch_gen_factory(deterministic=True)
