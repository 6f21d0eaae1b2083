"""`python -m peftcore.sources`: a model put where a server needs nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from peftcore.sources.__main__ import main
from server.settings import Settings


def test_a_model_is_copied_and_its_settings_are_printed(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    linked = tmp_path / "linked"  # as a hub's cache has it
    linked.mkdir()
    for path in model_folder.iterdir():
        (linked / path.name).symlink_to(path)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "models"), str(linked)])
    main()
    file = tmp_path / "settings.yaml"
    file.write_text(capsys.readouterr().out)
    settings = Settings(config=file)
    assert settings.served_model_name == "linked"
    folder = Path(str(settings.model))
    assert folder.parent == tmp_path / "models"
    assert {p.name for p in folder.iterdir()} == {p.name for p in model_folder.iterdir()}
    assert not any(p.is_symlink() for p in folder.iterdir())
    assert set(yaml.safe_load(file.read_text())) == {"model", "served_model_name"}


def test_no_model_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "models"), ""])
    main()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "models").exists()
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "models"), str(tmp_path / "no.gguf")])
    with pytest.raises(SystemExit, match="there is no such file"):
        main()
