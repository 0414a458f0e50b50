"""How the server listens, whom it lets in, and how long it waits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from keepwarm.core.errors import ConfigError, InvalidRequest
from keepwarm.engine.requests import valid_namespace
from keepwarm.service.model_registry import MAX_TEMPERATURE

DEFAULT_NAMESPACE = "default"
"""The one that is used without keys."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_AT_LEAST = {
    "max_body_bytes": 1,
    "max_import_bytes": 1,
    "max_head_bytes": 1 << 10,  # what browsers send takes about so much
    "max_connections": 1,
    "max_messages": 1,
    "max_choices": 1,
}
_DURATIONS = (
    "head_timeout_s",
    "body_timeout_s",
    "keep_alive_s",
    "heartbeat_s",
    "queue_timeout_s",
    "slow_reader_s",
)


class LogFormat(StrEnum):
    """How log lines are written: for people, or for machines."""

    CONSOLE = "console"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server listens, whom it lets in, and how long it waits.

    host, port: where it listens. api_keys: namespace to key; whoever has the key sees that
    namespace's agents and shares KV with nobody else; the namespace "default" is the one that is
    used without keys. admins: the namespaces whose keys may load and unload models and see the
    figures of all; a key alone always may. allowed_hosts: values of `Host` beyond loopback's that
    are answered when it listens on loopback. allowed_origins: web pages that may call it (CORS);
    none by default. model_aliases: other names of the model that requests may use; `*` at the end
    stands for anything. max_body_bytes: of a request; an import is bounded by max_import_bytes.
    max_head_bytes: request line and headers together. max_connections: at once; further ones are
    told so. head_timeout_s: for a whole head. body_timeout_s: how long a client may keep the server
    waiting for its body, and a second longer for each 16 KiB of it. keep_alive_s: how long a
    connection may be idle. max_messages: of a request, counting the parts of their contents.
    max_choices: the largest `n`. rate_per_minute: requests per key, or per address without keys; 0
    is any number. heartbeat_s: a stream is never silent for longer. queue_timeout_s: how long a
    request may wait for its row. deadline_s: for its last token; 0 is for ever. slow_reader_s: how
    long one write to a client may take. shutdown_grace_s: how long running replies may go on after
    the server was told to stop. default_temperature: where a request gives none. log_format:
    console or json. log_prompts: whether logs may hold what was said.
    """

    host: str = "127.0.0.1"
    port: int = 8642
    api_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    admins: tuple[str, ...] = (DEFAULT_NAMESPACE,)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    model_aliases: tuple[str, ...] = ()
    max_body_bytes: int = 32 << 20
    max_import_bytes: int = 64 << 30
    max_head_bytes: int = 64 << 10
    max_connections: int = 1024
    head_timeout_s: float = 20.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    max_messages: int = 8192
    max_choices: int = 8
    rate_per_minute: int = 0
    heartbeat_s: float = 10.0
    queue_timeout_s: float = 600.0
    deadline_s: float = 0.0
    slow_reader_s: float = 120.0
    shutdown_grace_s: float = 30.0
    default_temperature: float = 1.0
    log_format: LogFormat = LogFormat.CONSOLE
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise ConfigError("host", "must not be empty; 0.0.0.0 listens on every address")
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", f"must be from 0 to 65535, not {self.port}")
        self._check_numbers()
        self._check_keys()

    def _check_numbers(self) -> None:
        for key, least in _AT_LEAST.items():
            if getattr(self, key) < least:
                raise ConfigError(key, f"must be at least {least}, not {getattr(self, key)}")
        for key in _DURATIONS:
            if not getattr(self, key) > 0:
                raise ConfigError(key, f"must be above 0, not {getattr(self, key)}")
        for key in ("rate_per_minute", "deadline_s", "shutdown_grace_s", "default_temperature"):
            if getattr(self, key) < 0:
                raise ConfigError(key, f"must not be negative, as {getattr(self, key)} is")
        if self.default_temperature > MAX_TEMPERATURE:
            raise ConfigError("default_temperature", f"must be at most {MAX_TEMPERATURE:g}")

    def _check_keys(self) -> None:
        for namespace, key in self.api_keys.items():
            if not namespace:
                raise ConfigError("api_keys", "a key has no namespace; call it 'default'")
            try:
                valid_namespace(namespace)
            except InvalidRequest as error:
                raise ConfigError("api_keys", error.problem) from error
            if not key:
                raise ConfigError("api_keys", f"the key of {namespace!r} is empty")
        if len(set(self.api_keys.values())) < len(self.api_keys):
            raise ConfigError("api_keys", "two namespaces have the same key")
        for namespace in self.admins:
            if namespace not in (*self.api_keys, DEFAULT_NAMESPACE):
                raise ConfigError("admins", f"{namespace!r} has no key in api_keys")

    def is_admin(self, namespace: str) -> bool:
        """Whether the namespace's key is an admin's."""
        return len(self.api_keys) == 1 or namespace in self.admins

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK
