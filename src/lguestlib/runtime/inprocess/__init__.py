"""A machine without a hypervisor: the guest is Python in this process, on the same memory.

It works everywhere, and the devices cannot tell: their registers, rings, kicks
and interrupts are those of any other machine.
"""
