"""Whether a derivative is the slope of the response: central differences, in float64 where the model can run in it."""

from __future__ import annotations

import contextlib
import copy
import logging
import types
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fisherop.model.compat import clean_failure
from fisherop.model.draws import DETACHING
from fisherop.model.promoted import Promoted
from fisherop.model.response import Response

_LOG = logging.getLogger(__name__)


class _Detached(TorchFunctionMode):
    """What ``.detach()`` gave when it was recorded is what it gives again: it is meant to be constant.

    But for what is then changed in place, which changes what was detached.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, Tensor] = {}
        self._edited: set[int] = set()
        self._count = 0
        self._records = True

    def run(self, function: Callable[[], Tensor]) -> Tensor:
        """The function's result; the first time, what it detaches is recorded."""
        self._count = 0
        with self:
            out = function()
        edited = {i for i, t in self._kept.items() if t._version > 0} if self._records else set()
        if edited:
            self._edited |= edited
            self._kept.clear()
            return self.run(function)
        self._records = False
        return out

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in DETACHING:
            return out
        i, self._count = self._count, self._count + 1
        kept = self._kept.get(i)
        if i in self._edited or (not self._records and (kept is None or kept.shape != out.shape)):
            return out
        if self._records:
            self._kept[i] = out.clone()
            return self._kept[i]
        return self._kept[i].clone()


class _Arithmetic(NamedTuple):
    """How the response is evaluated: by which function, in which dtype, and whether that takes promotion.

    `steps` are a share of the image's largest element, `tolerance` is relative to ‖J v‖, and noise above `drowned` of
    the slope decides nothing.
    """

    respond: Response
    dtype: torch.dtype
    promotes: bool = False
    steps: tuple[float, ...] = (1e-7, 1e-9, 1e-5)
    tolerance: float = 1e-4
    drowned: float = 0.05


def check_slope(
    respond: Response,
    image: Tensor,
    v: Tensor,
    jv: Tensor,
    derivative: Callable[[Response, Tensor, Tensor], Tensor],
    *,
    precision: float,
    detaches: bool,
    program: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> bool:
    """Hold J v to the central difference (f(x + h v) − f(x − h v)) / 2 h.

    First at the image; if they differ, because float32 rounds a few units to the other side of zero, J v in float64 by
    the recorded program, if there is one. What is left may be a kink: a pixel just at a bound, a tie in max pooling.
    Then PyTorch's derivative is held to differences at a point beside the image, where ties are broken; the program,
    which takes less memory, is asked first. All is in float64, which a
    float32 model's operations are promoted to, with h of 10⁻⁷, 10⁻⁹ and 10⁻⁵ of the image's largest element, to 10⁻⁴
    of ‖J v‖; where a model can't run in float64, in its own dtype, with 10⁻², 10⁻³ and 5 · 10⁻² and to 0.05.
    What kinks and rounding can do is the second difference ‖f(x + h v) − 2 f(x) + f(x − h v)‖ / 2 h; twice that is
    allowed, and a step where it is a large share of the slope decides nothing. J v is wrong where no step agrees with
    it and two steps agree with each other.

    Parameters
    ----------
    respond : Response
        Each of the tensors that the response consists of is compared for itself.
    image, v : Tensor, shape ``image_shape``
    jv : Tensor, shape (M,)
        J v at the image.
    derivative : callable
        ``(respond, x, v) -> J(x) v`` by PyTorch, flat.
    precision : float
        The machine epsilon of the least precise step of the model.
    detaches : bool
        Whether the model calls ``.detach()``: what that gives is held constant.
    program : callable, optional
        ``(x, v) -> J(x) v`` by the recorded operations, flat, if these are the same for every image.

    Returns
    -------
    bool
        Whether this decided: False where noise hides the slope at every step.

    Raises
    ------
    ValueError
        J v is not the slope.
    """
    scale = float(image.abs().max()) or 1.0
    arithmetic, ahead = _arithmetic(respond, image, v, precision, scale)
    first = arithmetic._replace(steps=arithmetic.steps[:1])
    known = {} if ahead is None or detaches else {first.steps[0] * scale: ahead}
    responses = _Responses(image, v, arithmetic, detaches, known)
    if _compare(responses, jv, first, scale)[0]:
        return True
    if not arithmetic.promotes:
        program = None
    if program is not None and _compare(responses, _by_program(program, responses), first, scale)[0]:
        return True
    responses = _Responses(_beside(image, scale), v, arithmetic, detaches)
    if program is not None and _compare(responses, _by_program(program, responses), arithmetic, scale)[0]:
        return True
    with _context(arithmetic):
        jv = derivative(arithmetic.respond, responses.x, responses.v)
    verdict, error = _compare(responses, jv, arithmetic, scale)
    if verdict is False:
        raise ValueError(
            f"PyTorch's derivative of the model is not the slope of its response: J v and the central difference of "
            f"the response differ by {error:.1e} of their norm; the usual causes are an operation or a custom autograd "
            "function without the right derivative, an activation changed through .data, and a factor taken out by "
            ".item() or NumPy (use .detach() on what is meant to be constant, as x + (x.round() - x).detach() does)"
        )
    return verdict is True


def _arithmetic(
    respond: Response, image: Tensor, v: Tensor, precision: float, scale: float
) -> tuple[_Arithmetic, Tensor | None]:
    """Float64, by promotion or by a copy of the model, or else the image's own dtype; and the response a step ahead."""
    if image.dtype == torch.float64 and precision <= torch.finfo(torch.float64).eps:
        return _Arithmetic(respond, torch.float64), None
    for candidate in (lambda: _Arithmetic(respond, torch.float64, promotes=True), lambda: _copied(respond)):
        try:
            with clean_failure(), torch.no_grad():
                arithmetic = candidate()
                with _context(arithmetic):
                    ahead = arithmetic.respond(image.double() + arithmetic.steps[0] * scale * v.double())
                if torch.isfinite(ahead).all():
                    return arithmetic, ahead
        except Exception as error:  # whatever a model that knows its dtype raises
            _LOG.info("the model can't run in float64: %s", error)
    return _Arithmetic(respond, image.dtype, False, (1e-2, 1e-3, 5e-2), 0.05, 0.3), None


def _copied(respond: Response) -> _Arithmetic:
    if not isinstance(respond.model, nn.Module):
        raise TypeError("it is no module, of which there could be a copy")
    return _Arithmetic(Response(copy.deepcopy(respond.model).double(), sparse=respond.sparse), torch.float64)


def _context(arithmetic: _Arithmetic) -> contextlib.AbstractContextManager:
    return Promoted() if arithmetic.promotes else contextlib.nullcontext()


def _by_program(program: Callable[[Tensor, Tensor], Tensor], responses: _Responses) -> Tensor | None:
    """J v in float64; None where the program can't run in it."""
    try:
        with clean_failure(), torch.no_grad(), Promoted():
            return program(responses.x, responses.v)
    except Exception as error:  # whatever an operation raises that is recorded for one dtype
        _LOG.info("the program can't run in float64: %s", error)
        return None


class _Responses:
    """The response at x + h v, by h: ``responses(h)`` is a list of the flat tensors that it consists of, in float64."""

    def __init__(
        self,
        x: Tensor,
        v: Tensor,
        arithmetic: _Arithmetic,
        detaches: bool,
        known: Mapping[float, Tensor] = types.MappingProxyType({}),
    ) -> None:
        self.x, self.v = (t.to(arithmetic.dtype) for t in (x, v))
        self._arithmetic, self._known = arithmetic, dict(known)
        self._frozen = _Detached() if detaches else None
        if detaches:
            self(0.0)  # where it records

    def __call__(self, h: float) -> list[Tensor]:
        respond = self._arithmetic.respond
        if h not in self._known:
            x = self.x + h * self.v
            with torch.no_grad(), _context(self._arithmetic):
                self._known[h] = respond(x) if self._frozen is None else self._frozen.run(lambda: respond(x))
        return list(self._known[h].double().split(respond.sizes))


def _compare(at: _Responses, jv: Tensor | None, arithmetic: _Arithmetic, scale: float) -> tuple[bool | None, float]:
    """Whether J v is the slope at x, None where no step decides; and the error of the worst part."""
    if jv is None:
        return None, 0.0
    respond, eps = arithmetic.respond, torch.finfo(arithmetic.dtype).eps
    jv = jv.to(arithmetic.dtype)
    parts = [_Part() for _ in respond.sizes]
    for step in arithmetic.steps:
        h = step * scale
        plus = at(h)
        for i, slope in enumerate(jv.double().split(respond.sizes)):
            central = (plus[i] - at(-h)[i]) / (2 * h)
            size, error = max(norm(slope), norm(central)), norm(central - slope)
            noise = 8 * eps * norm(plus[i]) / h
            if error > arithmetic.tolerance * size + noise or noise > arithmetic.drowned * size:
                noise += norm(plus[i] - 2 * at(0.0)[i] + at(-h)[i]) / h
            if error == 0 or noise <= arithmetic.drowned * size:
                parts[i].add(central, error, error / size if error else 0.0, arithmetic.tolerance * size + noise)
        if all(part.agrees for part in parts):
            return True, 0.0
    wrong = [part.share for part in parts if part.disagrees]
    if wrong:
        return False, max(wrong)
    doubted = any(part.doubted for part in parts)
    return (True if any(part.agrees for part in parts) and not doubted else None), 0.0


class _Part:
    """What the steps say of one tensor of the response."""

    def __init__(self) -> None:
        self.agrees = self.disagrees = False
        self.share = 0.0
        self._against: list[tuple[Tensor, float]] = []

    @property
    def doubted(self) -> bool:
        """Whether a step speaks against J v and none for it."""
        return bool(self._against) and not self.agrees

    def add(self, central: Tensor, error: float, share: float, allowed: float) -> None:
        """A difference speaks against J v where another step's is much the same."""
        if error <= allowed:
            self.agrees, self.disagrees = True, False
        elif not self.agrees:
            self.share = max(self.share, share)
            for other, its_error in self._against:
                least = min(0.5 * error, 0.5 * its_error, 0.1 * max(norm(central), norm(other)))
                self.disagrees |= norm(central - other) <= least
            self._against.append((central, error))


def norm(x: Tensor) -> float:
    """‖x‖₂ in float64, also where the squares of its elements leave that range."""
    x = x.detach().double()
    size = torch.linalg.vector_norm(x).item()
    if 1e-100 < size < 1e100:
        return size
    peak = torch.linalg.vector_norm(x, torch.inf).item() if x.numel() else 0.0
    return peak * torch.linalg.vector_norm(x / peak).item() if peak else 0.0


def _beside(image: Tensor, scale: float) -> Tensor:
    """A point near the image, within its range, where no two pixels are alike and none is at a bound."""
    generator = torch.Generator("cpu").manual_seed(20171127)
    share, towards = torch.rand(2, *image.shape, generator=generator, dtype=torch.float64, device="cpu").to(
        image.device
    )
    x = image.detach().double()
    low, high = x.min(), x.max()
    if high == low:
        return x + 0.01 * scale * (0.2 + 0.8 * share)
    return x + 0.01 * (0.2 + 0.8 * share) * (low + (0.25 + 0.5 * towards) * (high - low) - x)
