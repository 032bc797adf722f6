"""Files by several writers at once, of every damage, and how much memory and disk they take."""

import hashlib
import json
import os
import pathlib
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from helpers import DTYPES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fisherop.atomic
import fisherop.files
from fisherop import Eigendistortion
from fisherop.atomic import replacing
from fisherop.files import _checksum, fingerprint
from fisherop.testing import linear_model, matrix_with_singular_values

MATRIX = matrix_with_singular_values(np.linspace(3, 1, 24), 30, 24)
POSIX = pytest.mark.skipif(os.name != "posix", reason="locks, permissions and signals of POSIX")


def linear(dtype=torch.float64):
    return Eigendistortion(torch.linspace(0, 1, 24, dtype=dtype).reshape(1, 2, 3, 4), linear_model(MATRIX, dtype))


@pytest.fixture(scope="module")
def ed():
    return linear().synthesize("golub_kahan", k=2, rng=0, progress=False)


@pytest.fixture
def saved(tmp_path, ed):
    ed.save(tmp_path / "ed.npz")
    return tmp_path / "ed.npz"


WRITER = """
import sys, threading, torch
torch.set_num_threads(1)
from fisherop import Eigendistortion
path, saves, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ed = Eigendistortion(torch.linspace(0, 1, 24).double(), lambda x: 2 * x).synthesize("exact", k=1, progress=False)
print("ready", flush=True)
sys.stdin.readline()

def work():
    for _ in range(saves // count):
        ed.save(path)

threads = [threading.Thread(target=work) for _ in range(count)]
[t.start() for t in threads]
[t.join() for t in threads]
"""


@pytest.mark.parametrize("saves", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_writers_of_one_path(tmp_path, saves):
    """Two processes of four threads in all: no save fails, and each file that is loaded in between is whole."""
    path = tmp_path / "ed.npz"
    reader = Eigendistortion(torch.linspace(0, 1, 24).double(), lambda x: 2 * x)
    arguments = [sys.executable, "-c", WRITER, str(path), str(saves // 2), "2"]
    writers = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    loads = 0
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            reader.load(path)
            loads += 1
    for writer in writers:
        _, errors = writer.communicate()
        assert writer.returncode == 0 and not errors, errors
    reader.load(path)
    assert loads > 3 and list(tmp_path.iterdir()) == [path]


def test_threads_of_one_object_save_to_one_path(tmp_path, ed):
    failures = []

    def work():
        try:
            for _ in range(10):
                ed.save(tmp_path / "ed.npz")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    linear().load(tmp_path / "ed.npz")
    assert not failures and len(list(tmp_path.iterdir())) == 1


@POSIX
def test_leftovers_go_and_what_is_being_written_stays(tmp_path):
    host = fisherop.atomic._HOST
    killed, elsewhere, old, other = (
        tmp_path / name
        for name in (
            f".fisherop-{host}-{'0' * 16}.tmp",
            f".fisherop-{'f' * 8}-{'1' * 16}.tmp",
            f".fisherop-{'f' * 8}-{'2' * 16}.tmp",
            ".fisherop-mine.tmp",
        )
    )
    for path in (killed, elsewhere, old, other):
        path.write_text("half")
    os.utime(old, (0, 0))
    with replacing(tmp_path / "a") as file:
        assert not killed.exists() and not old.exists() and elsewhere.exists() and other.exists()
        temporary = pathlib.Path(file.name)
        file.write(b"first")
        with replacing(tmp_path / "b") as second:
            second.write(b"second")
        assert temporary.exists()  # although another was written meanwhile
    assert (tmp_path / "a").read_bytes() == b"first" and (tmp_path / "b").read_bytes() == b"second"
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "a", tmp_path / "b", elsewhere, other])


@POSIX
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """There what others left goes by its age."""
    host = fisherop.atomic._HOST
    young, old = (tmp_path / f".fisherop-{host}-{digit * 16}.tmp" for digit in "01")
    for path in (young, old):
        path.write_text("half")
    os.utime(old, (0, 0))

    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fisherop.atomic.fcntl, "flock", flock)
    with replacing(tmp_path / "a") as file:
        file.write(b"first")
    assert young.exists() and not old.exists() and (tmp_path / "a").read_bytes() == b"first"


@POSIX
def test_a_writer_whose_file_was_taken_for_a_leftover_makes_another(tmp_path, monkeypatch):
    flock, taken = fisherop.atomic.fcntl.flock, []

    def take_first(file, how):
        flock(file, how)
        if not taken:
            taken.append(file.name)
            os.unlink(file.name)

    monkeypatch.setattr(fisherop.atomic.fcntl, "flock", take_first)
    with replacing(tmp_path / "a") as file:
        file.write(b"first")
    assert taken and (tmp_path / "a").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


@POSIX
def test_links_and_permissions_stay(tmp_path, ed):
    (tmp_path / "elsewhere").mkdir()
    target, link, dangling = tmp_path / "elsewhere" / "ed.npz", tmp_path / "link.npz", tmp_path / "dangling.npz"
    link.symlink_to("elsewhere/ed.npz")
    dangling.symlink_to(link)
    umask = os.umask(0o027)
    try:
        ed.save(link)  # of which the target is made
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        for mode in (0o600, 0o664, 0o755):
            target.chmod(mode)
            ed.save(dangling)
            assert stat.S_IMODE(target.stat().st_mode) == mode
    finally:
        os.umask(umask)
    assert link.is_symlink() and dangling.is_symlink() and not target.is_symlink()
    linear().load(link)
    assert len(list(tmp_path.iterdir())) == 3 and list(target.parent.iterdir()) == [target]


def test_paths_that_no_file_can_have(tmp_path, ed):
    with pytest.raises(IsADirectoryError, match="path must be a file's, and this is a folder"):
        ed.save(tmp_path)
    if os.name == "posix":
        with pytest.raises(ValueError, match="but '/dev/null' is a device or a pipe"):
            ed.save("/dev/null")
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(OSError, match="symbolic link"):
            ed.save(tmp_path / "loop")
    with pytest.raises(FileNotFoundError):
        ed.save(tmp_path / "nothing" / "ed.npz")
    name = "x" * 240 + ".npz"
    ed.save(tmp_path / name)
    linear().load(tmp_path / name)


def fields_of(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files if name not in ("format", "checksum")}


def put(path, fields):
    np.savez(path, format=np.array(1), checksum=np.array(_checksum(fields)), **fields)


def test_bombs_cost_nothing(saved):
    """A member that says it is large, compressed or not, is not read."""
    whole = saved.read_bytes()
    header = struct.pack("<6sBBH", b"\x93NUMPY", 1, 0, 118)
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (%d,), }"
    fields = fields_of(saved)
    for name in (*fields, "format", "checksum"):
        for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
            with zipfile.ZipFile(saved, "w") as archive:
                for other in fields.keys() - {name}:
                    with archive.open(f"{other}.npy", "w") as part:
                        np.lib.format.write_array(part, fields[other])
                n = 2**22 if compression == zipfile.ZIP_DEFLATED else 2**50
                info = zipfile.ZipInfo(f"{name}.npy")
                info.compress_type = compression
                with archive.open(info, "w") as part:
                    part.write(header + (text % n).ljust(117) + b"\n" + bytes(n * 8 if n < 2**30 else 0))
                for other in {"format", "checksum"} - {name}:
                    with archive.open(f"{other}.npy", "w") as part:
                        np.lib.format.write_array(part, np.array(1) if other == "format" else np.array("0" * 64))
            tracemalloc.start()
            with pytest.raises(ValueError, match=r"is damaged|is no file of eigendistortions"):
                linear().load(saved)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 2**22
    saved.write_bytes(whole)
    linear().load(saved)


@pytest.mark.parametrize("name", ["eigenvalues", "eigenvectors", "details", "engine_report", "image", "versions"])
def test_more_than_the_image_and_the_number_of_pairs_allow_is_not_read(saved, name, monkeypatch):
    """Stored, with a right checksum: the size alone says that it can't be right."""
    fields = fields_of(saved)
    large = np.zeros(2**20) if fields[name].dtype.kind == "f" else np.full(20_000, "long " * 20)
    if name == "details":
        monkeypatch.setitem(fisherop.fields.RESULT, "details", fisherop.fields.RESULT["details"]._replace(most_bytes=0))
        monkeypatch.setattr(fisherop.fields, "_EACH_PAIR", 64)
        large = np.array(" " * 2**20)
    put(saved, fields | {name: large})
    with monkeypatch.context() as patch:
        patch.setattr(
            fisherop.files, "_array", lambda archive, part: pytest.fail(part) if part == name else array(archive, part)
        )
        with pytest.raises(ValueError, match=f"{name}|an image \\(1048576,\\) of float64, this one is"):
            linear().load(saved)


array = fisherop.files._array


def test_files_that_others_have_packed(saved):
    fields = fields_of(saved)
    everything = {"format": np.array(1), "checksum": np.array(_checksum(fields))} | fields
    np.savez_compressed(saved, **everything)
    with pytest.raises(ValueError, match="compressed, and save compresses nothing"):
        linear().load(saved)
    with zipfile.ZipFile(saved, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for name in (*everything, "eigenvalues"):
            with archive.open(f"{name}.npy", "w") as part:
                np.lib.format.write_array(part, everything[name])
    with pytest.raises(ValueError, match="its parts overlap"):
        linear().load(saved)
    with zipfile.ZipFile(saved, "w") as archive:
        for i in range(60_000):
            archive.writestr(f"{i}", b"")
    with pytest.raises(ValueError, match="directory is not where it should be, or too long"):
        linear().load(saved)


HEADERS = {
    "no end": b"{'descr': '<f8', 'fortran_order': False, 'shape': (",
    "nested": b"(" * 9000,
    "of no type": b"{'descr': 'nothing', 'fortran_order': False, 'shape': (4,), }",
    "of objects": b"{'descr': '|O', 'fortran_order': False, 'shape': (4,), }",
    "huge": b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }",
    "beyond int64": b"{'descr': '<f8', 'fortran_order': False, 'shape': (4, %s), }" % (b"9" * 40),
    "negative": b"{'descr': '<f8', 'fortran_order': False, 'shape': (-2, -2), }",
    "of nothing": b"{'descr': '|V0', 'fortran_order': False, 'shape': (100000000000,), }",
    "no dict": b"{[]: 1}",
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_are_wrong(saved, kind):
    fields = fields_of(saved)
    length = 10240 - 10
    text = HEADERS[kind].ljust(length - 1) + b"\n"
    with zipfile.ZipFile(saved, "w") as archive:
        archive.writestr("eigenvalues.npy", struct.pack("<6sBBH", b"\x93NUMPY", 1, 0, length) + text + bytes(32))
        for name, value in {"format": np.array(1), "checksum": np.array("0" * 64), **fields}.items():
            if name != "eigenvalues":
                with archive.open(f"{name}.npy", "w") as part:
                    np.lib.format.write_array(part, value)
    with pytest.raises(ValueError, match="is damaged"):
        linear().load(saved)


def alterations(name, x):
    """What no `save` writes in this field, and the field that the error may name instead."""
    yield "missing", None
    yield "0-d or not", x[None] if x.ndim == 0 else x.reshape(-1)[0]
    yield "one more dimension", x[..., None]
    if x.dtype.kind == "U":
        yield "bytes", np.char.encode(x, "utf-8")
        yield "numbers", np.zeros(x.shape)
    else:
        yield "complex", x.astype(np.complex64 if x.itemsize == 8 else complex)
        yield "text", x.astype(str)
        yield "float16", x.astype(np.float16)
        yield "other byte order", x.astype(x.dtype.newbyteorder(">"))
        yield "another width", x.astype({"f8": "f4", "f4": "f8", "i8": "i4"}[x.dtype.str[1:]])
    if x.dtype.kind == "f":
        for value in (np.nan, np.inf, -np.inf):
            if not (value == np.inf and name.endswith("bounds")):
                y = x.copy()
                y[(0,) * x.ndim] = value
                yield str(value), y
        if name not in ("image", "response_fingerprint", "eigenvectors"):
            yield "negative", -x - 1
    if x.dtype.kind == "i":
        yield "negative", -1 - x
        yield "huge", x + (2**62)
    if x.ndim and x.shape[0] > 1 and name not in ("image", "versions", "engine_report", "response_shape", "attributes"):
        yield "shorter", x[:-1]
    special = {
        "eigenvalues": lambda: {"ascending": x[::-1]},
        "eigenvectors": lambda: {"twice as long": 2 * x, "one twice": x[:, [0] * x.shape[1]]},
        "eigenindex": lambda: {"unsorted": x[::-1], "in the midst": x + 1, "out of range": x + 1000},
        "tol": lambda: {"zero": x * 0, "above 1": x + 2},
        "noise": lambda: {"above 1": x + 2},
        "lambda_max_bounds": lambda: {"reversed": x[::-1], "below an eigenvalue": x / 2},
        "lambda_min_bounds": lambda: {"reversed": x[::-1]},
        "image_size": lambda: {"another": x + 1},
        "response_size": lambda: {"zero": x * 0},
        "response_shape": lambda: {"another": x + 1, "negative": -x},
        "evidence": lambda: {
            "no JSON": np.array("because"),
            "unknown": np.array('{"source": "hearsay"}'),
            "of a wrong type": np.array('{"source": "krylov", "chance": "small"}'),
            "more": np.array('{"source": "krylov", "why": 1}'),
        },
        "status": lambda: {"unknown": np.full(x.shape, "fine"), "of other letters": np.full(x.shape, "EIGENPAIR")},
        "details": lambda: {
            f"{i}: {text[:25]}": np.array(text)
            for i, text in enumerate(
                ("", "[1]", "{", "[" * 100_000, '{"a":' * 100_000, "1", "9" * 5000, *WRONG_HISTORIES)
            )
        },
        "versions": lambda: {"no version": np.full(x.shape, "torch")},
    }
    yield from special.get(name, dict)().items()


WRONG_HISTORIES = [
    f'{{"history": {entries}}}'
    for entries in (
        "1",
        "[1]",
        '[{"n_products": 1}]',
        '[{"n_products": 1, "largest": [[1], [1, 2]], "smallest": [[], []]}]',
        *(
            f'[{{"n_products": {n}, "largest": [[{value}], [1]], "smallest": [[], []]}}]'
            for wrong in ("NaN", '"1"', "true", "null", "1" * 400)
            for n, value in ((wrong, 1), (1, wrong))
        ),
    )
]
OPTIONAL = {"response_shape", "object", "model", "attributes"}  # which earlier versions left out


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_wrong_field_is_named(tmp_path, dtype):
    """With a right checksum, so that nothing but the field itself can tell."""
    ed = linear(dtype).synthesize("golub_kahan", k=2, rng=0, tol=1e-5, progress=False)
    before, path, seen = ed.result, tmp_path / "ed.npz", 0
    ed.save(path)
    right = fields_of(path) | {"attributes": np.array(["mine"])}
    put(path, right)
    other = linear(dtype).load(path)  # which holds
    assert str(other.result) == str(ed.result)
    for name in right:
        for kind, wrong in alterations(name, right[name]):
            fields = dict(right)
            if wrong is None:
                del fields[name]
                if name in OPTIONAL:
                    continue
            else:
                fields[name] = np.asarray(wrong)
            put(path, fields)
            with pytest.raises(ValueError) as caught:
                ed.load(path)
            message = str(caught.value)
            # an image may be another's, and a count may differ from either side
            partners = {"eigenvalues", "response_shape"} if kind in ("shorter", "another", "0-d or not") else set()
            partners |= {"image_size", "eigenvectors"} if name == "image" else set()
            partners |= {"response_shape"} if name == "response_size" else set()
            assert str(path) in message, (name, kind, message)
            assert any(field in message for field in {name, *partners}), (name, kind, message)
            assert ed.result is before
            seen += 1
    put(path, right | {"more": np.zeros(3)})
    with pytest.raises(ValueError, match="unknown field 'more'"):
        ed.load(path)
    assert seen > 150


def test_what_an_earlier_version_gave_as_ground(saved):
    fields = fields_of(saved)
    evidence = fields.pop("evidence")
    put(saved, fields | {"ground": np.array("extreme Ritz pairs")})
    result = linear().load(saved).result
    assert result.ground == "extreme Ritz pairs" and result.evidence.source == "stated"
    assert json.loads(evidence.item())["source"] == "krylov"


def test_a_status_that_its_numbers_refute(saved):
    fields = fields_of(saved)
    for status, changes in (
        ("eigenpair", {"residual_norms": fields["residual_norms"] + 1}),
        ("null to tol", {}),
    ):
        put(saved, fields | {"status": np.full(4, status)} | changes)
        with pytest.raises(ValueError, match=f"status says '{status}' of pair 0, which its residual or its eigenvalue"):
            linear().load(saved)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_changed_anywhere(saved, ed, data):
    """Loaded as it was, or refused."""
    ed.save(saved)
    whole = bytearray(saved.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    saved.write_bytes(whole)
    other = linear()
    try:
        other.load(saved)
    except ValueError as error:
        assert str(saved) in str(error) and other.result is None
    else:
        np.testing.assert_array_equal(other.result.eigenvectors, ed.result.eigenvectors)
        assert str(other.result) == str(ed.result)


def test_fingerprints_are_those_of_earlier_versions(monkeypatch):
    monkeypatch.setattr(fisherop.files, "_PART", 1000)
    response = torch.linspace(-1, 3, 4567, dtype=torch.float64) ** 3
    rng = np.random.default_rng(256)
    groups, signs = rng.integers(256, size=4567), rng.choice([-1.0, 1.0], 4567)
    expected = np.bincount(groups, signs * response.numpy(), 256)
    np.testing.assert_allclose(fingerprint(response), expected, atol=1e-12)


@pytest.mark.parametrize("order", "CF")
def test_checksums_are_those_of_earlier_versions(order, monkeypatch):
    monkeypatch.setattr(fisherop.files, "_PIECE", 100)
    arrays = {"b": np.asarray(np.random.default_rng(0).standard_normal((30, 7)), order=order), "a": np.array("text")}
    arrays |= {"empty": np.zeros((0, 3)), "ints": np.arange(50)}
    digest = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        digest.update(f"{name} {x.dtype.str} {x.shape}\n".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    assert _checksum(arrays) == digest.hexdigest()


@pytest.mark.parametrize("dtype", [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.slow)])
def test_load_takes_no_more_than_twice_what_it_returns(tmp_path, dtype):
    """In arrays: 3 × 10⁵ pixels, 6 × 10⁵ responses and 4 distortions."""
    n = 300_000
    image = torch.rand(n, dtype=dtype)
    scales = torch.linspace(1, 2, n, dtype=dtype)

    def solver(operator, k, which, **options):
        vectors = np.zeros((n, 4))
        vectors[[n - 1, n - 2, 1, 0], range(4)] = 1
        return np.zeros(4), vectors

    ed = Eigendistortion(image, lambda x: torch.cat([x * scales, 0 * x]))
    ed.synthesize(solver, k=2, progress=False, on_failure="warn", tol=1e-4)
    ed.save(tmp_path / "ed.npz")
    other = Eigendistortion(image, ed.model)
    held = ed.result.eigenvectors.nbytes
    del ed
    tracemalloc.start()
    other.load(tmp_path / "ed.npz")
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held <= now <= 1.1 * held and peak <= 2 * held


def test_long_details(saved, ed):
    """Of a long search; one text is one piece of the file."""
    fields = fields_of(saved)
    details = json.loads(fields["details"].item())
    assert details["restarts"] == ed.result.details["restarts"]
    put(saved, fields | {"details": np.array(json.dumps(details | {"more": "x" * 10**6}))})
    assert len(linear().load(saved).result.details["more"]) == 10**6


def test_another_jacobian_with_the_same_response_is_refused(tmp_path):
    path, x = tmp_path / "ed.npz", torch.zeros(1, 6, dtype=torch.float64)
    model, other = nn.Linear(6, 5).double(), nn.Linear(6, 5).double()
    other.bias.data = model.bias.data.clone()  # all of the response at zero
    Eigendistortion(x, model).synthesize(progress=False, rng=0).save(path)
    ed = Eigendistortion(x, other)
    with pytest.raises(ValueError, match="of another model: ‖J v‖² is"):
        ed.load(path)
    assert ed.result is None and Eigendistortion(x, model).load(path).result is not None


@pytest.mark.parametrize("size", [1e-170, 1e160, 1e300])
def test_responses_whose_squares_leave_the_range(tmp_path, size):
    """A large offset, and a moderate J."""
    gains, offset = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), torch.tensor(size, dtype=torch.float64)

    def model(x):
        return torch.cat([gains * x, offset[None] + 0 * x[:1]])

    ed = Eigendistortion(torch.ones(3, dtype=torch.float64), model).synthesize(progress=False)
    ed.save(tmp_path / "ed.npz")
    found = Eigendistortion.from_file(tmp_path / "ed.npz", model)
    np.testing.assert_array_equal(found.eigenvalues, ed.eigenvalues)
    with pytest.raises(ValueError, match="another model"):
        Eigendistortion.from_file(tmp_path / "ed.npz", lambda x: 2 * model(x))
