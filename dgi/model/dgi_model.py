"""The model: item encoder → residual quantizer → decoder with soft teacher forcing, heads sharing the codebooks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dgi.config import InputKind, ModelConfig
from dgi.data.batches import Batch
from dgi.model.decoders import CachedDecoder, TransformerDecoder, caches
from dgi.model.encoders import Encoder, QueryEncoding, SequenceEncoder
from dgi.model.heads import CosineHead, InnerProductHead
from dgi.model.quantizer import ResidualQuantizer
from dgi_kernels import HiddenStates, ResidualQuantization, unique_codes

# (B, M, d) vectors of the codes just chosen and (B, M) parents, None in the first step -> hidden states (B, M, d)
_HiddenStep = Callable[[Tensor | None, Tensor | None], Tensor]


class DGIOutput(NamedTuple):
    """What :class:`dgi.DGILoss` reads.

    Attributes:
        z: (B, d) vectors of the clicked items.
        query: (B, d) z_q.
        item_rows: (B,) catalog rows of the clicked items.
        quantization: of z, or None for a :class:`DualEncoder`.
        codes: (B, m) hard codes of z, the decoder's targets, or None.
        hidden: (B, m, d) decoder states h_j, or None.
        candidates: (C, d) vectors of the batch's candidates, or None.
        candidate_rows: (C,) their catalog rows, or None.
        item_bias: (num_items,) a bias of every item, added to its logits of InfoNCE, or None.
    """

    z: Tensor
    query: Tensor
    item_rows: Tensor
    quantization: ResidualQuantization | None = None
    codes: Tensor | None = None
    hidden: Tensor | None = None
    candidates: Tensor | None = None
    candidate_rows: Tensor | None = None
    item_bias: Tensor | None = None


class DualEncoder(nn.Module):
    """Two towers and nothing else: the dense baseline, and what :class:`DGIModel` builds on.

    Args:
        config: the model's configuration.
        encoder: any module that is an :class:`dgi.model.encoders.Encoder`; built from ``config`` if None.
    """

    encoder: Encoder

    def __init__(self, config: ModelConfig, encoder: Encoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder if encoder is not None else build_encoder(config)

    def encode_queries(self, batch: Batch) -> QueryEncoding:
        """The batch's encoded queries."""
        return self._encode(batch)[2]

    def _encode(self, batch: Batch) -> tuple[Tensor | None, Tensor | None, QueryEncoding]:
        """Vectors of the clicked items (B, d) and of the candidates (C, d), if there are any, and encoded queries."""
        wanted = [x for x in (batch.targets, batch.candidates) if x is not None]
        if self.encoder.reads_item_vectors:
            items = self.encoder.encode_items(batch.item_features)
            query = self.encoder.encode_queries(batch, items)
            z, candidates = (None if x is None else items[x] for x in (batch.targets, batch.candidates))
            return z, candidates, query
        query = self.encoder.encode_queries(batch, None)
        if not wanted:
            return None, None, query
        needed, place = torch.unique(torch.cat(wanted), return_inverse=True)
        vectors = iter(self.encoder.encode_items(batch.item_features[needed])[place].split([len(x) for x in wanted]))
        z, candidates = (None if x is None else next(vectors) for x in (batch.targets, batch.candidates))
        return z, candidates, query

    def encode_clicks(self, batch: Batch) -> tuple[DGIOutput, QueryEncoding]:
        """What the loss reads of queries, clicked items and candidates, and the encoded queries."""
        z, candidates, query = self._encode(batch)
        if z is None or batch.targets is None:
            raise ValueError("batch must have targets in training; it has none")
        return DGIOutput(
            z,
            query.vector,
            batch.item_rows[batch.targets],
            candidates=candidates,
            candidate_rows=None if batch.candidates is None else batch.item_rows[batch.candidates],
        ), query

    def forward(
        self, batch: Batch, *, tau: float = 1.0, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> DGIOutput:
        """Encode the batch.  The arguments of the quantizer's noise are accepted, so that one trainer serves both."""
        return self.encode_clicks(batch)[0]


class DGIModel(DualEncoder):
    """Differentiable Geometric Indexing.

    Args:
        config: the model's configuration, ablation switches included.
        encoder: any module that is an :class:`dgi.model.encoders.Encoder`; built from ``config`` if None.
        decoder: any module ``(inputs (B, t, d), memory, mask) -> (B, t + 1, d)``; built from ``config`` if None. With
            the methods of :class:`dgi.model.decoders.CachedDecoder` it is searched one position at a time.

    Attributes:
        quantizer: :class:`dgi.ResidualQuantizer`, owner of the codebooks and of γ.
        heads: one :class:`dgi.CosineHead` per level; its weight *is* the codebook unless ``config.heads`` is separate.
        item_codes, item_keys: buffers (N, m) and (N,) int64: semantic IDs that training in stages has given to the
            items of its catalog, and :func:`item_keys` of those; None where IDs are what the quantizer makes of the
            vectors.
        item_bias: parameter (N,), a bias of every item in InfoNCE; None where none is learnt.
    """

    item_codes: Tensor | None
    item_keys: Tensor | None
    item_bias: nn.Parameter | None

    def __init__(self, config: ModelConfig, encoder: Encoder | None = None, decoder: nn.Module | None = None) -> None:
        super().__init__(config, encoder)
        self.decoder = decoder if decoder is not None else build_decoder(config, self.encoder)
        self.residual = config.residual_decoder or config.starts_at_vectors
        if self.residual and isinstance(self.decoder, TransformerDecoder):
            nn.init.zeros_(self.decoder.output.weight)
            nn.init.zeros_(self.decoder.output.bias)
        self.quantizer = ResidualQuantizer(
            config.dim,
            config.codebook_sizes,
            initial_scale=config.initial_scale,
            similarity=config.similarity,
            metric=config.metric or None,
        )
        head = CosineHead if config.similarity == "cosine" else InnerProductHead
        detached = config.gradient == "detached" and config.heads == "shared"
        self.heads = nn.ModuleList(
            head(self._head_weight(codebook), self.quantizer.log_scale, detached=detached, eps=self.quantizer.eps)
            for codebook in self.quantizer.codebooks
        )
        self.register_buffer("item_codes", None)
        self.register_buffer("item_keys", None)
        self.register_parameter("item_bias", None)

    def keep_items(self, num_items: int, *, codes: bool, bias: bool) -> None:
        """Make room for the semantic IDs of a catalog's items (-1 until they are given), and for their biases (0)."""
        device = self.quantizer.codebooks[0].device
        if codes:
            self.register_buffer("item_codes", torch.full((num_items, self.depth), -1, device=device))
            self.register_buffer("item_keys", torch.zeros(num_items, dtype=torch.int64, device=device))
        if bias:
            self.item_bias = nn.Parameter(torch.zeros(num_items, device=device))

    def _head_weight(self, codebook: nn.Parameter) -> nn.Parameter:
        if self.config.heads == "shared":
            return codebook
        return nn.Parameter(torch.randn_like(codebook) / codebook.shape[1] ** 0.5)

    @property
    def depth(self) -> int:
        """Number of levels m."""
        return len(self.heads)

    def encode_clicks(self, batch: Batch) -> tuple[DGIOutput, QueryEncoding]:
        output, query = super().encode_clicks(batch)
        return output._replace(item_bias=self.item_bias), query

    def forward(
        self,
        batch: Batch,
        *,
        tau: float = 1.0,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
        inputs: InputKind = "soft",
        fixed: bool = False,
    ) -> DGIOutput:
        """One training step's forward pass with soft teacher forcing: decoder inputs BOS, z̃_1, …, z̃_{m-1}.

        Args:
            batch: B rows with known targets.
            tau: Gumbel-Softmax temperature.
            seed, row_offset: of the quantizer's noise; ``row_offset`` is the first row's place in the global batch.
            inputs: ``soft``; ``hard``: the decoder reads the vectors of the codes, and nothing is quantized; ``mixed``:
                it reads those, and the gradient is that of the z̃_j.
            fixed: targets are ``item_codes``, not the codes of today's vectors.
        """
        output, query = self.encode_clicks(batch)
        z = output.z
        if fixed:
            assert self.item_codes is not None
            codes = self.item_codes[output.item_rows]
        else:
            codes = self.quantizer.assign(z)
        quantization = None
        if inputs != "hard":
            mode = "straight_through" if self.config.gradient == "straight_through" else "soft"
            quantization = self.quantizer(z, tau, mode=mode, seed=seed, row_offset=row_offset)
        read = self._decoder_inputs(codes, quantization, inputs)
        hidden = self.hidden_states(read[:, :-1], query)
        return output._replace(quantization=quantization, codes=codes, hidden=hidden)

    def hidden_states(self, inputs: Tensor, query: QueryEncoding) -> Tensor:
        """h_1 … h_{t+1} (B, t + 1, d) of the vectors (B, t, d) of the first t codes."""
        hidden = self.decoder(inputs, query.memory, query.mask)
        if not self.residual:
            return hidden
        start = query.vector.unsqueeze(1)
        return hidden + torch.cat([start, start - inputs.cumsum(1)], 1)

    def _decoder_inputs(self, codes: Tensor, quantization: ResidualQuantization | None, inputs: InputKind) -> Tensor:
        """(B, m, d) of codes (B, m): their vectors, the mixtures, or the first with the gradient of the second."""
        if quantization is not None and inputs == "soft" and self.config.gradient != "detached":
            return quantization.quantized
        vectors = torch.stack([self.quantizer.embed(codes[:, j], j) for j in range(self.depth)], 1)
        if self.config.gradient == "detached":
            return vectors.detach()
        if quantization is None:
            return vectors
        return quantization.quantized + (vectors - quantization.quantized).detach()

    @torch.no_grad()
    def semantic_ids(self, z: Tensor, codes: Tensor, ids: Sequence[str], *, unique: bool) -> Tensor:
        """Final codes (N, m) of the items of a catalog: those that training has given, else the quantizer's.

        Args:
            z: (N, d) their vectors.
            codes: (N, m) what the quantizer makes of them.
            ids: of the N items.
            unique: move items whose ID another one has to one that is free, the given ones last.
        """
        quantizer = self.quantizer
        if self.item_codes is not None and self.item_keys is not None:
            keys, order = self.item_keys.sort()
            wanted = item_keys(ids).to(keys.device)
            place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            known = keys[place] == wanted
            given = self.item_codes[order[place]]
            codes = torch.where(known[:, None], given, codes)
            # Of items with one ID the nearest keeps it, and none is nearer than its own vectors' sum.
            own = torch.stack([quantizer.embed(given[:, j], j) for j in range(self.depth)], 1).sum(1)
            z = torch.where(known[:, None], own, z)
        if unique:
            codes = unique_codes(codes, z, list(quantizer.codebooks), metric=quantizer.metric, eps=quantizer.eps)
        return codes

    @torch.no_grad()
    def initialize(self, z: Tensor, *, generator: torch.Generator | None = None) -> None:
        """Set what training starts from by the vectors ``z`` (N, d) of all items: codebooks to K-means centres."""
        self.quantizer.initialize(z, generator=generator)

    def beam_step_function(
        self, query: QueryEncoding
    ) -> Callable[[int, Tensor | None, Tensor | None], Tensor | HiddenStates]:
        """The model's side of :func:`dgi_kernels.beam_search` for a batch of encoded queries.

        The decoder reads the selected codes' vectors ``e_{j, c_j}`` (hard codes, as search has them).
        """
        step = self._cached_step(query) if caches(self.decoder) else self._whole_step(query)

        def logits(depth: int, tokens: Tensor | None, parents: Tensor | None) -> Tensor | HiddenStates:
            chosen = None if tokens is None else self.quantizer.embed(tokens, depth - 1)
            hidden = step(chosen, None if parents is None else parents.clamp(min=0))
            return cast(CosineHead, self.heads[depth]).for_search(hidden)

        return logits

    def _cached_step(self, query: QueryEncoding) -> _HiddenStep:
        """One position of every beam at a time, from what the decoder keeps of those before."""
        decoder = cast(CachedDecoder, self.decoder)
        cache = decoder.start_search(query.memory, query.mask)
        rest = query.vector.unsqueeze(1)

        def step(chosen: Tensor | None, parents: Tensor | None) -> Tensor:
            nonlocal cache, rest
            hidden, cache = decoder.search_step(cache, chosen, parents)
            if not self.residual:
                return hidden
            if chosen is not None and parents is not None:
                rest = rest.gather(1, parents.unsqueeze(-1).expand(-1, -1, rest.shape[2])) - chosen
            return hidden + rest

        return step

    def _whole_step(self, query: QueryEncoding) -> _HiddenStep:
        """Every beam's whole prefix, and its request's memory, through the decoder in each step."""
        batch = len(query.vector)
        prefix = query.vector.new_empty(batch, 1, 0, self.config.dim)

        def step(chosen: Tensor | None, parents: Tensor | None) -> Tensor:
            nonlocal prefix
            if chosen is not None and parents is not None:
                survivors = parents[..., None, None].expand(-1, -1, *prefix.shape[2:])
                prefix = torch.cat([prefix.gather(1, survivors), chosen.to(prefix.dtype).unsqueeze(2)], 2)
            beams = prefix.shape[1]
            repeated = QueryEncoding(*(value.repeat_interleave(beams, 0) for value in query))
            hidden = self.hidden_states(prefix.flatten(0, 1), repeated)
            return hidden[:, -1].unflatten(0, (batch, beams))

        return step


def item_keys(ids: Sequence[str]) -> Tensor:
    """(N,) int64 that tell items apart by their ids: the first 8 bytes of BLAKE2b."""
    digests = (hashlib.blake2b(item_id.encode(errors="surrogatepass"), digest_size=8).digest() for item_id in ids)
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64).clone()


def build_encoder(config: ModelConfig) -> Encoder:
    """The encoder that ``config.encoder`` names."""
    if config.encoder == "t5":
        from dgi.model.t5 import T5Encoder  # transformers is an optional dependency

        return T5Encoder.from_pretrained(config)
    return SequenceEncoder(config)


def build_decoder(config: ModelConfig, encoder: Encoder) -> nn.Module:
    """A T5 decoder beside a T5 encoder, else the built-in one."""
    if config.encoder == "t5":
        from dgi.model.t5 import T5Decoder

        return T5Decoder.from_pretrained(config)
    return TransformerDecoder(config, encoder.width)
