"""Eigendistortions: the changes of an image that a model notices most and least."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from fisherop import checks
from fisherop.checkpoint import keeping
from fisherop.distortions import Distortions
from fisherop.files import _checksum, check_jacobian, check_same, contents, read, result_from, write  # noqa: F401, where it once was
from fisherop.solve import eigenpairs, transfer
from fisherop.spaces import Space


class Eigendistortion(Distortions):
    """The extreme eigenvectors of a model's Fisher information at an image, as images.

    Parameters
    ----------
    image : Tensor, shape ``image_shape``
        One image of N elements, float32 or float64; usually ``(1, channels, height, width)``.
    model : callable or nn.Module
        Maps the image to its response, in evaluation mode; see `linearize` for what is accepted and what is refused.
    noise, subspace, metric : optional
        The noise of the response, the changes of the image that count, and their norm; see `JacobianOperator`.
    engine, chunk_size, memory
        How products are made, how many at a time, and what that may take; see `linearize`.

    Attributes
    ----------
    operator : FisherOperator, shape (N, N), or, with a subspace, (d, d)
    model : callable or nn.Module
    image : Tensor, shape ``image_shape``
    result : EigenResult or None
        The certified pairs, after `synthesize`.
    eigendistortions, eigenvalues, eigenindex : Tensor or None
        What it holds, as tensors on the image's device: (K, ...), (K,) and (K,).
    jacobian : Tensor or None, shape (M, N)
        Once ``method="exact"`` or `compute_jacobian` has computed it.

    Notes
    -----
    A pickle holds the image, the model, the options and the result, and attributes that you added. Where it is loaded,
    and where `copy.deepcopy` makes a copy, the model is linearized anew. A search goes on from nothing there, and a
    Jacobian has to be computed anew.

    References
    ----------
    Berardino, Ballé, Laparra and Simoncelli 2017, Eigen-distortions of hierarchical representations, NeurIPS 30.

    Examples
    --------
    >>> import torch
    >>> from fisherop import Eigendistortion
    >>> image = torch.linspace(0, 1, 12, dtype=torch.float64)
    >>> ed = Eigendistortion(image, torch.sin).synthesize(progress=False)
    >>> ed.eigenvalues.sqrt()  # the slope of the sine is its cosine: at 0, and at 1
    tensor([1.0000, 0.5403], dtype=torch.float64)
    """

    def __init__(
        self,
        image: Tensor,
        model: Callable[[Tensor], Any],
        *,
        noise: Any = None,
        subspace: Space | None = None,
        metric: Any = None,
        engine: str = "auto",
        chunk_size: int | None = None,
        memory: int | None = None,
    ) -> None:
        observed = {"noise": noise, "subspace": subspace, "metric": metric}
        self._build(image, model, observed | {"engine": engine, "chunk_size": chunk_size, "memory": memory})

    def synthesize(
        self,
        method: str | Callable[..., tuple] = "auto",
        k: int | None = None,
        max_iter: int | None = None,
        p: int | None = None,
        q: int | None = None,
        stop_criterion: float | None = None,
        *,
        which: str | None = None,
        tol: float | None = None,
        maxiter: int | None = None,
        rng: int | np.random.Generator | None = None,
        progress: bool = True,
        on_failure: str = "raise",
        checkpoint: str | os.PathLike | None = None,
        checkpoint_seconds: float = 60.0,
        **options: Any,
    ) -> Eigendistortion:
        """Find the eigendistortions.

        Call it again to go on. With ``"golub_kahan"``, which ``"auto"`` takes where the problem is large, the stored
        result is returned if it already answers the request. Otherwise the search continues from its Krylov basis,
        which the object holds: for more pairs, a smaller tol, or after an interrupt or too few iterations. When it
        begins anew instead: "Resuming" in docs/design.md.

        After Ctrl-C, what ``"golub_kahan"`` has found so far is certified and kept in `result`, unless an earlier one
        has more converged pairs; call `synthesize` again to continue. A second Ctrl-C ends at once. Of other methods
        nothing is kept.

        Parameters
        ----------
        method : str or callable
            The solver, as in `eigenpairs`.
        k : int, optional
            How many at each end; by default 1, and all N with ``method="exact"``.
        max_iter, p, q, stop_criterion : optional
            As in plenoptic: `maxiter`, oversampling and power iterations of ``"randomized_svd"``, and `tol`.
        which : {"both", "largest", "smallest"}, optional
            The ends; by default both, and the largest with ``"randomized_svd"``, which finds no other.
        tol, maxiter, rng, progress, on_failure
            As in `eigenpairs`.
        checkpoint : str or path-like, optional
            A file for the search, for a process that may be killed. The next call with the same image, model, k, which,
            tol and max_basis, in another process, too, goes on from it, with the random stream that it holds, whatever
            rng. It takes as much as the basis, and is removed when the search is over; an interrupt, or too few
            iterations, leaves it. For ``"golub_kahan"`` alone, which ``"auto"`` then takes, without `v0` and
            `orthogonal_to`.
        checkpoint_seconds : float
            From one write to the next; longer where writes would take more than 5 % of the time.
        **options
            Of the method; `eigenpairs` lists them.

        Returns
        -------
        Eigendistortion
            Itself.

        Raises
        ------
        ConvergenceError
            Not everything converged; the object is unchanged, and what was found is in the error's ``result``.
        ValueError
            An argument can't be used, or the file at `checkpoint` is damaged or belongs to another image, model or
            search; the message says what differs.
        OSError
            The checkpoint can't be written; the search stays in the object.
        KeyboardInterrupt
            Ctrl-C was pressed, see above.
        """
        if tol is not None and stop_criterion is not None:
            raise ValueError(f"tol={tol!r} and stop_criterion={stop_criterion!r} mean the same: give one of them")
        name = method if isinstance(method, str) else None
        if "state" in options:
            raise TypeError("synthesize has no option 'state': it has a state of its own")
        if max_iter is not None and maxiter is not None:
            raise ValueError(f"max_iter={max_iter!r} and maxiter={maxiter!r} mean the same: give one of them")
        max_iter = checks.integer("max_iter", maxiter if max_iter is None else max_iter, 1, 2**31 - 1, optional=True)
        tolerance = next(t for t in (tol, stop_criterion, 1e-6) if t is not None)
        options |= {name: value for name, value in (("p", p), ("q", q)) if value is not None}
        if k is None:
            k = self.operator.shape[0] if name == "exact" else 1
        if which is None:
            which = "largest" if name == "randomized_svd" else "both"
        self._state |= {"products": self.operator.products, "result": self.result}
        asked = {"k": k, "which": which, "tol": tolerance}
        try:
            with keeping(self._state, checkpoint, checkpoint_seconds, method, asked, options) as method:
                self.result = eigenpairs(
                    self.operator,
                    k,
                    which,
                    method=method,
                    tol=tolerance,
                    maxiter=max_iter,
                    rng=rng,
                    progress=progress,
                    on_failure=on_failure,
                    state=self._state,
                    **options,
                )
        except KeyboardInterrupt:
            self.result = self._state["result"]
            raise
        return self

    def to(self, *args: Any, **kwargs: Any) -> Eigendistortion:
        """Move to another device, or to another precision, in place, and return itself; your model stays as it is.

        A module is copied, then moved. What was found is certified anew by products in the new arithmetic; a Jacobian
        is computed anew.

        Parameters
        ----------
        *args, **kwargs
            A device, a dtype (float32 or float64), or both, as `torch.Tensor.to` takes them.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As by `torch.Tensor.to`, `copy.deepcopy` and `linearize`, or by a model that is no module, is not moved, and
            can't take the new image; the object is unchanged.

        Warns
        -----
        RuntimeWarning
            What was found does not hold in the new arithmetic, as float32 distortions may not in float64.
        """
        operator = self.operator.to(*args, **kwargs)
        if operator is self.operator:
            return self
        if self.jacobian is not None:
            operator.jacobian.to_dense()
        result = None if self.result is None else transfer(operator, self.result)
        self.operator, self.model, self.result, self._state = operator, operator.linearization.model, result, {}
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write what was found to one ``.npz`` file, which holds no pickle and which NumPy reads.

        It holds the image, the fields of `result` (`details` as JSON, arrays as lists), the shape and a fingerprint of
        the model's response, the engine's report, the names of the object's and the model's types, and the versions of
        the libraries. It is written under a temporary name beside `path` and then renamed, so that `path` holds the old
        file or the new one, whatever happens.

        Parameters
        ----------
        path : str or path-like
            Used as it is: no ending is added.

        Raises
        ------
        ValueError
            Nothing has been synthesized yet.
        TypeError
            A solver of your own left something in `details` that JSON can't hold.
        """
        write(checks.path("path", path, new=True), self._fields())

    def _fields(self) -> dict[str, ArrayLike]:
        return contents(self._found(), self.operator.linearization, type(self), self.model, self._observed())

    def _observed(self) -> str:
        """The kinds of its noise, subspace and metric, in words."""
        parts = [f"{name}: {type(one).__name__}" for name, one in self.operator.observed.items()]
        return ", ".join([*parts, f"{self.operator.shape[0]} dimensions"]) if parts else ""

    def load(self, path: str | os.PathLike) -> Eigendistortion:
        """Take the result that `save` wrote to `path`, for the same image and model, and return itself.

        Raises
        ------
        ValueError
            The file is damaged, of another kind or of a newer format, or belongs to another image or model; the object
            is unchanged.
        """
        self._take(path, read(checks.path("path", path), self.image))
        return self

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike,
        model: Callable[[Tensor], Any],
        *,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Eigendistortion:
        """What `save` wrote, with its image; the model must give the same response to it.

        Parameters
        ----------
        path : str or path-like
            The file.
        model : callable or nn.Module
            The model, as it was.
        device : torch.device or str, optional
            Where the image goes; by default where the model's parameters are.
        **options
            As when the object was made: noise, subspace, metric, engine, chunk_size, memory.

        Returns
        -------
        Eigendistortion

        Raises
        ------
        ValueError
            As by `load`, and as by `linearize`.
        """
        fields = read(checks.path("path", path))
        if device is None and isinstance(model, nn.Module):
            device = next((p.device for p in model.parameters()), None)
        self = cls(checks.moved("device", torch.from_numpy(fields["image"]), device=device), model, **options)
        self._take(path, fields)
        return self

    def _take(self, path: str | os.PathLike, fields: dict[str, NDArray]) -> None:
        check_same(path, fields, self.image, self.operator.linearization.response, self._observed())
        result = result_from(fields)
        check_jacobian(path, result, self.operator)
        self.result = result
