"""Where settings come from, which goes before which, and how a wrong one is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic_settings import CliApp, SettingsError

from server.settings import Settings


def parse(*flags: str) -> Settings:
    return CliApp.run(Settings, cli_args=list(flags))


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
