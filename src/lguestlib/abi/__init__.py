"""What the kernel and the wire say: structures, constants, requests and thin calls.

One module per kernel header or protocol, under the kernel's own names.  Nothing
here knows of memory layout, policy or threads, and every C function is bound on
its first use, so that the declarations import anywhere.

Calls raise OSError with the errno, the call's name and what it was about, and
OverflowError for an address, a length or an offset that the kernel's type cannot
hold and ctypes would cut.
"""
