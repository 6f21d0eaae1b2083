"""A registry that an older version wrote is taken over; one that a newer version wrote is not."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import sqlalchemy as sa
from safetensors.torch import load_file, save_file

from peftcore.base import BaseModel
from peftcore.packing import PackedSize
from peftcore.primitives import tensors_of
from peftcore.tasks import Tasks
from server.adapters.admission import validate
from server.adapters.registry import NOT_COUNTED, SCHEMA_VERSION
from server.adapters.store import AdapterStore, Alias, StoreError
from tests import tiny
from tests.recorder import Recorder, compare

#: As version 1 made it. Its counts were of the tensors one after another, each rounded up to 64.
VERSION_1 = """
CREATE TABLE adapters (
    digest VARCHAR(64) NOT NULL, method VARCHAR NOT NULL, rank INTEGER NOT NULL,
    num_elements BIGINT NOT NULL, num_virtual_tokens INTEGER NOT NULL,
    virtual_kv BOOLEAN NOT NULL, adds BOOLEAN NOT NULL, modules JSON NOT NULL,
    file_bytes BIGINT NOT NULL, created_at FLOAT NOT NULL, files_sha256 VARCHAR(64) NOT NULL,
    PRIMARY KEY (digest)
);
CREATE TABLE aliases (
    name VARCHAR NOT NULL, digest VARCHAR(64) NOT NULL, created_at FLOAT NOT NULL,
    updated_at FLOAT NOT NULL, num_requests BIGINT NOT NULL, last_used_at FLOAT,
    PRIMARY KEY (name), FOREIGN KEY(digest) REFERENCES adapters (digest)
);
CREATE INDEX ix_aliases_digest ON aliases (digest);
PRAGMA user_version = 1;
"""

FILES = (tiny.CONFIG_NAME, tiny.WEIGHTS_NAME)


@dataclass(frozen=True)
class Stored:
    """An adapter as version 1 had it."""

    digest: str
    rank: int
    num_elements: int
    modules: tuple[str, ...]


def write_version_1(root: Path, adapters: dict[str, tuple[Stored, dict[str, bytes]]]) -> None:
    """A store by version 1.  adapters: name → the row, and the two files."""
    root.mkdir(parents=True)
    with closing(sqlite3.connect(root / "registry.sqlite")) as connection, connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(VERSION_1)
        for name, (stored, files) in adapters.items():
            folder = root / "adapters" / stored.digest
            folder.mkdir(parents=True)
            total = hashlib.sha256()
            for file in FILES:
                (folder / file).write_bytes(files[file])
                total.update(f"{file} {hashlib.sha256(files[file]).hexdigest()}\n".encode())
            row = (
                stored.digest, "LORA", stored.rank, stored.num_elements, 0, False, True,
                json.dumps(stored.modules), sum(map(len, files.values())), 12.5, total.hexdigest(),
            )  # fmt: skip
            connection.execute(f"INSERT INTO adapters VALUES ({', '.join('?' * 11)})", row)
            alias = (name, stored.digest, 13.5, 14.5, 7, 15.5)
            connection.execute("INSERT INTO aliases VALUES (?, ?, ?, ?, ?, ?)", alias)


def some_adapters() -> dict[str, tuple[Stored, dict[str, bytes]]]:
    """Contents that nothing reads."""
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in ("poet", "clerk")]
    files = dict.fromkeys(FILES, b"{}")
    return {
        "poet": (Stored(digests[0], 8, 1024, ("a.q_proj", "a.v_proj")), files),
        "clerk": (Stored(digests[1], 4, 64, ("lm_head",)), files),
    }


def user_version(root: Path) -> int:
    with closing(sqlite3.connect(root / "registry.sqlite")) as connection:
        return connection.execute("PRAGMA user_version").fetchone()[0]


def assert_taken_over(root: Path) -> None:
    store = AdapterStore(root)
    for name, (stored, files) in some_adapters().items():
        record = store.record(stored.digest)
        assert record is not None
        assert (record.rank, record.num_elements, record.modules) == (
            stored.rank,
            stored.num_elements,
            stored.modules,
        )
        assert record.num_half_elements == NOT_COUNTED
        assert (record.method, record.adds, record.virtual_kv) == ("LORA", True, False)
        assert (record.created_at, record.file_bytes) == (12.5, 4)
        assert store.alias(name) == Alias(name, stored.digest, 13.5, 14.5, 7, 15.5, False)
        for file in FILES:
            assert (store.folder(stored.digest) / file).read_bytes() == files[file]
    assert [alias.name for alias in store.aliases()] == ["clerk", "poet"]
    store.check_integrity()
    store.close()
    assert user_version(root) == SCHEMA_VERSION == 6


def test_version_1_keeps_its_adapters_and_names(tmp_path: Path) -> None:
    write_version_1(tmp_path / "store", some_adapters())
    assert user_version(tmp_path / "store") == 1
    for _ in range(2):  # the second time there is nothing to do
        assert_taken_over(tmp_path / "store")


def test_version_2_keeps_its_adapters_and_names(tmp_path: Path) -> None:
    """It had no pins yet."""
    root = tmp_path / "store"
    write_version_1(root, some_adapters())
    with closing(sqlite3.connect(root / "registry.sqlite")) as connection, connection:
        connection.executescript(
            "ALTER TABLE adapters ADD COLUMN num_half_elements BIGINT NOT NULL DEFAULT -1;"
            "PRAGMA user_version = 2;"
        )
    assert_taken_over(root)
    store = AdapterStore(root)
    store.set_pinned("poet", True)
    assert [(alias.name, alias.pinned) for alias in store.aliases()] == [
        ("clerk", False),
        ("poet", True),
    ]
    with pytest.raises(KeyError):
        store.set_pinned("nobody", True)
    store.close()


def test_version_1_can_be_written_to(tmp_path: Path) -> None:
    write_version_1(tmp_path / "store", some_adapters())
    store = AdapterStore(tmp_path / "store")
    poet, clerk = (store.names_of(s.digest) for s, _ in some_adapters().values())
    assert (poet, clerk) == (["poet"], ["clerk"])
    record = store.record(some_adapters()["poet"][0].digest)
    assert record is not None
    digest = hashlib.sha256(b"new").hexdigest()
    size = PackedSize(640, 128, 9)
    new = replace(record, digest=digest, **size._asdict())
    with store.staging() as folder:
        for file in FILES:
            (folder / file).write_text("new")
        store.put(folder, new)
    assert store.set_alias("poet", new.digest) == record.digest
    store.purge(record.digest)
    found = store.record(new.digest)
    assert found is not None
    assert found.packed_size == size
    store.check_integrity()
    store.close()


def test_a_takeover_that_fails_has_changed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "store"
    write_version_1(root, some_adapters())
    with monkeypatch.context() as patch:
        patch.setattr(sa.MetaData, "create_all", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            AdapterStore(root)
    assert user_version(root) == 1
    assert_taken_over(root)


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "store"
    write_version_1(root, some_adapters())
    assert_taken_over(root)
    with closing(sqlite3.connect(root / "registry.sqlite")) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match=r"schema version 7; this program knows 6$"):
        AdapterStore(root)
    assert user_version(root) == SCHEMA_VERSION + 1
    with closing(sqlite3.connect(root / "registry.sqlite")) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    assert_taken_over(root)


@pytest.mark.parametrize("names", [("lora-r4", "lora-r8-all", "lora-bias-all"), ("head",)], ids=len)
def test_version_1s_adapters_are_served(names: tuple[str, ...], tmp_path: Path) -> None:
    """Packed as now, whatever their rows say: the head's 300 outputs do not fill their last tile,
    so that it takes more than what version 1 counted."""
    model = tiny.llama()
    empty = tiny.runtime(model, tmp_path / "data")
    empty.close()
    root = empty.adapters.store.folder("0" * 64).parents[1]
    shutil.rmtree(root)

    configs = tiny.peft_configs("llama") | {
        "head": peft.LoraConfig(r=16, target_modules=["lm_head"], task_type="CAUSAL_LM"),
    }
    folders: dict[str, Path] = {}
    adapters: dict[str, tuple[Stored, dict[str, bytes]]] = {}
    tasks = Tasks(model, BaseModel.from_model(model))
    for name in names:
        folder = tiny.save_random_adapter(model, configs[name], tmp_path / name)
        if name == "lora-r4":
            weights = load_file(folder / tiny.WEIGHTS_NAME)
            save_file({k: t.half() for k, t in weights.items()}, folder / tiny.WEIGHTS_NAME)
        files = {file: (folder / file).read_bytes() for file in FILES}
        _, program = validate(files[tiny.CONFIG_NAME], folder / tiny.WEIGHTS_NAME, tasks)
        counts = [t.numel() for p in program.primitives for t in tensors_of(p)]
        num_elements = sum(-(-count // 64) * 64 for count in counts)
        modules = tuple(program.modules)
        stored = Stored(program.digest, program.max_rank, num_elements, modules)
        adapters[name], folders[name] = (stored, files), folder
    write_version_1(root, adapters)

    runtime = tiny.runtime(model, tmp_path / "data")
    assert {a.name: a.digest for a in runtime.adapters.list()} == {
        name: stored.digest for name, (stored, _) in adapters.items()
    }
    recorder, prompt = Recorder(runtime), [5, 6, 7, 8, 9, 10, 11]
    sequences = {}
    for name in adapters:
        with runtime.adapters.lease(name) as lease:
            sequences[name] = recorder.add(name, prompt, lease)
    recorder.run()
    for name, seq in sequences.items():
        assert runtime.adapters.get(name).residency == "device", name
        assert compare(recorder, seq, tiny.PeftOracle(model, [(folders[name], 1.0)])) < 1e-4, name
    runtime.check_integrity()
    runtime.close()
