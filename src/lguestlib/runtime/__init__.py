"""Threads and file descriptors: a thread per virtqueue, back-ends, machines, the launcher."""
