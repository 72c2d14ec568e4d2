"""Stand-ins for the commands of Slurm that submitit calls: sbatch, srun, scontrol requeue and sacct, on this machine.

They cannot show when a real Slurm preempts, which signals it sends, or who may requeue.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = "FAKE_SLURM"  # environment variable with the folder that holds the state of jobs
HOST = "node1"


def install(folder: Path) -> dict[str, str]:
    """Write the commands to a folder. Returns the environment variables with which they are found."""
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        command = shlex.join([sys.executable, str(Path(__file__).resolve()), name])
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", STATE: str(folder)}


def settings_of(script: str) -> dict[str, str | bool]:
    """The options for sbatch in the script of a job."""
    lines = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {key: value or True for key, _, value in (line.removeprefix("--").partition("=") for line in lines)}


def preempt(folder: Path, job: str, grace: float) -> None:
    """Send SIGTERM, wait, send SIGKILL and restart the job, as Slurm does with --requeue."""
    (folder / f"{job}.requeue").touch()
    task = int((folder / f"{job}.pid").read_text())
    os.kill(task, signal.SIGTERM)
    time.sleep(grace)
    os.kill(task, signal.SIGKILL)


def sbatch(script: str) -> None:
    state = Path(os.environ[STATE])
    settings = settings_of(Path(script).read_text())
    number = 100 + len(list(state.glob("*.sbatch")))
    (state / f"{number}.sbatch").write_text(Path(script).read_text())
    count = int(re.match(r"0-(\d+)", str(settings.get("array", "0-0")))[1]) + 1
    names = [f"{number}_{index}" for index in range(count)] if "array" in settings else [str(number)]
    for name in names:
        (state / f"{name}.state").write_text("RUNNING")
        command = [sys.executable, __file__, "job", script, name]
        subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print(f"Submitted batch job {number}")


def job(script: str, name: str) -> None:
    state = Path(os.environ[STATE])
    array, _, index = name.partition("_")
    here = {"SLURM_JOB_ID": str(int(array) + 1000 * bool(index) + int(index or 0)), "SLURM_NTASKS": "1"}
    here |= {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    here |= {"SLURM_ARRAY_JOB_ID": array, "SLURM_ARRAY_TASK_ID": index} if index else {}
    while True:
        code = subprocess.run(["bash", script], env={**os.environ, **here, "NAME": name}).returncode
        if not (state / f"{name}.requeue").exists():
            break
        (state / f"{name}.requeue").unlink()
    (state / f"{name}.state").write_text("FAILED" if code else "COMPLETED")


def srun(*arguments: str) -> None:
    """Run the command of a job, with its output in the given file."""
    rest, array, _, index = list(arguments), *os.environ["NAME"].partition("_")
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            name = rest.pop(0)
            for pattern, value in {"%A": array, "%a": index, "%j": array, "%t": "0"}.items():
                name = name.replace(pattern, value)
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if option == "--output" else 2)
    (Path(os.environ[STATE]) / f"{os.environ['NAME']}.pid").write_text(str(os.getpid()))
    os.execvp(rest[0], rest)


def scontrol(action: str, name: str) -> None:
    assert action == "requeue"
    (Path(os.environ[STATE]) / f"{name}.requeue").touch()


def sacct(*_: str) -> None:
    print("JobID|State|NodeList")
    for path in Path(os.environ[STATE]).glob("*.state"):
        print(f"{path.stem}|{path.read_text()}|{HOST}")


if __name__ == "__main__":
    {"sbatch": sbatch, "job": job, "srun": srun, "scontrol": scontrol, "sacct": sacct}[sys.argv[1]](*sys.argv[2:])
