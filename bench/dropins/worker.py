"""Run the steps of one drop-in on one version of the code; write what they return, their times and their memory.

python bench/dropins/worker.py NAME OUTPUT ROUNDS [DATA]      in the root of the version
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
sys.path[0] = os.getcwd()  # their modules before ours of the same name
sys.path.append(str(BENCH))

import torch  # noqa: E402
from measure import peak_bytes, processor_seconds, seconds  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import dropins  # noqa: E402


def main(name: str, output: str, rounds: str, data: str = "") -> None:
    folder, figures = Path(output), {}
    clock = processor_seconds if torch.get_num_threads() == 1 else seconds  # of one thread no neighbour's time is seen
    for step, run in dropins.load(name).steps(Path(data) if data else None).items():
        outputs = {key: value.detach().contiguous().clone() for key, value in run().items()}
        save_file(outputs, folder / f"{step}.safetensors")
        memory = peak_bytes(run)
        figures[step] = {"seconds": [clock(run) for _ in range(int(rounds))], "peak_bytes": memory}
    (folder / "figures.json").write_text(json.dumps({"clock": clock.__name__, "steps": figures}))


if __name__ == "__main__":
    main(*sys.argv[1:])
