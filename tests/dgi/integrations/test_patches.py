"""Our Gumbel-Softmax in the place of torch's, and quantizers made of codebooks trained elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dgi.integrations import gumbel_softmax_patch, residual_quantizer_from
from dgi_kernels import assign_codes, gumbel_softmax, residual_quantize
from dgi_kernels.enums import METRICS
from dgi_kernels.types import Metric


def test_gumbel_softmax_is_ours_inside_the_block() -> None:
    original, logits = F.gumbel_softmax, torch.randn(5, 9)
    torch.manual_seed(3)
    expected = gumbel_softmax(logits, 0.7), gumbel_softmax(logits, 0.5, True)
    with gumbel_softmax_patch():
        torch.manual_seed(3)
        soft, hard = F.gumbel_softmax(logits, tau=0.7), F.gumbel_softmax(logits, tau=0.5, hard=True, dim=1)
    assert torch.equal(soft, expected[0]) and torch.equal(hard, expected[1])
    assert F.gumbel_softmax is original
    with pytest.raises(KeyError), gumbel_softmax_patch():
        raise KeyError
    assert F.gumbel_softmax is original


def test_gumbel_softmax_passes_gradients() -> None:
    logits = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(4, 6)
    with gumbel_softmax_patch():
        torch.manual_seed(3)
        (F.gumbel_softmax(logits, 0.8) * weight).sum().backward()
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad((gumbel_softmax(logits, 0.8) * weight).sum(), logits)
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize(("shape", "options"), [((4, 6), {"dim": 0}), ((0, 6), {}), ((3, 4, 5), {"dim": -2})])
def test_other_gumbel_softmax_calls_stay_torchs(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    logits = torch.randn(shape)
    torch.manual_seed(3)
    expected = F.gumbel_softmax(logits, **options)
    with gumbel_softmax_patch():
        torch.manual_seed(3)
        assert torch.equal(F.gumbel_softmax(logits, **options), expected)


@pytest.mark.parametrize(
    "tau",
    [
        pytest.param(torch.linspace(0.5, 1.5, 4).unsqueeze(1), id="one a row"),
        pytest.param(torch.tensor(1), id="an integer"),
        pytest.param(torch.tensor([[0.5]]).expand(1, 1), id="two dimensions"),
        0.0,
        -1.0,
        float("inf"),
        True,
        pytest.param(torch.tensor(0.0), id="a zero tensor"),
        pytest.param(torch.tensor([0.5], dtype=torch.float64), id="another dtype"),
        pytest.param(torch.linspace(0.5, 1.5, 6), id="one a column"),
    ],
)
def test_temperatures_that_are_not_ours_stay_torchs(tau: Any) -> None:
    """Guards against calls that torch takes and that raise inside the block."""
    logits = torch.randn(4, 6) if not isinstance(tau, torch.Tensor) or tau.shape != (1, 1) else torch.randn(6)
    torch.manual_seed(3)
    expected = F.gumbel_softmax(logits, tau)
    with gumbel_softmax_patch():
        torch.manual_seed(3)
        actual = F.gumbel_softmax(logits, tau)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_temperature_of_one_element_is_ours(shape: tuple[int, ...]) -> None:
    tau, logits = torch.nn.Parameter(torch.full(shape, 0.7)), torch.randn(4, 6)
    weight = torch.randn(4, 6)
    torch.manual_seed(3)
    expected = gumbel_softmax(logits, 0.7)
    with gumbel_softmax_patch():
        torch.manual_seed(3)
        actual = F.gumbel_softmax(logits, tau)
    assert torch.equal(actual, expected)
    (actual * weight).sum().backward()
    assert tau.grad is not None and tau.grad.shape == shape and tau.grad.item() != 0


def test_logits_that_are_not_ours_stay_torchs() -> None:
    class Own(torch.Tensor):
        pass

    with gumbel_softmax_patch():
        assert F.gumbel_softmax(torch.randn(4, 6, device="meta")).is_meta
        assert isinstance(F.gumbel_softmax(torch.randn(4, 6).as_subclass(Own)), Own)
        with pytest.warns(UserWarning, match="eps"):
            F.gumbel_softmax(torch.randn(4, 6), eps=1e-6)


def test_codes_of_given_codebooks() -> None:
    codebooks = [torch.randn(7, 12), torch.randn(9, 12)]
    z = torch.randn(200, 12)
    quantizer = residual_quantizer_from(codebooks)
    residual, expected = z.double(), []
    for codebook in codebooks:
        code = (F.normalize(residual, dim=1) @ F.normalize(codebook.double(), dim=1).T).argmax(1)
        residual = residual - codebook[code]
        expected.append(code)
    assert torch.equal(quantizer.assign(z), torch.stack(expected, 1))
    codebooks[0].zero_()
    assert quantizer.codebooks[0].abs().sum() > 0, "copied"


def test_codes_of_a_residual_vq() -> None:
    library = pytest.importorskip("vector_quantize_pytorch")
    source = library.ResidualVQ(dim=16, num_quantizers=3, codebook_size=20, use_cosine_sim=True, kmeans_init=True)
    z = torch.randn(500, 16)
    source.train()
    for _ in range(5):
        source(z)
    source.eval()
    quantizer = residual_quantizer_from(source)
    assert torch.equal(quantizer.assign(z), source(z)[1])
    assert len(quantizer.assign(z).unique(dim=0)) > 100
    with pytest.raises(ValueError, match="metric must be that of source, 'cosine'"):
        residual_quantizer_from(source, metric="euclidean")
    with pytest.raises(ValueError, match="no projections"):
        residual_quantizer_from(
            library.ResidualVQ(dim=16, num_quantizers=2, codebook_size=20, use_cosine_sim=True, codebook_dim=8)
        )


def test_codes_of_a_euclidean_residual_vq() -> None:
    """The default of vector-quantize-pytorch, far from 0."""
    library = pytest.importorskip("vector_quantize_pytorch")
    source = library.ResidualVQ(dim=16, num_quantizers=3, codebook_size=20, kmeans_init=True)
    z = torch.randn(500, 16) + 5
    for _ in range(5):
        source(z)
    source.eval()
    quantizer = residual_quantizer_from(source)
    assert quantizer.metric == "euclidean"
    assert torch.equal(quantizer.assign(z), source(z)[1])
    with pytest.raises(ValueError, match="affine_param"):
        residual_quantizer_from(library.ResidualVQ(dim=16, num_quantizers=2, codebook_size=20, affine_param=True))


@pytest.mark.parametrize("metric", METRICS)
def test_codes_of_given_codebooks_by_a_metric(metric: Metric) -> None:
    codebooks, z = [torch.randn(9, 12), torch.randn(7, 12)], torch.randn(100, 12)
    quantizer = residual_quantizer_from(codebooks, metric=metric)
    assert torch.equal(quantizer.assign(z), assign_codes(z, codebooks, metric=metric))
    soft = residual_quantize(z, codebooks, quantizer.scale, metric=metric, noise=False)
    torch.testing.assert_close(quantizer(z, noise=False).quantized, soft.quantized)


class Layer(torch.nn.Module):
    """As much of a VectorQuantize of vector-quantize-pytorch as is looked at."""

    has_projections = False

    def __init__(self, initted: bool, cosine: bool = True, affine: bool = False) -> None:
        super().__init__()
        self.use_cosine_sim = cosine
        self._codebook = torch.nn.Module()
        self._codebook.register_buffer("initted", torch.tensor(initted))
        self._codebook.affine_param = affine


class Quantizer(torch.nn.Module):
    """As much of a ResidualVQ."""

    def __init__(
        self,
        *,
        norm: float = 1.0,
        initted: bool = True,
        cosine: tuple[bool, bool] = (True, True),
        affine: bool = False,
        **options: int | None,
    ) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(True, cosine[0]), Layer(initted, cosine[1], affine)])
        self.codebooks = norm * F.normalize(torch.randn(2, 5, 8), dim=-1)
        for name, value in options.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 4, "eval_beam_size": 4}, "with 4 beams"),
        ({"beam_size": 1, "eval_beam_size": 3}, "with 3 beams"),
        ({"initted": False}, "no codebook at level 1 yet"),
        ({"norm": 1.5}, "vectors of norm 1"),
        ({"cosine": (False, True)}, "the same at all levels"),
        ({"cosine": (False, False), "affine": True}, "that of level 1 is transformed first"),
    ],
)
def test_a_residual_vq_with_other_codes_is_refused(options: dict[str, Any], message: str) -> None:
    """Guards against codes that differ from the source's without a word."""
    assert len(residual_quantizer_from(Quantizer(beam_size=4, eval_beam_size=1)).codebooks) == 2
    euclidean = Quantizer(norm=1.5, cosine=(False, False))
    z = torch.randn(40, 8)
    expected = assign_codes(z, list(euclidean.codebooks), metric="euclidean")
    assert torch.equal(residual_quantizer_from(euclidean).assign(z), expected)
    with pytest.raises(ValueError, match=message):
        residual_quantizer_from(Quantizer(**options))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], TypeError, "source must be a ResidualVQ or a sequence"),
        (torch.nn.Linear(2, 3), TypeError, "source must be a ResidualVQ or a sequence.*got Linear"),
        ([torch.randn(3, 4), torch.randn(3, 5)], ValueError, r"source\[1\] must have shape"),
        ([torch.full((3, 4), torch.nan)], ValueError, r"source\[0\] must be finite"),
    ],
)
def test_wrong_sources(source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        residual_quantizer_from(source)
