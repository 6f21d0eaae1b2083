"""`polypeft adapters`: upload, look at, keep resident, delete."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from clients.adapter_files import CONFIG_NAME, WEIGHTS_NAME, open_adapter
from clients.cli.common import AsJson, err, errors_to_exit, local_time, out, print_json, size
from clients.client import Client
from clients.results import Adapter

adapters = typer.Typer(
    no_args_is_help=True, help="Upload, list, look at, keep resident and delete adapters."
)

Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Names = Annotated[list[str], typer.Argument(help="The adapters' names.")]


@adapters.command("push")
def push(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            help=f"A folder as PEFT or AdapterHub saves it ({CONFIG_NAME} and {WEIGHTS_NAME}), a "
            ".zip of it, or the .safetensors with the config beside it.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            "-n",
            help="What requests will call it; by default the folder's or the zip's name.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter. A name that exists is pointed at the new weights at once.

    The files are looked at before they are sent; the server then checks every tensor against its
    base model.
    """
    client: Client = context.obj
    name = name or _name_of(path)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with errors_to_exit():
        with open_adapter(path) as files:
            total = files.num_bytes
        with Progress(
            *columns,
            TransferSpeedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        ) as progress:
            task = progress.add_task(name, total=total)
            adapter = client.adapters.push(
                name, path, lambda sent: progress.update(task, completed=sent)
            )
    if as_json:
        print_json(asdict(adapter))
        return
    what = f"{adapter.method}, rank {adapter.rank}" if adapter.rank else adapter.method
    out.print(f"{adapter.status} {adapter.name} ({what}) sha256:{adapter.digest}", soft_wrap=True)


def _name_of(path: Path) -> str:
    """The folder's, also where a file in it is given."""
    whole = path.absolute()
    if whole.suffix == ".zip":
        return whole.stem
    return whole.parent.name if whole.suffix == ".safetensors" else whole.name


@adapters.command("list")
def list_adapters(context: typer.Context, as_json: AsJson = False) -> None:
    """List the adapters that the server has."""
    client: Client = context.obj
    with errors_to_exit():
        found = client.adapters.list()
    if as_json:
        print_json([asdict(adapter) for adapter in found])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "METHOD", "RANK", "SIZE", "RESIDENT", "REQUESTS", "DIGEST"):
        table.add_column(
            column, justify="right" if column in ("RANK", "SIZE", "REQUESTS") else "left"
        )
    for a in found:
        rank = str(a.rank) if a.rank else "-"
        table.add_row(
            a.name, a.method, rank, size(a.num_bytes), where(a), str(a.num_requests), a.digest[:12]
        )
    out.print(table)


@adapters.command("show")
def show(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show what an adapter is, where it is resident, and how often it was used."""
    client: Client = context.obj
    with errors_to_exit():
        adapter = client.adapters.get(name)
    if as_json:
        print_json(asdict(adapter))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in _facts(adapter).items():
        table.add_row(key, Text(value))
    out.print(table)


@adapters.command("rm")
def remove(context: typer.Context, names: Names, as_json: AsJson = False) -> None:
    """Delete adapters. Requests that are running finish first."""
    client: Client = context.obj
    _each(names, "deleted", client.adapters.remove, as_json)


@adapters.command("pin")
def pin(context: typer.Context, names: Names, as_json: AsJson = False) -> None:
    """Keep adapters on the device: they are never evicted."""
    client: Client = context.obj
    _each(names, "pinned", client.adapters.pin, as_json)


@adapters.command("unpin")
def unpin(context: typer.Context, names: Names, as_json: AsJson = False) -> None:
    """Let adapters be evicted again."""
    client: Client = context.obj
    _each(names, "unpinned", client.adapters.unpin, as_json)


@adapters.command("prefetch")
def prefetch(context: typer.Context, names: Names, as_json: AsJson = False) -> None:
    """Begin to load adapters, so that their first requests need not wait for it."""
    client: Client = context.obj
    _each(names, "prefetching", client.adapters.prefetch, as_json)


def _each(names: list[str], done: str, act: Callable[[str], Adapter], as_json: bool) -> None:
    """Act on one after another, and stop at the first that is refused."""
    answers = []
    with errors_to_exit():
        for name in names:
            answers.append(act(name))
            if not as_json:
                out.print(f"{done} {name}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json([asdict(adapter) for adapter in answers])


def where(adapter: Adapter) -> str:
    """Where it is resident, in a word or two."""
    found = "loading" if adapter.residency == "loading" else adapter.tier or adapter.residency
    return f"{found}, pinned" if adapter.pinned else found


def _facts(adapter: Adapter) -> dict[str, str]:
    last = adapter.last_used_at
    labels = {} if adapter.labels is None else {"labels": ", ".join(adapter.labels)}
    return {
        "name": adapter.name,
        "digest": f"sha256:{adapter.digest}",
        "method": adapter.method,
        "task": adapter.task or "-",
        **labels,
        "rank": str(adapter.rank or "-"),
        "virtual tokens": str(adapter.num_virtual_tokens or "-"),
        "size": f"{size(adapter.num_bytes)} on the device, {size(adapter.file_bytes)} in files",
        "modules": "\n".join(_by_layers(adapter.modules)) or "-",
        "created": local_time(adapter.created_at),
        "updated": local_time(adapter.updated_at),
        "requests": f"{adapter.num_requests}, {adapter.num_running} running",
        "last used": "never" if last is None else local_time(last),
        "resident": where(adapter),
    }


def _by_layers(modules: Sequence[str]) -> list[str]:
    """Modules whose paths differ in numbers only are one, with how many there are."""
    counts = Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", path) for path in modules)
    return [f"{path} ({count})" if "*" in path else path for path, count in counts.items()]
