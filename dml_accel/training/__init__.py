"""One run from its configuration to its folder, uninterrupted or resumed.

In reading order:

    choosing         the best weights of each peer by validation, and when to stop early
    rates            the learning rates of a step: by flags, or by the caller's schedule
    loop             the loop over steps, and evaluation
    optimizer_state  the state of any optimizer as tensors and JSON
    checkpoint       all state that a run carries: written, verified and read
    trackers         records for TensorBoard and other trackers
    status           status.json: written while a run runs, read when it may have been killed
    run_folder       the folder of a run: lock and records; how a saved one is read
    progress         expected cost, throughput, the progress bar
    setup            validate a run, choose a placement, put its cohort together
    planning         predict what a run costs on any number of processes, without training
    resume           what a run resumes from, and what is refused
    bad_images       images that a run cannot read: agreed on, and listed
    repeat           a run that is repeated: what this machine changes of it
    record           what a run writes: description, records, results and peers
    train            one run from top to bottom
    learn            the same for modules and tensors of your own, from Python
"""
