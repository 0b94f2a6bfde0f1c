"""Killed before any rename, a run that is resumed ends as one that was left alone. SIGKILL leaves
no time to clean up: it leaves the folder as it is then, with temporary files, and a rename that has
happened or has not."""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
from test_training import NARROW, TINY, assert_same_run, call, folder, small, succeed  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("script", ["simclr", "byol", "corinfomax"])
def test_killed_at_every_rename(script, small):  # noqa: F811
    """With the target network, or the running covariance, that a method carries along."""
    argv = ["--dataset", "toy.pt", *TINY, *NARROW, "--save-every", "1", "--epochs", "2", "--out"]
    killed, replace = [], os.replace

    def noted(*names):
        killed.append(shutil.copytree("whole", f"killed{len(killed)}"))
        return replace(*names)

    with mock.patch.object(os, "replace", noted):
        succeed(script, *argv, "whole")
    # config, views; after each epoch checkpoint, encoder, milestone, log; once the one before
    assert len(killed) == 2 + 2 * 4 + 1
    left = {path.name for path in Path().glob("killed*/*.tmp")}
    names = "config.json", "views.png", "checkpoint.pt", "encoder.pt", "log.jsonl"
    assert left >= {f"{name}.tmp" for name in names}
    for out in killed:
        assert call(script, *argv, out, "--resume")[0] == 0
        assert_same_run(out, "whole")
