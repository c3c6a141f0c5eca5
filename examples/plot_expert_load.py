"""Plot how evenly training used the experts.

    python examples/plot_expert_load.py load.png "with the bias update=loads.pt" "without=loads-without.pt"

Each FILE is a `--load-output` of train_megatron.py: tokens of each expert, integers [iterations, layers, experts].
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import torch

WINDOW = 10  # iterations that are added up: one batch of a toy is too small to be even by chance


def main() -> None:
    """A panel a run: a thin line is one expert of one layer, the thick one the busiest expert, mean of the layers."""
    output, *runs = sys.argv[1:]
    figure, panels = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4.2), sharey=True, squeeze=False)
    endings = []
    for panel, run in zip(panels[0], runs, strict=True):
        title, _, file = run.rpartition("=")
        loads = torch.load(file).double()
        whole = len(loads) // WINDOW * WINDOW
        windows = loads[:whole].unflatten(0, (-1, WINDOW)).sum(1)
        relative = windows / windows.mean(-1, keepdim=True)
        busiest = relative.amax(-1).mean(-1)
        endings.append(f"{busiest[-1]:.2f} times an even share {title}")
        iterations = torch.arange(WINDOW, whole + 1, WINDOW)
        lines = panel.plot(iterations, relative.flatten(1), color="steelblue", linewidth=0.5, alpha=0.5)
        lines[0].set_label(f"each of {relative.shape[2]} experts in {relative.shape[1]} layers")
        panel.plot(iterations, busiest, color="black", linewidth=2, label="busiest expert, mean of layers")
        panel.axhline(1, color="firebrick", linewidth=1, linestyle="--", label="even share")
        panel.set(title=title, xlabel="training iteration", xlim=(0, whole))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(f"tokens of an expert over an even share\n(sums over {WINDOW} iterations)")
    panels[0][0].set_ylim(bottom=0)
    figure.suptitle("The busiest expert ends at " + ", ".join(endings), fontweight="bold")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
