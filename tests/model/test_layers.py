from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import assert_close, small_image
from torch import nn

from fisherop import JacobianOperator, LayerResponse


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.act = nn.Softplus()

    def forward(self, x):
        return x + self.act(self.conv(self.act(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 2, 1)
        self.layer2 = nn.Sequential(Block(), Block())
        self.drop = nn.Dropout()
        self.rnn = nn.RNN(4, 3, batch_first=True)
        self.ran = []
        for name, module in self.named_modules():
            module.register_forward_hook(lambda *_, name=name: self.ran.append(name))

    def forward(self, x):
        x = self.layer2(self.stem(x))
        return self.rnn(self.drop(x).reshape(1, -1, 4))


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double().eval()


def test_response_is_the_layers_and_nothing_beyond_runs(net):
    image = small_image()
    wanted = net.layer2[0](net.stem(image))
    hooks = [len(m._forward_hooks) for m in net.modules()]
    response = LayerResponse(net, "layer2.0")
    net.ran.clear()
    assert torch.equal(response(image), wanted)
    assert not {"layer2.1", "layer2", "drop", "rnn", ""} & set(net.ran) and "stem" in net.ran
    assert [len(m._forward_hooks) for m in net.modules()] == hooks
    jacobian = torch.autograd.functional.jacobian(lambda x: net.layer2[0](net.stem(x)), image)
    assert_close(JacobianOperator(image, response).to_dense(), jacobian.reshape(48, 48), torch.float64)


@pytest.mark.parametrize("call", [0, 1])
def test_a_module_called_twice_takes_call(net, call):
    image = small_image()
    block = net.layer2[0]
    x = net.stem(image)
    calls = [block.act(x), block.act(block.conv(block.act(x)))]
    assert torch.equal(LayerResponse(net, "layer2.0.act", call=call)(image), calls[call])


def test_tuples_pass_through(net):
    output = LayerResponse(net, "rnn")(small_image())
    assert isinstance(output, tuple)
    assert JacobianOperator(small_image(), LayerResponse(net, "rnn")).shape == (36 + 3, 48)


def test_the_models_state_is_not_touched(net):
    net.layer2.train()
    flags = [m.training for m in net.modules()]
    assert not LayerResponse(net, "stem").training
    assert [m.training for m in net.modules()] == flags


def test_threads_do_not_meet(net):
    image = small_image()
    names = ["stem", "layer2.0", "layer2.1", "stem", "layer2.0.conv"] * 8
    wanted = [LayerResponse(net, name)(image) for name in names]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda name: LayerResponse(net, name)(image), names))
    assert all(map(torch.equal, found, wanted))


def test_hook_is_removed_after_an_exception(net):
    with pytest.raises(RuntimeError):
        LayerResponse(net, "rnn")(torch.ones(1, 5, 5))
    assert all(len(m._forward_hooks) == 1 for m in net.modules())


def test_bad_arguments(net):
    with pytest.raises(ValueError, match=r"no layer 'layer2\.2'; the nearest are .*'layer2\.1'.*; all are in dict"):
        LayerResponse(net, "layer2.2")
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        LayerResponse(lambda x: x, "layer")
    with pytest.raises(ValueError, match="call must be an integer from 0, got -1"):
        LayerResponse(net, "stem", call=-1)
    with pytest.raises(RuntimeError, match="layer 'stem' was called 1 times in the forward pass, so that call=1 never"):
        LayerResponse(net, "stem", call=1)(small_image())
    assert np.all([len(m._forward_hooks) == 1 for m in net.modules()])


def test_says_what_it_is(net):
    assert "layer='stem', call=0" in repr(LayerResponse(net, "stem"))
