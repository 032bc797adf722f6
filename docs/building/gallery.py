"""The tutorials: how sphinx-gallery runs `examples/`, in which order, and where it finds their figures."""

import pathlib
import shutil

from sphinx_gallery.scrapers import figure_rst
from tqdm.auto import tqdm

import fisherop.progress
import fisherop.several_models
import fisherop.sweeps

ORDER = [
    "quickstart",
    "tutorial_linear",
    "tutorial_resnet",
    "berardino",
    "principal_distortions",
    "noise_models",
    "restricted",
    "universal_distortion",
    "spectrum",
    "study",
    "scipy_solvers",
    "sparse_matrix",
]


class Order:
    """Of the files in a folder: as in ORDER, and what is not there at the end."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, filename):
        stem = pathlib.Path(filename).stem
        return (ORDER.index(stem) if stem in ORDER else len(ORDER)), stem


def saved(block, block_vars, gallery_conf):
    """Show the figures that a block saved, below it: an example saves them in the working directory, its own folder."""
    paths = block_vars["image_path_iterator"]
    written = sorted(pathlib.Path(block_vars["src_file"]).parent.glob("*.png"), key=lambda p: p.stat().st_mtime_ns)
    shown = []
    for one, place in zip(written, paths, strict=False):
        shutil.move(one, place)
        shown.append(place)
    return figure_rst(shown, gallery_conf["src_dir"])


def clean(gallery_conf, fname):
    """Remove what an example left, so that each begins as in a folder of its own, and show no progress bars."""
    examples = pathlib.Path(gallery_conf["src_dir"]).parent / "examples"
    for one in examples.glob("*.png"):
        one.unlink()
    for name in ("study", "stimuli"):
        shutil.rmtree(examples / name, ignore_errors=True)
    for one in ("study.html", "study.csv"):
        (examples / one).unlink(missing_ok=True)
    for module in (fisherop.progress, fisherop.several_models, fisherop.sweeps):
        module.tqdm = quiet


def quiet(*args, disable=False, **options):
    """A progress bar that isn't shown: on a page nobody waits."""
    return tqdm(*args, disable=True, **options)


def settings(docs):
    return {
        "examples_dirs": [str(docs.parent / "examples")],
        "gallery_dirs": [str(docs / "tutorials")],
        "ignore_pattern": r"(^|/)networks\.py$",
        "filename_pattern": "/",
        "within_subsection_order": "building.gallery.Order",
        "image_scrapers": ("building.gallery.saved",),
        "reset_modules": ("matplotlib", "building.gallery.clean"),
        "reset_modules_order": "both",
        "abort_on_example_error": False,
        "capture_repr": (),
        "download_all_examples": False,
        "show_signature": False,
        "show_memory": False,
        "min_reported_time": 1e9,
        "write_computation_times": False,
        "remove_config_comments": True,
        "notebook_images": False,
        "plot_gallery": "True",
    }
