"""Compiles what a text must match to grammars over the tokens, by xgrammar.

A compilation may take seconds or gigabytes, and a thread cannot be ended. So each runs in a child
process, forked from a thread of a small pool, with a bound on its time and its memory; what it
made comes back serialized. Neither the event loop nor the engine waits for it. Knows nothing of
sequences or logits (`server.engine.guided`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import resource
import select
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from server.engine.json_schema import followed_schema
from server.engine.sequence import Constraint
from server.errors import BadRequest, TooLarge, Unavailable
from server.tokenization import Tokenizer

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar, GrammarCompiler, TokenizerInfo

#: Most bytes of a schema, an expression or a grammar.
MAX_SOURCE_BYTES = 64 << 10
#: How long a compilation may take.
MAX_SECONDS = 10.0
#: Bytes of the compiled form, serialized. Ordinary schemas have some hundred thousand.
MAX_COMPILED_BYTES = 64 << 20
#: Bytes that a compilation may take beside what the server has.
_MAX_MEMORY = 1 << 30
#: Bytes of compiled grammars that are kept for later requests.
_CACHE_BYTES = 64 << 20
_NUM_WORKERS = 2
_MAX_WAITING = 64


class Grammars:
    """Compiled grammars by what they were made of, least recently used dropped first.

    Args:
        vocab_size: rows of the logits, of which the tokenizer may not use all.
        eos_token_ids: what ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, CompiledGrammar | BadRequest] = OrderedDict()
        self._num_bytes = 0
        self._num_waiting = 0

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_NUM_WORKERS, thread_name_prefix="grammars")

    def close(self) -> None:
        """Wait for what is being compiled, at most `MAX_SECONDS`."""
        if "_pool" in self.__dict__:
            self._pool.shutdown(cancel_futures=True)

    @staticmethod
    def followed(constraint: Constraint) -> Any:
        """The JSON schema as it is followed. Raises BadRequest where it cannot be."""
        _check_size(constraint)
        try:
            return followed_schema(constraint.source)
        except BadRequest as exc:
            raise _named(exc, constraint.param) from None

    async def compile(self, constraint: Constraint) -> CompiledGrammar:
        """The grammar of a constraint; from the cache, where it is there.

        Raises:
            BadRequest: it cannot be followed, or not be compiled within the bounds.
            TooLarge: the source is too long.
            Unavailable: too many wait to be compiled.
        """
        if not self._eos:
            raise BadRequest("this model has no end token", param=constraint.param)
        _check_size(constraint)
        digest = hashlib.sha256(f"{constraint.kind}\0{constraint.source}".encode()).digest()
        with self._lock:
            found = self._kept.get(digest)
            if found is not None:
                self._kept.move_to_end(digest)
        if found is None:
            if self._num_waiting >= _MAX_WAITING:
                raise Unavailable("too many grammars wait to be compiled")
            self._num_waiting += 1
            try:
                loop = asyncio.get_running_loop()
                found = await loop.run_in_executor(self._pool, self._compile, constraint, digest)
            finally:
                self._num_waiting -= 1
        if isinstance(found, BadRequest):
            raise _named(found, constraint.param)
        return found

    def _compile(self, constraint: Constraint, digest: bytes) -> CompiledGrammar | BadRequest:
        with self._lock:  # another request may have asked for the same meanwhile
            found = self._kept.get(digest)
        if found is not None:
            return found
        try:
            found = self._compile_anew(constraint)
        except BadRequest as exc:
            found = exc
        with self._lock:
            self._keep(digest, found)
        return found

    def _compile_anew(self, constraint: Constraint) -> CompiledGrammar:
        if constraint.kind == "json_schema":
            schema = json.dumps(followed_schema(constraint.source))
            constraint = replace(constraint, source=schema)
        from xgrammar import CompiledGrammar

        info, compiler = self._info, self._compiler
        data = _in_child(
            lambda: _compile(compiler, constraint).serialize_json().encode(), MAX_SECONDS
        )
        return CompiledGrammar.deserialize_json(data.decode(), info)

    def _keep(self, digest: bytes, found: CompiledGrammar | BadRequest) -> None:
        if digest in self._kept:
            return
        self._kept[digest] = found
        self._num_bytes += _size(found)
        while self._num_bytes > _CACHE_BYTES:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= _size(dropped)

    @cached_property
    def _info(self) -> TokenizerInfo:
        from xgrammar import TokenizerInfo

        detected = TokenizerInfo.from_huggingface(
            self._tokenizer.fast, vocab_size=self._vocab_size, stop_token_ids=self._eos
        )
        # Special tokens are no part of a text, so they must not match one by their names.
        vocab: list[bytes | str] = [""] * self._vocab_size
        for token, token_id in self._tokenizer.fast.get_vocab().items():
            if token_id < self._vocab_size and token_id not in self._tokenizer.special:
                vocab[token_id] = token
        return TokenizerInfo.from_vocab_and_metadata(vocab, detected.dump_metadata())

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        from xgrammar import GrammarCompiler

        return GrammarCompiler(self._info, max_threads=1, cache_enabled=False)


def _check_size(constraint: Constraint) -> None:
    if len(constraint.source.encode()) > MAX_SOURCE_BYTES:
        raise TooLarge(
            f"{constraint.param}: more than {MAX_SOURCE_BYTES} bytes", param=constraint.param
        )


def _named(error: BadRequest, param: str) -> BadRequest:
    return BadRequest(f"{param}: {error.message}", param=param)


def _size(found: CompiledGrammar | BadRequest) -> int:
    return 1024 if isinstance(found, BadRequest) else found.memory_size_bytes


def _compile(compiler: GrammarCompiler, constraint: Constraint) -> CompiledGrammar:
    match constraint.kind:
        case "json_schema":
            return compiler.compile_json_schema(constraint.source, any_whitespace=False)
        case "regex":
            return compiler.compile_regex(constraint.source)
        case "grammar":
            return compiler.compile_grammar(constraint.source)
        case "structural_tag":
            return compiler.compile_structural_tag(constraint.source)


def _in_child(work: Callable[[], bytes], seconds: float) -> bytes:
    """What `work` returns in a forked child, which is killed when it takes too long.

    The child has one thread and runs nothing but `work`; it must not touch torch or a lock that
    another thread of the parent may have held.

    Raises:
        BadRequest: `work` raised, with its message; or it took too long, or too much memory.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_child(work, write, seconds)
    os.close(write)
    end = time.monotonic() + seconds
    data = bytearray()
    try:
        while len(data) <= MAX_COMPILED_BYTES:
            ready, _, _ = select.select([read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise BadRequest(f"takes more than {seconds:g} s to compile; make it simpler")
            piece = os.read(read, 1 << 20)
            if not piece:
                break
            data += piece
        else:
            raise BadRequest("its compiled form is too large; make it simpler")
    finally:
        os.close(read)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    match data[:1]:
        case b"+":
            return bytes(data[1:])
        case b"-":
            raise BadRequest(data[1:].decode(errors="replace"))
        case _:
            raise BadRequest("takes too much memory to compile; make it simpler")


def _run_child(work: Callable[[], bytes], write: int, seconds: float) -> Any:
    """Never returns."""
    try:
        os.nice(10)
        # Pipes of other children among them: these would not end with their own child.
        os.closerange(3, write)
        os.closerange(write + 1, os.sysconf("SC_OPEN_MAX"))
        with open("/proc/self/statm") as file:
            num_bytes = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes + _MAX_MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # xgrammar's warnings
        try:
            data = b"+" + work()
        except Exception as exc:
            data = b"-" + _reason(exc).encode()
        view = memoryview(data)
        while view:
            view = view[os.write(write, view) :]
    finally:
        os._exit(0)


def _reason(exc: Exception) -> str:
    """An error of xgrammar without its time and its place in xgrammar."""
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    return re.sub(r"^\[[\d:]+\] \S+\.cc:\d+: ", "", lines[0])[:500]


__all__ = ["MAX_SECONDS", "MAX_SOURCE_BYTES", "Grammars"]
