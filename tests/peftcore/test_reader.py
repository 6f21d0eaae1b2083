"""Broken weight files: each is refused, by the key or the file, and nothing in them is run."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from peftcore.checkpoint.reader import TensorReader
from peftcore.errors import CheckpointError

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "broken"
#: Where a file of the shared folder is refused; none of the folder's files is served.
SHARED_KEYS = {"own_nan_inf_values": "a", "ok_basic": "test"}
SHARED_FILES = sorted(SHARED.glob("**/*.safetensors"))


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: the header's length, the header, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ZEROS = bytes(16)
GOOD = {"a": entry("F32", [4], 0, 16)}

#: Content of the file → the key that is named; "weights" is the file.
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "weights"),
    "shorter than its header's length": (b"\1\2\3", "weights"),
    "header too large": (raw(GOOD, ZEROS, length=(1 << 56) + 1), "weights"),
    "header longer than the file": (raw(GOOD, ZEROS, length=4000), "weights"),
    "header not JSON": (raw(b"not json at all."), "weights"),
    "header not UTF-8": (raw(b'{"\xff": 1}'), "weights"),
    "header a list": (raw([GOOD]), "weights"),
    "header deeply nested": (raw(b'{"a":' * 20_000), "weights"),
    "no tensor": (raw({}), "weights"),
    "no tensor but metadata": (raw({"__metadata__": {"format": "pt"}}), "weights"),
    "truncated": (raw(GOOD, ZEROS[:-1]), "weights"),
    "left over": (raw(GOOD, ZEROS + b"\0"), "weights"),
    "overlap": (raw(GOOD | {"b": entry("F32", [4], 8, 24)}, bytes(24)), "weights"),
    "same range twice": (raw(GOOD | {"b": entry("F32", [4], 0, 16)}, ZEROS), "weights"),
    "hole": (raw(GOOD | {"b": entry("F32", [1], 20, 24)}, bytes(24)), "weights"),
    "end before start": (raw({"a": entry("F32", [4], 16, 0)}, ZEROS), "weights"),
    "negative offset": (raw({"a": entry("F32", [4], -16, 0)}, ZEROS), "weights"),
    "shape and range disagree": (raw({"a": entry("F32", [5], 0, 16)}, ZEROS), "weights"),
    "shape overflows": (raw({"a": entry("F32", [1 << 62, 1 << 62], 0, 16)}, ZEROS), "weights"),
    "negative shape": (raw({"a": entry("F32", [-4], 0, 16)}, ZEROS), "weights"),
    "unknown dtype": (raw({"a": entry("F31", [4], 0, 16)}, ZEROS), "weights"),
    "no dtype": (raw({"a": {"shape": [4], "data_offsets": [0, 16]}}, ZEROS), "weights"),
    "duplicate key": (
        raw(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
            b'"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', ZEROS),
        "weights",
    ),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        + b"0" * 64 + b"\nsize 319876032\n",
        "weights",
    ),
    "an HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", "weights"),
    "zero-size": (raw({"a": entry("F32", [0, 4], 0, 0)}), "a"),
    "zero-size beside another": (raw(GOOD | {"b": entry("F32", [4, 0], 16, 16)}, ZEROS), "b"),
    "nan": (raw(GOOD, struct.pack("<4f", 1, 2, float("nan"), 4)), "a"),
    "inf": (raw(GOOD, struct.pack("<4f", 1, 2, 3, float("inf"))), "a"),
    "-inf in fp16": (raw({"a": entry("F16", [8], 0, 16)}, b"\0\xfc" * 8), "a"),
    "nan in bf16": (raw({"a": entry("BF16", [8], 0, 16)}, b"\xc0\x7f" * 8), "a"),
}  # fmt: skip

#: Each dtype of the format that no adapter has, with its bytes a value.
FOREIGN = {
    "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "U16": 2, "U32": 4, "U64": 8,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip


def refusal(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        TensorReader.from_file(path)
    assert str(caught.value).startswith(f"{caught.value.key}: ")
    return caught.value


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused(name: str, tmp_path: Path) -> None:
    content, key = BROKEN[name]
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(content)
    assert refusal(path).key == key


def test_the_helper_makes_good_files(tmp_path: Path) -> None:
    """What BROKEN breaks is what it says: the same files unbroken are read."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw(GOOD | {"b": entry("BF16", [2], 16, 20)}, struct.pack("<5f", *range(5))))
    reader = TensorReader.from_file(path)
    assert reader.peek("a").tolist() == [0, 1, 2, 3]
    assert reader.peek("b").tolist() == [0, 4]
    assert sorted(reader.keys()) == ["a", "b"]


@pytest.mark.parametrize("dtype", FOREIGN)
def test_a_foreign_dtype_is_refused_by_key(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = {
        "fine": entry("F32", [4], 0, 16),
        "odd": entry(dtype, [4], 16, 16 + 4 * FOREIGN[dtype]),
    }
    path.write_bytes(raw(header, ZEROS + bytes(4 * FOREIGN[dtype])))
    error = refusal(path)
    assert error.key in ("odd", "weights")  # torch may not know the dtype at all
    assert "dtype" in str(error) or error.key == "weights"


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in SHARED_FILES])
def test_the_shared_broken_files(path: Path) -> None:
    if path.stem == "own_name_traversal":  # a good file with an odd key: a name and no path
        with pytest.raises(CheckpointError) as caught:
            TensorReader.from_file(path).finish()
        assert caught.value.key == "../../../etc/passwd"
    else:
        assert refusal(path).key == SHARED_KEYS.get(path.stem, "weights")


def test_what_was_checked_before_is_not_searched_for_nan_again(tmp_path: Path) -> None:
    """A file of the store; everything else about it is checked still."""
    path = tmp_path / "a.safetensors"
    for name, (content, key) in BROKEN.items():
        path.write_bytes(content)
        if "nan" in name or "inf" in name:
            assert list(TensorReader.from_file(path, check_values=False).keys()) == ["a"]
        else:
            with pytest.raises(CheckpointError) as caught:
                TensorReader.from_file(path, check_values=False)
            assert caught.value.key == key, name


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.safetensors").key == "weights"
    assert refusal(tmp_path).key == "weights"


@pytest.mark.parametrize(
    "key", ["../../../etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "", "." * 300, "\N{SNOWMAN}"]
)
def test_odd_names_are_names_and_no_paths(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw({key: entry("F32", [4], 0, 16)}, ZEROS))
    reader = TensorReader.from_file(path)
    assert list(reader.keys()) == [key]
    with pytest.raises(CheckpointError) as caught:
        reader.finish()
    assert caught.value.key == key
    assert list(tmp_path.iterdir()) == [path]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["pickle", "torch", "torch-legacy"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_pickle_is_refused_and_not_run(form: str, name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    content = {"a": torch.zeros(2), "b": Payload(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    assert refusal(path).key == "weights"
    assert not marker.exists()
    with path.open("rb") as file:
        pickle.load(file) if form == "pickle" else torch.load(file, weights_only=False)
    assert marker.exists(), "the payload would not have worked"


def test_a_git_lfs_pointer_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    assert "git lfs pull" in str(refusal(path))


# -- taking ------------------------------------------------------------------------------------


def reader_of(**tensors: Tensor) -> TensorReader:
    return TensorReader(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_tensor_is_taken_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(3, 5).to(dtype)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    reader = TensorReader.from_file(tmp_path / "a.safetensors")
    taken = reader.take("a", (3, 5))
    assert taken.dtype == torch.float32
    assert torch.equal(taken, tensor.to(torch.float32))
    assert reader.peek("a").dtype == dtype
    reader.finish()


def test_a_missing_key_says_why_it_is_wanted() -> None:
    with pytest.raises(CheckpointError, match=r"^b: missing.*: target_modules names q$") as caught:
        reader_of(a=torch.ones(1)).take("b", (1,), "target_modules names q")
    assert caught.value.key == "b"


@pytest.mark.parametrize("shape", [(3, 4), (4, 3, 1), (12,), ()])
def test_another_shape_names_both(shape: tuple[int, ...]) -> None:
    reader = reader_of(a=torch.ones(4, 3))
    with pytest.raises(CheckpointError, match=r"\[4, 3\]") as caught:
        reader.take("a", shape)
    assert caught.value.key == "a"
    assert str(list(shape)) in str(caught.value)
    with pytest.raises(CheckpointError):  # it was not taken
        reader.finish()


def test_what_is_left_over_is_named() -> None:
    reader = reader_of(c=torch.ones(1), a=torch.ones(1), b=torch.ones(1))
    reader.take("b", (1,))
    with pytest.raises(CheckpointError, match=r"and 1 more") as caught:
        reader.finish()
    assert caught.value.key == "a"
    reader.take("a", (1,))
    with pytest.raises(CheckpointError) as caught:
        reader.finish()
    assert caught.value.key == "c"
    assert "more" not in str(caught.value)
    reader.take("c", (1,))
    reader.finish()


def test_a_key_is_taken_once() -> None:
    reader = reader_of(a=torch.ones(1))
    assert reader.has("a")
    assert not reader.has("b")
    reader.take("a", (1,))
    with pytest.raises(AssertionError, match="a is taken twice"):
        reader.take("a", (1,))
