"""The catalogue's file: its tables and versions, how it is opened, and what SQLite's errors mean.

Texts and messages are blobs of UTF-8 with `surrogatepass`, because JSON may bring lone surrogates.
"""

import errno
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from keepwarm.core.errors import KeepwarmError
from keepwarm.store.catalog.errors import CatalogCorrupt, CatalogTooNew, CatalogUnavailable
from keepwarm.store.catalog.seals import COLUMNS, install, seal_all

Step = Callable[[sqlite3.Connection], None]
"""Takes the tables from one version to the next; foreign keys are not enforced meanwhile."""

APPLICATION_ID = int.from_bytes(b"KWrm", "big")
WAL_PAGES = 256
WAL_BYTES = 1 << 20
CACHE_KIB = 16 * 1024
FILE_SUFFIXES = ("", "-wal", "-shm")

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_PRIMARY_CODE = 0xFF

# What belongs to a line has the line first in its key and no rowid, so that it lies together: an
# agent is read from a few pages. Records come in the order of their creation.
_TABLES = {
    "agents": """(
        agent INTEGER PRIMARY KEY,
        name TEXT NOT NULL UNIQUE,
        pinned INTEGER NOT NULL,
        priority INTEGER NOT NULL,
        quota_bytes INTEGER,
        policy TEXT NOT NULL
    ) STRICT""",
    "lines": """(
        line INTEGER PRIMARY KEY,
        agent INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,
        number INTEGER NOT NULL,
        tokenizer TEXT NOT NULL,
        head INTEGER,
        num_tokens INTEGER NOT NULL,
        num_turns INTEGER NOT NULL,
        last_used INTEGER NOT NULL,
        namespace TEXT NOT NULL,
        UNIQUE (agent, number, tokenizer)
    ) STRICT""",
    "spans": """(
        line INTEGER NOT NULL REFERENCES lines ON DELETE CASCADE,
        position INTEGER NOT NULL,
        text BLOB,
        token_ids BLOB NOT NULL,
        is_whole INTEGER NOT NULL,
        is_special INTEGER NOT NULL,
        PRIMARY KEY (line, position)
    ) STRICT, WITHOUT ROWID""",
    "messages": """(
        line INTEGER NOT NULL REFERENCES lines ON DELETE CASCADE,
        node INTEGER NOT NULL,
        parent INTEGER NOT NULL,
        json BLOB NOT NULL,
        PRIMARY KEY (line, node)
    ) STRICT, WITHOUT ROWID""",
    "turns": """(
        line INTEGER NOT NULL REFERENCES lines ON DELETE CASCADE,
        position INTEGER NOT NULL,
        num_tokens INTEGER NOT NULL,
        head INTEGER,
        PRIMARY KEY (line, position)
    ) STRICT, WITHOUT ROWID""",
    "line_blocks": """(
        line INTEGER NOT NULL REFERENCES lines ON DELETE CASCADE,
        depth INTEGER NOT NULL,
        hash BLOB NOT NULL,
        PRIMARY KEY (line, depth)
    ) STRICT, WITHOUT ROWID""",
    "families": """(
        family INTEGER PRIMARY KEY,
        fingerprint TEXT NOT NULL,
        lineage TEXT NOT NULL,
        namespace TEXT NOT NULL,
        layout TEXT NOT NULL,
        UNIQUE (fingerprint, lineage, namespace)
    ) STRICT""",
    "records": """(
        created INTEGER PRIMARY KEY,
        hash BLOB NOT NULL UNIQUE,
        before BLOB NOT NULL,
        parent BLOB NOT NULL,
        depth INTEGER NOT NULL,
        start INTEGER NOT NULL,
        stop INTEGER NOT NULL,
        family INTEGER NOT NULL REFERENCES families,
        file_bytes INTEGER NOT NULL,
        maker TEXT
    ) STRICT""",
    "chores": "(chore TEXT PRIMARY KEY) STRICT, WITHOUT ROWID",
}


def _create_tables(db: sqlite3.Connection) -> None:
    for name, definition in _TABLES.items():
        db.execute(f"CREATE TABLE {name} {definition}")


def _add_overflow_and_receipts(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE agents ADD COLUMN overflow TEXT NOT NULL DEFAULT 'error'")
    db.execute("ALTER TABLE turns ADD COLUMN receipt BLOB")


def _add_models(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE agents ADD COLUMN model TEXT NOT NULL DEFAULT ''")


def _distrust_texts(db: sqlite3.Connection) -> None:
    """Earlier versions named a reply's ids by what the template makes of it, or by no text."""
    db.execute("UPDATE spans SET is_whole = 0 WHERE is_special = 0")


def _add_fixed_mains(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE agents ADD COLUMN has_fixed_main INTEGER NOT NULL DEFAULT 0")


def _add_seals(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE agents ADD COLUMN num_lines INTEGER NOT NULL DEFAULT 0")
    db.execute(
        "UPDATE agents SET num_lines = (SELECT count(*) FROM lines WHERE agent = agents.agent)"
    )
    for table in COLUMNS:
        db.execute(f"ALTER TABLE {table} ADD COLUMN seal INTEGER")
    seal_all(db)


STEPS: tuple[Step, ...] = (
    _create_tables,
    _add_overflow_and_receipts,
    _add_models,
    _distrust_texts,
    _add_fixed_mains,
    _add_seals,
)
"""Step n takes version n to n + 1; an empty file has version 0. One that changes rows behind
`_add_seals` must seal them again.
"""


def open_for_writing(path: Path, steps: Sequence[Step] = STEPS) -> sqlite3.Connection:
    """Open the connection that writes; create the file, or bring its tables up to date."""
    _create_private(path)
    with _connected(path) as db:
        _check_identity(db, path, supported=len(steps))
        _configure(db, path)
        _migrate(db, steps)
        db.execute("PRAGMA foreign_keys=ON")
        _check_tables(db)
    return db


def open_for_reading(path: Path) -> sqlite3.Connection:
    """Open a connection that cannot write to a catalogue that is open for writing."""
    with _connected(path) as db:
        db.execute("PRAGMA query_only=ON")
        _check_identity(db, path, supported=len(STEPS))
        _check_tables(db)
    return db


def open_damaged(path: Path) -> sqlite3.Connection:
    """Open what is left of a catalogue, also where the file was cut."""
    db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    db.text_factory = _text
    db.execute("PRAGMA writable_schema=ON")  # SQLite refuses a file that was cut otherwise
    return db


def is_current(db: sqlite3.Connection) -> bool:
    """Whether it is a catalogue of this version."""
    identity = _pragma(db, "application_id"), _pragma(db, "user_version")
    return identity == (APPLICATION_ID, len(STEPS))


def begin_anew(db: sqlite3.Connection, tables: Sequence[str]) -> None:
    """Replace these tables by empty ones, whatever is in them. Inside a transaction."""
    for name in tables:
        db.execute(f"DROP TABLE {name}")
        db.execute(f"CREATE TABLE {name} {_TABLES[name]}")
        if name in COLUMNS:
            db.execute(f"ALTER TABLE {name} ADD COLUMN seal INTEGER")


def set_aside(path: Path) -> Path:
    """Move a closed catalogue out of the way, under a new name, and return where it is now."""
    target = next(name for name in _names_aside(path) if not _exists(name))
    for suffix in FILE_SUFFIXES:  # the database first: SQLite deletes a log that is left alone
        source = _with_suffix(path, suffix)
        if source.exists():
            source.rename(_with_suffix(target, suffix))
    return target


def size_bytes(path: Path) -> int:
    """Return the bytes that the database, its log and its index take on disk."""
    # Never open these files beside SQLite: closing any descriptor of them drops its POSIX locks.
    total = 0
    for suffix in FILE_SUFFIXES:
        try:
            total += _with_suffix(path, suffix).stat().st_size
        except FileNotFoundError:
            continue
    return total


@contextmanager
def translated(path: Path, operation: str, *, opening: bool = False) -> Iterator[None]:
    """Turn SQLite's complaints about file or disk into typed errors; others are bugs and pass."""
    try:
        yield
    except UnicodeDecodeError as error:  # its complaint quotes what is damaged
        raise CatalogCorrupt(
            path, f"{operation} found what is no text: {error.object!r}"
        ) from error
    except sqlite3.DatabaseError as error:
        typed = _typed(error, path, operation, opening=opening)
        if typed is None:
            raise
        raise typed from error


def _typed(
    error: sqlite3.DatabaseError, path: Path, operation: str, *, opening: bool
) -> KeepwarmError | None:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY_CODE
    if code in _DAMAGED or (opening and code == sqlite3.SQLITE_ERROR):
        return CatalogCorrupt(path, str(error))
    if isinstance(error, sqlite3.IntegrityError):  # a damaged row is in the way
        return CatalogCorrupt(path, str(error))
    if not isinstance(error, sqlite3.OperationalError) or code == sqlite3.SQLITE_ERROR:
        return None
    return CatalogUnavailable(
        path, operation=operation, message=str(error), errorname=error.sqlite_errorname
    )


def _create_private(path: Path) -> None:
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError as error:
        raise CatalogUnavailable(
            path,
            operation="open",
            message=error.strerror or str(error),
            errorname=errno.errorcode.get(error.errno or 0, "OSError"),
        ) from error


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a connection for the block that sets it up; it is closed if that fails."""
    with translated(path, "open", opening=True):
        uri = f"{path.absolute().as_uri()}?mode=rw"
        db = sqlite3.connect(uri, uri=True, isolation_level=None)
        db.text_factory = _text
        install(db)
        try:
            yield db
        except BaseException:
            db.close()
            raise


def _text(data: bytes) -> str:
    """Decode text; a damaged one becomes another that no seal fits, and does not raise."""
    return data.decode("utf-8", "replace")


def _check_identity(db: sqlite3.Connection, path: Path, *, supported: int) -> None:
    application, version = _pragma(db, "application_id"), _pragma(db, "user_version")
    (num_tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if application != APPLICATION_ID and (application or version or num_tables):
        raise CatalogCorrupt(path, f"it belongs to another application (id {application:#x})")
    if version > supported:
        raise CatalogTooNew(path, found=version, supported=supported)


def _configure(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA page_size=4096")
    db.execute("PRAGMA secure_delete=ON")  # deleted rows are overwritten; see `Catalog.scrub`
    # A commit is one append to the log, and the engines' thread reads while it is written.
    (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise CatalogUnavailable(
            path,
            operation="open",
            message=f"its disk cannot keep a write-ahead log (journal mode {mode})",
            errorname="SQLITE_CANTOPEN",
        )
    # A small log: it counts against the disk's budget, and is copied in few milliseconds.
    db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
    db.execute(f"PRAGMA journal_size_limit={WAL_BYTES}")
    db.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    db.execute("PRAGMA fullfsync=ON")  # for macOS, whose fsync does not reach the medium
    db.execute("PRAGMA checkpoint_fullfsync=ON")


def _migrate(db: sqlite3.Connection, steps: Sequence[Step]) -> None:
    version = _pragma(db, "user_version")
    if version == len(steps):
        return
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=OFF")
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in steps[version:]:
            step(db)
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute(f"PRAGMA user_version={len(steps)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _check_tables(db: sqlite3.Connection) -> None:
    for name in _TABLES:
        db.execute(f"SELECT * FROM {name} LIMIT 1").fetchone()


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def _names_aside(path: Path) -> Iterator[Path]:
    number = 1
    while True:
        yield path.with_name(f"{path.name}.aside-{number}")
        number += 1


def _exists(path: Path) -> bool:
    return any(_with_suffix(path, suffix).exists() for suffix in FILE_SUFFIXES)


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
