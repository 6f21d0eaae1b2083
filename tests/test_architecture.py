"""Who may import whom: read from the source, so that an arrow that runs up fails.

    api → runtime → engine → {adapters, models} → peftcore

Two kinds of module stand beside this order and may be imported from any room of the server: the
*vocabulary* (`server.engine.sequence`, `server.errors`, `server.settings`, `server.logs`,
`server.metrics`, `server.tokenization`), which imports no room; and what puts the server together,
`server.build`, `server.plan` and `server.__main__`, which nothing else imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("server", "peftcore", "clients", "loadtests")

#: Room → the rooms that it may import, its own and the vocabulary apart.
RULES: dict[str, set[str]] = {
    "peftcore": set(),
    "clients": set(),
    "loadtests": {"clients", "peftcore"},  # and the server, whose engine it measures
    "server.models": {"peftcore"},
    "server.adapters": {"peftcore"},
    "server.engine": {"server.adapters", "server.models", "peftcore"},
    "server.runtime": {"server.engine", "server.adapters"},
    "server.api": {"server.runtime"},
    "server.build": {
        "server.runtime", "server.engine", "server.adapters", "server.models", "server.memory",
        "peftcore",
    },
    "server.plan": {
        "server.build",
        "server.memory",
        "server.adapters",
        "server.models",
        "peftcore",
    },
    "server.memory": set(),
    "server.__main__": {"server.build", "server.plan", "server.api", "server.models", "peftcore"},
    "server.healthcheck": set(),
    "server.vocabulary": set(),
}  # fmt: skip

VOCABULARY = {
    "server",
    "server.engine.sequence",
    "server.errors",
    "server.settings",
    "server.logs",
    "server.metrics",
    "server.tokenization",
}

#: Arrows that the rules do not allow, each with why it is there: module → imported module.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("server.adapters.cache", "server.engine.scheduler"): (
        "the cache implements the Residency that the scheduler asks for, named where it is asked"
    ),
    ("server.api.upload", "peftcore.config"): "the size limit of a config, kept where it is read",
    ("server.api.lora_root", "peftcore.config"): "the same, and the files' names",
}

#: For annotations alone the api may see what the runtime hands it.
TYPES_ONLY = {("server.api", "server.adapters")}


class Arrow(NamedTuple):
    importer: str
    imported: str
    line: int
    types_only: bool


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def arrows_of(name: str, source: str) -> Iterator[Arrow]:
    """The imports of one module, wherever in it they stand."""

    def visit(node: ast.AST, types_only: bool) -> Iterator[Arrow]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, types_only)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Arrow(name, alias.name, node.lineno, types_only)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:  # `from package import module` imports the module
                longer = f"{node.module}.{alias.name}"
                target = longer if longer in MODULES else node.module
                yield Arrow(name, target, node.lineno, types_only)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, types_only)

    yield from visit(ast.parse(source), False)


def room_of(module: str) -> str:
    if module in VOCABULARY:
        return "server.vocabulary"
    top, _, rest = module.partition(".")
    return f"server.{rest.partition('.')[0]}" if top == "server" else top


def forbidden(arrow: Arrow) -> str | None:
    """Why this arrow may not be, or None."""
    if arrow.imported.split(".")[0] in ("peft", "adapters"):
        return "a test oracle, never imported by what is installed"
    if arrow.imported.split(".")[0] == "tests":
        return "the product imports no tests"
    if arrow.imported.split(".")[0] not in OURS:
        return None
    importer, imported = room_of(arrow.importer), room_of(arrow.imported)
    if importer == imported or imported in RULES[importer]:
        return None
    if importer == "loadtests" and imported.startswith("server"):
        return None
    if imported == "server.vocabulary" and importer.startswith("server."):
        return None
    if arrow.types_only and (importer, imported) in TYPES_ONLY:
        return None
    if (arrow.importer, arrow.imported) in EXCEPTIONS:
        return None
    return f"{importer} may not import {imported}"


ARROWS = [arrow for name, path in MODULES.items() for arrow in arrows_of(name, path.read_text())]


def test_no_arrow_runs_up() -> None:
    bad = [
        f"{MODULES[a.importer].relative_to(ROOT)}:{a.line}: imports {a.imported}: {why}"
        for a in ARROWS
        if (why := forbidden(a)) is not None
    ]
    assert not bad, "\n".join(bad)


def test_every_exception_is_used() -> None:
    present = {(a.importer, a.imported) for a in ARROWS}
    assert set(EXCEPTIONS) <= present
    rooms = {(room_of(a.importer), room_of(a.imported)) for a in ARROWS if a.types_only}
    assert rooms >= TYPES_ONLY


def test_every_module_has_a_room() -> None:
    assert {room_of(module) for module in MODULES} == set(RULES)


def closure(module: str) -> set[str]:
    """What importing `module` imports, our own modules all the way."""
    found: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        for arrow in ARROWS:
            if arrow.importer == name and not arrow.types_only and arrow.imported not in found:
                found.add(arrow.imported)
                todo.append(arrow.imported)
    return found


@pytest.mark.parametrize(
    "module", ["server.engine.sequence", "server.engine.scheduler", "server.engine.block_manager"]
)
def test_the_schedulers_modules_import_no_torch(module: str) -> None:
    """Nor anything that does; they decide by numbers, and are tested without a model."""
    heavy = {"torch", "transformers", "numpy", "bitsandbytes", "safetensors"}
    imported = {name.split(".")[0] for name in closure(module)}
    assert not imported & heavy
    assert not any(name.startswith("peftcore") for name in closure(module))


def test_the_client_imports_nothing_of_ours_and_little_else() -> None:
    """A client machine has no torch."""
    libraries = {"httpx", "tenacity", "typer", "rich", "prometheus_client"}
    allowed = {"clients", *libraries, *sys.stdlib_module_names}
    imported = {a.imported.split(".")[0] for a in ARROWS if a.importer.startswith("clients")}
    assert imported <= allowed


def test_http_lives_in_the_api_only() -> None:
    http = {"fastapi", "starlette", "uvicorn", "multipart", "python_multipart"}
    users = {a.importer for a in ARROWS if a.imported.split(".")[0] in http}
    assert users <= {m for m in MODULES if m.startswith("server.api")} | {"server.__main__"}


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("peftcore.arena", "import server.settings"),
        ("peftcore.train.upload", "from clients.client import Client"),
        ("peftcore.arena", "from server import errors"),
        ("peftcore.arena", "def f():\n    from clients.client import Client"),
        ("peftcore.arena", "if TYPE_CHECKING:\n    from server.runtime import Runtime"),
        ("peftcore.methods.lora", "import peft"),
        ("server.models.loader", "try:\n    from adapters import init\nexcept ImportError: pass"),
        ("server.models.loader", "from server.adapters.store import AdapterStore"),
        ("server.adapters.store", "from server.models.loader import load_model"),
        ("server.adapters.store", "from server.engine.engine import Engine"),
        ("server.engine.engine", "from server.runtime import Runtime"),
        ("server.engine.engine", "from server.api.schemas import ChatCompletionRequest"),
        ("server.runtime", "from server.api import app"),
        ("server.api.app", "from server.engine.engine import Engine"),
        ("server.api.app", "from server.adapters.manager import AdapterManager"),
        ("server.errors", "from server.runtime import Runtime"),
        ("server.engine.sequence", "from server.engine.engine import Engine"),
        ("clients.client", "from server.errors import ServerError"),
        ("server.runtime", "import loadtests"),
        ("server.settings", "from tests import tiny"),
    ],
)
def test_a_forbidden_arrow_is_found(importer: str, source: str) -> None:
    assert any(forbidden(arrow) for arrow in arrows_of(importer, source))
