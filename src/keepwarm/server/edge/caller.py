"""Who sent a request: whose namespace it is in, and how it names its agent."""

from collections.abc import Mapping
from dataclasses import dataclass

from keepwarm.core.agent import home_namespace, in_namespace
from keepwarm.engine.requests import valid_name
from keepwarm.server.edge.identity import agent_of
from keepwarm.server.edge.keys import Role
from keepwarm.server.problems import Kind, NotAllowed, Problem


@dataclass(frozen=True, slots=True)
class Caller:
    """`role` comes from the key, and is the owner's where none is asked for."""

    role: Role
    headers: Mapping[str, str]

    @property
    def namespace(self) -> str:
        return self.role.namespace

    def agent_of(self, *fields: object) -> str | None:
        """The agent's whole name, by the headers or the fields. Raises InvalidRequest."""
        agent_id = agent_of(self.headers, *fields)
        return None if agent_id is None else in_namespace(self.namespace, agent_id)

    def agent(self, name: str) -> str:
        """The whole name of an agent that is named in a path. Raises InvalidRequest."""
        return in_namespace(self.namespace, valid_name(name))

    def stored_agent(self, name: str) -> str:
        """The same for one that is there already, whose name may have been damaged on the disk."""
        return in_namespace(self.namespace, name)

    def must_be_admin(self) -> None:
        """Raises NotAllowed for a user's key."""
        if not self.role.is_admin:
            message = "this needs an admin's key; see server.admins"
            raise NotAllowed(Problem(403, Kind.FORBIDDEN, message))

    def owns(self, agent_id: str) -> bool:
        return home_namespace(agent_id) == self.namespace

    def shown(self, agent_id: str) -> str:
        """An agent's name as its owner knows it."""
        return in_namespace("", agent_id)
