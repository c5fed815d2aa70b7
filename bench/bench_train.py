"""Training with the fused ops against training with their references: the same losses, and the seconds of a step.

Two models with the same weights, batches and noise are trained side by side, step by step, one with
``backend="auto"`` in all ops, the other with ``backend="reference"`` (plain PyTorch). The table has the median seconds
of a step and the largest relative difference of their losses over the first steps and over all: rounding grows from
step to step, as it does between any two kernels. "demo" is ``make demo``'s model and data (MovieLens-100K, fetched on
first use); "large" the default codebooks (4096, 1024, 256) at D = 256 over item vectors, random ones. On a GPU a third
model takes each step as one CUDA graph.

``DGI_BASE=<checkout of another commit, built in place>`` adds a table of a step beside the same by that commit's code,
in a process that takes turns with this one: of "demo", and of "deep", the demo at D = 128 with 4 + 4 layers. Both start
with the same weights, but their dropout is drawn differently.

Run: python bench/bench_train.py [demo | large | deep] [--steps N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import statistics
import sys
from collections.abc import Callable

import numpy as np
import other_commit
import torch
from dgi.train import LossStep  # by the name that older commits have too
from measure import Results, Step, interleaved, seconds, title

from dgi import DGIModel, Trainer
from dgi.config import ModelConfig, TrainConfig
from dgi.data import Catalog, Interactions, load_movielens
from dgi.demo import DEMO_MODEL, DEMO_TRAINING
from dgi.progress import Progress

# "graph": as "auto", each step one CUDA graph.
BACKENDS = ("auto", "reference", "graph") if torch.cuda.is_available() else ("auto", "reference")
FIRST = 10  # steps within which rounding has not grown yet


Case = tuple[ModelConfig, TrainConfig, Catalog, Interactions]


def demo() -> Case:
    data = load_movielens()
    training = DEMO_TRAINING
    if hasattr(training, "contrastive"):  # older commits have the items of a batch as candidates, and no other
        training = dataclasses.replace(training, contrastive="in_batch")
    return DEMO_MODEL, training, data.catalog, data.train


def large(
    items: int = 20_000,
    rows: int = 50_000,
    dim: int = 256,
    batch: int = 1024,
    sizes: tuple[int, ...] = (4096, 1024, 256),
) -> Case:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((items, dim), dtype=np.float32)
    catalog = Catalog(tuple(map(str, range(items))), ("",) * items, vectors)
    interactions = Interactions(
        ("",) * rows,
        random.integers(items, size=(rows, 4)),
        random.integers(items, size=rows),
        np.arange(rows, dtype=np.float64),
    )
    model = ModelConfig(
        encoder="vectors",
        vector_dim=dim,
        dim=dim,
        codebook_sizes=sizes,
        history_layers=1,
        decoder_layers=1,
        dropout=0.0,
    )
    return model, TrainConfig(batch_size=batch, epochs=1), catalog, interactions


def deep() -> Case:
    model, *others = demo()
    return dataclasses.replace(model, dim=128, history_layers=4, decoder_layers=4), *others


CASES = {"demo": demo, "large": large}
BESIDE_BASE = {"demo": demo, "deep": deep}


def trainers(make: Callable[[], Case]) -> dict[str, Trainer]:
    """One per backend, ready for its first step with the same weights."""
    config, training, catalog, interactions = make()
    torch.manual_seed(training.seed)
    model = DGIModel(config)
    first = Trainer(model, training, catalog, interactions, None, progress=False)
    first._start(resume=False)  # sets the codebooks
    return {
        backend: Trainer(
            copy.deepcopy(model),
            training,
            catalog,
            interactions,
            None,
            progress=False,
            **({"cuda_graph": True} if backend == "graph" else {}),
        )
        for backend in BACKENDS
    }


def with_backend(module: torch.nn.Module, backend: str) -> torch.nn.Module:
    for part in module.modules():
        if hasattr(part, "backend"):
            part.backend = "auto" if backend == "graph" else backend
    return module.train()


def update_steps(make: Callable[[], Case]) -> dict[str, Step]:
    """One training step of each backend, every call with the next batch."""
    return {backend: endless_steps(trainer, backend) for backend, trainer in trainers(make).items()}


# batch, step -> the values of its losses, for which it waits
Take = Callable[[object, int], dict[str, float]]


def prepared(trainer: Trainer, backend: str = "auto") -> tuple[Take, list[tuple[int, object]]]:
    """What takes the steps of a trainer without stages, and the batches of its first epoch with their steps."""
    if not hasattr(trainer, "_stage_update"):
        return prepared_before(trainer)
    (span,) = trainer.schedule.spans
    update = trainer._stage_update(span)
    with_backend(update.loss_step, backend)

    def take(batch: object, step: int) -> dict[str, float]:
        result = trainer._update(update, batch, step)
        values = update.values()[1]
        trainer._tend_codes(step, result)
        return values

    return take, [(step, trainer._batch(step, span)) for step in range(trainer.epoch_steps)]


def prepared_before(trainer: Trainer) -> tuple[Take, list[tuple[int, object]]]:
    """As :func:`prepared`, of older commits."""
    if not hasattr(trainer, "_loss_step"):
        loss_step, batches = LossStep(trainer.model.train(), trainer.config), list(trainer._batches(0))
    else:
        (span,) = trainer.schedule.spans
        loss_step = trainer._loss_step(span)
        batches = [(step, trainer._batch(step, span)) for step in range(trainer.epoch_steps)]

    def take(batch: object, step: int) -> dict[str, float]:
        result, values = trainer._update(loss_step, batch, step)
        trainer._tend_codes(step, result)
        return values

    return take, batches


def endless_steps(trainer: Trainer, backend: str) -> Step:
    take, batches = prepared(trainer, backend)
    steps = itertools.cycle(batches)
    return lambda: take(*reversed(next(steps)))


def run(case: str, steps: int, results: Results) -> None:
    systems = trainers(CASES[case])
    losses: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    ready = {name: prepared(trainer, name) for name, trainer in systems.items()}
    batches = ready["auto"][1]

    def update(name: str, batch: object, step: int) -> None:
        losses[name].append(ready[name][0](batch, step)["loss"])

    with Progress(steps, case, unit="steps") as bar:
        for step, batch in batches[:steps]:
            for name in BACKENDS if step % 2 else reversed(BACKENDS):
                times[name].append(seconds(lambda name=name, batch=batch, step=step: update(name, batch, step)))
            bar.update()
    differences = [abs(a - b) / abs(b) for a, b in zip(losses["auto"], losses["reference"], strict=True)]
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    in_graph = f"; in a graph {median['graph']:.4f}" if "graph" in median else ""
    config = systems["auto"].model.config
    print(
        f"{case}: D={config.dim}, K={config.codebook_sizes}, batches of {systems['auto'].rank_batch}; {title()}\n"
        f"  seconds a step, medians of {len(differences) - 1}: auto {median['auto']:.4f}, reference "
        f"{median['reference']:.4f}; auto is {median['reference'] / median['auto']:.2f} times as fast{in_graph}\n"
        f"  loss {losses['auto'][0]:.4f} -> {losses['auto'][-1]:.4f}; largest relative difference over the first "
        f"{FIRST} steps {max(differences[:FIRST]):.1e}, over all {max(differences):.1e}",
        flush=True,
    )
    for name in BACKENDS:
        shape = {"D": config.dim, "K": list(config.codebook_sizes), "batch": systems["auto"].rank_batch}
        results.add("training step", shape, name, times[name][1:], losses=losses[name])


def plain_step(make: Callable[[], Case]) -> Step:
    """A step of training as a user's: nothing but the trainer's own."""
    config, training, catalog, interactions = make()
    torch.manual_seed(training.seed)
    trainer = Trainer(DGIModel(config), training, catalog, interactions, None, progress=False)
    trainer._start(resume=False)
    return endless_steps(trainer, "auto")


def run_beside_base(case: str, steps: int, results: Results) -> None:
    make, base = BESIDE_BASE[case], other_commit.name()
    with other_commit.process(__file__, case) as ask:
        times = interleaved({"ours": plain_step(make), base: lambda: ask("step")}, steps)
    config, training, *_ = make()
    shape = {
        "D": config.dim,
        "layers": f"{config.history_layers}+{config.decoder_layers}",
        "batch": training.batch_size,
    }
    for system, measured_times in times.items():
        results.add("training step with dropout", shape, system, measured_times)
    median = {system: 1e3 * statistics.median(values) for system, values in times.items()}
    ratio = median[base] / median["ours"]
    print(
        f"{case}, ms a step: ours {median['ours']:.1f}, {base} {median[base]:.1f}; {ratio:.2f} times as fast",
        flush=True,
    )


if __name__ == "__main__" and sys.argv[1:2] == ["--serve"]:
    one_step = plain_step(BESIDE_BASE[sys.argv[2]])
    other_commit.serve(lambda line: one_step())
elif __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="of demo, large, deep (default: all)")
    parser.add_argument("--steps", type=int, default=40, help="steps of each training (default 40)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    known = CASES | BESIDE_BASE
    if unknown := set(options.cases) - set(known):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    measured = Results()
    for chosen in options.cases or known:
        if chosen in CASES:
            run(chosen, options.steps, measured)
        if chosen in BESIDE_BASE and other_commit.is_given():
            run_beside_base(chosen, options.steps, measured)
    if options.json:
        measured.write(options.json)
        print(f"wrote {options.json}")
