"""The sigmoid loss in Triton: the kernel, its launches and those that are compiled ahead of time."""
