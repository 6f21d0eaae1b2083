"""The disk tier: content, names, and what a killed process leaves (nothing)."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from server.adapters.store import AdapterRecord, AdapterStore, StoreError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def digest_of(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


def record_of(content: str) -> AdapterRecord:
    return AdapterRecord(
        digest=digest_of(content),
        method="LORA",
        rank=8,
        num_elements=1024,
        num_half_elements=960,
        num_rounded_bytes=640,
        num_virtual_tokens=0,
        virtual_kv=False,
        adds=True,
        modules=("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"),
        file_bytes=0,
        created_at=12.5,
    )


def put(store: AdapterStore, content: str) -> str:
    """Store files made of `content`; returns their digest."""
    with store.staging() as folder:
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_text(content)
        store.put(folder, record_of(content))
    return digest_of(content)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(tmp_path)
    yield store
    store.check_integrity()
    store.close()


def test_record_and_files_come_back(store: AdapterStore) -> None:
    digest = put(store, "weights")
    assert store.record(digest) == replace(record_of("weights"), file_bytes=len("{}weights"))
    assert (store.folder(digest) / WEIGHTS).read_text() == "weights"
    assert store.record(digest_of("other")) is None


def test_all_survives_a_restart(tmp_path: Path) -> None:
    first = AdapterStore(tmp_path)
    digest = put(first, "weights")
    first.set_alias("poet", digest)
    first.count_requests({"poet": 3}, at=99.0)
    before = first.alias("poet")
    first.close()

    second = AdapterStore(tmp_path)
    assert before is not None
    assert (before.num_requests, before.last_used_at) == (3, 99.0)
    assert second.aliases() == [before]
    assert second.record(digest) is not None
    second.check_integrity()
    second.close()


def test_same_digest_again_changes_nothing(store: AdapterStore) -> None:
    digest = put(store, "weights")
    inode = (store.folder(digest) / WEIGHTS).stat().st_ino
    put(store, "weights")
    assert (store.folder(digest) / WEIGHTS).stat().st_ino == inode


@pytest.mark.parametrize(
    "damage", ["folder", "file", "truncated", "flipped", "a folder for a file"]
)
def test_damaged_files_are_replaced(store: AdapterStore, damage: str) -> None:
    digest = put(store, "weights")
    store.set_alias("poet", digest)
    file = store.folder(digest) / WEIGHTS
    match damage:
        case "folder":
            for path in store.folder(digest).iterdir():
                path.unlink()
            store.folder(digest).rmdir()
        case "file":
            file.unlink()
        case "truncated":
            file.write_text("we")
        case "flipped":
            file.write_text("weightS")
        case _:
            file.unlink()
            file.mkdir()
    with pytest.raises(AssertionError, match="missing or damaged"):
        store.check_integrity()
    put(store, "weights")
    assert file.read_text() == "weights"
    assert store.names_of(digest) == ["poet"]


def test_staging_is_removed_whatever_happens(store: AdapterStore) -> None:
    def fail() -> None:
        with store.staging() as folder:
            (folder / "half").write_text("done")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    store.check_integrity()


def test_put_takes_exactly_the_two_files(store: AdapterStore) -> None:
    with store.staging() as folder:
        (folder / WEIGHTS).write_text("weights")
        with pytest.raises(ValueError, match=CONFIG):
            store.put(folder, record_of("weights"))
        (folder / CONFIG).write_text("{}")
        (folder / "pytorch_model.bin").write_text("pickle")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin"):
            store.put(folder, record_of("weights"))


@pytest.mark.parametrize("digest", ["", "../../etc", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "/"])
def test_a_digest_cannot_leave_its_folder(store: AdapterStore, digest: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256 digest"):
        store.folder(digest)


def test_failed_insert_leaves_no_folder(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store._engine.begin
    monkeypatch.setattr(
        store._engine,
        "begin",
        lambda: (_ for _ in ()).throw(sa.exc.OperationalError("", {}, OSError())),
    )
    with pytest.raises(sa.exc.OperationalError):
        put(store, "weights")
    monkeypatch.setattr(store._engine, "begin", real)
    store.check_integrity()
    put(store, "weights")


def test_alias_flips_and_keeps_its_counts(store: AdapterStore) -> None:
    old, new = put(store, "old"), put(store, "new")
    assert store.set_alias("poet", old) is None
    store.count_requests({"poet": 2, "gone": 5}, at=1.0)
    first = store.alias("poet")
    assert store.set_alias("poet", old) == old
    assert store.alias("poet") == first
    assert store.set_alias("poet", new) == old
    flipped = store.alias("poet")
    assert first is not None
    assert flipped is not None
    assert flipped.digest == new
    assert flipped.created_at == first.created_at
    assert flipped.updated_at >= first.updated_at
    assert flipped.num_requests == 2
    assert store.names_of(old) == []
    assert store.unreferenced() == [old]
    assert store.alias("gone") is None


def test_alias_needs_a_stored_digest(store: AdapterStore) -> None:
    with pytest.raises(KeyError):
        store.set_alias("poet", digest_of("never stored"))
    assert store.aliases() == []


def test_remove_alias(store: AdapterStore) -> None:
    digest = put(store, "weights")
    store.set_alias("poet", digest)
    assert store.remove_alias("poet") == digest
    with pytest.raises(KeyError, match="poet"):
        store.remove_alias("poet")


def test_purge_refuses_what_a_name_needs(store: AdapterStore) -> None:
    digest = put(store, "weights")
    store.set_alias("a", digest)
    store.set_alias("b", digest)
    with pytest.raises(ValueError, match="a, b"):
        store.purge(digest)
    store.remove_alias("a")
    store.remove_alias("b")
    store.purge(digest)
    assert store.record(digest) is None
    assert not store.folder(digest).exists()
    store.purge(digest)


def test_open_deletes_leftovers_and_keeps_the_rest(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    digest = put(store, "weights")
    store.close()
    (tmp_path / "staging" / "dead").mkdir()
    (tmp_path / "staging" / "dead" / WEIGHTS).write_text("half")
    (tmp_path / "staging" / "file").write_text("half")
    (tmp_path / "adapters" / digest_of("no row")).mkdir()
    (tmp_path / "adapters" / "stray").write_text("half")

    store = AdapterStore(tmp_path)
    store.check_integrity()
    assert os.listdir(tmp_path / "adapters") == [digest]
    store.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    with pytest.raises(StoreError, match="in use"):
        AdapterStore(tmp_path)
    store.close()
    store.close()
    AdapterStore(tmp_path).close()


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    with store._engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA user_version = 99")
    store.close()
    with pytest.raises(StoreError, match="version 99"):
        AdapterStore(tmp_path)


def test_many_threads(store: AdapterStore) -> None:
    """Uploads of few contents under few names, flips, deletions and counts at once."""
    start = threading.Barrier(8)

    def work(worker: int) -> None:
        start.wait()
        for turn in range(12):
            content, name = f"content {(worker + turn) % 3}", f"name-{turn % 2}"
            digest = put(store, content)
            try:
                store.set_alias(name, digest)
            except KeyError:  # purged by another worker in between
                continue
            store.count_requests({name: 1}, at=float(turn))
            if turn % 4 == 3:
                # Another worker was first, or the other name needs the digest.
                with suppress(KeyError, ValueError):
                    store.purge(store.remove_alias(name))
            for alias in store.aliases():
                store.record(alias.digest)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    store.check_integrity()
    for digest in store.unreferenced():
        store.purge(digest)


#: Runs a scenario in forks; the n-th fork is killed at its n-th call that changes the disk.
CRASH_SCRIPT = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_store import *

root, scenario = Path(sys.argv[2]), sys.argv[3]

def prepare(store):
    store.set_alias("poet", put(store, "old"))
    if scenario == "repair":
        (store.folder(digest_of("old")) / WEIGHTS).unlink()

def act(store, say):
    if scenario == "put":
        say(put(store, "new"))
    elif scenario == "repair":
        say(put(store, "old"))
    elif scenario == "flip":
        digest = put(store, "new")
        old = store.set_alias("poet", digest)
        say("flipped")
        store.purge(old)
    elif scenario == "delete":
        digest = store.remove_alias("poet")
        say("removed")
        store.purge(digest)

def child(root, limit, out):
    store = AdapterStore(root)
    calls = 0
    def killing(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == limit:
                os._exit(9)
            return real(*args, **kwargs)
        return call
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, killing(getattr(os, name)))
    for event in ("begin", "commit"):
        sa.event.listen(store._engine, event, killing(lambda connection: None))
    act(store, lambda word: os.write(out, word.encode()))
    os._exit(0)

limit = status = 0
while status == 0 and limit == 0 or os.waitstatus_to_exitcode(status) == 9:
    limit += 1
    here = root / str(limit)
    store = AdapterStore(here)
    prepare(store)
    store.close()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(here, limit, writer)
    os.close(writer)
    acknowledged = os.read(reader, 100).decode()
    os.close(reader)
    _, status = os.waitpid(pid, 0)

    store = AdapterStore(here)
    if scenario != "repair" or acknowledged:
        store.check_integrity()
    alias = store.alias("poet")
    if scenario == "put":
        assert alias.digest == digest_of("old")
        assert not acknowledged or store.record(acknowledged)
    elif scenario == "repair":
        assert alias.digest == digest_of("old")
        put(store, "old")  # whatever state the kill left, the next upload heals it
        store.check_integrity()
    elif scenario == "flip":
        assert alias.digest == digest_of("new") if acknowledged else alias
        assert store.record(alias.digest)
    elif scenario == "delete":
        assert not acknowledged or alias is None
    store.close()
assert os.waitstatus_to_exitcode(status) == 0, "the scenario itself failed"
print(limit)
"""


@pytest.mark.parametrize("scenario", ["put", "repair", "flip", "delete"])
def test_killed_at_every_step(tmp_path: Path, scenario: str) -> None:
    """A process killed at any step leaves a store that opens clean and lost nothing."""
    here = Path(__file__)
    command = [sys.executable, "-c", CRASH_SCRIPT, str(here.parent), str(tmp_path), scenario]
    done = subprocess.run(command, cwd=here.parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3, "the scenario was killed at several steps"
