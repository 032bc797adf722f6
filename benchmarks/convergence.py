"""True error against products, one line a method, one panel a problem: draws what ``both_ends.py`` measured.

python benchmarks/both_ends.py --problems onoff_56 --k 1 --tol 1e-1 1e-2 1e-3 1e-4 1e-5 1e-6
python benchmarks/convergence.py both_ends.json [MORE.json ...] --out convergence.png
"""

import argparse
import json
import pathlib

import matplotlib.pyplot as plt

FLOOR = 1e-16  # of the axis; rows without an answer are left out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="+", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("convergence.png"))
    options = parser.parse_args()
    rows = [row for path in options.results for row in json.loads(path.read_text()) if row["bottom"] is not None]
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    lines = list(dict.fromkeys(row["method"].split(",")[0] for row in rows))
    figure, axes = plt.subplots(1, len(problems), figsize=(3.4 * len(problems), 3.6), sharey=True, squeeze=False)
    for ax, problem in zip(axes[0], problems, strict=True):
        for number, line in enumerate(lines):
            points = sorted(
                (row["products"], max(row["top_error"], row["bottom_error"], FLOOR))
                for row in rows
                if row["problem"] == problem and row["method"].split(",")[0] == line
            )
            if points:
                bold = {"color": "black", "linewidth": 2.5, "zorder": 3} if line == "auto" else {"color": f"C{number}"}
                label = "golub_kahan (auto)" if line == "auto" else line
                ax.loglog(*zip(*points, strict=True), marker="o", markersize=4, label=label, **bold)
        ax.set_title(problem, fontsize=10)
        ax.set_xlabel("products (one J v and one Jᵀu)")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("true error of both ends / λ_max")
    handles = {text: h for ax in axes[0] for h, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(options.out, dpi=150)


if __name__ == "__main__":
    main()
