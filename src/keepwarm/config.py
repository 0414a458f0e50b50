"""The settings of a server: from flags, else the environment, else `keepwarm.toml`.

A setting has one name in three forms: `server.port`, `KEEPWARM_SERVER_PORT`, and `port` under
`[server]`. Every section is a dataclass next to the code that it configures.
"""

import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from keepwarm.core.errors import ConfigError
from keepwarm.core.policies import EngineConfig
from keepwarm.home import keepwarm_home
from keepwarm.server.settings import ServerConfig
from keepwarm.service.model_registry import AutoLoad, ModelSettings, require_dtypes
from keepwarm.store.agent_cache_store import StoreConfig

FILE_NAME = "keepwarm.toml"
MODELS = "models"
"""The section of the file that has a table for each model."""
PREFIX = "KEEPWARM_"
OTHER_VARIABLES = frozenset(
    {
        "KEEPWARM_HOME",
        "KEEPWARM_BLAS",
        "KEEPWARM_NATIVE",
        "KEEPWARM_URL",
        "KEEPWARM_API_KEY",
        "KEEPWARM_CONFIG",
    }
)
"""Variables with the prefix that are not settings: where state is kept, what computes, and what
clients need."""

MAX_WHOLE_NUMBER = 1 << 62
"""The largest whole number of a setting: SQLite, clocks and file formats can all hold it."""

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(rf"([0-9]+|[0-9]+\.[0-9]+(?=\s*[kmgt]))\s*({'|'.join(filter(None, _UNITS))})?")

Values = Mapping[str, object]
"""Values by the names of their settings, `section.key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model that is served, and how it computes.

    name: smollm2, a folder, or a hub id. dtype: float32, float16 or bfloat16; the device's own
    where it is empty. kv_dtype: float16 or float32, for the KV of the native step; float16 where it
    is empty. native: whether the native step may compute it. deterministic: where MLX computes on
    the CPU, results are equal to the bit whatever else is in the batch, at up to 1.7 times the time
    per token; the native step's always are. auto_load: which other models are loaded when a
    request names them: `known` ones, which have a section `[models.NAME]`, `any` folder or hub id,
    or `never` one. memory_bytes: the most memory for the weights of all models; 0 is the device's
    memory less the KV's budget. patience_s: how many seconds a model that must make room goes on
    answering; unfinished replies then wait for its return. build_when_idle: while there are no
    requests, the new turns of agents that talk to several models are computed on each of those
    models that is in memory.
    """

    name: str = "smollm2"
    dtype: str = ""
    kv_dtype: str = ""
    native: bool = True
    deterministic: bool = False
    auto_load: AutoLoad = AutoLoad.KNOWN
    memory_bytes: int = 0
    patience_s: float = 30.0
    build_when_idle: bool = True

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("name", "must name a model: smollm2, a folder, or a hub id")
        require_dtypes(self.dtype, self.kv_dtype)
        for key in ("memory_bytes", "patience_s"):
            if getattr(self, key) < 0:
                raise ConfigError(key, "must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """The memory for KV; the weights of the models come on top of it.

    budget_bytes: the most memory for the KV of all agents; 0 is a quarter of the device's.
    """

    budget_bytes: int = 0

    def __post_init__(self) -> None:
        if self.budget_bytes < 0:
            raise ConfigError("budget_bytes", "must not be negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings by section; `models`: by name, the models that have settings of their own."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    disk: StoreConfig = field(default_factory=StoreConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    models: Mapping[str, ModelSettings] = field(default_factory=dict)


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
    """Read all settings. Raises ConfigError, which names the setting and its value's source."""
    path = config_file or find_file(environment)
    from_flags = {name: Given(value, "the command line") for name, value in (flags or {}).items()}
    values: dict[str, object] = {}
    given: dict[str, Given] = {}
    for source in (_from_file(path) if path else {}, _from_environment(environment), from_flags):
        values |= {name: _valid(name, one) for name, one in source.items()}
        given |= source
    sections = {name: _section(name, values, given) for name in SECTIONS}
    return Settings(**sections, models=_models_of(path) if path else {})


def find_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Find the file: the one that `KEEPWARM_CONFIG` names, else one here, else in the home."""
    named = environment.get("KEEPWARM_CONFIG")
    if named:
        return Path(named).expanduser()
    places = (Path.cwd() / FILE_NAME, keepwarm_home() / FILE_NAME)
    return next((path for path in places if path.is_file()), None)


def all_settings() -> Iterator[tuple[str, Field[Any]]]:
    """Yield every setting with its name, `section.key`."""
    for section, config_type in SECTIONS.items():
        for setting in fields(config_type):
            yield f"{section}.{setting.name}", setting


def default_of(setting: "Field[Any]") -> object:
    """Return the setting's default value."""
    if setting.default_factory is not MISSING:
        return setting.default_factory()
    return setting.default


def variable_of(name: str) -> str:
    """Name the environment variable of a setting."""
    return PREFIX + name.replace(".", "_").upper()


def parse_size(name: str, text: str) -> int:
    """Read `8GiB`, `500MB` or `12` as bytes. Raises ConfigError, for the setting `name`."""
    try:
        return _size(text)
    except _WrongValue as error:
        raise ConfigError(name, f"{error}, not {text!r}") from None


def is_secret(setting: "Field[Any]") -> bool:
    """Whether the setting's value is never shown, not even where it is wrong."""
    return not setting.repr


# -- sources ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """A value as it was written, and where."""

    value: object
    source: str


def _document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:  # neither UTF-8, nor TOML, nor numbers for Python
        raise ConfigError(str(path), f"cannot be read: {error}") from error


def _models_of(path: Path) -> dict[str, ModelSettings]:
    """Read the tables `[models.NAME]`, which only a file can have."""
    tables = _document(path).get(MODELS, {})
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise ConfigError(MODELS, f"must hold one table for each model, in {path}")
    return {name: _model_of(name, table, path) for name, table in tables.items()}


def _model_of(name: str, table: Mapping[str, object], path: Path) -> ModelSettings:
    if not name.strip():
        raise ConfigError(MODELS, f"has a table without a name, in {path}")
    hints = get_type_hints(ModelSettings)
    values: dict[str, Any] = {}
    for key, value in table.items():
        setting = f"{MODELS}.{name}.{key}"
        if key not in hints:
            raise ConfigError(
                setting, f"is not a setting (from {path}); there are {_listed(hints)}"
            )
        try:
            values[key] = _parsed(key, value, hints[key])
        except _WrongValue as error:
            raise ConfigError(setting, f"{error}, not {value!r} (from {path})") from None
    try:
        return ModelSettings(**values)
    except ConfigError as error:
        raise ConfigError(
            f"{MODELS}.{name}.{error.key}", f"{error.problem} (from {path})"
        ) from error


def _from_file(path: Path) -> dict[str, Given]:
    document = _document(path)
    values: dict[str, Given] = {}
    document.pop(MODELS, None)
    for section, table in document.items():
        if section not in SECTIONS or not isinstance(table, dict):
            raise ConfigError(section, f"is not a section of {path}; there are {_listed(SECTIONS)}")
        for key, value in table.items():
            values[f"{section}.{key}"] = Given(value, str(path))
    return values


def _from_environment(environment: Mapping[str, str]) -> dict[str, Given]:
    names = {variable_of(name): name for name, _ in all_settings()}
    values: dict[str, Given] = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        if variable not in names:
            raise ConfigError(variable, "is not a setting; docs/configuration.md lists them")
        values[names[variable]] = Given(value, f"the environment's {variable}")
    return values


# -- values ----------------------------------------------------------------------------------------


class _WrongValue(Exception):
    """Says what is wrong with a value, without repeating it."""


def _valid(name: str, given: Given) -> object:
    setting = dict(all_settings()).get(name)
    if setting is None:
        problem = f"is not a setting (from {given.source}); docs/configuration.md lists them"
        raise ConfigError(name, problem)
    section, _, key = name.partition(".")
    hint = get_type_hints(SECTIONS[section])[key]
    try:
        return _parsed(key, given.value, hint)
    except _WrongValue as error:
        shown = "" if is_secret(setting) else f", not {given.value!r}"
        # `from None`: the cause would quote the value, which may be a secret.
        raise ConfigError(name, f"{error}{shown} (from {given.source})") from None


def _parsed(key: str, value: object, hint: Any) -> object:
    if "bytes" in key.split("_"):
        return _in_range(_size(value))
    try:
        parsed = _typed(value, hint)
    except ValidationError as error:
        raise _WrongValue(error.errors()[0]["msg"]) from None
    return _in_range(parsed)


def _typed(value: object, hint: Any) -> object:
    """Convert text to the wanted type; other values must have that type already."""
    adapter: TypeAdapter[object] = TypeAdapter(hint)
    if isinstance(value, str):
        return adapter.validate_python(_from_text(value, hint))
    if isinstance(value, list):
        value = tuple(value)
    return adapter.validate_python(value, strict=True)


def _from_text(text: str, hint: Any) -> object:
    """Read `a,b` as a list, or `name=value,other=value` as a table, where one is wanted."""
    if get_origin(hint) is None:
        return text
    items = [item.strip() for item in text.split(",") if item.strip()]
    return items if get_origin(hint) is tuple else _table(items)


def _table(items: Sequence[str]) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, item in enumerate(items, 1):
        name, equals, value = item.partition("=")
        if not equals:
            raise _WrongValue(f"must be NAME=VALUE,NAME=VALUE; item {number} has no '='")
        if table.setdefault(name.strip(), value.strip()) != value.strip():
            raise _WrongValue(f"item {number} gives a name another value")
    return table


def _size(value: object) -> int:
    """Read `8GiB`, `500MB`, or a whole number of bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    if match is None:
        raise _WrongValue("must be a size like 8GiB or 500MB, or a whole number of bytes")
    number, unit = match.groups()
    return int(Decimal(number) * _UNITS[unit or ""])


def _in_range(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise _WrongValue("must be a finite number")
    if isinstance(value, int) and abs(value) > MAX_WHOLE_NUMBER:
        raise _WrongValue(f"must not be beyond {MAX_WHOLE_NUMBER:,}")
    return value


def _section(section: str, values: Values, given: Mapping[str, Given]) -> Any:
    own = {
        name.partition(".")[2]: value
        for name, value in values.items()
        if name.startswith(f"{section}.")
    }
    try:
        return SECTIONS[section](**own)
    except ConfigError as error:
        name = f"{section}.{error.key}"
        source = f" (from {given[name].source})" if name in given else ""
        raise ConfigError(name, f"{error.problem}{source}") from error


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names)
