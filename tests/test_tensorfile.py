"""Files of tensors: as the safetensors library reads and writes them, and nothing that is not whole."""

import json
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gptq_triton.files import open_checkpoint, read_tensors, save_tensors
from gptq_triton.tensorfile import DTYPES, MAX_HEADER, Entry, TensorFile, TorchFile, open_tensors, write_tensors

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a": torch.tensor(5, dtype=torch.int64),
    "half": torch.randn(2, 3, 5).half(),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "none": torch.zeros(0, 4),
    'ä"\\': torch.ones(1, dtype=torch.bfloat16),
}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in expected
    )


def test_reads_what_the_library_writes_and_writes_what_it_reads(tmp_path):
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    found, metadata = read_tensors(tmp_path / "theirs.safetensors")
    assert same(found, TENSORS)
    assert metadata == {"format": "pt"}
    save_tensors(tmp_path / "ours.safetensors", TENSORS, {"x": "y"})
    assert same(load_file(tmp_path / "ours.safetensors"), TENSORS)
    save_tensors(tmp_path / "empty.safetensors", {}, {})
    assert load_file(tmp_path / "empty.safetensors") == {}
    assert read_tensors(tmp_path / "empty.safetensors") == ({}, {})


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype(tmp_path, name):
    tensor = torch.arange(6).to(DTYPES[name]).view(2, 3)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    save_tensors(tmp_path / "y.safetensors", {"x": tensor}, {})
    for file in ("x.safetensors", "y.safetensors"):
        found = read_tensors(tmp_path / file)[0]["x"]
        assert found.dtype == DTYPES[name]
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


@given(rows=st.integers(1, 9), columns=st.integers(1, 5), start=st.integers(0, 9), length=st.integers(0, 9))
def test_rows(tmp_path_factory, rows, columns, start, length):
    tensor = torch.randint(0, 100, (rows, columns), dtype=torch.int32)
    path = tmp_path_factory.getbasetemp() / "rows.safetensors"
    save_file({"before": torch.ones(3), "x": tensor}, path)
    start, stop = min(start, rows), min(start + length, rows)
    with open_tensors(path) as file:
        assert torch.equal(file.rows("x", start, max(start, stop)), tensor[start : max(start, stop)])
    torch.save({"x": tensor}, path.with_suffix(".pt"))
    with open_tensors(path.with_suffix(".pt")) as file:
        assert torch.equal(file.rows("x", start, max(start, stop)), tensor[start : max(start, stop)])


def header(content, data=b"", length=None):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**fields):
    return header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}, b"\0" * 8)


BAD = {
    "empty": (b"", "it has no header"),
    "short": (b"\1\0\0", "it has no header"),
    "no header": (struct.pack("<Q", 0), "it has no header"),
    "header past the end": (header({}, length=100), r"its header claims 100 bytes; the file has 10"),
    "absurd header": (header({}, length=2**63), "its header claims 9223372036854775808 bytes"),
    "not JSON": (header(b"{x"), "its header is not valid JSON"),
    "not UTF-8": (header(b'{"\xff": 1}'), "its header is not valid JSON"),
    "too deep": (header(b"[" * 100000), "its header is not valid JSON"),
    "a list": (header([]), "its header is not a JSON object"),
    "a name twice": (header(b'{"x": 1, "x": 1}'), "a name occurs twice"),
    "metadata": (header({"__metadata__": {"a": 1}}), "__metadata__ must map names to strings"),
    "not an entry": (header({"x": 5}), "x must have dtype, shape and data_offsets, got 5"),
    "no such dtype": (one(dtype="Q4"), "x: dtype must be one of .*, got 'Q4'"),
    "dtype no string": (one(dtype=None), "x: dtype must be one of"),
    "negative shape": (one(shape=[-2]), r"x: shape must be a list of sizes, got \[-2\]"),
    "absurd shape": (one(shape=[2**62, 2**62]), "x takes .* bytes, its offsets say 8"),
    "fraction": (one(shape=[2.0]), "x: shape must be a list of sizes"),
    "truth": (one(shape=[True, 2]), "x: shape must be a list of sizes"),
    "many dimensions": (one(shape=[1] * 17 + [2]), "shape at most 16"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "data_offsets must be two numbers"),
    "offsets backwards": (one(data_offsets=[8, 0]), "x takes 8 bytes, its offsets say -8"),
    "a hole": (one(data_offsets=[4, 12]), "x starts at byte .*, where .* was expected"),
    "too much data": (one() + b"\0", "its tensors end at byte .*, the file at"),
    "too little": (one()[:-1], "its tensors end at byte .*, the file at"),
    "overlap": (
        header({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "xy"}, b"\0" * 8),
        "y starts at byte .*, where .* was expected",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_headers(tmp_path, what):
    raw, message = BAD[what]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"x\.safetensors is not a readable safetensors file: .*{message}"):
        TensorFile(path)
    with pytest.raises(ValueError, match=message), open_checkpoint(path):
        pass


def test_a_header_beyond_the_limit(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(MAX_HEADER + 100)  # no disk is used
    with pytest.raises(ValueError, match=f"its header claims {MAX_HEADER + 1} bytes"):
        TensorFile(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    with TensorFile(path) as file:
        with path.open("r+b") as other:
            other.truncate(2000)
        with pytest.raises(ValueError, match="it became shorter while it was read"):
            file.read("x")


def test_not_a_file(tmp_path):
    for name in ("folder.safetensors", "none.safetensors", "folder.pt", "none.pt"):
        if name.startswith("folder"):
            (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=f"{name} is not a readable"):
            open_tensors(tmp_path / name)


def test_what_is_written_is_what_was_announced(tmp_path):
    entries = {"x": Entry(torch.float32, (2,))}
    for tensors in ([("y", torch.ones(2))], [("x", torch.ones(3))], [("x", torch.ones(2).half())]):
        with pytest.raises(ValueError, match="announced was x"):
            write_tensors(tmp_path / "x", entries, tensors, {})
    for tensors in ([], [("x", torch.ones(2))] * 2):
        with pytest.raises(ValueError, match="zip"):
            write_tensors(tmp_path / "x", entries, tensors, {})


# .pt


def test_torch_files(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt")
    with TorchFile(tmp_path / "x.pt") as file:
        assert file.entries["half"] == Entry(torch.float16, (2, 3, 5))
        assert same({key: file.read(key) for key in file.entries}, TENSORS)
        tensor = file.read("b.weight")
    (tmp_path / "x.pt").write_bytes(b"")  # nothing that was read depends on the file
    assert torch.equal(tensor, TENSORS["b.weight"])


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": Bomb()}, "is not a readable file of tensors alone"),
        ({"x": {"y": torch.ones(1)}}, "must hold one dict of names to tensors"),
        ({5: torch.ones(1)}, "must hold one dict of names to tensors"),
        ([torch.ones(1)], "must hold one dict of names to tensors"),
        ({"x": torch.ones(2, 2).to_sparse()}, "x must be a dense tensor"),
    ],
)
def test_torch_files_of_other_things(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        TorchFile(tmp_path / "x.pt")
    assert "boom" not in capsys.readouterr().out


def rezip(path, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    change(members)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)


def test_hostile_torch_files(tmp_path):
    path = tmp_path / "x.pt"

    def refused(message):
        with pytest.raises(ValueError, match=rf"x\.pt is not a readable file of tensors alone: .*{message}"):
            TorchFile(path)

    torch.save({"x": torch.zeros(100000)}, path)
    rezip(path, lambda members: None, zipfile.ZIP_DEFLATED)  # a bomb: 400 kB from a few hundred bytes
    refused("a member is compressed")
    torch.save({"x": torch.zeros(1000)}, path)
    rezip(path, lambda members: members.update({name: raw[:8] for name, raw in members.items() if "/data/0" in name}))
    refused("")
    torch.save({"x": torch.ones(1000)}, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(struct.pack("<f", 1.0) * 8) + 5] ^= 1
    path.write_bytes(raw)
    refused("the checksum of .*data/0 is wrong")
    path.write_bytes(pickle.dumps({"x": 1}))
    refused("File is not a zip file")
    torch.save({"x": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    refused("File is not a zip file")
