"""A search by one position at a time finds what one by whole prefixes finds; forward is as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgi import DGIModel, ModelConfig
from dgi.model import decoders, dgi_model
from dgi.model.decoders import TransformerDecoder, caches
from dgi.model.encoders import QueryEncoding
from dgi_kernels import BeamResult, Trie, beam_search

SIZES = (7, 5, 6, 4)


def make_model(decoder: Callable[[ModelConfig], nn.Module] | None = None, **changes: Any) -> DGIModel:
    given: dict[str, Any] = {"dim": 16, "codebook_sizes": SIZES, "attention_heads": 2, "decoder_layers": 2}
    config = ModelConfig(**given | {"vocabulary_size": 10} | changes)
    return DGIModel(config, decoder=None if decoder is None else decoder(config)).eval()


def requests(model: DGIModel, batch: int = 5) -> QueryEncoding:
    width = model.encoder.width
    mask = torch.rand(batch, 9) < 0.6
    mask[:, 0] = True
    return QueryEncoding(torch.randn(batch, model.config.dim), torch.randn(batch, 9, width), mask)


def searched(model: DGIModel, query: QueryEncoding, trie: Trie, beams: int = 8, **options: Any) -> BeamResult:
    step = model.beam_step_function(query)
    return beam_search(trie, step, batch_size=len(query.vector), num_beams=beams, **options)


def whole_prefixes(model: DGIModel, query: QueryEncoding, trie: Trie, *args: Any, **options: Any) -> BeamResult:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dgi_model, "caches", lambda decoder: False)
        return searched(model, query, trie, *args, **options)


def assert_same(got: BeamResult, want: BeamResult) -> None:
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-5, atol=1e-4)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.nodes, want.nodes)


@pytest.fixture(params=["whole", "ragged", "few"])
def trie(request: pytest.FixtureRequest) -> Trie:
    if request.param == "few":  # fewer semantic IDs than beams: some are dead from the first level on
        return Trie.from_codes([[0, 1, 2, 3], [0, 1, 2, 0], [3, 1, 0, 0]], codebook_sizes=SIZES)
    rows = [[random.randrange(size) for size in SIZES] for _ in range(150)]
    if request.param == "ragged":
        rows = [row[: random.randint(1, 4)] for row in rows]
    return Trie.from_codes(rows, codebook_sizes=SIZES)


@pytest.mark.parametrize("filtered", [False, True])
@torch.no_grad()
def test_a_search_finds_what_whole_prefixes_find(trie: Trie, filtered: bool) -> None:
    model = make_model()
    query = requests(model)
    filters = None
    if filtered:
        few = torch.rand(trie.num_items) < 0.2
        few[0] = True
        filters = [None, trie.filter(mask=few), trie.filter(items=torch.tensor([0])), None, trie.filter(mask=few)]
    assert_same(searched(model, query, trie, filters=filters), whole_prefixes(model, query, trie, filters=filters))


@torch.no_grad()
def test_a_search_equals_whole_prefixes_in_other_dtypes_and_widths() -> None:
    trie = Trie.from_codes([[random.randrange(size) for size in SIZES] for _ in range(90)], codebook_sizes=SIZES)
    model = make_model(lambda config: TransformerDecoder(config, 12)).double()
    model.encoder.width = 12  # the memory is mapped to the decoder's width
    query = QueryEncoding(*(x.double() if x.is_floating_point() else x for x in requests(model, 1)))
    got, want = searched(model, query, trie, beams=1), whole_prefixes(model, query, trie, beams=1)
    assert torch.equal(got.codes, want.codes)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-6, atol=1e-6)


class Summing(nn.Module):
    """A decoder of the user's own: h is the sum of what was read, and of the memory."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.map = nn.Linear(config.dim, config.dim)
        self.floats_per_position = config.dim
        self.calls: list[str] = []

    def forward(self, inputs: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        self.calls.append("forward")
        before = torch.cat([(memory * mask.unsqueeze(-1)).sum(1, keepdim=True), inputs], 1)
        return self.map(before.cumsum(1))


class CachedSumming(Summing):
    def start_search(self, memory: Tensor, mask: Tensor) -> Tensor:
        return (memory * mask.unsqueeze(-1)).sum(1, keepdim=True)

    def search_step(self, cache: Tensor, inputs: Tensor | None, parents: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls.append("step")
        if inputs is not None and parents is not None:
            cache = cache.gather(1, parents.unsqueeze(-1).expand(-1, -1, cache.shape[-1])) + inputs
        return self.map(cache), cache


class OtherForward(CachedSumming):
    def forward(self, inputs: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return 2 * super().forward(inputs, memory, mask)


@torch.no_grad()
def test_the_users_own_decoder_is_asked_for_steps_if_it_has_them(trie: Trie) -> None:
    torch.manual_seed(0)
    cached = make_model(CachedSumming)
    query = requests(cached)
    torch.manual_seed(0)
    plain = make_model(Summing)
    assert_same(searched(cached, query, trie), searched(plain, query, trie))
    assert set(cached.decoder.calls) == {"step"} and set(plain.decoder.calls) == {"forward"}


@torch.no_grad()
def test_steps_that_forward_would_not_take_are_not_taken() -> None:
    """A forward that is overridden or hooked alone must be searched with; dropout has no cache."""
    model = make_model(OtherForward)
    assert not caches(model.decoder) and caches(make_model(CachedSumming).decoder)
    query = requests(model)
    hidden = model.beam_step_function(query)(0, None, None).h
    torch.testing.assert_close(hidden, model.decoder(hidden.new_empty(5, 0, 16), query.memory, query.mask))
    hooked = make_model().decoder
    assert caches(hooked)
    handle = hooked.register_forward_hook(lambda *_: None)
    assert not caches(hooked)
    handle.remove()
    assert caches(hooked) and not caches(hooked.train())


def test_steps_pass_gradients_on_as_whole_prefixes_do() -> None:
    model = make_model()
    query, tokens = requests(model, 2), torch.tensor([[1, 2, 0], [4, 4, 3]])
    parents = torch.zeros_like(tokens)

    def gradients() -> list[Tensor]:
        step = model.beam_step_function(query)
        first = step(0, None, None).h
        loss = first.square().sum() + step(1, tokens, parents).h.sin().sum()
        return list(torch.autograd.grad(loss, [*model.decoder.parameters()], materialize_grads=True))

    got = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dgi_model, "caches", lambda decoder: False)
        want = gradients()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_the_memory_is_never_repeated_for_the_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory O(B M L): no tensor that a step is given or leaves grows with beams times the request's length."""
    seen: list[int] = []

    def recorded(
        states: Tensor, layers: Any, memory: Any, mask: Tensor, past: Any, ancestors: Any, **options: Any
    ) -> Any:
        found = step(states, layers, memory, mask, past, ancestors, **options)
        seen.extend(x.numel() for x in (states, *memory, mask, *past, *ancestors, *found))
        return found

    step = decoders.decoder_step
    monkeypatch.setattr(decoders, "decoder_step", recorded)
    model = make_model()
    slots, beams, batch = 400, 30, 2
    query = QueryEncoding(
        torch.randn(batch, 16), torch.randn(batch, slots, 16), torch.ones(batch, slots, dtype=torch.bool)
    )
    rows = [[random.randrange(size) for size in SIZES] for _ in range(300)]
    searched(model, query, Trie.from_codes(rows, codebook_sizes=SIZES), beams)
    assert max(seen) == batch * slots * 2 * 16 < batch * beams * slots * 16
