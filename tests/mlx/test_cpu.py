"""The preparation of the CPU device. Each case needs a fresh process: a BLAS is loaded once."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from keepwarm.mlx_backend import CPU_SETUP

pytestmark = pytest.mark.skipif(
    not CPU_SETUP.needed, reason="MLX brings its own BLAS or computes on a GPU here"
)
needs_reproducible_blas = pytest.mark.skipif(
    not CPU_SETUP.reproducible, reason="only MKL's products are reproducible; x86-64 has it"
)

REPORT = """
import json, dataclasses, keepwarm.mlx_backend
print(json.dumps(dataclasses.asdict(keepwarm.mlx_backend.CPU_SETUP)))
"""

# Rows of products over SmolLM2's weight shapes, and of attention over padded keys.
DIGEST = """
import hashlib, keepwarm.mlx_backend, mlx.core as mx, numpy as np
rng = np.random.default_rng(0)
rows = hashlib.sha256()
for outputs, inputs in ((192, 576), (576, 576), (1536, 576), (576, 1536), (4096, 576)):
    weight = mx.array(rng.standard_normal((outputs, inputs), dtype=np.float32))
    x = mx.array(rng.standard_normal((1, 512, inputs), dtype=np.float32))
    whole = np.array(x @ weight.T)
    for num_rows in (4, 8, 12, 64, 252, 256):
        part = np.array(mx.contiguous(x[:, :num_rows]) @ weight.T)
        assert part.tobytes() == whole[:, :num_rows].tobytes(), (outputs, inputs, num_rows)
    rows.update(whole.tobytes())


def attend(q, k, v, num_keys):
    mask = mx.arange(k.shape[2]) < num_keys
    return np.array(mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask=mask))


q = mx.array(rng.standard_normal((1, 9, 256, 64), dtype=np.float32))
k = mx.array(rng.standard_normal((1, 3, 2048, 64), dtype=np.float32))
v = mx.array(rng.standard_normal((1, 3, 2048, 64), dtype=np.float32))
for num_keys in (100, 300, 500):
    whole = attend(q, k, v, num_keys)
    for num_rows, padded in ((4, 512), (4, 1024), (64, 512), (256, 512)):
        part = attend(
            mx.contiguous(q[:, :, :num_rows]),
            mx.contiguous(k[:, :, :padded]),
            mx.contiguous(v[:, :, :padded]),
            num_keys,
        )
        assert part.tobytes() == whole[:, :, :num_rows].tobytes(), (num_keys, num_rows, padded)
    rows.update(whole.tobytes())
print(rows.hexdigest())
"""


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, warnings included."""
    inherited = {key: value for key, value in os.environ.items() if not is_blas_setting(key)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def is_blas_setting(key: str) -> bool:
    return key.startswith(("MKL_", "OPENBLAS_", "OMP_", "KEEPWARM_BLAS", "PYTHONWARNINGS"))


def report(**environment: str) -> dict[str, object]:
    return json.loads(run(REPORT, **environment).splitlines()[-1])


def test_it_finds_an_installed_blas_and_tunes_malloc() -> None:
    found = report()

    assert Path(str(found["blas"])).exists()
    assert found["malloc_tuned"] == (platform.libc_ver()[0] == "glibc")
    assert found["num_threads"] == len(os.sched_getaffinity(0))
    assert not found["too_late"]


def test_what_the_user_has_set_wins() -> None:
    found = report(OMP_NUM_THREADS="1", MKL_CBWR="COMPATIBLE")

    assert found["num_threads"] == 1
    assert found["mkl_cbwr"] in {"COMPATIBLE", None}


def test_without_a_blas_it_warns_and_still_works() -> None:
    printed = run(REPORT, KEEPWARM_BLAS="none")

    assert "no optimised BLAS was found" in printed
    assert json.loads(printed.splitlines()[-1])["blas"] is None


def test_a_library_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    broken = tmp_path / "libbroken.so"
    broken.write_bytes(b"not a library")

    printed = run(REPORT, KEEPWARM_BLAS=str(broken))

    assert str(broken) in json.loads(printed.splitlines()[-1])["problems"][0]


def test_a_library_that_is_no_blas_is_reported() -> None:
    printed = run(REPORT, KEEPWARM_BLAS="libm.so.6")

    assert "cblas_sgemm" in json.loads(printed.splitlines()[-1])["problems"][0]


def test_importing_mlx_first_warns_that_it_is_too_late() -> None:
    printed = run("import mlx.core\n" + REPORT)

    assert "mlx.core was imported before keepwarm" in printed
    assert json.loads(printed.splitlines()[-1])["too_late"]


def test_importing_keepwarm_alone_prepares_nothing() -> None:
    code = "import os, sys, keepwarm, keepwarm.core.errors\n"
    code += "print('mlx' in sys.modules, 'MKL_CBWR' in os.environ)"

    assert run(code).strip() == "False False"


@needs_reproducible_blas
def test_mlx_really_uses_the_blas() -> None:
    code = "import keepwarm.mlx_backend, mlx.core as mx\n"
    code += "x = mx.ones((64, 64))\nmx.eval(x @ x)"

    assert "SGEMM" in run(code, MKL_VERBOSE="1")


@needs_reproducible_blas
def test_canonical_shapes_give_equal_bits_whatever_the_number_of_threads() -> None:
    """What EXP-005's strict form stands on: rows in fours, keys in multiples of 512."""
    digests = {run(DIGEST, OMP_NUM_THREADS=str(threads)) for threads in (1, 2)}

    assert len(digests) == 1
