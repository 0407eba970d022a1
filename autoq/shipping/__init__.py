"""Shipping: a picked trial becomes a checkpoint, and the checkpoint is held against what was promised.

`export` writes a folder: the files that the target's runtime loads, the assignment, a model card with
the frontier's picture, and `autoq.json`, the manifest. `verify` reads such a folder back, loads it in
the runtime and compares bytes, formats, outputs, quality and latency with what the study measured.
"""
