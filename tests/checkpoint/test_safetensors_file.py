"""Headers of safetensors files: every way in which one can be wrong."""

import copy
import functools
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.checkpoint.safetensors_file import read_header
from hetmoe.errors import InputError
from tests.checkpoint.golden_files import FOLDERS, GOLDEN, ROOT, join, outcome, refuses, split

KEY = "model.layers.1.mlp.experts.2.down_proj.weight"


@functools.cache
def original():
    return split(GOLDEN / "olmoe_tiny" / "model.safetensors")


@pytest.fixture
def path(tmp_path):
    join(tmp_path / "some.safetensors", *original())
    return tmp_path / "some.safetensors"


def refused(path, header, *words, data=None):
    join(path, header, original()[1] if data is None else data)
    return refuses(lambda: read_header(path), str(path), *words)


def changed(**fields):
    header = copy.deepcopy(original()[0])
    header[KEY] |= fields
    return header


@pytest.mark.parametrize("folder", FOLDERS)
def test_golden_headers_are_read_exactly(folder):
    path = GOLDEN / folder / "model.safetensors"
    header, data = split(path)
    header.pop("__metadata__", None)
    found = read_header(path)
    start = path.stat().st_size - len(data)
    assert found.keys() == header.keys()
    for key, entry in header.items():
        tensor = found[key]
        assert (tensor.path, tensor.key, tensor.dtype, list(tensor.shape)) == (
            path,
            key,
            entry["dtype"],
            entry["shape"],
        )
        assert [tensor.offset - start, tensor.offset + tensor.nbytes - start] == entry["data_offsets"]


@pytest.mark.parametrize("length", [-1, 10**6, 100_000_001, 2**31, 2**62, 2**64 - 1])
def test_header_longer_than_the_file_is_refused(path, length):
    raw = path.read_bytes()
    length = length if length > 0 else len(raw) - 7  # one byte too many
    path.write_bytes(length.to_bytes(8, "little") + raw[8:])
    refuses(lambda: read_header(path), str(path), f"{length:,} bytes", f"the file has {len(raw):,}")


def test_header_beyond_the_limit_is_refused_unread(path):
    """Even where the file has the bytes: the file is sparse, and takes no memory."""
    with path.open("wb") as file:
        file.write((32_000_001).to_bytes(8, "little"))
        file.truncate(32_000_100)
    tracemalloc.start()
    refuses(lambda: read_header(path), str(path), "32,000,001", "the limit is 32,000,000")
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"nothing", "not JSON"),
        (b'{"a": \xff}', "not JSON"),
        ("{}".encode("utf-16"), "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),  # a byte order mark
        (b"[" * 100_000, "more lists than shapes"),
        (b'{"a":[' + b"[]," * 100_000 + b"[]]}", "more lists than shapes"),
        (b'{"a":' * 100_000, "not JSON"),
        (b'{"a": %s}' % (b"1" * 5000), "not JSON"),  # Python parses no longer numbers
        (b"[]", "list"),
        (b"null", "NoneType"),
        (b'"a"', "str"),
        (b"3", "int"),
    ],
)
def test_header_must_be_a_json_object(path, text, word):
    refused(path, text, word)


@pytest.mark.parametrize("depth", [*range(850, 1000, 3), 3000])
def test_no_depth_of_nesting_gets_through(path, depth):
    refused(path, b'{"a":' + b"[" * depth + b"]" * depth + b"}")


def test_keys_and_fields_given_twice_are_refused(path):
    text = json.dumps(original()[0])
    entry = json.dumps(original()[0][KEY])
    refused(path, (text[:-1] + f', "{KEY}": {entry}}}').encode(), KEY, "twice")
    refused(path, (text[:-1] + ', "__metadata__": {}}').encode(), "__metadata__", "twice")
    refused(path, text.replace('"dtype"', '"dtype": "I8", "dtype"', 1).encode(), "dtype", "twice")


@pytest.mark.parametrize("metadata", [None, [], "pt", {"format": 3}, {"format": None}, {"a": {}}])
def test_metadata_must_be_strings(path, metadata):
    refused(path, original()[0] | {"__metadata__": metadata}, "__metadata__", "strings")


@pytest.mark.parametrize("entry", [None, 3, "F32", [], ["F32", [1], [0, 4]], {}, {"dtype": "F32"}])
def test_entries_must_have_three_fields(path, entry):
    refused(path, original()[0] | {KEY: entry}, KEY, "dtype, shape and data_offsets", str(entry))


def test_entries_must_have_no_other_fields(path):
    refused(path, changed(strides=[1]), KEY, "strides")


@pytest.mark.parametrize("dtype", ["F4", "f32", "", "float32", None, 32, ["F32"], {"F32": 1}, True])
def test_dtype_must_be_known(path, dtype):
    refused(path, changed(dtype=dtype), KEY, "dtype", repr(str(dtype)))


@pytest.mark.parametrize(
    "shape",
    [
        [2**63],
        [10**30, 0],
        [1] * 9,
        [-64, 24],
        [64.0, 24],
        [True, 24],
        ["64", 24],
        [None],
        None,
        1536,
        "64x24",
        [[64, 24]],
    ],
)
def test_shape_must_be_whole_numbers(path, shape):
    refused(path, changed(shape=shape), KEY, "shape", str(shape), "must be a list of whole numbers")


def test_true_is_no_number_even_where_one_would_fit(path):
    refused(path, changed(shape=[True, *original()[0][KEY]["shape"]]), KEY, "whole numbers")


@pytest.mark.parametrize("shape", [[], [0], [64], [64, 25], [2**62], [2**32, 2**32], [2**62, 4], [10**18, 0]])
def test_shape_must_fill_the_data(path, shape):
    """Python's integers do not wrap around: 2**32 times 2**32 is not 0."""
    begin, end = original()[0][KEY]["data_offsets"]
    size = 4 * int(np.prod([1, *shape], dtype=object))
    refused(path, changed(shape=shape), KEY, str(shape), f"needs {size} bytes", f"give {end - begin}")


def test_numbers_too_long_to_print_are_refused(path):
    """Python refuses to print whole numbers of more than 4300 digits."""
    refused(path, changed(shape=[10**4000, 10**4000]), KEY)


@pytest.mark.parametrize(
    "offsets", [None, [], [0], [0, 1, 2], "0, 4", [0.0, 4.0], [False, True], ["0", "4"], [-4, 0], [4, 0], [2**64, 0]]
)
def test_offsets_must_be_two_ascending_numbers(path, offsets):
    refused(path, changed(data_offsets=offsets), KEY, "data_offsets", str(offsets))


def test_data_must_be_gapless_and_inside_the_file(path):
    header, data = original()
    begin, end = header[KEY]["data_offsets"]
    size = end - begin
    for shift in (-4, 4, size, 2**40):
        message = refused(path, changed(data_offsets=[begin + shift, end + shift]))
        assert "overlaps" in message or "leaves a gap" in message
    missing = {key: entry for key, entry in header.items() if key != KEY}
    refused(path, missing, "leaves a gap", f"expected {begin}")
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    refused(path, header, "4 bytes follow", last, data=data + b"1234")
    refused(path, {}, f"{len(data)} bytes follow", "the header")
    twice = header | {"again": header[KEY]}
    refused(path, twice, "overlaps", f"expected {end}")
    begins = header[last]["data_offsets"][0]
    grown = header | {last: {"dtype": "U8", "shape": [2**50], "data_offsets": [begins, begins + 2**50]}}
    refused(path, grown, last, "ends at byte", "truncated")


def test_truncated_files_are_refused(path):
    raw = path.read_bytes()
    start = len(raw) - len(original()[1])
    offsets = [offset for key, e in original()[0].items() if key != "__metadata__" for offset in e["data_offsets"]]
    sizes = {0, 1, 7, 8, 9, start // 2, start - 1, start, start + 1, len(raw) - 1} | {start + o for o in offsets[::29]}
    for size in sorted(sizes - {len(raw)}):
        path.write_bytes(raw[:size])
        refuses(lambda: read_header(path), str(path), f"{size:,}" if size < start else str(size))


def test_absent_files_are_refused(tmp_path):
    refuses(lambda: read_header(tmp_path / "nothing"), str(tmp_path / "nothing"), "no such file")
    refuses(lambda: read_header(tmp_path), str(tmp_path), "cannot be read")


def test_messages_can_be_printed(path):
    """JSON can spell half of a surrogate pair, which no terminal can show."""
    refused(path, {"\ud800": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}})


@pytest.mark.parametrize("padding", [b"", b" " * 7, b"\n" * 1000])
def test_padding_of_the_header_does_not_matter(path, padding):
    expected = [(t.key, t.shape, t.offset + len(padding)) for t in read_header(path).values()]
    text = path.read_bytes()[8 : -len(original()[1])]
    join(path, text + padding, original()[1])
    assert [(t.key, t.shape, t.offset) for t in read_header(path).values()] == expected


def test_declared_petabytes_take_no_memory(tmp_path):
    """In a process that may hold no more than it has after its imports, and 64 MB."""
    script = """
import pathlib, resource, sys
from hetmoe.checkpoint.safetensors_file import read_header
from hetmoe.errors import InputError
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
limit = int(status["VmSize"].split()[0]) * 1024 + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        read_header(pathlib.Path(path))
    except InputError as error:
        print(str(error)[-100:])
"""
    paths = []
    for shape, end in (([2**50], 2**52), ([2**20] * 2, 2**42), ([10**15, 10**15], 4 * 10**30), ([2**62, 0], 0)):
        paths.append(tmp_path / str(len(paths)))
        join(paths[-1], {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}, b"1234")
    run = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout.count("\n")) == (0, 4), run.stderr


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**31, 2**62, 2**64, 10**30])
    | st.floats()
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.lists(st.integers(-2, 3) | st.sampled_from([4, 24, 64, 2**40, 2**62, 10**30]), max_size=4)


@settings(max_examples=250)
@given(
    key=st.sampled_from([*original()[0], "new", ""]),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "other", None]),
    value=JSON | NUMBERS | st.sampled_from(["F64", "BF16", "I64", "U8", "BOOL"]),
    cut=st.integers(0, 3),
)
def test_random_mutations_raise_nothing_else(tmp_path_factory, key, field, value, cut):
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    header, data = original()
    if field is None or not isinstance(header.get(key), dict):
        header = header | {key: value}
    else:
        header = header | {key: header[key] | {field: value}}
    join(path, header, data[: len(data) - cut] if cut else data)
    tracemalloc.start()
    tensors = outcome(lambda: read_header(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if isinstance(tensors, InputError):
        assert str(path) in str(tensors)
    else:  # then the library reads it as well, and finds the same
        assert cut == 0
        with safetensors.safe_open(path, "np") as file:
            assert set(file.keys()) == tensors.keys()
            assert all(tuple(file.get_slice(k).get_shape()) == t.shape for k, t in tensors.items())
    assert peak < 4e6
