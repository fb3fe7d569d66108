"""What every other package needs: the configuration, errors, files and keyed randomness.

In reading order:

    errors       every error that ends a command, with its exit code
    updates      the update schedules: what a step of each costs, and what it goes with
    cohort       the words of --cohort: which peers they ask for
    flags        what a flag is: default, help, range; intervals; sections
    assignments  words that are key=value: --opt-args and --peer-opt
    source_code  a hash of functions and classes that users register
    lessons      the targets and divergences: their arguments, and what they go with
    method       the section of the configuration that says who learns what from whom
    config       the configuration: cohort, seed and six sections; every field is one flag
    recipes      --recipe: how the literature trains, by name
    files        write files whole or not at all; read untrusted files up to a limit
    config_file  --config: files of flags
    host         the surroundings of a process: folders for caches, C and OpenMP libraries
    settings     what flags, files and recipes say together
    locks        locks on files, and file systems that have none
    streams      standard streams that are closed, gone or full, or lack letters
    rng          draws that depend on their key only; stratified choice
    tables       tables of results for terminals, Markdown and HTML
    versions     package versions, commit and command line; packages that some commands need
"""
