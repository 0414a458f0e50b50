"""Compiles the native step with the package, where this machine can; without it the wheel is pure.

The system's compiler is used where there is one, and the wheel is then for this system. Otherwise
the `ziglang` wheel is asked for, whose libraries run with glibc 2.27 and later. The variable
KEEPWARM_NATIVE_BUILD changes that: `x86_64` or `aarch64` builds the wheel for such machines, always
with ziglang, and `off` the pure wheel.
"""

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

VARIABLE = "KEEPWARM_NATIVE_BUILD"
NATIVE = Path("src") / "keepwarm" / "native"


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        return ["ziglang"] if self._wants_native and self._is_portable else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or not self._wants_native:
            return
        try:
            made = list(self._compiled())
        except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(f"Keepwarm without its native step: {reason}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{self._platform_tag()}"
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in made]

    def _compiled(self) -> Iterator[Path]:
        """Compile what the machine's CPUs can run. Raises RuntimeError without a compiler."""
        build = _build_of(self.root)
        for target in build.TARGETS.get(self._machine, ()):
            compiler = build.zig_command_for(target) if self._is_portable else None
            yield from build.build([target], Path(self.root) / NATIVE / "builds", compiler=compiler)

    @property
    def _wants_native(self) -> bool:
        return sys.platform == "linux" and os.environ.get(VARIABLE) != "off"

    @property
    def _machine(self) -> str:
        return os.environ.get(VARIABLE) or platform.machine()

    @property
    def _is_portable(self) -> bool:
        """Whether ziglang compiles: where it was asked for, or the system has no compiler."""
        return bool(os.environ.get(VARIABLE)) or not _build_of(self.root).system_compilers()

    def _platform_tag(self) -> str:
        """Name the systems that it is for: a system's compiler needs that system's libc."""
        libc, version = platform.libc_ver()
        if self._is_portable:
            return f"manylinux_2_27_{self._machine}"
        if libc != "glibc":
            return f"linux_{self._machine}"
        return f"manylinux_{version.replace('.', '_')}_{self._machine}"


def _build_of(root: str) -> ModuleType:
    path = Path(root) / NATIVE / "build.py"
    spec = importlib.util.spec_from_file_location("keepwarm_native_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
