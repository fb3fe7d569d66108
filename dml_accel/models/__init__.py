"""Networks: their names, building, optimizers, and the folders of trained ones.

In reading order:

    stems        timm's ResNets with a stem for small images
    networks     networks for small images, registered with timm
    spec         --cohort, parsed: one specification per peer
    timm_config  config.json beside a network's weights, as timm writes it
    hub          folders on the Hugging Face Hub: downloaded, and pushed
    pretrained   trained weights to start from: of the hub, a peer's folder or a file
    rehearsal    what a network does with a few images, tried without a trace
    build        a network from its specification, or an error that names what would fit
    optim        the optimizer of a peer
    own_optim    the optimizer that a caller of learn makes
    schedules    the learning rate of a step
    model_card   README.md of a trained network
    peer_folder  the folder of a trained peer: one reader, one writer
    own_network  the same of a module of the caller's, which timm cannot build
"""
