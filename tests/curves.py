"""Learning curves: the kNN accuracy of several runs by epoch, from their log.jsonl.

    python tests/curves.py                       (the logs in tests/results/shapes_curves/)
    python tests/curves.py runs/A runs/B --out curves.png

A run shows one point for each epoch that has a figure: train with --knn-every 1 for all of them."""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def log_of(path):
    """The entries of a run's folder, or of a log itself."""
    file = path / "log.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in file.read_text().splitlines()]


def main():
    from matplotlib.figure import Figure  # here alone, so that --help does without it

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    logs = sorted((RESULTS / "shapes_curves").glob("*.jsonl"))
    parser.add_argument("runs", type=Path, nargs="*", default=logs, help="folders, or log.jsonl")
    parser.add_argument("--untrained", type=float, default=49.8, help="its kNN in %%")
    parser.add_argument("--out", default=RESULTS / "pictures" / "curves.png", help="the picture")
    args = parser.parse_args()
    figure = Figure((8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for path in args.runs:
        points = [(e["epoch"], 100 * e["knn_top1"]) for e in log_of(path) if "knn_top1" in e]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=path.stem)
    axes.axhline(args.untrained, color="gray", linestyle=":", label="untrained")
    axes.set(xlabel="epoch", ylabel="kNN top-1 on test images, %")
    axes.grid(color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
