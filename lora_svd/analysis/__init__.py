"""Spectra, ranks and outliers of weights and features, and the dimension that a task needs; tables and figures."""
