"""True error against products, one line a method, one panel a problem: draws what ``both_ends.py`` measured.

python benchmarks/both_ends.py --problems onoff_56 --k 1 --tol 1e-1 1e-2 1e-3 1e-4 1e-5 1e-6
python benchmarks/convergence.py both_ends.json [MORE.json ...] --out convergence.png
"""

import argparse
import json
import pathlib

import matplotlib.pyplot as plt

from fisherop.printing import COLOURS, MARKERS

TITLES = {
    "ResNet18 maxpool": "ResNet18 to maxpool, float32",
    "onoff_56": "On–Off, 56 × 56",
    "luminance_gain_56": "luminance gain, 56 × 56",
    "vgg16_features11_40": "VGG16 features.11, 40 × 40",
}
FLOOR = 1e-16  # of the axis; rows without an answer are left out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("convergence.png"))
    options = parser.parse_args()
    rows = [row for path in options.results for row in json.loads(path.read_text()) if row["bottom"] is not None]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    lines = list(dict.fromkeys(row["method"].split(",")[0] for row in rows))
    rows_of_axes = -(-len(problems) // 2)
    size = (7, 2.9 * rows_of_axes + 0.6)
    figure, axes = plt.subplots(rows_of_axes, 2, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for ax, problem in zip(axes.flat, problems, strict=False):
        for number, line in enumerate(lines):
            points = sorted(
                (row["products"], max(row["top_error"], row["bottom_error"], FLOOR))
                for row in rows
                if row["problem"] == problem and row["method"].split(",")[0] == line
            )
            if points:
                style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
                style |= {"linewidth": 2.5, "zorder": 3} if line == "auto" else {"linewidth": 1}
                label = "golub_kahan (auto)" if line == "auto" else line
                ax.loglog(*zip(*points, strict=True), markersize=5, label=label, **style)
        ax.set_title(TITLES.get(problem, problem))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("products (one J v and one Jᵀu)")
    for ax in axes.flat[len(problems) :]:
        ax.remove()
    figure.supylabel("true error of both ends / λ_max", fontsize="medium")
    handles = {text: h for ax in axes.flat for h, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
