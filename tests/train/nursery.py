"""Runs trainings as forked children and kills them: a script, because one import serves all children.

python nursery.py SETTINGS.json SEED KILLS   kill -9 after random times, resume, until KILLS were dealt and a run ended

Prints one JSON line: the sha256 of the adapter file of the uninterrupted run and of the others, and what was done.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deltatune.train import TrainSettings, train
from deltatune.train.base import load_base


def fork(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException as error:  # the parent reads the exit code, the test the reason
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def digest(output: Path) -> str:
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


def settings_for(values: dict, output: Path, resume: bool) -> TrainSettings:
    return TrainSettings(**{**values, "output_dir": str(output), "resume_from_checkpoint": resume})


def start(values: dict, output: Path) -> int:
    return fork(lambda: train(settings_for(values, output, resume=True)))


def kill_at_random(values: dict, output: Path, seconds: float, seed: int, kills: int) -> dict:
    draw = random.Random(seed)
    dealt, resumed_at = 0, []
    for _ in range(kills * 10):
        child = start(values, output)
        if dealt < kills:
            time.sleep(draw.uniform(0.1, 1.1) * seconds)
            os.kill(child, signal.SIGKILL)
        code = wait(child)
        resumed_at.append(sorted(path.name for path in output.glob("checkpoint-*")))
        if code == 0:
            if dealt >= kills:
                return {"digest": digest(output), "kills": dealt, "left": resumed_at}
            shutil.rmtree(output)  # it was faster than the blow: once more
        elif code == -signal.SIGKILL:
            dealt += 1
        else:
            raise SystemExit(f"the child ended with {code}")
    raise SystemExit("no run came to its end")


def main() -> None:
    values = json.loads(Path(sys.argv[1]).read_text())
    root = Path(values.pop("output_dir"))
    load_base(settings_for(values, root, False))  # imports what the children need, once
    import accelerate  # noqa: F401

    begun = time.perf_counter()
    if wait(start(values, root / "whole")) != 0:
        raise SystemExit("the uninterrupted run failed")
    seconds = time.perf_counter() - begun
    told = kill_at_random(values, root / "killed", seconds, int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({"whole": digest(root / "whole"), "seconds": seconds, **told}))


if __name__ == "__main__":
    main()
