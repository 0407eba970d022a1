"""The service: one FastAPI application over one store, and the queue that runs its studies.

    autoq serve --db autoq.db

It reads and writes the store alone. Models, torch and Optuna live in the processes that the queue starts.
"""
