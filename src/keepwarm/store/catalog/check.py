"""The rules between the catalogue's tables, as queries that find what breaks them."""

import sqlite3

from keepwarm.core.errors import InvariantBroken
from keepwarm.store.catalog.seals import COLUMNS

_CONTRADICTIONS = {
    **{
        f"a row of {table} whose seal is wrong": f"""
            SELECT {columns} FROM {table} WHERE seal IS NOT seal_of({columns})
        """
        for table, columns in COLUMNS.items()
    },
    "a row whose owner is gone": "PRAGMA foreign_key_check",
    "a damaged page": "SELECT * FROM pragma_quick_check WHERE quick_check <> 'ok'",
    "spans (line, tokens, spans) that are not what the line says, or not contiguous": """
        SELECT line, sum(length(token_ids)) / 4, count(position)
        FROM lines LEFT JOIN spans USING (line) GROUP BY line
        HAVING coalesce(sum(length(token_ids)), 0) <> 4 * num_tokens
            OR count(position) % 2 = 0 OR max(position) <> count(position) - 1
    """,
    "a span (line, position) out of turn": """
        SELECT line, position FROM spans WHERE is_special <> position % 2
    """,
    "turns (line, turns) that are not as many as the line says, or not contiguous": """
        SELECT line, count(position) FROM lines LEFT JOIN turns USING (line) GROUP BY line
        HAVING count(position) <> num_turns OR max(position) <> count(position) - 1
    """,
    "a block table (line, blocks) with gaps": """
        SELECT line, count(*) FROM line_blocks GROUP BY line HAVING max(depth) <> count(*) - 1
    """,
    "a block (line, depth) whose hash is no hash": """
        SELECT line, depth FROM line_blocks WHERE length(hash) <> 32
    """,
    "a message (line, node) without the one before it": """
        SELECT line, node FROM messages AS m WHERE parent <> 0 AND NOT EXISTS (
            SELECT 1 FROM messages WHERE line = m.line AND node = m.parent AND node < m.node)
    """,
    "a conversation (line, message) without its last message": """
        SELECT line, head
        FROM (SELECT line, head FROM lines UNION SELECT line, head FROM turns) AS h
        WHERE head <> 0 AND NOT EXISTS (
            SELECT 1 FROM messages WHERE line = h.line AND node = h.head)
    """,
    "a message (line, node) that no turn leads to": """
        SELECT line, node FROM messages EXCEPT SELECT line, parent FROM messages
        EXCEPT SELECT line, head FROM turns EXCEPT SELECT line, head FROM lines
    """,
}


def check_tables(db: sqlite3.Connection) -> None:
    """Raise InvariantBroken with the first row that contradicts another."""
    for what, query in _CONTRADICTIONS.items():
        row = db.execute(query).fetchone()
        if row is not None:
            raise InvariantBroken(f"the catalogue has {what}: {row}")
