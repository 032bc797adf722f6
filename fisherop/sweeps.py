"""Many images, layers and models: each pair of an image and a model is a task of its own, done once, kept in a file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from fisherop import checks
from fisherop.atomic import replacing
from fisherop.eigendistortion import Eigendistortion
from fisherop.plans import Here, Plan, outcomes_of
from fisherop.solvers import SOLVERS
from fisherop.spaces import Space
from fisherop.tasks import Facts, Outcome

COLUMNS = ("image", "model", "layer", "eigenindex", "eigenvalue", "residual", "status", "threshold")
COLUMNS += ("n_pixels", "products", "seconds", "file", "error")
_SHOWN = 10  # failures


@dataclass(frozen=True, eq=False, kw_only=True)
class Record(Facts):
    """One task of a sweep: an image, a model, a layer, and what was found.

    Attributes
    ----------
    image : int or str
        Its position among the images, or its name.
    model, layer : str
        The latter empty for the model's own response.
    eigenindex, eigenvalues, residual_norms : ndarray, shape (K,)
        As of `EigenResult`; empty where the task failed.
    thresholds : ndarray, shape (K,)
        1 / √λ, the amplitude at which d′ = 1, as F predicts it; infinite where λ can't be told from zero, and a lower
        bound, which depends on tol, where the pair is ``"null to tol"``.
    status : tuple of str
        What each pair is.
    n_pixels : int
        N, or, with a subspace, its dimension; 0 where the task failed.
    n_products, seconds : float
        What the task took where it ran.
    name : str
        Of the model and the layer: the one that a mapping gives, or both.
    file : str
        Where its distortions are, empty without a store.
    error, traceback : str
        What went wrong, in one line, and in full; empty where nothing did.
    """

    image: int | str
    model: str
    layer: str
    name: str
    file: str
    error: str
    traceback: str

    def __repr__(self) -> str:
        return f"<image {self.image}, {self.name}: {self.error or f'{len(self.eigenvalues)} eigendistortions'}>"


class SweepError(RuntimeError):
    """A task failed, and ``on_error="raise"``; `result` holds what is done."""

    def __init__(self, message: str, result: SweepResult) -> None:
        super().__init__(message)
        self.result = result


class SweepResult(Sequence[Record]):
    """The records of a sweep, images by models, in the order in which these were given.

    Attributes
    ----------
    records : tuple of Record
        Of those tasks that are done, or failed: all, unless the sweep was ended before.
    done, failed : tuple of Record
    """

    def __init__(self, plan: Plan, outcomes: Mapping[int, Outcome]) -> None:
        self._plan, self._fields = plan, {}
        records = []
        for i in sorted(outcomes):
            job, outcome = plan.jobs[i], outcomes[i]
            empty = np.empty(0)
            facts = outcome.facts or Facts(empty.astype(np.intp), empty, empty, empty, (), 0, 0.0, 0.0)
            file = plan.files[i] if outcome.facts is not None and outcome.fields is None else ""
            known: dict[str, Any] = {"image": job.image, "model": job.model, "layer": job.layer or "", **vars(facts)}
            known["name"] = job.model if plan.has_names or not job.layer else f"{job.model} {job.layer}"
            record = Record(file=file, error=outcome.error, traceback=outcome.trace, **known)
            records.append(record)
            self._fields[record.image, record.model, record.layer] = outcome.fields
        self.records = tuple(records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def done(self) -> tuple[Record, ...]:
        """Those without an error."""
        return tuple(record for record in self.records if not record.error)

    @property
    def failed(self) -> tuple[Record, ...]:
        """Those with an error."""
        return tuple(record for record in self.records if record.error)

    def __repr__(self) -> str:
        left = len(self._plan.jobs) - len(self)
        text = f"<SweepResult: {len(self.done)} of {len(self._plan.jobs)} tasks done"
        text += f", {left} not begun or not finished" if left else ""
        text += f", {len(self.failed)} failed" if self.failed else ""
        alike: dict[str, list[Record]] = {}
        for one in self.failed:
            alike.setdefault(one.error, []).append(one)
        for several in list(alike.values())[:_SHOWN]:
            text += f"\n  {several[0]!r}" + (f" and {len(several) - 1} more" if len(several) > 1 else "")
        return text + ("\n  ..." if len(alike) > _SHOWN else "") + ">"

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write a row for each eigendistortion, and one for each task that failed.

        Its columns are those of `Record`: image, model, layer, eigenindex, eigenvalue, residual (‖F v − λ v‖, not
        relative), status, threshold (of the norm; a lower bound if the status is null to tol), n_pixels, products and
        seconds of the task, file (an absolute path), error.

        Parameters
        ----------
        path : str or path-like
            A file; what it held is replaced as a whole.

        Raises
        ------
        OSError
            It can't be written.
        """
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(COLUMNS)
        for one in self:
            rows = zip(one.eigenindex, one.eigenvalues, one.residual_norms, one.status, one.thresholds, strict=True)
            for row in list(rows) or [("",) * 5]:
                names = (one.image, one.model, one.layer)
                table.writerow((*names, *row, one.n_pixels, one.n_products, one.seconds, one.file, one.error))
        with replacing(checks.path("path", path, new=True)) as file:
            file.write(text.getvalue().encode(errors="backslashreplace"))

    def load(self, record: Record) -> Eigendistortion:
        """The eigendistortions of a record, with its image and its model, which is built here.

        Parameters
        ----------
        record : Record
            One of this result.

        Raises
        ------
        ValueError
            The task failed, the record is another sweep's, or its file is damaged or gone.
        """
        checks.instance("record", record, Record, "a Record of this sweep", "take one, as table[0] is")
        names = (record.image, record.model, record.layer)
        if not any(_is_same(record, one) for one in self):
            raise ValueError(f"record must be of this sweep, got {record!r}")
        if record.error:
            raise ValueError(f"there is nothing to load of {record!r}: its task failed")
        job = next(job for job in self._plan.jobs if (job.image, job.model, job.layer or "") == names)
        ed = Eigendistortion(job.tensor, job.recipe.model(job.layer), **self._plan.model_settings)
        fields = self._fields[names]
        if fields is None:
            return ed.load(record.file)
        ed._take("the record", {name: np.asarray(value) for name, value in fields.items()})
        return ed


def _is_same(one: Record, other: Record) -> bool:
    """Whether they are one record, or copies of it, as pickles are."""
    names = ("image", "model", "layer", "file", "error")
    arrays = ("eigenindex", "eigenvalues", "residual_norms")
    return all(getattr(one, name) == getattr(other, name) for name in names) and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


def sweep(
    images: Sequence[Tensor] | Mapping[str, Tensor],
    models: Sequence[Any] | Mapping[str, Any],
    *,
    executor: Any = None,
    store: str | os.PathLike | None = None,
    k: int = 1,
    which: str = "both",
    method: str | Callable[..., tuple] = "auto",
    tol: float = 1e-6,
    maxiter: int | None = None,
    rng: int | None = None,
    noise: Any = None,
    subspace: Space | None = None,
    metric: Any = None,
    engine: str = "auto",
    chunk_size: int | None = None,
    device: str | None = None,
    threads: int | None = 1,
    on_error: str = "record",
    progress: bool = True,
    **options: Any,
) -> SweepResult:
    """The eigendistortions of every image and every model, on one machine or many, each done once.

    Each task is one `Eigendistortion`. A task that fails doesn't end the sweep: its record says why.

    Parameters
    ----------
    images : sequence or mapping of Tensor
        Each as `Eigendistortion` takes one; a mapping gives them names.
    models : sequence or mapping
        Models, or callables without arguments that build one, or ``(either, layer)`` with the name of a layer, as in
        `LayerResponse`. A mapping gives them names. In other processes models are built once for a sweep; a model
        itself is sent with every task, which for a large one takes longer than to send what builds it.
    executor : concurrent.futures.Executor, optional
        Where tasks run, by default here, one after the other: threads, processes (start them by ``"spawn"``), loky's,
        ``client.get_executor()`` of a Dask client for a cluster, or any other with `submit` whose futures have `done`,
        `result` and `cancel`. It stays yours: it is not shut down.
    store : str or path-like, optional
        A folder with a file for each task that is done, as `Eigendistortion.save` writes it. A task whose file is
        there, and sound, is not done again: so a sweep that was interrupted goes on, and several may share a folder.
        By default results stay in memory.
    k, which, method, tol, maxiter
        As in `Eigendistortion.synthesize`.
    rng : int, optional
        A seed, the same for each task.
    noise, subspace, metric, engine, chunk_size
        As in `Eigendistortion`.
    device : str, optional
        Where tasks compute, by default where the images are. ``"cuda"`` is the GPU that a worker has chosen, or, where
        it has chosen none, the one of the worker's number in its pool.
    threads : int or None
        Of PyTorch, in each process of a pool, so that workers don't fight over cores; None leaves them as they are.
    on_error : {"record", "raise"}
        What to do when a task fails.
    progress : bool
        Show a bar.
    **options
        Of the method; `eigenpairs` lists them.

    Returns
    -------
    SweepResult

    Raises
    ------
    SweepError
        A task failed, and `on_error` is ``"raise"``; its `result` holds what was done before.
    KeyboardInterrupt
        Ctrl-C was pressed. What is done is in the store, and in the `result` of the exception.
    TypeError, ValueError
        An argument can't be used, or a model can't be sent to other processes.
    OSError
        The store can't be written to. What is done is in the `result` of the exception.

    Notes
    -----
    A file's name is a hash of the image, the layer, the settings but for `maxiter`, and the model: its tensors and
    attributes, and the code of its own classes and functions. So models are built here, too, where there is a store,
    and a task fails where a worker has another model than this process, or older code. Without a store nobody looks at
    the code of workers that were started before it was changed. A model that is given itself, and keeps something of
    its first call as an attribute, is another one afterwards.
    """
    settings = options | {
        "k": checks.integer("k", k),
        "which": checks.choice("which", which, ("both", "largest", "smallest")),
        "method": method if callable(method) else checks.choice("method", method, ("auto", *SOLVERS)),
        "tol": checks.tolerance(tol),
        "maxiter": checks.integer("maxiter", maxiter, 1, 2**31 - 1, optional=True),
        "rng": checks.integer("rng", rng, 0, what="a seed, an integer from 0", optional=True),
        "noise": noise,
        "subspace": subspace,
        "metric": metric,
        "engine": engine,
        "chunk_size": chunk_size,
    }
    cures = {"on_failure": "a task that doesn't converge is one that failed", "stop_criterion": "use tol"}
    cures |= dict.fromkeys(("checkpoint", "checkpoint_seconds", "state"), "tasks that are done are kept in its store")
    allowed = set(options) if callable(method) else SOLVERS["golub_kahan" if method == "auto" else method].options
    for name in options:
        if name in cures or name not in allowed:
            cure = cures.get(name, f"options of {method!r} are {', '.join(sorted(allowed)) or 'none'}")
            raise TypeError(f"sweep has no option {name!r}: {cure}")
    checks.choice("on_error", on_error, ("record", "raise"))
    threads = checks.integer("threads", threads, optional=True)
    progress = checks.flag("progress", progress)
    if hasattr(executor, "get_executor") or not (executor is None or callable(getattr(executor, "submit", None))):
        what = "None, or of the interface of concurrent.futures.Executor"
        checks.refuse(TypeError, "executor", what, executor, "of a Dask client, pass client.get_executor()")
    plan = Plan(images, models, settings, executor, device, threads)
    outcomes: dict[int, Outcome] = {}
    with tqdm(total=len(plan.jobs), unit=" tasks", disable=not progress) as bar:
        try:
            if store is not None:
                outcomes |= plan.open(checks.path("store", store))
                bar.update(len(outcomes))
                bar.unpause()
            todo = plan.order(set(range(len(plan.jobs))) - set(outcomes))
            n_failed = sum(bool(outcome.error) for outcome in outcomes.values())
            if n_failed and on_error == "raise":
                _raise(SweepResult(plan, outcomes), next(o for o in outcomes.values() if o.error))
            for i, outcome in outcomes_of(Here() if executor is None else executor, plan, todo):
                outcomes[i] = outcome  # also where it can't be written
                outcomes[i] = plan.keep(i, outcome)
                if outcomes[i].error:
                    n_failed += 1
                    bar.set_postfix_str(f"{n_failed} failed", refresh=False)
                    if on_error == "raise":
                        _raise(SweepResult(plan, outcomes), outcomes[i])
                bar.update()
        except (KeyboardInterrupt, OSError) as error:
            error.result = SweepResult(plan, outcomes)  # pyright: ignore[reportAttributeAccessIssue]
            raise
        finally:
            plan.forget()
    return SweepResult(plan, outcomes)


def _raise(result: SweepResult, outcome: Outcome) -> None:
    raise SweepError(f"{result.failed[0]!r}\n{outcome.trace}", result) from outcome.cause
