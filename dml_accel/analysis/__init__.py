"""Comparisons of methods over seeds, and reports about finished runs.

In reading order:

    published   published results on CIFAR-100
    methods     named methods, and presets
    stages      the method of two stages: what each trains, at equal compute
    chosen      which methods a comparison has, and which coincide
    runs        finished runs below some folders, in groups that can be compared
    passes      what training costs in forward passes
    statistics  means, intervals and paired differences over seeds
    speeds      what makes the times of runs differ besides their methods
    tables      a comparison as tables and text: results.md
    plots       figures from numbers
    planned     the runs of a comparison before they are made
    comparison  the folder of a comparison: its runs and their tables
    compare     train every method with the same seeds, and write one table of all
    probes      weight noise, entropy, calibration and disagreement of trained networks
    figures     the figures of a report
    page        a report of any runs as one self-contained HTML page
"""
