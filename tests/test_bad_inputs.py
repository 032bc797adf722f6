"""Bad input to the whole public API: what each gets, as bad_inputs.txt has it, and that nothing is changed by it.

Each line of that file is a call, ``=>``, and what it gets: an error and its message, in which ``...`` stands for what
differs from version to version; a warning; or "right", where the input isn't bad.
"""

import fnmatch
import importlib.util
import pathlib
import re
import warnings

import pytest
from inputs import everything, prepared
from matplotlib import pyplot
from unharmed import same

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # PyTorch's own
TABLE = pathlib.Path(__file__).with_name("bad_inputs.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("bad"))


def attempt(expression, names):
    """What a call gets, in the words of the table."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            eval(expression, dict(names))
        except Exception as error:
            return f"{type(error).__name__}: {error}".replace(names["D"], "D").replace("\n", " | ")
        finally:
            pyplot.close("all")
    caught = [w for w in caught if "requires_grad=True to a scalar" not in str(w.message)]
    return f"{caught[0].category.__name__}: {caught[0].message}" if caught else "right"


@pytest.mark.parametrize("line", TABLE, ids=[f"{number}: {line[:50]}" for number, line in enumerate(TABLE)])
def test_bad_input(line, names):
    expression, expected = line.split("  => ")
    if "'primme'" in expected and importlib.util.find_spec("primme") and expected.startswith("ModuleNotFoundError"):
        pytest.skip("PRIMME is installed")
    before = everything(names)
    got = attempt(expression, names)
    pattern = fnmatch.translate(re.sub(r"([\[\]*?])", r"[\1]", expected).replace("...", "*"))
    assert re.match(pattern, got), f"{expression}\n     got {got}\nexpected {expected}"
    after = everything(names)
    assert after.rest == before.rest
    assert all(same(after.tensors[path], tensor) for path, tensor in before.tensors.items())


def test_all_are_here():
    """The 371 inputs of the study, each of a kind, in its order."""
    assert len(TABLE) >= 371
