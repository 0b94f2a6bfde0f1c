"""Learning curves: the kNN accuracy of several runs by epoch, from their log.jsonl.

    python tests/curves.py                       (the runs in tests/results/shapes_cpu/)
    python tests/curves.py runs/A runs/B --out curves.png

A curve begins with the untrained encoder and has a point for each epoch that has a figure: train
with --knn-every 1 for all of them."""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main():
    from matplotlib.figure import Figure  # here alone, so that --help does without it

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    runs = sorted(path.parent for path in (RESULTS / "shapes_cpu").glob("*/log.jsonl"))
    parser.add_argument("runs", type=Path, nargs="*", default=runs, help="folders with a log.jsonl")
    parser.add_argument("--untrained", type=float, default=49.8, help="its kNN in %%")
    parser.add_argument("--out", default=RESULTS / "pictures" / "curves.png", help="the picture")
    args = parser.parse_args()
    figure = Figure((8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    for i, path in enumerate(args.runs):
        log = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
        points = [(e["epoch"], 100 * e["knn_top1"]) for e in log if "knn_top1" in e]
        epochs, figures = zip((0, args.untrained), *points, strict=True)
        style = {"marker": "os^v"[i % 4], "markersize": 5, "linestyle": ("-", "--")[i // 5 % 2]}
        axes.plot(epochs, figures, label=path.name, **style)
    axes.set(xlabel="epoch", ylabel="kNN top-1 on test images, %")
    axes.grid(color="0.9")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
