"""Noisy Student on torch and timm. Runs alone: `python -m ml`, no server, no database.

The face (`config`, `recipes`, `errors`, `events`, `manifest`, `tasks`, `schedules`, `self_training`) is plain Python that
anyone may import; `pixels` is the ring shared with serving; everything else needs torch.
"""

import os

# GNU OpenMP reads this when torch is imported. Threads that have no more of a training step to do wait for the next one by
# spinning; its default of some 5 ms takes a core from the loader after every step, this one a third of that.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
