"""constrained_generate against generate with TrieLogitsProcessor, in every family of transformers that decodes text.

Each family is built tiny from its configuration class, with random weights and nothing from a hub. Prompts of unequal
length are padded on the left (those of an encoder on the right). Semantic IDs are searched with an end token, some of
them shorter than others, and without. A family is "equal" where all live scores agree to rounding, and the sequences
wherever no other score is as near.

Run: python bench/families.py [FAMILY ...] [--json FILE] [--page FILE] [--seconds N]
     make families writes bench/families.json and docs/families.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import tiny_models
import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from dgi.integrations import TrieLogitsProcessor, constrained_generate  # noqa: E402
from dgi.progress import Progress  # noqa: E402
from dgi_kernels import Trie  # noqa: E402

SIZES, OFFSETS, BEAMS, RETURNED = (7, 6, 7), (10, 20, 30), 5, 4
FIRST_WORD, LENGTHS = 40, (9, 4, 7)
LIVE = -1e6  # generate gives rows of no beam scores of -1e9 and less
TOLERANCE = 2e-4  # of scores of about 10 in float32, by sums in another order


# How the page counts each result.
COUNTED = {
    "equal": "equal",
    "differs": "differ",
    "mixed": "are mixed",
    "refused": "refused by name",
    "generate fails": "where generate itself fails",
    "not built": "that could not be built tiny",
}


INTRODUCTION = """# Model families

<!-- Written by bench/families.py. -->

`constrained_generate` compared with `generate` and a `TrieLogitsProcessor`, in every family of transformers {version}
that decodes text. Each model is tiny and has random weights; prompts of unequal length are padded; semantic IDs have an
end token (and some are shorter than others), or none. "Equal" means the same sequences, and the same scores to
rounding. `make families` repeats it.

{families} families: {counted}.
"""


class Outcome(NamedTuple):
    """How a family fared: "equal", "differs", "refused", "generate fails" or "not built", and more in words."""

    result: str
    detail: str = ""
    difference: float = 0.0


def outcome_of(model: Any, end: int | None) -> Outcome:
    """The outcome of a comparison; without a cache too, where the model's cannot be used."""
    outcome = compare(model, end)
    if outcome.result in ("refused", "generate fails"):
        again = compare(model, end, use_cache=False)
        if again.result in ("equal", "differs"):
            return Outcome(outcome.result, f"{outcome.detail}; {again.result} with use_cache=False", again.difference)
    return outcome


def compare(model: Any, end: int | None, **options: Any) -> Outcome:
    """Search the same catalog both ways with the same options; ``end`` is the end token or None."""
    torch.manual_seed(0)
    trie = Trie.from_codes(catalog(ragged=end is not None), codebook_sizes=SIZES)
    prompts = make_prompts(model)
    encodes = model.config.is_encoder_decoder
    if getattr(model.generation_config, "forced_eos_token_id", None) is not None:
        model.generation_config.forced_eos_token_id = end
    processor = TrieLogitsProcessor(trie, OFFSETS, start=1 if encodes else max(LENGTHS), eos_token_id=end)
    try:
        theirs = model.generate(
            **prompts,
            num_beams=BEAMS,
            num_return_sequences=RETURNED,
            do_sample=False,
            eos_token_id=end,
            max_new_tokens=len(SIZES) + (end is not None),
            logits_processor=[processor],
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    except Exception as error:  # of whatever kind a family's own code raises
        return Outcome("generate fails", _in_words(error))
    try:
        ours = constrained_generate(
            model,
            trie,
            **prompts,
            token_offsets=OFFSETS,
            num_beams=BEAMS,
            num_return_sequences=RETURNED,
            eos_token_id=end,
            **options,
        )
    except Exception as error:  # what is no clear refusal is a fault of ours
        clear = isinstance(error, (ValueError, TypeError))
        return Outcome("refused" if clear else "differs", _in_words(error))
    return agreement(ours.sequences, ours.sequences_scores, theirs.sequences, theirs.sequences_scores)


def agreement(ours: Tensor, our_scores: Tensor, theirs: Tensor, their_scores: Tensor) -> Outcome:
    """Whether live scores (rows,) agree, and sequences (rows, T) where no other score is as near."""
    scores, others = our_scores.view(-1, RETURNED), their_scores.view(-1, RETURNED)
    if others.isnan().any():
        return Outcome("generate fails", "its scores are NaN")
    if not torch.equal(scores > -torch.inf, others > LIVE):
        return Outcome("differs", "another number of live rows")
    difference = float((scores - others).abs()[scores > -torch.inf].max())
    if difference > TOLERANCE:
        return Outcome("differs", f"scores by {difference:.2g}", difference)
    sequences, other_sequences = ours.view(len(scores), RETURNED, -1), theirs.view(len(scores), RETURNED, -1)
    for request, best in enumerate(scores):
        for row in range(int((best > -torch.inf).sum())):
            alone = ((best - best[row]).abs() < 10 * TOLERANCE).sum() == 1 and row < RETURNED - 1
            if alone and _stripped(sequences[request, row]) != _stripped(other_sequences[request, row]):
                return Outcome("differs", "sequences")
    return Outcome("equal", "", difference)


def catalog(ragged: bool) -> list[list[int]]:
    """Semantic IDs of up to three codes, drawn by the seed."""
    codes = torch.stack([torch.randint(size, (120,)) for size in SIZES], dim=1).tolist()
    return [row[: 2 + i % 2] for i, row in enumerate(codes)] if ragged else codes


def make_prompts(model: Any) -> dict[str, Tensor]:
    """Words of unequal lengths, padded on the left for a decoder; no mask where the model takes none."""
    ids = torch.randint(FIRST_WORD, tiny_models.VOCABULARY, (len(LENGTHS), max(LENGTHS)))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    if not model.config.is_encoder_decoder:
        mask = mask.flip(1)
    if "attention_mask" not in tiny_models.forward_arguments(model):
        return {"input_ids": ids}
    return {"input_ids": ids.masked_fill(~mask, tiny_models.PAD), "attention_mask": mask.long()}


def examine(family: str) -> dict[str, Any]:
    """The row of a family: what it keeps, and how it fared with an end token and without."""
    torch.manual_seed(0)
    try:
        model = tiny_models.tiny_model(family)
    except Exception as error:  # of whatever kind a family's own code raises
        outcome = Outcome("not built", _in_words(error))
        return {"family": family, "kind": "", "with an end token": outcome._asdict(), "without": outcome._asdict()}
    with_end, without = outcome_of(model, tiny_models.END), outcome_of(model, None)
    return {
        "family": family,
        "kind": tiny_models.kind(model),
        "with an end token": with_end._asdict(),
        "without": without._asdict(),
    }


def page(results: dict[str, Any]) -> str:
    """The table of families as a page of the documentation."""
    rows = results["families"]
    counts: dict[str, int] = {}
    for row in rows:
        counts[_summary(row)] = counts.get(_summary(row), 0) + 1
    counted = ", ".join(f"{counts[name]} {text}" for name, text in COUNTED.items() if name in counts)
    lines = [
        INTRODUCTION.format(version=results["transformers"], families=len(rows), counted=counted),
        "| Family | Decoder | Result | Largest difference of scores |",
        "|---|---|---|---|",
    ]
    for row in rows:
        outcomes = [row["with an end token"], row["without"]]
        difference = f"{max(outcome['difference'] for outcome in outcomes):.0e}" if _summary(row) == "equal" else ""
        lines.append(f"| {row['family']} | {row['kind']} | {_escaped(_told(row))} | {difference} |")
    return "\n".join(lines) + "\n"


def _summary(row: dict[str, Any]) -> str:
    names = {row["with an end token"]["result"], row["without"]["result"]}
    return names.pop() if len(names) == 1 else "mixed"


def _told(row: dict[str, Any]) -> str:
    told = []
    for way in ("with an end token", "without"):
        outcome = row[way]
        told.append(outcome["result"] + (f": {outcome['detail']}" if outcome["detail"] else ""))
    return told[0] if told[0] == told[1] else f"with an end token {told[0]}; without {told[1]}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _stripped(sequence: Tensor) -> list[int]:
    tokens = sequence.tolist()
    while tokens and tokens[-1] in (tiny_models.PAD, tiny_models.END, -1):
        tokens.pop()
    return tokens


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{type(error).__name__}: {text[:160]}" if not isinstance(error, (ValueError, TypeError)) else text[:200]


class _TooLong(BaseException):
    pass


def _stop(*_: object) -> None:
    raise _TooLong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types, e.g. llama t5; default all")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    parser.add_argument("--page", type=Path, help="write the table, in Markdown, to this file")
    parser.add_argument("--from-json", type=Path, help="write the page from an earlier run's file; nothing is run")
    parser.add_argument("--seconds", type=int, default=120, help="give up on a family after so many")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.from_json:
        results = json.loads(options.from_json.read_text())
    else:
        torch.set_num_threads(options.threads)
        transformers.logging.set_verbosity_error()
        warnings.simplefilter("ignore")
        families, told = options.families or tiny_models.families(), []
        with Progress(len(families), "comparing", unit="families") as progress:
            for family in families:
                told.append(_within(family, options.seconds))
                progress.update()
        results = {"transformers": transformers.__version__, "torch": torch.__version__, "families": told}
    if options.json:
        rows = ",\n".join(json.dumps(row) for row in results["families"])
        head = json.dumps({name: value for name, value in results.items() if name != "families"})
        options.json.write_text(f'{head[:-1]}, "families": [\n{rows}\n]}}\n')
    if options.page:
        options.page.write_text(page(results))
    wrong = [row for row in results["families"] if "differs" in _told(row)]
    if not options.page:
        print("\n".join(f"{row['family']:28}{row['kind']:40}{_told(row)}" for row in results["families"]))
    sys.exit(f"{len(wrong)} families differ: {', '.join(row['family'] for row in wrong)}" if wrong else 0)


def _within(family: str, seconds: int) -> dict[str, Any]:
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(seconds)
    try:
        return examine(family)
    except _TooLong:
        outcome = Outcome("not built", f"not small enough: takes more than {seconds} seconds")._asdict()
        return {"family": family, "kind": "", "with an end token": outcome, "without": outcome}
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main()
