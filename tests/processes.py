# SPDX-License-Identifier: MIT
"""Two processes against one, in fp32. Run by hand; the test, in float64: slow/test_distributed.py.

    python tests/processes.py --json processes.json --flags="--optimizer sgd --lr 1e-5"

Each method trains two epochs on shapes by one process with two threads and by two with one each.
Given are the relative differences of the first epoch's loss and, at the end, of the encoder's
weights (the norm of the difference, of all weights together). With --rounding also by one process
with one thread, which differs by nothing but the order of sums: two processes should differ by
about as much. At a preset's rate rounding takes any two runs apart within an epoch; a small one
shows what the processes do.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from benchmark import METHODS, common

ROOT = Path(__file__).resolve().parent.parent
FIXED = "--dataset shapes --epochs 2 --precision fp32 --device cpu --knn-every 0".split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WAYS = {"one": ([], 2), "two": (TORCHRUN, 1), "rounding": ([], 1)}  # words before, threads


def train(way, name, flags, out):
    """(loss of the first epoch, the encoder's weights in one vector) of a run."""
    (before, threads), (script, *own) = WAYS[way], METHODS[name].split()
    words = [sys.executable, *before, ROOT / f"{script}.py", *FIXED, *own, *flags]
    how = {"env": os.environ | {"OMP_NUM_THREADS": str(threads)}, "text": True}
    done = subprocess.run([*map(str, words), "--out", out], capture_output=True, **how)
    said = [line for line in done.stderr.splitlines() if ": error: " in line]
    said = (said or done.stderr.splitlines() or [""])[0]
    common.check(done.returncode == 0, f"{name}, {way}: {said}")
    log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    encoder = common.load_file(Path(out, "encoder.pt"))["state_dict"]
    weights = [w for key, w in encoder.items() if key.endswith((".weight", ".bias"))]
    return log[0]["loss"], torch.cat([w.flatten().double() for w in weights])


def main():
    parser = common.Parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="some")
    parser.add_argument("--flags", type=shlex.split, default=[], help="for the methods' scripts")
    parser.add_argument("--rounding", action="store_true", help="one process with one thread, too")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    args.device = "cpu"
    others, rows, about = ["two"] + ["rounding"] * args.rounding, {}, common.describe(args)
    for name in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            runs = {x: train(x, name, args.flags, str(Path(folder, x))) for x in ["one", *others]}
        loss, weights = runs["one"]
        rows[name], text = {"loss": loss}, f"{name:13} loss {loss:8.4f}"
        for way in others:
            apart = abs(runs[way][0] / loss - 1)
            far = float((runs[way][1] - weights).norm() / weights.norm())
            rows[name] |= {f"loss_{way}": apart, f"weights_{way}": far}
            text += f"   {way}: loss {apart:.1e}, weights {far:.1e}"
        print(text, flush=True)
    if args.json:
        common.write_json({"methods": rows} | about, args.json)


if __name__ == "__main__":
    common.run(main)
