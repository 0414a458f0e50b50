"""Errors of the catalogue and of the disk under it, each with the facts."""

from pathlib import Path

from keepwarm.core.errors import KeepwarmError


class CatalogTooNew(KeepwarmError):
    """The file was written by a newer Keepwarm. Nothing was changed."""

    def __init__(self, path: Path, *, found: int, supported: int) -> None:
        super().__init__(
            f"{path} has version {found} and this Keepwarm reads versions up to {supported}; "
            "install the newer Keepwarm again, or choose another home"
        )
        self.path = path
        self.found = found
        self.supported = supported


class CatalogCorrupt(KeepwarmError):
    """The file is not a catalogue, or is damaged. `set_aside` makes room for a new one."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path} cannot be used as a catalogue: {problem}")
        self.path = path
        self.problem = problem


class CatalogUnavailable(KeepwarmError):
    """The disk refused. Nothing of the operation was kept, and it may be tried again."""

    def __init__(self, path: Path, *, operation: str, message: str, errorname: str) -> None:
        super().__init__(f"{path}: {operation} failed: {message} ({errorname})")
        self.path = path
        self.operation = operation
        self.message = message
        self.errorname = errorname


class UnstorableMessage(KeepwarmError):
    """A message is not JSON, so it could not be given back as it was."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"a message cannot be stored as JSON: {problem}")
        self.problem = problem
