"""Every supported layer against torch.func, and every other one refused by name."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.probe import Probe, tapped_parameters
from assay.probe.layers import find_rule
from assay.tasks import Classification
from tests.probe.probe_oracle import check_probe

CLASSES = 3


def cross_entropy(run: Any, batch: Any) -> Tensor:
    return F.cross_entropy(run(batch[0]), batch[1], reduction="none")


class Flat(nn.Module):
    """A body, then class scores from what it gives by fixed, uneven weights; no parameters of its own."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x).flatten(1)
        weights = torch.linspace(-1, 1, h.shape[1] * CLASSES, dtype=h.dtype).sin().view(h.shape[1], CLASSES)
        return h.tanh() @ weights


def check(body: nn.Module, *shape: int, size: int = 4) -> None:
    torch.manual_seed(0)
    model = Flat(body).double()
    for parameter in model.parameters():  # norms start at ones and zeros, which hide mistakes
        nn.init.normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    batch = torch.randn(size, *shape, dtype=torch.float64), torch.randint(CLASSES, (size,))
    check_probe(model, Classification(), batch, cross_entropy)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    check(nn.Linear(5, 4, bias=bias), *shape)


PADDINGS = list(itertools.product(["zeros", "reflect", "replicate", "circular"], [0, 2, "same", "valid"]))


@pytest.mark.parametrize(("mode", "padding"), PADDINGS)
def test_conv2d_padding(mode: str, padding: Any) -> None:
    stride = 1 if padding == "same" else (2, 1)
    check(nn.Conv2d(2, 4, (3, 2), stride, padding, dilation=(1, 2), padding_mode=mode), 2, 7, 6)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_conv1d(mode: str) -> None:
    check(nn.Conv1d(3, 4, 4, stride=3, padding=2, dilation=2, padding_mode=mode), 3, 19)


def test_conv3d() -> None:
    check(nn.Conv3d(2, 4, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 1), padding_mode="replicate"), 2, 4, 5, 3)


# Many positions: the gradient is the smaller form. One position and wide groups: the zero-padded factors are.
@pytest.mark.parametrize("side", [3, 7])
@pytest.mark.parametrize(("channels", "out", "groups"), [(4, 6, 2), (6, 6, 6), (4, 12, 4)])
def test_grouped_and_depthwise(channels: int, out: int, groups: int, side: int) -> None:
    check(nn.Conv2d(channels, out, 3, groups=groups), channels, side, side)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("extra", [0, 1])
def test_transposed_convolutions(extra: int, groups: int) -> None:
    check(nn.ConvTranspose1d(4, 6, 3, 2, 1, extra, groups), 4, 5)
    check(nn.ConvTranspose2d(2, 4, (3, 2), (2, 3), (1, 0), extra, groups, dilation=(2, 1)), 2, 4, 3)
    check(nn.ConvTranspose3d(2, 2, (1, 2, 3), 2, 0, extra, groups, bias=False), 2, 2, 3, 2)
    check(nn.ConvTranspose1d(4, 6, 3, 2, 1, 2 + extra, groups, dilation=4), 4, 5)  # outputs that no input reaches


@pytest.mark.parametrize("tracked", [True, False])
def test_instance_norms(tracked: bool) -> None:
    check(nn.InstanceNorm1d(3, affine=True, track_running_stats=tracked), 3, 7)
    check(nn.InstanceNorm2d(3, affine=True, track_running_stats=tracked), 3, 4, 5)
    check(nn.InstanceNorm3d(2, affine=True, track_running_stats=tracked), 2, 3, 2, 4)


@pytest.mark.parametrize("slopes", [1, 3])
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 4)])
def test_prelu(shape: tuple[int, ...], slopes: int) -> None:
    check(nn.PReLU(slopes), *shape)


def test_a_convolution_that_runs_twice() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).tanh())

    check(Recurrent(), 2, 5, 4)


def test_grouped_convolutions_take_the_smaller_of_two_forms() -> None:
    def positions(conv: nn.Conv2d, side: int) -> int:
        rule = find_rule(conv)
        assert not isinstance(rule, str)
        inputs = torch.randn(2, conv.in_channels, side, side)
        return rule.factors(conv, inputs, conv(inputs)).inputs.shape[1]

    # depthwise at 25 positions: the 9 numbers per channel are fewer than the 25 windows
    assert positions(nn.Conv2d(6, 6, 3, groups=6), side=7) == 9
    # 2 groups at one position: 2 rows are fewer than the 36 weights that an output has
    assert positions(nn.Conv2d(8, 4, 3, groups=2), side=3) == 2


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding_with_repeated_ids(padding_idx: int | None) -> None:
    torch.manual_seed(0)
    model = Flat(nn.Embedding(6, 3, padding_idx=padding_idx)).double()
    batch = torch.randint(6, (5, 9)), torch.randint(CLASSES, (5,))  # 9 draws of 6 ids: some repeat
    check_probe(model, Classification(), batch, cross_entropy, forward_mode=padding_idx is None)


def test_embedding_of_one_id_per_sample() -> None:
    torch.manual_seed(0)
    batch = torch.tensor([0, 3, 3]), torch.tensor([0, 1, 2])
    check_probe(Flat(nn.Embedding(6, 3)).double(), Classification(), batch, cross_entropy)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
def test_layer_norm(shape: tuple[int, ...]) -> None:
    check(nn.LayerNorm(5), *shape)


def test_layer_norm_over_several_dimensions() -> None:
    check(nn.LayerNorm((2, 3)), 4, 2, 3)


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm(eps: float | None) -> None:
    check(nn.RMSNorm(5, eps=eps), 3, 5)


def test_group_norm() -> None:
    check(nn.GroupNorm(2, 6), 6, 3, 2)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d, (4,)),
        (nn.BatchNorm1d, (4, 3)),
        (nn.BatchNorm2d, (4, 3, 2)),
        (nn.BatchNorm3d, (4, 2, 3, 2)),
    ],
)
def test_batch_norm_with_running_statistics(norm: type[nn.Module], shape: tuple[int, ...]) -> None:
    check(norm(4), *shape)


class GatedRMSNorm(nn.Module):
    """Named as the family is, but it scales before it normalises: only the self-check can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 5))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def test_a_formula_that_its_name_belies_is_caught() -> None:
    batch = torch.randn(4, 5), torch.randint(CLASSES, (4,))
    with pytest.raises(RuntimeError, match=r"parameter 'body\.weight'"):
        Probe(Flat(GatedRMSNorm()), Classification())(batch)


class OddLSTM(nn.LSTM):
    """A subclass of a layer whose own steps are known: it may take others."""


REFUSED = {
    "subclass": (lambda: OddLSTM(3, 3), "OddLSTM"),
    "embedding bag": (lambda: nn.EmbeddingBag(4, 2, mode="max"), "EmbeddingBag"),
    "max_norm": (lambda: nn.Embedding(4, 2, max_norm=1.0), "max_norm"),
    "scale_grad_by_freq": (lambda: nn.Embedding(4, 2, scale_grad_by_freq=True), "scale_grad_by_freq"),
    "sparse": (lambda: nn.Embedding(4, 2, sparse=True), "sparse"),
    "sparse bag": (lambda: nn.EmbeddingBag(4, 2, sparse=True), "sparse"),
    "complex": (lambda: nn.Linear(3, 3, dtype=torch.complex64), "complex"),
    "complex and bare": (lambda: nn.ParameterList([torch.ones(3, dtype=torch.complex64)]), "complex"),
    "batch statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), "running statistics"),
    "weight norm": (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), "weight_g, weight_v"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_layers_are_named(case: str) -> None:
    make, reason = REFUSED[case]
    model = nn.ModuleDict({"known": nn.Linear(2, 2), "odd": make()})
    with pytest.raises(ValueError, match=rf"'odd(\.\w+)*' .*{reason}"):
        tapped_parameters(model)
    assert tapped_parameters(model, skip_unsupported=True) == ["known.weight", "known.bias"]
    assert tapped_parameters(model, "known") == ["known.weight", "known.bias"]
