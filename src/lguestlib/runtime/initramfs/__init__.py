"""The first file system of a Linux guest: the host's static busybox and ``init.sh``, which starts it all.

`archive` makes it, `busybox` finds the program, `modules` the drivers that the
kernel does not have built in.
"""
