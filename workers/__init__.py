"""Workers on Ray: actors that hold the model and evaluate assignments.

Importing this package imports no Ray; `executor` and `session` do.
"""
