"""Configuration of a model and of its training: plain dataclasses, stored as JSON beside the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

EncoderKind = Literal["text", "vectors", "t5"]
GradientKind = Literal["soft", "straight_through", "detached"]
HeadKind = Literal["shared", "separate"]
SimilarityKind = Literal["cosine", "inner_product"]
MetricKind = Literal["", "cosine", "dot", "euclidean"]  # "": that of the similarity
ContrastiveKind = Literal["in_batch", "sampled", "all_items"]
StageKind = Literal["encoder", "quantizer", "decoder", "joint"]
RefreshKind = Literal["never", "epoch", "step"]
InputKind = Literal["soft", "hard", "mixed"]

WORDS_1, WORDS_2 = "words-1", "words-2"  # tokenizers of the package itself

# What fields that were added since version 0.1.0 stood for in the models and runs before them.
BEFORE: dict[str, Any] = {
    "tokenizer": WORDS_1,
    "contrastive": "in_batch",
    "contrastive_samples": 1024,
    "log_q": False,
    "steps": 0,
    "stages": [],
    "item_bias": False,
    "word_scale": 1.0,
    "principal_axes": False,
}

MAX_INT, MAX_SEED = 2**31 - 1, 2**63 - 1

LOSS_TERMS = ("ntp", "global", "local", "infonce", "diversity")
PARTS = ("encoder", "quantizer", "decoder")  # of a model, as stages of training name them


@dataclass(frozen=True)
class ModelConfig:
    """What the model is made of.

    ``gradient``, ``heads`` and ``similarity`` are the paper's ablations: ``gradient`` is how the next-token loss
    reaches the quantizer (``soft``: through p; ``straight_through``: one-hot forward, soft Jacobian backward;
    ``detached``: not at all, the two-stage setting), ``heads`` whether level j's output head is the
    codebook E_j itself, ``similarity`` whether logits are scaled cosines or plain inner products.

    Attributes:
        encoder: ``text`` (built-in transformer over hashed words), ``vectors`` (precomputed item and query vectors) or
            ``t5`` (a Hugging Face T5-family model).
        dim: width d of items, queries, codebooks and hidden states.
        codebook_sizes: K_j of every level.
        attention_heads, history_layers, text_layers, decoder_layers, dropout: the built-in transformers.
        tokenizer: how the ``text`` encoder cuts texts: ``words-2``, words of all scripts, symbols and emoji (see
            :mod:`dgi.model.words`); ``words-1``, as models of version 0.1.0 do, which takes accents and vowel signs
            for gaps; or a tokenizer of the package tokenizers: a file ``tokenizer.json``, a folder that holds one, or
            a name on the Hugging Face hub. It is saved with the model.
        vocabulary_size: hash buckets of the ``text`` encoder's words; with a tokenizer of your own its tokens are
            taken as they are.
        max_tokens: words (``text``) or word pieces (``t5``) kept of one text.
        word_scale: standard deviation of the ``text`` encoder's word vectors at the start. A cosine turns by angles:
            a rate of 1e-3 turns long vectors by little, so they start short; without ``text_layers`` the bias of
            their mean does too, by the same factor. Before it was a setting it was 1.
        max_history: items of the history that are read, the latest ones.
        causal: each item of a history sees those before it only, and the vector of the last one is the query's. A whole
            sequence then trains in one pass, every item a query for the next (``text`` and ``vectors``, requests
            without query texts).
        vector_dim: width of precomputed vectors (``vectors``).
        principal_axes: start from what the precomputed vectors know (``vectors``): an item's vector is its projection
            on the catalog's ``dim`` principal axes plus a correction that starts at 0, a request's the mean of what it
            reads plus another (not where ``causal``). Before the first step cosines are then those of the given
            vectors, as far as so many axes hold them. See :func:`dgi.model.encoders.start_at_principal_axes`.
        residual_decoder: the decoder corrects the query's own vector, less the vectors of the codes so far: before it
            has learnt anything, a search is one by residual quantization of the query. Where a model starts at given
            vectors (``principal_axes``), it always does.
        pretrained: name or folder of a T5-family model (``t5``).
        initial_scale: starting value of the learnable logit scale γ.
        metric: how the quantizer compares residuals with codes, as in :func:`dgi_kernels.residual_quantize`, whose
            logits γ scales; empty: scaled cosines, or plain inner products where ``similarity`` says so.
    """

    encoder: EncoderKind = "text"
    dim: int = 64
    codebook_sizes: tuple[int, ...] = (4096, 1024, 256)
    attention_heads: int = 4
    history_layers: int = 2
    text_layers: int = 1
    decoder_layers: int = 2
    dropout: float = 0.1
    tokenizer: str = WORDS_2
    vocabulary_size: int = 16384
    max_tokens: int = 32
    word_scale: float = 0.1
    max_history: int = 10
    causal: bool = False
    vector_dim: int = 0
    principal_axes: bool = True
    residual_decoder: bool = False
    pretrained: str = ""
    initial_scale: float = 30.0
    gradient: GradientKind = "soft"
    heads: HeadKind = "shared"
    similarity: SimilarityKind = "cosine"
    metric: MetricKind = ""

    @property
    def starts_at_vectors(self) -> bool:
        """Whether the model begins as a search by the cosines of the given vectors."""
        return self.encoder == "vectors" and self.principal_axes and not self.causal

    def __post_init__(self) -> None:
        for name in ("dim", "attention_heads", "history_layers", "decoder_layers", "max_tokens"):
            _within(self, name, 1)
        for name in ("text_layers", "max_history", "vector_dim"):
            _within(self, name, 0)
        _within(self, "vocabulary_size", 2)  # one for padding, and one for words
        if not self.codebook_sizes or any(not 1 <= size <= MAX_INT for size in self.codebook_sizes):
            raise ValueError(
                f"codebook_sizes must hold one positive size per level, at most {MAX_INT}; got {self.codebook_sizes}"
            )
        if self.dim % self.attention_heads:
            raise ValueError(f"dim must be a multiple of attention_heads; got {self.dim} and {self.attention_heads}")
        if self.encoder == "vectors" and not self.vector_dim:
            raise ValueError('vector_dim must be the width of the vectors where encoder is "vectors"; got 0')
        if self.encoder == "t5" and not self.pretrained:
            raise ValueError('pretrained must name a T5-family model or folder where encoder is "t5"; got ""')
        if self.encoder == "t5" and self.causal:
            raise ValueError('causal must be False where encoder is "t5", which reads a history as one text; got True')
        if self.encoder == "text" and not self.tokenizer:
            raise ValueError(f'tokenizer must be "{WORDS_2}", "{WORDS_1}", or the path or name of a tokenizer; got ""')
        _positive(self, "initial_scale")
        _positive(self, "word_scale")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Attributes:
        name: ``encoder``: InfoNCE alone trains the encoder. ``quantizer``: takes no steps; residual K-means of the
            vectors of all items sets the codebooks, and every item gets a semantic ID that no other has, where there
            are enough. Where items have IDs already, the new codes are renumbered to agree with the old ones as far as
            possible. ``decoder``: the next-token loss alone, the encoder fixed. ``joint``: all terms.
        epochs: of this stage; with ``TrainConfig.steps`` they are its share of those steps. A ``quantizer`` takes none.
        trains: which of ``encoder`` (with the bias of items), ``quantizer`` (codebooks, heads, γ) and ``decoder``
            learn; empty for the usual ones: the encoder, or decoder and quantizer, or all.
        rates: peak learning rate of a part, where it is not ``backbone_lr`` or ``quantizer_lr``. The schedule of a
            part, warm-up and decay, is over all the steps of all the stages that train it.
        codes: when semantic IDs follow the item vectors. ``step``: at once, as in the paper. ``epoch``: at the start of
            every epoch but the stage's first. ``never``: they are those of the stage before. Empty: ``step`` for
            ``joint`` if no stage ``quantizer`` came before, else ``never``.
        inputs: what the decoder reads of the codes before: ``soft`` the mixtures z̃ (soft teacher forcing); ``hard`` the
            vectors of the codes, as in search; ``mixed`` those, with the gradient of the mixtures. Empty: ``soft`` for
            ``joint``, else ``hard``.
        distillation: of the next-token targets the part that is the model's softmax over all items, summed over the
            items below each prefix, in place of the code of the item clicked; needs candidates ``all_items``.
        contrastive: as ``TrainConfig.contrastive``, which it is where empty.
        loss_weights: over those of ``TrainConfig``.
    """

    name: StageKind
    epochs: float = 1.0
    trains: tuple[str, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    codes: Literal["", "never", "epoch", "step"] = ""
    inputs: Literal["", "soft", "hard", "mixed"] = ""
    distillation: float = 0.0
    contrastive: Literal["", "in_batch", "sampled", "all_items"] = ""
    loss_weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _positive(self, "epochs")
        for name, values in (("trains", self.trains), ("rates", self.rates)):
            unknown = sorted(set(values) - set(PARTS))
            if unknown:
                raise ValueError(f"{name} must name parts among {', '.join(PARTS)}; got {unknown[0]!r}")
        for part, rate in self.rates.items():
            if not 0 < rate < math.inf:
                raise ValueError(f"rates[{part!r}] must be positive and finite; got {rate}")
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must be from 0 to 1; got {self.distillation}")
        _check_loss_weights(self.loss_weights)


@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained.

    Attributes:
        epochs: passes over the training interactions.
        steps: steps to train for, in place of ``epochs``; 0 for ``epochs``.
        batch_size: interactions per step, over all processes.
        backbone_lr, quantizer_lr: peak learning rates of encoder and decoder, and of codebooks, heads and γ.
        warmup_steps: linear warm-up, then linear decay to zero at the last step.
        weight_decay, clip_norm: AdamW's decay, largest norm of the whole gradient.
        tau_start, tau_end: Gumbel-Softmax temperature, annealed geometrically over training.
        loss_weights: weight of every term of the objective; a term left out has weight 1.
        beta: weight of the commitment half of the local loss.
        contrastive_temperature: τ_CL of InfoNCE.
        contrastive: candidates of InfoNCE beside a query's own item. ``in_batch``: the items that others of the batch
            clicked; ``sampled``: ``contrastive_samples`` items drawn in every step, as often as they were clicked in
            training; ``all_items``: the whole catalog, encoded in every step, for catalogs of some thousand items.
        contrastive_samples: items drawn for ``sampled``, over all processes.
        log_q: correct InfoNCE for how often each item is a candidate; without it popular items are pushed away.
        revive_every: steps between revivals of dead codes; 0 turns them off.
        log_every, checkpoint_every: steps between rows of metrics, and between checkpoints.
        seed: of weights, data order and noise.
        item_bias: learn a bias for every item, added to its logit in InfoNCE with ``all_items``.
        stages: see :class:`Stage`; their epochs replace ``epochs``. Empty for the paper's recipe: everything together
            from the start, which is ``({"name": "joint"},)``.
    """

    epochs: int = 10
    steps: int = 0
    batch_size: int = 128
    backbone_lr: float = 1e-3
    quantizer_lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    tau_start: float = 1.0
    tau_end: float = 0.1
    loss_weights: dict[str, float] = field(default_factory=dict)
    beta: float = 0.25
    contrastive_temperature: float = 0.05
    contrastive: ContrastiveKind = "in_batch"
    contrastive_samples: int = 1024
    log_q: bool = True
    revive_every: int = 200
    log_every: int = 10
    checkpoint_every: int = 500
    seed: int = 0
    item_bias: bool = False
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "contrastive_samples", "log_every", "checkpoint_every"):
            _within(self, name, 1)
        for name in ("steps", "warmup_steps", "revive_every"):
            _within(self, name, 0)
        _within(self, "seed", 0, MAX_SEED)
        for name in ("backbone_lr", "quantizer_lr", "clip_norm", "tau_start", "tau_end", "contrastive_temperature"):
            _positive(self, name)
        _within(self, "weight_decay", 0, math.inf)
        _finite("weight_decay", self.weight_decay)
        _finite("beta", self.beta)
        _check_loss_weights(self.loss_weights)
        _check_stages(self)
        if not any(self.loss_weights.get(name, 1.0) for name in LOSS_TERMS):
            raise ValueError("loss_weights must not all be 0: there would be nothing to train for")


def _check_loss_weights(weights: dict[str, float]) -> None:
    unknown = sorted(set(weights) - set(LOSS_TERMS))
    if unknown:
        raise ValueError(f"loss_weights must name terms among {', '.join(LOSS_TERMS)}; got {', '.join(unknown)}")
    for name, weight in weights.items():
        _finite(f"loss_weights[{name!r}]", weight)


def _check_stages(config: TrainConfig) -> None:
    """Whether every stage finds what it needs from those before."""
    coded = False
    for number, stage in enumerate(config.stages, start=1):
        contrastive = stage.contrastive or config.contrastive
        if stage.name == "decoder" and not coded:
            raise ValueError(f"stages[{number - 1}] trains a decoder before any stage makes codes (quantizer or joint)")
        if stage.distillation and (contrastive != "all_items" or not coded or stage.codes == "step"):
            raise ValueError(
                f"stages[{number - 1}] needs codes of all items for distillation, of a stage before, and contrastive "
                f'"all_items"; contrastive is {contrastive!r}, codes {stage.codes!r}'
            )
        coded = coded or stage.name in ("quantizer", "joint")
    if config.stages and config.stages[-1].name == "quantizer":
        raise ValueError("stages must not end with the quantizer: nothing would learn its codes")
    if config.item_bias and all(
        (stage.contrastive or config.contrastive) != "all_items" for stage in stages_of(config)
    ):
        raise ValueError(f'item_bias needs contrastive="all_items"; got {config.contrastive!r}')


def stages_of(config: TrainConfig) -> tuple[Stage, ...]:
    """The stages of a configuration, the paper's where it names none."""
    return config.stages or (Stage("joint"),)


Config = TypeVar("Config", ModelConfig, TrainConfig, Stage)


def to_dict(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """The configuration as JSON-ready values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """Build a configuration from JSON values; an unknown field or a value of the wrong type is named."""
    types = get_type_hints(cls)
    unknown = sorted(set(values) - set(types))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r} in {cls.__name__}; known: {', '.join(sorted(types))}")
    return cls(**{name: _typed(f"{cls.__name__}.{name}", types[name], value) for name, value in values.items()})


def from_file(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """As :func:`from_dict`, of values that any version has stored: what it did not know yet is as it was then."""
    known = {field.name for field in dataclasses.fields(cls)}
    return from_dict(cls, {name: value for name, value in BEFORE.items() if name in known} | dict(values))


def _typed(name: str, kind: Any, value: Any) -> Any:
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}; got {value!r}")
        return value
    if origin is tuple and get_args(kind)[0] is Stage:
        if isinstance(value, dict):  # one stage, as ``--set`` gives it without brackets
            value = [value]
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, (dict, Stage)) for item in value):
            raise ValueError(f'{name} must be a list of stages, such as [{{"name": "joint"}}]; got {value!r}')
        return tuple(item if isinstance(item, Stage) else _stage(f"{name}[{i}]", item) for i, item in enumerate(value))
    if origin is tuple and get_args(kind)[0] is str:
        if not isinstance(value, (list, tuple)) or any(type(item) is not str for item in value):
            raise ValueError(f"{name} must be a list of words; got {value!r}")
        return tuple(value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or any(type(item) is not int for item in value):
            hint = f", such as [{value}]" if type(value) is int and value > 0 else ""
            raise ValueError(f"{name} must be a list of integers{hint}; got {value!r}")
        return tuple(value)
    if origin is dict:
        if not isinstance(value, dict) or any(type(item) not in (int, float) for item in value.values()):
            raise ValueError(f"{name} must map names to numbers; got {value!r}")
        return {str(key): _float(name, item) for key, item in value.items()}
    if kind is float and type(value) is int:
        return _float(name, value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be {kind.__name__}; got {value!r}")
    return value


def _stage(name: str, value: dict[str, Any]) -> Stage:
    if "name" not in value:
        raise ValueError(f"{name} must have a name among {', '.join(get_args(StageKind))}; got {value!r}")
    try:
        return from_dict(Stage, value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _float(name: str, value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite; got an integer of {len(str(abs(value)))} digits") from None


def _within(config: Any, name: str, low: int, high: float = MAX_INT) -> None:
    value = getattr(config, name)
    if value < low:
        raise ValueError(f"{name} must be at least {low}; got {value}")
    if value > high:
        raise ValueError(f"{name} must be at most {high}; got {value}")


def _positive(config: Any, name: str) -> None:
    value = getattr(config, name)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite; got {value}")


def _finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}")
