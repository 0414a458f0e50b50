"""API keys: the namespace that each opens, and whether it is an admin's."""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from keepwarm.server.settings import DEFAULT_NAMESPACE, ServerConfig


@dataclass(frozen=True, slots=True)
class Role:
    """What a caller may see and do. `namespace` is empty for the default one."""

    namespace: str
    is_admin: bool


OWNER = Role("", is_admin=True)
"""The role of every caller where the server has no keys."""
ANONYMOUS = Role("", is_admin=False)
"""The role of a request without a key, which only open paths answer."""


class Keyring:
    """Knows the configured keys, as digests."""

    def __init__(self, config: ServerConfig) -> None:
        self._roles = {
            _digest(key): Role(
                "" if namespace == DEFAULT_NAMESPACE else namespace, config.is_admin(namespace)
            )
            for namespace, key in config.api_keys.items()
        }

    def __len__(self) -> int:
        return len(self._roles)

    def role_of(self, headers: Mapping[str, str]) -> Role | None:
        """Find the role by `Authorization: Bearer KEY` or `x-api-key: KEY`; None: no valid key."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(key)
        for known, role in self._roles.items():
            if hmac.compare_digest(known, digest):
                return role
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
