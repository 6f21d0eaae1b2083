"""Put a runtime together from settings: model, pools, adapters, engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from peftcore import ops
from peftcore.arena import AdapterArena
from peftcore.base import BaseModel
from peftcore.checkpoint import adapterhub_format
from peftcore.checkpoint.adapterhub_heads import HEAD_CONFIG_NAME, HEAD_NAME
from peftcore.config import CONFIG_NAME, WEIGHTS_NAME
from peftcore.memory import align_by_malloc, trim_malloc
from peftcore.ops.cpu import kernels, kernels_status
from peftcore.packing import PackedAdapter
from peftcore.quant import Activations, Quantization
from peftcore.sources.resolve import resolve_model
from server.adapters.admission import Packer
from server.adapters.budget import Budget
from server.adapters.cache import AdapterCache, HostCache
from server.adapters.manager import AdapterManager
from server.adapters.store import AdapterStore, StoreError
from server.engine.block_manager import BlockManager
from server.engine.engine import Engine
from server.engine.grammars import Grammars
from server.engine.model_runner import ModelRunner
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.sequence import PoolingParams
from server.engine.step_graphs import CudaCapture, StepGraphs, unfit
from server.errors import Conflict, ServerError
from server.memory import (
    MemoryPlan,
    TooLittleMemory,
    base_bytes,
    graph_bytes,
    make_memory_plan,
    workspace_bytes,
)
from server.models.embedding import default_embedding, embedding_defaults
from server.models.kv_pool import KVPool
from server.models.loader import LoadedModel, load_model
from server.runtime import Runtime
from server.settings import Settings
from server.tokenization import Tokenizer

logger = logging.getLogger(__name__)

#: Host memory for adapters beside a GPU, in bytes.
_HOST_MEMORY = 512 << 20
#: How AdapterHub calls an adapter's weights.
_HUB_WEIGHTS_NAME = adapterhub_format.WEIGHTS_NAME


class SetupError(Exception):
    """The settings cannot be carried out; the message names the flag."""


def build_runtime(settings: Settings) -> Runtime:
    """Resolve and load the model, open the store, size the pools, register what is preloaded. The
    engine is not started.

    Raises:
        ModelSourceError, UnservableModel: the model cannot be had, or not be served.
        SetupError: a setting does not fit.
    """
    device = device_of(settings)
    folders = adapter_folders(settings)
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    align_by_malloc()
    folder = resolve_model(settings.model)
    logger.info("base model %s from %s", folder.name, folder.path)
    activations = _activations(settings, device)
    loaded = load_model(folder.path, settings.quantization, device, activations)
    if loaded.quantization != settings.quantization:
        logger.info("the checkpoint is quantized, and keeps its %s codes", loaded.quantization)
    tokenizer = Tokenizer.from_folder(folder.path)
    name = settings.served_model_name or folder.name
    embedding = embedding_defaults(folder.path, loaded)
    runtime = assemble(settings, loaded, tokenizer, name, embedding)
    preload(runtime, folders)
    trim_malloc()  # what loading took for a time lies between what stays
    return runtime


def device_of(settings: Settings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SetupError("--device cuda: torch finds no CUDA device")
    return torch.device(settings.device)


def _activations(settings: Settings, device: torch.device) -> Activations | None:
    asked = settings.activations
    if asked == "auto":
        return None
    if asked != "float" and (
        device.type != "cpu" or settings.quantization == "none" or kernels() is None
    ):
        raise SetupError(
            f"--activations {asked}: needs a quantized base and the CPU kernels, here are "
            f"{settings.quantization} and {kernels_status() if device.type == 'cpu' else device}"
        )
    return asked


def kv_dtype_of(
    settings: Settings,
    device: torch.device,
    quantization: Quantization,
    dtype: torch.dtype,
    *,
    is_encoder: bool,
) -> torch.dtype:
    """Half precision costs nothing beside codes, where the CPU kernels read it; otherwise, and for
    an encoder, of which nothing is kept, as the model computes, in `dtype`."""
    if settings.kv_cache_dtype != "auto":
        return cast(torch.dtype, getattr(torch, settings.kv_cache_dtype))
    halves = device.type == "cpu" and kernels() is not None and not is_encoder
    return torch.float16 if halves and quantization != "none" else dtype


def adapter_dtype_of(
    settings: Settings, device: torch.device, quantization: Quantization, dtype: torch.dtype
) -> torch.dtype:
    """How adapters are packed. Raises SetupError: as nothing here could read them."""
    asked = settings.adapter_dtype
    is_read = device.type == "cpu" and kernels() is not None and not ops.uses_triton(device)
    if asked == "int8" and not (is_read and dtype == torch.float32):
        raise SetupError(
            f"--adapter-dtype int8: needs the CPU kernels and float32 beside a base's codes, here "
            f"are {ops.status(device)} and {dtype} on {device}; float does without"
        )
    rounded = asked == "int8" or (asked == "auto" and is_read and quantization != "none")
    return torch.int8 if rounded else dtype


def kv_room(
    settings: Settings, kv_memory: int, block_bytes: int, max_positions: int, *, is_encoder: bool
) -> tuple[int, int]:
    """Blocks of the KV cache, and most tokens of one step.

    Args:
        kv_memory: bytes that the cache may take.
        max_positions: what the model was made for.
    """
    num_blocks = kv_memory // block_bytes
    max_num_batched_tokens = max(settings.max_num_batched_tokens, settings.max_num_seqs)
    if is_encoder:  # its keys and values are needed within a step, by each layer anew
        longest = settings.max_model_len or max_positions
        max_num_batched_tokens = max(max_num_batched_tokens, longest)
        per_step = 2 * max_num_batched_tokens // settings.block_size + settings.max_num_seqs
        num_blocks = min(num_blocks, per_step)
    return num_blocks, max_num_batched_tokens


def assemble(
    settings: Settings,
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    base_name: str,
    embedding: PoolingParams | None = None,
) -> Runtime:
    """A runtime around a model in memory. Raises SetupError.

    Args:
        embedding: how the model's own files say that texts are embedded, if they do.
    """
    is_encoder = loaded.is_encoder
    kv_dtype = kv_dtype_of(
        settings, loaded.device, loaded.quantization, loaded.dtype, is_encoder=is_encoder
    )
    block_bytes = KVPool.block_bytes(loaded.base.kv_shapes, settings.block_size, kv_dtype)
    memory = memory_plan(settings, loaded)
    num_blocks, max_num_batched_tokens = kv_room(
        settings,
        memory.kv_cache,
        block_bytes,
        loaded.max_position_embeddings,
        is_encoder=is_encoder,
    )
    capacity = num_blocks * settings.block_size
    max_model_len = min(settings.max_model_len or loaded.max_position_embeddings, capacity)
    if settings.max_model_len is not None:
        if settings.max_model_len > loaded.max_position_embeddings:
            raise SetupError(
                f"--max-model-len {settings.max_model_len}: the model was made for "
                f"{loaded.max_position_embeddings} tokens"
            )
        if settings.max_model_len > capacity:
            raise SetupError(
                f"--kv-memory: {memory.kv_cache} bytes hold {capacity} tokens, fewer than "
                f"--max-model-len {settings.max_model_len}"
            )
    if capacity == 0:
        raise SetupError(f"--kv-memory: at least one block of {block_bytes} bytes is needed")
    memory = replace(memory, kv_cache=num_blocks * block_bytes)
    logger.log(logging.INFO if memory.fits else logging.WARNING, "memory: %s", memory)

    pool = KVPool(
        loaded.base.kv_shapes,
        num_blocks=num_blocks,
        block_size=settings.block_size,
        dtype=kv_dtype,
        device=loaded.device,
    )
    arena = AdapterArena(settings.adapter_memory, torch.uint8, loaded.device)
    store = _open_store(settings.data_dir.expanduser(), base_name, loaded.base)

    adapter_dtype = adapter_dtype_of(settings, loaded.device, loaded.quantization, loaded.dtype)
    packer = Packer(loaded.tasks, adapter_dtype, pin_memory=loaded.device.type == "cuda")

    def load(digest: str) -> PackedAdapter:
        return packer.load(store.folder(digest), digest)

    cache = AdapterCache(
        arena,
        HostCache(host_memory(settings, loaded.device)),
        load=load,
        size_of=lambda digest: adapters.budget.bytes_of(adapters.record(digest)),
        linears=loaded.host.linears,
        wake=lambda: runtime.wake(),
    )
    adapters = AdapterManager(
        store,
        loaded.tasks,
        base_name,
        packer=packer,
        budget=Budget(arena.data.nbytes, adapter_dtype),
        residency=cache.residency,
        tier=cache.tier,
        forget=lambda digest: runtime.forget(digest),
        keep=lambda digests: runtime.keep(digests),
    )
    try:
        adapters.check_pins()
    except Conflict as exc:
        adapters.close()
        raise SetupError(f"--adapter-memory: {exc.message}") from exc
    scheduler = Scheduler(
        BlockManager(num_blocks, settings.block_size),
        cache,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_prefill_tokens=settings.max_prefill_tokens,
        whole=is_encoder,
    )
    graphs = capture_steps(settings, loaded, pool, max_model_len)
    engine = Engine(
        scheduler,
        ModelRunner(loaded, pool, cache.resident, graphs),
        cache,
        Sampler(loaded.eos_token_ids, looks_between=loaded.device.type == "cpu"),
        tokenizer,
        loaded.eos_token_ids,
    )
    vocab_size = loaded.model.config.get_text_config().vocab_size
    runtime = Runtime(
        engine,
        adapters,
        tokenizer,
        base_name=base_name,
        max_model_len=max_model_len,
        max_waiting=settings.max_waiting,
        request_timeout=settings.request_timeout,
        generates=loaded.tasks.generates,
        prepare_task=loaded.tasks.task_class,
        embedding=embedding or default_embedding(loaded),
        grammars=Grammars(tokenizer, vocab_size, loaded.eos_token_ids),
        facts={
            "model": base_name,
            "quantization": loaded.quantization,
            "activations": loaded.activations,
            "device": str(loaded.device),
            "kernels": ops.status(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(kv_dtype).removeprefix("torch."),
            "adapter_dtype": "int8" if adapter_dtype == torch.int8 else "float",
            "max_model_len": max_model_len,
            "cuda_graphs": graphs is not None,
            "vocab_size": vocab_size,
        },
    )
    return runtime


def memory_plan(settings: Settings, loaded: LoadedModel) -> MemoryPlan:
    """What the pools around a model in memory may take. Raises SetupError."""
    longest = loaded.max_position_embeddings
    max_num_batched_tokens = max(settings.max_num_batched_tokens, settings.max_num_seqs)
    try:
        return make_memory_plan(
            loaded.device,
            base=base_bytes(loaded.model),
            adapters=settings.adapter_memory,
            workspace=workspace_bytes(
                loaded.model.config.get_text_config(),
                max_num_batched_tokens=max_num_batched_tokens,
                max_num_seqs=settings.max_num_seqs,
                max_model_len=settings.max_model_len or longest,
                dtype=loaded.dtype,
                dequantizes=dequantizes(loaded.device),
            ),
            kv_memory=settings.kv_memory,
            is_loaded=True,
            graphs=graph_bytes(
                loaded.model.config.get_text_config(),
                max_rows=max_graph_rows(settings),
                max_model_len=settings.max_model_len or longest,
                dtype=loaded.dtype,
            )
            if wants_graphs(settings, loaded.device) and unfit(loaded) is None
            else 0,
        )
    except TooLittleMemory as exc:
        raise SetupError(str(exc)) from exc


def wants_graphs(settings: Settings, device: torch.device) -> bool:
    return settings.cuda_graphs and device.type == "cuda"


def max_graph_rows(settings: Settings) -> int:
    """Rows of the largest graph."""
    return min(settings.cuda_graph_max_seqs or settings.max_num_seqs, settings.max_num_seqs)


def capture_steps(
    settings: Settings, loaded: LoadedModel, pool: KVPool, max_model_len: int
) -> StepGraphs | None:
    """The decode steps' graphs; None, and why in the log, where steps are computed eagerly."""
    if not wants_graphs(settings, loaded.device):
        return None
    if reason := unfit(loaded):
        logger.warning("no CUDA graphs: %s", reason)
        return None
    start = time.perf_counter()
    try:
        graphs = StepGraphs(
            loaded,
            pool,
            CudaCapture(),
            max_rows=max_graph_rows(settings),
            max_model_len=max_model_len,
        )
    except Exception as exc:  # whatever a model does that cannot be captured
        logger.warning("no CUDA graphs: the model's step cannot be captured: %s", exc)
        return None
    seconds = time.perf_counter() - start
    logger.info("CUDA graphs of up to %s rows in %.1f s", graphs.num_rows[-1], seconds)
    return graphs


def dequantizes(device: torch.device) -> bool:
    """Does a step make whole float weights of quantized ones?"""
    return device.type != "cpu" or kernels() is None


def host_memory(settings: Settings, device: torch.device) -> int:
    """Bytes for adapters' host copies. A CPU's arena is host memory: a copy would be a second."""
    if settings.adapter_host_memory is not None:
        return settings.adapter_host_memory
    return 0 if device.type == "cpu" else _HOST_MEMORY


def _open_store(data_dir: Path, base_name: str, base: BaseModel) -> AdapterStore:
    """The adapters of this base: one of another shape or name has a folder of its own."""
    try:
        return AdapterStore(data_dir / f"{base_name.replace('/', '--')}-{base.structure()[:12]}")
    except StoreError as exc:
        raise SetupError(f"--data-dir: {exc}") from exc


def adapter_folders(settings: Settings) -> list[Path]:
    """The folders with a config in --preload's, which are to be registered by their names.

    Raises:
        SetupError: a folder that a setting names is not there, or the weights beside a config.
    """
    for flag, folder in (("--preload", settings.preload), ("--lora-root", settings.lora_root)):
        if folder is not None and not folder.is_dir():
            raise SetupError(f"{flag}: there is no folder {folder}")
    if settings.preload is None:
        return []
    folders = sorted(p for p in settings.preload.iterdir() if (p / CONFIG_NAME).is_file())
    for path in folders:
        if not any((path / name).is_file() for name in (WEIGHTS_NAME, _HUB_WEIGHTS_NAME)):
            raise SetupError(f"--preload {path}: has no {WEIGHTS_NAME} beside its {CONFIG_NAME}")
    return folders


def preload(runtime: Runtime, folders: Sequence[Path]) -> None:
    """Register each of `adapter_folders`; raises SetupError for one that is refused."""
    for path in folders:
        weights, head = path / WEIGHTS_NAME, None
        if not weights.is_file():
            weights, head = path / _HUB_WEIGHTS_NAME, path / HEAD_NAME
        try:
            info, outcome = runtime.adapters.register(
                path.name,
                (path / CONFIG_NAME).read_bytes(),
                weights,
                _read_if_there(path / "config.json"),
                head=head if head is not None and head.is_file() else None,
                head_config=_read_if_there(path / HEAD_CONFIG_NAME),
            )
        except ServerError as exc:
            raise SetupError(f"--preload {path}: {exc.message}") from exc
        logger.info("adapter %s (%s) %s", info.name, info.method, outcome)


def _read_if_there(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
