"""The settings of the server: where it listens, what it lets in, and how long it waits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from keepwarm.core.errors import ConfigError, InvalidRequest
from keepwarm.engine.requests import valid_namespace
from keepwarm.service.model_registry import MAX_TEMPERATURE

DEFAULT_NAMESPACE = "default"
"""The namespace of callers where the server has no keys."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_AT_LEAST = {
    "max_body_bytes": 1,
    "max_import_bytes": 1,
    "max_head_bytes": 1 << 10,  # about what browsers send
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
    """The form of log lines: for people, or for machines."""

    CONSOLE = "console"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens, what it lets in, and how long it waits. Times are in seconds.

    host, port: where it listens. api_keys: namespace to key; a key opens the agents of its
    namespace, which share KV with no other namespace; "default" is the namespace that is used
    without keys. admins: the namespaces whose keys may load and unload models and see everyone's
    figures; a single key always may. allowed_hosts: values of `Host`, beside loopback's, that are
    answered when it listens on loopback. allowed_origins: web pages that may call it (CORS); none
    by default. model_aliases: other names of the model that requests may use; `*` at the end stands
    for anything. max_body_bytes: the largest body; an import is bounded by max_import_bytes.
    max_head_bytes: request line and headers together. max_connections: open at once; further ones
    get a 503. head_timeout_s: how long a whole head may take. body_timeout_s: how long the server
    waits for a body, and a second more for each 16 KiB of it. keep_alive_s: how long a connection
    may be idle. max_messages: messages of a request, counting the parts of their contents.
    max_choices: the largest `n`. rate_per_minute: requests per key, or per address without keys; 0
    is no limit. heartbeat_s: a stream is never silent for longer. queue_timeout_s: how long a
    request may wait for its row. deadline_s: how long a request may take in all; 0 is no limit.
    slow_reader_s: how long a client may take to read what it was sent. shutdown_grace_s: how long
    running replies may go on after the server was told to stop. default_temperature: where a
    request gives none. log_format: console or json. log_prompts: whether logs may hold what was
    said.
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
        """Whether it listens on loopback only."""
        return self.host in LOOPBACK
