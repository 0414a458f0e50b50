"""The settings of a server: flags before environment before `keepwarm.toml`, each named by where
it belongs: `server.port`, `KEEPWARM_SERVER_PORT`, `port` under `[server]`.

Every section is a dataclass that lies next to the code that it configures.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from pydantic import ByteSize, TypeAdapter, ValidationError

from keepwarm.core.errors import ConfigError
from keepwarm.core.policies import EngineConfig
from keepwarm.home import keepwarm_home
from keepwarm.server.settings import ServerConfig
from keepwarm.store.agent_cache_store import StoreConfig

T = TypeVar("T")

FILE_NAME = "keepwarm.toml"
PREFIX = "KEEPWARM_"
OTHER_VARIABLES = frozenset(
    {"KEEPWARM_HOME", "KEEPWARM_BLAS", "KEEPWARM_URL", "KEEPWARM_API_KEY", "KEEPWARM_CONFIG"}
)
"""Variables that are no settings of a server: where state lies, and what clients need."""

Values = Mapping[str, object]
"""By `section.key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which model is served, and how it computes.

    name: smollm2, a folder, or a hub id. dtype: float32, float16 or bfloat16; the device's own
    where it is empty. deterministic: the same bits whatever else is in the batch (on the CPU), at
    up to 1.7 times the time per token.
    """

    name: str = "smollm2"
    dtype: str = ""
    deterministic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """budget_bytes: what the KV of all agents may take in memory; 0 is a quarter of the machine's.

    The model's weights come on top of it.
    """

    budget_bytes: int = 0

    def __post_init__(self) -> None:
        if self.budget_bytes < 0:
            raise ConfigError("budget_bytes", "must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of them, by section."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    disk: StoreConfig = field(default_factory=StoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelConfig,
    "memory": MemoryConfig,
    "disk": StoreConfig,
    "engine": EngineConfig,
    "server": ServerConfig,
}


def load_settings(
    flags: Values | None = None,
    *,
    config_file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """Raises ConfigError, which names the setting, and where a wrong value comes from."""
    path = config_file or find_file(environment)
    sources = {
        str(path): _from_file(path) if path is not None else {},
        "the environment": dict(_from_environment(environment)),
        "the command line": dict(flags or {}),
    }
    values: dict[str, object] = {}
    for source, given in sources.items():
        for name, value in given.items():
            values[name] = _valid(name, value, source)
    return Settings(**{name: _section(name, values) for name in SECTIONS})


def find_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file that `KEEPWARM_CONFIG` names, else one here, else one in Keepwarm's home."""
    named = environment.get("KEEPWARM_CONFIG")
    if named:
        return Path(named).expanduser()
    places = (Path.cwd() / FILE_NAME, keepwarm_home() / FILE_NAME)
    return next((path for path in places if path.is_file()), None)


def all_settings() -> Iterator[tuple[str, Field[Any]]]:
    """Each by its name, `section.key`."""
    for section, config_type in SECTIONS.items():
        for setting in fields(config_type):
            yield f"{section}.{setting.name}", setting


def default_of(setting: "Field[Any]") -> object:
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return setting.default


# -- sources ---------------------------------------------------------------------------------------


def _from_file(path: Path) -> dict[str, object]:
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from error
    values: dict[str, object] = {}
    for section, table in document.items():
        if section not in SECTIONS or not isinstance(table, dict):
            raise ConfigError(section, f"is no section of {path}; there are {_listed(SECTIONS)}")
        values.update({f"{section}.{key}": value for key, value in table.items()})
    return values


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    names = {PREFIX + name.replace(".", "_").upper(): name for name, _ in all_settings()}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in names:
            raise ConfigError(variable, "is no setting; docs/configuration.md lists them")
        yield names[variable], value


# -- values ----------------------------------------------------------------------------------------


def _valid(name: str, value: object, source: str) -> object:
    section, _, key = name.partition(".")
    hints = get_type_hints(SECTIONS[section]) if section in SECTIONS else {}
    if key not in hints:
        raise ConfigError(name, f"is no setting (from {source}); docs/configuration.md lists them")
    try:
        return _adapter(key, hints[key]).validate_python(_from_text(value, hints[key]))
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ConfigError(name, f"{problem}, not {value!r} (from {source})") from error


def _adapter(key: str, hint: Any) -> TypeAdapter[Any]:
    """Bytes may be written as 8GiB or 500MB."""
    return TypeAdapter(ByteSize if key.endswith("_bytes") else hint)


def _from_text(value: object, hint: Any) -> object:
    """`a,b` is a list and `name=value,other=value` a table, where one is wanted."""
    if not isinstance(value, str) or get_origin(hint) is None:
        return value
    items = [item.strip() for item in value.split(",") if item.strip()]
    if get_origin(hint) is tuple:
        return items
    return dict(item.partition("=")[::2] for item in items)


def _section(section: str, values: Values) -> Any:
    own = {
        name.partition(".")[2]: value
        for name, value in values.items()
        if name.startswith(f"{section}.")
    }
    try:
        return SECTIONS[section](**own)
    except ConfigError as error:
        raise ConfigError(f"{section}.{error.key}", error.problem) from error


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names)
