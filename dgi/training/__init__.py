"""Training: the loop, its checkpoints, and the processes of a distributed run."""
