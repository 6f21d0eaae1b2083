"""A Dockerfile's stages, and their steps carried out in folders of this machine, without Docker.

What a step does to the machine itself (packages, users) is left out, and named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).parents[1]
#: RUN lines that begin so change the machine; a build on one would not.
SYSTEM = ("apt-get", "groupadd")


@dataclass(frozen=True)
class Stage:
    """Its instructions in order, each with its text."""

    name: str
    base: str
    steps: list[tuple[str, str]]

    def last(self, instruction: str) -> str | None:
        found = [value for name, value in self.steps if name == instruction]
        return found[-1] if found else None


def read_stages(path: Path) -> tuple[dict[str, str], dict[str, Stage]]:
    """The arguments before the first FROM, and every stage by its name."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    with path.open("rb") as file:
        structure = DockerfileParser(fileobj=file).structure
    for step in structure:
        name, value = step["instruction"], step["value"]
        if name == "FROM":
            base, _, stage = value.partition(" AS ")
            current = stages[stage] = Stage(stage, base, [])
        elif current is not None and name != "COMMENT":
            current.steps.append((name, value))
        elif name == "ARG":
            key, _, default = value.partition("=")
            arguments[key] = default
    return arguments, stages


def chain(stages: Mapping[str, Stage], name: str) -> list[Stage]:
    """The stage and all that it is built on, the lowest first."""
    stage = stages[name]
    return [*(chain(stages, stage.base) if stage.base in stages else ()), stage]


def expand(text: str, variables: Mapping[str, str]) -> str:
    """As Docker does in all instructions but RUN."""
    return re.sub(r"\$\{(\w+)\}", lambda m: variables.get(m[1], ""), text)


def assignments(text: str) -> list[tuple[str, str]]:
    """The pairs of an ENV: `A=1 B="two words"`."""
    pairs = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', text)
    return [(key, value.strip('"')) for key, value in pairs]


@dataclass
class Build:
    """Carries out the steps of stages, in place of paths of the image in folders of `root`.

    Args:
        root: what stands for the image's `/`. Paths that arguments name are used as they are.
        arguments: values of ARGs in place of their defaults.
        variables: the environment at first.
        after_each: called after each RUN with its text.
    """

    root: Path
    arguments: Mapping[str, str]
    variables: dict[str, str]
    after_each: Callable[[str], None] = lambda text: None
    left_out: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._folder = self.root

    def place(self, path: str) -> Path:
        inside = Path(path).is_relative_to(self.root)
        return Path(path) if inside else self.root / path.lstrip("/")

    def carry_out(self, stages: list[Stage]) -> None:
        """All steps of these stages, one after another. Raises AssertionError where one fails."""
        for stage in stages:
            for name, value in stage.steps:
                getattr(self, f"_{name.lower()}", lambda value: None)(value)

    def _arg(self, value: str) -> None:
        key, _, default = value.partition("=")
        self.variables[key] = self.arguments.get(key, default.strip('"'))

    def _env(self, value: str) -> None:
        for key, text in assignments(value):
            self.variables[key] = expand(text, self.variables)

    def _workdir(self, value: str) -> None:
        self._folder = self.place(expand(value, self.variables))
        self._folder.mkdir(parents=True, exist_ok=True)

    def _copy(self, value: str) -> None:
        if value.startswith("--from="):  # from the same folder to the same folder
            source, target = value.split()[1:]
            assert source == target
            assert self.place(expand(source, self.variables)).is_dir()
            return
        *sources, target = value.split()
        for source in sources:
            path, place = ROOT / source, self._folder / target
            if path.is_dir():
                shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, place / source if target.endswith("/") else place)

    def _run(self, value: str) -> None:
        if value.startswith(SYSTEM):
            self.left_out.append(value)
            return
        done = subprocess.run(
            ["/bin/sh", "-c", value], cwd=self._folder, env=self.variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=3000, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{value}\n{done.stdout[-4000:]}"
        self.ran.append(value)
        self.after_each(value)


def environment() -> dict[str, str]:
    """What a build starts from: this interpreter, no settings of the user but pip's and the cache,
    where kernels for this machine lie compiled."""
    kept = {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    for key in ("HOME", "XDG_CACHE_HOME", "SSL_CERT_FILE", "http_proxy", "https_proxy", "no_proxy"):
        if key in os.environ:
            kept[key] = os.environ[key]
    interpreter = Path(sys.executable).parent
    return kept | {"PATH": f"{interpreter}{os.pathsep}{os.environ.get('PATH', '')}"}


def command(text: str) -> list[str]:
    """Of an ENTRYPOINT, or of a HEALTHCHECK's CMD."""
    return json.loads(text[text.index("[") :])


__all__ = ["ROOT", "SYSTEM", "Build", "Stage", "chain", "command", "environment", "read_stages"]
