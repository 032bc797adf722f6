"""The tests of SciPy, PyLops and plenoptic, by their authors, on the objects of this library in the place of theirs.

SciPy's are those of scipy.sparse.linalg in the SciPy that is installed: the interface, ARPACK, LOBPCG, svds, PROPACK,
lsqr, lsmr, minres and the other iterative solvers, expm_multiply and onenormest. Wherever SciPy turns a real matrix of
float32 or float64 into a LinearOperator, it gets the `JacobianOperator` of the linear model of that matrix; in a second
row, where the matrix A is positive semidefinite, the `FisherOperator` of B, where A = BᵀB. In PyLops' tests a
`JacobianOperator` stands for `MatrixMult`, and in plenoptic's of eigendistortions `fisherop.plenoptic` for plenoptic.

Only tests in which an object of this library was made are counted. Those that fail are run once more on the peer's own
operators, without their matrix and in its dtype: what fails there as well asks for one of the two. Every suite runs in
a process of its own, so that a crash is a failure of the test that was running, and the rest go on. Prints a Markdown
table; half an hour on 2 cores, most of it for SciPy's iterative solvers.

    pip download --no-deps --no-binary pylops,plenoptic --dest FOLDER pylops plenoptic
    python benchmarks/peers.py --sources FOLDER

PyLops' and plenoptic's tests are in their source distributions only, of the versions that are installed. Names of
suites as arguments choose among them. pytest is needed throughout, and for plenoptic's tests timm.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.linalg as sla
import torch
from torch import nn

from fisherop import Eigendistortion, FisherOperator, JacobianOperator

SCIPY_TESTS = [
    "tests/test_interface.py",
    "_eigen/arpack/tests/test_arpack.py",
    "_eigen/lobpcg/tests/test_lobpcg.py",
    "_eigen/tests/test_svds.py",
    "tests/test_propack.py",
    "_isolve/tests",
    "tests/test_expm_multiply.py",
    "tests/test_onenormest.py",
]
SUITES = {  # by name: the peer, and in whose place what stands
    "scipy-jacobian": ("scipy", "SciPy, J"),
    "scipy-fisher": ("scipy", "SciPy, F"),
    "pylops": ("pylops", "PyLops, J"),
    "plenoptic": ("plenoptic", "plenoptic, `Eigendistortion`"),
}
MENTION = {"pylops": "MatrixMult("}  # in the tests that are worth a run
TIMEOUT = 3600  # seconds for a suite
LIMIT = 30  # seconds of CPU time for a test: some go on for minutes where their tolerance is out of float32's reach
MAX_ELEMENTS = 4_000_000  # of a matrix that is replaced

made = 0  # how many objects of this library stood in for a peer's


class Linear(nn.Module):
    """y = A x, in a form that pickles."""

    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.tensor(matrix))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.matrix @ x


def real_matrix(A: Any) -> np.ndarray | None:
    """A as an array, if it is a finite matrix of float32 or float64; else None."""
    if not (isinstance(A, np.ndarray) or scipy.sparse.issparse(A)) or A.ndim != 2 or 0 in A.shape:
        return None
    if A.dtype not in (np.float32, np.float64) or A.shape[0] * A.shape[1] > MAX_ELEMENTS:
        return None
    dense = np.array(A.toarray() if scipy.sparse.issparse(A) else A, order="C")
    return dense if np.isfinite(dense).all() else None


def jacobian_of(A: Any) -> JacobianOperator | None:
    """The operator J = A of a linear model, if A is a real matrix; else None."""
    matrix = real_matrix(A)
    return None if matrix is None else operator_of(JacobianOperator, matrix)


def fisher_of(A: Any) -> FisherOperator | None:
    """The operator F = BᵀB = A of a linear model, if A is a real, positive semidefinite matrix; else None."""
    matrix = real_matrix(A)
    if matrix is None or matrix.shape[0] != matrix.shape[1] or not np.array_equal(matrix, matrix.T):
        return None
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    if values[0] < -len(values) * np.finfo(np.float64).eps * values[-1]:
        return None
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    return operator_of(FisherOperator, root.astype(matrix.dtype))


def operator_of(kind: type, matrix: np.ndarray) -> Any:
    global made
    made += 1
    return kind(torch.zeros(matrix.shape[1], dtype=torch.from_numpy(matrix).dtype), Linear(matrix))


# %% In the place of what stands what; each returns the files to test, of which the first is the folder of them all


def replace(package: str, original: Any, new: Any) -> None:
    """Wherever a module of this package holds the original under any name, it holds the new one."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(package + "."):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    setattr(module, attribute, new)


def prepare_scipy(convert: Callable[[Any], Any], theirs: bool, source: str, folder: pathlib.Path) -> list[str]:
    original, lobpcg = sla.aslinearoperator, sla.lobpcg

    def ours(A: Any) -> Any:
        if theirs:  # of ours, nothing is made that could fail
            return A if real_matrix(A) is None else in_its_own_dtype(A)
        operator = convert(A)
        return A if operator is None else operator

    @functools.wraps(original)
    def aslinearoperator(A: Any) -> Any:
        return original(ours(A))

    @functools.wraps(lobpcg)
    def lobpcg_on_ours(A: Any, X: Any, B: Any = None, M: Any = None, *args: Any, **kwargs: Any) -> Any:
        return lobpcg(ours(A), X, ours(B), ours(M), *args, **kwargs)  # it never calls aslinearoperator

    replace("scipy", original, aslinearoperator)
    replace("scipy", lobpcg, lobpcg_on_ours)
    return [os.path.dirname(scipy.__file__), *(os.path.join(os.path.dirname(sla.__file__), t) for t in SCIPY_TESTS)]


def in_its_own_dtype(A: Any) -> sla.LinearOperator:
    """SciPy's operator of a matrix, that like ours multiplies in the matrix' dtype, whatever the vector's."""

    def times(matrix: Any) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: matrix @ x.astype(A.dtype)

    return sla.LinearOperator(A.shape, times(A), rmatvec=times(A.T), matmat=times(A), rmatmat=times(A.T), dtype=A.dtype)


def prepare_pylops(theirs: bool, source: str, folder: pathlib.Path) -> list[str]:
    import pylops

    original = pylops.MatrixMult

    def matrix_mult(A: Any, otherdims: Any = None, *args: Any, **kwargs: Any) -> Any:
        operator = jacobian_of(A) if otherdims is None and not args and set(kwargs) <= {"dtype"} else None
        if operator is None:
            return original(A, otherdims, *args, **kwargs)
        # theirs without its matrix, too, which PyLops uses where it can see it
        return pylops.LinearOperator(original(A, **kwargs) if theirs else operator, explicit=False)

    pylops.MatrixMult = pylops.basicoperators.MatrixMult = matrix_mult
    shutil.copytree(next(pathlib.Path(source).glob("*/pytests")), folder / "pytests")
    files = sorted((folder / "pytests").glob("test_*.py"))
    return [str(folder), *(str(path) for path in files if MENTION["pylops"] in path.read_text(encoding="utf-8"))]


def prepare_plenoptic(theirs: bool, source: str, folder: pathlib.Path) -> list[str]:
    import plenoptic
    import timm
    from PIL import Image

    for path in next(pathlib.Path(source).glob("*/tests/conftest.py")).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "test_eigendistortion.py" and not theirs:
            text = text.replace("import plenoptic as po\n", "import fisherop.plenoptic as po\n")
        if path.name in ("test_eigendistortion.py", "conftest.py", "utils.py"):
            (folder / path.name).write_text(text, encoding="utf-8")
    # Their images and a network's weights are downloads: plenoptic's own images do, and no test needs the network
    photograph, wheel = (image[0].movedim(0, -1) for image in (plenoptic.data.einstein(), plenoptic.data.color_wheel()))
    (folder / "256").mkdir()
    for name, image in (("einstein.pgm", photograph), ("curie.pgm", photograph.flip(0)), ("color_wheel.jpg", wheel)):
        Image.fromarray((255 * image).byte().numpy().squeeze()).save(folder / "256" / name)
    plenoptic.data.fetch_data = lambda name: folder
    timm.create_model = lambda *args, **kwargs: None
    count_objects(Eigendistortion)
    return [str(folder), str(folder / "test_eigendistortion.py")]


def count_objects(kind: type) -> None:
    """Let the objects of this kind count as made."""
    original = kind.__init__

    @functools.wraps(original)
    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        global made
        made += 1
        original(self, *args, **kwargs)

    kind.__init__ = counted


PREPARE = {
    "scipy-jacobian": functools.partial(prepare_scipy, jacobian_of),
    "scipy-fisher": functools.partial(prepare_scipy, fisher_of),
    "pylops": prepare_pylops,
    "plenoptic": prepare_plenoptic,
}


# %% A process of its own for each suite


def give_up(*args: Any) -> None:
    raise TimeoutError(f"not done after {LIMIT} s of CPU time")


class Recorder:
    """A pytest plugin: runs the tests wanted, and writes a line when one begins and when it has ended."""

    def __init__(self, path: str, wanted: Iterable[str] | None, done: Iterable[str], mention: str) -> None:
        self.path, self.wanted, self.done, self.mention = path, wanted, set(done), mention
        self.outcome, self.reason = "passed", ""

    def write(self, **line: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_modifyitems(self, items: list) -> None:
        def is_due(item: Any) -> bool:
            wanted = (
                self.mention in inspect.getsource(item.function) if self.wanted is None else item.nodeid in self.wanted
            )
            return wanted and item.nodeid not in self.done

        items[:] = filter(is_due, items)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome, self.reason, self.made = "passed", "", made
        self.write(test=nodeid)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed" and self.outcome != "failed":
            self.outcome, self.reason = report.outcome, str(getattr(report, "longreprtext", ""))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.write(test=nodeid, outcome=self.outcome, reason=self.reason, ours=made > self.made)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.write(test=report.nodeid, outcome="failed", reason=str(report.longreprtext), ours=True)


def work(job: dict) -> None:
    """What a process does: put our objects in the place of the peer's, then run its tests."""
    import pytest

    signal.signal(signal.SIGPROF, give_up)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "pytest.ini").write_text("[pytest]\n")  # and not this project's or the peer's
        root, *files = PREPARE[job["suite"]](job["theirs"], job["source"], folder)
        recorder = Recorder(job["path"], job["wanted"], job["done"], MENTION.get(job["suite"], ""))
        options = ["-q", "-p", "no:cacheprovider", "-c", str(folder / "pytest.ini"), "--rootdir", root]
        pytest.main([*options, *files], plugins=[recorder])


def run(suite: str, source: str, *, theirs: bool = False, wanted: list[str] | None = None) -> dict[str, dict]:
    """Each test's outcome, by its name. After a crash, the process begins anew with the tests that come after."""
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        path = os.path.join(name, "results")
        while True:
            job = {"suite": suite, "source": source, "theirs": theirs, "wanted": wanted, "done": list(results)}
            pathlib.Path(path).write_text("")
            pathlib.Path(path + ".job").write_text(json.dumps(job | {"path": path}))  # too long for an argument
            command = [sys.executable, __file__, "--job", path + ".job"]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT)
                how, output = f"process ended with {done.returncode}", done.stdout.decode(errors="replace")
            except subprocess.TimeoutExpired:
                how, output = f"not done after {TIMEOUT} s", ""
            before = len(results)
            with open(path, encoding="utf-8") as file:
                for line in map(json.loads, file):
                    results[line["test"]] = {"outcome": "crashed", "reason": how, "ours": True} | line
            if len(results) == before and not results:
                results["(no test)"] = {"outcome": "failed", "reason": f"{how}: {output[-2000:]}", "ours": True}
            if len(results) == before or results[list(results)[-1]]["outcome"] != "crashed":
                return results


# %% The table


def sources(folder: str | None, peer: str, unpacked: str) -> str | None:
    """Where the source distribution of this peer, in the version that is installed, is unpacked; None without one."""
    version = importlib.metadata.version(peer)
    for path in pathlib.Path(folder or ".").glob(f"{peer}-{version}.tar.gz"):
        with tarfile.open(path) as archive:
            archive.extractall(os.path.join(unpacked, peer), filter="data")
        return os.path.join(unpacked, peer)
    return None


def names(tests: Iterable[str]) -> str:
    """The names of tests without folders and parameters, with how many of each."""
    counts = collections.Counter(test.split("::", 1)[-1].split("[")[0].replace("::", ".") for test in tests)
    return ", ".join(f"`{name}`" + (f" × {count}" if count > 1 else "") for name, count in counts.items())


def row(suite: str, source: str, verbose: bool) -> str:
    peer, title = SUITES[suite]
    results = {test: result for test, result in run(suite, source).items() if result["ours"]}
    by_outcome = {
        outcome: [test for test, result in results.items() if result["outcome"] == outcome]
        for outcome in ("passed", "failed", "skipped", "crashed")
    }
    bad = by_outcome["failed"] + by_outcome["crashed"]
    own = run(suite, source, theirs=True, wanted=bad) if bad else {}
    also = [test for test in bad if own.get(test, {}).get("outcome") in ("failed", "crashed")]
    for test in bad if verbose else ():
        print(f"--- {test}\n{results[test]['reason'][-3000:]}\n", file=sys.stderr)
    failures = names(test for test in by_outcome["failed"] if test not in also)
    if by_outcome["crashed"]:
        failures += f"; **crashed**: {names(by_outcome['crashed'])}"
    passed, failed, skipped = (len(by_outcome[key]) for key in ("passed", "failed", "skipped"))
    failed += len(by_outcome["crashed"])
    return (
        f"| {title} ({importlib.metadata.version(peer)}) | {passed} of {passed + failed} | {failed - len(also)} | "
        f"{len(also)}{': ' + names(also) if also else ''} | {skipped} | {failures} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}; by default all")
    parser.add_argument("--sources", metavar="FOLDER", help="holds the source distributions, as tar.gz")
    parser.add_argument("--verbose", action="store_true", help="the end of each failure's report, on stderr")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return work(json.loads(pathlib.Path(args.job).read_text()))
    if unknown := set(args.suites) - set(SUITES):
        parser.error(f"there is no suite {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    print("| suite | passed | failed | failed on the peer's own objects, too | skipped | failures |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as unpacked:
        for suite in args.suites or SUITES:
            peer, title = SUITES[suite]
            if importlib.util.find_spec(peer) is None:
                print(f"| {title} | not installed | | | | |", flush=True)
            elif peer != "scipy" and not sources(args.sources, peer, unpacked):
                print(f"| {title} ({importlib.metadata.version(peer)}) | no source distribution | | | | |", flush=True)
            else:
                print(row(suite, os.path.join(unpacked, peer), args.verbose), flush=True)


if __name__ == "__main__":
    main()
