"""Training on several processes: how they start, who trains what, what they exchange.

In reading order:

    environment  what launchers say in environment variables, checked
    children     processes that a command starts by itself
    launch       how this process was started; what cannot work is refused
    device       the device of this process, and the versions of what drives it
    liveness     which processes are alive, and how a run ends that has lost one
    accelerator  an accelerator of HF Accelerate that belongs to one run
    processes    the process group, and its small collectives
    batchnorm    batch norm whose statistics span several processes, or are exact in any layout
    costs        what an image costs a network: operations, memory, time
    compile      torch.compile: its settings, and what happens if it fails
    exchange     what processes of different peers send each other
    placement    which processes train which peer, and the collectives between them
    plan         the predicted cost of each placement, and the choice between them
    rules        what ``auto`` chooses for speed, by fixed rules
    plan_tables  a plan in tables and words, for one number of processes or for several
    wrap         a network made ready for training: on its device, compiled, in DDP
"""
