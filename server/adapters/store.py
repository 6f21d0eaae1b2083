"""Where adapters live on disk: content-addressed folders and a registry of names.

Knows files and rows; nothing of tensors, of the base model, or of who uses an adapter.

    root/registry.sqlite                  adapters(digest …), aliases(name → digest …)
    root/adapters/<digest>/               adapter_config.json, adapter_model.safetensors; what they
                                          compile to, which can be made again: packed.safetensors
    root/staging/<random>/                what is being written; nothing in it is ever read back
    root/store.lock                       held while a process has the store open

Invariant: a row is committed only after its folder is on the disk under its final name, and a
folder is removed only after its row is gone. So a process killed at any point leaves at most
leftovers, which the next open deletes, and never loses what `put` or `set_alias` returned from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock, Timeout

from peftcore.config import CONFIG_NAME, WEIGHTS_NAME
from peftcore.packing import PackedSize
from server.adapters import registry
from server.adapters.registry import StoreError

_FILES = (CONFIG_NAME, WEIGHTS_NAME)
#: May stand beside them.
PACKED_NAME = "packed.safetensors"


@dataclass(frozen=True)
class AdapterRecord:
    """One content digest.

    Attributes:
        digest: SHA-256 of the canonical config and weights, as hex.
        num_elements, num_half_elements, num_rounded_bytes: `packed_size`.
        virtual_kv: the virtual tokens' keys and values are given (prefix tuning).
        adds: may be mixed by weight.
        file_bytes: size of the two files; `put` measures it.
        created_at: seconds since the epoch.
        task: PEFT's `task_type`; None for an adapter that generates.
        num_labels: of its own head; 0 without one.
    """

    digest: str
    method: str
    rank: int
    num_elements: int
    num_half_elements: int
    num_rounded_bytes: int
    num_virtual_tokens: int
    virtual_kv: bool
    adds: bool
    modules: tuple[str, ...]
    file_bytes: int
    created_at: float
    task: str | None = None
    num_labels: int = 0

    @property
    def packed_size(self) -> PackedSize:
        return PackedSize(self.num_elements, self.num_half_elements, self.num_rounded_bytes)


@dataclass(frozen=True)
class Alias:
    """A name and the digest that it stands for now. Counts, times and the pin outlive a flip.

    Attributes:
        labels: what its classes are called, in the order of the head's rows; None: nobody said.
        problem_type: what is asked of them, as transformers says it; None likewise.
    """

    name: str
    digest: str
    created_at: float
    updated_at: float
    num_requests: int
    last_used_at: float | None
    pinned: bool
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None


class AdapterStore:
    """The disk tier. Safe to call from several threads; one process at a time."""

    def __init__(self, root: Path) -> None:
        """Open or create the store at `root`, and delete what a killed process left half-done.

        Raises:
            StoreError: see there.
        """
        self._root = Path(root)
        self._adapters_dir = self._root / "adapters"
        self._staging_dir = self._root / "staging"
        self._adapters_dir.mkdir(parents=True, exist_ok=True)
        self._staging_dir.mkdir(exist_ok=True)
        self._file_lock = FileLock(self._root / "store.lock", thread_local=False)
        try:
            self._file_lock.acquire(timeout=0)
        except Timeout:
            raise StoreError(f"{self._root} is in use by another process") from None
        #: Held by every writer, so that a folder and its row change together.
        self._lock = threading.RLock()
        try:
            self._engine = registry.open_registry(self._root / "registry.sqlite")
            _fsync(self._root)
            self._sweep()
        except BaseException:
            self._file_lock.release()
            raise

    def close(self) -> None:
        """Release the database and the lock; closing twice is harmless."""
        self._engine.dispose()
        self._file_lock.release()

    # Contents ---------------------------------------------------------------------------------

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A fresh empty folder on the store's own disk, removed at exit whatever happens."""
        folder = self._staging_dir / uuid.uuid4().hex
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, staged: Path, record: AdapterRecord) -> None:
        """Take a staged folder in as `record.digest`; on return it survives a power cut.

        The same digest again changes nothing, unless the stored files were lost or damaged: then
        the staged ones take their place.

        Args:
            staged: a folder from `staging`, holding the two files and, if anything, their packed
                form.
            record: what the row shall say; its `file_bytes` is replaced by the measured size.
        """
        names = sorted(os.listdir(staged))
        if sorted({*names} - {PACKED_NAME}) != sorted(_FILES):
            raise ValueError(f"a staged adapter is {_FILES}, not {names}")
        final = self.folder(record.digest)
        row = asdict(record) | {
            "file_bytes": sum((staged / name).stat().st_size for name in _FILES),
            "files_sha256": _hash_files(staged),
        }
        for name in names:
            # Loading reads the packed form, which is what the system's memory should keep.
            _fsync(staged / name, uncached=PACKED_NAME in names and name != PACKED_NAME)
        _fsync(staged)
        with self._lock:
            stored = self._row(record.digest)
            if stored is None:
                self._insert(staged, final, row)
            elif not _is_intact(final, stored.files_sha256):
                self._repair(staged, final, row)

    def _insert(self, staged: Path, final: Path, row: dict[str, Any]) -> None:
        _remove(final)
        os.rename(staged, final)
        try:
            _fsync(self._adapters_dir)
            with self._engine.begin() as connection:
                connection.execute(sa.insert(registry.adapters).values(row))
        except BaseException:
            # Only where no row was committed; if that cannot be told, the next open will.
            with suppress(sa.exc.SQLAlchemyError):
                if self._row(row["digest"]) is None:
                    _remove(final)
            raise

    def _repair(self, staged: Path, final: Path, row: dict[str, Any]) -> None:
        """Replace the files one by one: the row stands, so the folder is never away."""
        final.mkdir(exist_ok=True)
        for name in os.listdir(staged):
            _remove(final / name, only_folders=True)
            os.replace(staged / name, final / name)
        _fsync(final)
        _fsync(self._adapters_dir)
        with self._engine.begin() as connection:
            connection.execute(
                sa.update(registry.adapters)
                .where(registry.adapters.c.digest == row["digest"])
                .values({key: row[key] for key in ("file_bytes", "files_sha256")})
            )

    def folder(self, digest: str) -> Path:
        """Where the digest's files are, or would be."""
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise ValueError(f"not a SHA-256 digest in hex: {digest!r}")
        return self._adapters_dir / digest

    def record(self, digest: str) -> AdapterRecord | None:
        row = self._row(digest)
        if row is None:
            return None
        values = {field.name: getattr(row, field.name) for field in fields(AdapterRecord)}
        return AdapterRecord(**values | {"modules": tuple(row.modules)})

    def uncounted(self) -> list[str]:
        """Digests whose elements an earlier version counted in another form."""
        counts = registry.adapters.c.num_half_elements
        query = sa.select(registry.adapters.c.digest).where(counts == registry.NOT_COUNTED)
        with self._engine.connect() as connection:
            return list(connection.scalars(query))

    def set_packed_size(self, digest: str, size: PackedSize) -> None:
        """Correct a row."""
        with self._lock, self._engine.begin() as connection:
            connection.execute(
                sa.update(registry.adapters)
                .where(registry.adapters.c.digest == digest)
                .values(size._asdict())
            )

    def unreferenced(self) -> list[str]:
        """Digests that no alias names, sorted."""
        query = (
            sa.select(registry.adapters.c.digest)
            .outerjoin(registry.aliases)
            .where(registry.aliases.c.name.is_(None))
            .order_by(registry.adapters.c.digest)
        )
        with self._engine.connect() as connection:
            return list(connection.scalars(query))

    def purge(self, digest: str) -> None:
        """Delete a digest's row and folder; an unknown digest is no error.

        Raises:
            ValueError: an alias names it.
        """
        final = self.folder(digest)
        with self._lock:
            if names := self.names_of(digest):
                raise ValueError(f"{digest} is in use by {', '.join(names)}")
            with self._engine.begin() as connection:
                connection.execute(
                    sa.delete(registry.adapters).where(registry.adapters.c.digest == digest)
                )
            with self.staging() as trash:
                if final.exists():
                    os.rename(final, trash / digest)
                    _fsync(self._adapters_dir)

    # Names ------------------------------------------------------------------------------------

    def alias(self, name: str) -> Alias | None:
        with self._engine.connect() as connection:
            row = connection.execute(
                sa.select(registry.aliases).where(registry.aliases.c.name == name)
            ).first()
        return None if row is None else _alias(row)

    def aliases(self) -> list[Alias]:
        """All names, sorted."""
        with self._engine.connect() as connection:
            rows = connection.execute(
                sa.select(registry.aliases).order_by(registry.aliases.c.name)
            ).all()
        return [_alias(row) for row in rows]

    def names_of(self, digest: str) -> list[str]:
        """The names that stand for the digest, sorted."""
        query = sa.select(registry.aliases.c.name).where(registry.aliases.c.digest == digest)
        with self._engine.connect() as connection:
            return list(connection.scalars(query.order_by(registry.aliases.c.name)))

    def set_alias(
        self,
        name: str,
        digest: str,
        labels: Sequence[str] | None = None,
        problem_type: str | None = None,
    ) -> str | None:
        """Let `name` stand for `digest`, with what is said of its classes, from now on, in one
        transaction.

        Returns:
            The digest it stood for before, or None.

        Raises:
            KeyError: the digest is not stored.
        """
        now = time.time()
        with self._lock, self._engine.begin() as connection:
            if not connection.scalar(
                sa.select(registry.adapters.c.digest).filter_by(digest=digest)
            ):
                raise KeyError(digest)
            previous = connection.scalar(sa.select(registry.aliases.c.digest).filter_by(name=name))
            values: dict[str, Any] = {
                "digest": digest,
                "labels": None if labels is None else list(labels),
                "problem_type": problem_type,
            }
            if previous is None:
                times = {"created_at": now, "updated_at": now}
                connection.execute(sa.insert(registry.aliases).values(name=name, **values, **times))
            else:
                update = sa.update(registry.aliases).where(registry.aliases.c.name == name)
                changes = {"updated_at": now} if previous != digest else {}
                connection.execute(update.values(**values, **changes))
            return previous

    def set_pinned(self, name: str, pinned: bool) -> None:
        """Raises KeyError: there is no such name."""
        update = sa.update(registry.aliases).where(registry.aliases.c.name == name)
        with self._lock, self._engine.begin() as connection:
            if not connection.execute(update.values(pinned=pinned)).rowcount:
                raise KeyError(name)

    def remove_alias(self, name: str) -> str:
        """Forget a name. Returns its digest.

        Raises:
            KeyError: there is no such name.
        """
        with self._lock, self._engine.begin() as connection:
            digest = connection.scalar(sa.select(registry.aliases.c.digest).filter_by(name=name))
            if digest is None:
                raise KeyError(name)
            connection.execute(sa.delete(registry.aliases).where(registry.aliases.c.name == name))
            return digest

    def count_requests(self, counts: Mapping[str, int], at: float) -> None:
        """Add to the names' request counts; names that are gone are passed over."""
        if not counts:
            return
        update = (
            sa.update(registry.aliases)
            .where(registry.aliases.c.name == sa.bindparam("alias"))
            .values(
                num_requests=registry.aliases.c.num_requests + sa.bindparam("more"), last_used_at=at
            )
        )
        with self._lock, self._engine.begin() as connection:
            connection.execute(update, [{"alias": n, "more": c} for n, c in counts.items()])

    # Integrity --------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise AssertionError unless every row has its files, unchanged, every folder has its
        row, every alias its adapter, and nothing is staged."""
        with self._lock, self._engine.connect() as connection:
            rows = connection.execute(
                sa.select(registry.adapters.c.digest, registry.adapters.c.files_sha256)
            ).all()
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            folders = set(os.listdir(self._adapters_dir))
            staged = os.listdir(self._staging_dir)
        if broken:
            raise AssertionError(f"aliases without an adapter: {broken}")
        for digest, files_sha256 in rows:
            if not _is_intact(self.folder(digest), files_sha256):
                raise AssertionError(f"files of {digest} are missing or damaged")
        if strays := folders - {digest for digest, _ in rows}:
            raise AssertionError(f"folders without a row: {sorted(strays)}")
        if staged:
            raise AssertionError(f"left in staging: {staged}")

    def _row(self, digest: str) -> Any:
        with self._engine.connect() as connection:
            return connection.execute(sa.select(registry.adapters).filter_by(digest=digest)).first()

    def _sweep(self) -> None:
        """Delete what a killed process left: all that is staged, and folders without a row."""
        with self._engine.connect() as connection:
            known = set(connection.scalars(sa.select(registry.adapters.c.digest)))
        strays = [path for path in self._adapters_dir.iterdir() if path.name not in known]
        for path in [*self._staging_dir.iterdir(), *strays]:
            _remove(path)


def _alias(row: Any) -> Alias:
    labels = None if row.labels is None else tuple(row.labels)
    return Alias(**{**row._mapping, "labels": labels})


def _hash_files(folder: Path) -> str:
    """SHA-256 over the names and hashes of the two files, as hex."""
    total = hashlib.sha256()
    for name in _FILES:
        with open(folder / name, "rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _is_intact(folder: Path, files_sha256: str) -> bool:
    try:
        return _hash_files(folder) == files_sha256
    except OSError:
        return False


def _fsync(path: Path, *, uncached: bool = False) -> None:
    """Force a file, or a folder's list of names, to the disk.

    Args:
        uncached: tell the system that nobody will read it soon.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if uncached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _remove(path: Path, *, only_folders: bool = False) -> None:
    """Delete a file or a tree; no error where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif not only_folders:
        path.unlink(missing_ok=True)
