"""Noisy Student on torch and timm. Runs alone: `python -m ml`, no server, no database.

The face (`config`, `recipes`, `errors`, `events`, `manifest`, `tasks`, `schedules`, `self_training`) is plain Python that
anyone may import; `pixels` is the ring shared with serving; everything else needs torch.
"""
