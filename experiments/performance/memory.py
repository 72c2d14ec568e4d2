"""Peak memory of a training step of each contestant of `benchmark training`, each alone in its own process.

On CUDA the peak is what PyTorch allocated; on a CPU the resident memory of the process, libraries included.
Run: python experiments/performance/memory.py [OVERRIDES of `benchmark training`] [json=memory.json]
"""

import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from statistics import median

from omegaconf import OmegaConf

from gpt2.analysis.tables import as_text
from gpt2.benchmarks.common import circumstances, headline, peak_bytes, reset_peak, write_json
from gpt2.benchmarks.contestants import Workload, contestants
from gpt2.cli.compose import compose
from gpt2.runtime.device import free_memory, keep_freed_memory

STEPS = 3


def measure(config, name):
    """Train one contestant for some steps in this process. Returns its peak memory and the seconds a step."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        workload = Workload(config, Path(folder), STEPS)
        contestant = next(contestant for contestant in contestants(workload) if contestant.name == name)
        if contestant.is_ours:
            keep_freed_memory()  # as train.py does
        contestant.prepare()
        workload.state = {}  # the memory of the initial weights does not count
        free_memory()
        reset_peak(workload.device)
        seconds = [contestant.time_steps() for _ in range(STEPS)]
        peak = peak_bytes(workload.device)
    return {"contestant": name, "peak_memory_bytes": peak, "alone_step_seconds": median(seconds[1:])}


def main():
    config = OmegaConf.to_object(compose("benchmark_training", sys.argv[1:]))
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(config, Path(folder), 1)
        names = [contestant.name for contestant in contestants(workload)]
        about = circumstances(workload.device)
    print(headline(about), flush=True)

    rows = []
    for name in names:
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(measure, config, name).result())
        except Exception as error:  # noqa: BLE001  # such as a killed process or an unsupported precision
            print(f"{name} was not measured: {error}", file=sys.stderr)
    cells = [[r["contestant"], f"{r['peak_memory_bytes'] / 1e6:,.0f}", f"{r['alone_step_seconds']:.2f}"] for r in rows]
    print(f"\n{as_text([['', 'peak MB', 's a step'], *cells])}")
    write_json(config.json, {"benchmark": "memory", "config": asdict(config), **about, "results": rows})


if __name__ == "__main__":
    main()
