"""The command `polypeft` against a real server."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import Result
from typer.testing import CliRunner

from clients.cli import app
from tests.serving import CONFIG, Served

Run = Callable[..., Result]


@pytest.fixture
def run(server: Served) -> Run:
    def run(*arguments: str, status: int = 0, stdin: str | None = None) -> Result:
        environment = {"POLYPEFT_URL": server.url, "COLUMNS": "200"}
        result = CliRunner().invoke(app, list(arguments), input=stdin, env=environment)
        assert result.exit_code == status, result.output
        return result

    return run


@pytest.mark.parametrize("command", [[], ["adapters"], ["adapters", "push"], ["chat"]])
def test_help_teaches(run: Run, command: list[str]) -> None:
    output = run(*command, "--help").output
    assert "Usage" in output


def test_adapters(run: Run, server: Served) -> None:
    folder = server.make_adapter("lora-r4", 4)
    assert run("adapters", "push", "new", str(folder)).stdout.startswith(
        "created new (LORA, rank 4)"
    )
    assert run("adapters", "push", "new", str(folder)).stdout.startswith("unchanged new")
    listed = run("adapters", "list").stdout
    assert listed.splitlines()[0].split()[:3] == ["NAME", "METHOD", "RANK"]
    assert "new" in listed
    shown = json.loads(run("adapters", "show", "new", "--json").stdout)
    assert shown["rank"] == 4
    assert shown["digest"] in run("adapters", "show", "new").stdout
    assert [a["name"] for a in json.loads(run("adapters", "list", "--json").stdout)] == [
        "new",
        "poet",
    ]
    assert run("adapters", "rm", "new").stdout == "deleted new\n"
    assert "does not exist" in run("adapters", "show", "new", status=1).stderr


def test_complete(run: Run, server: Served) -> None:
    options = ["--model", "poet", "--temperature", "0", "--max-tokens", "4"]
    streamed = run("complete", "abc", *options).stdout
    assert streamed == run("complete", "abc", *options, "--no-stream").stdout
    assert streamed == run("complete", "-", *options, stdin="abc").stdout


def test_chat_once(run: Run) -> None:
    options = ["--system", "be brief", "--temperature", "0", "--max-tokens", "4"]
    poet = run("chat", "hello", "-m", "poet", *options).stdout
    assert poet == run("chat", "hello", "-m", "poet", *options, "--no-stream").stdout
    assert poet == run("chat", "hello", "-a", "poet=1", *options).stdout
    assert poet != run("chat", "hello", "-a", "poet=-3", *options).stdout


def test_conversation(run: Run) -> None:
    turns = "hello\n/model poet\nagain\n/model nobody\nwho\n/what\n/reset\n\n/exit\nnever"
    result = run("chat", "--temperature", "0", "--max-tokens", "4", stdin=turns)
    assert "base>" in result.stdout
    assert "poet>" in result.stdout
    assert "'nobody' does not exist" in result.stderr
    run("chat", "--max-tokens", "2", stdin="the input ends")


def test_errors_are_one_line(run: Run, server: Served) -> None:
    folder = server.make_adapter("lora-r4", 5)
    (folder / CONFIG).write_text("{}")
    refused = run("adapters", "push", "bad", str(folder), status=1)
    assert refused.stderr.startswith("polypeft: peft_type")
    (folder / CONFIG).unlink()
    assert CONFIG in run("adapters", "push", "bad", str(folder), status=1).stderr
    assert run("chat", "hello", "-a", "poet=x", status=2).stderr
    nobody = run("--url", "http://127.0.0.1:1", "adapters", "list", status=1).stderr
    assert "127.0.0.1:1" in nobody
