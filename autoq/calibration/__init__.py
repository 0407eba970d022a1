"""Calibration: text in three disjoint parts, and statistics of the unquantized model on it."""
