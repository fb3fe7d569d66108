"""Comparisons of methods over seeds, and reports about finished runs.

In reading order:

    methods.py      named methods, presets, published results
    runs.py         finished runs below folders: read, and grouped by what can be compared
    statistics.py   means, intervals and paired differences over seeds; the record of a comparison
    tables.py       a comparison in tables and words: results.md
    plots.py        figures from numbers
    compare.py      every method over the same seeds: one run for each, one table for all
    probes.py       weight noise, entropy, calibration and disagreement of trained networks
    figures.py      the figures of a report: which numbers of which runs
    page.py         the report: one HTML page
"""
