"""The registry's tables and how its database is opened; what the rows mean is `store`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sqlalchemy as sa

SCHEMA_VERSION = 6

#: In place of `num_half_elements`: this and what else is in `PackedSize` is to be counted anew.
NOT_COUNTED = -1

#: How long a statement waits for another connection's transaction, in milliseconds.
BUSY_TIMEOUT_MS = 10_000


class StoreError(RuntimeError):
    """The store cannot be opened: another process has it, or a newer version wrote it."""


_metadata = sa.MetaData()

adapters = sa.Table(
    "adapters",
    _metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("method", sa.String, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("num_elements", sa.BigInteger, nullable=False),
    sa.Column("num_half_elements", sa.BigInteger, nullable=False),
    sa.Column("num_rounded_bytes", sa.BigInteger, nullable=False),
    sa.Column("num_virtual_tokens", sa.Integer, nullable=False),
    sa.Column("virtual_kv", sa.Boolean, nullable=False),
    sa.Column("adds", sa.Boolean, nullable=False),
    sa.Column("modules", sa.JSON, nullable=False),
    sa.Column("file_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("task", sa.String),
    sa.Column("num_labels", sa.Integer, nullable=False),
    # Not part of a record: the hash of the two files as they were stored, to notice damage.
    sa.Column("files_sha256", sa.String(64), nullable=False),
)

aliases = sa.Table(
    "aliases",
    _metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("digest", sa.ForeignKey("adapters.digest"), nullable=False, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("updated_at", sa.Float, nullable=False),
    sa.Column("num_requests", sa.BigInteger, nullable=False, default=0),
    sa.Column("last_used_at", sa.Float),
    sa.Column("pinned", sa.Boolean, nullable=False, default=False),
    sa.Column("labels", sa.JSON(none_as_null=True)),
    sa.Column("problem_type", sa.String),
)

#: What makes a database of a version one of the next.
_MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (  # it counted another form of the elements
        f"ALTER TABLE adapters ADD COLUMN num_half_elements BIGINT NOT NULL DEFAULT {NOT_COUNTED}",
    ),
    2: ("ALTER TABLE aliases ADD COLUMN pinned BOOLEAN NOT NULL DEFAULT 0",),
    3: (  # all adapters generated
        "ALTER TABLE adapters ADD COLUMN task VARCHAR",
        "ALTER TABLE adapters ADD COLUMN num_labels INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE aliases ADD COLUMN labels JSON",
    ),
    4: ("ALTER TABLE aliases ADD COLUMN problem_type VARCHAR",),
    5: (
        "ALTER TABLE adapters ADD COLUMN num_rounded_bytes BIGINT NOT NULL DEFAULT 0",
        f"UPDATE adapters SET num_half_elements = {NOT_COUNTED}",
    ),
}


def open_registry(path: Path) -> sa.Engine:
    """Open or create the database. Raises StoreError for a newer version's."""
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)))

    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where SQLAlchemy says so
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",  # a commit is on the disk when it returns
            "foreign_keys = ON",
            f"busy_timeout = {BUSY_TIMEOUT_MS}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    try:
        with engine.begin() as connection:
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version > SCHEMA_VERSION:
                raise StoreError(
                    f"{path} has schema version {version}; this program knows {SCHEMA_VERSION}"
                )
            for old in range(version or SCHEMA_VERSION, SCHEMA_VERSION):
                for statement in _MIGRATIONS[old]:
                    connection.exec_driver_sql(statement)
            _metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
    except BaseException:
        engine.dispose()
        raise
    return engine
