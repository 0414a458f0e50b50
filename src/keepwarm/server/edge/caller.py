"""Who sent a request: the namespace it is in, and the agent that it names."""

from collections.abc import Mapping
from dataclasses import dataclass

from keepwarm.core.agent import home_namespace, in_namespace
from keepwarm.engine.requests import valid_name
from keepwarm.server.edge.identity import agent_of
from keepwarm.server.edge.keys import Role
from keepwarm.server.problems import Kind, NotAllowed, Problem


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of one request. `role` comes from its key; without keys it is the owner's."""

    role: Role
    headers: Mapping[str, str]

    @property
    def namespace(self) -> str:
        """The namespace of the caller's agents; empty for the default one."""
        return self.role.namespace

    def agent_of(self, *fields: object) -> str | None:
        """Find the agent's whole name, by the headers or the fields. Raises InvalidRequest."""
        agent_id = agent_of(self.headers, *fields)
        return None if agent_id is None else in_namespace(self.namespace, agent_id)

    def agent(self, name: str) -> str:
        """Return the whole name of an agent that a path names. Raises InvalidRequest."""
        return in_namespace(self.namespace, valid_name(name))

    def stored_agent(self, name: str) -> str:
        """Return the whole name of an agent on disk, whose name may be damaged and invalid."""
        return in_namespace(self.namespace, name)

    def must_be_admin(self) -> None:
        """Raise NotAllowed for a user's key."""
        if not self.role.is_admin:
            message = "this needs an admin's key; see server.admins"
            raise NotAllowed(Problem(403, Kind.FORBIDDEN, message))

    def owns(self, agent_id: str) -> bool:
        """Whether the agent is in the caller's namespace."""
        return home_namespace(agent_id) == self.namespace

    def shown(self, agent_id: str) -> str:
        """Return the agent's name as its owner knows it, without its namespace."""
        return in_namespace("", agent_id)
