"""The order of imports, and everything that the README and the examples promise to run."""

import ast
import configparser
import doctest
import importlib
import inspect
import os
import pathlib
import pydoc
import re
import subprocess
import sys

import pytest
import torch

import fisherop
import fisherop.combinators
import fisherop.curves
import fisherop.density
import fisherop.eigendistortion
import fisherop.images
import fisherop.jacobian
import fisherop.noise
import fisherop.plot
import fisherop.spaces
import fisherop.stimuli
import fisherop.testing
import fisherop.webpage

ROOT = pathlib.Path(__file__).parents[1]
ORDER = [
    "checks",
    "markup",
    "pictures",
    "jacobian",
    "model.compat",
    "model.undisturbed",
    "model.sparse",
    "model.duals",
    "model.engines.nodes",
    "model.engines.places",
    "model.engines.writes",
    "model.engines.tape",
    "model.engines.kernels",
    "model.engines.simplify",
    "model.engines.lower",
    "model.engines.compact",
    "model.engines.reuse",
    "model.engines.plain",
    "model.engines.traced",
    "model.engines",
    "model.draws",
    "model.guard",
    "model.response",
    "model.promoted",
    "model.slopes",
    "model.contents",
    "model.programs",
    "model.trial",
    "model.current",
    "model.build",
    "model.pickles",
    "model.linearize",
    "from_operator",
    "combinators",
    "pooled",
    "models",
    "noise",
    "spaces",
    "basis",
    "model.layers",
    "model.identity",
    "model.recipe",
    "model",
    "observed",
    "on_workers",
    "by_rows",
    "operators",
    "density",
    "result",
    "sample",
    "certificate",
    "krylov.orthogonalize",
    "krylov.bounds",
    "krylov.lanczos",
    "krylov.search",
    "krylov.pencil",
    "krylov.several",
    "krylov.box",
    "krylov",
    "solvers.ends",
    "solvers",
    "progress",
    "advice",
    "solve",
    "triplets",
    "spectrum",
    "several_models",
    "principal",
    "atomic",
    "fields",
    "files",
    "checkpoint",
    "thresholds",
    "distortions",
    "eigendistortion",
    "tasks",
    "plans",
    "sweeps",
    "stimuli",
    "images",
    "printing",
    "panels",
    "curves",
    "webpage",
    "plot",
    "plenoptic_files",
    "plenoptic",
    "testing",
]
MAY_IMPORT_MATPLOTLIB = {"printing", "panels", "curves", "plot", "plenoptic", "images"}  # the last for its photograph


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = [p for p in sorted((ROOT / "fisherop").rglob("*.py")) if p != ROOT / "fisherop" / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for name in imports(path):
        if name.startswith("fisherop."):
            assert place(name) < place(own) or (own == "fisherop.solvers" and name.startswith(own)), f"{own} <- {name}"
        assert name.split(".")[0] != "matplotlib" or ORDER[place(own)] in MAY_IMPORT_MATPLOTLIB, f"{own} <- {name}"


def place(name):
    """Of the longest name in ORDER that a module's name begins with."""
    parts = name.split(".")[1:]
    return next(ORDER.index(".".join(parts[:i])) for i in range(len(parts), 0, -1) if ".".join(parts[:i]) in ORDER)


def test_the_number_of_the_version_is_one():
    for place, pattern in [
        ("CITATION.cff", r"^version: (.*)$"),
        ("docs/conda-recipe/meta.yaml", r'^{% set version = "(.*)" %}$'),
        ("CHANGELOG.md", r"^## ([\d.]+)"),
    ]:
        text = (ROOT / place).read_text(encoding="utf-8")
        assert re.findall(pattern, text, re.M)[0] == fisherop.__version__, place


def test_the_recipe_needs_what_setup_needs():
    """Of conda's packages, which have names of their own, the same versions."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = {line.replace(">=", " >=") for line in config["options"]["install_requires"].split()}
    wanted |= {f"python {config['options']['python_requires']}"}
    names = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
    recipe = (ROOT / "docs" / "conda-recipe" / "meta.yaml").read_text(encoding="utf-8")
    (run,) = re.findall(r"^  run:\n((?:    - .*\n)+)", recipe, re.M)
    found = {line.removeprefix("    - ") for line in run.splitlines()}
    assert {" ".join([names.get(line.split()[0], line.split()[0]), *line.split()[1:]]) for line in found} == wanted


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def public():
    """Public names, and the methods and properties that their classes define."""
    modules = [fisherop, fisherop.images, fisherop.plot, fisherop.testing, fisherop.jacobian]
    modules += [
        fisherop.combinators,
        fisherop.models,
        fisherop.noise,
        fisherop.spaces,
        fisherop.curves,
        fisherop.density,
        fisherop.stimuli,
        fisherop.webpage,
    ]
    for module in modules:
        for name, value in vars(module).items():
            own = (
                name in fisherop.__all__ if module is fisherop else getattr(value, "__module__", "") == module.__name__
            )
            if name.startswith("_") or not own or not callable(value):
                continue
            yield f"{module.__name__}.{name}"
            inherited = dir(value.__base__) if isinstance(value, type) else ()  # so is their description
            for attribute, kind in vars(value).items() if isinstance(value, type) else ():
                is_own = not attribute.startswith("_") and attribute not in inherited
                if is_own and (inspect.isfunction(kind) or isinstance(kind, property)):
                    yield f"{module.__name__}.{name}.{attribute}"


@pytest.mark.parametrize("name", sorted(public()))
def test_docstrings_are_numpydoc(name):
    """Every public name has one; parameters, where it has a section of them, are all there, and in order."""
    validate = pytest.importorskip("numpydoc.validate", reason="numpydoc is not installed").validate
    wanted = {"GL01", "GL02", "GL03", "GL05", "GL06", "GL07", "GL08", "SS03", "SS04", "PR02", "PR03", "PR05"}
    wanted |= {"PR08", "PR09", "PR10", "RT04", "RT05", "YD01"}
    wanted |= {"PR01"} if "\n    Parameters\n" in (pydoc.locate(name).__doc__ or "") else set()
    found = [f"{code}: {text}" for code, text in validate(name)["errors"] if code in wanted]
    assert not found


def run(script, cwd):
    """Run Python code as a user would, with warnings as errors."""
    filters = ["-W", "error", "-W", "ignore:`torch.jit.script` is deprecated"]
    env = os.environ | {"MPLBACKEND": "agg"}
    done = subprocess.run([sys.executable, *filters, *script], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_matplotlib(tmp_path):
    out = run(["-c", "import sys, fisherop; print([m for m in sys.modules if m.startswith('matplotlib')])"], tmp_path)
    assert out.strip() == "[]"


def test_modules_load_when_they_are_first_used(tmp_path):
    code = "import fisherop; print([getattr(fisherop, m).__name__ for m in ('plot', 'images', 'testing', 'plenoptic')])"
    assert "'fisherop.plot', 'fisherop.images', 'fisherop.testing', 'fisherop.plenoptic'" in run(["-c", code], tmp_path)
    with pytest.raises(AttributeError, match="module 'fisherop' has no attribute 'plots'"):
        fisherop.plots  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_module_is_shadowed_by_a_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert importlib.import_module(name) is sys.modules[name]
    parent, _, own = name.rpartition(".")
    assert getattr(sys.modules[parent], own) is sys.modules[name]


def test_the_example_of_a_docstring():
    assert doctest.testmod(fisherop.eigendistortion, raise_on_error=True).attempted >= 4


EXAMPLES = [p for p in sorted((ROOT / "examples").glob("*.py")) if p.name != "networks.py"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.name != "tutorial_linear.py" else []) for p in EXAMPLES],
)
def test_examples(path, tmp_path):
    out = run([str(path)], tmp_path)
    announced = re.findall(r"[\w]+\.png", out)
    assert announced and {p.name for p in tmp_path.glob("*.png")} == set(announced)
    assert all((tmp_path / name).stat().st_size > 5000 for name in announced)
    if path.name == "quickstart.py":
        assert "eigenpairs of F (19200 × 19200), J is 38400 × 19200" in out
        assert len(re.findall(r"^ +\d+ .* (eigenpair|null to tol)$", out, re.MULTILINE)) == 4


@pytest.mark.parametrize(("name", "own"), [("resnet18", "ResNet18"), ("vgg16", "VGG16Features")])
def test_networks_take_the_weights_of_torchvision(name, own, monkeypatch):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is an optional neighbour")
    monkeypatch.syspath_prepend(ROOT / "examples")
    networks = importlib.import_module("networks")
    theirs, ours = getattr(torchvision.models, name)().eval(), getattr(networks, own)().eval()
    state = {key: value for key, value in theirs.state_dict().items() if own == "ResNet18" or "features" in key}
    ours.load_state_dict(state)
    image = torch.rand(1, 3, 64, 64)
    expected = theirs(image) if own == "ResNet18" else theirs.features(image)
    assert torch.equal(ours(image), expected)


def test_networks_have_the_published_size(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    networks = importlib.import_module("networks")
    own = {name: getattr(networks, name)() for name in ("ResNet18", "VGG16Features")}
    sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in own.items()}
    assert sizes == {"ResNet18": 11_689_512, "VGG16Features": 14_714_688}
    assert networks.ResNet18().eval()(torch.rand(1, 3, 40, 40)).shape == (1, 1000)


def python_of(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.S | re.M)


def test_readme_code(tmp_path):
    """All of the README's Python, top to bottom, as one script."""
    blocks = python_of(ROOT / "README.md")
    assert len(blocks) >= 2
    run(["-c", "\n".join(blocks)], tmp_path)


def test_the_reference_has_every_public_name():
    pages = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "reference").glob("*.rst"))
    described = set(re.findall(r"^\.\. auto(?:class|function|exception):: ([\w.]+)", pages, re.M))
    described = {name.rpartition(".")[2] for name in described}
    wanted = set(fisherop.__all__) | set(fisherop.plot.__all__)
    for name in fisherop._MODULES:
        module = importlib.import_module(f"fisherop.{name}")
        wanted |= {
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and callable(value) and getattr(value, "__module__", "") == module.__name__
        }
    assert wanted <= described


START = ROOT / "docs" / "start.md"
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if python_of(p)]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.relative_to(ROOT / "docs").as_posix(), marks=[pytest.mark.slow] if p != START else [])
        for p in PAGES
    ],
)
def test_code_of_the_site(path, tmp_path):
    """A page's Python, top to bottom, after the block of the start page that makes `image`, `model` and `ed`."""
    blocks = python_of(path) if path == START else [python_of(START)[0], *python_of(path)]
    run(["-c", "\n".join(blocks)], tmp_path)
