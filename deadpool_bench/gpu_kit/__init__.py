"""What one borrowed GPU can prove, in steps of at most nine minutes: `scripts/gpu_kit.sh` runs them.

Each step appends what it sees to ``step-N.jsonl`` at once, checks it against a figure, and ends with one line, PASS or
FAIL. ``--dry`` runs the same step without a GPU (Gloo, the emulation of CUDA), so that the kit is known to work before
a machine is at hand; what a dry run says is never taken for a result. It needs a checkout of the repository.
"""
