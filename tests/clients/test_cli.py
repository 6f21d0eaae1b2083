"""The command `polypeft` against a real server."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from clients.cli import app, generation
from clients.cli.adapters import where
from clients.cli.top import Load, Sample, render
from clients.errors import ConnectionLost
from clients.metrics import Snapshot
from clients.results import Adapter
from tests.clients.conftest import LABELS, classifiers
from tests.serving import CONFIG, WEIGHTS, Served

Run = Callable[..., Result]

ROOT = Path(__file__).parents[2]
GREEDY = ["--temperature", "0", "--max-tokens", "4"]


def invoke(url: str, *arguments: str, status: int = 0, stdin: str | None = None) -> Result:
    environment = {"POLYPEFT_URL": url, "COLUMNS": "200"}
    result = CliRunner().invoke(app, list(arguments), input=stdin, env=environment)
    assert result.exit_code == status, result.output
    return result


@pytest.fixture
def run(server: Served) -> Run:
    return lambda *arguments, **options: invoke(server.url, *arguments, **options)


COMMANDS = [
    *([], ["complete"], ["chat"], ["classify"], ["top"], ["adapters"]),
    *(["adapters", name] for name in ("push", "list", "show", "rm", "pin", "unpin", "prefetch")),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(run: Run, command: list[str]) -> None:
    output = run(*command, "--help").output
    assert "Usage" in output
    assert " ".join(command) in output


def test_adapters(run: Run, server: Served) -> None:
    folder = server.make_adapter("lora-r4", 4)
    assert run("adapters", "push", str(folder), "--name", "new").stdout.startswith(
        "created new (LORA, rank 4)"
    )
    again = json.loads(run("adapters", "push", str(folder), "-n", "new", "--json").stdout)
    assert (again["name"], again["status"]) == ("new", "unchanged")
    listed = run("adapters", "list").stdout
    assert listed.splitlines()[0].split()[:3] == ["NAME", "METHOD", "RANK"]
    assert "new" in listed
    shown = json.loads(run("adapters", "show", "new", "--json").stdout)
    assert shown["rank"] == 4
    facts = run("adapters", "show", "new").stdout
    assert shown["digest"] in facts
    assert [line.split() for line in facts.splitlines() if "*" in line] == [
        ["modules", "model.layers.*.self_attn.q_proj", "(3)"],
        ["model.layers.*.self_attn.v_proj", "(3)"],
        ["model.layers.*.mlp.down_proj", "(3)"],
    ]
    assert [a["name"] for a in json.loads(run("adapters", "list", "--json").stdout)] == [
        "new",
        "poet",
    ]
    assert run("adapters", "rm", "new").stdout == "deleted new\n"
    assert "does not exist" in run("adapters", "show", "new", status=1).stderr


def test_an_adapter_is_called_as_its_folder(run: Run, server: Served) -> None:
    folder = server.make_adapter("ia3", 9)
    for path in (folder, folder / WEIGHTS):
        found = json.loads(run("adapters", "push", str(path), "--json").stdout)
        assert found["name"] == folder.name
    gone = json.loads(run("adapters", "rm", folder.name, "--json").stdout)
    assert [adapter["name"] for adapter in gone] == [folder.name]


def test_pin_unpin_prefetch(run: Run) -> None:
    assert run("adapters", "prefetch", "poet").stdout == "prefetching poet\n"
    assert run("adapters", "pin", "poet").stdout == "pinned poet\n"
    assert "pinned" in run("adapters", "list").stdout
    half = run("adapters", "unpin", "poet", "nobody", status=1)
    assert half.stdout == "unpinned poet\n"
    assert "'nobody' does not exist" in half.stderr
    unpinned = json.loads(run("adapters", "unpin", "poet", "--json").stdout)
    assert [(a["name"], a["pinned"]) for a in unpinned] == [("poet", False)]


def test_complete(run: Run) -> None:
    options = ["--model", "poet", *GREEDY]
    streamed = run("complete", "abc", *options).stdout
    assert streamed == run("complete", "abc", *options, "--no-stream").stdout
    assert streamed == run("complete", "-", *options, stdin="abc").stdout
    found = json.loads(run("complete", "abc", *options, "--json").stdout)
    assert found["text"] + "\n" == streamed
    assert (found["model"], found["num_completion_tokens"]) == ("poet", 4)


def test_an_answer_that_breaks_off_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def pieces() -> Iterator[str]:
        yield "half of it"
        raise ConnectionLost("the server is gone")

    opened: Any = nullcontext(pieces())
    with pytest.raises(ConnectionLost):
        generation._write_all(opened)
    assert capsys.readouterr().out == "half of it\n"


def test_chat_once(run: Run) -> None:
    options = ["--system", "be brief", *GREEDY]
    poet = run("chat", "hello", "-m", "poet", *options).stdout
    assert poet == run("chat", "hello", "-m", "poet", *options, "--no-stream").stdout
    assert poet == run("chat", "hello", "-a", "poet=1", *options).stdout
    assert poet != run("chat", "hello", "-a", "poet=-3", *options).stdout
    found = json.loads(run("chat", "hello", "-m", "poet", *options, "--json").stdout)
    assert found["text"] + "\n" == poet


def test_conversation(run: Run) -> None:
    turns = "hello\n/model poet\nagain\n/model nobody\nwho\n/what\n/reset\n\n/exit\nnever"
    result = run("chat", *GREEDY, stdin=turns)
    assert "base>" in result.stdout
    assert "poet>" in result.stdout
    assert "'nobody' does not exist" in result.stderr
    run("chat", "--max-tokens", "2", stdin="the input ends")
    assert "give PROMPT" in run("chat", "--json", status=2).stderr


def test_a_conversation_remembers_until_it_is_reset(run: Run, server: Served) -> None:
    first, second, third = (
        line.removeprefix("base> ")
        for line in run("chat", *GREEDY, stdin="one\nsame\n/reset\nsame\n").stdout.splitlines()[:3]
    )
    alone = run("chat", "same", *GREEDY).stdout.rstrip("\n")
    assert third.removeprefix("base> ") == alone
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "same"},
    ]
    body = {"model": "tiny", "messages": history, "temperature": 0, "max_tokens": 4}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert second == answer["choices"][0]["message"]["content"]


def test_ctrl_c_stops_the_answer_and_not_the_conversation(slow_server: Served) -> None:
    command = [sys.executable, "-m", "clients.cli", "--url", slow_server.url, "chat", "-m", "poet"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "450", "--temperature", "1.5"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(len(b"poet> ")) == b"poet> "
        assert process.stdout.read(1)  # of the answer
        sequences = slow_server.runtime.engine.live
        process.send_signal(signal.SIGINT)
        slow_server.wait_idle()
        assert all(seq.num_output_tokens < 450 for seq in sequences)
        out, _ = process.communicate(b"/exit\n", timeout=20)
        assert out.decode(errors="replace").splitlines()[-1].endswith("poet> ")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_errors_are_one_line(run: Run, server: Served, tmp_path: Path) -> None:
    def line(*arguments: str, status: int = 1) -> str:
        text = run(*arguments, status=status).stderr
        assert text.startswith("polypeft: ")
        assert text.count("\n") == 1
        return text

    folder = server.make_adapter("lora-r4", 5)
    (folder / CONFIG).write_text("{}")
    assert "peft_type" in line("adapters", "push", str(folder))
    (folder / CONFIG).unlink()
    assert CONFIG in line("adapters", "push", str(folder))
    assert "no such file" in line("adapters", "push", str(tmp_path / "nowhere"))
    assert run("chat", "hello", "-a", "poet=x", status=2).stderr
    nobody = line("--url", "http://127.0.0.1:1", "adapters", "list")
    assert "127.0.0.1:1" in nobody
    assert "polypeft-serve" in nobody
    assert "http://HOST:PORT" in line("--url", "127.0.0.1", "adapters", "list")


def test_classify(run: Run, server: Served) -> None:
    folders = classifiers(server)
    for name, folder in folders.items():
        run("adapters", "push", str(folder), "--name", name)
    texts = ["a fine film", "[b]dull[/b]"]
    shown = run("adapters", "show", "mood").stdout
    assert "SEQ_CLS" in shown
    assert ", ".join(LABELS) in shown
    assert "labels" not in run("adapters", "show", "poet").stdout
    rows = json.loads(run("classify", *texts, "-m", "mood", "--json").stdout)
    assert [row["text"] for row in rows] == texts
    lines = run("classify", "-", "-m", "mood", stdin="\n".join(texts)).stdout.splitlines()
    assert lines[0].split() == ["LABEL", "PROB", "TEXT"]
    for line, row, text in zip(lines[1:], rows, texts, strict=True):
        assert line.split(maxsplit=2) == [row["label"], f"{max(row['probs']):.3f}", text]
        assert row["label"] in LABELS
    tokens = run("classify", "abc", "-m", "names").stdout.splitlines()
    assert [line.split()[-1] for line in tokens[1:]] == ["a", "b", "c"]
    joined = run("classify", "abc", "-m", "names", "--entities").stdout.splitlines()
    assert "".join(line.split()[-1] for line in joined[1:]) == "abc"  # LABEL_n is never O
    assert "whole texts" in run("classify", "abc", "-m", "mood", "--entities", status=1).stderr
    assert "poet" in run("classify", "abc", "-m", "poet", status=1).stderr
    run("classify", "abc", status=2)  # no model
    run("adapters", "rm", *folders)


# -- top -------------------------------------------------------------------------------------------


def test_top_shows_what_runs(run: Run, server: Served) -> None:
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            server.complete("poet", "abc")

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        looks = run("top", "-i", "0.3", "-n", "2", "--json").stdout
        shown = run("top", "-i", "0.2", "-n", "1").stdout
    finally:
        done.set()
        thread.join()
    first, second = (json.loads(text + "}") for text in looks.split("\n}\n")[:2])
    for look in (first, second):
        assert look["requests_per_s"] > 0
        assert look["output_tokens_per_s"] > 0
        assert 0 <= look["kv_use"] < 1
        assert look["adapter_hit_rate"] == 1
        assert [row["name"] for row in look["adapters"]] == ["poet"]
        assert look["adapters"][0]["requests_per_s"] > 0
        assert look["adapters"][0]["output_tokens_per_s"] > 0
    assert "output tokens/s" in shown
    assert "poet" in shown


def test_what_top_showed_last_stays_in_a_terminal(server: Served) -> None:
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "clients.cli", "--url", server.url, "top", "-i", "0.05"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "LINES": "40"}
    process = subprocess.Popen(
        [*command, "-n", "1"], cwd=ROOT, env=environment, stdout=its_end, stderr=its_end
    )
    os.close(its_end)
    said = b""
    try:
        while piece := _read(terminal):
            said += piece
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    live, _, after = said.partition(b"\x1b[?1049l")  # back from the alternate screen
    assert b"\x1b[?1049h" in live
    assert b"poet" in live
    assert b"poet" in after


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # how Linux says that the other end is closed
        return b""


def sample(time: float, text: str, *adapters: Adapter) -> Sample:
    return Sample(time, Snapshot(text), adapters)


def adapter(name: str, **changes: Any) -> Adapter:
    facts: dict[str, Any] = {
        "name": name, "digest": name, "method": "LORA", "rank": 1, "num_bytes": 1, "file_bytes": 1,
        "num_virtual_tokens": 0, "modules": [], "created_at": 0.0, "updated_at": 0.0,
        "num_requests": 0, "last_used_at": None, "residency": "disk", "num_running": 0,
    }  # fmt: skip
    return Adapter(**(facts | changes))


def test_rates_are_of_the_time_between_two_looks() -> None:
    before = sample(
        10.0,
        'polypeft_requests_total{endpoint="/v1/completions",status="200"} 5\n'
        'polypeft_requests_total{endpoint="/v1/classify",status="429"} 1\n'
        "polypeft_generated_tokens_total 1000\npolypeft_adapter_hits_total 7\n",
        adapter("a", num_requests=3),
        adapter("b", num_requests=8),
    )
    after = sample(
        12.0,
        'polypeft_requests_total{endpoint="/v1/completions",status="200"} 9\n'
        'polypeft_requests_total{endpoint="/v1/classify",status="429"} 3\n'
        'polypeft_requests_total{endpoint="/metrics",status="200"} 99\n'
        "polypeft_generated_tokens_total 40\n"  # the server started anew
        "polypeft_adapter_hits_total 10\npolypeft_adapter_loads_total 1\n"
        "polypeft_kv_blocks 8\npolypeft_kv_blocks_used 2\n"
        'polypeft_adapter_bytes{tier="device"} 2048\npolypeft_adapter_bytes{tier="disk"} 9\n',
        *(adapter("a", num_requests=3), adapter("b", num_requests=14)),
        adapter("c", tier="host", pinned=True),
    )
    load = Load.between(before, after)
    assert (load.requests_per_s, load.output_tokens_per_s) == (3.0, 20.0)
    assert (load.adapter_hit_rate, load.kv_use) == (0.75, 0.25)
    assert (load.adapter_bytes, load.num_running) == (2048, None)
    assert [(row.name, row.requests_per_s) for row in load.adapters] == [
        ("b", 3.0),
        ("a", 0.0),
        ("c", 0.0),
    ]
    assert load.adapters[2].resident == "host, pinned"
    assert where(adapter("x", residency="loading", tier="disk")) == "loading"
    assert "and 2 more" in str(render(load, 1).renderables[2])


# -- refusals that are hard to bring about ---------------------------------------------------------


@contextmanager
def stub(answers: dict[str, tuple[int, dict[str, str], Any]]) -> Iterator[str]:
    """A server that answers `METHOD path` as it is told, and 404 to all else."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            status, headers, body = answers.get(f"{self.command} {self.path}", (404, {}, {}))
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_DELETE = _answer

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_errors_say_what_to_do() -> None:
    error = {"error": {"message": "no", "type": "t", "param": None, "code": None}}
    answers = {
        "GET /v1/adapters/locked": (401, {}, error),
        "GET /v1/adapters/busy": (429, {"retry-after": "600"}, error),
        "GET /v1/adapters/broken": (500, {"x-request-id": "r-7"}, error),
    }
    with stub(answers) as url:
        expected = {"locked": "--api-key", "busy": "try again in 600 s", "broken": "request r-7"}
        for name, text in expected.items():
            assert text in invoke(url, "adapters", "show", name, status=1).stderr
