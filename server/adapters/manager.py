"""Adapters by name: registration, aliases, leases.

A name is an alias of a content digest. A request takes a *lease* on the digests that it starts
with; a flip or a delete changes what later requests find, and a digest that no name and no lease
refers to any more is dropped from cache and disk. The manager knows names and digests, not where
weights lie.

Two locks: `_lock` guards what requests read and is never held over the disk, so that the event loop
may take it; `_writer` orders changes of the store and is held by worker threads only.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copyfile
from typing import Literal

from peftcore.config import CONFIG_NAME, WEIGHTS_NAME
from peftcore.errors import AdapterError, CheckpointError, ConfigError, MixtureError
from peftcore.memory import trim_malloc
from peftcore.packing import PackedAdapter, PackedSize, packed_size
from peftcore.program import check_mixture
from peftcore.tasks import Tasks
from server.adapters.admission import Packer, join_head, validate
from server.adapters.budget import Budget
from server.adapters.cache import yield_to_engine
from server.adapters.info import AdapterInfo
from server.adapters.labels import Labels, parse_labels
from server.adapters.lease import Lease
from server.adapters.store import AdapterRecord, AdapterStore, Alias
from server.engine.sequence import AdapterUse
from server.errors import BadRequest, Conflict, NotFound, Unprocessable

logger = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class AdapterManager:
    """The registered adapters of one base model. Thread-safe.

    Args:
        store: files and registry.
        tasks, base_name: what adapters are compiled against, and the base's name in requests.
        packer: makes the form in which adapters are loaded.
        budget: the adapters' device memory.
        residency, tier: where a digest is now; see `AdapterCache`.
        forget: called with a digest that is gone for good.
        keep: called with all digests that are to stay on the device, whenever they change.
    """

    def __init__(
        self,
        store: AdapterStore,
        tasks: Tasks,
        base_name: str,
        *,
        packer: Packer,
        budget: Budget,
        residency: Callable[[str], str],
        tier: Callable[[str], str],
        forget: Callable[[str], None],
        keep: Callable[[frozenset[str]], None],
    ) -> None:
        self.store = store
        self.base_name = base_name
        self._tasks = tasks
        self._packer = packer
        self.budget = budget
        self._residency = residency
        self._tier = tier
        self._forget = forget
        self._keep = keep
        self._lock = threading.RLock()
        self._writer = threading.RLock()
        self._count_anew()
        self._aliases: dict[str, Alias] = {alias.name: alias for alias in store.aliases()}
        self._records: dict[str, AdapterRecord] = {}
        for alias in self._aliases.values():
            record = store.record(alias.digest)
            assert record is not None
            self._records[alias.digest] = record
        self._leases: Counter[str] = Counter()
        self._uncounted: Counter[str] = Counter()
        self._worker = ThreadPoolExecutor(1, "adapter-worker", initializer=yield_to_engine)
        for digest in store.unreferenced():
            store.purge(digest)

    def _count_anew(self) -> None:
        """Correct the rows of an earlier version; what cannot be read fails when it is loaded."""
        for digest in self.store.uncounted():
            folder = self.store.folder(digest)
            try:
                config = (folder / CONFIG_NAME).read_bytes()
                _, program = validate(config, folder / WEIGHTS_NAME, self._tasks)
            except (AdapterError, OSError) as exc:
                logger.error("adapter %s cannot be read: %s", digest[:12], exc)
                self.store.set_packed_size(digest, PackedSize(1, 0, 1))
            else:
                self.store.set_packed_size(digest, packed_size(program))

    # -- requests --------------------------------------------------------------------------------

    def lease(self, model: str, mixture: Sequence[tuple[str, float]] | None = None) -> Lease:
        """Resolve what a request names, and keep it alive.

        Args:
            model: the base's name, "<adapter>", "<base>:<adapter>" or
                "<adapter>@sha256:<digest prefix>".
            mixture: adapters and weights, beside the base's name.

        Raises:
            NotFound: no such model, adapter, or digest of it.
            BadRequest: a mixture beside an adapter's name, or an empty or repeated one.
            Unprocessable: a mixture that does not add up.
            TooLarge: a mixture that does not fit the adapters' memory.
        """
        with self._lock:
            if mixture is not None:
                return self._lease_mixture(model, mixture)
            if model == self.base_name:
                return Lease(model, ())
            alias = self._find(model.removeprefix(f"{self.base_name}:"), "model")
            self._uncounted[alias.name] += 1
            return self._take(model, [(alias, 1.0)], self._labels(alias))

    def _lease_mixture(self, model: str, mixture: Sequence[tuple[str, float]]) -> Lease:
        if model != self.base_name:
            raise BadRequest(
                f"adapters: goes beside the base model's name {self.base_name!r}, not {model!r}",
                param="model",
            )
        if not mixture:
            raise BadRequest("adapters: at least one is needed", param="adapters")
        found = [(self._find(name, "adapters"), weight) for name, weight in mixture]
        digests = [alias.digest for alias, _ in found]
        if len(set(digests)) < len(digests):
            raise BadRequest(
                "adapters: one adapter is named twice; add its weights up", param="adapters"
            )
        records = [self._records[d] for d in digests]
        try:
            check_mixture(
                [(a.name, r.adds, r.method) for (a, _), r in zip(found, records, strict=True)],
                [weight for _, weight in found],
            )
        except MixtureError as exc:
            raise Unprocessable(str(exc), param="adapters", code="mixture_not_additive") from None
        self.budget.check_mixture(self._records[d] for d in {*digests, *self.pinned()})
        for alias, _ in found:
            self._uncounted[alias.name] += 1
        return self._take(model, found)

    def _find(self, reference: str, param: str) -> Alias:
        """The alias for "<adapter>" or "<adapter>@sha256:<digest prefix>"."""
        name, at, prefix = reference.partition("@sha256:")
        alias = self._aliases.get(name)
        if alias is None:
            raise NotFound(
                f"the model {reference!r} does not exist: it is neither the base model "
                f"{self.base_name!r} nor a registered adapter",
                param=param,
                code="model_not_found",
            )
        if at and not (re.fullmatch("[0-9a-f]{1,64}", prefix) and alias.digest.startswith(prefix)):
            raise NotFound(
                f"adapter {name!r} is now sha256:{alias.digest[:12]}, not sha256:{prefix[:64]}",
                param=param,
                code="model_not_found",
            )
        return alias

    def _take(
        self, label: str, uses: Sequence[tuple[Alias, float]], labels: tuple[str, ...] = ()
    ) -> Lease:
        for alias, _ in uses:
            self._leases[alias.digest] += 1
        records = [self._records[alias.digest] for alias, _ in uses]
        first = records[0]
        return Lease(
            label,
            tuple(AdapterUse(alias.digest, weight) for alias, weight in uses),
            names=tuple(alias.name for alias, _ in uses),
            num_virtual_tokens=first.num_virtual_tokens,
            virtual_kv=first.virtual_kv,
            task=next((r.task for r in records if r.task is not None), None),
            labels=labels,
            problem_type=None if len(uses) > 1 else uses[0][0].problem_type,
            on_release=self._release,
        )

    def _labels(self, alias: Alias) -> tuple[str, ...]:
        """What its classes are called: as it was said, else as transformers does."""
        count = self._records[alias.digest].num_labels
        return alias.labels or tuple(f"LABEL_{i}" for i in range(count))

    def _release(self, lease: Lease) -> None:
        with self._lock:
            for use in lease.uses:
                self._let_go(use.digest)

    def _let_go(self, digest: str) -> None:
        self._leases[digest] -= 1
        if self._leases[digest] == 0:
            del self._leases[digest]
            self._drop_if_unused(digest)

    def _is_used(self, digest: str) -> bool:
        return digest in self._leases or any(a.digest == digest for a in self._aliases.values())

    def _drop_if_unused(self, digest: str) -> None:
        if not self._is_used(digest) and self._records.pop(digest, None) is not None:
            self._forget(digest)
            self._worker.submit(self._purge_if_unused, digest)

    def _purge_if_unused(self, digest: str) -> None:
        """Delete the files, unless somebody has registered the same bytes again."""
        with self._writer:
            with self._lock:
                if self._is_used(digest):
                    return
            self.store.purge(digest)

    def record(self, digest: str) -> AdapterRecord:
        """The record of a digest that is named or leased."""
        return self._records[digest]

    # -- registration ----------------------------------------------------------------------------

    def register(
        self,
        name: str,
        config: bytes,
        weights: Path,
        id2label: bytes | None = None,
        *,
        head: Path | None = None,
        head_config: bytes | None = None,
        may_replace: bool = True,
    ) -> tuple[AdapterInfo, Literal["created", "unchanged", "updated"]]:
        """Validate an adapter, keep it, and let `name` mean it. Blocks; for a worker thread.

        Args:
            name: the alias.
            config: `adapter_config.json`'s bytes.
            weights: a safetensors file, which stays the caller's.
            id2label: what a classifier's classes are called, as `parse_labels` reads it.
            head, head_config: what lies beside an adapter of AdapterHub's, as `join_head` reads it.
            may_replace: the name may stand for other bytes so far.

        Raises:
            BadRequest: the name, the labels. Conflict: it is the base's, or the adapter does not
            fit the adapters' memory beside those that are pinned. Unprocessable: the adapter does
            not fit the base, or the labels the adapter. TooLarge: it does not fit the adapters'
            memory.
        """
        self.check_name(name, may_exist=may_replace)
        if head is not None:
            with self.store.staging() as folder:
                joining = self._worker.submit(join_head, config, weights, head, head_config, folder)
                try:
                    config, weights, said = joining.result()
                except AdapterError as exc:
                    raise _refusal(exc) from None
                labels = id2label or said
                return self.register(name, config, weights, labels, may_replace=may_replace)
        about = Labels() if id2label is None else parse_labels(id2label)
        try:
            # One at a time, on a thread that gives way to the engine.
            record, packed = self._worker.submit(self._validate, config, weights).result()
        except AdapterError as exc:
            raise _refusal(exc) from None
        digest = record.digest
        if about.names is not None and len(about.names) != record.num_labels:
            raise Unprocessable(
                f"id2label: {len(about.names)} labels, but the adapter's head has "
                f"{record.num_labels}",
                param="id2label",
                code="invalid_labels",
            )
        with self._writer:
            self.check_name(name, may_exist=may_replace)
            self._check_pins(self._pinned_if(name, digest), record)
            with self._lock:
                self._leases[digest] += 1  # nobody drops it until the name holds it, or this fails
                self._records.setdefault(digest, record)
            try:
                with self.store.staging() as staged:
                    (staged / CONFIG_NAME).write_bytes(config)
                    copyfile(weights, staged / WEIGHTS_NAME)
                    self._packer.save(packed, staged)
                    self.store.put(staged, record)
                del packed
                trim_malloc()  # what checks and compiling took for a time lies between what stays
                before = self._aliases.get(name)
                previous = self.store.set_alias(name, digest, about.names, about.problem_type)
                alias = self.store.alias(name)
                assert alias is not None
                with self._lock:
                    self._aliases[name] = alias
                    if alias.pinned:
                        self._keep(self.pinned())
                    if previous is not None:
                        self._drop_if_unused(previous)
            finally:
                with self._lock:
                    self._let_go(digest)
            info = self._info(alias)
        if previous is None:
            return info, "created"
        same = before is not None and _means(before) == _means(alias)
        return info, "unchanged" if same else "updated"

    def check_name(self, name: str, *, may_exist: bool = True) -> None:
        """Raises BadRequest or Conflict if an adapter cannot have this name."""
        if not NAME_PATTERN.fullmatch(name):
            raise BadRequest(
                f"name: {name[:200]!r} must match {NAME_PATTERN.pattern} (letters, digits, '.', "
                "'_', '-'; at most 128)",
                param="name",
            )
        if name == self.base_name:
            raise Conflict(f"name: {name!r} is the base model's", param="name")
        if not may_exist and name in self._aliases:
            raise Conflict(f"name: {name!r} is taken", param="name", code="already_exists")

    def _validate(self, config: bytes, weights: Path) -> tuple[AdapterRecord, PackedAdapter]:
        parsed, program = validate(config, weights, self._tasks)
        record = AdapterRecord(
            digest=program.digest,
            method=parsed.peft_type,
            rank=program.max_rank,
            **packed_size(program)._asdict(),
            num_virtual_tokens=program.num_virtual_tokens,
            virtual_kv=program.virtual_kv,
            adds=program.adds,
            modules=tuple(program.modules),
            file_bytes=len(config) + weights.stat().st_size,
            created_at=time.time(),
            task=program.task,
            num_labels=program.num_labels,
        )
        self.budget.check_upload(record)
        return record, self._packer.pack(program)

    # -- pins ------------------------------------------------------------------------------------

    def pinned(self) -> frozenset[str]:
        """The digests that pinned names stand for."""
        with self._lock:
            return frozenset(a.digest for a in self._aliases.values() if a.pinned)

    def num_pinned(self) -> int:
        """How many names are pinned."""
        with self._lock:
            return sum(alias.pinned for alias in self._aliases.values())

    def check_pins(self) -> None:
        """Raises Conflict if what was pinned before does not fit the memory that there is now."""
        self._check_pins(self.pinned())

    def _pinned_if(self, name: str, digest: str) -> frozenset[str]:
        """The same, were `name` to stand for `digest`."""
        with self._lock:
            others = {a.digest for a in self._aliases.values() if a.pinned and a.name != name}
            alias = self._aliases.get(name)
        return frozenset(others | {digest} if alias is not None and alias.pinned else others)

    def set_pinned(self, name: str, pinned: bool) -> AdapterInfo:
        """Keep an adapter on the device from now on, across restarts too; or no more. The name is
        pinned: what it comes to stand for is kept in its turn.

        Raises:
            NotFound: no such adapter. Conflict: the largest of the others would not fit any more.
        """
        with self._writer:
            with self._lock:
                alias = self._find(name, "name")
            if pinned:
                self._check_pins(self.pinned() | {alias.digest})
            self.store.set_pinned(alias.name, pinned)
            with self._lock:
                # What is counted of its requests may have changed meanwhile.
                alias = dataclasses.replace(self._aliases[alias.name], pinned=pinned)
                self._aliases[alias.name] = alias
                self._keep(self.pinned())
                return self._info(alias)

    def _check_pins(self, pinned: frozenset[str], *new: AdapterRecord) -> None:
        """Raises Conflict unless each adapter, `new` ones too, fits beside all that are pinned."""
        with self._lock:
            known = {**self._records, **{record.digest: record for record in new}}
        self.budget.check_pins(
            (known[digest] for digest in pinned), (known[d] for d in known.keys() - pinned)
        )

    # -- what there is ---------------------------------------------------------------------------

    def list(self) -> list[AdapterInfo]:
        """All adapters by name."""
        self.flush()
        with self._lock:
            return [self._info(self._aliases[name]) for name in sorted(self._aliases)]

    def get(self, name: str) -> AdapterInfo:
        """Raises NotFound."""
        self.flush()
        with self._lock:
            return self._info(self._find(name, "name"))

    def delete(self, name: str) -> AdapterInfo:
        """Forget a name; requests that run finish. Raises NotFound."""
        self.flush()
        with self._writer:
            with self._lock:
                alias = self._find(name, "name")
                info = self._info(alias)
            self.store.remove_alias(alias.name)
            with self._lock:
                del self._aliases[alias.name]
                if alias.pinned:
                    self._keep(self.pinned())
                self._drop_if_unused(alias.digest)
            return info

    def _info(self, alias: Alias) -> AdapterInfo:
        record = self._records[alias.digest]
        return AdapterInfo(
            name=alias.name,
            digest=record.digest,
            method=record.method,
            rank=record.rank,
            num_bytes=self.budget.bytes_of(record),
            file_bytes=record.file_bytes,
            num_virtual_tokens=record.num_virtual_tokens,
            modules=record.modules,
            created_at=alias.created_at,
            updated_at=alias.updated_at,
            num_requests=alias.num_requests,
            last_used_at=alias.last_used_at,
            pinned=alias.pinned,
            tier=self._tier(record.digest),
            residency=self._residency(record.digest),
            num_running=self._leases[record.digest],
            task=record.task or "CAUSAL_LM",
            labels=self._labels(alias) or None,
            problem_type=alias.problem_type,
        )

    def names_by_digest(self) -> Mapping[str, Sequence[str]]:
        """Every registered digest with its names; adapters in the order of their registration."""
        names: dict[str, list[str]] = {}
        with self._lock:
            for alias in sorted(self._aliases.values(), key=lambda alias: alias.created_at):
                names.setdefault(alias.digest, []).append(alias.name)
        return names

    def records(self) -> Sequence[AdapterRecord]:
        """Of all digests that are named or leased."""
        with self._lock:
            return list(self._records.values())

    def file_bytes(self) -> int:
        """What the adapters' files take of the disk."""
        return sum(record.file_bytes for record in self.records())

    def flush(self) -> None:
        """Write the counts of requests to the registry."""
        with self._writer:
            with self._lock:
                counts = {n: c for n, c in self._uncounted.items() if n in self._aliases}
                self._uncounted.clear()
            now = time.time()
            self.store.count_requests(counts, now)
            with self._lock:
                for name, count in counts.items():
                    alias = self._aliases[name]
                    self._aliases[name] = dataclasses.replace(
                        alias, num_requests=alias.num_requests + count, last_used_at=now
                    )

    def close(self) -> None:
        """Finish what is pending and close the store."""
        self._worker.shutdown(wait=True)
        self.flush()
        self.store.close()

    def check_integrity(self) -> None:
        """Raises AssertionError unless store, aliases and leases agree."""
        self._worker.submit(lambda: None).result()  # what was dropped is deleted
        with self._writer, self._lock:
            stored = {alias.name: alias.digest for alias in self.store.aliases()}
            assert stored == {a.name: a.digest for a in self._aliases.values()}
            assert all(count > 0 for count in self._leases.values())
            assert set(self._records) == {*stored.values(), *self._leases}
            self.store.check_integrity()


def _means(alias: Alias) -> tuple[object, ...]:
    return alias.digest, alias.labels, alias.problem_type


def _refusal(exc: AdapterError) -> Unprocessable:
    """The 422 for an adapter that peftcore refuses."""
    match exc:
        case CheckpointError(key=key):
            return Unprocessable(str(exc), param=key, code="invalid_adapter_weights")
        case ConfigError(field=field):
            return Unprocessable(str(exc), param=field, code="invalid_adapter_config")
    return Unprocessable(str(exc), code="invalid_adapter")


__all__ = ["AdapterManager", "Lease"]
