"""What Python users call, beside ``learn``: the commands as functions, and methods of their own.

In reading order:

    process  the process of a caller in Python: what a call changes is put back
    methods  divergences, targets and methods of one's own, registered by name
    trained  trained networks: load, evaluate, predict, export
    runs     a run, and a comparison of methods over seeds
"""
