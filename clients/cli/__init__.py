"""The command `polypeft`: adapters, completions, chat and classes, from a terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from clients.cli.adapters import adapters
from clients.cli.common import errors_to_exit
from clients.cli.generation import chat, classify, complete
from clients.cli.top import top
from clients.client import API_KEY_VARIABLE, DEFAULT_URL, URL_VARIABLE, Client

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Talk to a polypeft server: one base model, many adapters.\n\n"
    "Try:  [bold]polypeft chat 'Write a haiku'[/bold], then the same with "
    "[bold]--model ADAPTER[/bold] and a name from [bold]polypeft adapters list[/bold]; "
    "upload one with [bold]polypeft adapters push FOLDER[/bold], and watch the server with "
    "[bold]polypeft top[/bold].",
)
app.add_typer(adapters, name="adapters")
for command in (complete, chat, classify, top):
    app.command()(command)


@app.callback()
def main_options(
    context: typer.Context,
    url: Annotated[
        str, typer.Option(envvar=URL_VARIABLE, help="Where the server listens.")
    ] = DEFAULT_URL,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=API_KEY_VARIABLE,
            show_envvar=True,
            help="Sent as a bearer token. The variable keeps it out of the list of processes.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a byte until a request is given up.")
    ] = 600.0,
) -> None:
    with errors_to_exit():
        context.obj = context.with_resource(Client(url, api_key, timeout=timeout))


def main() -> None:
    app()
