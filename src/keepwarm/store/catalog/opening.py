"""Opening the catalogue: what it knows, and what replaces one that is damaged or gone."""

import logging
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from keepwarm.core.agent import PRIVATE
from keepwarm.core.block import BlockHash
from keepwarm.core.stored import AgentState, KVFamily
from keepwarm.store.catalog.catalog import Catalog
from keepwarm.store.catalog.errors import CatalogCorrupt
from keepwarm.store.catalog.rescue import rescue
from keepwarm.store.catalog.rows import BlockUsage, RecordRow
from keepwarm.store.catalog.schema import set_aside

log = logging.getLogger("keepwarm.store")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Opened:
    """What the catalogue knew when it was opened.

    `unclaimed` records are of an import that never got an agent. `damaged` agents cannot be read,
    for the reason given; more may be found when they are asked for. `notices` say what was lost.
    """

    rows: list[RecordRow]
    usage: BlockUsage
    pinned: list[AgentState]
    clock: int
    other_bytes: int = 0
    needs_erasing: bool = False
    unclaimed: tuple[BlockHash, ...] = ()
    damaged: dict[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def open_catalog(path: Path, *, was_used: bool) -> tuple[Catalog, Opened]:
    """Open the catalogue and read what it knows. Raises CatalogTooNew and CatalogUnavailable.

    One that cannot be used is set aside, and a new one begun with every agent that can be read of
    it. `was_used`: the home had a catalogue before, so it is a loss where there is none.
    """
    if was_used and not (path.exists() and path.stat().st_size):
        return _begin_anew(path, f"{path} is {'empty' if path.exists() else 'gone'}")
    try:
        return _read(path)
    except CatalogCorrupt as error:
        return _begin_anew(path, str(error))


def _begin_anew(path: Path, problem: str) -> tuple[Catalog, Opened]:
    moved = set_aside(path)
    with Catalog.open(path) as catalog:
        rescued = rescue(moved, catalog)
    log.error(
        "%s. What is left of it was moved to %s and a new catalogue is begun: %s. KV of the rest "
        "is found again by content",
        problem,
        moved,
        rescued,
    )
    notice = f"the agents' catalogue was damaged or gone and is begun anew: {rescued}"
    return _read(path, (notice,))


def _read(path: Path, notices: tuple[str, ...] = ()) -> tuple[Catalog, Opened]:
    catalog = Catalog.open(path)
    try:
        damaged = catalog.find_damaged()
        rows: list[RecordRow] = _or_anew(catalog, catalog.load_records, [])
        namespaces = catalog.namespaces()
        usage = _or_anew(catalog, catalog.load_usage, BlockUsage(Counter(), {}))
        return catalog, Opened(
            rows,
            usage,
            catalog.load_pinned(damaged),
            catalog.clock(),
            needs_erasing=catalog.needs_scrub,
            unclaimed=tuple(row.hash for row in rows if is_unclaimed(row.family, namespaces)),
            damaged=damaged,
            notices=notices,
        )
    except BaseException:
        catalog.close()
        raise


def is_unclaimed(family: KVFamily, namespaces: Collection[str]) -> bool:
    """Whether KV of this family is of an import that was killed before its agent was there."""
    return family.namespace.startswith(PRIVATE) and family.namespace not in namespaces


def _or_anew(catalog: Catalog, load: Callable[[], T], nothing: T) -> T:
    """Load from the tables about KV, which are begun anew where a page of them is damaged."""
    try:
        return load()
    except CatalogCorrupt as error:
        log.error("%s. Its tables about KV are begun anew; KV is found again by content", error)
        catalog.begin_records_anew()
        return nothing
