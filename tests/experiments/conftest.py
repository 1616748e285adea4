"""The experiments are scripts beside each other: their folder is where they find their neighbours."""

import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parents[2] / "configs" / "experiments"
sys.path.insert(0, str(EXPERIMENTS))
