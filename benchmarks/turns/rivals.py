"""Other servers on the embedded model, each in a process of its own that prints its port."""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from socket import create_server
from typing import Any, cast

from benchmarks.server.wire import HOST
from keepwarm.bench.child_process import ChildProcess
from keepwarm.bench.requiring import PathNotTaken, require
from keepwarm.mlx_backend.loading.embedded_model import embedded_model, embedded_source

LLAMA, MLX_LM = "llama.cpp", "mlx-lm"
LLAMA_PACKAGE = "xllamacpp"
"""The wheel with llama.cpp's server; no dependency of Keepwarm."""
START_S = 120.0
SLOT_TOKENS = 2048
BATCH_TOKENS = 512


def installed_rivals() -> tuple[str, ...]:
    """Return the servers that can be started here."""
    return (MLX_LM, LLAMA) if find_spec(LLAMA_PACKAGE) else (MLX_LM,)


@contextmanager
def rival_server(name: str, folder: Path, *, num_slots: int) -> Iterator[tuple[int, str]]:
    """Run the server until the block ends; yield its port, and the model's name for requests.

    `folder` is for files that it needs. llama.cpp has the packaged weights and `num_slots` slots;
    mlx-lm's server has them in float32, because its quantised products are slow on a CPU.
    """
    arguments = (name, str(folder), str(num_slots))
    with ChildProcess("-m", "benchmarks.turns.rivals", *arguments) as process:
        line = process.read_line()
        if not line:
            raise PathNotTaken(f"{name} did not start: {process.complaints()[-2000:]}")
        port, model = json.loads(line)
        _wait_for(port)
        yield port, model


def _wait_for(port: int) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        connection = HTTPConnection(HOST, port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    require(False, f"nothing answers at port {port} after {START_S:g} s")


# -- in the child ----------------------------------------------------------------------------------


def _serve_llama(num_slots: int) -> None:
    module: Any = importlib.import_module(LLAMA_PACKAGE)
    params = module.CommonParams()
    params.model.path = str(embedded_source().path)
    params.port = _free_port()
    params.n_ctx, params.n_parallel = num_slots * SLOT_TOKENS, num_slots
    params.n_ubatch = BATCH_TOKENS
    params.n_gpu_layers = 0
    params.verbosity = 0
    num_cpus = len(os.sched_getaffinity(0))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_cpus
    server = module.Server(params)
    _announce(int(server.listening_address.rsplit(":", 1)[1]), "smollm2")
    sys.stdin.read()


def _serve_mlx_lm(folder: Path) -> None:
    from mlx_lm import server

    import keepwarm  # noqa: F401 - its BLAS comes before MLX

    weights = _in_float32(folder)
    port = _free_port()
    _announce(port, str(weights))
    sys.argv = ["mlx_lm.server", "--model", str(weights), "--port", str(port)]
    server.main()


def _in_float32(folder: Path) -> Path:
    """Write the embedded model without quantisation. Returns its folder."""
    from mlx_lm.utils import dequantize_model, load, save

    source, target = embedded_model(folder), folder / "float32"
    model, tokenizer, config = cast("tuple[Any, Any, Any]", load(str(source), return_config=True))
    config.pop("quantization", None)
    config.pop("quantization_config", None)
    plain = dequantize_model(model)
    plain.set_dtype(_float32())
    save(target, source, plain, tokenizer, config)
    return target


def _float32() -> Any:
    import mlx.core as mx

    return mx.float32


def _free_port() -> int:
    with create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def _announce(port: int, model: str) -> None:
    print(json.dumps([port, model]), flush=True)  # noqa: T201 - for the process that asked


def _main(name: str, folder: str, num_slots: str) -> None:
    if name == LLAMA:
        _serve_llama(int(num_slots))
    else:
        _serve_mlx_lm(Path(folder))


if __name__ == "__main__":
    _main(*sys.argv[1:])
