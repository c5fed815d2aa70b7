"""constrained_generate takes what generate takes: inputs, keywords, settings, wrapped models; or refuses it by name."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs transformers: pip install 'dgi-kernels[hf]'")
from transformers import GenerationConfig, LogitsProcessor  # noqa: E402
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402

from dgi.integrations import TrieLogitsProcessor, constrained_generate  # noqa: E402
from tests.dgi.integrations.cases import END, PAD, Case, assert_same, ragged_codes  # noqa: E402

SIZES = (6, 9, 7)


def make_case(family: str, ragged: bool = True) -> Case:
    return Case(family, ragged_codes(150, SIZES) if ragged else np.random.randint(0, SIZES, (200, 3)), SIZES)


def assert_as_generate(case: Case, end: Any = END, beams: int = 5, model: Any = None, **options: Any) -> Any:
    """Search both ways with the same options; return ours."""
    model = case.model if model is None else model
    processors = [*options.pop("logits_processor", []), case.processor(end)]
    prompts = {**case.prompts, **options.pop("prompts", {})}
    theirs = model.generate(
        **prompts,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        eos_token_id=end,
        max_new_tokens=case.trie.depth + (end is not None),
        logits_processor=processors,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    if processors[:-1]:
        options["logits_processor"] = processors[:-1]
    ours = constrained_generate(
        model, case.trie, **prompts, token_offsets=case.offsets, num_beams=beams, eos_token_id=end, **options
    )
    assert_same(theirs, ours, len(case.prompts["input_ids"]), end if isinstance(end, list) else [END])
    return ours


class Favour(LogitsProcessor):
    """Adds to the scores of tokens, by row."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.linspace(0, 1, scores.shape[1]) + input_ids[:, :1] / 100


SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.4},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[6], [7, 13]]},
    "suppress_tokens": {"suppress_tokens": [6, 14]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [6, 8]},
    "forced_eos_token_id": {"forced_eos_token_id": END},
    "min_new_tokens": {"min_new_tokens": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (1, 1.7)},
    "sequence_bias": {"sequence_bias": [[[7], 3.0], [[END], 4.0]]},
    "remove_invalid_values": {"remove_invalid_values": True},
    "logits_processor": {"logits_processor": [Favour()]},
    "early_stopping": {"early_stopping": True, "length_penalty": 0.3},
    "never": {"early_stopping": "never", "length_penalty": 2.0},
    "use_cache": {"use_cache": False},
    "temperature without sampling": {"temperature": 0.5},
}


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_followed(family: str, name: str) -> None:
    assert_as_generate(make_case(family), **SETTINGS[name])


@pytest.mark.parametrize("where", ["generation_config", "the model's"])
def test_settings_of_a_configuration_are_followed(where: str) -> None:
    case = make_case("qwen2")
    settings = {"repetition_penalty": 1.3, "length_penalty": 0.2, "early_stopping": True}
    by_keyword = assert_as_generate(case, **settings)
    if where == "generation_config":
        config = GenerationConfig(**settings)
        before = copy.deepcopy(config)
        ours = constrained_generate(
            case.model,
            case.trie,
            **case.prompts,
            token_offsets=case.offsets,
            num_beams=5,
            eos_token_id=END,
            generation_config=config,
        )
        assert config == before
    else:
        case.model.generation_config.update(**settings, num_beams=7, max_new_tokens=50)
        ours = assert_as_generate(case)
    assert torch.equal(ours.sequences, by_keyword.sequences)
    assert torch.equal(ours.sequences_scores, by_keyword.sequences_scores)


def test_a_forced_start_among_the_codes() -> None:
    case = make_case("bart")
    ours = assert_as_generate(case, forced_bos_token_id=case.offsets[0] + 2)
    assert (ours.codes[ours.nodes >= 0][:, 0] == 2).all()
    with pytest.raises(ValueError, match="forced_bos_token_id=3 cannot be followed"):
        case.constrained(END, 5, forced_bos_token_id=3)
    prompts = torch.tensor([[2, 3]] * 3)
    assert_as_generate_behind(case, prompts, forced_bos_token_id=3)


def assert_as_generate_behind(case: Case, decoder_prompts: Tensor, **options: Any) -> None:
    """Both ways with what the decoder reads first given."""
    case.start = decoder_prompts.shape[1]
    ours = assert_as_generate(case, prompts={"decoder_input_ids": decoder_prompts}, **options)
    assert torch.equal(ours.sequences[::5, : case.start], decoder_prompts)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_decoder_prompts(family: str) -> None:
    case = make_case(family)
    start = case.model.generation_config.decoder_start_token_id
    assert_as_generate_behind(case, torch.tensor([[start, 9, 4], [start, 7, 4], [start, 8, 3]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "do_sample=True .* cannot be followed: .* give do_sample=False"),
        ({"renormalize_logits": True}, "renormalize_logits=True"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"token_healing": True}, "token_healing=True"),
        ({"max_time": 3.0}, "max_time=3.0"),
        ({"stop_strings": ["x"]}, "stop_strings="),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"forced_eos_token_id": 2}, "forced_eos_token_id=2 cannot be followed"),
        ({"min_length": 50}, "min_length=50 cannot be followed"),
        ({"min_new_tokens": 4}, "min_new_tokens=4 cannot be followed"),
        ({"max_new_tokens": 1}, "max_new_tokens must not be given to constrained_generate"),
        ({"max_length": 10}, "max_length must not be given"),
        ({"prefix_allowed_tokens_fn": lambda *_: [1]}, "prefix_allowed_tokens_fn must not be given"),
        ({"generation_config": GenerationConfig(num_beams=7)}, "generation_config must not ask for num_beams=7"),
        ({"generation_config": {"num_beams": 7}}, "generation_config must be a GenerationConfig"),
        ({"repetition_penalty": 2.0, "normalize": "full"}, 'normalize must be "vocabulary" where .* RepetitionPenalty'),
        ({"filter": None, "lenght_penalty": 0.0}, "lenght_penalty"),
        ({"filter": 3}, "'filter'"),
        ({"attention_maks": torch.ones(3, 9)}, "attention_maks"),
        ({"decoder_input_ids": torch.ones(3, 1), "pixel_values": torch.ones(3, 1)}, "pixel_values"),
    ],
)
@pytest.mark.parametrize("family", ["t5", "qwen2"])
def test_what_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    """By name, as generate refuses what it does not know."""
    with pytest.raises((ValueError, TypeError), match=message):
        make_case(family).constrained(END, 5, **options)


def test_settings_of_the_model_that_are_refused() -> None:
    case = make_case("qwen2")
    case.model.generation_config.do_sample = True
    with pytest.raises(ValueError, match="do_sample=True .*of a generation_config"):
        case.constrained(END, 5)
    case.constrained(END, 5, do_sample=False)


@pytest.mark.parametrize("family", ["t5", "gpt2", "qwen2"])
@pytest.mark.parametrize("ends", [[END, 3], [4, END, 2]])
def test_several_end_tokens(family: str, ends: list[int]) -> None:
    """Each may follow a semantic ID, which then counts once per end token, as in generate."""
    case = make_case(family)
    ours = assert_as_generate(case, ends, beams=6)
    ended = ours.sequences.view(3, 6, -1)[ours.nodes >= 0]
    assert all(sum(token in ends for token in row[case.start :].tolist()) == 1 for row in ended)
    assert_as_generate(make_case(family), ends, beams=6, repetition_penalty=1.2)


def test_the_decoder_starts_with_bos_where_it_has_no_other() -> None:
    case = make_case("t5")
    case.model.generation_config.decoder_start_token_id = None
    case.model.generation_config.bos_token_id = 2
    ours = assert_as_generate(case)
    assert (ours.sequences[:, 0] == 2).all()
    case.model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id` or `bos_token_id"):
        case.constrained(END, 5)


@pytest.mark.parametrize("form", [BaseModelOutput, lambda states: (states,)], ids=["ModelOutput", "tuple"])
def test_encoder_outputs_of_the_caller(form: Any) -> None:
    """They give the same results, twice: they are not repeated in place."""
    case = make_case("t5")
    expected = case.constrained(END, 5)
    outputs = form(case.model.get_encoder()(**case.prompts)[0])
    for _ in range(2):
        ours = case.constrained(END, 5, encoder_outputs=outputs)
        torch.testing.assert_close(ours.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(ours.sequences, expected.sequences)


@pytest.mark.parametrize("end", [END, None])
def test_token_types_go_on(end: int | None) -> None:
    case = make_case("gpt2", ragged=end is not None)
    types = torch.randint(5, 9, case.prompts["input_ids"].shape)
    assert_as_generate(case, end, prompts={"token_type_ids": types})


@pytest.mark.parametrize("end", [END, None])
def test_prompts_by_embeddings(end: int | None) -> None:
    case = make_case("qwen2", ragged=end is not None)
    embedded = torch.randn(*case.prompts["input_ids"].shape, 32)
    assert_as_generate(case, end, prompts={"inputs_embeds": embedded})


class Adapter(nn.Module):
    """A model wrapped as peft wraps it: forward hides its parameters, generate is the inner model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


WRAPPERS = {
    "adapter": Adapter,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "compiled parallel": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_wrapped_models(family: str, wrap: Any) -> None:
    """The prompts are padded: without position_ids the scores would be others."""
    case = make_case(family)
    expected = assert_as_generate(case)
    case.model = wrap(case.model)
    ours = constrained_generate(
        case.model, case.trie, **case.prompts, token_offsets=case.offsets, num_beams=5, eos_token_id=END
    )
    assert torch.equal(ours.sequences, expected.sequences)
    assert torch.equal(ours.sequences_scores, expected.sequences_scores)


def test_a_model_of_data_parallel_training() -> None:
    case = make_case("gpt2")
    expected = case.constrained(END, 5)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        case.model = nn.parallel.DistributedDataParallel(case.model)
        ours = constrained_generate(
            case.model, case.trie, **case.prompts, token_offsets=case.offsets, num_beams=5, eos_token_id=END
        )
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(ours.sequences_scores, expected.sequences_scores)


class PromptTuned(Adapter):
    """Puts learned embeddings before each prompt when it is first read, as peft's prompt tuning does."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.virtual = torch.randn(3, model.get_input_embeddings().embedding_dim)
        self.prepare = model.prepare_inputs_for_generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self.base_model.prepare_inputs_for_generation = self.prepared
        try:
            return self.base_model.generate(*args, **kwargs)
        finally:
            del self.base_model.prepare_inputs_for_generation

    def prepared(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = self.prepare(*args, **kwargs)
        count = len(self.virtual)
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
        inputs.pop("position_ids", None)
        cache = inputs["cache"] if "cache" in inputs else inputs["past_key_values"]  # as of transformers 5.24, before
        if cache.get_seq_length() == 0:
            ids = inputs.pop("input_ids")
            embedded = self.base_model.get_input_embeddings()(ids)
            inputs["inputs_embeds"] = torch.cat([self.virtual.expand(len(ids), -1, -1), embedded], dim=1)
        return inputs


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mistral"])
def test_prompt_tuned_models(family: str) -> None:
    """The cache is longer than the prompts: what beams share is counted in the cache."""
    case = make_case(family)
    alone = assert_as_generate(case)
    tuned = assert_as_generate(case, model=PromptTuned(case.model))
    assert not torch.equal(tuned.sequences_scores, alone.sequences_scores)


@pytest.mark.parametrize("tuning", ["LoraConfig", "PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "t5"])
def test_models_of_peft(family: str, tuning: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install peft")
    case = make_case(family)
    options = (
        {"target_modules": {"gpt2": ["c_attn"], "qwen2": ["q_proj"], "t5": ["q"]}[family], "init_lora_weights": False}
        if tuning == "LoraConfig"
        else {"num_virtual_tokens": 3}
    )
    config = getattr(peft, tuning)(task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM", **options)
    assert_as_generate(case, model=peft.get_peft_model(case.model, config).eval())


def test_no_model_of_transformers() -> None:
    case = make_case("gpt2")
    given = {**case.prompts, "token_offsets": case.offsets, "num_beams": 4}
    with pytest.raises(TypeError, match="model must be a transformers model with a generate method; got Linear"):
        constrained_generate(nn.Linear(2, 2), case.trie, **given)

    class Other(Adapter):
        def generate(self, **_: Any) -> None:
            """One that knows no custom_generate."""

    with pytest.raises(TypeError, match="model must be one whose generate runs what custom_generate gives"):
        constrained_generate(Other(case.model), case.trie, **given)


def test_the_mask_is_what_generate_makes_of_padding() -> None:
    for family in ("t5", "qwen2"):
        case = make_case(family)
        del case.prompts["attention_mask"]
        case.model.generation_config.pad_token_id = PAD
        assert_as_generate(case)


@pytest.mark.parametrize("given", [{}, {"generation_config": GenerationConfig(length_penalty=0.5)}], ids=["", "config"])
def test_no_end_token_is_none_of_the_model_either(given: dict[str, Any]) -> None:
    """Padding that is also the model's end token is told as padding where nothing ends."""
    case = make_case("gpt2", ragged=False)
    masked = assert_as_generate(case, None, **given)
    del case.prompts["attention_mask"]
    case.model.generation_config.eos_token_id = PAD
    ours = assert_as_generate(case, None, **given)
    assert torch.equal(ours.sequences_scores, masked.sequences_scores)


def test_a_model_in_half_precision() -> None:
    case = make_case("qwen2")
    case.model = case.model.bfloat16()
    assert_as_generate(case, repetition_penalty=1.2)


def test_the_processor_takes_a_trie_of_another_call() -> None:
    """The same processor and the same model serve any number of searches."""
    case = make_case("t5")
    processor = TrieLogitsProcessor(case.trie, case.offsets, start=1, eos_token_id=[END, 3])
    first = case.generate([END, 3], 5, logits_processor=[processor])
    again = case.generate([END, 3], 5, logits_processor=[processor])
    assert torch.equal(first.sequences, again.sequences)
