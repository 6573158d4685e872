"""Which settings to choose: tasks x methods x settings x seeds, on two small models, with a table and plots.

settings.py says what a run is, grids.py which runs there are, tasks.py and methods.py what is trained, runs.py how,
records.py keeps the results, tables.py and plots.py show them, command.py is `python -m benchmarks sweep`.
"""
