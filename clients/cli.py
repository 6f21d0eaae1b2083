"""The command `polypeft`: adapters, completions and chat, from a terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from clients.client import CONFIG_NAME, DEFAULT_URL, WEIGHTS_NAME, Adapter, Client, weights_path
from clients.errors import ClientError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Talk to a polypeft server: one base model, many adapters.\n\n"
    "Try:  [bold]polypeft chat 'Write a haiku'[/bold], then the same with "
    "[bold]--model ADAPTER[/bold] and a name from [bold]polypeft adapters list[/bold].",
)
adapters = typer.Typer(no_args_is_help=True, help="Upload, list, look at and delete adapters.")
app.add_typer(adapters, name="adapters")

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="An adapter's name, BASE:ADAPTER or ADAPTER@sha256:DIGEST; by default the base model.",
    ),
]
Mix = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="NAME[=WEIGHT]",
        help="Mix adapters on the base model; may be given several times.",
    ),
]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, max=2, help="0 takes the likeliest token each time.")
]
TopP = Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling.")]
Seed = Annotated[int | None, typer.Option(help="Makes the answer repeatable.")]
NoStream = Annotated[bool, typer.Option("--no-stream", help="Print the answer at once, whole.")]


@app.callback()
def main_options(
    context: typer.Context,
    url: Annotated[
        str, typer.Option(envvar="POLYPEFT_URL", help="Where the server listens.")
    ] = DEFAULT_URL,
    api_key: Annotated[
        str | None, typer.Option(envvar="POLYPEFT_API_KEY", help="Sent as a bearer token.")
    ] = None,
) -> None:
    context.obj = context.with_resource(Client(url, api_key))


@contextmanager
def _errors_to_exit() -> Iterator[None]:
    """What the server or the disk refuses is one line on stderr and exit status 1."""
    try:
        yield
    except (ClientError, OSError) as exc:
        err.print(f"polypeft: {exc}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


@adapters.command("push")
def push(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What requests will call the adapter.")],
    folder: Annotated[
        Path,
        typer.Argument(
            exists=True,
            file_okay=False,
            help=f"A folder as PEFT saves it, {CONFIG_NAME} and {WEIGHTS_NAME}, or AdapterHub.",
        ),
    ],
) -> None:
    """Upload an adapter. A name that exists is pointed at the new weights at once."""
    client: Client = context.obj
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with _errors_to_exit():
        size = weights_path(folder).stat().st_size
        with Progress(
            *columns,
            TransferSpeedColumn(),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        ) as progress:
            task = progress.add_task(name, total=size)
            adapter = client.adapters.push(name, folder, lambda n: progress.advance(task, n))
    what = f"{adapter.method}, rank {adapter.rank}" if adapter.rank else adapter.method
    out.print(f"{adapter.status} {adapter.name} ({what}) sha256:{adapter.digest}", soft_wrap=True)


@adapters.command("list")
def list_adapters(context: typer.Context, as_json: AsJson = False) -> None:
    """List the adapters that the server has."""
    client: Client = context.obj
    with _errors_to_exit():
        found = client.adapters.list()
    if as_json:
        _print_json([dataclasses.asdict(adapter) for adapter in found])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "METHOD", "RANK", "SIZE", "RESIDENT", "REQUESTS", "DIGEST"):
        table.add_column(
            column, justify="right" if column in ("RANK", "SIZE", "REQUESTS") else "left"
        )
    for a in found:
        rank = str(a.rank) if a.rank else "-"
        size, requests = _size(a.num_bytes), str(a.num_requests)
        table.add_row(a.name, a.method, rank, size, a.residency, requests, a.digest[:12])
    out.print(table)


@adapters.command("show")
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The adapter's name.")],
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is, where it is resident, and how often it was used."""
    client: Client = context.obj
    with _errors_to_exit():
        adapter = client.adapters.get(name)
    if as_json:
        _print_json(dataclasses.asdict(adapter))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in _facts(adapter).items():
        table.add_row(key, value)
    out.print(table)


@adapters.command("rm")
def remove(
    context: typer.Context,
    names: Annotated[list[str], typer.Argument(help="The adapters' names.")],
) -> None:
    """Delete adapters. Requests that are running finish first."""
    client: Client = context.obj
    with _errors_to_exit():
        for name in names:
            out.print(f"deleted {client.adapters.remove(name).name}")


@app.command()
def complete(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="Text to continue; '-' reads it from stdin.")],
    model: Model = None,
    adapter: Mix = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    no_stream: NoStream = False,
) -> None:
    """Continue a text."""
    client: Client = context.obj
    text = sys.stdin.read() if prompt == "-" else prompt
    options = _options(adapter, max_tokens, temperature, top_p, seed)
    with _errors_to_exit():
        if no_stream:
            _write(client.complete(text, model, **options).text + "\n")
        else:
            _write_all(client.stream_complete(text, model, **options))


@app.command()
def chat(
    context: typer.Context,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to say; '-' reads it from stdin. Without it, a conversation."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system prompt.")] = None,
    model: Model = None,
    adapter: Mix = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    no_stream: NoStream = False,
) -> None:
    """Ask once, or hold a conversation."""
    client: Client = context.obj
    options = _options(adapter, max_tokens, temperature, top_p, seed)
    messages = [] if system is None else [{"role": "system", "content": system}]
    if prompt is None:
        _converse(client, messages, model, options)
        return
    text = sys.stdin.read() if prompt == "-" else prompt
    messages.append({"role": "user", "content": text})
    with _errors_to_exit():
        if no_stream:
            _write(client.chat(messages, model, **options).text + "\n")
        else:
            _write_all(client.stream_chat(messages, model, **options))


CHAT_HELP = "/model NAME talks to another adapter, /model to the base; /reset forgets; /exit ends."


def _converse(
    client: Client, messages: list[dict[str, str]], model: str | None, options: dict[str, Any]
) -> None:
    """Read turns until the end of the input. Ctrl-C stops an answer, not the conversation."""
    err.print(CHAT_HELP, style="dim", markup=False, highlight=False)
    num_system = len(messages)
    while True:
        try:
            line = out.input(f"[bold]{escape(model or 'base')}>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            del messages[num_system:]
        elif line == "/model" or line.startswith("/model "):
            model = line.removeprefix("/model").strip() or None
        elif line.startswith("/"):
            err.print(CHAT_HELP, style="dim", markup=False, highlight=False)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = _write_all(client.stream_chat(messages, model, **options))
                messages.append({"role": "assistant", "content": answer})
            except ClientError as exc:
                err.print(f"polypeft: {exc}", style="red", markup=False, highlight=False)
                messages.pop()


def _options(
    mix: list[str] | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
) -> dict[str, Any]:
    given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "adapters": [_part(text) for text in mix] if mix else None,
    }
    return {key: value for key, value in given.items() if value is not None}


def _part(text: str) -> dict[str, Any]:
    """`NAME=WEIGHT` or `NAME`."""
    name, equals, weight = text.partition("=")
    try:
        return {"name": name, "weight": float(weight) if equals else 1.0}
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not NAME or NAME=WEIGHT") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_all(pieces: Iterator[str]) -> str:
    """Write the pieces as they come, as plain text; returns them together."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            _write(piece)
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]  # a generator's: it hangs up
    _write("\n")
    return answer


def _print_json(value: Any) -> None:
    _write(json.dumps(value, indent=2) + "\n")


def _facts(adapter: Adapter) -> dict[str, str]:
    last = adapter.last_used_at
    return {
        "name": adapter.name,
        "digest": f"sha256:{adapter.digest}",
        "method": adapter.method,
        "rank": str(adapter.rank or "-"),
        "virtual tokens": str(adapter.num_virtual_tokens or "-"),
        "size": f"{_size(adapter.num_bytes)} on the device, {_size(adapter.file_bytes)} in files",
        "modules": ", ".join(adapter.modules) or "-",
        "created": _time(adapter.created_at),
        "updated": _time(adapter.updated_at),
        "requests": f"{adapter.num_requests}, {adapter.num_running} running",
        "last used": "never" if last is None else _time(last),
        "resident": adapter.residency,
    }


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
