"""Which engine `linearize` takes for the architectures that people use, and how right it is. Random weights, float64.

For plenoptic, torchvision, timm, transformers and kornia, where installed: J v against central differences, the adjoint
identity, whether repeated products have the same bits, and whether the model is unharmed: the same parameters and
buffers with the same values, no tensor with a graph left in it, and a copy of it can be made. Prints a Markdown table;
half an hour on 2 cores. Names as arguments choose among them: whole names, or packages.
"""

import copy
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisherop import linearize

STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
COLOUR = (1, 3, 224, 224)
VANISHING = ("googlenet", "inception_v3", "shufflenet_v2_x0_5")  # with the statistics that batch norms start from
FRONT_ENDS = (
    "Gaussian",
    "CenterSurround",
    "LinearNonlinear",
    "LuminanceGainControl",
    "LuminanceContrastGainControl",
    "OnOff",
)
TORCHVISION = (
    "alexnet",
    "vgg11_bn",
    "resnet18",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
    "inception_v3",
)
TIMM = (
    "mobilevit_xs",
    "convnextv2_atto",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "eva02_tiny_patch14_224",
    "levit_128s",
    "mobilenetv4_conv_small",
    "repvit_m0_9",
    "vit_tiny_patch16_224",
    "xcit_nano_12_p16_224",
)
TRANSFORMERS = {  # the options of a small configuration
    "ViT": {"num_hidden_layers": 4, "hidden_size": 192, "num_attention_heads": 3},
    "CLIPVision": {"num_hidden_layers": 2, "hidden_size": 192, "num_attention_heads": 3},
    "Dinov2": {"num_hidden_layers": 2, "hidden_size": 192, "num_attention_heads": 3},
    "Segformer": {"depths": [1, 1, 1, 1]},
    "SiglipVision": {"num_hidden_layers": 2, "hidden_size": 192, "num_attention_heads": 3},
    "Swin": {"depths": [1, 1, 1, 1], "embed_dim": 48, "num_heads": [1, 2, 4, 8]},
}
Found = dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]


class Distance(nn.Module):
    """A metric, to one image."""

    def __init__(self, metric: nn.Module, size: int) -> None:
        super().__init__()
        self.metric = metric
        self.register_buffer("reference", torch.rand(1, 3, size, size))

    def forward(self, x: Tensor) -> Tensor:
        return self.metric(x, self.reference)


class Embedded(nn.Module):
    """A language model, from embeddings in the image's place."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, x: Tensor) -> Any:
        return self.language_model(inputs_embeds=x, use_cache=False)


def of_plenoptic(plenoptic: Any) -> Found:
    found: Found = {}
    for name in FRONT_ENDS:
        for cached in (False, True):
            found[f"{name}, {'cached' if cached else 'no cache'}"] = (
                lambda name=name, cached=cached: getattr(plenoptic.models, name)(31, cache_filt=cached),
                (1, 1, 64, 64),
            )
    found["LaplacianPyramid"] = lambda: plenoptic.process.LaplacianPyramid(), (1, 1, 64, 64)
    found["SteerablePyramidFreq"] = lambda: plenoptic.process.SteerablePyramidFreq((64, 64)), (1, 1, 64, 64)
    found["PortillaSimoncelli"] = lambda: plenoptic.models.PortillaSimoncelli((64, 64), 3), (1, 1, 64, 64)
    return found


def of_torchvision(torchvision: Any) -> Found:
    found: Found = {}
    for name in TORCHVISION:
        arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        size = 299 if name == "inception_v3" else 224
        found[name] = (
            lambda name=name, arguments=arguments: torchvision.models.get_model(name, **arguments),
            (1, 3, size, size),
        )
    return found


def of_timm(timm: Any) -> Found:
    return {name: (lambda name=name: timm.create_model(name), COLOUR) for name in TIMM}


def of_transformers(transformers: Any) -> Found:
    def build(name: str) -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**TRANSFORMERS[name])
        return getattr(transformers, f"{name}Model")(config)

    def language() -> nn.Module:
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 0}
        return Embedded(transformers.GPT2Model(transformers.GPT2Config(**sizes)))

    found: Found = {name: (lambda name=name: build(name), COLOUR) for name in TRANSFORMERS}
    return found | {"GPT2": (language, (1, 16, 64))}


def of_kornia(kornia: Any) -> Found:
    return {
        "SSIMLoss": (lambda: Distance(kornia.losses.SSIMLoss(11), 64), (1, 3, 64, 64)),
        "MS_SSIMLoss": (lambda: Distance(kornia.losses.MS_SSIMLoss(), 64), (1, 3, 64, 64)),
        "RgbToLab": (kornia.color.RgbToLab, (1, 3, 64, 64)),
        "Sobel": (kornia.filters.Sobel, (1, 3, 64, 64)),
        "UnsharpMask": (lambda: kornia.filters.UnsharpMask((9, 9), (2.0, 2.0)), (1, 3, 64, 64)),
        "TFeat": (lambda: kornia.feature.TFeat(False), (1, 1, 32, 32)),
    }


PACKAGES = {
    "plenoptic": of_plenoptic,
    "torchvision": of_torchvision,
    "timm": of_timm,
    "transformers": of_transformers,
    "kornia": of_kornia,
}


def models(chosen: list[str]) -> Iterator[tuple[str, str, Callable[[], nn.Module], tuple[int, ...]]]:
    """Package, name, builder and image shape of every architecture that is chosen and can be built here."""
    for package, find in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            continue
        for name, (build, shape) in find(importlib.import_module(package)).items():
            if not chosen or package in chosen or name in chosen:
                yield package, name, build, shape


def prepared(name: str, model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """In float64 and evaluation mode, with a Jacobian that is neither zero nor lost in rounding.

    Matrices that are initialised to zero or nearly so are drawn at random; some models' batch norms get the statistics
    of a batch.
    """
    model = model.double().eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for p in model.parameters():
            if float(p.abs().max()) < 1e-4 and p.ndim > 1:
                nn.init.normal_(p, std=0.02)
        if name in VANISHING:
            for norm in norms:
                norm.momentum = None
                norm.train()
            model(torch.rand(2, *shape[1:], dtype=torch.float64))
    return model.eval()


def difference(lin: Any, v: Tensor, h: float) -> Tensor:
    """Central differences of the response; kinks of the activations make a smaller step better, rounding a larger."""
    with torch.no_grad():
        ahead, behind = (lin.respond(lin.image + sign * h * v[0]) for sign in (1, -1))
    return (ahead - behind) / (2 * h)


def harm(model: nn.Module, parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> str:
    """What is not as before, in a word or two; empty where nothing is."""
    if any(dict(model.named_parameters())[name] is not p for name, p in parameters.items()):
        return "a parameter replaced"
    state = model.state_dict()
    if any(not torch.equal(state[name], value) for name, value in values.items()):
        return "a value changed"
    kept = [t for m in model.modules() for t in (*m._buffers.values(), *vars(m).values()) if isinstance(t, Tensor)]
    if any(t.grad_fn is not None for t in kept) or any(p.grad is not None for p in parameters.values()):
        return "a graph left"
    try:
        copy.deepcopy(model)
    except Exception as error:
        return f"no copy: {type(error).__name__}"
    return ""


def row(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[str]:
    """The cells of an architecture's row."""
    torch.manual_seed(0)
    model = prepared(name, build(), shape)
    parameters = dict(model.named_parameters())
    values = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.rand(shape, dtype=torch.float64)
    lin = linearize(x, model, chunk_size=1)
    v, u = torch.randn(1, *x.shape, dtype=x.dtype), torch.randn(1, lin.response_size, dtype=x.dtype)
    jv, jtu = lin.jvp(v), lin.vjp(u)
    bits = all(torch.equal(lin.jvp(v), jv) and torch.equal(lin.vjp(u), jtu) for _ in range(2))
    error = min(float((jv - difference(lin, v, h)).norm() / jv.norm()) for h in STEPS)
    adjoint = abs(float((jv * u).sum() - (jtu * v).sum())) / float(jv.norm() * u.norm())
    engine = lin.engine_report[-1].split(":")[0]
    unharmed = harm(model, parameters, values) or "yes"
    return [engine, f"{error:.0e}", f"{adjoint:.0e}", "yes" if bits else "NO", unharmed]


def main() -> None:
    columns = ["architecture", "image", "engine", "J v against differences", "adjoint identity", "bits repeat"]
    columns.append("model unharmed")
    print("|" + "|".join(f" {column} " for column in columns) + "|")
    print("|" + "---|" * len(columns))
    for package, name, build, shape in models(sys.argv[1:]):
        try:
            cells = row(name, build, shape)
        except Exception as error:
            traceback.print_exc()
            cells = [f"{type(error).__name__}: {str(error).splitlines()[0][:80]}", *[""] * 4]
        print(f"| {package} {name} | {'×'.join(map(str, shape[1:]))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
