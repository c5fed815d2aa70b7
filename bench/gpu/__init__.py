"""What ``bench/gpu.sh`` runs on a machine with a GPU, and its rehearsal without one.

stages      what is run, in which order, how long it may take
run         runs stages, each in a process of its own, within limits; summary, archive
session     what a stage measures with: every figure is written as soon as it is there
device      the one place that touches the GPU's run time: clock, graphs, memory
rehearsal   a GPU that is not there: tensors that say they are on it and have no numbers, a clock that is a stub
ahead       compiles all Triton kernels that the stages will launch, in parallel
check       every kernel at its real tiles against float64
cosine, quantize, beam, ceilings, threads, sweep    figures
peers       other libraries, each of which may be missing or broken
"""
