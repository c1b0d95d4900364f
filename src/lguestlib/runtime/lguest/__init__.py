"""lguest, the hypervisor of 32-bit Linux 2.6.23 to 3.19: its file, and a machine on it."""
