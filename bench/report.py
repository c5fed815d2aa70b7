"""Renders the tables and pictures of README.md and docs/ from bench/results/*.json, and from nothing else.

    python bench/report.py             write them
    python bench/report.py --check     fail if a table or a picture is not what the committed results make

A page says what it shows between markers, and everything between them is replaced:

    <!-- report:cpu-cosine op=cosine_cross_entropy N=4096 -->      the table of bench/results/cpu-cosine.json, with
    <!-- /report -->                                               only the rows of this op and shape
    <!-- picture:cpu-cosine op=cosine_cross_entropy N=4096 -->     the same as bars, light and dark; with over=D as
    <!-- /picture -->                                              milliseconds over D, all else equal
    <!-- kernels -->                                               a table that begins with ops: its columns of kernels
    <!-- /kernels -->                                              say what dgi_kernels.backend knows
    <!-- ops -->                                                  where the code of each op is
    <!-- /ops -->
    <!-- comparison:compare-movielens -->                          the tables of a comparison by "dgi compare"
    <!-- /comparison -->
    <!-- figure:compare-movielens kind=knob systems=dense,dgi -->    a picture of it, see comparison_pictures.py
    <!-- /figure -->
    <!-- tail:compare-movielens -->                                its table of head and tail over the popularity weight
    <!-- /tail -->
    <!-- side-by-side:compare-a,compare-b systems=dgi,dense -->  one measure of systems over several comparisons
    <!-- /side-by-side -->
    <!-- scale -->                                                 what each step costs by the size of a catalog
    <!-- /scale -->
    <!-- summary -->                                               one table over all ops: the rows of SUMMARY
    <!-- /summary -->

Figures of a CPU are ratios within one run, since its clock and its neighbours are no one else's; a GPU's have
milliseconds too.  Where there are no results the page says so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

import comparison_pictures
import svg
from curve import curve, curve_text
from dropin_tables import dropin_tables
from figure_texts import cell, heading, megabytes, significant, value_text
from op_table import op_table
from scale_table import scale_table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKER = re.compile(r"(<!-- (report|picture):(\S+)((?: [^=\s]+=\S+)*) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
KERNELS = re.compile(r"(?<=<!-- kernels -->\n).*?(?=<!-- /kernels -->)", re.DOTALL)
COMPARISON = re.compile(r"(<!-- comparison:(\S+) -->\n).*?(<!-- /comparison -->)", re.DOTALL)
FIGURE = re.compile(r"(<!-- figure:(\S+)((?: [^=\s]+=\S+)*) -->\n).*?(<!-- /figure -->)", re.DOTALL)
TAIL = re.compile(r"(<!-- tail:(\S+) -->\n).*?(<!-- /tail -->)", re.DOTALL)
SIDE_BY_SIDE = re.compile(r"(<!-- side-by-side:(\S+)((?: [^=\s]+=\S+)*) -->\n).*?(<!-- /side-by-side -->)", re.DOTALL)
DROPINS = re.compile(r"(<!-- dropins -->\n).*?(<!-- /dropins -->)", re.DOTALL)
SCALE = re.compile(r"(?<=<!-- scale -->\n).*?(?=<!-- /scale -->)", re.DOTALL)
SUMMARY_PLACE = re.compile(r"(?<=<!-- summary -->\n).*?(?=<!-- /summary -->)", re.DOTALL)
OPS = re.compile(r"(?<=<!-- ops -->\n).*?(?=<!-- /ops -->)", re.DOTALL)
COLUMNS = {"C++": ("native", "cpu"), "Triton": ("triton", "cuda"), "CUDA C++": ("native", "cuda")}
OURS = ("ours", "native", "fused", "constrained_generate", "auto")  # what benchmarks call it; the first there is
FLOOR = "floor"
WIDTH = 5.0  # inches of a picture, so that its letters can still be read where it is made as narrow as a phone
PLAIN = ("eager", "reference", "exponential_")  # the same op in plain PyTorch
# Ours, or less work.
NO_PEERS = ("filtered", "updated", "with bias", "generate, TrieLogitsProcessor", "generate, unconstrained")
# The rows of the summary, chosen to show the weakest cases too: results, what is kept of them, what is said of a case.
SUMMARY = (
    ("cpu-cosine", "op=cosine_cross_entropy N=4096 K=4096 D=64,768", "N K D logits"),
    ("cpu-quantize", "op=residual_quantize tau=0.5 D=64,768", "N D assignments"),
    ("cpu-gumbel", "op=gumbel_noise K=4096", "N K"),
    ("cpu-trie", "op=trie_build N=1000000", "N"),
    (
        "cpu-beam",
        "op=beam_search items=1000000 codes=2048 levels=3 batch=1,64 beams=10,50 spread=clustered",
        "items batch beams",
    ),
    (
        "cpu-beam",
        "op=rank_candidates items=1000000 codes=2048 levels=3 batch=8 beams=50 spread=clustered",
        "items batch beams",
    ),
    ("cpu-integrations", "op=constrained_generate model=t5 beams=20", "model batch beams"),
    ("cpu-train", "op=training step", "D batch"),
)


@dataclass
class Row:
    """One shape of one op: median seconds and peak bytes of each system that was measured in turns."""

    shape: dict[str, object]
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        """The name of our system, "" where it was not measured."""
        return next((name for name in OURS if name in self.seconds), "")

    def ratio(self, system: str) -> float | None:
        """How many times longer than ours; ours against the floor, where there is one."""
        of, to = (system, FLOOR) if system == self.ours else (system, self.ours)
        return self.seconds[of] / self.seconds[to] if of in self.seconds and to in self.seconds else None


@dataclass
class Run:
    """One file of results."""

    name: str
    document: dict

    @classmethod
    def load(cls, name: str) -> Run | None:
        path = RESULTS / f"{name}.json"
        return cls(name, json.loads(path.read_text())) if path.exists() else None

    @cached_property
    def gpu(self) -> str | None:
        return self.document["machine_info"].get("gpu")

    def rows(self, filters: dict[str, str]) -> dict[str, list[Row]]:
        """By op, in the order of the file; ``filters`` keep an op and values of its shape."""
        groups: dict[str, dict[str, Row]] = {}
        wanted = {key: value for key, value in filters.items() if key not in ("op", "over")}
        for benchmark in self.document["benchmarks"]:
            info, stats = benchmark["extra_info"], benchmark["stats"]
            if filters.get("op", info["op"]) != info["op"]:
                continue
            if any(str(info["shape"].get(key)) not in value.split(",") for key, value in wanted.items()):
                continue
            row = groups.setdefault(info["op"], {}).setdefault(benchmark["group"], Row(info["shape"]))
            row.seconds[info["system"]] = stats["median"]
            if info.get("peak_bytes") is not None and info["system"] != FLOOR:
                row.memory[info["system"]] = info["peak_bytes"]
        return {op: list(rows.values()) for op, rows in groups.items()}

    def place(self) -> str:
        """The machine, the date and the commit in short."""
        machine = self.document["machine_info"]
        return (
            f"{self.gpu or machine['cpu']}, {self.document['datetime'][:10]}, "
            f"commit `{str(self.document['commit_info']['id'])[:10]}`"
        )

    def source(self, constants: dict[str, object]) -> str:
        """Where and when these figures were taken, and how to take them again."""
        machine, commit = self.document["machine_info"], self.document["commit_info"]
        threads = constants.get("threads", machine["threads"])
        versions = (
            f"torch {machine['torch']}, "
            + (f"Triton {machine['triton']}, CUDA {machine['cuda']}, " if self.gpu else "")
            + f"Python {machine['python']}"
        )
        where = self.gpu or f"{machine['cpu']} ({machine['instructions']}), {threads} thread{'s' * (threads != 1)}"
        changed = " with changes" if commit.get("dirty") else ""
        return (
            f"{where}; {versions}; {self.document['datetime'][:10]}, commit `{str(commit['id'])[:10]}`{changed}: "
            f"`{self.document['command']}`"
        )


def systems(rows: Sequence[Row]) -> list[str]:
    """Ours first, then the others in the order of the file."""
    ours = dict.fromkeys(row.ours for row in rows if row.ours)
    others = dict.fromkeys(name for row in rows for name in row.seconds if name not in (*ours, FLOOR))
    return [*ours, *others]


def split_shape(rows: list[Row]) -> tuple[dict[str, object], list[str]]:
    """What all rows share, and the names of what varies."""
    names = list(dict.fromkeys(name for row in rows for name in row.shape))
    constants = {
        name: rows[0].shape[name]
        for name in names
        if all(row.shape.get(name, row) == rows[0].shape.get(name) for row in rows)
    }
    return constants, [name for name in names if name not in constants]


def table(run: Run, op: str, rows: list[Row]) -> str:
    """One op as a table: a row for each shape, ratios for each system, and their peak memory."""
    constants, varying = split_shape(rows)
    names = systems(rows)
    columns: list[tuple[str, list[str]]] = [
        (name, [value_text(row.shape.get(name, "")) for row in rows]) for name in varying
    ]
    if run.gpu:
        columns.append(("ours, ms", [cell(row.seconds.get(row.ours), lambda s: f"{1e3 * s:.4g}") for row in rows]))
    if not any(row.ours for row in rows):  # nobody to compare with
        columns += [
            (f"{name}, ms", [cell(row.seconds.get(name), lambda s: f"{1e3 * s:.3g}") for row in rows]) for name in names
        ]
    for name in names:
        ratios = [row.ratio(name) for row in rows]
        if any(ratio is not None for ratio in ratios):
            title = "**ours ÷ floor**" if name in OURS else f"{name} ÷ ours"
            columns.append((title, [cell(ratio, significant) for ratio in ratios]))
    for name in names:
        if any(name in row.memory for row in rows):
            title = f"MB: {'ours' if name in OURS else name}"
            columns.append((title, [cell(row.memory.get(name), megabytes) for row in rows]))
    if not varying:
        columns.insert(0, ("", ["" for _ in rows]))
    lines = [
        "| " + " | ".join(title for title, _ in columns) + " |",
        "|" + "|".join("---" if title in varying else "--:" for title, _ in columns) + "|",
        *("| " + " | ".join(values[i] for _, values in columns) + " |" for i in range(len(rows))),
    ]
    shape = ", ".join(f"{name} = {value_text(value)}" for name, value in constants.items())
    title = f"**`{op}`**{', ' + shape if shape else ''}"
    return "\n".join([title, "", *lines, "", f"<sub>{run.source(constants)}</sub>"])


def picture_name(name: str, filters: dict[str, str]) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "-", "-".join([name, *filters.values()])).strip("-")


def compared(run: Run, filters: dict[str, str]) -> list[tuple[str, Row]]:
    """What a picture shows: (op, row) of every shape with a time of ours."""
    return [(op, row) for op, rows in run.rows(filters).items() for row in rows if row.ours]


def alt_text(run: Run, filters: dict[str, str]) -> str:
    """The picture in words: what each system took, from its best shape to its worst."""
    shown = compared(run, filters)
    spans = []
    for name in [*systems([row for _, row in shown])[1:], FLOOR]:
        ratios = sorted(row.seconds[name] / row.seconds[row.ours] for _, row in shown if name in row.seconds)
        if not ratios:
            continue
        low, high = (significant(ratio) for ratio in (ratios[0], ratios[-1]))
        spans.append(f"{name} {low}" + (f" to {high}" if high != low else ""))
    by_op = {op: split_shape([row for of, row in shown if of == op])[0] for op, _ in shown}
    return f"Bar chart of time ÷ ours. {'; '.join(heading(*item) for item in by_op.items())}: {'; '.join(spans)}."


def bars(run: Run, filters: dict[str, str], palette: Sequence[str]) -> Figure:
    """A group of bars for each shape below a line that names it, each bar with its system and ratio at its end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    shown = compared(run, filters)
    by_op = {op: [row for of, row in shown if of == op] for op, _ in shown}
    split = {op: split_shape(rows) for op, rows in by_op.items()}
    names = [FLOOR, *systems([row for _, row in shown])]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(names)}
    ratios = [
        [(name, row.seconds[name] / row.seconds[row.ours]) for name in names if name in row.seconds] for _, row in shown
    ]
    longest = max(ratio for of_row in ratios for _, ratio in of_row)
    logarithmic = longest > 20
    title = "\n".join(
        textwrap.fill(heading(op, constants).replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"), 66)
        for op, (constants, _) in split.items()
    )
    lines = sum(map(len, ratios)) + 1.6 * len(ratios)  # a bar takes 1; the name of its group and a gap 1.6
    figure = Figure(figsize=(WIDTH, 0.19 * lines + 0.16 * title.count("\n") + 0.85), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    place, least, reach = 0.0, min(0.5, *(0.7 * ratio for of_row in ratios for _, ratio in of_row)), 0.0
    for (op, row), of_row in zip(shown, ratios, strict=True):
        label = ", ".join(f"{name} = {value_text(row.shape.get(name, ''))}" for name in split[op][1])
        axes.annotate(
            label if len(by_op) == 1 else f"{op}, {label}" if label else op,
            (0, place),
            xycoords=("axes fraction", "data"),
            va="center",
        )
        place += 1
        for name, ratio in of_row:
            axes.barh(place, ratio, height=0.86, color=colours[name], gid=f"bar-{place:.1f}")
            text = f"{name}  {significant(ratio)}"
            axes.annotate(text, (ratio, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
            # How far the axis must go for the text to end within it: a letter is about 0.075 inches wide.
            share = 1 - (0.12 + 0.075 * len(text)) / (WIDTH - 0.3)
            reach = max(reach, least * (ratio / least) ** (1 / share) if logarithmic else ratio / share)
            place += 1
        place += 0.6
    axes.set(ylim=(place - 0.8, -0.6), xlabel="time ÷ ours, shorter is faster" + ", logarithmic" * logarithmic)
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(least if logarithmic else 0, reach)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def lines_over(run: Run, filters: dict[str, str]) -> tuple[str, str, dict[str, list[tuple[float, float]]]]:
    """What a curve shows: its heading, what it goes over, and by system the points (value, seconds)."""
    over, (op, rows) = filters["over"], next(iter(run.rows(filters).items()))
    constants, varying = split_shape(rows)
    if varying != [over]:
        raise SystemExit(f"a picture over {over} must hold all else equal; {', '.join(varying)} vary in {run.name}")
    names = systems(rows)
    points = {name: [(row.shape[over], row.seconds[name]) for row in rows if name in row.seconds] for name in names}
    return heading(op, constants), over, points  # type: ignore[return-value]


class Picture(NamedTuple):
    """A picture that a page shows.

    Attributes:
        stem: of its files.
        alt: what it shows, in words.
        draw: draws it in these colours.
        salt: of the identifiers in its files.
    """

    stem: str
    alt: str
    draw: Callable[[Sequence[str]], Figure]
    salt: str


def chart(run: Run, filters: dict[str, str]) -> Picture:
    """The picture of :func:`bars`, or of lines over a part of the shape that ``over`` names."""
    if "over" in filters:
        lines = lines_over(run, filters)
        return Picture(picture_name(run.name, filters), curve_text(*lines), partial(curve, *lines), run.name)
    return Picture(picture_name(run.name, filters), alt_text(run, filters), partial(bars, run, filters), run.name)


def rendered(page: Path, text: str) -> tuple[str, list[Picture]]:
    """The page with everything between its markers rendered again, and the pictures that it shows."""
    shown: list[Picture] = []

    def show(picture: Picture) -> str:
        shown.append(picture)
        return svg.links(page, picture.stem, picture.alt)

    def replace(match: re.Match[str]) -> str:
        start, kind, name, options, end = match.groups()
        filters = parsed(options)
        run = Run.load(name)
        by_op = run.rows(filters) if run else {}
        if run is None or not by_op:
            return start + (f"\n{missing(name)}\n\n" if kind == "report" else "") + end
        if kind == "picture":
            return start + show(chart(run, filters)) + "\n" + end
        return start + "\n" + "\n\n".join(table(run, op, rows) for op, rows in by_op.items()) + "\n\n" + end

    text = SUMMARY_PLACE.sub(lambda match: summary(), MARKER.sub(replace, text))
    text = SCALE.sub(lambda match: f"\n{scale_table(RESULTS / 'cpu-scale.json')}\n\n", text)
    text = DROPINS.sub(lambda match: f"{match[1]}\n{dropin_tables(RESULTS)}\n\n{match[2]}", text)
    text = COMPARISON.sub(lambda match: f"{match[1]}\n{comparison(match[2])}\n\n{match[3]}", text)
    text = FIGURE.sub(lambda match: f"{match[1]}{show(figure(match[2], parsed(match[3])))}\n{match[4]}", text)
    text = TAIL.sub(lambda match: f"{match[1]}\n{tail(match[2])}\n\n{match[3]}", text)
    text = SIDE_BY_SIDE.sub(lambda m: f"{m[1]}\n{side_by_side(m[2].split(','), parsed(m[3]))}\n\n{m[4]}", text)
    text = OPS.sub(lambda match: op_table(available()), text)
    return KERNELS.sub(lambda match: kernels(match[0]), text), shown


def comparison(name: str) -> str:
    """The tables of ``dgi compare``, with the machine that they were made on."""
    from dgi.evaluation.comparison_report import data_markdown

    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "*Not measured yet, so nothing is claimed: the command above makes it.*"
    results = json.loads(path.read_text())
    machine = results["machine"]
    sections = [data_markdown(data, "####") for data in results["data"].values()]
    if len(sections) == 1:  # the page has its title
        sections = [sections[0].split("\n\n", 1)[1]]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    source = f"<sub>{machine['cpu']}, {threads}, torch {machine['torch']}: `bench/results/{name}.json`</sub>"
    return "\n\n".join([*sections, source])


def figure(name: str, options: dict[str, str]) -> Picture:
    """A picture of a comparison, see :mod:`comparison_pictures`; ``options`` are its kind and its systems."""
    kind = options["kind"]
    systems = comparison_pictures.load(RESULTS / f"{name}.json", options["systems"].split(","))
    return Picture(
        picture_name(name, options),
        comparison_pictures.words(name, systems, kind),
        partial(comparison_pictures.draw, systems, kind),
        name,
    )


def tail(name: str) -> str:
    """Head and tail of each data set of ``dgi compare``, over the weight of popularity."""
    from dgi.evaluation.comparison_report import tail_markdown

    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "*Not measured yet, so nothing is claimed.*"
    tables = [tail_markdown(data) for data in json.loads(path.read_text())["data"].values()]
    return "\n\n".join([*tables, f"<sub>`bench/results/{name}.json`</sub>"])


def side_by_side(names: list[str], options: dict[str, str]) -> str:
    """NDCG of systems in several comparisons, one column each."""
    from dgi.evaluation.comparison_report import ndcg_side_by_side

    missing = [name for name in names if not (RESULTS / f"{name}.json").is_file()]
    if missing:
        return f"*Not measured yet, so nothing is claimed: {', '.join(missing)}.*"
    results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    data = [part for of_file in results for part in of_file["data"].values()]
    sources = ", ".join(f"`bench/results/{name}.json`" for name in names)
    return f"{ndcg_side_by_side(data, options['systems'].split(','))}\n\n<sub>{sources}</sub>"


def summary() -> str:
    """All ops in one table: ours against the floor, plain PyTorch and the fastest peer, and where it was measured."""
    lines = [
        "| op | case | **ours ÷ floor** | PyTorch ÷ ours | fastest peer ÷ ours | peak MB: ours / PyTorch |",
        "|---|---|--:|--:|--:|--:|",
    ]
    places: dict[str, list[str]] = {}
    for name, filters, said in SUMMARY:
        run = Run.load(name)
        if run is None:
            continue
        for op, rows in run.rows(parsed(filters)).items():
            lines += [summary_row(op, row, said.split()) for row in rows]
            places.setdefault(run.place(), []).append(f"`{op}`")
    where = "; ".join(f"{', '.join(dict.fromkeys(ops))}: {place}" for place, ops in places.items())
    return "\n".join(["", *lines, "", f"<sub>{where}</sub>", "", ""])


def summary_row(op: str, row: Row, said: list[str]) -> str:
    plain = next((name for name in PLAIN if name in row.seconds), "")
    peers = [name for name in row.seconds if name not in (row.ours, plain, FLOOR, *NO_PEERS)]
    fastest = min(peers, key=row.seconds.__getitem__, default="")
    shape = ", ".join(f"{name} {value_text(row.shape[name])}" for name in said)
    memory = " / ".join(cell(row.memory.get(name), megabytes) for name in (row.ours, plain)) if row.memory else "–"
    peer = "torch.compile" if fastest == "compile" else fastest
    cells = [
        f"`{op}`",
        shape,
        cell(row.ratio(row.ours), significant),
        cell(row.ratio(plain), significant),
        f"{significant(row.seconds[fastest] / row.seconds[row.ours])} ({peer})" if peer else "–",
        memory,
    ]
    return "| " + " | ".join(cells) + " |"


def parsed(options: str) -> dict[str, str]:
    """``name=value`` pairs; a word without ``=`` belongs to the value before it."""
    return dict(re.findall(r"(\S+?)=(.*?)(?= \S+=|$)", options.strip()))


def missing(name: str) -> str:
    """What a page says in place of a table."""
    command = "bench/gpu.sh" if name.startswith("gpu-") else f"make bench-{name.removeprefix('cpu-')}"
    return f"*Not measured yet, so nothing is claimed: `{command}` makes `bench/results/{name}.json`.*"


def available() -> dict:
    from dgi_kernels.backend import KERNELS as AVAILABLE

    return AVAILABLE


def kernels(table: str) -> str:
    """The table with the columns of :data:`COLUMNS` filled in."""
    header, *lines = table.splitlines()
    titles = [cell.strip() for cell in header.split("|")]
    for i, line in enumerate(lines):
        cells = line.split("|")
        op = cells[1].strip().strip("`")
        for title, (backend, device) in COLUMNS.items() if op in available() else ():
            cells[titles.index(title)] = " ✓ " if device in available()[op].get(backend, {}) else "   "
        lines[i] = "|".join(cells)
    return "\n".join([header, *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is out of date")
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        before = page.read_text()
        after, shown = rendered(page, before)
        if after != before:
            stale.append(page)
            if not options.check:
                page.write_text(after)
        for picture in shown:
            if options.check:  # matplotlib's versions draw the same bars with other bytes: that they exist will do
                stale += [path for path in svg.files(picture.stem) if not path.exists()]
                continue
            for path, text in svg.render(picture.draw, picture.stem, picture.salt):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    for path in stale:
        print(f"{'out of date' if options.check else 'written'}: {path.relative_to(ROOT)}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
