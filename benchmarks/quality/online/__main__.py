"""Grad-Mimic's claims for training on noisy data, at small scale.

::

    python -m benchmarks.quality.online [--quick] [--packages FOLDER] [digits] [emoji] [clip]

digits: scikit-learn's digits with 40, 50 and 60 % of the labels wrong. Published (2501.06708): 20.7 % fewer steps to
the accuracy of training on everything, detection F1 about .97.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.quality.online import digits

if __name__ == "__main__":
    torch.set_num_threads(1)
    digits.main("--quick" in sys.argv[1:])
