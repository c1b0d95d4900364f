"""What devices do to the outside: files, TAP interfaces, terminals, the kernel's randomness."""
