"""Killed before any rename, a run that is resumed ends as one that was left alone.

SIGKILL leaves no time to clean up: half-written temporary files stay, a rename has happened or has
not. A process that has loaded torch forks a run, kills it, and forks the next."""

import contextlib
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from test_training import NARROW, TINY, SmallEncoder, assert_same_run, finish, start, store, toy

import common

pytestmark = pytest.mark.slow


def run_once(argv, out, rename=None):
    """The exit status of a run, resumed where there is one, in a process of its own that is killed
    before its n-th rename."""
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
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
    """Run argv whole, then once for each rename killed there, and to its end; print how many were
    killed, and what files they left."""
    common.resnet = SmallEncoder
    left, argv = set(), sys.argv[1:]
    assert run_once(argv, "whole") == 0
    for n in itertools.count(1):
        status = run_once(argv, "run", n)
        left |= {path.name for path in Path("run").glob("*")}
        assert run_once(argv, "run") == 0
        assert_same_run("run", "whole")
        shutil.rmtree("run")
        if status == 0:  # the run had fewer renames
            break
        assert status == -signal.SIGKILL
    print(json.dumps([n - 1, sorted(left)]))


@pytest.mark.parametrize("script", ["simclr", "byol", "corinfomax"])
def test_killed_at_every_rename(script, tmp_path):
    """With the target network, or the running covariance, that a method carries along. The driver
    is a process that has not computed anything: what has cannot be forked safely."""
    store(toy(), tmp_path / "toy.pt")
    argv = [script, "--dataset", "toy.pt", *TINY, *NARROW, "--save-every", "1", "--epochs", "2"]
    status, out, err = finish(start(__file__, *argv, cwd=tmp_path))
    shutil.rmtree(tmp_path)
    assert status == 0, err
    killed, left = json.loads(out.splitlines()[-1])
    # config, views; after each epoch checkpoint, encoder, milestone, log; once the one before
    assert killed == 2 + 2 * 4 + 1
    names = {"config.json", "views.png", "checkpoint.pt", "encoder.pt", "log.jsonl"}
    assert {f"{name}.tmp" for name in names} <= set(left)


if __name__ == "__main__":
    main()
