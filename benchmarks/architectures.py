"""Which engine `linearize` takes for the architectures that people use, and how right it is. Random weights, float64.

For torchvision's architectures, and one of timm and of transformers, where installed: J v against central differences,
the adjoint identity, and whether repeated products have the same bits. Prints a Markdown table; a quarter of an hour
on 2 cores. Names as arguments choose among them.
"""

import importlib.util
import sys

import torch
from torch import nn

from fisherop import linearize

STEPS = (1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
VANISHING = ("googlenet", "inception_v3", "shufflenet_v2_x0_5")  # with the statistics that batch norms start from
SIZES = {"inception_v3": 299}
TORCHVISION = [
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
]


class Output(nn.Module):
    """The output of a transformers model as a dict of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict:
        return dict(self.model(x))


def models() -> dict:
    """A builder for every architecture that can be built here."""
    found = {}
    if importlib.util.find_spec("torchvision"):
        import torchvision

        for name in TORCHVISION:
            arguments = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            found[name] = lambda name=name, arguments=arguments: torchvision.models.get_model(name, **arguments)
    if importlib.util.find_spec("timm"):
        import timm

        found["timm mobilevit_xs"] = lambda: timm.create_model("mobilevit_xs")
    if importlib.util.find_spec("transformers"):
        import transformers

        found["transformers ViTModel"] = lambda: Output(
            transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=4, hidden_size=192, num_attention_heads=3))
        )
    return found


def prepared(name: str, model: nn.Module, size: int) -> nn.Module:
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
            model(torch.rand(2, 3, size, size, dtype=torch.float64))
    return model.eval()


def main() -> None:
    print("| architecture | image | engine | J v against differences | adjoint identity | bits repeat |")
    print("|---|---|---|---|---|---|")
    for name, build in models().items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        torch.manual_seed(0)
        size = SIZES.get(name, 224)
        model = prepared(name, build(), size)
        x = torch.rand(1, 3, size, size, dtype=torch.float64)
        lin = linearize(x, model, chunk_size=1)
        v, u = torch.randn(1, *x.shape, dtype=x.dtype), torch.randn(1, lin.response_size, dtype=x.dtype)
        jv, jtu = lin.jvp(v), lin.vjp(u)
        bits = all(torch.equal(lin.jvp(v), jv) and torch.equal(lin.vjp(u), jtu) for _ in range(2))
        error = min(float((jv - difference(lin, v, h)).norm() / jv.norm()) for h in STEPS)
        adjoint = abs(float((jv * u).sum() - (jtu * v).sum())) / float(jv.norm() * u.norm())
        engine = lin.engine_report[-1].split(":")[0]
        print(f"| {name} | {size}² | {engine} | {error:.0e} | {adjoint:.0e} | {'yes' if bits else 'NO'} |", flush=True)


def difference(lin, v: torch.Tensor, h: float) -> torch.Tensor:
    """Central differences of the response; kinks of the activations make a smaller step better, rounding a larger."""
    with torch.no_grad():
        ahead, behind = (lin.respond(lin.image + sign * h * v[0]) for sign in (1, -1))
    return (ahead - behind) / (2 * h)


if __name__ == "__main__":
    main()
