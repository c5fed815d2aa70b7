"""Fast, exact building blocks for generative retrieval.

Cosine logits and their cross-entropy, Gumbel-Softmax and soft residual quantization, tries and trie-constrained beam
search, after *Differentiable Geometric Indexing for End-to-End Generative Retrieval* (arXiv 2603.10409).  Every op
takes ``backend="auto" | "reference" | "triton" | "native"``; :func:`backends` says what is available here.
"""

from dgi_kernels.backend import BackendStatus, BackendUnavailable, backends, debug, why_not
from dgi_kernels.beam import BeamResult, Beams, HiddenStates, beam_search, beam_step, cosine_beam_step
from dgi_kernels.beam.graph import CapturedSearch, capture_search
from dgi_kernels.clustering import KMeans, balanced_codes, kmeans, residual_kmeans, unique_codes
from dgi_kernels.clustering.modules import ResidualVectorQuantizer, VectorQuantizer
from dgi_kernels.cosine import cosine_cross_entropy, cosine_logits
from dgi_kernels.cosine.contrastive import InfoNCELoss, SampledSoftmaxLoss
from dgi_kernels.cosine.frequency import FrequencyEstimator
from dgi_kernels.cosine.modules import CosineCrossEntropyLoss, CosineLinear
from dgi_kernels.cosine.parallel import vocabulary_parallel_cosine_cross_entropy
from dgi_kernels.decoder import DecoderLayer, decoder_step
from dgi_kernels.dropout import attention, dropout
from dgi_kernels.encoder import EncoderLayer, encoder_layers
from dgi_kernels.gumbel import gumbel_noise, gumbel_softmax
from dgi_kernels.normalizer import log_normalizer
from dgi_kernels.quantize import ResidualQuantization, assign_codes, residual_quantize
from dgi_kernels.ranking import Ranking, rank_candidates
from dgi_kernels.trie import ItemRanges, NodeScores, Trie, TrieFilter, TrieFormatError

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "BackendUnavailable",
    "BeamResult",
    "Beams",
    "CapturedSearch",
    "CosineCrossEntropyLoss",
    "CosineLinear",
    "DecoderLayer",
    "EncoderLayer",
    "FrequencyEstimator",
    "HiddenStates",
    "InfoNCELoss",
    "ItemRanges",
    "KMeans",
    "NodeScores",
    "Ranking",
    "ResidualQuantization",
    "ResidualVectorQuantizer",
    "SampledSoftmaxLoss",
    "Trie",
    "TrieFilter",
    "TrieFormatError",
    "VectorQuantizer",
    "assign_codes",
    "attention",
    "backends",
    "balanced_codes",
    "beam_search",
    "beam_step",
    "capture_search",
    "cosine_beam_step",
    "cosine_cross_entropy",
    "cosine_logits",
    "debug",
    "decoder_step",
    "dropout",
    "encoder_layers",
    "gumbel_noise",
    "gumbel_softmax",
    "kmeans",
    "log_normalizer",
    "rank_candidates",
    "residual_kmeans",
    "residual_quantize",
    "unique_codes",
    "vocabulary_parallel_cosine_cross_entropy",
    "why_not",
]
