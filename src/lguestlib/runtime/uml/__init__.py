"""User-mode Linux: a real kernel as a process, whose devices this process serves over vhost-user.

`kernel` finds it and its drivers, `machine` runs it, in a `process` that ends with
this one.
"""
