"""Compiles the native step with the package, where this machine can; without it the wheel is pure.

A system compiler is used where there is one; else the `ziglang` wheel is asked for, which also
makes wheels for old versions of glibc. KEEPWARM_NATIVE_BUILD=off leaves the step out.
"""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src") / "keepwarm" / "native"


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        if not self._wants_native or _build_of(self.root).system_compilers():
            return []
        return ["ziglang"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or not self._wants_native:
            return
        build = _build_of(self.root)
        folder = Path(self.root) / NATIVE / "builds"
        try:
            made = build.build(build.TARGETS.get(platform.machine(), ()), folder)
        except (build.NoCompiler, subprocess.CalledProcessError, OSError) as error:
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(f"Keepwarm without its native step: {reason}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag()}"
        build_data["artifacts"] += [str(path.relative_to(self.root)) for path in made]

    @property
    def _wants_native(self) -> bool:
        return sys.platform == "linux" and os.environ.get("KEEPWARM_NATIVE_BUILD") != "off"


def _platform_tag() -> str:
    """Name this system: a library of the system's compiler needs its libc or a later one."""
    libc, version = platform.libc_ver()
    if libc != "glibc":
        return f"linux_{platform.machine()}"
    return f"manylinux_{version.replace('.', '_')}_{platform.machine()}"


def _build_of(root: str) -> ModuleType:
    path = Path(root) / NATIVE / "build.py"
    spec = importlib.util.spec_from_file_location("keepwarm_native_build", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
