"""Images of kernels and programs: understood, checked, and placed in guest memory.

`parse.parse` makes an `image.Image` of a file's bytes, `file.open_image` gives
those; `linux_boot.LinuxBoot` tells a Linux kernel what it needs to know.  No
byte is placed before everything has been checked (T23).
"""
