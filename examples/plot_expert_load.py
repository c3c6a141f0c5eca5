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
    """A panel a run: each line is one expert's share of its layer's tokens over an even share, in one layer."""
    output, *runs = sys.argv[1:]
    figure, panels = plt.subplots(1, len(runs), figsize=(5 * len(runs), 4), sharey=True, squeeze=False)
    for panel, run in zip(panels[0], runs, strict=True):
        title, _, file = run.rpartition("=")
        loads = torch.load(file).double()
        whole = len(loads) // WINDOW * WINDOW
        windows = loads[:whole].unflatten(0, (-1, WINDOW)).sum(1)
        relative = windows / windows.mean(-1, keepdim=True)
        iterations = torch.arange(WINDOW, whole + 1, WINDOW)
        panel.plot(iterations, relative.flatten(1), linewidth=0.5)
        panel.plot(iterations, relative.amax(-1).mean(-1), color="black", label="largest, mean of layers")
        panel.set(title=f"{title}: ends at {relative[-1].amax(-1).mean():.2f}", xlabel="iteration")
        panel.legend()
    panels[0][0].set_ylabel("tokens of an expert / even share")
    figure.tight_layout()
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
