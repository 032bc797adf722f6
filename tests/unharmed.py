"""Whether a model is as before, with nothing of a transform, a graph or a recording left in it."""

import gc
import random
import types
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from helpers import assert_close
from kinds import flat, plain
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import checkpoint


def respond(model, x: Tensor) -> Tensor:
    """What a plain call of the user's gives, flat."""
    with torch.no_grad():
        return flat(plain(model)(x.clone()))


def tensors_in(thing, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a model holds: its own, in its containers, in what its hooks hold, in a function's closure."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        yield path, thing
        return
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, types.FunctionType):
        parts = dict(zip(thing.__code__.co_freevars, (c.cell_contents for c in thing.__closure__ or ()), strict=True))
    elif isinstance(thing, Mapping):
        parts = thing
    elif isinstance(thing, list | tuple):
        parts = dict(enumerate(thing))
    elif isinstance(thing, nn.Module) or type(thing).__module__ == "kinds":
        parts = vars(thing)
    else:
        return
    for place, (key, part) in enumerate(list(parts.items())):  # hooks' keys are numbers that count on
        yield from tensors_in(part, f"{path}.{key if isinstance(key, str) else place}", seen)


def place(tensor: Tensor) -> int:
    return tensor.data_ptr() if tensor.layout == torch.strided else id(tensor)


def state(model) -> dict[str, tuple[Tensor, int, Tensor]]:
    return {path: (t, place(t), t.detach().clone()) for path, t in tensors_in(model)}


def flags(model) -> list:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [(m.training, len(m._forward_hooks), [p.requires_grad for p in m.parameters(False)]) for m in modules]


def is_ordinary(tensor: Tensor) -> bool:
    """No graph, no tangent, no transform's or recording's wrapper."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return False
    tangent = None
    if tensor.layout == torch.strided:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(tensor).tangent
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tangent is None
        and tensor.grad_fn is None
        and tensor.grad is None
        and tensor.requires_grad <= isinstance(tensor, nn.Parameter)
        and not tensor.is_inference()
    )


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.to_dense(), b.to_dense())


def check_unharmed(model, before: dict, control, *, writes: bool = False) -> None:
    """`before` is its state, `control` an equal model, called once, plainly; `writes`: it moves its parameters."""
    now, expected = dict(tensors_in(model)), dict(tensors_in(control))
    assert set(before) <= set(now) <= set(expected), "nothing is lost, and nothing new but what a plain call sets up"
    for path, tensor in now.items():
        assert is_ordinary(tensor), f"{path} is no ordinary tensor"
        if path in before:
            had, where, value = before[path]
            assert same(tensor, value) or same(tensor, expected[path]), f"{path} has changed"
            if isinstance(had, nn.Parameter):
                assert tensor is had, f"{path} is another object"
            assert writes or place(tensor) == where, f"{path} lies elsewhere"
        else:
            assert_close(tensor.cpu(), expected[path].detach().cpu(), tensor.dtype)
    if isinstance(model, nn.Module):
        assert dict(model.named_buffers()).keys() == dict(control.named_buffers()).keys(), "caches are kept"
        assert flags(model) == flags(control)


def settings():
    """What an interrupt might leave changed."""
    _, *numpy = np.random.get_state()  # noqa: NPY002
    return {
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "mha": torch.backends.mha.get_fastpath_enabled(),
        "sdp": [getattr(torch._C, f"_get_{n}_sdp_enabled")() for n in ("flash", "mem_efficient", "math", "cudnn")],
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "transforms": torch._C._functorch.get_dynamic_layer_stack_depth(),
        "level": forward_ad._current_level,
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "checkpoint": getattr(checkpoint, "_NoopSaveInputs", None),
        "gc": gc.isenabled(),
        "warnings": (warnings.filters[:], warnings.showwarning),
        "random": random.getstate(),
        "numpy": [part.tobytes() if isinstance(part, np.ndarray) else part for part in numpy],
        "torch": torch.get_rng_state().tolist(),
    }
