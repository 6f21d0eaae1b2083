"""Where settings come from, which goes before which, and how a wrong one is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsError

from server import settings
from server.settings import Settings


def parse(*flags: str) -> Settings:
    return settings.parse(flags)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(
        "port: 1\nmax_num_seqs: 2\nkv_memory: 3MiB\nrequest_timeout: null\napi_key: secret\n"
    )
    return path


def test_flags_then_environment_then_file_then_defaults(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYPEFT_PORT", "10")
    monkeypatch.setenv("POLYPEFT_MAX_NUM_SEQS", "20")
    found = parse("--config", str(file), "--port", "100")
    assert (found.port, found.max_num_seqs, found.kv_memory) == (100, 20, 3 << 20)
    assert found.request_timeout is None
    assert found.block_size == Settings().block_size
    monkeypatch.setenv("POLYPEFT_CONFIG", str(file))
    assert parse().kv_memory == 3 << 20


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [("512MiB", 512 << 20), ("2gb", 2_000_000_000), ("4096", 4096), ("0", 0), ("1.5 KiB", 1536)],
)
def test_sizes(size: str, num_bytes: int) -> None:
    assert parse("--adapter-memory", size, "--kv-memory", size).adapter_memory == num_bytes
    assert parse("--kv-memory", size).kv_memory == num_bytes


@pytest.mark.parametrize("size", ["lots", "1 potato", "-5", "", "auto"])
def test_what_is_no_size_is_told_how_one_is_written(size: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parse(f"--adapter-memory={size}")
    (error,) = caught.value.errors()
    assert (error["loc"], error["msg"]) == (
        ("adapter_memory",),
        "a size is written as 512MiB, 2GiB or in bytes",
    )


@pytest.mark.parametrize("name", ["config", "data_dir", "preload", "lora_root", "api_key_file"])
def test_home_is_found_where_no_shell_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "place").write_text("port: 7")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(f"POLYPEFT_{name.upper()}", "~/place")
    found = parse()
    assert getattr(found, name) == tmp_path / "place"
    assert found.port == (7 if name == "config" else 8000)


def test_none_by_a_flag() -> None:
    found = parse("--request-timeout", "null", "--kv-memory", "auto")
    assert (found.request_timeout, found.kv_memory) == (None, None)


def test_the_help_says_what_values_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # each flag's text on one line
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for flag, value in {
        "adapter-memory": "SIZE", "kv-memory": "SIZE", "adapter-host-memory": "SIZE",
        "max-upload": "SIZE", "request-timeout": "SECONDS", "port": "NUMBER", "config": "PATH",
        "api-key": "KEY", "model": "TEXT", "device": "{auto,cpu,cuda}",
    }.items():  # fmt: skip
        assert f"--{flag} {value}" in said
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in said
    assert "null)" not in said, "a default that says nothing"
    assert "(default: 512MiB)" in said
    assert "\nSizes are written as 512MiB" in said


def test_keys_do_not_show(file: Path) -> None:
    found = parse("--config", str(file))
    assert found.api_key is not None
    assert found.api_key.get_secret_value() == "secret"
    assert "secret" not in repr(found) + str(found) + found.model_dump_json()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("colour: red\n", "colour: there is no such setting"),
        ("max-num-seqs: 2\n", "max-num-seqs: there is no such setting"),
        ("config: other.yaml\n", "config: there is no such setting"),
        ("- a\n", "must map names"),
        ("a: [\n", "line 2"),
        ("\x00", "settings.yaml"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(SettingsError) as caught:
        parse("--config", str(path))
    assert said in str(caught.value)


def test_the_documents_table_has_every_setting_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    table = text.split("| setting | default | |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(Settings.model_fields)


def serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server", *flags], env=os.environ | environment,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("port: many\n")
    ended = serve("--config", str(path), POLYPEFT_API_KEY="secret-key")
    assert ended.returncode == 1
    assert ended.stderr.startswith("polypeft-serve: --port: ")
    path.write_text("colour: red\n")
    ended = serve("--config", str(path), POLYPEFT_API_KEY="secret-key")
    assert ended.stderr == f"polypeft-serve: {path}: colour: there is no such setting\n"
    assert "secret-key" not in ended.stderr + json.dumps(ended.args)
