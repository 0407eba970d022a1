"""Kinds of tasks, one file each: see `autoq.tasks`."""
