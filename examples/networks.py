"""Networks for the examples, where torchvision need not be installed."""

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut (He, Zhang, Ren and Sun 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(x + shortcut)


class ResNet18(nn.Module):
    """ResNet18 with the layers and the parameters' names of torchvision's: (1, 3, H, W) → (1, 1000).

    References
    ----------
    He, Zhang, Ren and Sun 2016, Deep residual learning for image recognition, CVPR, Table 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        for i in range(1, 5):
            first = BasicBlock(widths[i - 1], widths[i], 1 if i == 1 else 2)
            setattr(self, f"layer{i}", nn.Sequential(first, BasicBlock(widths[i], widths[i], 1)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 1000)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class VGG16Features(nn.Module):
    """The convolutional part of VGG16, with the layers and the parameters' names of torchvision's.

    References
    ----------
    Simonyan and Zisserman 2015, Very deep convolutional networks for large-scale image recognition, ICLR, Table 1, D.
    """

    def __init__(self) -> None:
        super().__init__()
        layers, inputs = [], 3
        for outputs in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1), nn.ReLU(inplace=True)] if outputs else [nn.MaxPool2d(2, 2)]
            inputs = outputs or inputs
        self.features = nn.Sequential(*layers)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


def he_initialise(model: nn.Module) -> None:
    """Random convolutions that keep the responses' size (He, Zhang, Ren and Sun 2015, ICCV, equation 15); biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def load_imagenet_weights(model: nn.Module, name: str) -> str:
    """Load torchvision's weights of its model `name`, as far as `model` has these layers; say which it has now."""
    try:
        from torchvision.models import get_model_weights

        state = get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=False)
    except ImportError:
        return "random weights: those of ImageNet come with torchvision, which is not installed"
    except OSError as error:
        return f"random weights: those of ImageNet could not be downloaded ({error})"
    own = model.state_dict()
    model.load_state_dict({key: value for key, value in state.items() if key in own})
    return "weights trained on ImageNet"


class Normalise(nn.Module):
    """From values between 0 and 1 to those that networks of ImageNet expect: (1, 3, H, W), a grey image thrice."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std
