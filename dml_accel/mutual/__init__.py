"""The method: what peers learn from each other, and one optimizer step of the cohort.

In reading order:

    divergences  what a peer minimises towards a teacher, as pure functions
    targets      what peers learn from their teachers, from the logits of all
    own          divergences and targets of the user's own: adapted, and checked once
    losses       the losses as pure functions
    gathering    logits of peers that are in different processes, for a loop of one's own
    reference    the same losses and steps as plain loops, for tests only
    metrics      metrics of a cohort as sums and counts
    links        --links, parsed: who learns from whom, with which weight
    pausing      which of two peers pauses in a step of the schedule switch
    teaching     the targets and losses of a run's peers
    averages     the average of a peer's weights over its steps
    snapshots    the weights of all peers at the last exchange
    buffers      the buffers of a network over a step: counted, kept, put back
    peer         a peer in training: network, optimizer, loss scaler, one update
    teachers     frozen peers, which teach and are not updated
    step         one optimizer step, by each update schedule
"""
