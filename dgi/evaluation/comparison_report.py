"""Tables and pictures of a comparison's results."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgi.evaluation.evaluate import K
from dgi.evaluation.names import DESCRIPTIONS
from dgi.pictures import COLOURS, attempt, dress, figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Json = Mapping[str, Any]
TEXTS = ("system", "what", "chosen")  # columns of words


def markdown(results: Json) -> str:
    """One section for each data set: how it was measured, quality with intervals, and geometry with cost."""
    return "\n\n".join(data_markdown(data) for data in results["data"].values()) + "\n"


def data_markdown(data: Json, heading: str = "##") -> str:
    """The section of one data set."""
    return "\n\n".join(
        [f"{heading} {data['data']}", _protocol(data), _quality(data), _cost(data)],
    )


def _protocol(data: Json) -> str:
    split = {
        "time": "split by time",
        "leave_one_out": "leave-one-out, the last item of each user is the test",
        "given": "split as given",
    }[data["split"]]
    seen = "left out of" if data["history_excluded"] else "kept in"
    which = (
        f"all {data['queries']:,}" if data["queries"] == data["test"] else f"{data['queries']:,} of {data['test']:,}"
    )
    # Before batches could be of sequences, items could share an ID.
    unique = ", and make semantic IDs unique" if "batches_of" in data else ""
    beams = f", and search with {_widths(data['num_beams'])} beams" if "num_beams" in data else ""
    half = " (`dgi_ids` half)" if "dgi_ids" in data["systems"] else ""
    minutes = f" (the dense system's in {data['minutes']:g} minutes)" if data["minutes"] else ""
    return (
        f"{data['items']:,} items, {data['train']:,} training, {data['validation']:,} validation and {which} test "
        f"requests, {split}; all items are ranked, items of the history are {seen} the rankings. Budget of every "
        f"trained system: {data['steps']:,} steps{minutes} of {data['training']['batch_size']} "
        f"{data.get('batches_of', 'interactions')}, {data['epochs']:.1f} epochs; generative systems spend "
        f"{data['encoder_share']:.0%} of it on the encoder that they start from, those in stages a "
        f"third{half}{unique}{beams}. Width "
        f"{data['model']['dim']}. In brackets: 95 % intervals, bootstrap over requests; Δ: paired, against "
        f"`{data['best_baseline']}`, the best baseline{_chosen_on(data)}{_over_two_stage(data)}."
    )


def _over_two_stage(data: Json) -> str:
    """What the column of differences from two-stage retrieval is; nothing where no system has one."""
    known = any("over_two_stage" in one for one in data["systems"].values())
    return ", and against two-stage retrieval with the same encoder" if known else ""


def _widths(num_beams: int | list[int]) -> str:
    """One number of beams, or those of each level."""
    return f"{num_beams:,}" if isinstance(num_beams, int) else "/".join(f"{width:,}" for width in num_beams)


def _chosen_on(data: Json) -> str:
    """Results of earlier versions have no validation, and a baseline that was best on test requests."""
    validation = data["systems"][data["best_baseline"]].get("validation", {})
    return "" if validation.get(f"ndcg@{K}") is None else " on validation requests"


def _quality(data: Json) -> str:
    systems = data["systems"]
    buckets = list(next(iter(systems.values()))["buckets"])
    recall = f"R@{K}"
    beside = ["Δ NDCG, two-stage"] if _over_two_stage(data) else []
    header = [
        "system",
        "seeds",
        recall,
        f"NDCG@{K}",
        "Δ NDCG",
        *beside,
        f"NDCG@{K} by seed",
        "on validation requests",
        *(f"{recall}, {bucket}" for bucket in buckets),
        "never",
    ]
    rows = []
    for name, of_system in systems.items():
        measures = of_system["measures"]
        difference, over = of_system["difference"], of_system.get("over_two_stage")
        rows.append(
            [
                f"`{name}`",
                str(len(of_system["seeds"])),
                _interval(measures[f"recall@{K}"]),
                _interval(measures[f"ndcg@{K}"]),
                "" if difference is None else _interval(difference[f"ndcg@{K}"], signed=True),
                *("" if over is None else _interval(over[f"ndcg@{K}"], signed=True) for _ in beside),
                " ".join(map(_number, measures[f"ndcg@{K}"]["seeds"], [4] * len(of_system["seeds"]))),
                _number(of_system.get("validation", {}).get(f"ndcg@{K}"), 4),
                *(_number(of_system["buckets"][bucket]) for bucket in buckets),
                f"{of_system['hubness']['never_returned']:.0%}",
            ]
        )
    return _table(header, rows)


def tail_markdown(data: Json) -> str:
    """Head and tail over the weight of popularity, of the systems that have been measured so."""
    header = ["system", "α", f"R@{K}", f"NDCG@{K}", "head: bucket 1", "middle: 2, 3", "tail: 4, 5, summed"]
    rows = []
    for name, of_system in data["systems"].items():
        for row in of_system.get("tail") or []:
            buckets = row["buckets"]
            middle = _sum(buckets, ("2", "3"))
            rows.append(
                [
                    f"`{name}`",
                    f"{row['popularity_weight']:.3g}",
                    _number(row[f"recall@{K}"], 4),
                    _number(row[f"ndcg@{K}"], 4),
                    _number(buckets.get("1")),
                    _number(None if middle is None else middle / 2),
                    _number(_sum(buckets, ("4", "5"))),
                ]
            )
    return _table(header, rows)


def ndcg_side_by_side(comparisons: Sequence[Json], names: Sequence[str]) -> str:
    """NDCG with its interval of the systems ``names``, a column for each data set; "–" where a system was not run."""
    header = ["system", "what", *(f"NDCG@{K}, {data['data']}: {data['steps']:,} steps" for data in comparisons)]
    rows = []
    for name in names:
        found = [data["systems"].get(name) for data in comparisons]
        seeds = [f" ({len(one['seeds'])} seeds)" if one and len(one["seeds"]) > 1 else "" for one in found]
        values = ["–" if one is None else _interval(one["measures"][f"ndcg@{K}"]) for one in found]
        rows.append([f"`{name}`", DESCRIPTIONS[name], *map("".join, zip(values, seeds, strict=True))])
    return _table(header, rows)


def _sum(values: Json, names: tuple[str, ...]) -> float | None:
    known = [values.get(name) for name in names]
    return None if None in known else sum(value for value in known if value is not None)


def _cost(data: Json) -> str:
    header = [
        "system",
        "what",
        "hubness",
        "IsoScore",
        "norm ~ clicks",
        f"NDCG@{K} by exact cosine of own vectors",
        "gradient norm: median, largest",
        f"hit rate at {K} on validation requests, over training",
        "chosen",
        "parameters",
        "s",
        "s, search",
    ]
    key = f"validation_hit_rate@{K}"
    rows = []
    for name, of_system in data["systems"].items():
        geometry = of_system["geometry"] or {}
        logged = [row for row in of_system["curve"] if "grad_norm" in row]
        # Of a generative system, while its decoder was trained: other systems share what came before.
        norms = sorted(row["grad_norm"] for row in [row for row in logged if "ntp" in row] or logged)
        chosen = {
            setting: "/".join(dict.fromkeys(f"{seed[setting]:g}" for seed in of_system["settings"]))
            for setting in of_system["settings"][0]
        }
        rows.append(
            [
                f"`{name}`",
                DESCRIPTIONS[name],
                f"{of_system['hubness']['skewness']:.1f}",
                _number(geometry.get("iso_score"), 2),
                _number(geometry.get("norm_popularity"), 2),
                _number(of_system.get("exact_cosine", {}).get(f"ndcg@{K}"), 4),
                f"{norms[len(norms) // 2]:.2g}, {norms[-1]:.2g}" if norms else "–",
                " ".join(_number(row[key]) for row in of_system["curve"] if key in row) or "–",
                ", ".join(f"{setting.replace('_', ' ')} {value}" for setting, value in chosen.items()) or "–",
                f"{of_system['parameters']:,}" if of_system["parameters"] else "–",
                f"{of_system['seconds']['fit']:,.0f}",
                f"{of_system['seconds']['search']:,.0f}",
            ]
        )
    return _table(*_without_empty(header, rows))


def _without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns that no system has a value in, but for the first two."""
    kept = [place for place in range(len(header)) if place < 2 or any(row[place] != "–" for row in rows)]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _interval(value: Json, signed: bool = False) -> str:
    sign = "+" if signed else ""
    texts = [_bare(f"{value[key]:{sign}.4f}") for key in ("mean", "low", "high")]
    return f"{texts[0]} [{texts[1]}, {texts[2]}]"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else _bare(f"{value:.{digits}f}")


def _bare(number: str) -> str:
    """Without the zero before the point."""
    return re.sub(r"^([+-]?)0\.", r"\1.", number)


def _table(header: list[str], rows: list[list[str]]) -> str:
    aligned = ["---" if name in TEXTS else "--:" for name in header]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, aligned, *rows])


def pictures(results: Json, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw each data set's ``NAME.png``: quality, popularity buckets, validation and gradient norm over training.

    Returns:
        The pictures that could be drawn.
    """
    drawn = []
    for name, data in results["data"].items():
        path = Path(folder) / f"{name}.png"
        if attempt(lambda data=data, path=path: comparison_picture(data, path), path):  # type: ignore[misc]
            drawn.append(path)
    return drawn


def comparison_picture(data: Json, png_path: str | os.PathLike[str]) -> None:
    """Four panels: NDCG with intervals, recall by bucket, and over the steps validation and gradient norm."""
    systems = data["systems"]
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(systems)}
    styles = {name: ("-", "--", ":", "-.")[place // len(COLOURS) % 4] for place, name in enumerate(systems)}
    picture = figure(figsize=(13, 9))
    ((quality, buckets), (validation, gradients)) = picture.subplots(2, 2)
    for place, (name, of_system) in enumerate(systems.items()):
        value = of_system["measures"][f"ndcg@{K}"]
        errors = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
        quality.errorbar(value["mean"], -place, xerr=errors, fmt="o", color=colours[name], capsize=3)
        line = {"color": colours[name], "linestyle": styles[name], "linewidth": 1.4}
        known = [(key, mean) for key, mean in of_system["buckets"].items() if mean is not None]
        buckets.plot(*zip(*known, strict=True), label=name, marker=".", **line)
        _curve(validation, of_system["curve"], f"validation_hit_rate@{K}", marker=".", **line)
        _curve(gradients, of_system["curve"], "grad_norm", **line)
    quality.set_yticks([-place for place in range(len(systems))], list(systems), fontsize=9)
    quality.grid(axis="x", color="0.9")
    dress(quality, f"NDCG@{K} on {data['data']}, 95 % intervals", "")
    dress(buckets, f"Recall@{K} by popularity of the target, head to tail", "")
    buckets.legend(frameon=False, fontsize=8, ncols=2)
    dress(validation, f"Hit rate at {K} on validation requests", "")
    dress(gradients, "Gradient norm", "")
    gradients.set_yscale("log")
    for panel in (validation, gradients):
        panel.set_xlabel("step")
    save(picture, png_path)


def _curve(panel: Axes, rows: list[Json], key: str, **line: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        panel.plot(*zip(*points, strict=True), **line)
