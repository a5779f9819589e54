"""Programs of this repository run side by side, a core each; what they say goes to log files."""

import os
import sys
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from subprocess import STDOUT, CalledProcessError, run

from config import ROOT


def start(command, log):
    """Runs a program, [its file, *flags], on one core; what it says goes to the end of a file.
    Raises ValueError with its last words if it fails."""
    one_core = os.environ | {"OMP_NUM_THREADS": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        how = {"cwd": ROOT, "env": one_core, "stdout": file, "stderr": STDOUT, "check": True}
        try:
            run([sys.executable, *command], **how)
        except CalledProcessError as error:
            *_, last_words = ["", *log.read_text().splitlines()]
            raise ValueError(f"{log}: failed: {last_words}") from error


def side_by_side(tasks, jobs):
    """Calls each function with its arguments, [(function, *arguments)], jobs at a time. After one
    that fails no other starts; those beside it finish."""
    waiting, running = deque(tasks), set()
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.add(pool.submit(*waiting.popleft()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
