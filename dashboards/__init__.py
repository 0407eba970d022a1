"""The dashboard: figures that page, notebook and report share, templates, and static files.

Figures are built here from records of the store, once, as Plotly figures with a table of the same numbers. Nothing
here knows of torch, of HTTP, or of a database.
"""
