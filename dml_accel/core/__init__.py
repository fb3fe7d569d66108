"""What every other package needs: the configuration, errors, files and keyed randomness.

In reading order:

    errors    every error that ends a command, with its exit code
    updates   the update schedules: what a step of each costs, and what it goes with
    config    the configuration: cohort, seed and six sections; every field is one flag
    files     write files whole or not at all; read untrusted files up to a limit
    locks     locks on files, and file systems that have none
    streams   standard streams that are closed, gone or full, or lack letters
    host      the surroundings of a process: folders for caches, C and OpenMP libraries
    rng       draws that depend on their key only; stratified choice
    tables    tables of results for terminals, Markdown and HTML
    versions  package versions, commit and command line; packages that some commands need
"""
