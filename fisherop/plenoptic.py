"""plenoptic's names for what is here: ``import fisherop.plenoptic as po`` in the place of ``import plenoptic as po``.

The eigendistortions and their figures are fisherop's; every other name is looked up in plenoptic, which has to be
installed for those alone. docs/from_plenoptic.md says what differs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import fisherop.eigendistortion
from fisherop import checks
from fisherop.panels import Panel, draw
from fisherop.pictures import short, to_pictures, value_range
from fisherop.plenoptic_files import LoadWarning, examine, is_torchs, load_checked
from fisherop.printing import PrintFigure
from fisherop.result import EigenResult


class Eigendistortion(fisherop.eigendistortion.Eigendistortion):
    """`fisherop.Eigendistortion`, but a `synthesize` that does not converge warns, so that a script goes on.

    `load` takes the arguments of plenoptic's and checks what it checks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._built_in = frozenset(vars(self)) | {"_built_in"}

    def synthesize(self, *args: Any, on_failure: str = "warn", **kwargs: Any) -> Eigendistortion:
        super().synthesize(*args, on_failure=on_failure, **kwargs)
        return self

    def save(self, file_path: str | os.PathLike) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`fisherop.Eigendistortion.save`; of attributes that you added the names are saved, not the values."""
        super().save(checks.path("file_path", file_path))

    def _fields(self) -> dict[str, Any]:
        return super()._fields() | {"attributes": np.array(sorted(self._added()), dtype=str)}

    def _added(self) -> set[str]:
        return set(vars(self)) - self._built_in

    def load(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        file_path: str | os.PathLike,
        map_location: str | torch.device | None = None,
        raise_on_checks: bool = True,
        tensor_equality_atol: float = 1e-8,
        tensor_equality_rtol: float = 1e-5,
    ) -> Eigendistortion:
        """Take the result that `save` wrote, for the same image and model.

        Parameters
        ----------
        file_path : str or path-like
        map_location : str or torch.device, optional
            The device that the image must be on. What is loaded goes there with or without it, since a file holds no
            device.
        raise_on_checks : bool
            If False, a check that fails warns: the image is then the file's, and the model stays this object's. Where
            the model's response differs, the pairs are certified anew by its products, and `result` says what holds.
            Another device or dtype is an error all the same.
        tensor_equality_atol, tensor_equality_rtol : float
            The image may differ from the file's by ``atol + rtol |x|`` in each element x. The response, of which the
            file holds a fingerprint alone, may differ from the file's y by atol √M + rtol ‖y‖ in norm.

        Returns
        -------
        Eigendistortion
            Itself.

        Raises
        ------
        ValueError
            There is a result already; the file is damaged or of another kind; or the type of the object, its
            attributes, the image, or the model's response or name are others. The object is unchanged.

        Warns
        -----
        io.LoadWarning
            As above, with ``raise_on_checks=False``.
        """
        checks.flag("raise_on_checks", raise_on_checks)
        if self.result is not None:
            raise ValueError(
                "load can only be called with a just-initialized Eigendistortion object, and this one has a result: "
                "make another, or use Eigendistortion.from_file(path, model)"
            )
        operator, result = load_checked(
            self,
            checks.path("file_path", file_path),
            map_location,
            None if raise_on_checks else io.LoadWarning,
            tensor_equality_atol,
            tensor_equality_rtol,
            self._added(),
        )
        self.operator, self.result, self._state = operator, result, {}
        return self

    @property
    def _representation_flat(self) -> Tensor:
        """The response, shape (M, 1), by the name at which plenoptic's own tests look."""
        return self.operator.linearization.response.reshape(-1, 1)


def display_eigendistortion(
    eigendistortion: fisherop.eigendistortion.Eigendistortion,
    eigenindex: int = 0,
    alpha: float = 5.0,
    process_image: Callable[[Tensor], Tensor] | None = None,
    ax: Axes | None = None,
    *,
    as_rgb: bool | None = None,
    channel_idx: int | None = None,
    zoom: int | None = None,
    vrange: tuple[float, float] | None = None,
) -> Figure:
    """Show the image plus a scaled eigendistortion.

    Parameters
    ----------
    eigendistortion : Eigendistortion
        After `synthesize`.
    eigenindex : int
        Rank among all N: 0 for the most noticeable, −1 or N − 1 for the least.
    alpha : float
        The distortion's norm, in the image's units.
    process_image : callable, optional
        Makes of the image, with or without distortion and of its shape, on the CPU, what is shown, such as by undoing
        a normalization.
    as_rgb, channel_idx, zoom, vrange, ax
        As in `fisherop.plot.imshow`; `vrange` by default of the image alone.

    Returns
    -------
    Figure
        One of pyplot's, so that a notebook shows it.

    Raises
    ------
    ValueError
        This eigendistortion has not been synthesized, or as in `imshow`.
    """
    show = _Shown(eigendistortion, process_image, None, as_rgb, channel_idx, vrange)
    return draw([show.sum(eigenindex, alpha)], zoom=zoom, ax=ax, new_figure=_pyplots)


def display_eigendistortion_all(
    eigendistortion: fisherop.eigendistortion.Eigendistortion,
    eigenindex: int | Sequence[int] = (0, -1),
    alpha: float | Sequence[float] = 5.0,
    process_image: Callable[[Tensor], Tensor] | None = None,
    process_distortion: Callable[[Tensor], Tensor] | None = None,
    as_rgb: bool | None = None,
    channel_idx: int | None = None,
    suptitle: str = "Eigendistortions",
    *,
    zoom: int | None = None,
    vrange: tuple[float, float] | None = None,
) -> Figure:
    """Show eigendistortions alone, above, and, below, the image and the image plus each of them.

    Parameters
    ----------
    eigendistortion : Eigendistortion
        After `synthesize`.
    eigenindex : int or sequence of int
        Ranks among all N: 0 for the most noticeable, −1 or N − 1 for the least.
    alpha : float or sequence of float
        The distortions' norm, in the image's units; one for all, or one each.
    process_image : callable, optional
        As in `display_eigendistortion`; it sees the second row.
    process_distortion : callable, optional
        The same for the first row. By default a distortion is shown on its own symmetric scale, so that mid-grey is no
        change.
    suptitle : str
    as_rgb, channel_idx, zoom, vrange
        As in `display_eigendistortion`.

    Returns
    -------
    Figure
        One of pyplot's, so that a notebook shows it.

    Raises
    ------
    ValueError
        One of these eigendistortions has not been synthesized, `alpha` has another length, or as in `imshow`.
    """
    indices = checks.integers("eigenindex", eigenindex)
    alphas = _norms("alpha", alpha, indices)
    checks.instance("suptitle", suptitle, (str, type(None)), "a str, or None")
    show = _Shown(eigendistortion, process_image, process_distortion, as_rgb, channel_idx, vrange)
    above, below = [None] * len(show.image()), show.image()
    for index, scale in zip(indices, alphas, strict=True):
        above += show.distortion(index)
        below += show.sum(index, scale)
    return draw([above, below], zoom=zoom, suptitle=suptitle, new_figure=_pyplots)


def eigendistortion_imshow_all(
    eigendistortion: fisherop.eigendistortion.Eigendistortion,
    eigenindex: int | Sequence[int] = (0, -1),
    channel_idx: int | None = None,
    distortion_scale: float | Sequence[float] = 5.0,
    process_image: Callable[[Tensor], Tensor] | None = None,
    process_distortion: Callable[[Tensor], Tensor] | None = None,
    **kwargs: Any,
) -> Figure:
    """`display_eigendistortion_all` as plenoptic 2 calls it: `eigenindex` is the position among those found."""
    found = _result(eigendistortion).eigenindex.tolist()
    positions = checks.integers("eigenindex", eigenindex)
    positions = [checks.position("eigenindex", i, len(found), "eigendistortions found") for i in positions]
    return display_eigendistortion_all(
        eigendistortion,
        [found[i] for i in positions],
        _norms("distortion_scale", distortion_scale, positions),
        process_image,
        process_distortion,
        channel_idx=channel_idx,
        **kwargs,
    )


def _pyplots(dpi: float) -> Figure:
    return pyplot.figure(dpi=dpi, FigureClass=PrintFigure)


def _norms(name: str, value: float | Sequence[float], indices: list[int]) -> list[float]:
    what = f"one number, or one for each of {indices}"
    norms = checks.array(name, value, what=what)
    if norms.shape not in ((), (len(indices),)):
        checks.refuse(ValueError, name, what, value)
    return np.broadcast_to(norms, len(indices)).tolist()


def _result(eigendistortion: fisherop.eigendistortion.Eigendistortion) -> EigenResult:
    kind = fisherop.eigendistortion.Eigendistortion
    checks.instance("eigendistortion", eigendistortion, kind, "an Eigendistortion")
    if eigendistortion.result is None:
        raise ValueError("there are no eigendistortions to show: call synthesize() first")
    return eigendistortion.result


class _Shown:
    """The panels of an image, of its distortions, and of their sums: one in colour, or one for each channel."""

    def __init__(
        self,
        ed: fisherop.eigendistortion.Eigendistortion,
        process_image: Callable[[Tensor], Tensor] | None,
        process_distortion: Callable[[Tensor], Tensor] | None,
        as_rgb: bool | None,
        channel_idx: int | None,
        vrange: tuple[float, float] | None,
    ) -> None:
        self.result = _result(ed)
        for name, process in {"process_image": process_image, "process_distortion": process_distortion}.items():
            if process is not None:
                checks.function(name, process, "callable, or None")
        self.ed, self.process_image, self.process_distortion = ed, process_image, process_distortion
        self.channels = as_rgb, channel_idx
        self.original = ed.image.detach().cpu().clone()  # a process_image in place changes nothing else
        self.limits = value_range(self._pictures(self.original.clone(), process_image), vrange)

    def image(self) -> list[Panel]:
        return self._panels(self.original.clone(), self.process_image, "image", self.limits)

    def sum(self, index: int, scale: float) -> list[Panel]:
        (distortion, name), scale = self._distortion(index), checks.number("alpha", scale)
        return self._panels(
            self.original + scale * distortion, self.process_image, f"image + {short(scale)} × {name}", self.limits
        )

    def distortion(self, index: int) -> list[Panel]:
        distortion, name = self._distortion(index)
        if self.process_distortion is None:
            peak = float(distortion.abs().max())
            limits = -peak, peak
        else:
            limits = value_range(self._pictures(distortion.clone(), self.process_distortion))
        return self._panels(distortion, self.process_distortion, name, limits)

    def _distortion(self, index: int) -> tuple[Tensor, str]:
        result, n = self.result, self.result.image_size
        ranks = result.eigenindex.tolist()
        what = f"an integer, and one of those synthesized, {ranks} of {n}"
        checks.integer("eigenindex", index, -n, n - 1, what=what)
        if index % n not in ranks:
            checks.refuse(ValueError, "eigenindex", what, index, "synthesize more with k")
        column = ranks.index(index % n)
        tensor = self.ed.operator.to_tensors(result.eigenvectors[:, [column]])[0].cpu()
        return tensor, f"eigendistortion {ranks[column]}\nλ = {short(float(result.eigenvalues[column]))}"

    def _pictures(self, tensor: Tensor, process: Callable[[Tensor], Tensor] | None) -> list:
        if process is None:
            return to_pictures(tensor, *self.channels)
        return to_pictures(process(tensor), *self.channels, name="what process_image or process_distortion returns")

    def _panels(
        self, tensor: Tensor, process: Callable[[Tensor], Tensor] | None, title: str, limits: tuple[float, float]
    ) -> list[Panel]:
        pictures = self._pictures(tensor, process)
        title += ", processed" if process is not None else ""
        names = [f"channel {i}: {title}" for i in range(len(pictures))] if len(pictures) > 1 else [title]
        return [Panel(picture, limits, name) for picture, name in zip(pictures, names, strict=True)]


def examine_saved_synthesis(file_path: str | os.PathLike, map_location: str | torch.device | None = None) -> None:
    """Print what a saved object holds: versions, names, shapes.

    Parameters
    ----------
    file_path : str or path-like
        A file by `Eigendistortion.save`; one by `torch.save` goes to plenoptic's function of this name.
    map_location : str or torch.device, optional
        For plenoptic's files; those of `Eigendistortion.save` hold no device.

    Raises
    ------
    ValueError
        The file is damaged or of another kind.
    """
    file_path = checks.path("file_path", file_path)
    if is_torchs(file_path):
        _module("plenoptic.io").examine_saved_synthesis(file_path, map_location)
    else:
        examine(file_path)


class _Namespace:
    """Some names of our own in the place of plenoptic's; all others are plenoptic's, or `fallback`'s without it."""

    def __init__(self, path: str, fallback: Mapping[str, Any] = MappingProxyType({}), **own: Any) -> None:
        vars(self).update(own, _path=path, _fallback=fallback)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(_module(self._path), name)
        except ImportError:
            if name in self._fallback:
                return self._fallback[name]
            raise


def _module(path: str) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{error}: fisherop.plenoptic looks up what isn't its own there, `pip install plenoptic`"
        ) from error


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(_module("plenoptic"), name)


_own = {
    "Eigendistortion": Eigendistortion,
    "display_eigendistortion": display_eigendistortion,
    "display_eigendistortion_all": display_eigendistortion_all,
}
synth = synthesize = _Namespace(
    "plenoptic.synthesize",
    Eigendistortion=Eigendistortion,
    eigendistortion=_Namespace("plenoptic.synthesize.eigendistortion", **_own),
)
io = _Namespace(
    "plenoptic.io",
    {"LoadWarning": LoadWarning},
    examine_saved_synthesis=examine_saved_synthesis,
)
plot = _Namespace("plenoptic.plot", eigendistortion_imshow_all=eigendistortion_imshow_all)
