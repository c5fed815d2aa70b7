"""A data set of files small enough for tests: after items a, a + 1, … comes the next one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

ITEMS, ROWS = 30, 200
# Settings of a model and a training that take a second.
SETTINGS = {
    "dim": 16,
    "codebook_sizes": [8, 4],
    "attention_heads": 2,
    "history_layers": 1,
    "text_layers": 0,
    "decoder_layers": 1,
    "vocabulary_size": 256,
    "epochs": 2,
    "batch_size": 64,
    "warmup_steps": 2,
}


def write_data(folder: Path, random: np.random.Generator) -> Path:
    """``items.tsv`` and ``interactions.jsonl``; every second row has a query too, the first has nothing but one."""
    folder.mkdir()
    lines = [f"film-{row}\ttitle{row} genre{row % 5}" for row in range(ITEMS)]
    (folder / "items.tsv").write_text("\n".join(["id\ttext", *lines]) + "\n")
    rows = []
    for time in range(ROWS):
        first, length = int(random.integers(ITEMS)), int(random.integers(1, 5)) if time else 0
        item = (first + length) % ITEMS
        rows.append(
            {
                "history": [f"film-{(first + step) % ITEMS}" for step in range(length)],
                "query": "" if time % 2 else f"genre{item % 5}",
                "item_id": f"film-{item}",
                "timestamp": time,
            }
        )
    (folder / "interactions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_judgments(path: Path) -> Path:
    """Two judged queries, one with three grades."""
    rows = [("genre1", 1, 3), ("genre1", 6, 1), ("genre1", 2, 0), ("genre2", 2, 2), ("genre2", 9, 0)]
    path.write_text("query\titem_id\trating\n" + "".join(f"{q}\tfilm-{item}\t{r}\n" for q, item, r in rows))
    return path
