"""Hostile content for a file: random bytes, damage to a valid file, and frames that are right around what is wrong."""

import base64
import functools
import gzip
import io
import json
import pathlib
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

# Unpickling it would make a file in the current folder; no loader may.
PICKLE = b"cos\nsystem\n(S'touch unpickled'\ntR."
DEEP = "[" * 500 + "]" * 500
HOLES = (  # JSON as it stands in the text, so that it need not be valid
    *("null", "true", "false", "-1", "0", "1", "3", "2.5", "-0.0", "1e308", "1e999", "NaN", "-Infinity"),
    *("9223372036854775807", "9223372036854775808", "9" * 30, "9" * 400, "9" * 5000, "2147483648", "4294967296"),
    *('""', '" "', '"a"', '"' + "x" * 5000 + '"', '"../../x"', '"/etc/passwd"', '"a/b"', r'"a\u0000b"', r'"\ud800"'),
    *(r'"\u2028\u2029"', '"<script>alert(1)</script>"', r'"\"><img src=x onerror=alert(1)>"', '"{history}"', '"%s"'),
    *(
        "[]",
        "{}",
        "[[]]",
        "[null]",
        '["a"]',
        "[1, 2]",
        "[-1]",
        "[1e308, -1e308]",
        '{"a": 1}',
        '{"": {}}',
        '{"value": 1}',
    ),
    *('{"value": 1, "ci95": [1]}', '{"value": "x", "n": "y"}', "[" * 50 + "]" * 50, DEEP, "[" * 100_000, '{"a":' * 200),
)
TOKENS = (
    *(
        b"\0",
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\r",
        b"\n",
        b"\r\n",
        b"\t",
        b"::",
        b"|",
        b",",
        b'"',
    ),
    *(b"'", b"\\", b"{", b"}", b"[", b"]", b"(", b":", b"=", b"-1", b"1e999", b"nan", b"inf", b"9" * 40, b"9" * 5000),
    *(
        b"../../x",
        b"/etc/passwd",
        b"<script>",
        "\u2028".encode(),
        "\u202e".encode(),
        "９".encode(),
        "é".encode("latin-1"),
    ),
    *(b"x" * 70_000, b"[" * 2000, PICKLE, b"\x80\x04\x95", b"PK\x03\x04", b"\x1f\x8b\x08", b"PAR1", b"\x93NUMPY"),
    *(b"{{ ''.__class__ }}", b"{% for i in range(9) %}", b"%", b"__import__('os')", b"null", b"\xff" * 8, b"\0" * 8),
)


def content(path: pathlib.Path, valid: bytes) -> st.SearchStrategy[bytes]:
    """What may stand in the file `path` instead of `valid`."""
    shaped = _SHAPED.get("".join(path.suffixes[-2:]), _SHAPED.get(path.suffix))
    kinds = [st.binary(max_size=200), mutated(valid)]
    return st.one_of(*kinds, *([shaped(valid)] * 2 if shaped else []))


def mutated(valid: bytes) -> st.SearchStrategy[bytes]:
    place = st.integers(0, max(len(valid) - 1, 0))
    change = st.tuples(st.sampled_from(_CHANGES), place, place, st.sampled_from(TOKENS))
    return st.lists(change, min_size=1, max_size=3).map(functools.partial(_changed, valid))


def _changed(content: bytes, changes) -> bytes:
    for change, here, there, token in changes:
        content = change(content, here, there, token)
    return content


_CHANGES = (
    lambda c, i, j, token: c[:i],  # truncate
    lambda c, i, j, token: c[:i] + bytes([c[i] ^ (1 << j % 8)]) + c[i + 1 :] if i < len(c) else c,  # flip a bit
    lambda c, i, j, token: c[: min(i, j)] + c[max(i, j) :],  # leave out
    lambda c, i, j, token: c[:i] + c[i : i + j % 64] * 2 + c[i + j % 64 :],  # repeat
    lambda c, i, j, token: c[:i] + token + c[i:],  # insert
    lambda c, i, j, token: c[:i] + token + c[i + len(token) :],  # overwrite
    lambda c, i, j, token: c[:i] + c[j : j + 64] + c[i:],  # splice
)


# ---- JSON -----------------------------------------------------------------------------------------------------------


def shaped_json(valid: bytes) -> st.SearchStrategy[bytes]:
    return in_json(valid.decode()).map(lambda text: text.encode("utf-8", "surrogatepass"))


def in_json(text: str) -> st.SearchStrategy[str]:
    """The document with values replaced, keys left out, doubled, renamed or added."""
    places = list(_places(json.loads(text)))
    replacement = st.one_of(
        st.sampled_from(HOLES), st.sampled_from(places).map(lambda place: json.dumps(_at(text, place)))
    )
    change = st.tuples(
        st.sampled_from(places), st.sampled_from(("set", "set", "set", "drop", "add", "double")), replacement
    )
    return st.lists(change, min_size=1, max_size=2).map(functools.partial(_edited, text))


def _places(value, path=()):
    """Paths of all values, of long lists only the first and last few."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for place in sorted({*range(len(value))[:3], *range(len(value))[-2:]}):
            yield from _places(value[place], (*path, place))


def _at(text, path):
    value = json.loads(text)
    for key in path:
        value = value[key]
    return value


def _edited(text: str, changes) -> str:
    document, holes = json.loads(text), []
    for path, how, hole in changes:
        mark = f"@hole{len(holes)}@"
        holes.append((json.dumps(mark), hole))
        owner = document
        try:
            for key in path[:-1]:
                owner = owner[key]
            if not path:
                document = {mark: mark} if how == "add" else mark
            elif how == "drop":
                del owner[path[-1]]
            elif how == "add" and isinstance(owner, dict):
                owner[mark] = mark
            elif how == "double" and isinstance(owner, dict):
                owner[mark] = owner[path[-1]]  # under the same key, once the mark is replaced
                holes[-1] = (holes[-1][0], json.dumps(path[-1]))
            else:
                owner[path[-1]] = mark
        except (KeyError, IndexError, TypeError):  # an earlier change took that place away
            continue
    written = json.dumps(document)
    for mark, hole in holes:
        key = hole if hole.startswith('"') else json.dumps(hole[:40])
        written = written.replace(f"{mark}: ", f"{key}: ").replace(mark, hole)
    return written


def shaped_jsonl(valid: bytes) -> st.SearchStrategy[bytes]:
    lines = valid.decode().splitlines()
    shown = st.sampled_from(sorted({0, 1, len(lines) - 1} & {*range(len(lines))}))
    edited = shown.flatmap(
        lambda place: in_json(lines[place]).map(lambda line: [*lines[:place], line, *lines[place + 1 :]])
    )
    return st.one_of(edited, st.permutations(lines), st.just([*lines, *lines]), st.just([])).map(
        lambda found: "\n".join(found).encode("utf-8", "surrogatepass")
    )


# ---- tables and archives --------------------------------------------------------------------------------------------


def shaped_table(valid: bytes) -> st.SearchStrategy[bytes]:
    """A field of a line replaced, left out, or exchanged with another."""
    lines = valid.split(b"\n")
    separator = max((b"::", b"\t", b"|", b","), key=valid.count)

    def edit(line, field, other, how, token):
        fields = lines[line % len(lines)].split(separator)
        field, other = field % len(fields), other % len(fields)
        if how == "swap":
            fields[field], fields[other] = fields[other], fields[field]
        elif how == "drop":
            del fields[field]
        else:
            fields[field] = token if how == "set" else fields[field] + separator + token
        return b"\n".join([*lines[: line % len(lines)], separator.join(fields), *lines[line % len(lines) + 1 :]])

    return st.builds(
        edit, st.integers(0, 30), st.integers(0, 8), st.integers(0, 8),
        st.sampled_from(("set", "set", "swap", "drop", "add")), st.sampled_from(TOKENS),
    )  # fmt: skip


def shaped_gz(valid: bytes) -> st.SearchStrategy[bytes]:
    inside = gzip.decompress(valid)
    bombs = (b"\n" * 30_000_000, b"x" * 30_000_000, b"1,2,3,4\n" * 4_000_000, gzip.compress(b"\n" * 1000))
    return st.one_of(mutated(inside), mutated(inside), shaped_table(inside), st.sampled_from(bombs)).map(_packed)


@functools.lru_cache(maxsize=8)
def _packed(content: bytes) -> bytes:
    return gzip.compress(content, 1, mtime=0)


def shaped_safetensors(valid: bytes) -> st.SearchStrategy[bytes]:
    """A frame around a hostile header; lengths of headers that lie."""
    size = int.from_bytes(valid[:8], "little")
    header, body = valid[8 : 8 + size].decode(), valid[8 + size :]
    lies = st.sampled_from((0, 0, 0, 0, 1, -1, 2**20, 100_000_001, 2**40, 2**63))

    def frame(text, lie):
        raw = text.encode("utf-8", "surrogatepass")
        return ((len(raw) + lie) % 2**64).to_bytes(8, "little") + raw + body

    return st.builds(frame, in_json(header), lies)


def shaped_npz(valid: bytes) -> st.SearchStrategy[bytes]:
    arrays = dict(np.load(io.BytesIO(valid)))
    return st.builds(
        functools.partial(_archive, arrays), st.sampled_from([*arrays, "other"]), st.integers(0, len(ARRAYS) - 1),
        st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)), st.booleans(),
    )  # fmt: skip


def _npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def _header(text: str) -> bytes:
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text.encode()


ARRAYS = (
    _npy(np.array([print], object)), _npy(np.array("a")), _npy(np.zeros(0)), _npy(np.full((3, 3), np.nan)),
    _npy(np.array([-1, 10**12])), _npy(np.array(["x"])), _npy(np.zeros(3, "M8[s]")), _npy(np.arange(5)[::-1]),
    _header("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"),
    _header("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }"),
    _header("{'descr': '<i8', 'fortran_order': False, 'shape': ((1,),), }"),
    _header("{'descr': [('a', '<i8')] * 9, 'fortran_order': False, 'shape': (1,), }"),
    _header("{'descr': 'O', 'fortran_order': False, 'shape': (1,), }") + PICKLE,
    _header("{'descr': " + "[" * 300 + "]" * 300 + "}"), PICKLE, b"",
)  # fmt: skip


def _archive(arrays, name, number, how, other_too) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for key, array in arrays.items():
            if key != name:
                archive.writestr(f"{key}.npy", _npy(array))
        archive.writestr(f"{name}.npy", ARRAYS[number])
        if other_too:
            archive.writestr("../../escaped.npy", ARRAYS[0])
    return buffer.getvalue()


def shaped_parquet(valid: bytes) -> st.SearchStrategy[bytes]:
    return st.sampled_from(_tables(base64.b64encode(valid).decode()))


@functools.cache
def _tables(valid: str) -> list[bytes]:
    """The table with a column of another kind, left out, doubled or renamed; without rows; with very many."""
    table = pq.read_table(io.BytesIO(base64.b64decode(valid)))
    n = len(table)
    kinds = (
        pa.array([None] * n), pa.array([-1] * n), pa.array([2**63 - 1] * n), pa.array([float("nan")] * n),
        pa.array([1e308] * n), pa.array([""] * n), pa.array(["../x\0\u2028"] * n), pa.array([b"\xff\xfe"] * n),
        pa.array([True] * n), pa.array([[]] * n, pa.list_(pa.int64())), pa.array([[1, None]] * n),
        pa.array([{"a": 1}] * n),
        pa.array([[{"content": None}]] * n), pa.array([[("k", 1)]] * n, pa.map_(pa.string(), pa.int64())),
        pa.array([["a", "b"]] * n), pa.array([2**62] * n, pa.timestamp("us")), pa.array([10**6] * n, pa.date32()),
        pa.array(["x" * 5000] * n), pa.array([2**64 - 1] * n, pa.uint64()), pa.array([[[1.0]]] * n),
        pa.nulls(n, pa.int32()),
        pa.Array.from_buffers(pa.string(), n, [None, *map(pa.py_buffer, (np.arange(n + 1, dtype="i4"), b"\xff" * n))]),
        pa.array([1] * n, pa.timestamp("s", "No/Where")), pa.array([1] * n).dictionary_encode(),
    )  # fmt: skip
    found = [table.slice(0, 0), table.rename_columns([f"x{c}" for c in table.column_names]), pa.table({})]
    for place, name in enumerate(table.column_names):
        found += [table.set_column(place, name, kind) for kind in kinds]
        found += [table.drop_columns([name]), table.append_column(name, table.column(place))]
    first = table.column_names[0]
    many = pa.table(
        {
            name: pa.nulls(40_000_000, pa.int8()) if name == first else pa.nulls(40_000_000)
            for name in table.column_names
        }
    )
    return [_parquet(each) for each in [*found, many]]


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


_SHAPED = {
    ".json": shaped_json, ".jsonl": shaped_jsonl, ".gz": shaped_gz, ".safetensors": shaped_safetensors,
    ".npz": shaped_npz, ".parquet": shaped_parquet,
    **dict.fromkeys((".csv", ".tsv", ".dat", ".data", ".item", ".inter", ".txt"), shaped_table),
}  # fmt: skip
