"""Reward functions in the shapes that trainers call: `trl`, `openrlhf`, `verl`, `slime`; `hacking` watches a run.

None of them imports its trainer. Each pins the revision that answers first, waits for a server that restarts as long
as its timeout allows, and never turns a failure into a number. How each is configured: docs/trainers.md.
"""
