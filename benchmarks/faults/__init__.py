"""What is lost when something breaks: ``python -m benchmarks.faults [--times 50] [--ray 20] [--only WORDS …]``.

A small corpus is scored undisturbed, then again and again while processes are killed (``processes.py``), storage fails
(``storage.py``), or what is read is damaged, changes or is odd (``inputs.py``). After each fault the run is repeated as
a user would, and its tables are compared with the undisturbed ones, row by row and bit by bit (``world.py``): rows that
are in neither table nor quarantine are *lost*, rows that are there twice, or in both, *doubled*, rows with other scores
*changed*. All three must be 0.
"""
