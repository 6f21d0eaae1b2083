"""The Dockerfile and compose.yaml, without Docker: linted, validated, and every step carried out.

The steps of a target run in a plain virtual environment, read from the file itself. In `make test`
it sees the packages that are installed here and compiles the kernels of this CPU alone; `make
test-slow` installs all of them. Then the server runs as the image would run it: with its
environment, no compiler, and, where this system lets a process have mounts of its own, a root that
cannot be written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from compose_spec import PyCompose

from peftcore.ops.cpu.build import capabilities, capability
from server.settings import Settings
from tests.dockerfile import ROOT, Build, chain, command, environment, read_stages

ARGUMENTS, STAGES = read_stages(ROOT / "Dockerfile")
TARGETS = ("cpu", "cuda")

#: Makes every mount read-only but those of two folders, then runs the rest of the command.
READ_ONLY = """
set -e
mount --make-rprivate /
for folder in "$1" "$2"; do mount --bind "$folder" "$folder"; done
for mount in $(cut -d' ' -f2 /proc/self/mounts); do
    case "$mount" in "$1"|"$2"|/proc*|/sys*|/dev*) continue;; esac
    mount -o remount,bind,ro "$mount"
done
if touch "$3/probe" 2>/dev/null; then echo "still writable: $3"; exit 99; fi
shift 3
exec "$@"
"""


def scripts() -> Path:
    return Path(sys.executable).parent


# -- the Dockerfile's text -------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [scripts() / "hadolint", "--no-color", "--failure-threshold", "info", "Dockerfile"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_stage_stands_on_one_base_that_can_be_pinned() -> None:
    assert set(ARGUMENTS) == {"BASE"}
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", ARGUMENTS["BASE"]), "a tag; a digest may follow"
    for stage in STAGES.values():
        assert stage.base == "${BASE}" or stage.base in STAGES


@pytest.mark.parametrize("target", TARGETS)
def test_what_an_image_is(target: str) -> None:
    stages = chain(STAGES, target)
    steps = [step for stage in stages for step in stage.steps]
    assert "builder" not in {stage.name for stage in stages}, "no compiler comes along"
    assert not [text for name, text in steps if name == "RUN" and "apt-get" in text]
    last = {name: text for name, text in steps if name != "HEALTHCHECK"}
    user, group = (int(part) for part in last["USER"].split(":"))
    assert min(user, group) >= 10000
    assert last["VOLUME"] == "${DATA}"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert command(last["ENTRYPOINT"])[-1] == "polypeft-serve"
    assert [text for name, text in steps if name == "HEALTHCHECK" and "CMD" in text]


def test_the_context_has_what_is_copied_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source
        for stage in STAGES.values()
        for name, value in stage.steps
        if name == "COPY" and not value.startswith("--from")
        for source in value.split()[:-1]
    }
    assert "*" in lines
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)


# -- its steps -------------------------------------------------------------------------------------


def build(target: str, root: Path, *, full: bool) -> Build:
    """Carry out all steps of a target. Not `full`: with the packages that are installed here."""
    prefix = root / "opt" / "polypeft"

    def borrow(text: str) -> None:
        """Let the new environment see this one's packages."""
        if "python -m venv" in text and not full:
            [site] = prefix.glob("lib/python*/site-packages")
            (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    arguments = {"PREFIX": str(prefix), "DATA": str(root / "data")}
    if full:  # where the wheels are to be found, on a machine that does not reach the default
        given = os.environ.get("IMAGE_BUILD_ARGS", "").split()
        arguments |= dict(argument.split("=", 1) for argument in given)
    else:
        arguments["CAPABILITIES"] = capability()
    variables = environment()
    if full:
        variables["XDG_CACHE_HOME"] = str(root / "cache")  # nothing is compiled yet
    else:  # setuptools is borrowed too: pip reads this as `--no-build-isolation`
        variables["PIP_NO_BUILD_ISOLATION"] = "0"
    done = Build(root, arguments, variables, borrow)
    done.carry_out(chain(STAGES, f"builder-{target}"))
    done.variables = {"PATH": "/nonexistent", "LANG": "C.UTF-8"}  # nothing of the builder's
    done.carry_out(chain(STAGES, target))
    return done


def check_steps(target: str, done: Build) -> None:
    """Every RUN of the target was carried out or is one of the two that change the machine."""
    stages = {s.name: s for t in (target, f"builder-{target}") for s in chain(STAGES, t)}
    runs = [text for s in stages.values() for name, text in s.steps if name == "RUN"]
    assert sorted([*done.ran, *done.left_out]) == sorted(runs)
    assert len(done.left_out) == 2
    for text in done.left_out:
        subprocess.run(["/bin/sh", "-nc", text], check=True)


def listing(folder: Path) -> set[tuple[str, int]]:
    """Every file in a folder with its time."""
    return {
        (str(p), p.lstat().st_mtime_ns) for p in folder.rglob("*") if p.is_file() or p.is_symlink()
    }


def read_only(done: Build, scratch: Path) -> list[str]:
    """What goes before a command to take from it all but the volume and a folder of its own for
    short-lived files; nothing where this system does not let us."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return []
    wrapped = [unshare, "--map-root-user", "--mount", "/bin/sh", "-c", READ_ONLY, "sh"]
    wrapped += [done.variables["DATA"], str(scratch), str(done.root)]
    path = {"PATH": os.environ["PATH"]}
    probe = subprocess.run([*wrapped, "true"], capture_output=True, env=path, check=False)
    return wrapped if probe.returncode == 0 else []


@contextmanager
def running(done: Build, scratch: Path, *flags: str, **settings: str) -> Iterator[str]:
    """The image's entrypoint in its environment; the server's address once its health check, which
    is the image's own, finds it ready. At exit it is stopped as Docker does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = done.variables | {"POLYPEFT_PORT": str(port), "TMPDIR": str(scratch)} | settings
    stages = chain(STAGES, "cpu")
    entrypoint = next(filter(None, (stage.last("ENTRYPOINT") for stage in reversed(stages))))
    check = next(filter(None, (stage.last("HEALTHCHECK") for stage in reversed(stages))))
    program, *rest = command(entrypoint)
    binaries = Path(done.variables["PREFIX"]) / "bin"
    guard = read_only(done, scratch)
    if guard:  # what mounts needs this system's programs, what is run does not
        guard = [*guard, "/usr/bin/env", f"PATH={variables['PATH']}"]
    log = scratch / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*guard, str(binaries / program), *rest, "--host", "127.0.0.1", *flags],
            env=variables | ({"PATH": os.environ["PATH"]} if guard else {}),
            cwd=done.variables["DATA"], stdout=file, stderr=file,
        )  # fmt: skip
    try:
        asked = [str(binaries / command(check)[0]), *command(check)[1:]]
        end = time.monotonic() + 120
        while subprocess.run(asked, env=variables, capture_output=True, check=False).returncode:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(getattr(signal, str(STAGES["runtime"].last("STOPSIGNAL"))))
        assert process.wait(30) == -signal.SIGTERM, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert subprocess.run(asked, env=variables, capture_output=True, check=False).returncode == 1


def check_serving(done: Build, scratch: Path, kernels: str, **settings: str) -> None:
    """It answers by compiled kernels, and writes to the volume alone."""
    data, prefix = Path(done.variables["DATA"]), Path(done.variables["PREFIX"])
    before = listing(prefix)
    with running(done, scratch, "--kv-memory", "8MiB", **settings) as url:
        facts = httpx.get(f"{url}/health", timeout=60).json()
        assert facts["kernels"] == kernels
        body = {"model": facts["model"], "prompt": "Hello", "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 4
    assert listing(prefix) == before
    written = {str(path.relative_to(data)).split(os.sep)[0] for path in data.rglob("*")}
    assert "adapters" in written
    assert written <= {"adapters", "cache"}
    assert not [*data.rglob("*.so")], "nothing was compiled"
    assert {path.name for path in scratch.iterdir()} == {"log"}


def test_the_cpu_images_steps_and_server(model_folder: Path, tmp_path: Path) -> None:
    done = build("cpu", tmp_path / "root", full=False)
    check_steps("cpu", done)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    check_serving(done, scratch, capability(), POLYPEFT_MODEL=str(model_folder))


@pytest.mark.slow
def test_the_cpu_image_in_full(tmp_path: Path) -> None:
    """All packages, kernels for all CPUs. Each CPU's kernels serve the model, which was baked in
    or, by default, is fetched into the volume."""
    root = tmp_path / "root"
    done = build("cpu", root, full=True)
    check_steps("cpu", done)
    prefix = root / "opt" / "polypeft"
    assert not [*prefix.glob("lib/python*/site-packages/triton")]
    assert len([*prefix.glob("kernels/*/*.so")]) == len(capabilities())
    for number, name in enumerate((capability(), "AVX2", "PORTABLE")):
        scratch = tmp_path / f"scratch{number}"
        scratch.mkdir()
        check_serving(done, scratch, name, POLYPEFT_CPU_CAPABILITY=name)


@pytest.mark.slow
def test_the_cuda_images_steps(tmp_path: Path) -> None:
    """Triton finds its binding to the driver compiled, where there is no compiler."""
    done = build("cuda", tmp_path, full=False)
    check_steps("cuda", done)
    *start, name = command(STAGES["cuda"].last("ENTRYPOINT") or "")
    stub = tmp_path / "bin" / "polypeft-serve"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    variables = done.variables | {"PATH": f"{stub.parent}:/usr/bin:/bin"}
    for _ in range(2):  # also when the volume has it already
        ended = subprocess.run(
            [*start, name, "--model", "a b"], env=variables, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stdout) == (0, "--model a b\n"), ended.stderr
    load = """
from triton.backends.nvidia import driver
from triton.runtime import build
build._load_module_from_path = lambda name, path: print(path) or exit()
driver.CudaUtils()
"""
    # Triton's key has the platform, which Python asks `file` about, if there is one.
    if (program := shutil.which("file")) is not None:
        (stub.parent / "file").symlink_to(program)
    python = Path(done.variables["PREFIX"], "bin", "python")
    ended = subprocess.run(
        [python, "-c", load], env=done.variables | {"PATH": str(stub.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout.startswith(done.variables["TRITON_CACHE_DIR"]), ended.stderr


# -- compose.yaml ----------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    text = (ROOT / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


COMPOSE = compose()


def test_compose_is_what_the_specification_allows() -> None:
    read = PyCompose.from_json(json.dumps(COMPOSE))
    read.validate()
    assert set(read.service_names()) == {"polypeft", "polypeft-cuda", "prometheus", "grafana"}
    wrong = COMPOSE | {"services": {"a": {"image": "b", "readonly": True}}}
    with pytest.raises(ValueError, match="readonly"):
        PyCompose.from_json(json.dumps(wrong))


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_service_may_do_little(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert re.search(r":[\w.]+$", service["image"])
    assert not service["image"].endswith(":latest")
    if "build" in service:
        assert service["build"]["target"] in TARGETS, "whose image has a health check"
    else:
        assert service["healthcheck"]["test"]
    for volume in service["volumes"]:
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (ROOT / source).exists()
            assert volume.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]


def test_the_services_find_each_other() -> None:
    scrape = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"][0]
    for name in ("polypeft", "polypeft-cuda"):
        service = COMPOSE["services"][name]
        [alias] = service["networks"]["default"]["aliases"]
        port = STAGES["runtime"].last("EXPOSE")
        assert scrape["static_configs"] == [{"targets": [f"{alias}:{port}"]}]
        assert service["ports"][0].endswith(f":{port}")
        grace = float(service["stop_grace_period"].removesuffix("s"))
        assert grace > Settings().drain_timeout + 5
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards/polypeft.yaml").read_text())[
        "providers"
    ]
    places = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/polypeft.json" in places
