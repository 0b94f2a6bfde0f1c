"""Killed at any moment, again and again, a run that is resumed ends as one that was left alone.

SIGKILL leaves no time to clean up: half-written temporary files stay, a rename has happened or has
not. A process that has loaded torch forks a run, kills it, and forks the next."""

import contextlib
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_training import NARROW, ROOT, TINY, SmallEncoder, assert_same_run, store, toy

import common

pytestmark = pytest.mark.slow
KILLS = 4


def run_once(argv, out, seconds=None, rename=None):
    """The exit status of a run, resumed where there is one, in a process of its own that is killed
    after some seconds, or before its n-th rename."""
    resume = ["--resume"] if Path(out).exists() else []
    pid = os.fork()
    if not pid:
        script, *sys.argv = argv[0], *argv, "--out", out, *resume
        calls, replace = itertools.count(1), os.replace

        def last_rename(*given):
            if next(calls) == rename:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(*given)

        os.replace = last_rename
        with open("printed.txt", "a") as printed, contextlib.redirect_stdout(printed):
            try:
                common.run(importlib.import_module(script).main)
                status = 0
            except SystemExit as stop:
                status = stop.code
        sys.stderr.flush()
        os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)  # at worst it has ended: nobody has waited for it yet
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    """Run argv whole, then KILLS times killed or, with "renames", once for each rename, and to its
    end; print how many were killed, and what files they left."""
    how, *argv = sys.argv[1:]
    common.resnet = SmallEncoder if how == "renames" else common.resnet
    begun, rng = time.monotonic(), random.Random(0)
    assert run_once(argv, "whole") == 0
    lasted, killed, left = time.monotonic() - begun, 0, set()
    for n in itertools.count(1) if how == "renames" else range(KILLS):
        seconds = rng.uniform(0, lasted / 2) if how == "times" else None
        status = run_once(argv, "run", seconds, n if how == "renames" else None)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        left |= {path.name for path in Path("run").glob("*")}
        if how == "renames":
            assert run_once(argv, "run") == 0
            assert_same_run("run", "whole")
            shutil.rmtree("run")
            if status == 0:  # the run had fewer renames
                break
    if how == "times":
        assert run_once(argv, "run") == 0
        assert_same_run("run", "whole")
    print(json.dumps([killed, sorted(left)]))


def kill(how, script, folder, *flags):
    """main, in a process that has not computed anything: what has cannot be forked safely."""
    store(toy(), folder / "toy.pt")
    argv = [script, "--dataset", "toy.pt", *TINY, *NARROW, "--save-every", "1", *flags]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    where = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    driver = subprocess.run([sys.executable, __file__, how, *argv], **where)
    shutil.rmtree(folder)
    assert driver.returncode == 0, driver.stderr
    return json.loads(driver.stdout.splitlines()[-1])


@pytest.mark.parametrize("script", ["byol", "corinfomax"])
def test_killed_at_any_moment(script, tmp_path):
    """With the target network, or the running covariance, that a method carries along."""
    killed, _ = kill("times", script, tmp_path, "--epochs", "6")
    assert killed >= KILLS // 2  # others had ended before: machines differ


def test_killed_at_every_rename(tmp_path):
    killed, left = kill("renames", "simclr", tmp_path, "--epochs", "2")
    # config, views; after each epoch checkpoint, encoder, milestone, log; once the one before
    assert killed == 2 + 2 * 4 + 1
    names = {"config.json", "views.png", "checkpoint.pt", "encoder.pt", "log.jsonl"}
    assert {f"{name}.tmp" for name in names} <= set(left)


if __name__ == "__main__":
    main()
