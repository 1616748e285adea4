"""How every picture of the project looks. Importing it sends them to files: a machine that trains has no screen."""

import matplotlib

matplotlib.use("Agg")

STYLE = {
    "figure.dpi": 160,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
