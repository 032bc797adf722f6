"""The tasks of a sweep: which there are, which are done, in what order, and how they come back from an executor."""

from __future__ import annotations

import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from fisherop import checks
from fisherop.files import write
from fisherop.model.identity import identity
from fisherop.model.recipe import Recipe, here, packed
from fisherop.tasks import MODEL, Outcome, Task, kept, open_store, run

_FORMAT = 1  # of what a file's name stands for
_AHEAD = 2**30  # bytes of tasks that are sent before they run
_MOST, _LEAST = 1024, 64  # tasks
_LOOK = 0.02  # seconds from one look at what is done to the next


@dataclass(frozen=True, eq=False)
class Job:
    image: int | str
    tensor: Tensor
    model: str
    recipe: Recipe
    layer: str | None


class Plan:
    """All tasks of a sweep, numbered, images by models."""

    def __init__(
        self, images: Any, models: Any, settings: dict[str, Any], executor: Any, device: str | None, threads: int | None
    ) -> None:
        self.settings, self.threads = settings, threads
        self.model_settings = {name: settings[name] for name in MODEL}
        self.is_remote = executor is not None and not isinstance(executor, ThreadPoolExecutor)
        named = _named_images(images)
        self.entries, self.has_names = _named_models(models), isinstance(models, Mapping)
        self.jobs = [Job(image, tensor, *entry) for image, tensor in named.items() for entry in self.entries]
        self.files: list[str] = [""] * len(self.jobs)
        self.folder, self.mark, self.device = None, "", device
        self.weights: dict[int, str] = {}  # by recipe, as the first task found them
        self.identities: dict[int, str] = {}  # by recipe, where there is a store
        self.sent: Any = settings
        size = max(tensor.numel() * tensor.element_size() for tensor in named.values())
        if self.is_remote:
            cure = "define what it holds at the top level of a module that the workers can import"
            self.sent = packed(settings, "an argument of the sweep", cure)
            size += len(self.sent) + max(recipe.pack() for _, recipe, _ in self.entries)
        self.ahead = 1 if executor is None else min(max(_AHEAD // max(size, 1), _LEAST), _MOST)

    def open(self, folder: Any) -> dict[int, Outcome]:
        """Open a store; what it holds already."""
        self.folder = pathlib.Path(os.path.abspath(os.fsdecode(folder)))
        self.mark = open_store(self.folder)
        settings = {name: self.settings[name] for name in sorted(self.settings) if name != "maxiter"}
        settings = {name: x.item() if isinstance(x, np.generic) else x for name, x in settings.items()}
        constant = identity(settings, _FORMAT)
        of_models: dict[int, Any] = {}
        of_images: dict[int | str, str] = {}
        found = {}
        for i, job in enumerate(self.jobs):
            if id(job.recipe) not in of_models:
                of_models[id(job.recipe)] = self._identified(job.recipe)
            if isinstance(of_models[id(job.recipe)], Outcome):
                found[i] = of_models[id(job.recipe)]
                continue
            if job.image not in of_images:
                of_images[job.image] = identity(job.tensor)
            parts = (constant, of_models[id(job.recipe)], of_images[job.image], job.layer)
            self.files[i] = str(self.folder / f"{identity(parts)}.npz")
            try:
                facts = kept(self.files[i], job.tensor)
            except OSError as error:  # another user's, who lets nobody read it
                found[i] = Outcome.of_error(error)
                continue
            if facts is not None:
                found[i] = Outcome(facts)
        return found

    def _identified(self, recipe: Recipe) -> str | Outcome:
        """What a model is, or why it can't be told, as what comes of its tasks."""
        try:
            self.identities[id(recipe)] = recipe.identity()
            return self.identities[id(recipe)]
        except (Exception, SystemExit) as error:
            return Outcome.of_error(error)
        finally:
            if self.is_remote:
                recipe.forget()

    def order(self, todo: set[int]) -> list[int]:
        """By models, so that workers build few; else at random, so that two sweeps in a folder rarely do the same."""
        rng = np.random.default_rng()
        rank = {id(recipe): rng.random() for _, recipe, _ in self.entries}
        return sorted(todo, key=lambda i: (rank[id(self.jobs[i].recipe)], rng.random()))

    def task(self, i: int) -> Task:
        job = self.jobs[i]
        device = self.device
        if device is None and job.tensor.device.type != "cpu":
            device = job.tensor.device.type if self.is_remote else str(job.tensor.device)
        where = self.files[i], self.mark, here(), self.identities.get(id(job.recipe), "")
        return Task(job.tensor, job.recipe, job.layer, self.sent, device, self.threads, *where)

    def keep(self, i: int, outcome: Outcome) -> Outcome:
        """Write what a worker could not; refuse what comes of a model with other weights than before."""
        recipe = self.jobs[i].recipe
        if outcome.weights:
            try:
                recipe.check(outcome.weights, self.weights.setdefault(id(recipe), outcome.weights))
            except RuntimeError as error:
                return Outcome.of_error(error)
        if outcome.fields is None or not self.files[i]:
            return outcome
        write(self.files[i], outcome.fields)
        return Outcome(outcome.facts)

    def forget(self) -> None:
        for _, recipe, _ in self.entries:
            recipe.forget()


class Here(Executor):
    """Runs each task at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def outcomes_of(executor: Any, plan: Plan, todo: list[int]) -> Iterator[tuple[int, Outcome]]:
    """What comes back, as it comes."""
    pending: dict[Any, int] = {}
    left = iter(todo)
    is_more = True
    try:
        while pending or is_more:
            while is_more and len(pending) < plan.ahead:
                i = next(left, None)
                if i is None:
                    is_more = False
                    break
                try:
                    pending[executor.submit(run, plan.task(i))] = i
                except Exception as error:  # of a pool that has lost its workers, or was shut down
                    yield i, Outcome.of_error(error)
            done = [future for future in pending if future.done()]
            for future in done:
                try:
                    outcome = future.result()
                except (Exception, SystemExit) as error:  # of a worker that was lost
                    outcome = Outcome.of_error(error)
                yield pending.pop(future), outcome
            if pending and not done:
                time.sleep(_LOOK)
    finally:
        for future in pending:
            future.cancel()


def _named_images(images: Any) -> dict[int | str, Tensor]:
    what = "a sequence of at least one image, each a tensor, or a mapping of names to them"
    if isinstance(images, Tensor):
        checks.refuse(TypeError, "images", what, images, "use images.split(1)")
    names = list(images) if isinstance(images, Mapping) else None
    several = checks.several("images", list(images.values()) if isinstance(images, Mapping) else images, Tensor, what)
    found = dict(zip(range(len(several)) if names is None else map(str, names), several, strict=True))
    if len(found) < len(several):
        raise ValueError(f"the names of images must differ as texts, got {names}")
    return found


def _named_models(models: Any) -> list[tuple[str, Recipe, str | None]]:
    """Names, what makes the models, and layers; one recipe for each model."""
    what = "a sequence of at least one model, of what builds one, or of (either, layer); or a mapping of names to them"
    values = list(models.values()) if isinstance(models, Mapping) else models
    if callable(values):
        checks.refuse(TypeError, "models", what, values, "use [model]")
    several = checks.several("models", values, object, what)
    names = [str(name) for name in models] if isinstance(models, Mapping) else [""] * len(several)
    recipes: dict[int, Recipe] = {}
    found = []
    for place, (name, entry) in enumerate(zip(names, several, strict=True)):
        given, layer = entry if isinstance(entry, tuple) and len(entry) == 2 else (entry, None)
        where = f"models[{name or place!r}]"
        checks.function(where, given, what)
        if layer is not None:
            layer_is = f"the layer of {where}"
            if not checks.instance(layer_is, layer, str, "the name of a submodule, a str"):
                checks.refuse(ValueError, layer_is, "the name of a submodule, and not empty", layer)
        if id(given) not in recipes:
            label = name or _unlike(_name_of(given), [one.name for one in recipes.values()])
            recipes[id(given)] = Recipe(given, label)
        found.append((name or recipes[id(given)].name, recipes[id(given)], layer))
    for entry in found:
        if sum(entry[::2] == other[::2] for other in found) > 1:
            raise ValueError(
                f"models must differ, or have names of their own in a mapping: {entry[0]!r} is there twice"
            )
    return found


def _name_of(given: Any) -> str:
    while isinstance(given, functools.partial):
        given = given.func
    name = getattr(given, "__name__", None)
    return name if isinstance(name, str) and not isinstance(given, nn.Module) else type(given).__name__


def _unlike(name: str, others: list[str]) -> str:
    number, new = 1, name
    while new in others:
        number += 1
        new = f"{name} {number}"
    return new
