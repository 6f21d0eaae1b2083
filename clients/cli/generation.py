"""`polypeft complete`, `chat` and `classify`: text in, text out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from clients.calls import Message
from clients.cli.common import (
    AsJson,
    Model,
    err,
    errors_to_exit,
    out,
    print_json,
    show_error,
    write,
)
from clients.client import Client, Stream
from clients.errors import ClientError
from clients.results import Classification, Reply

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

CHAT_HELP = "/model NAME talks to another adapter, /model to the base; /reset forgets; /exit ends."


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
    as_json: AsJson = False,
) -> None:
    """Continue a text."""
    client: Client = context.obj
    text = _text(prompt)
    options = _options(adapter, max_tokens, temperature, top_p, seed)
    with errors_to_exit():
        if no_stream or as_json:
            _show(client.complete(text, model, **options), as_json)
        else:
            _write_all(client.stream_complete(text, model, **options))


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
    as_json: AsJson = False,
) -> None:
    """Ask once, or hold a conversation.

    In a conversation Ctrl-C stops the answer; /model NAME talks to another adapter, /reset forgets
    what was said, /exit or the end of the input ends it.
    """
    client: Client = context.obj
    options = _options(adapter, max_tokens, temperature, top_p, seed)
    messages: list[Message] = [] if system is None else [_message("system", system)]
    if prompt is None:
        if no_stream or as_json:
            raise typer.BadParameter("a conversation is streamed; give PROMPT, or leave these out")
        _Conversation(client, messages, model, options).run()
        return
    messages.append(_message("user", _text(prompt)))
    with errors_to_exit():
        if no_stream or as_json:
            _show(client.chat(messages, model, **options), as_json)
        else:
            _write_all(client.stream_chat(messages, model, **options))


def classify(
    context: typer.Context,
    texts: Annotated[
        list[str], typer.Argument(help="Texts; a single '-' reads one a line from stdin.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The name of an adapter that classifies.")
    ],
    entities: Annotated[
        bool, typer.Option("--entities", help="Join classified tokens to entities.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tell the class of texts, or of their tokens, by an adapter that was trained to."""
    client: Client = context.obj
    if texts == ["-"]:
        texts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    with errors_to_exit():
        options = {"aggregation": "simple"} if entities else {}
        found = client.classify(texts, model, **options)
    if as_json:
        print_json([{"text": texts[c.index], **asdict(c)} for c in found])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("LABEL", "PROB", "TEXT"):
        table.add_column(column, no_wrap=column != "TEXT")
    for c in found:
        for row in _rows(c, texts[c.index]):
            table.add_row(*map(escape, row))
    out.print(table)


def _rows(found: Classification, text: str) -> list[tuple[str, str, str]]:
    """Class, probability and text of everything that has a class."""
    if found.tokens is not None:
        return [(t.label, f"{t.score:.3f}", t.token) for t in found.tokens]
    if found.entities is not None:
        return [(e.label, f"{e.score:.3f}", e.text) for e in found.entities]
    if found.values is not None:
        return [(", ".join(f"{value:.4g}" for value in found.values), "-", text)]
    label = found.label if found.labels is None else ", ".join(found.labels)
    return [(label or "-", f"{max(found.probs):.3f}" if found.probs else "-", text)]


class _Conversation:
    """Turns read from the terminal until the end of the input, and their answers."""

    def __init__(
        self,
        client: Client,
        messages: list[Message],
        model: str | None,
        options: Mapping[str, Any],
    ) -> None:
        self._client = client
        self._messages = messages
        self._num_system = len(messages)
        self._model = model
        self._options = options

    def run(self) -> None:
        err.print(CHAT_HELP, style="dim", markup=False, highlight=False)
        while True:
            try:
                line = out.input(f"[bold]{escape(self._model or 'base')}>[/bold] ").strip()
            except (EOFError, KeyboardInterrupt):
                out.print()
                return
            if line in ("/exit", "/quit"):
                return
            if line.startswith("/"):
                self._obey(line)
            elif line:
                self._say(line)

    def _obey(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/reset":
            del self._messages[self._num_system :]
        elif command == "/model":
            self._model = rest.strip() or None
        else:
            err.print(CHAT_HELP, style="dim", markup=False, highlight=False)

    def _say(self, text: str) -> None:
        """A turn that failed is forgotten; one that was stopped is kept as far as it came."""
        self._messages.append(_message("user", text))
        answer = ""
        try:
            with self._client.stream_chat(self._messages, self._model, **self._options) as stream:
                for piece in stream:
                    answer += piece
                    write(piece)
        except KeyboardInterrupt:
            pass
        except ClientError as exc:
            write("\n" if answer else "")
            show_error(exc)
            self._messages.pop()
            return
        write("\n")
        self._messages.append(_message("assistant", answer))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(argument: str) -> str:
    return sys.stdin.read() if argument == "-" else argument


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


def _show(reply: Reply, as_json: bool) -> None:
    if as_json:
        print_json({key: value for key, value in asdict(reply).items() if key != "raw"})
    else:
        write(reply.text + "\n")


def _write_all(opened: AbstractContextManager[Stream]) -> None:
    """Write the pieces as they come, as plain text; also one that breaks off ends its line."""
    with opened as stream:
        try:
            for piece in stream:
                write(piece)
        finally:
            write("\n")
